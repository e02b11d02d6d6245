//! Fetching: exactly the right bytes of a content, or an error.
//!
//! A read takes the first of these that has its bytes: verified buffers in memory, the tier's
//! published object, verified pieces of the staging file that is being filled here, a fetch that is
//! in flight, the lake. Two lanes share the bytes in flight, demand (someone waits) before
//! prefetch. `docs/fetch.md` has the bounds and the times.

use std::sync::Arc;

use bytes::Bytes;

use crate::format::placement::PackUse;
use crate::store::kv::Kv;
use crate::store::lake::Lake;

mod config;
mod lanes;
mod memory;
mod port;
mod stats;
mod types;

pub use config::FetchConfig;
pub use port::{FetchStage, FetchTier, FileIdentity, PackFile, Sidecar};
pub use stats::{FetchStats, SourceStats};
pub use types::{ContentRef, FetchError, ParseWordError, Prefetch, Verify, WholeFile};

/// Reads contents and fills the tier. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Fetcher(());

/// How far a fill is.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct FillProgress {
    /// Bytes of all packs of the fill.
    pub bytes_total: u64,
    /// Bytes that are in the tier or in its staging files by now.
    pub bytes_done: u64,
    pub packs_total: u64,
    /// Packs that are complete in the tier.
    pub packs_done: u64,
    /// Packs that were not filled because of an error.
    pub packs_failed: u64,
}

/// Why a fill did not end with all packs in the tier.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FillError {
    #[error("there is no tier to fill; name one with --tier or LARDER_TIER")]
    NoTier,
    #[error("filling was cancelled with {done} of {total} packs in the tier")]
    Cancelled { done: u64, total: u64 },
    #[error("{failed} of {total} packs could not be filled; the first because: {first}")]
    Failed {
        failed: u64,
        total: u64,
        first: String,
    },
}

/// A running fill. Dropping the handle lets the fill go on; `cancel` ends it.
#[derive(Debug, Clone)]
pub struct FillHandle(());

impl FillHandle {
    /// Says how far the fill is.
    pub fn progress(&self) -> FillProgress {
        todo!()
    }
    /// Waits for the end; any number of callers may wait.
    pub async fn wait(&self) -> Result<FillProgress, FillError> {
        todo!()
    }
    /// Ends the fill; what was written stays for the next one.
    pub fn cancel(&self) {
        todo!()
    }
}

/// A mount's packs, known to the fetcher as long as this lives. Dropping it ends its prefetch.
#[derive(Debug)]
pub struct Attachment(());

impl Fetcher {
    pub fn new(
        _lake: Arc<dyn Lake>,
        _tier: Option<Arc<dyn FetchTier>>,
        _kv: Kv,
        _cfg: FetchConfig,
        _rt: tokio::runtime::Handle,
    ) -> Self {
        todo!()
    }

    /// Reads what memory, the tier or the staging file has, on the calling thread: never waits for
    /// the network. None: ask [`Fetcher::read`].
    pub fn try_read(
        &self,
        _c: &ContentRef,
        _offset: u64,
        _len: u32,
        _verify: Verify,
    ) -> Option<Result<Bytes, FetchError>> {
        todo!()
    }

    /// Like [`Fetcher::try_read`], into the caller's buffer; gives how many bytes were filled:
    /// `min(buf.len(), size - offset)`.
    pub fn try_read_into(
        &self,
        _c: &ContentRef,
        _offset: u64,
        _buf: &mut [u8],
        _verify: Verify,
    ) -> Option<Result<usize, FetchError>> {
        todo!()
    }

    /// Reads exactly `min(len, size - offset)` bytes from wherever they are, or fails within the
    /// configured time.
    pub async fn read(
        &self,
        _c: &ContentRef,
        _offset: u64,
        _len: u32,
        _verify: Verify,
    ) -> Result<Bytes, FetchError> {
        todo!()
    }

    /// Gives the file where the content is a whole object of the tier and verified as asked. Where
    /// only the verification is missing, begins it in the background.
    pub fn whole(&self, _c: &ContentRef, _verify: Verify) -> Option<WholeFile> {
        todo!()
    }

    /// Brings packs into the tier through the prefetch lane, in the order given.
    pub fn fill(&self, _packs: Vec<PackUse>) -> FillHandle {
        todo!()
    }

    /// Makes a mount's packs known (in tree order where the caller knows it), so that reads of them
    /// start the prefetch its policy asks for.
    pub fn attach(&self, _packs: Vec<PackUse>, _prefetch: Prefetch) -> Attachment {
        todo!()
    }

    /// Copies the counters.
    pub fn stats(&self) -> FetchStats {
        todo!()
    }
}
