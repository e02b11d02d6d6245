//! Bytes from the lake: exactly the range that was asked, however often the body breaks.
//!
//! A body that breaks is asked again from the byte where it broke. Passing errors are tried again
//! after a jittered wait, permanent ones end the read at once. Three clocks: a body that brings
//! nothing for the stall time is broken; the whole read ends at its deadline; a body that is longer
//! or shorter than asked is broken too. Nothing here verifies: that is the caller's.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::time::{Instant, sleep, timeout_at};

use crate::format::tree::Pin;
use crate::store::lake::patience::within;
use crate::store::lake::retry::{Retry, RetryPolicy, Verdict};
use crate::store::lake::{Body, Lake, LakeError};

use super::stats::{Counters, SourceCounters, bump};

/// What is read: an object of our own, or a user's own pinned one.
#[derive(Debug, Clone)]
pub(super) enum Object {
    Own(Arc<str>),
    Pinned(Arc<Pin>),
}

impl Object {
    /// Names it, for messages.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Own(key) => key.to_string(),
            Self::Pinned(pin) => format!("s3://{}/{}", pin.bucket, pin.key),
        }
    }
}

/// Why a range was not read.
#[derive(Debug, Clone)]
pub(super) enum SourceError {
    /// Time ran out while errors were passing.
    Late { waited: Duration, source: Arc<LakeError> },
    /// Trying again does not help.
    Permanent(Arc<LakeError>),
}

/// Reads from the lake with patience.
#[derive(Debug, Clone)]
pub(super) struct LakeReader {
    pub lake: Arc<dyn Lake>,
    pub counters: Arc<Counters>,
    pub stall_timeout: Duration,
}

/// Which counter a request belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum For {
    Demand,
    Prefetch,
    Meta,
}

/// The largest first allocation for a body: more comes as bytes arrive.
const FIRST_ALLOCATION_MAX: u64 = 16 << 20;

impl LakeReader {
    fn source_counters(&self, what_for: For) -> &SourceCounters {
        match what_for {
            For::Demand => &self.counters.lake_demand,
            For::Prefetch => &self.counters.lake_prefetch,
            For::Meta => &self.counters.lake_meta,
        }
    }

    fn retries(&self) -> &AtomicU64 {
        &self.counters.retries
    }

    /// Reads exactly `range`, or fails by `deadline`.
    pub(super) async fn read(
        &self,
        object: &Object,
        range: Range<u64>,
        what_for: For,
        deadline: Instant,
    ) -> Result<Bytes, SourceError> {
        let begun = Instant::now();
        let want = range.end - range.start;
        let mut got = BytesMut::with_capacity(want.min(FIRST_ALLOCATION_MAX) as usize);
        let mut retry = Retry::new(self.patience(begun, deadline));
        loop {
            let before = got.len();
            let attempt = self.attempt(object, &range, &mut got, what_for);
            let error = match timeout_at(deadline, attempt).await {
                Ok(Ok(())) => return Ok(got.freeze()),
                Ok(Err(error)) => error,
                Err(_) => passing(object, "out of time"),
            };
            if got.len() > before {
                retry.progressed();
            }
            self.wait_or_give_up(&mut retry, error, begun).await?;
        }
    }

    /// Reads a whole object of at most `len_max` bytes, or fails by `deadline`.
    pub(super) async fn read_whole(
        &self,
        object: &Object,
        len_max: u64,
        what_for: For,
        deadline: Instant,
    ) -> Result<Bytes, SourceError> {
        let begun = Instant::now();
        let mut retry = Retry::new(self.patience(begun, deadline));
        loop {
            let attempt = self.attempt_whole(object, len_max, what_for);
            let error = match timeout_at(deadline, attempt).await {
                Ok(Ok(bytes)) => return Ok(bytes),
                Ok(Err(error)) => error,
                Err(_) => passing(object, "out of time"),
            };
            self.wait_or_give_up(&mut retry, error, begun).await?;
        }
    }

    fn patience(&self, begun: Instant, deadline: Instant) -> RetryPolicy {
        RetryPolicy {
            first_wait: Duration::from_millis(50),
            wait_max: Duration::from_secs(2),
            total_max: deadline.saturating_duration_since(begun),
        }
    }

    async fn wait_or_give_up(&self, retry: &mut Retry, error: LakeError, begun: Instant) -> Result<(), SourceError> {
        match retry.failed(&error, begun.elapsed(), rand::random()) {
            Verdict::After(wait) => {
                bump(self.retries());
                sleep(wait).await;
                Ok(())
            }
            Verdict::GiveUp if error.is_passing() => {
                Err(SourceError::Late { waited: begun.elapsed(), source: Arc::new(error) })
            }
            Verdict::GiveUp => Err(SourceError::Permanent(Arc::new(error))),
        }
    }

    async fn attempt_whole(&self, object: &Object, len_max: u64, what_for: For) -> Result<Bytes, LakeError> {
        let asked = async {
            match object {
                Object::Own(key) => self.lake.get(key, None).await,
                Object::Pinned(pin) => self.lake.get_pinned(pin, None).await,
            }
        };
        let asked = within(self.stall_timeout, asked).await.map_err(|_| passing(object, "no answer"))?;
        let Body { len, mut stream, .. } = asked.inspect_err(|_| self.source_counters(what_for).add(0))?;
        if len > len_max {
            return Err(LakeError::Permanent { key: object.name(), source: "the object is too large".into() });
        }
        let mut got = BytesMut::with_capacity(len.min(FIRST_ALLOCATION_MAX) as usize);
        while let Some(chunk) =
            within(self.stall_timeout, stream.next()).await.map_err(|_| passing(object, "the body stalled"))?
        {
            got.extend_from_slice(&chunk?);
            if got.len() as u64 > len {
                break;
            }
        }
        self.source_counters(what_for).add(got.len() as u64);
        match got.len() as u64 == len {
            true => Ok(got.freeze()),
            false => Err(passing(object, "the body has another length than announced")),
        }
    }

    /// Goes on from where `got` ends.
    async fn attempt(
        &self,
        object: &Object,
        range: &Range<u64>,
        got: &mut BytesMut,
        what_for: For,
    ) -> Result<(), LakeError> {
        let want = range.end - range.start;
        let rest = range.start + got.len() as u64..range.end;
        if rest.is_empty() {
            return Ok(());
        }
        let expected = rest.end - rest.start;
        let counters = self.source_counters(what_for);
        let asked = async {
            match object {
                Object::Own(key) => self.lake.get(key, Some(rest)).await,
                Object::Pinned(pin) => self.lake.get_pinned(pin, Some(rest)).await,
            }
        };
        let asked = within(self.stall_timeout, asked).await.map_err(|_| passing(object, "no answer"))?;
        let Body { len, mut stream, .. } = asked.inspect_err(|_| counters.add(0))?;
        if len != expected {
            counters.add(0);
            return Err(passing(object, "the answer has another length than was asked"));
        }
        let before = got.len();
        let result = loop {
            match within(self.stall_timeout, stream.next()).await {
                Err(_) => break Err(passing(object, "the body stalled")),
                Ok(None) if got.len() as u64 == want => break Ok(()),
                Ok(None) => break Err(passing(object, "the body ended too early")),
                Ok(Some(Err(error))) => break Err(error),
                Ok(Some(Ok(chunk))) if (got.len() + chunk.len()) as u64 > want => {
                    // Which of its bytes are wrong cannot be known: none of this answer is kept.
                    got.truncate(before);
                    break Err(passing(object, "the body is longer than announced"));
                }
                Ok(Some(Ok(chunk))) => got.extend_from_slice(&chunk),
            }
        };
        counters.add((got.len() - before) as u64);
        result
    }
}

fn passing(object: &Object, why: &'static str) -> LakeError {
    LakeError::Passing { key: object.name(), source: why.into() }
}
