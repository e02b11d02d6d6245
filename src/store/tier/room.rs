//! Room: nothing is begun that would not fit, and the steward is asked when it gets tight.
//!
//! The steward notes after each sweep what is taken (`steward/room`). Who begins a pack adds what this
//! process has begun since: above the high watermark it asks for a sweep, above a configured capacity
//! it is refused. The sums of several nodes may be off by what the others began since the last sweep.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::format::ids::PackId;
use crate::store::tier::error::TierError;
use crate::store::tier::io::TierIo;
use crate::store::tier::layout;
use crate::store::tier::plan::SweepPlan;
use crate::store::tier::scan::{Scan, StagingScan};
use crate::store::tier::{Core, Tier};

/// How long the note is believed without another look.
const BELIEVED_MS: u64 = 500;
/// What was begun is in the sums of the second note since.
const NOTES_MAX: u8 = 2;
/// The steward is not asked more often.
const ASK_PERIOD_MS: u64 = 2000;

/// What `steward/room` says.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct RoomNote {
    pub format: u32,
    /// Server's clock when the sweep looked.
    pub time_ms: i64,
    /// Without what leaves by itself (trash, orphans), with all of the packs below.
    pub taken_bytes: u64,
    /// Packs that are being staged.
    pub staged: BTreeSet<PackId>,
    pub capacity_bytes: u64,
    pub high_bytes: u64,
}

/// What this process knows of the room.
#[derive(Debug, Default)]
pub(super) struct Room {
    note: Option<RoomNote>,
    looked_ms: Option<u64>,
    asked_ms: Option<u64>,
    /// Packs begun lately.
    begun: BTreeMap<PackId, Begun>,
}

/// A pack that this process has begun.
#[derive(Debug, Clone, Copy)]
struct Begun {
    len_bytes: u64,
    /// How many notes have come since.
    notes: u8,
}

/// Whom to wake where room is wanted.
pub(super) struct Waker(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waker")
    }
}

/// Whether a pack may be begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fits {
    Well,
    /// It may, but it is time for a sweep.
    Tightly,
    Not,
}

impl RoomNote {
    fn fits(&self, begun_bytes: u64) -> Fits {
        match self.taken_bytes.saturating_add(begun_bytes) {
            taken if taken > self.capacity_bytes => Fits::Not,
            taken if taken > self.high_bytes => Fits::Tightly,
            _ => Fits::Well,
        }
    }
}

impl<I: TierIo> Tier<I> {
    /// Sets what is called when room is wanted: it should have the tier swept soon. Once per tier.
    pub fn on_room_wanted(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.core.waker.set(Waker(Box::new(wake)));
    }
}

impl<I: TierIo> Core<I> {
    /// Refuses to begin what cannot end: the file system, or the configured capacity, lacks the room.
    pub(super) fn check_room(&self, pack: &PackId, missing_bytes: u64) -> Result<(), TierError> {
        let space = self.io.space().ok();
        if space.is_some_and(|space| space.free_bytes < missing_bytes) || !self.fits(pack, missing_bytes) {
            self.want_room();
            let source = std::io::Error::from_raw_os_error(nix::libc::ENOSPC);
            return Err(TierError::io("stage", &layout::staging_dir(pack), source));
        }
        Ok(())
    }

    fn fits(&self, pack: &PackId, missing_bytes: u64) -> bool {
        let Some(capacity_bytes) = self.cfg.capacity_bytes.or(self.marker.capacity_bytes) else {
            return true;
        };
        self.look_for_room();
        let fits = {
            let mut state = self.state.lock();
            let room = &mut state.room;
            let others = room.begun.iter().filter(|(begun, _)| *begun != pack);
            let others = others.map(|(_, begun)| begun.len_bytes).sum::<u64>();
            let counted = room.note.as_ref().is_some_and(|note| note.staged.contains(pack));
            let more = if counted { others } else { others.saturating_add(missing_bytes) };
            let known = match &room.note {
                Some(note) => note.fits(more),
                None if more > capacity_bytes => Fits::Not,
                // Nobody has noted anything yet: it is time for the first sweep.
                None => Fits::Tightly,
            };
            if known != Fits::Not {
                let len_bytes = if counted { 0 } else { missing_bytes };
                room.begun.insert(*pack, Begun { len_bytes, notes: 0 });
            }
            known
        };
        if fits == Fits::Tightly {
            self.want_room();
        }
        fits != Fits::Not
    }

    /// Reads the steward's note, unless it was read just now.
    fn look_for_room(&self) {
        let now_ms = self.clock.monotonic_ms();
        let is_known = |at: u64| now_ms.saturating_sub(at) < BELIEVED_MS;
        if self.state.lock().room.looked_ms.is_some_and(is_known) {
            return;
        }
        let note = self.read_json::<RoomNote>(layout::ROOM).ok().flatten();
        let mut state = self.state.lock();
        state.room.looked_ms = Some(now_ms);
        if note != state.room.note {
            // The sweep that wrote it may have looked before a pack was begun; the next one has not.
            let staged = note.as_ref().map(|note| note.staged.clone()).unwrap_or_default();
            state.room.begun.retain(|pack, begun| {
                begun.notes += 1;
                begun.notes < NOTES_MAX && !staged.contains(pack)
            });
            state.room.note = note;
        }
    }

    fn want_room(&self) {
        let now_ms = self.clock.monotonic_ms();
        {
            let mut state = self.state.lock();
            if state.room.asked_ms.is_some_and(|at| now_ms.saturating_sub(at) < ASK_PERIOD_MS) {
                return;
            }
            state.room.asked_ms = Some(now_ms);
        }
        if let Some(waker) = self.waker.get() {
            (waker.0)();
        }
    }

    /// Notes what is taken after a sweep that moved these bytes of commits away.
    pub(super) fn note_room(&self, scan: &Scan, plan: &SweepPlan, evicted_bytes: u64) -> Result<(), TierError> {
        let Some(capacity_bytes) = self.cfg.capacity_bytes.or(self.marker.capacity_bytes) else {
            return Ok(());
        };
        let accepted = scan.staging.iter().filter(|staging| staging.accepted);
        let coming = accepted.clone().map(StagingScan::coming_bytes).sum::<u64>();
        let note = RoomNote {
            format: 1,
            time_ms: scan.now_ms,
            taken_bytes: plan.taken_bytes.saturating_sub(evicted_bytes).saturating_add(coming),
            staged: accepted.filter_map(|staging| staging.pack).collect(),
            capacity_bytes,
            high_bytes: plan.high_bytes,
        };
        self.replace(layout::ROOM, &serde_json::to_vec(&note).expect("plain fields"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_above_the_high_watermark_is_tight_and_above_the_capacity_does_not_fit() {
        let staged = BTreeSet::new();
        let note = RoomNote { format: 1, time_ms: 0, staged, taken_bytes: 50, capacity_bytes: 100, high_bytes: 90 };
        assert_eq!(note.fits(40), Fits::Well);
        assert_eq!(note.fits(41), Fits::Tightly);
        assert_eq!(note.fits(50), Fits::Tightly);
        assert_eq!(note.fits(51), Fits::Not);
    }
}
