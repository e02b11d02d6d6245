//! The supervisor of one task: a small process that outlives the scheduler.
//!
//! It takes the task's lock, runs the command, ends it when asked to, and writes down how it ended.
//! There is one for each task, so nothing is lost when one dies but its own task, which a scheduler then
//! finds [`super::task::Sight::Lost`]. No runtime: one thread waits for the command, the other looks for
//! the request to stop. It is the subreaper of its task: who loses its
//! parent becomes its child and can be found.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::{Gid, Pid, Uid};

use super::disk::{self, DiskError};
use super::family::{Birth, Family};
use super::image;
use super::logfile::LogBound;
use super::task::{MARKER, TaskDir, TaskExit, TaskSpec, end_what_is_left};
use crate::crash;

/// How often it is looked whether a task that was asked to stop has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How often it is looked whether it was asked to. The kernel would tell changes in a directory, but only to so few
/// listeners of one user (128) that supervisors would take them all.
const IDLE_INTERVAL: Duration = Duration::from_millis(500);
/// How often, and in which steps, the lock is tried.
const LOCK_TRIES: u32 = 200;
const LOCK_INTERVAL: Duration = Duration::from_millis(20);
/// How often, and in which steps, it is tried to write down the end: for an hour.
const WRITE_TRIES: u32 = 360;
const WRITE_INTERVAL: Duration = Duration::from_secs(10);
/// How often it is tried to end what does not die, so that the task can be over.
const END_INTERVAL: Duration = Duration::from_secs(1);
/// The status of a shell that finds no such command.
const CANNOT_START: i32 = 127;

/// Runs a task to its end: `larder supervise DIR`. Does nothing where another supervisor has it or had it.
pub fn run(dir: &Path) -> Result<(), DiskError> {
    // Fails only for a process that leads a group: then it is on its own already.
    let _ = nix::unistd::setsid();
    let own = nix::sys::prctl::set_child_subreaper(true).is_ok();
    supervise(dir, own.then(nix::unistd::getpid))
}

/// `own`: this process, where all its children are the task's.
pub(super) fn supervise(dir: &Path, own: Option<Pid>) -> Result<(), DiskError> {
    let task = TaskDir::at(dir);
    let Some(_lock) = take_lock(&task)? else {
        return Ok(());
    };
    let Some(mut spec) = disk::read_json::<TaskSpec>(&task.spec_file())? else {
        return Ok(());
    };
    if task.exit_file().exists() || !disk::make_once(&task.started_file())? {
        return Ok(());
    }
    crash::point("supervisor: before the command");
    let mut family = task.family(&spec, own)?;
    let started = image::pin(&task, &mut spec).and_then(|()| match task.asked_to_stop() {
        Some(_) => Ok(None),
        None => start(&spec).map(Some),
    });
    let exit = match started {
        Ok(Some(child)) => watch(&task, &spec, &mut family, child),
        Ok(None) => ended_now(TaskExit { stopped: true, ..TaskExit::default() }),
        Err(_) if task.asked_to_stop().is_some() => ended_now(TaskExit { stopped: true, ..TaskExit::default() }),
        Err(error) => {
            ended_now(TaskExit { code: Some(CANNOT_START), error: Some(error.to_string()), ..TaskExit::default() })
        }
    };
    // What the command left behind goes with it: the GPUs are given to others now. As long as something of it
    // is there, the task is not over, and this supervisor lives.
    while let Err(error) = end_what_is_left(&spec, &family) {
        eprintln!("{error}; trying again");
        std::thread::sleep(END_INTERVAL);
    }
    crash::point("supervisor: before its end");
    write_down(&task, &exit)
}

fn ended_now(exit: TaskExit) -> TaskExit {
    TaskExit { ended_ms: jiff::Timestamp::now().as_millisecond(), ..exit }
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
    let append = |path: &Path| OpenOptions::new().create(true).append(true).mode(0o640).open(path);
    let log = append(&spec.log)?;
    let stdout = match &spec.stdout {
        Some(path) => append(path)?,
        None => log.try_clone()?,
    };
    let Some((program, args)) = spec.argv.split_first() else {
        return Err(std::io::Error::other("there is no command"));
    };
    let mut command = Command::new(program);
    if !spec.inherits {
        command.env_clear();
    }
    command.args(args).envs(&spec.env).env(MARKER, &spec.marker).current_dir(&spec.cwd);
    command.stdin(Stdio::null()).stdout(stdout).stderr(log).process_group(0);
    if let Some((uid, gid)) = spec.user {
        become_user(&mut command, uid, gid);
    }
    command.spawn()
}

/// Gives the groups that a user is in; one that is not known has only `gid`.
pub(super) fn groups_of(uid: u32, gid: u32) -> Vec<Gid> {
    let known = nix::unistd::User::from_uid(Uid::from_raw(uid)).ok().flatten();
    let name = known.and_then(|user| std::ffi::CString::new(user.name).ok());
    let groups = name.and_then(|name| nix::unistd::getgrouplist(&name, Gid::from_raw(gid)).ok());
    groups.unwrap_or_else(|| vec![Gid::from_raw(gid)])
}

/// Has a command run as a user, with all the user's groups.
fn become_user(command: &mut Command, uid: u32, gid: u32) {
    let groups = groups_of(uid, gid);
    let change = move || {
        nix::unistd::setgroups(&groups)?;
        nix::unistd::setgid(Gid::from_raw(gid))?;
        nix::unistd::setuid(Uid::from_raw(uid))?;
        Ok(())
    };
    // SAFETY: between fork and exec this makes three system calls and allocates nothing; the list of groups was
    // made before.
    unsafe { command.pre_exec(change) };
}

/// Waits for the end, and brings it about when asked to. With a stop, the end is that of all processes, or of
/// the grace time: the command may be a shell that dies before the program that saves its state.
fn watch(task: &TaskDir, spec: &TaskSpec, family: &mut Family, mut child: Child) -> TaskExit {
    let birth = Birth::of(Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX)));
    if let Err(error) = disk::write_json(&task.birth_file(), &birth) {
        eprintln!("{error}; if this supervisor is lost, what is left of the task is found by its marker only");
    }
    family.born(birth);
    let (tell, ended) = mpsc::channel();
    let waiter = std::thread::Builder::new().name("waiter".to_owned()).spawn(move || {
        let _ = tell.send(exit_of(child.wait()));
    });
    if let Err(error) = waiter {
        return ended_now(TaskExit { error: Some(error.to_string()), ..TaskExit::default() });
    }
    let mut exit: Option<TaskExit> = None;
    let mut asked_at: Option<Instant> = None;
    let mut log = LogBound::default();
    loop {
        family.reap();
        if let Some(bytes_max) = spec.log_bytes_max {
            log.keep(&spec.log, bytes_max);
        }
        let grace = task.asked_to_stop();
        if grace.is_some() && asked_at.is_none() {
            family.signal(Signal::SIGTERM);
            asked_at = Some(Instant::now());
        }
        // A grace time beyond what can be counted never ends.
        let is_over = asked_at.zip(grace).is_some_and(|(at, grace)| at.elapsed() >= grace);
        match &exit {
            Some(exit) if asked_at.is_none() => return exit.clone(),
            Some(exit) if is_over || family.left().is_ok_and(|left| left.is_empty()) => {
                return TaskExit { stopped: true, ..exit.clone() };
            }
            None if is_over => {
                let _ = family.kill(Duration::ZERO);
            }
            _ => {}
        }
        match ended.recv_timeout(if asked_at.is_some() { LOOK_INTERVAL } else { IDLE_INTERVAL }) {
            Ok(told) => exit = Some(told),
            Err(RecvTimeoutError::Timeout) => {}
            // It has told all it had to tell.
            Err(RecvTimeoutError::Disconnected) if exit.is_some() => std::thread::sleep(LOOK_INTERVAL),
            Err(RecvTimeoutError::Disconnected) => exit = Some(ended_now(TaskExit::default())),
        }
    }
}

fn exit_of(told: std::io::Result<ExitStatus>) -> TaskExit {
    ended_now(match told {
        Ok(status) => TaskExit { code: status.code(), signal: status.signal(), ..TaskExit::default() },
        Err(error) => TaskExit { error: Some(error.to_string()), ..TaskExit::default() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_user_has_all_groups_and_an_unknown_one_has_its_own() {
        let told = Command::new("id").args(["-G", "root"]).output().expect("runs id");
        let mut wanted: Vec<u32> =
            String::from_utf8_lossy(&told.stdout).split_whitespace().filter_map(|group| group.parse().ok()).collect();
        let mut groups: Vec<u32> = groups_of(0, 0).into_iter().map(Gid::as_raw).collect();
        wanted.sort_unstable();
        groups.sort_unstable();
        assert_eq!(groups, wanted);
        assert_eq!(groups_of(4_000_000_001, 77), [Gid::from_raw(77)]);
    }
}
