//! Refs by conditional writes: one object per ref, compared by its ETag and swapped.
//!
//! A deleted ref keeps its object, with no commit in it: a store deletes without conditions, so a
//! deletion could take a move with it that came between.

use bytes::Bytes;

use super::{Expect, Head, RefAt, RefError, Refs, SMALL_BYTES_MAX, TRIES_MAX, is_expected, now_ms};
use crate::format::ids::CommitId;
use crate::format::refs::{REF_FORMAT, RefValue};
use crate::store::lake::{LakeError, PutIf, get_with_etag};

/// What lies under a ref's key.
pub(super) struct Stored {
    value: Option<RefValue>,
    etag: Option<String>,
}

impl Stored {
    pub(super) fn heads(&self) -> Vec<Head> {
        let head = self.value.as_ref().and_then(|value| {
            let head = |commit| Head { commit, time_ms: value.time_ms, by: value.by.clone() };
            value.commit.map(head)
        });
        head.into_iter().collect()
    }
}

fn ref_key(at: &RefAt<'_>) -> String {
    format!("datasets/{}/refs/{}/{}", at.dataset, at.kind, at.name)
}

impl Refs {
    pub(super) async fn cas_read(&self, at: &RefAt<'_>) -> Result<Stored, RefError> {
        let key = ref_key(at);
        match get_with_etag(&*self.lake, &key, SMALL_BYTES_MAX).await {
            Err(LakeError::NotFound { .. }) => Ok(Stored { value: None, etag: None }),
            Err(error) => Err(error.into()),
            Ok((bytes, etag)) => {
                let value = RefValue::decode(&bytes);
                let value = value.map_err(|source| RefError::Damaged { key, source })?;
                Ok(Stored { value: Some(value), etag: Some(etag) })
            }
        }
    }

    pub(super) async fn cas_write(
        &self,
        at: &RefAt<'_>,
        to: Option<CommitId>,
        expect: &Expect,
    ) -> Result<Vec<Head>, RefError> {
        for _ in 0..TRIES_MAX {
            let stored = self.cas_read(at).await?;
            if !is_expected(&stored.heads(), expect) {
                return Err(at.conflict(stored.heads()));
            }
            let value = RefValue { format: REF_FORMAT, commit: to, time_ms: now_ms(), by: self.by.clone() };
            let when = stored.etag.map_or(PutIf::Absent, PutIf::Match);
            let body = Bytes::from(value.encode());
            match self.put(&ref_key(at), body, when).await {
                Ok(_) => {
                    return Ok(Stored { value: Some(value), etag: None }.heads());
                }
                Err(LakeError::Precondition { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            // Somebody moved it - or we did, and the answer was lost. Else the next round tells.
            let now = self.cas_read(at).await?;
            if now.value.as_ref() == Some(&value) {
                return Ok(now.heads());
            }
        }
        Err(at.busy())
    }
}
