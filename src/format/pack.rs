//! Packs: many files' bytes back to back, or one large file's; laid out, indexed, named.
//!
//! ```text
//! packed:  | file a ....000 | file b .......0 | ... 000 |   each start and the end on 4 KiB, zeros between
//! whole:   | one content, exact length |
//! ```
//!
//! A pack's id is the BLAKE3 of its encoded [`PackIndex`]. In the lake: `packs/ab/<id>.index` (those
//! bytes), `.recipe` (where the pack's own bytes lie), `.outboard` (chaining values, where it has a
//! content above 256 KiB), `.proof` (digests of an imported pack, once known).
//!
//! * [`plan`]: which content goes to which pack. * `index`: the index and its codec.
//! * [`piece`]: what of a pack can be verified alone. * `sidecar`: recipe, outboard, proof.
//!
//! Invariants: contents follow each other without gaps but for the zeros up to the next 4 KiB, so
//! offsets are computed, never stored; a pack has one content at least; its padding is zeros.

use crate::format::ids::{ContentDigest, ContentId, PackId};
use crate::format::placement::Extent;
use crate::format::tree::Pin;

mod index;
pub mod piece;
pub mod plan;
mod sidecar;

pub use piece::{Piece, PieceFault};
pub use plan::{Layout, PackDraft, PackPlanner, Slot};
pub use sidecar::OutboardLayout;

use crate::format::digest::Outboard;

/// What files start on inside a pack.
pub const ALIGN: u64 = 4096;
/// A pack is cut once it holds this much, at least.
pub const PACK_LEN_MIN: u64 = 256 << 20;
/// A file above this (at least) is a pack of its own.
pub const WHOLE_LEN_MIN: u64 = 64 << 20;
/// Version of indexes, recipes, outboards and proofs that this larder writes, and the newest it reads.
pub const PACK_FORMAT: u32 = 1;

/// One content of a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedContent {
    pub content: ContentId,
    /// Logical size.
    pub size: u64,
    pub place: Place,
}

/// Where a content lies in its pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Run { offset: u64 },
    Sparse { extents: Vec<Extent> },
}

/// Everything a pack holds, by offset. Its digest is the pack's id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackIndex {
    /// Length of the pack.
    pub len: u64,
    /// By offset of their first stored byte, not overlapping. A content may be there twice (a
    /// streaming writer knows a place before it knows the digest).
    pub contents: Vec<PackedContent>,
}

/// Where a pack's bytes lie in the lake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// One object of our own: `data/<key>`, the pack at its start.
    Native { key: String },
    /// The user's own objects: one per content, in the index's order.
    Assembled { pins: Vec<Pin> },
}

/// The recipe of a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    pub pack: PackId,
    pub len: u64,
    /// Length of the encoded index, and of the outboard (0: there is none).
    pub index_len: u64,
    pub outboard_len: u64,
    pub source: Source,
}

/// The chaining values of every content of a pack above 256 KiB, addressable by content position.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PackOutboard {
    /// (position in `PackIndex::contents`, values), ascending.
    pub contents: Vec<(u32, Outboard)>,
}

/// What an imported pack's contents turned out to be, fixed by exclusive create when first read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    pub pack: PackId,
    /// One for each content; None where the source object is gone or was overwritten.
    pub digests: Vec<Option<ContentDigest>>,
}

/// Rounds up to the next multiple of [`ALIGN`]; None above 64 bits.
pub fn align_up(len: u64) -> Option<u64> {
    len.checked_next_multiple_of(ALIGN)
}

impl Place {
    /// Gives the offset of the first stored byte.
    pub fn start(&self) -> u64 {
        match self {
            Self::Run { offset } => *offset,
            Self::Sparse { extents } => extents.first().map_or(0, |extent| extent.offset),
        }
    }
}

impl PackedContent {
    /// Gives the offset behind the last stored byte.
    pub fn end(&self) -> u64 {
        match &self.place {
            Place::Run { offset } => offset.saturating_add(self.size),
            Place::Sparse { extents } => extents.last().map_or(0, |extent| extent.offset.saturating_add(extent.len)),
        }
    }

    /// Counts the bytes from the first stored one to the last, padding between extents included.
    pub fn stored_len(&self) -> u64 {
        self.end().saturating_sub(self.place.start())
    }

    /// Gives the stored extents: a run is one that covers the whole content.
    pub fn extents(&self) -> std::borrow::Cow<'_, [Extent]> {
        match &self.place {
            Place::Run { offset } => vec![Extent { logical: 0, offset: *offset, len: self.size }].into(),
            Place::Sparse { extents } => extents.as_slice().into(),
        }
    }
}

#[cfg(test)]
mod tests;
