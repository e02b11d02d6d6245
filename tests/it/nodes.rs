//! Several real daemons on one tier: what they cost the lake together.
//!
//! The long ones are `campaign::nodes`.

use crate::kit::cluster::{AHEAD_BYTES, Cluster, one_copy};
use crate::kit::wait_for;

#[test]
fn four_nodes_that_read_the_same_cold_commit_cost_the_lake_one_copy() {
    let mut cluster = Cluster::new(4);
    for node in &mut cluster.nodes {
        // On a busy machine a claim may hold a read up for longer than the default allows.
        node.set("LARDER_FETCH_CLAIM_WAIT", "25s");
        node.set("LARDER_FETCH_GIVE_UP", "2m");
    }
    // Small files that are one pack, and a large one of its own that has two spans.
    let mut sizes: Vec<u64> = (0..160).map(|n| 90_000 + 500 * n).collect();
    sizes.push(66 << 20);
    let files = cluster.read_cold_on_all(&sizes, 4);
    // The readers are done before the fills may be. A folder of staging may be left: the steward's work.
    wait_for("the fills' end", || cluster.total("larder_packs_published_total", "") >= 2);
    cluster.print_sources();
    let copy = one_copy(&files);
    let sent = cluster.proxy.counters().data_down;
    let ahead = cluster.total("larder_lake_bytes_total", "lane=\"demand\"");
    println!("one copy {copy}, sent {sent}, of these asked ahead by readers {ahead}");
    // And a little more where a fill ends under a reader that was about to join it.
    let ahead_max = 4 * 2 * AHEAD_BYTES + copy / 50;
    assert!(ahead <= ahead_max, "{ahead} bytes asked ahead of two packs by four nodes");
    assert!(sent - ahead <= copy + copy / 50, "{} bytes sent for one copy of {copy}", sent - ahead);
    assert_eq!(cluster.total("larder_fetch_read_errors_total", ""), 0);
    assert_eq!(cluster.total("larder_packs_published_total", ""), 2, "read back and published once each");
}

#[test]
fn a_node_without_peers_serves_its_readers_from_the_shared_staging() {
    let mut cluster = Cluster::new(2);
    for node in &mut cluster.nodes {
        node.set("LARDER_PEER_LISTEN", "");
        node.set("LARDER_FETCH_CLAIM_WAIT", "25s");
    }
    cluster.read_cold_on_all(&[100_000; 60], 2);
    assert_eq!(cluster.total("larder_fetch_read_bytes_total", "source=\"peer\""), 0);
    assert!(!cluster.tier().join("peer-key").exists(), "nobody listens");
    let ahead = cluster.total("larder_lake_bytes_total", "lane=\"demand\"");
    assert!(ahead <= 2 * AHEAD_BYTES, "{ahead} bytes asked ahead");
}
