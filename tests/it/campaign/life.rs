//! A day of a node in twenty minutes: mounts, reads, evictions, kills, and a store and a tier that fail, all at random.
//! No wrong byte, no error that the faults do not explain; at the end memory, descriptors, threads and the kernel's
//! backing ids are flat, and no process hangs in the kernel.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::Campaign;
use super::fault::random_fault;
use crate::kit::proxy::{Proxy, Rule};
use crate::kit::s3::{TestS3, env_at};
use crate::kit::{World, wait_for};
use crate::survive::{count_backing_ids, fds_of};

const DATASETS: usize = 4;
const SLOTS: u64 = 6;
const READERS: u64 = 6;
/// Mounts of the quiet time, over which nothing may grow.
const QUIET_ROUNDS: u64 = 100;

/// What reading may end in while mounts come and go by force and the store fails.
const EXPLAINED: [i32; 7] =
    [libc::EIO, libc::ENOENT, libc::ENOTCONN, libc::ECONNABORTED, libc::ESTALE, libc::ENOTDIR, libc::EINTR];

#[derive(Debug, Default)]
struct Counts {
    right: AtomicU64,
    explained: AtomicU64,
}

/// What a process takes: descriptors, threads, resident MiB.
#[derive(Debug, Clone, Copy)]
struct Taken {
    descriptors: usize,
    threads: u64,
    resident_mib: u64,
}

impl Taken {
    fn by(pid: i32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
        let number = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
            line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
        };
        Self { descriptors: fds_of(pid), threads: number("Threads:"), resident_mib: number("VmRSS:") / 1024 }
    }
}

fn slot(world: &World, number: u64) -> PathBuf {
    world.path(&format!("slot{number}"))
}

/// Reads at random through whatever is mounted; every byte that comes is compared.
fn read_on(slots: &[PathBuf], files: &HashMap<String, Vec<u8>>, seed: u64, ends: &AtomicBool, counts: &Counts) {
    let mut random = SmallRng::seed_from_u64(seed);
    let names: Vec<&String> = files.keys().collect();
    while !ends.load(Ordering::Relaxed) {
        let name = names[random.random_range(0..names.len())];
        let wanted = &files[name];
        let path = slots[random.random_range(0..slots.len())].join(name);
        let offset = random.random_range(0..=wanted.len());
        let mut got = vec![0; random.random_range(1..300_000)];
        match fs::File::open(&path).and_then(|file| file.read_at(&mut got, offset as u64)) {
            Ok(len) => {
                let want = &wanted[offset..(offset + got.len()).min(wanted.len())];
                assert!(got[..len] == want[..len], "{} at {offset} has other bytes", path.display());
                // A short read only where a signal cut a longer one: never an empty one within the file.
                assert!(len > 0 || want.is_empty(), "{} at {offset}: nothing was read", path.display());
                counts.right.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(0);
                assert!(EXPLAINED.contains(&errno), "{}: {error}", path.display());
                counts.explained.fetch_add(1, Ordering::Relaxed);
                // Nothing may be mounted there at all.
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Lists published objects of the tier.
fn objects(tier: &Path) -> Vec<PathBuf> {
    let below = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    below(tier.join("objects")).flat_map(below).collect()
}

/// Takes an object away, or puts something into its place that is none.
fn spoil_tier(world: &World, campaign: &mut Campaign) {
    let objects = objects(&world.tier());
    let Some(object) = objects.get(campaign.below(objects.len() as u64) as usize) else {
        return;
    };
    if fs::remove_file(object).is_err() {
        return;
    }
    match campaign.below(4) {
        0 => drop(symlink("/etc/passwd", object)),
        1 => drop(nix::unistd::mkfifo(object, nix::sys::stat::Mode::S_IRWXU)),
        2 => drop(fs::create_dir(object)),
        _ => {}
    }
}

fn kill_daemon(world: &World) {
    let place = larder::node::place::Place::at(&world.state());
    if let Some(pid) = place.daemon_pid() {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}

fn act(world: &World, proxy: &Proxy, campaign: &mut Campaign, log: &Mutex<Vec<String>>) {
    let dataset = format!("d{}", campaign.below(DATASETS as u64));
    let at = slot(world, campaign.below(SLOTS));
    let at = at.to_str().expect("plain");
    let what = campaign.below(14);
    log.lock().expect("lock").push(format!("{what} {dataset} {at}"));
    match what {
        0..=3 => {
            let engine = ["fuse", "fuse", "auto"][campaign.below(3) as usize];
            let prefetch = ["none", "touched", "all"][campaign.below(3) as usize];
            world.run(["mount", &dataset, at, "--engine", engine, "--prefetch", prefetch]);
        }
        4 | 5 => drop(world.run(["umount", "--force", at])),
        6 => drop(world.run(["uncache", &dataset])),
        7 => drop(world.run(["cache", &dataset, "--no-wait"])),
        8 | 9 => kill_daemon(world),
        10 => {
            let fault = random_fault(campaign);
            proxy.rule(Rule::every("GET", fault).times(1 + campaign.below(6)));
        }
        11 => proxy.set_down(campaign.below(2) == 0),
        12 => spoil_tier(world, campaign),
        _ => proxy.heal(),
    }
    std::thread::sleep(Duration::from_millis(campaign.below(300)));
}

/// Makes the datasets; gives every file by its name, which only one of them has.
fn push_all(world: &World, campaign: &mut Campaign) -> HashMap<String, Vec<u8>> {
    let mut files = HashMap::new();
    for dataset in 0..DATASETS {
        let source = world.make_dir(&format!("source{dataset}"));
        for number in 0..60 {
            let name = format!("{dataset}-{number}");
            let len = [0, 1, 4096, 70_000, 262_145, 900_000][campaign.below(6) as usize];
            let bytes = campaign.bytes(len);
            fs::write(source.join(&name), &bytes).expect("writes");
            files.insert(name, bytes);
        }
        // A pack of its own: read by passthrough.
        let (name, bytes) = (format!("{dataset}-large"), campaign.bytes(66 << 20));
        fs::write(source.join(&name), &bytes).expect("writes");
        files.insert(name, bytes);
        world.push(&source, &format!("d{dataset}"));
    }
    files
}

/// With nothing but a well store: mounts, reads and unmounts; gives what the daemon takes then.
fn quiet(world: &World, files: &HashMap<String, Vec<u8>>, rounds: u64) -> Taken {
    let name = files.keys().find(|name| name.starts_with("0-") && files[*name].len() > 5000).expect("a file");
    for _ in 0..rounds {
        let at = slot(world, 0);
        world.ok(["mount", "d0", at.to_str().expect("plain"), "--prefetch", "none"]);
        assert!(fs::read(at.join(name)).expect("reads") == files[name]);
        world.ok(["umount", at.to_str().expect("plain")]);
    }
    Taken::by(world.daemon_pid().expect("a daemon"))
}

/// Says which of our processes are in the kernel and do not come out.
fn stuck(pids: &[i32]) -> Vec<i32> {
    let is_stuck = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('D'))
    };
    pids.iter().copied().filter(is_stuck).collect()
}

#[test]
#[ignore = "long: make campaign PART=life"]
fn a_day_of_a_node_leaves_nothing_behind() {
    let mut campaign = Campaign::new();
    let s3 = TestS3::start();
    let proxy = Proxy::start(s3.addr());
    let mut world = World::new();
    world.set_all(env_at(&proxy.endpoint(), "life"));
    world.set("LARDER_FETCH_GIVE_UP", "5s");
    world.set("LARDER_FETCH_STALL_TIMEOUT", "1s");
    world.set("LARDER_READ_TIMEOUT", "2s");
    let files = push_all(&world, &mut campaign);
    let slots: Vec<PathBuf> = (0..SLOTS).map(|number| world.make_dir(&format!("slot{number}"))).collect();
    let (ends, counts, log) = (AtomicBool::new(false), Counts::default(), Mutex::default());
    let mut actions = 0;
    std::thread::scope(|scope| {
        for _ in 0..READERS {
            let seed = campaign.below(u64::MAX);
            let (slots, files, ends, counts) = (&slots, &files, &ends, &counts);
            scope.spawn(move || read_on(slots, files, seed, ends, counts));
        }
        while campaign.goes_on(actions, u64::MAX) || actions < 50 {
            act(&world, &proxy, &mut campaign, &log);
            actions += 1;
        }
        proxy.heal();
        ends.store(true, Ordering::Relaxed);
    });
    let (right, explained) = (counts.right.into_inner(), counts.explained.into_inner());
    println!("{actions} actions, {right} reads right, {explained} ended in an error that a fault explains");
    assert!(right > 0, "something was read");
    wait_for("the daemon", || world.run(["daemon", "status", "--json"]).stdout.contains("\"ready\": true"));
    for at in &slots {
        world.run(["umount", "--force", at.to_str().expect("plain")]);
    }
    wait_for("all mounts to be gone", || world.json(&["mounts"]) == serde_json::json!([]));
    let before = quiet(&world, &files, QUIET_ROUNDS / 4);
    let after = quiet(&world, &files, QUIET_ROUNDS);
    println!("the daemon took {before:?}, and {after:?} after {QUIET_ROUNDS} mounts more");
    assert!(after.descriptors <= before.descriptors + 8, "descriptors grow: {before:?} {after:?}");
    assert!(after.threads <= before.threads + 16, "threads grow: {before:?} {after:?}");
    assert!(after.resident_mib <= before.resident_mib + 64, "memory grows: {before:?} {after:?}");
    let at = slots[0].to_str().expect("plain");
    world.ok(["mount", "d0", at]);
    assert_eq!(count_backing_ids(&world), 0, "backing ids are left in the kernel");
    let mut pids = world.keeper_pids();
    assert!(fds_of(pids[0]) < 20, "the keeper has {} descriptors", fds_of(pids[0]));
    pids.extend(world.daemon_pid());
    pids.push(i32::try_from(std::process::id()).expect("a pid"));
    wait_for("nobody to be stuck in the kernel", || stuck(&pids).is_empty());
}
