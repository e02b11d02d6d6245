//! How a job is shown: its record, and what follows from the rest of the state.

use serde::{Deserialize, Serialize};

use super::core::Outlook;
use super::job::{JobRecord, State, Stop};
use super::mounts::Mounts;
use super::store::MountOf;
use crate::quota::{MilliGpus, Template};

/// A job, for the API and `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobView {
    #[serde(flatten)]
    pub job: JobRecord,
    /// The name of its state: `Pending`, `Running`, ...
    pub status: String,
    /// What it has, or asks for.
    pub gpus: MilliGpus,
    /// Where it runs.
    pub nodes: Vec<String>,
    /// One sentence: why it is not running, or what ended it. None for a job that simply runs or succeeded.
    pub why: Option<String>,
}

/// What a view is made with.
pub(super) struct Look<'a> {
    pub outlook: Option<&'a Outlook>,
    pub mounts: &'a Mounts,
}

impl JobView {
    pub(super) fn new(job: &JobRecord, look: &Look<'_>) -> Self {
        let placement = job.attempt().filter(|_| job.state.has_gpus()).map(|attempt| &attempt.placement);
        let mut nodes: Vec<String> =
            placement.into_iter().flat_map(|placement| &placement.seats).map(|seat| seat.node.to_string()).collect();
        nodes.dedup();
        let asked = job.spec.templates.first().map_or(MilliGpus(0), Template::size);
        Self {
            status: job.state.word().to_owned(),
            gpus: placement.map_or(asked, crate::quota::Placement::size),
            nodes,
            why: why(job, look),
            job: job.clone(),
        }
    }
}

fn why(job: &JobRecord, look: &Look<'_>) -> Option<String> {
    match &job.state {
        State::Pending => Some(match look.outlook {
            Some(Outlook::Waits(why)) => why.to_string(),
            Some(Outlook::After(jobs)) => {
                let names: Vec<String> = jobs.iter().map(ToString::to_string).collect();
                format!("it starts as soon as {} has stopped", names.join(", "))
            }
            None => match &job.hold {
                Some(hold) => format!("it could not start and is tried again: {}", hold.why),
                None => "it was not looked at yet; it is in the next cycle".to_owned(),
            },
        }),
        State::Starting => {
            let commits = job.spec.datasets.iter();
            let waits = commits.clone().find(|data| look.mounts.is_mounting(&MountOf::job(job, &data.commit)));
            let fails = commits.clone().find_map(|data| look.mounts.problem(&MountOf::job(job, &data.commit)));
            Some(match (fails, waits) {
                (Some(problem), _) => format!("its dataset can't be mounted: {problem}"),
                (None, Some(data)) => format!("{} is being mounted", data.revision),
                (None, None) => "its processes are being started".to_owned(),
            })
        }
        State::Stopping { stop, .. } | State::Completing { stop: Some(stop) } => Some(stopped_for(stop)),
        State::Completing { stop: None } => Some(match job.push_tries {
            0 => "its outputs are being stored".to_owned(),
            tries => format!("its outputs are being stored, try {}", tries + 1),
        }),
        State::Failed { why } => Some(why.clone()),
        State::Running | State::Succeeded | State::Cancelled => None,
    }
}

fn stopped_for(stop: &Stop) -> String {
    match stop {
        Stop::Preempted { why } => format!("it is {why}"),
        Stop::NodeGone { node } => format!("its node {node} was taken away"),
        Stop::Lost => "one of its processes was lost".to_owned(),
        Stop::Unready { why } => format!("it can't start now: {why}"),
        Stop::Failed { why } => format!("it failed: {why}"),
        Stop::Cancelled => "it was cancelled".to_owned(),
        Stop::Deleted => "it was deleted".to_owned(),
    }
}
