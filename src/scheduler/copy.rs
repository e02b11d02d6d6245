//! Copies a tree of files that somebody else may be writing to.
//!
//! Directories are opened one below the other and never by a path, and links are not followed: who owns the
//! tree may put a link to another's file into its place at any moment, and the scheduler may be root. What
//! vanishes meanwhile is left out. What is neither a file, a directory nor a symbolic link is left out too.
//!
//! The copy lies in a directory that nobody else gets into.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fstatat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Whence, lseek};

use super::disk::{DiskError, at};

/// Each level has two directories open.
const DEPTH_MAX: u32 = 200;
const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);
/// Opening a pipe must not wait for its writer.
const FILE: OFlag = OFlag::O_RDONLY.union(OFlag::O_NOFOLLOW).union(OFlag::O_NONBLOCK).union(OFlag::O_CLOEXEC);

/// Copies what is in `from` into `to`, a directory that is made. All of it belongs to `owner` then; its modes and
/// times are kept. Nothing where there is no `from`.
pub(super) fn tree(from: &Path, to: &Path, owner: Option<(u32, u32)>) -> Result<(), DiskError> {
    let source = match open(from, DIRECTORY, Mode::empty()) {
        Ok(source) => source,
        Err(Errno::ENOENT) => return Ok(()),
        Err(error) => return Err(at(from, "open the directory")(error.into())),
    };
    Copy { owner }.directory(source, to, 0)
}

/// Copies one file, likewise.
pub(super) fn file(from: &Path, to: &Path) -> Result<(), DiskError> {
    let parent = from.parent().unwrap_or(Path::new("/"));
    let source = match open(parent, DIRECTORY, Mode::empty()) {
        Ok(source) => source,
        Err(Errno::ENOENT) => return Ok(()),
        Err(error) => return Err(at(parent, "open the directory")(error.into())),
    };
    let name = from.file_name().unwrap_or_default().as_bytes();
    let name = std::ffi::CString::new(name).map_err(|error| at(from, "name")(error.into()))?;
    Copy { owner: None }.regular(&source, &name, to)
}

struct Copy {
    owner: Option<(u32, u32)>,
}

impl Copy {
    fn directory(&self, source: OwnedFd, to: &Path, depth: u32) -> Result<(), DiskError> {
        if depth > DEPTH_MAX {
            let error = io::Error::other(format!("it is more than {DEPTH_MAX} directories deep"));
            return Err(at(to, "copy to it")(error));
        }
        let meta = File::from(source.try_clone().map_err(at(to, "copy to it"))?);
        let meta = meta.metadata().map_err(at(to, "look at what is copied to it"))?;
        fs::create_dir(to).map_err(at(to, "make the directory"))?;
        let mut dir = Dir::from_fd(source).map_err(|error| at(to, "read what is copied to it")(error.into()))?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(|error| at(to, "read what is copied to it")(error.into()))?;
            names.push(entry.file_name().to_owned());
        }
        for name in names.iter().filter(|name| !matches!(name.to_bytes(), b"." | b"..")) {
            let below = to.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
            self.one(&dir, name, &below, depth)?;
        }
        self.finish(to, &meta)
    }

    fn one(&self, dir: &impl AsFd, name: &CStr, to: &Path, depth: u32) -> Result<(), DiskError> {
        let stat = match fstatat(dir, name, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(at(to, "look at what is copied to it")(error.into())),
        };
        match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
            SFlag::S_IFDIR => match openat(dir, name, DIRECTORY, Mode::empty()) {
                Ok(below) => self.directory(below, to, depth + 1),
                Err(error) => vanished(error, to),
            },
            SFlag::S_IFREG => self.regular(dir, name, to),
            SFlag::S_IFLNK => match readlinkat(dir, name) {
                Ok(target) => {
                    std::os::unix::fs::symlink(target, to).map_err(at(to, "link"))?;
                    self.give(to)
                }
                Err(error) => vanished(error, to),
            },
            _ => Ok(()),
        }
    }

    fn regular(&self, dir: &impl AsFd, name: &CStr, to: &Path) -> Result<(), DiskError> {
        let mut source = match openat(dir, name, FILE, Mode::empty()) {
            Ok(source) => File::from(source),
            Err(error) => return vanished(error, to),
        };
        let meta = source.metadata().map_err(at(to, "look at what is copied to it"))?;
        if !meta.is_file() {
            return Ok(());
        }
        let mut options = fs::OpenOptions::new();
        let mut copy = options.write(true).create_new(true).mode(0o600).open(to).map_err(at(to, "make"))?;
        // No further than it is long now: it may be a file that grows as fast as it is copied.
        data(&mut source, &mut copy, meta.len()).map_err(at(to, "copy to it"))?;
        drop(copy);
        self.finish(to, &meta)
    }

    /// Gives a file or directory its owner, mode and times.
    fn finish(&self, to: &Path, meta: &fs::Metadata) -> Result<(), DiskError> {
        self.give(to)?;
        // Not setuid and the like: it would be another's program.
        let mode = fs::Permissions::from_mode(meta.mode() & 0o777);
        fs::set_permissions(to, mode).map_err(at(to, "set the mode"))?;
        let time = TimeSpec::new(meta.mtime(), meta.mtime_nsec());
        let set = utimensat(nix::fcntl::AT_FDCWD, to, &time, &time, UtimensatFlags::NoFollowSymlink);
        set.map_err(|error| at(to, "set the times")(error.into()))
    }

    fn give(&self, to: &Path) -> Result<(), DiskError> {
        match self.owner {
            Some((uid, gid)) => std::os::unix::fs::lchown(to, Some(uid), Some(gid)).map_err(at(to, "give away")),
            None => Ok(()),
        }
    }
}

/// Copies the data of a file and leaves its holes: logs are cut at their beginning by making a hole of it.
fn data(source: &mut File, copy: &mut File, len: u64) -> io::Result<()> {
    let mut copied = 0;
    while copied < len {
        let start = i64::try_from(copied).map_err(io::Error::other)?;
        let start = match lseek(&*source, start, Whence::SeekData) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = lseek(&*source, start, Whence::SeekHole)?;
        let (start, end) = (start.unsigned_abs(), end.unsigned_abs().min(len));
        source.seek(io::SeekFrom::Start(start))?;
        copy.seek(io::SeekFrom::Start(start))?;
        io::copy(&mut io::Read::take(&mut *source, end.saturating_sub(start)), copy)?;
        copied = end.max(copied + 1);
    }
    copy.set_len(len.min(source.metadata()?.len()))
}

/// What is gone, or has become a link, since it was looked at is left out.
fn vanished(error: Errno, to: &Path) -> Result<(), DiskError> {
    match error {
        Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR => Ok(()),
        error => Err(at(to, "open what is copied to it")(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_is_copied_as_a_hole() {
        let dir = tempfile::tempdir().expect("a directory");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let mut file = File::create(&from).expect("makes");
        for at in [0, 32 << 20] {
            file.seek(io::SeekFrom::Start(at)).expect("seeks");
            io::Write::write_all(&mut file, b"data").expect("writes");
        }
        file.set_len(64 << 20).expect("grows");
        super::file(&from, &to).expect("copies");
        let (was, is) = (fs::metadata(&from).expect("is there"), fs::metadata(&to).expect("is there"));
        assert!(fs::read(&from).expect("reads") == fs::read(&to).expect("reads"), "other bytes");
        if was.blocks() * 512 > 1 << 20 {
            eprintln!("skipped: this file system has no holes");
            return;
        }
        assert!(is.blocks() * 512 <= 1 << 20, "{} blocks", is.blocks());
    }

    #[test]
    fn a_tree_is_copied_with_modes_times_and_links_that_are_not_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("sub/deeper")).expect("makes");
        fs::write(from.join("sub/a"), "alpha").expect("writes");
        fs::set_permissions(from.join("sub/a"), fs::Permissions::from_mode(0o4751)).expect("changes the mode");
        fs::write(dir.path().join("secret"), "no").expect("writes");
        std::os::unix::fs::symlink("../secret", from.join("link")).expect("links");
        nix::unistd::mkfifo(&from.join("pipe"), Mode::S_IRUSR).expect("makes a pipe");
        tree(&from, &to, None).expect("copies");
        let (was, is) = (fs::metadata(from.join("sub/a")), fs::metadata(to.join("sub/a")));
        let (was, is) = (was.expect("is there"), is.expect("is there"));
        assert_eq!((is.mtime(), is.mtime_nsec()), (was.mtime(), was.mtime_nsec()));
        assert_eq!(is.mode() & 0o7777, 0o751);
        assert_eq!(fs::read_to_string(to.join("sub/a")).expect("reads"), "alpha");
        assert_eq!(fs::read_link(to.join("link")).expect("is a link"), Path::new("../secret"));
        assert!(to.join("sub/deeper").is_dir() && !to.join("pipe").exists());
        tree(&from.join("nothing"), &to.join("nothing"), None).expect("nothing to copy");
        file(&from.join("link"), &to.join("file")).expect("a link is left out");
        assert!(!to.join("nothing").exists() && !to.join("file").exists());
    }
}
