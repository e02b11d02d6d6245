//! Requests to the API server: how many at a time, how long each may take, how many there were.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long one may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    Bind,
    Evict,
    Get,
    Tell,
    Lease,
}

impl Verb {
    /// Gives its name in the metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Evict => "evict",
            Self::Get => "get",
            Self::Tell => "tell",
            Self::Lease => "lease",
        }
    }
}

/// Counts requests by what they are for and the status of the answer; 0: there was none.
#[derive(Debug, Default)]
pub struct Requests {
    counts: Mutex<BTreeMap<(Verb, u16), u64>>,
}

impl Requests {
    /// Sends one and waits for its answer, as long as it may take.
    pub async fn send<T>(
        &self,
        verb: Verb,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, kube::Error> {
        let answer = match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
            Ok(answer) => answer,
            Err(late) => Err(kube::Error::Service(Box::new(late))),
        };
        let code = match &answer {
            Ok(_) => 200,
            Err(error) => code(error),
        };
        let mut counts = self.counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *counts.entry((verb, code)).or_default() += 1;
        answer
    }

    /// Gives how many there were.
    pub fn counts(&self) -> BTreeMap<(Verb, u16), u64> {
        self.counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

/// Gives the status of an answer; 0 where there was none.
pub fn code(error: &kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        _ => 0,
    }
}

/// Lets so many requests through in a second, and some at once.
#[derive(Debug)]
pub struct Throttle {
    per_second: f64,
    burst: f64,
    /// Requests that may be sent at once, and when that was so. Below 0: those that wait have been promised.
    state: Mutex<(f64, Instant)>,
}

impl Throttle {
    /// Makes one that is full.
    pub fn new(per_second: f64, burst: f64) -> Self {
        Self { per_second, burst, state: Mutex::new((burst, Instant::now())) }
    }

    /// Waits for one's turn; turns are in the order of the calls.
    pub async fn take(&self) {
        let wait = self.promise(Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    fn promise(&self, now: Instant) -> Duration {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (tokens, since) = *state;
        let filled = tokens + now.saturating_duration_since(since).as_secs_f64() * self.per_second;
        let left = filled.min(self.burst) - 1.0;
        *state = (left, now);
        Duration::try_from_secs_f64((-left / self.per_second).max(0.0)).unwrap_or(REQUEST_TIMEOUT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_throttle_lets_a_burst_through_and_then_the_rate() {
        let throttle = Throttle::new(10.0, 3.0);
        let begun = Instant::now();
        let waits: Vec<u128> = (0..5).map(|_| throttle.promise(begun).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100, 200]);
        let later = begun + Duration::from_secs(100);
        let waits: Vec<u128> = (0..4).map(|_| throttle.promise(later).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100], "time that went by counts up to the burst");
    }
}
