//! One decision: the state while it is made, and its steps in order.
//!
//! [`plan`] reads as the list in `docs/design/fair-share.md`: drain, quota, share, idle, why.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap, HashMap};

use super::cluster::{Cluster, Request, Spot};
use super::demands::Classes;
use super::explain;
use super::ledger::{Account, FIRM, Standing};
use super::plan::{Cause, Grounds, Plan, Preemption, ProjectShare, Start};
use super::share::{Claim, fair_shares};
use super::snapshot::{
    Job, JobId, JobState, MilliGpus, Node, NodeId, NodeState, Placement, Project, ProjectId, Seat, Snapshot,
    SnapshotError,
};

/// What a job does while the decision is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Waiting,
    Running,
    /// Stops, by this plan or an earlier one; its GPUs count as free.
    Leaving,
    /// Is started by this plan.
    Starting,
}

/// A job while the decision is made.
#[derive(Debug)]
pub(super) struct Work<'a> {
    pub job: &'a Job,
    pub project: u32,
    pub level: u64,
    pub phase: Phase,
    pub standing: Standing,
    pub started: u64,
    /// GPUs of all its spots.
    pub size: u64,
    pub spots: Vec<Spot>,
    /// The first of its templates that the empty cluster would hold.
    pub first: Option<Request>,
    /// Its templates; None where GPUs can't be cut like that.
    pub requests: Vec<Option<Request>>,
}

/// A request that would not fit even after all pauses. With project and level: only asked by these,
/// because asking pushes jobs of the project over a line.
pub(super) type Hopeless = (Request, Grounds, Option<(u32, u64)>);

/// Everything while the decision is made.
pub(super) struct State<'a> {
    pub nodes: Vec<&'a Node>,
    pub projects: Vec<&'a Project>,
    pub jobs: Vec<Work<'a>>,
    pub accounts: Vec<Account>,
    pub cluster: Cluster,
    pub classes: Classes,
    /// Running jobs by node.
    pub on_node: Vec<Vec<u32>>,
    /// By what jobs like to be near to: whether the node holds it.
    near: BTreeMap<&'a str, Vec<bool>>,
    next_start: u64,
    /// Requests that did not fit, and the number of releases then.
    full: HashMap<Request, u64>,
    /// Requests that would not fit even after all pauses, and what was so then.
    pub hopeless: HashMap<Hopeless, (u64, usize)>,
    /// Counts changes of standings: what was hopeless is so until one.
    pub lowered: u64,
    /// How many jobs a node must lose for one more process, with the version of the node then.
    pub costs: HashMap<(u32, Grounds), Vec<(u64, u32)>>,
    /// By process size and grounds: how many more processes each node could have, and at which of its versions.
    pub possible_slots: HashMap<(u32, Grounds), Vec<(u64, u32)>>,
    pub plan: Plan,
}

/// Decides what to start and what to pause.
pub fn plan(snapshot: &Snapshot) -> Result<Plan, SnapshotError> {
    let mut state = State::new(snapshot)?;
    state.drain();
    state.divide();
    let mut queues = state.queues();
    // Each step may move the lines that the other looks at: a pause for a share leaves room that a quota
    // is entitled to, a job that is given back pushes another over a line.
    let (mut first, mut share_is_done) = (true, false);
    while state.serve_all(Grounds::Quota, &mut queues, first) || !share_is_done {
        let started = state.serve_all(Grounds::Share, &mut queues, first);
        let spared = state.spare_needless();
        if !started && !spared {
            break;
        }
        if spared {
            // Starts may be undone.
            queues = state.queues();
        }
        // The last pass found nothing: it looks again only if something changes before.
        (first, share_is_done) = (false, !spared);
    }
    state.draw_all();
    state.serve(Grounds::Idle, &mut queues);
    state.draw_all();
    state.name_what_goes_before();
    state.plan.waiting = explain::waiting(&mut state);
    state.plan.shares = state.shares();
    Ok(state.plan)
}

fn by_id<T, K: Ord>(
    all: &[T],
    key: impl Fn(&T) -> &K,
    error: impl Fn(&K) -> SnapshotError,
) -> Result<Vec<&T>, SnapshotError> {
    let mut sorted: Vec<&T> = all.iter().collect();
    sorted.sort_by(|a, b| key(a).cmp(key(b)));
    match sorted.windows(2).find(|pair| key(pair[0]) == key(pair[1])) {
        Some(pair) => Err(error(key(pair[0]))),
        None => Ok(sorted),
    }
}

impl<'a> State<'a> {
    fn new(snapshot: &'a Snapshot) -> Result<Self, SnapshotError> {
        let nodes = by_id(&snapshot.nodes, |node| &node.id, |id| SnapshotError::DuplicateNode(id.clone()))?;
        let projects =
            by_id(&snapshot.projects, |project| &project.id, |id| SnapshotError::DuplicateProject(id.clone()))?;
        let jobs = by_id(&snapshot.jobs, |job| &job.id, |id| SnapshotError::DuplicateJob(id.clone()))?;
        let accounts = projects.iter().map(|project| Account::new(project.quota, project.weight(), project.limit));
        let mut state = Self {
            accounts: accounts.collect(),
            cluster: Cluster::new(nodes.iter().map(|node| (node.gpus, node.state == NodeState::Ready))),
            on_node: vec![Vec::new(); nodes.len()],
            near: BTreeMap::new(),
            jobs: Vec::with_capacity(jobs.len()),
            classes: Classes::default(),
            next_start: 0,
            full: HashMap::new(),
            hopeless: HashMap::new(),
            lowered: 0,
            costs: HashMap::new(),
            possible_slots: HashMap::new(),
            plan: Plan::default(),
            nodes,
            projects,
        };
        for (what, holders) in &snapshot.held {
            let holds = state.nodes.iter().map(|node| holders.contains(&node.id)).collect();
            state.near.insert(what, holds);
        }
        let project_numbers: HashMap<&ProjectId, u32> = state.projects.iter().map(|p| &p.id).zip(0..).collect();
        let node_numbers: HashMap<&NodeId, u32> = state.nodes.iter().map(|node| &node.id).zip(0..).collect();
        for job in jobs {
            let unknown = || SnapshotError::UnknownProject { job: job.id.clone(), project: job.project.clone() };
            let project = *project_numbers.get(&job.project).ok_or_else(unknown)?;
            state.add(job, project, &node_numbers)?;
        }
        // Only now: what stops must have had its place beside what runs.
        for number in 0..state.jobs.len() {
            if state.jobs[number].phase == Phase::Leaving {
                state.jobs[number].spots.iter().for_each(|spot| state.cluster.release(spot));
            }
        }
        Ok(state)
    }

    fn add(&mut self, job: &'a Job, project: u32, nodes: &HashMap<&NodeId, u32>) -> Result<(), SnapshotError> {
        let number = self.jobs.len() as u32;
        let owner = self.projects[project as usize];
        let requests = job.templates.iter().map(|t| self.classes.request(&self.nodes, owner, job, t)).collect();
        let level = if job.preemptible { u64::from(job.priority) } else { FIRM };
        let (phase, placement, started) = match &job.state {
            JobState::Waiting => (Phase::Waiting, None, 0),
            JobState::Running { placement, started } => (Phase::Running, Some(placement), *started),
            JobState::Stopping { placement } => (Phase::Leaving, Some(placement), 0),
        };
        let mut spots = Vec::new();
        for seat in placement.iter().flat_map(|placement| &placement.seats) {
            let unknown = || SnapshotError::UnknownNode { job: job.id.clone(), node: seat.node.clone() };
            let node = *nodes.get(&seat.node).ok_or_else(unknown)?;
            let spot = Spot { node, gpus: seat.gpus.clone(), each: u32::try_from(seat.each.0).unwrap_or(u32::MAX) };
            let full = |gpu| SnapshotError::Overcommitted { job: job.id.clone(), node: seat.node.clone(), gpu };
            self.cluster.take(&spot).map_err(full)?;
            spots.push(spot);
        }
        let size = placement.map_or(0, |placement| placement.size().0);
        let standing = Standing::Lent;
        self.jobs.push(Work { job, project, level, phase, standing, started, size, spots, first: None, requests });
        if phase == Phase::Running {
            self.next_start = self.next_start.max(started.saturating_add(1));
            self.accounts[project as usize].insert(number, level, started, size);
            self.seat(number);
        }
        Ok(())
    }

    /// Lists a running job at its nodes.
    fn seat(&mut self, number: u32) {
        for spot in &self.jobs[number as usize].spots {
            let there = &mut self.on_node[spot.node as usize];
            if !there.contains(&number) {
                there.push(number);
            }
        }
    }

    /// Stops a running job: its GPUs are free for the plan.
    pub fn pause(&mut self, number: u32) {
        let work = &mut self.jobs[number as usize];
        work.phase = Phase::Leaving;
        for spot in &work.spots {
            self.on_node[spot.node as usize].retain(|job| *job != number);
            self.cluster.release(spot);
        }
        let project = work.project;
        self.accounts[project as usize].remove(number);
        self.draw(project);
    }

    /// Takes a pause back.
    pub fn unpause(&mut self, number: u32) {
        let work = &mut self.jobs[number as usize];
        work.phase = Phase::Running;
        for spot in &work.spots {
            let taken = self.cluster.take(spot);
            debug_assert!(taken.is_ok(), "what was released a moment ago is free");
        }
        // As its account has it until the lines are drawn: they may have moved meanwhile.
        work.standing = Standing::Lent;
        self.lowered += 1;
        let (project, level, started, size) = (work.project, work.level, work.started, work.size);
        self.accounts[project as usize].insert(number, level, started, size);
        self.seat(number);
        self.draw(project);
    }

    /// Draws the lines of a project anew.
    pub fn draw(&mut self, project: u32) {
        let (jobs, nodes) = (&mut self.jobs, &mut self.cluster.nodes);
        let lowered = &mut self.lowered;
        self.accounts[project as usize].draw(|number, standing| {
            let work = &mut jobs[number as usize];
            work.standing = standing;
            *lowered += 1;
            work.spots.iter().for_each(|spot| nodes[spot.node as usize].version += 1);
        });
        debug_assert!(self.standings_agree(project));
    }

    /// Says whether the running jobs stand where their project's account has them.
    fn standings_agree(&self, project: u32) -> bool {
        let mut running = self.accounts[project as usize].entries.iter().map(|entry| {
            let work = &self.jobs[entry.job as usize];
            work.phase != Phase::Running || work.standing == entry.standing
        });
        running.all(|agrees| agrees)
    }

    fn draw_all(&mut self) {
        for project in 0..self.accounts.len() as u32 {
            self.draw(project);
        }
    }

    /// Pauses what can be paused on draining nodes.
    fn drain(&mut self) {
        for number in 0..self.jobs.len() as u32 {
            let work = &self.jobs[number as usize];
            if work.phase != Phase::Running || !work.job.preemptible {
                continue;
            }
            let draining = work.spots.iter().map(|spot| self.nodes[spot.node as usize]);
            let Some(node) = draining.into_iter().find(|node| node.state == NodeState::Draining) else {
                continue;
            };
            self.plan
                .preemptions
                .push(Preemption { job: work.job.id.clone(), cause: Cause::Draining { node: node.id.clone() } });
            self.pause(number);
        }
    }

    /// Finds the fair shares: from all jobs that run, wait or stop, so that pausing one changes nothing.
    fn divide(&mut self) {
        let mut unready: Vec<u64> = vec![0; self.accounts.len()];
        let mut capacity: u64 =
            self.nodes.iter().filter(|n| n.state == NodeState::Ready).map(|n| u64::from(n.gpus) * 1000).sum();
        for work in &mut self.jobs {
            let running = work.phase == Phase::Running;
            // What runs on nodes that take nothing new is capacity only as long as it runs.
            if running {
                let outside = work.spots.iter().filter(|spot| self.nodes[spot.node as usize].state != NodeState::Ready);
                let outside: u64 = outside.map(|spot| u64::from(spot.each) * spot.gpus.len() as u64).sum();
                capacity = capacity.saturating_add(outside);
                unready[work.project as usize] += outside;
            }
            work.first = work.requests.iter().flatten().copied().find(|request| self.classes.possible(request, false));
            let wants = work.first.map_or(if running { work.size } else { 0 }, |request| request.size());
            let account = &mut self.accounts[work.project as usize];
            account.demand = account.demand.saturating_add(wants);
        }
        let pools = self.reachable_gpus();
        for (account, pools) in self.accounts.iter_mut().zip(pools) {
            account.demand = account.demand.min(account.limit);
            if let Some(gpus) = pools {
                account.demand = account.demand.min(gpus.saturating_mul(1000));
            }
        }
        for (account, outside) in self.accounts.iter_mut().zip(unready) {
            account.demand = account.demand.max(outside.min(account.limit));
        }
        let claims = self.accounts.iter().map(|account| Claim {
            quota: MilliGpus(account.quota),
            weight: account.weight,
            demand: MilliGpus(account.demand),
        });
        let shares = fair_shares(MilliGpus(capacity), &claims.collect::<Vec<_>>());
        self.accounts.iter_mut().zip(shares).for_each(|(account, share)| account.fair_share = share.0);
    }

    /// By project: GPUs of the ready nodes that its pools reach; None if it may go anywhere.
    fn reachable_gpus(&self) -> Vec<Option<u64>> {
        let reach = |project: &&Project| {
            if project.train_pools.is_empty() || project.interactive_pools.is_empty() {
                return None;
            }
            let inside = |node: &&&Node| {
                node.state == NodeState::Ready
                    && (!node.pools.is_disjoint(&project.train_pools)
                        || !node.pools.is_disjoint(&project.interactive_pools))
            };
            Some(self.nodes.iter().filter(inside).map(|node| u64::from(node.gpus)).sum())
        };
        self.projects.iter().map(reach).collect()
    }

    /// By project: its waiting jobs, in order. Those that no node could hold take nobody's turn.
    fn queues(&self) -> Vec<Vec<u32>> {
        let mut queues = vec![Vec::new(); self.accounts.len()];
        for (work, number) in self.jobs.iter().zip(0u32..) {
            if work.phase == Phase::Waiting && work.first.is_some() {
                queues[work.project as usize].push(number);
            }
        }
        for queue in &mut queues {
            // Jobs are in the order of their names, and the sort keeps it among equals.
            queue.sort_by_key(|number| {
                let work = &self.jobs[*number as usize];
                (Reverse(work.level), Reverse(work.job.priority), work.job.seq)
            });
        }
        queues
    }

    /// Serves until nothing starts: starts may have brought others so near to a line that somebody who
    /// was refused can push them over it now. Says whether something started.
    fn serve_all(&mut self, grounds: Grounds, queues: &mut [Vec<u32>], first: bool) -> bool {
        self.draw_all();
        let before = self.plan.starts.len();
        if first {
            self.serve(grounds, queues);
        }
        let mut again = !first || self.plan.starts.len() > before;
        while again {
            let starts = self.plan.starts.len();
            // Few: nobody else has a turn to wait for.
            let mut entitled = self.entitled(grounds, queues);
            self.serve(grounds, &mut entitled);
            again = self.plan.starts.len() > starts;
        }
        self.leave_queues(queues);
        self.plan.starts.len() > before
    }

    /// Those of the queues that could start on these grounds, were there room.
    fn entitled(&self, grounds: Grounds, queues: &[Vec<u32>]) -> Vec<Vec<u32>> {
        let could = |number: &&u32| {
            let work = &self.jobs[**number as usize];
            let mut sizes = work.requests.iter().flatten().map(|request| request.size());
            work.phase == Phase::Waiting && sizes.any(|size| self.is_entitled(work, size, grounds))
        };
        queues.iter().map(|queue| queue.iter().filter(could).copied().collect()).collect()
    }

    fn is_entitled(&self, work: &Work<'_>, size: u64, grounds: Grounds) -> bool {
        let account = &self.accounts[work.project as usize];
        match grounds {
            Grounds::Quota => account.in_quota(work.level, size),
            Grounds::Share => work.job.preemptible && account.in_share(work.level, size),
            Grounds::Idle => work.job.preemptible,
        }
    }

    /// Goes once through all waiting jobs, the projects in turn; started ones leave the queues.
    fn serve(&mut self, grounds: Grounds, queues: &mut [Vec<u32>]) {
        let mut turns: BinaryHeap<Reverse<Turn>> = BinaryHeap::new();
        let mut next = vec![0usize; queues.len()];
        for (project, queue) in queues.iter().enumerate() {
            turns.extend(queue.first().map(|number| Reverse(self.turn(grounds, project as u32, *number))));
        }
        while let Some(Reverse(turn)) = turns.pop() {
            let project = turn.project as usize;
            let queue = &queues[project];
            if let Some(number) = queue.get(next[project]) {
                self.attempt(*number, grounds);
            }
            next[project] += 1;
            turns.extend(queue.get(next[project]).map(|number| Reverse(self.turn(grounds, turn.project, *number))));
        }
        self.leave_queues(queues);
    }

    fn leave_queues(&self, queues: &mut [Vec<u32>]) {
        for queue in queues {
            queue.retain(|number| self.jobs[*number as usize].phase == Phase::Waiting);
        }
    }

    fn turn(&self, grounds: Grounds, project: u32, number: u32) -> Turn {
        let (account, work) = (&self.accounts[project as usize], &self.jobs[number as usize]);
        let seq = work.job.seq;
        let size = work.first.map_or(0, |request| request.size());
        if grounds == Grounds::Quota {
            // All of them are entitled, so the order is free: large ones first pack best.
            let large = work.first.map(|request| (request.milli, request.processes));
            let (part, of) = (account.kept().into(), account.quota.max(1).into());
            return Turn { last: false, large: Reverse(large), part, of, seq, project };
        }
        let above = account.allocated.saturating_add(size).saturating_sub(account.quota);
        let last = account.weight == 0 && above > 0;
        Turn { last, large: Reverse(None), part: above.into(), of: account.weight.max(1).into(), seq, project }
    }

    /// Starts the job by its first template that can be had on these grounds.
    fn attempt(&mut self, number: u32, grounds: Grounds) -> bool {
        for template in 0..self.jobs[number as usize].requests.len() {
            let work = &self.jobs[number as usize];
            let Some(request) = work.requests[template] else {
                continue;
            };
            let (account, size) = (&self.accounts[work.project as usize], request.size());
            if !self.is_entitled(work, size, grounds) || !self.classes.possible(&request, false) {
                continue;
            }
            let within_limit = account.allocated.saturating_add(size) <= account.limit;
            let free = if within_limit { self.take_free(number, &request) } else { None };
            if let Some(spots) = free {
                self.start(number, template, spots, grounds);
                return true;
            }
            if grounds != Grounds::Idle
                && let Some(spots) = self.take_by_pausing(number, &request, grounds)
            {
                self.start(number, template, spots, grounds);
                return true;
            }
        }
        false
    }

    /// Takes free GPUs, where the job likes to be or else anywhere.
    pub fn take_free(&mut self, number: u32, request: &Request) -> Option<Vec<Spot>> {
        if self.full.get(request) == Some(&self.cluster.releases) {
            return None;
        }
        let class = self.classes.class(request.class);
        let near = self.jobs[number as usize].job.near.as_deref().and_then(|what| self.near.get(what));
        let nearby =
            near.and_then(|holds| self.cluster.place(request, &|node| class.has(node) && holds[node as usize]));
        let spots = nearby.or_else(|| self.cluster.place(request, &|node| class.has(node)));
        if spots.is_none() {
            self.full.insert(*request, self.cluster.releases);
        }
        spots
    }

    /// The number that the next start gets.
    pub fn next_start(&self) -> u64 {
        self.next_start
    }

    fn start(&mut self, number: u32, template: usize, spots: Vec<Spot>, grounds: Grounds) {
        let seat = |spot: &Spot| Seat {
            node: self.nodes[spot.node as usize].id.clone(),
            gpus: spot.gpus.clone(),
            each: MilliGpus(u64::from(spot.each)),
        };
        let seats = spots.iter().map(seat).collect();
        let work = &mut self.jobs[number as usize];
        let placement = Placement { template, seats };
        work.phase = Phase::Starting;
        work.started = self.next_start;
        work.standing = Standing::Lent;
        work.size = placement.size().0;
        work.spots = spots;
        self.next_start += 1;
        self.plan.starts.push(Start { job: work.job.id.clone(), placement, grounds, after: Vec::new() });
        let (project, level, started, size) = (work.project, work.level, work.started, work.size);
        let account = &mut self.accounts[project as usize];
        let plain = grounds == Grounds::Quota && !account.displaces(size);
        account.insert(number, level, started, size);
        if plain {
            // Nobody falls out: the line between kept and not kept moves by this job only.
            account.keep(number, level, size);
            self.jobs[number as usize].standing = Standing::Kept;
        } else if grounds != Grounds::Idle {
            self.draw(project);
        }
    }

    /// Names, for each start, the jobs that still have its GPUs.
    fn name_what_goes_before(&mut self) {
        let mut leaving: HashMap<(u32, u32), Vec<&JobId>> = HashMap::new();
        for work in self.jobs.iter().filter(|work| work.phase == Phase::Leaving) {
            for (node, gpu) in work.spots.iter().flat_map(|spot| spot.gpus.iter().map(|gpu| (spot.node, *gpu))) {
                leaving.entry((node, gpu)).or_default().push(&work.job.id);
            }
        }
        if leaving.is_empty() {
            return;
        }
        let numbers: HashMap<&NodeId, u32> = self.nodes.iter().map(|node| &node.id).zip(0..).collect();
        for start in &mut self.plan.starts {
            let places = start.placement.seats.iter().flat_map(|seat| {
                let node = numbers.get(&seat.node).copied().unwrap_or(u32::MAX);
                seat.gpus.iter().map(move |gpu| (node, *gpu))
            });
            let mut after: Vec<JobId> =
                places.filter_map(|place| leaving.get(&place)).flatten().map(|id| (*id).clone()).collect();
            after.sort();
            after.dedup();
            start.after = after;
        }
    }

    fn shares(&self) -> Vec<ProjectShare> {
        let share = |(project, account): (&&Project, &Account)| ProjectShare {
            project: project.id.clone(),
            quota: project.quota,
            fair_share: MilliGpus(account.fair_share),
            allocated: MilliGpus(account.allocated),
            kept: MilliGpus(account.kept()),
            demand: MilliGpus(account.demand),
        };
        self.projects.iter().zip(&self.accounts).map(share).collect()
    }
}

/// Whose turn it is: the smallest first.
#[derive(Debug)]
struct Turn {
    last: bool,
    large: Reverse<Option<(u32, u32)>>,
    part: u128,
    of: u128,
    seq: u64,
    project: u32,
}

impl Ord for Turn {
    fn cmp(&self, other: &Self) -> Ordering {
        let ratio = (self.part * other.of).cmp(&(other.part * self.of));
        let size = self.last.cmp(&other.last).then(self.large.cmp(&other.large));
        size.then(ratio).then(self.seq.cmp(&other.seq)).then(self.project.cmp(&other.project))
    }
}

impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Turn {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Turn {}
