//! Nobody notices that a daemon dies: open files, running reads, mappings and listings go on with the next
//! one, which the keeper starts.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::kit::{World, wait_for};

/// Longer than what is packed together with others: the kernel may read it itself.
const LARGE: usize = 66 << 20;
const SMALL: usize = 300_000;
/// So many that without a large file the kernel opens them without asking.
const SMALL_FILES: usize = 80;

/// Says whether this kernel sends requests again that a dead daemon had taken.
pub fn has_resend() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|word| word.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(9))
}

/// Says whether this machine can do what these tests are about.
fn can_hand_over() -> bool {
    let can = has_resend() && nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("skipped: needs root, /dev/fuse and Linux 6.9");
    }
    can
}

/// Bytes that differ everywhere and between files.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    let mut bytes = vec![0; len];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// A commit with small files that the daemon serves and a large one for the kernel, mounted.
pub struct Stage {
    pub mount: PathBuf,
    pub files: Arc<Vec<(PathBuf, Vec<u8>)>>,
}

impl Stage {
    pub fn new(world: &World, larges: usize) -> Self {
        let source = world.make_dir("source");
        let mut files = Vec::new();
        for number in 0..SMALL_FILES {
            files.push((PathBuf::from(format!("d{}/f{number}", number % 4)), noise(number as u64, SMALL)));
        }
        for number in 0..larges {
            files.push((PathBuf::from(format!("large{number}")), noise(1000 + number as u64, LARGE)));
        }
        for (path, bytes) in &files {
            let path = source.join(path);
            fs::create_dir_all(path.parent().expect("has a parent")).expect("makes the parents");
            fs::write(path, bytes).expect("writes");
        }
        world.push(&source, "data");
        fs::remove_dir_all(&source).expect("removes the source");
        world.ok(["cache", "data"]);
        let mount = world.mount("data", "m", &["--verify", "tier"]);
        let files = files.into_iter().map(|(path, bytes)| (mount.join(path), bytes)).collect();
        Self { mount, files: Arc::new(files) }
    }

    /// Opens the first large file so that the kernel reads it itself.
    pub fn open_backed(&self, world: &World) -> File {
        let path = &self.files[SMALL_FILES].0;
        let mut file = File::open(path).expect("opens");
        wait_for("the kernel to have the file", || {
            let has = backed_files(world) == Some(1);
            if !has {
                file = File::open(path).expect("opens again");
            }
            has
        });
        file
    }
}

fn metric(world: &World, name: &str) -> Option<u64> {
    let ran = world.run(["daemon", "metrics"]);
    let line = ran.stdout.lines().find(|line| line.starts_with(name) && line.contains('{'))?;
    line.rsplit(' ').next()?.parse().ok()
}

fn backed_files(world: &World) -> Option<u64> {
    metric(world, "larder_mount_passthrough_files")
}

fn forget_pages(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("advises");
}

/// Waits until another daemon than `pid` serves.
#[track_caller]
fn wait_for_another(world: &World, pid: i32) -> i32 {
    let mut now = None;
    wait_for("another daemon", || {
        now = world.daemon_pid();
        now.is_some_and(|now| now != pid)
    });
    now.expect("was seen")
}

/// Readers that open, read, map and list at random and compare all bytes.
pub struct Readers {
    stop: Arc<AtomicBool>,
    pub rounds: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    pub fn start(stage: &Stage, count: u64, seed: u64) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = (0..count).map(|number| {
            let (files, mount) = (Arc::clone(&stage.files), stage.mount.clone());
            let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
            let mut random = SmallRng::seed_from_u64(seed + number);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    read_one(&files, &mount, &mut random);
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        Self { threads: threads.collect(), stop, rounds }
    }

    /// Ends them; fails where one has seen an error.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a reader saw an error");
        }
        self.rounds.load(Ordering::Relaxed)
    }
}

fn read_one(files: &[(PathBuf, Vec<u8>)], mount: &Path, random: &mut SmallRng) {
    let (path, bytes) = &files[random.random_range(0..files.len())];
    let file = File::open(path).unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
    let (kind, at) = (random.random_range(0..5), random.random_range(0..bytes.len()));
    let len = (bytes.len() - at).min(400_000);
    match kind {
        0 => forget_pages(&file),
        1 => {
            let dir = mount.join(format!("d{}", at % 4));
            let names = fs::read_dir(&dir).expect("lists").filter(|entry| entry.as_ref().is_ok()).count();
            assert_eq!(names, SMALL_FILES / 4, "{}", dir.display());
        }
        2 => return assert_mapped(&file, bytes, path),
        _ => {}
    }
    let mut read = vec![0; len];
    file.read_exact_at(&mut read, at as u64).unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
    assert!(read == bytes[at..at + len], "{} at {at}", path.display());
}

/// Compares a page here and there through a mapping.
fn assert_mapped(file: &File, bytes: &[u8], path: &Path) {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
    let len = std::num::NonZeroUsize::new(bytes.len()).expect("is not empty");
    // SAFETY: a new mapping of a file that never changes, read within its length and unmapped once.
    unsafe {
        let map = mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, 0).expect("maps");
        let seen = std::slice::from_raw_parts(map.as_ptr().cast::<u8>(), bytes.len());
        for at in (0..bytes.len()).step_by(bytes.len() / 7) {
            assert_eq!(seen[at], bytes[at], "{} mapped at {at}", path.display());
        }
        munmap(map, bytes.len()).expect("unmaps");
    }
}

mod raw {
    nix::ioctl_write_ptr!(backing_close, 229, 2, u32);
}

/// Counts the backing ids that the kernel holds for the mount, by closing them. Nothing may be open.
pub fn count_backing_ids(world: &World) -> usize {
    use std::os::fd::AsRawFd;
    let keeper = larder::fs::keeper::Client::connect(&world.state()).expect("the keeper answers");
    let kept = keeper.list().expect("lists");
    let device = keeper.attach(kept.first().expect("a mount").id).expect("gives").fuse;
    // SAFETY: the ioctl reads four bytes from a live u32.
    let is_there = |id: &u32| unsafe { raw::backing_close(device.as_raw_fd(), &raw const *id) }.is_ok();
    (1..200_000u32).filter(is_there).count()
}

pub fn fds_of(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

#[test]
fn what_is_open_goes_on_with_the_next_daemon() {
    if !can_hand_over() {
        return;
    }
    let world = World::new();
    let stage = Stage::new(&world, 1);
    let backed = stage.open_backed(&world);
    let (small_path, small_bytes) = &stage.files[7];
    let small = File::open(small_path).expect("opens");
    let mut listing = fs::read_dir(stage.mount.join("d1")).expect("lists");
    listing.next().expect("a first").expect("an entry");
    let pid = world.daemon_pid().expect("runs");
    world.kill_daemon();
    // Nobody starts a daemon but the keeper.
    for file in [&backed, &small] {
        forget_pages(file);
    }
    let mut read = vec![0; SMALL];
    small.read_exact_at(&mut read, 0).expect("reads on");
    assert!(read == *small_bytes);
    assert_eq!(listing.filter(|entry| entry.as_ref().is_ok()).count(), SMALL_FILES / 4 - 1);
    let second = File::open(&stage.files[SMALL_FILES].0).expect("what the kernel reads is opened again");
    for file in [&backed, &second] {
        file.read_exact_at(&mut read, 40 << 20).expect("reads");
        assert!(read == stage.files[SMALL_FILES].1[40 << 20..(40 << 20) + SMALL]);
    }
    let now = wait_for_another(&world, pid);
    assert_ne!(now, pid);
    wait_for("the record to be taken over", || backed_files(&world) == Some(2));
    drop((backed, second, small));
    wait_for("the releases", || metric(&world, "larder_mount_open_files") == Some(0));
    assert_eq!(count_backing_ids(&world), 0);
    assert_eq!(world.mounted().len(), 1);
    assert_eq!(world.keeper_pids().len(), 1);
}

#[test]
fn readers_notice_nothing_of_a_daemon_that_is_killed_again_and_again() {
    if !can_hand_over() {
        return;
    }
    let world = World::new();
    let stage = Stage::new(&world, 2);
    let readers = Readers::start(&stage, 4, 1);
    for _ in 0..8 {
        let (pid, rounds) = (world.daemon_pid(), readers.rounds.load(Ordering::Relaxed));
        // Something has been read since the kill before.
        wait_for("some reads", || readers.rounds.load(Ordering::Relaxed) > rounds + 5);
        world.kill_daemon();
        wait_for_another(&world, pid.unwrap_or(0));
    }
    let rounds = readers.finish();
    assert!(rounds > 40, "{rounds} rounds");
    wait_for("the releases", || metric(&world, "larder_mount_open_files") == Some(0));
    assert_eq!(count_backing_ids(&world), 0);
    let keeper = world.keeper_pids();
    assert!(keeper.len() == 1 && fds_of(keeper[0]) < 20, "{keeper:?} has {} descriptors", fds_of(keeper[0]));
}

#[test]
fn a_keeper_that_is_killed_is_replaced_and_gets_the_mounts() {
    if !can_hand_over() {
        return;
    }
    let world = World::new();
    let stage = Stage::new(&world, 0);
    let file = File::open(&stage.files[3].0).expect("opens");
    world.kill_keeper();
    wait_for("another keeper with the mount", || {
        larder::fs::keeper::Client::connect(&world.state())
            .is_ok_and(|keeper| keeper.list().is_ok_and(|all| all.len() == 1))
    });
    let other = world.mount("data", "m2", &[]);
    assert!(fs::read(other.join("d0/f0")).expect("reads") == stage.files[0].1);
    let pid = world.daemon_pid().expect("runs");
    world.kill_daemon();
    forget_pages(&file);
    let mut read = vec![0; SMALL];
    file.read_exact_at(&mut read, 0).expect("the new keeper had the mount, and the daemon's command");
    assert!(read == stage.files[3].1);
    wait_for_another(&world, pid);
}

#[test]
fn when_keeper_and_daemon_are_killed_the_mount_is_made_again() {
    if !can_hand_over() {
        return;
    }
    let mut world = World::new();
    world.set("LARDER_DAEMON_RESTART", "false");
    let stage = Stage::new(&world, 0);
    let open = File::open(&stage.files[0].0).expect("opens");
    forget_pages(&open);
    // The daemon first, so that it cannot start another keeper.
    world.kill_daemon();
    world.kill_keeper();
    world.ok(["daemon"]);
    wait_for("the mount", || fs::read(&stage.files[0].0).is_ok_and(|read| read == stage.files[0].1));
    assert_eq!(world.mounted().len(), 1, "the dead one is gone: {:?}", world.mounted());
    // It is read a moment before the daemon has entered it.
    wait_for("the mount to be entered", || world.json(&["mounts"])[0]["state"] == "mounted");
    world.ok(["umount", stage.mount.to_str().expect("plain")]);
    assert!(world.mounted().is_empty());
}

#[test]
fn a_daemon_that_was_told_to_stop_is_not_started_again() {
    if !can_hand_over() {
        return;
    }
    let world = World::new();
    let stage = Stage::new(&world, 0);
    let open = File::open(&stage.files[0].0).expect("opens");
    world.ok(["daemon", "stop"]);
    assert!(world.mounted().is_empty());
    drop(open);
    wait_for("the keeper's end", || world.keeper_pids().is_empty());
    assert!(world.daemon_pid().is_none());
    world.ok(["daemon"]);
    wait_for("the mount", || fs::read(&stage.files[0].0).is_ok_and(|read| read == stage.files[0].1));
}

#[test]
fn another_program_takes_over_while_files_are_open() {
    if !can_hand_over() {
        return;
    }
    let world = World::new();
    let stage = Stage::new(&world, 0);
    let readers = Readers::start(&stage, 3, 9);
    let file = File::open(&stage.files[5].0).expect("opens");
    let pid = world.daemon_pid().expect("runs");
    let copy = world.path("larder-new");
    fs::copy(world.binary(), &copy).expect("copies the program");
    let said = world.ok(["daemon", "upgrade", copy.to_str().expect("plain")]);
    let info = world.json(&["daemon", "status"]);
    assert_ne!(info["pid"].as_i64(), Some(i64::from(pid)), "{said}");
    assert_eq!(info["program"].as_str(), copy.to_str());
    forget_pages(&file);
    let mut read = vec![0; SMALL];
    file.read_exact_at(&mut read, 0).expect("reads on");
    assert!(read == stage.files[5].1);
    readers.finish();
    // What dies now is started again from the new program.
    let pid = world.daemon_pid().expect("runs");
    world.kill_daemon();
    wait_for_another(&world, pid);
    assert_eq!(world.json(&["daemon", "status"])["program"].as_str(), copy.to_str());
}

#[test]
fn a_program_that_cannot_take_over_is_refused_and_the_daemon_stays() {
    if !can_hand_over() {
        return;
    }
    let world = World::new();
    let stage = Stage::new(&world, 0);
    let pid = world.daemon_pid();
    let told = world.fails(1, ["daemon", "upgrade", "/bin/false"]);
    assert!(told.contains("cannot take over; the daemon stays"), "{told}");
    assert_eq!(world.daemon_pid(), pid);
    assert!(fs::read(&stage.files[0].0).expect("reads") == stage.files[0].1);
}

#[test]
fn a_program_that_says_it_can_and_does_not_come_up_gives_way_to_the_one_before() {
    use std::os::unix::fs::PermissionsExt;
    if !can_hand_over() {
        return;
    }
    let world = World::new();
    let stage = Stage::new(&world, 0);
    let liar = world.path("liar");
    let handover = larder::fs::session::HANDOVER;
    fs::write(&liar, format!("#!/bin/sh\n[ \"$2\" = handover ] && echo {handover} && exit 0\nexit 1\n"))
        .expect("writes");
    fs::set_permissions(&liar, fs::Permissions::from_mode(0o755)).expect("makes it a program");
    let told = world.fails(1, ["daemon", "upgrade", liar.to_str().expect("plain")]);
    assert!(told.contains("did not come up"), "{told}");
    assert!(fs::read(&stage.files[0].0).expect("reads") == stage.files[0].1);
    assert_eq!(world.mounted().len(), 1);
}

#[test]
fn an_upgrade_that_means_another_state_directory_is_refused_and_the_daemon_stays() {
    let mut world = World::new();
    world.set("LARDER_SOCKET", world.path("d.sock").display().to_string());
    world.ok(["daemon"]);
    let info = world.json(&["daemon", "status"]);
    let other = format!("--state={}", world.make_dir("other").display());
    let told = world.fails(2, ["daemon", "upgrade", &other]);
    assert!(told.contains("this command means"), "{told}");
    assert_eq!(world.json(&["daemon", "status"])["pid"], info["pid"]);
}

#[test]
fn readers_of_small_files_notice_nothing_of_a_daemon_that_is_killed_again_and_again() {
    if !can_hand_over() {
        return;
    }
    let world = World::new();
    let stage = Stage::new(&world, 0);
    let skips_opens = || world.json(&["mounts"])[0]["stats"]["skips_opens"].as_bool();
    let readers = Readers::start(&stage, 4, 1);
    for _ in 0..5 {
        let (pid, rounds) = (world.daemon_pid(), readers.rounds.load(Ordering::Relaxed));
        wait_for("some reads", || readers.rounds.load(Ordering::Relaxed) > rounds + 5);
        assert_eq!(skips_opens(), Some(true));
        world.kill_daemon();
        wait_for_another(&world, pid.unwrap_or(0));
        // It serves its mounts a moment after it can be asked.
        wait_for("the mount to be served", || skips_opens().is_some());
    }
    readers.finish();
    assert_eq!(metric(&world, "larder_mount_open_files"), Some(0));
}

/// What fails in passing costs nobody anything: it is tried again by itself, and until then who reads waits.
#[test]
fn a_mount_that_cannot_be_taken_over_at_once_is_tried_again_and_who_reads_waits() {
    if !can_hand_over() {
        return;
    }
    let mut world = World::new();
    let tier = world.make_dir("export");
    world.ok(["tier", "init", tier.to_str().expect("plain")]);
    world.set("LARDER_TIER", tier.to_str().expect("plain"));
    let source = world.files("source", &[("a.bin", &noise(1, SMALL))]);
    world.push(&source, "data");
    let mount = world.mount("data", "m", &[]);
    let file = File::open(mount.join("a.bin")).expect("opens");
    // The export is away, as far as the next daemon sees.
    let (marker, away) = (tier.join("larder-tier.json"), world.path("marker"));
    fs::rename(&marker, &away).expect("takes the marker away");
    world.kill_daemon();
    wait_for("a take-over that fails", || world.log().contains("could not be mounted again"));
    assert!(world.mounted().contains(&mount), "it stays");
    let reader = std::thread::spawn(move || {
        forget_pages(&file);
        let mut read = vec![0; SMALL];
        file.read_exact_at(&mut read, 0).map(|()| read)
    });
    fs::rename(&away, &marker).expect("puts it back");
    let read = reader.join().expect("ends").expect("who waited sees no error");
    assert!(read == noise(1, SMALL));
    let is_counted = || world.run(["daemon", "metrics"]).stdout.contains("larder_mounts_taken_over_total 1");
    wait_for("it to be taken over, not made anew", is_counted);
}
