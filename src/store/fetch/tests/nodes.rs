//! Several nodes that fill one tier together: each byte once, nobody waits for long, the dead are
//! replaced, the late change nothing.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::kit::{FAKE_CLAIM_TTL, FAKE_SPAN_LEN, FakeTier, TestFile, TestPack, World, native, no_memory};
use crate::format::digest::BLOCK_LEN;
use crate::format::ids::PackId;
use crate::store::fetch::{FetchConfig, Fetcher, Given, Peers, Prefetch, Verify};
use crate::testkit::faulty_lake::{Fault, MemLake, Op, Rule};

const NODES: u64 = 4;

/// Eight spans of small files, some of which lie across the ends of spans, and a large one.
fn many(lake: &MemLake, name: &str) -> TestPack {
    let seed = name.bytes().fold(0, |seed, byte| seed * 1000 + u64::from(byte));
    let mut files: Vec<_> = (0..40).map(|n| TestFile::of(90_000 + 1000 * n, seed + n)).collect();
    files.push(TestFile::of(9 * BLOCK_LEN + 77, seed + 99));
    files.extend((0..10).map(|n| TestFile::of(30_000 + n, seed + 200 + n)));
    native(lake, name, &files)
}

fn cfg() -> FetchConfig {
    FetchConfig { ahead_bytes_max: 100_000, claim_wait_ms: 30_000, read_timeout_ms: 60_000, ..no_memory() }
}

/// One fetcher for each node, on one tier and one lake.
fn nodes(world: &World, tier: &Arc<FakeTier>, cfg: &FetchConfig) -> Vec<Fetcher> {
    (0..NODES).map(|node| world.fetcher_on(Some(tier.other_node(10 + node)), cfg.clone())).collect()
}

fn prefetched(nodes: &[Fetcher]) -> u64 {
    nodes.iter().map(|node| node.stats().lake_prefetch.bytes).sum()
}

fn asked_ahead(nodes: &[Fetcher]) -> u64 {
    nodes.iter().map(|node| node.stats().lake_demand.bytes).sum()
}

async fn read_all(node: &Fetcher, pack: &TestPack, start: usize) {
    for step in 0..pack.contents.len() {
        // 7 and the number of contents have no divisor in common: each is read once, out of order.
        let content = &pack.contents[(start + step * 7) % pack.contents.len()];
        let got = node.read(&content.c, 0, u32::MAX, Verify::Node).await.expect("read");
        assert!(got == content.bytes, "wrong bytes");
    }
}

#[track_caller]
fn assert_published(tier: &FakeTier, world: &World, pack: &TestPack) {
    let published = std::fs::read(tier.object(&pack.pack)).expect("published");
    assert!(published == world.memory.bytes_of(&pack.key).expect("the pack"), "published bytes differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_fill_a_pack_together_bring_each_byte_once() {
    let world = World::new();
    let tier = FakeTier::new();
    let packs: Vec<_> = (0..3).map(|n| many(&world.memory, &format!("p{n}"))).collect();
    world.lake.rule(Rule::every(Op::Get, Fault::Delay(Duration::from_millis(5))).on("data/"));
    let nodes = nodes(&world, &tier, &cfg());
    let fills: Vec<_> = nodes.iter().map(|node| node.fill(packs.iter().map(TestPack::uses).collect())).collect();
    for fill in fills {
        let done = fill.wait().await.expect("filled");
        assert_eq!((done.packs_done, done.bytes_done), (3, done.bytes_total));
    }
    let all: u64 = packs.iter().map(|pack| pack.len).sum();
    assert_eq!(prefetched(&nodes), all, "one copy");
    assert_eq!(nodes.iter().map(|node| node.stats().packs_published).sum::<u64>(), 3, "read back once each");
    assert_eq!(nodes.iter().map(|node| node.stats().tier_errors).sum::<u64>(), 0);
    for pack in &packs {
        assert_published(&tier, &world, pack);
    }
    assert_eq!(tier.claims(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_on_every_node_cost_one_copy_and_a_bounded_part_ahead() {
    let world = World::new();
    let tier = FakeTier::new();
    let packs: Vec<_> = (0..6).map(|n| many(&world.memory, &format!("p{n}"))).collect();
    world.lake.rule(Rule::every(Op::Get, Fault::Delay(Duration::from_millis(5))).on("data/"));
    let nodes = nodes(&world, &tier, &cfg());
    let uses: Vec<_> = packs.iter().map(TestPack::uses).collect();
    let mounts: Vec<_> = nodes.iter().map(|node| node.attach(uses.clone(), Prefetch::All)).collect();
    let readers = nodes.iter().flat_map(|node| (0..8).map(move |reader| (node, reader)));
    let reads = readers.map(|(node, reader)| {
        let packs = &packs;
        async move {
            for n in 0..packs.len() {
                read_all(node, &packs[(n + reader) % packs.len()], reader).await;
            }
        }
    });
    futures::future::join_all(reads).await;
    let all: u64 = packs.iter().map(|pack| pack.len).sum();
    let bound = NODES * cfg().ahead_bytes_max * packs.len() as u64;
    assert!(asked_ahead(&nodes) <= bound, "{} bytes ahead, {bound} allowed", asked_ahead(&nodes));
    // One copy; two where a busy machine lets the short claims of this test expire.
    assert!(prefetched(&nodes) <= 2 * all, "{} bytes of {all}", prefetched(&nodes));
    drop(mounts);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_holds_a_reader_up_for_its_bound_and_then_the_lake_is_read() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = many(&world.memory, "a");
    let cfg = FetchConfig { ahead_bytes_max: 0, claim_wait_ms: 300, ..no_memory() };
    let node = world.fetcher_on(Some(tier.clone()), cfg);
    let mount = node.attach(vec![pack.uses()], Prefetch::All);
    // A node that lives, and never brings what it claimed.
    let always = Instant::now() + Duration::from_secs(3600);
    (0..20).for_each(|span| tier.claim_for(9, &pack.pack, span, always));
    for content in &pack.contents[..3] {
        let begun = Instant::now();
        let got = node.read(&content.c, 0, u32::MAX, Verify::Node).await.expect("read");
        assert!(got == content.bytes);
        assert!(begun.elapsed() >= Duration::from_millis(300), "it was given the chance: {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    }
    assert_eq!(node.stats().lake_prefetch.requests, 0);
    assert_eq!(node.stats().lake_demand.requests, 3);
    drop(mount);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_node_wrote_is_read_from_the_shared_staging_file_before_it_is_marked() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = many(&world.memory, "a");
    let node = world.fetcher_on(Some(tier.clone()), FetchConfig { ahead_bytes_max: 0, ..cfg() });
    let mount = node.attach(vec![pack.uses()], Prefetch::All);
    let always = Instant::now() + Duration::from_secs(3600);
    (0..20).for_each(|span| tier.claim_for(9, &pack.pack, span, always));
    let bytes = world.memory.bytes_of(&pack.key).expect("the pack");
    std::fs::write(tier.staging(&pack.pack), &bytes).expect("another node writes");
    read_all(&node, &pack, 3).await;
    assert_eq!(node.stats().lake_demand.requests + node.stats().lake_prefetch.requests, 0);
    assert!(node.stats().staging.bytes >= pack.contents.iter().map(|c| c.c.size).sum());
    drop(mount);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_nodes_spans_are_taken_over_and_what_it_wrote_is_not_fetched_again() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = many(&world.memory, "a");
    let bytes = world.memory.bytes_of(&pack.key).expect("the pack");
    // It died in its second span with most of it written and nothing marked.
    let written = FAKE_SPAN_LEN..2 * FAKE_SPAN_LEN - BLOCK_LEN / 2;
    let mut staged = vec![0; bytes.len()];
    staged[written.start as usize..written.end as usize]
        .copy_from_slice(&bytes[written.start as usize..written.end as usize]);
    std::fs::write(tier.staging(&pack.pack), &staged).expect("it had written");
    tier.claim_for(9, &pack.pack, 1, Instant::now());
    let node = world.fetcher_on(Some(tier.clone()), cfg());
    let begun = Instant::now();
    node.fill(vec![pack.uses()]).wait().await.expect("filled");
    assert!(begun.elapsed() >= FAKE_CLAIM_TTL, "it could have been alive");
    assert_eq!(tier.faults.taken_over.load(Ordering::Relaxed), 1);
    // The pieces at both ends of what was written lie only partly in it; at least one lies between.
    assert!(node.stats().lake_prefetch.bytes <= pack.len - BLOCK_LEN, "{:?}", node.stats().lake_prefetch);
    assert_published(&tier, &world, &pack);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_slept_and_wakes_after_the_publish_changes_no_byte() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = many(&world.memory, "a");
    let sleeper_tier = tier.other_node(2);
    sleeper_tier.faults.silent.store(true, Ordering::Relaxed);
    let sleeper = world.fetcher_on(Some(sleeper_tier.clone()), cfg());
    // Its first bodies come very late: it sleeps with its claims taken.
    let sleep = FAKE_CLAIM_TTL * 4;
    world.lake.rule(Rule::every(Op::Get, Fault::Delay(sleep)).on("data/").times(3));
    let sleeping = sleeper.fill(vec![pack.uses()]);
    super::tiers::until("it has claimed", || tier.claims() >= 1).await;
    let node = world.fetcher_on(Some(tier.other_node(3)), cfg());
    node.fill(vec![pack.uses()]).wait().await.expect("filled by the other");
    assert_published(&tier, &world, &pack);
    let written = sleeper_tier.faults.staged_writes.load(Ordering::Relaxed);
    sleeping.wait().await.expect("there, by another");
    assert_published(&tier, &world, &pack);
    let late = sleeper_tier.faults.staged_writes.load(Ordering::Relaxed);
    assert!(late >= written && sleeper.stats().filling_paused.is_none());
    assert_eq!(sleeper.stats().read_errors, 0);
    read_all(&sleeper, &pack, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_whose_index_others_take_away_begins_again_and_filling_does_not_pause() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = many(&world.memory, "a");
    // More often than any other failure of the tier is forgiven.
    tier.faults.indexes_lost.store(5, Ordering::Relaxed);
    let node = world.fetcher_on(Some(tier.clone()), cfg());
    node.fill(vec![pack.uses()]).wait().await.expect("filled in the end");
    assert_eq!(node.stats().filling_paused, None);
    assert_eq!(node.stats().lake_prefetch.bytes, pack.len, "its spans were marked: nothing is fetched again");
    assert_published(&tier, &world, &pack);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_that_is_cancelled_lets_go_of_its_claims_at_once() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = many(&world.memory, "a");
    world.lake.rule(Rule::every(Op::Get, Fault::Hang).on("data/").times(2));
    let first = world.fetcher_on(Some(tier.other_node(2)), cfg());
    let fill = first.fill(vec![pack.uses()]);
    super::tiers::until("it has claimed", || tier.claims() >= 1).await;
    fill.cancel();
    super::tiers::until("nothing is claimed", || tier.claims() == 0).await;
    let node = world.fetcher_on(Some(tier.other_node(3)), cfg());
    node.fill(vec![pack.uses()]).wait().await.expect("filled");
    assert_eq!(tier.faults.taken_over.load(Ordering::Relaxed), 0);
}

/// How another node answers.
#[derive(Debug)]
enum FakePeers {
    /// As it should.
    Node(&'static str, Fetcher),
    /// With as many bytes as were asked for, and other ones.
    Lies,
    /// Never.
    Stalls,
    /// That it is bringing them, again and again.
    Promises,
    /// Not at all.
    Gone,
}

#[async_trait::async_trait]
impl Peers for FakePeers {
    async fn get(&self, address: &str, pack: &PackId, range: Range<u64>, patience: Duration) -> Given {
        match self {
            Self::Node(name, fetcher) if *name == address => fetcher.give(pack, range, patience).await,
            Self::Lies => Given::Bytes(Bytes::from(vec![0xee; (range.end - range.start) as usize])),
            Self::Stalls => std::future::pending().await,
            Self::Promises => {
                tokio::time::sleep(patience / 2).await;
                Given::Coming
            }
            Self::Node(..) | Self::Gone => Given::Nothing,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_gets_from_the_owner_what_it_has_and_what_it_has_not_begun() {
    let world = World::new();
    let tier = FakeTier::new();
    // One span of four pieces.
    let files: Vec<_> = (0..8).map(|n| TestFile::of(120_000, 70 + n)).collect();
    let pack = native(&world.memory, "a", &files);
    let few = FetchConfig { prefetch_requests_max: 1, piece_len_bytes: BLOCK_LEN, ahead_bytes_max: 0, ..cfg() };
    let owner = world.fetcher_on(Some(tier.other_node(2)), few.clone());
    // The prefetch stands still with its first piece.
    world.lake.rule(Rule::every(Op::Get, Fault::Delay(Duration::from_secs(2))).on("data/").times(1));
    let fill = owner.fill(vec![pack.uses()]);
    super::tiers::until("it has claimed and begun", || world.lake.counters().gets() > 0 && tier.claims() == 1).await;
    let reader = world.fetcher_on(Some(tier.other_node(3)), few);
    reader.set_peers(Arc::new(FakePeers::Node("node-2", owner.clone())));
    let mount = reader.attach(vec![pack.uses()], Prefetch::All);
    for content in pack.contents.iter().rev() {
        let got = reader.read(&content.c, 0, u32::MAX, Verify::Node).await.expect("read");
        assert!(got == content.bytes);
    }
    fill.wait().await.expect("filled");
    let all: u64 = pack.contents.iter().map(|content| content.c.size).sum();
    let stats = reader.stats();
    assert_eq!(stats.lake_demand.requests + stats.lake_prefetch.requests, 0);
    assert!(stats.peer.bytes > all / 2, "{stats:?}");
    assert_eq!(owner.stats().to_peers.bytes, stats.peer.bytes);
    assert_eq!(owner.stats().lake_prefetch.bytes, pack.len, "brought now, and once");
    drop(mount);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_lies_stalls_or_is_gone_costs_a_reader_the_bound_and_no_byte_is_wrong() {
    for (peers, wrong) in [(FakePeers::Lies, true), (FakePeers::Stalls, false), (FakePeers::Gone, false)] {
        let world = World::new();
        let tier = FakeTier::new();
        let pack = many(&world.memory, "a");
        let cfg = FetchConfig { ahead_bytes_max: 0, claim_wait_ms: 300, ..no_memory() };
        let node = world.fetcher_on(Some(tier.clone()), cfg);
        let how = format!("{peers:?}");
        node.set_peers(Arc::new(peers));
        let mount = node.attach(vec![pack.uses()], Prefetch::All);
        let always = Instant::now() + Duration::from_secs(3600);
        (0..20).for_each(|span| tier.claim_for(9, &pack.pack, span, always));
        for content in &pack.contents[..3] {
            let begun = Instant::now();
            let got = node.read(&content.c, 0, u32::MAX, Verify::Node).await.expect("read");
            assert!(got == content.bytes, "{how}");
            assert!(begun.elapsed() < Duration::from_secs(60), "{how}: {:?}", begun.elapsed());
        }
        let stats = node.stats();
        assert_eq!((stats.peer.requests, stats.lake_demand.requests), (0, 3), "{how}");
        assert_eq!(stats.damaged_fetches > 0, wrong, "{how}");
        drop(mount);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_only_promises_holds_a_reader_up_for_half_of_its_time() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = many(&world.memory, "a");
    let cfg = FetchConfig { ahead_bytes_max: 0, claim_wait_ms: 200, read_timeout_ms: 3000, ..no_memory() };
    let node = world.fetcher_on(Some(tier.clone()), cfg);
    node.set_peers(Arc::new(FakePeers::Promises));
    let mount = node.attach(vec![pack.uses()], Prefetch::All);
    let always = Instant::now() + Duration::from_secs(3600);
    (0..20).for_each(|span| tier.claim_for(9, &pack.pack, span, always));
    let (begun, content) = (Instant::now(), &pack.contents[0]);
    let got = node.read(&content.c, 0, u32::MAX, Verify::Node).await.expect("read");
    assert!(got == content.bytes);
    // Longer than a silent one, and not for ever: the read itself would have failed after 3 s.
    assert!(begun.elapsed() >= Duration::from_millis(600), "it was believed for a while: {:?}", begun.elapsed());
    assert_eq!(node.stats().lake_demand.requests, 1);
    drop(mount);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gives_only_what_it_checked_itself() {
    let world = World::new();
    let tier = FakeTier::new();
    let pack = many(&world.memory, "a");
    // Another node wrote the file, with a wrong byte, and marked the first span.
    let mut bytes = world.memory.bytes_of(&pack.key).expect("the pack").to_vec();
    bytes[5000] ^= 1;
    std::fs::write(tier.staging(&pack.pack), &bytes).expect("another node writes");
    let always = Instant::now() + Duration::from_secs(3600);
    (1..20).for_each(|span| tier.claim_for(9, &pack.pack, span, always));
    tier.mark_for(&pack.pack, 0);
    let node = world.fetcher_on(Some(tier.clone()), cfg());
    let wait = Duration::from_millis(100);
    assert_eq!(node.give(&pack.pack, 4096..8192, wait).await, Given::Nothing, "it does not fill the pack");
    let fill = node.fill(vec![pack.uses()]);
    super::tiers::until("it has looked", || fill.progress().bytes_done > 0).await;
    assert_eq!(node.give(&pack.pack, 4096..8192, wait).await, Given::Nothing, "marked by another");
    let theirs = FAKE_SPAN_LEN + 500_000..FAKE_SPAN_LEN + 500_100;
    assert_eq!(node.give(&pack.pack, theirs, wait).await, Given::Nothing, "claimed by another");
    assert_eq!(node.give(&pack.pack, u64::MAX - 5..u64::MAX, wait).await, Given::Nothing, "behind the end");
    fill.cancel();
}
