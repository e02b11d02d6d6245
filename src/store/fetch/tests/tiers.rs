//! Tiers that are full, failing, hanging, damaged or evicted under a reader.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::kit::{FAKE_SPAN_LEN, FakeTier, TestFile, TestPack, World, flip, native, no_memory, small_config};
use crate::format::digest::BLOCK_LEN;
use crate::format::placement::Location;
use crate::store::fetch::{FetchConfig, Fetcher, FillError, NotReady, PackFillError, Prefetch, Verify};
use crate::testkit::faulty_lake::{Fault, MemLake, Op, Rule};

const LEVELS: [Verify; 3] = [Verify::Tier, Verify::Node, Verify::Always];

fn mixed(lake: &MemLake, name: &str) -> TestPack {
    let files = [
        TestFile::of(50_000, 1),
        TestFile::of(3 * BLOCK_LEN + 9, 2),
        TestFile::of(200_000, 3),
        TestFile::sparse(700_000, 4, &[(4096, 300_000), (600_000, 5000)]),
        TestFile::of(7, 5),
    ];
    native(lake, name, &files)
}

async fn assert_reads(fetcher: &Fetcher, pack: &TestPack, verify: Verify) {
    for content in &pack.contents {
        let got = fetcher.read(&content.c, 0, u32::MAX, verify).await.expect("read");
        assert!(got == content.bytes, "wrong bytes at {verify}");
    }
}

fn offset_of(pack: &TestPack, content: usize) -> u64 {
    match &pack.contents[content].c.location {
        Location::Run { offset, .. } => *offset,
        Location::Sparse { extents, .. } => extents[0].offset,
        Location::None => panic!("a content with bytes"),
    }
}

/// Waits for what runs in the background; fails after a while.
pub(super) async fn until(what: &str, done: impl Fn() -> bool) {
    for _ in 0..12_000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_costs_the_lake_each_byte_once_and_afterwards_nothing() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    let fetcher = world.fetcher(no_memory());
    let done = fetcher.fill(vec![pack.uses()]).wait().await.expect("filled");
    assert_eq!((done.packs_done, done.bytes_done), (1, pack.len));
    assert_eq!(fetcher.stats().lake_prefetch.bytes, pack.len);
    world.lake.rule(Rule::every(Op::Get, Fault::Permanent));
    for verify in LEVELS {
        assert_reads(&fetcher, &pack, verify).await;
    }
    let again = fetcher.fill(vec![pack.uses()]).wait().await.expect("it is there");
    assert_eq!(again.packs_done, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filled_tier_serves_a_fresh_node_while_the_lake_is_down() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    world.fetcher(small_config()).fill(vec![pack.uses()]).wait().await.expect("filled");
    // Everything: without the recipe nothing of a large content could be judged.
    world.lake.rule(Rule::every(Op::Get, Fault::Passing));
    let other_node = World { kv: crate::store::kv::Kv::in_memory(), ..world };
    for verify in LEVELS {
        assert_reads(&other_node.fetcher(no_memory()), &pack, verify).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_flipped_in_the_tier_heals_from_the_lake() {
    for verify in [Verify::Node, Verify::Always] {
        for content in 0..5 {
            let world = World::new();
            let pack = mixed(&world.memory, "a");
            world.fetcher(no_memory()).fill(vec![pack.uses()]).wait().await.expect("filled");
            world.flip_in_tier(&pack.pack, offset_of(&pack, content));
            let fetcher = world.fetcher(no_memory());
            assert_reads(&fetcher, &pack, verify).await;
            until("the object is good again", || {
                let bytes = std::fs::read(world.object_path(&pack.pack)).unwrap_or_default();
                let whole = world.memory.bytes_of(&pack.key).expect("the pack");
                bytes == whole
            })
            .await;
            assert!(fetcher.stats().heals >= 1);
            assert_eq!(fetcher.stats().read_errors, 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_flipped_while_the_daemon_runs_is_found_by_always() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    let fetcher = world.fetcher(no_memory());
    fetcher.fill(vec![pack.uses()]).wait().await.expect("filled");
    assert_reads(&fetcher, &pack, Verify::Always).await;
    world.flip_in_tier(&pack.pack, offset_of(&pack, 2) + 5);
    assert_reads(&fetcher, &pack, Verify::Always).await;
    assert!(fetcher.stats().heals >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_was_cut_short_heals() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    world.fetcher(no_memory()).fill(vec![pack.uses()]).wait().await.expect("filled");
    let object = std::fs::OpenOptions::new().write(true).open(world.object_path(&pack.pack)).expect("there");
    object.set_len(pack.len - 5000).expect("cut");
    for verify in LEVELS {
        assert_reads(&world.fetcher(no_memory()), &pack, verify).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_puts_back_what_lay_beside_a_published_pack() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    let fill = || async { world.fetcher(no_memory()).fill(vec![pack.uses()]).wait().await };
    fill().await.expect("filled");
    assert_eq!(world.lose_sidecars(&pack.pack), 3, "an index, the values of the large contents, and the recipe");
    let done = fill().await.expect("put back");
    assert_eq!((done.packs_done, done.bytes_done), (1, pack.len));
    assert_eq!(world.lose_sidecars(&pack.pack), 3);
    world.lake.rule(Rule::every(Op::Get, Fault::Permanent));
    fill().await.expect_err("neither the tier nor the lake has the index");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_flipped_in_staging_is_neither_read_nor_published() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = mixed(&world.memory, "a");
    let fetcher = world.fetcher_on(Some(tier.clone()), no_memory());
    // The last piece hangs, so that the others can be damaged in the staging file.
    world.lake.rule(Rule::every(Op::Get, Fault::Delay(Duration::from_millis(300))).on("data/").after(3).times(1));
    let fill = fetcher.fill(vec![pack.uses()]);
    until("pieces are staged", || fill.progress().bytes_done > BLOCK_LEN).await;
    for content in 0..5 {
        flip(&tier.staging(&pack.pack), offset_of(&pack, content));
    }
    for verify in LEVELS {
        assert_reads(&fetcher, &pack, verify).await;
    }
    fill.wait().await.expect("filled in the end");
    let published = std::fs::read(tier.object(&pack.pack)).expect("published");
    assert!(published == world.memory.bytes_of(&pack.key).expect("the pack"));
    assert!(fetcher.stats().heals >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_that_was_killed_goes_on_from_its_marks() {
    let world = World::new();
    let tier = FakeTier::new();
    let files: Vec<_> = (0..24).map(|n| TestFile::of(200_000 + n, n)).collect();
    let pack = native(&world.memory, "a", &files);
    let cfg = FetchConfig { prefetch_requests_max: 1, ..no_memory() };
    {
        let fetcher = world.fetcher_on(Some(tier.clone()), cfg.clone());
        world.lake.rule(Rule::every(Op::Get, Fault::Hang).on("data/").after(8));
        let fill = fetcher.fill(vec![pack.uses()]);
        until("two spans are marked", || tier.spans_done(&pack.pack) >= 2).await;
        drop(fetcher);
        assert!(fill.wait().await.is_err(), "it ends with the fetcher");
    }
    world.lake.heal();
    let fetcher = world.fetcher_on(Some(tier.clone()), cfg);
    fetcher.fill(vec![pack.uses()]).wait().await.expect("filled");
    // Of the two marked spans the later one may be fetched again where its claim was still being given up.
    let marked = FAKE_SPAN_LEN;
    let fetched = fetcher.stats().lake_prefetch.bytes;
    assert!(fetched <= pack.len - marked + 2 * BLOCK_LEN, "fetched {fetched} of {}", pack.len);
    assert_reads(&fetcher, &pack, Verify::Always).await;
    assert_eq!(fetcher.stats().heals, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_to_what_a_killed_fill_left_is_found() {
    let world = World::new();
    let tier = FakeTier::new();
    let files: Vec<_> = (0..24).map(|n| TestFile::of(200_000 + n, n)).collect();
    let pack = native(&world.memory, "a", &files);
    {
        let cfg = FetchConfig { prefetch_requests_max: 1, ..no_memory() };
        let fetcher = world.fetcher_on(Some(tier.clone()), cfg);
        world.lake.rule(Rule::every(Op::Get, Fault::Hang).on("data/").after(8));
        let _fill = fetcher.fill(vec![pack.uses()]);
        until("two spans are marked", || tier.spans_done(&pack.pack) >= 2).await;
    }
    world.lake.heal();
    flip(&tier.staging(&pack.pack), 300_000);
    let fetcher = world.fetcher_on(Some(tier.clone()), no_memory());
    fetcher.fill(vec![pack.uses()]).wait().await.expect("filled");
    assert_reads(&fetcher, &pack, Verify::Tier).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_tier_stops_filling_and_no_read_fails() {
    let world = World::new();
    let tier = FakeTier::new();
    tier.faults.full.store(true, Ordering::Relaxed);
    let pack = mixed(&world.memory, "a");
    let cfg = FetchConfig { tier_pause_ms: 60_000, ..no_memory() };
    let fetcher = world.fetcher_on(Some(tier.clone()), cfg);
    let _mount = fetcher.attach(vec![pack.uses()], Prefetch::All);
    let error = fetcher.fill(vec![pack.uses()]).wait().await.expect_err("full");
    assert!(matches!(error, FillError::Failed { first: PackFillError::Tier { .. }, .. }), "{error:?}");
    assert!(fetcher.stats().filling_paused.is_some());
    for verify in LEVELS {
        assert_reads(&fetcher, &pack, verify).await;
    }
    let error = fetcher.fill(vec![pack.uses()]).wait().await.expect_err("paused");
    assert!(matches!(error, FillError::Failed { first: PackFillError::Paused { .. }, .. }), "{error:?}");
    assert_eq!(fetcher.stats().read_errors, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_mount_that_goes_leaves_no_file_of_its_packs_open() {
    let world = World::new();
    let (first, second) = (mixed(&world.memory, "a"), native(&world.memory, "b", &[TestFile::of(9000, 7)]));
    let fetcher = world.fetcher(no_memory());
    fetcher.fill(vec![first.uses(), second.uses()]).wait().await.expect("filled");
    let one = fetcher.attach(vec![first.uses(), second.uses()], Prefetch::None);
    let other = fetcher.attach(vec![first.uses()], Prefetch::All);
    for pack in [&first, &second] {
        assert_reads(&fetcher, pack, Verify::Node).await;
    }
    assert_eq!(fetcher.stats().open_files, 2);
    drop(one);
    until("one is closed", || fetcher.stats().open_files == 1).await;
    assert_reads(&fetcher, &first, Verify::Node).await;
    drop(other);
    until("both are closed", || fetcher.stats().open_files == 0).await;
    assert_reads(&fetcher, &first, Verify::Node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tier_that_fails_never_fails_a_read() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = mixed(&world.memory, "a");
    let fetcher = world.fetcher_on(Some(tier.clone()), no_memory());
    tier.faults.opens_fail.store(true, Ordering::Relaxed);
    for verify in LEVELS {
        assert_reads(&fetcher, &pack, verify).await;
    }
    tier.faults.opens_fail.store(false, Ordering::Relaxed);
    tier.faults.publishing_fails.store(true, Ordering::Relaxed);
    fetcher.fill(vec![pack.uses()]).wait().await.expect_err("not published");
    assert_reads(&fetcher, &pack, Verify::Node).await;
    assert!(fetcher.stats().tier_errors >= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tier_that_hangs_holds_readers_up_once_and_not_for_long() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = mixed(&world.memory, "a");
    let cfg = FetchConfig { tier_pause_ms: 60_000, ..no_memory() };
    let fetcher = world.fetcher_on(Some(tier.clone()), cfg);
    tier.faults.hangs.store(true, Ordering::Relaxed);
    for verify in LEVELS {
        assert_reads(&fetcher, &pack, verify).await;
    }
    assert!(tier.faults.opens.load(Ordering::Relaxed) <= 2, "nobody looks at it any more");
    assert_eq!(fetcher.stats().read_errors, 0);
    tier.faults.hangs.store(false, Ordering::Relaxed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_that_a_hanging_tier_holds_up_holds_up_no_reader() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = mixed(&world.memory, "a");
    let hour = 3_600_000;
    let cfg = FetchConfig { tier_pause_ms: hour, claim_wait_ms: hour, ahead_bytes_max: 0, ..no_memory() };
    let fetcher = world.fetcher_on(Some(tier.clone()), cfg);
    tier.faults.hangs.store(true, Ordering::Relaxed);
    let mount = fetcher.attach(vec![pack.uses()], Prefetch::All);
    let reads = assert_reads(&fetcher, &pack, Verify::Node);
    let read = tokio::time::timeout(Duration::from_secs(60), reads).await;
    tier.faults.hangs.store(false, Ordering::Relaxed);
    read.expect("nobody waits for the claim's time");
    assert_eq!(fetcher.stats().read_errors, 0);
    drop(mount);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tier_on_a_server_that_is_away_keeps_no_worker() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = mixed(&world.memory, "a");
    world.fetcher_on(Some(tier.clone()), no_memory()).fill(vec![pack.uses()]).wait().await.expect("filled");
    tier.faults.remote.store(true, Ordering::Relaxed);
    let fetcher = world.fetcher_on(Some(tier.clone()), FetchConfig { tier_pause_ms: 60_000, ..no_memory() });
    tier.faults.hangs.store(true, Ordering::Relaxed);
    for content in &pack.contents {
        let (worker, c) = (fetcher.clone(), content.c.clone());
        let at_once = tokio::task::spawn_blocking(move || worker.try_read(&c, 0, u32::MAX, Verify::Tier).is_none());
        let at_once = tokio::time::timeout(Duration::from_secs(60), at_once).await;
        // A file without bytes is nowhere and needs nobody.
        assert_eq!(at_once.expect("no worker waits").expect("no panic"), content.c.size > 0);
    }
    let first = pack.contents.iter().find(|content| fetcher.waits_for_whole(&content.c)).expect("a pack has a begin");
    fetcher.look_for_whole(&first.c).await;
    assert!(!fetcher.waits_for_whole(&first.c), "it is known to be silent");
    assert!(fetcher.whole(&first.c, Verify::Tier).is_none());
    assert_reads(&fetcher, &pack, Verify::Node).await;
    assert_eq!(fetcher.stats().read_errors, 0);
    tier.faults.hangs.store(false, Ordering::Relaxed);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_pack_is_read_from_the_lake_and_comes_back() {
    let world = World::new();
    let tier = FakeTier::new();
    let (pack, other) = (mixed(&world.memory, "a"), native(&world.memory, "b", &[TestFile::of(9000, 77)]));
    let cfg = FetchConfig { open_files_max: 1, ..no_memory() };
    let fetcher = world.fetcher_on(Some(tier.clone()), cfg);
    let _mount = fetcher.attach(vec![pack.uses()], Prefetch::Touched);
    fetcher.fill(vec![pack.uses(), other.uses()]).wait().await.expect("filled");
    assert_reads(&fetcher, &other, Verify::Node).await;
    tier.evict(&pack.pack);
    assert_reads(&fetcher, &pack, Verify::Node).await;
    until("the mount's prefetch brings it back", || tier.object(&pack.pack).exists()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn open_files_stay_within_their_bound() {
    let world = World::new();
    let packs: Vec<_> =
        (0..40).map(|n| native(&world.memory, &format!("p{n}"), &[TestFile::of(5000 + n, n)])).collect();
    let fetcher = world.fetcher(FetchConfig { open_files_max: 8, ..no_memory() });
    fetcher.fill(packs.iter().map(TestPack::uses).collect()).wait().await.expect("filled");
    for pack in &packs {
        assert_reads(&fetcher, pack, Verify::Node).await;
        assert!(fetcher.stats().open_files <= 8, "{}", fetcher.stats().open_files);
    }
    assert_eq!(fetcher.stats().lake_demand.requests, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_object_is_handed_out_only_once_this_node_digested_it() {
    let world = World::new();
    let pack = native(&world.memory, "a", &[TestFile::of(2 * BLOCK_LEN + 3, 1)]);
    let c = &pack.contents[0].c;
    world.fetcher(small_config()).fill(vec![pack.uses()]).wait().await.expect("filled");
    assert!(world.fetcher(small_config()).whole(c, Verify::Node).is_some(), "the filling node knows");

    let other_node = World { kv: crate::store::kv::Kv::in_memory(), ..world };
    let fetcher = other_node.fetcher(small_config());
    assert!(fetcher.whole(c, Verify::Always).is_none(), "each read is checked");
    assert!(fetcher.whole(c, Verify::Node).is_none(), "not digested here yet");
    until("it is digested in the background", || fetcher.whole(c, Verify::Node).is_some()).await;
    let fresh = other_node.fetcher(small_config());
    let whole = fresh.whole(c, Verify::Node).expect("remembered across a restart");
    assert_eq!(whole.len, c.size);

    other_node.flip_in_tier(&pack.pack, 99);
    let fresh = other_node.fetcher(small_config());
    assert!(fresh.whole(c, Verify::Node).is_none(), "another mtime: not the file that was digested");
    until("it heals", || fresh.stats().heals == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_placement_that_points_at_other_contents_is_an_error_at_every_level() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    let whole = native(&world.memory, "b", &[TestFile::of(2 * BLOCK_LEN, 50)]);
    let other = native(&world.memory, "c", &[TestFile::of(2 * BLOCK_LEN, 51)]);
    let fetcher = world.fetcher(no_memory());
    fetcher.fill(vec![pack.uses(), whole.uses(), other.uses()]).wait().await.expect("filled");
    for verify in LEVELS {
        assert_reads(&fetcher, &pack, verify).await;
        let mut wrong = pack.contents[0].c.clone();
        wrong.location = pack.contents[2].c.location.clone();
        assert!(fetcher.read(&wrong, 0, 100, verify).await.is_err(), "a small file at {verify}");
        let mut wrong = whole.contents[0].c.clone();
        wrong.location = other.contents[0].c.location.clone();
        assert!(fetcher.read(&wrong, 0, 100, verify).await.is_err(), "a large file at {verify}");
        assert!(fetcher.whole(&wrong, verify).is_none());
    }
    assert!(fetcher.whole(&whole.contents[0].c, Verify::Node).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_packed_file_is_never_handed_out_whole() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    let fetcher = world.fetcher(small_config());
    fetcher.fill(vec![pack.uses()]).wait().await.expect("filled");
    for content in &pack.contents {
        assert!(fetcher.whole(&content.c, Verify::Tier).is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_brings_what_the_mount_asked_for() {
    for (prefetch, brought) in [(Prefetch::None, 0), (Prefetch::Touched, 1), (Prefetch::All, 4)] {
        let world = World::new();
        let packs: Vec<_> =
            (0..4).map(|n| native(&world.memory, &format!("p{n}"), &[TestFile::of(70_000, n)])).collect();
        let fetcher = world.fetcher(small_config());
        let mount = fetcher.attach(packs.iter().map(TestPack::uses).collect(), prefetch);
        fetcher.read(&packs[2].contents[0].c, 0, 10, Verify::Node).await.expect("read");
        let there = || packs.iter().filter(|pack| world.object_path(&pack.pack).exists()).count();
        until("the packs come", || there() == brought).await;
        drop(mount);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_join_pieces_that_a_fill_brings() {
    let world = World::new();
    let pack = native(&world.memory, "a", &[TestFile::of(2 * BLOCK_LEN, 1)]);
    let fetcher = world.fetcher(no_memory());
    world.lake.rule(Rule::every(Op::Get, Fault::Delay(Duration::from_millis(100))).on("data/"));
    let fill = fetcher.fill(vec![pack.uses()]);
    until("the fill is under way", || world.lake.counters().log.iter().any(|(_, key)| key.starts_with("data/"))).await;
    let content = &pack.contents[0];
    let reads = (0..20).map(|n| fetcher.read(&content.c, n * 1000, 1000, Verify::Node));
    for (n, got) in futures::future::join_all(reads).await.into_iter().enumerate() {
        assert!(got.expect("read") == content.bytes[n * 1000..][..1000]);
    }
    fill.wait().await.expect("filled");
    assert_eq!(fetcher.stats().lake_demand.requests, 0);
    assert_eq!(fetcher.stats().lake_prefetch.bytes, pack.len);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_a_fill_ends_it_and_another_who_wants_the_pack_keeps_it_alive() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    let fetcher = world.fetcher(small_config());
    world.lake.rule(Rule::every(Op::Get, Fault::Delay(Duration::from_millis(50))).on("data/"));
    let (first, second) = (fetcher.fill(vec![pack.uses()]), fetcher.fill(vec![pack.uses()]));
    first.cancel();
    assert!(matches!(first.wait().await, Err(FillError::Cancelled { .. })));
    second.wait().await.expect("filled");
    assert_eq!(fetcher.stats().lake_prefetch.bytes, pack.len, "one fill");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_tier_a_fill_says_so_and_reads_work() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    let fetcher = world.fetcher_on(None, small_config());
    assert!(matches!(fetcher.fill(vec![pack.uses()]).wait().await, Err(FillError::NoTier)));
    assert_reads(&fetcher, &pack, Verify::Node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_pack_in_the_lake_is_not_published() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    world.memory.flip(&pack.key, offset_of(&pack, 2) as usize);
    let fetcher = world.fetcher(no_memory());
    fetcher.fill(vec![pack.uses()]).wait().await.expect_err("damaged");
    assert!(!world.object_path(&pack.pack).exists());
    for (n, content) in pack.contents.iter().enumerate() {
        let read = fetcher.read(&content.c, 0, u32::MAX, Verify::Tier).await;
        assert_eq!(read.is_ok(), n != 2, "content {n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn try_read_never_asks_the_lake() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    let fetcher = Arc::new(world.fetcher(small_config()));
    for content in &pack.contents {
        assert!(fetcher.try_read(&content.c, 0, 10, Verify::Node).is_none());
    }
    assert_eq!(world.lake.counters().gets(), 0);
    fetcher.fill(vec![pack.uses()]).wait().await.expect("filled");
    world.lake.reset_counters();
    for content in &pack.contents {
        let mut buf = vec![0; content.bytes.len() + 100];
        let filled = fetcher.try_read_into(&content.c, 3, &mut buf, Verify::Node).expect("at hand").expect("good");
        assert!(buf[..filled] == content.bytes[3..]);
    }
    assert_eq!(world.lake.counters().gets(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_checked_now_is_not_called_unproven() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = mixed(&world.memory, "a");
    // An object without what describes it, which only the lake has.
    std::fs::write(tier.object(&pack.pack), world.memory.bytes_of(&pack.key).expect("the pack")).expect("writes");
    world.lake.rule(Rule::every(Op::Get, Fault::Permanent));
    let fetcher = world.fetcher_on(Some(tier.clone()), no_memory());
    for verify in [Verify::Node, Verify::Tier] {
        assert_eq!(fetcher.ready(&pack.uses(), verify).await, Err(NotReady::Unchecked { pack: pack.pack }));
    }
    world.lake.heal();
    for verify in [Verify::Node, Verify::Tier] {
        fetcher.ready(&pack.uses(), verify).await.expect("the lake is back");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_object_is_ready_when_it_is_good_again() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    world.fetcher(no_memory()).fill(vec![pack.uses()]).wait().await.expect("filled");
    world.flip_in_tier(&pack.pack, offset_of(&pack, 1));
    let fetcher = world.fetcher(no_memory());
    assert_eq!(fetcher.ready(&pack.uses(), Verify::Node).await, Err(NotReady::Absent { pack: pack.pack }));
    until("the object is good again", || {
        std::fs::read(world.object_path(&pack.pack)).ok().map(Into::into) == world.memory.bytes_of(&pack.key)
    })
    .await;
    fetcher.ready(&pack.uses(), Verify::Node).await.expect("it was fetched again");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_was_replaced_is_seen_when_it_is_looked_at_again() {
    let world = World::new();
    let pack = mixed(&world.memory, "a");
    let fetcher = world.fetcher(no_memory());
    fetcher.fill(vec![pack.uses()]).wait().await.expect("filled");
    let before = fetcher.ready(&pack.uses(), Verify::Node).await.expect("is there");
    let (object, other) = (world.object_path(&pack.pack), world.dir.path().join("other"));
    std::fs::copy(&object, &other).and_then(|_| std::fs::rename(&other, &object)).expect("is replaced");
    assert_eq!(fetcher.ready(&pack.uses(), Verify::Node).await.expect("is open still"), before);
    fetcher.look_again(&pack.pack);
    assert_ne!(fetcher.ready(&pack.uses(), Verify::Node).await.expect("is there").file_id, before.file_id);
}
