//! The seam to the file system: few operations, all synchronous, paths relative to the tier.
//!
//! An implementation promises what an NFS server and its client do, no more: `create` and `link`
//! have one winner; `rename` of one source has one winner and replaces silently; a name may be seen
//! late (a lookup that failed is remembered by the client until [`TierIo::refresh`] of its folder);
//! `stat` and `list` ask the server. There is no locking, no rename that refuses to replace, no
//! atime.

use std::fmt;
use std::io;

/// What a file is known by and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Inode number (the server's file id).
    pub file_id: u64,
    pub size_bytes: u64,
    /// Bytes that the file takes on the medium.
    pub allocated_bytes: u64,
    /// Server's clock, nanoseconds since 1970.
    pub mtime_ns: i64,
    pub is_dir: bool,
}

impl Stat {
    /// Modification time in milliseconds of the server's clock.
    pub fn mtime_ms(&self) -> i64 {
        self.mtime_ns.div_euclid(1_000_000)
    }

    /// Bytes that a file takes: a sparse one less than its size, a small one not its whole block.
    pub fn on_medium(&self) -> u64 {
        self.allocated_bytes.min(self.size_bytes)
    }
}

/// One name in a folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    pub name: String,
    pub is_dir: bool,
}

/// What statvfs says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Space {
    pub total_bytes: u64,
    /// What we may still write (quota and reserved blocks taken off).
    pub free_bytes: u64,
}

/// An open file of the tier.
pub trait TierFile: fmt::Debug + Send + Sync + 'static {
    /// Reads at most `buf.len()` bytes; 0 at the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes the file at least this long; never shorter.
    fn extend(&self, len_bytes: u64) -> io::Result<()>;
    /// Looks at the file itself, not at its name.
    fn stat(&self) -> io::Result<Stat>;
    /// Makes data and length durable.
    fn sync(&self) -> io::Result<()>;
}

/// The file system that has the tier.
pub trait TierIo: fmt::Debug + Send + Sync + 'static {
    type File: TierFile;

    /// Opens an existing file for reading, or for reading and writing.
    fn open(&self, path: &str, write: bool) -> io::Result<Self::File>;
    /// Creates a file that must not exist (O_EXCL), for reading and writing.
    fn create(&self, path: &str) -> io::Result<Self::File>;
    /// Gives a file a second name that must not exist.
    fn link(&self, from: &str, to: &str) -> io::Result<()>;
    /// Moves a file or a folder; replaces a file that has the name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    fn unlink(&self, path: &str) -> io::Result<()>;
    fn mkdir(&self, path: &str) -> io::Result<()>;
    fn rmdir(&self, path: &str) -> io::Result<()>;
    /// Lists a folder as the server has it, without `.snapshot` and the client's own leftovers.
    fn list(&self, dir: &str) -> io::Result<Vec<Listed>>;
    /// Looks at a name as the server has it.
    fn stat(&self, path: &str) -> io::Result<Stat>;
    /// Sets the modification time to the server's now, and gives what the file looks like then.
    fn touch(&self, path: &str) -> io::Result<Stat>;
    /// Makes the client forget what it remembers of a folder's names.
    fn refresh(&self, dir: &str) -> io::Result<()>;
    /// Makes a folder's names durable.
    fn sync_dir(&self, dir: &str) -> io::Result<()>;
    fn space(&self) -> io::Result<Space>;
    /// Says whether it lies on a server that may be away.
    fn is_remote(&self) -> bool;
}

/// Reads from `offset` until `buf` is full or the file ends.
pub(crate) fn read_full<F: TierFile + ?Sized>(file: &F, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
