//! From entries in tree order to blocks and a root, in bounded memory.

use crate::format::ids::{BlockId, TreeId};
use crate::format::placement::{Location, PlacementRoot};

use super::entry::{Entry, Mtime};
use super::segment::TreeRoot;

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
    pub placement: PlacementRoot,
}

/// Says which entry broke the order or the rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    #[error("entry {rank} `{name}`: {why}")]
    Entry {
        rank: u64,
        name: String,
        why: &'static str,
    },
    #[error("{given} entries were given, the directories' counts promise {promised}")]
    Counts { given: u64, promised: u64 },
}

/// Builds a tree and its placement together: `push` every entry in tree order with its location,
/// take the blocks that became ready with `drain`, and `finish`.
///
/// Keeps at most one open segment and one open index block a level.
#[derive(Debug)]
pub struct TreeBuilder {
    _private: (),
}

impl TreeBuilder {
    pub fn new(_root_mode: u32, _root_mtime: Mtime, _root_children: u64) -> Self {
        todo!()
    }

    pub fn push(&mut self, _entry: Entry, _location: Location) -> Result<(), BuildError> {
        todo!()
    }

    /// Takes the blocks that are ready.
    pub fn drain(&mut self) -> Vec<BuiltBlock> {
        todo!()
    }

    /// Closes everything; the last blocks come back with the result.
    pub fn finish(self) -> Result<(Built, Vec<BuiltBlock>), BuildError> {
        todo!()
    }
}
