//! Imported contents: pins, proofs, and source objects that changed or went.

use std::time::Duration;

use super::kit::{FakeTier, TestFile, TestPack, World, imported, no_memory, small_config};
use super::tiers::until;
use crate::format::digest::{BLOCK_LEN, digest};
use crate::format::pack::{Proof, Recipe, Source};
use crate::format::paths::{PackPart, data_key, pack_key};
use crate::store::fetch::{FetchConfig, FetchError, FetchTier as _, Fetcher, FillError, PackFillError, Verify};
use crate::store::tier::Sidecar;
use crate::testkit::faulty_lake::{Fault, Op, Rule};

const LEVELS: [Verify; 3] = [Verify::Tier, Verify::Node, Verify::Always];

fn files() -> Vec<TestFile> {
    vec![
        TestFile::of(50_000, 1),
        TestFile::of(5 * BLOCK_LEN + 9, 2),
        TestFile::of(70_000, 3),
        TestFile::of(BLOCK_LEN + 1, 4),
    ]
}

async fn assert_reads(fetcher: &Fetcher, pack: &TestPack, verify: Verify) {
    for content in &pack.contents {
        let got = fetcher.read(&content.c, 0, u32::MAX, verify).await.expect("read");
        assert!(got == content.bytes, "wrong bytes at {verify}");
    }
}

fn proof(world: &World, pack: &TestPack) -> Option<Proof> {
    let bytes = world.memory.bytes_of(&pack_key(&pack.pack, PackPart::Proof))?;
    Some(Proof::decode(&bytes).expect("a proof"))
}

#[tokio::test(flavor = "multi_thread")]
async fn imported_objects_are_read_from_where_they_lie_and_proven_when_the_pack_is_full() {
    let world = World::new();
    let pack = imported(&world.memory, "user", &files());
    let fetcher = world.fetcher(no_memory());
    assert_reads(&fetcher, &pack, Verify::Node).await;
    assert!(proof(&world, &pack).is_none(), "reading parts proves nothing");
    fetcher.fill(vec![pack.uses()]).wait().await.expect("filled");
    let proof = proof(&world, &pack).expect("made by the fill");
    let expected: Vec<_> = files().iter().map(|file| Some(digest(&file.bytes))).collect();
    assert_eq!(proof.digests, expected);
    world.lake.rule(Rule::every(Op::GetPinned, Fault::Permanent));
    for verify in LEVELS {
        assert_reads(&fetcher, &pack, verify).await;
    }
    let other_node = World { kv: crate::store::kv::Kv::in_memory(), ..world };
    for verify in LEVELS {
        assert_reads(&other_node.fetcher(no_memory()), &pack, verify).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overwritten_object_is_an_error_for_its_own_file_only() {
    let world = World::new();
    let pack = imported(&world.memory, "user", &files());
    world.memory.set_foreign("user", "dir/2", vec![9; 70_000], false);
    let fetcher = world.fetcher(no_memory());
    let check = async |fetcher: &Fetcher| {
        for verify in LEVELS {
            for (n, content) in pack.contents.iter().enumerate() {
                match fetcher.read(&content.c, 0, u32::MAX, verify).await {
                    Ok(got) => assert!(n != 2 && got == content.bytes, "content {n} at {verify}"),
                    Err(error) => {
                        assert!(n == 2 && matches!(error, FetchError::Gone { .. }), "content {n}: {error:?}");
                        assert!(error.to_string().contains("s3://user/dir/2"), "{error}");
                    }
                }
            }
        }
    };
    check(&fetcher).await;
    fetcher.fill(vec![pack.uses()]).wait().await.expect("the rest of the pack is usable");
    assert_eq!(proof(&world, &pack).expect("made").digests.iter().filter(|d| d.is_none()).count(), 1);
    check(&fetcher).await;
    check(&world.fetcher(no_memory())).await;
    let other_node = World { kv: crate::store::kv::Kv::in_memory(), ..world };
    check(&other_node.fetcher(no_memory())).await;
    assert!(other_node.object_path(&pack.pack).exists(), "it is not set aside for what it cannot have");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_gone_is_an_error_also_while_its_pack_is_brought() {
    for proven in [false, true] {
        let world = World::new();
        // All of them in one piece.
        let files = [TestFile::of(50_000, 1), TestFile::of(60_000, 2), TestFile::of(70_000, 3)];
        let pack = imported(&world.memory, "user", &files);
        world.memory.set_foreign("user", "dir/2", vec![9; 70_000], false);
        if proven {
            // Brought before, without the object as well.
            world.fetcher(no_memory()).fill(vec![pack.uses()]).wait().await.expect("filled");
            std::fs::remove_file(world.object_path(&pack.pack)).expect("evicted");
        }
        world.lake.rule(Rule::every(Op::GetPinned, Fault::Delay(Duration::from_millis(60))));
        let fetcher = world.fetcher(FetchConfig { memory_bytes_max: 64 << 20, ..no_memory() });
        let fill = fetcher.fill(vec![pack.uses()]);
        until("a piece is asked", || fetcher.stats().in_flight_bytes > 0).await;
        let reads = (0..8).map(|_| fetcher.read(&pack.contents[2].c, 0, u32::MAX, Verify::Node));
        for got in futures::future::join_all(reads).await {
            assert!(matches!(got, Err(FetchError::Gone { .. })), "zeros in its place");
        }
        fill.wait().await.expect("the rest of the pack is usable");
        assert_eq!(fetcher.stats().memory_bytes, 0, "pieces of imported packs are not kept");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_bytes_under_the_same_pin_are_an_error() {
    let world = World::new();
    let pack = imported(&world.memory, "user", &files());
    world.fetcher(no_memory()).fill(vec![pack.uses()]).wait().await.expect("filled");
    std::fs::remove_file(world.object_path(&pack.pack)).expect("evicted");
    // A store that gives other bytes under the same ETag: nothing but the proof can tell.
    world.lake.rule(Rule::every(Op::GetPinned, Fault::FlipByte(10)).on("dir/0"));
    let fetcher = world.fetcher(no_memory());
    let error = fetcher.read(&pack.contents[0].c, 0, 100, Verify::Node).await.expect_err("a conflict");
    assert!(matches!(error, FetchError::ProofConflict { .. }), "{error:?}");
    let error = fetcher.fill(vec![pack.uses()]).wait().await.expect_err("a conflict");
    assert!(matches!(error, FillError::Failed { first: PackFillError::Damaged { .. }, .. }), "{error:?}");
    assert!(!world.object_path(&pack.pack).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn with_read_only_credentials_the_proof_lies_beside_the_object() {
    let world = World::new();
    let pack = imported(&world.memory, "user", &files());
    world.lake.rule(Rule::every(Op::Put, Fault::Denied));
    let fetcher = world.fetcher(no_memory());
    fetcher.fill(vec![pack.uses()]).wait().await.expect("filled");
    assert!(proof(&world, &pack).is_none());
    let fresh = world.fetcher(no_memory());
    world.lake.rule(Rule::every(Op::GetPinned, Fault::Permanent));
    for verify in LEVELS {
        assert_reads(&fresh, &pack, verify).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_does_not_answer_to_the_proof_is_asked_again_and_not_for_ever() {
    let world = World::new();
    let pack = imported(&world.memory, "user", &files());
    let fetcher = world.fetcher(no_memory());
    world.lake.rule(Rule::every(Op::Put, Fault::Hang).times(1));
    fetcher.fill(vec![pack.uses()]).wait().await.expect("the second put is answered");
    assert!(proof(&world, &pack).is_some());

    let other = imported(&world.memory, "other", &files());
    world.lake.rule(Rule::every(Op::Put, Fault::Hang));
    let error = fetcher.fill(vec![other.uses()]).wait().await.expect_err("no put is answered");
    assert!(matches!(error, FillError::Failed { first: PackFillError::Lake { .. }, .. }), "{error:?}");
    assert_reads(&fetcher, &other, Verify::Node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_flipped_in_the_tier_heals_from_the_users_objects() {
    for content in 0..4 {
        let world = World::new();
        let pack = imported(&world.memory, "user", &files());
        world.fetcher(no_memory()).fill(vec![pack.uses()]).wait().await.expect("filled");
        let crate::format::placement::Location::Run { offset, .. } = pack.contents[content].c.location else {
            panic!("a run")
        };
        world.flip_in_tier(&pack.pack, offset + 1000);
        for verify in [Verify::Node, Verify::Always] {
            assert_reads(&world.fetcher(no_memory()), &pack, verify).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_that_the_index_does_not_have_is_refused() {
    let world = World::new();
    let pack = imported(&world.memory, "user", &files());
    let fetcher = world.fetcher(small_config());
    let mut c = pack.contents[0].c.clone();
    c.location = pack.contents[2].c.location.clone();
    let error = fetcher.read(&c, 0, 10, Verify::Node).await.expect_err("no such content there");
    assert!(matches!(error, FetchError::BadPack { .. }), "{error:?}");
}

/// A recipe for an imported pack that leads to other bytes of the lake's own.
fn lying_recipe(world: &World, pack: &TestPack) -> Vec<u8> {
    let index_key = pack_key(&pack.pack, PackPart::Index);
    let index_len = world.memory.bytes_of(&index_key).expect("is there").len() as u64;
    world.memory.set(&data_key("others"), vec![7; pack.len as usize]);
    let source = Source::Native { key: "others".to_owned() };
    Recipe { pack: pack.pack, len: pack.len, index_len, outboard_len: 0, source }.encode()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recipe_that_leads_an_import_to_other_objects_gives_no_other_bytes() {
    // By who writes in the lake's prefix: an error.
    let world = World::new();
    let pack = imported(&world.memory, "user", &files());
    let lie = lying_recipe(&world, &pack);
    world.memory.set(&pack_key(&pack.pack, PackPart::Recipe), lie.clone());
    for verify in LEVELS {
        let fetcher = world.fetcher(no_memory());
        for content in &pack.contents {
            let read = fetcher.read(&content.c, 0, u32::MAX, verify).await;
            assert!(matches!(read, Err(FetchError::BadPack { .. })), "{verify}: {read:?}");
        }
    }
    // By who writes in the tier, while the lake is late: the lake's recipe counts.
    let world = World::new();
    let pack = imported(&world.memory, "user", &files());
    let lie = lying_recipe(&world, &pack);
    for verify in LEVELS {
        let tier = FakeTier::new();
        tier.put_sidecar(&pack.pack, Sidecar::Recipe, &lie).expect("keeps");
        let recipe = pack_key(&pack.pack, PackPart::Recipe);
        world.lake.rule(Rule::every(Op::Get, Fault::Hang).on(&recipe).times(6));
        let cfg = FetchConfig { read_timeout_ms: 60_000, ..no_memory() };
        assert_reads(&world.fetcher_on(Some(tier), cfg), &pack, verify).await;
    }
}
