//! What can be read without the network: memory, the tier's object, the staging file.
//!
//! The fast path reads straight into the caller's buffer: with `--verify tier`, or where this node
//! digested the object (or just these units) before. Everything else goes unit by unit: read a unit
//! whole, check it, keep it in memory, and remember that the object's unit is good.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::format::digest::{BLOCK_LEN, block_cv, digest};
use crate::format::ids::ContentId;
use crate::format::placement::Location;

use super::engine::{Inner, pack_of};
use super::fill::PieceAt;
use super::memory::UnitKey;
use super::pack_meta::{PackMeta, UnitProof};
use super::packs::{OpenPack, PackState};
use super::plan::{Part, parts, unit_range, units_of};
use super::stats::bump;
use super::types::{ContentRef, Verify};

/// What the places at hand say of a unit.
#[derive(Debug)]
pub(super) enum Local {
    /// Verified as asked.
    Unit(Bytes),
    /// Not here.
    Miss,
    /// Cannot be judged without the pack's description.
    NeedMeta,
    /// The tier's object has wrong bytes here.
    Damaged(Arc<OpenPack>),
}

/// Where the fast path looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Only where nothing can make it wait: a worker that waits for a server serves nobody.
    Memory,
    /// In the tier as well.
    Tier,
}

/// What the fast path did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fast {
    Filled,
    /// Ask the slow path.
    Ask,
}

impl Inner {
    /// Fills `buf` with the bytes from `offset` on, if they are at hand and good.
    pub(super) fn read_local(
        self: &Arc<Self>,
        c: &ContentRef,
        offset: u64,
        buf: &mut [u8],
        verify: Verify,
        reach: Reach,
    ) -> Fast {
        let Some(pack) = pack_of(c) else {
            buf.fill(0);
            return if self.is_holes(c) == Some(true) || buf.is_empty() { Fast::Filled } else { Fast::Ask };
        };
        let range = offset..offset + buf.len() as u64;
        let state = self.packs.state(&pack);
        let open = if reach == Reach::Tier { self.packs.open(&state) } else { None };
        if let Some(open) = &open
            && is_trusted(&state, open, c, &range, verify)
        {
            if self.read_object(&state, open, c, &range, buf) {
                self.counters.tier.add(buf.len() as u64);
                return Fast::Filled;
            }
            return Fast::Ask;
        }
        if let Some(bytes) = kept_range(&state, c, &range) {
            buf.copy_from_slice(&bytes);
            self.counters.memory.add(bytes.len() as u64);
            self.read_ahead(c, &units_of(&range), verify);
            return Fast::Filled;
        }
        self.read_units(&state, c, &range, buf, verify, reach)
    }

    /// Reads straight from the object. False: the tier failed; the reader goes to the lake.
    fn read_object(
        self: &Arc<Self>,
        state: &Arc<PackState>,
        open: &Arc<OpenPack>,
        c: &ContentRef,
        range: &Range<u64>,
        buf: &mut [u8],
    ) -> bool {
        let read = read_parts(c, range, buf, |part, offset| open.read_exact(part, offset));
        match read {
            Some(Ok(())) => true,
            Some(Err(_)) => {
                bump(&self.counters.tier_errors);
                self.packs.forget(state, open);
                false
            }
            None => false,
        }
    }

    fn read_units(
        self: &Arc<Self>,
        state: &Arc<PackState>,
        c: &ContentRef,
        range: &Range<u64>,
        buf: &mut [u8],
        verify: Verify,
        reach: Reach,
    ) -> Fast {
        let meta = self.metas.peek(&state.pack);
        if let Some(meta) = &meta {
            state.know_contents(&meta.index);
        }
        self.read_ahead(c, &units_of(range), verify);
        for block in units_of(range) {
            let key = UnitKey { content: c.content, block };
            let unit = match self.memory.get(&key) {
                Some(unit) => {
                    self.counters.memory.add(unit.len() as u64);
                    unit
                }
                None if reach == Reach::Memory => return Fast::Ask,
                None => match self.local_unit(state, c, block, verify, meta.as_deref()) {
                    Local::Unit(unit) => unit,
                    _ => return Fast::Ask,
                },
            };
            if copy_overlap(&unit, block, range, buf).is_none() {
                return Fast::Ask;
            }
        }
        Fast::Filled
    }

    /// Looks for one unit among what has just arrived, in the tier's object, then in the staging file.
    pub(super) fn local_unit(
        self: &Arc<Self>,
        state: &Arc<PackState>,
        c: &ContentRef,
        block: u64,
        verify: Verify,
        meta: Option<&PackMeta>,
    ) -> Local {
        if let Some(unit) = kept_range(state, c, &unit_range(c.size, block)) {
            self.counters.memory.add(unit.len() as u64);
            // A copy: whoever keeps the unit must not keep the whole piece.
            return Local::Unit(Bytes::copy_from_slice(&unit));
        }
        let Some(proof) = unit_proof(c, block, meta) else {
            return Local::NeedMeta;
        };
        let from_object = match self.packs.open(state) {
            Some(open) => self.object_unit(state, &open, c, block, verify, &proof, meta),
            None => Local::Miss,
        };
        match from_object {
            Local::Miss => self.staged_unit(state, c, block, &proof, meta),
            other => other,
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn object_unit(
        self: &Arc<Self>,
        state: &Arc<PackState>,
        open: &Arc<OpenPack>,
        c: &ContentRef,
        block: u64,
        verify: Verify,
        proof: &UnitProof,
        meta: Option<&PackMeta>,
    ) -> Local {
        if let Some(meta) = meta {
            if meta.is_complete_in_tier() {
                open.set_complete();
            }
            match meta.position(&c.content, c.size, &c.location) {
                Some(position) if meta.is_in_tier(position) => {}
                _ => return Local::Miss,
            }
        }
        let range = unit_range(c.size, block);
        let mut unit = vec![0; (range.end - range.start) as usize];
        if !self.read_object(state, open, c, &range, &mut unit) {
            return Local::Miss;
        }
        if is_trusted(state, open, c, &range, verify) {
            self.counters.tier.add(unit.len() as u64);
            return Local::Unit(unit.into());
        }
        self.look_closer(state, open, verify);
        match self.check_unit(proof, block, &unit) {
            Some(true) => {
                self.counters.tier.add(unit.len() as u64);
                if let Some(start) = unit_start(c, block) {
                    open.set_unit(start);
                }
                let unit = Bytes::from(unit);
                self.memory.put(UnitKey { content: c.content, block }, unit.clone());
                Local::Unit(unit)
            }
            // A reference that the pack's index does not have says nothing about the object.
            Some(false) if state.knows_contents() && !state.has(c) => Local::Miss,
            Some(false) => Local::Damaged(open.clone()),
            // An imported content in blocks, before its chaining values are known here.
            None => Local::Miss,
        }
    }

    /// Reads a unit from the staging file, where its piece has arrived. It is checked again: what lies
    /// there is not published yet.
    fn staged_unit(
        self: &Arc<Self>,
        state: &Arc<PackState>,
        c: &ContentRef,
        block: u64,
        proof: &UnitProof,
        meta: Option<&PackMeta>,
    ) -> Local {
        let Some(fill) = state.filling().filter(|_| self.packs.tier_answers()) else {
            return Local::Miss;
        };
        let range = unit_range(c.size, block);
        let Some(wanted) = parts(&c.location, range.clone()) else {
            return Local::Miss;
        };
        let staged = wanted.iter().all(|part| match part {
            Part::Hole { .. } => true,
            Part::Data { offset, len } => {
                let piece = fill.piece_of(&(*offset..offset + len));
                piece.is_some_and(|piece| matches!(fill.piece_at(piece), PieceAt::Staged))
            }
        });
        if !staged {
            return Local::Miss;
        }
        let proof = match (proof, meta.and_then(|meta| meta.position(&c.content, c.size, &c.location))) {
            (UnitProof::Pin, Some(position)) if c.size <= BLOCK_LEN => match fill.learned_digest(position) {
                Some(learned) => UnitProof::Digest(learned),
                None => return Local::Miss,
            },
            (proof, _) => proof.clone(),
        };
        let mut unit = vec![0; (range.end - range.start) as usize];
        let read = read_parts(c, &range, &mut unit, |part, offset| fill.read_staged(part, offset));
        if !matches!(read, Some(Ok(()))) {
            bump(&self.counters.tier_errors);
            return Local::Miss;
        }
        if self.check_unit(&proof, block, &unit) != Some(true) {
            return Local::Miss;
        }
        let unit = Bytes::from(unit);
        self.counters.staging.add(unit.len() as u64);
        self.memory.put(UnitKey { content: c.content, block }, unit.clone());
        Local::Unit(unit)
    }

    /// Checks a unit. None: nothing is known that would prove these bytes.
    pub(super) fn check_unit(&self, proof: &UnitProof, block: u64, unit: &[u8]) -> Option<bool> {
        let begun = Instant::now();
        let good = match proof {
            UnitProof::Digest(expected) => digest(unit) == *expected,
            UnitProof::Block(expected) => block_cv(block, unit) == *expected,
            UnitProof::Pin | UnitProof::Damaged => return None,
        };
        self.note_verify_time(begun.elapsed());
        Some(good)
    }
}

/// Gives a range out of a piece that has just arrived. The whole piece was checked, so what it has is what
/// the pack's index says; and this content must be there by that index, not by the placement alone.
fn kept_range(state: &PackState, c: &ContentRef, range: &Range<u64>) -> Option<Bytes> {
    let fill = state.filling()?;
    fill.kept(&fill.place_of(c, range)?)
}

/// Says what proves a unit. None: that takes the pack's description.
pub(super) fn unit_proof(c: &ContentRef, block: u64, meta: Option<&PackMeta>) -> Option<UnitProof> {
    if let ContentId::Digest(expected) = c.content
        && c.size <= BLOCK_LEN
    {
        return Some(UnitProof::Digest(expected));
    }
    let meta = meta?;
    Some(match meta.position(&c.content, c.size, &c.location) {
        Some(position) => meta.unit_proof(position, block),
        None => UnitProof::Damaged,
    })
}

/// Says whether a range of an object needs no check.
fn is_trusted(state: &PackState, open: &OpenPack, c: &ContentRef, range: &Range<u64>, verify: Verify) -> bool {
    if !state.has(c) {
        return false;
    }
    if open.is_whole_verified() && verify != Verify::Always {
        return true;
    }
    let units_are_good = || units_of(range).all(|block| unit_start(c, block).is_some_and(|start| open.has_unit(start)));
    match verify {
        Verify::Tier => open.is_complete() || units_are_good(),
        Verify::Always => false,
        Verify::Node => units_are_good(),
    }
}

/// Gives where a unit starts in its pack: the name of the unit in the object's map. Units of sparse
/// contents have none and are checked each time, until the whole object was.
fn unit_start(c: &ContentRef, block: u64) -> Option<u64> {
    match c.location {
        Location::Run { offset, .. } => offset.checked_add(block.checked_mul(BLOCK_LEN)?),
        _ => None,
    }
}

/// Fills `buf` with a logical range, holes as zeros. None: the location contradicts itself.
pub(super) fn read_parts(
    c: &ContentRef,
    range: &Range<u64>,
    buf: &mut [u8],
    mut read: impl FnMut(&mut [u8], u64) -> std::io::Result<()>,
) -> Option<std::io::Result<()>> {
    if let Location::Run { offset, .. } = c.location {
        return Some(read(buf, offset.checked_add(range.start)?));
    }
    let mut rest = buf;
    for part in parts(&c.location, range.clone())? {
        let (Part::Hole { len } | Part::Data { len, .. }) = part;
        let (now, behind) = rest.split_at_mut_checked(len as usize)?;
        match part {
            Part::Hole { .. } => now.fill(0),
            Part::Data { offset, .. } => {
                if let Err(error) = read(now, offset) {
                    return Some(Err(error));
                }
            }
        }
        rest = behind;
    }
    Some(Ok(()))
}

/// Copies what a unit and the asked range have in common; gives how much that is.
pub(super) fn copy_overlap(unit: &[u8], block: u64, range: &Range<u64>, buf: &mut [u8]) -> Option<usize> {
    let unit_at = block * BLOCK_LEN;
    let start = range.start.max(unit_at);
    let end = range.end.min(unit_at + unit.len() as u64);
    let from = unit.get((start - unit_at) as usize..end.checked_sub(unit_at)? as usize)?;
    let to = buf.get_mut((start - range.start) as usize..(end - range.start) as usize)?;
    to.copy_from_slice(from);
    Some(from.len())
}
