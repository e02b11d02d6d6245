//! Filling one pack: pieces, in parallel, verified, written to the tier's staging file, published.
//!
//! ```text
//! open stage -> claims -> pieces -> marks -> the turn to publish -> proof -> read back -> publish
//! ```
//!
//! Invariants:
//! * Only bytes that have their digest are written (of an imported pack without a proof: bytes that
//!   came from the pinned object itself).
//! * What is published was digested as it lies in the staging file, after the last sync: a byte that
//!   was damaged between write and publish is found and fetched again.
//! * A piece in flight is known to readers, who may wait for it; a piece that is done may be read
//!   from the staging file, where it is checked again.
//! * A piece belongs to the span where it begins, and a mark says that all pieces of its span are there.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::format::digest::{BLOCK_LEN, ChainingValue, ContentHasher, Outboard, block_count, block_cv};
use crate::format::ids::{ContentDigest, PackId};
use crate::format::pack::{Piece, Place};
use crate::format::placement::Location;
use crate::store::tier::TierError;

use super::pack_meta::PackMeta;
use super::port::{FetchStage, SpanClaim};
use super::spans::{SpanState, Spans};
use super::types::ContentRef;

/// What came of a piece that a reader waited for: its bytes, or none.
type Arrival = Option<Option<Bytes>>;

#[derive(Debug)]
enum PieceStatus {
    Todo,
    Flying(watch::Receiver<Arrival>),
    /// In the staging file; `ours`: this process checked it and wrote it. `kept`: the checked bytes, for
    /// those who read just behind the fill.
    Done {
        ours: bool,
        kept: Option<Bytes>,
    },
}

/// What was learned of an imported content from the bytes that the pinned object gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Learned {
    /// All of it.
    Digest(ContentDigest, Option<Outboard>),
    /// Some of its blocks.
    Blocks(Vec<Option<ChainingValue>>),
    /// The source object is gone, or is another one now.
    Gone,
}

/// A pack that is being filled here.
#[derive(Debug)]
pub(super) struct FillState {
    pub pack: PackId,
    pub meta: Arc<PackMeta>,
    pub pieces: Vec<Piece>,
    pub stage: Box<dyn FetchStage>,
    status: Mutex<Vec<PieceStatus>>,
    pub spans: Spans,
    /// When the marks of others were last looked for.
    pub polled: Mutex<Option<Instant>>,
    learned: Mutex<BTreeMap<u32, Learned>>,
    bytes_done: AtomicU64,
    /// The claims were given up. Whoever claims holds it meanwhile: a claim that came behind that would stay.
    released: RwLock<bool>,
}

/// The duty to bring a piece.
#[derive(Debug)]
pub(super) struct PieceFlight {
    fill: Arc<FillState>,
    pub index: usize,
    arrival: Option<watch::Sender<Arrival>>,
}

/// How a reader may get at a piece.
#[derive(Debug)]
pub(super) enum PieceAt {
    /// In the staging file.
    Staged,
    /// Wait for it.
    Flying(watch::Receiver<Arrival>),
    /// Nobody brings it yet.
    Todo,
}

impl FillState {
    /// `first_at`: an offset that a reader waits for, where one does.
    pub(super) fn new(
        meta: Arc<PackMeta>,
        stage: Box<dyn FetchStage>,
        piece_len: u64,
        first_at: Option<u64>,
    ) -> Arc<Self> {
        let pieces = meta.index.pieces(piece_len);
        let status = pieces.iter().map(|_| PieceStatus::Todo).collect();
        let spans = Spans::new(meta.index.len, stage.span_len(), first_at);
        let fill = Self {
            pack: meta.recipe.pack,
            meta,
            pieces,
            stage,
            status: Mutex::new(status),
            spans,
            polled: Mutex::new(None),
            learned: Mutex::default(),
            bytes_done: AtomicU64::new(0),
            released: RwLock::new(false),
        };
        if !fill.is_exclusive() {
            fill.take_marks();
        }
        Arc::new(fill)
    }

    /// Says whether one node brings all of the pack: what another wrote of an imported one proves
    /// nothing before its digests are fixed.
    pub(super) fn is_exclusive(&self) -> bool {
        !self.meta.is_native()
    }

    /// Counts in what others have marked since.
    pub(super) fn take_marks(&self) {
        for span in self.spans.take_marks(|span| self.stage.is_done(span)) {
            for index in self.pieces_of(span) {
                self.set_done(index, false);
            }
        }
    }

    /// Gives the span of the piece that holds an offset.
    pub(super) fn span_of(&self, offset: u64) -> u64 {
        let piece = self.piece_of(&(offset..offset)).and_then(|index| self.pieces.get(index));
        self.spans.of(piece.map_or(offset, |piece| piece.offset))
    }

    /// Says whether this node brings a piece's span.
    pub(super) fn is_mine(&self, index: usize) -> bool {
        let piece = self.pieces.get(index);
        piece.is_some_and(|piece| matches!(self.spans.state(self.spans.of(piece.offset)), SpanState::Mine { .. }))
    }

    /// Lists the pieces that begin in a span.
    pub(super) fn pieces_of(&self, span: u64) -> Range<usize> {
        let range = self.spans.range(span);
        let at = |offset| self.pieces.partition_point(|piece: &Piece| piece.offset < offset);
        at(range.start)..at(range.end)
    }

    pub(super) fn bytes_done(&self) -> u64 {
        self.bytes_done.load(Ordering::Relaxed)
    }

    /// Finds the piece that holds this range of the pack; None where it crosses pieces.
    pub(super) fn piece_of(&self, range: &Range<u64>) -> Option<usize> {
        let behind = self.pieces.partition_point(|piece| piece.offset <= range.start);
        let index = behind.checked_sub(1)?;
        (range.end <= self.pieces.get(index)?.end()).then_some(index)
    }

    /// Gives where a range of a content lies in the pack, if the pack's own index says that too.
    pub(super) fn place_of(&self, c: &ContentRef, range: &Range<u64>) -> Option<Range<u64>> {
        let Location::Run { offset, .. } = c.location else {
            return None;
        };
        self.meta.position(&c.content, c.size, &c.location)?;
        Some(offset.checked_add(range.start)?..offset.checked_add(range.end)?)
    }

    /// Gives a range of the pack out of a piece whose checked bytes are still in memory.
    pub(super) fn kept(&self, range: &Range<u64>) -> Option<Bytes> {
        let index = self.piece_of(range)?;
        let piece = match self.status.lock().get(index)? {
            PieceStatus::Done { kept: Some(bytes), .. } => bytes.clone(),
            _ => return None,
        };
        self.cut(index, range, &piece)
    }

    /// Lets the bytes of a piece go; they are in the staging file.
    pub(super) fn let_go(&self, index: usize) {
        if let Some(PieceStatus::Done { kept, .. }) = self.status.lock().get_mut(index) {
            *kept = None;
        }
    }

    /// Cuts a range of the pack out of a piece that has arrived.
    pub(super) fn cut(&self, index: usize, range: &Range<u64>, piece: &Bytes) -> Option<Bytes> {
        let start = self.pieces.get(index)?.offset;
        let (from, to) = (range.start.checked_sub(start)?, range.end.checked_sub(start)?);
        let (from, to) = (usize::try_from(from).ok()?, usize::try_from(to).ok()?);
        (from <= to && to <= piece.len()).then(|| piece.slice(from..to))
    }

    pub(super) fn piece_at(&self, index: usize) -> PieceAt {
        match self.status.lock().get(index) {
            Some(PieceStatus::Done { .. }) => PieceAt::Staged,
            Some(PieceStatus::Flying(arrival)) => PieceAt::Flying(arrival.clone()),
            _ => PieceAt::Todo,
        }
    }

    /// Claims a span, or the turn to publish; nothing once the claims were given up.
    pub(super) fn claim(&self, span: u64) -> io::Result<SpanClaim> {
        let released = self.released.read();
        if *released {
            let path = format!("the fill of pack {}", self.pack.short());
            return Err(io::Error::other(TierError::Gone { path, source: io::ErrorKind::Interrupted.into() }));
        }
        self.stage.claim(span)
    }

    /// Gives up the claims that are still ours, those of calls that run just now too.
    pub(super) fn release(&self) {
        *self.released.write() = true;
        self.stage.release();
    }

    /// Takes on a piece that nobody brings yet.
    pub(super) fn begin(self: &Arc<Self>, index: usize) -> Option<PieceFlight> {
        let mut status = self.status.lock();
        let slot = status.get_mut(index)?;
        if !matches!(slot, PieceStatus::Todo) {
            return None;
        }
        let (sender, receiver) = watch::channel(None);
        *slot = PieceStatus::Flying(receiver);
        Some(PieceFlight { fill: self.clone(), index, arrival: Some(sender) })
    }

    /// Lists those of these pieces that nobody brings yet.
    pub(super) fn todo(&self, among: Range<usize>) -> Vec<usize> {
        let status = self.status.lock();
        among.filter(|index| matches!(status.get(*index), Some(PieceStatus::Todo))).collect()
    }

    /// Gives one of these pieces that others bring at this moment.
    pub(super) fn flying(&self, among: Range<usize>) -> Option<watch::Receiver<Arrival>> {
        let status = self.status.lock();
        status.get(among)?.iter().find_map(|s| match s {
            PieceStatus::Flying(arrival) => Some(arrival.clone()),
            _ => None,
        })
    }

    /// Says whether all of these pieces are there.
    pub(super) fn are_done(&self, among: Range<usize>) -> bool {
        let status = self.status.lock();
        status.get(among).is_some_and(|all| all.iter().all(|s| matches!(s, PieceStatus::Done { .. })))
    }

    /// Says whether this process checked the piece and wrote it.
    pub(super) fn is_ours(&self, index: usize) -> bool {
        matches!(self.status.lock().get(index), Some(PieceStatus::Done { ours: true, .. }))
    }

    /// Counts a piece in when it was written, here or by another.
    pub(super) fn set_done(&self, index: usize, ours: bool) {
        self.set_done_and_keep(index, ours, None);
    }

    fn set_done_and_keep(&self, index: usize, ours: bool, kept: Option<Bytes>) {
        let Some(piece) = self.pieces.get(index) else {
            return;
        };
        if let Some(slot) = self.status.lock().get_mut(index) {
            match slot {
                PieceStatus::Done { .. } => return,
                // The bytes that are on their way here are the same; who waits for them gets them.
                PieceStatus::Flying(_) if !ours => return,
                slot => *slot = PieceStatus::Done { ours, kept },
            }
        }
        self.bytes_done.fetch_add(piece.len, Ordering::Relaxed);
    }

    /// Sends the pieces of damaged contents back to be fetched again.
    pub(super) fn set_todo(&self, positions: &[u32]) {
        let mut status = self.status.lock();
        for (piece, slot) in self.pieces.iter().zip(status.iter_mut()) {
            let hit = positions.iter().any(|p| (piece.first..=piece.last).contains(p));
            if hit && matches!(slot, PieceStatus::Done { .. }) {
                *slot = PieceStatus::Todo;
                self.bytes_done.fetch_sub(piece.len, Ordering::Relaxed);
            }
        }
    }

    /// Reads a range that lies in a staged piece.
    pub(super) fn read_staged(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let mut at = 0;
        while let Some(rest) = buf.get_mut(at..).filter(|rest| !rest.is_empty()) {
            match self.stage.read_at(rest, offset + at as u64)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                n => at += n,
            }
        }
        Ok(())
    }

    /// Notes what the fetched bytes of one content of a piece are. `logical` is where they start.
    pub(super) fn learn(&self, position: u32, logical: u64, bytes: &[u8]) {
        let Some(content) = self.meta.content(position) else {
            return;
        };
        let learned = learn(content.size, logical, bytes);
        let mut all = self.learned.lock();
        let Learned::Blocks(new) = learned else {
            all.insert(position, learned);
            return;
        };
        let slot = all.entry(position).or_insert_with(|| Learned::Blocks(vec![None; new.len()]));
        if let Learned::Blocks(blocks) = slot {
            for (block, new) in blocks.iter_mut().zip(new) {
                *block = new.or(*block);
            }
        }
    }

    pub(super) fn learn_gone(&self, position: u32) {
        self.learned.lock().insert(position, Learned::Gone);
    }

    pub(super) fn is_gone(&self, position: u32) -> bool {
        matches!(self.learned.lock().get(&position), Some(Learned::Gone))
    }

    /// Gives what was learned of a content, put together where it came in blocks.
    pub(super) fn learned(&self, position: u32) -> Option<Learned> {
        let found = self.learned.lock().get(&position).cloned()?;
        let Learned::Blocks(blocks) = found else {
            return Some(found);
        };
        let blocks: Option<Vec<_>> = blocks.into_iter().collect();
        let size = self.meta.content(position)?.size;
        let (digest, outboard) = Outboard::of_blocks(size, blocks?)?;
        Some(Learned::Digest(digest, Some(outboard)))
    }

    /// Gives the digest of a small imported content as it was fetched.
    pub(super) fn learned_digest(&self, position: u32) -> Option<ContentDigest> {
        match self.learned.lock().get(&position)? {
            Learned::Digest(digest, _) => Some(*digest),
            _ => None,
        }
    }
}

/// Digests a content, or blocks of it.
fn learn(size: u64, logical: u64, bytes: &[u8]) -> Learned {
    if bytes.len() as u64 == size {
        let mut hasher = ContentHasher::new();
        hasher.update(bytes);
        let (digest, outboard) = hasher.finish();
        return Learned::Digest(digest, outboard);
    }
    let mut blocks = vec![None; block_count(size) as usize];
    let first = logical / BLOCK_LEN;
    for (index, block) in (first..).zip(bytes.chunks(BLOCK_LEN as usize)) {
        if let Some(slot) = blocks.get_mut(index as usize) {
            *slot = Some(block_cv(index, block));
        }
    }
    Learned::Blocks(blocks)
}

impl PieceFlight {
    pub(super) fn fill(&self) -> &Arc<FillState> {
        &self.fill
    }

    pub(super) fn piece(&self) -> Piece {
        *self.fill.pieces.get(self.index).expect("a flight is begun for a piece that exists")
    }

    /// Says that the bytes are verified and written. Those of an imported pack are not kept: without a
    /// proof nothing says that all nodes got the same.
    pub(super) fn land(mut self, bytes: Bytes) {
        let kept = (!self.fill.is_exclusive()).then(|| bytes.clone());
        self.fill.set_done_and_keep(self.index, true, kept);
        if let Some(arrival) = self.arrival.take() {
            arrival.send_replace(Some(Some(bytes)));
        }
    }
}

impl Drop for PieceFlight {
    /// A piece that did not land may be begun again.
    fn drop(&mut self) {
        let Some(arrival) = self.arrival.take() else {
            return;
        };
        if let Some(slot) = self.fill.status.lock().get_mut(self.index) {
            *slot = PieceStatus::Todo;
        }
        arrival.send_replace(Some(None));
    }
}

/// One content's part of a piece: where it lies in the content, and in the piece's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ContentPart {
    pub position: u32,
    pub logical: Range<u64>,
    pub in_piece: Range<usize>,
}

/// Lists the parts of contents in a piece of an imported pack, whose contents are runs.
pub(super) fn content_parts(meta: &PackMeta, piece: &Piece) -> Vec<ContentPart> {
    let positions = piece.first..=piece.last;
    positions
        .filter_map(|position| {
            let content = meta.content(position)?;
            let Place::Run { offset } = content.place else {
                return None;
            };
            let start = piece.offset.max(offset);
            let end = piece.end().min(content.end());
            (start < end).then(|| ContentPart {
                position,
                logical: start - offset..end - offset,
                in_piece: (start - piece.offset) as usize..(end - piece.offset) as usize,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::digest::digest;

    #[test]
    fn a_content_that_came_in_blocks_has_the_same_digest() {
        let bytes: Vec<u8> = (0..3 * BLOCK_LEN + 5).map(|i| (i % 253) as u8).collect();
        let size = bytes.len() as u64;
        let whole = learn(size, 0, &bytes);
        let Learned::Digest(found, Some(outboard)) = whole else { panic!("it came whole") };
        assert_eq!(found, digest(&bytes));
        let cut = 2 * BLOCK_LEN as usize;
        let Learned::Blocks(first) = learn(size, 0, &bytes[..cut]) else { panic!("it came in parts") };
        let Learned::Blocks(last) = learn(size, cut as u64, &bytes[cut..]) else { panic!("it came in parts") };
        let merged: Vec<_> = first.iter().zip(&last).map(|(a, b)| a.or(*b)).collect();
        assert_eq!(merged, outboard.blocks.iter().map(|b| Some(*b)).collect::<Vec<_>>());
    }
}
