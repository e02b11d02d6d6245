//! Evictions that free nothing: server snapshots may hold the space of what is deleted. A steward that did
//! not notice would empty the tier for nothing.
//!
//! Looking at the free space right after a deletion is not enough to tell: servers free later, other nodes
//! write at the same time, and a reader may still have a file open. So a deletion that frees too little is
//! only *suspected*: what the tier takes and what the file system has free are noted, as a sum. Files that
//! come and go in the tier do not change that sum. Each sweep looks at it again: once it has back what was
//! deleted, nothing is wrong; if it still lacks it after `space_wait`, something else holds it, and
//! evictions for room rest for an hour. Meanwhile they rest where the file system is the limit: there each
//! one would make the next one necessary.
//!
//! Others that write to the same file system make the sum smaller as well. So only a deletion counts that is
//! large beside the file system: where it is the limit, evicting deletes a tenth of it.

use serde::{Deserialize, Serialize};

use crate::store::tier::Core;
use crate::store::tier::error::TierError;
use crate::store::tier::io::TierIo;
use crate::store::tier::layout;
use crate::store::tier::scan::{Scan, signed};

/// Deleting less than this, or than a hundredth of the file system, says nothing.
const DELETED_BYTES_MIN: u64 = 64 << 20;
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
pub(super) struct Suspicion {
    pub format: u32,
    /// Taken by the tier and free on the file system, together, before.
    pub sum_bytes: u64,
    pub deleted_bytes: u64,
}

impl Suspicion {
    /// Says whether what was deleted is still not free. Others that write to the file system make the
    /// sum smaller too; that they write just as much is not likely.
    fn is_missing(&self, sum_bytes: u64) -> bool {
        self.sum_bytes.saturating_sub(sum_bytes) >= self.deleted_bytes / 10 * 9
    }
}

/// What a steward could not write down, because the medium is full.
#[derive(Debug, Default)]
pub(super) struct Unwritten {
    suspicion: Option<(i64, Suspicion)>,
    found_ms: Option<i64>,
}

impl<I: TierIo> Core<I> {
    /// Adds what the tier takes and what is free. To be called after the scan: what arrives in between makes
    /// the sum smaller, and nothing is suspected for it.
    pub(super) fn sum_bytes(&self, scan: &Scan) -> Option<u64> {
        Some(scan.on_medium_bytes().saturating_add(self.io.space().ok()?.free_bytes))
    }

    /// Measures what is free, for [`Core::note_deleted`].
    pub(super) fn free_bytes(&self) -> Option<u64> {
        Some(self.io.space().ok()?.free_bytes)
    }

    /// Notes a deletion that freed too little, for the sweeps to come; one that freed enough ends the rest.
    /// `free_bytes` is from right before it.
    pub(super) fn note_deleted(
        &self,
        now_ms: i64,
        sum_bytes: u64,
        free_bytes: u64,
        deleted_bytes: u64,
    ) -> Result<(), TierError> {
        let Some(space) = self.io.space().ok() else {
            return Ok(());
        };
        if deleted_bytes < DELETED_BYTES_MIN.max(space.total_bytes / 100) {
            return Ok(());
        }
        if space.free_bytes.saturating_sub(free_bytes) >= deleted_bytes / 10 {
            self.state.lock().stall = Unwritten::default();
            self.remove(layout::SUSPICION)?;
            return self.remove(layout::STALL).map(drop);
        }
        if self.look(layout::SUSPICION)?.is_some() || self.state.lock().stall.suspicion.is_some() {
            return Ok(());
        }
        let suspicion = Suspicion { format: 1, sum_bytes, deleted_bytes };
        let written = self.replace(layout::SUSPICION, &serde_json::to_vec(&suspicion).expect("plain fields"));
        self.or_remember(written, |unwritten| unwritten.suspicion = Some((now_ms, suspicion)))
    }

    /// On a full medium nothing can be written down: this process remembers it then.
    fn or_remember(
        &self,
        written: Result<(), TierError>,
        remember: impl FnOnce(&mut Unwritten),
    ) -> Result<(), TierError> {
        match written {
            Err(error) if error.is_full() => {
                remember(&mut self.state.lock().stall);
                Ok(())
            }
            written => written,
        }
    }

    /// Gives what is known now.
    pub(super) fn stall(&self, now_ms: i64) -> Result<Stall, TierError> {
        let rests_since = |since_ms: i64| now_ms - since_ms <= signed(REST_MS);
        let (suspected, found_ms) = {
            let unwritten = &self.state.lock().stall;
            (unwritten.suspicion.is_some(), unwritten.found_ms)
        };
        let found = found_ms.is_some_and(rests_since)
            || self.look(layout::STALL)?.is_some_and(|stat| rests_since(stat.mtime_ms()));
        Ok(match found {
            true => Stall::Found,
            false if suspected || self.look(layout::SUSPICION)?.is_some() => Stall::Suspected,
            false => Stall::No,
        })
    }

    /// Looks whether a suspicion is right, and sets the scan's word for it. Gives the bytes that were
    /// deleted for nothing.
    pub(super) fn judge_suspicion(&self, scan: &mut Scan) -> Result<Option<u64>, TierError> {
        let Some((since_ms, suspicion)) = self.suspicion()? else {
            return Ok(None);
        };
        // The scan measured the free space before it looked at files: what arrives meanwhile is in our favour.
        let sum_bytes = scan.on_medium_bytes().saturating_add(scan.space.free_bytes);
        let missing = suspicion.filter(|suspicion| suspicion.is_missing(sum_bytes));
        if missing.is_some() && scan.now_ms - since_ms < signed(self.cfg.space_wait_ms) {
            return Ok(None);
        }
        if missing.is_some() {
            let written = self.replace(layout::STALL, b"{\"format\":1}");
            self.or_remember(written, |unwritten| unwritten.found_ms = Some(scan.now_ms))?;
        }
        self.state.lock().stall.suspicion = None;
        self.remove(layout::SUSPICION)?;
        scan.stall = self.stall(scan.now_ms)?;
        Ok(missing.map(|suspicion| suspicion.deleted_bytes))
    }

    /// Gives the suspicion and since when it is there; none inside: nobody can read it.
    fn suspicion(&self) -> Result<Option<(i64, Option<Suspicion>)>, TierError> {
        if let Some((since_ms, suspicion)) = self.state.lock().stall.suspicion.clone() {
            return Ok(Some((since_ms, Some(suspicion))));
        }
        let Some(stat) = self.look(layout::SUSPICION)? else {
            return Ok(None);
        };
        match self.read_json(layout::SUSPICION) {
            Ok(suspicion) => Ok(Some((stat.mtime_ms(), suspicion))),
            Err(TierError::BadFile { .. }) => Ok(Some((stat.mtime_ms(), None))),
            Err(error) => Err(error),
        }
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
