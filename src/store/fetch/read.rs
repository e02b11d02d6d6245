//! Reading what is not at hand: units in flight, from the tier (with the pack's description), from
//! pieces that a fill brings, from the lake.
//!
//! A reader asks for units. Those that nobody fetches yet are begun here, neighbours in one request;
//! each runs in a task of its own, so that a reader who leaves does not take others down with it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::try_join_all;
use tokio::time::{Instant, timeout, timeout_at};

use crate::format::digest::BLOCK_LEN;
use crate::format::ids::ContentId;
use crate::format::pack::Source;
use crate::format::paths::data_key;
use crate::format::placement::Location;

use super::engine::{Inner, bad_pack, content_name, pack_of};
use super::fill::{FillState, PieceAt};
use super::flight::{Boarded, Flight, Ticket};
use super::lanes::{Lane, Permit};
use super::local::{Fast, Local, Reach, copy_overlap, unit_proof};
use super::memory::UnitKey;
use super::pack_meta::{PackMeta, UnitProof};
use super::packs::{OpenPack, PackState};
use super::plan::{Part, parts, unit_count, unit_range, units_of};
use super::source::{For, Object, SourceError};
use super::stats::bump;
use super::types::{ContentRef, FetchError, Verify};

/// Units that one reader asks for at once: more come when these are there.
const STEP_UNITS: u64 = 32;

impl Inner {
    /// Reads a non-empty range within the content from wherever it is.
    pub(super) async fn read_slow(
        self: &Arc<Self>,
        c: &ContentRef,
        range: Range<u64>,
        verify: Verify,
    ) -> Result<Bytes, FetchError> {
        let deadline = self.deadline();
        let whole_read = async {
            let first = self.read_once(c, &range, verify, deadline).await;
            match (&first, pack_of(c)) {
                // A description that arrived damaged may be the reason: it proves less than the bytes.
                (Err(error), Some(pack)) if blames_description(error, c) => {
                    self.metas.forget(&pack);
                    self.read_once(c, &range, verify, deadline).await
                }
                _ => first,
            }
        };
        let result = match timeout_at(deadline, whole_read).await {
            Ok(result) => result,
            Err(_) => Err(self.late(c)),
        };
        if let Err(error) = &result {
            bump(&self.counters.read_errors);
            tracing::warn!(%error, "a read failed");
        }
        result
    }

    async fn read_once(
        self: &Arc<Self>,
        c: &ContentRef,
        range: &Range<u64>,
        verify: Verify,
        deadline: Instant,
    ) -> Result<Bytes, FetchError> {
        if let Some(bytes) = self.arriving(c, range, verify).await {
            return Ok(bytes);
        }
        if unit_count(c.size) == 1 {
            let unit = self.unit(c, 0, verify, deadline).await?;
            return slice_unit(c, &unit, range);
        }
        self.read_blocks(c, range, verify, deadline).await
    }

    /// Waits for a piece that a fill brings, where it has all of the range: its bytes need no copy.
    async fn arriving(self: &Arc<Self>, c: &ContentRef, range: &Range<u64>, verify: Verify) -> Option<Bytes> {
        let fill = self.packs.filling(&pack_of(c)?).filter(|fill| !fill.is_exclusive())?;
        let place = fill.place_of(c, range)?;
        let index = fill.piece_of(&place)?;
        self.read_ahead(c, &units_of(range), verify);
        if self.is_sequential(&c.content) && matches!(fill.piece_at(index), PieceAt::Todo) && fill.is_mine(index) {
            self.bring_now(&fill, index);
        }
        let PieceAt::Flying(mut arrival) = fill.piece_at(index) else {
            return fill.kept(&place);
        };
        let arrived =
            timeout(self.cfg.stall_timeout(), arrival.wait_for(Option::is_some)).await.ok()?.ok()?.clone()??;
        let bytes = fill.cut(index, &place, &arrived)?;
        self.counters.in_flight.add(bytes.len() as u64);
        Some(bytes)
    }

    async fn unit(
        self: &Arc<Self>,
        c: &ContentRef,
        block: u64,
        verify: Verify,
        deadline: Instant,
    ) -> Result<Bytes, FetchError> {
        let mut units = self.units(c, block..block + 1, verify, deadline).await?;
        units.pop().ok_or_else(|| bad_pack(c, "a content without bytes was read"))
    }

    async fn read_blocks(
        self: &Arc<Self>,
        c: &ContentRef,
        range: &Range<u64>,
        verify: Verify,
        deadline: Instant,
    ) -> Result<Bytes, FetchError> {
        let mut result = BytesMut::zeroed((range.end - range.start) as usize);
        let blocks = units_of(range);
        let mut at = blocks.start;
        while at < blocks.end {
            let step = at..(at + STEP_UNITS).min(blocks.end);
            let units = self.units(c, step.clone(), verify, deadline).await?;
            if let ([only], true) = (units.as_slice(), blocks.end - blocks.start == 1) {
                return slice_block(c, only, blocks.start, range);
            }
            for (block, unit) in step.clone().zip(&units) {
                copy_overlap(unit, block, range, &mut result)
                    .ok_or_else(|| bad_pack(c, "a block has another length than it must have"))?;
            }
            at = step.end;
        }
        Ok(result.freeze())
    }

    /// Gets units in order: from memory, by joining flights, by beginning them.
    async fn units(
        self: &Arc<Self>,
        c: &ContentRef,
        wanted: Range<u64>,
        verify: Verify,
        deadline: Instant,
    ) -> Result<Vec<Bytes>, FetchError> {
        let mut waits = Vec::new();
        let begun = self.board(c, wanted.clone(), verify, |wait| waits.push(wait));
        for run in begun {
            self.launch(c, run, verify, deadline);
        }
        self.read_ahead(c, &wanted, verify);
        try_join_all(waits.into_iter().map(|wait| async {
            match wait {
                Wait::Here(unit) => Ok(unit),
                Wait::Ticket(ticket) => ticket.wait().await,
            }
        }))
        .await
    }

    /// Takes each unit from memory, joins its flight, or begins one; neighbours that begin are one run.
    fn board(
        &self,
        c: &ContentRef,
        wanted: Range<u64>,
        verify: Verify,
        mut wait: impl FnMut(Wait),
    ) -> Vec<Vec<Flight>> {
        let mut runs: Vec<Vec<Flight>> = Vec::new();
        let mut open_run = false;
        for block in wanted {
            let key = UnitKey { content: c.content, block };
            if let Some(unit) = self.memory.get(&key) {
                self.counters.memory.add(unit.len() as u64);
                wait(Wait::Here(unit));
                open_run = false;
                continue;
            }
            match self.flights.board(key, verify) {
                Boarded::Joined(ticket) => {
                    let len = unit_range(c.size, block);
                    self.counters.in_flight.add(len.end - len.start);
                    wait(Wait::Ticket(ticket));
                    open_run = false;
                }
                Boarded::Begun(flight, ticket) => {
                    wait(Wait::Ticket(ticket));
                    match runs.last_mut().filter(|_| open_run) {
                        Some(run) => run.push(flight),
                        None => runs.push(vec![flight]),
                    }
                    open_run = true;
                }
            }
        }
        runs
    }

    fn launch(self: &Arc<Self>, c: &ContentRef, flights: Vec<Flight>, verify: Verify, deadline: Instant) {
        let (inner, c) = (self.clone(), c.clone());
        let stopped = self.stopped.clone();
        self.rt.spawn(async move {
            let run = Run { inner: &inner, c: &c, verify, deadline };
            tokio::select! {
                () = run.fly(flights) => {}
                () = stopped.cancelled() => {}
            }
        });
    }

    /// Begins what a sequential reader of a large content will want next.
    pub(super) fn read_ahead(self: &Arc<Self>, c: &ContentRef, wanted: &Range<u64>, verify: Verify) {
        let count = unit_count(c.size);
        if count < 2 || self.cfg.readahead_bytes_max < BLOCK_LEN {
            return;
        }
        let window_max = self.cfg.readahead_bytes_max / BLOCK_LEN;
        let ahead = {
            let mut table = self.readahead.lock();
            table.get_or_insert_mut(c.content, Default::default).note(wanted, count, window_max)
        };
        if !ahead.is_empty() {
            let fill = pack_of(c).and_then(|pack| self.packs.filling(&pack));
            let fill = fill.filter(|fill| !fill.is_exclusive());
            let comes = |block| fill.as_ref().is_some_and(|fill| self.brings(fill, c, unit_range(c.size, block)));
            let begin = ahead.clone().find(|block| !comes(*block)).unwrap_or(ahead.end);
            for run in self.board(c, begin..ahead.end, verify, drop) {
                self.launch(c, run, verify, self.deadline());
            }
        }
    }

    /// Says whether a fill has a range in memory or brings it; makes it bring what is this node's.
    fn brings(self: &Arc<Self>, fill: &Arc<FillState>, c: &ContentRef, range: Range<u64>) -> bool {
        let Some(place) = fill.place_of(c, &range) else {
            return false;
        };
        let Some(index) = fill.piece_of(&place) else {
            return false;
        };
        match fill.piece_at(index) {
            PieceAt::Flying(_) => true,
            PieceAt::Staged => fill.kept(&place).is_some(),
            PieceAt::Todo if fill.is_mine(index) => {
                self.bring_now(fill, index);
                true
            }
            PieceAt::Todo => false,
        }
    }

    pub(super) fn is_sequential(&self, content: &ContentId) -> bool {
        self.readahead.lock().peek(content).is_some_and(|r| r.is_sequential())
    }

    /// Sets a damaged object aside and has it filled again.
    pub(super) async fn heal(self: &Arc<Self>, state: &Arc<PackState>, open: Arc<OpenPack>, why: &'static str) {
        let Some(tier) = self.packs.tier().cloned() else {
            return;
        };
        self.packs.forget(state, &open);
        bump(&self.counters.heals);
        tracing::warn!(pack = %state.pack, why, "an object of the tier is damaged; it is set aside and fetched again");
        let pack = state.pack;
        let set_aside = tokio::task::spawn_blocking(move || tier.quarantine(&pack, &open.identity, why)).await;
        if !matches!(set_aside, Ok(Ok(()))) {
            bump(&self.counters.tier_errors);
        }
        self.packs.expect_present(state);
        self.fill_again(state.pack);
    }
}

/// Says whether a damaged recipe, index or outboard in memory could have led to this error.
fn blames_description(error: &FetchError, c: &ContentRef) -> bool {
    match error {
        FetchError::Damaged { .. } | FetchError::BadPack { .. } => true,
        FetchError::Gone { .. } => matches!(c.content, ContentId::Digest(_)),
        FetchError::Unreachable { .. } | FetchError::ProofConflict { .. } | FetchError::Stopped => false,
    }
}

enum Wait {
    Here(Bytes),
    Ticket(Ticket),
}

fn slice_unit(c: &ContentRef, unit: &Bytes, range: &Range<u64>) -> Result<Bytes, FetchError> {
    slice_block(c, unit, 0, range)
}

fn slice_block(c: &ContentRef, unit: &Bytes, block: u64, range: &Range<u64>) -> Result<Bytes, FetchError> {
    let at = block * BLOCK_LEN;
    let (start, end) = (range.start - at, range.end - at);
    match end <= unit.len() as u64 {
        true => Ok(unit.slice(start as usize..end as usize)),
        false => Err(bad_pack(c, "a content is shorter than its size")),
    }
}

/// One run of neighbouring units of a content on its way.
pub(super) struct Run<'a> {
    pub inner: &'a Arc<Inner>,
    pub c: &'a ContentRef,
    pub verify: Verify,
    pub deadline: Instant,
}

impl Run<'_> {
    /// Gets every unit from the nearest place that has it.
    async fn fly(&self, flights: Vec<Flight>) {
        let meta = match self.meta().await {
            Ok(meta) => meta,
            Err(error) => return land_all(flights, &error),
        };
        let Some(pack) = pack_of(self.c) else {
            return land_all(flights, &bad_pack(self.c, "a content without a place was fetched"));
        };
        let state = self.inner.packs.state(&pack);
        let left = self.take_local(&state, meta.clone(), flights).await;
        let left = self.join_fill(&state, left).await;
        if left.is_empty() {
            return;
        }
        self.want(&state, &left);
        self.inner.touched(pack);
        let left = self.through_fill(&state, meta.as_ref(), left).await;
        for run in neighbours(left) {
            self.fetch_units(meta.as_deref(), run).await;
        }
    }

    /// Gets the pack's description where the content cannot be judged without it.
    async fn meta(&self) -> Result<Option<Arc<PackMeta>>, FetchError> {
        let small = self.c.size <= BLOCK_LEN && matches!(self.c.content, ContentId::Digest(_));
        let Some(pack) = pack_of(self.c).filter(|_| !small) else {
            return Ok(pack_of(self.c).and_then(|pack| self.inner.metas.peek(&pack)));
        };
        let meta = self.inner.metas.full(&pack, self.deadline).await;
        let meta = meta.map_err(|error| self.inner.meta_error(self.c, error))?;
        if meta.position(&self.c.content, self.c.size, &self.c.location).is_none() {
            return Err(bad_pack(self.c, "its index does not have this content at this place"));
        }
        Ok(Some(meta))
    }

    /// Takes what memory (somebody may have been faster), the tier's object and the staging file have.
    pub(super) async fn take_local(
        &self,
        state: &Arc<PackState>,
        meta: Option<Arc<PackMeta>>,
        flights: Vec<Flight>,
    ) -> Vec<Flight> {
        let mut left = Vec::new();
        for flight in flights {
            if let Some(unit) = self.inner.memory.get(&flight.key) {
                flight.land(Ok(unit));
                continue;
            }
            let (inner, c, state_) = (self.inner.clone(), self.c.clone(), state.clone());
            let (verify, block, meta) = (self.verify, flight.key.block, meta.clone());
            let look = move || inner.local_unit(&state_, &c, block, verify, meta.as_deref());
            match self.inner.look_at_tier(look).await {
                Some(Local::Unit(unit)) => flight.land(Ok(unit)),
                Some(Local::Damaged(open)) => {
                    left.push(self.after_damage(state, open, flight).await);
                }
                _ => left.push(flight),
            }
        }
        left
    }

    /// An imported content whose source is gone has no bytes in the tier: then the object is as good
    /// as it can be, and is kept. Every other damaged object is set aside.
    async fn after_damage(&self, state: &Arc<PackState>, open: Arc<OpenPack>, flight: Flight) -> Flight {
        let meta = self.inner.metas.full(&state.pack, self.deadline).await.ok();
        let lacks_it = meta.is_some_and(|meta| {
            let position = meta.position(&self.c.content, self.c.size, &self.c.location);
            position.is_none_or(|position| !meta.is_in_tier(position))
        });
        if !lacks_it {
            self.inner.heal(state, open, "a read found wrong bytes").await;
        }
        flight
    }

    /// Joins pieces that a fill brings at this moment; lets the fill bring the next ones now for a
    /// reader who goes through a large content in order (it would fetch them twice otherwise).
    async fn join_fill(&self, state: &Arc<PackState>, flights: Vec<Flight>) -> Vec<Flight> {
        let Some(fill) = state.filling() else {
            return flights;
        };
        let sequential = self.inner.is_sequential(&self.c.content);
        let mut left = Vec::new();
        for flight in flights {
            match self.piece_unit(&fill, flight.key.block, sequential, self.inner.cfg.stall_timeout()).await {
                Some(unit) => {
                    self.inner.memory.put(flight.key, unit.clone());
                    flight.land(Ok(unit));
                }
                None => left.push(flight),
            }
        }
        left
    }

    pub(super) async fn piece_unit(
        &self,
        fill: &Arc<FillState>,
        block: u64,
        sequential: bool,
        patience: Duration,
    ) -> Option<Bytes> {
        // A piece that has arrived is what the pack's index says, not what a placement says.
        let position = fill.meta.position(&self.c.content, self.c.size, &self.c.location)?;
        let range = unit_range(self.c.size, block);
        let wanted = parts(&self.c.location, range.clone())?;
        let mut unit = BytesMut::with_capacity((range.end - range.start) as usize);
        for part in wanted {
            match part {
                Part::Hole { len } => unit.resize(unit.len() + len as usize, 0),
                Part::Data { offset, len } => {
                    let index = fill.piece_of(&(offset..offset + len))?;
                    if sequential && matches!(fill.piece_at(index), PieceAt::Todo) && fill.is_mine(index) {
                        self.inner.bring_now(fill, index);
                    }
                    let PieceAt::Flying(mut arrival) = fill.piece_at(index) else {
                        return None;
                    };
                    let wait = arrival.wait_for(Option::is_some);
                    // A piece that does not come must not hold a reader up: the lake is asked then.
                    let arrived = timeout(patience, wait).await.ok()?.ok()?.clone()??;
                    let from = (offset - fill.pieces.get(index)?.offset) as usize;
                    unit.extend_from_slice(arrived.get(from..from + len as usize)?);
                }
            }
        }
        if fill.is_gone(position) {
            // Its source object is gone: there are zeros in its place, and no read may give them.
            return None;
        }
        self.inner.counters.in_flight.add(unit.len() as u64);
        Some(unit.freeze())
    }

    /// Fetches neighbouring units in one request; wrong bytes are fetched again a few times.
    async fn fetch_units(&self, meta: Option<&PackMeta>, mut flights: Vec<Flight>) {
        let mut tries = 0;
        while !flights.is_empty() {
            tries += 1;
            let (first, last) = (first_block(&flights), last_block(&flights));
            let range = unit_range(self.c.size, first).start..unit_range(self.c.size, last).end;
            let (object, bytes, _permit) = match self.get(meta, &range).await {
                Ok(got) => got,
                Err(error) => return land_all(flights, &error),
            };
            let mut wrong = Vec::new();
            for flight in flights {
                match self.take(meta, &flight, &bytes, range.start) {
                    Ok(unit) => {
                        self.inner.memory.put(flight.key, unit.clone());
                        flight.land(Ok(unit));
                    }
                    Err(()) => wrong.push(flight),
                }
            }
            if !wrong.is_empty() {
                bump(&self.inner.counters.damaged_fetches);
                if tries >= self.inner.cfg.damaged_tries_max {
                    let error = self.damaged(meta, &object, tries);
                    return land_all(wrong, &error);
                }
            }
            flights = wrong;
        }
    }

    /// Cuts one unit out of what was fetched, and checks it.
    fn take(&self, meta: Option<&PackMeta>, flight: &Flight, bytes: &Bytes, start: u64) -> Result<Bytes, ()> {
        let range = unit_range(self.c.size, flight.key.block);
        let (from, to) = ((range.start - start) as usize, (range.end - start) as usize);
        let unit = bytes.get(from..to).ok_or(())?;
        let proof = unit_proof(self.c, flight.key.block, meta).ok_or(())?;
        let good = match proof {
            // The pinned object itself gave it: that is what was asked for.
            UnitProof::Pin => true,
            proof => self.inner.check_unit(&proof, flight.key.block, unit) == Some(true),
        };
        match good {
            // A buffer of its own, so that what memory keeps is what it counts.
            true if unit.len() == bytes.len() => Ok(bytes.clone()),
            true => Ok(Bytes::copy_from_slice(unit)),
            false => Err(()),
        }
    }

    /// Gets logical bytes of the content from the lake. They are in flight until the permit is dropped.
    async fn get(&self, meta: Option<&PackMeta>, range: &Range<u64>) -> Result<(Object, Bytes, Permit), FetchError> {
        let len = range.end - range.start;
        let acquire = self.inner.lanes.acquire(Lane::Demand, len);
        let permit = timeout_at(self.deadline, acquire).await.map_err(|_| self.inner.late(self.c))?;
        let (object, ranges) = self.place(meta, range).await?;
        let read = |range| self.inner.reader.read(&object, range, For::Demand, self.deadline);
        let failed = |error: SourceError| self.inner.source_error(self.c, object.name(), error);
        if let [Part::Data { offset, len }] = ranges.as_slice() {
            let bytes = read(*offset..offset + len).await.map_err(failed)?;
            return Ok((object, bytes, permit));
        }
        let mut bytes = BytesMut::with_capacity(len as usize);
        for part in ranges {
            match part {
                Part::Hole { len } => bytes.resize(bytes.len() + len as usize, 0),
                Part::Data { offset, len } => {
                    bytes.extend_from_slice(&read(offset..offset + len).await.map_err(failed)?);
                }
            }
        }
        Ok((object, bytes.freeze(), permit))
    }

    /// Says which object has the bytes, and where.
    async fn place(&self, meta: Option<&PackMeta>, range: &Range<u64>) -> Result<(Object, Vec<Part>), FetchError> {
        let wild = || bad_pack(self.c, "its place lies beyond any object");
        if let Some(meta) = meta
            && !meta.is_native()
        {
            return self.place_pinned(meta, range);
        }
        let pack = pack_of(self.c).ok_or_else(wild)?;
        let recipe = self.inner.metas.recipe(&pack, self.deadline).await;
        let recipe = recipe.map_err(|error| self.inner.meta_error(self.c, error))?;
        let key = match &recipe.source {
            // What a pin names is only ever read from the pinned object itself, whatever a recipe says.
            Source::Native { key } if matches!(self.c.content, ContentId::Digest(_)) => key,
            _ => {
                let meta = self.inner.metas.full(&pack, self.deadline).await;
                let meta = meta.map_err(|error| self.inner.meta_error(self.c, error))?;
                return self.place_pinned(&meta, range);
            }
        };
        let ranges = parts(&self.c.location, range.clone()).ok_or_else(wild)?;
        let inside = ranges.iter().all(|part| match part {
            Part::Data { offset, len } => offset + len <= recipe.len,
            Part::Hole { .. } => true,
        });
        match inside {
            true => Ok((Object::Own(data_key(key).into()), ranges)),
            false => Err(bad_pack(self.c, "the content lies behind the end of its pack")),
        }
    }

    /// An imported content is the whole of its own object.
    fn place_pinned(&self, meta: &PackMeta, range: &Range<u64>) -> Result<(Object, Vec<Part>), FetchError> {
        let position = meta.position(&self.c.content, self.c.size, &self.c.location);
        let object = position.and_then(|position| meta.object_of(position)).filter(|_| !meta.is_native());
        let object = object.ok_or_else(|| bad_pack(self.c, "its pack has no pinned object for this content"))?;
        Ok((object, vec![Part::Data { offset: range.start, len: range.end - range.start }]))
    }

    fn damaged(&self, meta: Option<&PackMeta>, object: &Object, tries: u32) -> FetchError {
        let pack = match &self.c.location {
            Location::Run { pack, .. } | Location::Sparse { pack, .. } => *pack,
            Location::None => return bad_pack(self.c, "a content without a place was fetched"),
        };
        let (content, key) = (content_name(&self.c.content), object.name());
        let unproven_before = matches!(self.c.content, ContentId::Pin(_)) && meta.is_some();
        match unproven_before {
            true => FetchError::ProofConflict { pack, content, key },
            false => FetchError::Damaged { pack, content, key, tries },
        }
    }
}

fn land_all(flights: Vec<Flight>, error: &FetchError) {
    for flight in flights {
        flight.land(Err(error.clone()));
    }
}

fn first_block(flights: &[Flight]) -> u64 {
    flights.first().map_or(0, |f| f.key.block)
}

fn last_block(flights: &[Flight]) -> u64 {
    flights.last().map_or(0, |f| f.key.block)
}

/// Cuts a list of flights, in order, into runs of neighbours.
fn neighbours(flights: Vec<Flight>) -> Vec<Vec<Flight>> {
    let mut runs: Vec<Vec<Flight>> = Vec::new();
    for flight in flights {
        match runs.last_mut() {
            Some(run) if last_block(run) + 1 == flight.key.block => run.push(flight),
            _ => runs.push(vec![flight]),
        }
    }
    runs
}

impl Inner {
    /// Fills what is at hand without a wait for a server; the public `try_read` is built on it.
    pub(super) fn try_fill(self: &Arc<Self>, c: &ContentRef, offset: u64, buf: &mut [u8], verify: Verify) -> bool {
        let reach = if self.packs.tier_is_remote() { Reach::Memory } else { Reach::Tier };
        self.read_local(c, offset, buf, verify, reach) == Fast::Filled
    }
}
