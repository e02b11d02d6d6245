//! The tier: a write-once cache of packs in a directory, shared by nodes without locks.
//!
//! ```text
//! larder-tier.json      the marker: without it nothing is read and nothing written
//! objects/ab/<pack>     complete, verified, never changed; beside it .index .outboard .proof
//! staging/<pack>/       bytes that arrive, span by span (64 MiB), with claims and done-marks
//! commits/<lake>/<c>/   what is cached for whom: records, leases, uses, keep
//! holds/ trash/ quarantine/ nodes/ steward/ tmp/
//! ```
//!
//! * [`io`], [`clock`]: the seams. [`real`]: the file system. A simulated one lies in `testkit`.
//! * [`stage`]: staging and publishing. [`objects`]: what is published; quarantine; scrubbing.
//! * [`records`]: which commits are cached, mounted, kept. [`holds`]: hard links of a mount.
//! * `siblings`: what a process can prove about others of its node.
//! * `room`: nothing is begun that would not fit.
//! * [`scan`]: a snapshot of everything (`fans`: of the objects). [`plan`]: what to do about it (pure). [`sweep`]: doing it.
//!   [`stall`]: whether that frees anything.
//! * [`check`]: accounting against a full walk. `why`: what protects a commit, and what was decided.
//!
//! Invariants (`docs/formats/tier.md` has the order of writes and the crash table):
//! * What lies under its final name is complete, verified, and never changes.
//! * A record protects the objects it names; a lease, keep or hold protects a record. Who protects
//!   writes first and looks afterwards; who removes renames away first and looks afterwards, and
//!   puts back what turns out to be protected: one of the two always sees the other.
//! * Nothing depends on locks, on atime or on comparing clocks of two hosts. Claims and the
//!   steward's lease only save work: correctness does not need them.
//!
//! Everything is synchronous and deterministic over [`TierIo`] and [`Clock`]: no threads, no tokio.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::format::ids::{NodeId, TierId};

pub mod check;
pub mod clock;
mod error;
mod fans;
mod files;
pub mod holds;
pub mod io;
mod layout;
mod marker;
pub mod objects;
pub mod plan;
pub mod real;
pub mod records;
mod room;
pub mod scan;
pub mod secret;
mod siblings;
pub mod stage;
mod stall;
pub mod sweep;
mod turns;
mod why;

pub use check::{CheckReport, Finding};
pub use clock::{Clock, RealClock};
pub use error::TierError;
pub use holds::Hold;
pub use io::{Space, Stat, TierFile, TierIo};
pub use layout::{CommitKey, Sidecar};
pub use marker::{InitOptions, Marker};
pub use objects::{FileIdentity, PackFile, Quarantined, ScrubOutcome, ScrubReport};
pub use plan::{Decision, Policy, Reason, SweepPlan, Verdict};
pub use real::RealIo;
pub use records::{Lease, Record, Renewed};
pub use scan::Scan;
pub use secret::PeerKey;
pub use siblings::{Fate, Purpose, Siblings};
pub use stage::{Claimed, SPAN_LEN, Stage};
pub use sweep::{Steward, StewardReport};
pub use why::{HoldInfo, LeaseInfo, RecordInfo, Why};

use layout::node_file;

/// How a node uses a tier. Times are compared on the server's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TierConfig {
    /// Bytes that the tier may take; None: what the marker says, else what the file system has.
    pub capacity_bytes: Option<u64>,
    /// Age-out after the last use; None: what the marker says, else one day.
    pub ttl_ms: Option<u64>,
    /// Eviction begins above this share of the capacity …
    pub high_watermark_percent: u8,
    /// … and ends at this one.
    pub low_watermark_percent: u8,
    /// How long what was moved away stays in the trash: longer than any client's attribute cache.
    pub grace_ms: u64,
    /// Deleted space that is not free after so long is held by something else. Longer than a node keeps a file
    /// of an evicted pack open.
    pub space_wait_ms: u64,
    /// A lease that nobody renewed for so long belongs to a dead node.
    pub lease_ttl_ms: u64,
    /// The same for the steward's lease, and for the right to set an object aside.
    pub claim_ttl_ms: u64,
    /// The same for a claim on a span: others wait for it, so it is short, and its owner renews it
    /// four times as often.
    pub span_claim_ttl_ms: u64,
    /// Staging that nobody wrote to for so long is given up.
    pub staging_ttl_ms: u64,
    /// How long damaged objects are kept to look at.
    pub quarantine_ttl_ms: u64,
    /// What one claim and one done-mark cover, where this node begins a pack.
    pub span_len_bytes: u64,
}

/// Age-out after the last use, where nobody says otherwise: one day.
pub const TTL_DEFAULT_MS: u64 = 24 * 3600 * 1000;

impl Default for TierConfig {
    fn default() -> Self {
        Self {
            capacity_bytes: None,
            ttl_ms: None,
            high_watermark_percent: 90,
            low_watermark_percent: 80,
            // Linux clients keep attributes of folders for at most 60 s.
            grace_ms: 90_000,
            space_wait_ms: 6 * 60_000,
            lease_ttl_ms: 15 * 60_000,
            claim_ttl_ms: 2 * 60_000,
            span_claim_ttl_ms: 15_000,
            staging_ttl_ms: 24 * 3600 * 1000,
            quarantine_ttl_ms: 7 * 24 * 3600 * 1000,
            span_len_bytes: SPAN_LEN,
        }
    }
}

/// One tier, as one process of one node uses it. Cheap to clone.
#[derive(Debug)]
pub struct Tier<I: TierIo = RealIo> {
    core: Arc<Core<I>>,
}

impl<I: TierIo> Clone for Tier<I> {
    fn clone(&self) -> Self {
        Self { core: Arc::clone(&self.core) }
    }
}

#[derive(Debug)]
struct Core<I> {
    io: I,
    clock: Arc<dyn Clock>,
    /// For messages.
    dir: PathBuf,
    marker: Marker,
    node: NodeId,
    /// This process' use of the tier: part of every name that only it writes.
    instance: Uuid,
    nonces: AtomicU64,
    cfg: TierConfig,
    siblings: Arc<dyn Siblings>,
    waker: OnceLock<room::Waker>,
    state: Mutex<State>,
}

/// What this process must renew. The lock is never held across I/O.
#[derive(Debug, Default)]
struct State {
    leases: BTreeMap<Uuid, records::LeaseState>,
    /// Commits used since the last heartbeat.
    used: BTreeSet<CommitKey>,
    /// Paths of the claims that this process holds.
    claims: BTreeSet<String>,
    /// Where peers reach this process, if they do.
    address: Option<String>,
    /// Counts the records and leases that this process wrote …
    promises: u64,
    /// … and at which of them each fan of the objects was last asked from the server.
    fans: BTreeMap<u8, u64>,
    /// Records that were read, by path: they never change.
    records: BTreeMap<String, Arc<Record>>,
    room: room::Room,
    /// What could not be written down on a full medium.
    stall: stall::Unwritten,
    /// What the fans of the objects held.
    listed: BTreeMap<u8, Arc<fans::Fan>>,
}

impl Tier<RealIo> {
    /// Makes a directory a tier; it must be empty or not exist.
    pub fn init(dir: &Path, options: &InitOptions) -> Result<Marker, TierError> {
        let io = RealIo::for_init(dir, options)?;
        marker::init(&io, dir, options, &RealClock::default())
    }

    /// The same, but takes a directory that is a tier already as it is; says whether it was made now. Nodes that
    /// do this at the same time make one tier.
    pub fn init_if_missing(dir: &Path, options: &InitOptions) -> Result<(Marker, bool), TierError> {
        match Self::init(dir, options) {
            Err(TierError::AlreadyTier { .. }) => Ok((marker::read(&RealIo::new(dir), dir)?, false)),
            made => Ok((made?, true)),
        }
    }

    /// Opens a tier. Without the marker it is refused and nothing is written.
    pub fn open(dir: &Path, node: NodeId, cfg: TierConfig) -> Result<Self, TierError> {
        Self::open_as(dir, node, Uuid::new_v4(), Arc::new(siblings::Strangers), cfg)
    }

    /// The same for an instance that its siblings know by its id.
    pub fn open_as(
        dir: &Path,
        node: NodeId,
        instance: Uuid,
        siblings: Arc<dyn Siblings>,
        cfg: TierConfig,
    ) -> Result<Self, TierError> {
        let io = RealIo::new(dir);
        let found = marker::read(&io, dir)?;
        let io = io.with_marker(&found);
        let clock = Arc::new(RealClock::default());
        Ok(Self::with_marker(io, clock, dir, found, node, instance, cfg).with_siblings(siblings))
    }

    /// Says whether a directory is a tier (has a marker that can be read).
    pub fn is_tier(dir: &Path) -> bool {
        marker::read(&RealIo::new(dir), dir).is_ok()
    }
}

impl<I: TierIo> Tier<I> {
    /// Opens a tier over any file system and clock.
    pub fn open_with(
        io: I,
        clock: Arc<dyn Clock>,
        dir: &Path,
        node: NodeId,
        instance: Uuid,
        cfg: TierConfig,
    ) -> Result<Self, TierError> {
        let found = marker::read(&io, dir)?;
        Ok(Self::with_marker(io, clock, dir, found, node, instance, cfg))
    }

    fn with_marker(
        io: I,
        clock: Arc<dyn Clock>,
        dir: &Path,
        marker: Marker,
        node: NodeId,
        instance: Uuid,
        cfg: TierConfig,
    ) -> Self {
        let core = Core {
            io,
            clock,
            dir: dir.to_owned(),
            marker,
            node,
            instance,
            nonces: AtomicU64::new(1),
            cfg,
            siblings: Arc::new(siblings::Strangers),
            waker: OnceLock::new(),
            state: Mutex::default(),
        };
        Self { core: Arc::new(core) }
    }

    /// Takes a source of proof about this node's other processes; before the first clone.
    pub(crate) fn with_siblings(mut self, siblings: Arc<dyn Siblings>) -> Self {
        if let Some(core) = Arc::get_mut(&mut self.core) {
            core.siblings = siblings;
        }
        self
    }

    /// Gives the tier's id.
    pub fn id(&self) -> TierId {
        self.core.marker.tier
    }

    /// Says whether it lies on a server: then any call may wait for as long as the server is away.
    pub fn is_remote(&self) -> bool {
        self.core.io.is_remote()
    }

    /// Gives the directory.
    pub fn dir(&self) -> &Path {
        &self.core.dir
    }

    /// Gives what `larder tier init` fixed.
    pub fn marker(&self) -> &Marker {
        &self.core.marker
    }

    /// Gives how this node uses the tier.
    pub fn config(&self) -> &TierConfig {
        &self.core.cfg
    }

    /// Age-out after the last use, where neither commit nor dataset says otherwise.
    pub fn ttl_ms(&self) -> u64 {
        self.core.cfg.ttl_ms.or(self.core.marker.ttl_ms).unwrap_or(TTL_DEFAULT_MS)
    }

    /// Bytes that the tier may take, where someone said so.
    pub fn configured_capacity_bytes(&self) -> Option<u64> {
        self.core.cfg.capacity_bytes.or(self.core.marker.capacity_bytes)
    }

    /// Lets the claims of this process say where peers reach it.
    pub fn set_address(&self, address: Option<String>) {
        self.core.state.lock().address = address;
    }

    /// Gives the server's now, in milliseconds of the server's clock.
    pub fn now_ms(&self) -> Result<i64, TierError> {
        self.core.now_ms()
    }
}

impl<I: TierIo> Core<I> {
    /// A name that nobody else uses.
    fn nonce(&self) -> Uuid {
        let n = self.nonces.fetch_add(1, Ordering::Relaxed);
        Uuid::from_u128(self.instance.as_u128() ^ (u128::from(n) << 16))
    }

    /// The server's clock: this node's own file is touched and its time read.
    fn now_ms(&self) -> Result<i64, TierError> {
        let path = node_file(&self.node);
        match self.io.touch(&path) {
            Ok(stat) => return Ok(stat.mtime_ms()),
            Err(error) => {
                let error = TierError::io("touch", &path, error);
                if !error.is_gone() {
                    return Err(error);
                }
            }
        }
        let touched = match self.replace(&path, &records::node_note(&self.node, self.clock.wall_ms())) {
            Ok(()) => self.io.touch(&path),
            Err(error) if error.is_full() => self.io.touch(layout::CLOCK),
            Err(error) => return Err(error),
        };
        Ok(touched.map_err(|e| TierError::io("touch", &path, e))?.mtime_ms())
    }
}

#[cfg(test)]
mod tests;
