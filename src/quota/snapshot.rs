//! What a decision starts from: projects, nodes, jobs and where they run.
//!
//! Everything here is plain data that can be stored and printed. Amounts of GPUs are thousandths
//! ([`MilliGpus`]), so that sums are exact.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::iter::Sum;
use std::ops::Add;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Thousandths of a GPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MilliGpus(pub u64);

impl MilliGpus {
    /// One whole GPU.
    pub const ONE: Self = Self(1000);

    /// Gives whole GPUs.
    pub const fn whole(gpus: u64) -> Self {
        Self(gpus.saturating_mul(1000))
    }

    /// Subtracts, down to nothing.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Add for MilliGpus {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sum for MilliGpus {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self(0), Add::add)
    }
}

impl fmt::Display for MilliGpus {
    /// Prints `2`, `0.5`, `1.25`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 1000, self.0 % 1000);
        if rest == 0 {
            return f.pad(&whole.to_string());
        }
        f.pad(format!("{whole}.{rest:03}").trim_end_matches('0'))
    }
}

/// Says that a text is not an amount of GPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an amount of GPUs: write 2, 0.5 or 0.125")]
pub struct ParseGpusError {
    /// What was given.
    pub text: String,
}

impl FromStr for MilliGpus {
    type Err = ParseGpusError;

    fn from_str(text: &str) -> Result<Self, ParseGpusError> {
        let error = || ParseGpusError { text: text.to_owned() };
        let (whole, rest) = text.split_once('.').unwrap_or((text, ""));
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(rest) || rest.len() > 3 || (whole.is_empty() && rest.is_empty()) {
            return Err(error());
        }
        let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| error())? };
        let rest: u64 = format!("{rest:0<3}").parse().map_err(|_| error())?;
        whole.checked_mul(1000).and_then(|milli| milli.checked_add(rest)).map(Self).ok_or_else(error)
    }
}

impl Serialize for MilliGpus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_multiple_of(1000) {
            return serializer.serialize_u64(self.0 / 1000);
        }
        // Three decimals survive a double; nothing is computed with it.
        serializer.serialize_f64(self.0 as f64 / 1000.0)
    }
}

impl<'de> Deserialize<'de> for MilliGpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = MilliGpus;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an amount of GPUs such as 2 or 0.5")
            }
            fn visit_u64<E: serde::de::Error>(self, gpus: u64) -> Result<MilliGpus, E> {
                self.visit_str(&gpus.to_string())
            }
            fn visit_i64<E: serde::de::Error>(self, gpus: i64) -> Result<MilliGpus, E> {
                self.visit_str(&gpus.to_string())
            }
            fn visit_f64<E: serde::de::Error>(self, gpus: f64) -> Result<MilliGpus, E> {
                self.visit_str(&gpus.to_string())
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<MilliGpus, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Gives the name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(name: &str) -> Self {
                Self(name.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer).map(|name| Self(name.into()))
            }
        }
    };
}

name_id!(
    /// Name of a project.
    ProjectId
);
name_id!(
    /// Name of a node.
    NodeId
);
name_id!(
    /// Name of a job, unlike any other's.
    JobId
);

/// A team's claim on the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Project {
    /// Its name.
    pub id: ProjectId,
    /// What it is guaranteed.
    pub quota: MilliGpus,
    /// Its part of the surplus, relative to the other projects'; the quota if absent.
    #[serde(default)]
    pub weight: Option<MilliGpus>,
    /// What it never exceeds.
    #[serde(default)]
    pub limit: Option<MilliGpus>,
    /// Pools in which train and inference jobs may run; none named: all.
    #[serde(default)]
    pub train_pools: BTreeSet<String>,
    /// Pools in which interactive and build jobs may run; none named: all.
    #[serde(default)]
    pub interactive_pools: BTreeSet<String>,
}

impl Project {
    /// Makes a project that has a quota and nothing else.
    pub fn new(id: &str, quota: MilliGpus) -> Self {
        Self {
            id: id.into(),
            quota,
            weight: None,
            limit: None,
            train_pools: BTreeSet::new(),
            interactive_pools: BTreeSet::new(),
        }
    }

    /// Gives the over-quota weight.
    pub fn weight(&self) -> u64 {
        self.weight.unwrap_or(self.quota).0
    }
}

/// Whether a node takes new jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// It does.
    #[default]
    Ready,
    /// It takes nothing new; what runs there goes on.
    Cordoned,
    /// It takes nothing new; what can be paused is paused.
    Draining,
}

/// A machine with GPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its name.
    pub id: NodeId,
    /// How many GPUs it has.
    pub gpus: u32,
    /// What templates may ask for.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The pools that it is in.
    #[serde(default)]
    pub pools: BTreeSet<String>,
    /// Whether it takes new jobs.
    #[serde(default)]
    pub state: NodeState,
}

impl Node {
    /// Makes a ready node without labels and pools.
    pub fn new(id: &str, gpus: u32) -> Self {
        Self { id: id.into(), gpus, labels: BTreeMap::new(), pools: BTreeSet::new(), state: NodeState::Ready }
    }
}

/// What a job is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Runs to its end without a person; can be paused.
    #[default]
    Train,
    /// Builds something for a person who waits.
    Build,
    /// A person works in it.
    Interactive,
    /// Answers requests.
    Inference,
}

impl Kind {
    /// Gives the priority of a job that names none.
    pub fn priority(self) -> u32 {
        match self {
            Self::Train => 50,
            Self::Build | Self::Interactive => 100,
            Self::Inference => 125,
        }
    }

    /// Says whether jobs of this kind may be paused, unless they say otherwise.
    pub fn preemptible(self) -> bool {
        self == Self::Train
    }

    /// Says whether the job runs in the interactive pools.
    pub fn in_interactive_pools(self) -> bool {
        matches!(self, Self::Build | Self::Interactive)
    }
}

/// One shape that a job may take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// GPUs of each process: a fraction of one, or whole ones.
    pub gpus: MilliGpus,
    /// How many processes start together.
    #[serde(default = "one")]
    pub processes: u32,
    /// The pool to run in; absent: any that the project may use.
    #[serde(default)]
    pub pool: Option<String>,
    /// Labels that the node must have.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

impl Template {
    /// Makes a template of one process.
    pub fn new(gpus: MilliGpus) -> Self {
        Self { gpus, processes: 1, pool: None, labels: BTreeMap::new() }
    }

    /// Gives the GPUs of all processes together.
    pub fn size(&self) -> MilliGpus {
        MilliGpus(self.gpus.0.saturating_mul(u64::from(self.processes)))
    }

    /// Says whether GPUs can be cut like that: a fraction of one, or whole ones.
    pub fn is_sound(&self) -> bool {
        let milli = self.gpus.0;
        self.processes > 0 && milli > 0 && (milli < 1000 || milli.is_multiple_of(1000)) && milli <= u64::from(u32::MAX)
    }
}

/// GPUs of one node that one process has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// The node.
    pub node: NodeId,
    /// Numbers of the GPUs on it, from 0.
    pub gpus: Vec<u32>,
    /// How much of each of them.
    pub each: MilliGpus,
}

/// Where a job runs, a seat for each process in the order of the ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Which of the job's templates, from 0.
    pub template: usize,
    /// One for each process.
    pub seats: Vec<Seat>,
}

impl Placement {
    /// Gives the GPUs of all seats together.
    pub fn size(&self) -> MilliGpus {
        self.seats.iter().map(|seat| MilliGpus(seat.each.0.saturating_mul(seat.gpus.len() as u64))).sum()
    }
}

/// What a job does now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Wants to run.
    #[default]
    Waiting,
    /// Runs.
    Running {
        /// Where.
        placement: Placement,
        /// Grows with each start, in the order of the plan's starts.
        started: u64,
    },
    /// Was told to stop and still has its GPUs.
    Stopping {
        /// Where.
        placement: Placement,
    },
}

/// A unit of work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// Whose it is.
    pub project: ProjectId,
    /// What it is for.
    pub kind: Kind,
    /// Order within the project, greater first.
    pub priority: u32,
    /// Whether it may be paused.
    pub preemptible: bool,
    /// Its place in the queue, kept when it is paused.
    pub seq: u64,
    /// Shapes, tried in this order.
    pub templates: Vec<Template>,
    /// What it would like to find on its node: a key of [`Snapshot::held`].
    #[serde(default)]
    pub near: Option<String>,
    /// What it does now.
    #[serde(default)]
    pub state: JobState,
}

impl Job {
    /// Makes a waiting job of one process.
    pub fn new(id: &str, project: &str, kind: Kind, gpus: MilliGpus, seq: u64) -> Self {
        Self {
            id: id.into(),
            project: project.into(),
            kind,
            priority: kind.priority(),
            preemptible: kind.preemptible(),
            seq,
            templates: vec![Template::new(gpus)],
            near: None,
            state: JobState::Waiting,
        }
    }
}

/// All that a decision depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// The projects.
    pub projects: Vec<Project>,
    /// The nodes.
    pub nodes: Vec<Node>,
    /// Jobs that wait, run or stop.
    pub jobs: Vec<Job>,
    /// Which nodes hold what (a commit, say); jobs with that in `near` go there first.
    #[serde(default)]
    pub held: BTreeMap<String, BTreeSet<NodeId>>,
}

/// Says how a snapshot contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Two projects of one name.
    #[error("project {0} is listed twice")]
    DuplicateProject(ProjectId),
    /// Two nodes of one name.
    #[error("node {0} is listed twice")]
    DuplicateNode(NodeId),
    /// Two jobs of one name.
    #[error("job {0} is listed twice")]
    DuplicateJob(JobId),
    /// A job of nobody.
    #[error("job {job} belongs to project {project}, which is not listed")]
    UnknownProject {
        /// The job.
        job: JobId,
        /// What it names.
        project: ProjectId,
    },
    /// A job runs where nothing is.
    #[error("job {job} runs on node {node}, which is not listed: requeue the job if the node is lost")]
    UnknownNode {
        /// The job.
        job: JobId,
        /// What it names.
        node: NodeId,
    },
    /// A job runs on a GPU that the node has not, or that is full.
    #[error("job {job} runs on GPU {gpu} of node {node}, which is not there or has not that much left")]
    Overcommitted {
        /// The job.
        job: JobId,
        /// The node.
        node: NodeId,
        /// The GPU.
        gpu: u32,
    },
}
