//! What stat(2) shows, as a pure function of an entry and the mount's options.

use crate::format::tree::{Entry, EntryKind, Mtime};

/// An inode number: 1 for the root of the mount, an entry's rank + 2 for everything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(pub u64);

/// The inode number of the root of every mount.
pub const ROOT: Ino = Ino(1);

/// What rank 0 has.
const FIRST: u64 = 2;

/// What a directory gives as its size: one block, as file systems commonly do.
const DIR_SIZE_BYTES: u64 = 4096;

impl Ino {
    /// Gives the number of an entry.
    pub fn of_rank(rank: u64) -> Self {
        Self(rank.saturating_add(FIRST))
    }

    /// Gives the rank of the entry that has this number; None for the root (and 0, which nothing has).
    pub fn rank(self) -> Option<u64> {
        self.0.checked_sub(FIRST)
    }
}

/// What kind of thing an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    File,
    Dir,
    Symlink,
}

/// The attributes of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    pub ino: Ino,
    pub kind: Kind,
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub size_bytes: u64,
    /// In units of 512 bytes.
    pub blocks: u64,
    /// Of content, status and access alike.
    pub mtime: Mtime,
}

/// How a mount shows owners and modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    pub uid: u32,
    pub gid: u32,
    /// Bits that are taken away from every mode, after the overrides.
    pub umask: u32,
    /// Replaces the mode of every file.
    pub file_mode: Option<u32>,
    /// Replaces the mode of every directory.
    pub dir_mode: Option<u32>,
}

impl Look {
    fn mode(&self, kind: Kind, stored: u32) -> u32 {
        let chosen = match kind {
            Kind::File => self.file_mode.unwrap_or(stored),
            Kind::Dir => self.dir_mode.unwrap_or(stored),
            // The kernel does not look at a symlink's own mode.
            Kind::Symlink => return 0o777,
        };
        chosen & 0o7777 & !self.umask
    }

    /// Gives the attributes of a directory from what is stored of it.
    pub fn dir(&self, ino: Ino, mode: u32, mtime: Mtime, subdirs: u64) -> Attr {
        Attr {
            ino,
            kind: Kind::Dir,
            mode: self.mode(Kind::Dir, mode),
            nlink: dir_nlink(subdirs),
            uid: self.uid,
            gid: self.gid,
            size_bytes: DIR_SIZE_BYTES,
            blocks: DIR_SIZE_BYTES / 512,
            mtime,
        }
    }

    /// Gives the attributes of an entry. None for a later entry of a hard-link group: its first
    /// entry has them.
    pub fn entry(&self, ino: Ino, entry: &Entry) -> Option<Attr> {
        let (kind, size_bytes) = match &entry.kind {
            EntryKind::File { size, .. } => (Kind::File, *size),
            EntryKind::Symlink { target } => (Kind::Symlink, target.len() as u64),
            EntryKind::Dir { subdirs, .. } => {
                return Some(self.dir(ino, entry.mode, entry.mtime, *subdirs));
            }
            EntryKind::HardLink { .. } => return None,
        };
        let blocks = if kind == Kind::File { size_bytes.div_ceil(512) } else { 0 };
        Some(Attr {
            ino,
            kind,
            mode: self.mode(kind, entry.mode),
            nlink: entry.nlink,
            uid: self.uid,
            gid: self.gid,
            size_bytes,
            blocks,
            mtime: entry.mtime,
        })
    }
}

/// Counts a directory's links: its name, its own `.`, and the `..` of each directory in it. Where that
/// is more than the field holds, 1 says that links are not tracked.
fn dir_nlink(subdirs: u64) -> u32 {
    u32::try_from(subdirs.saturating_add(2)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::{ContentDigest, ContentId};

    const LOOK: Look = Look { uid: 7, gid: 8, umask: 0, file_mode: None, dir_mode: None };

    fn file(mode: u32, size: u64) -> Entry {
        let content = ContentId::Digest(ContentDigest([0; 32]));
        Entry {
            name: (*b"f").into(),
            mode,
            mtime: Mtime { secs: -1, nanos: 5 },
            nlink: 3,
            kind: EntryKind::File { size, content, pin: None },
        }
    }

    #[test]
    fn stored_values_are_shown_where_nothing_overrides_them() {
        let attr = LOOK.entry(Ino(9), &file(0o4755, 513)).expect("a file");
        assert_eq!((attr.mode, attr.nlink, attr.uid, attr.gid), (0o4755, 3, 7, 8));
        assert_eq!((attr.size_bytes, attr.blocks), (513, 2));
        assert_eq!(attr.mtime, Mtime { secs: -1, nanos: 5 });
    }

    #[test]
    fn overrides_come_before_the_umask_and_spare_symlinks() {
        let look = Look { umask: 0o027, file_mode: Some(0o666), dir_mode: Some(0o777), ..LOOK };
        assert_eq!(look.entry(Ino(9), &file(0o4755, 0)).expect("a file").mode, 0o640);
        assert_eq!(look.dir(ROOT, 0o700, Mtime::default(), 1).mode, 0o750);
        assert_eq!(look.dir(ROOT, 0o700, Mtime::default(), 3).nlink, 5);
        let link = Entry { kind: EntryKind::Symlink { target: (*b"to").into() }, ..file(0o777, 0) };
        let attr = look.entry(Ino(9), &link).expect("a symlink");
        assert_eq!((attr.mode, attr.size_bytes, attr.blocks), (0o777, 2, 0));
    }

    #[test]
    fn numbers_and_ranks_are_each_other_s_inverse() {
        assert_eq!(Ino::of_rank(0), Ino(2));
        assert_eq!(Ino(2).rank(), Some(0));
        assert_eq!(ROOT.rank(), None);
        assert_eq!(Ino(0).rank(), None);
    }
}
