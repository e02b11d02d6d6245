//! How a file is cut into chunks: which are holes, which lie in the pack as they are, which have to be
//! copied to the file of tails.
//!
//! The kernel maps whole blocks. So a chunk can be taken from a pack where all its blocks follow each
//! other there, block for block; anything else (the end of a pack of exact length, the border of a
//! sparse extent) is copied.

use crate::format::placement::{Extent, Location};

use super::BLOCK;
use super::disk::INDEX_LEN;

/// Indexes of one file at most.
pub const CHUNKS_MAX: u64 = 8 << 20;
/// Bytes of one file that are copied at most: copies lie on the node's own disk.
pub const COPIED_MAX: u64 = 256 << 20;
/// Blocks of a chunk at most, as a power of two.
const BITS_MAX: u8 = 31;

/// What a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    Hole,
    /// Starts at this block of the pack.
    At(u64),
    Copy,
}

/// Bytes of a file that belong into the file of tails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// The file.
    pub rank: u64,
    /// Where in the file, and how many.
    pub logical: u64,
    pub len: u64,
    /// Where in the file of tails: at the start of a block.
    pub to: u64,
}

/// A file, cut.
#[derive(Debug)]
pub struct Map<'a> {
    size: u64,
    extents: std::borrow::Cow<'a, [Extent]>,
    pack_len: u64,
    bits: u8,
}

impl<'a> Map<'a> {
    /// Cuts a file of `size` bytes, above 0, in a pack of `pack_len` bytes. None: it takes more than
    /// [`CHUNKS_MAX`] chunks, or [`COPIED_MAX`] bytes to be copied.
    pub fn new(size: u64, location: &'a Location, pack_len: u64) -> Option<Self> {
        let extents = match location {
            Location::None => (&[]).into(),
            Location::Run { offset, .. } => vec![Extent { logical: 0, offset: *offset, len: size }].into(),
            Location::Sparse { extents, .. } => extents.as_slice().into(),
        };
        let mut map = Self { size, extents, pack_len, bits: 0 };
        map.bits = map.choose()?;
        Some(map)
    }

    /// Blocks of a chunk, as a power of two.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Counts the chunks.
    pub fn count(&self) -> u64 {
        self.size.div_ceil(self.chunk_len())
    }

    /// Gives the logical range of a chunk: start and length.
    pub fn range(&self, chunk: u64) -> (u64, u64) {
        let start = chunk.saturating_mul(self.chunk_len());
        (start, self.chunk_len().min(self.size.saturating_sub(start)))
    }

    /// Says what a chunk is.
    pub fn chunk(&self, chunk: u64) -> Chunk {
        let (start, len) = self.range(chunk);
        let end = start.saturating_add(len);
        let first = self.extents.partition_point(|e| e.logical.saturating_add(e.len) <= start);
        let Some(extent) = self.extents.get(first).filter(|e| e.logical < end) else {
            return Chunk::Hole;
        };
        match self.block_of(extent, start, end) {
            Some(block) => Chunk::At(block),
            None => Chunk::Copy,
        }
    }

    fn chunk_len(&self) -> u64 {
        BLOCK << self.bits
    }

    /// Gives the block at which a chunk lies in the pack, if it lies there as the kernel needs it.
    fn block_of(&self, extent: &Extent, start: u64, end: u64) -> Option<u64> {
        let skipped = start.checked_sub(extent.logical)?;
        let at = extent.offset.checked_add(skipped)?;
        let inside = end <= extent.logical.checked_add(extent.len)?;
        // Of the last block of a file the pack must have the zeros behind the end as well.
        let stored = at.checked_add(end.checked_sub(start)?.checked_next_multiple_of(BLOCK)?)?;
        (inside && at.is_multiple_of(BLOCK) && stored <= self.pack_len).then_some(at / BLOCK)
    }

    /// Chooses the size of chunks at which indexes and copies together take least.
    fn choose(&mut self) -> Option<u8> {
        let covers = (0..=BITS_MAX).find(|bits| BLOCK << bits >= self.size).unwrap_or(BITS_MAX);
        self.bits = covers;
        if self.count() == 1 && self.chunk(0) != Chunk::Copy {
            return Some(covers);
        }
        let mut best: Option<(u64, u8)> = None;
        for bits in 0..=covers {
            self.bits = bits;
            if self.count() > CHUNKS_MAX {
                continue;
            }
            let copied = self.copied_len();
            if copied > COPIED_MAX {
                continue;
            }
            let cost = self.count() * INDEX_LEN + copied;
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, bits));
            }
        }
        best.map(|(_, bits)| bits)
    }

    /// Counts the bytes of the chunks that have to be copied. Only those at an extent's start or end
    /// can be such.
    pub fn copied_len(&self) -> u64 {
        let mut last = None;
        let mut sum = 0_u64;
        for extent in self.extents.iter() {
            let end = extent.logical.saturating_add(extent.len).min(self.size).saturating_sub(1);
            for chunk in [extent.logical / self.chunk_len(), end / self.chunk_len()] {
                if last.is_none_or(|last| chunk > last) {
                    last = Some(chunk);
                    if self.chunk(chunk) == Chunk::Copy {
                        sum = sum.saturating_add(self.range(chunk).1.next_multiple_of(BLOCK));
                    }
                }
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::ids::PackId;

    const PACK: PackId = PackId([1; 32]);

    fn run(offset: u64) -> Location {
        Location::Run { pack: PACK, offset }
    }

    fn chunks(map: &Map<'_>) -> Vec<Chunk> {
        (0..map.count()).map(|chunk| map.chunk(chunk)).collect()
    }

    #[test]
    fn a_file_among_others_is_one_chunk_whatever_its_size() {
        for size in [1, 4096, 4097, 10 << 30] {
            let location = run(8192);
            let map = Map::new(size, &location, 1 << 40).expect("is cut");
            assert_eq!(chunks(&map), [Chunk::At(2)], "{size}");
        }
        assert_eq!(Map::new(10 << 30, &run(0), 1 << 40).expect("is cut").bits(), 22);
    }

    #[test]
    fn the_end_of_a_pack_of_exact_length_is_copied_and_little_more() {
        for size in [1, 5000, (64 << 20) + 1, (1 << 30) + 4097, (10 << 30) - 1] {
            let location = run(0);
            let map = Map::new(size, &location, size).expect("is cut");
            let chunks = chunks(&map);
            let copied: Vec<usize> = (0..chunks.len()).filter(|i| chunks[*i] == Chunk::Copy).collect();
            assert_eq!(copied, [chunks.len() - 1], "{size}");
            assert!(map.count() * 8 + map.range(map.count() - 1).1 < size / 256 + 8192, "{size}");
        }
        let location = run(0);
        let whole = Map::new(1 << 30, &location, 1 << 30).expect("is cut");
        assert_eq!(chunks(&whole), [Chunk::At(0)], "nothing is left over");
    }

    #[test]
    fn files_of_holes_are_one_hole_and_the_largest_is_still_cut() {
        let map = Map::new(1 << 40, &Location::None, 0).expect("is cut");
        assert_eq!(chunks(&map), [Chunk::Hole]);
        let map = Map::new(i64::MAX as u64, &Location::None, 0).expect("is cut");
        assert_eq!((map.bits(), map.count()), (31, 1 << 20));
    }

    #[test]
    fn a_file_that_takes_too_many_indexes_is_refused() {
        // Every other block is data, at places that no larger chunk fits.
        let extents = (0..1024).map(|n| Extent { logical: n * 8192, offset: (n * 3 % 1024) * 4096, len: 4096 });
        let mut extents: Vec<Extent> = extents.collect();
        assert!(Map::new(8 << 20, &Location::Sparse { pack: PACK, extents: extents.clone() }, 4 << 20).is_some());
        // Copying is what makes it possible where indexes alone would not.
        extents.push(Extent { logical: 1 << 44, offset: 4 << 20, len: 1 });
        let location = Location::Sparse { pack: PACK, extents };
        let map = Map::new((1 << 44) + 1, &location, 1 << 30).expect("is cut");
        assert!(map.count() <= CHUNKS_MAX);
    }

    #[test]
    fn a_file_of_which_too_much_would_be_copied_is_refused() {
        // Every block is cut in two, so that none can be taken from the pack.
        let extents = |blocks: u64| -> Vec<Extent> {
            (0..2 * blocks).map(|n| Extent { logical: n * 2048, offset: n * 4096, len: 2048 }).collect()
        };
        for (blocks, fits) in [(COPIED_MAX / BLOCK, true), (COPIED_MAX / BLOCK + 1, false)] {
            let location = Location::Sparse { pack: PACK, extents: extents(blocks) };
            assert_eq!(Map::new(blocks * BLOCK, &location, 1 << 30).is_some(), fits, "{blocks}");
        }
    }

    /// Extents that a pack can have: in order, at places that follow each other.
    fn sparse() -> impl Strategy<Value = (u64, Vec<Extent>, u64)> {
        let piece = (0_u64..5, 0_u64..4096, 1_u64..20_000, any::<bool>());
        (proptest::collection::vec(piece, 1..6), 0_u64..30_000, any::<bool>()).prop_map(|(pieces, behind, padded)| {
            let (mut logical, mut offset, mut extents) = (0, 4096, Vec::new());
            for (blocks, odd, len, aligned) in pieces {
                logical += blocks * 4096 + if aligned { 0 } else { odd };
                if aligned {
                    logical = logical.next_multiple_of(4096);
                }
                extents.push(Extent { logical, offset, len });
                logical += len;
                offset = (offset + len).next_multiple_of(4096);
            }
            let last = extents.last().expect("one at least");
            let pack_len = if padded { offset } else { last.offset + last.len };
            (logical + behind, extents, pack_len)
        })
    }

    proptest! {
        /// Whatever the cut: put together again from chunks, the file is what its extents say.
        #[test]
        fn chunks_show_exactly_the_file((size, extents, pack_len) in sparse()) {
            let mut pack: Vec<u8> = vec![0; pack_len.next_multiple_of(4096) as usize];
            let mut file = vec![0_u8; size.next_multiple_of(4096) as usize];
            for extent in &extents {
                for i in 0..extent.len {
                    let byte = (extent.offset + i) as u8 | 1;
                    pack[(extent.offset + i) as usize] = byte;
                    file[(extent.logical + i) as usize] = byte;
                }
            }
            let location = Location::Sparse { pack: PACK, extents };
            for bits in 0..6 {
                let mut map = Map::new(size, &location, pack_len).expect("is cut");
                if bits > 0 {
                    map.bits = bits - 1;
                }
                let mut shown = Vec::new();
                for chunk in 0..map.count() {
                    let (start, len) = map.range(chunk);
                    let len = len.next_multiple_of(4096) as usize;
                    match map.chunk(chunk) {
                        Chunk::Hole => shown.extend(vec![0; len]),
                        Chunk::Copy => shown.extend(&file[start as usize..start as usize + len]),
                        Chunk::At(block) => {
                            let at = block as usize * 4096;
                            prop_assert!(at + len <= pack_len as usize, "the pack ends before");
                            shown.extend(&pack[at..at + len]);
                        }
                    }
                }
                prop_assert_eq!(&shown, &file);
            }
        }
    }
}
