//! History, listing and copying out, with the real binary.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::kit::World;

/// Two versions of a small dataset, the first one tagged.
fn two_versions(world: &World) -> (String, String) {
    let dir = world.files("src", &[("a.txt", b"one"), ("sub/b.txt", b"two"), ("sub/deep/c", b"three"), ("gone", b"x")]);
    let first = world.push(&dir, "photos");
    world.ok(["tag", "photos", "v1"]);
    fs::write(dir.join("a.txt"), b"other").unwrap();
    fs::remove_file(dir.join("gone")).unwrap();
    fs::write(dir.join("new"), b"new").unwrap();
    let second = world.push(&dir, "photos");
    assert_ne!(first, second);
    (first, second)
}

#[test]
fn log_show_and_datasets_tell_what_was_pushed() {
    let world = World::new();
    let (first, second) = two_versions(&world);
    let log = world.json(&["log", "photos"]);
    let ids: Vec<&str> = log.as_array().unwrap().iter().map(|row| row["commit"].as_str().unwrap()).collect();
    assert_eq!(ids, [second.as_str(), first.as_str()]);
    assert_eq!(log[0]["branches"][0], "main");
    assert_eq!(log[1]["tags"][0], "v1");
    assert_eq!(world.json(&["log", "photos@v1"]).as_array().unwrap().len(), 1);
    assert_eq!(world.json(&["log", "photos", "-n", "1"]).as_array().unwrap().len(), 1);

    let show = world.json(&["show", &format!("photos@{}", &first[..10])]);
    assert_eq!(show["commit"], first.as_str());
    assert_eq!((show["files"].as_u64(), show["dirs"].as_u64()), (Some(4), Some(2)));
    assert_eq!(show["proof"], "digested");

    let datasets = world.json(&["datasets"]);
    assert_eq!(datasets["datasets"][0]["dataset"], "photos");
    assert_eq!(datasets["datasets"][0]["head"], second.as_str());
    assert!(world.ok(["datasets"]).contains("photos"));
    assert!(world.ok(["log", "photos"]).contains(&format!("commit {second} (main)")));
    assert!(world.ok(["show", "photos"]).contains("every file has its digest"));
}

#[test]
fn ls_and_cat_show_what_a_commit_holds() {
    let world = World::new();
    two_versions(&world);
    assert_eq!(world.ok(["ls", "photos@v1"]), "a.txt\ngone\nsub/\n");
    assert_eq!(world.ok(["ls", "photos", "sub"]), "sub/b.txt\nsub/deep/\n");
    assert_eq!(world.ok(["ls", "-R", "photos"]), "a.txt\nnew\nsub/\nsub/b.txt\nsub/deep/\nsub/deep/c\n");
    let rows = world.json(&["ls", "photos", "a.txt"]);
    assert_eq!((rows[0]["kind"].as_str(), rows[0]["size"].as_u64()), (Some("file"), Some(5)));
    assert_eq!(rows[0]["digest"], blake3::hash(b"other").to_hex().as_str());
    assert_eq!(world.ok(["cat", "photos@v1", "a.txt", "sub/deep/c"]), "onethree");
    assert!(world.fails(1, ["cat", "photos", "sub"]).contains("directory"));
    assert!(world.fails(1, ["cat", "photos", "nope"]).contains("has no `nope`"));
}

#[test]
fn a_revision_that_is_not_there_is_an_error_with_the_next_step() {
    let world = World::new();
    two_versions(&world);
    let told = world.fails(1, ["ls", "phots"]);
    assert!(told.contains("there are: photos"), "{told}");
    let told = world.fails(1, ["ls", "photos@v9"]);
    assert!(told.contains("v9"), "{told}");
    world.fails(2, ["ls", "Not A Name"]);
}

#[test]
fn diff_tells_what_was_added_removed_and_changed() {
    let world = World::new();
    two_versions(&world);
    let text = world.ok(["diff", "photos@v1", "photos"]);
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('m')).collect();
    assert_eq!(lines, ["M a.txt", "D gone", "A new"]);
    let rows = world.json(&["diff", "photos@v1", "@main"]);
    let changes: Vec<(&str, &str)> = rows
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (row["path"].as_str().unwrap(), row["change"].as_str().unwrap()))
        .filter(|(_, change)| *change != "attributes")
        .collect();
    assert_eq!(changes, [("a.txt", "content"), ("gone", "removed"), ("new", "added")]);
    let stat = world.json(&["diff", "photos@v1", "photos", "--stat"]);
    assert_eq!((stat["added"].as_u64(), stat["bytes_added"].as_u64()), (Some(1), Some(8)));
    assert_eq!(world.ok(["diff", "photos", "photos", "--exit-code"]), "");
    world.fails(1, ["diff", "photos@v1", "photos", "--exit-code"]);
}

#[test]
fn tags_and_branches_are_made_listed_moved_and_removed() {
    let world = World::new();
    let (first, second) = two_versions(&world);
    world.ok(["tag", "photos@v1", "also"]);
    let tags = world.json(&["tag", "photos"]);
    let names: Vec<&str> = tags.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["also", "v1"]);
    assert!(world.fails(1, ["tag", "photos", "v1"]).contains("--force"));
    world.ok(["tag", "photos", "v1", "--force"]);
    assert_eq!(world.json(&["show", "photos@v1"])["commit"], second.as_str());
    world.ok(["branch", &format!("photos@{first}"), "old"]);
    assert_eq!(world.json(&["show", "photos@old"])["commit"], first.as_str());
    world.ok(["rm", "photos@old"]);
    world.fails(1, ["show", "photos@old"]);
    world.ok(["tag", "photos", "also", "--delete"]);
    assert_eq!(world.json(&["tag", "photos"]).as_array().unwrap().len(), 1);
    world.fails(2, ["rm", "photos"]);
    world.ok(["rm", "photos", "--dataset"]);
    world.fails(1, ["log", "photos"]);
}

#[test]
fn get_gives_back_what_was_pushed() {
    let world = World::new();
    let dir = world.files("src", &[("plain", b"plain"), ("d/run.sh", b"#!/bin/sh"), ("d/empty", b"")]);
    fs::set_permissions(dir.join("d/run.sh"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::create_dir(dir.join("void")).unwrap();
    std::os::unix::fs::symlink("plain", dir.join("link")).unwrap();
    fs::hard_link(dir.join("plain"), dir.join("d/same")).unwrap();
    let sparse = fs::File::create(dir.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (64 << 20) - 3).unwrap();
    drop(sparse);
    let large: Vec<u8> = (0..9_000_000_u32).flat_map(|n| n.to_le_bytes()).take(20 << 20).collect();
    fs::write(dir.join("large"), &large).unwrap();
    fs::set_permissions(dir.join("d"), fs::Permissions::from_mode(0o555)).unwrap();
    world.push(&dir, "photos");
    let out = world.path("out");
    let report = world.json(&["get", "photos", out.to_str().unwrap()]);
    assert_eq!(report["failed_count"], 0);
    let differ = std::process::Command::new("rsync")
        .args(["-naciHS", "--no-o", "--no-g", "--delete"])
        .arg(format!("{}/", dir.display()))
        .arg(format!("{}/", out.display()))
        .output();
    match differ {
        Ok(differ) => assert_eq!(String::from_utf8_lossy(&differ.stdout), ""),
        Err(_) => eprintln!("rsync is not installed: compared by hand only"),
    }
    let stat = |name: &str| fs::symlink_metadata(out.join(name)).unwrap();
    let source = |name: &str| fs::symlink_metadata(dir.join(name)).unwrap();
    for name in ["plain", "d/run.sh", "d", "link", "sparse", "void", "large"] {
        let (one, other) = (stat(name), source(name));
        assert_eq!(
            (one.mode(), one.mtime(), one.mtime_nsec()),
            (other.mode(), other.mtime(), other.mtime_nsec()),
            "{name}"
        );
    }
    assert_eq!(stat("plain").ino(), stat("d/same").ino());
    assert!(stat("sparse").blocks() < 1000, "holes stay holes");
    assert_eq!(fs::read(out.join("large")).unwrap(), large);
    assert!(world.fails(1, ["get", "photos", out.to_str().unwrap()]).contains("there already"));
    let one = world.path("one");
    world.ok(["get", "photos", "d/run.sh", one.to_str().unwrap()]);
    assert_eq!(fs::read(&one).unwrap(), b"#!/bin/sh");
}
