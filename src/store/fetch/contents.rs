//! Which contents an object has, and where: so that a reference is believed only where the pack's own
//! index has it.
//!
//! An object that was digested proves its contents, not a placement that points into it. Reads that
//! skip the digest compare the reference with this table first: 12 bytes a content, so that it can
//! stay in memory when the index does not.

use crate::format::ids::{ContentDigest, ContentId, PinId};
use crate::format::pack::{ALIGN, PackIndex, Place};
use crate::format::placement::{Extent, Location};

use super::types::ContentRef;

/// The contents of one pack, by where they start.
#[derive(Debug)]
pub(super) struct Contents {
    /// Starts in units of [`ALIGN`], ascending.
    slots: Box<[u32]>,
    prints: Box<[u64]>,
}

impl Contents {
    /// Takes them from an index that has the pack's id. A start that no slot can name (beyond 16 TiB)
    /// is left out: such a content is digested each time.
    pub(super) fn of(index: &PackIndex) -> Self {
        let rows = index.contents.iter().filter_map(|content| {
            let slot = slot_of(content.place.start())?;
            let extents: &[Extent] = match &content.place {
                Place::Run { .. } => &[],
                Place::Sparse { extents } => extents,
            };
            Some((slot, print_of(&content.content, content.size, extents)))
        });
        let (slots, prints): (Vec<_>, Vec<_>) = rows.unzip();
        Self { slots: slots.into(), prints: prints.into() }
    }

    /// Says whether the pack has exactly this content at this place.
    pub(super) fn has(&self, c: &ContentRef) -> bool {
        let (start, extents): (u64, &[Extent]) = match &c.location {
            Location::None => return false,
            Location::Run { offset, .. } => (*offset, &[]),
            Location::Sparse { extents, .. } => (extents.first().map_or(0, |e| e.offset), extents),
        };
        let found = slot_of(start).and_then(|slot| self.slots.binary_search(&slot).ok());
        let print = found.and_then(|at| self.prints.get(at));
        print == Some(&print_of(&c.content, c.size, extents))
    }
}

fn slot_of(offset: u64) -> Option<u32> {
    offset.is_multiple_of(ALIGN).then(|| u32::try_from(offset / ALIGN).ok()).flatten()
}

/// A fingerprint: the head of the content's own digest, mixed with size and shape. Two contents of
/// one pack never share a start, so this only has to tell the right one from a wrong one.
fn print_of(content: &ContentId, size: u64, extents: &[Extent]) -> u64 {
    let (kind, raw) = match content {
        ContentId::Digest(ContentDigest(raw)) => (1, raw),
        ContentId::Pin(PinId(raw)) => (2, raw),
    };
    let head = raw.first_chunk::<8>().map_or(0, |head| u64::from_le_bytes(*head));
    let parts = extents.iter().flat_map(|e| [e.logical, e.offset, e.len]);
    [kind, size]
        .into_iter()
        .chain(parts)
        .fold(head, |mix, part| (mix ^ part).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::PackId;
    use crate::format::pack::PackedContent;

    #[test]
    fn only_the_right_content_at_the_right_place_is_known() {
        let digest = |n| ContentId::Digest(ContentDigest([n; 32]));
        let extents = vec![Extent { logical: 8192, offset: 0, len: 5 }];
        let packed = |content, size, place| PackedContent { content, size, place };
        let index = PackIndex {
            len: 0,
            contents: vec![
                packed(digest(1), 5000, Place::Run { offset: 0 }),
                packed(digest(2), 10, Place::Run { offset: 0 }),
                packed(digest(3), 90_000, Place::Sparse { extents }),
            ],
        };
        let index = PackIndex::decode(&index.encode()).expect("an index");
        let table = Contents::of(&index);
        let pack = PackId([9; 32]);
        let at = |n, size, offset| ContentRef { content: digest(n), size, location: Location::Run { pack, offset } };
        assert!(table.has(&at(1, 5000, 0)));
        assert!(table.has(&at(2, 10, 8192)));
        assert!(!table.has(&at(2, 10, 0)), "another place");
        assert!(!table.has(&at(1, 4999, 0)), "another size");
        assert!(!table.has(&at(2, 10, 8193)), "no place at all");
        let Place::Sparse { extents } = &index.contents[2].place else { panic!("sparse") };
        let mut sparse = ContentRef {
            content: digest(3),
            size: 90_000,
            location: Location::Sparse { pack, extents: extents.clone() },
        };
        assert!(table.has(&sparse));
        if let Location::Sparse { extents, .. } = &mut sparse.location {
            extents[0].logical = 0;
        }
        assert!(!table.has(&sparse), "another shape");
    }
}
