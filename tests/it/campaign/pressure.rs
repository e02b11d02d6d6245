//! A tier that holds a third of what its nodes read: commits come, are read and leave all the time.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use super::Campaign;
use crate::kit::cluster::{Cluster, Order, SourceFile, read_and_compare, write_source};
use crate::kit::{World, wait_for};

const NODES: u64 = 4;
const COMMITS: u64 = 6;
const READERS: u64 = 3;
/// How long it goes on, whatever the campaign would allow.
const LASTS: Duration = Duration::from_secs(600);

/// One dataset, and what it was made of.
struct Dataset {
    name: String,
    source: PathBuf,
    files: Vec<SourceFile>,
}

/// Small files that share a pack, and a large one that is a pack of its own.
fn push_datasets(cluster: &Cluster, campaign: &mut Campaign) -> Vec<Dataset> {
    let pushed = (0..COMMITS).map(|number| {
        let name = format!("set{number}");
        let source = cluster.nodes[0].path(&name);
        let mut sizes: Vec<u64> = (0..100).map(|n| 1 + 3000 * n + number).collect();
        sizes.push((65 << 20) + number);
        let files = write_source(&source, &sizes, campaign.below(1 << 40));
        cluster.nodes[0].push(&source, &name);
        Dataset { name, source, files }
    });
    pushed.collect()
}

fn take_turns(node: &World, number: u64, datasets: &[Dataset], seed: u64, ends: Instant, mounts: &AtomicU64) {
    let mut random = SmallRng::seed_from_u64(seed * NODES + number);
    while Instant::now() < ends {
        let dataset = &datasets[random.random_range(0..datasets.len())];
        let prefetch = ["none", "touched", "all"][random.random_range(0..3)];
        let mount = node.mount(&dataset.name, "m", &["--prefetch", prefetch]);
        mounts.fetch_add(1, Ordering::Relaxed);
        read_some(dataset, &mount, &mut random);
        node.ok(["umount", mount.to_str().expect("plain")]);
        std::thread::sleep(Duration::from_millis(random.random_range(0..400)));
    }
}

/// Reads a few files or all, at once or with pauses in which the commit grows old.
fn read_some(dataset: &Dataset, mount: &Path, random: &mut SmallRng) {
    for _ in 0..random.random_range(1..4) {
        let count = random.random_range(1..=dataset.files.len());
        let first = random.random_range(0..=dataset.files.len() - count);
        read_and_compare(
            &dataset.source,
            mount,
            &dataset.files[first..first + count],
            READERS,
            Order::Shuffled(random.random_range(0..1 << 40)),
        );
        std::thread::sleep(Duration::from_millis(random.random_range(0..1500)));
    }
}

#[test]
#[ignore = "long: make campaign PART=pressure"]
fn no_read_fails_under_constant_eviction_and_the_accounts_agree_at_the_end() {
    let mut campaign = Campaign::new();
    let mut cluster = Cluster::new(NODES as usize);
    let datasets = push_datasets(&cluster, &mut campaign);
    let bytes: u64 = datasets.iter().flat_map(|dataset| &dataset.files).map(|(_, size)| size).sum();
    for node in &mut cluster.nodes {
        node.set("LARDER_TIER_CAPACITY", (bytes / 3).to_string());
        node.set("LARDER_TIER_TTL", "3s");
        node.set("LARDER_TIER_GRACE", "1s");
        node.set("LARDER_TIER_SPACE_WAIT", "6m");
        node.set("LARDER_TIER_SCRUB_RATE", "4MiB");
        node.set("LARDER_STEWARD_PERIOD", "1s");
    }
    cluster.renew_tier();
    let ends = campaign.ends.min(Instant::now() + LASTS);
    let (seed, mounts) = (campaign.below(1 << 32), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for (number, node) in (0..).zip(&cluster.nodes) {
            let (datasets, mounts) = (&datasets, &mounts);
            scope.spawn(move || take_turns(node, number, datasets, seed, ends, mounts));
        }
    });
    cluster.print_sources();
    let left = |node: &World| node.log().lines().filter(|line| line.contains("a commit left")).count() as u64;
    let evicted: u64 = cluster.nodes.iter().map(left).sum();
    println!("{} mounts, {evicted} commits evicted", mounts.load(Ordering::Relaxed));
    assert!(evicted >= 20 && evicted * 20 > mounts.load(Ordering::Relaxed), "hardly any eviction: {evicted}");
    assert_eq!(cluster.total("larder_fetch_read_errors_total", ""), 0);
    assert_eq!(cluster.total("larder_tier_heals_total", ""), 0, "nothing was damaged");
    let rested = |node: &World| node.log().contains("deleting freed nothing");
    assert!(!cluster.nodes.iter().any(rested), "evicting went on");
    assert_accounts_agree(&cluster);
}

/// When the last commits have aged out, and the steward has cleared what the last fills left: what is there
/// is what the accounts say, to the byte.
fn assert_accounts_agree(cluster: &Cluster) {
    let check = || -> Value {
        let said = cluster.nodes[0].run(["tier", "check", "--json"]).stdout;
        serde_json::from_str(&said).expect("a report")
    };
    println!("at the end: {}", check());
    wait_for("an empty tier", || cluster.nodes[0].json(&["tier", "commits"])["commits"] == json!([]));
    wait_for("a tier in order", || check()["good"] == json!(true));
    let report = check();
    assert_eq!(report["accounted_bytes"], report["walked_bytes"], "{report}");
}
