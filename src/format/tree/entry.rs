//! Entries: what a tree says of one name.

use crate::format::ids::{ContentId, PinId};

/// A modification time: seconds since 1970 (also before), and nanoseconds below 1,000,000,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mtime {
    pub secs: i64,
    pub nanos: u32,
}

/// A user's own object that an imported tree refers to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pin {
    pub bucket: String,
    pub key: String,
    /// The version id, where the bucket keeps versions.
    pub version: Option<String>,
    /// The ETag as the store gave it, quotes included.
    pub etag: String,
    pub size: u64,
}

impl Pin {
    /// Computes the id: the digest of the encoding, under its own domain.
    pub fn id(&self) -> PinId {
        todo!()
    }
}

/// One name in one directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// 1 to 255 bytes, no `/`, no NUL, not `.` or `..`; not necessarily UTF-8.
    pub name: Box<[u8]>,
    /// Permission bits, setuid, setgid and sticky: at most 0o7777.
    pub mode: u32,
    pub mtime: Mtime,
    /// Links of the group inside this tree, in its first entry; 1 elsewhere.
    pub nlink: u32,
    pub kind: EntryKind,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file. An empty one has the digest of no bytes and no place in a pack.
    File {
        size: u64,
        content: ContentId,
        /// The pin itself, exactly where `content` is a pin.
        pin: Option<Box<Pin>>,
    },
    /// A directory: entries of its own, and of its whole subtree (`descendants >= children`).
    Dir { children: u64, descendants: u64 },
    /// A symbolic link: 1 to 4095 bytes without NUL.
    Symlink { target: Box<[u8]> },
    /// A later entry of a hard-link group: the first one's path from the root, `/` between names.
    /// Its mode and mtime are those of the first and are not stored again (0 here).
    HardLink { first: Box<[u8]> },
}
