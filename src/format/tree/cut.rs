//! Where the run of entries, and the runs of children above it, are cut.
//!
//! A cut follows an entry whose hash is below a bound, once a minimum is reached, and comes by
//! force at a maximum. The hash takes in the name of the entry, the name of its directory, and its
//! content: with the name alone, a dataset of directories that all hold `image.png` and
//! `label.txt` would have no natural cut at all, and one new file would move every forced one.
//! The whole path is left out on purpose: a renamed directory keeps the segments below it.
//!
//! These numbers and the hash are part of the format: other ones give other tree ids.

use crate::format::ids::{BlockId, ContentId};

use super::entry::{Entry, EntryKind};

/// Entries of a segment: at least (but for the last one), on average, at most.
pub const ENTRIES_MIN: usize = 256;
pub const ENTRIES_MEAN: usize = 1024;
pub const ENTRIES_CUT: usize = 4096;
/// Children of an index block: at least (but for the last one), on average, at most.
pub const CHILDREN_MIN: usize = 64;
pub const CHILDREN_MEAN: usize = 256;
pub const CHILDREN_CUT: usize = 1024;
/// A block is cut when its entries or children take this many bytes. One more of the largest
/// possible entry (33 KiB) stays below the limit that readers keep (256 KiB).
pub const BODY_CUT: usize = 192 << 10;

const _: () = assert!(BODY_CUT + (36 << 10) < super::segment::BLOCK_LEN_MAX);

/// The numbers above as one value, so that tests can build deep indexes of small trees.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cuts {
    pub(super) entries: Bounds,
    pub(super) children: Bounds,
}

/// Minimum, mean and maximum of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) min: usize,
    pub(super) mean: usize,
    pub(super) max: usize,
}

impl Cuts {
    /// What the format says.
    pub(super) const FORMAT: Self = Self {
        entries: Bounds { min: ENTRIES_MIN, mean: ENTRIES_MEAN, max: ENTRIES_CUT },
        children: Bounds { min: CHILDREN_MIN, mean: CHILDREN_MEAN, max: CHILDREN_CUT },
    };

    /// Says whether a segment ends behind `entry`, with which it has `count` entries in `len` bytes.
    pub(super) fn ends_segment(&self, dir_name: &[u8], entry: &Entry, count: usize, len: usize) -> bool {
        self.entries.ends(count, len, || entry_hash(dir_name, entry))
    }

    /// Says whether an index block ends behind `child`, with which it has `count` children in `len`
    /// bytes.
    pub(super) fn ends_index(&self, child: &BlockId, count: usize, len: usize) -> bool {
        self.children.ends(count, len, || first_word(child.as_bytes()))
    }
}

impl Bounds {
    /// Behind the minimum one hash in `mean - min` ends the run.
    fn ends(&self, count: usize, len: usize, hash: impl FnOnce() -> u64) -> bool {
        let bound = u64::MAX / (self.mean - self.min) as u64;
        count >= self.max || len >= BODY_CUT || (count >= self.min && hash() < bound)
    }
}

/// Hashes what decides on a cut: FNV-1a over the directory's name, `/` and the entry's name, mixed
/// with the first eight bytes of a file's content id.
fn entry_hash(dir_name: &[u8], entry: &Entry) -> u64 {
    let bytes = dir_name.iter().chain(b"/").chain(entry.name.iter());
    let named = bytes
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let content = match &entry.kind {
        EntryKind::File { content: ContentId::Digest(digest), .. } => first_word(digest.as_bytes()),
        EntryKind::File { content: ContentId::Pin(pin), .. } => first_word(pin.as_bytes()),
        EntryKind::Dir { .. } | EntryKind::Symlink { .. } | EntryKind::HardLink { .. } => 0,
    };
    mix(named ^ content)
}

/// Spreads every bit over all others (the finish of splitmix64).
fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

fn first_word(id: &[u8; 32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *id;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
