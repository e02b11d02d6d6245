//! Limits of the fetcher, with their reasons. Every bound of `docs/fetch.md` is a field here.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What the fetcher may use, and how long it may take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FetchConfig {
    /// Verified buffers kept in memory.
    pub memory_bytes_max: u64,
    /// Bytes asked from the lake and not yet handed on, both lanes together.
    pub in_flight_bytes_max: u64,
    /// Indexes, recipes and chaining values of packs kept in memory.
    pub pack_meta_bytes_max: u64,
    /// What one prefetch request asks for, about. A multiple of 256 KiB.
    pub piece_len_bytes: u64,
    /// Prefetch requests at once.
    pub prefetch_requests_max: usize,
    /// Packs being filled at once.
    pub fill_packs_max: usize,
    /// Packs of which readers may have pieces brought at once, each with its staging file open.
    pub fill_open_max: usize,
    /// What readers may bring of a pack by themselves while it is not in the tier: so much may be
    /// fetched twice. What they want beyond it becomes part of the fill.
    pub ahead_bytes_max: u64,
    /// How long a reader waits for bytes that another node brings before it asks the lake.
    pub claim_wait_ms: u64,
    /// Files of the tier kept open.
    pub open_files_max: usize,
    /// A read fails with EIO when the lake has not given its bytes by then.
    pub read_timeout_ms: u64,
    /// A request of a fill is given up when the lake has not given its bytes by then.
    pub prefetch_timeout_ms: u64,
    /// A body that brings nothing for this long is given up and asked again from where it stopped.
    pub stall_timeout_ms: u64,
    /// How often wrong bytes are fetched again before they are an error.
    pub damaged_tries_max: u32,
    /// How long "the tier does not have this pack" is believed.
    pub absent_recheck_ms: u64,
    /// How long filling pauses after the tier was full or failed.
    pub tier_pause_ms: u64,
    /// Largest readahead window of a sequential reader of a large content.
    pub readahead_bytes_max: u64,
}

impl Default for FetchConfig {
    fn default() -> Self {
        Self {
            memory_bytes_max: 256 << 20,
            in_flight_bytes_max: 256 << 20,
            pack_meta_bytes_max: 64 << 20,
            piece_len_bytes: 8 << 20,
            prefetch_requests_max: 16,
            fill_packs_max: 4,
            fill_open_max: 128,
            ahead_bytes_max: 1 << 20,
            claim_wait_ms: 2_000,
            open_files_max: 512,
            read_timeout_ms: 30_000,
            prefetch_timeout_ms: 120_000,
            stall_timeout_ms: 5_000,
            damaged_tries_max: 3,
            absent_recheck_ms: 2_000,
            tier_pause_ms: 30_000,
            readahead_bytes_max: 8 << 20,
        }
    }
}

impl FetchConfig {
    /// Gives the total time of a demand read.
    pub fn read_timeout(&self) -> Duration {
        Duration::from_millis(self.read_timeout_ms)
    }

    /// Gives how long a reader waits for another node.
    pub fn claim_wait(&self) -> Duration {
        Duration::from_millis(self.claim_wait_ms)
    }

    /// Gives the time after which a silent body is given up.
    pub fn stall_timeout(&self) -> Duration {
        Duration::from_millis(self.stall_timeout_ms)
    }
}
