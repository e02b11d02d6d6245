//! What is bounded stays bounded: memory, open files, and who waits for whom.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::kit::proxy::{Fault, Proxy, Rule};
use crate::kit::s3::{TestS3, env_at};
use crate::kit::{World, wait_for};

const FILES: usize = 10_000;
const READERS: usize = 64;
const MIB: u64 = 1 << 20;
/// What is configured here (`fetch.memory`, `fetch.bytes_in_flight`), and what a daemon takes beside that: its program,
/// threads, metadata, and the record of what is open (`docs/operations.md`, "Sizes").
const CEILING: u64 = (32 + 16 + 256) * MIB;

fn bytes_of(number: usize) -> Vec<u8> {
    let mut bytes = vec![(number % 251) as u8; 1000 + number % 4000];
    bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
    bytes
}

fn path_of(root: &Path, number: usize) -> PathBuf {
    root.join(format!("{:03}", number / 100)).join(format!("{number:05}"))
}

/// A world with bounds that are small, and many files.
fn world(proxy: &Proxy) -> World {
    let mut world = World::new();
    world.set_all(env_at(&proxy.endpoint(), "bounds"));
    world.set("LARDER_FETCH_MEMORY", "32MiB");
    world.set("LARDER_FETCH_BYTES_IN_FLIGHT", "16MiB");
    // Long enough for whoever waits here; what stalls is asked for again soon.
    world.set("LARDER_FETCH_GIVE_UP", "10m");
    world.set("LARDER_FETCH_STALL_TIMEOUT", "1s");
    world.set("LARDER_READ_TIMEOUT", "1s");
    world
}

/// The daemon's largest resident memory so far.
fn peak(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("is told");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
}

/// How many descriptors a process has; None where the kernel does not show it to us.
fn descriptors(pid: i32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())
}

#[test]
fn ten_thousand_open_files_and_64_readers_fit_into_the_memory_that_is_configured() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("asks");
    if hard < FILES as u64 + 2000 || setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() {
        eprintln!("skipped: needs {FILES} descriptors, the limit is {hard}");
        return;
    }
    let s3 = TestS3::start();
    let proxy = Proxy::start(s3.addr());
    let world = world(&proxy);
    let source = world.make_dir("source");
    for number in 0..FILES {
        let path = path_of(&source, number);
        if number % 100 == 0 {
            fs::create_dir_all(path.parent().expect("has a parent")).expect("mkdir");
        }
        fs::write(path, bytes_of(number)).expect("writes");
    }
    // Not one of small files only: there the kernel would not tell what is open.
    fs::write(source.join("large"), vec![1; (65 << 20) + 1]).expect("writes");
    world.push(&source, "many");
    world.ok(["cache", "many"]);
    let dir = world.mount("many", "m", &[]);
    let pid = world.daemon_pid().expect("a daemon");
    let open: Vec<File> = (0..FILES).map(|number| File::open(path_of(&dir, number)).expect("opens")).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..READERS {
            scope.spawn(|| {
                while let Some((number, file)) = {
                    // Far apart, as a shuffled epoch reads.
                    let turn = next.fetch_add(1, Ordering::Relaxed);
                    (turn < FILES).then(|| turn * 7919 % FILES).and_then(|at| Some((at, open.get(at)?)))
                } {
                    let wanted = bytes_of(number);
                    let mut got = vec![0; wanted.len() + 1];
                    let len = file.read_at(&mut got, 0).expect("reads");
                    assert!(got[..len] == wanted, "file {number}");
                }
            });
        }
    });
    let metrics = world.ok(["daemon", "metrics"]);
    let told = metrics.lines().find(|line| line.starts_with("larder_mount_open_files")).expect("is told");
    assert!(told.ends_with(&format!(" {FILES}")), "{told}");
    let peak = peak(pid);
    println!("{FILES} files open, {READERS} readers: the daemon took {} MiB at most", peak / MIB);
    assert!(peak < CEILING, "the daemon took {} MiB of {}", peak / MIB, CEILING / MIB);
    if let Some(descriptors) = descriptors(pid) {
        assert!(descriptors < 1000, "{descriptors} descriptors: files that are open cost the daemon none");
    }
    drop(open);
    wait_for("the files to be closed", || {
        let metrics = world.ok(["daemon", "metrics"]);
        metrics.lines().any(|line| line.starts_with("larder_mount_open_files") && line.ends_with(" 0"))
    });
}

#[test]
fn a_daemon_that_runs_out_of_descriptors_refuses_what_does_not_fit_and_serves_the_rest() {
    let s3 = TestS3::start();
    let proxy = Proxy::start(s3.addr());
    let world = world(&proxy);
    let source = world.files("source", &[("file", &bytes_of(7))]);
    world.push(&source, "data");
    world.ok(["cache", "data"]);
    world.ok(["daemon", "stop"]);
    let mut command = world.command(["daemon", "--foreground"]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let few = || {
        setrlimit(Resource::RLIMIT_NOFILE, 160, 160)?;
        Ok(())
    };
    // SAFETY: a system call that may be made between fork and exec.
    let mut daemon = unsafe { command.pre_exec(few) }.spawn().expect("starts");
    wait_for("the daemon", || world.run(["daemon", "status"]).code == 0);
    let mut mounted = Vec::new();
    let refused = (0..160).find_map(|number| {
        let dir = world.make_dir(&format!("m{number}"));
        let ran = world.run(["mount", "data", dir.to_str().expect("plain")]);
        if ran.code == 0 {
            mounted.push(dir);
        }
        (ran.code != 0).then_some(ran.stderr)
    });
    let refused = refused.expect("160 mounts do not fit");
    assert!(refused.contains("too many for another mount") && refused.contains("LimitNOFILE"), "{refused}");
    assert!(!mounted.is_empty(), "{refused}");
    for dir in &mounted {
        assert!(fs::read(dir.join("file")).expect("is served all the same") == bytes_of(7), "{}", dir.display());
    }
    assert_eq!(daemon.try_wait().expect("asks"), None, "the daemon lives");
    // What is given back can be used again.
    for dir in mounted.iter().rev().take(3) {
        world.ok(["umount", dir.to_str().expect("plain")]);
    }
    let again = mounted.last().expect("one");
    world.ok(["mount", "data", again.to_str().expect("plain")]);
    assert!(fs::read(again.join("file")).expect("reads") == bytes_of(7));
    world.ok(["daemon", "stop"]);
    daemon.wait().expect("ends");
}

#[test]
fn readers_that_wait_for_a_store_that_stalls_do_not_stop_those_of_what_is_there() {
    let s3 = TestS3::start();
    let proxy = Proxy::start(s3.addr());
    let world = world(&proxy);
    for (name, first) in [("hot", 0), ("cold", 1000)] {
        let source = world.make_dir(name);
        for number in first..first + READERS {
            fs::write(source.join(number.to_string()), bytes_of(number)).expect("writes");
        }
        world.push(&source, name);
    }
    world.ok(["cache", "hot"]);
    let hot = world.mount("hot", "hot-m", &[]);
    let cold = world.mount("cold", "cold-m", &["--prefetch", "none"]);
    // What the files are is known; their bytes do not come.
    assert_eq!(fs::read_dir(&cold).expect("lists").flatten().filter(|entry| entry.metadata().is_ok()).count(), READERS);
    proxy.rule(Rule::every("GET", Fault::Stall(10)).on("/data/"));
    let (waiting, came) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for number in 1000..1000 + READERS {
            let (cold, waiting, came) = (&cold, &waiting, &came);
            scope.spawn(move || {
                let file = File::open(cold.join(number.to_string())).expect("opens");
                waiting.fetch_add(1, Ordering::SeqCst);
                let mut got = vec![0; bytes_of(number).len()];
                file.read_exact_at(&mut got, 0).expect("reads when the store does");
                came.store(true, Ordering::SeqCst);
                assert!(got == bytes_of(number), "{number}");
            });
        }
        wait_for("the readers to wait", || waiting.load(Ordering::SeqCst) == READERS);
        for number in 0..READERS {
            assert!(fs::read(hot.join(number.to_string())).expect("reads") == bytes_of(number), "{number}");
        }
        assert!(!came.load(Ordering::SeqCst), "the others wait all the while");
        world.ok(["status", "--no-lake"]);
        proxy.heal();
    });
}
