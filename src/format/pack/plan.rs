//! Which content goes to which pack: decided by sizes alone, before anything is read.
//!
//! A [`PackPlanner`] takes stored sizes in tree order and says at once which pack, which position
//! and which offset each gets; it says when a pack is full. [`PackDraft`] collects what becomes
//! known later (the content ids) and turns into a [`PackIndex`] when all of it is there.

use std::collections::BTreeMap;

use crate::format::ids::ContentId;
use crate::format::placement::Extent;

use super::{ALIGN, PACK_LEN_MIN, PackIndex, PackedContent, Place, WHOLE_LEN_MIN, align_up};

/// Sizes that grow with the dataset so that a placement has at most about 2,000 packs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// A pack is closed when it holds at least this.
    pub pack_len: u64,
    /// A file above this is a pack of its own, with its exact length.
    pub whole_len: u64,
}

impl Layout {
    /// Chooses by the bytes of the whole tree: at most 1,000 packs that are full, and at most
    /// 2,000 files that are packs of their own.
    pub fn for_bytes(total: u64) -> Self {
        Self { pack_len: (total / 1000).max(PACK_LEN_MIN), whole_len: (total / 2000).max(WHOLE_LEN_MIN) }
    }
}

/// Where a content comes to lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Number of the pack in this plan, from 0, in the order in which packs were opened.
    pub pack: u64,
    /// Position in the pack's index.
    pub position: u32,
    pub place: Place,
    /// Whether the content is the whole pack, with its exact length.
    pub whole: bool,
    /// A pack that is complete with this content (its own, where that is full or whole).
    pub closed: Option<Closed>,
}

/// A pack that gets no more contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed {
    pub pack: u64,
    /// Length of the pack.
    pub len: u64,
    /// How many contents it has.
    pub contents: u32,
}

/// Extents of a sparse content at most: a writer stores the smallest holes as zeros ([`coalesce`]).
pub const EXTENTS_MAX: usize = 1024;

/// Joins the extents of a sparse file (position, length; in order) across their smallest holes
/// until at most `max` are left. A hole that was joined must be stored as zeros.
pub fn coalesce(data: &mut Vec<(u64, u64)>, max: usize) {
    let max = max.max(1);
    if data.len() <= max {
        return;
    }
    let hole = |pair: &[(u64, u64)]| match pair {
        [(start, len), (next, _)] => next.saturating_sub(start.saturating_add(*len)),
        _ => 0,
    };
    let mut holes: Vec<(u64, usize)> = data.windows(2).map(hole).zip(1..).collect();
    holes.sort_unstable();
    let joined: std::collections::HashSet<usize> = holes.iter().take(data.len() - max).map(|(_, at)| *at).collect();
    let mut kept: Vec<(u64, u64)> = Vec::with_capacity(max);
    for (at, &(start, len)) in data.iter().enumerate() {
        match kept.last_mut() {
            Some(last) if joined.contains(&at) => last.1 = start.saturating_add(len).saturating_sub(last.0),
            _ => kept.push((start, len)),
        }
    }
    *data = kept;
}

/// Says why a content cannot be laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("an empty content has no place in a pack")]
    Empty,
    #[error("the extents are not in order, overlap, or reach above the size")]
    Extents,
    #[error("a sparse content has at most 1024 extents: join the smallest holes")]
    TooMany,
    #[error("the pack would be longer than 2^63 bytes")]
    TooLong,
}

/// Lays contents out in order: fills one pack after the other, gives large ones a pack of their own.
#[derive(Debug)]
pub struct PackPlanner {
    layout: Layout,
    /// Number that the next pack gets.
    next: u64,
    /// The pack that is being filled.
    open: Option<Closed>,
}

impl PackPlanner {
    pub fn new(layout: Layout) -> Self {
        Self { layout, next: 0, open: None }
    }

    /// Places a content of `size` bytes, all of them stored.
    pub fn push(&mut self, size: u64) -> Result<Slot, PlanError> {
        self.place(size, |offset| Ok((Place::Run { offset }, offset.checked_add(size).ok_or(PlanError::TooLong)?)))
    }

    /// Places a sparse content of `size` bytes: `data` has (position, length) of what is not a hole.
    pub fn push_sparse(&mut self, size: u64, data: &[(u64, u64)]) -> Result<Slot, PlanError> {
        let mut end = 0_u64;
        for &(logical, len) in data {
            let ends = logical.checked_add(len).filter(|ends| len > 0 && logical >= end && *ends <= size);
            end = ends.ok_or(PlanError::Extents)?;
        }
        if data.len() > EXTENTS_MAX {
            return Err(PlanError::TooMany);
        }
        let stored = data.iter().map(|(_, len)| len).sum();
        self.place(stored, |offset| place_extents(offset, data))
    }

    /// Closes the pack that is open, at the end of the plan.
    pub fn finish(&mut self) -> Option<Closed> {
        self.open.take()
    }

    fn place(&mut self, stored: u64, at: impl Fn(u64) -> Result<(Place, u64), PlanError>) -> Result<Slot, PlanError> {
        if stored == 0 {
            return Err(PlanError::Empty);
        }
        if stored > self.layout.whole_len {
            let (place, len) = at(0)?;
            let closed = Closed { pack: self.take_number(), len: checked(len)?, contents: 1 };
            return Ok(Slot { pack: closed.pack, position: 0, place, whole: true, closed: Some(closed) });
        }
        let mut open = match self.open.take() {
            Some(open) => open,
            None => Closed { pack: self.take_number(), len: 0, contents: 0 },
        };
        let (place, end) = at(open.len)?;
        let slot = Slot { pack: open.pack, position: open.contents, place, whole: false, closed: None };
        open.len = checked(align_up(end).ok_or(PlanError::TooLong)?)?;
        open.contents += 1;
        if open.len >= self.layout.pack_len || open.contents == u32::MAX {
            return Ok(Slot { closed: Some(open), ..slot });
        }
        self.open = Some(open);
        Ok(slot)
    }

    fn take_number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }
}

/// Keeps lengths below what any reader's sums can hold.
fn checked(len: u64) -> Result<u64, PlanError> {
    if len <= i64::MAX as u64 { Ok(len) } else { Err(PlanError::TooLong) }
}

/// Lays extents out from `offset` on, each on the next boundary; gives the end of the last.
pub(super) fn place_extents(offset: u64, data: &[(u64, u64)]) -> Result<(Place, u64), PlanError> {
    let mut extents = Vec::with_capacity(data.len());
    let mut end = offset;
    for &(logical, len) in data {
        let offset = align_up(end).ok_or(PlanError::TooLong)?;
        end = offset.checked_add(len).ok_or(PlanError::TooLong)?;
        extents.push(Extent { logical, offset, len });
    }
    debug_assert!(offset.is_multiple_of(ALIGN));
    Ok((Place::Sparse { extents }, end))
}

/// A pack whose layout is known and whose contents' ids arrive one by one, in any order.
#[derive(Debug, Default)]
pub struct PackDraft {
    closed: Option<Closed>,
    contents: BTreeMap<u32, PackedContent>,
}

impl PackDraft {
    /// Notes a content at its slot, once its id is known.
    pub fn fill(&mut self, slot: &Slot, size: u64, content: ContentId) {
        self.contents.insert(slot.position, PackedContent { content, size, place: slot.place.clone() });
    }

    /// Notes that the pack gets no more contents.
    pub fn close(&mut self, closed: Closed) {
        self.closed = Some(closed);
    }

    /// Says whether the pack is closed and the id of every content is known.
    pub fn is_complete(&self) -> bool {
        self.closed.is_some_and(|closed| self.contents.len() == closed.contents as usize)
    }

    /// Gives the index, where the draft is complete.
    pub fn finish(self) -> Option<PackIndex> {
        let len = self.closed.filter(|_| self.is_complete())?.len;
        Some(PackIndex { len, contents: self.contents.into_values().collect() })
    }
}
