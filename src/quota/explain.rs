//! Why each job goes on waiting: the one reason that holds for the state after the plan.

use std::collections::HashMap;

use super::cluster::Request;
use super::cycle::{Phase, State, Work};
use super::plan::{Cause, Grounds, Waiting};
use super::snapshot::{JobId, MilliGpus};
use super::why::Why;

/// Answers that many jobs share.
#[derive(Default)]
struct Memo {
    slots: HashMap<(Request, Grounds), u32>,
    free: HashMap<u32, MilliGpus>,
}

/// Gives the reasons, by the jobs' names.
pub(super) fn waiting(state: &mut State<'_>) -> Vec<Waiting> {
    let mut memo = Memo::default();
    let paused: HashMap<JobId, Cause> =
        state.plan.preemptions.iter().map(|p| (p.job.clone(), p.cause.clone())).collect();
    let mut all = Vec::new();
    for number in 0..state.jobs.len() {
        let job = state.jobs[number].job;
        let why = match (paused.get(&job.id), state.jobs[number].phase) {
            (Some(Cause::Needed { by, project, .. }), _) => {
                Why::PausedFor { job: by.clone(), project: project.clone() }
            }
            (Some(Cause::Draining { node }), _) => Why::PausedByDrain { node: node.clone() },
            (None, Phase::Waiting) => reason(state, number, &mut memo),
            (None, Phase::Running | Phase::Starting | Phase::Leaving) => continue,
        };
        all.push(Waiting { job: job.id.clone(), why });
    }
    all
}

fn reason(state: &mut State<'_>, number: usize, memo: &mut Memo) -> Why {
    match state.jobs[number].first {
        Some(request) => entitlement(state, number, &request, memo),
        None => impossible(state, number),
    }
}

/// No node could hold it.
fn impossible(state: &mut State<'_>, number: usize) -> Why {
    let Some(request) = state.jobs[number].requests.iter().flatten().next().copied() else {
        let asked = state.jobs[number].job.templates.first();
        return Why::Unsound { gpus: asked.map_or(MilliGpus(0), |template| template.gpus) };
    };
    let (nodes, largest) = state.classes.class(request.class).ready();
    Why::NoCandidate {
        gpus: MilliGpus(request.milli.into()),
        processes: request.processes,
        nodes,
        largest: MilliGpus::whole(largest.into()),
        cordoned: state.classes.possible(&request, true),
    }
}

/// A node could hold it: it is not its turn, or there is no room.
fn entitlement(state: &State<'_>, number: usize, request: &Request, memo: &mut Memo) -> Why {
    let work: &Work<'_> = &state.jobs[number];
    let (account, project) = (&state.accounts[work.project as usize], work.job.project.clone());
    let (size, needs) = (request.size(), MilliGpus(request.size()));
    let in_quota = account.in_quota(work.level, size);
    let in_share = work.job.preemptible && account.in_share(work.level, size);
    let allocated = MilliGpus(account.allocated);
    if !in_quota && !work.job.preemptible {
        let kept = MilliGpus(account.kept_from(work.level));
        return Why::QuotaInUse { project, kept, quota: MilliGpus(account.quota), needs };
    }
    if account.allocated.saturating_add(size) > account.limit {
        return Why::Limit { project, allocated, limit: MilliGpus(account.limit), needs };
    }
    let free = *memo.free.entry(request.class).or_insert_with(|| state.free_for(request));
    if !in_quota && !in_share {
        return Why::ShareInUse { project, allocated, fair_share: MilliGpus(account.fair_share), needs, free };
    }
    let grounds = if in_quota { Grounds::Quota } else { Grounds::Share };
    let possible = *memo.slots.entry((*request, grounds)).or_insert_with(|| state.slots_possible(request, grounds));
    let (gpus, processes) = (MilliGpus(request.milli.into()), request.processes);
    Why::Fragmented { project, in_quota, gpus, processes, possible, free }
}
