//! The processes of a task: how they are found, and how they are ended.
//!
//! A process belongs to a task where one of these is so:
//!
//! * it has the task's marker in its environment;
//! * it is in the session and the group in which the command was started ([`Birth`]);
//! * it is below one of those, or below the supervisor, which is the subreaper of its task: who loses its
//!   parent becomes the supervisor's child.
//!
//! None of them is enough alone: programs overwrite their environment (titles of processes), clean it
//! (`env -i`, `sudo`), leave their group, and lose their supervisor.
//!
//! A daemon of this program, and its keeper, are left alone with all that is below them: they serve others too and
//! outlive who started them. They are known by the names that they give themselves ([`APART_NAMES`]): their
//! environment is closed to all but root. Before they have done that they are this very program with [`APART`] in
//! its environment; any other program with that belongs to its task.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::task::MARKER;

/// The variable with which a process is started that belongs to no task, whoever starts it.
pub const APART: &str = "LARDER_APART";
/// What such a process calls itself, as the kernel tells everybody: at most 15 bytes.
pub const APART_NAMES: [&str; 2] = ["larder-daemon", "larder-keeper"];
/// How often it is looked whether the killed have gone.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Where a task's command was started. Numbers of processes come again after a boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Birth {
    boot: String,
    session: i32,
    group: i32,
}

impl Birth {
    /// Describes a command that leads a group of its own in this process's session.
    pub(super) fn of(group: Pid) -> Self {
        let session = nix::unistd::getsid(None).map_or(0, Pid::as_raw);
        Self { boot: boot(), session, group: group.as_raw() }
    }
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// A process that lives, as the kernel tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    pid: i32,
    name: String,
    parent: i32,
    group: i32,
    session: i32,
}

impl Row {
    /// Reads `/proc/<pid>/stat`; None for a dead one. The name may have blanks and parentheses.
    fn parse(pid: i32, stat: &str) -> Option<Self> {
        let (named, rest) = stat.rsplit_once(')')?;
        let (_, name) = named.split_once('(')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<i32>().ok();
        let dead = matches!(fields.first(), Some(&("Z" | "X")));
        // A leader that has ended while its threads go on looks dead.
        if dead && number(17).is_none_or(|threads| threads < 2) {
            return None;
        }
        Some(Self { pid, name: name.to_owned(), parent: number(1)?, group: number(2)?, session: number(3)? })
    }

    fn is_apart(&self) -> bool {
        let is_named_so = APART_NAMES.contains(&self.name.as_str());
        is_named_so || (has_variable(self.pid, &format!("{APART}=1")) && is_this_program(self.pid))
    }
}

/// Lists the living processes. One that ends meanwhile is not there; a list that can't be had is an error:
/// it does not say that nobody is left.
fn table() -> io::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let stat = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
        rows.extend(Row::parse(pid, &String::from_utf8_lossy(&stat)));
    }
    Ok(rows)
}

/// Says whether a process was started with this variable. One that may not be looked at is not known by it.
fn has_variable(pid: i32, wanted: &str) -> bool {
    let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environ.split(|byte| *byte == 0).any(|pair| pair == wanted.as_bytes())
}

/// Says whether a process runs the same file as this one.
fn is_this_program(pid: i32) -> bool {
    let file = |pid: &str| fs::metadata(format!("/proc/{pid}/exe")).map(|meta| (meta.dev(), meta.ino())).ok();
    file("self").is_some_and(|own| file(&pid.to_string()) == Some(own))
}

/// The processes of one task.
#[derive(Debug, Clone)]
pub(super) struct Family {
    wanted: String,
    birth: Option<Birth>,
    /// This process, where it is the supervisor and the subreaper of this one task.
    supervisor: Option<Pid>,
}

impl Family {
    pub(super) fn new(marker: &str, birth: Option<Birth>, supervisor: Option<Pid>) -> Self {
        let birth = birth.filter(|birth| birth.boot == boot());
        Self { wanted: format!("{MARKER}={marker}"), birth, supervisor }
    }

    /// Remembers where the command was started.
    pub(super) fn born(&mut self, birth: Birth) {
        self.birth = Some(birth);
    }

    fn is_of_birth(&self, row: &Row) -> bool {
        self.birth.as_ref().is_some_and(|birth| (birth.session, birth.group) == (row.session, row.group))
    }

    /// Lists those that live.
    pub(super) fn left(&self) -> io::Result<Vec<Pid>> {
        let own = nix::unistd::getpid().as_raw();
        let rows: Vec<Row> = table()?.into_iter().filter(|row| row.pid != own).collect();
        let mut found: BTreeSet<i32> = BTreeSet::new();
        let mut apart: BTreeSet<i32> = BTreeSet::new();
        let below = self.supervisor.map(Pid::as_raw);
        loop {
            let before = found.len() + apart.len();
            for row in &rows {
                if found.contains(&row.pid) || apart.contains(&row.pid) || apart.contains(&row.parent) {
                    continue;
                }
                let inherits = found.contains(&row.parent) || below == Some(row.parent);
                // The environment of everybody is looked at once.
                let marked = || before == 0 && has_variable(row.pid, &self.wanted);
                if inherits || self.is_of_birth(row) || marked() {
                    if row.is_apart() {
                        apart.insert(row.pid)
                    } else {
                        found.insert(row.pid)
                    };
                }
            }
            if found.len() + apart.len() == before {
                return Ok(found.into_iter().map(Pid::from_raw).collect());
            }
        }
    }

    /// Sends a signal to the group of the command.
    pub(super) fn signal(&self, signal: Signal) {
        if let Some(birth) = &self.birth {
            let _ = killpg(Pid::from_raw(birth.group), signal);
        }
    }

    /// Kills all, again and again, and gives who is left after a while: one that waits for a device.
    pub(super) fn kill(&self, patience: Duration) -> io::Result<Vec<Pid>> {
        let begun = Instant::now();
        loop {
            self.reap();
            let left = self.left()?;
            for pid in &left {
                let _ = kill(*pid, Signal::SIGKILL);
            }
            if left.is_empty() || begun.elapsed() > patience {
                return Ok(left);
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Takes the dead that became the supervisor's children. The command itself is somebody else's to wait for.
    pub(super) fn reap(&self) {
        if self.supervisor.is_none() {
            return;
        }
        let command = self.birth.as_ref().map(|birth| birth.group);
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        while let Ok(status) = waitid(Id::All, flags)
            && let Some(pid) = status.pid().filter(|pid| Some(pid.as_raw()) != command)
        {
            if waitpid(pid, Some(WaitPidFlag::WNOHANG)).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_whatever_its_name_and_a_dead_one_is_none() {
        let stat = "7 (a) b (c) S 3 5 6 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 99";
        let named = |name: &str| Row { pid: 7, name: name.to_owned(), parent: 3, group: 5, session: 6 };
        assert_eq!(Row::parse(7, stat), Some(named("a) b (c")));
        assert_eq!(Row::parse(7, &stat.replace(") S", ") Z")), None);
        let threads = stat.replace(") S", ") Z").replace(" 20 0 1 ", " 20 0 4 ");
        assert!(Row::parse(7, &threads).is_some(), "its threads go on");
        assert_eq!(Row::parse(7, ""), None);
    }

    #[test]
    fn a_birth_of_another_boot_says_nothing() {
        let other = Birth { boot: "another".to_owned(), ..Birth::of(nix::unistd::getpgrp()) };
        let family = Family::new("nobody-has-this", Some(other), None);
        assert_eq!(family.left().expect("lists"), []);
    }

    #[test]
    fn only_what_calls_itself_a_daemon_is_left_alone_and_not_what_has_its_variable() {
        let dir = tempfile::tempdir().expect("a directory");
        let marker = uuid::Uuid::new_v4().to_string();
        let family = Family::new(&marker, None, None);
        for (name, is_left) in [("train", true), (APART_NAMES[0], false), (APART_NAMES[1], false)] {
            // A process is called as its file is.
            let program = dir.path().join(name);
            std::os::unix::fs::symlink("/bin/sleep", &program).expect("links");
            let mut command = std::process::Command::new(&program);
            command.arg("1000000").env(MARKER, &marker).env(APART, "1");
            let mut child = command.spawn().expect("starts");
            let found = family.left();
            let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
            child.kill().expect("kills");
            child.wait().expect("ends");
            assert_eq!(found.expect("lists").contains(&pid), is_left, "{name}");
        }
    }
}
