//! Several nodes on one tier, at size: what they cost the lake together, how long they take, and what a
//! node costs that is killed or stands still on the way.
//!
//! `LARDER_CAMPAIGN_SHRINK` divides the sizes, for a machine that has less time or space.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Campaign;
use crate::kit::cluster::{AHEAD_BYTES, Cluster, Order, SourceFile, one_copy, read_and_compare, write_source};

const LINK_BYTES_PER_SEC: u64 = 50 << 20;
const PACK_BYTES: u64 = 256 << 20;
const SPAN_BYTES: u64 = 64 << 20;
/// Spans of one pack that a node brings at once.
const SPANS_AT_ONCE: u64 = 2;
const READERS: u64 = 8;
/// What the lake has sent to a node that sleeps and nobody takes out of its sockets: it is sent again.
const CUT_BYTES: u64 = 16 << 20;

fn shrink() -> u64 {
    std::env::var("LARDER_CAMPAIGN_SHRINK").ok().and_then(|text| text.parse().ok()).unwrap_or(1).max(1)
}

/// How long it took until the lake had sent a copy, and until everybody had read everything.
#[derive(Debug)]
struct Took {
    arrived: Duration,
    read: Duration,
}

/// Mounts everywhere, reads everything everywhere, and unmounts.
fn read_everywhere(cluster: &Cluster, nodes: usize, source: &Path, files: &[SourceFile], order: Order) -> Took {
    cluster.renew_tier();
    let mounts: Vec<_> = cluster.nodes[..nodes].iter().map(|node| node.mount("data", "m", &[])).collect();
    cluster.proxy.reset_counters();
    let begun = Instant::now();
    let arrived = std::thread::scope(|scope| {
        for (node, mount) in mounts.iter().enumerate() {
            let order = order_of(order, node as u64);
            scope.spawn(move || read_and_compare(source, mount, files, READERS, order));
        }
        let copy = scope.spawn(|| {
            while cluster.proxy.counters().data_down < one_copy(files) {
                std::thread::sleep(Duration::from_millis(100));
            }
            begun.elapsed()
        });
        copy.join().expect("it only waits")
    });
    Took { arrived, read: begun.elapsed() }
}

/// Each node shuffles in its own way.
fn order_of(order: Order, node: u64) -> Order {
    match order {
        Order::Tree => Order::Tree,
        Order::Shuffled(seed) => Order::Shuffled(seed * 10 + node),
    }
}

/// Reads a dataset with one node, then with four, through one link.
///
/// In the order of the tree four nodes take the time of one. Shuffled, nearly all reading comes after
/// the last byte has arrived, and four nodes on one machine read four times as much with the same
/// cores: then the time until the bytes are there is compared.
fn compare_one_with_four(sizes: &[u64], order: Order) {
    let mut campaign = Campaign::new();
    let cluster = Cluster::new(4);
    let source = cluster.nodes[0].path("source");
    let files = write_source(&source, sizes, campaign.below(1 << 40));
    cluster.nodes[0].push(&source, "data");
    let copy = one_copy(&files);
    cluster.proxy.set_link(Some(LINK_BYTES_PER_SEC));
    let alone = read_everywhere(&cluster, 1, &source, &files, order);
    cluster.print_sources();
    println!(
        "one node: {} MiB in {alone:.1?}, {order:?}, sent {} MiB",
        copy >> 20,
        cluster.proxy.counters().data_down >> 20
    );
    let together = read_everywhere(&cluster, 4, &source, &files, order);
    cluster.print_sources();
    let sent = cluster.proxy.counters().data_down;
    let ahead = cluster.total("larder_lake_bytes_total", "lane=\"demand\"");
    let meta = cluster.total("larder_lake_bytes_total", "lane=\"meta\"");
    let factor = |bytes: u64| bytes as f64 / copy as f64;
    println!(
        "four nodes: {together:.1?}, {order:?}; sent {:.4} of one copy, of these {:.4} ahead by readers; descriptions {meta} bytes",
        factor(sent),
        factor(ahead)
    );
    assert_eq!(cluster.total("larder_fetch_read_errors_total", ""), 0);
    assert!(factor(sent - ahead) <= 1.02, "{} bytes for one copy of {copy}", sent - ahead);
    // 1 MiB of each pack and node, and a file for each reader in each 2 s that it waited for a claim.
    let packs = copy.div_ceil(PACK_BYTES) + sizes.iter().filter(|size| **size > 64 << 20).count() as u64;
    let unit = (256 << 10) * 32;
    let waits =
        4 * READERS * (together.read.as_secs() / 2 + 1) * sizes.iter().max().map_or(unit, |size| unit.min(*size));
    let bound = 4 * packs * AHEAD_BYTES + waits;
    assert!(ahead <= bound, "{ahead} bytes ahead, {bound} allowed");
    let (one, four) = match order {
        Order::Tree => (alone.read, together.read),
        Order::Shuffled(_) => (alone.arrived, together.arrived),
    };
    assert!(four.as_secs_f64() <= 1.2 * one.as_secs_f64(), "{together:?} instead of {alone:?}");
}

fn many_small_files() -> Vec<u64> {
    (0..20_000 / shrink()).map(|n| 60_000 + (n % 97) * 1000).collect()
}

#[test]
#[ignore = "long: make campaign PART=nodes"]
fn four_nodes_read_many_small_files_for_one_copy_and_in_the_time_of_one() {
    compare_one_with_four(&many_small_files(), Order::Tree);
}

#[test]
#[ignore = "long: make campaign PART=nodes"]
fn four_nodes_read_shuffled_small_files_for_one_copy_that_arrives_in_the_time_of_one() {
    compare_one_with_four(&many_small_files(), Order::Shuffled(1));
}

#[test]
#[ignore = "long: make campaign PART=nodes"]
fn four_nodes_read_a_few_large_files_for_one_copy_and_in_the_time_of_one() {
    compare_one_with_four(&[(512 << 20) / shrink(); 4], Order::Tree);
}

#[test]
#[ignore = "long: make campaign PART=nodes"]
fn a_node_that_is_killed_or_stands_still_costs_its_unfinished_spans() {
    let mut campaign = Campaign::new();
    let cluster = Cluster::new(4);
    let source = cluster.nodes[0].path("source");
    let files = write_source(&source, &vec![500_000; (512 / shrink()) as usize], campaign.below(1 << 40));
    cluster.nodes[0].push(&source, "data");
    cluster.proxy.set_link(Some(LINK_BYTES_PER_SEC));
    let copy = one_copy(&files);
    let mut worst = 0;
    for round in 0.. {
        if !campaign.goes_on(round, 50) {
            println!("{round} rounds, at most {:.3} of one copy", worst as f64 / copy as f64);
            break;
        }
        let victim = 1 + campaign.below(3) as usize;
        let (kills, at) = (campaign.below(2) == 0, Duration::from_millis(campaign.below(6000)));
        let sleeps = Duration::from_millis(campaign.below(25_000));
        disturb(&cluster, &source, &files, round, victim, &move |pid| {
            std::thread::sleep(at);
            let _ = kill(pid, if kills { Signal::SIGKILL } else { Signal::SIGSTOP });
            if !kills {
                std::thread::sleep(sleeps);
                let _ = kill(pid, Signal::SIGCONT);
            }
        });
        let sent = cluster.proxy.counters().data_down;
        worst = worst.max(sent);
        let ahead = cluster.total("larder_lake_bytes_total", "lane=\"demand\"");
        let unfinished = SPANS_AT_ONCE * SPAN_BYTES;
        let brought = |node| cluster.counter(node, "larder_lake_bytes_total", "lane=\"prefetch\"") >> 20;
        println!(
            "round {round}: node {victim} {} at {at:?} for {sleeps:?}, sent {:.3}, ahead {ahead}, filled, MiB: {:?}",
            if kills { "killed" } else { "stopped" },
            sent as f64 / copy as f64,
            (0..4).map(brought).collect::<Vec<_>>(),
        );
        let bound = copy + copy / 50 + ahead + AHEAD_BYTES + unfinished + CUT_BYTES;
        assert!(sent <= bound, "{sent} bytes sent, {bound} allowed");
    }
}

/// Reads everywhere while something happens to one node, whose own reads do not count.
fn disturb(
    cluster: &Cluster,
    source: &Path,
    files: &[SourceFile],
    round: u64,
    victim: usize,
    happen: &(dyn Fn(Pid) + Sync),
) {
    cluster.renew_tier();
    let mounts: Vec<_> = cluster.nodes.iter().map(|node| node.mount("data", "m", &[])).collect();
    let pid = Pid::from_raw(cluster.nodes[victim].daemon_pid().expect("it runs"));
    cluster.proxy.reset_counters();
    std::thread::scope(|scope| {
        let happened = scope.spawn(|| happen(pid));
        let mut survivors = Vec::new();
        for (node, mount) in mounts.iter().enumerate() {
            if node == victim {
                // Its reads begin, and end however they end.
                scope.spawn(move || files.iter().all(|(path, _)| std::fs::read(mount.join(path)).is_ok()));
                continue;
            }
            let order = Order::Shuffled(round * 10 + node as u64);
            survivors.push(scope.spawn(move || read_and_compare(source, mount, files, READERS, order)));
        }
        happened.join().expect("it sends signals");
        survivors.into_iter().for_each(|survivor| survivor.join().expect("the survivors read everything right"));
        // Reads of a mount whose daemon was killed wait for the next daemon.
        cluster.nodes[victim].ok(["daemon"]);
    });
    cluster.nodes[0].ok(["tier", "check"]);
}
