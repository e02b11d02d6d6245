//! What happens to jobs that have GPUs, or outputs to store: from what their tasks say to the next record.
//!
//! Each step may be done again: a scheduler that was killed in the middle looks at the records and the
//! tasks, and goes on. `docs/formats/scheduler.md` has the order of writes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use uuid::Uuid;

use super::core::{Core, now_ms};
use super::disk::DiskError;
use super::job::{ATTEMPTS_MAX, Hold, JobRecord, LOST_MAX, OutputCommit, State, Stop};
use super::lake_side::NewCommit;
use super::mounts::{MountPlace, MountSight};
use super::snapshot::user_of;
use super::store::MountOf;
use super::task::{EndError, Sight, TaskDir, TaskExit, TaskSpec};
use crate::quota::Kind;

/// How often storing an output is tried. A job whose outputs wait holds no GPU, and what it made can't be
/// made again for nothing: with the pauses below, this is a week.
const PUSH_TRIES_MAX: u32 = 1024;
/// After how much time it is tried again, at first and at most.
const PUSH_PAUSE_MS: i64 = 1000;
const PUSH_PAUSE_MS_MAX: i64 = 600_000;
/// Tasks of tries that failed which are kept, so that somebody can look at them.
const PUSH_TASKS_KEPT: u32 = 8;
/// The exit status of a push that was given a wrong command line, or whose user may not push: trying again changes
/// nothing.
pub(super) const PUSH_USAGE: i32 = 2;
/// Names of what a commit does not have that a record remembers.
const LEFT_OUT_MAX: usize = 20;
/// Supervisors in a row that may end before they begin, and the time before the next one, at first.
const STILLBORN_MAX: u32 = 6;
const STILLBORN_PAUSE_MS: i64 = 200;
/// An attempt that ran so long forgives the losses before it.
const LOST_RESET_MS: i64 = 3_600_000;
/// Tasks that are closed at the same time.
const CLOSINGS_MAX: usize = 16;
/// After how much time a job that could not start is looked at again, at first and at most.
const HOLD_MS: i64 = 10_000;
const HOLD_MS_MAX: i64 = 600_000;

impl Core {
    /// Looks at all jobs to which something may have happened, and takes the next step of each.
    pub(super) fn progress(&mut self) {
        let active: Vec<Uuid> = self.jobs.values().filter(|job| self.may_have_moved(job)).map(|job| job.id).collect();
        self.touched.clear();
        for id in active {
            if let Err(error) = self.step(&id) {
                // The next turn tries again.
                tracing::error!(job = %id, error = &error as &dyn std::error::Error, "a job's next step failed");
            }
        }
    }

    /// Says whether a job is to be looked at now. Of one that simply runs the kernel tells when a task ends; it
    /// is looked at now and then all the same, for nobody tells that a supervisor was killed.
    fn may_have_moved(&self, job: &JobRecord) -> bool {
        match job.state {
            State::Running if !job.is_being_stored() => {
                self.look_at_all || self.touched.contains(&job.id) || !self.watch.has(&job.id)
            }
            _ => Self::is_moving(job),
        }
    }

    /// Says whether something happens to a job that nobody tells: it is looked at in each turn.
    pub(super) fn is_moving(job: &JobRecord) -> bool {
        let moves = matches!(job.state, State::Starting | State::Stopping { .. } | State::Completing { .. });
        moves || job.is_being_stored()
    }

    fn step(&mut self, id: &Uuid) -> Result<(), DiskError> {
        let Some(job) = self.jobs.get(id).cloned() else {
            return Ok(());
        };
        if !matches!(job.state, State::Completing { stop: Some(_) }) {
            self.store_snapshot(&job)?;
        }
        let Some(job) = self.jobs.get(id).cloned() else {
            return Ok(());
        };
        match &job.state {
            State::Starting => self.start(&job),
            State::Running => self.watch(&job),
            State::Stopping { stop, since_ms } => self.stop(&job, stop, *since_ms),
            State::Completing { stop: None } => self.complete(&job),
            State::Completing { stop: Some(stop) } => self.leave_outputs(&job, stop),
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
        if self.executor(job).is_none() {
            let why = "the scheduler has no container engine now (see `larder scheduler run --engine`)".to_owned();
            return self.begin_stop(&job.id, Stop::Unready { why });
        }
        let asker = (job.id, job.attempt().map_or(0, |attempt| attempt.number));
        for (dataset, revision, commit) in job.reads() {
            let of = MountOf::job(job, commit);
            let place = MountPlace { dir: self.store.mount(&of), user: user_of(job) };
            match self.mounts.want(dataset, &of, place, asker) {
                MountSight::Ready => {}
                MountSight::Wait => return Ok(()),
                MountSight::Unready(why) => {
                    let why = format!("{revision} can't be mounted now: {why}");
                    return self.begin_stop(&job.id, Stop::Unready { why });
                }
                MountSight::Failed(why) => {
                    let why = format!("{revision} can't be mounted: {why}");
                    return self.begin_stop(&job.id, Stop::Failed { why });
                }
            }
        }
        if self.restore(job)?.is_none() {
            return Ok(());
        }
        match self.paths.want(job, &self.options.host_paths) {
            Some(Ok(())) => {}
            Some(Err(why)) => return self.begin_stop(&job.id, Stop::Failed { why }),
            None => return Ok(()),
        }
        self.spawn_ranks(job)
    }

    /// Starts the supervisors that are missing; Running when all ranks have begun.
    fn spawn_ranks(&mut self, job: &JobRecord) -> Result<(), DiskError> {
        let sights = self.sights(job)?;
        let tasks = self.tasks(job);
        for (rank, (task, sight)) in (0u32..).zip(tasks.iter().zip(&sights)) {
            if *sight != Sight::Fresh {
                continue;
            }
            if self.is_stillborn(task) {
                let log = std::fs::read_to_string(task.path().join("supervisor.log")).unwrap_or_default();
                let why = format!("its supervisor ended {STILLBORN_MAX} times before it began: {}", last_line(&log));
                return self.begin_stop(&job.id, Stop::Failed { why });
            }
            if let Err(error) = self.spawn_rank(job, rank, task) {
                // Not its own fault: a full disk, a limit, a program that is just being replaced.
                let cause = std::error::Error::source(&error).map_or(String::new(), |cause| format!(": {cause}"));
                return self.begin_stop(&job.id, Stop::Unready { why: format!("{error}{cause}") });
            }
        }
        let begun = |sight: &Sight| !matches!(sight, Sight::Fresh | Sight::Alive { started: false });
        if !sights.is_empty() && sights.iter().all(begun) {
            self.stillborn.retain(|task, _| !tasks.contains(task));
            self.change(&job.id, |job| {
                job.state = State::Running;
                job.holds = 0;
            })?;
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
        let Some(executor) = self.executor(job) else {
            return Ok(());
        };
        launch.lay_out()?;
        let spec = TaskSpec { log_bytes_max: Some(self.options.log_bytes_max), ..executor.task(&launch)? };
        self.forget_old_attempts(job)?;
        self.supervise(task, &spec)
    }

    /// Removes the tasks of attempts that the record has forgotten.
    fn forget_old_attempts(&self, job: &JobRecord) -> Result<(), DiskError> {
        let place = self.store.job(&job.id);
        let number = job.attempt().map_or(0, |attempt| attempt.number);
        match number.checked_sub(u32::try_from(ATTEMPTS_MAX).unwrap_or(u32::MAX)) {
            Some(old) if place.attempt(old).exists() => self.store.throw_away(&place.attempt(old)),
            _ => Ok(()),
        }
    }

    /// Says whether no further supervisor is started for a task.
    pub(super) fn is_stillborn(&self, task: &TaskDir) -> bool {
        let ended = !self.supervisors.contains_key(task);
        ended && self.stillborn.get(task).is_some_and(|(count, _)| *count >= STILLBORN_MAX)
    }

    pub(super) fn supervise(&mut self, task: &TaskDir, spec: &TaskSpec) -> Result<(), DiskError> {
        let (count, at_ms) = self.stillborn.get(task).copied().unwrap_or_default();
        let now_ms = now_ms();
        if now_ms < at_ms {
            return Ok(());
        }
        let pause = STILLBORN_PAUSE_MS.saturating_mul(1 << count.min(16));
        self.stillborn.insert(task.clone(), (count.saturating_add(1), now_ms.saturating_add(pause)));
        task.prepare(spec)?;
        crate::crash::point("before supervisor");
        let child = task.spawn(&self.options.exe)?;
        crate::crash::point("after supervisor");
        self.supervisors.insert(task.clone(), child);
        Ok(())
    }

    pub(super) fn begin_stop(&mut self, id: &Uuid, stop: Stop) -> Result<(), DiskError> {
        self.change(id, |job| job.stop(stop, now_ms()))
    }

    /// Closes a task that nobody supervises, on a thread where something of it may be left; None as long as
    /// that lasts.
    pub(super) fn close(&mut self, task: &TaskDir, sight: &Sight) -> Result<Option<TaskExit>, DiskError> {
        if *sight == Sight::Fresh {
            return match task.close(now_ms()) {
                Ok(exit) => Ok(exit),
                Err(EndError::Disk(error)) => Err(error),
                Err(error) => {
                    tracing::error!(%error, "a task that never started can't be closed yet");
                    Ok(None)
                }
            };
        }
        if self.closings.contains_key(task) || self.closings.len() >= CLOSINGS_MAX {
            return Ok(None);
        }
        let closed = task.clone();
        let begun = std::thread::Builder::new().name("closing".to_owned()).spawn(move || {
            if let Err(error) = closed.close(now_ms()) {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, task = %closed.path().display(), "what is left of a task can't be ended yet");
            }
        });
        let begun = begun.map_err(super::disk::at(task.path(), "start a thread that closes"))?;
        self.closings.insert(task.clone(), begun);
        Ok(None)
    }

    /// Looks whether a running job ended, failed, was lost or has run too long.
    fn watch(&mut self, job: &JobRecord) -> Result<(), DiskError> {
        if !self.watch.has(&job.id) {
            // Before the look: what happens later is told.
            let tasks = self.tasks(job);
            self.watch.add(job.id, &tasks);
        }
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

    /// Gives the image that the containers of the present attempt have, as far as that is known.
    fn image_of(&self, job: &JobRecord) -> Option<String> {
        let named = job.spec.image.as_ref()?;
        let found = self.tasks(job).first()?.image()?;
        let (name, _) = named.split_once('@').unwrap_or((named, ""));
        Some(format!("{name}@{}", found.digest))
    }

    fn succeed(&mut self, job: &JobRecord, exits: Vec<TaskExit>) -> Result<(), DiskError> {
        let image = self.image_of(job);
        self.change(&job.id, |job| {
            end_attempt(job, exits, None);
            set_image(job, image);
            if job.spec.outputs.is_empty() {
                job.state = State::Succeeded;
                job.ended_ms = Some(now_ms());
            } else {
                job.state = State::Completing { stop: None };
            }
        })
    }

    /// Asks all ranks to end; when they have, the job goes where it was stopped for.
    fn stop(&mut self, job: &JobRecord, stop: &Stop, since_ms: i64) -> Result<(), DiskError> {
        let grace = Duration::from_millis(job.spec.grace_ms);
        let mut ended = Vec::new();
        for task in self.tasks(job) {
            let sight = task.look()?;
            match sight {
                Sight::Ended(exit) => ended.push(Some(exit)),
                Sight::Alive { .. } => {
                    task.ask_to_stop(grace)?;
                    ended.push(None);
                }
                Sight::Fresh | Sight::Lost => ended.push(self.close(&task, &sight)?),
            }
        }
        let Some(exits) = ended.into_iter().collect::<Option<Vec<TaskExit>>>() else {
            return Ok(());
        };
        // It came to its end before it heard that it should stop.
        let ended_well = !exits.is_empty() && exits.iter().all(|exit| exit.succeeded() && !exit.stopped);
        let tasks = self.tasks(job);
        self.stillborn.retain(|task, _| !tasks.contains(task));
        if ended_well && matches!(stop, Stop::Preempted { .. } | Stop::NodeGone { .. }) {
            return self.succeed(job, exits);
        }
        if *stop == Stop::Deleted {
            return match job.is_being_stored() {
                true => self.change(&job.id, |job| job.state = State::Completing { stop: Some(Stop::Deleted) }),
                false => self.forget(&job.id),
            };
        }
        let failed = own_failure(stop, &exits, since_ms);
        let (stop, image) = (stop.clone(), self.image_of(job));
        self.change(&job.id, |job| {
            set_image(job, image);
            stopped(job, stop, exits, failed);
        })
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
        let Some(exit) = self.run_push(&task, |core| core.push_task(job, number, &task))? else {
            return Ok(());
        };
        if let Some(old) = job.push_tries.checked_sub(PUSH_TASKS_KEPT) {
            self.store.throw_away(self.store.job(&job.id).push(old, number).path())?;
        }
        if let Some(commit) = commit_of(&task, &exit) {
            let (dataset, path) = (output.dataset.clone(), output.path.clone());
            let left_out = left_out_of(&task);
            return self.change(&job.id, |job| {
                job.outputs.push(OutputCommit { dataset, path, commit, left_out });
                job.push_tries = 0;
            });
        }
        let pause = PUSH_PAUSE_MS.saturating_mul(1 << job.push_tries.min(16)).min(PUSH_PAUSE_MS_MAX);
        let is_hopeless = exit.code == Some(PUSH_USAGE) && !exit.lost;
        if !is_hopeless && job.push_tries + 1 < PUSH_TRIES_MAX {
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

    /// Starts a task that pushes, or closes one that was lost; gives how it ended, when it has.
    pub(super) fn run_push(
        &mut self,
        task: &TaskDir,
        spec: impl FnOnce(&Self) -> Result<TaskSpec, DiskError>,
    ) -> Result<Option<TaskExit>, DiskError> {
        let sight = task.look()?;
        match sight {
            Sight::Alive { .. } => {}
            Sight::Fresh if self.supervisors.contains_key(task) => {}
            Sight::Fresh if !self.is_stillborn(task) => {
                let spec = spec(self)?;
                self.supervise(task, &spec)?;
            }
            // Counts as a try that failed.
            Sight::Fresh | Sight::Lost => drop(self.close(task, &sight)?),
            Sight::Ended(exit) => {
                self.stillborn.remove(task);
                return Ok(Some(exit));
            }
        }
        Ok(None)
    }

    /// Ends what stores the outputs of a job that was cancelled or deleted, then does that.
    fn leave_outputs(&mut self, job: &JobRecord, stop: &Stop) -> Result<(), DiskError> {
        for number in 0..job.spec.outputs.len() {
            let task = self.store.job(&job.id).push(job.push_tries, number);
            if !task.path().exists() {
                continue;
            }
            let sight = task.look()?;
            match sight {
                Sight::Ended(_) => {}
                Sight::Alive { .. } => return task.ask_to_stop(Duration::ZERO),
                Sight::Fresh | Sight::Lost => {
                    if self.close(&task, &sight)?.is_none() {
                        return Ok(());
                    }
                }
            }
        }
        if *stop == Stop::Deleted {
            return if self.leave_snapshot(job)? { self.forget(&job.id) } else { Ok(()) };
        }
        self.change(&job.id, |job| {
            job.state = State::Cancelled;
            job.ended_ms = Some(now_ms());
        })
    }

    fn push_task(&self, job: &JobRecord, number: usize, task: &TaskDir) -> Result<TaskSpec, DiskError> {
        let dataset = job.spec.outputs.get(number).map_or_else(String::new, |output| output.dataset.clone());
        let commit = NewCommit {
            dir: self.store.job(&job.id).output(&dataset),
            message: format!("Output of job {}/{}", job.project, job.name),
            dataset,
            ..self.commit_by(job, task)?
        };
        let marker = format!("{}.push.{}.{number}", job.id, job.push_tries);
        Ok(self.pushing(&commit, marker, task))
    }

    /// Gives what all commits by a job have in common; writes the metadata down.
    pub(super) fn commit_by(&self, job: &JobRecord, task: &TaskDir) -> Result<NewCommit, DiskError> {
        let mut meta = std::collections::BTreeMap::from([
            ("job".to_owned(), format!("{}/{}", job.project, job.name)),
            ("command".to_owned(), serde_json::to_string(&job.spec.command).unwrap_or_default()),
        ]);
        if !job.spec.env.is_empty() {
            meta.insert("environment".to_owned(), serde_json::to_string(&job.spec.env).unwrap_or_default());
        }
        let meta_file = task.path().join("meta.json");
        super::disk::make_dir(task.path(), 0o700)?;
        super::disk::write_json(&meta_file, &meta)?;
        let image = job.attempts.iter().rev().find_map(|attempt| attempt.image.clone());
        let mut inputs: Vec<String> =
            job.spec.datasets.iter().map(|data| format!("{}@{}", data.dataset, data.commit)).collect();
        inputs.extend(job.spec.restore.iter().map(|from| format!("{}@{}", from.dataset, from.commit)));
        Ok(NewCommit {
            dir: self.store.dir().to_owned(),
            dataset: String::new(),
            message: String::new(),
            meta_file,
            inputs,
            job: job.id.to_string(),
            image: image.or_else(|| self.image_of(job)).or_else(|| job.spec.image.clone()),
            code: job.spec.code.clone(),
            user: user_of(job),
        })
    }

    /// Gives the task that makes a commit.
    pub(super) fn pushing(&self, commit: &NewCommit, marker: String, task: &TaskDir) -> TaskSpec {
        let argv = self.lake.push(commit);
        TaskSpec {
            marker,
            argv,
            env: BTreeMap::new(),
            inherits: true,
            cwd: self.store.dir().to_owned(),
            user: None,
            log: task.path().join("log"),
            stdout: Some(task.path().join("stdout")),
            kill: Vec::new(),
            left: Vec::new(),
            image: None,
            log_bytes_max: None,
        }
    }

    /// Gives the mounts that jobs with GPUs read.
    pub(super) fn mounts_in_use(&self) -> BTreeSet<MountOf> {
        let using = self.jobs.values().filter(|job| job.state.has_gpus());
        let read = using.flat_map(|job| job.reads().into_iter().map(move |(_, _, commit)| MountOf::job(job, commit)));
        // What is being copied in is read on, also by a job that was put back.
        let copied = self.restorings.iter().filter(|(_, copying)| !copying.is_finished());
        let copied = copied.filter_map(|(id, _)| self.jobs.get(id));
        let copied = copied.filter_map(|job| Some(MountOf::job(job, &job.spec.restore.as_ref()?.commit)));
        // What an earlier scheduler mounted for everybody stays as long as somebody may read it.
        read.chain(copied).flat_map(|of| [MountOf { uid: None, commit: of.commit.clone() }, of]).collect()
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

fn set_image(job: &mut JobRecord, image: Option<String>) {
    if let Some(attempt) = job.attempts.last_mut() {
        attempt.image = image;
    }
}

/// Gives what a push printed.
fn told_by(task: &TaskDir) -> Option<serde_json::Value> {
    serde_json::from_slice(&std::fs::read(task.path().join("stdout")).ok()?).ok()
}

/// Gives the commit that a push printed.
pub(super) fn commit_of(task: &TaskDir, exit: &TaskExit) -> Option<String> {
    told_by(task).filter(|_| exit.succeeded())?.get("commit")?.as_str().map(str::to_owned)
}

/// Gives the first names that a push left out.
fn left_out_of(task: &TaskDir) -> Vec<String> {
    let told = told_by(task).unwrap_or_default();
    let skipped = told.get("skipped").and_then(serde_json::Value::as_array);
    let names = skipped.into_iter().flatten().filter_map(|problem| problem.get("path")?.as_str());
    names.take(LEFT_OUT_MAX).map(str::to_owned).collect()
}

/// Says what failed by itself in a job that was stopped. What ended badly after the others were told to stop
/// lost its peers, and after one was lost nobody can tell.
fn own_failure(stop: &Stop, exits: &[TaskExit], since_ms: i64) -> Option<String> {
    if *stop == Stop::Lost {
        return None;
    }
    let is_own = |exit: &&TaskExit| {
        !exit.stopped && !exit.lost && !exit.succeeded() && (exit.ended_ms < since_ms || exit.error.is_some())
    };
    exits.iter().find(is_own).map(ToString::to_string)
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
        (Stop::Unready { why }, _) => {
            let hold_ms = HOLD_MS.saturating_mul(1 << job.holds.min(16)).min(HOLD_MS_MAX);
            job.holds = job.holds.saturating_add(1);
            job.hold = Some(Hold { until_ms: now_ms().saturating_add(hold_ms), why });
            job.state = State::Pending;
        }
        (Stop::Preempted { .. } | Stop::NodeGone { .. } | Stop::Lost, Some(why)) => over(job, State::Failed { why }),
        (Stop::Preempted { .. } | Stop::NodeGone { .. }, None) => {
            job.pauses += 1;
            job.state = State::Pending;
        }
        (Stop::Lost, None) => {
            // What ran for long is not what loses its processes.
            let ran_ms = job.attempt().map_or(0, |attempt| now_ms() - attempt.begun_ms);
            job.losses = if ran_ms > LOST_RESET_MS { 1 } else { job.losses + 1 };
            let why =
                "its processes were lost again and again: the machine went down, or somebody killed their supervisors";
            match job.losses > LOST_MAX {
                true => over(job, State::Failed { why: why.to_owned() }),
                false => job.state = State::Pending,
            }
        }
    }
}

pub(super) fn last_line(text: &str) -> &str {
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: i32, ended_ms: i64) -> TaskExit {
        TaskExit { code: Some(code), ended_ms, ..TaskExit::default() }
    }

    #[test]
    fn a_rank_that_fails_because_its_peers_were_told_to_stop_does_not_fail_the_job() {
        let preempted = Stop::Preempted { why: "paused for another".to_owned() };
        let asked = TaskExit { stopped: true, ..exit(143, 1010) };
        let lost_its_peer = exit(1, 1020);
        assert_eq!(own_failure(&preempted, &[asked.clone(), lost_its_peer], 1000), None);
        assert!(own_failure(&preempted, &[asked, exit(1, 990)], 1000).is_some(), "it failed before that");
        assert_eq!(own_failure(&Stop::Lost, &[exit(1, 990)], 1000), None, "nobody can tell why");
    }
}
