//! Segments and index blocks: how entries are encoded, counted and found by position.
//!
//! Both are content-addressed blocks (`nodes/ab/<id>` in the lake). Cuts depend on contents alone
//! (`cut`), so equal runs of entries give equal blocks whatever happened before.
//!
//! A decoded block carries prefix sums: so the block that holds a rank, and the directory whose
//! subtree holds one, are found by binary search.

use crate::format::codec::{DecodeError, Reader, Writer};
use crate::format::ids::{BlockId, TreeId};

use super::entry::{ENTRIES_MAX, Entry, EntryKind, Mtime, NAME_LEN_MAX, PinReader, name_fault, read_u32, root_fault};

/// Version of trees that this larder writes, and the newest it reads.
pub const TREE_FORMAT: u32 = 1;
/// Longest encoded block of a tree: cuts come well before it.
pub const BLOCK_LEN_MAX: usize = 256 << 10;
/// Longest encoded root of a tree or a placement.
pub const ROOT_LEN_MAX: usize = 16 << 20;
/// Index levels at most: a tree of 2^48 entries needs 7.
pub const LEVEL_MAX: u8 = 12;

const BLOCK_MAGIC: [u8; 4] = *b"LDTB";
const ROOT_MAGIC: [u8; 4] = *b"LDTR";
/// A segment is the level below the first index.
const LEVEL_SEGMENT: u8 = 0;
/// Shortest encoding of an entry, and of an index's child.
const ENTRY_LEN_MIN: usize = 4;
const CHILD_LEN_MIN: usize = 41;

/// A run of entries in tree order, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub entries: Vec<Entry>,
    counts: Counts,
    /// Of each directory: its position, and the sum of `descendants` up to and with it.
    dirs: Vec<(u32, u64)>,
}

/// What a block holds below it. Sums saturate never: a decoder refuses overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Entries.
    pub entries: u64,
    /// Sum of `descendants` over the directory entries.
    pub descendants: u64,
    /// Regular files (first entries of their group only), directories, symlinks.
    pub files: u64,
    pub dirs: u64,
    pub symlinks: u64,
    /// Sum of the sizes of the regular files.
    pub bytes: u64,
}

/// What an index block says of one child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildRef {
    pub id: BlockId,
    /// Length of the child's encoding, for planning fetches.
    pub encoded_len: u32,
    pub counts: Counts,
    /// Name of the first entry below the child: lets a lookup skip segments unread.
    pub first_name: Box<[u8]>,
}

/// A run of children, one level above them. Level 1 indexes segments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexBlock {
    pub level: u8,
    pub children: Vec<ChildRef>,
    counts: Counts,
    /// Of each child: entries, and sum of `descendants`, up to and with it.
    ends: Vec<(u64, u64)>,
}

/// Either kind of block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Block {
    Segment(Segment),
    Index(IndexBlock),
}

/// The root of a tree: the root directory's own attributes and the top of the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeRoot {
    pub mode: u32,
    pub mtime: Mtime,
    /// Entries of the root directory itself, and how many of them are directories.
    pub children: u64,
    pub subdirs: u64,
    /// Counts of the whole tree (`entries` = all ranks).
    pub counts: Counts,
    /// The children of the top index block; level 0 where they are segments' refs directly
    /// (`level` is the level of the block that would hold them, so 1). Empty for an empty tree.
    pub top: IndexBlock,
}

impl Counts {
    /// Counts one entry.
    pub fn of(entry: &Entry) -> Self {
        let one = Self { entries: 1, ..Self::default() };
        match &entry.kind {
            EntryKind::File { size, .. } => Self { files: 1, bytes: *size, ..one },
            EntryKind::Dir { descendants, .. } => Self { dirs: 1, descendants: *descendants, ..one },
            EntryKind::Symlink { .. } => Self { symlinks: 1, ..one },
            EntryKind::HardLink { .. } => one,
        }
    }

    /// Adds; None above 64 bits.
    pub fn plus(&self, more: &Self) -> Option<Self> {
        Some(Self {
            entries: self.entries.checked_add(more.entries)?,
            descendants: self.descendants.checked_add(more.descendants)?,
            files: self.files.checked_add(more.files)?,
            dirs: self.dirs.checked_add(more.dirs)?,
            symlinks: self.symlinks.checked_add(more.symlinks)?,
            bytes: self.bytes.checked_add(more.bytes)?,
        })
    }

    /// Subtracts what was counted before; None where that was more.
    pub fn minus(&self, less: &Self) -> Option<Self> {
        Some(Self {
            entries: self.entries.checked_sub(less.entries)?,
            descendants: self.descendants.checked_sub(less.descendants)?,
            files: self.files.checked_sub(less.files)?,
            dirs: self.dirs.checked_sub(less.dirs)?,
            symlinks: self.symlinks.checked_sub(less.symlinks)?,
            bytes: self.bytes.checked_sub(less.bytes)?,
        })
    }

    /// Says whether the counts can be those of some entries.
    fn is_possible(&self) -> bool {
        let kinds = self.files.checked_add(self.dirs).and_then(|sum| sum.checked_add(self.symlinks));
        (1..=ENTRIES_MAX).contains(&self.entries) && kinds.is_some_and(|kinds| kinds <= self.entries)
    }

    fn write(&self, w: &mut Writer) {
        let Self { entries, descendants, files, dirs, symlinks, bytes } = *self;
        [entries, descendants, files, dirs, symlinks, bytes].into_iter().for_each(|count| w.varint(count));
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let at = r.at();
        let counts = Self {
            entries: r.varint()?,
            descendants: r.varint()?,
            files: r.varint()?,
            dirs: r.varint()?,
            symlinks: r.varint()?,
            bytes: r.varint()?,
        };
        match counts.is_possible() {
            true => Ok(counts),
            false => Err(r.bad(at, "counts", "they contradict each other")),
        }
    }
}

impl Segment {
    /// Makes a segment of entries. Sums that overflow (which no tree has) stop at the maximum.
    pub fn new(entries: Vec<Entry>) -> Self {
        let (counts, dirs) = sum_entries(&entries).unwrap_or_default();
        Self { entries, counts, dirs }
    }

    /// Gives the sums over the entries.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Sums `descendants` over the entries before `position`.
    pub fn descendants_before(&self, position: usize) -> u64 {
        let dirs = self.dirs.partition_point(|(at, _)| (*at as usize) < position);
        dirs.checked_sub(1).and_then(|last| self.dirs.get(last)).map_or(0, |(_, sum)| *sum)
    }

    /// Finds the first entry with which the sum of `descendants` grows above `sum`.
    pub fn dir_above(&self, sum: u64) -> Option<usize> {
        let found = self.dirs.partition_point(|(_, end)| *end <= sum);
        self.dirs.get(found).map(|(at, _)| *at as usize)
    }
}

impl IndexBlock {
    /// Makes an index of children. Sums that overflow (which no tree has) stop at the maximum.
    pub fn new(level: u8, children: Vec<ChildRef>) -> Self {
        let (counts, ends) = sum_children(&children).unwrap_or_default();
        Self { level, children, counts, ends }
    }

    /// Gives the sums over the children.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Counts the entries before a child, and sums their `descendants`.
    pub fn before(&self, child: usize) -> (u64, u64) {
        child.checked_sub(1).and_then(|last| self.ends.get(last)).copied().unwrap_or_default()
    }

    /// Finds the child that holds the entry at `position`, counted from the block's first.
    pub fn child_at(&self, position: u64) -> usize {
        self.ends.partition_point(|(entries, _)| *entries <= position)
    }

    /// Finds the first child with which the sum of `descendants` grows above `sum`.
    pub fn child_above(&self, sum: u64) -> usize {
        self.ends.partition_point(|(_, descendants)| *descendants <= sum)
    }
}

impl TreeRoot {
    /// Computes the tree id: the digest of the encoding.
    pub fn id(&self) -> TreeId {
        Self::id_of(&self.encode())
    }

    /// Computes the tree id of an encoded root.
    pub fn id_of(encoded: &[u8]) -> TreeId {
        TreeId(*blake3::hash(encoded).as_bytes())
    }

    /// Encodes to the stored bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(ROOT_MAGIC, TREE_FORMAT);
        w.varint(u64::from(self.mode));
        self.mtime.write(&mut w);
        w.varint(self.children);
        w.varint(self.subdirs);
        w.u8(self.top.level);
        w.varint(self.top.children.len() as u64);
        self.top.children.iter().for_each(|child| child.write(&mut w));
        w.finish()
    }

    /// Decodes and checks everything that a root alone can show.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (mut r, _) = Reader::open("tree root", bytes, ROOT_MAGIC, TREE_FORMAT)?;
        if bytes.len() > ROOT_LEN_MAX {
            return Err(r.bad(ROOT_LEN_MAX, "length", "it is above the limit"));
        }
        let at = r.at();
        let mode = read_u32(&mut r, "mode")?;
        let mtime = Mtime::read(&mut r)?;
        if let Some(why) = root_fault(mode, &mtime) {
            return Err(r.bad(at, "root directory", why));
        }
        let at = r.at();
        let (children, subdirs) = (r.varint()?, r.varint()?);
        let level_at = r.at();
        let level = r.u8()?;
        let top = read_index(&mut r, level, level_at)?;
        r.end()?;
        let counts = *top.counts();
        let bad = |why| DecodeError {
            object: "tree root",
            offset: at,
            problem: crate::format::codec::Problem::Field { field: "root directory", why },
        };
        if children > counts.entries
            || subdirs > counts.dirs
            || subdirs > children
            || (children == 0) != (counts.entries == 0)
        {
            return Err(bad("its counts contradict those of the tree"));
        }
        if counts.entries == 0 && level != 1 {
            return Err(bad("an empty tree has an index of level 1"));
        }
        Ok(Self { mode, mtime, children, subdirs, counts, top })
    }

    /// Estimates the bytes that the decoded root takes in memory.
    pub fn heap_bytes(&self) -> usize {
        size_of::<Self>() + self.top.heap_bytes()
    }
}

impl Block {
    /// Computes the block id: the digest of the encoding.
    pub fn id_of(encoded: &[u8]) -> BlockId {
        BlockId(*blake3::hash(encoded).as_bytes())
    }

    /// Encodes to the stored bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::default();
        match self {
            Self::Segment(segment) => {
                let mut pins = Default::default();
                segment.entries.iter().for_each(|entry| entry.write(&mut body, &mut pins));
                encode_block(LEVEL_SEGMENT, segment.entries.len(), &body.finish())
            }
            Self::Index(index) => {
                index.children.iter().for_each(|child| child.write(&mut body));
                encode_block(index.level, index.children.len(), &body.finish())
            }
        }
    }

    /// Decodes and checks everything a block alone can show (names, order inside a directory is
    /// checked by the navigator, which knows where directories start).
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (mut r, _) = Reader::open("tree block", bytes, BLOCK_MAGIC, TREE_FORMAT)?;
        if bytes.len() > BLOCK_LEN_MAX {
            return Err(r.bad(BLOCK_LEN_MAX, "length", "it is above the limit"));
        }
        let at = r.at();
        let block = match r.u8()? {
            LEVEL_SEGMENT => Self::Segment(read_segment(&mut r)?),
            level => Self::Index(read_index(&mut r, level, at)?),
        };
        if block.counts().entries == 0 {
            return Err(r.bad(at, "block", "it is empty"));
        }
        r.end()?;
        Ok(block)
    }

    /// Gives the sums over what the block holds.
    pub fn counts(&self) -> &Counts {
        match self {
            Self::Segment(segment) => segment.counts(),
            Self::Index(index) => index.counts(),
        }
    }

    /// Gives 0 for a segment, else the level of the index.
    pub fn level(&self) -> u8 {
        match self {
            Self::Segment(_) => LEVEL_SEGMENT,
            Self::Index(index) => index.level,
        }
    }

    /// Gives the name of the first entry below the block.
    pub fn first_name(&self) -> Option<&[u8]> {
        match self {
            Self::Segment(segment) => segment.entries.first().map(|entry| &*entry.name),
            Self::Index(index) => index.children.first().map(|child| &*child.first_name),
        }
    }

    /// Estimates the bytes that the decoded block takes in memory.
    pub fn heap_bytes(&self) -> usize {
        /// What an allocation costs beside its bytes.
        const OVERHEAD: usize = 16;
        match self {
            Self::Segment(segment) => {
                let entries = segment.entries.iter().map(|entry| entry.heap_bytes() + OVERHEAD).sum::<usize>();
                size_of_val(segment.entries.as_slice()) + size_of_val(segment.dirs.as_slice()) + entries
            }
            Self::Index(index) => index.heap_bytes(),
        }
    }
}

impl IndexBlock {
    fn heap_bytes(&self) -> usize {
        let names = self.children.iter().map(|child| child.first_name.len() + 16).sum::<usize>();
        size_of_val(self.children.as_slice()) + size_of_val(self.ends.as_slice()) + names
    }
}

impl ChildRef {
    pub(super) fn write(&self, w: &mut Writer) {
        w.raw(self.id.as_bytes());
        w.varint(u64::from(self.encoded_len));
        self.counts.write(w);
        w.bytes(&self.first_name);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let at = r.at();
        let id = BlockId(r.array()?);
        let encoded_len = read_u32(r, "child's length")?;
        let counts = Counts::read(r)?;
        let first_name: Box<[u8]> = r.bytes("first name", NAME_LEN_MAX)?.into();
        match name_fault(&first_name) {
            Some(why) => Err(r.bad(at, "first name", why)),
            None if encoded_len as usize > BLOCK_LEN_MAX => Err(r.bad(at, "child's length", "it is above the limit")),
            None => Ok(Self { id, encoded_len, counts, first_name }),
        }
    }
}

/// Puts a block together: header, level, count, body.
pub(super) fn encode_block(level: u8, count: usize, body: &[u8]) -> Vec<u8> {
    let mut w = Writer::new(BLOCK_MAGIC, TREE_FORMAT);
    w.u8(level);
    w.varint(count as u64);
    w.raw(body);
    w.finish()
}

fn read_segment(r: &mut Reader<'_>) -> Result<Segment, DecodeError> {
    let at = r.at();
    let count = r.count("entries", ENTRY_LEN_MIN)?;
    let mut entries = Vec::with_capacity(count);
    let mut pins = PinReader::default();
    for _ in 0..count {
        entries.push(Entry::read(r, &mut pins)?);
    }
    let (counts, dirs) = sum_entries(&entries).ok_or_else(|| r.bad(at, "counts", "they are above 64 bits"))?;
    Ok(Segment { entries, counts, dirs })
}

fn read_index(r: &mut Reader<'_>, level: u8, level_at: usize) -> Result<IndexBlock, DecodeError> {
    if level == LEVEL_SEGMENT || level > LEVEL_MAX {
        return Err(r.bad(level_at, "level", "it is not from 1 to 12"));
    }
    let at = r.at();
    let count = r.count("children", CHILD_LEN_MIN)?;
    let mut children = Vec::with_capacity(count);
    for _ in 0..count {
        children.push(ChildRef::read(r)?);
    }
    let sums = sum_children(&children).filter(|(counts, _)| counts.entries <= ENTRIES_MAX);
    let (counts, ends) = sums.ok_or_else(|| r.bad(at, "counts", "they are above 64 bits"))?;
    Ok(IndexBlock { level, children, counts, ends })
}

fn sum_entries(entries: &[Entry]) -> Option<(Counts, Vec<(u32, u64)>)> {
    let mut counts = Counts::default();
    let mut dirs = Vec::new();
    for (position, entry) in (0_u32..).zip(entries) {
        counts = counts.plus(&Counts::of(entry))?;
        if entry.is_dir() {
            dirs.push((position, counts.descendants));
        }
    }
    Some((counts, dirs))
}

fn sum_children(children: &[ChildRef]) -> Option<(Counts, Vec<(u64, u64)>)> {
    let mut counts = Counts::default();
    let mut ends = Vec::with_capacity(children.len());
    for child in children {
        counts = counts.plus(&child.counts)?;
        ends.push((counts.entries, counts.descendants));
    }
    Some((counts, ends))
}
