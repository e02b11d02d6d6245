//! The spool: what the walk found, in tree order, in two temporary files.
//!
//! ```text
//! items   | header of / | items of / | header of /a | items of /a | ...   variable records
//! dirs    | 32 bytes a directory: parent, children, descendants, subdirs  by directory number
//! ```
//!
//! A directory's counts are known only after everything below it was seen, its entry is written
//! long before: so counts have a table of their own. Numbers are given in the order in which the
//! entries were written; the root is 0. Both files are unlinked from the start: a kill leaves none.
//!
//! While it is written, a spool is digested: two walks with equal [`Fingerprint`]s saw the same names
//! with the same attributes, and no file that changed in between.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::format::ids::ContentId;
use crate::format::placement::Location;
use crate::format::tree::{Mtime, Pin};

use super::codec::{Put, Take};
use super::error::{AtPath, PushError};

const BUFFER_BYTES: usize = 1 << 20;
const DIR_ROW_LEN: u64 = 32;
const NLINK_AT: u64 = 5;
/// What a file's record ends with that is no part of its state: `stored` and `dev`.
const UNDIGESTED_BYTES: usize = 16;
/// The digest takes long runs much faster than single records.
const DIGEST_RUN_BYTES: usize = 64 << 10;

/// Says whether two walks saw the same: see [`Stat::same_state`] for files.
pub(super) type Fingerprint = blake3::Hash;

/// What the walk saw of a regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    pub size: u64,
    /// Bytes on disk, as a hint: less than `size` means holes or compression.
    pub stored: u64,
    pub mtime: Mtime,
    pub ctime: Mtime,
    pub dev: u64,
    pub ino: u64,
}

impl Stat {
    /// Says whether both are the same state of one file. Blocks on disk change without a write
    /// (delayed allocation), device numbers between two mounts of one file system.
    pub(super) fn same_state(&self, other: &Self) -> bool {
        let key = |stat: &Self| (stat.size, stat.mtime, stat.ctime, stat.ino);
        key(self) == key(other)
    }
}

/// One name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub name: Vec<u8>,
    pub mode: u32,
    pub mtime: Mtime,
    pub nlink: u32,
    pub kind: Kind,
}

/// What a name is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// A file of the pushed directory.
    File(Stat),
    /// A file of the commit that is pushed onto.
    Known {
        size: u64,
        content: ContentId,
        pin: Option<Box<Pin>>,
        location: Location,
    },
    Dir {
        number: u64,
    },
    Symlink {
        target: Vec<u8>,
    },
    /// A later entry of a hard-link group: where the first one's record starts, and its path.
    Link {
        first_at: u64,
        path: Vec<u8>,
    },
}

/// One record of the spool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record {
    /// The items of this directory follow.
    Enter {
        number: u64,
        path: Vec<u8>,
    },
    Item {
        at: u64,
        item: Item,
    },
}

/// The counts of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct DirCounts {
    pub parent: u64,
    pub children: u64,
    pub descendants: u64,
    pub subdirs: u64,
}

/// What a spool holds in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Totals {
    /// First entries only.
    pub files: u64,
    pub dirs: u64,
    pub symlinks: u64,
    pub links: u64,
    /// Logical bytes.
    pub bytes: u64,
    /// Files that the walk found (they have ordinals from 0 in spool order).
    pub walked_files: u64,
}

/// A spool: written once in order, then read any number of times.
#[derive(Debug)]
pub(super) struct Spool {
    dir: PathBuf,
    items: File,
    dirs: File,
    buffer: Vec<u8>,
    flushed: u64,
    dirs_next: u64,
    hasher: blake3::Hasher,
    to_digest: Vec<u8>,
    pub root_mode: u32,
    pub root_mtime: Mtime,
    pub totals: Totals,
}

impl Spool {
    /// Makes an empty one with its files below `dir`.
    pub(super) fn create(dir: &Path, root_mode: u32, root_mtime: Mtime) -> Result<Self, PushError> {
        Ok(Self {
            dir: dir.to_owned(),
            items: tempfile::tempfile_in(dir).at(dir)?,
            dirs: tempfile::tempfile_in(dir).at(dir)?,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            flushed: 0,
            dirs_next: 1,
            hasher: blake3::Hasher::new(),
            to_digest: Vec::with_capacity(DIGEST_RUN_BYTES),
            root_mode,
            root_mtime,
            totals: Totals::default(),
        })
    }

    pub(super) fn damaged(&self, why: &'static str) -> PushError {
        PushError::Spool { path: self.dir.clone(), why }
    }

    /// Gives the next directory its number.
    pub(super) fn number_dir(&mut self) -> u64 {
        self.dirs_next += 1;
        self.dirs_next - 1
    }

    /// Begins the items of a directory.
    pub(super) fn enter(&mut self, number: u64, path: &[u8]) -> Result<(), PushError> {
        let mut put = Put::default();
        put.u32(0);
        put.u8(0);
        put.u64(number);
        put.bytes(path);
        self.append(put, 0).map(|_| ())
    }

    /// Digests what was written so far, and the root's attributes.
    pub(super) fn fingerprint(&self) -> Fingerprint {
        let mut hasher = self.hasher.clone();
        hasher.update(&self.to_digest);
        let mut put = Put::default();
        put.u32(self.root_mode);
        put.mtime(self.root_mtime);
        hasher.update(&put.0).finalize()
    }

    /// Adds an item of the directory that was entered last; gives where its record starts.
    pub(super) fn item(&mut self, item: &Item) -> Result<u64, PushError> {
        self.count(item);
        let mut put = Put::default();
        put.u32(0);
        put.u8(match &item.kind {
            Kind::File(_) => 1,
            Kind::Known { .. } => 2,
            Kind::Dir { .. } => 3,
            Kind::Symlink { .. } => 4,
            Kind::Link { .. } => 5,
        });
        put.u32(item.nlink);
        put.bytes(&item.name);
        put.u32(item.mode);
        put.mtime(item.mtime);
        match &item.kind {
            Kind::File(stat) => put_stat(&mut put, stat),
            Kind::Known { size, content, pin, location } => {
                put.u64(*size);
                put.content(content);
                put.location(location);
                put.u8(u8::from(pin.is_some()));
                if let Some(pin) = pin {
                    put.pin(pin);
                }
            }
            Kind::Dir { number } => put.u64(*number),
            Kind::Symlink { target } => put.bytes(target),
            Kind::Link { first_at, path } => {
                put.u64(*first_at);
                put.bytes(path);
            }
        }
        self.append(put, if matches!(item.kind, Kind::File(_)) { UNDIGESTED_BYTES } else { 0 })
    }

    fn count(&mut self, item: &Item) {
        let totals = &mut self.totals;
        match &item.kind {
            Kind::File(stat) => {
                totals.files += 1;
                totals.walked_files += 1;
                totals.bytes += stat.size;
            }
            Kind::Known { size, .. } => {
                totals.files += 1;
                totals.bytes += size;
            }
            Kind::Dir { .. } => totals.dirs += 1,
            Kind::Symlink { .. } => totals.symlinks += 1,
            Kind::Link { .. } => totals.links += 1,
        }
    }

    /// Appends a record; its last `undigested` bytes are no part of the fingerprint.
    fn append(&mut self, put: Put, undigested: usize) -> Result<u64, PushError> {
        let mut bytes = put.0;
        let len = u32::try_from(bytes.len() - 4).map_err(|_| self.damaged("a record is too long"))?;
        if let Some(head) = bytes.first_chunk_mut::<4>() {
            *head = len.to_le_bytes();
        }
        let at = self.flushed + self.buffer.len() as u64;
        self.buffer.extend_from_slice(&bytes);
        self.to_digest.extend_from_slice(bytes.get(..bytes.len() - undigested).unwrap_or(&bytes));
        if self.to_digest.len() >= DIGEST_RUN_BYTES {
            self.hasher.update(&self.to_digest);
            self.to_digest.clear();
        }
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        Ok(at)
    }

    /// Writes what is buffered; must precede reading.
    pub(super) fn flush(&mut self) -> Result<(), PushError> {
        self.items.write_all(&self.buffer).at(&self.dir)?;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Counts one link more in the first entry of a group.
    pub(super) fn add_link(&mut self, first_at: u64) -> Result<(), PushError> {
        let at = first_at + NLINK_AT;
        if let Some(in_buffer) = at.checked_sub(self.flushed) {
            let from = usize::try_from(in_buffer).map_err(|_| self.damaged("an offset is out of range"))?;
            if let Some(field) = self.buffer.get_mut(from..).and_then(|rest| rest.first_chunk_mut::<4>()) {
                *field = u32::from_le_bytes(*field).saturating_add(1).to_le_bytes();
                return Ok(());
            }
            return Err(self.damaged("a hard link's first entry is missing"));
        }
        let mut field = [0; 4];
        self.items.read_exact_at(&mut field, at).at(&self.dir)?;
        let nlink = u32::from_le_bytes(field).saturating_add(1);
        self.items.write_all_at(&nlink.to_le_bytes(), at).at(&self.dir)
    }

    pub(super) fn set_counts(&self, number: u64, counts: DirCounts) -> Result<(), PushError> {
        let mut put = Put::default();
        put.u64(counts.parent);
        put.u64(counts.children);
        put.u64(counts.descendants);
        put.u64(counts.subdirs);
        self.dirs.write_all_at(&put.0, number * DIR_ROW_LEN).at(&self.dir)
    }

    pub(super) fn counts(&self, number: u64) -> Result<DirCounts, PushError> {
        let mut row = [0; DIR_ROW_LEN as usize];
        self.dirs.read_exact_at(&mut row, number * DIR_ROW_LEN).at(&self.dir)?;
        let mut take = Take(&row);
        let mut next = || take.u64().unwrap_or(0);
        Ok(DirCounts { parent: next(), children: next(), descendants: next(), subdirs: next() })
    }

    /// Takes one item of the directory `number` out of the counts: its file turned out unreadable.
    pub(super) fn drop_item(&self, number: u64) -> Result<(), PushError> {
        let mut counts = self.counts(number)?;
        counts.children = counts.children.saturating_sub(1);
        let mut at = number;
        loop {
            counts.descendants = counts.descendants.saturating_sub(1);
            self.set_counts(at, counts)?;
            if at == 0 {
                return Ok(());
            }
            at = counts.parent;
            counts = self.counts(at)?;
        }
    }

    /// Reads all records in order.
    pub(super) fn read(&self) -> Result<SpoolReader<'_>, PushError> {
        Ok(SpoolReader {
            spool: self,
            input: BufReader::with_capacity(BUFFER_BYTES, At { file: &self.items, at: 0 }),
            at: 0,
        })
    }
}

/// Reads a file from a position of its own, so that several readers do not meet.
#[derive(Debug)]
struct At<'a> {
    file: &'a File,
    at: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = self.file.read_at(buffer, self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

/// Reads a spool in order.
#[derive(Debug)]
pub(super) struct SpoolReader<'a> {
    spool: &'a Spool,
    input: BufReader<At<'a>>,
    at: u64,
}

impl SpoolReader<'_> {
    /// Gives the next record, None at the end.
    pub(super) fn next(&mut self) -> Result<Option<Record>, PushError> {
        if self.at == self.spool.flushed {
            return Ok(None);
        }
        let mut len = [0; 4];
        self.input.read_exact(&mut len).at(&self.spool.dir)?;
        let len = u32::from_le_bytes(len);
        if self.at + 4 + u64::from(len) > self.spool.flushed {
            return Err(self.spool.damaged("a record reaches beyond the end"));
        }
        let mut bytes = vec![0; len as usize];
        self.input.read_exact(&mut bytes).at(&self.spool.dir)?;
        let at = self.at;
        self.at += 4 + u64::from(len);
        decode(at, &bytes).map(Some).ok_or_else(|| self.spool.damaged("a record makes no sense"))
    }
}

fn put_stat(put: &mut Put, stat: &Stat) {
    put.u64(stat.size);
    put.mtime(stat.mtime);
    put.mtime(stat.ctime);
    put.u64(stat.ino);
    put.u64(stat.stored);
    put.u64(stat.dev);
}

fn decode(at: u64, bytes: &[u8]) -> Option<Record> {
    let mut take = Take(bytes);
    let tag = take.u8()?;
    if tag == 0 {
        return Some(Record::Enter { number: take.u64()?, path: take.bytes()?.to_vec() });
    }
    let nlink = take.u32()?;
    let name = take.bytes()?.to_vec();
    let mode = take.u32()?;
    let mtime = take.mtime()?;
    let kind = match tag {
        1 => Kind::File(Stat {
            size: take.u64()?,
            mtime: take.mtime()?,
            ctime: take.mtime()?,
            ino: take.u64()?,
            stored: take.u64()?,
            dev: take.u64()?,
        }),
        2 => Kind::Known {
            size: take.u64()?,
            content: take.content()?,
            location: take.location()?,
            pin: match take.u8()? {
                0 => None,
                _ => Some(Box::new(take.pin()?)),
            },
        },
        3 => Kind::Dir { number: take.u64()? },
        4 => Kind::Symlink { target: take.bytes()?.to_vec() },
        5 => Kind::Link { first_at: take.u64()?, path: take.bytes()?.to_vec() },
        _ => return None,
    };
    Some(Record::Item { at, item: Item { name, mode, mtime, nlink, kind } })
}
