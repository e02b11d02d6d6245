//! The kernel engine: mounts that need no daemon.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::kit::{World, mount_by_kernel, wait_for};

const FILES: &[(&str, &[u8])] = &[("a.txt", b"first"), ("dir/b.bin", &[7; 70_000]), ("dir/empty", b"")];

fn read_all(dir: &Path) {
    for (path, bytes) in FILES {
        assert!(fs::read(dir.join(path)).expect("reads") == *bytes, "{path}");
    }
}

fn pushed() -> World {
    let world = World::new();
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    world
}

/// Lists the hard links that hold packs for mounts.
fn held(world: &World) -> Vec<PathBuf> {
    let below = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    below(world.tier().join("holds")).flat_map(below).flat_map(below).collect()
}

fn engine_of(world: &World) -> String {
    world.json(&["mounts"])[0]["engine"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_kernel_mount_lives_without_a_daemon_and_the_next_one_takes_it_up() {
    let world = pushed();
    world.ok(["cache", "photos"]);
    let Some(mounted) = mount_by_kernel(&world, "photos", "m", &[]) else { return };
    let place = mounted.to_str().expect("plain");
    read_all(&mounted);
    assert_eq!(engine_of(&world), "kernel");
    assert!(world.ok(["daemon", "metrics"]).contains("engine=\"kernel\"} 1"));
    assert_eq!(held(&world).len(), 2, "a pack, and what says whose it is");
    let device = fs::metadata(&mounted).expect("stats").dev();

    world.kill_daemon();
    read_all(&mounted);
    world.ok(["daemon"]);
    wait_for("the mount to be taken up", || engine_of(&world) == "kernel");
    assert_eq!(fs::metadata(&mounted).expect("stats").dev(), device, "it is the same mount");
    world.ok(["daemon", "stop"]);
    read_all(&mounted);
    assert_eq!(held(&world).len(), 2);

    let open = fs::File::open(mounted.join("a.txt")).expect("opens");
    world.ok(["daemon"]);
    wait_for("the mount to be taken up again", || engine_of(&world) == "kernel");
    assert!(world.fails(1, ["umount", place]).contains("in use"));
    drop(open);
    world.ok(["umount", place]);
    assert!(!mounted.join("a.txt").exists());
    assert!(world.mounted().is_empty());
    assert_eq!(held(&world), Vec::<PathBuf>::new());
}

#[test]
fn a_kernel_mount_that_cannot_be_taken_up_is_unmounted_all_the_same() {
    let world = pushed();
    world.ok(["cache", "photos"]);
    let Some(mounted) = mount_by_kernel(&world, "photos", "m", &[]) else { return };
    let place = mounted.to_str().expect("plain");
    world.ok(["daemon", "stop"]);
    let aside = world.tier().with_extension("aside");
    fs::rename(world.tier(), &aside).and_then(|()| fs::write(world.tier(), b"no tier")).expect("the tier goes away");
    world.ok(["daemon"]);
    let state = || world.json(&["mounts"])[0]["state"].as_str().unwrap_or_default().to_owned();
    wait_for("the row to fail", || state() == "failed");
    let open = fs::File::open(mounted.join("a.txt")).expect("the kernel serves on");
    assert!(world.fails(1, ["umount", place]).contains("in use"));
    read_all(&mounted);
    drop(open);
    world.ok(["umount", place]);
    assert!(!mounted.join("a.txt").exists());
    assert!(world.mounted().is_empty());
    fs::remove_file(world.tier()).and_then(|()| fs::rename(&aside, world.tier())).expect("the tier comes back");
}

#[test]
fn what_the_kernel_cannot_serve_yet_is_refused_with_the_next_step() {
    let world = pushed();
    world.ok(["cache", "photos"]);
    if mount_by_kernel(&world, "photos", "m", &[]).is_none() {
        return;
    }
    let source = world.files("more", &[("c", b"not in the tier")]);
    world.push(&source, "more");
    let place = world.make_dir("n");
    let place = place.to_str().expect("plain");
    let told = world.fails(1, ["mount", "more", place, "--engine", "kernel"]);
    assert!(told.contains("larder cache more") && told.contains("--engine auto"), "{told}");
    let told = world.fails(1, ["mount", "photos", place, "--engine", "kernel", "--verify", "always"]);
    assert!(told.contains("--verify always") && told.contains("--engine fuse"), "{told}");
    assert_eq!(held(&world).len(), 2, "what failed holds nothing");
}

#[test]
fn options_of_a_kernel_mount_are_what_the_reader_sees() {
    let world = pushed();
    world.ok(["cache", "photos"]);
    let options = ["--subdir", "/dir/", "--uid", "1234", "--gid", "77", "--file-mode", "0400", "--umask", "027"];
    let Some(mounted) = mount_by_kernel(&world, "photos", "m", &options) else { return };
    let meta = fs::metadata(mounted.join("b.bin")).expect("stat");
    assert_eq!((meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777), (1234, 77, 0o400));
    assert!(!mounted.join("a.txt").exists());
    // Without --allow-other nobody else looks in: the directory that is mounted keeps them out.
    assert_eq!(fs::metadata(&mounted).expect("stat").permissions().mode() & 0o077, 0);
}

#[test]
fn auto_serves_at_once_and_the_kernel_takes_over_when_nothing_is_open() {
    let world = pushed();
    let dir = world.make_dir("probe");
    world.ok(["cache", "photos"]);
    if mount_by_kernel(&world, "photos", "probe", &[]).is_none() {
        return;
    }
    world.ok(["umount", dir.to_str().expect("plain")]);
    let source = world.files("more", &[("a", b"one"), ("b", b"two")]);
    world.push(&source, "more");
    let mounted = world.mount("more", "m", &["--engine", "auto"]);
    assert_eq!(engine_of(&world), "fuse", "nothing is in the tier yet");
    let open = fs::File::open(mounted.join("a")).expect("opens");
    world.ok(["cache", "more"]);
    assert_eq!(fs::read(mounted.join("b")).expect("reads"), b"two");
    // Another mount of the commit, where nothing is open, shows that all is there for a take-over.
    let other = world.mount("more", "n", &["--engine", "auto"]);
    let engine_at = |at: usize| world.json(&["mounts"])[at]["engine"].as_str().unwrap_or_default().to_owned();
    wait_for("the kernel to take over where nothing is open", || engine_at(1) == "kernel");
    assert_eq!(engine_at(0), "fuse", "never under a reader");
    world.ok(["umount", other.to_str().expect("plain")]);
    drop(open);
    wait_for("the kernel to take over", || engine_of(&world) == "kernel");
    assert_eq!(fs::read(mounted.join("a")).expect("reads"), b"one");
    assert_eq!(world.mounted().len(), 1, "the FUSE mount is gone");
    world.kill_daemon();
    assert_eq!(fs::read(mounted.join("b")).expect("reads without a daemon"), b"two");
    world.ok(["umount", mounted.to_str().expect("plain")]);
    assert!(world.mounted().is_empty());
}
