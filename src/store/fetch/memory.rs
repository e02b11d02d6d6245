//! Verified buffers in memory: least recently used go first, bounded by bytes.
//!
//! A unit is what is verified alone: a content up to 256 KiB, or one 256 KiB block of a larger one.
//! Every buffer owns exactly its bytes: a slice of a larger body would keep all of it alive and make
//! the bound a lie.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

use crate::format::ids::ContentId;

/// Names a unit: the block's number is 0 for a content of one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct UnitKey {
    pub content: ContentId,
    pub block: u64,
}

/// A shard below this would hold too few blocks to be of use.
const SHARD_BYTES_MIN: u64 = 4 << 20;
const SHARDS_MAX: u64 = 16;
/// What an entry costs beside its bytes, about.
const ENTRY_OVERHEAD_BYTES: u64 = 160;

#[derive(Debug)]
struct Shard {
    units: LruCache<UnitKey, Bytes>,
    bytes: u64,
}

/// The buffers.
#[derive(Debug)]
pub(super) struct Memory {
    shards: Vec<Mutex<Shard>>,
    shard_bytes_max: u64,
    hasher: RandomState,
    bytes: AtomicU64,
}

impl Memory {
    pub(super) fn new(bytes_max: u64) -> Self {
        let count = (bytes_max / SHARD_BYTES_MIN).clamp(1, SHARDS_MAX);
        let shards = (0..count).map(|_| Mutex::new(Shard { units: LruCache::unbounded(), bytes: 0 })).collect();
        Self { shards, shard_bytes_max: bytes_max / count, hasher: RandomState::new(), bytes: AtomicU64::new(0) }
    }

    fn shard(&self, key: &UnitKey) -> &Mutex<Shard> {
        let slot = self.hasher.hash_one(key) % self.shards.len() as u64;
        self.shards.get(slot as usize).expect("a remainder is below its divisor")
    }

    pub(super) fn get(&self, key: &UnitKey) -> Option<Bytes> {
        self.shard(key).lock().units.get(key).cloned()
    }

    /// Keeps a verified unit. The buffer must own exactly its bytes.
    pub(super) fn put(&self, key: UnitKey, unit: Bytes) {
        let cost = unit.len() as u64 + ENTRY_OVERHEAD_BYTES;
        if cost > self.shard_bytes_max {
            return;
        }
        let mut dropped = Vec::new();
        let mut shard = self.shard(&key).lock();
        let before = shard.bytes;
        if let Some(old) = shard.units.put(key, unit) {
            shard.bytes -= old.len() as u64 + ENTRY_OVERHEAD_BYTES;
        }
        shard.bytes += cost;
        while shard.bytes > self.shard_bytes_max {
            let Some((_, old)) = shard.units.pop_lru() else {
                break;
            };
            shard.bytes -= old.len() as u64 + ENTRY_OVERHEAD_BYTES;
            dropped.push(old);
        }
        let after = shard.bytes;
        // Wraps where it shrinks; the sum over all is right.
        self.bytes.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
        drop(shard);
        drop(dropped);
    }

    /// Bytes held now, bookkeeping included.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::ContentDigest;

    fn key(n: u64) -> UnitKey {
        UnitKey { content: ContentId::Digest(ContentDigest([7; 32])), block: n }
    }

    #[test]
    fn the_bound_holds_and_the_least_recently_used_go_first() {
        let memory = Memory::new(10_000);
        for n in 0..20 {
            memory.put(key(n), Bytes::from(vec![n as u8; 1000]));
            memory.get(&key(0));
            assert!(memory.bytes() <= 10_000, "{}", memory.bytes());
        }
        assert!(memory.get(&key(0)).is_some(), "used all the time");
        assert!(memory.get(&key(19)).is_some(), "the newest");
        assert!(memory.get(&key(1)).is_none(), "long unused");
    }

    #[test]
    fn putting_a_unit_again_does_not_count_twice() {
        let memory = Memory::new(10_000);
        for _ in 0..50 {
            memory.put(key(1), Bytes::from(vec![1; 5000]));
        }
        assert_eq!(memory.bytes(), 5000 + ENTRY_OVERHEAD_BYTES);
    }

    #[test]
    fn what_is_larger_than_all_memory_is_not_kept() {
        let memory = Memory::new(1000);
        memory.put(key(1), Bytes::from(vec![1; 5000]));
        assert_eq!(memory.bytes(), 0);
        assert!(memory.get(&key(1)).is_none());
    }
}
