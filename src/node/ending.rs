//! A daemon that stops: what is being made is waited for, and what is mounted is given back, or left to the next one.
//!
//! Nothing is mounted any more when the process ends that nobody serves: whoever makes a mount says so first
//! ([`Daemon::begin_making`]) and enters it with [`Daemon::put`], which takes nothing from a daemon that stops.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::daemon::{Daemon, blocking};
use super::engine::Served;
use super::error::NodeError;
use super::mounting::{Live, Mounted, release, release_lease};
use crate::fs::keeper;

/// How long mounts that are being made may take to see that the daemon stops: they wait for nothing but the keeper.
const MAKING_TIMEOUT: Duration = Duration::from_secs(10);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Somebody makes a mount: as long as this lives, a daemon that stops waits.
#[derive(Debug)]
pub(super) struct Making(Daemon);

impl Drop for Making {
    fn drop(&mut self) {
        self.0.inner.makings.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Daemon {
    /// Says that a mount is going to be made; refused when the daemon stops.
    pub(super) fn begin_making(&self) -> Result<Making, NodeError> {
        // Counted before it is looked: who stops does it the other way round.
        self.inner.makings.fetch_add(1, Ordering::SeqCst);
        let making = Making(self.clone());
        if self.inner.stop.is_cancelled() { Err(NodeError::Stopping) } else { Ok(making) }
    }

    /// Enters what has become of a mount that was being made. Gives it back where it has no place any more: the
    /// daemon gives its mounts back, or somebody has unmounted it meanwhile.
    pub(super) fn put(&self, id: Uuid, now: Live) -> Option<Live> {
        let mut live = self.inner.live.lock();
        let is_ending = self.inner.stop.is_cancelled() && !self.leaves_mounts();
        match live.get_mut(&id) {
            Some(place @ Live::Mounting(_)) if !is_ending => {
                *place = now;
                None
            }
            _ => Some(now),
        }
    }

    /// Takes a mount away that [`Daemon::put`] has not taken. `keeps_row`: the next daemon makes it again.
    pub(super) async fn take_back(&self, live: Live, keeps_row: bool) {
        if let Err(error) = blocking("unmounting", move || unmount(live, keeps_row)).await {
            tracing::warn!(%error, "a mount stays that nobody serves");
        }
    }

    /// Unmounts everything, but leaves the table, so that the next daemon makes the mounts again.
    pub async fn unmount_all(&self) {
        let begun = Instant::now();
        while self.inner.makings.load(Ordering::SeqCst) > 0 && begun.elapsed() < MAKING_TIMEOUT {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        let all: Vec<Live> = self.inner.live.lock().drain().map(|(_, live)| live).collect();
        let keeps_rows = self.inner.table.is_some();
        for live in all {
            let _ = blocking("unmounting", move || unmount(live, keeps_rows)).await;
        }
        self.drop_left().await;
    }
}

/// Unmounts, lazily where it is in use. `keeps_row`: an image stays, for the next daemon.
fn unmount(live: Live, keeps_row: bool) {
    if let Live::Mounted(mounted) = &live {
        // The kernel needs no daemon, and the next one takes it up.
        if keeps_row && matches!(mounted.served, Served::Kernel(_)) {
            return release_lease(live);
        }
        unmount_one(mounted);
        // The kernel has taken over at this moment: its packs stay held for the next daemon.
        if keeps_row && keeper::shows_image(mounted.row.dir()) {
            return release_lease(live);
        }
    }
    release(Some(live));
}

fn unmount_one(mounted: &Mounted) {
    let dir = mounted.row.dir();
    if let Err(error) = mounted.served.unmount(false) {
        tracing::warn!(%error, dir = %dir.display(), "unmounting lazily");
        if let Err(error) = mounted.served.unmount(true) {
            tracing::warn!(%error, dir = %dir.display(), "it stays mounted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::{MountOptions, MountRow};
    use super::*;
    use crate::config::{self, Env, Overrides};
    use crate::format::ids::CommitId;

    async fn daemon(dir: &std::path::Path) -> Daemon {
        let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let set = [("state", path("state")), ("lake.url", path("lake"))];
        let flags: Overrides = set.map(|(name, value)| (name.to_owned(), value)).into_iter().collect();
        let vars = [("HOME".to_owned(), path("home"))].into_iter().collect();
        let env = Env { vars, cwd: dir.to_owned() };
        let loaded = config::load(None, &env, &flags).expect("is a configuration");
        Daemon::open_private(loaded.config, dir.join("keeper")).await.expect("opens")
    }

    fn row() -> MountRow {
        let options = serde_json::json!({
            "verify": "node", "prefetch": "all", "uid": 1, "gid": 1, "allow_other": false
        });
        let options: MountOptions = serde_json::from_value(options).expect("are options");
        MountRow {
            id: Uuid::new_v4(),
            dataset: "xray".to_owned(),
            revision: "xray".to_owned(),
            commit: CommitId([1; 32]),
            options,
            attachments: Vec::new(),
            image: None,
        }
    }

    fn failed(row: &MountRow) -> Live {
        Live::Failed { row: row.clone(), reason: "no matter".to_owned() }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_that_stops_waits_for_the_mounts_that_are_being_made_and_takes_no_more() {
        let dir = tempfile::tempdir().expect("a directory");
        let daemon = daemon(dir.path()).await;
        let making = daemon.begin_making().expect("it lives");
        daemon.stop();
        assert!(matches!(daemon.begin_making(), Err(NodeError::Stopping)));
        let (ending, begun) = (daemon.clone(), Instant::now());
        let ending = tokio::spawn(async move { ending.unmount_all().await });
        tokio::task::yield_now().await;
        let has_ended = ending.is_finished();
        // On a machine that stood still for so long the wait has ended, as it should.
        assert!(!has_ended || begun.elapsed() > MAKING_TIMEOUT, "somebody still makes a mount");
        drop(making);
        ending.await.expect("ends");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_unmounted_or_comes_too_late_is_given_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let daemon = daemon(dir.path()).await;
        let (wanted, unmounted, late) = (row(), row(), row());
        for row in [&wanted, &late] {
            daemon.inner.live.lock().insert(row.id, Live::Mounting(row.clone()));
        }
        assert!(daemon.put(wanted.id, failed(&wanted)).is_none());
        assert!(daemon.put(unmounted.id, failed(&unmounted)).is_some(), "nobody wants it any more");
        assert!(daemon.put(wanted.id, failed(&wanted)).is_some(), "it is entered once");
        daemon.stop();
        assert!(daemon.put(late.id, failed(&late)).is_some(), "nobody would serve it");
    }
}
