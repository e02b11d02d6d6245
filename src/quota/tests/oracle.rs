//! What must hold of every plan, computed naively and apart from the code that plans.

use std::collections::{BTreeMap, BTreeSet};

use super::super::{Cause, Grounds, Job, JobId, JobState, Node, NodeState, Plan, Project, Snapshot, Template};

fn seats_of(job: &Job) -> Vec<(&str, u32, u64)> {
    match &job.state {
        JobState::Waiting => Vec::new(),
        JobState::Running { placement, .. } | JobState::Stopping { placement } => placement
            .seats
            .iter()
            .flat_map(|seat| seat.gpus.iter().map(|gpu| (seat.node.as_str(), *gpu, seat.each.0)))
            .collect(),
    }
}

fn size_of(job: &Job) -> u64 {
    seats_of(job).iter().map(|(_, _, milli)| milli).sum()
}

fn level(job: &Job) -> u64 {
    if job.preemptible { job.priority.into() } else { u64::MAX }
}

fn started(job: &Job) -> Option<u64> {
    match job.state {
        JobState::Running { started, .. } => Some(started),
        JobState::Waiting | JobState::Stopping { .. } => None,
    }
}

/// Thousandths used of each GPU by `jobs`.
fn used<'a>(jobs: impl Iterator<Item = &'a Job>) -> BTreeMap<(&'a str, u32), u64> {
    let mut used = BTreeMap::new();
    for (node, gpu, milli) in jobs.flat_map(seats_of) {
        *used.entry((node, gpu)).or_default() += milli;
    }
    used
}

/// Running jobs of a project by rank, with `extra` as the last of its level.
fn ranked<'a>(snapshot: &'a Snapshot, project: &str, extra: Option<(u64, u64)>) -> Vec<(Option<&'a Job>, u64, u64)> {
    let jobs = snapshot.jobs.iter().filter(|job| job.project.as_str() == project);
    let mut all: Vec<_> =
        jobs.filter_map(|job| started(job).map(|at| (level(job), at, Some(job), size_of(job)))).collect();
    all.extend(extra.map(|(level, size)| (level, u64::MAX, None, size)));
    all.sort_by_key(|(level, at, _, _)| (std::cmp::Reverse(*level), *at));
    all.into_iter().map(|(level, _, job, size)| (job, level, size)).collect()
}

/// Names of the jobs within the quota, and of those within the fair share besides; None: `extra`.
type Lines<'a> = (BTreeSet<Option<&'a str>>, BTreeSet<Option<&'a str>>);

fn lines<'a>(snapshot: &'a Snapshot, project: &Project, fair_share: u64, extra: Option<(u64, u64)>) -> Lines<'a> {
    let ranked = ranked(snapshot, project.id.as_str(), extra);
    let (mut kept, mut fair, mut sum) = (BTreeSet::new(), BTreeSet::new(), 0);
    for (job, level, size) in &ranked {
        if *level == u64::MAX || sum + size <= project.quota.0 {
            sum += size;
            kept.insert(job.map(|job| job.id.as_str()));
        }
    }
    for (job, _, size) in &ranked {
        let id = job.map(|job| job.id.as_str());
        if !kept.contains(&id) && sum + size <= fair_share {
            sum += size;
            fair.insert(id);
        }
    }
    (kept, fair)
}

/// Whether the template may use the node, ready or not.
fn allowed(project: &Project, job: &Job, template: &Template, node: &Node) -> bool {
    let pools = if job.kind.in_interactive_pools() { &project.interactive_pools } else { &project.train_pools };
    let pool_of_template =
        template.pool.iter().all(|pool| node.pools.contains(pool) && (pools.is_empty() || pools.contains(pool)));
    (pools.is_empty() || node.pools.iter().any(|pool| pools.contains(pool)))
        && pool_of_template
        && template.labels.iter().all(|(name, value)| node.labels.get(name) == Some(value))
}

/// Processes of the template that fit beside what is used.
fn room(s: &Snapshot, project: &Project, job: &Job, template: &Template, used: &BTreeMap<(&str, u32), u64>) -> u64 {
    let nodes = s.nodes.iter().filter(|node| node.state == NodeState::Ready && allowed(project, job, template, node));
    nodes
        .map(|node| {
            let free = (0..node.gpus).map(|gpu| 1000 - used.get(&(node.id.as_str(), gpu)).copied().unwrap_or(0));
            match template.gpus.0 {
                milli if milli < 1000 => free.map(|free| free / milli).sum(),
                milli => free.filter(|free| *free == 1000).count() as u64 / (milli / 1000),
            }
        })
        .sum()
}

/// What a plan starts, what is used after it, and the lines of all projects before it lends.
struct Drawn<'a> {
    used: BTreeMap<(&'a str, u32), u64>,
    world: &'a Snapshot,
    kept: BTreeSet<Option<&'a str>>,
    fair: BTreeSet<Option<&'a str>>,
    new: BTreeSet<Option<&'a str>>,
}

impl<'a> Drawn<'a> {
    fn of(after: &'a Snapshot, world: &'a Snapshot, plan: &'a Plan) -> Self {
        let new = plan.started().into_iter().map(Some).collect();
        let used = used(after.jobs.iter());
        let mut drawn = Self { used, world, kept: BTreeSet::new(), fair: BTreeSet::new(), new };
        for project in &world.projects {
            let share = plan.shares.iter().find(|share| share.project == project.id).expect("each has a share");
            let (kept, fair) = lines(world, project, share.fair_share.0, None);
            drawn.kept.extend(kept);
            drawn.fair.extend(fair);
        }
        drawn
    }
}

/// Checks all promises of one plan.
pub fn check(before: &Snapshot, plan: &Plan, after: &Snapshot) {
    no_gpu_is_overcommitted_and_gangs_are_whole(before, plan, after);
    everybody_is_told(before, plan, after);
    pauses_are_just(before, plan, after);
    limits_hold(plan, after);
    let lent = |id: &JobId| plan.starts.iter().any(|start| start.job == *id && start.grounds == Grounds::Idle);
    let mut without_lent = after.clone();
    without_lent.jobs.iter_mut().filter(|job| lent(&job.id)).for_each(|job| job.state = JobState::Waiting);
    nobody_could_be_spared(before, plan, &without_lent);
    let drawn = Drawn::of(after, &without_lent, plan);
    for project in &after.projects {
        let share = plan.shares.iter().find(|share| share.project == project.id).expect("each project has a share");
        assert_eq!(share.allocated.0, after.allocated(project.id.as_str()).0, "{}", project.id);
        for job in after.jobs.iter().filter(|job| job.project == project.id && job.state == JobState::Waiting) {
            nothing_is_withheld(after, plan, &drawn, project, job);
        }
    }
}

fn no_gpu_is_overcommitted_and_gangs_are_whole(before: &Snapshot, plan: &Plan, after: &Snapshot) {
    for ((node, gpu), milli) in used(after.jobs.iter()) {
        let node = after.nodes.iter().find(|other| other.id.as_str() == node).expect("the node is there");
        assert!(gpu < node.gpus && milli <= 1000, "GPU {gpu} of {} carries {milli}", node.id);
    }
    for start in &plan.starts {
        let job = before.jobs.iter().find(|job| job.id == start.job).expect("the job is there");
        let project = before.projects.iter().find(|project| project.id == job.project).expect("is there");
        let template = &job.templates[start.placement.template];
        assert_eq!(start.placement.seats.len(), template.processes as usize, "{} is whole", job.id);
        for seat in &start.placement.seats {
            let node = before.nodes.iter().find(|node| node.id == seat.node).expect("the node is there");
            assert!(
                node.state == NodeState::Ready && allowed(project, job, template, node),
                "{} on {}",
                job.id,
                node.id
            );
            assert_eq!(seat.each.0 * seat.gpus.len() as u64, template.gpus.0);
            assert!(seat.gpus.len() == 1 || seat.each.0 == 1000);
        }
    }
}

fn everybody_is_told(before: &Snapshot, plan: &Plan, after: &Snapshot) {
    let started: BTreeSet<&str> = plan.started().into_iter().collect();
    let paused: BTreeSet<&str> = plan.paused().into_iter().collect();
    assert_eq!((started.len(), paused.len()), (plan.starts.len(), plan.preemptions.len()), "each job once");
    assert!(started.is_disjoint(&paused), "no job is paused in the cycle that starts it");
    let waits: BTreeSet<&str> =
        after.jobs.iter().filter(|j| j.state == JobState::Waiting).map(|j| j.id.as_str()).collect();
    let told: BTreeSet<&str> = plan.waiting.iter().map(|waiting| waiting.job.as_str()).collect();
    assert_eq!(waits, told);
    assert!(plan.waiting.iter().all(|waiting| !waiting.why.to_string().is_empty()));
    let waited = before.jobs.iter().filter(|job| job.state == JobState::Waiting).map(|job| job.id.as_str());
    let waited: BTreeSet<&str> = waited.collect();
    assert!(started.is_subset(&waited), "only waiting jobs are started");
}

/// Plays the plan again, start by start: who starts is entitled to it, and who is paused for it stands
/// beyond the line at that moment.
fn pauses_are_just(before: &Snapshot, plan: &Plan, after: &Snapshot) {
    let mut world = before.clone();
    let mut needed: BTreeMap<&JobId, Vec<&JobId>> = BTreeMap::new();
    for preemption in &plan.preemptions {
        let victim = world.jobs.iter_mut().find(|job| job.id == preemption.job).expect("the victim is there");
        assert!(victim.preemptible && started(victim).is_some(), "{} can't be paused", victim.id);
        match &preemption.cause {
            Cause::Needed { by, .. } => needed.entry(by).or_default().push(&preemption.job),
            // The first step.
            Cause::Draining { .. } => victim.state = JobState::Waiting,
        }
    }
    let project_of = |job: &Job| {
        let project = before.projects.iter().find(|project| project.id == job.project).expect("is there");
        let share = plan.shares.iter().find(|share| share.project == project.id).expect("is there");
        (project, share.fair_share.0)
    };
    for start in &plan.starts {
        let job = after.jobs.iter().find(|job| job.id == start.job).expect("is there");
        let (project, fair_share) = project_of(job);
        let (in_quota, in_share) = entitled(&world, project, fair_share, job, size_of(job));
        let victims = needed.remove(&start.job).unwrap_or_default();
        match start.grounds {
            Grounds::Quota => assert!(in_quota, "{} is not in quota", job.id),
            Grounds::Share => assert!(in_share, "{} is not in share", job.id),
            Grounds::Idle => assert!(job.preemptible && victims.is_empty(), "{} was only lent to", job.id),
        }
        world.jobs.iter_mut().filter(|other| other.id == job.id).for_each(|other| other.state = job.state.clone());
        for victim in &victims {
            let (project, fair_share) = project_of(world.jobs.iter().find(|job| job.id == **victim).expect("is there"));
            let (kept, fair) = lines(&world, project, fair_share, None);
            let id = Some(victim.as_str());
            assert!(!kept.contains(&id), "{victim} was within its quota");
            assert!(!fair.contains(&id) || start.grounds == Grounds::Quota, "{victim} was within its share");
        }
        world.jobs.iter_mut().filter(|job| victims.contains(&&job.id)).for_each(|job| job.state = JobState::Waiting);
    }
    assert!(needed.is_empty(), "{needed:?} are paused for nobody");
}

/// None of those who were paused for others could simply go on: its GPUs are used, or its limit is.
/// What was lent afterwards doesn't count.
fn nobody_could_be_spared(before: &Snapshot, plan: &Plan, without_lent: &Snapshot) {
    for preemption in plan.preemptions.iter().filter(|preemption| matches!(preemption.cause, Cause::Needed { .. })) {
        let victim = before.jobs.iter().find(|job| job.id == preemption.job).expect("the victim is there");
        let project = before.projects.iter().find(|project| project.id == victim.project).expect("is there");
        let with = without_lent.jobs.iter().filter(|job| job.id != victim.id).chain([victim]);
        let overcommitted = used(with).values().any(|milli| *milli > 1000);
        let allocated = without_lent.allocated(project.id.as_str()).0 + size_of(victim);
        let over_limit = project.limit.is_some_and(|limit| allocated > limit.0);
        assert!(overcommitted || over_limit, "{} could be spared", victim.id);
    }
}

/// Whether a job of that size is in quota, and in share.
fn entitled(s: &Snapshot, project: &Project, fair_share: u64, job: &Job, size: u64) -> (bool, bool) {
    let (kept, fair) = lines(s, project, fair_share, None);
    let sum = |ids: &BTreeSet<Option<&str>>, least: u64| -> u64 {
        let of_rank = s.jobs.iter().filter(|other| ids.contains(&Some(other.id.as_str())) && level(other) >= least);
        of_rank.map(size_of).sum()
    };
    let in_quota = sum(&kept, level(job)) + size <= project.quota.0;
    (in_quota, job.preemptible && sum(&kept, 0) + sum(&fair, level(job)) + size <= fair_share)
}

fn limits_hold(plan: &Plan, after: &Snapshot) {
    for project in &after.projects {
        let jobs = || after.jobs.iter().filter(|job| job.project == project.id && started(job).is_some());
        let starts: Vec<&Job> = jobs().filter(|job| plan.started().contains(&job.id.as_str())).collect();
        if let Some(limit) = project.limit.filter(|_| !starts.is_empty()) {
            assert!(jobs().map(size_of).sum::<u64>() <= limit.0, "{} is above its limit", project.id);
        }
        if starts.iter().any(|job| !job.preemptible) {
            let firm: u64 = jobs().filter(|job| !job.preemptible).map(size_of).sum();
            assert!(firm <= project.quota.0, "{} has {firm} that can't be taken back", project.id);
        }
    }
}

/// A waiting job is entitled to nothing that it could have. The lines are those before anything was
/// lent: whom that pushes over a line is looked at in the next cycle.
fn nothing_is_withheld(after: &Snapshot, plan: &Plan, drawn: &Drawn<'_>, project: &Project, job: &Job) {
    let why = plan.why(job.id.as_str());
    let paused = plan.paused().contains(&job.id.as_str());
    let fair_share = plan.shares.iter().find(|share| share.project == project.id).expect("is there").fair_share.0;
    for template in job.templates.iter().filter(|template| template.is_sound()) {
        let size = template.size().0;
        let allocated = after.allocated(project.id.as_str()).0;
        let limit = project.limit.map_or(u64::MAX, |limit| limit.0);
        let (kept, fair) = lines(drawn.world, project, fair_share, Some((level(job), size)));
        let (in_quota, in_share) = entitled(drawn.world, project, fair_share, job, size);
        for (entitled, with_fair) in [(in_quota, false), (in_share, true)] {
            // A job paused in this plan comes back in the next one at the earliest.
            if !entitled || paused {
                continue;
            }
            let stays = |other: &&Job| {
                let id = Some(other.id.as_str());
                let within = match other.project == job.project {
                    true => kept.contains(&id) || (with_fair && fair.contains(&id)),
                    false => drawn.kept.contains(&id) || (with_fair && drawn.fair.contains(&id)),
                };
                started(other).is_some() && (!other.preemptible || within || drawn.new.contains(&id))
            };
            let own: u64 =
                after.jobs.iter().filter(|other| other.project == job.project).filter(stays).map(size_of).sum();
            let room = room(after, project, job, template, &used(after.jobs.iter().filter(stays)));
            let possible = room >= u64::from(template.processes) && own + size <= limit;
            assert!(!possible, "{} is entitled (quota {in_quota}, share {in_share}) and would fit: {why}", job.id);
        }
        let idle = room(after, project, job, template, &drawn.used);
        let lendable = job.preemptible && !paused && allocated + size <= limit;
        assert!(!lendable || idle < u64::from(template.processes), "{} would fit on idle GPUs: {why}", job.id);
    }
    let sound = job.templates.iter().filter(|template| template.is_sound());
    let possible = sound.into_iter().any(|t| room(after, project, job, t, &BTreeMap::new()) >= u64::from(t.processes));
    assert_eq!(!possible && !paused, matches!(why.kind(), "no-candidate" | "unsound"), "{}: {why}", job.id);
}
