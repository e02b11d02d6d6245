//! What happens to jobs that have GPUs, or outputs to store: from what their tasks say to the next record.
//!
//! Each step may be done again: a scheduler that was killed in the middle looks at the records and the
//! tasks, and goes on. `docs/formats/scheduler.md` has the order of writes.

use std::collections::BTreeSet;
use std::time::Duration;

use uuid::Uuid;

use super::core::{Core, now_ms};
use super::disk::DiskError;
use super::job::{JobRecord, LOST_MAX, OutputCommit, State, Stop};
use super::lake_side::NewCommit;
use super::mounts::MountSight;
use super::task::{Sight, TaskDir, TaskExit, TaskSpec};
use crate::quota::Kind;

/// How often storing an output is tried.
const PUSH_TRIES_MAX: u32 = 6;
/// After how much time it is tried again, at first.
const PUSH_PAUSE_MS: i64 = 1000;

impl Core {
    /// Looks at all jobs to which something may have happened, and takes the next step of each.
    pub(super) fn progress(&mut self) {
        let is_active = |job: &&JobRecord| job.state.has_gpus() || job.state == State::Completing;
        let active: Vec<Uuid> = self.jobs.values().filter(is_active).map(|job| job.id).collect();
        for id in active {
            if let Err(error) = self.step(&id) {
                // The next turn tries again.
                tracing::error!(job = %id, error = &error as &dyn std::error::Error, "a job's next step failed");
            }
        }
    }

    fn step(&mut self, id: &Uuid) -> Result<(), DiskError> {
        let Some(job) = self.jobs.get(id).cloned() else {
            return Ok(());
        };
        match &job.state {
            State::Starting => self.start(&job),
            State::Running => self.watch(&job),
            State::Stopping { stop } => self.stop(&job, stop),
            State::Completing => self.complete(&job),
            State::Pending | State::Succeeded | State::Failed { .. } | State::Cancelled => Ok(()),
        }
    }

    fn tasks(&self, job: &JobRecord) -> Vec<TaskDir> {
        let place = self.store.job(&job.id);
        let Some(attempt) = job.attempt() else {
            return Vec::new();
        };
        let ranks = 0..u32::try_from(attempt.placement.seats.len()).unwrap_or(u32::MAX);
        ranks.map(|rank| place.task(attempt.number, rank)).collect()
    }

    fn sights(&self, job: &JobRecord) -> Result<Vec<Sight>, DiskError> {
        self.tasks(job).iter().map(TaskDir::look).collect()
    }

    /// Mounts, lays out, starts supervisors; Running when all ranks have begun.
    fn start(&mut self, job: &JobRecord) -> Result<(), DiskError> {
        for data in &job.spec.datasets {
            let dir = self.store.mount(&data.commit);
            match self.mounts.want(&data.dataset, &data.commit, dir) {
                MountSight::Ready => {}
                MountSight::Wait => return Ok(()),
                MountSight::Failed(why) => {
                    let why = format!("{} can't be mounted: {why}", data.revision);
                    return self.begin_stop(&job.id, Stop::Failed { why });
                }
            }
        }
        let sights = self.sights(job)?;
        let tasks = self.tasks(job);
        for (rank, (task, sight)) in (0u32..).zip(tasks.iter().zip(&sights)) {
            if *sight == Sight::Fresh
                && let Err(error) = self.spawn_rank(job, rank, task)
            {
                // Not its own fault perhaps, but holding GPUs until somebody looks helps nobody.
                let cause = std::error::Error::source(&error).map_or(String::new(), |cause| format!(": {cause}"));
                return self.begin_stop(&job.id, Stop::Failed { why: format!("{error}{cause}") });
            }
        }
        let begun = |sight: &Sight| !matches!(sight, Sight::Fresh | Sight::Alive { started: false });
        if !sights.is_empty() && sights.iter().all(begun) {
            self.change(&job.id, |job| job.state = State::Running)?;
        }
        Ok(())
    }

    fn spawn_rank(&mut self, job: &JobRecord, rank: u32, task: &TaskDir) -> Result<(), DiskError> {
        if self.supervisors.contains_key(task) {
            return Ok(());
        }
        let Some(launch) = self.launch(job, rank) else {
            return Ok(());
        };
        launch.lay_out()?;
        let spec = self.executor(job).task(&launch);
        self.supervise(task, &spec)
    }

    fn supervise(&mut self, task: &TaskDir, spec: &TaskSpec) -> Result<(), DiskError> {
        task.prepare(spec)?;
        let child = task.spawn(&self.options.exe)?;
        self.supervisors.insert(task.clone(), child);
        Ok(())
    }

    fn begin_stop(&mut self, id: &Uuid, stop: Stop) -> Result<(), DiskError> {
        self.change(id, |job| job.state = State::Stopping { stop })
    }

    /// Looks whether a running job ended, failed, was lost or has run too long.
    fn watch(&mut self, job: &JobRecord) -> Result<(), DiskError> {
        let sights = self.sights(job)?;
        if sights.iter().any(|sight| matches!(sight, Sight::Lost | Sight::Fresh)) {
            return self.begin_stop(&job.id, Stop::Lost);
        }
        for (rank, sight) in sights.iter().enumerate() {
            match sight {
                Sight::Ended(exit) if exit.lost => return self.begin_stop(&job.id, Stop::Lost),
                Sight::Ended(exit) if !exit.succeeded() => {
                    let why = if sights.len() > 1 { format!("rank {rank}: {exit}") } else { exit.to_string() };
                    return self.begin_stop(&job.id, Stop::Failed { why });
                }
                _ => {}
            }
        }
        if sights.iter().all(|sight| matches!(sight, Sight::Ended(_))) {
            return self.succeed(job, exits(sights));
        }
        match self.time_limit(job) {
            Some(limit_ms) if now_ms() - begun_ms(job) > i64::try_from(limit_ms).unwrap_or(i64::MAX) => {
                let limit = humantime::format_duration(Duration::from_millis(limit_ms));
                self.begin_stop(&job.id, Stop::Failed { why: format!("it ran longer than {limit}") })
            }
            _ => Ok(()),
        }
    }

    fn time_limit(&self, job: &JobRecord) -> Option<u64> {
        let project = self.cluster.projects.get(&job.project);
        let interactive = project.and_then(|project| project.interactive_limit_ms);
        let interactive = interactive.filter(|_| job.spec.kind == Kind::Interactive);
        [job.spec.max_runtime_ms, interactive].into_iter().flatten().min()
    }

    fn succeed(&mut self, job: &JobRecord, exits: Vec<TaskExit>) -> Result<(), DiskError> {
        self.change(&job.id, |job| {
            end_attempt(job, exits, None);
            if job.spec.outputs.is_empty() {
                job.state = State::Succeeded;
                job.ended_ms = Some(now_ms());
            } else {
                job.state = State::Completing;
            }
        })
    }

    /// Asks all ranks to end; when they have, the job goes where it was stopped for.
    fn stop(&mut self, job: &JobRecord, stop: &Stop) -> Result<(), DiskError> {
        let grace = Duration::from_millis(job.spec.grace_ms);
        let mut ended = Vec::new();
        for task in self.tasks(job) {
            match task.look()? {
                Sight::Ended(exit) => ended.push(Some(exit)),
                Sight::Alive { .. } => {
                    task.ask_to_stop(grace)?;
                    ended.push(None);
                }
                Sight::Fresh | Sight::Lost => ended.push(task.close(now_ms())?),
            }
        }
        let Some(exits) = ended.into_iter().collect::<Option<Vec<TaskExit>>>() else {
            return Ok(());
        };
        // It came to its end before it heard that it should stop.
        let ended_well = !exits.is_empty() && exits.iter().all(|exit| exit.succeeded() && !exit.stopped);
        if ended_well && matches!(stop, Stop::Preempted { .. } | Stop::NodeGone { .. }) {
            return self.succeed(job, exits);
        }
        if *stop == Stop::Deleted {
            self.forget(&job.id);
            return Ok(());
        }
        let failed =
            exits.iter().find(|exit| !exit.stopped && !exit.lost && !exit.succeeded()).map(ToString::to_string);
        let stop = stop.clone();
        self.change(&job.id, |job| stopped(job, stop, exits, failed))
    }

    /// Stores the outputs, one after the other.
    fn complete(&mut self, job: &JobRecord) -> Result<(), DiskError> {
        let stored = |dataset: &str| job.outputs.iter().any(|output| output.dataset == dataset);
        let next = job.spec.outputs.iter().enumerate().find(|(_, output)| !stored(&output.dataset));
        let Some((number, output)) = next else {
            return self.change(&job.id, |job| {
                job.state = State::Succeeded;
                job.ended_ms = Some(now_ms());
            });
        };
        let task = self.store.job(&job.id).push(job.push_tries, number);
        let exit = match task.look()? {
            Sight::Alive { .. } => return Ok(()),
            Sight::Fresh if self.supervisors.contains_key(&task) => return Ok(()),
            Sight::Fresh => {
                let spec = self.push_task(job, number, &task);
                return self.supervise(&task, &spec);
            }
            Sight::Lost => match task.close(now_ms())? {
                Some(exit) => exit,
                None => return Ok(()),
            },
            Sight::Ended(exit) => exit,
        };
        let printed = std::fs::read(task.path().join("stdout")).unwrap_or_default();
        let told: Option<serde_json::Value> = serde_json::from_slice(&printed).ok().filter(|_| exit.succeeded());
        let commit = told.as_ref().and_then(|told| told.get("commit")?.as_str()).map(str::to_owned);
        if let Some(commit) = commit {
            let (dataset, path) = (output.dataset.clone(), output.path.clone());
            return self.change(&job.id, |job| job.outputs.push(OutputCommit { dataset, path, commit }));
        }
        let pause = PUSH_PAUSE_MS.saturating_mul(1 << job.push_tries.min(16));
        if job.push_tries + 1 < PUSH_TRIES_MAX {
            if now_ms() - exit.ended_ms < pause {
                return Ok(());
            }
            return self.change(&job.id, |job| job.push_tries += 1);
        }
        let log = std::fs::read_to_string(task.path().join("log")).unwrap_or_default();
        let why = format!("its output {} could not be stored: {exit}: {}", output.dataset, last_line(&log));
        self.change(&job.id, |job| {
            job.state = State::Failed { why };
            job.ended_ms = Some(now_ms());
        })
    }

    fn push_task(&self, job: &JobRecord, number: usize, task: &TaskDir) -> TaskSpec {
        let dataset = job.spec.outputs.get(number).map_or(String::new(), |output| output.dataset.clone());
        let mut meta = std::collections::BTreeMap::from([
            ("job".to_owned(), format!("{}/{}", job.project, job.name)),
            ("command".to_owned(), serde_json::to_string(&job.spec.command).unwrap_or_default()),
        ]);
        if !job.spec.env.is_empty() {
            meta.insert("environment".to_owned(), serde_json::to_string(&job.spec.env).unwrap_or_default());
        }
        let commit = NewCommit {
            dir: self.store.job(&job.id).output(&dataset),
            message: format!("Output of job {}/{}", job.project, job.name),
            meta,
            inputs: job.spec.datasets.iter().map(|data| format!("{}@{}", data.dataset, data.commit)).collect(),
            job: job.id.to_string(),
            image: job.spec.image.clone(),
            code: job.spec.code.clone(),
            dataset,
        };
        let (argv, env) = self.lake.push(&commit);
        TaskSpec {
            marker: format!("{}.push.{}.{number}", job.id, job.push_tries),
            argv,
            env,
            cwd: self.store.dir().to_owned(),
            user: None,
            log: task.path().join("log"),
            stdout: Some(task.path().join("stdout")),
            kill: Vec::new(),
        }
    }

    /// Gives the commits that jobs with GPUs read.
    pub(super) fn commits_in_use(&self) -> BTreeSet<String> {
        let using = self.jobs.values().filter(|job| job.state.has_gpus());
        using.flat_map(|job| &job.spec.datasets).map(|data| data.commit.clone()).collect()
    }
}

fn exits(sights: Vec<Sight>) -> Vec<TaskExit> {
    let exits = sights.into_iter().filter_map(|sight| match sight {
        Sight::Ended(exit) => Some(exit),
        _ => None,
    });
    exits.collect()
}

fn begun_ms(job: &JobRecord) -> i64 {
    job.attempt().map_or(i64::MAX, |attempt| attempt.begun_ms)
}

fn end_attempt(job: &mut JobRecord, exits: Vec<TaskExit>, stop: Option<Stop>) {
    if let Some(attempt) = job.attempts.last_mut() {
        attempt.ended_ms = Some(now_ms());
        (attempt.exits, attempt.stop) = (exits, stop);
    }
}

/// Puts a job that was stopped where it belongs now. `failed`: one of its ranks ended badly by itself.
fn stopped(job: &mut JobRecord, stop: Stop, exits: Vec<TaskExit>, failed: Option<String>) {
    end_attempt(job, exits, Some(stop.clone()));
    let over = |job: &mut JobRecord, state: State| {
        job.state = state;
        job.ended_ms = Some(now_ms());
    };
    match (stop, failed) {
        (Stop::Cancelled | Stop::Deleted, _) => over(job, State::Cancelled),
        (Stop::Failed { why }, _) => over(job, State::Failed { why }),
        (Stop::Preempted { .. } | Stop::NodeGone { .. } | Stop::Lost, Some(why)) => over(job, State::Failed { why }),
        (Stop::Preempted { .. } | Stop::NodeGone { .. }, None) => {
            job.pauses += 1;
            job.state = State::Pending;
        }
        (Stop::Lost, None) => {
            job.losses += 1;
            let why =
                "its processes were lost again and again: the machine went down, or somebody killed their supervisors";
            match job.losses > LOST_MAX {
                true => over(job, State::Failed { why: why.to_owned() }),
                false => job.state = State::Pending,
            }
        }
    }
}

fn last_line(text: &str) -> &str {
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default()
}
