//! Navigation: pure functions over blocks that may not be at hand.
//!
//! Every function takes a [`Blocks`]. Where it meets a block that is not in memory it ends with
//! [`NavError::Need`]; the caller fetches that block and calls again (all functions are cheap to
//! repeat, and a caller keeps what it fetched until the call succeeds). So one code serves the
//! synchronous FUSE worker, async catalog commands and tests alike.

use std::sync::Arc;

use crate::format::codec::DecodeError;
use crate::format::ids::BlockId;
use crate::format::placement::{Location, PlacedBlock, PlacementRoot};

use super::entry::Entry;
use super::segment::{Block, TreeRoot};

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

/// Gives the root directory.
pub fn root_dir(_root: &TreeRoot) -> DirAt {
    todo!()
}

/// Finds a name in a directory.
pub fn lookup(
    _root: &TreeRoot,
    _blocks: &dyn Blocks,
    _dir: &DirAt,
    _name: &[u8],
) -> Result<EntryAt, NavError> {
    todo!()
}

/// Finds a path from the root (names separated by `/`; empty, `.` and leading `/` mean the root).
/// The root itself answers `None`.
pub fn resolve(
    _root: &TreeRoot,
    _blocks: &dyn Blocks,
    _path: &[u8],
) -> Result<Option<EntryAt>, NavError> {
    todo!()
}

/// Gives the entry of a rank, not knowing where it lies: O(depth) descents.
pub fn entry_at(_root: &TreeRoot, _blocks: &dyn Blocks, _rank: u64) -> Result<EntryAt, NavError> {
    todo!()
}

/// Gives the path of a rank from the root, names separated by `/`.
pub fn path_of(_root: &TreeRoot, _blocks: &dyn Blocks, _rank: u64) -> Result<Vec<u8>, NavError> {
    todo!()
}

/// Lists up to `limit` entries of a directory from position `from` (0-based) on, each located.
/// Reads each segment once; may give fewer than `limit` entries, but at least one unless at the end.
pub fn list(
    _root: &TreeRoot,
    _blocks: &dyn Blocks,
    _dir: &DirAt,
    _from: u64,
    _limit: usize,
) -> Result<Vec<EntryAt>, NavError> {
    todo!()
}

/// Gives all entries of the segment that holds `rank`, with the rank of its first: for scans in
/// tree order (push --onto, get, prefetch, diff) that do not care for directories.
pub fn segment_at(
    _root: &TreeRoot,
    _blocks: &dyn Blocks,
    _rank: u64,
) -> Result<(u64, Arc<Block>), NavError> {
    todo!()
}

/// Gives where the contents of the file of that rank lie.
pub fn location(
    _root: &TreeRoot,
    _placement: &PlacementRoot,
    _blocks: &dyn Blocks,
    _rank: u64,
) -> Result<Location, NavError> {
    todo!()
}
