//! Reads of a pack that is being filled: from pieces in flight, and from those that have just arrived.

use std::time::Duration;

use super::kit::{TestFile, TestPack, World, native, no_memory, small_config};
use super::tiers::until;
use crate::format::digest::BLOCK_LEN;
use crate::store::fetch::{ContentRef, FetchConfig, Verify};
use crate::testkit::faulty_lake::{Fault, MemLake, Op, Rule};

/// Two small contents of one size, and a large one that is several pieces.
fn pack(lake: &MemLake) -> TestPack {
    native(lake, "a", &[TestFile::of(100_000, 1), TestFile::of(100_000, 2), TestFile::of(20 * BLOCK_LEN + 5, 3)])
}

/// A reference that a hostile placement could make: the place of another content.
fn misplaced(pack: &TestPack) -> ContentRef {
    ContentRef { location: pack.contents[1].c.location.clone(), ..pack.contents[0].c.clone() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_placement_that_points_at_other_bytes_in_flight_is_an_error() {
    for kept_bytes in [0, 64 << 20] {
        let world = World::new();
        let pack = pack(&world.memory);
        let fetcher = world.fetcher(FetchConfig { memory_bytes_max: kept_bytes, ..no_memory() });
        world.lake.rule(Rule::every(Op::Get, Fault::Delay(Duration::from_millis(80))).on("data/"));
        let fill = fetcher.fill(vec![pack.uses()]);
        until("a piece is asked", || fetcher.stats().in_flight_bytes > 0).await;
        // In flight at first, then in the staging file or kept, at last in the tier.
        for _ in 0..20 {
            let got = fetcher.read(&misplaced(&pack), 0, u32::MAX, Verify::Node).await;
            assert!(got.is_err(), "bytes of another content");
        }
        fill.wait().await.expect("filled");
        assert!(fetcher.read(&misplaced(&pack), 0, u32::MAX, Verify::Node).await.is_err());
        assert!(fetcher.read(&pack.contents[0].c, 0, u32::MAX, Verify::Node).await.is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_behind_a_fill_looks_at_no_byte_twice() {
    let world = World::new();
    let pack = pack(&world.memory);
    let cfg = FetchConfig { memory_bytes_max: 64 << 20, prefetch_requests_max: 1, ..small_config() };
    let fetcher = world.fetcher(cfg);
    // The last piece does not come while the first ones are read: the pack stays unpublished.
    let last = Rule::every(Op::Get, Fault::Delay(Duration::from_secs(1))).on("data/");
    world.lake.rule(Rule::every(Op::Get, Fault::Delay(Duration::from_millis(1))).on("data/").times(5));
    world.lake.rule(last);
    let fill = fetcher.fill(vec![pack.uses()]);
    until("some pieces are there", || fetcher.stats().memory_bytes >= 2 << 20).await;
    let large = &pack.contents[2];
    for (offset, len) in [(0, 5000), (BLOCK_LEN - 10, 20), (0, 3 * BLOCK_LEN as u32), (7, 1)] {
        let got = fetcher.read(&large.c, offset, len, Verify::Always).await.expect("it arrived");
        assert!(got == large.bytes[offset as usize..offset as usize + len as usize], "{offset} + {len}");
    }
    let stats = fetcher.stats();
    assert_eq!((stats.staging.bytes, stats.lake_demand.bytes), (0, 0), "{stats:?}");
    drop(fill);
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_that_arrived_take_no_more_memory_than_they_may() {
    let world = World::new();
    let pack = pack(&world.memory);
    let cfg = FetchConfig { memory_bytes_max: 4 << 20, ..small_config() };
    let fetcher = world.fetcher(cfg);
    let fill = fetcher.fill(vec![pack.uses()]);
    let mut most = 0;
    while fill.progress().packs_done == 0 {
        most = most.max(fetcher.stats().memory_bytes);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(most > 0 && most <= 4 << 20, "{most} bytes");
    let large = &pack.contents[2];
    assert!(fetcher.read(&large.c, 0, u32::MAX, Verify::Node).await.expect("read") == large.bytes);
}
