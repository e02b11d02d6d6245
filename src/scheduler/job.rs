//! A job's record: what was asked for, where it stands, what came of it.
//!
//! Everything that is needed to repeat the job is in its [`JobSpec`]: datasets are commits, not names
//! that move. The record is one file, replaced whole at each [transition](State).

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::task::TaskExit;
use crate::quota::{JobId, Kind, Placement, Template};

/// Version of the record.
pub const FORMAT: u32 = 1;
/// Attempts that a record remembers; the older ones are forgotten, but for their number.
pub const ATTEMPTS_MAX: usize = 50;
/// How often a job is put back that was lost without its own fault, before it counts as failed.
pub const LOST_MAX: u32 = 5;

/// A commit that a job reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetMount {
    pub dataset: String,
    /// As the user wrote it: `xray@v2`.
    pub revision: String,
    /// What that was when the job was submitted.
    pub commit: String,
    /// Where the job finds it.
    pub path: String,
}

/// A directory of the job that becomes a commit when it succeeds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    pub dataset: String,
    pub path: String,
}

/// A directory that jobs of a project share, and that outlives them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    pub name: String,
    pub path: String,
}

/// A path of the machine that the job sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostPath {
    pub host: PathBuf,
    pub path: String,
}

/// A snapshot of a job that another one starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    pub dataset: String,
    pub revision: String,
    pub commit: String,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    pub kind: Kind,
    /// None: the kind's.
    #[serde(default)]
    pub priority: Option<u32>,
    /// Shapes, tried in this order.
    pub templates: Vec<Template>,
    /// A container image; None: a plain process.
    #[serde(default)]
    pub image: Option<String>,
    /// Program and arguments.
    pub command: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub datasets: Vec<DatasetMount>,
    #[serde(default)]
    pub outputs: Vec<Output>,
    #[serde(default)]
    pub volumes: Vec<Volume>,
    #[serde(default)]
    pub host_paths: Vec<HostPath>,
    /// Containers: as much shared memory as the machine has.
    #[serde(default)]
    pub large_shm: bool,
    /// Containers: `8888`, `8888:80` or `127.0.0.1:8888:80`, also with `/udp`.
    #[serde(default)]
    pub ports: Vec<String>,
    /// How long it may take to end when it is told to.
    pub grace_ms: u64,
    /// How long an attempt may run.
    #[serde(default)]
    pub max_runtime_ms: Option<u64>,
    /// What the program is a version of: a free text that its outputs remember.
    #[serde(default)]
    pub code: Option<String>,
    /// What its directories have at the first start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<Restore>,
}

impl JobSpec {
    /// Gives its place in the order of its project.
    pub fn priority(&self) -> u32 {
        self.priority.unwrap_or_else(|| self.kind.priority())
    }
}

/// Who submitted a job, and as whom it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submitter {
    pub uid: u32,
    pub gid: u32,
}

/// Why a job is made to stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// Another job is entitled to its GPUs, or its node is draining: it goes back to the queue.
    Preempted { why: String },
    /// Its node was taken away: likewise.
    NodeGone { node: String },
    /// One of its processes was lost: likewise, [`LOST_MAX`] times.
    Lost,
    /// It can't start now, through no fault of its own (the lake can't be reached): likewise, but not at once.
    Unready { why: String },
    /// One of its processes failed: so does the job.
    Failed { why: String },
    /// Somebody cancelled it: its record stays.
    Cancelled,
    /// Somebody deleted it: nothing stays but its commits.
    Deleted,
}

/// Where a job stands. `docs/formats/scheduler.md` has the transitions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum State {
    /// Waits in the queue.
    Pending,
    /// Has its GPUs; its datasets are mounted and its processes begun.
    Starting,
    /// All its processes have begun.
    Running,
    /// Was told to stop; still has its GPUs. What ended before `since_ms` ended by itself.
    Stopping {
        stop: Stop,
        #[serde(default)]
        since_ms: i64,
    },
    /// Ended well; its outputs become commits. Has no GPUs any more. `stop`: it was cancelled or deleted, and
    /// is so when nothing stores an output any more.
    Completing {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stop: Option<Stop>,
    },
    /// Ended well, its outputs are commits.
    Succeeded,
    /// Ended, not well.
    Failed { why: String },
    /// Was cancelled.
    Cancelled,
}

impl State {
    /// Gives its name, as users of other schedulers know it.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Starting => "Starting",
            Self::Running => "Running",
            Self::Stopping { .. } => "Stopping",
            Self::Completing { .. } => "Completing",
            Self::Succeeded => "Succeeded",
            Self::Failed { .. } => "Failed",
            Self::Cancelled => "Cancelled",
        }
    }

    /// Says whether nothing happens to it any more.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed { .. } | Self::Cancelled)
    }

    /// Says whether it has GPUs.
    pub fn has_gpus(&self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Stopping { .. })
    }
}

/// One try to run the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// From 1.
    pub number: u32,
    pub placement: Placement,
    /// Its place in the order of all starts.
    pub start: u64,
    pub begun_ms: i64,
    #[serde(default)]
    pub ended_ms: Option<i64>,
    /// How its processes ended, by rank, and why it was stopped.
    #[serde(default)]
    pub exits: Vec<TaskExit>,
    #[serde(default)]
    pub stop: Option<Stop>,
    /// The image that its containers had, by digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

/// A commit of what a job had made so far. With neither `commit` nor `error` it is being stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSnapshot {
    /// From 1.
    pub number: u32,
    pub dataset: String,
    pub begun_ms: i64,
    #[serde(default)]
    pub tries: u32,
    #[serde(default)]
    pub commit: Option<String>,
    #[serde(default)]
    pub error: Option<String>,
}

impl JobSnapshot {
    /// Says whether it is being stored.
    pub fn is_running(&self) -> bool {
        self.commit.is_none() && self.error.is_none()
    }
}

/// A commit that a job made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputCommit {
    pub dataset: String,
    pub path: String,
    pub commit: String,
    /// Sockets, pipes and devices in it, which no commit has: the first ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
}

/// Why a job that could run is not looked at yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub until_ms: i64,
    pub why: String,
}

/// Everything about a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    pub format: u32,
    /// Unlike any other job's, ever.
    pub id: Uuid,
    /// Unlike any other job's of its project.
    pub name: String,
    pub project: String,
    /// Its place in the queue, kept when it is paused.
    pub seq: u64,
    pub submitter: Submitter,
    pub submitted_ms: i64,
    pub spec: JobSpec,
    pub state: State,
    #[serde(default)]
    pub ended_ms: Option<i64>,
    /// The last one is the present one, where the job has GPUs.
    #[serde(default)]
    pub attempts: Vec<Attempt>,
    /// How often it was paused, and lost.
    #[serde(default)]
    pub pauses: u32,
    #[serde(default)]
    pub losses: u32,
    #[serde(default)]
    pub outputs: Vec<OutputCommit>,
    /// Waits in the queue until then, and why; `holds`: how often in a row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Hold>,
    #[serde(default)]
    pub holds: u32,
    /// How often its outputs were tried to be stored.
    #[serde(default)]
    pub push_tries: u32,
    /// At most the last ones; one at a time is being stored, the last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<JobSnapshot>,
    /// What it starts from is in its place.
    #[serde(default)]
    pub restored: bool,
}

impl JobRecord {
    /// Gives the name by which decisions know it.
    pub fn key(&self) -> JobId {
        JobId::from(format!("{}/{}", self.project, self.name).as_str())
    }

    /// Says whether a snapshot of it is being stored.
    pub fn is_being_stored(&self) -> bool {
        self.snapshots.last().is_some_and(JobSnapshot::is_running)
    }

    /// Gives the commits that it reads, what it starts from among them as long as that is not in its place.
    pub fn reads(&self) -> Vec<(&str, &str, &str)> {
        let datasets = self.spec.datasets.iter().map(|data| (&*data.dataset, &*data.revision, &*data.commit));
        let restore = self.spec.restore.iter().filter(|_| !self.restored);
        datasets.chain(restore.map(|from| (&*from.dataset, &*from.revision, &*from.commit))).collect()
    }

    /// Gives the present attempt, or the last.
    pub fn attempt(&self) -> Option<&Attempt> {
        self.attempts.last()
    }

    /// Tells it to stop. A stronger reason replaces a weaker one; since when it stops stays.
    pub fn stop(&mut self, stop: Stop, now_ms: i64) {
        let since_ms = match self.state {
            State::Stopping { since_ms, .. } => since_ms,
            _ => now_ms,
        };
        self.state = State::Stopping { stop, since_ms };
    }

    /// Begins an attempt, forgetting the oldest where there are too many.
    pub fn begin(&mut self, placement: Placement, start: u64, now_ms: i64) {
        let number = self.attempt().map_or(1, |last| last.number.saturating_add(1));
        if self.attempts.len() >= ATTEMPTS_MAX {
            self.attempts.remove(0);
        }
        let (ended_ms, exits, stop, image) = (None, Vec::new(), None, None);
        self.attempts.push(Attempt { number, placement, start, begun_ms: now_ms, ended_ms, exits, stop, image });
        self.state = State::Starting;
        self.hold = None;
    }
}
