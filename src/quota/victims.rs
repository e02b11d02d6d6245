//! Whom to pause so that an entitled job fits: as few as possible, from the projects that are
//! furthest above their share, the youngest; and none that could be spared.

use std::cmp::{Ordering, Reverse};
use std::collections::HashMap;

use super::cluster::{Request, Spot, slots};
use super::cycle::{Phase, State};
use super::ledger::Standing;
use super::plan::{Cause, Grounds, Preemption};
use super::snapshot::MilliGpus;

/// Nodes of equal cost that are compared by whom they would hit; the rest are not looked at.
const COMPARED_MAX: usize = 32;
/// Cost of a node that can't hold one more process, whoever is paused.
const NEVER: u32 = u32::MAX;

impl State<'_> {
    /// Says whether the job may be paused for one that starts on these grounds.
    fn may_pause(&self, number: u32, grounds: Grounds) -> bool {
        let work = &self.jobs[number as usize];
        let line = match grounds {
            Grounds::Quota => Standing::Kept,
            Grounds::Share | Grounds::Idle => Standing::Fair,
        };
        work.phase == Phase::Running && work.job.preemptible && work.standing > line && grounds != Grounds::Idle
    }

    /// Pauses jobs and takes their GPUs, or changes nothing.
    pub fn take_by_pausing(&mut self, number: u32, request: &Request, grounds: Grounds) -> Option<Vec<Spot>> {
        let work = &self.jobs[number as usize];
        let (project, level, size) = (work.project, work.level, request.size());
        let account = &self.accounts[project as usize];
        let displaces = match grounds {
            Grounds::Quota => account.displaces(size),
            // One that is in quota, too, stands before lower ones that are kept.
            Grounds::Share | Grounds::Idle => {
                account.displaces_fair(size) || (account.in_quota(level, size) && account.displaces(size))
            }
        };
        let alone = !displaces && account.allocated.saturating_add(size) <= account.limit;
        let key = (*request, grounds, (!alone).then_some((project, level)));
        let lowered = self.lowered;
        let now = (lowered, if alone { 0 } else { self.plan.starts.len() });
        if self.hopeless.get(&key) == Some(&now) {
            return None;
        }
        // The job counts already: lower ones of its project may fall over the line by it.
        let started = self.next_start();
        self.accounts[project as usize].insert(number, level, started, size);
        if displaces {
            self.draw(project);
        }
        let possible = self.possible(request, grounds, project);
        let spots = if possible { self.make_room(number, request, grounds) } else { None };
        // Whoever starts the job counts it again.
        self.accounts[project as usize].remove(number);
        if displaces || spots.is_some() {
            self.draw(project);
        }
        if spots.is_none() {
            // All is as it was.
            self.lowered = lowered;
            self.hopeless.insert(key, now);
        }
        spots
    }

    /// Pauses jobs and takes GPUs. Where only the limit is in the way, the free GPUs: then a victim that
    /// a later pause makes needless finds its own again.
    fn make_room(&mut self, number: u32, request: &Request, grounds: Grounds) -> Option<Vec<Spot>> {
        let project = self.jobs[number as usize].project;
        let free = self.take_free(number, request);
        let wanted = if free.is_some() { None } else { Some(request) };
        let Some(victims) = self.choose(wanted, grounds, project) else {
            free.iter().flatten().for_each(|spot| self.cluster.release(spot));
            return None;
        };
        let victims = self.spare(victims, wanted, project);
        let spots = free.or_else(|| self.take_free(number, request));
        self.record(&victims, number, grounds);
        spots
    }

    fn record(&mut self, victims: &[u32], by: u32, grounds: Grounds) {
        let by = self.jobs[by as usize].job;
        for victim in victims {
            let job = self.jobs[*victim as usize].job.id.clone();
            let cause = Cause::Needed { by: by.id.clone(), project: by.project.clone(), grounds };
            self.plan.preemptions.push(Preemption { job, cause });
        }
    }

    /// Thousandths free on each GPU of the node if all that may be paused were gone.
    fn freeable(&self, node: u32, grounds: Grounds) -> Vec<u32> {
        let mut free = self.cluster.nodes[node as usize].free.clone();
        for job in self.on_node[node as usize].iter().filter(|job| self.may_pause(**job, grounds)) {
            self.give(&mut free, *job, node);
        }
        free
    }

    /// Adds what the job has on the node.
    fn give(&self, free: &mut [u32], job: u32, node: u32) {
        for spot in self.jobs[job as usize].spots.iter().filter(|spot| spot.node == node) {
            spot.gpus.iter().for_each(|gpu| free[*gpu as usize] += spot.each);
        }
    }

    /// Counts processes, up to those asked for, that would fit if all that may be paused were gone.
    pub fn slots_possible(&self, request: &Request, grounds: Grounds) -> u32 {
        self.count_slots(request, |node| slots(self.freeable(node, grounds).into_iter(), request.milli))
    }

    fn count_slots(&self, request: &Request, mut slots_on: impl FnMut(u32) -> u32) -> u32 {
        let class = self.classes.class(request.class);
        let mut found = 0u32;
        for node in (0..self.nodes.len() as u32).filter(|node| class.has(*node)) {
            if self.cluster.nodes[node as usize].ready {
                found = found.saturating_add(slots_on(node));
            }
            if found >= request.processes {
                return request.processes;
            }
        }
        found
    }

    /// The same as [`State::slots_possible`], looking again only at nodes that have changed.
    fn slots_possible_again(&mut self, request: &Request, grounds: Grounds) -> u32 {
        let key = (request.milli, grounds);
        let mut known = self.possible_slots.remove(&key).unwrap_or_else(|| vec![(u64::MAX, 0); self.nodes.len()]);
        let found = self.count_slots(request, |node| {
            let (version, count) = &mut known[node as usize];
            let now = self.cluster.nodes[node as usize].version;
            if *version != now {
                (*version, *count) = (now, slots(self.freeable(node, grounds).into_iter(), request.milli));
            }
            *count
        });
        self.possible_slots.insert(key, known);
        found
    }

    fn possible(&mut self, request: &Request, grounds: Grounds, project: u32) -> bool {
        let account = &self.accounts[project as usize];
        let own = account.entries.iter().filter(|entry| self.may_pause(entry.job, grounds)).map(|entry| entry.size);
        account.allocated.saturating_sub(own.sum()) <= account.limit
            && self.slots_possible_again(request, grounds) >= request.processes
    }

    /// Says whether the job, which is counted already, has room now. `wanted`: unless it has its GPUs.
    fn has_room(&self, wanted: Option<&Request>, project: u32) -> bool {
        let account = &self.accounts[project as usize];
        let fits = |request: &Request| {
            let class = self.classes.class(request.class);
            self.cluster.fits(request, &|node| class.has(node))
        };
        account.allocated <= account.limit && wanted.is_none_or(fits)
    }

    /// Pauses jobs until there is room.
    fn choose(&mut self, wanted: Option<&Request>, grounds: Grounds, project: u32) -> Option<Vec<u32>> {
        let mut victims = Vec::new();
        while !self.has_room(wanted, project) {
            let account = &self.accounts[project as usize];
            let found = if account.allocated > account.limit {
                let own = account.entries.iter().rev().map(|entry| entry.job);
                own.into_iter().find(|job| self.may_pause(*job, grounds)).map(|job| vec![job])
            } else {
                wanted.and_then(|request| self.single(request, grounds).or_else(|| self.cheapest(request, grounds)))
            };
            let Some(found) = found else {
                debug_assert!(false, "what is possible is found");
                victims.iter().for_each(|victim| self.unpause(*victim));
                return None;
            };
            found.iter().for_each(|victim| self.pause(*victim));
            victims.extend(found);
        }
        Some(victims)
    }

    /// Gives back each victim that the job does not need, the worthiest first.
    fn spare(&mut self, mut victims: Vec<u32>, wanted: Option<&Request>, project: u32) -> Vec<u32> {
        if victims.len() < 2 {
            return victims;
        }
        victims.sort_by(|a, b| self.rather(*b, *a, &HashMap::new()));
        let mut needed = Vec::with_capacity(victims.len());
        for victim in victims {
            self.unpause(victim);
            if !self.has_room(wanted, project) {
                self.pause(victim);
                needed.push(victim);
            }
        }
        needed
    }

    /// Orders victims: who is paused rather comes first. `paused`: GPUs that the projects lose already.
    pub fn rather(&self, a: u32, b: u32, paused: &HashMap<u32, u64>) -> Ordering {
        let (one, other) = (&self.jobs[a as usize], &self.jobs[b as usize]);
        let minus = |project: u32| paused.get(&project).copied().unwrap_or(0);
        let (left, right) = (&self.accounts[one.project as usize], &self.accounts[other.project as usize]);
        let excess = right.excess_cmp(minus(other.project), left, minus(one.project));
        let level = if one.project == other.project { one.level.cmp(&other.level) } else { Ordering::Equal };
        excess.then(level).then(other.started.cmp(&one.started)).then(a.cmp(&b))
    }

    /// The best single victim that makes room for a job of one process.
    fn single(&self, request: &Request, grounds: Grounds) -> Option<Vec<u32>> {
        if request.processes != 1 {
            return None;
        }
        let mut teams: Vec<u32> = (0..self.accounts.len() as u32).collect();
        teams.retain(|team| self.accounts[*team as usize].allocated > self.accounts[*team as usize].kept());
        let excess = |a: &u32, b: &u32| self.accounts[*b as usize].excess_cmp(0, &self.accounts[*a as usize], 0);
        teams.sort_by(excess);
        for equals in teams.chunk_by(|a, b| excess(a, b).is_eq()) {
            let best = equals.iter().filter_map(|team| {
                let youngest_first = self.accounts[*team as usize].entries.iter().rev().map(|entry| entry.job);
                youngest_first.into_iter().find(|job| self.may_pause(*job, grounds) && self.makes_room(*job, request))
            });
            if let Some(best) = best.max_by_key(|job| self.jobs[*job as usize].started) {
                return Some(vec![best]);
            }
        }
        None
    }

    /// Says whether one process fits once this job is gone.
    fn makes_room(&self, number: u32, request: &Request) -> bool {
        let class = self.classes.class(request.class);
        let mut looked = u32::MAX;
        for spot in &self.jobs[number as usize].spots {
            let node = &self.cluster.nodes[spot.node as usize];
            if spot.node == looked || !node.ready || !class.has(spot.node) {
                continue;
            }
            looked = spot.node;
            let mut free = node.free.clone();
            self.give(&mut free, number, spot.node);
            if slots(free.into_iter(), request.milli) > 0 {
                return true;
            }
        }
        false
    }

    /// The victims on the node that must lose the fewest for one more process.
    fn cheapest(&mut self, request: &Request, grounds: Grounds) -> Option<Vec<u32>> {
        let key = (request.milli, grounds);
        let mut costs = self.costs.remove(&key).unwrap_or_else(|| vec![(u64::MAX, NEVER); self.nodes.len()]);
        for (node, cost) in (0u32..).zip(&mut costs) {
            let version = self.cluster.nodes[node as usize].version;
            if cost.0 != version {
                let victims = self.victims_on(node, request.milli, grounds);
                *cost = (version, victims.map_or(NEVER, |victims| victims.len() as u32));
            }
        }
        let class = self.classes.class(request.class);
        let usable = |node: &u32| class.has(*node) && self.cluster.nodes[*node as usize].ready;
        let nodes = || (0u32..).zip(&costs).filter(|(node, _)| usable(node)).map(|(node, cost)| (node, cost.1));
        let least = nodes().map(|(_, cost)| cost).min().filter(|cost| *cost != NEVER);
        let best = least.and_then(|least| {
            let equals = nodes().filter(|(_, cost)| *cost == least).take(COMPARED_MAX);
            let sets = equals.filter_map(|(node, _)| self.victims_on(node, request.milli, grounds));
            let first = |set: &Vec<u32>| set.first().copied();
            sets.min_by(|a, b| match (first(a), first(b)) {
                (Some(a), Some(b)) => self.rather(a, b, &HashMap::new()),
                (a, b) => b.cmp(&a),
            })
        });
        self.costs.insert(key, costs);
        best
    }

    /// Few jobs on the node whose pause makes room for one more process than now; None if all are too few.
    fn victims_on(&self, node: u32, milli: u32, grounds: Grounds) -> Option<Vec<u32>> {
        let there: Vec<u32> =
            self.on_node[node as usize].iter().copied().filter(|job| self.may_pause(*job, grounds)).collect();
        let mut free = self.cluster.nodes[node as usize].free.clone();
        let now = slots(free.iter().copied(), milli);
        if slots(self.freeable(node, grounds).into_iter(), milli) <= now {
            return None;
        }
        if !milli.is_multiple_of(1000) {
            return self.victims_on_a_gpu(node, &free, &there, milli);
        }
        let goal = (now + 1) * (milli / 1000);
        let (mut chosen, mut paused) = (Vec::new(), HashMap::new());
        loop {
            let whole = slots(free.iter().copied(), 1000);
            if whole >= goal {
                return Some(chosen);
            }
            let left = || there.iter().copied().filter(|job| !chosen.contains(job));
            let gain = |job: u32| {
                let mut without = free.clone();
                self.give(&mut without, job, node);
                (slots(without.into_iter(), 1000) - whole).min(goal - whole)
            };
            let best = left()
                .map(|job| (job, gain(job)))
                .filter(|(_, gain)| *gain > 0)
                .min_by(|a, b| Reverse(a.1).cmp(&Reverse(b.1)).then_with(|| self.rather(a.0, b.0, &paused)));
            let next = match best {
                Some((job, _)) => vec![job],
                None => self.sharers(node, &free, &left().collect::<Vec<_>>())?,
            };
            for job in next {
                self.give(&mut free, job, node);
                let work = &self.jobs[job as usize];
                *paused.entry(work.project).or_insert(0u64) += work.size;
                chosen.push(job);
            }
        }
    }

    /// The fewest jobs that share one GPU and have all of it that is not free.
    fn sharers(&self, node: u32, free: &[u32], there: &[u32]) -> Option<Vec<u32>> {
        let shared = (0..free.len()).filter(|gpu| free[*gpu] < 1000).filter_map(|gpu| {
            let parts = self.parts(node, gpu as u32, there);
            (free[gpu] + parts.iter().map(|(_, part)| part).sum::<u32>() == 1000).then_some(parts)
        });
        let fewest = shared.min_by_key(Vec::len)?;
        Some(fewest.into_iter().map(|(job, _)| job).collect())
    }

    /// Who of `there` has how much of one GPU.
    fn parts(&self, node: u32, gpu: u32, there: &[u32]) -> Vec<(u32, u32)> {
        let part = |job: &u32| {
            let spots =
                self.jobs[*job as usize].spots.iter().filter(|spot| spot.node == node && spot.gpus.contains(&gpu));
            let part: u32 = spots.map(|spot| spot.each).sum();
            (part > 0).then_some((*job, part))
        };
        there.iter().filter_map(part).collect()
    }

    /// The fewest jobs of one GPU that leave room for one more process of `milli` there.
    fn victims_on_a_gpu(&self, node: u32, free: &[u32], there: &[u32], milli: u32) -> Option<Vec<u32>> {
        let sets = (0..free.len()).filter_map(|gpu| {
            let goal = (free[gpu] / milli + 1) * milli;
            let mut parts = self.parts(node, gpu as u32, there);
            parts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| self.rather(a.0, b.0, &HashMap::new())));
            // One that is enough alone may be any; the best of these instead of the largest.
            let alone = parts.iter().filter(|(_, part)| free[gpu] + part >= goal);
            if let Some((job, _)) = alone.min_by(|a, b| self.rather(a.0, b.0, &HashMap::new())) {
                return Some(vec![*job]);
            }
            let mut sum = free[gpu];
            let needed = parts.iter().take_while(|(_, part)| {
                let more = sum < goal;
                sum += part;
                more
            });
            let set: Vec<u32> = needed.map(|(job, _)| *job).collect();
            (goal <= 1000 && sum >= goal).then_some(set)
        });
        sets.min_by(|a, b| {
            let firsts = a.first().zip(b.first());
            a.len()
                .cmp(&b.len())
                .then_with(|| firsts.map_or(Ordering::Equal, |(a, b)| self.rather(*a, *b, &HashMap::new())))
        })
    }

    /// What is free on nodes that the request may use.
    pub fn free_for(&self, request: &Request) -> MilliGpus {
        let class = self.classes.class(request.class);
        MilliGpus(self.cluster.free(&|node| class.has(node)))
    }
}
