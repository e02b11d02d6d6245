//! Reads from every source, with a lake that fails on demand.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;

use super::kit::{TestContent, TestFile, World, native, no_memory, small_config};
use crate::format::digest::{BLOCK_LEN, digest};
use crate::format::ids::ContentId;
use crate::format::paths::{PackPart, pack_key};
use crate::format::placement::Location;
use crate::store::fetch::{ContentRef, FetchConfig, FetchError, Fetcher, Verify};
use crate::testkit::faulty_lake::{Fault, Op, Rule};

const LARGE: u64 = 5 * BLOCK_LEN + 77;

fn files() -> Vec<TestFile> {
    vec![
        TestFile::of(1, 1),
        TestFile::of(100_000, 2),
        TestFile::of(BLOCK_LEN, 3),
        TestFile::of(LARGE, 4),
        TestFile::sparse(900_000, 5, &[(0, 4096), (400_000, 100_000), (800_000, 1000)]),
        TestFile::sparse(60_000, 6, &[(8192, 100)]),
    ]
}

fn no_tier(world: &World, cfg: FetchConfig) -> Fetcher {
    world.fetcher_on(None, cfg)
}

async fn assert_all(fetcher: &Fetcher, content: &TestContent, verify: Verify) {
    let got = fetcher.read(&content.c, 0, u32::MAX, verify).await.expect("all of it");
    assert!(got == content.bytes, "wrong bytes of a content of {} bytes", content.bytes.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_content_gives_exactly_its_bytes_from_the_lake() {
    let world = World::new();
    let pack = native(&world.memory, "a", &files());
    let fetcher = no_tier(&world, small_config());
    for content in &pack.contents {
        assert_all(&fetcher, content, Verify::Node).await;
        let size = content.bytes.len() as u64;
        for (offset, len) in [(0, 1), (size / 2, 5000), (size - 1, 100), (size, 10), (size + 5, 10)] {
            let got = fetcher.read(&content.c, offset, len, Verify::Always).await.expect("a part");
            let end = (offset + u64::from(len)).min(size);
            let want = content.bytes.get(offset as usize..end as usize).unwrap_or_default();
            assert!(got == want, "{offset} + {len} of {size}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_content_without_a_place_reads_as_zeros_only_if_it_is_zeros() {
    let world = World::new();
    let fetcher = no_tier(&world, small_config());
    world.lake.rule(Rule::every(Op::Get, Fault::Permanent));
    let zeros = ContentId::Digest(digest(&[0; 5000]));
    let holes = ContentRef { content: zeros, size: 5000, location: Location::None };
    assert!(fetcher.try_read(&holes, 0, 10, Verify::Node).is_none(), "not known yet");
    assert_eq!(fetcher.read(&holes, 4000, 9999, Verify::Always).await.expect("zeros"), vec![0; 1000]);
    let got = fetcher.try_read(&holes, 0, 10, Verify::Node).expect("known now");
    assert_eq!(got.expect("zeros"), vec![0; 10]);
    // A placement that lost a file's place must not turn it into zeros.
    let lost = ContentRef { size: 4999, ..holes };
    let error = fetcher.read(&lost, 0, 10, Verify::Node).await.expect_err("not zeros");
    assert!(matches!(error, FetchError::BadPack { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_of_one_content_cost_one_request() {
    let world = World::new();
    let pack = native(&world.memory, "a", &files());
    let fetcher = no_tier(&world, small_config());
    world.lake.rule(Rule::every(Op::Get, Fault::Delay(Duration::from_millis(50))).on("data/"));
    let content = &pack.contents[1];
    let reads = (0..40).map(|_| fetcher.read(&content.c, 0, u32::MAX, Verify::Node));
    for got in join_all(reads).await {
        assert!(got.expect("read") == content.bytes);
    }
    let counters = world.lake.counters();
    let data = counters.log.iter().filter(|(_, key)| key.starts_with("data/")).count();
    assert_eq!(data, 1);
    assert_eq!(fetcher.stats().lake_demand.bytes, 100_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_of_a_large_content_costs_that_block() {
    let world = World::new();
    let pack = native(&world.memory, "a", &files());
    let fetcher = no_tier(&world, FetchConfig { readahead_bytes_max: 0, ..small_config() });
    let large = &pack.contents[3];
    fetcher.read(&large.c, 3 * BLOCK_LEN + 5, 10, Verify::Node).await.expect("a few bytes");
    assert_eq!(fetcher.stats().lake_demand.bytes, BLOCK_LEN);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_is_resumed_where_it_broke() {
    let world = World::new();
    let pack = native(&world.memory, "a", &files());
    let fetcher = no_tier(&world, small_config());
    for fault in [Fault::CutBody(70_000), Fault::ShortBody(70_000), Fault::StallBody(70_000)] {
        world.lake.heal();
        world.lake.reset_counters();
        world.lake.rule(Rule::next(Op::Get, fault).on("data/"));
        let before = fetcher.stats();
        let fresh = no_tier(&world, small_config());
        assert_all(&fresh, &pack.contents[1], Verify::Node).await;
        assert_eq!(fresh.stats().lake_demand.bytes, 100_000, "{fault:?}: no byte twice");
        assert_eq!(fresh.stats().lake_demand.requests, 2, "{fault:?}");
        assert_eq!(fresh.stats().retries, before.retries + 1, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn passing_errors_anywhere_make_reads_late_not_wrong() {
    let world = World::new();
    let pack = native(&world.memory, "a", &files());
    for fault in [Fault::Passing, Fault::Hang, Fault::FlipByte(300), Fault::StallBody(10)] {
        for key in ["data/", ".recipe", ".index", ".outboard"] {
            let fetcher = no_tier(&world, small_config());
            world.lake.heal();
            world.lake.rule(Rule::every(Op::Get, fault).on(key).times(2));
            for content in &pack.contents {
                assert_all(&fetcher, content, Verify::Node).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lake_that_is_down_is_an_error_within_the_stated_time() {
    let world = World::new();
    let pack = native(&world.memory, "a", &files());
    for fault in [Fault::Passing, Fault::Hang, Fault::StallBody(1)] {
        let cfg = FetchConfig { read_timeout_ms: 600, ..small_config() };
        let fetcher = no_tier(&world, cfg);
        world.lake.heal();
        world.lake.rule(Rule::every(Op::Get, fault));
        let begun = Instant::now();
        let error = fetcher.read(&pack.contents[1].c, 0, 10, Verify::Node).await.expect_err("no lake");
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error:?}");
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        world.lake.heal();
        // A lake that answers again serves the next read; on a busy machine not always within 600 ms.
        let patient = Instant::now();
        while fetcher.read(&pack.contents[1].c, 0, u32::MAX, Verify::Node).await.is_err() {
            assert!(patient.elapsed() < Duration::from_secs(30), "the lake is back");
        }
        assert_all(&fetcher, &pack.contents[1], Verify::Node).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permanent_error_is_not_tried_again() {
    let world = World::new();
    let pack = native(&world.memory, "a", &files());
    let fetcher = no_tier(&world, small_config());
    world.lake.rule(Rule::every(Op::Get, Fault::Denied).on("data/"));
    let error = fetcher.read(&pack.contents[1].c, 0, 10, Verify::Node).await.expect_err("denied");
    assert!(matches!(error, FetchError::Gone { .. }), "{error:?}");
    assert_eq!(fetcher.stats().retries, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_in_the_lake_is_an_error_that_names_pack_content_and_key() {
    let world = World::new();
    let pack = native(&world.memory, "a", &files());
    let fetcher = no_tier(&world, small_config());
    let Location::Run { offset, .. } = pack.contents[1].c.location else { panic!("a run") };
    world.memory.flip(&pack.key, offset as usize + 99_999);
    let error = fetcher.read(&pack.contents[1].c, 0, 10, Verify::Tier).await.expect_err("damaged");
    let text = error.to_string();
    assert!(matches!(error, FetchError::Damaged { .. }), "{error:?}");
    assert!(text.contains(&pack.pack.to_string()) && text.contains("data/a"), "{text}");
    assert_all(&fetcher, &pack.contents[2], Verify::Node).await;
    let stats = fetcher.stats();
    assert!(stats.lake_demand.requests <= 8, "fetched again a bounded number of times");

    let Location::Run { offset, .. } = pack.contents[3].c.location else { panic!("a run") };
    world.memory.flip(&pack.key, (offset + 2 * BLOCK_LEN) as usize);
    let read = |at| fetcher.read(&pack.contents[3].c, at, 1000, Verify::Node);
    assert!(read(2 * BLOCK_LEN + 100).await.is_err());
    assert!(read(4 * BLOCK_LEN).await.is_ok(), "other blocks of the same file are good");
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_descriptions_are_errors_never_other_bytes() {
    for part in [PackPart::Index, PackPart::Outboard, PackPart::Recipe] {
        let world = World::new();
        let pack = native(&world.memory, "a", &files());
        let key = pack_key(&pack.pack, part);
        let len = world.memory.bytes_of(&key).expect("there").len();
        for offset in (0..len).step_by(13) {
            world.memory.flip(&key, offset);
            let fetcher = no_tier(&world, FetchConfig { read_timeout_ms: 1000, ..no_memory() });
            for content in &pack.contents {
                if let Ok(got) = fetcher.read(&content.c, 0, u32::MAX, Verify::Node).await {
                    assert!(got == content.bytes, "{part:?} flipped at {offset}");
                }
            }
            world.memory.flip(&key, offset);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_in_flight_and_in_memory_stay_within_their_bounds_under_many_readers() {
    let world = World::new();
    let files: Vec<_> = (0..8).map(|n| TestFile::of(12 * BLOCK_LEN, n)).collect();
    let pack = Arc::new(native(&world.memory, "a", &files));
    let cfg = FetchConfig { in_flight_bytes_max: 2 << 20, ..small_config() };
    let fetcher = no_tier(&world, cfg.clone());
    world.lake.rule(Rule::every(Op::Get, Fault::Delay(Duration::from_millis(5))).on("data/"));
    let readers = (0..64_u64).map(|n| {
        let (fetcher, pack) = (fetcher.clone(), pack.clone());
        tokio::spawn(async move {
            let content = &pack.contents[(n % 8) as usize];
            for step in 0..12 {
                let block = (step * (n + 1)) % 12;
                let got = fetcher.read(&content.c, block * BLOCK_LEN, 1000, Verify::Node).await;
                assert!(got.expect("read") == content.bytes[(block * BLOCK_LEN) as usize..][..1000]);
                assert!(fetcher.stats().memory_bytes <= 1 << 20);
            }
        })
    });
    for reader in join_all(readers).await {
        reader.expect("no reader panics");
    }
    let stats = fetcher.stats();
    assert!(stats.in_flight_bytes_peak <= cfg.in_flight_bytes_max, "{}", stats.in_flight_bytes_peak);
    assert!(stats.in_flight_bytes_peak > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequential_reader_is_served_from_what_was_read_ahead() {
    let world = World::new();
    let file = TestFile::of(40 * BLOCK_LEN, 9);
    let pack = native(&world.memory, "a", std::slice::from_ref(&file));
    let fetcher = no_tier(&world, FetchConfig { memory_bytes_max: 64 << 20, ..small_config() });
    let mut at = 0;
    while at < file.bytes.len() as u64 {
        let got = fetcher.read(&pack.contents[0].c, at, 128 << 10, Verify::Node).await.expect("read");
        assert!(got == file.bytes[at as usize..][..got.len()]);
        at += got.len() as u64;
    }
    let stats = fetcher.stats();
    assert_eq!(stats.lake_demand.bytes, file.bytes.len() as u64, "no byte twice");
    assert!(stats.lake_demand.requests <= 20, "{} requests for 40 blocks", stats.lake_demand.requests);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_who_leaves_does_not_take_others_down() {
    let world = World::new();
    let pack = native(&world.memory, "a", &files());
    let fetcher = no_tier(&world, small_config());
    world.lake.rule(Rule::every(Op::Get, Fault::Delay(Duration::from_millis(100))).on("data/"));
    let content = pack.contents[1].clone();
    let (first, c) = (fetcher.clone(), content.c.clone());
    let leaves = tokio::spawn(async move { first.read(&c, 0, 10, Verify::Node).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let stays = fetcher.read(&content.c, 0, u32::MAX, Verify::Node);
    leaves.abort();
    assert!(stays.await.expect("the other one reads on") == content.bytes);
}
