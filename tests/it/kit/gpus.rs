//! A scheduler with simulated GPUs in a world: started, killed, asked. When it is dropped, all tasks of its
//! jobs are ended and nothing of them is left.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use larder::scheduler::task::{Sight, TaskDir};
use serde_json::Value;

use super::{World, wait_for};

/// The scheduler of a world.
#[derive(Debug)]
pub struct Gpus {
    pub world: World,
    scheduler: Option<Child>,
    args: Vec<String>,
}

impl Gpus {
    /// Starts a scheduler that has nothing yet.
    pub fn new(world: World, args: &[&str]) -> Self {
        let mut gpus = Self { world, scheduler: None, args: args.iter().map(|arg| (*arg).to_owned()).collect() };
        gpus.start();
        gpus
    }

    /// Starts the scheduler and waits until it answers.
    pub fn start(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.world.path("scheduler.log"));
        let mut command = self.world.command(["scheduler", "run"]);
        command.args(&self.args).stdout(Stdio::null()).stderr(log.expect("opens the log"));
        // As services and hardened shells have it: what jobs have to reach is open all the same.
        let close = || {
            nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
            Ok(())
        };
        // SAFETY: one system call that may be made between fork and exec.
        unsafe { command.pre_exec(close) };
        self.scheduler = Some(command.spawn().expect("starts the scheduler"));
        wait_for("the scheduler", || self.world.run(["scheduler", "status"]).code == 0);
    }

    /// Kills the scheduler with SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut scheduler) = self.scheduler.take() {
            scheduler.kill().expect("kills the scheduler");
            scheduler.wait().expect("waits for its end");
        }
    }

    /// What the scheduler said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.world.path("scheduler.log")).unwrap_or_default()
    }

    /// Gives a job.
    #[track_caller]
    pub fn job(&self, project: &str, name: &str) -> Value {
        self.world.json(&["job", "describe", name, "-p", project])
    }

    /// Waits until a job has this status.
    #[track_caller]
    pub fn wait_status(&self, project: &str, name: &str, status: &str) {
        self.wait(&format!("{project}/{name} to be {status}"), |gpus| gpus.job(project, name)["status"] == status);
    }

    /// Waits until something is so; tells all jobs and the log where it is not within three minutes.
    #[track_caller]
    pub fn wait(&self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let begun = std::time::Instant::now();
        while !is_so(self) {
            if begun.elapsed() > Duration::from_secs(180) {
                let jobs = self.world.ok(["job", "list", "-A"]);
                panic!("{what}: not within three minutes\n{jobs}\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Gives where the scheduler keeps its things.
    pub fn dir(&self) -> PathBuf {
        let named = self.args.iter().skip_while(|arg| *arg != "--dir").nth(1);
        named.map_or_else(|| self.world.state().join("scheduler"), PathBuf::from)
    }

    /// Lists the tasks of all jobs that are known.
    fn tasks(&self) -> Vec<TaskDir> {
        let below = |dir: &Path| -> Vec<PathBuf> {
            fs::read_dir(dir)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.is_dir())
                .collect()
        };
        let jobs = below(&self.dir().join("jobs"));
        let attempts = jobs.iter().flat_map(|job| below(&job.join("attempts"))).flat_map(|attempt| below(&attempt));
        let pushes = jobs.iter().flat_map(|job| below(&job.join("push")));
        attempts.chain(pushes).map(|path| TaskDir::at(&path)).collect()
    }
}

impl Drop for Gpus {
    fn drop(&mut self) {
        self.kill();
        let tasks = self.tasks();
        for task in &tasks {
            let _ = task.ask_to_stop(Duration::ZERO);
        }
        for task in &tasks {
            // A supervisor that has just been started may not have its lock yet: closing keeps it out.
            for _ in 0..600 {
                match task.look() {
                    Ok(Sight::Alive { .. }) => std::thread::sleep(Duration::from_millis(50)),
                    Ok(Sight::Ended(_)) | Err(_) => break,
                    Ok(Sight::Fresh | Sight::Lost) => {
                        let _ = task.close(0);
                    }
                }
            }
        }
    }
}

/// Gives the pids of the living processes that have this variable with this value.
pub fn processes_with(name: &str, value: &str) -> Vec<i32> {
    let wanted = format!("{name}={value}");
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|byte| *byte == 0).any(|pair| pair == wanted.as_bytes())
    })
    .collect()
}

/// Gives the pid of the supervisor of a rank.
pub fn supervisor_of(task: &Path) -> Option<i32> {
    let pids =
        fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let task = task.to_str()?.as_bytes().to_vec();
    pids.into_iter().find(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let args: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        args.contains(&b"supervise".as_slice()) && args.contains(&task.as_slice())
    })
}
