//! A world of its own for one test: home, lake, tier and state in a temporary directory, and the real
//! binary in it. When it is dropped the daemon is stopped and what is mounted is taken away.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::mount::MntFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// What a command said.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A temporary home with everything in it.
#[derive(Debug)]
pub struct World {
    dir: tempfile::TempDir,
    env: Vec<(String, String)>,
    uid: Option<u32>,
    binary: PathBuf,
}

impl World {
    /// A laptop: nothing is configured, the lake is embedded.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("larder-it-").tempdir().expect("a temporary directory");
        fs::create_dir(dir.path().join("home")).expect("makes the home");
        // The campaign runs the release build.
        let binary = std::env::var_os("LARDER_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_larder").into());
        let mut world = Self { dir, env: Vec::new(), uid: None, binary: binary.into() };
        // Sweeps come often enough for tests that wait for one.
        world.set("LARDER_STEWARD_PERIOD", "300ms");
        world.set("LARDER_TIER_GRACE", "1s");
        world.set("LARDER_TIER_SPACE_WAIT", "3s");
        world
    }

    /// The same with the binary of the test's own build, also in a campaign: only that has what helps tests.
    pub fn of_this_build() -> Self {
        let mut world = Self::new();
        world.binary = env!("CARGO_BIN_EXE_larder").into();
        world
    }

    /// The same for another user: everything belongs to `uid`.
    pub fn of_user(uid: u32) -> Self {
        let mut world = Self::new();
        world.uid = Some(uid);
        // Where the build lies may be closed to other users (a home directory is).
        let binary = world.path("larder");
        copy_program(&world.binary, &binary);
        world.binary = binary;
        for path in [world.dir.path().to_owned(), world.path("home")] {
            std::os::unix::fs::chown(path, Some(uid), Some(uid)).expect("gives the home away");
        }
        world
    }

    /// Sets a variable for every command of this world.
    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        self.env.retain(|(have, _)| have != name);
        self.env.push((name.to_owned(), value.into()));
    }

    /// Sets many, as `TestS3::env` gives them.
    pub fn set_all(&mut self, env: Vec<(String, String)>) {
        for (name, value) in env {
            self.set(&name, value);
        }
    }

    /// Gives a path below the world's directory.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// Makes a directory below the world's.
    pub fn make_dir(&self, relative: &str) -> PathBuf {
        let path = self.path(relative);
        fs::create_dir_all(&path).expect("makes the directory");
        if let Some(uid) = self.uid {
            std::os::unix::fs::chown(&path, Some(uid), Some(uid)).expect("gives it away");
        }
        path
    }

    /// Writes files (path, bytes) below a directory of this world; gives the directory.
    pub fn files(&self, relative: &str, files: &[(&str, &[u8])]) -> PathBuf {
        let dir = self.make_dir(relative);
        for (name, bytes) in files {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().expect("has a parent")).expect("makes the parents");
            fs::write(path, bytes).expect("writes the file");
        }
        dir
    }

    /// Gives the state directory.
    pub fn state(&self) -> PathBuf {
        self.path("home/.local/state/larder")
    }

    /// Gives the tier's directory.
    pub fn tier(&self) -> PathBuf {
        self.path("home/.cache/larder/tier")
    }

    /// Gives the binary, where the world's user can run it.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Gives the command, ready to be spawned.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(args);
        self.surround(command)
    }

    /// Gives the command behind another one that runs it (`unshare --mount`).
    pub fn command_behind(&self, wrapper: &[&str], args: &[&str]) -> Command {
        let (program, flags) = wrapper.split_first().expect("names a program");
        let mut command = Command::new(program);
        command.args(flags).arg(&self.binary).args(args);
        self.surround(command)
    }

    fn surround(&self, mut command: Command) -> Command {
        command
            .env_clear()
            .env("HOME", self.path("home"))
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("RUST_BACKTRACE", "0")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        if let Some(uid) = self.uid {
            command.uid(uid).gid(uid);
        }
        command
    }

    /// Runs a command to its end.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Ran {
        let Output { status, stdout, stderr } = self.command(args).output().expect("runs larder");
        Ran {
            code: status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        }
    }

    /// Runs a command that must work; gives its stdout.
    #[track_caller]
    pub fn ok<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        let args: Vec<std::ffi::OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        let ran = self.run(&args);
        assert_eq!(ran.code, 0, "{args:?} failed\n{}\n{}\n{}", ran.stdout, ran.stderr, self.log());
        ran.stdout
    }

    /// Runs a command that must fail with this exit status; gives its stderr.
    #[track_caller]
    pub fn fails<S: AsRef<OsStr>>(&self, code: i32, args: impl IntoIterator<Item = S>) -> String {
        let args: Vec<std::ffi::OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        let ran = self.run(&args);
        assert_eq!(ran.code, code, "{args:?}\n{}\n{}", ran.stdout, ran.stderr);
        ran.stderr
    }

    /// Runs a command with `--json`; gives what it printed.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(args.iter().chain(&["--json"]));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?} printed no JSON ({error}): {text}"))
    }

    /// Pushes a directory; gives the commit's id.
    #[track_caller]
    pub fn push(&self, dir: &Path, dataset: &str) -> String {
        let pushed = self.json(&["push", dir.to_str().expect("a plain path"), dataset]);
        pushed["commit"].as_str().expect("push tells the commit").to_owned()
    }

    /// Makes a directory and mounts a revision there.
    #[track_caller]
    pub fn mount(&self, revision: &str, relative: &str, more: &[&str]) -> PathBuf {
        let dir = self.make_dir(relative);
        let place = dir.to_str().expect("a plain path");
        self.ok(["mount", revision, place].iter().chain(more));
        dir
    }

    /// Gives the daemon's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.state().join("daemon.log")).unwrap_or_default()
    }

    /// Gives the daemon's pid.
    pub fn daemon_pid(&self) -> Option<i32> {
        let ran = self.run(["daemon", "status", "--json"]);
        let info: Value = serde_json::from_str(&ran.stdout).ok()?;
        info["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())
    }

    /// Kills the daemon with SIGKILL and waits until it is dead. Where it had mounts, its keeper starts another
    /// one.
    #[track_caller]
    pub fn kill_daemon(&self) {
        let place = larder::node::place::Place::at(&self.state());
        let pid = place.daemon_pid().expect("a daemon runs");
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kills the daemon");
        wait_for("the daemon's end", || place.daemon_pid() != Some(pid));
    }

    /// Gives the pids of the keepers of this world.
    pub fn keeper_pids(&self) -> Vec<i32> {
        let state = self.state();
        let pids = fs::read_dir("/proc")
            .expect("lists")
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_ours = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|&byte| byte == 0).skip(1);
            words.next() == Some(b"keeper") && words.nth(1) == Some(state.as_os_str().as_encoded_bytes())
        };
        pids.filter(is_ours).collect()
    }

    /// Kills the keeper with SIGKILL and waits until it is dead.
    #[track_caller]
    pub fn kill_keeper(&self) {
        let pids = self.keeper_pids();
        assert_eq!(pids.len(), 1, "one keeper");
        kill(Pid::from_raw(pids[0]), Signal::SIGKILL).expect("kills the keeper");
        wait_for("the keeper's end", || !self.keeper_pids().contains(&pids[0]));
    }

    /// Lists what is mounted below this world's directory.
    pub fn mounted(&self) -> Vec<PathBuf> {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
        points.filter(|point| point.starts_with(self.dir.path())).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.command(["daemon", "stop"]).output();
        for point in self.mounted().into_iter().rev() {
            let _ = nix::mount::umount2(&point, MntFlags::MNT_DETACH);
        }
        let place = larder::node::place::Place::at(&self.state());
        if let Some(pid) = place.daemon_pid() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Mounts by the kernel engine what is in the tier. None: the kernel does not mount images from files here.
#[track_caller]
pub fn mount_by_kernel(world: &World, revision: &str, relative: &str, more: &[&str]) -> Option<PathBuf> {
    let dir = world.make_dir(relative);
    let place = dir.to_str().expect("a plain path");
    let ran = world.run(["mount", revision, place, "--engine", "kernel"].iter().chain(more));
    let lacks = ["mounts no image from this file", "has no EROFS", "need root"];
    if lacks.iter().any(|lack| ran.stderr.contains(lack)) {
        eprintln!("skipped: needs root, Linux 6.12 with file-backed EROFS, and a local disk");
        return None;
    }
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    Some(dir)
}

/// Copies a program and waits until it can be run: a process that another test starts at this moment has the copy open
/// for writing until it has become another program.
pub fn copy_program(from: &Path, to: &Path) {
    fs::copy(from, to).expect("copies the program");
    wait_for("the copy to be nobody's to write", || {
        let ran = Command::new(to).arg("--version").stdout(Stdio::null()).status();
        !matches!(ran, Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy)
    });
}

/// Waits until something is so; fails after a while that no slow machine needs.
#[track_caller]
pub fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
}
