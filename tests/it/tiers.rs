//! Several tiers on one node, moving between them, a configured capacity, and a medium that frees nothing.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::kit::{World, wait_for};

/// A node with the tiers `fast` (the default) and `large`; the dataset `notes` belongs into `large`.
fn world_with_two_tiers() -> World {
    let mut world = World::new();
    world.set("LARDER_STEWARD_PERIOD", "300ms");
    for name in ["fast", "large"] {
        let dir = world.path(name);
        world.ok(["tier", "init", dir.to_str().expect("plain")]);
    }
    let config = format!(
        "default_tier = \"fast\"\n[tier.fast]\npath = \"{}\"\n[tier.large]\npath = \"{}\"\nttl = \"7d\"\n[dataset.notes]\ntier = \"large\"\nttl = \"14d\"\n",
        world.path("fast").display(),
        world.path("large").display()
    );
    fs::write(world.path("larder.toml"), config).expect("writes the configuration");
    world.set("LARDER_CONFIG", world.path("larder.toml").to_str().expect("plain"));
    let bytes: Vec<u8> = (0..300_000_u32).flat_map(|i| i.to_le_bytes()).collect();
    world.files("source", &[("big.bin", &bytes), ("small", b"s")]);
    world.push(&world.path("source"), "photos");
    world.files("text", &[("a", b"1"), ("b", b"22")]);
    world.push(&world.path("text"), "notes");
    world
}

fn commits_in(world: &World, tier: &str) -> Vec<Value> {
    world.json(&["tier", "commits", "--tier", tier])["commits"].as_array().cloned().unwrap_or_default()
}

fn tier_of_mount(world: &World) -> Value {
    world.json(&["mounts"])[0]["options"]["tier"].clone()
}

#[test]
fn a_dataset_or_a_command_names_a_tier_and_else_the_default_is_taken() {
    let world = world_with_two_tiers();
    let tiers = world.json(&["tier", "list"]);
    let told: Vec<_> =
        tiers.as_array().expect("a list").iter().map(|t| (&t["name"], &t["default"], &t["ttl_ms"])).collect();
    let (day, week) = (json!(86_400_000_u64), json!(7 * 86_400_000_u64));
    assert_eq!(told, [(&json!("fast"), &json!(true), &day), (&json!("large"), &json!(false), &week)]);
    assert_eq!(tiers[1]["datasets"], json!(["notes"]));
    assert_eq!(world.json(&["cache", "photos"])["tier"], "fast");
    assert_eq!(world.json(&["cache", "notes"])["tier"], "large");
    assert_eq!(commits_in(&world, "large")[0]["ttl_ms"], json!(14 * 86_400_000_u64), "the dataset's, not the tier's");
    assert_eq!(world.json(&["cache", "notes", "--tier", "fast"])["tier"], "fast");
    assert_eq!((commits_in(&world, "fast").len(), commits_in(&world, "large").len()), (2, 1));
    let dir = world.mount("notes", "m", &[]);
    assert_eq!(tier_of_mount(&world), "large");
    world.ok(["umount", dir.to_str().expect("plain")]);
    world.mount("photos", "m", &["--tier", "large"]);
    assert_eq!(tier_of_mount(&world), "large");
    assert_eq!(world.json(&["uncache", "notes"])["tier"], "large");
    assert!(world.fails(1, ["cache", "photos", "--tier", "slow"]).contains("slow"));
}

#[test]
fn a_commit_moves_to_another_tier_while_it_is_read_and_leaves_with_its_last_reader() {
    let world = world_with_two_tiers();
    world.ok(["cache", "photos", "--keep"]);
    let dir = world.mount("photos", "m", &[]);
    assert_eq!(tier_of_mount(&world), "fast");
    let source = fs::read(world.path("source/big.bin")).expect("reads");
    let moved = world.json(&["tier", "move", "photos", "large"]);
    assert_eq!((&moved["from"], &moved["to"], &moved["left_bytes"]), (&json!("fast"), &json!("large"), &Value::Null));
    let there = commits_in(&world, "large");
    assert_eq!((&there[0]["percent_cached"], &there[0]["kept"]), (&json!(100), &json!(true)), "`keep` goes along");
    assert_eq!(fs::read(dir.join("big.bin")).expect("reads on"), source);
    assert_eq!(commits_in(&world, "fast").len(), 1, "it is in use");
    let other = world.mount("photos", "other", &[]);
    let tiers: Vec<Value> =
        world.json(&["mounts"]).as_array().expect("a list").iter().map(|m| m["options"]["tier"].clone()).collect();
    assert_eq!(tiers, ["fast", "large"], "new readers go where it is now");
    assert_eq!(fs::read(other.join("big.bin")).expect("reads"), source);
    world.ok(["umount", dir.to_str().expect("plain")]);
    wait_for("the commit to leave", || commits_in(&world, "fast").is_empty());
    assert_eq!(fs::read(other.join("big.bin")).expect("reads"), source);
    // Back again; nobody has it mounted from there.
    world.ok(["umount", other.to_str().expect("plain")]);
    let back = world.json(&["tier", "move", "photos", "fast", "--from", "large"]);
    assert!(back["left_bytes"].as_u64().is_some_and(|left| left > 1_000_000), "{back}");
    assert!(commits_in(&world, "large").iter().all(|commit| commit["dataset"] != "photos"));
    assert!(world.fails(1, ["tier", "move", "photos", "fast", "--from", "large"]).contains("not in the tier `large`"));
}

#[test]
fn what_does_not_fit_into_the_capacity_gets_room_at_once_and_not_at_the_next_period() {
    let mut world = World::new();
    world.set("LARDER_STEWARD_PERIOD", "1h");
    world.set("LARDER_TIER_CAPACITY", "6MiB");
    for name in ["a", "b"] {
        let bytes: Vec<u8> = (0..1_000_000_u32)
            .flat_map(|i| i.wrapping_mul(name.len() as u32 + 7 + u32::from(name == "b")).to_le_bytes())
            .collect();
        world.files(name, &[("big.bin", &bytes)]);
        world.push(&world.path(name), name);
    }
    world.ok(["cache", "a"]);
    let filled = world.json(&["cache", "b"]);
    assert_eq!(filled["finished"], true);
    let usage = world.json(&["tier", "commits"]);
    let names: Vec<&Value> = usage["commits"].as_array().expect("a list").iter().map(|c| &c["dataset"]).collect();
    assert_eq!(names, ["b"], "the least recently used made room");
    assert_eq!(world.json(&["tier", "why", "a"])["last"]["reason"], "least_recently_used");
}

/// A node whose tier lies on a small medium of its own and holds `old`, 72 MB, and `new`, 4 MB. Gives the medium.
fn world_with_a_small_medium() -> (World, PathBuf) {
    let mut world = World::new();
    world.set("LARDER_STEWARD_PERIOD", "1h");
    let dir = world.make_dir("medium");
    nix::mount::mount(Some("tmpfs"), &dir, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=300m"))
        .expect("mounts a tmpfs (needs root)");
    let tier = dir.join("tier");
    world.ok(["tier", "init", tier.to_str().expect("plain")]);
    world.set("LARDER_TIER", tier.to_str().expect("plain"));
    let bytes: Vec<u8> = (0..18_000_000_u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    world.files("old", &[("big.bin", &bytes)]);
    world.files("new", &[("small.bin", &bytes[..4_000_000])]);
    for name in ["old", "new"] {
        world.push(&world.path(name), name);
        world.ok(["cache", name]);
    }
    (world, dir)
}

fn objects_of(tier: &Path) -> Vec<PathBuf> {
    let fans = fs::read_dir(tier.join("objects")).expect("lists").flatten();
    fans.flat_map(|fan| fs::read_dir(fan.path()).expect("lists").flatten()).map(|object| object.path()).collect()
}

#[test]
fn an_eviction_whose_space_is_freed_late_is_no_reason_to_stop() {
    let (world, dir) = world_with_a_small_medium();
    let open: Vec<_> = objects_of(&dir.join("tier")).iter().map(|path| fs::File::open(path).expect("opens")).collect();
    world.ok(["uncache", "old"]);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let swept = world.json(&["tier", "sweep"]);
    assert!(swept["deleted_bytes"].as_u64().is_some_and(|bytes| bytes > 70_000_000), "{swept}");
    assert!(dir.join("tier/steward/suspicion").exists(), "nothing was free at once");
    assert_eq!(world.json(&["tier", "sweep"])["freed_nothing_bytes"], Value::Null);
    assert!(dir.join("tier/steward/suspicion").exists(), "still open");
    drop(open);
    // And somebody fills the tier again meanwhile.
    world.ok(["cache", "old"]);
    assert_eq!(world.json(&["tier", "sweep"])["freed_nothing_bytes"], Value::Null);
    assert_eq!(world.json(&["status"])["tiers"][0]["evictions_free_nothing"], false);
    assert!(!dir.join("tier/steward/suspicion").exists());
    world.ok(["daemon", "stop"]);
}

#[test]
fn an_eviction_that_frees_nothing_stops_and_says_so() {
    let (mut world, dir) = world_with_a_small_medium();
    // A snapshot of the medium: whatever is deleted in the tier, its bytes stay.
    let snapshot = dir.join("snapshot");
    fs::create_dir(&snapshot).expect("makes it");
    for object in objects_of(&dir.join("tier")) {
        fs::hard_link(&object, snapshot.join(object.file_name().expect("has one"))).expect("links");
    }
    world.ok(["uncache", "old"]);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let swept = world.json(&["tier", "sweep"]);
    assert!(swept["deleted_bytes"].as_u64().is_some_and(|bytes| bytes > 70_000_000), "{swept}");
    assert_eq!(swept["freed_nothing_bytes"], Value::Null, "too early to tell: {swept}");
    std::thread::sleep(std::time::Duration::from_millis(4100));
    let swept = world.json(&["tier", "sweep"]);
    assert!(swept["freed_nothing_bytes"].as_u64().is_some_and(|bytes| bytes > 70_000_000), "{swept}");
    assert_eq!(world.json(&["status"])["tiers"][0]["evictions_free_nothing"], true);
    assert!(world.ok(["status"]).contains("evicting frees nothing"));
    assert!(world.ok(["daemon", "metrics"]).contains("larder_tier_evictions_free_nothing{tier=\"default\"} 1"));
    // Far above the watermark, and nothing more is given away for nothing.
    world.set("LARDER_TIER_CAPACITY", "1MiB");
    let plan = world.json(&["tier", "sweep", "--dry-run"]);
    assert_eq!(plan["decisions"][0]["reason"], "evictions_free_nothing", "{plan}");
    assert_eq!(world.json(&["tier", "sweep"])["evicted"], 0);
    world.ok(["daemon", "stop"]);
}
