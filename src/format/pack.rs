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

use crate::format::codec::DecodeError;
use crate::format::digest::Outboard;
use crate::format::ids::{ContentDigest, ContentId, PackId};
use crate::format::placement::Extent;
use crate::format::tree::Pin;

/// What files start on inside a pack.
pub const ALIGN: u64 = 4096;
/// A pack is cut once it holds this much, at least.
pub const PACK_LEN_MIN: u64 = 256 << 20;
/// A file above this (at least) is a pack of its own.
pub const WHOLE_LEN_MIN: u64 = 64 << 20;

/// Sizes that grow with the dataset so that a placement has at most about 2,000 packs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// A pack is closed when it holds at least this.
    pub pack_len: u64,
    /// A file above this is a pack of its own, with its exact length.
    pub whole_len: u64,
}

impl Layout {
    /// Chooses by the bytes of the whole tree.
    pub fn for_bytes(_total: u64) -> Self {
        todo!()
    }
}

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
    /// By offset of their first stored byte, not overlapping, no content twice.
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

/// Lays contents out in order: closes a pack when it is full, gives large ones a pack of their own.
/// Returns, for each content pushed, nothing yet; a pack's places are known when it is closed.
#[derive(Debug)]
pub struct PackPlanner {
    _private: (),
}

/// A piece that a fetch can verify by itself: whole contents, or whole blocks of a large one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Range of the pack.
    pub offset: u64,
    pub len: u64,
    /// Positions of the contents in `PackIndex::contents` that lie in it: `[first, last]`. For a piece of
    /// a large content `first == last` and `logical` is where it starts in the content.
    pub first: u32,
    pub last: u32,
    pub logical: u64,
}

impl PackIndex {
    pub fn id(&self) -> PackId {
        todo!()
    }
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }
    pub fn decode(_bytes: &[u8]) -> Result<Self, DecodeError> {
        todo!()
    }
    /// Cuts the pack into pieces of about `target` bytes (a multiple of 256 KiB), each verifiable alone.
    /// Sparse contents above one block are cut at block boundaries of their logical bytes.
    pub fn pieces(&self, _target: u64) -> Vec<Piece> {
        todo!()
    }
    /// Finds the content that holds the byte at `offset`, if any (padding has none).
    pub fn content_at(&self, _offset: u64) -> Option<usize> {
        todo!()
    }
}

impl Recipe {
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }
    pub fn decode(_bytes: &[u8]) -> Result<Self, DecodeError> {
        todo!()
    }
}

impl PackOutboard {
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }
    pub fn decode(_bytes: &[u8]) -> Result<Self, DecodeError> {
        todo!()
    }
}

impl Proof {
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }
    pub fn decode(_bytes: &[u8]) -> Result<Self, DecodeError> {
        todo!()
    }
}
