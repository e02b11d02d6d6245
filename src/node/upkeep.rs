//! What the daemon does by itself: leases renewed, tiers swept, use markers, failed mounts tried again.
//!
//! Each tier has its own turn, which is not begun again while it lasts: one that hangs keeps nobody else
//! waiting.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::store::kv::Kv;
use crate::store::tier::{Reason, StewardReport, Tier, TierError, Verdict};

use super::daemon::{Daemon, META_DISK_BYTES_MAX, OpenTier, blocking};
use super::mounting::Live;

/// How often a use marker in the lake is refreshed.
const USE_PERIOD: Duration = Duration::from_secs(24 * 3600);
/// How often the metadata on disk is brought within its limit.
const META_SWEEP_PERIOD: Duration = Duration::from_secs(3600);
/// How often what this node verified is compared with what the tier still holds.
const VERIFIED_SWEEP_PERIOD: Duration = Duration::from_secs(3600);

/// Tiers that are looked after at this moment.
type Busy = Arc<Mutex<HashSet<String>>>;

/// What is still to be done at the next turn of a tier.
#[derive(Debug, Clone, Copy)]
struct Extras {
    /// Leases of processes of this node that were killed.
    forget_ended: bool,
    /// The table of what was verified.
    sweep_verified: bool,
}

impl Daemon {
    /// Runs until the daemon stops.
    pub async fn upkeep(self) {
        let period = self.config().daemon.steward_period.0;
        let stop = self.stopping();
        let mut noted = Instant::now();
        let mut swept: Option<Instant> = None;
        let mut verified: Option<Instant> = None;
        let busy = Busy::default();
        let mut cleaned = HashSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(period) => {}
                () = self.inner.room_wanted.notified() => {}
            }
            self.forget_gone();
            self.look_after_keeper().await;
            self.remount().await;
            let sweep_verified = verified.is_none_or(|at| at.elapsed() >= VERIFIED_SWEEP_PERIOD);
            if sweep_verified {
                verified = Some(Instant::now());
            }
            self.open_made_tiers(&busy);
            let has_all_mounts = self.inner.table.is_some() && !self.is_mounting();
            for opened in self.open_tiers() {
                let name = opened.name.clone();
                let forget_ended = has_all_mounts && !cleaned.contains(&name);
                if self.begin_turn(opened, Extras { forget_ended, sweep_verified }, &busy) && forget_ended {
                    cleaned.insert(name);
                }
            }
            if noted.elapsed() >= USE_PERIOD {
                noted = Instant::now();
                self.note_all_uses();
            }
            if swept.is_none_or(|at| at.elapsed() >= META_SWEEP_PERIOD) {
                swept = Some(Instant::now());
                self.sweep_meta().await;
            }
        }
    }

    /// Looks after a tier in a task of its own. False: the turn before this one still goes on.
    fn begin_turn(&self, opened: OpenTier, extras: Extras, busy: &Busy) -> bool {
        let Some(tier) = opened.tier else {
            return true;
        };
        if !busy.lock().insert(opened.name.clone()) {
            tracing::debug!(tier = opened.name, "is still being looked after");
            return false;
        }
        let (busy, kv, daemon) = (Arc::clone(busy), self.inner.kv.clone(), self.clone());
        tokio::spawn(async move {
            if extras.forget_ended {
                daemon.drop_orphaned_holds(Arc::clone(&tier)).await;
            }
            daemon.retry_leases(&opened.name, &tier).await;
            let report = look_after(tier, opened.name.clone(), extras, kv).await;
            if report.is_some_and(|report| daemon.count_evictions(&opened.name, &report)) {
                opened.fetcher.resume_filling();
            }
            let fetcher = opened.fetcher;
            if blocking("closing idle files", move || fetcher.close_idle_files()).await.is_err() {
                tracing::warn!(tier = opened.name, "idle files could not be closed");
            }
            busy.lock().remove(&opened.name);
        });
        true
    }

    /// Counts what left, by reason. Says whether there is more room now.
    fn count_evictions(&self, tier: &str, report: &StewardReport) -> bool {
        let mut counts = self.inner.evictions.lock();
        for decision in report.decisions.iter().filter(|decision| decision.verdict == Verdict::Leaves) {
            let reason = match decision.reason {
                Reason::AgedOut { .. } => "aged_out",
                Reason::LeastRecentlyUsed { .. } => "room",
                Reason::Uncached => "uncached",
                Reason::Leftover => "leftover",
                _ => "other",
            };
            *counts.entry((tier.to_owned(), reason)).or_default() += 1;
        }
        report.evicted > 0
    }

    /// Opens the tiers that are there and that nobody has used yet: they are looked after as well. In the
    /// background, because one may hang.
    fn open_made_tiers(&self, busy: &Busy) {
        if self.inner.table.is_none() {
            return;
        }
        let open: HashSet<String> = self.open_tiers().into_iter().map(|opened| opened.name).collect();
        for (name, section) in self.config().tier.iter().filter(|(name, _)| !open.contains(*name)) {
            if !busy.lock().insert(name.clone()) {
                continue;
            }
            let (daemon, busy, name, path) = (self.clone(), Arc::clone(busy), name.clone(), section.path.clone());
            tokio::spawn(async move {
                let is_made = blocking("looking for a tier", move || Tier::is_tier(&path)).await;
                if matches!(is_made, Ok(true))
                    && let Err(error) = daemon.tier(&name).await
                {
                    tracing::warn!(%error, tier = name, "the tier cannot be looked after");
                }
                busy.lock().remove(&name);
            });
        }
    }

    fn is_mounting(&self) -> bool {
        self.inner.live.lock().values().any(|live| matches!(live, Live::Mounting(_)))
    }

    fn note_all_uses(&self) {
        let mut commits: Vec<_> = self
            .inner
            .live
            .lock()
            .values()
            .filter_map(|live| match live {
                Live::Mounted(mounted) => Some(mounted.snapshot.commit),
                _ => None,
            })
            .collect();
        commits.sort();
        commits.dedup();
        for commit in commits {
            self.note_use(commit);
        }
    }

    async fn sweep_meta(&self) {
        let Some(catalog) = self.inner.catalog.get() else {
            return;
        };
        let meta = catalog.meta.clone();
        if let Ok(Err(error)) = blocking("sweeping metadata", move || meta.sweep_disk(META_DISK_BYTES_MAX)).await {
            tracing::warn!(%error, "the metadata on disk could not be swept");
        }
    }
}

/// Renews leases and does the steward's work of one tier.
async fn look_after(tier: Arc<Tier>, name: String, extras: Extras, kv: Kv) -> Option<StewardReport> {
    let label = name.clone();
    let looked = blocking("looking after a tier", move || {
        let renewed = tier.heartbeat();
        for error in &renewed.failed {
            tracing::warn!(%error, tier = label, "a lease could not be renewed");
        }
        if extras.forget_ended {
            forget_ended(&tier, &label);
        }
        let report = tier.steward_step(&tier.policy());
        if extras.sweep_verified {
            sweep_verified(&tier, &label, &kv);
        }
        report
    });
    match looked.await {
        Ok(Ok(report)) => {
            tell(&name, &report);
            Some(report)
        }
        Ok(Err(error)) => {
            tracing::warn!(%error, tier = name, "the steward could not do its work");
            None
        }
        Err(_) => None,
    }
}

fn forget_ended(tier: &Tier, name: &str) {
    match tier.forget_ended() {
        Ok(0) => {}
        Ok(leases) => tracing::info!(tier = name, leases, "leases of processes that were killed are taken away"),
        Err(error) => tracing::info!(%error, tier = name, "leases of processes that were killed expire by themselves"),
    }
}

/// Forgets what was verified of objects that are gone.
fn sweep_verified(tier: &Tier, name: &str, kv: &Kv) {
    let swept = tier.published().map(|there| kv.sweep_verified(&tier.id(), |pack| there.contains(pack)));
    match swept {
        Ok(Ok(left)) => tracing::debug!(tier = name, left, "verified objects are remembered"),
        Ok(Err(error)) => tracing::warn!(%error, tier = name, "the table of verified objects could not be swept"),
        Err(error) => note_error(name, &error),
    }
}

fn note_error(name: &str, error: &TierError) {
    tracing::info!(%error, tier = name, "what the tier holds could not be listed");
}

/// Logs what a sweep did, each eviction with its reason.
fn tell(name: &str, report: &StewardReport) {
    for decision in report.decisions.iter().filter(|decision| decision.verdict == Verdict::Leaves) {
        let (commit, dataset) = (decision.key.commit.short(), &decision.dataset);
        tracing::info!(tier = name, dataset, commit, reason = decision.reason.text(), "a commit left");
    }
    for failed in &report.failed {
        tracing::warn!(tier = name, failed, "a step of the sweep failed; the next one tries again");
    }
    if let Some(deleted_bytes) = report.freed_nothing_bytes {
        tracing::error!(
            tier = name,
            deleted_bytes,
            "deleting freed nothing on the file system (snapshots?): evictions for room are suspended for an hour"
        );
    }
    tracing::debug!(tier = name, ?report, "looked after");
}
