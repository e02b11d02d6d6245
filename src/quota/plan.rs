//! What a decision says: what starts where, what is paused for whom, why the others wait.

use serde::Serialize;

use super::snapshot::{JobId, MilliGpus, NodeId, Placement, ProjectId};
use super::why::Why;

/// What shall be done now. Starts are in the order in which start numbers are given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Jobs to start.
    pub starts: Vec<Start>,
    /// Jobs to pause.
    pub preemptions: Vec<Preemption>,
    /// Jobs that go on waiting, by name, those among them that are paused now.
    pub waiting: Vec<Waiting>,
    /// What each project has after the plan, and what it deserves, by name.
    pub shares: Vec<ProjectShare>,
}

/// On what grounds a job runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grounds {
    /// Its project's quota.
    Quota,
    /// Its project's fair share of the surplus.
    Share,
    /// Nobody else needs the place.
    Idle,
}

/// A job to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Start {
    /// The job.
    pub job: JobId,
    /// Where.
    pub placement: Placement,
    /// On what grounds.
    pub grounds: Grounds,
    /// Jobs that must be gone first. Not empty: don't start it now; a later plan will, once they are gone.
    pub after: Vec<JobId>,
}

/// A job to pause: it goes back to the queue with its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Preemption {
    /// The job.
    pub job: JobId,
    /// For what.
    pub cause: Cause,
}

/// Why a job is paused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// Another job needs its GPUs.
    Needed {
        /// The job.
        by: JobId,
        /// Its project.
        project: ProjectId,
        /// On what grounds it may take them.
        grounds: Grounds,
    },
    /// Its node is draining.
    Draining {
        /// The node.
        node: NodeId,
    },
}

/// A job that goes on waiting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Waiting {
    /// The job.
    pub job: JobId,
    /// What it waits for.
    pub why: Why,
}

/// How a project stands after the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProjectShare {
    /// The project.
    pub project: ProjectId,
    /// What it is guaranteed.
    pub quota: MilliGpus,
    /// What it deserves now.
    pub fair_share: MilliGpus,
    /// What its running and starting jobs have.
    pub allocated: MilliGpus,
    /// The part of that which stands within its quota.
    pub kept: MilliGpus,
    /// What its running and waiting jobs would use, as far as they could ever run.
    pub demand: MilliGpus,
}
