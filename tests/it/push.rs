//! `larder push` as people use it: the real binary over the embedded lake, and its death.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use crate::kit::World;

/// Name, then kind, mode, times and bytes of everything below a directory.
fn scan(dir: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut all = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(at) = dirs.pop() {
        for entry in std::fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let what = if meta.is_dir() {
                dirs.push(path.clone());
                "dir".to_owned()
            } else if meta.is_symlink() {
                format!("link to {:?}", std::fs::read_link(&path).unwrap())
            } else {
                let digest = blake3::hash(&std::fs::read(&path).unwrap());
                format!("file {} {digest} {}", meta.len(), meta.nlink())
            };
            let name = path.strip_prefix(dir).unwrap().as_os_str().as_bytes().to_vec();
            all.insert(name, format!("{what} {:o} {}.{}", meta.mode(), meta.mtime(), meta.mtime_nsec()));
        }
    }
    all
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Copies a revision out and compares it with its source.
#[track_caller]
fn assert_got(world: &World, revision: &str, source: &Path) {
    let out = world.path(&format!("out-{}", rand::random::<u64>()));
    world.ok(["get", revision, text(&out)]);
    assert_eq!(scan(source), scan(&out));
}

#[test]
fn a_push_leaves_out_what_is_excluded_and_puts_a_part_where_it_is_told() {
    let world = World::new();
    let base = world.files("base", &[("keep/a", b"a"), ("old/b", b"b"), ("x.tmp", b"t"), ("keep/y.tmp", b"t")]);
    let options = ["--exclude", "*.tmp", "--branch", "work", "-m", "base"];
    let pushed = world.json(&[&["push", text(&base), "photos"][..], &options].concat());
    assert_eq!((&pushed["branch"], &pushed["files"]), (&"work".into(), &2.into()), "{pushed}");
    assert!(world.fails(1, ["show", "photos@main"]).contains("main"));
    let part = world.files("part", &[("c", b"c")]);
    let onto = ["--onto", "photos@work", "--at", "old", "--branch", "work"];
    world.json(&[&["push", text(&part), "photos"][..], &onto].concat());
    let expected = world.files("expected", &[("keep/a", b"a"), ("old/c", b"c")]);
    let out = world.path("out");
    world.ok(["get", "photos@work", text(&out)]);
    let names = |dir: &Path| scan(dir).into_keys().collect::<Vec<_>>();
    assert_eq!(names(&out), names(&expected), "`old` was replaced, the rest is as it was");
}

#[test]
fn a_directory_is_pushed_and_copied_out_again() {
    let world = World::new();
    let source = world.files(
        "source",
        &[("a", b"1"), ("dir/b", &noise(1, 100_000)), ("dir/deep/c", b""), ("run.sh", b"#!/bin/sh\n")],
    );
    std::fs::set_permissions(source.join("run.sh"), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::hard_link(source.join("dir/b"), source.join("linked")).unwrap();
    std::os::unix::fs::symlink("a", source.join("symlink")).unwrap();
    std::fs::create_dir(source.join("void")).unwrap();
    let said = world.json(&["push", text(&source), "photos", "-m", "first", "--tag", "v1", "--meta", "camera=k3"]);
    assert_eq!((said["files"].as_u64(), said["unchanged"].as_bool()), (Some(4), Some(false)), "{said}");
    assert_got(&world, "photos@v1", &source);
    // Again: nothing changed; the text says so.
    let again = world.ok(["push", text(&source), "photos"]);
    assert!(again.starts_with("nothing changed"), "{again}");
    assert!(again.contains(said["commit"].as_str().unwrap()), "{again}");
}

#[test]
fn wrong_use_is_told_with_status_2() {
    let world = World::new();
    let source = world.files("source", &[("a", b"1")]);
    for args in [
        vec!["push", text(&source), "Bad Name"],
        vec!["push", text(&source), "photos", "--meta", "no-value"],
        vec!["push", text(&source), "photos", "--tag", "abcd12"],
        vec!["push", text(&source), "photos", "--at", "x"],
        vec!["push", "/no/such/dir", "photos"],
    ] {
        let said = world.fails(2, &args);
        assert!(!said.is_empty(), "{args:?}");
    }
    let said = world.fails(1, ["push", text(&source), "photos", "--exclude", "a["]);
    assert!(said.contains("a["), "{said}");
}

#[test]
fn what_this_user_cannot_read_is_listed_and_can_be_left_out() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let world = World::of_user(65534);
    let source =
        world.files("source", &[("good", b"1"), ("closed", b"2"), ("dir/inner", b"3"), ("dir/hidden/x", b"4")]);
    for name in ["closed", "dir/hidden"] {
        std::fs::set_permissions(source.join(name), PermissionsExt::from_mode(0o000)).unwrap();
    }
    let said = world.fails(1, ["push", text(&source), "photos"]);
    assert!(said.contains("closed: ") && said.contains("dir/hidden: ") && said.contains("--skip-unreadable"), "{said}");
    let refused: Value = serde_json::from_str(&world.run(["push", text(&source), "photos", "--json"]).stdout).unwrap();
    let paths: Vec<_> = refused["problems"].as_array().unwrap().iter().map(|problem| &problem["path"]).collect();
    assert_eq!(paths, ["closed", "dir/hidden"]);
    let said = world.json(&["push", text(&source), "photos", "--skip-unreadable"]);
    assert_eq!(said["skipped"].as_array().map(Vec::len), Some(2), "{said}");
    assert_eq!(said["files"], Value::from(2));
}

#[test]
fn a_push_that_is_killed_at_random_moments_is_finished_by_running_it_again() {
    let rounds: u64 = std::env::var("LARDER_CAMPAIGN_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    let seed: u64 = std::env::var("LARDER_CAMPAIGN_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    eprintln!("rounds {rounds}, seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let world = World::new();
    let mut version = 0;
    for round in 0..rounds {
        let source = world.path("source");
        change(&source, &mut version, &mut random);
        let mut kills = 0;
        loop {
            let said = world.path("said");
            let mut child = world
                .command(["push", text(&source), "photos"])
                .stdout(Stdio::null())
                .stderr(std::fs::File::create(&said).unwrap())
                .spawn()
                .unwrap();
            let patience = Duration::from_millis(random.random_range(5..900));
            let begun = Instant::now();
            let ended = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break Some(status);
                }
                if begun.elapsed() > patience && kills < 8 {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    break None;
                }
                std::thread::sleep(Duration::from_millis(2));
            };
            match ended {
                Some(status) => {
                    let said = std::fs::read_to_string(&said).unwrap();
                    assert!(status.success(), "round {round}, seed {seed}, after {kills} kills: {said}");
                    break;
                }
                None => kills += 1,
            }
            // Whatever a ref points to is complete.
            if kills == 1 && world.run(["show", "photos"]).code == 0 {
                let out = world.path(&format!("check-{round}-{kills}"));
                world.ok(["get", "photos", text(&out)]);
                std::fs::remove_dir_all(out).unwrap();
            }
        }
        assert_got(&world, "photos", &source);
    }
}

/// Adds, changes and removes files; two of them large enough for uploads in parts.
fn change(source: &Path, version: &mut u64, random: &mut StdRng) {
    std::fs::create_dir_all(source.join("many")).unwrap();
    for _ in 0..60 {
        *version += 1;
        let name = source.join(format!("many/f{}", random.random_range(0..200)));
        std::fs::write(name, noise(*version, random.random_range(1..200_000))).unwrap();
    }
    *version += 1;
    std::fs::write(source.join("large"), noise(*version, (68 << 20) + 12345)).unwrap();
    *version += 1;
    std::fs::write(source.join(format!("many/middle{}", *version % 3)), noise(*version, 20 << 20)).unwrap();
}

#[test]
fn a_repeated_push_of_a_job_finds_its_commit_also_below_that_of_another() {
    let world = World::new();
    let dirs = [world.files("one", &[("a", b"one")]), world.files("two", &[("a", b"two")])];
    let push = |number: usize, job: &str| {
        let told = world.json(&["push", dirs[number].to_str().expect("a plain path"), "model", "--job", job]);
        told["commit"].as_str().expect("push tells the commit").to_owned()
    };
    let first = push(0, "job-1");
    let second = push(1, "job-2");
    assert_eq!(push(0, "job-1"), first);
    assert_eq!(world.json(&["show", "model"])["commit"], second.as_str(), "the head stays");
    assert_ne!(push(0, "job-3"), first, "another job's is another commit");
}
