//! Navigation: pure functions over blocks that may not be at hand.
//!
//! Every function takes a [`Blocks`]. Where it meets a block that is not in memory it ends with
//! [`NavError::Need`]; the caller fetches that block and calls again (all functions are cheap to
//! repeat, and a caller keeps what it fetched until the call succeeds). So one code serves the
//! synchronous FUSE worker, async catalog commands and tests alike.
//!
//! *Where a directory starts.* Let `D(r)` be the sum of `descendants` over all entries of a rank
//! below `r`: the index answers it on one way down. The subtrees of a directory's subdirectories
//! follow its own entries in order, so that of the directory entry at rank `r`, in a directory
//! whose entries start at `f` and are `n`, starts at `f + n + D(r) - D(f)`. The other way round, the
//! directory below which a rank lies is found by searching for a value of `D`.
//!
//! *A tree from the lake is not trusted.* A block that is not what its index says, names out of
//! order, counts that do not add up end in [`NavError::Damaged`], and every loop goes on over
//! strictly smaller ranges, so a hostile tree costs an error and never an endless walk.

use std::sync::Arc;

use crate::format::codec::DecodeError;
use crate::format::ids::BlockId;
use crate::format::placement::{Location, PlacedBlock, PlacementRoot};

use super::entry::{DEPTH_MAX, Entry, EntryKind};
use super::segment::{Block, ChildRef, Counts, IndexBlock, LEVEL_MAX, Segment, TreeRoot};

/// A block that navigation cannot go on without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Need {
    Tree(BlockId),
    Placed(BlockId),
}

/// Why navigation stopped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NavError {
    /// Fetch this block, then call again.
    #[error("block {0:?} is not at hand")]
    Need(Need),
    /// No such name, or no such rank.
    #[error("no such entry")]
    NotFound,
    #[error("not a directory")]
    NotDir,
    /// The tree contradicts itself: it was not made by a correct writer.
    #[error("tree is damaged: {why} at rank {rank}")]
    Damaged { rank: u64, why: &'static str },
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// Where blocks come from. Must answer from memory (or a local disk) without waiting on a network.
pub trait Blocks {
    fn tree_block(&self, id: BlockId) -> Option<Arc<Block>>;
    fn placed_block(&self, id: BlockId) -> Option<Arc<PlacedBlock>>;
}

/// A directory, located: everything that a listing or a lookup below it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirAt {
    /// Rank of its own entry; None for the root.
    pub rank: Option<u64>,
    /// Rank of its first entry, and how many it has.
    pub first: u64,
    pub children: u64,
    /// Sum of all ranks in its subtree (its subtree's blocks end at `first + descendants`).
    pub descendants: u64,
    /// How many of its own entries are directories.
    pub subdirs: u64,
    /// Rank of its parent's own entry; None where the parent is the root, or it is the root.
    pub parent: Option<u64>,
}

/// An entry, located.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryAt {
    pub rank: u64,
    pub entry: Entry,
    /// Present where the entry is a directory.
    pub dir: Option<DirAt>,
}

/// What a way down the index looks for.
#[derive(Debug, Clone, Copy)]
enum Goal<'a> {
    /// The entry of this rank.
    Rank(u64),
    /// The first entry with which `D` grows above this.
    Sum(u64),
    /// The last place at which this name can stand in the directory.
    Name(&'a DirAt, &'a [u8]),
}

/// Where a way down ended: a segment, perhaps not at hand yet.
struct Seat {
    /// Rank of the segment's first entry, and `D` of it.
    rank: u64,
    sum: u64,
    /// The index block that refers to it (None: the root's top), and the position in it.
    parent: Option<Arc<Block>>,
    child: usize,
    /// Positions chosen from the top down.
    trail: Trail,
}

/// The positions chosen on a way down, without an allocation.
#[derive(Default)]
struct Trail {
    chosen: [usize; LEVEL_MAX as usize],
    len: usize,
}

/// A segment at hand.
struct Leaf {
    rank: u64,
    sum: u64,
    block: Arc<Block>,
}

impl Trail {
    fn push(&mut self, child: usize) {
        if let Some(slot) = self.chosen.get_mut(self.len) {
            *slot = child;
            self.len += 1;
        }
    }

    fn as_slice(&self) -> &[usize] {
        self.chosen.get(..self.len).unwrap_or_default()
    }
}

impl Goal<'_> {
    /// Chooses a child of an index whose first entry has rank `rank` and before which `D` is `sum`.
    fn choose(&self, index: &IndexBlock, rank: u64, sum: u64) -> Option<usize> {
        let child = match *self {
            Self::Rank(goal) => index.child_at(goal.checked_sub(rank)?),
            Self::Sum(goal) => index.child_above(goal.checked_sub(sum)?),
            Self::Name(dir, name) => {
                // Children that begin inside the directory begin with one of its names.
                let last_rank = dir.first.checked_add(dir.children)?.checked_sub(1)?;
                let low = index.child_at(dir.first.saturating_sub(rank));
                let high = index.child_at(last_rank.checked_sub(rank)?).min(index.children.len().checked_sub(1)?);
                let inside = index.children.get(low + 1..=high).unwrap_or_default();
                low + inside.partition_point(|child| &*child.first_name <= name)
            }
        };
        (child < index.children.len()).then_some(child)
    }
}

impl Seat {
    fn find(root: &TreeRoot, blocks: &dyn Blocks, goal: Goal<'_>) -> Result<Self, NavError> {
        let (mut rank, mut sum) = (0_u64, 0_u64);
        let mut parent: Option<Arc<Block>> = None;
        let mut trail = Trail::default();
        loop {
            let index = index_of(root, &parent).ok_or(damaged(rank, "an index block is none"))?;
            let child =
                goal.choose(index, rank, sum).ok_or(damaged(rank, "an index has fewer entries than its counts say"))?;
            let (entries, descendants) = index.before(child);
            rank = rank.saturating_add(entries);
            sum = sum.saturating_add(descendants);
            trail.push(child);
            if index.level == 1 {
                return Ok(Self { rank, sum, parent, child, trail });
            }
            let child = index.children.get(child).ok_or(damaged(rank, "an index has no such child"))?;
            let next = load(blocks, child, index.level.saturating_sub(1), rank)?;
            parent = Some(next);
        }
    }

    fn child<'a>(&'a self, root: &'a TreeRoot) -> Result<&'a ChildRef, NavError> {
        let child = index_of(root, &self.parent).and_then(|index| index.children.get(self.child));
        child.ok_or(damaged(self.rank, "an index has no such child"))
    }

    fn load(self, root: &TreeRoot, blocks: &dyn Blocks) -> Result<Leaf, NavError> {
        let block = load(blocks, self.child(root)?, 0, self.rank)?;
        Ok(Leaf { rank: self.rank, sum: self.sum, block })
    }
}

impl Leaf {
    fn find(root: &TreeRoot, blocks: &dyn Blocks, goal: Goal<'_>) -> Result<Self, NavError> {
        Seat::find(root, blocks, goal)?.load(root, blocks)
    }

    fn segment(&self) -> Result<&Segment, NavError> {
        match &*self.block {
            Block::Segment(segment) => Ok(segment),
            Block::Index(_) => Err(damaged(self.rank, "a segment is an index block")),
        }
    }

    /// Gives the entry of a rank, with its position.
    fn entry(&self, rank: u64) -> Result<(usize, &Entry), NavError> {
        let position = rank.checked_sub(self.rank).and_then(|position| usize::try_from(position).ok());
        let entry = position.and_then(|position| Some((position, self.segment().ok()?.entries.get(position)?)));
        entry.ok_or(damaged(rank, "a segment has fewer entries than its counts say"))
    }

    /// Gives `D` of the entry at a position.
    fn sum_at(&self, position: usize) -> Result<u64, NavError> {
        Ok(self.sum.saturating_add(self.segment()?.descendants_before(position)))
    }
}

fn index_of<'a>(root: &'a TreeRoot, parent: &'a Option<Arc<Block>>) -> Option<&'a IndexBlock> {
    match parent.as_deref() {
        None => Some(&root.top),
        Some(Block::Index(index)) => Some(index),
        Some(Block::Segment(_)) => None,
    }
}

/// Takes a block and checks that it is what its index says.
fn load(blocks: &dyn Blocks, child: &ChildRef, level: u8, rank: u64) -> Result<Arc<Block>, NavError> {
    let block = blocks.tree_block(child.id).ok_or(NavError::Need(Need::Tree(child.id)))?;
    let same =
        block.level() == level && *block.counts() == child.counts && block.first_name() == Some(&*child.first_name);
    if same { Ok(block) } else { Err(damaged(rank, "a block is not what its index says")) }
}

fn damaged(rank: u64, why: &'static str) -> NavError {
    NavError::Damaged { rank, why }
}

/// Gives `D(rank)`.
pub(super) fn sum_before(root: &TreeRoot, blocks: &dyn Blocks, rank: u64) -> Result<u64, NavError> {
    if rank == 0 {
        return Ok(0);
    }
    if rank >= root.counts.entries {
        return Ok(root.counts.descendants);
    }
    let seat = Seat::find(root, blocks, Goal::Rank(rank))?;
    if seat.rank == rank {
        return Ok(seat.sum);
    }
    let leaf = seat.load(root, blocks)?;
    let (position, _) = leaf.entry(rank)?;
    leaf.sum_at(position)
}

/// Gives the root directory.
pub fn root_dir(root: &TreeRoot) -> DirAt {
    DirAt {
        rank: None,
        first: 0,
        children: root.children,
        descendants: root.counts.entries,
        subdirs: root.subdirs,
        parent: None,
    }
}

/// Locates the directory entry of rank `rank` in `parent`; `skipped` is how much its directories
/// before that one hold.
fn dir_below(parent: &DirAt, rank: u64, entry: &Entry, skipped: u64) -> Result<DirAt, NavError> {
    let EntryKind::Dir { children, descendants, subdirs } = entry.kind else {
        return Err(NavError::NotDir);
    };
    let first = parent.first.saturating_add(parent.children).saturating_add(skipped);
    if first.saturating_add(descendants) > parent.first.saturating_add(parent.descendants) {
        return Err(damaged(rank, "a directory ends behind the one that it lies in"));
    }
    Ok(DirAt { rank: Some(rank), first, children, descendants, subdirs, parent: parent.rank })
}

/// Puts an entry together with its place; `sum` is `D` of its rank. Goes to where its directory
/// starts only where it is a directory itself.
fn located(
    root: &TreeRoot,
    blocks: &dyn Blocks,
    dir: &DirAt,
    rank: u64,
    entry: &Entry,
    sum: u64,
) -> Result<EntryAt, NavError> {
    let place = match entry.is_dir() {
        false => None,
        true => {
            let skipped = sum.checked_sub(sum_before(root, blocks, dir.first)?);
            Some(dir_below(dir, rank, entry, skipped.ok_or(damaged(rank, "sums go down"))?)?)
        }
    };
    Ok(EntryAt { rank, entry: entry.clone(), dir: place })
}

/// Finds a name in a directory.
pub fn lookup(root: &TreeRoot, blocks: &dyn Blocks, dir: &DirAt, name: &[u8]) -> Result<EntryAt, NavError> {
    if dir.children == 0 {
        return Err(NavError::NotFound);
    }
    let leaf = Leaf::find(root, blocks, Goal::Name(dir, name))?;
    let entries = &leaf.segment()?.entries;
    let (low, high) = clip(&leaf, entries.len(), dir);
    let inside = entries.get(low..high).unwrap_or_default();
    let found = inside.binary_search_by(|entry| (*entry.name).cmp(name)).map_err(|_| NavError::NotFound)?;
    let entry = inside.get(found).ok_or(NavError::NotFound)?;
    let position = low + found;
    located(root, blocks, dir, leaf.rank + position as u64, entry, leaf.sum_at(position)?)
}

/// Gives the positions in a segment between which a directory's own entries lie.
fn clip(leaf: &Leaf, len: usize, dir: &DirAt) -> (usize, usize) {
    let position = |rank: u64| usize::try_from(rank.saturating_sub(leaf.rank)).unwrap_or(usize::MAX).min(len);
    (position(dir.first), position(dir.first.saturating_add(dir.children)))
}

/// Finds a path from the root (names separated by `/`; empty, `.` and leading `/` mean the root).
/// The root itself answers `None`.
pub fn resolve(root: &TreeRoot, blocks: &dyn Blocks, path: &[u8]) -> Result<Option<EntryAt>, NavError> {
    let mut found: Option<EntryAt> = None;
    for name in path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")) {
        let dir = match &found {
            None => root_dir(root),
            Some(entry) => entry.dir.ok_or(NavError::NotDir)?,
        };
        found = Some(lookup(root, blocks, &dir, name)?);
    }
    Ok(found)
}

/// Gives the directory that has the entry of a rank as its own; `visit` sees the directories on the
/// way, from the root's down.
fn walk_to(root: &TreeRoot, blocks: &dyn Blocks, rank: u64, visit: &mut dyn FnMut(&Entry)) -> Result<DirAt, NavError> {
    if rank >= root.counts.entries {
        return Err(NavError::NotFound);
    }
    let mut dir = root_dir(root);
    for _ in 0..=DEPTH_MAX {
        let offset = rank.checked_sub(dir.first).ok_or(damaged(rank, "a directory starts behind its entries"))?;
        let Some(below) = offset.checked_sub(dir.children) else {
            return Ok(dir);
        };
        if offset >= dir.descendants {
            return Err(damaged(rank, "an entry lies in no directory"));
        }
        let base = sum_before(root, blocks, dir.first)?;
        let goal = base.saturating_add(below);
        let leaf = Leaf::find(root, blocks, Goal::Sum(goal))?;
        let position = leaf.segment()?.dir_above(goal.saturating_sub(leaf.sum));
        let position = position.ok_or(damaged(rank, "an entry lies in no directory"))?;
        let found = leaf.rank.saturating_add(position as u64);
        if found < dir.first || found - dir.first >= dir.children {
            return Err(damaged(rank, "an entry lies below a directory of another one"));
        }
        let (_, entry) = leaf.entry(found)?;
        let skipped = leaf.sum_at(position)?.checked_sub(base).ok_or(damaged(found, "sums go down"))?;
        dir = dir_below(&dir, found, entry, skipped)?;
        visit(entry);
    }
    Err(damaged(rank, "directories are nested deeper than 4096"))
}

/// Gives the entry of a rank, not knowing where it lies: O(depth) descents.
pub fn entry_at(root: &TreeRoot, blocks: &dyn Blocks, rank: u64) -> Result<EntryAt, NavError> {
    let dir = walk_to(root, blocks, rank, &mut |_| {})?;
    let leaf = Leaf::find(root, blocks, Goal::Rank(rank))?;
    let (position, entry) = leaf.entry(rank)?;
    located(root, blocks, &dir, rank, entry, leaf.sum_at(position)?)
}

/// Gives the directory that has the entry of a rank as its own: O(depth) descents.
pub fn dir_of(root: &TreeRoot, blocks: &dyn Blocks, rank: u64) -> Result<DirAt, NavError> {
    walk_to(root, blocks, rank, &mut |_| {})
}

/// Gives the path of a rank from the root, names separated by `/`.
pub fn path_of(root: &TreeRoot, blocks: &dyn Blocks, rank: u64) -> Result<Vec<u8>, NavError> {
    let mut path = Vec::new();
    walk_to(root, blocks, rank, &mut |entry| {
        path.extend_from_slice(&entry.name);
        path.push(b'/');
    })?;
    let leaf = Leaf::find(root, blocks, Goal::Rank(rank))?;
    let (_, entry) = leaf.entry(rank)?;
    path.extend_from_slice(&entry.name);
    Ok(path)
}

/// Lists up to `limit` entries of a directory from position `from` (0-based) on, each located.
/// Reads each segment once; may give fewer than `limit` entries, but at least one unless at the end.
pub fn list(
    root: &TreeRoot,
    blocks: &dyn Blocks,
    dir: &DirAt,
    from: u64,
    limit: usize,
) -> Result<Vec<EntryAt>, NavError> {
    if from >= dir.children || limit == 0 {
        return Ok(Vec::new());
    }
    let start = dir.first.saturating_add(from);
    let leaf = Leaf::find(root, blocks, Goal::Rank(start))?;
    let entries = &leaf.segment()?.entries;
    let (low, high) = clip(&leaf, entries.len(), dir);
    let (at, _) = leaf.entry(start)?;
    let high = high.min(at.saturating_add(limit));
    check_order(root, blocks, dir, start, entries.get(at.saturating_sub(1).max(low)..high).unwrap_or_default())?;
    let given = entries.get(at..high).unwrap_or_default();
    let ends = from.saturating_add(given.len() as u64) >= dir.children;
    // Only directories, and the sum behind the last entry, need to know where the directory starts.
    let base = match ends || given.iter().any(Entry::is_dir) {
        true => sum_before(root, blocks, dir.first)?,
        false => 0,
    };
    if ends {
        let below = leaf.sum_at(high)?.checked_sub(base).and_then(|sum| sum.checked_add(dir.children));
        if below != Some(dir.descendants) {
            return Err(damaged(start, "a directory does not hold as many entries as it says"));
        }
    }
    let mut listed = Vec::with_capacity(given.len());
    for (position, entry) in (at..).zip(given) {
        let rank = leaf.rank.saturating_add(position as u64);
        let place = match entry.is_dir() {
            false => None,
            true => {
                let skipped = leaf.sum_at(position)?.checked_sub(base).ok_or(damaged(rank, "sums go down"))?;
                Some(dir_below(dir, rank, entry, skipped)?)
            }
        };
        listed.push(EntryAt { rank, entry: entry.clone(), dir: place });
    }
    Ok(listed)
}

/// Checks that names ascend, also from the segment before where `start` is the first of its own.
fn check_order(
    root: &TreeRoot,
    blocks: &dyn Blocks,
    dir: &DirAt,
    start: u64,
    entries: &[Entry],
) -> Result<(), NavError> {
    let ascends = |pair: &[Entry]| matches!(pair, [a, b] if a.name < b.name);
    if !entries.windows(2).all(ascends) {
        return Err(damaged(start, "the names of a directory are not in order"));
    }
    let Some(before) = start.checked_sub(1).filter(|before| *before >= dir.first) else {
        return Ok(());
    };
    let leaf = Leaf::find(root, blocks, Goal::Rank(before))?;
    let (position, entry) = leaf.entry(before)?;
    let is_last = position + 1 == leaf.segment()?.entries.len();
    match entries.first() {
        Some(first) if is_last && entry.name >= first.name => {
            Err(damaged(start, "the names of a directory are not in order"))
        }
        _ => Ok(()),
    }
}

/// Gives all entries of the segment that holds `rank`, with the rank of its first: for scans in
/// tree order (push --onto, get, prefetch, diff) that do not care for directories.
pub fn segment_at(root: &TreeRoot, blocks: &dyn Blocks, rank: u64) -> Result<(u64, Arc<Block>), NavError> {
    if rank >= root.counts.entries {
        return Err(NavError::NotFound);
    }
    let leaf = Leaf::find(root, blocks, Goal::Rank(rank))?;
    leaf.segment()?;
    Ok((leaf.rank, leaf.block))
}

/// Gives where the contents of the file of that rank lie.
pub fn location(
    root: &TreeRoot,
    placement: &PlacementRoot,
    blocks: &dyn Blocks,
    rank: u64,
) -> Result<Location, NavError> {
    let (first, block) = placed_at(root, placement, blocks, rank)?;
    let PlacedBlock::Segment(locations) = &*block else {
        return Err(damaged(rank, "a placed segment is an index block"));
    };
    let position = rank.checked_sub(first).and_then(|position| usize::try_from(position).ok());
    let location = position.and_then(|position| locations.get(position));
    location.cloned().ok_or(damaged(rank, "a placed segment has fewer entries than its tree's"))
}

/// Gives the placed segment (always [`PlacedBlock::Segment`]) that mirrors the tree segment which
/// holds `rank`, with the rank of its first entry. Reads no tree segment.
pub fn placed_at(
    root: &TreeRoot,
    placement: &PlacementRoot,
    blocks: &dyn Blocks,
    rank: u64,
) -> Result<(u64, Arc<PlacedBlock>), NavError> {
    if rank >= root.counts.entries {
        return Err(NavError::NotFound);
    }
    let fault = damaged(rank, "a placement does not mirror its tree");
    let seat = Seat::find(root, blocks, Goal::Rank(rank))?;
    let (top, below) = seat.trail.as_slice().split_first().ok_or(fault.clone())?;
    if placement.top.len() != root.top.children.len() {
        return Err(fault);
    }
    let mut id = *placement.top.get(*top).ok_or(fault.clone())?;
    for child in below {
        let block = blocks.placed_block(id).ok_or(NavError::Need(Need::Placed(id)))?;
        id = match &*block {
            PlacedBlock::Index(children) => *children.get(*child).ok_or(fault.clone())?,
            PlacedBlock::Segment(_) => return Err(fault),
        };
    }
    let block = blocks.placed_block(id).ok_or(NavError::Need(Need::Placed(id)))?;
    match &*block {
        PlacedBlock::Segment(locations) if locations.len() as u64 == seat.child(root)?.counts.entries => {
            Ok((seat.rank, block))
        }
        _ => Err(fault),
    }
}

/// Gives the entry that a later hard link stands for: a file of a lower rank that says it has more
/// links than one. An entry that is no such link is given back as it is.
pub fn resolve_link(root: &TreeRoot, blocks: &dyn Blocks, entry: &EntryAt) -> Result<EntryAt, NavError> {
    let EntryKind::HardLink { first } = &entry.entry.kind else {
        return Ok(entry.clone());
    };
    let found = match resolve(root, blocks, first) {
        Err(NavError::NotFound | NavError::NotDir) => None,
        other => other?,
    };
    let is_first = |found: &EntryAt| matches!(found.entry.kind, EntryKind::File { .. }) && found.entry.nlink > 1;
    match found {
        Some(found) if found.rank < entry.rank && is_first(&found) => Ok(found),
        _ => Err(damaged(entry.rank, "the first entry of a hard-link group is not a file before it")),
    }
}

/// Sums what a directory holds, in its whole subtree: two ways down, whatever its size.
pub fn subtree_counts(root: &TreeRoot, blocks: &dyn Blocks, dir: &DirAt) -> Result<Counts, NavError> {
    let end = counts_before(root, blocks, dir.first.saturating_add(dir.descendants))?;
    let start = counts_before(root, blocks, dir.first)?;
    end.minus(&start).ok_or(damaged(dir.first, "sums go down"))
}

/// Sums all entries of a rank below `rank`.
fn counts_before(root: &TreeRoot, blocks: &dyn Blocks, rank: u64) -> Result<Counts, NavError> {
    if rank >= root.counts.entries {
        return Ok(root.counts);
    }
    let overflow = damaged(rank, "sums are above 64 bits");
    let mut sum = Counts::default();
    let mut parent: Option<Arc<Block>> = None;
    loop {
        let index = index_of(root, &parent).ok_or(damaged(rank, "an index block is none"))?;
        let child = Goal::Rank(rank)
            .choose(index, sum.entries, 0)
            .ok_or(damaged(rank, "an index has fewer entries than its counts say"))?;
        for before in index.children.iter().take(child) {
            sum = sum.plus(&before.counts).ok_or(overflow.clone())?;
        }
        let child = index.children.get(child).ok_or(damaged(rank, "an index has no such child"))?;
        let next = load(blocks, child, index.level.saturating_sub(1), sum.entries)?;
        if let Block::Segment(segment) = &*next {
            let position = usize::try_from(rank - sum.entries).unwrap_or(usize::MAX);
            for entry in segment.entries.iter().take(position) {
                sum = sum.plus(&Counts::of(entry)).ok_or(overflow.clone())?;
            }
            return Ok(sum);
        }
        parent = Some(next);
    }
}
