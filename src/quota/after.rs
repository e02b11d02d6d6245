//! The snapshot once a plan is carried out, as if pausing took no time.

use std::collections::{HashMap, HashSet};

use super::plan::Plan;
use super::snapshot::{JobId, JobState, Placement, Snapshot};

/// Carries the plan out: paused jobs wait with their place in the queue, started ones run, and what
/// was stopping is gone.
pub fn after(mut snapshot: Snapshot, plan: &Plan) -> Snapshot {
    let paused: HashSet<&JobId> = plan.preemptions.iter().map(|preemption| &preemption.job).collect();
    let starts: HashMap<&JobId, (u64, &Placement)> =
        (0u64..).zip(&plan.starts).map(|(number, start)| (&start.job, (number, &start.placement))).collect();
    let last = snapshot.jobs.iter().map(|job| match job.state {
        JobState::Running { started, .. } => started.saturating_add(1),
        JobState::Waiting | JobState::Stopping { .. } => 0,
    });
    let next = last.max().unwrap_or(0);
    snapshot.jobs.retain(|job| !matches!(job.state, JobState::Stopping { .. }));
    for job in &mut snapshot.jobs {
        if paused.contains(&job.id) {
            job.state = JobState::Waiting;
        }
        if let Some((number, placement)) = starts.get(&job.id) {
            job.state = JobState::Running { placement: (*placement).clone(), started: next + number };
        }
    }
    snapshot
}
