//! EROFS mounts by the calls that need no loop device: fsopen, fsconfig, fsmount, move_mount.
//!
//! Two halves, because opening thousands of packs on a slow server takes long and the keeper must not:
//! [`detached`] runs in the daemon and gives a mount that is nowhere yet; the keeper puts it at its
//! directory ([`place`]), where nothing can take long. A mount needs nobody to live: the kernel holds it.
//!
//! *Beneath.* Where a FUSE mount of the commit is at the directory, the new mount is put beneath it, and
//! the FUSE mount is then taken away lazily. So the path shows the commit at every moment, whoever has
//! something open goes on with it, and afterwards there is one mount only.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use parking_lot::Mutex;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

/// What the name of every image of ours ends with: by that the mount table tells our mounts.
pub(crate) const IMAGE_SUFFIX: &str = ".larder";
/// Longest value that fsconfig(2) takes for a device.
const VALUE_LEN_MAX: usize = 250;
/// What the kernel says at most of why it refuses.
const SAID_LEN_MAX: usize = 1024;

/// Why the kernel does not take an image.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("EROFS mounts need root; run the daemon as root, or mount with --engine fuse")]
    NotRoot,
    #[error("this kernel has no EROFS (CONFIG_EROFS_FS); load the module `erofs`, or mount with --engine fuse")]
    NoErofs,
    #[error(
        "{}: the kernel mounts no image from this file; it needs Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE, and \
         the state directory on a local disk (not tmpfs, not overlayfs); or mount with --engine fuse", image.display()
    )]
    NotFromFiles { image: PathBuf },
    #[error("{}: the kernel does not take the image: {said}", image.display())]
    Refused {
        image: PathBuf,
        said: String,
        #[source]
        source: io::Error,
    },
    #[error("{}: {doing}", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

/// An image with what belongs to it.
#[derive(Debug, Clone)]
pub struct ImageMount<'a> {
    pub image: &'a Path,
    /// In the order of the image.
    pub devices: &'a [PathBuf],
    /// Directory that is shown as the root; empty: the image's own.
    pub subdir: &'a Path,
    /// Reads packs past their own page cache, so that bytes are kept once.
    pub direct: bool,
    pub read_ahead_kib: u32,
}

/// Only one mount is made at a time: which entry below /sys/class/bdi is whose shows by what is new.
static MAKING: Mutex<()> = Mutex::new(());

/// Makes a mount that is nowhere yet. Takes as long as opening its devices does.
pub fn detached(request: &ImageMount<'_>) -> Result<OwnedFd, KernelError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(KernelError::NotRoot);
    }
    let fs = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| no_context(request.image, error))?;
    let mut folders = Folders::default();
    let refused = |error: rustix::io::Errno| refusal(&fs, request.image, error);
    fsconfig_set_string(&fs, "source", folders.short(request.image)?).map_err(refused)?;
    for device in request.devices {
        fsconfig_set_string(&fs, "device", folders.short(device)?).map_err(refused)?;
    }
    if request.direct {
        fsconfig_set_flag(&fs, "directio").map_err(refused)?;
    }
    let made = {
        let _one = MAKING.lock();
        let before = read_ahead_entries();
        fsconfig_create(&fs).map_err(refused)?;
        raise_read_ahead(&before, request.read_ahead_kib);
        let attributes =
            MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(refused)?
    };
    if request.subdir.as_os_str().is_empty() { Ok(made) } else { below(&made, request.subdir) }
}

/// Gives the mount of a directory of a mount. A symbolic link on the way would lead out of it.
fn below(mount: &OwnedFd, subdir: &Path) -> Result<OwnedFd, KernelError> {
    let failed = |doing| {
        let path = subdir.to_owned();
        move |error: rustix::io::Errno| KernelError::Io { path, doing, source: error.into() }
    };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir =
        openat2(mount, subdir, flags, Mode::empty(), resolve).map_err(failed("is not a directory of the image"))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(&dir, "", flags).map_err(failed("cannot be shown as a mount of its own"))
}

/// Puts a detached mount at a directory: on top of what is there, or beneath it.
pub(super) fn place(mount: BorrowedFd<'_>, dir: &Path, beneath: bool, owner: Option<u32>) -> io::Result<()> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if beneath {
        flags |= MoveMountFlags::from_bits_retain(MOVE_MOUNT_BENEATH);
    }
    let Some(owner) = owner else {
        return Ok(move_mount(mount, "", CWD, dir, flags)?);
    };
    if beneath {
        // What is there is a mount of ours, put there when it was looked at whose the directory is: it shows the
        // dataset's own root now.
        let top = open_without_links(dir)?;
        return Ok(move_mount(mount, "", top, "", flags | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH)?);
    }
    let held = open_owned(dir, owner)?;
    Ok(move_mount(mount, "", held, "", flags | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH)?)
}

/// Opens a directory by a path that has no symbolic link in it.
pub(super) fn open_without_links(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match openat2(CWD, dir, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
        // Filters of older container runtimes let nobody make a call that they do not know.
        Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => step_without_links(dir),
        opened => Ok(opened?),
    }
}

/// The same without openat2: name by name, none of which may be a link.
fn step_without_links(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut held = openat(CWD, "/", flags, Mode::empty())?;
    for part in dir.components() {
        match part {
            Component::RootDir => {}
            Component::Normal(name) => held = openat(&held, name, flags, Mode::empty())?,
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
    }
    Ok(held)
}

/// Opens a directory that has to be somebody's, without following a symbolic link on the way: whoever may mount on
/// directories of his own could have put a link in the place of one.
pub(super) fn open_owned(dir: &Path, owner: u32) -> io::Result<OwnedFd> {
    let held = open_without_links(dir)?;
    let found = rustix::fs::fstat(&held)?;
    if found.st_uid != owner {
        let why = format!("the directory is user {}'s, not user {owner}'s", found.st_uid);
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    Ok(held)
}

/// Since Linux 6.5.
const MOVE_MOUNT_BENEATH: u32 = 0x200;

/// Says whether a mounted file system is an image of ours, by its line in the mount table.
pub(super) fn is_image(fs_type: &str, source: &Path) -> bool {
    fs_type == "erofs" && source.to_string_lossy().ends_with(IMAGE_SUFFIX)
}

/// Says why the kernel begins no mount. Only one answer means that it knows no EROFS.
fn no_context(image: &Path, error: rustix::io::Errno) -> KernelError {
    match Errno::from_raw(error.raw_os_error()) {
        Errno::ENODEV => KernelError::NoErofs,
        Errno::EPERM => KernelError::NotRoot,
        _ => KernelError::Io { path: image.to_owned(), doing: "no mount can be begun", source: error.into() },
    }
}

/// Turns the kernel's refusal into one that says what to do.
fn refusal(fs: &OwnedFd, image: &Path, error: rustix::io::Errno) -> KernelError {
    let source = io::Error::from(error);
    match Errno::from_raw(error.raw_os_error()) {
        Errno::ENOTBLK => KernelError::NotFromFiles { image: image.to_owned() },
        Errno::EPERM => KernelError::NotRoot,
        _ => KernelError::Refused { image: image.to_owned(), said: said_by(fs), source },
    }
}

/// Reads what the kernel has to say about a mount that it does not make.
fn said_by(fs: &OwnedFd) -> String {
    let mut lines = Vec::new();
    let mut buf = [0; SAID_LEN_MAX];
    while let Ok(len) = nix::unistd::read(fs.as_fd(), &mut buf) {
        let text = String::from_utf8_lossy(buf.get(..len).unwrap_or_default()).trim().to_owned();
        if len == 0 || lines.len() > 8 {
            break;
        }
        lines.push(text);
    }
    if lines.is_empty() { "it does not say why; see the kernel's log".to_owned() } else { lines.join("; ") }
}

/// Folders that are open so that paths below them are short.
#[derive(Default)]
struct Folders(HashMap<PathBuf, File>);

impl Folders {
    fn short(&mut self, path: &Path) -> Result<PathBuf, KernelError> {
        if path.as_os_str().len() <= VALUE_LEN_MAX {
            return Ok(path.to_owned());
        }
        let failed = |source| KernelError::Io { path: path.to_owned(), doing: "cannot be opened", source };
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        };
        if !self.0.contains_key(folder) {
            self.0.insert(folder.to_owned(), File::open(folder).map_err(failed)?);
        }
        let number = self.0.get(folder).map(AsRawFd::as_raw_fd).unwrap_or_default();
        Ok(Path::new("/proc/self/fd").join(number.to_string()).join(name))
    }
}

fn read_ahead_entries() -> BTreeSet<PathBuf> {
    let listed = fs::read_dir("/sys/class/bdi").into_iter().flatten().flatten();
    listed.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains("/erofs-")).collect()
}

/// Raises the read-ahead of what is new since `before`. Without it, reads are slower and nothing else.
fn raise_read_ahead(before: &BTreeSet<PathBuf>, kib: u32) {
    for entry in read_ahead_entries().difference(before) {
        let path = entry.join("read_ahead_kb");
        let now = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u32>().ok());
        if now.is_some_and(|now| now < kib)
            && let Err(error) = fs::write(&path, kib.to_string())
        {
            tracing::debug!(%error, path = %path.display(), "the kernel's read-ahead stays at its default");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_and_without_openat2_a_directory_is_reached_by_its_own_path_only() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path().canonicalize().expect("is there");
        fs::create_dir_all(dir.join("a/b")).expect("makes");
        std::os::unix::fs::symlink("a", dir.join("link")).expect("links");
        fs::write(dir.join("file"), "").expect("writes");
        for open in [open_without_links, step_without_links] {
            assert!(open(&dir.join("a/b")).is_ok());
            for path in ["link", "link/b", "file", "gone"] {
                assert!(open(&dir.join(path)).is_err(), "{path}");
            }
        }
    }
}
