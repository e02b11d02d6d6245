//! Which lake errors pass, and how long to wait before the next try.
//!
//! The SDK below the lake retries each request a few times within seconds. This policy sits on top
//! of it, for work that should outlive a longer outage: bounded in total time, with waits that grow
//! and are spread over their whole range, so that a thousand nodes do not come back at once.
//! [`Retry`] is pure: the caller says how much time went by and gives the random number.

use std::time::{Duration, Instant};

use super::LakeError;

/// How patient to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The first wait is at most this.
    pub first_wait: Duration,
    /// A wait doubles up to this.
    pub wait_max: Duration,
    /// No new try begins later than this after the first.
    pub total_max: Duration,
}

impl Default for RetryPolicy {
    /// Waits from 100 ms up to 5 s, half a minute in all: longer than a store's hiccup, shorter than
    /// the patience of whoever waits at a terminal.
    fn default() -> Self {
        Self {
            first_wait: Duration::from_millis(100),
            wait_max: Duration::from_secs(5),
            total_max: Duration::from_secs(30),
        }
    }
}

impl RetryPolicy {
    /// Makes a policy that never tries again.
    pub fn never() -> Self {
        Self { first_wait: Duration::ZERO, wait_max: Duration::ZERO, total_max: Duration::ZERO }
    }
}

/// What to do after a failed try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Wait so long, then try again.
    After(Duration),
    /// Give the error to whoever asked.
    GiveUp,
}

/// The tries of one piece of work.
#[derive(Debug, Clone)]
pub struct Retry {
    policy: RetryPolicy,
    failures: u32,
}

impl Retry {
    /// Begins with no failure.
    pub fn new(policy: RetryPolicy) -> Self {
        Self { policy, failures: 0 }
    }

    /// Counts how often it failed so far.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Forgets the failures: there was progress (a broken body brought some bytes).
    pub fn progressed(&mut self) {
        self.failures = 0;
    }

    /// Decides after a failure; `elapsed` since the first try, `random` in 0.0..1.0.
    pub fn failed(&mut self, error: &LakeError, elapsed: Duration, random: f64) -> Verdict {
        self.failures = self.failures.saturating_add(1);
        if !error.is_passing() {
            return Verdict::GiveUp;
        }
        let doublings = (self.failures - 1).min(20);
        let ceiling = self.policy.first_wait.saturating_mul(1 << doublings).min(self.policy.wait_max);
        // At least a tenth, so that a run of small random numbers does not hammer a store.
        let wait = ceiling.mul_f64(0.1 + 0.9 * random.clamp(0.0, 1.0));
        if elapsed + wait > self.policy.total_max || self.policy.total_max.is_zero() {
            return Verdict::GiveUp;
        }
        Verdict::After(wait)
    }
}

/// Runs `work` until it succeeds, fails permanently, or the policy's patience ends.
pub async fn with_retry<T, F, W>(policy: &RetryPolicy, mut work: W) -> Result<T, LakeError>
where
    W: FnMut() -> F,
    F: Future<Output = Result<T, LakeError>>,
{
    let begun = Instant::now();
    let mut retry = Retry::new(policy.clone());
    loop {
        let error = match work().await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        match retry.failed(&error, begun.elapsed(), rand::random()) {
            Verdict::After(wait) => tokio::time::sleep(wait).await,
            Verdict::GiveUp => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passing() -> LakeError {
        LakeError::Passing { key: "k".into(), source: "busy".into() }
    }

    #[test]
    fn waits_grow_to_the_maximum_and_are_spread() {
        let mut retry = Retry::new(RetryPolicy::default());
        let mut last = Vec::new();
        for _ in 0..8 {
            let mut other = retry.clone();
            let Verdict::After(long) = retry.failed(&passing(), Duration::ZERO, 1.0) else { panic!("gave up") };
            let Verdict::After(short) = other.failed(&passing(), Duration::ZERO, 0.0) else { panic!("gave up") };
            assert!(short < long && short > Duration::ZERO);
            last.push(long.as_millis());
        }
        assert_eq!(last, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    }

    #[test]
    fn permanent_errors_and_spent_patience_give_up() {
        let mut retry = Retry::new(RetryPolicy::default());
        let missing = LakeError::NotFound { key: "k".into() };
        assert_eq!(retry.failed(&missing, Duration::ZERO, 0.5), Verdict::GiveUp);
        assert_eq!(retry.failed(&passing(), Duration::from_secs(60), 0.5), Verdict::GiveUp);
        assert_eq!(Retry::new(RetryPolicy::never()).failed(&passing(), Duration::ZERO, 0.0), Verdict::GiveUp);
    }

    #[tokio::test]
    async fn work_is_repeated_until_it_succeeds() {
        let policy = RetryPolicy { first_wait: Duration::from_millis(1), ..RetryPolicy::default() };
        let mut tries = 0;
        let done = with_retry(&policy, || {
            tries += 1;
            let result = if tries < 3 { Err(passing()) } else { Ok(tries) };
            async move { result }
        });
        assert_eq!(done.await.unwrap(), 3);
    }
}
