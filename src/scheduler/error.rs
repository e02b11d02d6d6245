//! Why the scheduler did not do what was asked, with the next step.

use super::core::Named;
use super::disk::DiskError;

/// An error of a request.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    #[error("there is no job `{}`{}", named.name, named.project.as_ref().map_or(String::new(), |project| format!(" in project {project}")))]
    NoJob { named: Named },
    #[error("the job `{name}` is in several projects, {} and {} among them: name one with --project", projects[0], projects[1])]
    Ambiguous { name: String, projects: [String; 2] },
    #[error("there is no project `{name}`")]
    NoProject { name: String },
    #[error("there is no template `{name}`")]
    NoTemplate { name: String },
    #[error("there is no node `{name}`")]
    NoNode { name: String },
    #[error("there is a {kind} `{name}` already")]
    Exists { kind: &'static str, name: String },
    #[error("user {uid} may not {what}")]
    Denied { uid: u32, what: &'static str },
    #[error("{why}")]
    NotGranted { why: String },
    #[error(
        "`{name}` can't be the name of a {kind}: use up to 63 letters, digits, `.`, `_` and `-`, beginning with a letter or a digit"
    )]
    Name { kind: &'static str, name: String },
    #[error("{what}")]
    Wrong { what: String },
    #[error("{kind} `{name}` is in use by {jobs} jobs that are not over")]
    InUse { kind: &'static str, name: String, jobs: usize },
    #[error("the job `{name}` is {state}, not Running")]
    NotRunning { name: String, state: &'static str },
    #[error("the job has no rank {rank} now")]
    NoRank { rank: u32 },
    #[error("the scheduler has no container engine now")]
    NoEngine,
    #[error("the job is gone")]
    Gone,
    #[error("the scheduler is stopping")]
    Stopping,
    #[error("what was asked could not be written down")]
    Disk(#[from] DiskError),
}

impl SchedulerError {
    /// Gives the HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Self::NoJob { .. } | Self::NoProject { .. } | Self::NoNode { .. } => 404,
            Self::NoTemplate { .. } | Self::Gone => 404,
            Self::Exists { .. } | Self::InUse { .. } | Self::NotRunning { .. } => 409,
            Self::Denied { .. } | Self::NotGranted { .. } => 403,
            Self::Ambiguous { .. } | Self::Name { .. } | Self::Wrong { .. } | Self::NoRank { .. } => 400,
            Self::Stopping => 503,
            Self::Disk(_) | Self::NoEngine => 500,
        }
    }

    /// Gives the next step, where there is one.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoJob { .. } => Some("`larder job list -A` shows all jobs"),
            Self::NoProject { .. } => {
                Some("`larder project list` shows the projects, `larder project create` makes one")
            }
            Self::NoTemplate { .. } => Some("`larder job template list` shows the templates"),
            Self::NoNode { .. } => Some("`larder node list` shows the nodes"),
            Self::InUse { kind: "node", .. } => {
                Some("drain it first, or put its jobs back into the queue with `larder node rm --force`")
            }
            Self::NotGranted { .. } => {
                Some("`larder grant DATASET` lists who may; the node's policy is the file of daemon.policy")
            }
            Self::NoEngine => Some("install podman and start the scheduler again, or name one with --engine"),
            Self::InUse { .. } => Some("cancel or delete them first"),
            Self::NotRunning { .. } => Some("`larder job describe` says where it stands"),
            _ => None,
        }
    }
}
