//! A view, mounted: keeper, session and read-ahead together, as the daemon uses them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tokio::runtime::Handle;

use super::keeper::{Client, KeeperError, MountId, MountRequest, shows_image};
use super::session::{MountStats, ServeOptions, Session};
use super::view::View;
use crate::store::histogram::Times;

/// Where and how a view is to be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountSpec {
    /// An existing directory.
    pub dir: PathBuf,
    /// Whose it has to be, reached without a symbolic link; None: anybody's.
    pub owner: Option<u32>,
    /// `DATASET@REV`; the mount table shows it as `larder:DATASET@REV`.
    pub source: String,
    /// Whether other users than the mounting one may look in.
    pub allow_other: bool,
    /// Kept with the mount by the keeper, for a daemon that comes later.
    pub note: String,
    /// What the kernel reads ahead; needs root, is left alone without. 0: the kernel's default.
    pub read_ahead_kib: u32,
    pub serve: ServeOptions,
}

/// What the kernel reads ahead where nothing else is said. Sequential readers of packed files and of
/// what is still being fetched gain up to 1 MiB, which is also the largest request.
pub const READ_AHEAD_KIB: u32 = 1024;

/// How long an unmount waits for the workers to see it.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a view could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("{dir} cannot be mounted on; name an existing directory")]
    Dir {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot mount at {dir}")]
    Keeper {
        dir: PathBuf,
        #[source]
        source: KeeperError,
    },
    #[error("cannot serve the mount at {dir}")]
    Serve {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It was taken away: who had something open there has got errors.
    #[error("nobody can take over the mount at {dir}")]
    Lost {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl MountError {
    /// Says that a mount that was to be taken over is there no more. Any other error has changed nothing: it waits
    /// for the next try.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}

/// A mount that is being served.
#[derive(Debug)]
pub struct MountedView {
    /// Another keeper gives it another one.
    id: AtomicU64,
    /// As the keeper knows it.
    request: MountRequest,
    keeper: Client,
    session: Session,
}

/// Mounts a view. Blocks while the keeper mounts; call it from a thread that may.
pub fn mount(view: View, keeper: &Client, spec: MountSpec, rt: &Handle) -> Result<MountedView, MountError> {
    let (dir, request) = request_of(&spec)?;
    let MountSpec { read_ahead_kib, serve, .. } = spec;
    let fds = keeper.mount(request.clone()).map_err(|source| MountError::Keeper { dir: dir.clone(), source })?;
    let session = match Session::serve(view, fds.fuse, fds.slots, serve, rt.clone()) {
        Ok(session) => session,
        Err(source) => {
            let _ = keeper.unmount(&dir, true);
            return Err(MountError::Serve { dir, source });
        }
    };
    // The first question for a time of birth (statx, as std asks it) learns that there is none. Asked
    // now, it is not the one that waits when no daemon lives; and the mount has been seen to answer.
    if let Err(error) = std::fs::symlink_metadata(&dir) {
        tracing::warn!(%error, dir = %dir.display(), "a new mount does not answer for its root");
    }
    if read_ahead_kib > 0
        && let Err(error) = keeper.raise_read_ahead(fds.id, read_ahead_kib)
    {
        tracing::debug!(%error, dir = %dir.display(), "the kernel's read-ahead stays at its default");
    }
    Ok(MountedView { id: AtomicU64::new(fds.id.0), request, keeper: keeper.clone(), session })
}

fn request_of(spec: &MountSpec) -> Result<(PathBuf, MountRequest), MountError> {
    let dir = match spec.owner {
        // The keeper refuses a link on the way.
        Some(_) => spec.dir.clone(),
        None => std::fs::canonicalize(&spec.dir).map_err(|source| MountError::Dir { dir: spec.dir.clone(), source })?,
    };
    let MountSpec { source, allow_other, note, owner, .. } = spec;
    let request = MountRequest {
        dir: dir.clone(),
        owner: *owner,
        source: source.clone(),
        allow_other: *allow_other,
        note: note.clone(),
    };
    Ok((dir, request))
}

/// Takes over a mount that another daemon served. Where that can never be, the mount is taken away by force, so
/// that nobody waits for it for ever: then the error is [`MountError::Lost`].
pub fn take_over(
    view: View,
    keeper: &Client,
    id: MountId,
    spec: MountSpec,
    rt: &Handle,
) -> Result<MountedView, MountError> {
    let MountSpec { dir, owner, source, allow_other, note, serve, .. } = spec;
    let fds = match keeper.attach(id) {
        Ok(fds) => fds,
        Err(KeeperError::Refused { errno, .. }) if errno == Errno::ENOENT as i32 => {
            return Err(MountError::Lost { dir, source: Errno::ENOENT.into() });
        }
        Err(source) => return Err(MountError::Keeper { dir, source }),
    };
    match Session::serve(view, fds.fuse, fds.slots, serve, rt.clone()) {
        Ok(session) => {
            let request = MountRequest { dir, owner, source, allow_other, note };
            Ok(MountedView { id: AtomicU64::new(id.0), request, keeper: keeper.clone(), session })
        }
        Err(source) if source.kind() == io::ErrorKind::Unsupported => {
            drop_mount(keeper, &dir, id);
            Err(MountError::Lost { dir, source })
        }
        Err(source) => Err(MountError::Serve { dir, source }),
    }
}

/// Takes a mount away that nobody will serve. The keeper lets go of it in any case: what is open there gets errors.
pub fn drop_mount(keeper: &Client, dir: &Path, id: MountId) {
    let unmounted = if shows_image(dir) { Ok(()) } else { keeper.unmount(dir, true) };
    let gone = unmounted.err().into_iter().chain(keeper.forget(id).err());
    for error in gone {
        tracing::warn!(%error, dir = %dir.display(), "it stays mounted");
    }
}

impl MountedView {
    /// Names the mount to the keeper.
    pub fn id(&self) -> MountId {
        MountId(self.id.load(Ordering::Relaxed))
    }

    /// Gives the mount to a keeper that does not have it, because the one before was killed.
    pub fn give_to(&self, keeper: &Client) -> Result<(), MountError> {
        let dir = || self.request.dir.clone();
        let (fuse, slots) = self.session.descriptors().map_err(|source| MountError::Serve { dir: dir(), source })?;
        let adopted = keeper.adopt(self.request.clone(), &fuse, &slots);
        let id = adopted.map_err(|source| MountError::Keeper { dir: dir(), source })?;
        self.id.store(id.0, Ordering::Relaxed);
        Ok(())
    }

    /// Says where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.request.dir
    }

    /// Gives what is mounted.
    pub fn view(&self) -> &View {
        self.session.view()
    }

    /// Says whether the kernel still asks: false once it was unmounted by anybody and is no longer open.
    pub fn is_alive(&self) -> bool {
        self.session.is_alive()
    }

    /// Says whether another daemon can take the mount over while it is in use.
    pub fn can_hand_over(&self) -> bool {
        self.session.can_hand_over()
    }

    /// Copies the counters.
    pub fn stats(&self) -> MountStats {
        self.session.stats()
    }

    /// Gives how long the requests took that waited for something to be fetched.
    pub fn waits(&self) -> Times {
        self.session.waits()
    }

    /// Unmounts. By force: takes the mount out of the tree at once and goes on serving what is open.
    /// Blocks while the keeper unmounts.
    pub fn unmount(&self, force: bool) -> Result<(), KeeperError> {
        // Where an image has taken its place, it is in the directory tree no more.
        if !self.is_alive() || shows_image(&self.request.dir) {
            return Ok(());
        }
        self.keeper.unmount(&self.request.dir, force)?;
        let deadline = Instant::now() + END_TIMEOUT;
        while !force && self.is_alive() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits until the mount is gone.
    pub fn wait(self) {
        self.session.wait();
    }
}
