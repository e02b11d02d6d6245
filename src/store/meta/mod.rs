//! Immutable metadata: from memory, from the node's disk, or from the lake.
//!
//! * [`MetaStore`]: the one that everybody asks. A byte-bounded LRU of decoded blocks in front of
//!   a directory of files in front of the lake.
//! * [`cache`]: the LRU. * [`disk`]: the directory, its size limit and its sweep.
//! * [`snapshot`]: one commit, ready to be navigated.
//!
//! Invariants: what comes from disk or lake is checked against its id before it is decoded, so a
//! damaged file is fetched again and a damaged lake is an error that names the object. One block is
//! fetched once however many ask. No lock is held across an await or I/O.

use std::path::PathBuf;
use std::sync::Arc;

use crate::format::codec::DecodeError;
use crate::format::ids::{BlockId, CommitId, PlacementId, TreeId};
use crate::format::commit::Commit;
use crate::format::placement::{PlacedBlock, PlacementRoot};
use crate::format::tree::nav::{Blocks, NavError, Need};
use crate::format::tree::{Block, TreeRoot};
use crate::store::lake::{Lake, LakeError};

mod snapshot;

pub use snapshot::Snapshot;

/// How many bytes of decoded blocks are kept in memory when nothing else is said.
pub const MEMORY_BYTES_MAX: u64 = 64 << 20;
/// How many bytes of blocks are kept on the node's disk when nothing else is said.
pub const DISK_BYTES_MAX: u64 = 8 << 30;
/// How many blocks a prefetch asks for at a time.
pub const PREFETCH_PARALLEL: usize = 32;

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
    #[error("{key}: the object in the lake is damaged: its bytes are not those of its id; restore it from a copy, or push the data again")]
    Corrupt { key: String },
    /// The bytes are those of the id, but no correct writer makes them.
    #[error("{key} cannot be read")]
    Decode {
        key: String,
        #[source]
        source: DecodeError,
    },
    /// Navigation ended otherwise than with a missing block.
    #[error(transparent)]
    Nav(NavError),
}

/// Metadata by id. Cheap to clone.
#[derive(Debug, Clone)]
pub struct MetaStore {
    _lake: Arc<dyn Lake>,
    _dir: PathBuf,
}

impl MetaStore {
    /// Makes a store over `lake` with files below `dir` (`<state>/meta`), which need not exist yet.
    pub fn new(lake: Arc<dyn Lake>, dir: PathBuf, _memory_bytes_max: u64) -> Self {
        Self { _lake: lake, _dir: dir }
    }

    /// Brings one block to memory and disk; at most one fetch of it runs at a time.
    pub async fn fetch(&self, _need: Need) -> Result<(), MetaError> {
        todo!()
    }

    /// Brings all blocks of a snapshot (tree and placement) to the node's disk, 32 at a time.
    /// Dropping the future cancels it. Gives how many blocks were fetched.
    pub async fn prefetch_tree(&self, _snap: &Snapshot) -> Result<u64, MetaError> {
        todo!()
    }

    /// Runs a navigation to its end: fetches what it needs, keeps that until it succeeds.
    pub async fn drive<T>(&self, _f: impl FnMut(&dyn Blocks) -> Result<T, NavError>) -> Result<T, MetaError> {
        todo!()
    }

    /// Runs a navigation over memory and the node's disk, never the network.
    pub fn try_now<T>(&self, f: impl FnOnce(&dyn Blocks) -> Result<T, NavError>) -> Result<T, NavError> {
        f(self)
    }

    /// Gives a commit by its id.
    pub async fn commit(&self, _id: &CommitId) -> Result<Arc<Commit>, MetaError> {
        todo!()
    }

    /// Gives a tree's root by its id.
    pub async fn tree_root(&self, _id: &TreeId) -> Result<Arc<TreeRoot>, MetaError> {
        todo!()
    }

    /// Gives a placement's root by its id.
    pub async fn placement_root(&self, _tree: &TreeId, _id: &PlacementId) -> Result<Arc<PlacementRoot>, MetaError> {
        todo!()
    }

    /// Keeps bytes that were just made and stored in the lake, so that they need not be fetched.
    /// `key` is the object's key in the lake; the caller vouches for the bytes being those of the id
    /// (they are checked when read).
    pub fn keep(&self, _key: &str, _bytes: &[u8]) {}

    /// Deletes the files that were not used for longest until the directory is within its limit.
    /// The daemon calls it at start and hourly. Gives the bytes that are left.
    pub fn sweep_disk(&self, _bytes_max: u64) -> std::io::Result<u64> {
        todo!()
    }
}

impl Blocks for MetaStore {
    fn tree_block(&self, _id: BlockId) -> Option<Arc<Block>> {
        todo!()
    }

    fn placed_block(&self, _id: BlockId) -> Option<Arc<PlacedBlock>> {
        todo!()
    }
}
