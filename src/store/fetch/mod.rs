//! Fetching: exactly the right bytes of a content, or an error.
//!
//! A read takes the first of these that has its bytes:
//!
//! ```text
//! memory -> the tier's object -> the staging file -> a fetch in flight -> the lake
//! (verified)  (by --verify level)  (checked again)     (joined)            (checked)
//! ```
//!
//! Two lanes share the bytes in flight, demand (someone waits) before prefetch. A demand read takes
//! what it needs: one packed file, or the 256 KiB blocks it touches and a readahead window; the
//! prefetch lane brings whole packs into the tier behind it. Errors of the tier never reach a reader.
//!
//! * [`local`]: what is at hand. * [`read`]: what is not. * [`source`]: patience with the lake.
//! * [`fill`], [`fill_run`], [`proof`]: filling one pack. * [`job`], [`attach`]: filling many.
//! * [`spans`], [`gather`]: who of several nodes brings what. * [`read_fill`]: reads through a fill.
//! * [`peers`]: bytes that another node is bringing.
//! * [`check`]: digesting whole objects. * [`ready`]: what the kernel may have. * [`packs`], [`pack_meta`], [`contents`], [`memory`],
//!   [`kept`], [`holes`]: what is known.
//! * [`lanes`], [`flight`], [`plan`], [`hang`]: the rules. * [`port`]: what is asked of a tier.
//!
//! Lock order: none of the locks is held while another is taken, but for a mount's `State`, under
//! which the pause may be looked at and a fill be begun; none is held across I/O or an await.
//! `docs/fetch.md` has the bounds and the times.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use crate::format::ids::PackId;
use crate::format::placement::{Location, PackUse};
use crate::store::kv::Kv;
use crate::store::lake::Lake;
use crate::store::tier::FileIdentity;

mod attach;
mod check;
mod config;
mod contents;
mod engine;
mod fill;
mod fill_run;
mod flight;
mod gather;
mod hang;
mod holes;
mod job;
mod kept;
mod lanes;
mod local;
mod memory;
mod pack_meta;
mod packs;
mod peers;
mod plan;
mod port;
mod proof;
mod read;
mod read_fill;
mod ready;
mod source;
mod spans;
mod stats;
mod tier_port;
mod types;

#[cfg(test)]
mod tests;

pub use attach::{Attachment, TreeOrder};
pub use config::FetchConfig;
pub use job::{FillError, FillHandle, FillProgress, PackFillError};
pub use port::{FetchStage, FetchTier, Given, Peers, SpanClaim};
pub use ready::NotReady;
pub use stats::{FetchStats, SourceStats};
pub use types::{ContentRef, FetchError, ParseWordError, Prefetch, Verify, WholeFile};

use engine::{Inner, pack_of};
use local::{Fast, Reach};

/// Reads contents and fills the tier. Cheap to clone; dropping the last one stops what runs in the
/// background.
#[derive(Debug, Clone)]
pub struct Fetcher {
    inner: Arc<Inner>,
    _stop: Arc<StopOnDrop>,
}

#[derive(Debug)]
struct StopOnDrop(Arc<Inner>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stopped.cancel();
    }
}

impl Fetcher {
    /// Makes a fetcher. Background work runs on `rt`, which must have its timers enabled.
    pub fn new(
        lake: Arc<dyn Lake>,
        tier: Option<Arc<dyn FetchTier>>,
        kv: Kv,
        cfg: FetchConfig,
        rt: tokio::runtime::Handle,
    ) -> Self {
        let inner = Inner::new(lake, tier, kv, cfg, rt);
        Self { _stop: Arc::new(StopOnDrop(inner.clone())), inner }
    }

    /// Reads what memory, the tier or the staging file has, on the calling thread: never waits for
    /// the network, so of a tier on a server it looks at nothing. None: ask [`Fetcher::read`].
    pub fn try_read(&self, c: &ContentRef, offset: u64, len: u32, verify: Verify) -> Option<Result<Bytes, FetchError>> {
        let len = clamp(c, offset, u64::from(len));
        let mut buf = BytesMut::zeroed(len as usize);
        self.inner.try_fill(c, offset, &mut buf, verify).then(|| Ok(buf.freeze()))
    }

    /// Like [`Fetcher::try_read`], into the caller's buffer; gives how many bytes were filled:
    /// `min(buf.len(), size - offset)`.
    pub fn try_read_into(
        &self,
        c: &ContentRef,
        offset: u64,
        buf: &mut [u8],
        verify: Verify,
    ) -> Option<Result<usize, FetchError>> {
        let len = clamp(c, offset, buf.len() as u64) as usize;
        let buf = buf.get_mut(..len)?;
        self.inner.try_fill(c, offset, buf, verify).then_some(Ok(len))
    }

    /// Reads exactly `min(len, size - offset)` bytes from wherever they are, or fails within the
    /// configured time.
    pub async fn read(&self, c: &ContentRef, offset: u64, len: u32, verify: Verify) -> Result<Bytes, FetchError> {
        let len = clamp(c, offset, u64::from(len));
        if len == 0 {
            return Ok(Bytes::new());
        }
        if c.location == Location::None {
            self.inner.check_holes(c).await?;
            return Ok(BytesMut::zeroed(len as usize).freeze());
        }
        let (inner, wanted) = (self.inner.clone(), c.clone());
        let look = move || {
            let mut buf = BytesMut::zeroed(len as usize);
            let fast = inner.read_local(&wanted, offset, &mut buf, verify, Reach::Tier);
            (fast == Fast::Filled).then(|| buf.freeze())
        };
        // Not on this thread: it belongs to the runtime, and the tier may hang.
        if let Some(Some(bytes)) = self.inner.look_at_tier(look).await {
            return Ok(bytes);
        }
        self.inner.read_slow(c, offset..offset + len, verify).await
    }

    /// Says whether [`Fetcher::whole`] would wait for a server: then [`Fetcher::look_for_whole`] comes first.
    pub fn waits_for_whole(&self, c: &ContentRef) -> bool {
        let whole = matches!(c.location, Location::Run { offset: 0, .. });
        let state = pack_of(c).filter(|_| whole).map(|pack| self.inner.packs.state(&pack));
        state.is_some_and(|state| self.inner.packs.opens_remotely(&state))
    }

    /// Opens what [`Fetcher::whole`] wants, on a thread that may wait, for no longer than the stall time.
    pub async fn look_for_whole(&self, c: &ContentRef) {
        let Some(pack) = pack_of(c) else {
            return;
        };
        let inner = self.inner.clone();
        self.inner.look_at_tier(move || inner.packs.open(&inner.packs.state(&pack)).map(drop)).await;
    }

    /// Gives the file where the content is a whole object of the tier and verified as asked. Where
    /// only the verification is missing, begins it in the background.
    pub fn whole(&self, c: &ContentRef, verify: Verify) -> Option<WholeFile> {
        let Location::Run { offset: 0, .. } = c.location else {
            return None;
        };
        if verify == Verify::Always {
            return None;
        }
        let state = self.inner.packs.state(&pack_of(c)?);
        let open = self.inner.packs.open(&state)?;
        if open.len != c.size {
            return None;
        }
        let trusted = open.is_whole_verified() || (verify == Verify::Tier && open.is_complete());
        if trusted && state.has(c) {
            return Some(WholeFile { file: open.file.clone(), len: open.len });
        }
        self.inner.look_closer(&state, &open, verify);
        None
    }

    /// Waits until a pack's object in the tier is checked as `verify` asks, and gives which file that is; an
    /// error where the tier does not have it whole. Checks it now where that was not done.
    pub async fn ready(&self, used: &PackUse, verify: Verify) -> Result<FileIdentity, NotReady> {
        self.inner.ready(used, verify).await
    }

    /// Closes a pack's file, so that the next look sees the one that is in the tier now.
    pub fn look_again(&self, pack: &PackId) {
        self.inner.packs.close(pack);
    }

    /// Says whether a content lies where its reference says, by what its pack's own index has.
    pub async fn proves(&self, c: &ContentRef) -> Result<bool, FetchError> {
        self.inner.proves(c).await
    }

    /// Brings packs into the tier through the prefetch lane, in the order given.
    pub fn fill(&self, packs: Vec<PackUse>) -> FillHandle {
        FillHandle::start(&self.inner, packs)
    }

    /// Makes a mount's packs known (in tree order where the caller knows it), so that reads of them
    /// start the prefetch its policy asks for.
    pub fn attach(&self, packs: Vec<PackUse>, prefetch: Prefetch) -> Attachment {
        Attachment::new(&self.inner, packs, prefetch)
    }

    /// Lets readers ask the nodes that bring what they wait for. Only the first call counts.
    pub fn set_peers(&self, peers: Arc<dyn Peers>) {
        self.inner.peers.set(peers);
    }

    /// Gives a range of a pack that is being filled here to another node: only bytes that this process
    /// checked itself. Brings them now where their span is ours; waits no longer than `patience`.
    pub async fn give(&self, pack: &PackId, range: Range<u64>, patience: Duration) -> Given {
        self.inner.give(pack, range, patience).await
    }

    /// Ends a pause of the filling: somebody made room.
    pub fn resume_filling(&self) {
        self.inner.resume_filling();
    }

    /// Closes files of the tier that nobody reads: those of evicted packs hold their space. To be called
    /// about once a minute, on a thread that may wait for the tier.
    pub fn close_idle_files(&self) {
        self.inner.packs.close_idle(self.inner.packs.now_ms());
    }

    /// Copies the counters.
    pub fn stats(&self) -> FetchStats {
        self.inner.stats()
    }

    /// Gives the limits it works within.
    pub fn config(&self) -> &FetchConfig {
        &self.inner.cfg
    }
}

/// Says how many bytes a read gives: none behind the end.
fn clamp(c: &ContentRef, offset: u64, len: u64) -> u64 {
    len.min(c.size.saturating_sub(offset))
}
