//! Running the fill of one pack, single flight, as long as anybody is interested in it.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream::{self, StreamExt, TryStreamExt};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::format::digest::{BLOCK_LEN, block_cv, digest};
use crate::format::ids::{NodeId, PackId};
use crate::format::pack::Piece;
use crate::store::lake::LakeError;
use crate::store::tier::Sidecar;

use super::check::{Findings, digest_all};
use super::config::FetchConfig;
use super::engine::Inner;
use super::fill::{ContentPart, FillState, PieceFlight, content_parts};
use super::gather::Turn;
use super::job::PackFillError;
use super::lanes::Lane;
use super::pack_meta::{MetaError, PackMeta, UnitProof};
use super::packs::PackState;
use super::port::FetchTier;
use super::source::{For, Object, SourceError};
use super::stats::bump;
use super::tier_port::{is_full, is_overtaken};

/// Requests for the objects of one piece of an imported pack, at once.
const PIECE_REQUESTS_MAX: usize = 8;
/// How often a pack is filled after the tier failed, before filling pauses.
const FILL_TRIES_MAX: u32 = 2;
/// A fill that others overtook finds its spans done: each further try costs no fetching.
const OVERTAKEN_TRIES_MAX: u32 = 16;
/// How often a full tier is tried: its steward was asked and may make room.
const FULL_TRIES_MAX: u32 = 6;
/// How long the steward has each time.
const FULL_DELAY: Duration = Duration::from_secs(1);
/// For so long a node that was seen to fill the same packs counts.
const SHARES_FOR: Duration = Duration::from_secs(20);
/// Requests that a node may make at once however many others fill with it.
const REQUESTS_OF_A_NODE_MIN: usize = 4;
/// How often a pack is read back and mended before it is given up.
const READ_BACKS_MAX: u32 = 3;

type Outcome = Option<Result<(), PackFillError>>;

/// The fills that run, and how many may.
#[derive(Debug)]
pub(super) struct Fills {
    running: Mutex<HashMap<PackId, Weak<PackFill>>>,
    /// Staging files that are open.
    open: Semaphore,
    /// Fills that go through their packs; the others bring only what readers ask for.
    pub(super) packs: Semaphore,
    pub(super) requests: Semaphore,
    requests_max: usize,
    /// Nodes that were seen to fill the same packs, and when.
    others: Mutex<HashMap<NodeId, Instant>>,
}

/// Interest in the fill of one pack: when the last one is dropped, the fill ends where it is.
#[derive(Debug)]
pub(super) struct PackFill {
    outcome: watch::Receiver<Outcome>,
    cancel: CancellationToken,
}

impl Fills {
    pub(super) fn new(cfg: &FetchConfig) -> Self {
        Self {
            running: Mutex::default(),
            open: Semaphore::new(cfg.fill_open_max.max(1)),
            packs: Semaphore::new(cfg.fill_packs_max.max(1)),
            requests: Semaphore::new(cfg.prefetch_requests_max.max(1)),
            requests_max: cfg.prefetch_requests_max.max(1),
            others: Mutex::default(),
        }
    }

    /// Notes that another node fills what we fill.
    pub(super) fn saw(&self, node: NodeId) {
        let mut others = self.others.lock();
        others.retain(|_, at| at.elapsed() < SHARES_FOR);
        others.insert(node, Instant::now());
    }

    /// Says for how many of the requests one counts just now: nodes that fill together share the link,
    /// and what a reader waits for must not stand behind all that all of them ask for.
    fn weight(&self) -> u32 {
        let mut others = self.others.lock();
        others.retain(|_, at| at.elapsed() < SHARES_FOR);
        let most = self.requests_max / REQUESTS_OF_A_NODE_MIN;
        u32::try_from((others.len() + 1).min(most.max(1))).unwrap_or(1)
    }
}

impl PackFill {
    pub(super) fn has_ended(&self) -> bool {
        self.outcome.borrow().is_some()
    }

    pub(super) async fn wait(&self) -> Result<(), PackFillError> {
        let mut outcome = self.outcome.clone();
        match outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(PackFillError::Cancelled)),
            Err(_) => Err(PackFillError::Cancelled),
        }
    }
}

impl Drop for PackFill {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// What came of checking and writing a piece.
enum Written {
    Done(Bytes),
    Wrong,
    Tier(io::Error),
}

impl Inner {
    /// Begins to fill a pack, or joins the fill that runs.
    pub(super) fn fill_pack(self: &Arc<Self>, pack: PackId) -> Arc<PackFill> {
        let mut running = self.fills.running.lock();
        if let Some(there) = running.get(&pack).and_then(Weak::upgrade)
            && !there.has_ended()
        {
            return there;
        }
        let (sender, outcome) = watch::channel(None);
        let cancel = self.stopped.child_token();
        let fill = Arc::new(PackFill { outcome, cancel: cancel.clone() });
        running.insert(pack, Arc::downgrade(&fill));
        drop(running);
        let inner = self.clone();
        self.rt.spawn(async move {
            let result = tokio::select! {
                result = inner.run_fill(pack) => result,
                () = cancel.cancelled() => Err(PackFillError::Cancelled),
            };
            inner.fills.running.lock().retain(|_, fill| fill.strong_count() > 0);
            sender.send_replace(Some(result));
        });
        fill
    }

    /// Fills a pack again whose object was damaged.
    pub(super) fn fill_again(self: &Arc<Self>, pack: PackId) {
        let fill = self.fill_pack(pack);
        self.rt.spawn(async move { fill.wait().await });
    }

    async fn run_fill(self: &Arc<Self>, pack: PackId) -> Result<(), PackFillError> {
        let tier = self.packs.tier().cloned().ok_or(PackFillError::Cancelled)?;
        let _open = self.fills.open.acquire().await.map_err(|_| PackFillError::Cancelled)?;
        if let Some(why) = self.paused() {
            return Err(PackFillError::Paused { pack, why });
        }
        let state = self.packs.state(&pack);
        let mut tries = 0;
        loop {
            let filled = match self.is_published(&tier, &state).await {
                true => self.put_missing_sidecars(&tier, pack).await,
                false => self.fill_once(&tier, &state).await,
            };
            tries += 1;
            match filled {
                // Another process may have published the same pack and cleaned up what we wrote to, or
                // evicted it together with the index that we had just put.
                Err(PackFillError::Tier { source, .. }) if tries < tries_max(&source) => {
                    if is_full(&source) {
                        tokio::time::sleep(FULL_DELAY).await;
                    }
                }
                Err(PackFillError::Tier { source, .. }) => {
                    if self.is_published(&tier, &state).await {
                        return Ok(());
                    }
                    self.pause_filling(format!("the tier cannot take pack {}: {source}", pack.short()));
                    return Err(PackFillError::Tier { pack, source });
                }
                other => return other,
            }
        }
    }

    async fn fill_once(
        self: &Arc<Self>,
        tier: &Arc<dyn FetchTier>,
        state: &Arc<PackState>,
    ) -> Result<(), PackFillError> {
        let pack = state.pack;
        let meta = self.metas.full(&pack, self.prefetch_deadline()).await;
        let meta = meta.map_err(|error| PackFillError::of_meta(pack, error))?;
        let (opener, len, piece_len) = (tier.clone(), meta.index.len, self.cfg.piece_len_bytes);
        let stage = self.on_tier(pack, move || opener.open_stage(&pack, len)).await?;
        let fill = FillState::new(meta, stage, piece_len, state.wanted_at());
        *state.fill.write() = Some(fill.clone());
        let registered = Registered { state: state.clone(), fill: fill.clone(), rt: self.rt.clone(), released: false };
        let result = tokio::select! {
            result = self.fill_and_publish(tier, state, &fill) => result,
            never = self.keep_claims(&fill) => match never {},
        };
        registered.end().await;
        if matches!(result, Err(PackFillError::Damaged { .. })) {
            self.metas.forget(&pack);
        }
        result
    }

    /// Looks in the tier itself: a file that is open here may have been evicted meanwhile.
    pub(super) async fn is_published(self: &Arc<Self>, tier: &Arc<dyn FetchTier>, state: &Arc<PackState>) -> bool {
        let (inner, tier, state) = (self.clone(), tier.clone(), state.clone());
        let look = move || match tier.open_pack(&state.pack) {
            Ok(Some(found)) => {
                inner.packs.expect_present(&state);
                inner.packs.install(&state, found.file, found.len, found.identity);
                true
            }
            Ok(None) => false,
            Err(_) => {
                bump(&inner.counters.tier_errors);
                false
            }
        };
        tokio::task::spawn_blocking(look).await.unwrap_or(false)
    }

    /// Makes a published pack whole again whose sidecars a killed eviction took away: without its index it
    /// could not be read while the lake is away.
    async fn put_missing_sidecars(
        self: &Arc<Self>,
        tier: &Arc<dyn FetchTier>,
        pack: PackId,
    ) -> Result<(), PackFillError> {
        let looker = tier.clone();
        if self.on_tier(pack, move || looker.has_sidecar(&pack, Sidecar::Index)).await? {
            return Ok(());
        }
        let meta = self.metas.full(&pack, self.prefetch_deadline()).await;
        let meta = meta.map_err(|error| PackFillError::of_meta(pack, error))?;
        let tier = tier.clone();
        self.on_tier(pack, move || put_sidecars(tier.as_ref(), &meta)).await
    }

    async fn fill_and_publish(
        self: &Arc<Self>,
        tier: &Arc<dyn FetchTier>,
        state: &Arc<PackState>,
        fill: &Arc<FillState>,
    ) -> Result<(), PackFillError> {
        let _slot = self.fills.packs.acquire().await.map_err(|_| PackFillError::Cancelled)?;
        if fill.is_exclusive() {
            if self.take_turn_to_publish(tier, state, fill).await? == Turn::Published {
                return Ok(());
            }
            fill.spans.take_all();
        }
        if self.gather(tier, state, fill).await? == Turn::Published
            || self.take_turn_to_publish(tier, state, fill).await? == Turn::Published
        {
            return Ok(());
        }
        for _ in 0..READ_BACKS_MAX {
            self.mend(fill).await?;
            self.fix_proof(tier, fill).await?;
            let bad = self.read_back(fill).await?;
            if bad.is_empty() {
                return self.publish(tier, state, fill).await;
            }
            bump(&self.counters.heals);
            tracing::warn!(pack = %fill.pack, contents = bad.len(), "staged bytes were damaged; fetching them again");
            fill.set_todo(&bad);
        }
        Err(PackFillError::Damaged { pack: fill.pack })
    }

    pub(super) fn prefetch_deadline(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.cfg.prefetch_timeout_ms)
    }

    /// Runs tier I/O on a blocking thread; a failure ends the fill.
    pub(super) async fn on_tier<T: Send + 'static>(
        &self,
        pack: PackId,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, PackFillError> {
        let done = tokio::task::spawn_blocking(work).await.map_err(|_| PackFillError::Cancelled)?;
        done.map_err(|error| self.tier_failed(pack, error))
    }

    fn tier_failed(&self, pack: PackId, error: io::Error) -> PackFillError {
        // That another node was faster is no fault of the tier.
        if !is_overtaken(&error) {
            bump(&self.counters.tier_errors);
        }
        PackFillError::Tier { pack, source: Arc::new(error) }
    }

    /// Checks a piece as far as anything is known that proves it. Of an imported pack without a proof
    /// that is nothing: its bytes came from the pinned objects.
    pub(super) fn is_good_piece(&self, fill: &FillState, piece: &Piece, bytes: &[u8]) -> bool {
        let begun = std::time::Instant::now();
        let good = match fill.meta.is_native() {
            true => fill.meta.index.check_piece(piece, bytes, &*fill.meta).is_ok(),
            false => content_parts(&fill.meta, piece).iter().all(|part| is_good_part(fill, part, bytes)),
        };
        self.note_verify_time(begun.elapsed());
        good
    }

    /// Brings pieces that nobody brings yet, several at once, as long as they are wanted.
    pub(super) async fn bring_pieces(
        self: &Arc<Self>,
        fill: &Arc<FillState>,
        pieces: Vec<usize>,
        are_wanted: impl Fn() -> bool,
    ) -> Result<(), PackFillError> {
        let are_wanted = &are_wanted;
        stream::iter(pieces.into_iter().map(Ok))
            .try_for_each_concurrent(self.cfg.prefetch_requests_max.max(1), |index| async move {
                let weight = self.fills.weight();
                let _request = self.fills.requests.acquire_many(weight).await.map_err(|_| PackFillError::Cancelled)?;
                let Some(len) = fill.pieces.get(index).map(|piece| piece.len) else {
                    return Ok(());
                };
                let _permit = self.lanes.acquire(Lane::Prefetch, len).await;
                if !are_wanted() {
                    return Ok(());
                }
                match fill.begin(index) {
                    Some(flight) => self.bring_piece(flight).await,
                    None => Ok(()),
                }
            })
            .await
    }

    /// Fetches again what was found to be damaged.
    async fn mend(self: &Arc<Self>, fill: &Arc<FillState>) -> Result<(), PackFillError> {
        let all = 0..fill.pieces.len();
        while !fill.are_done(all.clone()) {
            self.bring_pieces(fill, fill.todo(all.clone()), || true).await?;
            self.until_landed(fill, all.clone()).await;
        }
        Ok(())
    }

    /// Waits for a piece that a reader took on.
    pub(super) async fn until_landed(&self, fill: &Arc<FillState>, among: std::ops::Range<usize>) {
        if let Some(mut flying) = fill.flying(among) {
            let _ = flying.wait_for(Option::is_some).await;
        }
    }

    /// Brings a piece now, because a reader is about to want it.
    pub(super) fn bring_now(self: &Arc<Self>, fill: &Arc<FillState>, index: usize) {
        let Some(flight) = fill.begin(index) else {
            return;
        };
        let inner = self.clone();
        self.rt.spawn(async move {
            let bring = async {
                let _permit = inner.lanes.acquire(Lane::Demand, flight.piece().len).await;
                inner.bring_piece(flight).await
            };
            tokio::select! {
                result = bring => drop(result),
                () = inner.stopped.cancelled() => {}
            }
        });
    }

    async fn bring_piece(self: &Arc<Self>, flight: PieceFlight) -> Result<(), PackFillError> {
        let (fill, piece) = (flight.fill().clone(), flight.piece());
        let deadline = self.prefetch_deadline();
        let mut tries = 0;
        let bytes = loop {
            tries += 1;
            let bytes = match fill.meta.object_of(piece.first) {
                Some(object @ Object::Own(_)) => self.native_piece(&object, &piece, deadline).await,
                _ => self.assembled_piece(&fill, &piece, deadline).await,
            };
            let bytes = bytes.map_err(|(key, error)| PackFillError::of_source(fill.pack, key, error))?;
            match self.check_and_write(&fill, piece, bytes).await? {
                Written::Done(bytes) => break bytes,
                Written::Tier(error) => return Err(self.tier_failed(fill.pack, error)),
                Written::Wrong => bump(&self.counters.damaged_fetches),
            }
            if tries >= self.cfg.damaged_tries_max {
                return Err(PackFillError::Damaged { pack: fill.pack });
            }
        };
        let (index, len) = (flight.index, piece.len);
        flight.land(bytes);
        if !fill.is_exclusive() {
            self.kept.note(&fill, index, len);
        }
        self.mark_if_complete(&fill, fill.spans.of(piece.offset)).await
    }

    /// Marks a span of ours when all of it is there.
    pub(super) async fn mark_if_complete(
        self: &Arc<Self>,
        fill: &Arc<FillState>,
        span: u64,
    ) -> Result<(), PackFillError> {
        if !fill.are_done(fill.pieces_of(span)) || !fill.spans.begin_marking(span) {
            return Ok(());
        }
        let marker = fill.clone();
        let mark = move || {
            marker.stage.mark_done(span).inspect_err(|_| marker.spans.not_marked(span))?;
            marker.spans.marked(span);
            Ok(())
        };
        self.on_tier(fill.pack, mark).await
    }

    async fn native_piece(
        &self,
        object: &Object,
        piece: &Piece,
        deadline: Instant,
    ) -> Result<Bytes, (String, SourceError)> {
        let read = self.reader.read(object, piece.offset..piece.end(), For::Prefetch, deadline).await;
        read.map_err(|error| (object.name(), error))
    }

    /// Gathers a piece from the user's own objects. What is gone stays zeros and is noted.
    async fn assembled_piece(
        &self,
        fill: &Arc<FillState>,
        piece: &Piece,
        deadline: Instant,
    ) -> Result<Bytes, (String, SourceError)> {
        let known_gone = |part: &ContentPart| fill.meta.proof().is_some() && fill.meta.digest(part.position).is_none();
        let (gone, wanted): (Vec<_>, Vec<_>) = content_parts(&fill.meta, piece).into_iter().partition(known_gone);
        gone.iter().for_each(|part| fill.learn_gone(part.position));
        let fetched: Vec<(ContentPart, Option<Bytes>)> = stream::iter(wanted)
            .map(|part| async move {
                let Some(object) = fill.meta.object_of(part.position) else {
                    return Ok((part, None));
                };
                match self.reader.read(&object, part.logical.clone(), For::Prefetch, deadline).await {
                    Ok(bytes) => Ok((part, Some(bytes))),
                    Err(SourceError::Permanent(error)) if is_gone(&error) => Ok((part, None)),
                    Err(error) => Err((object.name(), error)),
                }
            })
            .buffer_unordered(PIECE_REQUESTS_MAX)
            .try_collect()
            .await?;
        let mut bytes = BytesMut::zeroed(piece.len as usize);
        for (part, found) in fetched {
            match (found, bytes.get_mut(part.in_piece.clone())) {
                (Some(found), Some(target)) if found.len() == target.len() => {
                    target.copy_from_slice(&found);
                    fill.learn(part.position, part.logical.start, &found);
                }
                _ => fill.learn_gone(part.position),
            }
        }
        Ok(bytes.freeze())
    }

    async fn check_and_write(
        self: &Arc<Self>,
        fill: &Arc<FillState>,
        piece: Piece,
        bytes: Bytes,
    ) -> Result<Written, PackFillError> {
        let (inner, fill) = (self.clone(), fill.clone());
        let work = move || {
            if !inner.is_good_piece(&fill, &piece, &bytes) {
                return Written::Wrong;
            }
            match fill.stage.write_at(&bytes, piece.offset) {
                Ok(()) => Written::Done(bytes),
                Err(error) => Written::Tier(error),
            }
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| PackFillError::Cancelled)
    }

    /// Digests the staged pack as it lies there; gives the damaged contents.
    async fn read_back(self: &Arc<Self>, fill: &Arc<FillState>) -> Result<Vec<u32>, PackFillError> {
        let begun = std::time::Instant::now();
        let (staged, stopped) = (fill.clone(), self.stopped.clone());
        let work =
            move || digest_all(&staged.meta, &|buf, at| staged.read_staged(buf, at), &|| !stopped.is_cancelled());
        let findings: Findings = self.on_tier(fill.pack, work).await?;
        self.note_verify_time(begun.elapsed());
        Ok(findings.bad)
    }

    async fn publish(
        self: &Arc<Self>,
        tier: &Arc<dyn FetchTier>,
        state: &Arc<PackState>,
        fill: &Arc<FillState>,
    ) -> Result<(), PackFillError> {
        let (inner, state, fill, tier) = (self.clone(), state.clone(), fill.clone(), tier.clone());
        let pack = fill.pack;
        let work = move || -> io::Result<()> {
            put_sidecars(tier.as_ref(), &fill.meta)?;
            state.know_contents(&fill.meta.index);
            let ours = fill.stage.file_id();
            let published = fill.stage.publish()?;
            let is_ours = ours == Some(published.identity.file_id);
            let open = inner.packs.install(&state, published.file, published.len, published.identity);
            if fill.meta.is_complete_in_tier() {
                open.set_complete();
                if is_ours && open.identity == published.identity {
                    inner.packs.note_whole_verified(&state, &open);
                }
            }
            bump(&inner.counters.packs_published);
            inner.counters.bytes_published.fetch_add(published.len, Ordering::Relaxed);
            Ok(())
        };
        self.on_tier(pack, work).await
    }
}

/// Takes the fill out of the pack's state when it ends, however it ends, and gives its claims up:
/// others need not wait until they run out.
struct Registered {
    state: Arc<PackState>,
    fill: Arc<FillState>,
    rt: tokio::runtime::Handle,
    released: bool,
}

impl Registered {
    async fn end(mut self) {
        self.released = true;
        let fill = self.fill.clone();
        // A panic there is logged by the runtime; claims that stay run out.
        let _ = tokio::task::spawn_blocking(move || fill.release()).await;
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut slot = self.state.fill.write();
        if slot.as_ref().is_some_and(|there| Arc::ptr_eq(there, &self.fill)) {
            *slot = None;
        }
        drop(slot);
        if !self.released {
            let fill = self.fill.clone();
            self.rt.spawn_blocking(move || fill.release());
        }
    }
}

/// The index last: where it is, the others are.
fn put_sidecars(tier: &dyn FetchTier, meta: &PackMeta) -> io::Result<()> {
    let (pack, (index, outboard)) = (meta.recipe.pack, meta.sidecars());
    if !outboard.is_empty() {
        tier.put_sidecar(&pack, Sidecar::Outboard, outboard)?;
    }
    tier.put_sidecar(&pack, Sidecar::Recipe, &meta.recipe.encode())?;
    tier.put_sidecar(&pack, Sidecar::Index, index).map(drop)
}

fn tries_max(error: &io::Error) -> u32 {
    match error {
        error if is_overtaken(error) => OVERTAKEN_TRIES_MAX,
        error if is_full(error) => FULL_TRIES_MAX,
        _ => FILL_TRIES_MAX,
    }
}

fn is_gone(error: &LakeError) -> bool {
    matches!(error, LakeError::NotFound { .. } | LakeError::Precondition { .. })
}

/// Checks a part of an imported content against what is known of it.
fn is_good_part(fill: &FillState, part: &ContentPart, piece: &[u8]) -> bool {
    let meta: &PackMeta = &fill.meta;
    let Some(bytes) = piece.get(part.in_piece.clone()) else {
        return false;
    };
    if fill.is_gone(part.position) {
        // Gone now, but there when the proof was made: such a pack is not published again.
        return meta.proof().is_none() || !meta.is_in_tier(part.position);
    }
    let Some(expected) = meta.digest(part.position) else {
        return true;
    };
    let whole = meta.content(part.position).is_some_and(|c| c.size == bytes.len() as u64);
    if whole {
        return digest(bytes) == expected;
    }
    let first = part.logical.start / BLOCK_LEN;
    (first..).zip(bytes.chunks(BLOCK_LEN as usize)).all(|(block, bytes)| {
        match meta.unit_proof(part.position, block) {
            UnitProof::Block(value) => block_cv(block, bytes) == value,
            // Checked as a whole when the pack is read back.
            UnitProof::Pin => true,
            UnitProof::Digest(_) | UnitProof::Damaged => false,
        }
    })
}

impl PackFillError {
    fn of_source(pack: PackId, key: String, error: SourceError) -> Self {
        let (SourceError::Late { source, .. } | SourceError::Permanent(source)) = error;
        Self::Lake { pack, key, source }
    }

    pub(super) fn of_meta(pack: PackId, error: MetaError) -> Self {
        match error {
            MetaError::Source { key, error } => Self::of_source(pack, key, error),
            MetaError::Damaged { .. } => Self::Damaged { pack },
        }
    }
}
