//! Evictions that free nothing: server snapshots may hold the space of what is deleted. A steward that did
//! not notice would empty the tier for nothing.
//!
//! Looking at the free space right after a deletion is not enough to tell: servers free later, other nodes
//! write at the same time, and a reader may still have a file open. So a deletion that frees too little is
//! only *suspected*: what the tier takes and what the file system has free are noted, as a sum. Files that
//! come and go in the tier do not change that sum. Each sweep looks at it again: once it has back what was
//! deleted, nothing is wrong; if it still lacks it after four grace times, something else holds it, and
//! evictions for room rest for an hour. Meanwhile they rest where the file system is the limit: there each
//! one would make the next one necessary.

use serde::{Deserialize, Serialize};

use crate::store::tier::Core;
use crate::store::tier::error::TierError;
use crate::store::tier::io::TierIo;
use crate::store::tier::layout;
use crate::store::tier::scan::{Scan, signed};

/// Deleting less says nothing about whether deletions free anything.
const STALL_BYTES_MIN: u64 = 64 << 20;
/// A suspicion is believed after so many grace times: nodes keep files of evicted packs open for five minutes.
const GRACES: u64 = 4;
/// For so long evictions rest once they are known to free nothing.
const REST_MS: u64 = 3_600_000;

/// Whether evictions free anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stall {
    #[default]
    No,
    /// A deletion freed too little; too early to tell.
    Suspected,
    /// They freed nothing within the last hour.
    Found,
}

/// A deletion that freed too little.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Suspicion {
    format: u32,
    /// Taken by the tier and free on the file system, together, before.
    sum_bytes: u64,
    deleted_bytes: u64,
}

impl Suspicion {
    /// Says whether what was deleted is still not free. Others that write to the file system make the
    /// sum smaller too; that they write just as much is not likely.
    fn is_missing(&self, sum_bytes: u64) -> bool {
        self.sum_bytes.saturating_sub(sum_bytes) >= self.deleted_bytes / 10 * 9
    }
}

/// The sum before a deletion: free space is measured *after* the scan, so that what arrives in between makes
/// it smaller and nothing is suspected for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Before {
    free_bytes: u64,
    sum_bytes: u64,
}

impl<I: TierIo> Core<I> {
    pub(super) fn before_deleting(&self, scan: &Scan) -> Option<Before> {
        let free_bytes = self.io.space().ok()?.free_bytes;
        Some(Before { free_bytes, sum_bytes: scan.on_medium_bytes() + free_bytes })
    }

    /// Notes a deletion that freed too little, for the sweeps to come; one that freed enough ends the rest.
    pub(super) fn note_deleted(&self, before: Before, deleted_bytes: u64) -> Result<(), TierError> {
        let Ok(space) = self.io.space() else {
            return Ok(());
        };
        if deleted_bytes < STALL_BYTES_MIN {
            return Ok(());
        }
        if space.free_bytes.saturating_sub(before.free_bytes) >= deleted_bytes / 10 {
            self.remove(layout::SUSPICION)?;
            return self.remove(layout::STALL).map(drop);
        }
        if self.look(layout::SUSPICION)?.is_some() {
            return Ok(());
        }
        let suspicion = Suspicion { format: 1, sum_bytes: before.sum_bytes, deleted_bytes };
        self.replace(layout::SUSPICION, &serde_json::to_vec(&suspicion).expect("plain fields"))
    }

    /// Gives what is known now.
    pub(super) fn stall(&self, now_ms: i64) -> Result<Stall, TierError> {
        let rests = self.look(layout::STALL)?.is_some_and(|stat| now_ms - stat.mtime_ms() <= signed(REST_MS));
        Ok(match rests {
            true => Stall::Found,
            false if self.look(layout::SUSPICION)?.is_some() => Stall::Suspected,
            false => Stall::No,
        })
    }

    /// Looks whether a suspicion is right, and sets the scan's word for it. Gives the bytes that were
    /// deleted for nothing.
    pub(super) fn judge_suspicion(&self, scan: &mut Scan) -> Result<Option<u64>, TierError> {
        let Some(stat) = self.look(layout::SUSPICION)? else {
            return Ok(None);
        };
        // The scan measured the free space before it looked at files: what arrives meanwhile is in our favour.
        let sum_bytes = scan.on_medium_bytes() + scan.space.free_bytes;
        let suspicion = self.read_json::<Suspicion>(layout::SUSPICION)?;
        let missing = suspicion.filter(|suspicion| suspicion.is_missing(sum_bytes));
        if missing.is_some() && scan.now_ms - stat.mtime_ms() < signed(self.cfg.grace_ms * GRACES) {
            return Ok(None);
        }
        if missing.is_some() {
            self.replace(layout::STALL, b"{\"format\":1}")?;
        }
        self.remove(layout::SUSPICION)?;
        scan.stall = self.stall(scan.now_ms)?;
        Ok(missing.map(|suspicion| suspicion.deleted_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspicion_holds_only_if_the_deleted_bytes_are_missing() {
        let suspicion = Suspicion { format: 1, sum_bytes: 1000, deleted_bytes: 200 };
        assert!(suspicion.is_missing(800), "all of it is missing");
        assert!(suspicion.is_missing(820), "nearly all");
        assert!(!suspicion.is_missing(900), "half of it was freed late");
        assert!(!suspicion.is_missing(1000));
        assert!(!suspicion.is_missing(1500), "others made room");
    }
}
