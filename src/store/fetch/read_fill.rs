//! Reads through a fill: the bytes become part of what is brought anyway, here or by another node.
//!
//! The first bytes that readers want of a pack are asked from the lake at once (`ahead_bytes_max`): the
//! first images must not wait for 8 MiB. What they want beyond that is brought as a piece of the fill,
//! in the demand lane; or, where another node has claimed its span, waited for: from that node, from
//! the shared staging file, and after `claim_wait_ms` from the lake (half of the read's time where the
//! node says that it is bringing it).

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::{Instant, sleep, timeout};

use super::engine::pack_of;
use super::fill::{FillState, PieceAt};
use super::flight::Flight;
use super::local::{Local, read_parts, unit_proof};
use super::memory::UnitKey;
use super::pack_meta::PackMeta;
use super::packs::PackState;
use super::plan::{Part, parts, unit_range};
use super::port::Given;
use super::read::Run;
use super::spans::SpanState;
use super::stats::bump;

/// How often a reader who waits looks, at first and at the longest, and how often the tier is asked
/// for all who wait.
const LOOK_MIN: Duration = Duration::from_millis(10);
const LOOK_MAX: Duration = Duration::from_millis(160);
const ASK_EVERY: Duration = Duration::from_millis(100);

/// What a reader can do about bytes that are not here.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    /// Wait for the piece that flies here.
    Joins,
    /// Have the piece brought here now.
    Bring(usize),
    /// Ask the tier whose the span is.
    Ask(u64),
    /// Another node brings it.
    Theirs,
    /// It is there, and is no good: only the lake helps.
    Lake,
}

impl Run<'_> {
    /// Notes where in its pack a reader waits, so that a fill begins there.
    pub(super) fn want(&self, state: &PackState, flights: &[Flight]) {
        let Some(flight) = flights.first() else {
            return;
        };
        if let Some([Part::Data { offset, .. }, ..]) = parts(&self.c.location, self.range(flight)).as_deref() {
            state.want(*offset);
        }
    }

    fn range(&self, flight: &Flight) -> Range<u64> {
        unit_range(self.c.size, flight.key.block)
    }

    /// Gets units through the pack's fill; gives back those that only the lake can give.
    pub(super) async fn through_fill(
        &self,
        state: &Arc<PackState>,
        meta: Option<&Arc<PackMeta>>,
        flights: Vec<Flight>,
    ) -> Vec<Flight> {
        if !self.inner.packs.tier_answers() {
            // A fill gets nowhere now.
            return flights;
        }
        let bytes = flights.iter().map(|flight| self.range(flight)).map(|range| range.end - range.start).sum();
        // Who reads in order will want the rest too.
        let in_order = state.filling().is_some() && self.inner.is_sequential(&self.c.content);
        if !in_order && state.take_ahead(bytes, self.inner.cfg.ahead_bytes_max) {
            return flights;
        }
        let until = Instant::now() + self.inner.cfg.claim_wait();
        let Some(fill) = self.open_fill(state, until).await else {
            // No mount wants it filled; or it was published while we looked.
            return self.take_local(state, meta.cloned(), flights).await;
        };
        // All are set going before the first is waited for.
        for flight in &flights {
            for way in self.ways(&fill, flight) {
                self.begin(&fill, &way, until).await;
            }
        }
        let mut left = Vec::new();
        for flight in flights {
            match self.unit_through_fill(state, &fill, meta, &flight, until).await {
                Some(unit) => {
                    self.inner.memory.put(flight.key, unit.clone());
                    flight.land(Ok(unit));
                }
                None => left.push(flight),
            }
        }
        left
    }

    /// Gives the pack's fill; begins it where a mount wants the pack filled.
    async fn open_fill(&self, state: &Arc<PackState>, until: Instant) -> Option<Arc<FillState>> {
        let begun = match state.filling() {
            Some(fill) => return Some(fill),
            None => self.inner.begin_fill(&pack_of(self.c)?)?,
        };
        while Instant::now() < until && !begun.has_ended() {
            if let Some(fill) = state.filling() {
                return Some(fill);
            }
            sleep(LOOK_MIN).await;
        }
        None
    }

    /// Says for each part of a unit that has bytes what to do about it.
    fn ways(&self, fill: &FillState, flight: &Flight) -> Vec<Way> {
        let Some(parts) = parts(&self.c.location, self.range(flight)) else {
            return vec![Way::Lake];
        };
        let data = parts.iter().filter_map(|part| match part {
            Part::Data { offset, len } => Some(*offset..offset + len),
            Part::Hole { .. } => None,
        });
        data.map(|range| way(fill, &range)).collect()
    }

    async fn begin(&self, fill: &Arc<FillState>, way: &Way, until: Instant) {
        match way {
            Way::Bring(index) => self.inner.bring_now(fill, *index),
            Way::Ask(span) if fill.spans.begin_asking(*span, Instant::now()) => {
                // The answer is noted where it arrives, also when that is late.
                let left = until.saturating_duration_since(Instant::now());
                let (inner, fill, span) = (self.inner.clone(), fill.clone(), *span);
                let ask = self.inner.rt.spawn(async move { inner.ask_for_span(&fill, span, false).await });
                let _ = timeout(left, ask).await;
            }
            _ => {}
        }
    }

    async fn unit_through_fill(
        &self,
        state: &Arc<PackState>,
        fill: &Arc<FillState>,
        meta: Option<&Arc<PackMeta>>,
        flight: &Flight,
        mut until: Instant,
    ) -> Option<Bytes> {
        let latest = Instant::now() + self.half_of_the_time();
        let mut wait = LOOK_MIN;
        let mut last = false;
        loop {
            if let Some(unit) = self.look_here(state, meta, flight).await {
                return Some(unit);
            }
            if last {
                return None;
            }
            let ways = self.ways(fill, flight);
            if !ways.is_empty() && ways.iter().all(|way| *way == Way::Joins) {
                // It comes as fast as the lake gives it: to ask the lake as well would not help.
                let landed = self.piece_unit(fill, flight.key.block, false, self.half_of_the_time()).await;
                if landed.is_some() {
                    return landed;
                }
            }
            for way in &ways {
                self.begin(fill, way, until).await;
            }
            if ways.contains(&Way::Theirs) {
                match self.unit_of_peer(fill, meta, flight, until).await {
                    Given::Bytes(unit) => return Some(unit),
                    // It lives, and brings it: as good as a piece that flies here.
                    Given::Coming => until = latest.min(Instant::now() + self.inner.cfg.claim_wait()),
                    Given::Nothing => {}
                }
                if let Some(unit) = self.unmarked_unit(fill, meta, flight).await {
                    return Some(unit);
                }
                self.ask_for_all(state, fill).await;
            }
            // What arrived since the look above is found by one more.
            last = ways.contains(&Way::Lake) || Instant::now() >= until;
            if !last {
                sleep(wait).await;
                wait = (wait * 2).min(LOOK_MAX);
            }
        }
    }

    /// Looks at the tier's object and at the staging file.
    async fn look_here(&self, state: &Arc<PackState>, meta: Option<&Arc<PackMeta>>, flight: &Flight) -> Option<Bytes> {
        let (inner, c, state, meta) = (self.inner.clone(), self.c.clone(), state.clone(), meta.cloned());
        let (block, verify) = (flight.key.block, self.verify);
        let look = move || inner.local_unit(&state, &c, block, verify, meta.as_deref());
        match self.inner.look_at_tier(look).await {
            Some(Local::Unit(unit)) => Some(unit),
            _ => None,
        }
    }

    /// Asks the node that brings a unit for it. Its digest decides whether it is believed.
    async fn unit_of_peer(
        &self,
        fill: &Arc<FillState>,
        meta: Option<&Arc<PackMeta>>,
        flight: &Flight,
        until: Instant,
    ) -> Given {
        let range = self.range(flight);
        let proof = unit_proof(self.c, flight.key.block, meta.map(|meta| &**meta));
        let (Some(proof), Some(parts)) = (proof, parts(&self.c.location, range.clone())) else {
            return Given::Nothing;
        };
        let mut unit = BytesMut::with_capacity((range.end - range.start) as usize);
        for part in parts {
            match part {
                Part::Hole { len } => unit.resize(unit.len() + len as usize, 0),
                Part::Data { offset, len } => {
                    let SpanState::Theirs { peer: Some(address), .. } = fill.spans.state(fill.span_of(offset)) else {
                        return Given::Nothing;
                    };
                    match self.inner.ask_peer(&address, &fill.pack, offset..offset + len, until).await {
                        Given::Bytes(bytes) => unit.extend_from_slice(&bytes),
                        other => return other,
                    }
                }
            }
        }
        if self.inner.check_unit(&proof, flight.key.block, &unit) != Some(true) {
            bump(&self.inner.counters.damaged_fetches);
            return Given::Nothing;
        }
        self.inner.counters.peer.add(unit.len() as u64);
        Given::Bytes(unit.freeze())
    }

    /// What is left of the first half of the read's time: the other half is for the lake.
    fn half_of_the_time(&self) -> Duration {
        let left = self.deadline.saturating_duration_since(Instant::now());
        left.saturating_sub(self.inner.cfg.read_timeout() / 2)
    }

    /// Reads what another node may have written and not marked yet. Its digest decides.
    async fn unmarked_unit(
        &self,
        fill: &Arc<FillState>,
        meta: Option<&Arc<PackMeta>>,
        flight: &Flight,
    ) -> Option<Bytes> {
        let proof = unit_proof(self.c, flight.key.block, meta.map(|meta| &**meta))?;
        let (inner, fill, c) = (self.inner.clone(), fill.clone(), self.c.clone());
        let (range, block) = (self.range(flight), flight.key.block);
        let look = move || {
            let mut unit = vec![0; (range.end - range.start) as usize];
            let read = read_parts(&c, &range, &mut unit, |part, offset| fill.read_staged(part, offset));
            // Zeros are most likely a place that nobody wrote yet.
            let written = matches!(read, Some(Ok(()))) && unit.iter().any(|byte| *byte != 0);
            let good = written && inner.check_unit(&proof, block, &unit) == Some(true);
            good.then(|| Bytes::from(unit))
        };
        let unit = self.inner.look_at_tier(look).await??;
        self.inner.counters.staging.add(unit.len() as u64);
        self.inner.memory.put(UnitKey { content: self.c.content, block: flight.key.block }, unit.clone());
        Some(unit)
    }

    /// Looks for new marks, once for all readers that wait for this pack.
    async fn ask_for_all(&self, state: &Arc<PackState>, fill: &Arc<FillState>) {
        {
            let mut polled = fill.polled.lock();
            if polled.is_some_and(|at| at.elapsed() < ASK_EVERY) {
                return;
            }
            *polled = Some(Instant::now());
        }
        let looker = fill.clone();
        let look = move || looker.stage.refresh().inspect(|()| looker.take_marks()).is_ok();
        if self.inner.look_at_tier(look).await == Some(false) {
            // Published, or given up: the next look asks the tier again.
            self.inner.packs.expect_present(state);
        }
    }
}

/// Says what to do about a range of the pack.
fn way(fill: &FillState, range: &Range<u64>) -> Way {
    let Some(index) = fill.piece_of(range) else {
        return Way::Lake;
    };
    match fill.piece_at(index) {
        PieceAt::Flying(_) => return Way::Joins,
        PieceAt::Staged => return Way::Lake,
        PieceAt::Todo => {}
    }
    let Some(span) = fill.pieces.get(index).map(|piece| fill.spans.of(piece.offset)) else {
        return Way::Lake;
    };
    match fill.spans.state(span) {
        SpanState::Mine { .. } | SpanState::Marking | SpanState::Done => Way::Bring(index),
        // Of an imported pack the node that may publish it brings all.
        SpanState::Free if fill.is_exclusive() => Way::Theirs,
        SpanState::Free => Way::Ask(span),
        SpanState::Theirs { until, .. } if until <= Instant::now() && !fill.is_exclusive() => Way::Ask(span),
        SpanState::Asking | SpanState::Theirs { .. } => Way::Theirs,
    }
}
