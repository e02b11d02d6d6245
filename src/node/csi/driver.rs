//! What the driver has: its settings, its books, the daemon, the API, and one lock for each target and each mount.
//!
//! Lock order: a target's, then a mount's. Nobody holds two of a kind.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;
use uuid::Uuid;

use super::Settings;
use super::books::Books;
use super::error::CsiError;
use super::kube::Kube;
use crate::fs::keeper::{self, Shown};
use crate::node::api::{MountInfo, NodeInfo, UnbindRequest};
use crate::node::client::NodeClient;

/// How often the driver looks at what it waits for.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// One lock for each name, for as long as somebody wants it.
#[derive(Debug, Default)]
struct Locks(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Locks {
    fn of(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut all = self.0.lock();
        // Those that nobody has any more.
        all.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(all.entry(name.to_owned()).or_default())
    }
}

/// The driver of a node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Driver {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub settings: Settings,
    pub books: Books,
    pub daemon: NodeClient,
    pub kube: Option<Kube>,
    targets: Locks,
    mounts: Locks,
    /// Fills that the kernel engine waits for, by the key of the mount.
    pub fills: Mutex<HashMap<String, Uuid>>,
}

impl Driver {
    /// Opens the driver of a node.
    pub fn open(settings: Settings, kube: Option<Kube>) -> Result<Self, CsiError> {
        let books = Books::open(&settings.dir)?;
        let daemon = NodeClient::at(&settings.daemon);
        let (targets, mounts) = (Locks::default(), Locks::default());
        let inner = Inner { settings, books, daemon, kube, targets, mounts, fills: Mutex::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    pub(super) fn books(&self) -> &Books {
        &self.inner.books
    }

    pub(super) fn daemon(&self) -> &NodeClient {
        &self.inner.daemon
    }

    /// Waits for the lock of a target; not longer than a call may take.
    pub(super) async fn lock_target(&self, target: &Path) -> Result<OwnedMutexGuard<()>, CsiError> {
        self.lock(&self.inner.targets, &target.to_string_lossy()).await
    }

    /// Waits for the lock of a mount.
    pub(super) async fn lock_mount(&self, key: &str) -> Result<OwnedMutexGuard<()>, CsiError> {
        self.lock(&self.inner.mounts, key).await
    }

    async fn lock(&self, locks: &Locks, name: &str) -> Result<OwnedMutexGuard<()>, CsiError> {
        let waited = self.inner.settings.timeout;
        let locked = tokio::time::timeout(waited, locks.of(name).lock_owned()).await;
        locked.map_err(|_| CsiError::Busy { waited })
    }

    /// Takes the lock of a mount if nobody has it.
    pub(super) fn try_lock_mount(&self, key: &str) -> Option<OwnedMutexGuard<()>> {
        self.inner.mounts.of(key).try_lock_owned().ok()
    }

    /// Asks who the daemon is.
    pub(super) async fn info(&self) -> Result<NodeInfo, CsiError> {
        self.daemon().info().await.map_err(CsiError::of_daemon("the daemon cannot be asked"))
    }

    /// Waits until the daemon has taken up its mounts: before, what it does not list may be its own all the same.
    pub(super) async fn wait_until_ready(&self) -> Result<(), CsiError> {
        let until = tokio::time::Instant::now() + self.inner.settings.timeout / 2;
        loop {
            match self.info().await {
                Ok(info) if info.ready => return Ok(()),
                other if tokio::time::Instant::now() >= until => {
                    return other.and(Err(CsiError::NotReady));
                }
                // It is being replaced, perhaps.
                Ok(_) | Err(CsiError::NoDaemon(_)) => tokio::time::sleep(LOOK_INTERVAL).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// Lists the daemon's mounts that are ours, by key.
    pub(super) async fn mounts(&self) -> Result<HashMap<String, MountInfo>, CsiError> {
        let all = self.daemon().mounts().await.map_err(CsiError::of_daemon("the daemon's mounts cannot be listed"))?;
        let folder = self.books().mounts();
        let ours = all.into_iter().filter_map(|mount| {
            let key = mount.dir.strip_prefix(&folder).ok()?.to_str()?.to_owned();
            Some((key, mount))
        });
        Ok(ours.collect())
    }

    /// Takes a mount of ours away from a directory that shows one. What is open there goes on.
    pub(super) async fn unbind(&self, target: &Path) -> Result<(), CsiError> {
        let ask = |force| UnbindRequest { target: target.to_owned(), force };
        let failed = CsiError::of_daemon("the volume cannot be unmounted");
        for force in [false, true] {
            match self.daemon().unbind(&ask(force)).await.map_err(&failed) {
                Ok(()) => return Ok(()),
                Err(error) => match error.refused_with() {
                    // Somebody else was faster.
                    Some(404) => return Ok(()),
                    Some(409) if !force => {
                        tracing::info!(target = %target.display(), "a volume is in use while it is unpublished");
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Gives the lake's trouble, where there is some.
    pub(super) async fn lake_trouble(&self) -> Option<CsiError> {
        let info = self.info().await.ok()?;
        let problem = info.lake_problem?;
        let since = info.lake_problem_since_ms.and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
        let since = since.map(|at| format!(" since {at:.0}")).unwrap_or_default();
        Some(CsiError::Lake { problem, since })
    }
}

/// Gives what is mounted at a directory, from the mount table.
pub(super) fn shown(dir: &Path) -> Result<Option<Shown>, CsiError> {
    let at = |source| CsiError::Io { path: PathBuf::from("/proc/self/mountinfo"), doing: "be read", source };
    keeper::shown_at(dir).map_err(at)
}

/// Gives the real path of a directory that may not be there yet; its parent has to be.
pub(super) fn real(target: &Path) -> Result<PathBuf, CsiError> {
    let at = |source| CsiError::Io { path: target.to_owned(), doing: "be looked up", source };
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(at(std::io::ErrorKind::InvalidInput.into()));
    };
    Ok(std::fs::canonicalize(parent).map_err(at)?.join(name))
}

/// Says whether nothing of a target is left: the directory it was in is gone.
pub(super) fn parent_is_gone(target: &Path) -> bool {
    target.parent().is_some_and(|parent| !parent.exists())
}
