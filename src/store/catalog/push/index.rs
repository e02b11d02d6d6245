//! What this node remembers between pushes of one directory to one dataset: one redb file.
//!
//! ```text
//! <state>/push/<lake id>/<hash of dataset and directory>.redb
//!   meta      what, push id of an unfinished push, next pack number, what the last walk saw
//!   files     path            -> stat, digest            an unchanged file is not read again
//!   contents  digest          -> pack number, position   where a content lies
//!   layout    number|position -> content, size, place    what a pack holds, as it grows
//!   outboards number|position -> chaining values         until the pack is described in the lake
//!   packs     number          -> state, key, upload      see [`PackState`]
//!   parts     number|part     -> etag, size, digest      finished parts of running uploads
//!   blocks    kind, id        -> number of the push      blocks that the lake has
//! ```
//!
//! Rows may be lost (a kill loses what came after the last commit) but never promise too much: a
//! pack counts as there only once the lake said so. Only the coordinating thread touches it. redb
//! locks the file: a second push of the same directory is told so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use redb::{Database, DatabaseError, ReadableTable, TableDefinition, WriteTransaction};

use crate::format::digest::Outboard;
use crate::format::ids::{BlockId, CommitId, ContentDigest, PackId, TreeId};
use crate::format::pack::Place;
use crate::format::tree::build::BlockOf;
use crate::store::kv::open_database;
use crate::store::lake::UploadedPart;

use super::codec::{Put, Take};
use super::error::{AtPath, PushError};
use super::spool::Stat;

const META: TableDefinition<&str, &str> = TableDefinition::new("meta");
const FILES: TableDefinition<&[u8], &[u8]> = TableDefinition::new("files");
const CONTENTS: TableDefinition<[u8; 32], u64> = TableDefinition::new("contents");
const LAYOUT: TableDefinition<u64, &[u8]> = TableDefinition::new("layout");
const OUTBOARDS: TableDefinition<u64, &[u8]> = TableDefinition::new("outboards");
const PACKS: TableDefinition<u32, &str> = TableDefinition::new("packs");
const PARTS: TableDefinition<u64, &str> = TableDefinition::new("parts");
const BLOCKS: TableDefinition<[u8; 33], u64> = TableDefinition::new("blocks");

/// A change of the tables that an older larder could not read gets another number (and a fresh file).
const INDEX_VERSION: &str = "1";
const CACHE_BYTES: usize = 64 << 20;

/// Where a content lies: pack number and position in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct At {
    pub pack: u32,
    pub position: u32,
}

/// "Pack" of contents that have no stored byte: empty files and files of holes only.
pub(super) const NO_PACK: u32 = u32::MAX;

impl At {
    pub(super) const NOWHERE: Self = Self { pack: NO_PACK, position: 0 };

    fn key(self) -> u64 {
        u64::from(self.pack) << 32 | u64::from(self.position)
    }

    fn from_key(key: u64) -> Self {
        let low = u32::try_from(key & u64::from(u32::MAX)).unwrap_or(0);
        Self { pack: u32::try_from(key >> 32).unwrap_or(NO_PACK), position: low }
    }
}

/// What was known of a file when it was last read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileRow {
    pub stat: Stat,
    /// Whether its times were old enough when it was read that no later change can hide behind them.
    pub settled: bool,
    /// Whether it has ACLs or attributes, which are not stored.
    pub xattrs: bool,
    pub digest: ContentDigest,
}

/// One content of a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayoutRow {
    pub content: ContentDigest,
    pub size: u64,
    pub place: Place,
}

/// The tree that a push made of what its walk saw.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct WalkedRow {
    /// Of the walk, in hex.
    pub fingerprint: String,
    pub tree: TreeId,
    /// The mark of its blocks.
    pub generation: u64,
    /// Files with ACLs or attributes.
    pub xattrs_dropped: u64,
}

/// How far a pack is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum PackState {
    /// Its bytes are on their way.
    Uploading,
    /// Its bytes are in the lake, its description may not be.
    Data,
    /// Complete in the lake; no commit of ours refers to it yet.
    Described,
    /// A commit refers to it.
    Committed,
}

/// One pack.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct PackRow {
    pub state: PackState,
    /// Below `data/`; empty for a pack that somebody else made.
    pub key: String,
    /// Known from [`PackState::Data`] on.
    pub len: u64,
    pub id: Option<PackId>,
    pub upload: Option<String>,
    pub part_bytes: u64,
    /// Of a pack that holds one large file: its path, in hex.
    pub whole: Option<String>,
    /// Positions taken.
    pub contents: u32,
}

/// A part that arrived.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct PartRow {
    pub part: UploadedPart,
    /// BLAKE3 of its bytes: a resumed push compares instead of sending again.
    pub digest: String,
}

/// The index of one directory and dataset.
pub(super) struct Index {
    path: PathBuf,
    database: Database,
    /// Always there but for a moment inside `commit`.
    open: Option<WriteTransaction>,
    pending: Pending,
}

/// Rows that go to their tables together, in key order: opening a table for each row, and rows in
/// any order, cost several times what the rows do.
#[derive(Debug, Default)]
struct Pending {
    files: BTreeMap<Vec<u8>, Vec<u8>>,
    layout: BTreeMap<u64, Vec<u8>>,
    /// Only where the row replaces whatever is there.
    contents: BTreeMap<[u8; 32], u64>,
}

/// Rows that wait at most.
const PENDING_MAX: usize = 8192;

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Why an index could not be opened.
pub(super) enum OpenError {
    Busy,
    Other(PushError),
}

impl Index {
    /// Opens the index, or makes an empty one.
    pub(super) fn open(path: &Path) -> Result<Self, OpenError> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).at(parent).map_err(OpenError::Other)?;
        }
        let damaged = |source: redb::Error| {
            OpenError::Other(PushError::Index { path: path.to_owned(), source: Box::new(source) })
        };
        let database = match open_database(path, Database::builder().set_cache_size(CACHE_BYTES)) {
            Ok(database) => database,
            Err(DatabaseError::DatabaseAlreadyOpen) => return Err(OpenError::Busy),
            Err(error) => return Err(damaged(error.into())),
        };
        let open = database.begin_write().map_err(|error| damaged(error.into()))?;
        let mut index = Self { path: path.to_owned(), database, open: Some(open), pending: Pending::default() };
        let found = index.meta("version").map_err(OpenError::Other)?;
        if found.as_deref() != Some(INDEX_VERSION) {
            index.reset().map_err(OpenError::Other)?;
        }
        Ok(index)
    }

    fn damaged(&self, source: impl Into<redb::Error>) -> PushError {
        PushError::Index { path: self.path.clone(), source: Box::new(source.into()) }
    }

    fn nonsense(&self) -> PushError {
        self.damaged(redb::Error::Corrupted("a row makes no sense".to_owned()))
    }

    fn transaction(&self) -> &WriteTransaction {
        self.open.as_ref().expect("a transaction is open between calls")
    }

    fn reset(&mut self) -> Result<(), PushError> {
        let transaction = self.transaction();
        let all = || -> Result<(), redb::Error> {
            transaction.delete_table(META)?;
            transaction.delete_table(FILES)?;
            transaction.delete_table(CONTENTS)?;
            transaction.delete_table(LAYOUT)?;
            transaction.delete_table(OUTBOARDS)?;
            transaction.delete_table(PACKS)?;
            transaction.delete_table(PARTS)?;
            transaction.delete_table(BLOCKS)?;
            Ok(())
        };
        all().map_err(|error| self.damaged(error))?;
        self.set_meta("version", Some(INDEX_VERSION))?;
        self.commit()
    }

    /// Makes everything so far durable.
    pub(super) fn commit(&mut self) -> Result<(), PushError> {
        self.flush()?;
        if let Some(transaction) = self.open.take() {
            transaction.commit().map_err(|error| self.damaged(error))?;
        }
        let transaction = self.database.begin_write().map_err(|error| self.damaged(error))?;
        self.open = Some(transaction);
        Ok(())
    }

    pub(super) fn meta(&self, key: &str) -> Result<Option<String>, PushError> {
        let read = || -> Result<Option<String>, redb::Error> {
            let table = self.transaction().open_table(META)?;
            let value = table.get(key)?;
            Ok(value.map(|value| value.value().to_owned()))
        };
        read().map_err(|error| self.damaged(error))
    }

    pub(super) fn set_meta(&mut self, key: &str, value: Option<&str>) -> Result<(), PushError> {
        let write = || -> Result<(), redb::Error> {
            let mut table = self.transaction().open_table(META)?;
            match value {
                Some(value) => table.insert(key, value)?,
                None => table.remove(key)?,
            };
            Ok(())
        };
        write().map_err(|error| self.damaged(error))
    }

    pub(super) fn file(&self, path: &[u8]) -> Result<Option<FileRow>, PushError> {
        let read = || -> Result<Option<Option<FileRow>>, redb::Error> {
            let table = self.transaction().open_table(FILES)?;
            let row = table.get(path)?;
            Ok(row.map(|row| decode_file(row.value())))
        };
        match read().map_err(|error| self.damaged(error))? {
            Some(None) => Err(self.nonsense()),
            found => Ok(found.flatten()),
        }
    }

    pub(super) fn set_file(&mut self, path: &[u8], row: &FileRow) -> Result<(), PushError> {
        let mut put = Put::default();
        put.u64(row.stat.size);
        put.u64(row.stat.stored);
        put.mtime(row.stat.mtime);
        put.mtime(row.stat.ctime);
        put.u64(row.stat.dev);
        put.u64(row.stat.ino);
        put.u8(u8::from(row.settled) | u8::from(row.xattrs) << 1);
        put.raw(row.digest.as_bytes());
        self.pending.files.insert(path.to_vec(), put.0);
        self.flush_if_full()
    }

    fn flush_if_full(&mut self) -> Result<(), PushError> {
        let pending = &self.pending;
        let most = pending.files.len().max(pending.layout.len()).max(pending.contents.len());
        if most < PENDING_MAX { Ok(()) } else { self.flush() }
    }

    /// Brings the rows that wait to their tables.
    fn flush(&mut self) -> Result<(), PushError> {
        let pending = std::mem::take(&mut self.pending);
        let write = || -> Result<(), redb::Error> {
            let transaction = self.transaction();
            if !pending.files.is_empty() {
                let mut files = transaction.open_table(FILES)?;
                for (path, row) in &pending.files {
                    files.insert(path.as_slice(), row.as_slice())?;
                }
            }
            if !pending.layout.is_empty() {
                let mut layout = transaction.open_table(LAYOUT)?;
                for (key, row) in &pending.layout {
                    layout.insert(key, row.as_slice())?;
                }
            }
            if !pending.contents.is_empty() {
                let mut contents = transaction.open_table(CONTENTS)?;
                for (digest, at) in &pending.contents {
                    contents.insert(digest, at)?;
                }
            }
            Ok(())
        };
        write().map_err(|error| self.damaged(error))
    }

    pub(super) fn content(&self, digest: &ContentDigest) -> Result<Option<At>, PushError> {
        if let Some(at) = self.pending.contents.get(digest.as_bytes()) {
            return Ok(Some(At::from_key(*at)));
        }
        let read = || -> Result<Option<At>, redb::Error> {
            let table = self.transaction().open_table(CONTENTS)?;
            let row = table.get(*digest.as_bytes())?;
            Ok(row.map(|row| At::from_key(row.value())))
        };
        read().map_err(|error| self.damaged(error))
    }

    /// Notes that a pack holds a content at a position. `prefer`: also where another place is known.
    pub(super) fn add_content(&mut self, at: At, row: &LayoutRow, prefer: bool) -> Result<(), PushError> {
        let mut put = Put::default();
        put.raw(row.content.as_bytes());
        put.u64(row.size);
        match &row.place {
            Place::Run { offset } => {
                put.u8(0);
                put.u64(*offset);
            }
            Place::Sparse { extents } => {
                put.u8(1);
                put.extents(extents);
            }
        }
        self.pending.layout.insert(at.key(), put.0);
        if prefer || self.content(&row.content)?.is_none() {
            self.pending.contents.insert(*row.content.as_bytes(), at.key());
        }
        self.flush_if_full()
    }

    /// Notes that a content has no stored byte.
    pub(super) fn add_nowhere(&mut self, content: &ContentDigest) -> Result<(), PushError> {
        self.pending.contents.insert(*content.as_bytes(), At::NOWHERE.key());
        self.flush_if_full()
    }

    pub(super) fn layout(&self, at: At) -> Result<Option<LayoutRow>, PushError> {
        if let Some(row) = self.pending.layout.get(&at.key()) {
            return decode_layout(row).map(Some).ok_or_else(|| self.nonsense());
        }
        let read = || -> Result<Option<Option<LayoutRow>>, redb::Error> {
            let table = self.transaction().open_table(LAYOUT)?;
            let row = table.get(at.key())?;
            Ok(row.map(|row| decode_layout(row.value())))
        };
        match read().map_err(|error| self.damaged(error))? {
            Some(None) => Err(self.nonsense()),
            found => Ok(found.flatten()),
        }
    }

    /// Gives everything a pack holds, by position.
    pub(super) fn layout_of(&mut self, pack: u32) -> Result<Vec<(u32, LayoutRow)>, PushError> {
        self.flush()?;
        let read = || -> Result<Vec<(u32, Option<LayoutRow>)>, redb::Error> {
            let table = self.transaction().open_table(LAYOUT)?;
            let mut rows = Vec::new();
            for row in table.range(keys_of(pack))? {
                let (key, value) = row?;
                rows.push((At::from_key(key.value()).position, decode_layout(value.value())));
            }
            Ok(rows)
        };
        let rows = read().map_err(|error| self.damaged(error))?;
        rows.into_iter().map(|(at, row)| row.map(|row| (at, row)).ok_or_else(|| self.nonsense())).collect()
    }

    pub(super) fn set_outboard(&mut self, at: At, outboard: &Outboard) -> Result<(), PushError> {
        let mut put = Put::default();
        put.u64(outboard.size);
        put.u32(u32::try_from(outboard.blocks.len()).expect("a file has fewer than 2^32 blocks of 256 KiB"));
        for value in outboard.blocks.iter().chain(&outboard.groups) {
            put.raw(value);
        }
        let write = || -> Result<(), redb::Error> {
            self.transaction().open_table(OUTBOARDS)?.insert(at.key(), put.0.as_slice())?;
            Ok(())
        };
        write().map_err(|error| self.damaged(error))
    }

    pub(super) fn outboards_of(&self, pack: u32) -> Result<Vec<(u32, Outboard)>, PushError> {
        let read = || -> Result<Vec<(u32, Option<Outboard>)>, redb::Error> {
            let table = self.transaction().open_table(OUTBOARDS)?;
            let mut rows = Vec::new();
            for row in table.range(keys_of(pack))? {
                let (key, value) = row?;
                rows.push((At::from_key(key.value()).position, decode_outboard(value.value())));
            }
            Ok(rows)
        };
        let rows = read().map_err(|error| self.damaged(error))?;
        rows.into_iter().map(|(at, row)| row.map(|row| (at, row)).ok_or_else(|| self.nonsense())).collect()
    }

    pub(super) fn packs(&self) -> Result<BTreeMap<u32, PackRow>, PushError> {
        let read = || -> Result<BTreeMap<u32, Option<PackRow>>, redb::Error> {
            let table = self.transaction().open_table(PACKS)?;
            let mut rows = BTreeMap::new();
            for row in table.iter()? {
                let (key, value) = row?;
                rows.insert(key.value(), serde_json::from_str(value.value()).ok());
            }
            Ok(rows)
        };
        let rows = read().map_err(|error| self.damaged(error))?;
        rows.into_iter().map(|(number, row)| row.map(|row| (number, row)).ok_or_else(|| self.nonsense())).collect()
    }

    pub(super) fn set_pack(&mut self, number: u32, row: &PackRow) -> Result<(), PushError> {
        let text = serde_json::to_string(row).expect("a pack row is plain data");
        let write = || -> Result<(), redb::Error> {
            self.transaction().open_table(PACKS)?.insert(number, text.as_str())?;
            Ok(())
        };
        write().map_err(|error| self.damaged(error))
    }

    /// Forgets a pack and what lies in it.
    pub(super) fn forget_pack(&mut self, number: u32) -> Result<(), PushError> {
        self.forget_contents(number, 0)?;
        let write = || -> Result<(), redb::Error> {
            self.transaction().open_table(PACKS)?.remove(number)?;
            Ok(())
        };
        write().map_err(|error| self.damaged(error))?;
        self.forget_parts(number)
    }

    /// Forgets the contents of a pack from a position on.
    pub(super) fn forget_contents(&mut self, number: u32, from: u32) -> Result<(), PushError> {
        let rows = self.layout_of(number)?;
        let write = || -> Result<(), redb::Error> {
            let transaction = self.transaction();
            let mut layout = transaction.open_table(LAYOUT)?;
            let mut contents = transaction.open_table(CONTENTS)?;
            let mut outboards = transaction.open_table(OUTBOARDS)?;
            for (position, row) in rows.iter().filter(|(position, _)| *position >= from) {
                let key = At { pack: number, position: *position }.key();
                layout.remove(key)?;
                outboards.remove(key)?;
                let points_here = contents.get(*row.content.as_bytes())?.is_some_and(|at| at.value() == key);
                if points_here {
                    contents.remove(*row.content.as_bytes())?;
                }
            }
            Ok(())
        };
        write().map_err(|error| self.damaged(error))
    }

    /// Forgets what only an upload needed: its parts, and chaining values.
    pub(super) fn forget_parts(&mut self, number: u32) -> Result<(), PushError> {
        let write = || -> Result<(), redb::Error> {
            let transaction = self.transaction();
            transaction.open_table(PARTS)?.retain_in(keys_of(number), |_, _| false)?;
            transaction.open_table(OUTBOARDS)?.retain_in(keys_of(number), |_, _| false)?;
            Ok(())
        };
        write().map_err(|error| self.damaged(error))
    }

    pub(super) fn set_part(&mut self, number: u32, row: &PartRow) -> Result<(), PushError> {
        let key = At { pack: number, position: row.part.number }.key();
        let text = serde_json::to_string(row).expect("a part row is plain data");
        let write = || -> Result<(), redb::Error> {
            self.transaction().open_table(PARTS)?.insert(key, text.as_str())?;
            Ok(())
        };
        write().map_err(|error| self.damaged(error))
    }

    /// Gives the parts that arrived, by number.
    pub(super) fn parts_of(&self, number: u32) -> Result<Vec<PartRow>, PushError> {
        let read = || -> Result<Vec<Option<PartRow>>, redb::Error> {
            let table = self.transaction().open_table(PARTS)?;
            let mut rows = Vec::new();
            for row in table.range(keys_of(number))? {
                rows.push(serde_json::from_str(row?.1.value()).ok());
            }
            Ok(rows)
        };
        let rows = read().map_err(|error| self.damaged(error))?;
        rows.into_iter().map(|row| row.ok_or_else(|| self.nonsense())).collect()
    }

    pub(super) fn has_block(&self, of: BlockOf, id: &BlockId) -> Result<bool, PushError> {
        let read = || -> Result<bool, redb::Error> {
            Ok(self.transaction().open_table(BLOCKS)?.get(block_key(of, id))?.is_some())
        };
        read().map_err(|error| self.damaged(error))
    }

    /// Notes that the lake has these blocks, and that push `generation` uses them.
    pub(super) fn mark_blocks(&mut self, blocks: &[(BlockOf, BlockId)], generation: u64) -> Result<(), PushError> {
        let write = || -> Result<(), redb::Error> {
            let mut table = self.transaction().open_table(BLOCKS)?;
            for (of, id) in blocks {
                table.insert(block_key(*of, id), generation)?;
            }
            Ok(())
        };
        write().map_err(|error| self.damaged(error))
    }

    /// Gives the blocks that push `generation` uses.
    pub(super) fn blocks_of_push(&self, generation: u64) -> Result<Vec<(BlockOf, BlockId)>, PushError> {
        let read = || -> Result<Vec<(BlockOf, BlockId)>, redb::Error> {
            let table = self.transaction().open_table(BLOCKS)?;
            let mut blocks = Vec::new();
            for row in table.iter()? {
                let (key, mark) = row?;
                let [kind, id @ ..] = key.value();
                if mark.value() == generation {
                    let of = if kind == 0 { BlockOf::Tree } else { BlockOf::Placement };
                    blocks.push((of, BlockId(id)));
                }
            }
            Ok(blocks)
        };
        read().map_err(|error| self.damaged(error))
    }

    /// Forgets the blocks that push `generation` does not use.
    pub(super) fn keep_blocks_of(&mut self, generation: u64) -> Result<(), PushError> {
        let write = || -> Result<(), redb::Error> {
            self.transaction().open_table(BLOCKS)?.retain(|_, mark| mark == generation)?;
            Ok(())
        };
        write().map_err(|error| self.damaged(error))
    }

    pub(super) fn forget_blocks(&mut self) -> Result<(), PushError> {
        let write = || -> Result<(), redb::Error> {
            self.transaction().delete_table(BLOCKS)?;
            Ok(())
        };
        write().map_err(|error| self.damaged(error))
    }

    /// What the newest push of the directory saw and made.
    pub(super) fn walked(&self) -> Result<Option<WalkedRow>, PushError> {
        Ok(self.meta("walked")?.and_then(|text| serde_json::from_str(&text).ok()))
    }

    /// Remembers it; None: the next push has to look at every file.
    pub(super) fn set_walked(&mut self, row: Option<&WalkedRow>) -> Result<(), PushError> {
        let text = row.map(|row| serde_json::to_string(row).expect("a row is plain data"));
        self.set_meta("walked", text.as_deref())
    }

    /// Takes the next pack number.
    pub(super) fn next_pack(&mut self) -> Result<u32, PushError> {
        let next: u32 = self.meta("next_pack")?.and_then(|text| text.parse().ok()).unwrap_or(0);
        self.set_meta("next_pack", Some(&(next + 1).to_string()))?;
        Ok(next)
    }

    /// Gives the commit whose blocks are known to be in the lake.
    pub(super) fn blocks_of(&self) -> Result<Option<CommitId>, PushError> {
        Ok(self.meta("blocks_of")?.and_then(|text| text.parse().ok()))
    }
}

fn keys_of(pack: u32) -> std::ops::RangeInclusive<u64> {
    At { pack, position: 0 }.key()..=At { pack, position: u32::MAX }.key()
}

fn block_key(of: BlockOf, id: &BlockId) -> [u8; 33] {
    let mut key = [0; 33];
    let (kind, rest) = key.split_at_mut(1);
    kind.fill(match of {
        BlockOf::Tree => 0,
        BlockOf::Placement => 1,
    });
    rest.copy_from_slice(id.as_bytes());
    key
}

fn decode_file(bytes: &[u8]) -> Option<FileRow> {
    let mut take = Take(bytes);
    let stat = Stat {
        size: take.u64()?,
        stored: take.u64()?,
        mtime: take.mtime()?,
        ctime: take.mtime()?,
        dev: take.u64()?,
        ino: take.u64()?,
    };
    let flags = take.u8()?;
    Some(FileRow { stat, settled: flags & 1 != 0, xattrs: flags & 2 != 0, digest: ContentDigest(take.array()?) })
}

fn decode_layout(bytes: &[u8]) -> Option<LayoutRow> {
    let mut take = Take(bytes);
    let content = ContentDigest(take.array()?);
    let size = take.u64()?;
    let place = match take.u8()? {
        0 => Place::Run { offset: take.u64()? },
        _ => Place::Sparse { extents: take.extents()? },
    };
    Some(LayoutRow { content, size, place })
}

fn decode_outboard(bytes: &[u8]) -> Option<Outboard> {
    let mut take = Take(bytes);
    let size = take.u64()?;
    let blocks = (0..take.u32()?).map(|_| take.array()).collect::<Option<Vec<_>>>()?;
    let mut groups = Vec::new();
    while let Some(value) = take.array() {
        groups.push(value);
    }
    Some(Outboard { size, blocks, groups })
}
