//! Counters: where bytes came from and what went wrong on the way.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Requests and bytes of one source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct SourceStats {
    pub requests: u64,
    pub bytes: u64,
}

/// A snapshot of the fetcher's counters since it started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FetchStats {
    /// Served to readers from verified buffers.
    pub memory: SourceStats,
    /// Served to readers from published objects of the tier.
    pub tier: SourceStats,
    /// Served to readers from the shared staging file of a pack that is being filled.
    pub staging: SourceStats,
    /// Served to readers from another node, which is bringing it.
    pub peer: SourceStats,
    /// Given to other nodes, of what is being brought here.
    pub to_peers: SourceStats,
    /// Served to readers that joined a fetch somebody else had begun.
    pub in_flight: SourceStats,
    /// Asked from the lake because a reader waited.
    pub lake_demand: SourceStats,
    /// Asked from the lake to fill the tier.
    pub lake_prefetch: SourceStats,
    /// Indexes, recipes, chaining values and proofs of packs.
    pub lake_meta: SourceStats,
    /// Damaged objects of the tier that were set aside and are fetched again.
    pub heals: u64,
    /// Requests that were made again after a passing error.
    pub retries: u64,
    /// Fetched bytes that did not have their digest.
    pub damaged_fetches: u64,
    /// Reads that ended in an error.
    /// Spans that this node claimed, that another had claimed first, and whose claims others took over.
    pub claims_won: u64,
    pub claims_other: u64,
    pub claims_lost: u64,
    pub read_errors: u64,
    /// Time spent digesting.
    pub verify_us: u64,
    /// Errors of the tier that readers did not see.
    pub tier_errors: u64,
    /// Packs published by this process.
    pub packs_published: u64,
    /// Their bytes: what the lake sent for them, of all nodes, divided by this is the amplification.
    pub bytes_published: u64,
    /// Bytes asked from the lake and not yet handed on, now and at most so far.
    pub in_flight_bytes: u64,
    pub in_flight_bytes_peak: u64,
    /// Verified buffers in memory, now.
    pub memory_bytes: u64,
    /// Files of the tier open, now.
    pub open_files: u64,
    /// Why filling pauses, if it does: the tier is full or fails.
    pub filling_paused: Option<String>,
}

/// One source's counters.
#[derive(Debug, Default)]
pub(super) struct SourceCounters {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl SourceCounters {
    pub(super) fn add(&self, bytes: u64) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> SourceStats {
        SourceStats { requests: self.requests.load(Ordering::Relaxed), bytes: self.bytes.load(Ordering::Relaxed) }
    }
}

/// The live counters.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub memory: SourceCounters,
    pub tier: SourceCounters,
    pub staging: SourceCounters,
    pub peer: SourceCounters,
    pub to_peers: SourceCounters,
    pub in_flight: SourceCounters,
    pub lake_demand: SourceCounters,
    pub lake_prefetch: SourceCounters,
    pub lake_meta: SourceCounters,
    pub heals: AtomicU64,
    pub retries: AtomicU64,
    pub damaged_fetches: AtomicU64,
    pub claims_won: AtomicU64,
    pub claims_other: AtomicU64,
    pub claims_lost: AtomicU64,
    pub read_errors: AtomicU64,
    pub verify_us: AtomicU64,
    pub tier_errors: AtomicU64,
    pub packs_published: AtomicU64,
    pub bytes_published: AtomicU64,
}

impl Counters {
    /// Copies the counters; gauges are left at zero for the caller to fill.
    pub(super) fn snapshot(&self) -> FetchStats {
        let load = |c: &AtomicU64| c.load(Ordering::Relaxed);
        FetchStats {
            memory: self.memory.snapshot(),
            tier: self.tier.snapshot(),
            staging: self.staging.snapshot(),
            peer: self.peer.snapshot(),
            to_peers: self.to_peers.snapshot(),
            in_flight: self.in_flight.snapshot(),
            lake_demand: self.lake_demand.snapshot(),
            lake_prefetch: self.lake_prefetch.snapshot(),
            lake_meta: self.lake_meta.snapshot(),
            heals: load(&self.heals),
            retries: load(&self.retries),
            damaged_fetches: load(&self.damaged_fetches),
            claims_won: load(&self.claims_won),
            claims_other: load(&self.claims_other),
            claims_lost: load(&self.claims_lost),
            read_errors: load(&self.read_errors),
            verify_us: load(&self.verify_us),
            tier_errors: load(&self.tier_errors),
            packs_published: load(&self.packs_published),
            bytes_published: load(&self.bytes_published),
            ..FetchStats::default()
        }
    }
}

/// Adds one to a counter.
pub(super) fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
