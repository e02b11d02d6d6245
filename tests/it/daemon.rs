//! The daemon: mounts from push to read, restarts, kills, several commands and users at once.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Stdio;

use crate::kit::{World, wait_for};

const FILES: &[(&str, &[u8])] = &[("a.txt", b"alpha"), ("dir/b.bin", &[7; 70_000]), ("dir/empty", b"")];

fn read_all(dir: &std::path::Path) {
    for (name, bytes) in FILES {
        assert_eq!(&fs::read(dir.join(name)).expect(name), bytes, "{name}");
    }
}

#[test]
fn a_directory_is_pushed_mounted_read_and_unmounted() {
    let world = World::new();
    let source = world.files("source", FILES);
    let commit = world.push(&source, "photos");
    let mounted = world.mount("photos", "m", &[]);
    read_all(&mounted);
    assert!(fs::write(mounted.join("a.txt"), "x").is_err(), "a mount is read-only");
    let mounts = world.json(&["mounts"]);
    assert_eq!(mounts[0]["commit"], commit.as_str());
    assert_eq!(mounts[0]["state"], "mounted");
    assert_eq!(mounts[0]["dir"], mounted.to_str().expect("plain"));
    let status = world.json(&["status"]);
    assert_eq!(status["daemon"]["running"], true);
    assert_eq!(status["lake"]["ok"], true);
    assert_eq!(status["tiers"][0]["commits"][0]["mounts"], 1);
    world.ok(["umount", mounted.to_str().expect("plain")]);
    assert_eq!(fs::read_dir(&mounted).expect("lists").count(), 0);
    assert_eq!(world.json(&["mounts"]), serde_json::json!([]));
    assert!(world.ok(["daemon", "metrics"]).contains("larder_mounts{state=\"mounted\"} 0"));
}

/// A process that is stopped, until this is dropped.
struct Stopped(nix::unistd::Pid);

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(self.0, nix::sys::signal::Signal::SIGCONT);
    }
}

/// Counts the threads of a process that wait in the kernel for something that no signal ends.
fn threads_that_hang(pid: i32) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats = tasks.filter_map(|task| fs::read_to_string(task.path().join("stat")).ok());
    stats.filter(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('D'))).count()
}

#[test]
fn a_directory_that_hangs_holds_up_who_wants_to_mount_there_and_nobody_else() {
    let (other, mut world) = (World::new(), World::new());
    // A directory on a server that does not answer: a mount whose daemon stands still.
    let source = other.files("source", FILES);
    other.push(&source, "photos");
    let hung = other.mount("photos", "m", &["--prefetch", "none"]);
    let workers = 2;
    world.set("TOKIO_WORKER_THREADS", workers.to_string());
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    world.ok(["daemon"]);
    let pid = nix::unistd::Pid::from_raw(other.daemon_pid().expect("it runs"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("stops it");
    let stopped = Stopped(pid);
    let mut late = Vec::new();
    for number in 0..workers + 2 {
        let dir = hung.join(format!("dir/nothing-{number}"));
        let mut mount = world.command(["mount", "photos", dir.to_str().expect("plain")]);
        late.push(mount.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts"));
    }
    let daemon = world.daemon_pid().expect("it runs");
    wait_for("the daemon to look at them", || threads_that_hang(daemon) >= workers);
    let mut status = world.command(["daemon", "status"]).stdout(Stdio::null()).spawn().expect("starts");
    let mut answered = None;
    let begun = std::time::Instant::now();
    while answered.is_none() && begun.elapsed() < std::time::Duration::from_secs(60) {
        answered = status.try_wait().ok().flatten();
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let _ = status.kill().and_then(|()| status.wait());
    drop(stopped);
    for mut mount in late {
        assert!(!mount.wait().expect("ends").success(), "there is no such directory");
    }
    assert!(answered.is_some_and(|status| status.success()), "the daemon does not answer");
}

#[test]
fn options_of_a_mount_are_what_the_reader_sees() {
    let world = World::new();
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    let options = ["--subdir", "dir", "--uid", "1234", "--gid", "77", "--file-mode", "0400", "--umask", "027"];
    let mounted = world.mount("photos", "m", &options);
    let meta = fs::metadata(mounted.join("b.bin")).expect("stat");
    assert_eq!((meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777), (1234, 77, 0o400));
    assert!(!mounted.join("a.txt").exists());
}

#[test]
fn modes_of_directories_and_prefetch_are_what_the_options_say() {
    let world = World::new();
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    let mounted = world.mount("photos", "m", &["--dir-mode", "0510", "--prefetch", "none", "--verify", "always"]);
    let mode = |path: &str| fs::metadata(mounted.join(path)).expect("stat").permissions().mode() & 0o7777;
    assert_eq!((mode(""), mode("dir")), (0o510, 0o510));
    let options = world.json(&["mounts"])[0]["options"].clone();
    assert_eq!((&options["prefetch"], &options["verify"]), (&"none".into(), &"always".into()), "{options}");
    read_all(&mounted);
    assert_eq!(
        world.json(&["status"])["tiers"][0]["commits"][0]["percent_cached"],
        0,
        "nothing was brought behind the reads"
    );
}

#[test]
fn a_directory_that_cannot_be_mounted_on_is_refused_with_the_next_step() {
    let world = World::new();
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    world.make_dir("free");
    let plain = |name: &str| world.path(name).to_str().expect("plain").to_owned();
    assert!(world.fails(1, ["mount", "photos", &plain("gone")]).contains("hint: make it, or mount with --mkdir"));
    assert!(world.fails(1, ["mount", "photos", &plain("source")]).contains("--nonempty"));
    assert!(world.fails(1, ["mount", "photos", &plain("source/a.txt")]).contains("is not a directory"));
    assert!(world.fails(1, ["mount", "photos@v9", &plain("free")]).contains("v9"));
    world.ok(["mount", "photos", &plain("made"), "--mkdir"]);
    let told = world.fails(1, ["mount", "photos", &plain("made")]);
    assert!(told.contains("is mounted already: photos"), "{told}");
    assert!(world.fails(1, ["umount", &plain("home")]).contains("larder mounts"));
}

#[test]
fn a_mount_in_use_is_not_taken_away_unless_by_force() {
    let world = World::new();
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    let mounted = world.mount("photos", "m", &[]);
    let open = fs::File::open(mounted.join("dir/b.bin")).expect("opens");
    let place = mounted.to_str().expect("plain");
    let told = world.fails(1, ["umount", place]);
    assert!(told.contains("in use") && !told.contains("dead mount"), "{told}");
    read_all(&mounted);
    world.ok(["umount", "--force", place]);
    assert!(!mounted.join("a.txt").exists());
    drop(open);
}

#[test]
fn a_restart_brings_the_mounts_back_and_one_that_fails_takes_no_other_with_it() {
    let world = World::new();
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    world.push(&source, "movies");
    let (a, b) = (world.mount("photos", "a", &[]), world.mount("movies", "b", &[]));
    world.ok(["daemon", "stop"]);
    assert!(world.mounted().is_empty(), "a stopped daemon leaves nothing mounted");
    fs::remove_dir(&b).expect("takes the second's place away");
    world.ok(["daemon"]);
    wait_for("the first mount", || a.join("a.txt").exists());
    read_all(&a);
    // It is tried again and again: look at one answer that says so.
    let mut reason = String::new();
    wait_for("the second's failure", || {
        let mounts = world.json(&["mounts"]);
        reason = mounts[1]["reason"].as_str().unwrap_or_default().to_owned();
        mounts[1]["state"] == "failed"
    });
    assert!(reason.contains("/b"), "{reason}");
    fs::create_dir(&b).expect("gives the place back");
    wait_for("the second mount", || b.join("a.txt").exists());
}

#[test]
fn where_the_keeper_starts_no_daemon_the_next_command_does() {
    let mut world = World::new();
    world.set("LARDER_DAEMON_RESTART", "false");
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    let a = world.mount("photos", "a", &[]);
    world.kill_daemon();
    let b = world.mount("photos", "b", &[]);
    read_all(&b);
    wait_for("the first mount", || fs::read(a.join("a.txt")).is_ok());
    read_all(&a);
    assert_eq!(world.mounted().len(), 2, "nothing stale is left: {:?}", world.mounted());
}

#[test]
fn commands_that_start_the_daemon_at_once_get_one_daemon() {
    let world = World::new();
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    let children: Vec<_> = (0..6)
        .map(|i| {
            let dir = world.make_dir(&format!("m{i}"));
            let mut command =
                world.command(["mount", "photos"].map(str::to_owned).iter().chain(&[dir.display().to_string()]));
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts")
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().expect("ends");
        assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), world.log());
    }
    assert_eq!(world.json(&["mounts"]).as_array().map(Vec::len), Some(6));
    assert_eq!(world.log().matches("the daemon serves").count(), 1, "{}", world.log());
    (0..6).for_each(|i| read_all(&world.path(&format!("m{i}"))));
}

#[test]
fn a_daemon_that_cannot_start_is_told_with_its_log() {
    let mut world = World::new();
    world.set("LARDER_DAEMON_GROUP", "no-such-group");
    let told = world.fails(1, ["daemon"]);
    assert!(told.contains("ended before it was ready") && told.contains("no-such-group"), "{told}");
}

#[test]
fn a_command_that_means_another_lake_is_refused() {
    let mut world = World::new();
    world.ok(["daemon"]);
    let other = world.make_dir("other-lake");
    world.set("LARDER_LAKE", other.to_str().expect("plain"));
    let told = world.fails(2, ["mount", "photos", "/mnt"]);
    assert!(told.contains("serves the lake") && told.contains("hint: stop it"), "{told}");
}

#[test]
fn an_export_that_is_not_there_is_refused_and_nothing_is_written() {
    let mut world = World::new();
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    let export = world.make_dir("export");
    world.set("LARDER_TIER", export.to_str().expect("plain"));
    let dir = world.make_dir("m");
    let told = world.fails(1, ["mount", "photos", dir.to_str().expect("plain")]);
    assert!(told.contains("larder tier init"), "{told}");
    assert_eq!(fs::read_dir(&export).expect("lists").count(), 0);
    world.ok(["tier", "init", export.to_str().expect("plain")]);
    read_all(&world.mount("photos", "m", &[]));
}

#[test]
fn a_mount_in_the_foreground_ends_with_its_process() {
    let world = World::new();
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    let dir = world.make_dir("m");
    let mut child =
        world.command(["mount", "photos", dir.to_str().expect("plain"), "--foreground"]).spawn().expect("starts");
    wait_for("the mount", || dir.join("a.txt").exists());
    read_all(&dir);
    assert!(world.daemon_pid().is_none(), "no daemon was started");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("tells it to end");
    assert!(child.wait().expect("ends").success());
    assert!(world.mounted().is_empty());
    assert_eq!(fs::read_dir(world.state().join("private")).expect("lists").count(), 0);
}

/// There is no next daemon that would take it over: who reads would wait for ever.
#[test]
fn a_mount_in_the_foreground_whose_process_is_killed_goes_away_and_who_has_it_open_gets_errors() {
    let world = World::new();
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    let dir = world.make_dir("m");
    let mut child =
        world.command(["mount", "photos", dir.to_str().expect("plain"), "--foreground"]).spawn().expect("starts");
    wait_for("the mount", || dir.join("a.txt").exists());
    let file = fs::File::open(dir.join("a.txt")).expect("opens");
    child.kill().expect("kills");
    child.wait().expect("ends");
    wait_for("the mount to go", || world.mounted().is_empty());
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("advises");
    let read = std::os::unix::fs::FileExt::read_at(&file, &mut [0; 16], 0);
    assert!(read.is_err(), "{read:?}");
    drop(file);
    // The next daemon finds nothing to take away.
    world.ok(["daemon"]);
    assert_eq!(world.json(&["mounts"]), serde_json::json!([]));
    wait_for("nothing to be left of it", || {
        let private = fs::read_dir(world.state().join("private")).expect("lists").flatten();
        private.filter(|entry| entry.path().join("keeper.sock").exists()).count() == 0
    });
}

#[test]
fn an_unmount_by_somebody_else_is_noticed() {
    let world = World::new();
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    let dir = world.mount("photos", "m", &[]);
    nix::mount::umount(&dir).expect("unmounts");
    wait_for("the daemon to notice", || world.json(&["mounts"]) == serde_json::json!([]));
    let log = world.log();
    world.ok(["daemon", "stop"]);
    world.ok(["daemon"]);
    assert_eq!(world.json(&["mounts"]), serde_json::json!([]), "it does not come back\n{log}");
}

#[test]
fn a_mount_of_a_daemon_that_was_killed_is_unmounted_and_does_not_come_back() {
    let mut world = World::new();
    world.set("LARDER_DAEMON_RESTART", "false");
    let source = world.files("source", FILES);
    world.push(&source, "photos");
    let (dir, other) = (world.mount("photos", "m", &[]), world.mount("photos", "other", &[]));
    world.kill_daemon();
    world.ok(["umount", dir.to_str().expect("plain")]);
    assert!(!world.mounted().contains(&dir), "{:?}", world.mounted());
    let left: Vec<String> = mount_dirs(&world);
    assert_eq!(left, [other.to_str().expect("plain")], "the other one is taken over");
    world.ok(["daemon", "stop"]);
    let told = world.fails(1, ["umount", dir.to_str().expect("plain")]);
    assert!(told.contains("nothing is mounted there"), "{told}");
}

fn mount_dirs(world: &World) -> Vec<String> {
    let mounts = world.json(&["mounts"]);
    let dirs = mounts.as_array().expect("a list").iter().filter_map(|mount| mount["dir"].as_str());
    dirs.map(str::to_owned).collect()
}

/// Users need fusermount3 with its setuid bit, and a lake that both can read: over S3.
#[test]
fn two_users_have_two_daemons_and_not_each_others() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let s3 = crate::kit::s3::TestS3::start();
    let mut ada = World::of_user(4001);
    let mut bob = World::of_user(4002);
    ada.set_all(s3.env("shared"));
    bob.set_all(s3.env("shared"));
    let source = ada.files("source", FILES);
    ada.push(&source, "photos");
    for world in [&ada, &bob] {
        world.ok(["cache", "photos"]);
    }
    assert_ne!(ada.daemon_pid(), bob.daemon_pid());
    let (a, b) = (ada.make_dir("m"), bob.make_dir("m"));
    let device = fs::metadata("/dev/fuse").expect("the device").permissions().mode();
    if device & 0o006 == 0o006 {
        for (world, dir) in [(&ada, &a), (&bob, &b)] {
            world.ok(["mount", "photos", dir.to_str().expect("plain")]);
            assert_eq!(world.json(&["mounts"]).as_array().map(Vec::len), Some(1));
            let read = fs::read(dir.join("a.txt"));
            assert!(read.is_err(), "not even root looks into a user's mount");
        }
    }
    // Bob asks Ada's daemon: the socket's directory is closed to him.
    bob.set("LARDER_SOCKET", ada.state().join("daemon.sock").to_str().expect("plain"));
    let told = bob.fails(1, ["umount", a.to_str().expect("plain")]);
    assert!(told.contains("may not use the daemon") || told.contains("no daemon listens"), "{told}");
    bob.set("LARDER_SOCKET", "");
}
