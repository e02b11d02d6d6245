//! From the records to a snapshot, from a plan to the first step of what it says.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use uuid::Uuid;

use super::core::{Core, Outlook, now_ms};
use super::disk::DiskError;
use super::job::{JobRecord, State, Stop};
use crate::quota::{Cause, Job, JobId, JobState, Placement, Plan, Snapshot, plan};

impl Core {
    /// Gives what a decision starts from.
    pub fn snapshot(&self) -> Snapshot {
        let now_ms = now_ms();
        let mut held: BTreeMap<String, BTreeSet<_>> = BTreeMap::new();
        for job in self.jobs.values().filter(|job| job.state.has_gpus()) {
            let seats = job.attempt().into_iter().flat_map(|attempt| &attempt.placement.seats);
            let nodes: BTreeSet<_> = seats.map(|seat| seat.node.clone()).collect();
            for data in &job.spec.datasets {
                held.entry(data.commit.clone()).or_default().extend(nodes.iter().cloned());
            }
        }
        Snapshot {
            projects: self.cluster.projects.iter().map(|(name, project)| project.project(name)).collect(),
            nodes: self.cluster.nodes.values().map(|record| record.node.clone()).collect(),
            jobs: self.jobs.values().filter_map(|job| job_of(job, now_ms)).collect(),
            held,
        }
    }

    /// Decides, and takes the first step of each start and each pause: the record.
    pub(super) fn decide(&mut self) {
        let begun = Instant::now();
        self.dirty = false;
        let held = self.jobs.values().filter(|job| job.state == State::Pending).filter_map(|job| job.hold.as_ref());
        self.wake_ms = held.map(|hold| hold.until_ms).filter(|until_ms| *until_ms > now_ms()).min();
        let decided = match plan(&self.snapshot()) {
            Ok(decided) => decided,
            Err(error) => {
                tracing::error!(%error, "the records contradict themselves: nothing is started or paused");
                return;
            }
        };
        self.cycles += 1;
        self.cycle_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let Err(error) = self.carry_out(&decided) {
            tracing::error!(error = &error as &dyn std::error::Error, "a decision could not be written down");
            self.dirty = true;
        }
        self.outlook = outlook(&decided);
        self.shares = decided.shares;
    }

    fn carry_out(&mut self, decided: &Plan) -> Result<(), DiskError> {
        let ids: BTreeMap<JobId, Uuid> = self.jobs.values().map(|job| (job.key(), job.id)).collect();
        for preemption in &decided.preemptions {
            let why = match &preemption.cause {
                Cause::Needed { by, .. } => format!("paused for {by}"),
                Cause::Draining { node } => format!("paused: node {node} is draining"),
            };
            if let Some(id) = ids.get(&preemption.job) {
                tracing::info!(job = %preemption.job, why, "pausing");
                self.change(id, |job| job.stop(Stop::Preempted { why }, now_ms()))?;
            }
        }
        let mut start = self.jobs.values().filter(|job| job.state.has_gpus()).filter_map(JobRecord::attempt);
        let mut next =
            start.next().map(|first| start.map(|one| one.start).fold(first.start, u64::max) + 1).unwrap_or(0);
        for planned in decided.starts.iter().filter(|planned| planned.after.is_empty()) {
            let Some(id) = ids.get(&planned.job) else {
                continue;
            };
            tracing::info!(job = %planned.job, grounds = ?planned.grounds, "starting");
            let placement: Placement = planned.placement.clone();
            self.change(id, |job| job.begin(placement, next, now_ms()))?;
            next += 1;
        }
        Ok(())
    }
}

/// Gives what a decision sees of a job; None where it has and wants no GPUs.
fn job_of(job: &JobRecord, now_ms: i64) -> Option<Job> {
    let placement = || job.attempt().map(|attempt| attempt.placement.clone());
    let state = match &job.state {
        State::Pending if job.hold.as_ref().is_some_and(|hold| hold.until_ms > now_ms) => return None,
        State::Pending => JobState::Waiting,
        State::Starting | State::Running => {
            JobState::Running { placement: placement()?, started: job.attempt().map_or(0, |attempt| attempt.start) }
        }
        State::Stopping { .. } => JobState::Stopping { placement: placement()? },
        State::Completing { .. } | State::Succeeded | State::Failed { .. } | State::Cancelled => return None,
    };
    Some(Job {
        id: job.key(),
        project: job.project.as_str().into(),
        kind: job.spec.kind,
        priority: job.spec.priority(),
        preemptible: job.spec.kind.preemptible(),
        seq: job.seq,
        templates: job.spec.templates.clone(),
        near: job.spec.datasets.first().map(|data| data.commit.clone()),
        state,
    })
}

fn outlook(decided: &Plan) -> std::collections::HashMap<JobId, Outlook> {
    let waits = decided.waiting.iter().map(|waiting| (waiting.job.clone(), Outlook::Waits(waiting.why.clone())));
    let after = decided.starts.iter().filter(|start| !start.after.is_empty());
    waits.chain(after.map(|start| (start.job.clone(), Outlook::After(start.after.clone())))).collect()
}
