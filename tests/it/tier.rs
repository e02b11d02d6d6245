//! `larder tier`: sweeps in turn, checks and repairs, accounts, and says why.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::kit::World;

fn world_with_data() -> World {
    let mut world = World::new();
    // The daemon leaves the tier to the commands of the test.
    world.set("LARDER_STEWARD_PERIOD", "1h");
    let bytes: Vec<u8> = (0..300_000_u32).flat_map(|i| i.to_le_bytes()).collect();
    world.files("source", &[("big.bin", &bytes), ("small", b"s")]);
    world.push(&world.path("source"), "photos");
    world
}

fn published(world: &World) -> Vec<PathBuf> {
    let fans = fs::read_dir(world.tier().join("objects")).expect("lists").flatten();
    let objects = fans.flat_map(|fan| fs::read_dir(fan.path()).expect("lists").flatten());
    objects.map(|object| object.path()).filter(|path| path.extension().is_none()).collect()
}

/// Writes the steward's lease as the process does that sweeps.
fn let_sweep(tier: &Path, node: &str, instance: &str) {
    let owner = json!({ "node": node, "instance": instance, "host": "elsewhere" });
    fs::write(tier.join("steward/lease"), owner.to_string()).expect("writes the lease");
}

#[test]
fn a_sweep_waits_for_its_turn_and_takes_it_at_once_from_a_process_that_was_killed() {
    let world = world_with_data();
    world.ok(["cache", "photos", "--ttl", "1ms"]);
    let stranger = "0123456789abcdef0123456789abcdef";
    let_sweep(&world.tier(), stranger, stranger);
    let told = world.fails(1, ["tier", "sweep", "--wait", "300ms"]);
    assert!(told.contains(&format!("node {stranger} (elsewhere")), "{told}");
    let report: Value =
        serde_json::from_str(&world.run(["tier", "sweep", "--wait", "0s", "--json"]).stdout).expect("JSON");
    let steward = report["steward"]["node"].as_str().unwrap_or_default().replace('-', "");
    assert_eq!((&report["elsewhere"], steward.as_str()), (&json!(true), stranger));
    // A daemon of this node that was killed: the lock of its instance is free.
    let node = fs::read_to_string(world.state().join("node-id")).expect("reads the node's id");
    world.kill_daemon();
    let instances: Vec<PathBuf> =
        fs::read_dir(world.state().join("instances")).expect("lists").flatten().map(|entry| entry.path()).collect();
    let [killed] = instances.as_slice() else { panic!("only the daemon is left: {instances:?}") };
    let killed = killed.file_name().and_then(|name| name.to_str()).expect("plain");
    let_sweep(&world.tier(), node.trim(), killed);
    let report = world.json(&["tier", "sweep", "--wait", "0s"]);
    assert_eq!((&report["elsewhere"], &report["evicted"]), (&json!(false), &json!(1)), "{report}");
    assert!(published(&world).is_empty());
}

#[test]
fn a_lease_of_another_node_is_named_and_forgotten_on_request() {
    let world = world_with_data();
    world.ok(["cache", "photos"]);
    let node = "0123456789abcdef0123456789abcdef";
    let commit = fs::read_dir(world.tier().join("commits")).expect("lists").flatten().next().expect("a lake").path();
    let commit = fs::read_dir(commit).expect("lists").flatten().next().expect("a commit").path();
    fs::create_dir_all(commit.join("leases")).expect("makes the folder");
    let note = json!({ "format": 1, "node": node, "host": "gpu7", "time_ms": 0 });
    fs::write(commit.join(format!("leases/{node}.{node}")), note.to_string()).expect("writes the lease");
    let told = world.fails(1, ["uncache", "photos"]);
    assert!(told.contains(&format!("mounted by node {node} (gpu7")), "{told}");
    assert!(told.contains(&format!("larder tier forget-node {node}")), "{told}");
    let why = world.json(&["tier", "why", "photos"]);
    assert_eq!(why["leases"][0]["host"], "gpu7");
    assert_eq!((&why["now"]["reason"], &why["expires_in_ms"]), (&json!("mounted"), &Value::Null));
    let text = world.ok(["tier", "why", "photos@main"]);
    assert!(text.contains(&format!("lease: mount of node {node} (gpu7), renewed")), "{text}");
    world.ok(["tier", "forget-node", node]);
    world.ok(["uncache", "photos"]);
    let why = world.json(&["tier", "why", "photos"]);
    assert_eq!((&why["now"], &why["last"]["reason"]), (&Value::Null, &json!("uncached")));
}

#[test]
fn a_fill_of_a_killed_daemon_keeps_nobody_from_uncaching() {
    let world = world_with_data();
    world.ok(["cache", "photos"]);
    let node = fs::read_to_string(world.state().join("node-id")).expect("reads the node's id");
    let instance =
        fs::read_dir(world.state().join("instances")).expect("lists").flatten().next().expect("the daemon's");
    let instance = instance.file_name().into_string().expect("plain");
    let commit = fs::read_dir(world.tier().join("commits")).expect("lists").flatten().next().expect("a lake").path();
    let commit = fs::read_dir(commit).expect("lists").flatten().next().expect("a commit").path();
    fs::create_dir_all(commit.join("leases")).expect("makes the folder");
    let note =
        json!({ "format": 1, "node": node.trim(), "host": "h", "time_ms": 0, "instance": instance, "purpose": "fill" });
    fs::write(commit.join(format!("leases/{}.{instance}", node.trim())), note.to_string()).expect("writes the lease");
    assert!(world.fails(1, ["uncache", "photos"]).contains("being filled"));
    world.kill_daemon();
    world.ok(["uncache", "photos"]);
}

#[test]
fn what_is_out_of_order_is_found_and_repaired() {
    let world = world_with_data();
    world.ok(["cache", "photos"]);
    world.ok(["tier", "check"]);
    let object = published(&world).pop().expect("a pack");
    fs::File::options().write(true).open(&object).and_then(|file| file.set_len(100)).expect("cuts it");
    fs::write(world.tier().join("quarantine/what.json"), "?").expect("writes");
    fs::write(world.tier().join("stranger"), "?").expect("writes");
    let found = world.run(["tier", "check", "--json"]);
    let report: Value = serde_json::from_str(&found.stdout).expect("JSON");
    assert_eq!((found.code, &report["good"]), (1, &json!(false)), "{report}");
    let paths: Vec<&str> =
        report["findings"].as_array().expect("a list").iter().filter_map(|f| f["path"].as_str()).collect();
    let name = object.strip_prefix(world.tier()).expect("below").to_str().expect("plain");
    assert!(paths.contains(&name) && paths.contains(&"stranger"), "{paths:?}");
    fs::remove_file(world.tier().join("stranger")).expect("removes");
    world.ok(["tier", "check", "--repair"]);
    assert!(!object.exists(), "set aside");
    world.ok(["cache", "photos"]);
    world.ok(["tier", "check"]);
}

#[test]
fn what_a_sweep_would_do_is_told_and_not_done() {
    let world = world_with_data();
    world.ok(["cache", "photos", "--ttl", "1ms"]);
    let plan = world.json(&["tier", "sweep", "--dry-run"]);
    assert_eq!(
        (&plan["decisions"][0]["verdict"], &plan["decisions"][0]["reason"]),
        (&json!("leaves"), &json!("aged_out"))
    );
    assert!(!published(&world).is_empty(), "nothing was done");
    let report = world.json(&["tier", "sweep"]);
    assert_eq!(report["evicted"], 1);
    assert!(published(&world).is_empty());
    assert_eq!(world.json(&["tier", "why", "photos"])["last"]["reason"], "aged_out");
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert!(world.json(&["tier", "sweep"])["deleted_bytes"].as_u64().is_some_and(|bytes| bytes > 1_000_000));
    world.ok(["tier", "check"]);
}

#[test]
fn what_a_tier_holds_is_told_by_dataset_with_shared_packs_once() {
    let world = world_with_data();
    fs::write(world.path("source/more"), vec![3; 500_000]).expect("writes");
    world.ok(["tag", "photos", "v1"]);
    world.push(&world.path("source"), "photos");
    world.files("other", &[("x", b"something else")]);
    world.push(&world.path("other"), "notes");
    for revision in ["photos", "photos@v1", "notes"] {
        world.ok(["cache", revision]);
    }
    let usage = world.json(&["tier", "df"]);
    let of = |name: &str| {
        let all = usage["datasets"].as_array().expect("a list");
        all.iter().find(|of| of["dataset"] == name).unwrap_or_else(|| panic!("{name}: {usage}")).clone()
    };
    let (photos, notes) = (of("photos"), of("notes"));
    assert_eq!((&photos["commits"], &notes["commits"]), (&json!(2), &json!(1)));
    let sum = photos["cached_bytes"].as_u64().zip(notes["cached_bytes"].as_u64()).map(|(a, b)| a + b);
    assert_eq!(usage["used_bytes"].as_u64(), sum, "they share nothing, and each of a dataset's packs counts once");
    assert!(world.ok(["tier", "df"]).contains("\nnotes"));
}

#[test]
fn a_directory_that_is_a_tier_already_is_left_as_it_is_where_that_is_asked() {
    let world = World::new();
    let dir = world.path("shared");
    let dir = dir.to_str().expect("plain");
    let made = world.json(&["tier", "init", dir, "--if-missing", "--ttl", "3d"]);
    let again = world.json(&["tier", "init", dir, "--if-missing", "--ttl", "1h"]);
    assert_eq!(made, again, "the marker that is there counts");
    assert!(world.fails(1, ["tier", "init", dir]).contains("is a tier already"));
    world.files("foreign", &[("theirs.txt", b"x")]);
    assert!(
        world
            .fails(1, ["tier", "init", world.path("foreign").to_str().expect("plain"), "--if-missing"])
            .contains("theirs.txt")
    );
}
