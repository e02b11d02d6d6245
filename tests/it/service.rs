//! Larder as a service: units, `mount.larder`, and what systemd is told.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::kit::{World, mount_by_kernel, wait_for};

const UNITS: [&str; 2] = ["larder.service", "larder-keeper.service"];
/// What `systemd-analyze security` may say, of 10, where 10 is no protection at all. Generous: each version of
/// systemd counts otherwise. The keeper cannot have a mount namespace of its own, which counts much.
const EXPOSURE_MAX: [f64; 2] = [5.0, 6.0];

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name)
}

fn can_analyze() -> bool {
    let can = Command::new("systemd-analyze").arg("--version").output().is_ok();
    if !can {
        eprintln!("skipped: needs systemd-analyze");
    }
    can
}

#[test]
fn the_units_are_right() {
    if !can_analyze() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    for name in UNITS {
        // The program is not installed here.
        let text = fs::read_to_string(shipped(name)).expect("reads").replace("/usr/bin/larder", "/bin/true");
        fs::write(dir.path().join(name), text).expect("writes");
    }
    for name in UNITS {
        let output = Command::new("systemd-analyze")
            .args(["verify", "--man=no"])
            .arg(dir.path().join(name))
            .output()
            .expect("runs");
        let said = String::from_utf8_lossy(&output.stderr);
        // Other units of this machine are none of ours.
        let ours: Vec<&str> = said.lines().filter(|line| line.contains("larder")).collect();
        assert!(ours.is_empty(), "{name}: {ours:?}");
    }
}

#[test]
fn the_units_leave_little_open() {
    if !can_analyze() {
        return;
    }
    for (name, most) in UNITS.iter().zip(EXPOSURE_MAX) {
        let output = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager"])
            .arg(shipped(name))
            .output()
            .expect("runs");
        let said = String::from_utf8_lossy(&output.stdout);
        let line = said.lines().find(|line| line.contains("Overall exposure level"));
        let Some(line) = line else {
            eprintln!("skipped: this systemd-analyze has no offline security");
            return;
        };
        let level = line.split(": ").nth(1).and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
        assert!(level.expect("a number") <= most, "{line}");
    }
}

#[test]
fn the_daemons_unit_lets_it_make_the_calls_of_the_kernel_engine() {
    let unit = fs::read_to_string(shipped("larder.service")).expect("reads");
    let filters = unit.lines().filter_map(|line| line.strip_prefix("SystemCallFilter="));
    let allowed: Vec<&str> = filters.filter(|line| !line.starts_with('~')).flat_map(str::split_whitespace).collect();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/fs/keeper/kernel.rs");
    let source = fs::read_to_string(source).expect("reads");
    // What the keeper does is not filtered.
    let calls = ["fsopen(", "fsconfig_", "fsmount(", "open_tree("].into_iter().filter(|call| source.contains(call));
    let calls: Vec<&str> = calls.map(|call| call.trim_end_matches(['(', '_'])).collect();
    assert_eq!(calls.len(), 4, "the test looks for what the module calls");
    for call in calls {
        assert!(allowed.contains(&call), "{call} is none of {allowed:?}");
    }
    assert!(unit.contains("\nSystemCallErrorNumber="), "a call that is not allowed must not kill the daemon");
}

fn can_mount() -> bool {
    let can = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
}

/// Calls mount.larder as mount(8) does; gives its exit status and what it said.
fn mount_helper(world: &World, args: &[&str]) -> (i32, String) {
    let like = world.command(["mounts"]);
    let mut helper = Command::new(shipped("mount.larder"));
    helper.env_clear().envs(like.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = helper.env("LARDER_BIN", world.binary()).args(args).output().expect("runs");
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_line_of_fstab_mounts() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let source = world.files("source", &[("a.txt", b"alpha")]);
    world.push(&source, "data");
    let dir = world.make_dir("m");
    let place = dir.to_str().expect("plain");
    let options = "rw,noexec,nosuid,nodev,nofail,_netdev,x-systemd.after=larder.service,umask=027,uid=7";
    let (code, said) = mount_helper(&world, &["data@main", place, "-o", options]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(fs::read(dir.join("a.txt")).expect("reads"), b"alpha");
    let mounts = world.json(&["mounts"]);
    assert_eq!((mounts[0]["options"]["uid"].as_u64(), mounts[0]["options"]["umask"].as_u64()), (Some(7), Some(0o27)));
    let (again, said) = mount_helper(&world, &["data@main", place, "-o", options]);
    assert_eq!(again, 0, "what is mounted already is right: {said}");
    let (other, said) = mount_helper(&world, &["data@v9", place, "-o", options]);
    assert!(other == 32 && said.contains("another commit"), "{other} {said}");
    for (wrong, why) in [("remount", "cannot be changed"), ("compress", "unknown option compress")] {
        let (code, said) = mount_helper(&world, &["data", place, "-o", wrong]);
        assert!(code == 1 && said.contains(why), "{wrong}: {code} {said}");
    }
    assert_eq!(mount_helper(&world, &["data", place, "-s", "-f", "-o", "compress"]).0, 0);
    let (code, said) = mount_helper(&world, &["nothing@here", world.make_dir("n").to_str().expect("plain")]);
    assert!(code == 32 && said.contains("nothing"), "{code} {said}");
}

#[test]
fn a_line_of_fstab_is_content_with_what_the_kernel_serves() {
    let world = World::new();
    let source = world.files("source", &[("a.txt", b"alpha")]);
    world.push(&source, "data");
    world.ok(["cache", "data"]);
    let Some(dir) = mount_by_kernel(&world, "data", "m", &[]) else { return };
    let place = dir.to_str().expect("plain");
    let (code, said) = mount_helper(&world, &["data", place, "-o", "ro,engine=kernel"]);
    assert_eq!(code, 0, "{said}");
    world.ok(["umount", place]);
    let (code, said) = mount_helper(&world, &["data", place, "-o", "ro,engine=kernel"]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(world.json(&["mounts"])[0]["engine"], "kernel");
}

/// Ends a process when a test ends early.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Ends {
    fn tell(&mut self, signal: Signal) -> bool {
        let pid = i32::try_from(self.0.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("tells it");
        self.0.wait().expect("ends").success()
    }
}

fn get(socket: &Path, path: &str) -> String {
    let mut stream = UnixStream::connect(socket).expect("connects");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: larder\r\nConnection: close\r\n\r\n").expect("asks");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("is told");
    answer
}

#[test]
fn a_service_manager_restarts_the_daemon_under_open_files() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let socket = world.path("daemon.sock");
    world.set("LARDER_SOCKET", socket.to_str().expect("plain"));
    let source = world.files("source", &[("a.bin", &[7; 300_000])]);
    world.push(&source, "data");
    let state = world.state();
    let notify_path = world.path("notify");
    let notify = UnixDatagram::bind(&notify_path).expect("binds");
    notify.set_read_timeout(Some(Duration::from_secs(60))).expect("sets a timeout");
    let keeper = world.command([&"keeper", &"--state", &state.to_str().expect("plain"), &"--foreground"]).spawn();
    let mut keeper = Ends(keeper.expect("starts"));
    let start = || {
        let mut daemon = world.command(["daemon", "--foreground", "--keep-mounts"]);
        daemon.env("NOTIFY_SOCKET", &notify_path).env("WATCHDOG_USEC", "200000").stderr(Stdio::null());
        let daemon = Ends(daemon.spawn().expect("starts"));
        // Old words of the daemon before may come first.
        wait_for_word(&notify, "READY=1");
        daemon
    };
    let mut daemon = start();
    wait_for_word(&notify, "WATCHDOG=1");
    let mount = world.mount("data", "m", &[]);
    let file = File::open(mount.join("a.bin")).expect("opens");
    assert_eq!(world.keeper_pids().len(), 1, "the daemon uses the service's keeper");
    assert!(get(&socket, "/healthz").starts_with("HTTP/1.1 200"));
    wait_for("ready", || get(&socket, "/readyz").starts_with("HTTP/1.1 200"));
    for _ in 0..2 {
        assert!(daemon.tell(Signal::SIGTERM), "ends well");
        assert_eq!(world.mounted(), std::slice::from_ref(&mount), "the mount stays");
        daemon = start();
        nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("advises");
        let mut read = vec![0; 300_000];
        file.read_exact_at(&mut read, 0).expect("reads on");
        assert!(read.iter().all(|&byte| byte == 7));
    }
    drop(file);
    assert!(keeper.tell(Signal::SIGTERM), "the keeper unmounts everything and ends well");
    assert!(world.mounted().is_empty());
    assert!(world.keeper_pids().is_empty(), "the daemon starts none of its own");
    daemon.tell(Signal::SIGKILL);
}

#[test]
fn a_lease_that_the_tier_refused_is_asked_for_again() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let source = world.files("source", &[("a.txt", b"alpha")]);
    world.push(&source, "data");
    world.ok(["cache", "data"]);
    world.ok(["uncache", "data"]);
    // No record and no lease can be written below a file.
    let (commits, away) = (world.tier().join("commits"), world.tier().join("commits.away"));
    fs::rename(&commits, &away).expect("takes the directory away");
    fs::write(&commits, b"").expect("puts a file in its place");
    let dir = world.mount("data", "m", &["--ttl", "1h"]);
    assert_eq!(fs::read(dir.join("a.txt")).expect("is read from the lake"), b"alpha");
    assert!(world.log().contains("the tier did not take the lease"), "{}", world.log());
    fs::remove_file(&commits).expect("takes the file away");
    fs::rename(&away, &commits).expect("puts the directory back");
    wait_for("the lease", || world.log().contains("the tier took the lease now"));
    let why = world.json(&["tier", "why", "data"]);
    assert!(why.to_string().contains("\"leases\":[{"), "{why}");
}

#[test]
fn top_shows_each_mount() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let source = world.files("source", &[("a.txt", b"alpha")]);
    world.push(&source, "data");
    assert_eq!(world.json(&["top", "--count", "1", "--interval", "1ms"]), serde_json::json!([]));
    let dir = world.mount("data", "m", &[]);
    let file = File::open(dir.join("a.txt")).expect("opens");
    let seen = world.json(&["top", "--count", "1", "--interval", "1ms"]);
    assert_eq!((seen[0]["state"].as_str(), seen[0]["open_files"].as_u64()), (Some("mounted"), Some(1)), "{seen}");
    let table = world.ok(["top", "--count", "2", "--interval", "1ms"]);
    assert_eq!(table.matches("data").count(), 2, "{table}");
    drop(file);
}

#[track_caller]
fn wait_for_word(notify: &UnixDatagram, word: &str) {
    let mut room = [0; 256];
    loop {
        let len = notify.recv(&mut room).unwrap_or_else(|error| panic!("{word} does not come: {error}"));
        if &room[..len] == word.as_bytes() {
            return;
        }
    }
}

/// Gives the name in the documentation: a histogram is three series.
fn family<'a>(name: &'a str, known: &str) -> &'a str {
    if known.contains(&format!("`{name}`")) {
        return name;
    }
    ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name)
}

#[test]
fn the_daemon_gives_every_metric_of_the_documentation_and_no_other() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md")).expect("reads");
    let documented: std::collections::BTreeSet<&str> =
        page.lines().filter_map(|line| line.strip_prefix("| `larder_")?.split('`').next()).collect();
    let world = World::new();
    let source = world.files("source", &[("a.txt", b"alpha")]);
    world.push(&source, "photos");
    let dir = world.make_dir("m");
    if world.run(["mount", "photos", dir.to_str().expect("plain")]).code != 0 {
        eprintln!("skipped: needs a mount");
        return;
    }
    let text = world.ok(["daemon", "metrics"]);
    let given: std::collections::BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE larder_")?.split(' ').next()).collect();
    let undocumented: Vec<_> = given.difference(&documented).collect();
    assert!(undocumented.is_empty(), "docs/metrics.md does not have {undocumented:?}");
    // One that is labelled with reasons: there is none as long as nothing was evicted.
    let missing: Vec<_> = documented.difference(&given).filter(|name| **name != "tier_evictions_total").collect();
    assert!(missing.is_empty(), "the daemon does not give {missing:?}");
}

#[test]
fn the_dashboard_shows_only_metrics_that_there_are() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("systemd/grafana-dashboard.json")).expect("reads");
    let dashboard: serde_json::Value = serde_json::from_str(&text).expect("is JSON");
    let known = fs::read_to_string(root.join("docs/metrics.md")).expect("reads");
    let panels = dashboard["panels"].as_array().expect("has panels");
    let mut seen = 0;
    for panel in panels {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expr = target["expr"].as_str().expect("has an expression");
            for word in
                expr.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|w| w.starts_with("larder_"))
            {
                assert!(known.contains(&format!("`{}`", family(word, &known))), "{}: {word}", panel["title"]);
                seen += 1;
            }
        }
    }
    assert!(panels.len() >= 8 && seen >= 12, "{} panels, {seen} metrics", panels.len());
}

fn dpkg(root: &Path, args: &[&str]) -> (bool, String) {
    let output = Command::new("dpkg")
        .args(["--force-script-chrootless", "--force-depends", "--force-unsafe-io", "--log=/dev/null"])
        .arg(format!("--root={}", root.display()))
        .args(args)
        .output()
        .expect("runs");
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn the_package_installs_upgrades_and_goes_away() {
    let has_dpkg = Command::new("dpkg-deb").arg("--version").output().is_ok();
    if !has_dpkg || !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root and dpkg");
        return;
    }
    let world = World::new();
    let (out, root) = (world.path("dist"), world.make_dir("root"));
    for dir in ["var/lib/dpkg/info", "var/lib/dpkg/updates"] {
        fs::create_dir_all(root.join(dir)).expect("makes it");
    }
    fs::write(root.join("var/lib/dpkg/status"), "").expect("writes");
    // The same files twice, as two versions; quickly made rather than small.
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/deb");
    let mut packages = Vec::new();
    for version in ["0.1.0", "0.2.0"] {
        let mut make = Command::new(&script);
        make.arg(world.binary()).arg(&out).env("VERSION", version).env("DEB_COMPRESS", "-Znone");
        let output = make.output().expect("runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let made: Vec<PathBuf> = fs::read_dir(&out).expect("lists").flatten().map(|entry| entry.path()).collect();
        packages.push(made.into_iter().find(|path| path.to_string_lossy().contains(version)).expect("a package"));
    }
    for package in &packages {
        let (ok, said) = dpkg(&root, &["--install", package.to_str().expect("plain")]);
        assert!(ok, "{said}");
        for file in [
            "usr/bin/larder",
            "usr/sbin/mount.larder",
            "usr/lib/systemd/system/larder.service",
            "usr/lib/systemd/system/larder-keeper.service",
            "usr/share/man/man1/larder-mount.1.gz",
            "usr/share/bash-completion/completions/larder",
            "usr/share/doc/larder/larder.toml.example",
        ] {
            assert!(fs::metadata(root.join(file)).is_ok_and(|meta| meta.len() > 0), "{file}");
        }
    }
    let installed = Command::new(root.join("usr/bin/larder")).arg("--version").output().expect("runs");
    assert!(installed.status.success());
    let example = root.join("usr/share/doc/larder/larder.toml.example");
    world.ok([&"--config", &example.to_str().expect("plain"), &"config", &"check"]);
    fs::create_dir_all(root.join("var/lib/larder")).expect("makes it");
    let (ok, said) = dpkg(&root, &["--purge", "larder"]);
    assert!(ok, "{said}");
    let left: Vec<String> = ["usr", "etc/larder", "var/lib/larder"]
        .map(str::to_owned)
        .into_iter()
        .filter(|dir| root.join(dir).exists())
        .collect();
    assert!(left.is_empty(), "{left:?} is left");
}
