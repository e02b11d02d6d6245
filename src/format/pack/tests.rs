//! Packs of random contents: laid out, encoded, cut into pieces, damaged.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::plan::PlanError;
use super::*;
use crate::format::digest::{BLOCK_LEN, ChainingValue, ContentHasher, digest};
use crate::format::pack::piece::Known;

const KIB: u64 = 1024;

/// A content: its logical bytes, and where its data lies.
#[derive(Debug, Clone)]
struct Sample {
    size: u64,
    /// None: all of it is stored.
    data: Option<Vec<(u64, u64)>>,
    seed: u8,
}

impl Sample {
    fn logical(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size as usize];
        for (start, len) in self.data.clone().unwrap_or_else(|| vec![(0, self.size)]) {
            for (i, byte) in bytes[start as usize..(start + len) as usize].iter_mut().enumerate() {
                *byte = (i as u8).wrapping_mul(31).wrapping_add(self.seed) | 1;
            }
        }
        bytes
    }
}

/// A pack in memory with everything that proves it.
struct Made {
    index: PackIndex,
    bytes: Vec<u8>,
    outboard: PackOutboard,
    digests: Vec<ContentDigest>,
}

impl Known for Made {
    fn digest(&self, position: u32) -> Option<ContentDigest> {
        self.digests.get(position as usize).copied()
    }
    fn block(&self, position: u32, block: u64) -> Option<ChainingValue> {
        self.outboard.get(position)?.blocks.get(block as usize).copied()
    }
}

fn make(samples: &[Sample], layout: Layout) -> Vec<Made> {
    let mut planner = PackPlanner::new(layout);
    let mut drafts: BTreeMap<u64, (PackDraft, Vec<u8>, PackOutboard, Vec<ContentDigest>)> = BTreeMap::new();
    for sample in samples {
        let slot = match &sample.data {
            None => planner.push(sample.size),
            Some(data) => planner.push_sparse(sample.size, data),
        };
        let slot = slot.expect("samples have bytes");
        let (draft, bytes, outboard, digests) = drafts.entry(slot.pack).or_default();
        let logical = sample.logical();
        let mut hasher = ContentHasher::new();
        hasher.update(&logical);
        let (found, values) = hasher.finish();
        outboard.contents.extend(values.map(|values| (slot.position, values)));
        digests.push(found);
        draft.fill(&slot, sample.size, ContentId::Digest(found));
        let content = PackedContent { content: ContentId::Digest(found), size: sample.size, place: slot.place.clone() };
        for extent in content.extents().iter() {
            bytes.resize(extent.offset as usize, 0);
            bytes.extend(&logical[extent.logical as usize..(extent.logical + extent.len) as usize]);
        }
        if let Some(closed) = slot.closed {
            drafts.get_mut(&closed.pack).expect("it was opened").0.close(closed);
        }
    }
    if let Some(closed) = planner.finish() {
        drafts.get_mut(&closed.pack).expect("it was opened").0.close(closed);
    }
    let made = drafts.into_values().map(|(draft, mut bytes, outboard, digests)| {
        let index = draft.finish().expect("all are filled");
        bytes.resize(index.len as usize, 0);
        Made { index, bytes, outboard, digests }
    });
    made.collect()
}

fn small_layout() -> Layout {
    Layout { pack_len: 700 * KIB, whole_len: 900 * KIB }
}

fn sample() -> impl Strategy<Value = Sample> {
    let plain = prop_oneof![
        1..20 * KIB,
        200 * KIB..300 * KIB,
        1000 * KIB..1500 * KIB,
        Just(4096),
        Just(BLOCK_LEN),
        Just(4 * BLOCK_LEN)
    ];
    let plain = (plain, any::<u8>()).prop_map(|(size, seed)| Sample { size, data: None, seed });
    let parts = prop::collection::vec((0..400 * KIB, 1..120 * KIB), 1..12);
    let sparse = (parts, 0..300 * KIB, any::<u8>()).prop_map(|(parts, tail, seed)| {
        let mut at = 0;
        let mut data = Vec::new();
        for (gap, len) in parts {
            data.push((at + gap, len));
            at += gap + len;
        }
        Sample { size: at + tail, data: Some(data), seed }
    });
    prop_oneof![3 => plain, 1 => sparse]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn packs_survive_a_round_trip_and_their_pieces_tile_and_prove_them(
        samples in prop::collection::vec(sample(), 1..12), blocks in 1..6_u64, flip in any::<prop::sample::Index>(),
    ) {
        for made in make(&samples, small_layout()) {
            prop_assert_eq!(PackIndex::decode(&made.index.encode()), Ok(made.index.clone()));
            prop_assert_eq!(PackOutboard::decode(&made.outboard.encode()), Ok(made.outboard.clone()));
            let mut at = 0;
            for piece in made.index.pieces(blocks * BLOCK_LEN) {
                prop_assert_eq!(piece.offset, at);
                at = piece.end();
                let bytes = &made.bytes[piece.offset as usize..at as usize];
                prop_assert_eq!(made.index.check_piece(&piece, bytes, &made), Ok(()));
                let mut changed = bytes.to_vec();
                let place = flip.index(changed.len());
                changed[place] ^= 0x10;
                prop_assert!(made.index.check_piece(&piece, &changed, &made).is_err());
                prop_assert_eq!(made.index.check_piece(&piece, &bytes[1..], &made), Err(PieceFault::Shape));
            }
            prop_assert_eq!(at, made.index.len);
        }
    }

    #[test]
    fn every_stored_byte_is_found_and_no_padding_is(samples in prop::collection::vec(sample(), 1..8), at in any::<prop::sample::Index>()) {
        for made in make(&samples, small_layout()) {
            let offset = at.index(made.bytes.len());
            let inside = |content: &PackedContent| content.extents().iter().any(|e| (e.offset..e.offset + e.len).contains(&(offset as u64)));
            prop_assert_eq!(made.index.content_at(offset as u64), made.index.contents.iter().position(inside));
        }
    }

    #[test]
    fn ranges_of_an_outboard_are_where_the_layout_says(samples in prop::collection::vec(sample(), 1..8)) {
        for made in make(&samples, small_layout()) {
            let encoded = made.outboard.encode();
            let layout = OutboardLayout::of(&made.index).expect("small");
            prop_assert_eq!(layout.is_empty(), made.outboard.contents.is_empty());
            if !layout.is_empty() {
                prop_assert_eq!(layout.len(), encoded.len() as u64);
            }
            for (position, outboard) in &made.outboard.contents {
                let range = layout.blocks(*position, 0).expect("it has one group");
                let values = OutboardLayout::values(&encoded[range.start as usize..range.end as usize]);
                prop_assert_eq!(values.as_ref(), Some(&outboard.blocks));
                prop_assert!(layout.groups(*position).expect("known").is_empty());
                prop_assert_eq!(layout.blocks(*position, 1), None);
            }
        }
    }
}

#[test]
fn a_placement_has_at_most_two_thousand_packs_whatever_the_size() {
    for total in [0, 1 << 30, 1 << 40, 1 << 50, u64::MAX] {
        let layout = Layout::for_bytes(total);
        assert!(layout.pack_len >= PACK_LEN_MIN && layout.whole_len >= WHOLE_LEN_MIN);
        assert!(total / layout.pack_len <= 1000 && total / layout.whole_len <= 2000);
    }
}

#[test]
fn large_contents_are_packs_of_their_own_with_their_exact_length() {
    let samples = [100, 1001 * KIB + 1, 200].map(|size| Sample { size, data: None, seed: 3 });
    let made = make(&samples, small_layout());
    assert_eq!(made.len(), 2);
    assert_eq!(made[0].index.len, 8192);
    assert!(!made[0].index.is_whole());
    assert_eq!(made[1].index.len, 1001 * KIB + 1);
    assert!(made[1].index.is_whole());
}

#[test]
fn what_cannot_be_laid_out_is_refused() {
    let mut planner = PackPlanner::new(small_layout());
    assert_eq!(planner.push(0), Err(PlanError::Empty));
    assert_eq!(planner.push(u64::MAX), Err(PlanError::TooLong));
    for data in [&[(0, 5), (4, 1)][..], &[(0, 0)], &[(9, 2)], &[(u64::MAX, 2)]] {
        assert_eq!(planner.push_sparse(10, data), Err(PlanError::Extents), "{data:?}");
    }
    assert_eq!(planner.finish(), None);
}

#[test]
fn recipes_and_proofs_survive_a_round_trip() {
    let pin = |bucket: &str, key: &str, version: Option<&str>| Pin {
        bucket: bucket.into(),
        key: key.into(),
        version: version.map(Into::into),
        etag: "\"abc-3\"".into(),
        size: 77,
    };
    let pins = vec![
        pin("b", "x/1.png", None),
        pin("b", "x/10.png", Some("v")),
        pin("c", "x/10.png", None),
        pin("b", "ä", None),
    ];
    for source in [Source::Native { key: "2026/ab-1".into() }, Source::Assembled { pins }] {
        let recipe = Recipe { pack: PackId([1; 32]), len: 9, index_len: 8, outboard_len: 0, source };
        let encoded = recipe.encode();
        assert_eq!(Recipe::decode(&encoded), Ok(recipe));
        (0..encoded.len()).for_each(|cut| assert!(Recipe::decode(&encoded[..cut]).is_err()));
    }
    let proof = Proof { pack: PackId([2; 32]), digests: vec![None, Some(digest(b"x"))] };
    assert_eq!(Proof::decode(&proof.encode()), Ok(proof));
}

#[test]
fn a_recipe_can_point_nowhere_but_below_data() {
    for key in ["", "/", "../commits/x", "a//b", "a/./b", "a b", "ä"] {
        let source = Source::Native { key: key.into() };
        let recipe = Recipe { pack: PackId([1; 32]), len: 9, index_len: 8, outboard_len: 0, source };
        assert!(Recipe::decode(&recipe.encode()).is_err(), "{key}");
    }
}
