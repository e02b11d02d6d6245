//! Keeper, daemon and driver as the pods of a node: each with processes and mounts of its own, and one folder whose
//! mounts propagate between them. Whoever of them is killed, upgraded or started again: pods read on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::kit::csi::{Csi, kill_whole};
use crate::kit::{World, wait_for};

/// Mounts made inside are seen outside, and those made outside inside.
const BIDIRECTIONAL: [&str; 6] = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=unchanged"];
/// Only the latter.
const HOST_TO_CONTAINER: [&str; 6] = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=slave"];

/// Bytes of the file that is read over and over.
const LEN: usize = 3 << 20;

fn byte_at(at: usize) -> u8 {
    ((at >> 16) ^ (at >> 8) ^ at) as u8
}

/// Says whether this machine has what a node has.
fn can_run() -> bool {
    if !Csi::can_run() {
        return false;
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|word| word.parse::<u32>().ok());
    let resends = (numbers.next(), numbers.next()) >= (Some(6), Some(9));
    let separates = Command::new("unshare").args(["--mount", "--pid", "--fork", "true"]).status();
    let can = resends && separates.is_ok_and(|status| status.success());
    if !can {
        eprintln!("skipped: needs Linux 6.9 and unshare(1) with its own mount and pid namespaces");
    }
    can
}

/// A process with namespaces of its own; dies with what started it.
struct Pod {
    child: Child,
}

impl Pod {
    fn start(world: &World, namespaces: &[&str], args: &[&str]) -> Self {
        let log = File::options().create(true).append(true).open(world.path("pods.log")).expect("opens");
        let mut command = world.command_behind(namespaces, args);
        let child = command.stdout(Stdio::null()).stderr(log).process_group(0).spawn().expect("starts");
        Self { child }
    }

    /// Kills everything in it at once.
    fn kill(&mut self) {
        kill_whole(&mut self.child);
    }

    /// Tells what runs in it to end.
    fn terminate(&mut self) {
        let pid = self.child.id();
        let inside = format!("/proc/{pid}/task/{pid}/children");
        let text = fs::read_to_string(inside).expect("lists");
        let child = text.split_whitespace().next().expect("runs something").parse().expect("is a number");
        kill(Pid::from_raw(child), Signal::SIGTERM).expect("is told");
        wait_for("the end of a pod", || self.child.try_wait().expect("asks").is_some());
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A node of a cluster.
struct Node {
    keeper: Pod,
    daemon: Pod,
    csi: Csi,
    world: World,
}

fn start_keeper(world: &World) -> Pod {
    let state = world.state().display().to_string();
    Pod::start(world, &BIDIRECTIONAL, &["keeper", "--state", &state, "--foreground", "--keep-mounts"])
}

fn start_daemon(world: &World) -> Pod {
    Pod::start(world, &HOST_TO_CONTAINER, &["daemon", "--foreground", "--keep-mounts"])
}

fn start_csi(world: &World) -> Csi {
    let kubelet = world.path("k").display().to_string();
    let args = ["csi", "--mode", "node", "--kubelet-dir", &kubelet, "--node", "node-1"];
    let mut command = world.command_behind(&HOST_TO_CONTAINER, &args);
    command.process_group(0);
    Csi::spawn(world, command)
}

fn is_ready(world: &World) -> bool {
    let ran = world.run(["daemon", "status", "--json"]);
    let info: Value = serde_json::from_str(&ran.stdout).unwrap_or_default();
    ran.code == 0 && info["ready"] == Value::Bool(true)
}

impl Node {
    fn start() -> Self {
        let mut world = World::of_this_build();
        let bytes: Vec<u8> = (0..LEN).map(byte_at).collect();
        let source = world.files("one", &[("file", &bytes), ("b", b"other")]);
        world.push(&source, "xray");
        world.set("LARDER_DAEMON_RESTART", "false");
        world.set("LARDER_DAEMON_ON_DEMAND", "false");
        share(&world.make_dir("k"));
        let (keeper, daemon) = (start_keeper(&world), start_daemon(&world));
        wait_for("the daemon", || is_ready(&world));
        let csi = start_csi(&world);
        Self { keeper, daemon, csi, world }
    }

    fn restart_csi(&mut self) {
        self.csi.kill_now();
        self.csi = start_csi(&self.world);
    }

    fn restart_daemon(&mut self) {
        self.daemon = start_daemon(&self.world);
        wait_for("the daemon to have taken its mounts over", || is_ready(&self.world));
    }
}

/// Makes a folder one whose mounts propagate, as the kubelet's does.
fn share(dir: &Path) {
    mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("binds");
    mount(None::<&str>, dir, None::<&str>, MsFlags::MS_SHARED, None::<&str>).expect("shares");
}

/// Reads a file over and over, past the page cache; an error or a wrong byte ends it.
struct Reader {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Result<(), String>>,
}

impl Reader {
    fn start(path: PathBuf) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
        let thread = std::thread::spawn(move || {
            let kept = File::open(&path).map_err(|error| format!("opens: {error}"))?;
            while !stopped.load(Ordering::Acquire) {
                let fresh = File::open(&path).map_err(|error| format!("opens again: {error}"))?;
                for file in [&kept, &fresh] {
                    read_whole(file)?;
                }
                counted.fetch_add(1, Ordering::AcqRel);
            }
            Ok(())
        });
        Self { stop, rounds, thread }
    }

    /// Waits until it has read everything anew.
    fn goes_on(&self) {
        let before = self.rounds.load(Ordering::Acquire);
        wait_for("the reader to go on", || {
            self.rounds.load(Ordering::Acquire) > before + 1 || self.thread.is_finished()
        });
    }

    fn end(self) {
        self.stop.store(true, Ordering::Release);
        let ended = self.thread.join().expect("does not panic");
        assert_eq!(ended, Ok(()));
    }
}

fn read_whole(file: &File) -> Result<(), String> {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(|error| error.to_string())?;
    let mut read = vec![0; 256 << 10];
    for at in (0..LEN).step_by(read.len()) {
        file.read_exact_at(&mut read, at as u64).map_err(|error| format!("reads at {at}: {error}"))?;
        let right = read.iter().enumerate().all(|(offset, byte)| *byte == byte_at(at + offset));
        if !right {
            return Err(format!("wrong bytes at {at}"));
        }
    }
    Ok(())
}

#[test]
fn pods_read_on_whichever_pod_of_the_driver_dies_and_none_leaves_a_mount() {
    if !can_run() {
        return;
    }
    let mut node = Node::start();
    let target = node.csi.pod("p");
    node.csi.publish("v", &target, &[("dataset", "xray"), ("verify", "always")]).expect("is published");
    let reader = Reader::start(target.join("file"));
    reader.goes_on();
    for _ in 0..2 {
        // Out of memory; then an upgrade.
        node.daemon.kill();
        node.restart_daemon();
        reader.goes_on();
        node.daemon.terminate();
        node.restart_daemon();
        reader.goes_on();
    }
    node.restart_csi();
    reader.goes_on();
    let second = node.csi.pod("q");
    node.csi.publish("w", &second, &[("dataset", "xray"), ("verify", "always")]).expect("is published");
    assert_eq!(fs::read(second.join("b")).expect("reads"), b"other");
    // The keeper is replaced, and killed: the daemon gives the next one what it had.
    node.keeper.terminate();
    node.keeper = start_keeper(&node.world);
    reader.goes_on();
    node.keeper.kill();
    node.keeper = start_keeper(&node.world);
    wait_for("the keeper to have the mount again", || {
        let kept = larder::fs::keeper::Client::connect(&node.world.state()).and_then(|keeper| keeper.list());
        kept.is_ok_and(|kept| kept.len() == 1)
    });
    node.daemon.kill();
    node.restart_daemon();
    reader.goes_on();
    reader.end();
    node.csi.unpublish("v", &target).expect("is unpublished");
    node.csi.unpublish("w", &second).expect("is unpublished");
    node.csi.nothing_is_left(&node.world);
}

#[test]
fn after_a_reboot_volumes_come_back_with_their_commits_and_those_of_gone_pods_do_not() {
    if !can_run() {
        return;
    }
    let mut node = Node::start();
    let (stays, goes) = (node.csi.pod("stays"), node.csi.pod("goes"));
    node.csi.publish("v", &stays, &[("dataset", "xray@main")]).expect("is published");
    node.csi.publish("w", &goes, &[("dataset", "xray@main"), ("subdir", "/"), ("uid", "7")]).expect("is published");
    // Everything dies at once, and the mount table is empty afterwards.
    node.csi.kill_now();
    node.daemon.kill();
    node.keeper.kill();
    let kubelet = node.world.path("k");
    for point in node.world.mounted().into_iter().rev().filter(|point| *point != kubelet) {
        nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH).expect("unmounts");
    }
    fs::remove_dir_all(kubelet.join("pods/goes")).expect("removes the pod's folder");
    let source = node.world.files("two", &[("file", b"second")]);
    node.world.push(&source, "xray");
    node.keeper = start_keeper(&node.world);
    node.restart_daemon();
    node.csi = start_csi(&node.world);
    node.csi.publish("v", &stays, &[("dataset", "xray@main")]).expect("is published");
    assert_eq!(fs::metadata(stays.join("file")).expect("is there").len(), LEN as u64, "the commit it had");
    wait_for("the mount of the pod that went to go", || {
        node.world.json(&["mounts"]).as_array().is_some_and(|mounts| mounts.len() == 1)
    });
    node.csi.unpublish("v", &stays).expect("is unpublished");
    node.csi.nothing_is_left(&node.world);
}
