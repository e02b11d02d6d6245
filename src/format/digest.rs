//! Content digests, and the chaining values that let one block of a large file be checked alone.
//!
//! A content's digest is plain BLAKE3 of its logical bytes. For a content above [`BLOCK_LEN`] the
//! pack's outboard (sidecar) holds the BLAKE3 chaining values of its subtrees at two levels:
//! [`BLOCK_LEN`] and [`GROUP_LEN`]. Group values merge to the digest; block values of one group
//! merge to the group's value. So a read authenticates `size / 64 MiB` + at most 256 values, and
//! then only the blocks it touches.
//!
//! Blocks and groups are whole subtrees of BLAKE3's own tree (both lengths are powers of two above
//! its chunk), so nothing here invents a hash: merging the values gives the digest that any BLAKE3
//! tool prints.

use blake3::Hasher;
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::format::ids::ContentDigest;

/// What a read verifies at least: 256 KiB.
pub const BLOCK_LEN: u64 = 256 << 10;
/// What one group of chaining values covers: 64 MiB.
pub const GROUP_LEN: u64 = 64 << 20;
/// Blocks of a full group.
pub const GROUP_BLOCKS: u64 = GROUP_LEN / BLOCK_LEN;

// Both must be complete subtrees: a power of two of chunks.
const _: () = assert!(BLOCK_LEN.is_power_of_two() && GROUP_LEN.is_power_of_two() && GROUP_LEN > BLOCK_LEN);
const _: () = assert!(BLOCK_LEN > blake3::CHUNK_LEN as u64);

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

/// Counts the blocks of a content of `size` bytes.
pub fn block_count(size: u64) -> u64 {
    size.div_ceil(BLOCK_LEN)
}

/// Counts the groups of a content of `size` bytes.
pub fn group_count(size: u64) -> u64 {
    size.div_ceil(GROUP_LEN)
}

/// Counts the group values that an outboard holds: none where the content is one group.
pub fn group_values(size: u64) -> u64 {
    match group_count(size) {
        0 | 1 => 0,
        groups => groups,
    }
}

/// Counts the blocks of group `group` of a content of `size` bytes (0 behind its end).
pub fn blocks_of_group(size: u64, group: u64) -> u64 {
    block_count(size).saturating_sub(group.saturating_mul(GROUP_BLOCKS)).min(GROUP_BLOCKS)
}

/// Digests a content given in order; collects chaining values where it grows above [`BLOCK_LEN`].
///
/// Holds 32 bytes for each 256 KiB that it was given, and one BLAKE3 state.
#[derive(Debug)]
pub struct ContentHasher {
    /// Of the open block; its input offset is set when it is made.
    hasher: Hasher,
    /// Bytes in the open block.
    open_len: u64,
    /// Values of the blocks before it.
    blocks: Vec<ChainingValue>,
}

impl Default for ContentHasher {
    fn default() -> Self {
        Self::new()
    }
}

impl ContentHasher {
    pub fn new() -> Self {
        Self { hasher: Hasher::new(), open_len: 0, blocks: Vec::new() }
    }

    /// Takes the next bytes of the content.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.open_len == BLOCK_LEN {
                self.next_block();
            }
            let room = usize::try_from(BLOCK_LEN - self.open_len).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            self.hasher.update(now);
            self.open_len += now.len() as u64;
            bytes = rest;
        }
    }

    /// Takes a run of zeros (a hole), without having them at hand.
    pub fn update_zeros(&mut self, mut len: u64) {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        while len > 0 {
            let now = usize::try_from(len).unwrap_or(usize::MAX).min(ZEROS.len());
            self.update(ZEROS.get(..now).unwrap_or(&ZEROS));
            len -= now as u64;
        }
    }

    /// Counts the bytes taken so far.
    pub fn len(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK_LEN + self.open_len
    }

    /// Says whether nothing was taken yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives the digest, and the chaining values where the content is above [`BLOCK_LEN`].
    pub fn finish(mut self) -> (ContentDigest, Option<Outboard>) {
        let size = self.len();
        if self.blocks.is_empty() {
            return (ContentDigest(*self.hasher.finalize().as_bytes()), None);
        }
        self.blocks.push(self.hasher.finalize_non_root());
        let (digest, outboard) = Outboard::of_blocks(size, self.blocks).expect("one value for each block was pushed");
        (digest, Some(outboard))
    }

    fn next_block(&mut self) {
        self.blocks.push(self.hasher.finalize_non_root());
        self.hasher = Hasher::new(); // reset() would keep the offset
        self.hasher.set_input_offset(self.blocks.len() as u64 * BLOCK_LEN);
        self.open_len = 0;
    }
}

/// Digests a content that lies in memory as a whole.
pub fn digest(bytes: &[u8]) -> ContentDigest {
    ContentDigest(*blake3::hash(bytes).as_bytes())
}

/// Computes the chaining value of block `index` of a content of more than one block.
///
/// `bytes` are the block's: [`BLOCK_LEN`] of them, fewer (but some) in the last one. Bytes that no
/// block can be (none, too many, an index beyond 64 bits) give a value that no block has.
pub fn block_cv(index: u64, bytes: &[u8]) -> ChainingValue {
    let offset = index.checked_mul(BLOCK_LEN);
    match offset {
        Some(offset) if !bytes.is_empty() && bytes.len() as u64 <= BLOCK_LEN => {
            let mut hasher = Hasher::new();
            hasher.set_input_offset(offset);
            hasher.update(bytes);
            hasher.finalize_non_root()
        }
        _ => [0; 32],
    }
}

impl Outboard {
    /// Makes the outboard of a content from the values of its blocks (which may have been computed
    /// in parallel, by [`block_cv`]), and its digest. None where the number of values is not that
    /// of a content of `size` bytes, or the content has one block only.
    pub fn of_blocks(size: u64, blocks: Vec<ChainingValue>) -> Option<(ContentDigest, Self)> {
        if size <= BLOCK_LEN || blocks.len() as u64 != block_count(size) {
            return None;
        }
        if group_values(size) == 0 {
            let digest = merge_root(&blocks)?;
            return Some((digest, Self { size, blocks, groups: Vec::new() }));
        }
        let groups: Option<Vec<_>> = blocks.chunks(GROUP_BLOCKS as usize).map(merge_inner).collect();
        let groups = groups?;
        let digest = merge_root(&groups)?;
        Some((digest, Self { size, blocks, groups }))
    }

    /// Checks that all values merge to the digest.
    pub fn verify(&self, digest: &ContentDigest) -> bool {
        if self.groups.is_empty() {
            return Self::verify_blocks(self.size, 0, &self.blocks, digest.as_bytes());
        }
        Self::verify_groups(self.size, &self.groups, digest)
            && self.blocks.len() as u64 == block_count(self.size)
            && self
                .blocks
                .chunks(GROUP_BLOCKS as usize)
                .zip(&self.groups)
                .all(|(blocks, group)| merge_inner(blocks).as_ref() == Some(group))
    }

    /// Checks group values alone against the digest (they were read by range).
    pub fn verify_groups(size: u64, groups: &[ChainingValue], digest: &ContentDigest) -> bool {
        group_values(size) > 0
            && groups.len() as u64 == group_values(size)
            && merge_root(groups).as_ref() == Some(digest)
    }

    /// Checks the block values of group `group` alone against the group's value; where the content
    /// is one group, against the digest.
    pub fn verify_blocks(size: u64, group: u64, blocks: &[ChainingValue], expected: &ChainingValue) -> bool {
        if size <= BLOCK_LEN || blocks.is_empty() || blocks.len() as u64 != blocks_of_group(size, group) {
            return false;
        }
        match group_values(size) {
            0 => merge_root(blocks).is_some_and(|digest| digest.as_bytes() == expected),
            _ => merge_inner(blocks).as_ref() == Some(expected),
        }
    }
}

/// Merges the values of neighbouring subtrees to the value of the subtree that they make: the left
/// half is the largest power of two below their number, as in BLAKE3 itself.
fn merge_inner(values: &[ChainingValue]) -> Option<ChainingValue> {
    match values {
        [] => None,
        [one] => Some(*one),
        more => {
            let (left, right) = more.split_at(left_len(more.len()));
            Some(merge_subtrees_non_root(&merge_inner(left)?, &merge_inner(right)?, Mode::Hash))
        }
    }
}

/// Merges all values of a content, two at least, to its digest.
fn merge_root(values: &[ChainingValue]) -> Option<ContentDigest> {
    if values.len() < 2 {
        return None;
    }
    let (left, right) = values.split_at(left_len(values.len()));
    let hash = merge_subtrees_root(&merge_inner(left)?, &merge_inner(right)?, Mode::Hash);
    Some(ContentDigest(*hash.as_bytes()))
}

/// Gives the largest power of two below `len`, which is two at least.
fn left_len(len: usize) -> usize {
    len.div_ceil(2).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(len: u64) -> Vec<u8> {
        (0..len).map(|i| (i % 251) as u8).collect()
    }

    fn hash_in_steps(bytes: &[u8], step: usize) -> (ContentDigest, Option<Outboard>) {
        let mut hasher = ContentHasher::new();
        bytes.chunks(step).for_each(|part| hasher.update(part));
        hasher.finish()
    }

    #[test]
    fn the_digest_is_plain_blake3_whatever_the_length_and_the_steps() {
        for len in
            [0, 1, 1024, BLOCK_LEN - 1, BLOCK_LEN, BLOCK_LEN + 1, 2 * BLOCK_LEN, 3 * BLOCK_LEN + 7, 9 * BLOCK_LEN]
        {
            let bytes = bytes(len);
            for step in [1 << 20, 100_003, BLOCK_LEN as usize] {
                let (found, outboard) = hash_in_steps(&bytes, step);
                assert_eq!(found, digest(&bytes), "{len} in steps of {step}");
                assert_eq!(outboard.is_some(), len > BLOCK_LEN);
                if let Some(outboard) = outboard {
                    assert!(outboard.verify(&found));
                    let blocks: Vec<_> =
                        bytes.chunks(BLOCK_LEN as usize).enumerate().map(|(i, b)| block_cv(i as u64, b)).collect();
                    assert_eq!(outboard.blocks, blocks);
                }
            }
        }
    }

    #[test]
    fn groups_of_a_sparse_content_verify_alone_and_a_changed_value_does_not() {
        let size = 2 * GROUP_LEN + 5 * BLOCK_LEN + 3;
        let mut hasher = ContentHasher::new();
        hasher.update(b"start");
        hasher.update_zeros(size - 5 - 3);
        hasher.update(b"end");
        let (found, outboard) = hasher.finish();
        let outboard = outboard.expect("it is large");
        let mut plain = vec![0; size as usize];
        plain[..5].copy_from_slice(b"start");
        plain[size as usize - 3..].copy_from_slice(b"end");
        assert_eq!(found, digest(&plain));
        assert!(outboard.verify(&found));
        assert_eq!(outboard.groups.len(), 3);
        assert!(Outboard::verify_groups(size, &outboard.groups, &found));
        let per_group: Vec<_> = outboard.blocks.chunks(GROUP_BLOCKS as usize).collect();
        for (group, blocks) in per_group.iter().enumerate() {
            assert!(Outboard::verify_blocks(size, group as u64, blocks, &outboard.groups[group]));
            assert!(!Outboard::verify_blocks(size, group as u64, blocks, &outboard.groups[(group + 1) % 3]));
        }
        let mut changed = outboard.clone();
        changed.blocks[300][7] ^= 1;
        assert!(!changed.verify(&found));
        let mut changed = outboard;
        changed.groups[1][7] ^= 1;
        assert!(!changed.verify(&found));
    }

    #[test]
    fn values_that_are_not_those_of_the_size_are_refused() {
        let (found, outboard) = hash_in_steps(&bytes(3 * BLOCK_LEN), 1 << 20);
        let outboard = outboard.expect("it is large");
        assert!(Outboard::verify_blocks(outboard.size, 0, &outboard.blocks, found.as_bytes()));
        assert!(!Outboard::verify_blocks(outboard.size, 1, &outboard.blocks, found.as_bytes()));
        assert!(!Outboard::verify_blocks(outboard.size + BLOCK_LEN, 0, &outboard.blocks, found.as_bytes()));
        assert!(!Outboard::verify_blocks(u64::MAX, u64::MAX, &[], found.as_bytes()));
        assert!(!Outboard::verify_groups(outboard.size, &[], &found));
        assert!(Outboard::of_blocks(u64::MAX, Vec::new()).is_none());
        assert_eq!(block_cv(u64::MAX, b"x"), [0; 32]);
    }
}
