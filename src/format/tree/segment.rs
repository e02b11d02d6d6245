//! Segments and index blocks: how entries are cut, encoded and counted.
//!
//! Both are content-addressed blocks (`nodes/ab/<id>` in the lake). Cuts depend on contents alone
//! (a hash of the name, resp. of the child's id, between a minimum and a maximum), so equal runs of
//! entries give equal blocks whatever happened before.

use crate::format::codec::DecodeError;
use crate::format::ids::{BlockId, TreeId};

use super::entry::{Entry, Mtime};

/// A run of entries in tree order, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub entries: Vec<Entry>,
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
    /// Entries of the root directory itself.
    pub children: u64,
    /// Counts of the whole tree (`entries` = all ranks).
    pub counts: Counts,
    /// The children of the top index block; level 0 where they are segments' refs directly
    /// (`level` is the level of the block that would hold them, so 1). Empty for an empty tree.
    pub top: IndexBlock,
}

impl TreeRoot {
    /// Computes the tree id: the digest of the encoding.
    pub fn id(&self) -> TreeId {
        todo!()
    }

    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }

    pub fn decode(_bytes: &[u8]) -> Result<Self, DecodeError> {
        todo!()
    }
}

impl Block {
    /// Computes the block id: the digest of the encoding.
    pub fn id_of(_encoded: &[u8]) -> BlockId {
        todo!()
    }

    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }

    /// Decodes and checks everything a block alone can show (names, order inside a directory is
    /// checked by the navigator, which knows where directories start).
    pub fn decode(_bytes: &[u8]) -> Result<Self, DecodeError> {
        todo!()
    }
}
