//! Between the view's types and those of the FUSE protocol.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use crate::format::tree::Mtime;
use crate::fs::view::{Attr, Kind, Listed};

use super::{BLOCK_BYTES, GENERATION, TTL};

pub(super) fn time_of(mtime: Mtime) -> SystemTime {
    let whole = if mtime.secs >= 0 {
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(mtime.secs.unsigned_abs()))
    } else {
        SystemTime::UNIX_EPOCH.checked_sub(Duration::from_secs(mtime.secs.unsigned_abs()))
    };
    let nanos = Duration::from_nanos(u64::from(mtime.nanos));
    whole.and_then(|whole| whole.checked_add(nanos)).unwrap_or(SystemTime::UNIX_EPOCH)
}

pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Dir => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
    }
}

pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    let time = time_of(attr.mtime);
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.size_bytes,
        blocks: attr.blocks,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attr.kind),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: BLOCK_BYTES as u32,
        flags: 0,
    }
}

/// An entry without an inode: the kernel remembers that the name does not exist.
pub(super) fn no_entry() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

/// The two kinds of listing.
pub(super) enum Listing {
    Names(ReplyDirectory),
    Plus(ReplyDirectoryPlus),
}

impl Listing {
    /// True: full, the name was not added.
    pub fn add(&mut self, listed: &Listed) -> bool {
        let name = OsStr::from_bytes(&listed.name);
        let ino = INodeNo(listed.attr.ino.0);
        match self {
            Self::Names(reply) => reply.add(ino, listed.next, file_type(listed.attr.kind), name),
            Self::Plus(reply) => reply.add(ino, listed.next, name, &TTL, &file_attr(&listed.attr), GENERATION),
        }
    }

    pub fn finish(self, result: Result<(), fuser::Errno>) {
        match (self, result) {
            (Self::Names(reply), Ok(())) => reply.ok(),
            (Self::Names(reply), Err(errno)) => reply.error(errno),
            (Self::Plus(reply), Ok(())) => reply.ok(),
            (Self::Plus(reply), Err(errno)) => reply.error(errno),
        }
    }
}

/// Adds names to a listing. Some: where to go on; None: it is full, or there is no more.
pub(super) fn fill(listing: &mut Listing, listed: &[Listed]) -> Option<u64> {
    for one in listed {
        if listing.add(one) {
            return None;
        }
    }
    listed.last().map(|one| one.next)
}

/// Writes an error's causes behind it.
pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = String::new();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_keep_their_nanoseconds() {
        let time = time_of(Mtime { secs: -2, nanos: 800_000_000 });
        assert_eq!(time, SystemTime::UNIX_EPOCH - Duration::new(1, 200_000_000));
        assert_eq!(time_of(Mtime { secs: 1, nanos: 5 }), SystemTime::UNIX_EPOCH + Duration::new(1, 5));
        let _ = (time_of(Mtime { secs: i64::MAX, nanos: 999_999_999 }), time_of(Mtime { secs: i64::MIN, nanos: 0 }));
    }
}
