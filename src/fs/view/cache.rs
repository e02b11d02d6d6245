//! A small map that forgets what was not used for longest, cut into shards so that workers do not
//! wait for each other.

use std::hash::{BuildHasher, Hash, RandomState};
use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;

/// A power of two, several times the number of workers.
const SHARDS: usize = 16;

/// The map. Values are cloned out, so they should be small or counted.
#[derive(Debug)]
pub(super) struct Recent<K: Hash + Eq, V> {
    shards: Vec<Mutex<LruCache<K, V>>>,
    hasher: RandomState,
}

impl<K: Hash + Eq, V: Clone> Recent<K, V> {
    /// Keeps about `entries_max`.
    pub fn new(entries_max: usize) -> Self {
        let each = NonZeroUsize::new(entries_max / SHARDS).unwrap_or(NonZeroUsize::MIN);
        let shards = (0..SHARDS).map(|_| Mutex::new(LruCache::new(each))).collect();
        Self { shards, hasher: RandomState::new() }
    }

    fn shard(&self, key: &K) -> &Mutex<LruCache<K, V>> {
        let at = self.hasher.hash_one(key) as usize % SHARDS;
        self.shards.get(at).expect("a remainder by SHARDS is one of SHARDS")
    }

    pub fn get(&self, key: &K) -> Option<V> {
        self.shard(key).lock().get(key).cloned()
    }

    pub fn put(&self, key: K, value: V) {
        self.shard(&key).lock().put(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_gives_what_was_put_and_stays_within_its_bound() {
        let recent = Recent::new(64);
        for key in 0..10_000 {
            recent.put(key, key + 1);
            assert_eq!(recent.get(&key), Some(key + 1));
        }
        let left = (0..10_000).filter(|key| recent.get(key).is_some()).count();
        assert!(left <= 64, "{left} are left");
        assert!(left >= 32, "{left} are left");
    }
}
