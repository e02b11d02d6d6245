//! Which engine serves a mount, and how the kernel engine takes over.
//!
//! `fuse`: the daemon answers. `kernel`: an EROFS mount over packs that are complete in the tier, checked
//! on this node and held by hard links; no daemon is in the path, and none is needed for it to live on.
//! `auto`: FUSE serves at once, and the kernel takes over when it can and no file is open.
//!
//! Order when the kernel takes over: packs checked, held, the held files compared with what was checked,
//! image built, mount prepared, table written, mount placed. A crash before the last step leaves a hold
//! and an image, which the next attempt continues; a crash behind it leaves a mount that works and a row
//! that names its image, by which the next daemon takes it up.

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
use crate::fs::keeper::KeeperError;
use crate::fs::keeper::kernel::KernelError;
use crate::fs::kernel::{self, BuildError, ImageId, Images, KernelMount, Subject};
use crate::fs::mount::MountedView;
use crate::store::catalog::Snapshot;
use crate::store::fetch::NotReady;
use crate::store::meta::MetaError;
use crate::store::tier::{FileIdentity, Hold, Tier, TierError};

use super::daemon::{Daemon, OpenTier, blocking};
use super::error::NodeError;
use super::mounting::{Live, record_of, view_options};
use super::table::MountRow;

/// How often `auto` looks whether the kernel can take over.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

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
            Self::NotReady(NotReady::Absent { .. }) | Self::Replaced { .. } | Self::Tier(_) | Self::Keeper(_) => true,
            Self::Build(BuildError::Meta(_) | BuildError::Fetch(_) | BuildError::Write(_)) => true,
            Self::Subdir(_) | Self::Images(_) => true,
            Self::NoTier | Self::NotReady(_) | Self::Build(_) | Self::Kernel(_) | Self::Stopped(_) => false,
        }
    }

    /// Gives the next step, where the message does not say it.
    pub fn hint(&self, revision: &str) -> Option<String> {
        match self {
            Self::NotReady(NotReady::Absent { .. }) => Some(format!(
                "bring the commit into the tier first (`larder cache {revision}`), or mount with --engine auto, which serves at once"
            )),
            Self::NotReady(NotReady::Always) => Some("mount with --engine fuse, or with --verify node".to_owned()),
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
        images.sweep(&used);
    }

    /// Drops holds of this node that no mount has: of a mount that was being made when a daemon died.
    pub(super) async fn drop_orphaned_holds(&self, tier: Arc<Tier>) {
        let daemon = self.clone();
        let dropped = blocking("looking for old holds", move || {
            // Listed first: a mount is known before it makes its hold, and forgotten after it dropped it.
            let names = tier.own_holds()?;
            let known: HashSet<Uuid> = daemon.inner.live.lock().keys().copied().collect();
            let ids = names.iter().filter_map(|name| Uuid::try_parse(name).ok());
            ids.filter(|id| !known.contains(id)).try_for_each(|id| tier.release_hold(&hold_name(&id)))
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
        let (look, verify) = (options.look, options.verify);
        let subject = Subject { snapshot: snapshot.clone(), meta, fetcher, look, private, verify };
        let (images, row, daemon) = (self.images()?, row.clone(), self.clone());
        let rt = tokio::runtime::Handle::current();
        let work = move || {
            let hold = hold_packs(&store, &row, &subject.snapshot, &checked)?;
            let stop = daemon.stopping();
            let image = kernel::build(&images, &subject, &rt, &|| !stop.is_cancelled())?;
            daemon.sweep_images(&images);
            let subdir = Path::new(std::ffi::OsStr::from_bytes(&options.subdir));
            let mount = kernel::prepare(&image, |pack| hold.path(pack), subdir)?;
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
        let made = self.try_kernel(row, snapshot, tier).await;
        made.map_err(|source| {
            let (store, id) = (tier.tier.clone(), row.id);
            tokio::task::spawn_blocking(move || store.map(|tier| release_hold(&tier, &id)));
            NodeError::Engine { revision: row.revision.clone(), source: Box::new(source) }
        })
    }

    async fn try_kernel(
        &self,
        row: &mut MountRow,
        snapshot: &Snapshot,
        tier: &OpenTier,
    ) -> Result<Served, EngineError> {
        let prepared = self.prepare(row, snapshot, tier).await?;
        row.image = Some(prepared.image);
        let (keeper, dir) = (self.keeper().await?, row.dir().to_owned());
        let placed = move || KernelMount::place(&keeper, &prepared.mount, &dir, prepared.image, false);
        Ok(Served::Kernel(blocking("mounting", placed).await??))
    }

    /// Takes up the kernel mount that a daemon before this one left at the row's directory.
    pub(super) async fn take_up(&self, row: &MountRow) -> Result<Option<Served>, NodeError> {
        let Some(image) = row.image else {
            return Ok(None);
        };
        let (keeper, dir) = (self.keeper().await?, row.dir().to_owned());
        let found = blocking("looking for a kernel mount", move || KernelMount::find(&keeper, &dir, image)).await?;
        Ok(found.map(Served::Kernel))
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
                () = stop.cancelled() => {}
                () = daemon.take_over(id) => {}
            }
            // Unmounted meanwhile: what was held behind its back is not needed any more.
            let is_gone = !daemon.inner.live.lock().contains_key(&id);
            if let Some(tier) = tier.filter(|_| is_gone && !stop.is_cancelled()) {
                let _ = blocking("dropping a hold", move || release_hold(&tier, &id)).await;
            }
        });
    }

    async fn take_over(&self, id: Uuid) {
        while let Some((row, snapshot, view)) = self.served_by_fuse(&id) {
            let again = match self.try_takeover(row.clone(), &snapshot, &view).await {
                Ok(()) => false,
                Err(error) => {
                    let passing = error.is_passing();
                    if !passing {
                        tracing::info!(dir = %row.dir().display(), %error, "the mount stays with the FUSE engine");
                    }
                    passing
                }
            };
            if !again {
                return;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
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
        mut row: MountRow,
        snapshot: &Snapshot,
        view: &Arc<MountedView>,
    ) -> Result<(), EngineError> {
        let tier = self.tier(row.options.tier.as_deref().unwrap_or_default()).await?;
        let prepared = self.prepare(&row, snapshot, &tier).await?;
        // Never under a reader.
        while view.stats().open_files > 0 && view.is_alive() {
            tokio::time::sleep(LOOK_INTERVAL / 4).await;
        }
        row.image = Some(prepared.image);
        if let Some(table) = &self.inner.table {
            table.lock().update(&row).map_err(NodeError::from)?;
        }
        if !self.set_switching(&row.id, true) {
            return Ok(());
        }
        let (keeper, dir) = (self.keeper().await?, row.dir().to_owned());
        let placed =
            blocking("mounting", move || KernelMount::place(&keeper, &prepared.mount, &dir, prepared.image, true));
        let placed = placed.await;
        self.set_switching(&row.id, false);
        let kernel = placed??;
        tracing::info!(dir = %row.dir().display(), "the kernel serves the mount by itself");
        self.enter_kernel(row, kernel, tier.tier).await
    }

    /// Says that a mount is neither gone nor there for a moment. False: it is not mounted any more.
    fn set_switching(&self, id: &Uuid, switching: bool) -> bool {
        match self.inner.live.lock().get_mut(id) {
            Some(Live::Mounted(mounted)) => {
                mounted.switching = switching;
                true
            }
            _ => false,
        }
    }

    /// Notes that the kernel serves a mount now. Where it was unmounted meanwhile, it is taken away again.
    async fn enter_kernel(
        &self,
        row: MountRow,
        kernel: KernelMount,
        tier: Option<Arc<Tier>>,
    ) -> Result<(), EngineError> {
        let id = row.id;
        let is_mounted = {
            let mut live = self.inner.live.lock();
            match live.get_mut(&id) {
                Some(Live::Mounted(mounted)) => {
                    mounted.row = row;
                    mounted.served = Served::Kernel(kernel.clone());
                    true
                }
                _ => false,
            }
        };
        if !is_mounted {
            blocking("unmounting", move || {
                let ended = kernel.unmount(true);
                if let Some(tier) = tier {
                    release_hold(&tier, &id);
                }
                ended
            })
            .await??;
        }
        Ok(())
    }
}
