//! Placements: where a tree's contents lie, in blocks that mirror the tree's own.
//!
//! One placement segment per tree segment, in entry order, and one index block per tree index
//! block, so that a change of k files rewrites O(k). The root lists every pack that is used, with
//! its length and how many of its bytes this tree refers to: accounting, filling and gc need no
//! more than the root. `placements/<tree>/<placement>` in the lake; immutable; the newest complete
//! one counts. Not part of any commit id.

use crate::format::codec::DecodeError;
use crate::format::ids::{BlockId, PackId, PlacementId, TreeId};

/// Where the bytes of one file lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// Not a file with bytes of its own (directory, symlink, later hard link, empty file), or a file
    /// of holes only.
    None,
    /// All logical bytes, in one run: `[offset, offset + size)` of the pack.
    Run { pack: PackId, offset: u64 },
    /// A sparse file: its data extents in logical order; everything between them is holes.
    Sparse { pack: PackId, extents: Vec<Extent> },
}

/// A piece of a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Position in the file's logical bytes.
    pub logical: u64,
    /// Position in the pack.
    pub offset: u64,
    pub len: u64,
}

/// One pack that a placement uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackUse {
    pub pack: PackId,
    /// Length of the whole pack.
    pub len: u64,
    /// Bytes of it that this tree refers to (each content once, without padding).
    pub referenced: u64,
}

/// The root of a placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacementRoot {
    pub tree: TreeId,
    /// Sorted by pack id, no duplicates.
    pub packs: Vec<PackUse>,
    /// Placed blocks of the children of the tree root's top block, one each, in order.
    pub top: Vec<BlockId>,
}

/// A block of a placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlacedBlock {
    /// Mirrors a tree segment: one location per entry.
    Segment(Vec<Location>),
    /// Mirrors a tree index block: one child per child.
    Index(Vec<BlockId>),
}

impl PlacementRoot {
    pub fn id(&self) -> PlacementId {
        todo!()
    }
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }
    pub fn decode(_bytes: &[u8]) -> Result<Self, DecodeError> {
        todo!()
    }
}

impl PlacedBlock {
    pub fn id_of(_encoded: &[u8]) -> BlockId {
        todo!()
    }
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }
    pub fn decode(_bytes: &[u8]) -> Result<Self, DecodeError> {
        todo!()
    }
}
