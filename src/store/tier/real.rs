//! The tier's file system for real: a local directory or an NFS mount.
//!
//! What looks roundabout here is for NFS: `stat` opens the name first, because an open asks the
//! server and a stat may answer from a cache that is seconds old; `refresh` opens and closes a
//! folder, which makes the client ask whether its names changed.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::stat::futimens;
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC,
    statfs,
};
use nix::sys::statvfs::statvfs;
use nix::sys::time::TimeSpec;

use crate::store::tier::error::TierError;
use crate::store::tier::io::{Listed, Space, Stat, TierFile, TierIo};
use crate::store::tier::marker::{InitOptions, Marker};

/// A directory of this machine.
#[derive(Debug)]
pub struct RealIo {
    root: PathBuf,
    dir_mode: u32,
    file_mode: u32,
    owner: (Option<u32>, Option<u32>),
    remote: bool,
}

/// Whether a directory lies on a server: a file system that we do not know to be local may be one.
fn is_remote(dir: &Path) -> bool {
    const LOCAL: [FsType; 6] =
        [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC, OVERLAYFS_SUPER_MAGIC, F2FS_SUPER_MAGIC];
    statfs(dir).is_ok_and(|found| !LOCAL.contains(&found.filesystem_type()))
}

impl RealIo {
    /// Names a directory; looks at nothing.
    pub fn new(root: &Path) -> Self {
        let defaults = InitOptions::default();
        Self {
            root: root.to_owned(),
            dir_mode: defaults.dir_mode,
            file_mode: defaults.file_mode(),
            owner: (None, None),
            remote: false,
        }
    }

    pub(crate) fn with_marker(mut self, marker: &Marker) -> Self {
        self.dir_mode = marker.dir_mode;
        self.file_mode = marker.file_mode;
        self.owner = (marker.uid, marker.gid);
        self.remote = is_remote(&self.root);
        self
    }

    pub(crate) fn for_init(root: &Path, options: &InitOptions) -> Result<Self, TierError> {
        let io = Self {
            root: root.to_owned(),
            dir_mode: options.dir_mode,
            file_mode: options.file_mode(),
            owner: (options.uid, options.gid),
            remote: false,
        };
        if !root.exists() {
            let failed = |e| TierError::io("make", &root.display().to_string(), e);
            fs::create_dir_all(root).map_err(failed)?;
            io.dress_dir(root).map_err(failed)?;
        }
        Ok(io)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn dress_dir(&self, path: &Path) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(self.dir_mode))?;
        self.give_away(path);
        Ok(())
    }

    /// Under root_squash, and for users, the server decides: then this fails and that is fine.
    fn give_away(&self, path: &Path) {
        if self.owner != (None, None) {
            let _ = std::os::unix::fs::lchown(path, self.owner.0, self.owner.1);
        }
    }
}

fn stat_of(meta: &fs::Metadata) -> Stat {
    Stat {
        file_id: meta.ino(),
        size_bytes: meta.size(),
        allocated_bytes: meta.blocks().saturating_mul(512),
        mtime_ns: meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()),
        is_dir: meta.is_dir(),
    }
}

impl TierFile for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn extend(&self, len_bytes: u64) -> io::Result<()> {
        if self.metadata()?.len() < len_bytes { self.set_len(len_bytes) } else { Ok(()) }
    }

    fn stat(&self) -> io::Result<Stat> {
        Ok(stat_of(&self.metadata()?))
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}

impl TierIo for RealIo {
    type File = File;

    fn open(&self, path: &str, write: bool) -> io::Result<File> {
        OpenOptions::new().read(true).write(write).custom_flags(libc::O_NOFOLLOW).open(self.path(path))
    }

    fn create(&self, path: &str) -> io::Result<File> {
        let path = self.path(path);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(self.file_mode).open(&path)?;
        if file.metadata()?.mode() & 0o7777 != self.file_mode {
            file.set_permissions(fs::Permissions::from_mode(self.file_mode))?;
        }
        self.give_away(&path);
        Ok(file)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        fs::hard_link(self.path(from), self.path(to))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    fn unlink(&self, path: &str) -> io::Result<()> {
        fs::remove_file(self.path(path))
    }

    fn mkdir(&self, path: &str) -> io::Result<()> {
        let path = self.path(path);
        fs::DirBuilder::new().mode(self.dir_mode).create(&path)?;
        self.dress_dir(&path)
    }

    fn rmdir(&self, path: &str) -> io::Result<()> {
        fs::remove_dir(self.path(path))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<Listed>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path(dir))? {
            let entry = entry?;
            // Names that are not UTF-8 cannot be ours; shown lossily so that `check` reports them.
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == ".snapshot" || name.starts_with(".nfs") {
                continue;
            }
            names.push(Listed { name, is_dir: entry.file_type()?.is_dir() });
        }
        names.sort();
        Ok(names)
    }

    fn stat(&self, path: &str) -> io::Result<Stat> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(self.path(path))?;
        Ok(stat_of(&file.metadata()?))
    }

    fn touch(&self, path: &str) -> io::Result<Stat> {
        let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(self.path(path))?;
        futimens(&file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW)?;
        Ok(stat_of(&file.metadata()?))
    }

    fn refresh(&self, dir: &str) -> io::Result<()> {
        File::open(self.path(dir)).map(drop)
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        match File::open(self.path(dir))?.sync_all() {
            // Some file systems have no fsync of a folder.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    fn is_remote(&self) -> bool {
        self.remote
    }

    fn space(&self) -> io::Result<Space> {
        let vfs = statvfs(&self.root)?;
        let unit = vfs.fragment_size();
        Ok(Space {
            total_bytes: vfs.blocks().saturating_mul(unit),
            free_bytes: vfs.blocks_available().saturating_mul(unit),
        })
    }
}
