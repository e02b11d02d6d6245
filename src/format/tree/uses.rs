//! Which bytes of which packs a tree refers to, each once, in bounded memory.
//!
//! Contents of a pack never overlap, so a content is one that was seen exactly where its start was
//! covered before. Covered stretches that touch are merged: files in the order of their pack take
//! one stretch, whatever their number.

use std::collections::{BTreeMap, HashMap};

use crate::format::ids::PackId;
use crate::format::pack::align_up;
use crate::format::placement::{Location, PackUse};

#[derive(Debug, Default)]
pub(super) struct PackUses {
    packs: HashMap<PackId, Uses>,
}

#[derive(Debug, Default)]
struct Uses {
    /// As declared.
    len: Option<u64>,
    referenced: u64,
    /// Highest end of a content.
    end: u64,
    /// Stretches that are covered, by start.
    covered: BTreeMap<u64, u64>,
}

impl PackUses {
    pub(super) fn declare(&mut self, pack: PackId, len: u64) {
        self.packs.entry(pack).or_default().len = Some(len);
    }

    pub(super) fn add(&mut self, location: &Location, size: u64) {
        match location {
            Location::None => {}
            Location::Run { pack, offset } => self.packs.entry(*pack).or_default().add(*offset, size),
            Location::Sparse { pack, extents } => {
                let uses = self.packs.entry(*pack).or_default();
                extents.iter().for_each(|extent| uses.add(extent.offset, extent.len));
            }
        }
    }

    /// Gives the packs in order, or one that is shorter than what lies in it (pack, length, end).
    /// A pack that was declared and never referenced is left out.
    pub(super) fn finish(&self) -> Result<Vec<PackUse>, (PackId, u64, u64)> {
        let mut packs = Vec::with_capacity(self.packs.len());
        for (pack, uses) in self.packs.iter().filter(|(_, uses)| uses.referenced > 0) {
            let len = uses.len.unwrap_or(uses.end);
            if len < uses.end {
                return Err((*pack, len, uses.end));
            }
            packs.push(PackUse { pack: *pack, len, referenced: uses.referenced });
        }
        packs.sort_unstable_by_key(|used| used.pack);
        Ok(packs)
    }
}

impl Uses {
    fn add(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let mut stretch_end = align_up(end).unwrap_or(u64::MAX);
        let mut stretch_start = offset;
        if let Some((start, before_end)) = self.covered.range_mut(..=offset).next_back() {
            if offset < *before_end {
                return;
            }
            if offset == *before_end {
                stretch_start = *start;
            }
        }
        if let Some(next_end) = self.covered.remove(&stretch_end) {
            stretch_end = next_end;
        }
        self.covered.insert(stretch_start, stretch_end);
        self.referenced += len;
        self.end = self.end.max(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_content_counts_once_and_neighbours_take_one_stretch() {
        let pack = PackId([1; 32]);
        let mut uses = PackUses::default();
        for offset in [0, 8192, 4096, 8192, 0, 1 << 20, 12288] {
            uses.add(&Location::Run { pack, offset }, 100);
        }
        assert_eq!(uses.packs[&pack].covered, BTreeMap::from([(0, 16384), (1 << 20, (1 << 20) + 4096)]));
        assert_eq!(uses.finish(), Ok(vec![PackUse { pack, len: (1 << 20) + 100, referenced: 500 }]));
        uses.declare(pack, 4096);
        assert_eq!(uses.finish(), Err((pack, 4096, (1 << 20) + 100)));
        uses.declare(pack, 1 << 21);
        uses.declare(PackId([2; 32]), 5);
        assert_eq!(uses.finish(), Ok(vec![PackUse { pack, len: 1 << 21, referenced: 500 }]));
    }
}
