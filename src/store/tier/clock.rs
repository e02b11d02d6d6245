//! The node's own clocks. Ages of what lies in the tier are never taken from them: those compare
//! modification times that the server gave.

use std::fmt;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Time of this node.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Milliseconds that only go forward, from any start.
    fn monotonic_ms(&self) -> u64;
    /// Unix time in milliseconds, for texts that people read.
    fn wall_ms(&self) -> i64;
}

/// The machine's clocks.
#[derive(Debug)]
pub struct RealClock {
    start: Instant,
}

impl Default for RealClock {
    fn default() -> Self {
        Self { start: Instant::now() }
    }
}

impl Clock for RealClock {
    fn monotonic_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn wall_ms(&self) -> i64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    }
}
