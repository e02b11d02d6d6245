//! What of a pack can be verified alone, and the check itself.
//!
//! Pieces tile the pack: the padding behind a content belongs to its piece. Small contents go
//! together up to the target; one above it is cut at multiples of 256 KiB of its logical bytes; a
//! sparse one above 256 KiB always stands alone and is checked by its blocks, so that nobody
//! digests a hole of a terabyte to prove one page.

use std::ops::Range;

use crate::format::digest::{BLOCK_LEN, ChainingValue, block_count, block_cv, digest};
use crate::format::ids::ContentDigest;
use crate::format::placement::Extent;

use super::{PackIndex, PackedContent, Place};

/// A pack is cut into about as many pieces at most; above 8 TiB they grow beyond a target of 8 MiB.
pub const PIECES_MAX: u64 = 1 << 20;

/// A piece that a fetch can verify by itself: whole contents, or whole blocks of a large one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Range of the pack.
    pub offset: u64,
    pub len: u64,
    /// Positions of the contents in `PackIndex::contents` that lie in it: `[first, last]`. For a piece of
    /// a large content `first == last` and `logical` is where it starts in the content.
    pub first: u32,
    pub last: u32,
    pub logical: u64,
}

/// Says what of a piece is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PieceFault {
    #[error("the piece has another length than its bytes, or is none of this pack")]
    Shape,
    #[error("content {position} has other bytes than its digest says")]
    Content { position: u32 },
    #[error("block {block} of content {position} has other bytes than its chaining value says")]
    Block { position: u32, block: u64 },
    #[error("the padding at {offset} is not zero")]
    Padding { offset: u64 },
    #[error("nothing is known that would prove content {position}")]
    Unproven { position: u32 },
}

/// What a piece is checked against: digests and, for parts of large contents, block values that
/// were themselves verified ([`crate::format::digest::Outboard::verify_blocks`]).
pub trait Known {
    fn digest(&self, position: u32) -> Option<ContentDigest>;
    fn block(&self, position: u32, block: u64) -> Option<ChainingValue>;
}

impl Piece {
    /// Gives the offset behind the piece.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

impl PackIndex {
    /// Cuts the pack into pieces of about `target` bytes (a multiple of 256 KiB), each verifiable alone.
    /// Sparse contents above one block are cut at block boundaries of their logical bytes.
    pub fn pieces(&self, target: u64) -> Vec<Piece> {
        // An index that nobody trusts may speak of exabytes: the list stays bounded.
        let target = target.max(self.len / PIECES_MAX).max(1).checked_next_multiple_of(BLOCK_LEN).unwrap_or(1 << 62);
        let mut pieces = Vec::new();
        let mut open: Option<Piece> = None;
        for (position, content) in self.contents.iter().enumerate() {
            let number = u32::try_from(position).unwrap_or(u32::MAX);
            let start = content.place.start();
            let end = self.boundary_behind(position);
            if is_large_sparse(content) || content.stored_len() > target {
                pieces.extend(open.take());
                cut_large(&mut pieces, content, number, end, target);
                continue;
            }
            match &mut open {
                Some(piece) if end - piece.offset <= target => {
                    piece.len = end - piece.offset;
                    piece.last = number;
                }
                _ => {
                    let piece = Piece {
                        offset: start,
                        len: end.saturating_sub(start),
                        first: number,
                        last: number,
                        logical: 0,
                    };
                    pieces.extend(open.replace(piece));
                }
            }
        }
        pieces.extend(open);
        pieces
    }

    /// Tells which blocks of its content a piece is checked by; None where it is checked by the
    /// digests of whole contents.
    pub fn blocks_of(&self, piece: &Piece) -> Option<Range<u64>> {
        let content = self.contents.get(piece.first as usize)?;
        if piece.first != piece.last || content.size <= BLOCK_LEN {
            return None;
        }
        let covers = piece.logical == 0 && piece.end() >= content.end();
        if covers && !is_large_sparse(content) {
            return None;
        }
        let stored = clip(&content.extents(), piece).last()?;
        let end = stored.logical.saturating_add(stored.len).div_ceil(BLOCK_LEN).min(block_count(content.size));
        Some(piece.logical / BLOCK_LEN..end)
    }

    /// Checks the bytes of a piece: every content or block in it, and that the padding is zeros.
    pub fn check_piece(&self, piece: &Piece, bytes: &[u8], known: &dyn Known) -> Result<(), PieceFault> {
        let contents = self.contents.get(piece.first as usize..=piece.last as usize).ok_or(PieceFault::Shape)?;
        if bytes.len() as u64 != piece.len || piece.end() > self.len || contents.is_empty() {
            return Err(PieceFault::Shape);
        }
        check_padding(contents, piece, bytes)?;
        if let Some(blocks) = self.blocks_of(piece) {
            let content = contents.first().ok_or(PieceFault::Shape)?;
            return blocks.into_iter().try_for_each(|block| check_block(content, piece, bytes, block, known));
        }
        for (position, content) in (piece.first..).zip(contents) {
            let expected = known.digest(position).ok_or(PieceFault::Unproven { position })?;
            let logical = assemble(content, piece, bytes, 0, content.size).ok_or(PieceFault::Shape)?;
            if digest(&logical) != expected {
                return Err(PieceFault::Content { position });
            }
        }
        Ok(())
    }

    /// Gives where the next content starts, or the pack ends.
    fn boundary_behind(&self, position: usize) -> u64 {
        self.contents.get(position + 1).map_or(self.len, |next| next.place.start())
    }
}

fn is_large_sparse(content: &PackedContent) -> bool {
    content.size > BLOCK_LEN && matches!(content.place, Place::Sparse { .. })
}

/// Cuts one content; `end` is where the next one starts.
fn cut_large(pieces: &mut Vec<Piece>, content: &PackedContent, position: u32, end: u64, target: u64) {
    let extents = content.extents();
    let mut start = content.place.start();
    let mut logical = extents.first().map_or(0, |first| first.logical) / BLOCK_LEN * BLOCK_LEN;
    loop {
        let next = next_cut(&extents, start, logical, target);
        let stop = next.map_or(end, |(offset, _)| offset);
        pieces.push(Piece { offset: start, len: stop.saturating_sub(start), first: position, last: position, logical });
        match next {
            Some((offset, at)) => (start, logical) = (offset, at),
            None => return,
        }
    }
}

/// Finds where the piece that starts at `offset` and `logical` ends: the first multiple of a block
/// at which it has `target` stored bytes. Gives offset and logical position of the next piece.
fn next_cut(extents: &[Extent], offset: u64, logical: u64, target: u64) -> Option<(u64, u64)> {
    let goal = offset.checked_add(target)?;
    let at = extents.partition_point(|e| e.offset.saturating_add(e.len) <= goal);
    let extent = extents.get(at)?;
    let reached = extent.logical.checked_add(goal.saturating_sub(extent.offset))?;
    let cut = reached.max(logical + BLOCK_LEN).checked_next_multiple_of(BLOCK_LEN)?;
    let at = extents.partition_point(|e| e.logical.saturating_add(e.len) <= cut);
    let extent = extents.get(at)?;
    let skipped = cut.saturating_sub(extent.logical);
    Some((extent.offset + skipped, extent.logical.max(cut) / BLOCK_LEN * BLOCK_LEN))
}

/// Gives the parts of extents that lie in a piece.
fn clip<'a>(extents: &'a [Extent], piece: &'a Piece) -> impl Iterator<Item = Extent> + 'a {
    let first = extents.partition_point(|e| e.offset.saturating_add(e.len) <= piece.offset);
    let rest = extents.get(first..).unwrap_or_default();
    rest.iter().take_while(|e| e.offset < piece.end()).map(|e| {
        let skip = piece.offset.saturating_sub(e.offset);
        let end = e.offset.saturating_add(e.len).min(piece.end());
        let offset = e.offset + skip;
        Extent { logical: e.logical + skip, offset, len: end.saturating_sub(offset) }
    })
}

fn check_padding(contents: &[PackedContent], piece: &Piece, bytes: &[u8]) -> Result<(), PieceFault> {
    let mut at = piece.offset;
    for content in contents {
        for extent in clip(&content.extents(), piece) {
            check_zeros(piece, bytes, at, extent.offset)?;
            at = extent.offset + extent.len;
        }
    }
    check_zeros(piece, bytes, at, piece.end())
}

fn check_zeros(piece: &Piece, bytes: &[u8], from: u64, to: u64) -> Result<(), PieceFault> {
    let gap = slice(bytes, piece, from, to.saturating_sub(from)).ok_or(PieceFault::Shape)?;
    match gap.iter().position(|byte| *byte != 0) {
        Some(bad) => Err(PieceFault::Padding { offset: from + bad as u64 }),
        None => Ok(()),
    }
}

fn check_block(
    content: &PackedContent,
    piece: &Piece,
    bytes: &[u8],
    block: u64,
    known: &dyn Known,
) -> Result<(), PieceFault> {
    let position = piece.first;
    let expected = known.block(position, block).ok_or(PieceFault::Unproven { position })?;
    let start = block * BLOCK_LEN;
    let len = content.size.saturating_sub(start).min(BLOCK_LEN);
    let logical = assemble(content, piece, bytes, start, len).ok_or(PieceFault::Shape)?;
    match block_cv(block, &logical) == expected {
        true => Ok(()),
        false => Err(PieceFault::Block { position, block }),
    }
}

/// Gives logical bytes of a content out of a piece: borrowed where they lie in one run.
fn assemble<'a>(
    content: &PackedContent,
    piece: &Piece,
    bytes: &'a [u8],
    start: u64,
    len: u64,
) -> Option<std::borrow::Cow<'a, [u8]>> {
    if let Place::Run { offset } = content.place {
        return slice(bytes, piece, offset.checked_add(start)?, len).map(Into::into);
    }
    let mut logical = vec![0; usize::try_from(len).ok()?];
    let extents = content.extents();
    let first = extents.partition_point(|e| e.logical.saturating_add(e.len) <= start);
    for extent in extents.get(first..)?.iter().take_while(|e| e.logical < start + len) {
        let from = extent.logical.max(start);
        let to = (extent.logical + extent.len).min(start + len);
        let stored = slice(bytes, piece, extent.offset + (from - extent.logical), to - from)?;
        logical.get_mut((from - start) as usize..(to - start) as usize)?.copy_from_slice(stored);
    }
    Some(logical.into())
}

/// Gives a range of the pack out of a piece's bytes.
fn slice<'a>(bytes: &'a [u8], piece: &Piece, offset: u64, len: u64) -> Option<&'a [u8]> {
    let start = usize::try_from(offset.checked_sub(piece.offset)?).ok()?;
    bytes.get(start..start.checked_add(usize::try_from(len).ok()?)?)
}
