//! The scheduler's state, and what may be asked of it.
//!
//! One thread owns it ([`super::service`]), so there is no lock. Each [turn](Core::turn) looks at the
//! tasks (`progress`), decides (`decide`), and carries out (`progress`, `mounts`). A record is on disk
//! before anything follows from it: where writing fails, memory stays as the disk is, and the next turn
//! tries again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::api::ExecRequest;
use super::cluster::Cluster;
use super::disk::DiskError;
use super::error::SchedulerError;
use super::executor::{Containers, ExecPlan, Executor, Launch, Processes};
use super::host_paths::HostPaths;
use super::job::{FORMAT, JobRecord, JobSpec, State, Stop, Submitter};
use super::lake_side::LakeSide;
use super::mounts::{MountEnd, Mounts};
use super::store::{Store, StoreError};
use super::task::TaskDir;
use super::view::{JobView, Look};
use super::watch::Watch;
use crate::crash;
use crate::quota::{JobId, ProjectShare, Why};

/// How often the tasks are looked at as long as something happens of which nobody tells.
const TURN_INTERVAL: Duration = Duration::from_millis(100);
/// How often all jobs that run are looked at, whoever tells what.
const LOOK_AT_ALL_INTERVAL: Duration = Duration::from_secs(5);
/// Jobs that are remembered at most, those that are over among them.
const JOBS_MAX: usize = 100_000;

/// How a scheduler is set up.
#[derive(Debug, Clone)]
pub struct Options {
    pub dir: PathBuf,
    /// This program, for supervisors.
    pub exe: PathBuf,
    /// The container engine, where there is one.
    pub containers: Option<Containers>,
    /// Paths of the machine that jobs may name; what lies below them too.
    pub host_paths: Vec<PathBuf>,
    /// Longest grace time that a job may ask for.
    pub grace_max: Duration,
    /// Brings a waiting job's commits near.
    pub warm: bool,
    /// How long a log may grow before its beginning is given up.
    pub log_bytes_max: u64,
    /// How long a job that is over is remembered; None: for ever.
    pub keep: Option<Duration>,
    /// Where CUDA's multi-process service has its pipes, if it runs.
    pub mps_pipes: PathBuf,
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
}

impl Caller {
    /// Says whether the caller may do everything: root, and who runs the scheduler.
    pub fn is_master(&self) -> bool {
        self.uid == 0 || self.uid == nix::unistd::geteuid().as_raw()
    }
}

/// Names a job: its project may be left out where the name is unlike any other's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub project: Option<String>,
    pub name: String,
}

/// What the last decision said of a job that waits, or that starts when others are gone.
#[derive(Debug, Clone)]
pub(super) enum Outlook {
    Waits(Why),
    After(Vec<JobId>),
}

/// The scheduler.
#[derive(Debug)]
pub struct Core {
    pub(super) options: Options,
    pub(super) store: Store,
    pub(super) cluster: Cluster,
    pub(super) jobs: BTreeMap<Uuid, JobRecord>,
    pub(super) lake: Arc<dyn LakeSide>,
    pub(super) mounts: Mounts,
    /// Supervisors that this process started, until they end.
    pub(super) supervisors: HashMap<TaskDir, Child>,
    pub(super) outlook: HashMap<JobId, Outlook>,
    pub(super) shares: Vec<ProjectShare>,
    /// Something changed since the last decision.
    pub(super) dirty: bool,
    pub(super) cycles: u64,
    pub(super) cycle_us: u64,
    /// When the first job that is held may be looked at again.
    pub(super) wake_ms: Option<i64>,
    /// Supervisors in a row that ended before they began, by task, and when the next one is started.
    pub(super) stillborn: HashMap<TaskDir, (u32, i64)>,
    /// Threads that end what lost its supervisor.
    pub(super) closings: HashMap<TaskDir, JoinHandle<()>>,
    /// Threads that copy the files of a job for a snapshot, and into a job that starts from one.
    pub(super) copies: HashMap<Uuid, JoinHandle<Result<(), DiskError>>>,
    pub(super) restorings: HashMap<Uuid, JoinHandle<Result<(), DiskError>>>,
    /// Where the paths lead that jobs name.
    pub(super) paths: HostPaths,
    /// Tells that a running job's task ended; those of which it told since the last turn.
    pub(super) watch: Watch,
    pub(super) touched: HashSet<Uuid>,
    /// This turn looks at all jobs that run.
    pub(super) look_at_all: bool,
    looked_at: Option<Instant>,
    next_seq: u64,
}

pub(super) fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

impl Core {
    /// Opens the directory and takes up what is in it.
    pub fn open(options: Options, lake: Arc<dyn LakeSide>, mount_ends: Sender<MountEnd>) -> Result<Self, StoreError> {
        let store = Store::open(&options.dir)?;
        let cluster = store.cluster()?;
        let jobs: BTreeMap<Uuid, JobRecord> = store.jobs()?.into_iter().map(|job| (job.id, job)).collect();
        jobs.values().try_for_each(|job| Self::clean_snapshots(&store, job))?;
        let next_seq = jobs.values().map(|job| job.seq + 1).max().unwrap_or(0);
        let mounts = Mounts::new(Arc::clone(&lake), mount_ends);
        Ok(Self {
            options,
            store,
            cluster,
            jobs,
            lake,
            mounts,
            supervisors: HashMap::new(),
            outlook: HashMap::new(),
            shares: Vec::new(),
            dirty: true,
            cycles: 0,
            cycle_us: 0,
            wake_ms: None,
            stillborn: HashMap::new(),
            closings: HashMap::new(),
            copies: HashMap::new(),
            restorings: HashMap::new(),
            paths: HostPaths::default(),
            watch: Watch::default(),
            touched: HashSet::new(),
            look_at_all: true,
            looked_at: None,
            next_seq,
        })
    }

    /// Does what is to be done now.
    pub fn turn(&mut self) {
        self.look_at_all = self.looked_at.is_none_or(|at| at.elapsed() >= LOOK_AT_ALL_INTERVAL);
        if self.look_at_all {
            self.looked_at = Some(Instant::now());
            self.forget_the_old();
        }
        self.supervisors.retain(|_, child| !matches!(child.try_wait(), Ok(Some(_))));
        self.closings.retain(|_, closing| !closing.is_finished());
        self.progress();
        self.leave_nodes();
        self.dirty |= self.wake_ms.is_some_and(|wake_ms| wake_ms <= now_ms());
        if self.dirty {
            self.decide();
        }
        let needed = self.mounts_in_use();
        self.mounts.keep_only(&needed, &self.store);
    }

    /// Takes in that a task of a running job ended; None: of some job.
    pub(super) fn tell_ended(&mut self, job: Option<Uuid>) {
        match job {
            Some(job) => drop(self.touched.insert(job)),
            None => self.looked_at = None,
        }
    }

    /// Says after how much time the next turn is due where nobody asks or tells anything.
    pub(super) fn pause(&self) -> Duration {
        let is_unwatched = |job: &JobRecord| matches!(job.state, State::Running) && !self.watch.has(&job.id);
        if self.dirty
            || !self.closings.is_empty()
            || self.jobs.values().any(|job| Self::is_moving(job) || is_unwatched(job))
        {
            return TURN_INTERVAL;
        }
        let held_ms = self.wake_ms.map_or(u64::MAX, |wake_ms| u64::try_from(wake_ms - now_ms()).unwrap_or(0));
        LOOK_AT_ALL_INTERVAL.min(Duration::from_millis(held_ms)).max(TURN_INTERVAL)
    }

    /// Forgets jobs that have been over for long.
    fn forget_the_old(&mut self) {
        let Some(keep) = self.options.keep else {
            return;
        };
        let until_ms = now_ms().saturating_sub(i64::try_from(keep.as_millis()).unwrap_or(i64::MAX));
        let is_old = |job: &&JobRecord| {
            job.state.is_over() && !Self::is_storing(job) && job.ended_ms.is_some_and(|ended_ms| ended_ms < until_ms)
        };
        let old: Vec<Uuid> = self.jobs.values().filter(is_old).map(|job| job.id).collect();
        for id in old {
            if let Err(error) = self.forget(&id) {
                tracing::error!(job = %id, error = &error as &dyn std::error::Error, "an old job can't be forgotten");
            }
        }
    }

    /// Changes a job: on disk, then in memory.
    pub(super) fn change(&mut self, id: &Uuid, change: impl FnOnce(&mut JobRecord)) -> Result<(), DiskError> {
        let Some(mut job) = self.jobs.get(id).cloned() else {
            return Ok(());
        };
        change(&mut job);
        let state = job.state.word();
        crash::point(&format!("before {state}"));
        self.store.keep(&job)?;
        crash::point(&format!("after {state}"));
        if !matches!(job.state, State::Running) {
            self.watch.remove(id);
        }
        if !job.state.has_gpus() {
            self.paths.forget(id);
        }
        self.jobs.insert(*id, job);
        self.dirty = true;
        Ok(())
    }

    pub(super) fn find(&self, named: &Named) -> Result<&JobRecord, SchedulerError> {
        let mut found = self.jobs.values().filter(|job| {
            job.name == named.name && named.project.as_ref().is_none_or(|project| *project == job.project)
        });
        let first = found.next().ok_or_else(|| SchedulerError::NoJob { named: named.clone() })?;
        match found.next() {
            None => Ok(first),
            Some(other) => Err(SchedulerError::Ambiguous {
                name: named.name.clone(),
                projects: [first.project.clone(), other.project.clone()],
            }),
        }
    }

    /// Finds a job that the caller may act on.
    pub(super) fn own(&self, named: &Named, caller: Caller) -> Result<&JobRecord, SchedulerError> {
        let job = self.find(named)?;
        if caller.is_master() || job.submitter.uid == caller.uid {
            return Ok(job);
        }
        Err(SchedulerError::Denied { uid: caller.uid, what: "act on another user's job" })
    }

    /// Takes a job in.
    pub fn submit(
        &mut self,
        project: &str,
        name: &str,
        spec: JobSpec,
        caller: Caller,
    ) -> Result<JobView, SchedulerError> {
        self.admit(project, name, &spec, caller)?;
        let job = JobRecord {
            format: FORMAT,
            id: Uuid::new_v4(),
            name: name.to_owned(),
            project: project.to_owned(),
            seq: self.next_seq,
            submitter: Submitter { uid: caller.uid, gid: caller.gid },
            submitted_ms: now_ms(),
            spec,
            state: State::Pending,
            ended_ms: None,
            attempts: Vec::new(),
            pauses: 0,
            losses: 0,
            outputs: Vec::new(),
            hold: None,
            holds: 0,
            push_tries: 0,
            snapshots: Vec::new(),
            restored: false,
        };
        crash::point("before submission");
        self.store.keep(&job)?;
        crash::point("after submission");
        self.next_seq += 1;
        self.dirty = true;
        if self.options.warm {
            let user = super::snapshot::user_of(&job);
            job.reads().iter().for_each(|(dataset, _, commit)| self.mounts.warm(dataset, commit, user));
        }
        let id = job.id;
        self.jobs.insert(id, job);
        Ok(self.view(&id).expect("it was just taken in"))
    }

    fn admit(&self, project: &str, name: &str, spec: &JobSpec, caller: Caller) -> Result<(), SchedulerError> {
        let Some(record) = self.cluster.projects.get(project) else {
            return Err(SchedulerError::NoProject { name: project.to_owned() });
        };
        if !record.users.is_empty() && !record.users.contains(&caller.uid) && !caller.is_master() {
            return Err(SchedulerError::Denied { uid: caller.uid, what: "submit to this project" });
        }
        let own = nix::unistd::geteuid();
        if !own.is_root() && caller.uid != own.as_raw() {
            let what = "submit here: only root's scheduler can run jobs as somebody else";
            return Err(SchedulerError::Denied { uid: caller.uid, what });
        }
        if self.jobs.len() >= JOBS_MAX {
            let what = format!("there are {JOBS_MAX} jobs: delete some that are over");
            return Err(SchedulerError::Wrong { what });
        }
        super::check::name("job", name)?;
        super::check::spec(spec, &self.options)?;
        super::check::ports(&spec.ports, caller)?;
        if self.jobs.values().any(|job| job.project == project && job.name == name) {
            return Err(SchedulerError::Exists { kind: "job", name: format!("{project}/{name}") });
        }
        Ok(())
    }

    /// Submits a job again, with the same commits.
    pub fn rerun(&mut self, named: &Named, name: Option<String>, caller: Caller) -> Result<JobView, SchedulerError> {
        let job = self.find(named)?;
        let (project, base, spec) = (job.project.clone(), job.name.clone(), job.spec.clone());
        let taken = |name: &str| self.jobs.values().any(|job| job.project == project && job.name == name);
        let free = (2u32..).map(|number| format!("{base}-{number}")).find(|name| !taken(name));
        let name = name.or(free).unwrap_or(base);
        self.submit(&project, &name, spec, caller)
    }

    /// Ends a job; its record stays.
    pub fn cancel(&mut self, named: &Named, caller: Caller) -> Result<JobView, SchedulerError> {
        let id = self.own(named, caller)?.id;
        self.end(&id, Stop::Cancelled)?;
        self.view(&id)
    }

    /// Ends a job and forgets it.
    pub fn delete(&mut self, named: &Named, caller: Caller) -> Result<JobView, SchedulerError> {
        let id = self.own(named, caller)?.id;
        let view = self.view(&id)?;
        self.end(&id, Stop::Deleted)?;
        Ok(view)
    }

    fn end(&mut self, id: &Uuid, stop: Stop) -> Result<(), SchedulerError> {
        let Some(job) = self.jobs.get(id) else {
            return Ok(());
        };
        match &job.state {
            State::Starting | State::Running => self.change(id, |job| job.stop(stop, now_ms()))?,
            // A deletion is stronger than what it was stopped for before, a cancellation than a pause.
            State::Stopping { stop: Stop::Deleted, .. } | State::Completing { stop: Some(Stop::Deleted) } => {}
            State::Stopping { .. } => self.change(id, |job| job.stop(stop, now_ms()))?,
            // First what stores its outputs ends: it must not read what is being removed.
            State::Completing { .. } => self.change(id, |job| job.state = State::Completing { stop: Some(stop) })?,
            _ if stop == Stop::Deleted && job.is_being_stored() => {
                self.change(id, |job| job.state = State::Completing { stop: Some(stop) })?;
            }
            _ if stop == Stop::Deleted => self.forget(id)?,
            State::Pending => self.change(id, |job| {
                job.state = State::Cancelled;
                job.ended_ms = Some(now_ms());
            })?,
            State::Succeeded | State::Failed { .. } | State::Cancelled => {}
        }
        Ok(())
    }

    /// Forgets a job of which nothing runs: on disk, then in memory.
    pub(super) fn forget(&mut self, id: &Uuid) -> Result<(), DiskError> {
        crash::point("before deletion");
        self.store.forget(id)?;
        crash::point("after deletion");
        self.watch.remove(id);
        self.paths.forget(id);
        self.copies.remove(id);
        self.restorings.remove(id);
        self.jobs.remove(id);
        self.dirty = true;
        Ok(())
    }

    /// Shows a job.
    pub fn look_at(&self, named: &Named) -> Result<JobView, SchedulerError> {
        let id = self.find(named)?.id;
        self.view(&id)
    }

    /// Shows the jobs of a project, or all, in the order of their submission.
    pub fn list(&self, project: Option<&str>) -> Vec<JobView> {
        let mut jobs: Vec<&JobRecord> =
            self.jobs.values().filter(|job| project.is_none_or(|project| project == job.project)).collect();
        jobs.sort_by_key(|job| (job.submitted_ms, job.seq));
        jobs.iter().filter_map(|job| self.view(&job.id).ok()).collect()
    }

    pub(super) fn view(&self, id: &Uuid) -> Result<JobView, SchedulerError> {
        let job = self.jobs.get(id).ok_or(SchedulerError::Gone)?;
        Ok(JobView::new(job, &Look { outlook: self.outlook.get(&job.key()), mounts: &self.mounts }))
    }

    /// Gives where a job's output lies, and whether more may come.
    pub fn log_of(&self, named: &Named, rank: u32) -> Result<(PathBuf, bool), SchedulerError> {
        let job = self.find(named)?;
        Ok((self.store.job(&job.id).log(rank), !job.state.is_over()))
    }

    /// Gives where running jobs say how far they are.
    pub(super) fn progress_files(&self) -> Vec<(String, PathBuf)> {
        let running = self.jobs.values().filter(|job| job.state.has_gpus());
        running.map(|job| (job.key().to_string(), self.store.job(&job.id).progress().join("now"))).collect()
    }

    /// Gives the command that runs what is asked for beside a running job.
    pub fn exec_plan(&self, named: &Named, request: &ExecRequest, caller: Caller) -> Result<ExecPlan, SchedulerError> {
        let job = self.own(named, caller)?;
        if !matches!(job.state, State::Running) {
            return Err(SchedulerError::NotRunning { name: job.name.clone(), state: job.state.word() });
        }
        let rank = request.rank;
        let launch = self.launch(job, rank).ok_or(SchedulerError::NoRank { rank })?;
        let executor = self.executor(job);
        Ok(executor.ok_or(SchedulerError::NoEngine)?.exec(&launch, request))
    }

    /// Gives what a rank of the present attempt is run with.
    pub(super) fn launch<'a>(&'a self, job: &'a JobRecord, rank: u32) -> Option<Launch<'a>> {
        let attempt = job.attempt()?;
        let seat = attempt.placement.seats.get(rank as usize)?;
        let simulated = self.cluster.nodes.get(seat.node.as_str()).is_none_or(|node| node.simulated);
        let beside_real = simulated && self.cluster.nodes.values().any(|node| !node.simulated);
        let real_paths = self.paths.found(&job.id);
        let gpus = self.cluster.nodes.get(seat.node.as_str()).map_or(&[][..], |node| &node.gpus);
        let mps_pipes = &self.options.mps_pipes;
        let store = &self.store;
        Some(Launch { store, job, attempt, rank, seat, simulated, beside_real, real_paths, gpus, mps_pipes })
    }

    /// Gives what runs a job; None where that is not there (any more): a job with an image is never run
    /// without its container.
    pub(super) fn executor(&self, job: &JobRecord) -> Option<Box<dyn Executor>> {
        match (&job.spec.image, &self.options.containers) {
            (Some(_), Some(containers)) => Some(Box::new(containers.clone())),
            (Some(_), None) => None,
            (None, _) => Some(Box::new(Processes)),
        }
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
