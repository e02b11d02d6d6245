//! Scrubbing: every object of a tier is read and digested again, round and round, at a bounded rate.
//!
//! What was damaged on the tier after it was published is found within a round, set aside and fetched
//! again when it is read. All nodes of a tier move one cursor on, so a round takes the shorter the
//! more nodes there are. One thread for each tier; it has no state that matters, and ends with the
//! process.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::format::ids::PackId;
use crate::store::tier::{ScrubOutcome, Tier};

/// How long after its start a daemon begins: short-lived ones leave the tier alone.
const BEGIN_DELAY: Duration = Duration::from_secs(60);
/// A round that this process saw begin is not begun again earlier, however small the tier is.
const ROUND_MIN: Duration = Duration::from_secs(24 * 3600);
/// How long is waited where there is nothing to do, or the tier fails.
const IDLE_DELAY: Duration = Duration::from_secs(60);

/// Decides when a new round may begin.
#[derive(Debug, Default)]
struct Rounds {
    last: Option<PackId>,
    begun: Option<Instant>,
}

impl Rounds {
    /// Gives how long to wait before this object is scrubbed.
    fn wait_before(&mut self, next: PackId, now: Instant) -> Duration {
        let wraps = self.last.is_none_or(|last| next <= last);
        self.last = Some(next);
        if !wraps {
            return Duration::ZERO;
        }
        let due = self.begun.map_or(now, |begun| begun + ROUND_MIN);
        self.begun = Some(due.max(now));
        due.saturating_duration_since(now)
    }
}

/// Starts the thread of a tier; a rate of 0 is none.
pub(super) fn start(tier: Tier, name: String, rate_bytes_per_s: u64, stop: CancellationToken) {
    if rate_bytes_per_s == 0 {
        return;
    }
    let thread = std::thread::Builder::new().name("larder-scrub".to_owned());
    let started = thread.spawn(move || run(&tier, &name, rate_bytes_per_s, &stop));
    if let Err(error) = started {
        tracing::warn!(%error, "nothing is scrubbed");
    }
}

fn run(tier: &Tier, name: &str, rate: u64, stop: &CancellationToken) {
    let mut rounds = Rounds::default();
    pause(BEGIN_DELAY, stop);
    while !stop.is_cancelled() {
        let next = match tier.next_scrub() {
            Ok(Some(next)) => next,
            Ok(None) => {
                pause(IDLE_DELAY, stop);
                continue;
            }
            Err(error) => {
                tracing::debug!(%error, tier = name, "nothing to scrub now");
                pause(IDLE_DELAY, stop);
                continue;
            }
        };
        pause(rounds.wait_before(next, Instant::now()), stop);
        if stop.is_cancelled() {
            return;
        }
        scrub_one(tier, name, next, rate);
    }
}

fn scrub_one(tier: &Tier, name: &str, pack: PackId, rate: u64) {
    let begun = Instant::now();
    let mut read_bytes = 0_u64;
    let mut pace = |bytes: u64| {
        read_bytes = read_bytes.saturating_add(bytes);
        let due = Duration::from_secs_f64(read_bytes as f64 / rate as f64);
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
    };
    match tier.scrub(&pack, &mut pace) {
        Ok(report) => match report.outcome {
            ScrubOutcome::Damaged { .. } | ScrubOutcome::WrongSize { .. } => {
                tracing::error!(%pack, tier = name, ?report, "damaged on the tier: set aside");
            }
            ScrubOutcome::NoIndex => {
                tracing::warn!(%pack, tier = name, "cannot be checked: its index is gone");
            }
            ScrubOutcome::Good | ScrubOutcome::Unproven { .. } | ScrubOutcome::Gone => {
                tracing::debug!(%pack, tier = name, ?report, "scrubbed");
            }
        },
        Err(error) => {
            tracing::warn!(%error, %pack, tier = name, "could not be scrubbed");
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

/// Sleeps, but not past the daemon's end.
fn pause(time: Duration, stop: &CancellationToken) {
    let until = Instant::now() + time;
    while !stop.is_cancelled() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(Duration::from_millis(500)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_begins_at_once_the_first_time_and_then_once_a_day() {
        let now = Instant::now();
        let mut rounds = Rounds::default();
        let (a, b) = (PackId([1; 32]), PackId([2; 32]));
        assert_eq!(rounds.wait_before(a, now), Duration::ZERO);
        assert_eq!(rounds.wait_before(b, now), Duration::ZERO);
        assert_eq!(rounds.wait_before(a, now), ROUND_MIN, "the second round");
        assert_eq!(rounds.wait_before(b, now + ROUND_MIN), Duration::ZERO);
        let late = now + ROUND_MIN * 3;
        assert_eq!(rounds.wait_before(b, late), Duration::ZERO, "overdue");
    }
}
