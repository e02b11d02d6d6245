//! What came of a scenario, and how good that is compared with what was possible.

use std::collections::BTreeMap;

use serde::Serialize;

use super::engine::Policy;
use crate::quota::{Cause, Grounds, JobId, MilliGpus, Project, ProjectId, Why};

/// Everything that happened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// How it was decided.
    pub policy: Policy,
    /// The projects, as the scenario has them.
    pub projects: Vec<Project>,
    /// GPUs of all nodes.
    pub gpus: MilliGpus,
    /// When it ended.
    pub end_ms: u64,
    /// The state after each moment at which something happened.
    pub samples: Vec<Sample>,
    /// What happened, with its time.
    pub actions: Vec<(u64, Action)>,
    /// The jobs.
    pub jobs: BTreeMap<JobId, JobRecord>,
    /// What each project used: thousandths of a GPU times milliseconds.
    pub service_ms: BTreeMap<ProjectId, u64>,
    /// What each project deserves at the end.
    pub fair_shares: BTreeMap<ProjectId, MilliGpus>,
}

/// The state after a moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sample {
    /// When.
    pub at_ms: u64,
    /// What the scenario calls it.
    pub label: Option<String>,
    /// What each project has.
    pub allocated: BTreeMap<ProjectId, MilliGpus>,
    /// What each project deserves.
    pub fair_shares: BTreeMap<ProjectId, MilliGpus>,
    /// Which of its jobs wait.
    pub waiting: BTreeMap<ProjectId, Vec<JobId>>,
    /// Why they do.
    pub why: BTreeMap<JobId, Why>,
}

/// Something that happened to a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It came.
    Submitted(JobId),
    /// It was started.
    Started(JobId, Grounds),
    /// It was paused.
    Paused(JobId, Cause),
    /// It came to its end.
    Ended(JobId),
    /// It was deleted.
    Deleted(JobId),
}

/// What became of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JobRecord {
    /// Whose it is.
    pub project: ProjectId,
    /// Its GPUs, all processes together.
    pub size: MilliGpus,
    /// When it came.
    pub submitted_ms: u64,
    /// How long it wants to run; absent: until it is deleted.
    pub work_ms: Option<u64>,
    /// When it was first started.
    pub started_ms: Option<u64>,
    /// When it ended or was deleted.
    pub ended_ms: Option<u64>,
    /// How often it was paused.
    pub pauses: u32,
}

impl JobRecord {
    pub(super) fn new(project: ProjectId) -> Self {
        let size = MilliGpus(0);
        Self { project, size, submitted_ms: 0, work_ms: None, started_ms: None, ended_ms: None, pauses: 0 }
    }
}

impl Report {
    /// Gives the used part of all GPUs up to the end, in thousandths.
    pub fn utilisation_permille(&self) -> u64 {
        let used: u128 = self.service_ms.values().map(|service| u128::from(*service)).sum();
        let all = u128::from(self.gpus.0) * u128::from(self.end_ms);
        u64::try_from((used * 1000).checked_div(all).unwrap_or(0)).unwrap_or(u64::MAX)
    }

    /// Gives a bound that no schedule can exceed, even one that knows the future and cuts jobs at will.
    ///
    /// For any moment `s`: until `s` no more work is done than had arrived, each job at its own pace;
    /// after `s` no more than all GPUs do. The least of these sums over all `s` is the bound.
    pub fn utilisation_bound_permille(&self) -> u64 {
        let end = self.end_ms;
        let lengths = |job: &JobRecord| match (job.work_ms, job.ended_ms) {
            (Some(work), _) => work,
            (None, Some(ended)) => ended.saturating_sub(job.submitted_ms),
            (None, None) => u64::MAX,
        };
        // By moment: how the pace of arriving work changes there.
        let mut paces: BTreeMap<u64, i128> = BTreeMap::from([(end, 0)]);
        for job in self.jobs.values().filter(|job| job.submitted_ms < end) {
            *paces.entry(job.submitted_ms).or_default() += i128::from(job.size.0);
            let done = job.submitted_ms.saturating_add(lengths(job)).min(end);
            *paces.entry(done).or_default() -= i128::from(job.size.0);
        }
        let capacity = i128::from(self.gpus.0);
        let (mut arrived, mut pace, mut before) = (0i128, 0i128, 0u64);
        let mut bound = capacity * i128::from(end);
        for (moment, change) in paces {
            arrived += pace * i128::from(moment - before);
            bound = bound.min(arrived + capacity * i128::from(end - moment));
            (pace, before) = (pace + change, moment);
        }
        let all = capacity * i128::from(end);
        u64::try_from((bound * 1000).checked_div(all).unwrap_or(0)).unwrap_or(0)
    }

    /// Gives Jain's index of service per quota, in thousandths: 1000 if each project with a quota and
    /// jobs got the same per GPU of its quota, 1000/n if one of n got everything.
    pub fn jain_permille(&self) -> u64 {
        let active = self.projects.iter().filter(|project| project.quota.0 > 0);
        let active = active.filter(|project| self.jobs.values().any(|job| job.project == project.id));
        let normal: Vec<u128> = active
            .map(|project| {
                let service = self.service_ms.get(&project.id).copied().unwrap_or(0);
                u128::from(service) / u128::from(project.quota.0)
            })
            .collect();
        let (sum, squares) = normal.iter().fold((0u128, 0u128), |(sum, squares), x| (sum + x, squares + x * x));
        u64::try_from((sum * sum * 1000).checked_div(squares * normal.len() as u128).unwrap_or(1000)).unwrap_or(1000)
    }

    /// Gives the mean time between coming and first start, of the jobs that started.
    pub fn mean_wait_ms(&self) -> u64 {
        let waits = self.jobs.values().filter_map(|job| job.started_ms.map(|at| at.saturating_sub(job.submitted_ms)));
        let (sum, count) = waits.fold((0u64, 0u64), |(sum, count), wait| (sum.saturating_add(wait), count + 1));
        sum.checked_div(count).unwrap_or(0)
    }

    /// Gives how often jobs were paused.
    pub fn pauses(&self) -> u64 {
        self.jobs.values().map(|job| u64::from(job.pauses)).sum()
    }
}
