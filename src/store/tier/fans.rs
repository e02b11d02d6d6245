//! The 256 folders of objects, listed again only where names changed.
//!
//! What is published never changes, so a fan whose modification time is what it was has the same names
//! with the same bytes: one look instead of one for each file. A time is believed only once it is older
//! than the server's clock can blur: a change in the same tick as our look would not show.

use std::sync::Arc;

use crate::store::tier::Core;
use crate::store::tier::error::TierError;
use crate::store::tier::io::{Stat, TierIo};
use crate::store::tier::layout::{self, ObjectName, parse_object};

/// Coarser than the times of any file system that we know.
const TICK_MS: i64 = 2000;

/// What one fan held when it was listed.
#[derive(Debug, Default)]
pub(super) struct Fan {
    mtime_ns: i64,
    file_id: u64,
    pub objects: Vec<(ObjectName, Stat)>,
    pub strangers: Vec<String>,
}

impl<I: TierIo> Core<I> {
    /// Gives what a fan holds; `fresh`: every file is looked at, whatever is remembered.
    pub(super) fn fan(&self, fan: u8, now_ms: i64, fresh: bool) -> Result<Arc<Fan>, TierError> {
        let dir = format!("{}/{fan:02x}", layout::OBJECTS);
        // Before it is listed: what changes meanwhile has a later time.
        let Some(folder) = self.peek(&dir)? else {
            return Ok(Arc::default());
        };
        let same = |seen: &&Arc<Fan>| seen.mtime_ns == folder.mtime_ns && seen.file_id == folder.file_id;
        if !fresh && let Some(seen) = self.state.lock().listed.get(&fan).filter(same) {
            return Ok(Arc::clone(seen));
        }
        let mut found = Fan { mtime_ns: folder.mtime_ns, file_id: folder.file_id, ..Fan::default() };
        for listed in self.list(&dir)?.unwrap_or_default() {
            let path = format!("{dir}/{}", listed.name);
            let Some(name) = parse_object(&listed.name).filter(|name| name.path() == path) else {
                found.strangers.push(path);
                continue;
            };
            if let Some(stat) = self.peek(&path)? {
                found.objects.push((name, stat));
            }
        }
        let found = Arc::new(found);
        let mut state = self.state.lock();
        if folder.mtime_ms() + TICK_MS < now_ms {
            state.listed.insert(fan, Arc::clone(&found));
        } else {
            state.listed.remove(&fan);
        }
        Ok(found)
    }
}
