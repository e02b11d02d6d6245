//! Immutable metadata: from memory, from the node's disk, or from the lake.
//!
//! * [`MetaStore`]: the one that everybody asks. A byte-bounded LRU of decoded blocks in front of
//!   a directory of files in front of the lake.
//! * [`cache`]: the LRU. * [`disk`]: the directory, its size limit and its sweep.
//! * [`snapshot`]: one commit, ready to be navigated.
//!
//! Invariants: what comes from disk or lake is checked against its id before anybody sees it, so a
//! damaged file is fetched again and a damaged lake is an error that names the object. One block is
//! fetched once however many ask. No lock is held across an await or I/O.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use futures::stream::{self, FuturesUnordered, StreamExt, TryStreamExt};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use crate::format::codec::DecodeError;
use crate::format::commit::Commit;
use crate::format::ids::{BlockId, CommitId, PackId, PlacementId, TreeId};
use crate::format::paths;
use crate::format::placement::{Location, PlacedBlock, PlacementRoot};
use crate::format::tree::nav::{Blocks, NavError, Need};
use crate::format::tree::{Block, TreeRoot};
use crate::store::lake::{self, Lake, LakeError};

mod cache;
mod disk;
mod snapshot;

use cache::{BlockCache, Held};
use disk::Disk;

pub use snapshot::Snapshot;

/// How many bytes of decoded blocks are kept in memory when nothing else is said.
pub const MEMORY_BYTES_MAX: u64 = 64 << 20;
/// How many bytes of blocks are kept on the node's disk when nothing else is said.
pub const DISK_BYTES_MAX: u64 = 8 << 30;
/// How many blocks a prefetch asks for at a time.
pub const PREFETCH_PARALLEL: usize = 32;
/// How many blocks are asked for ahead while the order of packs is looked up.
const ORDER_PARALLEL: usize = 8;
/// What no block exceeds; a lake that offers more is refused before it fills the memory.
const BLOCK_BYTES_MAX: u64 = 16 << 20;
/// What no commit or root exceeds.
const ROOT_BYTES_MAX: u64 = 64 << 20;

/// Why metadata is not to be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MetaError {
    /// The lake does not have it, or cannot be reached.
    #[error("cannot fetch {key}")]
    Lake {
        key: String,
        #[source]
        source: Arc<LakeError>,
    },
    /// The lake has other bytes under the key than its id says.
    #[error(
        "{key}: the object in the lake is damaged: its bytes are not those of its id; \
         restore it from a copy, or push the data again"
    )]
    Corrupt { key: String },
    /// The bytes are those of the id, but no correct writer makes them.
    #[error("{key} cannot be read")]
    Decode {
        key: String,
        #[source]
        source: DecodeError,
    },
    /// A tree and its placement do not belong together.
    #[error("{key}: the placement does not have the shape of its tree; push the data again to make another one")]
    Shape { key: String },
    /// Navigation ended otherwise than with a missing block.
    #[error(transparent)]
    Nav(NavError),
}

impl MetaError {
    /// Says whether trying again may help.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Lake { source, .. } if source.is_passing())
    }

    /// Says whether the lake does not have the object.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Lake { source, .. } if matches!(**source, LakeError::NotFound { .. }))
    }
}

/// Metadata by id. Cheap to clone.
#[derive(Debug, Clone)]
pub struct MetaStore {
    inner: Arc<Inner>,
}

type Flight = Arc<OnceCell<Result<Held, MetaError>>>;

#[derive(Debug)]
struct Inner {
    lake: Arc<dyn Lake>,
    disk: Disk,
    cache: BlockCache,
    /// Fetches that run now. Never locked across an await.
    flights: Mutex<HashMap<Need, Flight>>,
}

fn key_of(need: &Need) -> String {
    match need {
        Need::Tree(id) => paths::node_key(id),
        Need::Placed(id) => paths::placed_key(id),
    }
}

/// Checks bytes against the id and decodes them. None: they are not those of the id.
fn check_block(need: &Need, bytes: &[u8]) -> Option<Result<Held, DecodeError>> {
    match need {
        Need::Tree(id) => (Block::id_of(bytes) == *id).then(|| Ok(Held::Tree(Arc::new(Block::decode(bytes)?)))),
        Need::Placed(id) => {
            (PlacedBlock::id_of(bytes) == *id).then(|| Ok(Held::Placed(Arc::new(PlacedBlock::decode(bytes)?))))
        }
    }
}

impl MetaStore {
    /// Makes a store over `lake` with files below `dir` (`<state>/meta`), which need not exist yet.
    pub fn new(lake: Arc<dyn Lake>, dir: PathBuf, memory_bytes_max: u64) -> Self {
        let inner = Inner {
            lake,
            disk: Disk::new(dir),
            cache: BlockCache::new(memory_bytes_max),
            flights: Mutex::new(HashMap::new()),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Brings one block to memory and disk; at most one fetch of it runs at a time.
    pub async fn fetch(&self, need: Need) -> Result<(), MetaError> {
        self.held(need).await.map(|_| ())
    }

    /// Brings all blocks of a snapshot (tree and placement) to the node's disk, 32 at a time.
    /// Dropping the future cancels it. Gives how many blocks were fetched.
    pub async fn prefetch_tree(&self, snap: &Snapshot) -> Result<u64, MetaError> {
        let children: Vec<BlockId> = snap.root.top.children.iter().map(|child| child.id).collect();
        let mut todo = Vec::new();
        let shape = || MetaError::Shape { key: paths::placement_key(&snap.placement.tree, &snap.placement_id) };
        plan_children(&mut todo, snap.root.top.level, &children, &snap.placement.top).ok_or_else(shape)?;
        // Blocks are met more than once only in trees with equal parts; each is fetched once.
        let mut seen: HashSet<(BlockId, BlockId)> = HashSet::new();
        let mut running = FuturesUnordered::new();
        let mut fetched = 0;
        loop {
            while running.len() < PREFETCH_PARALLEL {
                let Some(pair) = todo.pop() else { break };
                if seen.insert((pair.tree, pair.placed)) {
                    running.push(self.prefetch_pair(pair));
                }
            }
            let Some(done) = running.next().await else {
                return Ok(fetched);
            };
            let (count, below) = done?;
            fetched += count;
            todo.extend(below);
        }
    }

    /// Gives the packs of a snapshot in the order in which its tree first refers to them: calls
    /// `learned` with those that are new, segment by segment, until it answers false or all are found.
    pub async fn packs_in_tree_order(
        &self,
        snap: &Snapshot,
        mut learned: impl FnMut(Vec<PackId>) -> bool,
    ) -> Result<(), MetaError> {
        let mut left: HashSet<PackId> = snap.placement.packs.iter().map(|used| used.pack).collect();
        let mut ids = snap.placement.top.clone();
        for _ in 1..snap.root.top.level {
            let blocks: Vec<PlacedBlock> =
                stream::iter(ids).map(|id| self.placed_once(id)).buffered(ORDER_PARALLEL).try_collect().await?;
            let children = blocks.into_iter().map(|block| match block {
                PlacedBlock::Index(children) => children,
                PlacedBlock::Segment(_) => Vec::new(),
            });
            ids = children.flatten().collect();
        }
        let mut segments = stream::iter(ids).map(|id| self.placed_once(id)).buffered(ORDER_PARALLEL);
        while !left.is_empty()
            && let Some(block) = segments.next().await
        {
            let PlacedBlock::Segment(locations) = block? else { continue };
            let packs = locations.iter().filter_map(Location::pack);
            let new: Vec<PackId> = packs.filter(|pack| left.remove(pack)).collect();
            if !new.is_empty() && !learned(new) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Gives a block of a placement without pushing anything out of memory.
    async fn placed_once(&self, id: BlockId) -> Result<PlacedBlock, MetaError> {
        let key = paths::placed_key(&id);
        let kept = self.inner.disk.read(&key).filter(|bytes| PlacedBlock::id_of(bytes) == id);
        let bytes = match kept {
            Some(bytes) => bytes.into(),
            None => {
                let bytes = self.get(&key, BLOCK_BYTES_MAX).await?;
                if PlacedBlock::id_of(&bytes) != id {
                    return Err(MetaError::Corrupt { key });
                }
                self.keep(&key, &bytes);
                bytes
            }
        };
        PlacedBlock::decode(&bytes).map_err(|source| MetaError::Decode { key, source })
    }

    /// Runs a navigation to its end: fetches what it needs, keeps that until it succeeds.
    pub async fn drive<T>(&self, mut f: impl FnMut(&dyn Blocks) -> Result<T, NavError>) -> Result<T, MetaError> {
        let mut pinned: HashMap<Need, Held> = HashMap::new();
        loop {
            let need = match f(&Pinned { store: self, pinned: &pinned }) {
                Ok(value) => return Ok(value),
                Err(NavError::Need(need)) if !pinned.contains_key(&need) => need,
                Err(error) => return Err(MetaError::Nav(error)),
            };
            let held = self.held(need).await?;
            pinned.insert(need, held);
        }
    }

    /// Runs a navigation over memory and the node's disk, never the network.
    pub fn try_now<T>(&self, f: impl FnOnce(&dyn Blocks) -> Result<T, NavError>) -> Result<T, NavError> {
        f(self)
    }

    /// Gives a commit by its id.
    pub async fn commit(&self, id: &CommitId) -> Result<Arc<Commit>, MetaError> {
        self.object(&paths::commit_key(id), |bytes| {
            (Commit::id_of(bytes) == *id).then(|| Commit::decode(bytes).map(Arc::new))
        })
        .await
    }

    /// Gives a tree's root by its id.
    pub async fn tree_root(&self, id: &TreeId) -> Result<Arc<TreeRoot>, MetaError> {
        self.object(&paths::tree_key(id), |bytes| match TreeRoot::decode(bytes) {
            Ok(root) => (root.id() == *id).then(|| Ok(Arc::new(root))),
            Err(error) => Some(Err(error)),
        })
        .await
    }

    /// Gives a placement's root by its id.
    pub async fn placement_root(&self, tree: &TreeId, id: &PlacementId) -> Result<Arc<PlacementRoot>, MetaError> {
        self.object(&paths::placement_key(tree, id), |bytes| match PlacementRoot::decode(bytes) {
            Ok(root) => (root.id() == *id && root.tree == *tree).then(|| Ok(Arc::new(root))),
            Err(error) => Some(Err(error)),
        })
        .await
    }

    /// Says whether an object lies on the node's disk, unread.
    pub fn has_on_disk(&self, key: &str) -> bool {
        self.inner.disk.has(key)
    }

    /// Gives the bytes of a file on the node's disk, unchecked.
    pub fn kept(&self, key: &str) -> Option<Vec<u8>> {
        self.inner.disk.read(key)
    }

    /// Keeps bytes that were just made and stored in the lake, so that they need not be fetched.
    /// `key` is the object's key in the lake; whoever reads them checks them against their id.
    pub fn keep(&self, key: &str, bytes: &[u8]) {
        if let Err(error) = self.inner.disk.write(key, bytes) {
            tracing::debug!(key, %error, "metadata is not kept on disk");
        }
    }

    /// Forgets what is kept on disk of an object (it was deleted from the lake).
    pub fn forget(&self, key: &str) {
        self.inner.disk.remove(key);
    }

    /// Deletes the files that were not used for longest until the directory is within its limit.
    /// The daemon calls it at start and hourly. Gives the bytes that are left.
    pub fn sweep_disk(&self, bytes_max: u64) -> std::io::Result<u64> {
        self.inner.disk.sweep(bytes_max)
    }

    /// Gives the bytes that decoded blocks take in memory now.
    pub fn memory_bytes(&self) -> u64 {
        self.inner.cache.bytes()
    }

    /// Looks in memory, then on disk. A file whose bytes are not those of its id is deleted.
    fn local(&self, need: &Need) -> Option<Result<Held, MetaError>> {
        if let Some(held) = self.inner.cache.get(need) {
            return Some(Ok(held));
        }
        let key = key_of(need);
        let bytes = self.inner.disk.read(&key)?;
        match check_block(need, &bytes) {
            Some(Ok(held)) => {
                self.inner.cache.insert(*need, held.clone());
                Some(Ok(held))
            }
            Some(Err(source)) => Some(Err(MetaError::Decode { key, source })),
            None => {
                tracing::warn!(key, "a metadata file on disk is damaged; it is fetched again");
                self.inner.disk.remove(&key);
                None
            }
        }
    }

    async fn held(&self, need: Need) -> Result<Held, MetaError> {
        if let Some(found) = self.local(&need) {
            return found;
        }
        let flight = Arc::clone(self.inner.flights.lock().entry(need).or_default());
        // Who is dropped while it fetches leaves the cell empty, and the next waiter fetches.
        let result = flight.get_or_init(|| self.fetch_block(need)).await.clone();
        let mut flights = self.inner.flights.lock();
        if flights.get(&need).is_some_and(|running| Arc::ptr_eq(running, &flight)) {
            flights.remove(&need);
        }
        result
    }

    async fn fetch_block(&self, need: Need) -> Result<Held, MetaError> {
        let key = key_of(&need);
        let bytes = self.get(&key, BLOCK_BYTES_MAX).await?;
        let held = check_block(&need, &bytes)
            .ok_or_else(|| MetaError::Corrupt { key: key.clone() })?
            .map_err(|source| MetaError::Decode { key: key.clone(), source })?;
        self.keep(&key, &bytes);
        self.inner.cache.insert(need, held.clone());
        Ok(held)
    }

    async fn get(&self, key: &str, limit: u64) -> Result<bytes::Bytes, MetaError> {
        lake::get_all(self.inner.lake.as_ref(), key, limit)
            .await
            .map_err(|source| MetaError::Lake { key: key.to_owned(), source: Arc::new(source) })
    }

    /// Gives a checked object that is not a block. `check` answers None where the bytes are not the id's.
    async fn object<T>(
        &self,
        key: &str,
        check: impl Fn(&[u8]) -> Option<Result<T, DecodeError>>,
    ) -> Result<T, MetaError> {
        if let Some(bytes) = self.inner.disk.read(key) {
            match check(&bytes) {
                Some(Ok(value)) => return Ok(value),
                Some(Err(_)) | None => self.inner.disk.remove(key),
            }
        }
        let bytes = self.get(key, ROOT_BYTES_MAX).await?;
        let value = check(&bytes)
            .ok_or_else(|| MetaError::Corrupt { key: key.to_owned() })?
            .map_err(|source| MetaError::Decode { key: key.to_owned(), source })?;
        self.keep(key, &bytes);
        Ok(value)
    }

    /// Brings one block of the tree and its placed twin to disk; gives what lies below index blocks.
    async fn prefetch_pair(&self, pair: BlockPair) -> Result<(u64, Vec<BlockPair>), MetaError> {
        let (tree, placed) = (Need::Tree(pair.tree), Need::Placed(pair.placed));
        let fetched = [&tree, &placed].iter().filter(|need| !self.inner.disk.has(&key_of(need))).count() as u64;
        if pair.level == 0 {
            futures::try_join!(self.prefetch_leaf(tree), self.prefetch_leaf(placed))?;
            return Ok((fetched, Vec::new()));
        }
        let (tree, placed_held) = futures::try_join!(self.held(tree), self.held(placed))?;
        let mut below = Vec::new();
        let planned = match (&tree, &placed_held) {
            (Held::Tree(block), Held::Placed(placed)) => match (block.as_ref(), placed.as_ref()) {
                (Block::Index(index), PlacedBlock::Index(ids)) if index.level == pair.level => {
                    let children: Vec<BlockId> = index.children.iter().map(|child| child.id).collect();
                    plan_children(&mut below, index.level, &children, ids)
                }
                _ => None,
            },
            _ => None,
        };
        planned.ok_or_else(|| MetaError::Shape { key: key_of(&placed) })?;
        Ok((fetched, below))
    }

    /// Brings a segment to disk without pushing anything out of memory.
    async fn prefetch_leaf(&self, need: Need) -> Result<(), MetaError> {
        let key = key_of(&need);
        if self.inner.disk.has(&key) {
            return Ok(());
        }
        let bytes = self.get(&key, BLOCK_BYTES_MAX).await?;
        let right = match need {
            Need::Tree(id) => Block::id_of(&bytes) == id,
            Need::Placed(id) => PlacedBlock::id_of(&bytes) == id,
        };
        if !right {
            return Err(MetaError::Corrupt { key });
        }
        self.keep(&key, &bytes);
        Ok(())
    }
}

/// A block of the tree and the placed block that mirrors it, `level` levels above the segments.
#[derive(Debug, Clone, Copy)]
struct BlockPair {
    level: u8,
    tree: BlockId,
    placed: BlockId,
}

/// Adds the children of an index block, first on top of the stack. None: the two do not match.
fn plan_children(todo: &mut Vec<BlockPair>, level: u8, tree: &[BlockId], placed: &[BlockId]) -> Option<()> {
    if tree.len() != placed.len() {
        return None;
    }
    if tree.is_empty() {
        return Some(());
    }
    let level = level.checked_sub(1)?;
    let pairs = tree.iter().zip(placed).rev();
    todo.extend(pairs.map(|(&tree, &placed)| BlockPair { level, tree, placed }));
    Some(())
}

impl Blocks for MetaStore {
    fn tree_block(&self, id: BlockId) -> Option<Arc<Block>> {
        match self.local(&Need::Tree(id)) {
            Some(Ok(Held::Tree(block))) => Some(block),
            // An error is met again, and named, by whoever then fetches.
            _ => None,
        }
    }

    fn placed_block(&self, id: BlockId) -> Option<Arc<PlacedBlock>> {
        match self.local(&Need::Placed(id)) {
            Some(Ok(Held::Placed(block))) => Some(block),
            _ => None,
        }
    }
}

/// The store, and what one navigation needed so far: a small LRU cannot make it go in circles.
struct Pinned<'a> {
    store: &'a MetaStore,
    pinned: &'a HashMap<Need, Held>,
}

impl Blocks for Pinned<'_> {
    fn tree_block(&self, id: BlockId) -> Option<Arc<Block>> {
        match self.pinned.get(&Need::Tree(id)) {
            Some(Held::Tree(block)) => Some(Arc::clone(block)),
            _ => self.store.tree_block(id),
        }
    }

    fn placed_block(&self, id: BlockId) -> Option<Arc<PlacedBlock>> {
        match self.pinned.get(&Need::Placed(id)) {
            Some(Held::Placed(block)) => Some(Arc::clone(block)),
            _ => self.store.placed_block(id),
        }
    }
}

#[cfg(test)]
mod tests;
