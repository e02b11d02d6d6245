//! Filling: a commit brought into a tier on request, with progress.

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::format::grants::Right;
use crate::format::ids::CommitId;
use crate::format::refs::Revision;
use crate::store::fetch::FillHandle;
use crate::store::tier::{CommitKey, Purpose, TierError};

use super::api::{FillInfo, FillRequest, UncacheInfo, UncacheRequest};
use super::daemon::{Daemon, blocking};
use super::error::NodeError;
use super::mounting::{Caller, record_of};

/// How often a waiting request looks for progress.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// No request waits longer.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// How many fills that ended are remembered.
const REMEMBERED_MAX: usize = 100;

/// A fill, running or ended.
#[derive(Debug, Clone)]
pub struct Fill {
    pub dataset: String,
    pub commit: CommitId,
    pub tier: String,
    /// Who asked for it.
    pub by: u32,
    /// None: nothing was to be filled.
    pub handle: Option<FillHandle>,
    /// The end: None while it runs.
    pub ended: Option<Result<(), String>>,
    pub begun: Instant,
}

impl Fill {
    fn info(&self, id: Uuid) -> FillInfo {
        let progress = self.handle.as_ref().map(FillHandle::progress).unwrap_or_default();
        FillInfo {
            id,
            dataset: self.dataset.clone(),
            commit: self.commit,
            tier: self.tier.clone(),
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
            packs_done: progress.packs_done,
            packs_total: progress.packs_total,
            finished: self.ended.is_some(),
            error: self.ended.clone().and_then(Result::err),
        }
    }
}

impl Daemon {
    /// Begins to bring a revision into a tier, and sets what is kept and for how long.
    pub async fn fill(&self, request: FillRequest, caller: Caller) -> Result<FillInfo, NodeError> {
        let revision = Revision::parse(&request.revision)?;
        for right in rights_for(&request) {
            self.permit(caller, &revision.dataset, right).await?;
        }
        let snapshot = self.catalog().await?.snapshot(&revision).await?;
        let name = match self.named_tier(request.tier.as_ref(), revision.dataset.as_str()) {
            Some(name) => name,
            None => self.choose_tier(&record_of(&snapshot).key).await?,
        };
        let opened = self.tier(&name).await?;
        let tier = opened.tier.clone().ok_or(NodeError::NoTier)?;
        let id = Uuid::new_v4();
        let mut fill = Fill {
            dataset: snapshot.dataset.as_str().to_owned(),
            commit: snapshot.commit,
            tier: name,
            by: caller.uid,
            handle: None,
            ended: None,
            begun: Instant::now(),
        };
        let record = record_of(&snapshot);
        let key = record.key;
        let (keep, ttl_ms) = (request.keep, request.ttl.map(|ttl| ttl.as_ms()));
        let dataset_ttl = self.dataset_ttl(&record.dataset);
        if request.only_settings {
            blocking("changing the record", move || set(&tier, &key, keep, ttl_ms)).await??;
            fill.ended = Some(Ok(()));
            let info = fill.info(id);
            self.remember(id, fill);
            return Ok(info);
        }
        let lease = blocking("writing the record", move || {
            let lease = tier.lease_for(&record, Purpose::Fill)?;
            if ttl_ms.is_none() && tier.own_ttl(&key)? == Some(0) {
                // It was to leave with its last user: it is wanted again.
                tier.set_ttl(&key, None)?;
            }
            if dataset_ttl.is_some() {
                tier.set_dataset_ttl(&key.lake, &record.dataset, dataset_ttl)?;
            }
            set(&tier, &key, keep, ttl_ms)?;
            Ok::<_, TierError>(lease)
        });
        let lease = lease.await??;
        let handle = opened.fetcher.fill(snapshot.placement.packs.clone());
        fill.handle = Some(handle.clone());
        let info = fill.info(id);
        self.remember(id, fill);
        let daemon = self.clone();
        tokio::spawn(async move {
            let ended = handle.wait().await.map(drop).map_err(|error| error.to_string());
            // The time to live starts when the lease ends.
            let released = blocking("releasing the lease", move || lease.release()).await;
            if let Ok(Err(error)) = released {
                tracing::warn!(%error, "the lease of a fill stays until it expires");
            }
            if let Some(fill) = daemon.inner.fills.lock().get_mut(&id) {
                fill.ended = Some(ended);
            }
        });
        Ok(info)
    }

    fn remember(&self, id: Uuid, fill: Fill) {
        let mut fills = self.inner.fills.lock();
        fills.insert(id, fill);
        while fills.values().filter(|fill| fill.ended.is_some()).count() > REMEMBERED_MAX {
            let oldest = fills.iter().filter(|(_, fill)| fill.ended.is_some()).min_by_key(|(_, fill)| fill.begun);
            let Some(oldest) = oldest.map(|(id, _)| *id) else {
                break;
            };
            fills.remove(&oldest);
        }
    }

    /// Gives how a fill does: when it changed, when it ended, or when the time is over.
    pub async fn fill_info(&self, id: Uuid, wait: Duration) -> Result<FillInfo, NodeError> {
        let look = || self.inner.fills.lock().get(&id).map(|fill| fill.info(id)).ok_or(NodeError::NoFill { id });
        let first = look()?;
        let deadline = Instant::now() + wait.min(WAIT_MAX);
        let mut last = first.clone();
        while last == first && !last.finished && Instant::now() < deadline {
            if self.inner.stop.is_cancelled() {
                break;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
            last = look()?;
        }
        Ok(last)
    }

    /// Removes a commit from a tier now.
    pub async fn uncache(&self, request: UncacheRequest, caller: Caller) -> Result<UncacheInfo, NodeError> {
        let revision = Revision::parse(&request.revision)?;
        self.permit(caller, &revision.dataset, Right::Uncache).await?;
        let catalog = self.catalog().await?;
        let key = CommitKey { lake: catalog.lake_id, commit: catalog.resolve(&revision).await? };
        let name = match self.named_tier(request.tier.as_ref(), revision.dataset.as_str()) {
            Some(name) => name,
            None => self.choose_tier(&key).await?,
        };
        let tier = self.tier(&name).await?.tier.ok_or(NodeError::NoTier)?;
        let freed_bytes = blocking("removing a commit from the tier", move || tier.uncache(&key)).await??;
        Ok(UncacheInfo { dataset: revision.dataset.to_string(), commit: key.commit, tier: name, freed_bytes })
    }

    /// Ends a fill; what has arrived stays.
    pub fn cancel_fill(&self, id: Uuid, caller: Caller) -> Result<FillInfo, NodeError> {
        let fill = self.inner.fills.lock().get(&id).cloned().ok_or(NodeError::NoFill { id })?;
        if !caller.is_master() && caller.uid != fill.by {
            return Err(NodeError::Denied { uid: caller.uid, what: "end another user's fill".to_owned() });
        }
        if let Some(handle) = &fill.handle {
            handle.cancel();
        }
        Ok(fill.info(id))
    }
}

/// Says what somebody has to be allowed to. Who may only take a commit away brings none in.
fn rights_for(request: &FillRequest) -> Vec<Right> {
    match (request.keep, request.only_settings) {
        (Some(false), true) => vec![Right::Uncache],
        (Some(false), false) => vec![Right::Uncache, Right::Cache],
        (None | Some(true), _) => vec![Right::Cache],
    }
}

fn set(
    tier: &crate::store::tier::Tier,
    key: &CommitKey,
    keep: Option<bool>,
    ttl_ms: Option<u64>,
) -> Result<(), TierError> {
    match keep {
        Some(true) => tier.keep(key)?,
        Some(false) => tier.unkeep(key)?,
        None => {}
    }
    if ttl_ms.is_some() {
        tier.set_ttl(key, ttl_ms)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_only_uncache_brings_nothing_in() {
        for (keep, only_settings, rights) in [
            (None, false, vec![Right::Cache]),
            (Some(true), true, vec![Right::Cache]),
            (Some(false), true, vec![Right::Uncache]),
            (Some(false), false, vec![Right::Uncache, Right::Cache]),
        ] {
            let request = FillRequest { keep, only_settings, ..FillRequest::default() };
            assert_eq!(rights_for(&request), rights, "{keep:?} {only_settings}");
        }
    }
}
