//! What this process knows of each pack in the tier: its open file, what of it was verified here, and
//! the staging file that is being filled here.
//!
//! The tables are sharded and their locks are never held across I/O. Open files are bounded: opening
//! one more closes those that were not used for longest (who reads one keeps it open until done). Idle
//! ones are closed too: the space of an evicted pack is free only when nobody has it open.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};

use crate::format::ids::PackId;
use crate::format::pack::{PackIndex, PackedContent, Place};
use crate::format::placement::Location;
use crate::store::kv::{Kv, VerifiedFile};
use crate::store::tier::FileIdentity;

use super::contents::Contents;
use super::fill::FillState;
use super::hang::Answers;
use super::port::FetchTier;
use super::stats::{Counters, bump};
use super::types::ContentRef;

const SHARDS: usize = 16;
/// Packs that are remembered; the longest unused ones without an open file go first.
const PACKS_PER_SHARD_MAX: usize = 1024;
/// A file that nobody used for so long is closed.
const IDLE_MS: u64 = 5 * 60_000;
/// What one bit of a unit map covers: contents start on multiples of it.
const SLOT_LEN: u64 = 4096;
/// Slots of one leaf of a unit map.
const LEAF_SLOTS: u64 = 4096;
const LEAF_WORDS: usize = (LEAF_SLOTS / 64) as usize;

/// Which units of an object were verified, by where they start. Leaves come as they are touched.
#[derive(Debug)]
pub(super) struct UnitMap {
    leaves: Vec<OnceLock<Box<[AtomicU64; LEAF_WORDS]>>>,
}

impl UnitMap {
    fn new(len: u64) -> Self {
        let leaves = len.div_ceil(SLOT_LEN * LEAF_SLOTS);
        Self { leaves: (0..leaves).map(|_| OnceLock::new()).collect() }
    }

    fn place(offset: u64) -> (usize, usize, u64) {
        let slot = offset / SLOT_LEN;
        ((slot / LEAF_SLOTS) as usize, (slot % LEAF_SLOTS / 64) as usize, 1 << (slot % 64))
    }

    fn has(&self, offset: u64) -> bool {
        let (leaf, word, bit) = Self::place(offset);
        let word = self.leaves.get(leaf).and_then(OnceLock::get).and_then(|leaf| leaf.get(word));
        word.is_some_and(|word| word.load(Ordering::Relaxed) & bit != 0)
    }

    fn set(&self, offset: u64) {
        let (leaf, word, bit) = Self::place(offset);
        let Some(leaf) = self.leaves.get(leaf) else {
            return;
        };
        let leaf = leaf.get_or_init(|| Box::new([const { AtomicU64::new(0) }; LEAF_WORDS]));
        if let Some(word) = leaf.get(word) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }
}

/// A published object, open for reading.
#[derive(Debug)]
pub(super) struct OpenPack {
    pub file: Arc<File>,
    pub len: u64,
    pub identity: FileIdentity,
    /// This node digested all of it.
    whole: AtomicBool,
    /// Known to lack no content (an imported pack may): all that `--verify tier` needs to know.
    complete: AtomicBool,
    units: UnitMap,
}

impl OpenPack {
    pub(super) fn is_whole_verified(&self) -> bool {
        self.whole.load(Ordering::Acquire)
    }

    pub(super) fn set_whole_verified(&self) {
        self.whole.store(true, Ordering::Release);
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire) || self.is_whole_verified()
    }

    pub(super) fn set_complete(&self) {
        self.complete.store(true, Ordering::Release);
    }

    /// Says whether the unit that starts at this offset of the pack was verified here.
    pub(super) fn has_unit(&self, offset: u64) -> bool {
        self.units.has(offset)
    }

    pub(super) fn set_unit(&self, offset: u64) {
        self.units.set(offset);
    }

    /// Reads exactly `buf.len()` bytes.
    pub(super) fn read_exact(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

/// One pack.
#[derive(Debug)]
pub(super) struct PackState {
    pub pack: PackId,
    open: RwLock<Option<Arc<OpenPack>>>,
    /// Until then the tier is believed not to have it.
    absent_until_ms: AtomicU64,
    used: AtomicU64,
    /// Being filled here.
    pub fill: RwLock<Option<Arc<FillState>>>,
    /// A whole-object check is queued or running.
    pub checking: AtomicBool,
    /// What readers asked from the lake by themselves since the pack was last seen in the tier.
    ahead_bytes: AtomicU64,
    /// Where in the pack a reader waits, plus one; 0: nobody.
    wanted: AtomicU64,
    /// What the pack has, and where: the same for every copy of it.
    contents: OnceLock<Contents>,
}

/// All packs that this process met.
#[derive(Debug)]
pub(super) struct Packs {
    shards: Vec<Mutex<HashMap<PackId, Arc<PackState>>>>,
    tier: Option<Arc<dyn FetchTier>>,
    kv: Kv,
    counters: Arc<Counters>,
    open_files: AtomicUsize,
    open_files_max: usize,
    absent_recheck_ms: u64,
    started: Instant,
    tick: AtomicU64,
    /// When idle files were looked for, milliseconds, and the tick then.
    looks: Mutex<VecDeque<(u64, u64)>>,
    pub(super) answers: Answers,
}

impl Packs {
    pub(super) fn new(
        tier: Option<Arc<dyn FetchTier>>,
        kv: Kv,
        counters: Arc<Counters>,
        open_files_max: usize,
        absent_recheck_ms: u64,
    ) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            tier,
            kv,
            counters,
            open_files: AtomicUsize::new(0),
            open_files_max: open_files_max.max(1),
            absent_recheck_ms,
            started: Instant::now(),
            tick: AtomicU64::new(1),
            looks: Mutex::default(),
            answers: Answers::default(),
        }
    }

    pub(super) fn tier(&self) -> Option<&Arc<dyn FetchTier>> {
        self.tier.as_ref()
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    pub(super) fn open_files(&self) -> usize {
        self.open_files.load(Ordering::Relaxed)
    }

    fn shard(&self, pack: &PackId) -> &Mutex<HashMap<PackId, Arc<PackState>>> {
        let [first, ..] = pack.as_bytes();
        self.shards.get(usize::from(*first) % SHARDS).expect("a remainder is below its divisor")
    }

    /// Gives the state of a pack, new where it was not met before.
    pub(super) fn state(&self, pack: &PackId) -> Arc<PackState> {
        let mut shard = self.shard(pack).lock();
        if let Some(state) = shard.get(pack) {
            return state.clone();
        }
        if shard.len() >= PACKS_PER_SHARD_MAX {
            drop_unused(&mut shard);
        }
        let state = Arc::new(PackState {
            pack: *pack,
            open: RwLock::new(None),
            absent_until_ms: AtomicU64::new(0),
            used: AtomicU64::new(0),
            fill: RwLock::new(None),
            checking: AtomicBool::new(false),
            ahead_bytes: AtomicU64::new(0),
            wanted: AtomicU64::new(0),
            contents: OnceLock::new(),
        });
        shard.insert(*pack, state.clone());
        state
    }

    /// Gives the fill of a pack, where one runs.
    pub(super) fn filling(&self, pack: &PackId) -> Option<Arc<FillState>> {
        let state = self.shard(pack).lock().get(pack).cloned();
        state?.filling()
    }

    /// Says whether reading a pack of the tier can wait for a server that is away.
    pub(super) fn tier_is_remote(&self) -> bool {
        self.tier.as_ref().is_some_and(|tier| tier.is_remote())
    }

    /// Says whether [`Packs::open`] would ask a server.
    pub(super) fn opens_remotely(&self, state: &PackState) -> bool {
        self.tier_is_remote()
            && self.tier_answers()
            && state.open.read().is_none()
            && self.now_ms() >= state.absent_until_ms.load(Ordering::Relaxed)
    }

    /// Gives the pack's open file, opening it where the tier has it. Errors of the tier are counted
    /// and mean "not there".
    pub(super) fn open(&self, state: &PackState) -> Option<Arc<OpenPack>> {
        state.used.store(self.tick.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        let tier = self.tier.as_ref().filter(|_| self.tier_answers())?;
        if let Some(open) = state.open.read().as_ref() {
            return Some(open.clone());
        }
        if self.now_ms() < state.absent_until_ms.load(Ordering::Relaxed) {
            return None;
        }
        let found = tier.open_pack(&state.pack).unwrap_or_else(|_| {
            bump(&self.counters.tier_errors);
            None
        });
        let Some(found) = found else {
            state.absent_until_ms.store(self.now_ms() + self.absent_recheck_ms, Ordering::Relaxed);
            return None;
        };
        Some(self.install(state, found.file, found.len, found.identity))
    }

    /// Takes a file that was just opened or published. Where another thread was faster, its stays.
    pub(super) fn install(&self, state: &PackState, file: File, len: u64, identity: FileIdentity) -> Arc<OpenPack> {
        let open = Arc::new(OpenPack {
            file: Arc::new(file),
            len,
            identity,
            whole: AtomicBool::new(self.was_verified(&state.pack, &identity)),
            complete: AtomicBool::new(false),
            units: UnitMap::new(len),
        });
        {
            let mut slot = state.open.write();
            match slot.as_ref() {
                Some(there) if there.identity == identity => return there.clone(),
                Some(_) => {}
                None => {
                    self.open_files.fetch_add(1, Ordering::Relaxed);
                }
            }
            *slot = Some(open.clone());
            state.ahead_bytes.store(0, Ordering::Relaxed);
        }
        self.close_unused();
        open
    }

    fn was_verified(&self, pack: &PackId, identity: &FileIdentity) -> bool {
        let Some(tier) = self.tier.as_ref() else {
            return false;
        };
        let Ok(Some(row)) = self.kv.verified(&tier.id(), pack) else {
            return false;
        };
        row.file_id == identity.file_id
            && row.size == identity.size_bytes
            && row.mtime_ns == i128::from(identity.mtime_ns)
    }

    /// Remembers that this node digested the whole object.
    pub(super) fn note_whole_verified(&self, state: &PackState, open: &OpenPack) {
        open.set_whole_verified();
        let Some(tier) = self.tier.as_ref() else {
            return;
        };
        let FileIdentity { file_id, size_bytes, mtime_ns } = open.identity;
        let row = VerifiedFile {
            file_id,
            size: size_bytes,
            mtime_ns: i128::from(mtime_ns),
            when_ms: jiff::Timestamp::now().as_millisecond(),
        };
        // Not remembered means digested again after a restart, nothing worse.
        if let Err(error) = self.kv.set_verified(&tier.id(), &state.pack, &row) {
            tracing::warn!(pack = %state.pack, %error, "cannot remember that an object was verified");
        }
    }

    /// Closes a file that is no good (damaged, or its reads fail), if it still is the one that is open.
    pub(super) fn forget(&self, state: &PackState, open: &Arc<OpenPack>) {
        let mut slot = state.open.write();
        if slot.as_ref().is_some_and(|there| Arc::ptr_eq(there, open)) {
            *slot = None;
            self.open_files.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Lets the next read look again whether the tier has the pack.
    pub(super) fn expect_present(&self, state: &PackState) {
        state.absent_until_ms.store(0, Ordering::Relaxed);
    }

    fn open_states(&self) -> Vec<Arc<PackState>> {
        let mut open = Vec::new();
        for shard in &self.shards {
            let states: Vec<_> = shard.lock().values().cloned().collect();
            open.extend(states.into_iter().filter(|state| state.open.read().is_some()));
        }
        open
    }

    /// Closes the file of a pack that no mount has any more.
    pub(super) fn close(&self, pack: &PackId) {
        let state = self.shard(pack).lock().get(pack).cloned();
        let closed = state.and_then(|state| state.open.write().take());
        if closed.is_some() {
            self.open_files.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Closes the files that nobody used for [`IDLE_MS`], and those of evicted packs that nobody used
    /// since the last call: an open file holds its space. `now_ms` as of [`Packs::now_ms`].
    pub(super) fn close_idle(&self, now_ms: u64) {
        let (last, long_ago) = self.note_look(now_ms);
        for state in self.open_states() {
            let used = state.used.load(Ordering::Relaxed);
            let open = state.open.read().clone();
            if let Some(open) = open.filter(|open| used < long_ago || (used < last && is_deleted(&open.file))) {
                self.forget(&state, &open);
            }
        }
    }

    /// Gives the ticks of the last look and of one that is long ago; 0: there was none.
    fn note_look(&self, now_ms: u64) -> (u64, u64) {
        let tick = self.tick.fetch_add(1, Ordering::Relaxed);
        let mut looks = self.looks.lock();
        let is_long_ago = |look: Option<&(u64, u64)>| look.is_some_and(|(at, _)| now_ms.saturating_sub(*at) >= IDLE_MS);
        while is_long_ago(looks.get(1)) {
            looks.pop_front();
        }
        let last = looks.back().map_or(0, |(_, tick)| *tick);
        let long_ago = looks.front().filter(|look| is_long_ago(Some(look))).map_or(0, |(_, tick)| *tick);
        looks.push_back((now_ms, tick));
        (last, long_ago)
    }

    /// Closes the files used longest ago until the bound holds. A sixteenth goes at once, so that the
    /// search is rare.
    fn close_unused(&self) {
        if self.open_files() <= self.open_files_max {
            return;
        }
        let mut open = self.open_states();
        open.sort_unstable_by_key(|state| state.used.load(Ordering::Relaxed));
        let keep = self.open_files_max - self.open_files_max / 16;
        let close = open.len().saturating_sub(keep);
        for state in open.iter().take(close) {
            let closed = state.open.write().take();
            if closed.is_some() {
                self.open_files.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// Says whether the file was deleted since it was opened, or its server does not know it any more.
fn is_deleted(file: &File) -> bool {
    file.metadata().map_or(true, |meta| meta.nlink() == 0)
}

impl PackState {
    /// Takes the pack's contents from its index.
    pub(super) fn know_contents(&self, index: &PackIndex) {
        self.contents.get_or_init(|| Contents::of(index));
    }

    pub(super) fn knows_contents(&self) -> bool {
        self.contents.get().is_some()
    }

    /// Says whether the pack is known to have this content at this place. The index of a pack that is
    /// one whole content follows from the reference itself, and the pack's id proves it.
    pub(super) fn has(&self, c: &ContentRef) -> bool {
        if let (None, Location::Run { offset: 0, .. }) = (self.contents.get(), &c.location) {
            let place = Place::Run { offset: 0 };
            let only = PackedContent { content: c.content, size: c.size, place };
            let index = PackIndex { len: c.size, contents: vec![only] };
            if index.id() == self.pack {
                self.know_contents(&index);
            }
        }
        self.contents.get().is_some_and(|contents| contents.has(c))
    }

    /// Takes bytes from what readers may ask by themselves. False: that is used up.
    pub(super) fn take_ahead(&self, bytes: u64, bytes_max: u64) -> bool {
        let add = |used: u64| (used + bytes <= bytes_max).then_some(used + bytes);
        self.ahead_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
    }

    /// Notes where a reader waits.
    pub(super) fn want(&self, offset: u64) {
        self.wanted.store(offset.saturating_add(1), Ordering::Relaxed);
    }

    /// Gives where a reader waited last.
    pub(super) fn wanted_at(&self) -> Option<u64> {
        self.wanted.load(Ordering::Relaxed).checked_sub(1)
    }

    pub(super) fn filling(&self) -> Option<Arc<FillState>> {
        self.fill.read().clone()
    }
}

/// Makes room in a shard: half of the packs that nobody holds and that have no open file.
fn drop_unused(shard: &mut HashMap<PackId, Arc<PackState>>) {
    let unused = |state: &Arc<PackState>| {
        Arc::strong_count(state) == 1 && state.open.read().is_none() && state.fill.read().is_none()
    };
    let mut used: Vec<u64> = shard.values().filter(|s| unused(s)).map(|s| s.used.load(Ordering::Relaxed)).collect();
    used.sort_unstable();
    let Some(&middle) = used.get(used.len() / 2) else {
        return;
    };
    shard.retain(|_, state| !unused(state) || state.used.load(Ordering::Relaxed) > middle);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packs() -> (Packs, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("a directory");
        (Packs::new(None, Kv::in_memory(), Arc::default(), 8, 0), dir)
    }

    fn opened(packs: &Packs, dir: &tempfile::TempDir, number: u8) -> (Arc<PackState>, std::path::PathBuf) {
        let path = dir.path().join(number.to_string());
        std::fs::write(&path, b"bytes").expect("written");
        let state = packs.state(&PackId([number; 32]));
        packs.install(
            &state,
            File::open(&path).expect("opens"),
            5,
            FileIdentity { file_id: 1, size_bytes: 5, mtime_ns: 0 },
        );
        (state, path)
    }

    fn is_open(state: &PackState) -> bool {
        state.open.read().is_some()
    }

    fn use_now(packs: &Packs, state: &PackState) {
        state.used.store(packs.tick.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
    }

    #[test]
    fn the_file_of_an_evicted_pack_is_closed_when_nobody_uses_it() {
        let (packs, dir) = packs();
        let ((gone, path), (there, _)) = (opened(&packs, &dir, 1), opened(&packs, &dir, 2));
        packs.close_idle(0);
        std::fs::remove_file(path).expect("evicted");
        use_now(&packs, &gone);
        packs.close_idle(1);
        assert!(is_open(&gone), "somebody reads it");
        packs.close_idle(2);
        assert!(!is_open(&gone) && is_open(&there));
        assert_eq!(packs.open_files(), 1);
    }

    #[test]
    fn a_file_that_nobody_used_for_long_is_closed() {
        let (packs, dir) = packs();
        let ((idle, _), (busy, _)) = (opened(&packs, &dir, 1), opened(&packs, &dir, 2));
        for at in [0, IDLE_MS / 2, IDLE_MS - 1] {
            packs.close_idle(at);
            assert!(is_open(&idle));
            use_now(&packs, &busy);
        }
        packs.close_idle(IDLE_MS);
        assert!(!is_open(&idle) && is_open(&busy));
    }

    #[test]
    fn a_unit_map_knows_exactly_what_was_set() {
        let map = UnitMap::new(100 << 20);
        for offset in [0, 4096, 64 * 4096, 16 << 20, (100 << 20) - 4096] {
            assert!(!map.has(offset));
            map.set(offset);
            assert!(map.has(offset));
        }
        assert!(!map.has(8192));
        map.set(500 << 20);
        assert!(!map.has(500 << 20), "behind the end there is nothing");
    }
}
