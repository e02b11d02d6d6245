//! Which node brings which span of a pack that is being filled here: pure bookkeeping.
//!
//! A span is `Free` until somebody asks for it, then `Asking` while the tier is asked, then ours, another
//! node's, or done. What another node brings is asked for again when its claim could have run out.
//!
//! Lock: one, never held while anything else is called.

use std::ops::Range;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::port::SpanClaim;

/// Who brings a span, as far as this process knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SpanState {
    /// Nobody was asked.
    Free,
    /// The tier is being asked.
    Asking,
    /// We do. `driven`: the fill goes through it; else only a reader wanted a piece of it.
    Mine { driven: bool, taken_over: bool },
    /// We make it durable.
    Marking,
    /// Another node does. Not asked again before `until`.
    Theirs { peer: Option<String>, until: Instant },
    /// Marked: there, and durable.
    Done,
}

/// The spans of one pack.
#[derive(Debug)]
pub(super) struct Spans {
    len: u64,
    span_len: u64,
    /// Where this node begins, so that nodes that begin together do not ask for the same spans.
    first: usize,
    states: Mutex<Vec<SpanState>>,
}

impl Spans {
    pub(super) fn new(len: u64, span_len: u64, first_at: Option<u64>) -> Self {
        let span_len = span_len.max(1);
        let count = usize::try_from(len.div_ceil(span_len)).unwrap_or(usize::MAX);
        let first = match first_at {
            Some(at) => usize::try_from(at / span_len).unwrap_or(0),
            None => rand::random::<u32>() as usize,
        };
        Self { len, span_len, first: first % count.max(1), states: Mutex::new(vec![SpanState::Free; count]) }
    }

    pub(super) fn count(&self) -> u64 {
        self.len.div_ceil(self.span_len)
    }

    /// Gives the span in which an offset lies.
    pub(super) fn of(&self, offset: u64) -> u64 {
        offset / self.span_len
    }

    pub(super) fn range(&self, span: u64) -> Range<u64> {
        let start = span.saturating_mul(self.span_len).min(self.len);
        start..start.saturating_add(self.span_len).min(self.len)
    }

    pub(super) fn state(&self, span: u64) -> SpanState {
        self.states.lock().get(span as usize).cloned().unwrap_or(SpanState::Done)
    }

    fn set(&self, span: u64, state: SpanState) {
        if let Some(slot) = self.states.lock().get_mut(span as usize) {
            *slot = state;
        }
    }

    /// Gives the next span that the fill should go through: first what readers asked for, then what is
    /// free, then what another node may have let go. It is `Asking`, or ours and driven, afterwards.
    pub(super) fn next(&self, now: Instant) -> Option<u64> {
        let mut states = self.states.lock();
        let count = states.len();
        let order = || (0..count).map(|step| (self.first + step) % count);
        let ours = order().find(|i| matches!(states.get(*i), Some(SpanState::Mine { driven: false, .. })));
        let free = || order().find(|i| states.get(*i).is_some_and(|state| is_askable(state, now)));
        let index = ours.or_else(free)?;
        let slot = states.get_mut(index)?;
        *slot = match slot {
            SpanState::Mine { taken_over, .. } => SpanState::Mine { driven: true, taken_over: *taken_over },
            _ => SpanState::Asking,
        };
        Some(index as u64)
    }

    /// Begins to ask for a span. False: there is no reason to.
    pub(super) fn begin_asking(&self, span: u64, now: Instant) -> bool {
        let mut states = self.states.lock();
        match states.get_mut(span as usize) {
            Some(slot) if is_askable(slot, now) => {
                *slot = SpanState::Asking;
                true
            }
            _ => false,
        }
    }

    /// Notes what the tier answered.
    pub(super) fn answered(&self, span: u64, claim: SpanClaim, driven: bool, now: Instant) {
        let state = match claim {
            SpanClaim::Mine { taken_over } => SpanState::Mine { driven, taken_over },
            // The caller counts its pieces in by `take_marks`.
            SpanClaim::Done => SpanState::Free,
            SpanClaim::Other { peer, left, .. } => {
                // Not at once again, and not before it can have run out.
                let until = now + left.max(Duration::from_millis(100));
                SpanState::Theirs { peer, until }
            }
        };
        self.set(span, state);
    }

    /// The tier did not answer.
    pub(super) fn unanswered(&self, span: u64) {
        self.set(span, SpanState::Free);
    }

    /// Another node took the claim from us.
    pub(super) fn lose(&self, span: u64, until: Instant) {
        let mut states = self.states.lock();
        if let Some(slot @ SpanState::Mine { .. }) = states.get_mut(span as usize) {
            *slot = SpanState::Theirs { peer: None, until };
        }
    }

    /// Takes every span as ours without a claim: the pack has one node.
    pub(super) fn take_all(&self) {
        self.states.lock().fill(SpanState::Mine { driven: false, taken_over: false });
    }

    /// Notes what others have marked; gives the spans that were not known to be done.
    pub(super) fn take_marks(&self, is_done: impl Fn(u64) -> bool) -> Vec<u64> {
        let mut states = self.states.lock();
        let mut found = Vec::new();
        for (span, slot) in (0..).zip(states.iter_mut()) {
            let open = !matches!(slot, SpanState::Done | SpanState::Marking | SpanState::Mine { .. });
            if open && is_done(span) {
                *slot = SpanState::Done;
                found.push(span);
            }
        }
        found
    }

    /// Takes on to mark a span of ours that is complete. False: not ours, or somebody does already.
    pub(super) fn begin_marking(&self, span: u64) -> bool {
        let mut states = self.states.lock();
        match states.get_mut(span as usize) {
            Some(slot @ SpanState::Mine { .. }) => {
                *slot = SpanState::Marking;
                true
            }
            _ => false,
        }
    }

    pub(super) fn marked(&self, span: u64) {
        self.set(span, SpanState::Done);
    }

    /// The mark could not be made: it is tried again, or the fill ends.
    pub(super) fn not_marked(&self, span: u64) {
        self.set(span, SpanState::Mine { driven: false, taken_over: false });
    }

    pub(super) fn are_all_marked(&self) -> bool {
        self.states.lock().iter().all(|state| *state == SpanState::Done)
    }
}

fn is_askable(state: &SpanState, now: Instant) -> bool {
    match state {
        SpanState::Free => true,
        SpanState::Theirs { until, .. } => *until <= now,
        SpanState::Asking | SpanState::Mine { .. } | SpanState::Marking | SpanState::Done => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::NodeId;

    const LEN: u64 = 64;

    fn theirs(left_ms: u64) -> SpanClaim {
        SpanClaim::Other { node: NodeId(uuid::Uuid::from_u128(2)), peer: None, left: Duration::from_millis(left_ms) }
    }

    #[test]
    fn a_fill_begins_where_a_reader_waits_and_goes_round() {
        let spans = Spans::new(4 * LEN - 1, LEN, Some(2 * LEN + 5));
        let now = Instant::now();
        let order: Vec<_> = std::iter::from_fn(|| spans.next(now)).collect();
        assert_eq!(order, [2, 3, 0, 1]);
        assert_eq!(spans.range(3), 3 * LEN..4 * LEN - 1);
    }

    #[test]
    fn what_a_reader_claimed_comes_first_and_what_others_bring_is_asked_again_in_time() {
        let spans = Spans::new(4 * LEN, LEN, Some(0));
        let now = Instant::now();
        assert!(spans.begin_asking(3, now));
        assert!(!spans.begin_asking(3, now), "it is being asked");
        spans.answered(3, SpanClaim::Mine { taken_over: false }, false, now);
        assert!(spans.begin_asking(0, now));
        spans.answered(0, theirs(500), false, now);
        assert_eq!(spans.next(now), Some(3));
        assert_eq!(spans.next(now), Some(1));
        assert_eq!(spans.next(now), Some(2));
        assert_eq!(spans.next(now), None);
        assert_eq!(spans.next(now + Duration::from_millis(500)), Some(0));
    }

    #[test]
    fn a_mark_ends_a_span_whoever_made_it_but_not_one_that_we_bring() {
        let spans = Spans::new(3 * LEN, LEN, Some(0));
        let now = Instant::now();
        spans.next(now);
        spans.answered(0, SpanClaim::Mine { taken_over: false }, true, now);
        assert_eq!(spans.take_marks(|_| true), [1, 2]);
        assert!(!spans.are_all_marked());
        assert!(spans.begin_marking(0) && !spans.begin_marking(0));
        spans.marked(0);
        assert!(spans.are_all_marked());
    }

    #[test]
    fn a_span_that_was_taken_from_us_is_another_nodes() {
        let spans = Spans::new(LEN, LEN, None);
        let now = Instant::now();
        spans.next(now);
        spans.answered(0, SpanClaim::Mine { taken_over: true }, true, now);
        spans.lose(0, now);
        assert!(matches!(spans.state(0), SpanState::Theirs { .. }) && !spans.begin_marking(0));
        assert_eq!(spans.take_marks(|_| true), [0]);
    }
}
