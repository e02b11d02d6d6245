//! Which engine serves a mount, and how the kernel engine takes over.
//!
//! `fuse`: the daemon answers. `kernel`: an EROFS mount over packs that are complete in the tier, checked
//! on this node and held by hard links; no daemon is in the path, and none is needed for it to live on.
//! `auto`: FUSE serves at once, and the kernel takes over when it can and no file is open.
//!
//! Order when the kernel takes over: packs checked, held, the held files compared with what was checked,
//! image built, mount prepared, table written, mount placed. A crash before the last step leaves a hold
//! and an image, which the next attempt continues; a crash behind it leaves a mount that works and a row
//! that names its image, by which the next daemon takes it up. There is never a mount without such a row,
//! and never a hold taken from under a mount.
//!
//! One at a time changes what serves a mount ([`Changing`]): a take-over and an umount exclude each other.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::config::EngineChoice;
use crate::format::ids::PackId;
use crate::format::tree::nav;
use crate::fs::keeper::kernel::KernelError;
use crate::fs::keeper::{self, KeeperError};
use crate::fs::kernel::{self, BuildError, ImageId, Images, KernelMount, Subject};
use crate::fs::mount::MountedView;
use crate::store::catalog::Snapshot;
use crate::store::fetch::NotReady;
use crate::store::meta::MetaError;
use crate::store::tier::{FileIdentity, Hold, Tier, TierError};

use super::daemon::{Daemon, OpenTier, blocking};
use super::error::NodeError;
use super::mounting::{Live, record_of, required_owner, view_options};
use super::table::MountRow;

/// How often `auto` looks whether the kernel can take over, at first.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How often it looks for packs that are on their way.
const ABSENT_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// How often it tries again what failed otherwise.
const FAILED_INTERVAL_MAX: Duration = Duration::from_secs(300);
/// How long what was prepared may wait for the last file to be closed: packs may be set aside meanwhile.
const PREPARED_FOR_MAX: Duration = Duration::from_secs(10);
/// How often somebody looks who waits for a change of a mount to end, and how long.
const CHANGE_INTERVAL: Duration = Duration::from_millis(50);
const CHANGE_WAIT_MAX: Duration = Duration::from_secs(120);

/// What serves a mount.
#[derive(Debug, Clone)]
pub enum Served {
    Fuse(Arc<MountedView>),
    Kernel(KernelMount),
}

/// Why the kernel engine does not serve a mount.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("there is no tier, and the kernel reads packs nowhere else; configure one, or mount with --engine fuse")]
    NoTier,
    #[error(transparent)]
    NotReady(#[from] NotReady),
    #[error("pack {pack} was replaced in the tier while it was being held; try again")]
    Replaced { pack: PackId },
    #[error("the mount is in use or being unmounted")]
    InUse,
    #[error("the directory to be shown is not to be found")]
    Subdir(#[source] MetaError),
    #[error("the tier does not hold the packs")]
    Tier(#[from] TierError),
    #[error("there is no image for the kernel")]
    Build(#[from] BuildError),
    #[error("the folder of images cannot be used")]
    Images(#[source] std::io::Error),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    #[error(transparent)]
    Stopped(Box<NodeError>),
}

impl EngineError {
    /// Says whether trying again may help.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::NotReady(NotReady::Absent { .. } | NotReady::Unchecked { .. }) => true,
            Self::Build(BuildError::Meta(_) | BuildError::Fetch(_) | BuildError::Write(_)) => true,
            Self::Kernel(KernelError::Refused { .. } | KernelError::Io { .. }) => true,
            Self::Keeper(KeeperError::Protocol { .. }) => false,
            Self::Replaced { .. } | Self::InUse | Self::Tier(_) | Self::Keeper(_) => true,
            Self::Subdir(_) | Self::Images(_) | Self::Stopped(_) => true,
            Self::NoTier | Self::NotReady(_) | Self::Build(_) | Self::Kernel(_) => false,
        }
    }

    /// Gives the next step, where the message does not say it.
    pub fn hint(&self, revision: &str) -> Option<String> {
        match self {
            Self::NotReady(NotReady::Absent { .. }) => Some(format!(
                "bring the commit into the tier first (`larder cache {revision}`), or mount with --engine auto, which serves at once"
            )),
            Self::NotReady(NotReady::Always) => Some("mount with --engine fuse, or with --verify node".to_owned()),
            Self::NotReady(NotReady::Unchecked { .. }) => Some("try again, or mount with --engine auto".to_owned()),
            Self::NotReady(NotReady::Unproven { .. }) => Some("mount with --engine fuse".to_owned()),
            _ => None,
        }
    }
}

impl From<NodeError> for EngineError {
    fn from(error: NodeError) -> Self {
        Self::Stopped(Box::new(error))
    }
}

/// How long `auto` waits between its attempts.
#[derive(Debug, Default)]
struct Pace {
    tries: u32,
    kind: Option<std::mem::Discriminant<EngineError>>,
    told: String,
}

impl Pace {
    /// Gives how long to wait after an attempt that failed, and whether its reason is a new one.
    fn after(&mut self, error: &EngineError) -> (Duration, bool) {
        let most = match error {
            EngineError::NotReady(NotReady::Absent { .. }) => ABSENT_INTERVAL_MAX,
            _ => FAILED_INTERVAL_MAX,
        };
        // Something else is in the way now: what went before says nothing about it.
        if self.kind.replace(std::mem::discriminant(error)) != Some(std::mem::discriminant(error)) {
            self.tries = 0;
        }
        let wait = LOOK_INTERVAL.saturating_mul(1 << self.tries.min(16)).min(most);
        self.tries = self.tries.saturating_add(1);
        let reason = reason_of(error);
        let is_new = reason != self.told;
        self.told = reason;
        (wait, is_new)
    }
}

/// Says why, with all causes.
fn reason_of(error: &EngineError) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    std::iter::once(error.to_string()).chain(causes.map(ToString::to_string)).collect::<Vec<_>>().join(": ")
}

/// The right to change what serves a mount, for as long as it is kept. Others see the mount as there.
#[derive(Debug)]
pub(super) struct Changing {
    daemon: Daemon,
    id: Uuid,
}

impl Drop for Changing {
    fn drop(&mut self) {
        if let Some(Live::Mounted(mounted)) = self.daemon.inner.live.lock().get_mut(&self.id) {
            mounted.switching = false;
        }
    }
}

/// An image that must not be swept: its mount is being prepared.
#[derive(Debug)]
struct Preparing {
    daemon: Daemon,
    image: ImageId,
}

impl Drop for Preparing {
    fn drop(&mut self) {
        let mut preparing = self.daemon.inner.preparing.lock();
        if let Some(at) = preparing.iter().position(|image| *image == self.image) {
            preparing.swap_remove(at);
        }
    }
}

/// A mount of the kernel's own that is nowhere yet.
#[derive(Debug)]
struct Prepared {
    mount: OwnedFd,
    image: ImageId,
}

impl Served {
    /// Says which engine it is.
    pub fn engine(&self) -> EngineChoice {
        match self {
            Self::Fuse(_) => EngineChoice::Fuse,
            Self::Kernel(_) => EngineChoice::Kernel,
        }
    }

    /// Gives what the FUSE engine serves.
    pub fn view(&self) -> Option<&Arc<MountedView>> {
        match self {
            Self::Fuse(view) => Some(view),
            Self::Kernel(_) => None,
        }
    }

    /// Says whether it is still mounted.
    pub fn is_alive(&self) -> bool {
        match self {
            Self::Fuse(view) => view.is_alive(),
            Self::Kernel(mount) => mount.is_alive(),
        }
    }

    /// Unmounts; by force: at once. Blocks.
    pub fn unmount(&self, force: bool) -> Result<(), KeeperError> {
        match self {
            Self::Fuse(view) => view.unmount(force),
            Self::Kernel(mount) => mount.unmount(force),
        }
    }
}

/// Gives the mounts that have a hold, and are none of those that are known.
fn orphans(names: &[String], known: &[Uuid]) -> impl Iterator<Item = Uuid> {
    names.iter().filter_map(|name| Uuid::try_parse(name).ok()).filter(|id| !known.contains(id))
}

/// Names the hold of a mount.
fn hold_name(id: &Uuid) -> String {
    id.simple().to_string()
}

/// Drops the hold of a mount, if it has one. Blocks.
pub(super) fn release_hold(tier: &Tier, id: &Uuid) {
    if let Err(error) = tier.release_hold(&hold_name(id)) {
        tracing::warn!(%error, "the hold of a mount stays; `larder tier forget-node` drops it");
    }
}

/// Holds packs and makes sure that what is held is what was checked. Blocks.
fn hold_packs(
    tier: &Tier,
    row: &MountRow,
    snapshot: &Snapshot,
    checked: &[(PackId, FileIdentity)],
) -> Result<Hold, EngineError> {
    let hold = tier.hold(&record_of(snapshot).key, &hold_name(&row.id))?;
    for (pack, identity) in checked {
        let path = hold.path(pack);
        // A link from before may be one to a file that was set aside since.
        let is_same = |path: &Path| {
            std::fs::metadata(path).is_ok_and(|meta| {
                let mtime_ns = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
                *identity == FileIdentity { file_id: meta.ino(), size_bytes: meta.size(), mtime_ns }
            })
        };
        if !hold.add(pack)? {
            return Err(NotReady::Absent { pack: *pack }.into());
        }
        if !is_same(&path) {
            hold.drop_link(pack)?;
            if !hold.add(pack)? || !is_same(&path) {
                return Err(EngineError::Replaced { pack: *pack });
            }
        }
    }
    Ok(hold)
}

impl Daemon {
    fn images(&self) -> Result<Images, EngineError> {
        Images::open(self.inner.place.images()).map_err(EngineError::Images)
    }

    /// Removes what a daemon that died left half built.
    pub(super) fn clean_images(&self) {
        if let Ok(images) = self.images() {
            images.remove_drafts();
        }
    }

    /// Removes images that no mount uses, as far as they are too many.
    fn sweep_images(&self, images: &Images) {
        let Some(table) = &self.inner.table else {
            return;
        };
        let used: HashSet<ImageId> = table.lock().rows().iter().filter_map(|row| row.image).collect();
        // Held while sweeping: who begins to prepare waits, and then finds the image or builds it.
        let preparing = self.inner.preparing.lock();
        images.sweep(&used.into_iter().chain(preparing.iter().copied()).collect());
    }

    fn begin_preparing(&self, image: ImageId) -> Preparing {
        self.inner.preparing.lock().push(image);
        Preparing { daemon: self.clone(), image }
    }

    /// Says which mounts of this node's images the table does not know. They are left alone: they may be bind
    /// mounts that somebody made of ours.
    pub(super) fn tell_of_strays(&self) {
        let Some(table) = &self.inner.table else {
            return;
        };
        let known: HashSet<ImageId> = table.lock().rows().iter().filter_map(|row| row.image).collect();
        let folder = self.inner.place.images();
        for line in keeper::images_shown().unwrap_or_default() {
            let image = ImageId::of_file(&line.image).filter(|_| line.image.parent() == Some(&*folder));
            if image.is_some_and(|image| !known.contains(&image)) {
                let dir = line.dir.display();
                tracing::warn!(%dir, "an image of ours is mounted that no mount of the table shows; its packs are not held: umount(8) it");
            }
        }
    }

    /// Drops holds of this node that no mount has: of a mount that was being made when a daemon died.
    pub(super) async fn drop_orphaned_holds(&self, tier: Arc<Tier>) {
        let daemon = self.clone();
        let dropped = blocking("looking for old holds", move || {
            // Listed first: a mount is known before it makes its hold, and forgotten after it dropped it.
            let names = tier.own_holds()?;
            // A daemon that stops has forgotten what it leaves mounted.
            let rows: Vec<Uuid> = match &daemon.inner.table {
                Some(table) => table.lock().rows().iter().map(|row| row.id).collect(),
                None => Vec::new(),
            };
            let live: Vec<Uuid> = daemon.inner.live.lock().keys().copied().collect();
            orphans(&names, &[rows, live].concat()).try_for_each(|id| tier.release_hold(&hold_name(&id)))
        });
        if let Ok(Err(error)) = dropped.await {
            tracing::warn!(%error, "holds of mounts that ended stay in the tier");
        }
    }

    /// Does everything that comes before a kernel mount is put at its directory.
    async fn prepare(&self, row: &MountRow, snapshot: &Snapshot, tier: &OpenTier) -> Result<Prepared, EngineError> {
        let store = tier.tier.clone().ok_or(EngineError::NoTier)?;
        let options = view_options(&row.options);
        let mut checked = Vec::with_capacity(snapshot.placement.packs.len());
        for used in &snapshot.placement.packs {
            checked.push((used.pack, tier.fetcher.ready(used, options.verify).await?));
        }
        let private = match row.options.allow_other {
            true => None,
            false => Some(self.number_of(snapshot, &options.subdir).await?),
        };
        let meta = self.catalog().await?.meta.clone();
        let fetcher = tier.fetcher.clone();
        let subject = Subject { snapshot: snapshot.clone(), meta, fetcher, look: options.look, private };
        let (images, row, daemon) = (self.images()?, row.clone(), self.clone());
        let rt = tokio::runtime::Handle::current();
        let work = move || {
            let hold = hold_packs(&store, &row, &subject.snapshot, &checked).inspect_err(|error| {
                // The fetcher may have the file open that was there before.
                if let EngineError::Replaced { pack } = error {
                    subject.fetcher.look_again(pack);
                }
            })?;
            let stop = daemon.stopping();
            let _preparing = daemon.begin_preparing(subject.id());
            let image = kernel::build(&images, &subject, &rt, &|| !stop.is_cancelled())?;
            let subdir = Path::new(std::ffi::OsStr::from_bytes(&options.subdir));
            let mount = kernel::prepare(&image, |pack| hold.path(pack), subdir)?;
            daemon.sweep_images(&images);
            Ok(Prepared { mount, image: image.id })
        };
        blocking("preparing a kernel mount", work).await?
    }

    /// Gives the directory that is shown as the root: its rank + 1, or 0.
    async fn number_of(&self, snapshot: &Snapshot, subdir: &[u8]) -> Result<u64, EngineError> {
        let meta = &self.catalog().await?.meta;
        let found = meta.drive(|blocks| nav::resolve(&snapshot.root, blocks, subdir)).await;
        Ok(found.map_err(EngineError::Subdir)?.map_or(0, |at| at.rank + 1))
    }

    /// Mounts by the kernel engine alone.
    pub(super) async fn mount_by_kernel(
        &self,
        row: &mut MountRow,
        snapshot: &Snapshot,
        tier: &OpenTier,
    ) -> Result<Served, NodeError> {
        let is_new = self.inner.table.as_ref().is_some_and(|table| !table.lock().has(&row.id));
        let source = match self.try_kernel(row, snapshot, tier).await {
            Ok(served) => return Ok(served),
            Err(source) => source,
        };
        // What was mounted before keeps its row and its hold: the next attempt needs both.
        if is_new {
            if let Some(table) = &self.inner.table {
                table.lock().remove(&row.id)?;
            }
            let (store, id) = (tier.tier.clone(), row.id);
            blocking("dropping a hold", move || store.map(|tier| release_hold(&tier, &id))).await?;
        }
        Err(NodeError::Engine { revision: row.revision.clone(), source: Box::new(source) })
    }

    async fn try_kernel(
        &self,
        row: &mut MountRow,
        snapshot: &Snapshot,
        tier: &OpenTier,
    ) -> Result<Served, EngineError> {
        let prepared = self.prepare(row, snapshot, tier).await?;
        let (keeper, dir) = (self.keeper().await?, row.dir().to_owned());
        row.image = Some(prepared.image);
        if let Some(table) = &self.inner.table {
            table.lock().put(row).map_err(NodeError::from)?;
        }
        let owner = required_owner(row);
        let placed = move || KernelMount::place(&keeper, &prepared.mount, &dir, prepared.image, false, owner);
        Ok(Served::Kernel(blocking("mounting", placed).await??))
    }

    /// Takes up the kernel mount that a daemon before this one left at the row's directory.
    pub(super) async fn take_up(&self, row: &MountRow) -> Result<Option<Served>, NodeError> {
        let Some(image) = row.image else {
            return Ok(None);
        };
        let (keeper, dir) = (self.keeper().await?, row.dir().to_owned());
        let found = blocking("looking for a kernel mount", move || KernelMount::find(&keeper, &dir, image)).await?;
        let failed = |source| NodeError::DirIo { dir: row.dir().to_owned(), doing: "may be mounted", source };
        Ok(found.map_err(failed)?.map(Served::Kernel))
    }

    /// Has the kernel take over a mount of `auto`, as soon as it can. In the background.
    pub(super) fn begin_takeover(&self, id: Uuid) {
        let (chosen, tier) = match self.inner.live.lock().get(&id) {
            Some(Live::Mounted(mounted)) => (mounted.row.options.engine, mounted.tier.clone()),
            _ => return,
        };
        if chosen != EngineChoice::Auto || self.inner.table.is_none() || !nix::unistd::geteuid().is_root() {
            return;
        }
        let daemon = self.clone();
        tokio::spawn(async move {
            let stop = daemon.stopping();
            tokio::select! {
                () = stop.cancelled() => return,
                () = daemon.take_over(id) => {}
            }
            // Unmounted meanwhile, or left to the FUSE engine: what is held is not needed.
            let is_needed = match daemon.inner.live.lock().get(&id) {
                None => stop.is_cancelled(),
                Some(Live::Mounted(mounted)) => matches!(mounted.served, Served::Kernel(_)),
                Some(_) => true,
            };
            if let Some(tier) = tier.filter(|_| !is_needed) {
                let _ = blocking("dropping a hold", move || release_hold(&tier, &id)).await;
            }
        });
    }

    async fn take_over(&self, id: Uuid) {
        let mut pace = Pace::default();
        while let Some((row, snapshot, view)) = self.served_by_fuse(&id) {
            let dir = row.dir().to_owned();
            let Err(error) = self.try_takeover(row, &snapshot, &view).await else {
                return;
            };
            let (wait, is_new) = pace.after(&error);
            let reason = reason_of(&error);
            if !error.is_passing() {
                tracing::info!(dir = %dir.display(), reason, "the mount stays with the FUSE engine");
                return;
            }
            if is_new {
                tracing::info!(dir = %dir.display(), reason, "the kernel does not serve the mount yet");
            }
            tokio::time::sleep(wait).await;
        }
    }

    fn served_by_fuse(&self, id: &Uuid) -> Option<(MountRow, Snapshot, Arc<MountedView>)> {
        match self.inner.live.lock().get(id) {
            Some(Live::Mounted(mounted)) => match &mounted.served {
                Served::Fuse(view) => Some((mounted.row.clone(), mounted.snapshot.clone(), Arc::clone(view))),
                Served::Kernel(_) => None,
            },
            _ => None,
        }
    }

    async fn try_takeover(
        &self,
        row: MountRow,
        snapshot: &Snapshot,
        view: &Arc<MountedView>,
    ) -> Result<(), EngineError> {
        let tier = self.tier(row.options.tier.as_deref().unwrap_or_default()).await?;
        // Never under a reader. Nothing is prepared while it may take days.
        let is_used = || view.stats().open_files > 0 && view.is_alive();
        while is_used() {
            tokio::time::sleep(LOOK_INTERVAL / 4).await;
        }
        let prepared = self.prepare(&row, snapshot, &tier).await?;
        let until = tokio::time::Instant::now() + PREPARED_FOR_MAX;
        while is_used() {
            if tokio::time::Instant::now() >= until {
                return Err(EngineError::InUse);
            }
            tokio::time::sleep(LOOK_INTERVAL / 20).await;
        }
        // Its own task: what is begun is ended, also where the daemon is told to stop.
        let daemon = self.clone();
        let switched = tokio::spawn(async move { daemon.switch(row, prepared).await }).await;
        switched.map_err(|_| NodeError::Panicked { what: "mounting" })?
    }

    /// Puts a prepared mount in the place of the FUSE mount.
    async fn switch(&self, mut row: MountRow, prepared: Prepared) -> Result<(), EngineError> {
        let (keeper, dir) = (self.keeper().await?, row.dir().to_owned());
        let _changing = self.begin_change(&row.id).ok_or(EngineError::InUse)?;
        row.image = Some(prepared.image);
        if let Some(table) = &self.inner.table {
            table.lock().update(&row).map_err(NodeError::from)?;
        }
        let owner = required_owner(&row);
        let placed = blocking("mounting", move || {
            KernelMount::place(&keeper, &prepared.mount, &dir, prepared.image, true, owner)
        });
        let kernel = match placed.await {
            Ok(Ok(kernel)) => kernel,
            other => {
                row.image = None;
                self.update_row(&row);
                return other?.map(drop).map_err(EngineError::from);
            }
        };
        tracing::info!(dir = %row.dir().display(), "the kernel serves the mount by itself");
        // Not there any more only where the daemon is stopping: then the table names the mount.
        if let Some(Live::Mounted(mounted)) = self.inner.live.lock().get_mut(&row.id) {
            mounted.row = row;
            mounted.served = Served::Kernel(kernel);
        }
        Ok(())
    }

    /// Begins to change what serves a mount. None: it is not mounted, or somebody else changes it.
    fn begin_change(&self, id: &Uuid) -> Option<Changing> {
        match self.inner.live.lock().get_mut(id) {
            Some(Live::Mounted(mounted)) if !mounted.switching => mounted.switching = true,
            _ => return None,
        }
        Some(Changing { daemon: self.clone(), id: *id })
    }

    /// Begins to change what serves a mount, when nobody else does any more. None: it is not mounted.
    pub(super) async fn wait_to_change(&self, id: &Uuid, dir: &Path) -> Result<Option<Changing>, NodeError> {
        let until = tokio::time::Instant::now() + CHANGE_WAIT_MAX;
        loop {
            if let Some(changing) = self.begin_change(id) {
                return Ok(Some(changing));
            }
            if !matches!(self.inner.live.lock().get(id), Some(Live::Mounted(_))) {
                return Ok(None);
            }
            if tokio::time::Instant::now() >= until {
                return Err(NodeError::Busy { dir: dir.to_owned() });
            }
            tokio::time::sleep(CHANGE_INTERVAL).await;
        }
    }

    /// Unmounts the image that a daemon before this one left at the directory of a row that could not be made
    /// again.
    pub(super) async fn unmount_left(&self, row: &MountRow, force: bool) -> Result<(), NodeError> {
        if let Some(left) = self.take_up(row).await? {
            blocking("unmounting", move || left.unmount(force)).await??;
        }
        Ok(())
    }

    /// Drops the hold of a mount whose tier is not open, when it opens. In the background: it may hang.
    pub(super) fn release_hold_later(&self, row: MountRow) {
        let Some(name) = row.options.tier.filter(|_| row.options.engine != EngineChoice::Fuse) else {
            return;
        };
        let (daemon, id) = (self.clone(), row.id);
        tokio::spawn(async move {
            if let Ok(OpenTier { tier: Some(tier), .. }) = daemon.tier(&name).await {
                let _ = blocking("dropping a hold", move || release_hold(&tier, &id)).await;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_is_dropped_of_what_is_neither_mounted_nor_to_be_mounted() {
        let ids: Vec<Uuid> = (1..4).map(Uuid::from_u128).collect();
        let names: Vec<String> = ids.iter().map(hold_name).chain(["other".to_owned()]).collect();
        assert_eq!(orphans(&names, &ids[..2]).collect::<Vec<_>>(), ids[2..]);
        assert_eq!(orphans(&names, &ids).count(), 0);
    }

    #[test]
    fn what_fails_is_tried_less_and_less_and_told_once() {
        let mut pace = Pace::default();
        let absent = EngineError::NotReady(NotReady::Absent { pack: PackId([1; 32]) });
        let seconds = |(wait, is_new): (Duration, bool)| (wait.as_secs(), is_new);
        let waits: Vec<_> = (0..4).map(|_| seconds(pace.after(&absent))).collect();
        assert_eq!(waits, [(2, true), (4, false), (8, false), (10, false)]);
        let full = EngineError::Images(std::io::Error::other("full"));
        assert_eq!(seconds(pace.after(&full)), (2, true));
        let last = (0..100).map(|_| seconds(pace.after(&full))).last();
        assert_eq!(last, Some((300, false)));
    }

    #[test]
    fn only_what_no_time_can_mend_ends_the_attempts() {
        let pack = PackId([1; 32]);
        for passing in [NotReady::Absent { pack }, NotReady::Unchecked { pack }] {
            assert!(EngineError::from(passing).is_passing());
        }
        for lasting in [NotReady::Unproven { pack }, NotReady::Always] {
            assert!(!EngineError::from(lasting).is_passing());
        }
        let old = KeeperError::Protocol { socket: "keeper.sock".into() };
        assert!(!EngineError::from(old).is_passing(), "a keeper of before there was a kernel engine");
        assert!(!EngineError::from(KernelError::NoErofs).is_passing());
    }
}
