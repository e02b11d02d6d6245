//! The supervisor of one task: a small process that outlives the scheduler.
//!
//! It takes the task's lock, runs the command, ends it when asked to, and writes down how it ended.
//! There is one for each task, so nothing is lost when one dies but its own task, which a scheduler then
//! finds [`super::task::Sight::Lost`]. No runtime: one thread waits for the command, the other looks for
//! the request to stop.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::disk::{self, DiskError};
use super::task::{MARKER, TaskDir, TaskExit, TaskSpec, end_what_is_left};

/// How often the request to stop is looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How often, and in which steps, the lock is tried.
const LOCK_TRIES: u32 = 200;
const LOCK_INTERVAL: Duration = Duration::from_millis(20);
/// How often, and in which steps, it is tried to write down the end: for an hour.
const WRITE_TRIES: u32 = 360;
const WRITE_INTERVAL: Duration = Duration::from_secs(10);
/// The status of a shell that finds no such command.
const CANNOT_START: i32 = 127;

/// Runs a task to its end: `larder supervise DIR`. Does nothing where another supervisor has it or had it.
pub fn run(dir: &Path) -> Result<(), DiskError> {
    // Fails only for a process that leads a group: then it is on its own already.
    let _ = nix::unistd::setsid();
    let task = TaskDir::at(dir);
    let Some(_lock) = take_lock(&task)? else {
        return Ok(());
    };
    let Some(spec) = disk::read_json::<TaskSpec>(&task.spec_file())? else {
        return Ok(());
    };
    if task.exit_file().exists() || !disk::make_once(&task.started_file())? {
        return Ok(());
    }
    let mut exit = match task.asked_to_stop() {
        Some(_) => TaskExit { stopped: true, ..TaskExit::default() },
        None => match start(&spec) {
            Ok(child) => watch(&task, &spec, child),
            Err(error) => TaskExit { code: Some(CANNOT_START), error: Some(error.to_string()), ..TaskExit::default() },
        },
    };
    // What the command left behind goes with it: the GPUs are given to others now.
    end_what_is_left(&spec);
    exit.ended_ms = jiff::Timestamp::now().as_millisecond();
    write_down(&task, &exit)
}

/// Writes down how it ended. A disk that is full for a while must not make a job that ended run again.
fn write_down(task: &TaskDir, exit: &TaskExit) -> Result<(), DiskError> {
    for _ in 1..WRITE_TRIES {
        match disk::write_json(&task.exit_file(), exit) {
            Ok(()) => return Ok(()),
            Err(error) => eprintln!("{error}; trying again"),
        }
        // A job that was deleted has no place to write to any more.
        if !task.path().exists() {
            break;
        }
        std::thread::sleep(WRITE_INTERVAL);
    }
    disk::write_json(&task.exit_file(), exit)
}

/// Takes the task's lock. Who only looks at the task has it for a moment too, so it is tried for a while;
/// None where another supervisor was faster.
fn take_lock(task: &TaskDir) -> Result<Option<File>, DiskError> {
    for _ in 0..LOCK_TRIES {
        if task.started_file().exists() {
            break;
        }
        if let Some(lock) = disk::try_lock(&task.lock_file())? {
            return Ok(Some(lock));
        }
        std::thread::sleep(LOCK_INTERVAL);
    }
    Ok(None)
}

fn start(spec: &TaskSpec) -> std::io::Result<Child> {
    let append = |path: &Path| OpenOptions::new().create(true).append(true).mode(0o644).open(path);
    let log = append(&spec.log)?;
    let stdout = match &spec.stdout {
        Some(path) => append(path)?,
        None => log.try_clone()?,
    };
    let Some((program, args)) = spec.argv.split_first() else {
        return Err(std::io::Error::other("there is no command"));
    };
    let mut command = Command::new(program);
    command.args(args).env_clear().envs(&spec.env).env(MARKER, &spec.marker).current_dir(&spec.cwd);
    command.stdin(Stdio::null()).stdout(stdout).stderr(log).process_group(0);
    if let Some((uid, gid)) = spec.user {
        command.uid(uid).gid(gid);
    }
    command.spawn()
}

/// Waits for the end, and brings it about when asked to.
fn watch(task: &TaskDir, spec: &TaskSpec, mut child: Child) -> TaskExit {
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    let (tell, ended) = mpsc::channel();
    let waiter = std::thread::Builder::new().name("waiter".to_owned()).spawn(move || {
        let _ = tell.send(child.wait());
    });
    if let Err(error) = waiter {
        return TaskExit { error: Some(error.to_string()), ..TaskExit::default() };
    }
    let mut deadline: Option<Instant> = None;
    loop {
        match ended.recv_timeout(LOOK_INTERVAL) {
            Ok(Ok(status)) => return exit_of(status, deadline.is_some()),
            Ok(Err(error)) => return TaskExit { error: Some(error.to_string()), ..TaskExit::default() },
            Err(RecvTimeoutError::Disconnected) => return TaskExit::default(),
            Err(RecvTimeoutError::Timeout) => {}
        }
        match deadline {
            None => {
                if let Some(grace) = task.asked_to_stop() {
                    let _ = killpg(group, Signal::SIGTERM);
                    let now = Instant::now();
                    // A grace time beyond what the clock can count is a day.
                    deadline = now.checked_add(grace).or_else(|| now.checked_add(Duration::from_secs(86_400)));
                }
            }
            Some(deadline) if Instant::now() >= deadline => end_what_is_left(spec),
            Some(_) => {}
        }
    }
}

fn exit_of(status: ExitStatus, stopped: bool) -> TaskExit {
    TaskExit { code: status.code(), signal: status.signal(), stopped, ..TaskExit::default() }
}
