//! A byte-bounded LRU of decoded blocks.
//!
//! The cost of a block is what its decoded form takes in memory, computed from the block itself:
//! a decoded entry is several times its encoding, so bounding the encoded bytes would not bound
//! the memory.

use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use crate::format::placement::PlacedBlock;
use crate::format::tree::Block;
use crate::format::tree::nav::Need;

/// What a block costs besides its own heap: its node in the map, the `Arc`, about.
const NODE_BYTES: u64 = 160;

/// A decoded block of either structure.
#[derive(Debug, Clone)]
pub(super) enum Held {
    Tree(Arc<Block>),
    Placed(Arc<PlacedBlock>),
}

impl Held {
    /// Computes what the block takes in memory.
    fn cost_bytes(&self) -> u64 {
        let heap = match self {
            Self::Tree(block) => block.heap_bytes(),
            Self::Placed(block) => block.heap_bytes(),
        };
        heap as u64 + NODE_BYTES
    }
}

/// The cache itself. A block larger than the whole bound is not kept.
#[derive(Debug)]
pub(super) struct BlockCache {
    inner: Mutex<Inner>,
    bytes_max: u64,
}

#[derive(Debug)]
struct Inner {
    blocks: LruCache<Need, (Held, u64)>,
    bytes: u64,
}

impl BlockCache {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { inner: Mutex::new(Inner { blocks: LruCache::unbounded(), bytes: 0 }), bytes_max }
    }

    pub(super) fn get(&self, need: &Need) -> Option<Held> {
        self.inner.lock().blocks.get(need).map(|(held, _)| held.clone())
    }

    pub(super) fn insert(&self, need: Need, held: Held) {
        let cost = held.cost_bytes();
        if cost > self.bytes_max {
            return;
        }
        // What is pushed out is dropped after the lock is given back: dropping frees many names.
        let mut dropped = Vec::new();
        let mut inner = self.inner.lock();
        if let Some(old) = inner.blocks.put(need, (held, cost)) {
            inner.bytes -= old.1;
            dropped.push(old);
        }
        inner.bytes += cost;
        while inner.bytes > self.bytes_max {
            let Some((_, old)) = inner.blocks.pop_lru() else {
                break;
            };
            inner.bytes -= old.1;
            dropped.push(old);
        }
        drop(inner);
    }

    pub(super) fn bytes(&self) -> u64 {
        self.inner.lock().bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::BlockId;

    fn need(n: u8) -> Need {
        Need::Placed(BlockId([n; 32]))
    }

    fn block(children: usize) -> Held {
        Held::Placed(Arc::new(PlacedBlock::Index(vec![BlockId([0; 32]); children])))
    }

    #[test]
    fn blocks_beyond_the_bound_push_out_the_least_recently_used() {
        let cache = BlockCache::new(3 * (1000 * 32 + 200));
        for n in 0..3 {
            cache.insert(need(n), block(1000));
        }
        assert!(cache.get(&need(0)).is_some());
        cache.insert(need(3), block(1000));
        assert!(cache.get(&need(1)).is_none(), "1 was used before all others");
        assert!(cache.get(&need(0)).is_some() && cache.get(&need(2)).is_some() && cache.get(&need(3)).is_some());
        assert!(cache.bytes() <= 3 * (1000 * 32 + 200));
    }

    #[test]
    fn a_block_put_twice_counts_once() {
        let cache = BlockCache::new(1 << 20);
        cache.insert(need(1), block(10));
        let once = cache.bytes();
        cache.insert(need(1), block(10));
        assert_eq!(cache.bytes(), once);
    }

    #[test]
    fn a_block_larger_than_the_bound_is_not_kept() {
        let cache = BlockCache::new(1000);
        cache.insert(need(1), block(1000));
        assert_eq!(cache.bytes(), 0);
    }
}
