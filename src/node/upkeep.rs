//! What the daemon does by itself: leases renewed, tiers swept, use markers, failed mounts tried again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::store::tier::Tier;

use super::daemon::{Daemon, META_DISK_BYTES_MAX, blocking};
use super::mounting::Live;

/// How often a use marker in the lake is refreshed.
const USE_PERIOD: Duration = Duration::from_secs(24 * 3600);
/// How often the metadata on disk is brought within its limit.
const META_SWEEP_PERIOD: Duration = Duration::from_secs(3600);

impl Daemon {
    /// Runs until the daemon stops.
    pub async fn upkeep(self) {
        let period = self.config().daemon.steward_period.0;
        let stop = self.stopping();
        let mut noted = Instant::now();
        let mut swept: Option<Instant> = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(period) => {}
            }
            self.forget_gone();
            self.remount().await;
            for opened in self.open_tiers() {
                if let Some(tier) = opened.tier {
                    look_after(tier, opened.name).await;
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

/// Renews leases and does the steward's work of one tier. A tier that hangs delays its own turn only
/// up to the next period, because the others' turns are separate tasks of the blocking pool.
async fn look_after(tier: Arc<Tier>, name: String) {
    let label = name.clone();
    let looked = blocking("looking after a tier", move || {
        let renewed = tier.heartbeat();
        for error in &renewed.failed {
            tracing::warn!(%error, tier = label, "a lease could not be renewed");
        }
        tier.steward_step(&tier.policy())
    });
    match looked.await {
        Ok(Ok(report)) => tracing::debug!(tier = name, ?report, "looked after"),
        Ok(Err(error)) => tracing::warn!(%error, tier = name, "the steward could not do its work"),
        Err(_) => {}
    }
}
