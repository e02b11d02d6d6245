//! A task: one command that runs under a supervisor of its own, at most once, with or without a scheduler.
//!
//! ```text
//! <task>/task.json   what to run                        written by the scheduler, before the supervisor
//! <task>/lock        held by the supervisor as long as it lives
//! <task>/started     made once, before the command runs: who finds it does not run it again
//! <task>/birth.json  where the command was started: session and group
//! <task>/image.json  which image its container has
//! <task>/stop        asks the supervisor to end the command; holds the grace time
//! <task>/exit.json   how it ended; written last, never changed
//! ```
//!
//! The supervisor (`larder supervise`, [`super::supervise`]) outlives the scheduler. A scheduler that
//! comes back looks at these files and knows what is so: [`Sight`]. Starting is idempotent: two
//! supervisors of one task contend for the lock, and the second finds `started`.
//!
//! All processes of a task are ended with it: [`super::family`] finds them. A task is over when none of them
//! is left, and no container: what is left would use a GPU that somebody else has by then.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::disk::{self, DiskError};
use super::family::{Birth, Family};

/// The variable that all processes of a task have.
pub const MARKER: &str = "LARDER_TASK";
/// How long processes may take to die before it is said that they do not; one in an uninterruptible wait
/// never does.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a container engine may take to answer.
const ENGINE_TIMEOUT: Duration = Duration::from_secs(120);
const ENGINE_LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What to run, and how to end it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskSpec {
    /// Unlike any other task's.
    pub marker: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment, unless `inherits`.
    pub env: BTreeMap<String, String>,
    /// Has the environment of the supervisor, which is the scheduler's: it may hold what no file should.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub inherits: bool,
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
    /// Prints something as long as there is still what `kill` ends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<String>,
    /// The image in `argv`, which is run by its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageArg>,
    /// How long the log may grow before its beginning is given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_bytes_max: Option<u64>,
}

/// Where a command names an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageArg {
    /// `podman`, `docker`, with the path where it was given.
    pub engine: String,
    /// Its place in `argv`.
    pub at: usize,
}

/// What a name of an image meant when the container was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFound {
    /// The engine's own name for it.
    pub id: String,
    /// Names the same image on every machine: that of its manifest, or else the id.
    pub digest: String,
}

/// Why a task is not over yet.
#[derive(Debug, thiserror::Error)]
pub enum EndError {
    #[error("cannot list the processes of the machine")]
    List(#[source] std::io::Error),
    #[error("processes {pids:?} of the task do not die")]
    Processes { pids: Vec<i32> },
    #[error("cannot ask {program} whether the container is gone")]
    Engine {
        program: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{program} does not remove the container; remove it by hand: {by_hand}")]
    Container { program: String, by_hand: String },
    #[error(transparent)]
    Disk(#[from] DiskError),
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

    pub(super) fn birth_file(&self) -> PathBuf {
        self.file("birth.json")
    }

    pub(super) fn exit_file(&self) -> PathBuf {
        self.file("exit.json")
    }

    pub(super) fn image_file(&self) -> PathBuf {
        self.file("image.json")
    }

    /// Gives the image of its container, where it has one and that was found.
    pub fn image(&self) -> Option<ImageFound> {
        disk::read_json(&self.image_file()).ok().flatten()
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
        // A scheduler that was itself started by a job leaves nothing of that to its own jobs.
        command.env_remove(MARKER);
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
    /// request stays, but for a longer grace time.
    pub fn ask_to_stop(&self, grace: Duration) -> Result<(), DiskError> {
        disk::make_dir(&self.0, 0o700)?;
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        if self.asked_to_stop().is_some_and(|before| before <= grace) {
            return Ok(());
        }
        disk::write_json(&self.stop_file(), &grace_ms)
    }

    /// Gives the grace time, where it was asked to stop.
    pub(super) fn asked_to_stop(&self) -> Option<Duration> {
        disk::read_json::<u64>(&self.stop_file()).ok().flatten().map(Duration::from_millis)
    }

    /// Finds the processes of this task.
    pub(super) fn family(&self, spec: &TaskSpec, supervisor: Option<Pid>) -> Result<Family, DiskError> {
        let birth = disk::read_json::<Birth>(&self.birth_file())?;
        Ok(Family::new(&spec.marker, birth, supervisor))
    }

    /// Ends a task that nobody supervises, for good: no supervisor that comes late starts it. Kills what
    /// is left of it, which may take a while; an error where something does not die: the task is not over
    /// then. None where a supervisor has the lock now: ask again.
    pub fn close(&self, now_ms: i64) -> Result<Option<TaskExit>, EndError> {
        disk::make_dir(&self.0, 0o700)?;
        let Some(_lock) = disk::try_lock(&self.lock_file())? else {
            return Ok(None);
        };
        if let Some(exit) = disk::read_json(&self.exit_file())? {
            return Ok(Some(exit));
        }
        let fresh = disk::make_once(&self.started_file())?;
        // What was never started left nothing.
        if !fresh && let Some(spec) = disk::read_json::<TaskSpec>(&self.spec_file())? {
            end_what_is_left(&spec, &self.family(&spec, None)?)?;
        }
        let exit = TaskExit { lost: !fresh, stopped: fresh, ended_ms: now_ms, ..TaskExit::default() };
        disk::write_json(&self.exit_file(), &exit)?;
        Ok(Some(exit))
    }
}

/// Kills all processes of a task that are left, and the container. An error where something is still there.
pub(super) fn end_what_is_left(spec: &TaskSpec, family: &Family) -> Result<(), EndError> {
    kill_processes(family)?;
    if let Some((program, _)) = spec.kill.split_first() {
        // Only what is there afterwards counts: it may have been gone before.
        let _ = engine(&spec.kill, &spec.env);
        let told = engine(&spec.left, &spec.env);
        let program = program.clone();
        match told {
            Ok(text) if text.trim().is_empty() => {}
            Ok(_) => return Err(EndError::Container { program, by_hand: spec.kill.join(" ") }),
            Err(source) => return Err(EndError::Engine { program, source }),
        }
    }
    // An engine may have left a helper behind.
    kill_processes(family)
}

fn kill_processes(family: &Family) -> Result<(), EndError> {
    let left = family.kill(KILL_TIMEOUT).map_err(EndError::List)?;
    if left.is_empty() {
        return Ok(());
    }
    Err(EndError::Processes { pids: left.into_iter().map(Pid::as_raw).collect() })
}

/// Runs the engine and gives what it printed; an error where it failed or took too long.
pub(super) fn engine(argv: &[String], env: &BTreeMap<String, String>) -> std::io::Result<String> {
    let Some((program, args)) = argv.split_first() else {
        return Ok(String::new());
    };
    let mut command = Command::new(program);
    command.args(args).env_clear().envs(env).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let begun = Instant::now();
    while child.try_wait()?.is_none() {
        if begun.elapsed() > ENGINE_TIMEOUT {
            child.kill()?;
            child.wait()?;
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(ENGINE_LOOK_INTERVAL);
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(std::io::Error::other(output.status.to_string()))
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
