//! The cache as people see it: filling, keeping, clearing, ageing out, and status about it.

use std::fs;

use serde_json::Value;

use crate::kit::{World, wait_for};

fn world_with_data() -> (World, Vec<u8>) {
    let world = World::new();
    let bytes: Vec<u8> = (0..300_000_u32).flat_map(|i| i.to_le_bytes()).collect();
    world.files("source", &[("big.bin", &bytes), ("small", b"s")]);
    world.push(&world.path("source"), "photos");
    (world, bytes)
}

fn cached(world: &World) -> Vec<Value> {
    let status = world.json(&["status"]);
    status["tiers"][0]["commits"].as_array().cloned().unwrap_or_default()
}

#[test]
fn a_commit_is_filled_kept_let_go_and_cleared() {
    let (world, _) = world_with_data();
    let filled = world.json(&["cache", "photos", "--keep"]);
    assert_eq!(filled["finished"], true);
    assert_eq!(filled["bytes_done"], filled["bytes_total"]);
    let before = cached(&world);
    assert_eq!(before[0]["percent_cached"], 100, "{before:?}");
    assert_eq!((&before[0]["kept"], &before[0]["mounts"]), (&Value::Bool(true), &Value::from(0)));
    assert!(before[0]["ttl_left_ms"].is_null(), "a kept commit does not age out");
    assert!(world.fails(1, ["uncache", "photos"]).contains("--no-keep"));
    world.ok(["cache", "photos", "--no-keep"]);
    assert!(cached(&world)[0]["ttl_left_ms"].as_i64().is_some_and(|left| left > 0));
    let removed = world.json(&["uncache", "photos"]);
    assert!(removed["freed_bytes"].as_u64().is_some_and(|freed| freed > 1_000_000), "{removed}");
    assert!(cached(&world).is_empty());
}

#[test]
fn an_unused_commit_ages_out_and_is_read_again_from_the_lake() {
    let (world, bytes) = world_with_data();
    let dir = world.mount("photos", "m", &[]);
    world.ok(["cache", "photos", "--ttl", "1s"]);
    assert_eq!(fs::read(dir.join("big.bin")).expect("reads"), bytes);
    assert_eq!(cached(&world)[0]["mounts"], 1);
    std::thread::sleep(std::time::Duration::from_millis(2500));
    assert_eq!(cached(&world).len(), 1, "what is mounted stays, however old");
    world.ok(["umount", dir.to_str().expect("plain")]);
    wait_for("the commit to leave", || cached(&world).is_empty());
    let dir = world.mount("photos", "m", &[]);
    assert_eq!(fs::read(dir.join("big.bin")).expect("reads"), bytes);
    assert_eq!(fs::read(dir.join("small")).expect("reads"), b"s");
}

#[test]
fn a_shared_pack_is_counted_once_and_stays_with_its_last_user() {
    let (world, _) = world_with_data();
    world.ok(["tag", "photos", "v1"]);
    fs::write(world.path("source/more"), vec![3; 500_000]).expect("writes");
    world.push(&world.path("source"), "photos");
    world.ok(["cache", "photos@v1"]);
    world.ok(["cache", "photos"]);
    let commits = cached(&world);
    assert_eq!(commits.len(), 2);
    assert!(
        commits.iter().all(|commit| commit["shared_bytes"].as_u64().is_some_and(|shared| shared > 1_000_000)),
        "{commits:#?}"
    );
    world.ok(["uncache", "photos@v1"]);
    let left = cached(&world);
    assert_eq!((left.len(), &left[0]["percent_cached"]), (1, &Value::from(100)));
}

#[test]
fn what_is_not_waited_for_arrives_all_the_same() {
    let (world, _) = world_with_data();
    world.ok(["cache", "photos", "--no-wait"]);
    wait_for("the fill", || cached(&world).first().is_some_and(|commit| commit["percent_cached"] == 100));
}

#[test]
fn status_works_without_a_daemon() {
    let (world, _) = world_with_data();
    world.ok(["cache", "photos"]);
    world.ok(["daemon", "stop"]);
    let commits = cached(&world);
    assert_eq!(commits[0]["percent_cached"], 100);
    assert!(world.ok(["status"]).contains("photos@"));
    world.ok(["uncache", "photos"]);
}
