//! Files of holes only: they have no place in any pack, and must still be what their digest says.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;
use tokio::time::timeout_at;

use crate::format::digest::ContentHasher;
use crate::format::ids::ContentId;

use super::engine::{Inner, bad_pack};
use super::types::{ContentRef, FetchError};

/// Files of holes whose check is remembered.
const REMEMBERED_MAX: usize = 4096;

/// What was found out about contents without a place.
#[derive(Debug)]
pub(super) struct Holes(Mutex<LruCache<(ContentId, u64), bool>>);

impl Default for Holes {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(NonZeroUsize::new(REMEMBERED_MAX).expect("a constant above 0"))))
    }
}

impl Inner {
    /// Says whether a content without a place is zeros; None: not known yet.
    pub(super) fn is_holes(&self, c: &ContentRef) -> Option<bool> {
        match c.content {
            // Nothing proves what an imported object was.
            ContentId::Pin(_) => Some(c.size == 0),
            ContentId::Digest(_) => self.holes.0.lock().get(&(c.content, c.size)).copied(),
        }
    }

    /// Finds it out: digests that many zeros. A huge one may take longer than a read; the next read
    /// finds the result.
    pub(super) async fn check_holes(self: &Arc<Self>, c: &ContentRef) -> Result<(), FetchError> {
        let known = match self.is_holes(c) {
            Some(known) => known,
            None => {
                let (inner, content, size) = (self.clone(), c.content, c.size);
                let work = tokio::task::spawn_blocking(move || {
                    let mut hasher = ContentHasher::new();
                    hasher.update_zeros(size);
                    let zeros = content == ContentId::Digest(hasher.finish().0);
                    inner.holes.0.lock().put((content, size), zeros);
                    zeros
                });
                match timeout_at(self.deadline(), work).await {
                    Ok(done) => done.map_err(|_| FetchError::Stopped)?,
                    Err(_) => return Err(self.late(c)),
                }
            }
        };
        match known {
            true => Ok(()),
            false => Err(bad_pack(c, "the placement gives it no place, but its bytes are not zeros")),
        }
    }
}
