//! Refs by append-only logs, for stores without conditional writes.
//!
//! Each move puts one new entry under an id that nobody else uses, and names all entries that the
//! mover saw. The heads are the entries that no other names. Nothing is ever overwritten, so that a
//! store whose overwrites are only eventually consistent serves as well.
//!
//! Reading costs one listing and one read per head: ids grow with time and a new one names all
//! before it, so the newest entry is read first and covers the rest. Entries that are long
//! superseded are deleted by a later mover; who still lists one reads that it is gone, or does not
//! read it at all.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{Expect, Head, RefAt, RefError, Refs, SMALL_BYTES_MAX, is_expected, now_ms};
use crate::format::ids::CommitId;
use crate::format::refs::{REF_FORMAT, RefLogEntry};
use crate::store::lake::{LakeError, PutIf, get_all, list_all};

/// Entries that stay after a move; a mover that sees twice as many deletes the oldest.
const ENTRIES_KEPT: usize = 64;

/// A ref's log as far as it was read.
#[derive(Debug, Default)]
pub(super) struct Log {
    /// All ids, the oldest first.
    ids: Vec<String>,
    /// The entries that no other names, the oldest first.
    heads: Vec<(String, RefLogEntry)>,
}

impl Log {
    /// Gives the heads that are no deletions: where a deletion raced a move, the move stays.
    pub(super) fn heads(&self) -> Vec<Head> {
        let head = |(_, entry): &(String, RefLogEntry)| {
            let head = |commit| Head { commit, time_ms: entry.time_ms, by: entry.by.clone() };
            entry.commit.map(head)
        };
        self.heads.iter().filter_map(head).collect()
    }
}

fn log_prefix(at: &RefAt<'_>) -> String {
    format!("datasets/{}/log/{}/{}/", at.dataset, at.kind, at.name)
}

/// Makes an entry id: unique, in the order of time, and behind all that were seen whatever the
/// clock says.
pub(in crate::store::catalog) fn next_id(seen: &[String]) -> String {
    let newest = seen.iter().filter_map(|id| uuid::Uuid::parse_str(id).ok()).max();
    let newest_ms = newest.map_or(0, |id| id.as_u128() >> 80);
    let now = u64::try_from(now_ms()).unwrap_or(0);
    let time_ms = now.max(u64::try_from(newest_ms).unwrap_or(0).saturating_add(1));
    uuid::Builder::from_unix_timestamp_millis(time_ms, &rand::random()).into_uuid().to_string()
}

impl Refs {
    pub(super) async fn log_read(&self, at: &RefAt<'_>) -> Result<Log, RefError> {
        let prefix = log_prefix(at);
        let listed = list_all(&*self.lake, &prefix).await?;
        let ids = listed.iter().filter_map(|object| object.key.strip_prefix(&prefix));
        // A ref `a/b` has its entries below those of a ref `a`.
        let ids = ids.filter(|id| !id.contains('/')).map(str::to_owned).collect();
        self.log_read_entries(at, ids).await
    }

    /// Reads the entries that are not named by newer ones.
    pub(super) async fn log_read_entries(&self, at: &RefAt<'_>, mut ids: Vec<String>) -> Result<Log, RefError> {
        ids.sort_unstable();
        let prefix = log_prefix(at);
        let (mut covered, mut read) = (BTreeSet::new(), Vec::new());
        for id in ids.iter().rev() {
            if covered.contains(id) {
                continue;
            }
            let key = format!("{prefix}{id}");
            let bytes = match get_all(&*self.lake, &key, SMALL_BYTES_MAX).await {
                Err(LakeError::NotFound { .. }) => continue,
                bytes => bytes?,
            };
            let entry = RefLogEntry::decode(&bytes);
            let entry = entry.map_err(|source| RefError::Damaged { key, source })?;
            covered.extend(entry.supersedes.iter().cloned());
            read.push((id.clone(), entry));
        }
        let heads = read.into_iter().rev().filter(|(id, _)| !covered.contains(id)).collect();
        Ok(Log { ids, heads })
    }

    pub(super) async fn log_write(
        &self,
        at: &RefAt<'_>,
        to: Option<CommitId>,
        expect: &Expect,
    ) -> Result<Vec<Head>, RefError> {
        let log = self.log_read(at).await?;
        if !is_expected(&log.heads(), expect) {
            return Err(at.conflict(log.heads()));
        }
        let id = next_id(&log.ids);
        let entry =
            RefLogEntry { format: REF_FORMAT, commit: to, supersedes: log.ids, time_ms: now_ms(), by: self.by.clone() };
        // Repeating the same bytes under the same id after a lost answer changes nothing.
        let prefix = log_prefix(at);
        self.put(&format!("{prefix}{id}"), Bytes::from(entry.encode()), PutIf::Always).await?;
        self.prune(&prefix, &entry.supersedes).await;
        let mut after = self.log_read(at).await?;
        if !after.ids.contains(&id) {
            // A listing that lags behind: what we wrote is there nevertheless.
            after.ids.push(id.clone());
            after.heads.retain(|(id, _)| !entry.supersedes.contains(id));
            after.heads.push((id, entry));
        }
        Ok(after.heads())
    }

    /// Deletes the oldest entries, when there are many. What fails is left to the next mover.
    async fn prune(&self, prefix: &str, superseded: &[String]) {
        if superseded.len() < 2 * ENTRIES_KEPT {
            return;
        }
        let oldest = superseded.get(..superseded.len() - ENTRIES_KEPT).unwrap_or_default();
        for id in oldest {
            if let Err(error) = self.lake.delete(&format!("{prefix}{id}")).await {
                tracing::debug!(%error, "an old ref log entry stays");
                return;
            }
        }
    }
}
