//! How long things took, counted in buckets: for metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets, in milliseconds: from a local answer to what is given up.
const BOUNDS_MS: [u64; 14] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000];

/// Times that were measured. May be noted from many threads at once.
#[derive(Debug, Default)]
pub struct Histogram {
    counts: [AtomicU64; BOUNDS_MS.len()],
    /// Longer than the last bound.
    longer: AtomicU64,
    sum_us: AtomicU64,
}

/// What a histogram held at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Times {
    /// Upper bound in seconds, and how many took so long at most.
    pub buckets: Vec<(f64, u64)>,
    pub count: u64,
    pub sum_seconds: f64,
}

impl Histogram {
    /// Notes a time.
    pub fn note(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let fits = BOUNDS_MS.iter().position(|bound| us <= bound * 1000);
        let count = fits.and_then(|at| self.counts.get(at)).unwrap_or(&self.longer);
        count.fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// Gives what was noted so far.
    pub fn times(&self) -> Times {
        let mut count = 0;
        let buckets = BOUNDS_MS.iter().zip(&self.counts).map(|(bound_ms, counted)| {
            count += counted.load(Ordering::Relaxed);
            (*bound_ms as f64 / 1000.0, count)
        });
        let buckets = buckets.collect();
        count += self.longer.load(Ordering::Relaxed);
        Times { buckets, count, sum_seconds: self.sum_us.load(Ordering::Relaxed) as f64 / 1e6 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_counts_in_its_bucket_and_all_above() {
        let histogram = Histogram::default();
        for ms in [1, 3, 3, 60_000] {
            histogram.note(Duration::from_millis(ms));
        }
        let times = histogram.times();
        assert_eq!((times.count, times.sum_seconds), (4, 60.007));
        let below = |seconds: f64| times.buckets.iter().find(|(bound, _)| *bound == seconds).map(|(_, count)| *count);
        assert_eq!((below(0.001), below(0.002), below(0.005), below(30.0)), (Some(1), Some(1), Some(3), Some(3)));
    }
}
