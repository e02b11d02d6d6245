//! Content digests, and the chaining values that let one block of a large file be checked alone.
//!
//! A content's digest is plain BLAKE3 of its logical bytes. For a content above [`BLOCK_LEN`] the
//! pack's outboard (sidecar) holds the BLAKE3 chaining values of its subtrees at two levels:
//! [`BLOCK_LEN`] and [`GROUP_LEN`]. Group values merge to the digest; block values of one group
//! merge to the group's value. So a read authenticates `size / 64 MiB` + at most 256 values, and
//! then only the blocks it touches.

use crate::format::ids::ContentDigest;

/// What a read verifies at least: 256 KiB.
pub const BLOCK_LEN: u64 = 256 << 10;
/// What one group of chaining values covers: 64 MiB.
pub const GROUP_LEN: u64 = 64 << 20;

/// A chaining value: of a whole content (root) or of a subtree (non-root).
pub type ChainingValue = [u8; 32];

/// The chaining values of one content above [`BLOCK_LEN`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outboard {
    pub size: u64,
    /// One for each block, in order.
    pub blocks: Vec<ChainingValue>,
    /// One for each group, in order; empty where the content is one group.
    pub groups: Vec<ChainingValue>,
}

/// Digests a content given in order; collects chaining values where it grows above [`BLOCK_LEN`].
#[derive(Debug)]
pub struct ContentHasher {
    _private: (),
}

impl Default for ContentHasher {
    fn default() -> Self {
        Self::new()
    }
}

impl ContentHasher {
    pub fn new() -> Self {
        todo!()
    }
    pub fn update(&mut self, _bytes: &[u8]) {
        todo!()
    }
    /// A run of zeros (a hole), without having them at hand.
    pub fn update_zeros(&mut self, _len: u64) {
        todo!()
    }
    pub fn finish(self) -> (ContentDigest, Option<Outboard>) {
        todo!()
    }
}

/// Digests a content that lies in memory as a whole.
pub fn digest(_bytes: &[u8]) -> ContentDigest {
    todo!()
}

/// Computes the chaining value of block `index` of a content of more than one block.
pub fn block_cv(_index: u64, _bytes: &[u8]) -> ChainingValue {
    todo!()
}

impl Outboard {
    /// Checks that all values merge to the digest.
    pub fn verify(&self, _digest: &ContentDigest) -> bool {
        todo!()
    }
    /// Checks group values alone against the digest (they were read by range).
    pub fn verify_groups(_size: u64, _groups: &[ChainingValue], _digest: &ContentDigest) -> bool {
        todo!()
    }
    /// Checks the block values of group `group` alone against the group's value; where the content
    /// is one group, against the digest.
    pub fn verify_blocks(_size: u64, _group: u64, _blocks: &[ChainingValue], _expected: &ChainingValue) -> bool {
        todo!()
    }
}
