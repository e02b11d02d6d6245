//! A fill of many packs that somebody asked for: `larder cache`.

use std::io;
use std::sync::Arc;

use futures::stream::{self, StreamExt};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::format::ids::PackId;
use crate::format::placement::PackUse;
use crate::store::lake::LakeError;

use super::engine::Inner;

/// Why one pack was not filled.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PackFillError {
    #[error("pack {pack}: the tier does not take it")]
    Tier {
        pack: PackId,
        #[source]
        source: Arc<io::Error>,
    },
    #[error("pack {pack}: not filled, because filling pauses: {why}")]
    Paused { pack: PackId, why: String },
    #[error("pack {pack}: the lake does not give {key}")]
    Lake {
        pack: PackId,
        key: String,
        #[source]
        source: Arc<LakeError>,
    },
    #[error(
        "pack {pack}: its bytes or its description in the lake are damaged; push the data again or restore the objects"
    )]
    Damaged { pack: PackId },
    #[error(
        "pack {pack}: imported objects gave other bytes than were recorded when they were first read; import them again"
    )]
    ProofConflict { pack: PackId },
    #[error("filling was cancelled")]
    Cancelled,
}

/// How far a fill is.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct FillProgress {
    /// Bytes of all packs of the fill.
    pub bytes_total: u64,
    /// Bytes that are in the tier or in its staging files by now.
    pub bytes_done: u64,
    pub packs_total: u64,
    /// Packs that are complete in the tier.
    pub packs_done: u64,
    /// Packs that were not filled because of an error.
    pub packs_failed: u64,
}

/// Why a fill did not end with all packs in the tier.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FillError {
    #[error("there is no tier to fill; name one with --tier or LARDER_TIER")]
    NoTier,
    #[error("filling was cancelled with {done} of {total} packs in the tier")]
    Cancelled { done: u64, total: u64 },
    #[error("{failed} of {total} packs could not be filled")]
    Failed {
        failed: u64,
        total: u64,
        #[source]
        first: PackFillError,
    },
}

#[derive(Debug, Default)]
struct JobState {
    progress: FillProgress,
    /// Packs that are being filled, with their lengths.
    active: Vec<PackUse>,
    first_error: Option<PackFillError>,
}

#[derive(Debug)]
struct Job {
    inner: Arc<Inner>,
    state: Mutex<JobState>,
    cancel: CancellationToken,
    ended: watch::Sender<bool>,
}

/// A running fill. Dropping the handle lets the fill go on; `cancel` ends it.
#[derive(Debug, Clone)]
pub struct FillHandle(Arc<Job>);

impl FillHandle {
    pub(super) fn start(inner: &Arc<Inner>, packs: Vec<PackUse>) -> Self {
        let progress = FillProgress {
            bytes_total: packs.iter().map(|pack| pack.len).sum(),
            packs_total: packs.len() as u64,
            ..FillProgress::default()
        };
        let job = Arc::new(Job {
            inner: inner.clone(),
            state: Mutex::new(JobState { progress, ..JobState::default() }),
            cancel: inner.stopped.child_token(),
            ended: watch::Sender::new(false),
        });
        let runner = job.clone();
        inner.rt.spawn(async move {
            tokio::select! {
                () = runner.run(packs) => {}
                () = runner.cancel.cancelled() => {}
            }
            runner.ended.send_replace(true);
        });
        Self(job)
    }

    /// Says how far the fill is.
    pub fn progress(&self) -> FillProgress {
        let (mut progress, active) = {
            let state = self.0.state.lock();
            (state.progress.clone(), state.active.clone())
        };
        for pack in active {
            if let Some(fill) = self.0.inner.packs.state(&pack.pack).filling() {
                progress.bytes_done += fill.bytes_done().min(pack.len);
            }
        }
        progress
    }

    /// Waits for the end; any number of callers may wait.
    pub async fn wait(&self) -> Result<FillProgress, FillError> {
        let mut ended = self.0.ended.subscribe();
        // The sender lives in the job, so this ends only with the value.
        let _ = ended.wait_for(|ended| *ended).await;
        let state = self.0.state.lock();
        let progress = state.progress.clone();
        let total = progress.packs_total;
        match &state.first_error {
            _ if self.0.inner.packs.tier().is_none() && total > 0 => Err(FillError::NoTier),
            _ if self.0.cancel.is_cancelled() && progress.packs_done < total => {
                Err(FillError::Cancelled { done: progress.packs_done, total })
            }
            Some(first) => Err(FillError::Failed { failed: progress.packs_failed, total, first: first.clone() }),
            None => Ok(progress),
        }
    }

    /// Ends the fill; what was written stays for the next one.
    pub fn cancel(&self) {
        self.0.cancel.cancel();
    }
}

impl Job {
    async fn run(self: &Arc<Self>, packs: Vec<PackUse>) {
        if self.inner.packs.tier().is_none() {
            return;
        }
        let at_once = self.inner.cfg.fill_packs_max.max(1);
        stream::iter(packs).for_each_concurrent(at_once, |pack| self.one(pack)).await;
    }

    async fn one(&self, pack: PackUse) {
        self.state.lock().active.push(pack);
        let result = self.inner.fill_pack(pack.pack).wait().await;
        let mut state = self.state.lock();
        state.active.retain(|active| active.pack != pack.pack);
        match result {
            Ok(()) => {
                state.progress.packs_done += 1;
                state.progress.bytes_done += pack.len;
            }
            Err(error) => {
                state.progress.packs_failed += 1;
                state.first_error.get_or_insert(error);
            }
        }
    }
}
