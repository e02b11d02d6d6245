//! A task: one command that runs under a supervisor of its own, at most once, with or without a scheduler.
//!
//! ```text
//! <task>/task.json   what to run                        written by the scheduler, before the supervisor
//! <task>/lock        held by the supervisor as long as it lives
//! <task>/started     made once, before the command runs: who finds it does not run it again
//! <task>/stop        asks the supervisor to end the command; holds the grace time
//! <task>/exit.json   how it ended; written last, never changed
//! ```
//!
//! The supervisor (`larder supervise`, [`super::supervise`]) outlives the scheduler. A scheduler that
//! comes back looks at these files and knows what is so: [`Sight`]. Starting is idempotent: two
//! supervisors of one task contend for the lock, and the second finds `started`.
//!
//! All processes of a task have `LARDER_TASK=<marker>` in their environment: that is how those are found
//! and ended that outlived their parents, whatever they did to their process group.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::disk::{self, DiskError};

/// The variable that all processes of a task have.
pub const MARKER: &str = "LARDER_TASK";
/// How long leftover processes may take to die; one in an uninterruptible wait never does.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// What to run, and how to end it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskSpec {
    /// Unlike any other task's.
    pub marker: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
    pub cwd: PathBuf,
    /// Who runs it; None: the supervisor's user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<(u32, u32)>,
    /// Gets stdout and stderr, appended.
    pub log: PathBuf,
    /// Gets stdout instead, where it is wanted apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout: Option<PathBuf>,
    /// Ends what does not run as a descendant (a container), by force; empty: nothing does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kill: Vec<String>,
}

/// How a task ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskExit {
    /// Exit status, where it ended by itself.
    #[serde(default)]
    pub code: Option<i32>,
    /// Signal, where one ended it.
    #[serde(default)]
    pub signal: Option<i32>,
    /// It was asked to stop.
    #[serde(default)]
    pub stopped: bool,
    /// Its supervisor died before it ended (the machine went down, say).
    #[serde(default)]
    pub lost: bool,
    /// Why it could not be started.
    #[serde(default)]
    pub error: Option<String>,
    pub ended_ms: i64,
}

impl TaskExit {
    /// Says whether it ended well.
    pub fn succeeded(&self) -> bool {
        self.code == Some(0)
    }
}

impl std::fmt::Display for TaskExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.error, self.code, self.signal) {
            (Some(error), ..) => write!(f, "it could not be started: {error}"),
            (None, Some(code), _) => write!(f, "exit status {code}"),
            (None, None, Some(signal)) => write!(f, "ended by signal {signal}"),
            (None, None, None) if self.lost => f.write_str("its supervisor was lost"),
            (None, None, None) => f.write_str("stopped before it started"),
        }
    }
}

/// What the files of a task say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sight {
    /// Nobody supervises it, and it was never started.
    Fresh,
    /// A supervisor lives; whether it has begun.
    Alive { started: bool },
    /// It ended.
    Ended(TaskExit),
    /// It was started, its supervisor is gone, and nobody knows how it ended.
    Lost,
}

/// The directory of a task.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TaskDir(PathBuf);

impl TaskDir {
    /// Names the directory.
    pub fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Gives the directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(super) fn spec_file(&self) -> PathBuf {
        self.file("task.json")
    }

    pub(super) fn lock_file(&self) -> PathBuf {
        self.file("lock")
    }

    pub(super) fn started_file(&self) -> PathBuf {
        self.file("started")
    }

    pub(super) fn stop_file(&self) -> PathBuf {
        self.file("stop")
    }

    pub(super) fn exit_file(&self) -> PathBuf {
        self.file("exit.json")
    }

    /// Writes down what to run; what is there already stays.
    pub fn prepare(&self, spec: &TaskSpec) -> Result<(), DiskError> {
        disk::make_dir(&self.0, 0o700)?;
        if self.spec_file().exists() { Ok(()) } else { disk::write_json(&self.spec_file(), spec) }
    }

    /// Starts a supervisor for it. Harmless where there is one, or was.
    pub fn spawn(&self, exe: &Path) -> Result<Child, DiskError> {
        let log_path = self.file("supervisor.log");
        let log = fs::OpenOptions::new().create(true).append(true).open(&log_path);
        let log = log.map_err(disk::at(&log_path, "open"))?;
        let mut command = Command::new(exe);
        command.arg("supervise").arg(&self.0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).current_dir("/");
        command.spawn().map_err(disk::at(exe, "start the supervisor"))
    }

    /// Says how it does.
    pub fn look(&self) -> Result<Sight, DiskError> {
        if let Some(exit) = disk::read_json(&self.exit_file())? {
            return Ok(Sight::Ended(exit));
        }
        if !self.0.exists() {
            return Ok(Sight::Fresh);
        }
        let Some(lock) = disk::try_lock(&self.lock_file())? else {
            return Ok(Sight::Alive { started: self.started_file().exists() });
        };
        // A supervisor writes how it ended and goes: with its lock in hand, look again.
        if let Some(exit) = disk::read_json(&self.exit_file())? {
            return Ok(Sight::Ended(exit));
        }
        let started = self.started_file().exists();
        drop(lock);
        Ok(if started { Sight::Lost } else { Sight::Fresh })
    }

    /// Asks the supervisor to end the command: SIGTERM, and SIGKILL after the grace time. An earlier
    /// request stays.
    pub fn ask_to_stop(&self, grace: Duration) -> Result<(), DiskError> {
        disk::make_dir(&self.0, 0o700)?;
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        if self.stop_file().exists() { Ok(()) } else { disk::write_json(&self.stop_file(), &grace_ms) }
    }

    /// Gives the grace time, where it was asked to stop.
    pub(super) fn asked_to_stop(&self) -> Option<Duration> {
        disk::read_json::<u64>(&self.stop_file()).ok().flatten().map(Duration::from_millis)
    }

    /// Ends a task that nobody supervises, for good: no supervisor that comes late starts it. Kills what
    /// is left of it. None where a supervisor has the lock now: ask again.
    pub fn close(&self, now_ms: i64) -> Result<Option<TaskExit>, DiskError> {
        disk::make_dir(&self.0, 0o700)?;
        let Some(_lock) = disk::try_lock(&self.lock_file())? else {
            return Ok(None);
        };
        if let Some(exit) = disk::read_json(&self.exit_file())? {
            return Ok(Some(exit));
        }
        let fresh = disk::make_once(&self.started_file())?;
        if let Some(spec) = disk::read_json::<TaskSpec>(&self.spec_file())? {
            end_what_is_left(&spec);
        }
        let exit = TaskExit { lost: !fresh, stopped: fresh, ended_ms: now_ms, ..TaskExit::default() };
        disk::write_json(&self.exit_file(), &exit)?;
        Ok(Some(exit))
    }
}

/// Kills all processes of a task that are left, and what its `kill` ends.
pub(super) fn end_what_is_left(spec: &TaskSpec) {
    if let Some((program, args)) = spec.kill.split_first() {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Err(error) = command.status() {
            tracing::warn!(%error, ?program, "what ends a container could not be run");
        }
    }
    let begun = Instant::now();
    loop {
        let left = processes_with(&spec.marker);
        if left.is_empty() {
            return;
        }
        if begun.elapsed() > KILL_TIMEOUT {
            tracing::warn!(task = spec.marker, ?left, "processes do not die");
            return;
        }
        for pid in left {
            let _ = kill(pid, Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Finds the living processes of a task. A zombie has no environment any more.
fn processes_with(marker: &str) -> Vec<Pid> {
    let wanted = format!("{MARKER}={marker}");
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = pids.filter(|pid| {
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|byte| *byte == 0).any(|pair| pair == wanted.as_bytes())
    });
    ours.map(Pid::from_raw).collect()
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
