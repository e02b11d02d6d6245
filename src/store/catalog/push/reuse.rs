//! Reuse: which packs of the dataset's own history may be referred to, and which are written again.
//!
//! A pack of a living commit is safe to refer to: `gc` waits longer than any push may take and looks
//! again before it deletes. So the packs of the head and of a few commits before it are learned from
//! their indexes (one small object each, checked against its id) and remembered by the node.

use std::collections::{BTreeMap, HashSet};

use futures::StreamExt;

use crate::format::ids::{CommitId, ContentId, PackId};
use crate::format::pack::{ALIGN, PackIndex, Place};
use crate::format::paths::{PackPart, pack_key};
use crate::format::refs::DatasetName;
use crate::store::catalog::Catalog;
use crate::store::lake::{LakeError, get_all};
use crate::store::meta::Snapshot;

use super::error::PushError;
use super::index::{At, Index, LayoutRow, NO_PACK};
use super::packs::Packs;
use super::places::Places;

/// Commits before the head whose packs are looked at.
const ANCESTORS: usize = 8;
/// Pack indexes that are fetched at the same time.
const PARALLEL: usize = 16;
/// A pack of 2^20 small contents has an index of this order.
const INDEX_BYTES_MAX: u64 = 1 << 30;
/// Packs of one size class are merged once there are so many.
const CLASS_PACKS_MAX: usize = 8;

/// What history offers.
#[derive(Debug, Default)]
pub(super) struct History {
    pub commits: HashSet<CommitId>,
    /// Length by pack.
    packs: BTreeMap<PackId, u64>,
}

impl History {
    /// Adds the packs of a commit.
    pub(super) fn add(&mut self, snapshot: &Snapshot) {
        self.commits.insert(snapshot.commit);
        self.packs.extend(snapshot.placement.packs.iter().map(|pack| (pack.pack, pack.len)));
    }

    /// Adds the commits before `snapshot`, as far as they can be opened.
    pub(super) async fn add_ancestors(&mut self, catalog: &Catalog, dataset: &DatasetName, snapshot: &Snapshot) {
        let mut next = snapshot.commit_body.parents.first().copied();
        for _ in 0..ANCESTORS {
            let Some(commit) = next else { return };
            // A commit that was removed meanwhile offers nothing; it is no reason to fail.
            let Ok(older) = catalog.snapshot_of(dataset, &commit).await else {
                return;
            };
            self.add(&older);
            next = older.commit_body.parents.first().copied();
        }
    }

    /// Makes the packs known to the index, fetching what it has not seen, and allows their use.
    pub(super) async fn learn(
        &self,
        catalog: &Catalog,
        index: &mut Index,
        packs: &mut Packs,
        condemned: &dyn Fn(&str) -> bool,
    ) -> Result<(), PushError> {
        let safe = |pack: &&PackId| !condemned(&pack_key(pack, PackPart::Recipe));
        let (known, unknown): (Vec<PackId>, Vec<PackId>) =
            self.packs.keys().filter(safe).partition(|pack| packs.number_of(pack).is_some());
        for pack in known {
            if let Some(number) = packs.number_of(&pack) {
                packs.allow(number);
            }
        }
        let mut fetched = futures::stream::iter(unknown)
            .map(|pack| async move { (pack, fetch_index(catalog, &pack).await) })
            .buffer_unordered(PARALLEL);
        while let Some((pack, found)) = fetched.next().await {
            match found {
                Ok(Some(found)) => adopt(index, packs, pack, &found)?,
                // Not to be relied on: its contents are stored again.
                Ok(None) | Err(LakeError::NotFound { .. }) => {
                    tracing::warn!(%pack, "the index of a pack is missing or damaged; its contents are not reused");
                }
                Err(error) => return Err(error.into()),
            }
        }
        index.commit()
    }
}

async fn fetch_index(catalog: &Catalog, pack: &PackId) -> Result<Option<PackIndex>, LakeError> {
    let key = pack_key(pack, PackPart::Index);
    let bytes = get_all(&*catalog.lake, &key, INDEX_BYTES_MAX).await?;
    Ok(PackIndex::decode(&bytes).ok().filter(|index| index.id() == *pack))
}

fn adopt(index: &mut Index, packs: &mut Packs, id: PackId, found: &PackIndex) -> Result<(), PushError> {
    let count = u32::try_from(found.contents.len()).unwrap_or(u32::MAX);
    let number = packs.adopt(index, id, found.len, count)?;
    for (position, content) in (0..).zip(&found.contents) {
        // A pin says nothing about a local file's bytes.
        let ContentId::Digest(digest) = content.content else {
            continue;
        };
        let row = LayoutRow { content: digest, size: content.size, place: content.place.clone() };
        // Where the index knows another place that may be gone, this one is better.
        let known = index.content(&digest)?;
        let prefer = known.is_none_or(|at| at.pack != NO_PACK && !packs.usable(at.pack));
        index.add_content(At { pack: number, position }, &row, prefer)?;
    }
    packs.allow(number);
    Ok(())
}

/// What the new placement would use of one pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tally {
    pub number: u32,
    pub len: u64,
    /// Bytes of it that what the tree refers to takes, each content once.
    pub referenced: u64,
    /// Written by this push.
    pub new: bool,
}

/// The positions of one pack that the tree refers to.
#[derive(Debug, Default)]
struct Used {
    bits: Vec<u64>,
    count: u32,
}

impl Used {
    fn add(&mut self, position: u32) {
        let (word, bit) = (position as usize / 64, 1u64 << (position % 64));
        if self.bits.len() <= word {
            self.bits.resize(word + 1, 0);
        }
        if let Some(word) = self.bits.get_mut(word)
            && *word & bit == 0
        {
            *word |= bit;
            self.count += 1;
        }
    }

    fn has(&self, position: u32) -> bool {
        self.bits.get(position as usize / 64).is_some_and(|word| word & (1u64 << (position % 64)) != 0)
    }
}

/// Counts what the walked files refer to, pack by pack.
pub(super) fn tally(
    places: &mut Places,
    files: u64,
    packs: &Packs,
    index: &mut Index,
) -> Result<Vec<Tally>, PushError> {
    let mut seen: BTreeMap<u32, Used> = BTreeMap::new();
    for ordinal in 0..files {
        let row = places.get(ordinal)?;
        if !row.dropped && row.at.pack != NO_PACK {
            seen.entry(row.at.pack).or_default().add(row.at.position);
        }
    }
    let mut tallies = Vec::with_capacity(seen.len());
    for (number, used) in seen {
        let (len, contents) = packs.row(number).map_or((0, 0), |row| (row.len, row.contents));
        let new = packs.is_new(number);
        // Only a pack of which something is unused is looked at more closely.
        let referenced = if new || used.count == contents { len } else { referenced_bytes(index, number, &used)? };
        tallies.push(Tally { number, len, referenced, new });
    }
    Ok(tallies)
}

/// Sums up what the used contents take in the pack, with the zeros behind each: padding is no waste
/// that writing it again would save.
fn referenced_bytes(index: &mut Index, number: u32, used: &Used) -> Result<u64, PushError> {
    let layout = index.layout_of(number)?;
    Ok(layout.iter().filter(|(position, _)| used.has(*position)).map(|(_, row)| stored_bytes(row)).sum())
}

fn stored_bytes(row: &LayoutRow) -> u64 {
    let stored = match &row.place {
        Place::Run { .. } => row.size,
        Place::Sparse { extents } => extents.iter().map(|extent| extent.len).sum(),
    };
    stored.next_multiple_of(ALIGN)
}

/// Chooses the packs that are written again: those mostly waste, and the small ones of a class that
/// grew too numerous. Classes are factors of four below half a pack; what was written now stays.
pub(super) fn plan_rewrite(tallies: &[Tally], pack_len: u64) -> HashSet<u32> {
    let waste = |tally: &&Tally| !tally.new && tally.referenced.saturating_mul(2) < tally.len;
    let mut rewrite: HashSet<u32> = tallies.iter().filter(waste).map(|tally| tally.number).collect();
    let mut classes: BTreeMap<u32, Vec<&Tally>> = BTreeMap::new();
    for tally in tallies.iter().filter(|tally| !rewrite.contains(&tally.number)) {
        if let Some(class) = class_of(tally.len, pack_len) {
            classes.entry(class).or_default().push(tally);
        }
    }
    for class in classes.values().filter(|class| class.len() >= CLASS_PACKS_MAX) {
        rewrite.extend(class.iter().filter(|tally| !tally.new).map(|tally| tally.number));
    }
    rewrite
}

/// Gives the size class of a pack, None for one that is large enough to stay for good.
fn class_of(len: u64, pack_len: u64) -> Option<u32> {
    let full = pack_len / 2;
    (len < full).then(|| (full / len.max(1)).max(1).ilog2() / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACK: u64 = 256 << 20;

    fn old(number: u32, len: u64, referenced: u64) -> Tally {
        Tally { number, len, referenced, new: false }
    }

    #[test]
    fn a_pack_of_which_less_than_half_is_used_is_written_again() {
        let tallies = [old(1, PACK, PACK / 2 - 1), old(2, PACK, PACK / 2), old(3, PACK, PACK)];
        assert_eq!(plan_rewrite(&tallies, PACK), HashSet::from([1]));
    }

    #[test]
    fn a_pack_of_this_push_is_never_written_again() {
        let mut tally = old(1, PACK, 1);
        tally.new = true;
        assert!(plan_rewrite(&[tally], PACK).is_empty());
    }

    #[test]
    fn many_small_packs_of_one_class_are_merged_and_few_are_left() {
        let seven: Vec<Tally> = (0..7).map(|number| old(number, 1 << 20, 1 << 20)).collect();
        assert!(plan_rewrite(&seven, PACK).is_empty());
        let mut eight = seven;
        eight.push(Tally { number: 7, len: 1 << 20, referenced: 1 << 20, new: true });
        assert_eq!(plan_rewrite(&eight, PACK), (0..7).collect());
    }

    #[test]
    fn many_small_pushes_leave_few_packs() {
        // Each push adds one pack of 1 MiB; what is written again becomes packs as large as allowed.
        let mut packs: Vec<u64> = Vec::new();
        for _ in 0..5000 {
            packs.push(1 << 20);
            let tallies: Vec<Tally> = (0..).zip(&packs).map(|(number, len)| old(number, *len, *len)).collect();
            let rewrite = plan_rewrite(&tallies, PACK);
            let mut merged: u64 = rewrite.iter().map(|number| packs[*number as usize]).sum();
            let mut kept: Vec<u64> =
                (0..).zip(&packs).filter(|(number, _)| !rewrite.contains(number)).map(|(_, len)| *len).collect();
            while merged > 0 {
                kept.push(merged.min(PACK));
                merged -= merged.min(PACK);
            }
            packs = kept;
        }
        assert!(packs.len() < 80, "{} packs for 5,000 pushes of 1 MiB", packs.len());
    }

    #[test]
    fn a_large_pack_stays_however_many_there_are() {
        let tallies: Vec<Tally> = (0..100).map(|number| old(number, PACK / 2, PACK / 2)).collect();
        assert!(plan_rewrite(&tallies, PACK).is_empty());
    }
}
