//! What processes that died have left mounted: taken over where the table has a row for it, else taken away.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use uuid::Uuid;

use crate::fs::keeper::{self, KeeperError, MountId};
use crate::fs::mount;

use super::api::UmountRequest;
use super::daemon::{Daemon, blocking};
use super::error::NodeError;
use super::mounting::Live;
use super::table::MountRow;

/// A private state without a keeper that is younger may be starting.
const PRIVATE_AGE_MIN: Duration = Duration::from_secs(600);
/// When a mount that could not be taken over is tried again for the first time.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// How long a mount may take to say whether it is dead.
const DEAD_TIMEOUT: Duration = Duration::from_secs(5);

impl Daemon {
    /// Finds what the daemon before this one, and mounts in the foreground, have left in this state
    /// directory. What is in the table is noted, to be taken over; the rest is taken away.
    pub async fn find_left(&self) -> Result<(), NodeError> {
        self.clean_images();
        self.tell_of_strays();
        let rows: Vec<MountRow> = match &self.inner.table {
            Some(table) => table.lock().rows().to_vec(),
            None => Vec::new(),
        };
        if let Some(keeper) = self.find_keeper().await? {
            let left = blocking("looking for mounts", move || sort_left(&keeper, &rows)).await??;
            *self.inner.left.lock() = left;
        }
        let private = self.inner.private_dir.clone();
        blocking("looking for stale mounts", move || {
            for entry in std::fs::read_dir(private).into_iter().flatten().flatten() {
                clean_private(&entry.path());
            }
        })
        .await
    }

    /// Tries soon again, and then less and less often, where a mount could not be taken over: its readers wait.
    pub(super) fn retry_left_soon(&self) {
        let is_waiting = |daemon: &Self| !daemon.inner.left.lock().is_empty();
        if !is_waiting(self) || self.inner.retries_left.swap(true, Ordering::AcqRel) {
            return;
        }
        let (daemon, stop) = (self.clone(), self.stopping());
        tokio::spawn(async move {
            let mut wait = RETRY_FIRST;
            while is_waiting(&daemon) && !stop.is_cancelled() {
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = tokio::time::sleep(wait) => daemon.remount_missing().await,
                }
                wait = (wait * 2).min(daemon.config().daemon.steward_period.0.max(RETRY_FIRST));
            }
            daemon.inner.retries_left.store(false, Ordering::Release);
        });
    }

    /// Says whether a mount waits to be taken over for this row.
    pub(super) fn is_left(&self, id: &Uuid) -> bool {
        self.inner.left.lock().contains_key(id)
    }

    /// Takes away what stands where a row could not be mounted: a mount that nobody serves.
    pub(super) async fn take_away(&self, id: &Uuid, request: UmountRequest) -> Result<(), NodeError> {
        let dir = request.dir.clone();
        let is_there = blocking("looking at the mount", move || keeper::is_ours(&dir).unwrap_or(false)).await?;
        if is_there {
            let force = request.force || !self.is_left(id);
            let keeper = self.keeper().await?;
            blocking("unmounting", move || keeper.unmount(&request.dir, force)).await??;
        }
        let left = self.inner.left.lock().remove(id);
        if let (Some(left), false) = (left, is_there) {
            // Nowhere to be seen, but the keeper has it: who has something open there would wait for ever.
            let keeper = self.keeper().await?;
            blocking("letting go of a mount", move || keeper.forget(left)).await??;
        }
        Ok(())
    }

    /// Unmounts a row that could not be mounted. Where that fails, the row has failed as before.
    pub(super) async fn umount_failed(
        &self,
        id: Uuid,
        request: UmountRequest,
        why: Option<String>,
    ) -> Result<(), NodeError> {
        let Some(row) = self.inner.live.lock().get(&id).map(|live| live.row().clone()) else {
            return Err(NodeError::NotMounted { dir: request.dir });
        };
        // An image first: it is not taken away by force where that is not asked for.
        let mut gone = self.unmount_left(&row, request.force).await;
        if gone.is_ok() {
            gone = self.take_away(&id, request).await;
        }
        match gone {
            Ok(()) => self.release_hold_later(row),
            Err(_) => drop(self.put(id, Live::Failed { row, reason: why.unwrap_or_default() })),
        }
        gone
    }

    /// Takes away what was not taken over until the daemon stops: nobody will serve it.
    pub(super) async fn drop_left(&self) {
        let left: Vec<MountId> = self.inner.left.lock().drain().map(|(_, id)| id).collect();
        let Some(keeper) = self.inner.keeper.lock().await.clone().filter(|_| !left.is_empty()) else {
            return;
        };
        let dropped = blocking("taking away what was left", move || {
            for kept in keeper.list()?.into_iter().filter(|kept| left.contains(&kept.id)) {
                tracing::info!(dir = %kept.dir.display(), "taking away a mount that nobody serves");
                mount::drop_mount(&keeper, &kept.dir, kept.id);
            }
            Ok::<_, KeeperError>(())
        });
        if let Ok(Err(error)) = dropped.await {
            tracing::warn!(%error, "mounts of the daemon before stay");
        }
    }
}

/// Gives the mounts that have a row, and takes away the others: what is open there could only wait for ever.
fn sort_left(keeper: &keeper::Client, rows: &[MountRow]) -> Result<HashMap<Uuid, MountId>, KeeperError> {
    let (mut left, mut taken) = (HashMap::new(), HashSet::new());
    let mut nobodys = Vec::new();
    // The newest first: it covers the others.
    for kept in keeper.list()?.into_iter().rev() {
        let noted: Option<MountRow> = serde_json::from_str(&kept.note).ok();
        let row = noted.and_then(|noted| rows.iter().find(|row| row.id == noted.id && row.commit == noted.commit));
        match row {
            Some(row)
                if !kept.detached
                    && !keeper::shows_image(&kept.dir)
                    && row.dir() == kept.dir
                    && !left.contains_key(&row.id) =>
            {
                left.insert(row.id, kept.id);
                taken.insert(kept.dir);
            }
            _ => nobodys.push(kept),
        }
    }
    for kept in nobodys {
        // What stands at its directory may be another mount by now.
        if taken.contains(&kept.dir) {
            let_go(keeper, &kept);
        } else {
            take_away(keeper, &kept);
        }
    }
    Ok(left)
}

fn let_go(keeper: &keeper::Client, kept: &keeper::KeptMount) {
    tracing::info!(dir = %kept.dir.display(), "letting go of a mount that nobody serves");
    if let Err(error) = keeper.forget(kept.id) {
        tracing::warn!(%error, dir = %kept.dir.display(), "the keeper still has it");
    }
}

fn take_away(keeper: &keeper::Client, kept: &keeper::KeptMount) {
    // Its directory may show an image by now, which needs nobody.
    if kept.detached || keeper::shows_image(&kept.dir) {
        return let_go(keeper, kept);
    }
    tracing::info!(dir = %kept.dir.display(), "taking away a mount that nobody serves");
    if let Err(error) = keeper.unmount(&kept.dir, true) {
        tracing::warn!(%error, dir = %kept.dir.display(), "it stays");
    }
}

/// Takes a mount away that answers nobody any more: its keeper died together with its daemon.
pub(super) fn clear_dead(keeper: &keeper::Client, dir: &Path) {
    if !keeper::is_ours(dir).unwrap_or(false) {
        return;
    }
    let (tell, told) = std::sync::mpsc::channel();
    let asked = dir.to_owned();
    // In a thread of its own, because a mount that somebody else keeps may be late for ever.
    let asking = std::thread::Builder::new().name("is-it-dead".to_owned());
    let spawned = asking.spawn(move || tell.send(keeper::is_dead(&asked)));
    if spawned.is_err() || !told.recv_timeout(DEAD_TIMEOUT).unwrap_or(false) {
        return;
    }
    tracing::info!(dir = %dir.display(), "taking away a dead mount");
    if let Err(error) = keeper.unmount(dir, true) {
        tracing::warn!(%error, dir = %dir.display(), "it stays");
    }
}

/// Unmounts what nobody serves. Gives how many are left.
fn unmount_dead(keeper: &keeper::Client, is_dead: impl Fn(&keeper::KeptMount) -> bool) -> Result<usize, KeeperError> {
    let (dead, lives): (Vec<_>, Vec<_>) = keeper.list()?.into_iter().partition(is_dead);
    for kept in &dead {
        take_away(keeper, kept);
    }
    Ok(lives.len())
}

/// Cleans up after a `mount --foreground` that was killed; leaves one that lives alone.
fn clean_private(dir: &Path) {
    let lives = |pid: i32| Path::new(&format!("/proc/{pid}")).exists();
    let keeper = match keeper::Client::connect(dir) {
        Ok(keeper) => Some(keeper),
        Err(error) if error.is_absent() => None,
        // It lives, and is busy or of another version.
        Err(_) => return,
    };
    let Some(keeper) = keeper else {
        // Young ones may be starting.
        let age = std::fs::metadata(dir).and_then(|meta| meta.modified()).map(|at| at.elapsed());
        if matches!(age, Ok(Ok(age)) if age > PRIVATE_AGE_MIN) {
            let _ = std::fs::remove_dir_all(dir);
        }
        return;
    };
    let left = unmount_dead(&keeper, |kept| !lives(kept.server_pid));
    if matches!(left, Ok(0)) && keeper.stop().is_ok() {
        let _ = std::fs::remove_dir_all(dir);
    }
}
