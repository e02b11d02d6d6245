//! From entries in tree order to blocks and a root, in bounded memory.
//!
//! The builder takes entries directory by directory and checks what makes a list of entries a tree:
//! names in order and once, as many entries as each directory promised, hard links behind a first
//! entry that counts them. What it holds: one open segment, one open index block a level, of each
//! directory that is still to come its name and counts, the paths of hard-link groups that are not
//! complete, and the referenced stretches of each pack.
//!
//! The result depends on the entries alone, never on when `drain` was called.

use std::collections::HashMap;

use crate::format::codec::{Reader, Writer};
use crate::format::ids::{BlockId, PackId, TreeId};
use crate::format::placement::{Location, PlacedBlock, PlacementRoot};

use super::cut::Cuts;
use super::entry::{DEPTH_MAX, Entry, EntryKind, FILE_LEN_MAX, Mtime, NAME_LEN_MAX, PinWriter};
use super::segment::{Block, ChildRef, Counts, IndexBlock, LEVEL_MAX, TreeRoot, encode_block};
use super::uses::PackUses;

/// A block that is ready to be stored: content-addressed, in the order children before parents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltBlock {
    pub id: BlockId,
    pub bytes: Vec<u8>,
    /// Whether it belongs to the tree (`nodes/`) or to its placement (`placed/`).
    pub of: BlockOf,
}

/// Which structure a block belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockOf {
    Tree,
    Placement,
}

/// What a finished build gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    pub tree: TreeId,
    pub root: TreeRoot,
    /// Its `packs` have the lengths that were declared, else the highest end that was referenced.
    pub placement: PlacementRoot,
}

/// Says which entry broke the order or the rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    #[error("entry {rank} `{name}`: {why}")]
    Entry { rank: u64, name: String, why: &'static str },
    #[error("{given} entries were given, the directories' counts promise {promised}")]
    Counts { given: u64, promised: u64 },
    #[error("pack {pack} has {len} bytes, but an entry lies up to {end}")]
    Pack { pack: PackId, len: u64, end: u64 },
}

/// Builds a tree and its placement together: `push` every entry in tree order with its location,
/// take the blocks that became ready with `drain`, and `finish`.
///
/// Keeps at most one open segment and one open index block a level.
#[derive(Debug)]
pub struct TreeBuilder {
    mode: u32,
    mtime: Mtime,
    children: u64,
    subdirs: u64,
    /// The directories from the root to the one whose entries are being given.
    stack: Vec<Frame>,
    /// Path of that directory, with a `/` behind each name.
    path: Vec<u8>,
    /// Rank of the next entry.
    rank: u64,
    /// Groups whose later links are still to come: path of the first, its rank, how many.
    links: HashMap<Box<[u8]>, (u64, u32)>,
    uses: PackUses,
    open: OpenSegment,
    levels: Vec<OpenIndex>,
    ready: Vec<BuiltBlock>,
    cuts: Cuts,
}

/// A directory on the way to the current one.
#[derive(Debug)]
struct Frame {
    name: Box<[u8]>,
    promised: u64,
    /// Entries of its own that are still to come, and directories among them.
    left: u64,
    subdirs_left: u64,
    /// Name of its entry before, for the order.
    last: Vec<u8>,
    /// Own entries and the `descendants` of its directories, so far.
    found: u64,
    /// Its directories that were not entered yet: three counts and the name, encoded; read from `at`.
    waiting: Writer,
    at: usize,
}

/// The segment that is being filled.
#[derive(Debug, Default)]
struct OpenSegment {
    body: Writer,
    pins: PinWriter,
    locations: Vec<Location>,
    counts: Counts,
    first_name: Box<[u8]>,
}

/// The index block of one level that is being filled.
#[derive(Debug)]
struct OpenIndex {
    body: Writer,
    children: Vec<ChildRef>,
    placed: Vec<BlockId>,
    /// Whether a block of this level was closed already.
    closed: bool,
}

impl TreeBuilder {
    /// Starts a tree whose root directory has these attributes and promises so many entries.
    pub fn new(root_mode: u32, root_mtime: Mtime, root_children: u64, root_subdirs: u64) -> Self {
        // What the root's subtree holds in all is nobody's promise: it is learnt from its entries.
        let root = Frame::new(Box::default(), root_children, u64::MAX, root_subdirs);
        Self {
            mode: root_mode,
            mtime: root_mtime,
            children: root_children,
            subdirs: root_subdirs,
            stack: vec![root],
            path: Vec::new(),
            rank: 0,
            links: HashMap::new(),
            uses: PackUses::default(),
            open: OpenSegment::default(),
            levels: Vec::new(),
            ready: Vec::new(),
            cuts: Cuts::FORMAT,
        }
    }

    /// Cuts elsewhere than the format says: for tests of what depends on many blocks.
    #[cfg(test)]
    pub(super) fn with_cuts(mut self, cuts: Cuts) -> Self {
        self.cuts = cuts;
        self
    }

    /// Says how long a pack is (any time before `finish`); else its highest referenced end is taken.
    pub fn declare_pack(&mut self, pack: PackId, len: u64) {
        self.uses.declare(pack, len);
    }

    /// Takes the next entry in tree order and where its bytes lie.
    pub fn push(&mut self, entry: Entry, location: Location) -> Result<(), BuildError> {
        let fail =
            |rank, why| Err(BuildError::Entry { rank, name: String::from_utf8_lossy(&entry.name).into_owned(), why });
        if let Some(why) = entry.fault().or_else(|| location_fault(&entry, &location)) {
            return fail(self.rank, why);
        }
        if let Err(why) = self.enter_next_dir() {
            return fail(self.rank, why);
        }
        let Some(frame) = self.stack.last_mut() else {
            return Err(BuildError::Counts { given: self.rank + 1, promised: self.rank });
        };
        if let Err(why) = frame.take(&entry) {
            return fail(self.rank, why);
        }
        let dir_name = frame.name.clone();
        if let Err(why) = self.note_links(&entry) {
            return fail(self.rank, why);
        }
        let Some(counts) = self.open.counts.plus(&Counts::of(&entry)) else {
            return fail(self.rank, "the sizes of the tree add up to more than 64 bits");
        };
        self.open.counts = counts;
        self.uses.add(&location, entry.size());
        self.rank += 1;
        self.append(&dir_name, entry, location)
    }

    /// Takes the blocks that are ready.
    pub fn drain(&mut self) -> Vec<BuiltBlock> {
        std::mem::take(&mut self.ready)
    }

    /// Closes everything; the last blocks come back with the result.
    pub fn finish(mut self) -> Result<(Built, Vec<BuiltBlock>), BuildError> {
        let root_fault = super::entry::root_fault(self.mode, &self.mtime);
        if let Some(why) = root_fault.or(self.enter_next_dir().err()) {
            return Err(BuildError::Entry { rank: self.rank, name: "/".into(), why });
        }
        if !self.stack.is_empty() {
            return Err(BuildError::Counts { given: self.rank, promised: self.promised() });
        }
        if let Some((path, (rank, _))) = self.links.iter().min_by_key(|(_, (rank, _))| *rank) {
            let why = "its hard-link group has fewer links than it says";
            return Err(BuildError::Entry { rank: *rank, name: String::from_utf8_lossy(path).into_owned(), why });
        }
        self.close_segment()?;
        let (top, placed) = self.close_levels()?;
        let counts = *top.counts();
        let root = TreeRoot {
            mode: self.mode,
            mtime: self.mtime,
            children: self.children,
            subdirs: self.subdirs,
            counts,
            top,
        };
        let tree = root.id();
        let packs = self.uses.finish().map_err(|(pack, len, end)| BuildError::Pack { pack, len, end })?;
        let placement = PlacementRoot { tree, packs, top: placed };
        Ok((Built { tree, root, placement }, self.ready))
    }

    /// Leaves directories that are complete and enters the next one that has entries, so that the
    /// top of the stack expects one; the stack is empty where the tree is complete.
    fn enter_next_dir(&mut self) -> Result<(), &'static str> {
        while let Some(frame) = self.stack.last_mut() {
            if frame.left > 0 {
                return Ok(());
            }
            frame.check_complete()?;
            match frame.next_dir() {
                Some(next) => {
                    self.path.extend_from_slice(&next.name);
                    self.path.push(b'/');
                    self.stack.push(next);
                    if self.stack.len() > DEPTH_MAX + 1 {
                        return Err("it lies deeper than 4096 directories");
                    }
                }
                None => {
                    let name_len = frame.name.len();
                    self.stack.pop();
                    self.path.truncate(self.path.len().saturating_sub(name_len + 1));
                }
            }
        }
        Ok(())
    }

    /// Counts the entries that the directories seen so far promise.
    fn promised(&self) -> u64 {
        let missing = self.stack.iter().map(|frame| frame.left.saturating_add(frame.waiting_entries()));
        missing.fold(self.rank, u64::saturating_add)
    }

    fn note_links(&mut self, entry: &Entry) -> Result<(), &'static str> {
        match &entry.kind {
            EntryKind::File { .. } if entry.nlink > 1 => {
                let path = [&self.path, &*entry.name].concat();
                if path.len() > super::entry::LINK_PATH_LEN_MAX {
                    return Err("the path of a hard-link group's first entry is above 32 KiB");
                }
                self.links.insert(path.into(), (self.rank, entry.nlink - 1));
                Ok(())
            }
            EntryKind::HardLink { first } => {
                let (_, left) = self
                    .links
                    .get_mut(first)
                    .ok_or("the first entry of its hard-link group does not come before it, or has fewer links")?;
                *left -= 1;
                if *left == 0 {
                    self.links.remove(first);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn append(&mut self, dir_name: &[u8], entry: Entry, location: Location) -> Result<(), BuildError> {
        let open = &mut self.open;
        if open.locations.is_empty() {
            open.first_name = entry.name.clone();
        }
        entry.write(&mut open.body, &mut open.pins);
        open.locations.push(location);
        match self.cuts.ends_segment(dir_name, &entry, open.locations.len(), open.body.len()) {
            true => self.close_segment(),
            false => Ok(()),
        }
    }

    fn close_segment(&mut self) -> Result<(), BuildError> {
        if self.open.locations.is_empty() {
            return Ok(());
        }
        let open = std::mem::take(&mut self.open);
        let bytes = encode_block(0, open.locations.len(), &open.body.finish());
        let placed = self.emit_placed(&PlacedBlock::Segment(open.locations));
        let child = self.emit_tree(bytes, open.counts, open.first_name);
        self.add_child(0, child, placed)
    }

    /// Adds a block to the index `level` steps above the segments' own (0 indexes segments).
    fn add_child(&mut self, level: usize, child: ChildRef, placed: BlockId) -> Result<(), BuildError> {
        if self.levels.len() <= level {
            if level >= usize::from(LEVEL_MAX) {
                return Err(BuildError::Entry {
                    rank: self.rank,
                    name: "/".into(),
                    why: "the tree has too many entries",
                });
            }
            self.levels.push(OpenIndex {
                body: Writer::default(),
                children: Vec::new(),
                placed: Vec::new(),
                closed: false,
            });
        }
        let Some(open) = self.levels.get_mut(level) else {
            return Ok(());
        };
        child.write(&mut open.body);
        let ends = self.cuts.ends_index(&child.id, open.children.len() + 1, open.body.len());
        open.children.push(child);
        open.placed.push(placed);
        if ends { self.close_index(level) } else { Ok(()) }
    }

    fn close_index(&mut self, level: usize) -> Result<(), BuildError> {
        let Some(open) = self.levels.get_mut(level).filter(|open| !open.children.is_empty()) else {
            return Ok(());
        };
        open.closed = true;
        let body = std::mem::take(&mut open.body).finish();
        let (children, placed) = (std::mem::take(&mut open.children), std::mem::take(&mut open.placed));
        let index = IndexBlock::new(level as u8 + 1, children);
        let first_name = index.children.first().map(|child| child.first_name.clone()).unwrap_or_default();
        let bytes = encode_block(index.level, index.children.len(), &body);
        let placed = self.emit_placed(&PlacedBlock::Index(placed));
        let child = self.emit_tree(bytes, *index.counts(), first_name);
        self.add_child(level + 1, child, placed)
    }

    /// Closes the open index blocks from below; the first level of which no block was closed is
    /// the top, and goes into the root.
    fn close_levels(&mut self) -> Result<(IndexBlock, Vec<BlockId>), BuildError> {
        let mut level = 0;
        while self.levels.get(level).is_some_and(|open| open.closed) {
            self.close_index(level)?;
            level += 1;
        }
        let top = self
            .levels
            .get_mut(level)
            .map(|open| (std::mem::take(&mut open.children), std::mem::take(&mut open.placed)));
        let (children, placed) = top.unwrap_or_default();
        Ok((IndexBlock::new(level as u8 + 1, children), placed))
    }

    fn emit_tree(&mut self, bytes: Vec<u8>, counts: Counts, first_name: Box<[u8]>) -> ChildRef {
        let (id, encoded_len) = (Block::id_of(&bytes), bytes.len() as u32);
        self.ready.push(BuiltBlock { id, bytes, of: BlockOf::Tree });
        ChildRef { id, encoded_len, counts, first_name }
    }

    fn emit_placed(&mut self, block: &PlacedBlock) -> BlockId {
        let bytes = block.encode();
        let id = PlacedBlock::id_of(&bytes);
        self.ready.push(BuiltBlock { id, bytes, of: BlockOf::Placement });
        id
    }
}

impl Frame {
    fn new(name: Box<[u8]>, children: u64, promised: u64, subdirs: u64) -> Self {
        Self {
            name,
            promised,
            left: children,
            subdirs_left: subdirs,
            last: Vec::new(),
            found: 0,
            waiting: Writer::default(),
            at: 0,
        }
    }

    /// Takes one entry of the directory.
    fn take(&mut self, entry: &Entry) -> Result<(), &'static str> {
        match self.last.as_slice().cmp(&entry.name) {
            std::cmp::Ordering::Less => {}
            std::cmp::Ordering::Equal => return Err("the name is there twice"),
            std::cmp::Ordering::Greater => {
                return Err("the names of a directory are not in byte order");
            }
        }
        self.last.clear();
        self.last.extend_from_slice(&entry.name);
        self.left -= 1;
        self.found = self.found.saturating_add(1);
        if let EntryKind::Dir { children, descendants, subdirs } = entry.kind {
            self.subdirs_left =
                self.subdirs_left.checked_sub(1).ok_or("its directory has more directories than it says")?;
            self.found = self.found.saturating_add(descendants);
            if children > 0 {
                [children, descendants, subdirs].into_iter().for_each(|count| self.waiting.varint(count));
                self.waiting.bytes(&entry.name);
            }
        }
        Ok(())
    }

    /// Checks, behind the last entry of its own, what the directory promised.
    fn check_complete(&self) -> Result<(), &'static str> {
        if self.at == 0 && self.subdirs_left > 0 {
            return Err("the directory before it has fewer directories than it says");
        }
        if self.promised != u64::MAX && self.found != self.promised {
            return Err("the directory before it does not hold as many entries below it as it says");
        }
        Ok(())
    }

    /// Takes the next directory that is to be entered.
    fn next_dir(&mut self) -> Option<Self> {
        let mut r = Reader::bare("waiting directory", self.waiting.as_slice().get(self.at..)?);
        let (children, descendants, subdirs) = (r.varint().ok()?, r.varint().ok()?, r.varint().ok()?);
        let name = r.bytes("name", NAME_LEN_MAX).ok()?.into();
        self.at += r.at();
        Some(Self::new(name, children, descendants, subdirs))
    }

    /// Sums the entries of the directories that were not entered yet.
    fn waiting_entries(&self) -> u64 {
        let mut r = Reader::bare("waiting directory", self.waiting.as_slice().get(self.at..).unwrap_or_default());
        let mut sum = 0_u64;
        while let (Ok(_), Ok(descendants), Ok(_), Ok(_)) =
            (r.varint(), r.varint(), r.varint(), r.bytes("name", NAME_LEN_MAX))
        {
            sum = sum.saturating_add(descendants);
        }
        sum
    }
}

/// Says what is wrong with a location for its entry, if anything is.
fn location_fault(entry: &Entry, location: &Location) -> Option<&'static str> {
    use crate::format::pack::{ALIGN, plan::EXTENTS_MAX};
    let size = match (&entry.kind, location) {
        (_, Location::None) => return None,
        (EntryKind::File { size: 1.., .. }, _) => entry.size(),
        _ => return Some("only a file that is not empty has a place in a pack"),
    };
    let fits = |offset: u64, len: u64| offset.checked_add(len).is_some_and(|end| end <= FILE_LEN_MAX);
    match location {
        Location::Run { offset, .. } if !fits(*offset, size) || offset % ALIGN != 0 => {
            Some("its place does not start on 4 KiB or ends behind 2^63 bytes")
        }
        Location::None | Location::Run { .. } => None,
        Location::Sparse { extents, .. } if extents.is_empty() || extents.len() > EXTENTS_MAX => {
            Some("a sparse file has 1 to 1024 extents")
        }
        Location::Sparse { extents, .. } => {
            let mut end = 0;
            let good = extents.iter().all(|extent| {
                let in_order = extent.logical >= end && extent.len > 0 && extent.offset % ALIGN == 0;
                end = extent.logical.saturating_add(extent.len);
                in_order && end <= size && fits(extent.offset, extent.len)
            });
            (!good).then_some(
                "its extents are out of order, overlap, reach behind its end, or do not start on 4 KiB in the pack",
            )
        }
    }
}
