//! Mounting, unmounting, and making again what was mounted before.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::EngineChoice;
use crate::format::grants::Right;
use crate::format::ids::CommitId;
use crate::format::paths;
use crate::format::refs::{At, DatasetName, Revision};
use crate::fs::keeper::{KeeperError, MountId};
use crate::fs::mount::{self, MountError, MountSpec, MountedView, READ_AHEAD_KIB};
use crate::fs::session::ServeOptions;
use crate::fs::view::{Look, View, ViewError, ViewOptions};
use crate::store::catalog::Snapshot;
use crate::store::lake::PutIf;
use crate::store::tier::{CommitKey, Lease, Record, Tier};

use super::api::{MountInfo, MountRequest, MountState, UmountRequest};
use super::daemon::{Daemon, OpenTier, blocking, now_ms};
use super::engine::{self, Served};
use super::error::NodeError;
use super::leftover::clear_dead;
use super::open;
use super::place;
use super::policy::Reach;
use super::table::{Attachment, MountOptions, MountRow, Owner, TableError};

/// How a row of the table does at this moment.
#[derive(Debug)]
pub enum Live {
    /// Reserves the directory.
    Mounting(MountRow),
    Mounted(Box<Mounted>),
    /// It could not be made (again); tried again from time to time.
    Failed {
        row: MountRow,
        reason: String,
    },
}

/// A mount that is served.
#[derive(Debug)]
pub struct Mounted {
    pub row: MountRow,
    pub served: Served,
    /// Passes from one engine to the other at this moment.
    pub switching: bool,
    pub tier: Option<Arc<Tier>>,
    pub snapshot: Snapshot,
    /// None: the tier did not take it (full, read-only) or there is none.
    pub lease: Option<Lease>,
}

impl Mounted {
    fn is_of_tier(&self, name: &str) -> bool {
        self.row.options.tier.as_deref() == Some(name)
    }
}

/// A directory that is reserved for a mount; free again when dropped, unless the mount is there.
#[derive(Debug)]
struct Reserved {
    daemon: Daemon,
    id: Uuid,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut live = self.daemon.inner.live.lock();
        if matches!(live.get(&self.id), Some(Live::Mounting(_))) {
            live.remove(&self.id);
        }
    }
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
}

impl Caller {
    /// Says whether the caller may do anything: root, or the daemon's own user.
    pub fn is_master(&self) -> bool {
        self.uid == 0 || self.uid == nix::unistd::geteuid().as_raw()
    }

    /// Gives whose rights count: the caller's own, or of who is named by one who may do anything.
    pub(super) fn asks_for(self, named: Option<Self>) -> Result<Self, NodeError> {
        match named {
            Some(named) if !self.is_master() && named != self => {
                Err(NodeError::Denied { uid: self.uid, what: format!("ask in the name of user {}", named.uid) })
            }
            named => Ok(named.unwrap_or(self)),
        }
    }
}

impl Live {
    pub(super) fn row(&self) -> &MountRow {
        match self {
            Self::Mounting(row) | Self::Failed { row, .. } => row,
            Self::Mounted(mounted) => &mounted.row,
        }
    }

    fn info(&self) -> Option<MountInfo> {
        let row = self.row();
        let attachment = row.attachments.first()?;
        let (state, reason, mounted) = match self {
            Self::Mounting(_) => (MountState::Mounting, None, None),
            Self::Failed { reason, .. } => (MountState::Failed, Some(reason.clone()), None),
            Self::Mounted(mounted) => (MountState::Mounted, None, Some(mounted)),
        };
        let snapshot = mounted.map(|mounted| &mounted.snapshot);
        Some(MountInfo {
            id: row.id,
            dir: attachment.dir.clone(),
            dataset: row.dataset.clone(),
            revision: row.revision.clone(),
            commit: row.commit,
            state,
            reason,
            owner: attachment.owner.clone(),
            since_ms: attachment.since_ms,
            options: row.options.clone(),
            engine: match self {
                Self::Mounted(mounted) => Some(mounted.served.engine()),
                Self::Mounting(_) | Self::Failed { .. } => None,
            },
            entries: snapshot.map(|snapshot| snapshot.root.counts.entries),
            bytes: snapshot.map(|snapshot| snapshot.root.counts.bytes),
            stats: mounted.and_then(|mounted| mounted.served.view()).map(|view| view.stats()),
        })
    }
}

/// Gives what the tier keeps of a commit.
pub fn record_of(snapshot: &Snapshot) -> Record {
    Record {
        key: CommitKey { lake: snapshot.lake_id, commit: snapshot.commit },
        dataset: snapshot.dataset.as_str().to_owned(),
        placement: snapshot.placement_id,
        packs: snapshot.placement.packs.clone(),
    }
}

impl Daemon {
    /// Mounts a revision.
    pub async fn mount(&self, request: MountRequest, caller: Caller) -> Result<MountInfo, NodeError> {
        if self.inner.stop.is_cancelled() {
            return Err(NodeError::Stopping);
        }
        place::refuse_without_descriptors()?;
        let revision = Revision::parse(&request.revision)?;
        let whose = caller.asks_for(request.for_user)?;
        let reach = self.permit(whose, &revision.dataset, Right::Mount).await?;
        if request.ttl.is_some() {
            self.permit(whose, &revision.dataset, Right::Cache).await?;
        }
        let (request, dir) = self.look_at_dir(request, caller).await?;
        let mut options = self.effective(&request, revision.dataset.as_str(), whose);
        if reach == Reach::Caller {
            show_to_caller_only(&mut options, whose)?;
        }
        if options.engine == EngineChoice::Kernel && self.inner.table.is_none() {
            let what = "a kernel mount outlives its process, so it is the daemon's to keep: mount without --foreground";
            return Err(NodeError::Wrong { what: what.to_owned() });
        }
        let mut row = MountRow {
            id: Uuid::new_v4(),
            dataset: revision.dataset.as_str().to_owned(),
            revision: request.revision.clone(),
            // Known when the revision is resolved; until then the row only reserves the directory.
            commit: CommitId([0; 32]),
            options,
            attachments: vec![Attachment { dir, owner: Owner::User { uid: caller.uid }, since_ms: now_ms() }],
            image: None,
        };
        // From here on a daemon that stops waits: nothing is asked any more that may hang.
        let _making = self.begin_making()?;
        self.reserve(&row)?;
        // Gives the directory free again whatever happens on the way.
        let reserved = Reserved { daemon: self.clone(), id: row.id };
        let made = self.make(&mut row, Some(&revision)).await;
        let made = match made {
            Ok(mounted) => self.enter(&row, mounted).await,
            Err(error) => Err(error),
        };
        let now = Live::Mounted(Box::new(made?));
        let info = now.info().expect("a row has an attachment");
        if let Some(late) = self.put(row.id, now) {
            self.take_back(late, false).await;
            self.forget(&row.id).await?;
            return Err(NodeError::Stopping);
        }
        drop(reserved);
        self.note_use(row.commit);
        self.begin_takeover(row.id);
        Ok(info)
    }

    /// Writes the row to disk; a mount that cannot be remembered is taken away again.
    async fn enter(&self, row: &MountRow, mounted: Mounted) -> Result<Mounted, NodeError> {
        let Some(table) = &self.inner.table else {
            return Ok(mounted);
        };
        let added = {
            let mut table = table.lock();
            // A kernel mount's row was written before the mount was.
            if table.has(&row.id) { Ok(()) } else { table.add(row.clone()) }
        };
        let Err(error) = added else {
            return Ok(mounted);
        };
        let ended = blocking("unmounting", move || {
            mounted.served.unmount(true)?;
            release(Some(Live::Mounted(Box::new(mounted))));
            Ok::<(), KeeperError>(())
        });
        if let Ok(Err(error)) = ended.await {
            tracing::warn!(%error, dir = %row.dir().display(), "a mount that could not be remembered stays");
        }
        Err(error.into())
    }

    /// Fills in what the request leaves to defaults.
    fn effective(&self, request: &MountRequest, dataset: &str, caller: Caller) -> MountOptions {
        let config = &self.inner.config;
        let foreign = caller.uid != nix::unistd::geteuid().as_raw();
        MountOptions {
            subdir: inside(request.subdir.as_deref()),
            engine: request.engine.unwrap_or(config.mount.engine),
            verify: request.verify.unwrap_or(config.mount.verify),
            prefetch: request.prefetch.unwrap_or(config.mount.prefetch),
            uid: request.uid.unwrap_or(caller.uid),
            gid: request.gid.unwrap_or(caller.gid),
            umask: request.umask,
            file_mode: request.file_mode,
            dir_mode: request.dir_mode,
            // Whoever asks another user's daemon would see nothing otherwise.
            allow_other: request.allow_other.unwrap_or(config.mount.allow_other || foreign),
            tier: self.named_tier(request.tier.as_ref(), dataset),
            ttl: request.ttl,
        }
    }

    /// Says that a directory is mounted already, before it is found not to be empty.
    pub(super) fn refuse_taken(&self, dir: &Path) -> Result<(), NodeError> {
        self.forget_gone();
        let dir = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let live = self.inner.live.lock();
        let taken = live.values().find(|live| live.row().dir() == dir);
        match taken {
            None => Ok(()),
            Some(Live::Mounting(_)) => Err(NodeError::Busy { dir }),
            Some(other) => {
                let revision = other.row().revision.clone();
                Err(TableError::Taken { dir, revision }.into())
            }
        }
    }

    /// Reserves the directory, so that two commands cannot mount over one another.
    fn reserve(&self, row: &MountRow) -> Result<(), NodeError> {
        self.forget_gone();
        let dir = row.dir();
        let mut live = self.inner.live.lock();
        if let Some(other) = live.values().find(|live| live.row().dir() == dir) {
            return Err(match other {
                Live::Mounting(_) => NodeError::Busy { dir: dir.to_owned() },
                other => {
                    let revision = other.row().revision.clone();
                    TableError::Taken { dir: dir.to_owned(), revision }.into()
                }
            });
        }
        live.insert(row.id, Live::Mounting(row.clone()));
        Ok(())
    }

    /// Finds what a row shows, and the tier for it; with a revision, resolves that.
    async fn find(&self, row: &MountRow, revision: Option<&Revision>) -> Result<(Snapshot, OpenTier), NodeError> {
        if let Some(name) = &row.options.tier {
            return tokio::try_join!(self.snapshot(row, revision), self.tier(name));
        }
        let snapshot = self.snapshot(row, revision).await?;
        let name = self.choose_tier(&record_of(&snapshot).key).await?;
        Ok((snapshot, self.tier(&name).await?))
    }

    /// Makes the mount of a row; with a revision, resolves it first and writes its commit into the row.
    async fn make(&self, row: &mut MountRow, revision: Option<&Revision>) -> Result<Mounted, NodeError> {
        let stop = self.stopping();
        let (snapshot, tier) = tokio::select! {
            found = self.find(row, revision) => found?,
            () = stop.cancelled() => return Err(NodeError::Stopping),
        };
        row.options.tier = Some(tier.name.clone());
        row.commit = snapshot.commit;
        let lease = match &tier.tier {
            Some(tier) => self.lease(Arc::clone(tier), &snapshot, row).await?,
            None => None,
        };
        let served = match self.take_up(row).await? {
            Some(served) => served,
            None if row.options.engine == EngineChoice::Kernel => self.mount_by_kernel(row, &snapshot, &tier).await?,
            None => {
                row.image = None;
                self.mount_by_fuse(row, &snapshot, &tier).await?
            }
        };
        Ok(Mounted { row: row.clone(), served, switching: false, tier: tier.tier, snapshot, lease })
    }

    /// Mounts by the FUSE engine.
    async fn mount_by_fuse(&self, row: &MountRow, snapshot: &Snapshot, tier: &OpenTier) -> Result<Served, NodeError> {
        let options = view_options(&row.options);
        let meta = self.catalog().await?.meta.clone();
        let stop = self.stopping();
        let view = tokio::select! {
            opened = View::open(snapshot.clone(), meta.clone(), tier.fetcher.clone(), options) => opened,
            () = stop.cancelled() => return Err(NodeError::Stopping),
        };
        let view = view.map_err(|source| cannot_show(row, source))?;
        let spec = MountSpec {
            dir: row.dir().to_owned(),
            owner: required_owner(row),
            source: row.revision.clone(),
            allow_other: row.options.allow_other,
            note: serde_json::to_string(&row).unwrap_or_default(),
            read_ahead_kib: READ_AHEAD_KIB,
            // Another engine takes the mount over when nothing is open.
            serve: ServeOptions { counts_opens: row.options.engine == EngineChoice::Auto, ..ServeOptions::default() },
        };
        let view = self.show(view, row.id, spec).await?;
        if row.options.prefetch != crate::config::PrefetchLevel::None {
            let background = snapshot.clone();
            tokio::spawn(async move {
                if let Err(error) = meta.prefetch_tree(&background).await {
                    tracing::info!(%error, "metadata is fetched when it is needed");
                }
            });
        }
        Ok(Served::Fuse(Arc::new(view)))
    }

    /// Mounts the view, or takes over the mount that a daemon before this one has left for the row.
    async fn show(&self, view: View, id: Uuid, spec: MountSpec) -> Result<MountedView, NodeError> {
        let keeper = self.keeper().await?;
        if self.inner.stop.is_cancelled() {
            return Err(NodeError::Stopping);
        }
        let rt = tokio::runtime::Handle::current();
        let left = self.inner.left.lock().get(&id).copied();
        let Some(left) = left else {
            let mounted = blocking("mounting", move || {
                clear_dead(&keeper, &spec.dir);
                mount::mount(view, &keeper, spec, &rt)
            });
            return Ok(mounted.await??);
        };
        let taken = blocking("taking over a mount", move || mount::take_over(view, &keeper, left, spec, &rt)).await?;
        note_taken(&mut self.inner.left.lock(), &id, taken.as_ref().err());
        Ok(taken?)
    }

    async fn snapshot(&self, row: &MountRow, revision: Option<&Revision>) -> Result<Snapshot, NodeError> {
        let catalog = self.catalog().await?;
        match revision {
            Some(revision) => Ok(catalog.snapshot(revision).await?),
            None => Ok(catalog.snapshot_of(&DatasetName::parse(&row.dataset)?, &row.commit).await?),
        }
    }

    /// Gives the time to live, milliseconds, that this node's configuration names for a dataset. Where it names none,
    /// what another node said stays.
    pub(super) fn dataset_ttl(&self, dataset: &str) -> Option<u64> {
        self.inner.config.dataset.get(dataset)?.ttl.map(|ttl| ttl.as_ms())
    }

    /// Writes lease and record. A tier that does not take them serves reads all the same.
    async fn lease(&self, tier: Arc<Tier>, snapshot: &Snapshot, row: &MountRow) -> Result<Option<Lease>, NodeError> {
        let record = record_of(snapshot);
        let ttl_ms = row.options.ttl.map(|ttl| ttl.as_ms());
        let dataset_ttl = self.dataset_ttl(&row.dataset);
        let made = blocking("writing the lease", move || {
            let lease = tier.lease(&record)?;
            let mut set = if ttl_ms.is_some() { tier.set_ttl(&record.key, ttl_ms) } else { Ok(()) };
            if dataset_ttl.is_some() {
                set = set.and(tier.set_dataset_ttl(&record.key.lake, &record.dataset, dataset_ttl));
            }
            if let Err(error) = set {
                // The lease is what keeps the commit; it is not given up for that.
                tracing::warn!(%error, dataset = record.dataset, "the tier did not take the time to live");
            }
            Ok::<_, crate::store::tier::TierError>(lease)
        });
        match made.await? {
            Ok(lease) => Ok(Some(lease)),
            Err(error) => {
                tracing::warn!(%error, revision = row.revision, "the tier did not take the lease: its steward may let the commit go under the mount, which is then read from the lake");
                Ok(None)
            }
        }
    }

    /// Counts the mounts whose tier has taken no lease.
    pub(super) fn mounts_without_lease(&self) -> usize {
        let live = self.inner.live.lock();
        live.values().filter(|live| matches!(live, Live::Mounted(mounted) if mounted.lease.is_none())).count()
    }

    /// Counts the leases of mounts.
    pub(super) fn leases(&self) -> usize {
        let live = self.inner.live.lock();
        live.values().filter(|live| matches!(live, Live::Mounted(mounted) if mounted.lease.is_some())).count()
    }

    /// Asks a tier again for the leases that it refused.
    pub(super) async fn retry_leases(&self, name: &str, tier: &Arc<Tier>) {
        let without: Vec<(MountRow, Snapshot)> = {
            let live = self.inner.live.lock();
            let mounted = live.values().filter_map(|live| match live {
                Live::Mounted(mounted) if mounted.lease.is_none() && mounted.is_of_tier(name) => {
                    Some((mounted.row.clone(), mounted.snapshot.clone()))
                }
                _ => None,
            });
            mounted.collect()
        };
        for (row, snapshot) in without {
            let Ok(Some(lease)) = self.lease(Arc::clone(tier), &snapshot, &row).await else {
                continue;
            };
            tracing::info!(dir = %row.dir().display(), "the tier took the lease now");
            if let Some(Live::Mounted(mounted)) = self.inner.live.lock().get_mut(&row.id) {
                mounted.lease = Some(lease);
            }
        }
    }

    /// Leaves a use marker in the lake, which gc respects. In the background; without write access
    /// there is none.
    pub(super) fn note_use(&self, commit: CommitId) {
        let key = paths::use_key(&commit, &self.inner.node);
        let lake = Arc::clone(&self.inner.lake);
        let body = serde_json::json!({ "format": 1, "time_ms": now_ms() }).to_string();
        tokio::spawn(async move {
            if let Err(error) = lake.put(&key, body.into(), PutIf::Always).await {
                tracing::info!(%error, "the lake takes no use marker; gc there will not see this mount");
            }
        });
    }

    /// Unmounts a directory and forgets it.
    pub async fn umount(&self, request: UmountRequest, caller: Caller) -> Result<MountInfo, NodeError> {
        let dir = request.dir.clone();
        let (info, id) = {
            let live = self.inner.live.lock();
            let found = live.iter().find(|(_, live)| live.row().dir() == dir);
            let Some((id, found)) = found else {
                return Err(NodeError::NotMounted { dir });
            };
            if matches!(found, Live::Mounting(_)) {
                return Err(NodeError::Busy { dir });
            }
            (found.info().ok_or_else(|| NodeError::NotMounted { dir: dir.clone() })?, *id)
        };
        let owns = info.owner == Owner::User { uid: caller.uid };
        if !caller.is_master() && !owns {
            return Err(NodeError::Denied { uid: caller.uid, what: format!("unmount {}", info.dir.display()) });
        }
        // The kernel may be about to take over: what serves is asked for when it does not change any more.
        let _changing = self.wait_to_change(&id, &dir).await?;
        let served = match self.inner.live.lock().get_mut(&id) {
            Some(Live::Mounted(mounted)) => Some(mounted.served.clone()),
            Some(failed @ Live::Failed { .. }) => {
                // Nobody tries again to make it meanwhile.
                *failed = Live::Mounting(failed.row().clone());
                None
            }
            Some(Live::Mounting(_)) => return Err(NodeError::Busy { dir }),
            None => return Err(NodeError::NotMounted { dir }),
        };
        match served {
            Some(served) => blocking("unmounting", move || served.unmount(request.force)).await??,
            None => self.umount_failed(id, request, info.reason.clone()).await?,
        }
        self.forget(&id).await?;
        Ok(info)
    }

    /// Removes a mount from the table and gives its lease back.
    async fn forget(&self, id: &Uuid) -> Result<(), NodeError> {
        if let Some(table) = &self.inner.table {
            table.lock().remove(id)?;
        }
        let removed = self.inner.live.lock().remove(id);
        blocking("releasing the lease", move || release(removed)).await
    }

    /// Forgets mounts that somebody else has unmounted.
    pub(super) fn forget_gone(&self) {
        let gone: Vec<Uuid> = {
            let live = self.inner.live.lock();
            let ended = live
                .iter()
                .filter(|(_, live)| matches!(live, Live::Mounted(m) if !m.switching && !m.served.is_alive()));
            ended.map(|(id, _)| *id).collect()
        };
        for id in gone {
            if let Some(table) = &self.inner.table
                && let Err(error) = table.lock().remove(&id)
            {
                tracing::warn!(%error, "a mount that is gone stays in the table");
            }
            let removed = self.inner.live.lock().remove(&id);
            if let Some(Live::Mounted(mounted)) = &removed {
                tracing::info!(dir = %mounted.row.dir().display(), "somebody else has unmounted it");
            }
            tokio::task::spawn_blocking(move || release(removed));
        }
    }

    /// Lists all mounts, by directory.
    pub fn mounts(&self) -> Vec<MountInfo> {
        self.forget_gone();
        let mut all: Vec<MountInfo> = self.inner.live.lock().values().filter_map(Live::info).collect();
        all.sort_by(|a, b| a.dir.cmp(&b.dir));
        all
    }

    /// Makes everything in the table that is not mounted: at start, and from time to time what failed.
    pub async fn remount(&self) {
        self.remount_missing().await;
        self.retry_left_soon();
    }

    pub(super) async fn remount_missing(&self) {
        let Some(table) = &self.inner.table else {
            return;
        };
        let missing = {
            // Both at once: a row that is being unmounted leaves the table first.
            let table = table.lock();
            let mut live = self.inner.live.lock();
            let is_missing = |row: &&MountRow| matches!(live.get(&row.id), None | Some(Live::Failed { .. }));
            let missing: Vec<MountRow> = table.rows().iter().filter(is_missing).cloned().collect();
            for row in &missing {
                live.insert(row.id, Live::Mounting(row.clone()));
            }
            missing
        };
        let all = missing.into_iter().map(|row| self.remount_one(row));
        futures::future::join_all(all).await;
    }

    async fn remount_one(&self, mut row: MountRow) {
        let Ok(_making) = self.begin_making() else {
            return;
        };
        let was_left = self.is_left(&row.id);
        let mut made = self.make(&mut row, None).await;
        if let (Err(error), true, false) = (&made, was_left, self.is_left(&row.id)) {
            tracing::warn!(%error, dir = %row.dir().display(), "a mount could not be taken over: it is made anew");
            made = self.make(&mut row, None).await;
        }
        let (id, dir) = (row.id, row.dir().to_owned());
        let now = match made {
            Ok(mounted) => {
                if was_left {
                    self.inner.taken_over.fetch_add(1, Ordering::Relaxed);
                }
                let what = if was_left { "taken over" } else { "mounted again" };
                tracing::info!(dir = %dir.display(), revision = row.revision, "{what}");
                self.note_use(row.commit);
                self.update_row(&mounted.row);
                Live::Mounted(Box::new(mounted))
            }
            Err(error) => {
                let api = error.to_api();
                let reason = std::iter::once(api.error).chain(api.causes).collect::<Vec<_>>().join(": ");
                tracing::warn!(dir = %dir.display(), revision = row.revision, reason, "could not be mounted again");
                Live::Failed { row, reason }
            }
        };
        match self.put(id, now) {
            None => self.begin_takeover(id),
            Some(late) => self.take_back(late, true).await,
        }
    }

    /// Writes down what changed about a mount that was made again.
    pub(super) fn update_row(&self, row: &MountRow) {
        if let Some(table) = &self.inner.table
            && let Err(error) = table.lock().update(row)
        {
            tracing::warn!(%error, dir = %row.dir().display(), "what the table says of this mount is old");
        }
    }

    /// Waits until the one mount of a private daemon is gone.
    pub fn is_mounted(&self, id: &Uuid) -> bool {
        let live = self.inner.live.lock();
        matches!(live.get(id), Some(Live::Mounted(mounted)) if mounted.switching || mounted.served.is_alive())
    }
}

/// What was taken over, or is lost, is not waiting any more. After any other error it waits for the next try.
fn note_taken(left: &mut HashMap<Uuid, MountId>, id: &Uuid, error: Option<&MountError>) {
    if error.is_none_or(MountError::is_lost) {
        left.remove(id);
    }
}

/// Gives back what a mount has in the tier: its hold, then its lease.
pub(super) fn release(live: Option<Live>) {
    let Some(live) = live else {
        return;
    };
    if let Live::Mounted(mounted) = &live
        && mounted.row.options.engine != EngineChoice::Fuse
        && let Some(tier) = &mounted.tier
    {
        engine::release_hold(tier, &mounted.row.id);
    }
    release_lease(live);
}

pub(super) fn release_lease(live: Live) {
    if let Live::Mounted(mounted) = live
        && let Some(lease) = mounted.lease
        && let Err(error) = lease.release()
    {
        tracing::warn!(%error, "the lease stays until it expires");
    }
}

pub(super) fn view_options(options: &MountOptions) -> ViewOptions {
    ViewOptions {
        subdir: options.subdir.clone().unwrap_or_default().into_bytes(),
        look: Look {
            uid: options.uid,
            gid: options.gid,
            umask: options.umask.unwrap_or(0),
            file_mode: options.file_mode,
            dir_mode: options.dir_mode,
        },
        verify: open::verify(options.verify),
        prefetch: open::prefetch(options.prefetch),
    }
}

/// Of a dataset that others may not mount, a mount shows nothing to them either.
fn show_to_caller_only(options: &mut MountOptions, caller: Caller) -> Result<(), NodeError> {
    if options.uid != caller.uid {
        let what = format!("show files that not everybody may mount as those of user {}", options.uid);
        return Err(NodeError::Denied { uid: caller.uid, what });
    }
    options.umask = Some(options.umask.unwrap_or(0) | 0o077);
    Ok(())
}

/// Whose the directory of a mount has to be when it is mounted: a user could have put another in its place. None:
/// the daemon's own user's or root's mounts, who may mount anywhere.
pub(super) fn required_owner(row: &MountRow) -> Option<u32> {
    match row.attachments.first()?.owner {
        Owner::User { uid } if !(Caller { uid, gid: u32::MAX }).is_master() => Some(uid),
        Owner::User { .. } | Owner::Job { .. } | Owner::Pod { .. } => None,
    }
}

/// Gives a directory inside a commit as it is kept: from the commit's root on, without the slashes around it.
fn inside(subdir: Option<&str>) -> Option<String> {
    subdir.map(|subdir| subdir.trim_matches('/').to_owned()).filter(|subdir| !subdir.is_empty())
}

/// Makes sure that the directory is there, empty, and the caller's to mount on.
pub(super) fn check_dir(request: &MountRequest, caller: Caller) -> Result<PathBuf, NodeError> {
    let dir = &request.dir;
    let refuse = |why, hint: String| NodeError::Dir { dir: dir.clone(), why, hint };
    if !dir.is_absolute() {
        return Err(refuse("is not absolute", "name the directory from the root".to_owned()));
    }
    if request.mkdir {
        make_dir(dir, caller)?;
    }
    let found = std::fs::symlink_metadata(dir).and_then(|_| std::fs::canonicalize(dir));
    let real = match found {
        Ok(real) => real,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(refuse(
                "does not exist",
                format!("make it, or mount with --mkdir: mkdir -p {}", dir.display()),
            ));
        }
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENOTCONN as i32) => {
            let hint = format!("a dead mount is there; clear it with `fusermount3 -uz {}`", dir.display());
            return Err(refuse("answers `not connected`", hint));
        }
        Err(source) => {
            return Err(NodeError::DirIo { dir: dir.clone(), doing: "cannot be looked at", source });
        }
    };
    let io = |doing| {
        let dir = dir.clone();
        move |source| NodeError::DirIo { dir, doing, source }
    };
    let meta = std::fs::metadata(&real).map_err(io("cannot be looked at"))?;
    if !meta.is_dir() {
        return Err(refuse("is not a directory", "name a directory".to_owned()));
    }
    if !caller.is_master() && meta.uid() != caller.uid {
        return Err(NodeError::Denied {
            uid: caller.uid,
            what: format!("mount on {}, which is not theirs", dir.display()),
        });
    }
    if !request.nonempty && std::fs::read_dir(&real).map_err(io("cannot be listed"))?.next().is_some() {
        return Err(refuse("is not empty", "name an empty directory, or cover this one with --nonempty".to_owned()));
    }
    Ok(real)
}

fn make_dir(dir: &Path, caller: Caller) -> Result<(), NodeError> {
    if !caller.is_master() {
        return Err(NodeError::Denied { uid: caller.uid, what: format!("have {} made", dir.display()) });
    }
    let at = |source| NodeError::DirIo { dir: dir.to_owned(), doing: "cannot be made", source };
    std::fs::create_dir_all(dir).map_err(at)
}

fn cannot_show(row: &MountRow, source: ViewError) -> NodeError {
    let revision = row.revision.clone();
    match (&row.options.subdir, source) {
        (Some(subdir), ViewError::NoEntry | ViewError::NotDir) => {
            NodeError::NoSubdir { revision, subdir: subdir.clone() }
        }
        (_, source) => NodeError::View { revision, source },
    }
}

/// Says what a revision asks for, for messages: the part behind the `@`.
pub fn at_text(revision: &Revision) -> String {
    match &revision.at {
        At::Default => crate::format::refs::DEFAULT_BRANCH.to_owned(),
        At::Named(name) => name.as_str().to_owned(),
        At::Prefix(prefix) => prefix.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_could_not_be_taken_over_now_waits_for_the_next_try() {
        let (dir, id) = (PathBuf::from("/m"), Uuid::new_v4());
        let source = || std::io::Error::from(nix::errno::Errno::EAGAIN);
        let after = |error: Option<MountError>| {
            let mut left = HashMap::from([(id, MountId(1))]);
            note_taken(&mut left, &id, error.as_ref());
            left.contains_key(&id)
        };
        assert!(after(Some(MountError::Serve { dir: dir.clone(), source: source() })));
        assert!(!after(Some(MountError::Lost { dir, source: source() })));
        assert!(!after(None));
    }

    #[test]
    fn only_root_and_the_daemons_user_ask_in_the_name_of_others() {
        let user = |uid| Caller { uid, gid: 4 };
        let own = user(nix::unistd::geteuid().as_raw());
        assert_eq!(own.asks_for(Some(user(4001))).expect("may"), user(4001));
        assert_eq!(user(4002).asks_for(None).expect("for itself"), user(4002));
        assert_eq!(user(4002).asks_for(Some(user(4002))).expect("is itself"), user(4002));
        for named in [0, 4001, own.uid] {
            assert!(
                matches!(user(4002).asks_for(Some(user(named))), Err(NodeError::Denied { uid: 4002, .. })),
                "{named}"
            );
        }
    }

    #[test]
    fn a_directory_inside_a_commit_is_kept_without_the_slashes_around_it() {
        assert_eq!(inside(Some("/train/a/")).as_deref(), Some("train/a"));
        assert_eq!(inside(Some("//")), None);
        assert_eq!(inside(None), None);
    }
}
