//! The kernel engine: a commit as an EROFS image over its packs, with no daemon in the path of a read.
//!
//! * `build`: makes an image from the verified tree. * `files`: where images are kept, and which of
//!   them are complete. * this file: mounts of them.
//!
//! An image is given to the kernel only with packs that were checked on this node as the mount asks and
//! are held by hard links (whoever calls sees to both), and only where every file's place is one that its
//! pack's own index has. `docs/formats/image.md` has the bytes and the rules.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::keeper::kernel::{ImageMount, KernelError};
use super::keeper::{Client, KeeperError, image_at, kernel};

mod build;
mod files;

pub use build::{BuildError, Subject, build};
pub use files::{Description, Image, ImageId, Images};

/// What the kernel reads ahead of a file. More than of a FUSE mount: nothing is copied on the way.
const READ_AHEAD_KIB: u32 = 2048;

/// A mount that the kernel serves by itself.
#[derive(Debug, Clone)]
pub struct KernelMount {
    pub dir: PathBuf,
    pub image: ImageId,
    keeper: Client,
}

/// Makes a mount that is nowhere yet. Blocks for as long as opening all packs takes. `packs` gives the path
/// of each pack that is to be read.
pub fn prepare(
    image: &Image,
    packs: impl Fn(&crate::format::ids::PackId) -> PathBuf,
    subdir: &Path,
) -> Result<OwnedFd, KernelError> {
    let devices = image.devices(packs);
    let request = ImageMount {
        image: &image.path,
        devices: &devices,
        subdir,
        direct: !devices.first().is_some_and(|first| is_on_nfs(first)),
        read_ahead_kib: READ_AHEAD_KIB,
    };
    kernel::detached(&request)
}

/// Says whether reads of a file go to a server. There, whole windows of read-ahead save round trips; on a
/// local disk they only bring what shuffled readers do not want, and a second copy in memory.
fn is_on_nfs(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::NFS_SUPER_MAGIC)
}

impl KernelMount {
    /// Puts a prepared mount at its directory; `instead`: in the place of the mount of ours that is there.
    pub fn place(
        keeper: &Client,
        mount: &OwnedFd,
        dir: &Path,
        image: ImageId,
        instead: bool,
    ) -> Result<Self, KeeperError> {
        keeper.place(mount, dir, instead)?;
        Ok(Self { dir: dir.to_owned(), image, keeper: keeper.clone() })
    }

    /// Takes up a mount of an image that is at a directory already. None: it is not there.
    pub fn find(keeper: &Client, dir: &Path, image: ImageId) -> Option<Self> {
        let found = Self { dir: dir.to_owned(), image, keeper: keeper.clone() };
        found.is_alive().then_some(found)
    }

    /// Says whether it is (still) what is seen at its directory.
    pub fn is_alive(&self) -> bool {
        let shown = image_at(&self.dir).ok().flatten();
        shown.is_some_and(|path| path.file_name() == Path::new(&self.image.file_name()).file_name())
    }

    /// Unmounts. By force: at once, whoever uses it; what is open goes on.
    pub fn unmount(&self, force: bool) -> Result<(), KeeperError> {
        if self.is_alive() { self.keeper.unmount(&self.dir, force) } else { Ok(()) }
    }
}
