//! The tier's file system for real: a local directory or an NFS mount.
//!
//! What looks roundabout here is for NFS: `stat` opens the name first, because an open asks the
//! server and a stat may answer from a cache that is seconds old; `refresh` opens and closes a
//! folder, which makes the client ask whether its names changed.
//!
//! Others may write into a tier. A name is looked up below the tier's directory, never through a symbolic
//! link or out of it (openat2), and what is opened is a file or a folder and nothing that could hang, such as a pipe.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, renameat};
use nix::libc;
use nix::sys::stat::{Mode, fchmod, futimens, mkdirat};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC,
    statfs,
};
use nix::sys::statvfs::statvfs;
use nix::sys::time::TimeSpec;
use nix::unistd::{LinkatFlags, UnlinkatFlags, fchownat, linkat, unlinkat};

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

    /// Opens what a path below the tier names, and nothing else: no link is followed, nothing waits.
    fn open_at(&self, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
        let mut quiet = OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        if !flags.contains(OFlag::O_PATH) {
            quiet |= OFlag::O_NONBLOCK;
        }
        let base = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = nix::fcntl::open(&self.root, base, Mode::empty())?;
        let path = if path.is_empty() { "." } else { path };
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
        let how = OpenHow::new().flags(flags | quiet).resolve(resolve);
        match openat2(&root, path, how) {
            // A sandbox of before Linux 5.6, some of which forbid what they do not know: folder by folder.
            Err(Errno::ENOSYS | Errno::EPERM) => walk(root, path, flags | quiet),
            opened => Ok(opened?),
        }
    }

    /// Opens a file; anything else that has its name is refused.
    fn open_file(&self, path: &str, flags: OFlag) -> io::Result<(File, fs::Metadata)> {
        let file = File::from(self.open_at(path, flags)?);
        let meta = file.metadata()?;
        if meta.is_file() {
            return Ok((file, meta));
        }
        // As damage is: it is not read, and healed from the lake.
        let errno = if meta.is_dir() { Errno::EISDIR } else { Errno::EINVAL };
        Err(errno.into())
    }

    fn open_dir(&self, path: &str) -> io::Result<OwnedFd> {
        self.open_at(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
    }

    /// Opens the folder of a path; gives the last name too.
    fn folder<'a>(&self, path: &'a str) -> io::Result<(OwnedFd, &'a str)> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((self.open_at(folder, OFlag::O_PATH | OFlag::O_DIRECTORY)?, name))
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

    fn give_away_at(&self, folder: &OwnedFd, name: &str) {
        if self.owner != (None, None) {
            let (uid, gid) =
                (self.owner.0.map(nix::unistd::Uid::from_raw), self.owner.1.map(nix::unistd::Gid::from_raw));
            let _ = fchownat(folder, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW);
        }
    }
}

/// Opens a path folder by folder, without following a link.
fn walk(root: OwnedFd, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
    let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
    let way = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut at = root;
    for folder in folders.split('/').filter(|folder| !folder.is_empty()) {
        if folder == ".." {
            return Err(Errno::EXDEV.into());
        }
        at = openat(&at, folder, way, Mode::empty())?;
    }
    if name == ".." { Err(Errno::EXDEV.into()) } else { Ok(openat(&at, name, flags, Mode::empty())?) }
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
        let flags = if write { OFlag::O_RDWR } else { OFlag::O_RDONLY };
        Ok(self.open_file(path, flags)?.0)
    }

    fn create(&self, path: &str) -> io::Result<File> {
        let (folder, name) = self.folder(path)?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = File::from(openat(&folder, name, flags, Mode::from_bits_truncate(self.file_mode))?);
        if file.metadata()?.mode() & 0o7777 != self.file_mode {
            file.set_permissions(fs::Permissions::from_mode(self.file_mode))?;
        }
        self.give_away_at(&folder, name);
        Ok(file)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let ((from, old), (to, new)) = (self.folder(from)?, self.folder(to)?);
        Ok(linkat(&from, old, &to, new, LinkatFlags::empty())?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let ((from, old), (to, new)) = (self.folder(from)?, self.folder(to)?);
        Ok(renameat(&from, old, &to, new)?)
    }

    fn unlink(&self, path: &str) -> io::Result<()> {
        let (folder, name) = self.folder(path)?;
        Ok(unlinkat(&folder, name, UnlinkatFlags::NoRemoveDir)?)
    }

    fn mkdir(&self, path: &str) -> io::Result<()> {
        let (folder, name) = self.folder(path)?;
        let mode = Mode::from_bits_truncate(self.dir_mode);
        mkdirat(&folder, name, mode)?;
        // The umask may have taken bits away. A folder that somebody has put a link in the place of is not dressed.
        let made = openat(
            &folder,
            name,
            OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        fchmod(made.as_fd(), mode)?;
        self.give_away_at(&folder, name);
        Ok(())
    }

    fn rmdir(&self, path: &str) -> io::Result<()> {
        let (folder, name) = self.folder(path)?;
        Ok(unlinkat(&folder, name, UnlinkatFlags::RemoveDir)?)
    }

    fn list(&self, dir: &str) -> io::Result<Vec<Listed>> {
        let mut listed = nix::dir::Dir::from_fd(self.open_dir(dir)?)?;
        let mut names = Vec::new();
        for entry in listed.iter() {
            let entry = entry?;
            // Names that are not UTF-8 cannot be ours; shown lossily so that `check` reports them.
            let name = entry.file_name().to_string_lossy().into_owned();
            if matches!(name.as_str(), "." | ".." | ".snapshot") || name.starts_with(".nfs") {
                continue;
            }
            let is_dir = match entry.file_type() {
                Some(kind) => kind == nix::dir::Type::Directory,
                // This file system does not say so in a listing. What is gone meanwhile is no folder.
                None => {
                    let path = if dir.is_empty() { name.clone() } else { format!("{dir}/{name}") };
                    self.open_at(&path, OFlag::O_PATH | OFlag::O_DIRECTORY).is_ok()
                }
            };
            names.push(Listed { name, is_dir });
        }
        names.sort();
        Ok(names)
    }

    fn stat(&self, path: &str) -> io::Result<Stat> {
        Ok(stat_of(&File::from(self.open_at(path, OFlag::O_RDONLY)?).metadata()?))
    }

    fn touch(&self, path: &str) -> io::Result<Stat> {
        let (file, _) = self.open_file(path, OFlag::O_WRONLY)?;
        futimens(&file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW)?;
        Ok(stat_of(&file.metadata()?))
    }

    fn refresh(&self, dir: &str) -> io::Result<()> {
        self.open_dir(dir).map(drop)
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        match File::from(self.open_dir(dir)?).sync_all() {
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A tier's directory, and one beside it that nobody may reach from there.
    fn beside() -> (tempfile::TempDir, RealIo, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory");
        let (tier, outside) = (dir.path().join("tier"), dir.path().join("outside"));
        for folder in [tier.join("objects/ab"), outside.join("ab")] {
            fs::create_dir_all(folder).expect("mkdir");
        }
        fs::write(outside.join("secret"), b"secret").expect("writes");
        fs::write(tier.join("objects/ab/good"), b"good").expect("writes");
        let io = RealIo::new(&tier);
        (dir, io, outside)
    }

    #[test]
    fn a_link_that_somebody_put_into_a_tier_leads_nowhere() {
        let (dir, io, outside) = beside();
        let tier = dir.path().join("tier");
        symlink(&outside, tier.join("objects/cd")).expect("links");
        symlink(outside.join("secret"), tier.join("objects/ab/link")).expect("links");
        fs::write(outside.join("ab/victim"), b"x").expect("writes");
        for path in ["objects/ab/link", "objects/cd/secret", "../outside/secret", "objects/../../outside/secret"] {
            assert!(io.open(path, false).is_err(), "open {path}");
            assert!(io.stat(path).is_err(), "stat {path}");
            assert!(io.touch(path).is_err(), "touch {path}");
        }
        assert!(io.create("objects/cd/new").is_err());
        assert!(io.mkdir("objects/cd/new").is_err());
        assert!(io.list("objects/cd").is_err());
        assert!(io.unlink("objects/cd/secret").is_err());
        assert!(io.rmdir("objects/cd/ab").is_err());
        assert!(io.link("objects/ab/good", "objects/cd/good").is_err());
        assert!(io.rename("objects/ab/good", "objects/cd/good").is_err());
        assert!(io.rename("objects/cd/secret", "objects/ab/secret").is_err());
        let mut left: Vec<_> = fs::read_dir(&outside).expect("lists").flatten().map(|e| e.file_name()).collect();
        left.sort();
        assert_eq!(left, ["ab", "secret"], "nothing was put there or taken from there");
        // The link itself can be taken away, as anything that does not belong there.
        io.unlink("objects/ab/link").expect("unlinks");
        assert_eq!(fs::read(outside.join("secret")).expect("reads"), b"secret");
        assert!(io.list("objects").expect("lists").iter().all(|listed| listed.is_dir == (listed.name == "ab")));
    }

    #[test]
    fn what_is_no_file_is_not_opened_and_nobody_waits_for_it() {
        let (dir, io, _) = beside();
        let pipe = dir.path().join("tier/objects/ab/pipe");
        nix::unistd::mkfifo(&pipe, Mode::from_bits_truncate(0o600)).expect("makes a pipe");
        // Without O_NONBLOCK these would wait for somebody at the other end for ever.
        for write in [false, true] {
            assert!(io.open("objects/ab/pipe", write).is_err());
        }
        assert!(io.touch("objects/ab/pipe").is_err());
        io.stat("objects/ab/pipe").expect("is looked at");
        assert!(io.open("objects/ab", false).is_err(), "a folder is no file");
        assert_eq!(io.stat("objects/ab").map(|stat| stat.is_dir).ok(), Some(true));
        let mut bytes = [0; 4];
        io.open("objects/ab/good", false).expect("opens").read_exact_at(&mut bytes, 0).expect("reads");
        assert_eq!(&bytes, b"good");
    }

    #[test]
    fn without_openat2_a_path_is_walked_in_the_same_way() {
        let (dir, _, outside) = beside();
        let tier = dir.path().join("tier");
        symlink(&outside, tier.join("objects/cd")).expect("links");
        let root = || {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
            nix::fcntl::open(&tier, flags, Mode::empty()).expect("opens")
        };
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW;
        assert!(walk(root(), "objects/ab/good", flags).is_ok() && walk(root(), ".", flags).is_ok());
        for path in ["objects/cd/secret", "..", "../outside/secret", "objects/../../outside", "objects/cd"] {
            assert!(walk(root(), path, flags).is_err(), "{path}");
        }
    }
}
