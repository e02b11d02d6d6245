//! Why a job waits, and what would let it run: a typed reason that prints as one sentence.

use std::fmt;

use serde::Serialize;
use serde::ser::SerializeMap;

use super::snapshot::{JobId, MilliGpus, NodeId, ProjectId};

/// What a waiting job waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// No template asks for something that GPUs can be cut into.
    Unsound {
        /// What the first template asks for per process.
        gpus: MilliGpus,
    },
    /// No node that is ready could ever hold any of its templates, were it empty.
    NoCandidate {
        /// What each process needs, by the first template.
        gpus: MilliGpus,
        /// How many processes.
        processes: u32,
        /// Ready nodes that are in the right pools and have the right labels.
        nodes: u32,
        /// GPUs of the largest of these nodes.
        largest: MilliGpus,
        /// Whether a node that is cordoned or draining would do.
        cordoned: bool,
    },
    /// Its project may not have that much.
    Limit {
        /// The project.
        project: ProjectId,
        /// What it has.
        allocated: MilliGpus,
        /// What it may have.
        limit: MilliGpus,
        /// What the job needs.
        needs: MilliGpus,
    },
    /// It can't be paused, so it runs only within the quota, which is in use.
    QuotaInUse {
        /// The project.
        project: ProjectId,
        /// What jobs of at least its rank keep of the quota.
        kept: MilliGpus,
        /// The quota.
        quota: MilliGpus,
        /// What the job needs.
        needs: MilliGpus,
    },
    /// It is in quota or in share, but the GPUs that are free or could be freed do not lie together.
    Fragmented {
        /// The project.
        project: ProjectId,
        /// Whether the quota grants it (else the fair share).
        in_quota: bool,
        /// What each process needs.
        gpus: MilliGpus,
        /// How many processes.
        processes: u32,
        /// Processes that would fit if all that may be paused for it were gone.
        possible: u32,
        /// GPUs free on nodes that it may use.
        free: MilliGpus,
    },
    /// Its project has its fair share, and nothing fitting is idle.
    ShareInUse {
        /// The project.
        project: ProjectId,
        /// What it has.
        allocated: MilliGpus,
        /// What it deserves now.
        fair_share: MilliGpus,
        /// What the job needs.
        needs: MilliGpus,
        /// GPUs free on nodes that it may use.
        free: MilliGpus,
    },
    /// It was paused in this plan for another job.
    PausedFor {
        /// The other job.
        job: JobId,
        /// Its project.
        project: ProjectId,
    },
    /// It was paused in this plan because its node is draining.
    PausedByDrain {
        /// The node.
        node: NodeId,
    },
}

impl Why {
    /// Gives the name of the reason, for scripts.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unsound { .. } => "unsound",
            Self::NoCandidate { .. } => "no-candidate",
            Self::Limit { .. } => "limit",
            Self::QuotaInUse { .. } => "quota-in-use",
            Self::Fragmented { .. } => "fragmented",
            Self::ShareInUse { .. } => "share-in-use",
            Self::PausedFor { .. } => "paused-for",
            Self::PausedByDrain { .. } => "paused-by-drain",
        }
    }
}

/// "2 GPUs", "1 GPU", "0.5 GPU".
struct Gpus(MilliGpus);

impl fmt::Display for Gpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.0.0 > 1000 || self.0.0 == 0 { "s" } else { "" };
        write!(f, "{} GPU{plural}", self.0)
    }
}

/// "2 GPUs", or "3 processes of 2 GPUs".
struct Request(MilliGpus, u32);

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            1 => write!(f, "{}", Gpus(self.0)),
            processes => write!(f, "{processes} processes of {}", Gpus(self.0)),
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsound { gpus } => {
                write!(
                    f,
                    "it asks for {gpus} GPUs a process, which can't be given: ask for a fraction below 1, or for whole GPUs"
                )
            }
            Self::NoCandidate { gpus, processes, nodes: 0, cordoned: false, .. } => write!(
                f,
                "no node is in a pool that it may use and has the labels that it asks for; it needs {}",
                Request(*gpus, *processes)
            ),
            Self::NoCandidate { gpus, processes, cordoned: true, .. } => write!(
                f,
                "only nodes that take no new jobs could hold {}; it runs when one of them is ready again",
                Request(*gpus, *processes)
            ),
            Self::NoCandidate { gpus, processes, nodes, largest, .. } => write!(
                f,
                "the {nodes} node(s) that it may use, the largest with {}, could not hold {} even if they were empty",
                Gpus(*largest),
                Request(*gpus, *processes)
            ),
            Self::Limit { project, allocated, limit, needs } => write!(
                f,
                "project {project} uses {allocated} of the {} that are its limit, and the job needs {needs}; it runs when jobs of {project} end",
                Gpus(*limit)
            ),
            Self::QuotaInUse { project, kept, quota, needs } => write!(
                f,
                "a job that can't be paused runs only within the quota, and project {project} uses {kept} of its {}, the job needs {needs}; it runs when such jobs of {project} end",
                Gpus(*quota)
            ),
            Self::Fragmented { project, in_quota, gpus, processes, possible, free } => write!(
                f,
                "project {project} is entitled to it by its {}, but the places are too scattered: {} free, room for {possible} of {} even after pausing all that may be paused; it runs when running jobs leave {} together",
                if *in_quota { "quota" } else { "fair share" },
                Gpus(*free),
                Request(*gpus, *processes),
                Request(*gpus, 1)
            ),
            Self::ShareInUse { project, allocated, fair_share, needs, free } => write!(
                f,
                "project {project} has {allocated} of its fair share of {} now, the job needs {needs}, and {} idle where it may run; it runs when enough of them become idle together",
                Gpus(*fair_share),
                Idle(*free)
            ),
            Self::PausedFor { job, project } => {
                write!(
                    f,
                    "it was paused for job {job} of project {project}, which is entitled to the GPUs; it goes on when GPUs become idle"
                )
            }
            Self::PausedByDrain { node } => {
                write!(f, "it was paused because node {node} is draining; it goes on as soon as another node has room")
            }
        }
    }
}

/// "2 GPUs are", "1 GPU is".
struct Idle(MilliGpus);

impl fmt::Display for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.0.0 > 1000 || self.0.0 == 0 { "are" } else { "is" };
        write!(f, "{} {verb}", Gpus(self.0))
    }
}

impl Serialize for Why {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("reason", self.kind())?;
        map.serialize_entry("text", &self.to_string())?;
        map.end()
    }
}
