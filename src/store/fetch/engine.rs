//! What all parts of the fetcher share, and small helpers on it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::format::ids::{ContentDigest, ContentId, PackId};
use crate::format::placement::Location;
use crate::store::kv::Kv;
use crate::store::lake::{Lake, LakeError};

use super::attach::Registry;
use super::check::CheckQueue;
use super::config::FetchConfig;
use super::fill_run::Fills;
use super::flight::Flights;
use super::holes::Holes;
use super::kept::Kept;
use super::lanes::Lanes;
use super::memory::Memory;
use super::pack_meta::{MetaError, PackMetas};
use super::packs::Packs;
use super::peers::PeerTable;
use super::plan::Readahead;
use super::port::FetchTier;
use super::source::{LakeReader, SourceError};
use super::stats::{Counters, FetchStats};
use super::types::{ContentRef, FetchError};

/// Large contents whose readers' positions are remembered.
const READAHEAD_CONTENTS_MAX: usize = 1024;

/// The shared state of a fetcher.
#[derive(Debug)]
pub(super) struct Inner {
    pub cfg: FetchConfig,
    pub rt: Handle,
    pub lake: Arc<dyn Lake>,
    pub reader: LakeReader,
    pub counters: Arc<Counters>,
    pub lanes: Arc<Lanes>,
    pub memory: Memory,
    pub kept: Kept,
    pub flights: Arc<Flights>,
    pub metas: PackMetas,
    pub packs: Packs,
    pub readahead: Mutex<LruCache<ContentId, Readahead>>,
    pub fills: Fills,
    pub checks: CheckQueue,
    pub registry: Registry,
    pub holes: Holes,
    pub peers: PeerTable,
    /// Ends everything that runs in the background.
    pub stopped: CancellationToken,
    pause: Mutex<Option<Pause>>,
}

/// Filling pauses because the tier is full or fails.
#[derive(Debug, Clone)]
struct Pause {
    until: Instant,
    why: String,
}

impl Inner {
    pub(super) fn new(
        lake: Arc<dyn Lake>,
        tier: Option<Arc<dyn FetchTier>>,
        kv: Kv,
        cfg: FetchConfig,
        rt: Handle,
    ) -> Arc<Self> {
        let counters = Arc::new(Counters::default());
        let reader = LakeReader { lake: lake.clone(), counters: counters.clone(), stall_timeout: cfg.stall_timeout() };
        let contents_max = std::num::NonZeroUsize::new(READAHEAD_CONTENTS_MAX).expect("a constant above 0");
        Arc::new(Self {
            lanes: Lanes::new(cfg.in_flight_bytes_max),
            memory: Memory::new(cfg.memory_bytes_max / 2),
            kept: Kept::new(cfg.memory_bytes_max / 2),
            flights: Arc::default(),
            metas: PackMetas::new(reader.clone(), tier.clone(), cfg.pack_meta_bytes_max, cfg.damaged_tries_max),
            packs: Packs::new(tier, kv, counters.clone(), cfg.open_files_max, cfg.absent_recheck_ms),
            readahead: Mutex::new(LruCache::new(contents_max)),
            fills: Fills::new(&cfg),
            checks: CheckQueue::default(),
            registry: Registry::default(),
            holes: Holes::default(),
            peers: PeerTable::default(),
            stopped: CancellationToken::new(),
            pause: Mutex::new(None),
            cfg,
            rt,
            lake,
            reader,
            counters,
        })
    }

    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.cfg.read_timeout()
    }

    /// Adds what was spent digesting.
    pub(super) fn note_verify_time(&self, spent: Duration) {
        self.counters.verify_us.fetch_add(spent.as_micros() as u64, Ordering::Relaxed);
    }

    /// Stops filling for a while.
    pub(super) fn pause_filling(&self, why: String) {
        tracing::warn!(why, "filling the tier pauses; reads go on from the lake");
        let until = Instant::now() + Duration::from_millis(self.cfg.tier_pause_ms);
        *self.pause.lock() = Some(Pause { until, why });
    }

    /// Ends the pause.
    pub(super) fn resume_filling(&self) {
        *self.pause.lock() = None;
    }

    /// Says why filling pauses, if it does.
    pub(super) fn paused(&self) -> Option<String> {
        let mut pause = self.pause.lock();
        if pause.as_ref().is_some_and(|p| p.until <= Instant::now()) {
            *pause = None;
        }
        pause.as_ref().map(|p| p.why.clone())
    }

    pub(super) fn stats(&self) -> FetchStats {
        let (in_flight_bytes, in_flight_bytes_peak) = self.lanes.used();
        FetchStats {
            in_flight_bytes,
            in_flight_bytes_peak,
            memory_bytes: self.memory.bytes() + self.kept.bytes(),
            open_files: self.packs.open_files() as u64,
            filling_paused: self.paused(),
            ..self.counters.snapshot()
        }
    }

    /// Turns an error of the lake into one that names what was read.
    pub(super) fn source_error(&self, c: &ContentRef, key: String, error: SourceError) -> FetchError {
        let (pack, content) = (pack_of(c).unwrap_or(PackId([0; 32])), content_name(&c.content));
        match error {
            SourceError::Late { waited, source } => {
                FetchError::Unreachable { pack, content, key, waited_ms: waited.as_millis() as u64, source }
            }
            SourceError::Permanent(source) => FetchError::Gone { pack, content, key, source },
        }
    }

    /// Turns an error about a pack's description into one that names what was read.
    pub(super) fn meta_error(&self, c: &ContentRef, error: MetaError) -> FetchError {
        match error {
            MetaError::Source { key, error } => self.source_error(c, key, error),
            MetaError::Damaged { why } => bad_pack(c, why),
        }
    }

    /// The error of a read whose time ran out while it waited.
    pub(super) fn late(&self, c: &ContentRef) -> FetchError {
        let key = "packs".to_owned();
        let source = LakeError::Passing { key: key.clone(), source: "out of time".into() };
        let waited = self.cfg.read_timeout();
        self.source_error(c, key, SourceError::Late { waited, source: Arc::new(source) })
    }
}

pub(super) fn bad_pack(c: &ContentRef, why: &'static str) -> FetchError {
    let pack = pack_of(c).unwrap_or(PackId([0; 32]));
    FetchError::BadPack { pack, content: content_name(&c.content), why }
}

/// Gives the pack that a content lies in.
pub(super) fn pack_of(c: &ContentRef) -> Option<PackId> {
    match &c.location {
        Location::None => None,
        Location::Run { pack, .. } | Location::Sparse { pack, .. } => Some(*pack),
    }
}

/// Names a content, for messages.
pub(super) fn content_name(content: &ContentId) -> String {
    match content {
        ContentId::Digest(ContentDigest(raw)) => hex::encode(raw),
        ContentId::Pin(pin) => format!("pin {pin}"),
    }
}
