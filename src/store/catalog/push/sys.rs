//! The system calls of a push: relative to an open directory, never through a symbolic link.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstatat};
use nix::unistd::{AccessFlags, Whence, faccessat};

use crate::format::pack::ALIGN;
use crate::format::tree::Mtime;

/// Opens the directory that is pushed; it may be named by a symbolic link.
pub(super) fn open_root(dir: &Path) -> nix::Result<OwnedFd> {
    nix::fcntl::open(dir, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

/// Opens a directory below `root`, name by name, so that no link is followed and no length limit met.
pub(super) fn open_dir(root: &OwnedFd, path: &[u8]) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).peekable();
    if names.peek().is_none() {
        return openat(root, OsStr::new("."), flags | OFlag::O_RDONLY, Mode::empty());
    }
    let mut at: Option<OwnedFd> = None;
    while let Some(name) = names.next() {
        let access = if names.peek().is_some() { OFlag::O_PATH } else { OFlag::O_RDONLY };
        let from = at.as_ref().map_or(root.as_fd(), OwnedFd::as_fd);
        at = Some(openat(from, name, flags | access, Mode::empty())?);
    }
    at.ok_or(Errno::ENOENT)
}

/// Opens a regular file for reading. `O_NONBLOCK`: should it have become a pipe, this does not hang.
pub(super) fn open_file(dir: &OwnedFd, name: &[u8]) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    Ok(File::from(openat(dir, name, flags, Mode::empty())?))
}

pub(super) fn lstat(dir: &OwnedFd, name: &[u8]) -> nix::Result<FileStat> {
    fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}

pub(super) fn fstat(file: &impl AsFd) -> nix::Result<FileStat> {
    nix::sys::stat::fstat(file)
}

pub(super) fn read_link(dir: &OwnedFd, name: &[u8]) -> nix::Result<Vec<u8>> {
    readlinkat(dir, name).map(|target| target.as_bytes().to_vec())
}

/// Says whether this process may read the file.
pub(super) fn readable(dir: &OwnedFd, name: &[u8]) -> nix::Result<()> {
    faccessat(dir, name, AccessFlags::R_OK, AtFlags::AT_EACCESS)
}

/// The names of one directory, sorted by bytes, in one piece of memory.
#[derive(Debug, Default)]
pub(super) struct Names {
    bytes: Vec<u8>,
    spans: Vec<(u32, u32)>,
}

impl Names {
    /// Adds a name; false where there is no room for more (4 GiB of names).
    pub(super) fn push(&mut self, name: &[u8]) -> bool {
        let (Ok(start), Ok(len)) = (u32::try_from(self.bytes.len()), u32::try_from(name.len())) else {
            return false;
        };
        self.bytes.extend_from_slice(name);
        self.spans.push((start, len));
        true
    }

    pub(super) fn get(&self, index: usize) -> Option<&[u8]> {
        self.spans.get(index).map(|span| self.at(*span))
    }

    fn at(&self, (start, len): (u32, u32)) -> &[u8] {
        self.bytes.get(start as usize..start as usize + len as usize).unwrap_or_default()
    }

    fn sort(&mut self) {
        let mut spans = std::mem::take(&mut self.spans);
        spans.sort_unstable_by(|a, b| self.at(*a).cmp(self.at(*b)));
        self.spans = spans;
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.spans.iter().map(|span| self.at(*span))
    }
}

/// Lists a directory, sorted, without `.` and `..`.
pub(super) fn list(dir: &OwnedFd) -> nix::Result<Names> {
    let mut names = Names::default();
    for entry in Dir::from_fd(dir.try_clone().map_err(|_| Errno::EMFILE)?)?.iter() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." && !names.push(name) {
            return Err(Errno::EOVERFLOW);
        }
    }
    names.sort();
    Ok(names)
}

pub(super) fn mtime_of(stat: &FileStat) -> Mtime {
    Mtime { secs: stat.st_mtime, nanos: u32::try_from(stat.st_mtime_nsec).unwrap_or(0) }
}

pub(super) fn ctime_of(stat: &FileStat) -> Mtime {
    Mtime { secs: stat.st_ctime, nanos: u32::try_from(stat.st_ctime_nsec).unwrap_or(0) }
}

/// A run of a file that has data: `[start, end)`.
pub(super) type DataRun = (u64, u64);

/// Holes shorter than this are read as the zeros they are: an extent costs more than it saves.
const HOLE_LEN_MIN: u64 = 64 << 10;
/// What a pack index takes for one content.
const EXTENTS_MAX: usize = 1024;

/// Finds the runs with data of a file of `size` bytes; one run where the file system knows no holes.
pub(super) fn data_runs(file: &File, size: u64) -> io::Result<Vec<DataRun>> {
    let mut runs: Vec<DataRun> = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, at, Whence::SeekData) {
            Ok(start) => start.min(size),
            Err(Errno::ENXIO) => break,
            Err(Errno::EINVAL) => return Ok(vec![(0, size)]),
            Err(errno) => return Err(errno.into()),
        };
        let end = match seek(file, start, Whence::SeekHole) {
            Ok(end) => end.min(size),
            Err(Errno::ENXIO) => size,
            Err(errno) => return Err(errno.into()),
        };
        if end <= start {
            break;
        }
        // Extents start on 4 KiB in a pack, whatever the file system's granularity.
        let (start, end) = (start & !(ALIGN - 1), end.next_multiple_of(ALIGN).min(size));
        runs.push((start, end));
        at = end;
    }
    let mut hole_min = HOLE_LEN_MIN;
    loop {
        runs = without_short_holes(&runs, size, hole_min);
        if runs.len() <= EXTENTS_MAX {
            return Ok(runs);
        }
        hole_min *= 2;
    }
}

/// Takes holes shorter than `hole_min` as data.
fn without_short_holes(runs: &[DataRun], size: u64, hole_min: u64) -> Vec<DataRun> {
    let mut merged: Vec<DataRun> = Vec::new();
    for (start, end) in runs.iter().copied() {
        match merged.last_mut() {
            Some(last) if start.saturating_sub(last.1) < hole_min => last.1 = end,
            None if start < hole_min => merged.push((0, end)),
            _ => merged.push((start, end)),
        }
    }
    match merged.last_mut() {
        Some(last) if size - last.1 < hole_min => last.1 = size,
        None if size < hole_min && size > 0 => merged.push((0, size)),
        _ => {}
    }
    merged
}

fn seek(file: &File, at: u64, whence: Whence) -> nix::Result<u64> {
    let at = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
    nix::unistd::lseek(file, at, whence).map(i64::cast_unsigned)
}

/// Says whether a name has ACLs, capabilities or user attributes (a security label alone is not counted).
pub(super) fn has_xattrs(dir: &OwnedFd, name: &[u8]) -> bool {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    let Ok(path) = CString::new(path) else {
        return false;
    };
    let mut list = [0u8; XATTR_LIST_BYTES];
    // SAFETY: `path` is NUL-terminated and outlives the call; the buffer is writable for the length given.
    let len = unsafe { libc::llistxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    counts(len, &list)
}

/// As [`has_xattrs`], of an open file or directory.
pub(super) fn has_xattrs_open(file: &impl AsRawFd) -> bool {
    let mut list = [0u8; XATTR_LIST_BYTES];
    // SAFETY: the descriptor is open for as long as `file` is borrowed; the buffer is writable for the length given.
    let len = unsafe { libc::flistxattr(file.as_raw_fd(), list.as_mut_ptr().cast(), list.len()) };
    counts(len, &list)
}

/// More names than fit are certainly not one label alone.
const XATTR_LIST_BYTES: usize = 1024;

fn counts(len: isize, list: &[u8]) -> bool {
    match usize::try_from(len) {
        Ok(0) => false,
        Ok(len) => list
            .get(..len)
            .unwrap_or_default()
            .split(|byte| *byte == 0)
            .any(|attr| !attr.is_empty() && attr != b"security.selinux"),
        Err(_) => Errno::last() == Errno::ERANGE,
    }
}
