//! The kernel engine: a commit as an EROFS image over its packs, with no daemon in the path of a read.
//!
//! * `build`: makes an image from the verified tree. * `files`: where images are kept, and which of
//!   them are complete. * this file: mounts of them.
//!
//! An image is given to the kernel only with packs that were checked on this node as the mount asks and
//! are held by hard links (whoever calls sees to both), and only where every file's place is one that its
//! pack's own index has. `docs/formats/image.md` has the bytes and the rules.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::keeper::kernel::{ImageMount, KernelError};
use super::keeper::{Client, ImageLine, KeeperError, image_at, image_by_id, kernel};

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
    /// Its number in the mount table.
    id: u64,
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
        owner: Option<u32>,
    ) -> Result<Self, KeeperError> {
        let placed = keeper.place(mount, dir, instead, owner);
        // Whatever was answered, or not: what is there now counts.
        match (Self::find(keeper, dir, image), placed) {
            (Ok(Some(found)), Ok(()) | Err(KeeperError::Unreachable { .. } | KeeperError::Protocol { .. })) => {
                Ok(found)
            }
            (_, Err(error)) => Err(error),
            (Ok(None), Ok(())) => {
                let what = format!("{} does not show the image that was mounted there", dir.display());
                Err(KeeperError::Refused { errno: nix::errno::Errno::ENOENT as i32, what })
            }
            (Err(source), Ok(())) => {
                let what = format!("/proc/self/mountinfo cannot be read: {source}");
                Err(KeeperError::Refused { errno: source.raw_os_error().unwrap_or_default(), what })
            }
        }
    }

    /// Takes up a mount of an image that is at a directory already. None: it is not there.
    pub fn find(keeper: &Client, dir: &Path, image: ImageId) -> io::Result<Option<Self>> {
        let found = image_at(dir)?.filter(|line| image.is_file(&line.image));
        Ok(found.map(|line| Self { dir: dir.to_owned(), image, id: line.id, keeper: keeper.clone() }))
    }

    /// Says whether it is (still) mounted, also beneath another mount, or where a directory above it got
    /// another name. Yes where the mount table cannot be read: what is forgotten loses its packs.
    pub fn is_alive(&self) -> bool {
        self.line().map_or(true, |line| line.is_some())
    }

    fn line(&self) -> io::Result<Option<ImageLine>> {
        Ok(image_by_id(self.id)?.filter(|line| self.image.is_file(&line.image)))
    }

    /// Unmounts. By force: at once, whoever uses it; what is open goes on.
    pub fn unmount(&self, force: bool) -> Result<(), KeeperError> {
        match self.line() {
            Ok(None) => Ok(()),
            Ok(Some(line)) if !line.is_on_top => {
                let what = format!("{}: something else is mounted over it; unmount that first", line.dir.display());
                Err(KeeperError::Refused { errno: nix::errno::Errno::EBUSY as i32, what })
            }
            Ok(Some(line)) => self.keeper.unmount(&line.dir, force),
            Err(_) => self.keeper.unmount(&self.dir, force),
        }
    }
}
