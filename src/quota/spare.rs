//! Takes back what later decisions of the same plan made needless: pauses, and with them starts that
//! were entitled only as long as the paused job was away.
//!
//! Giving a job back lowers no line: it has its old rank, so it displaces lower ranks only. A start
//! that it pushes over the line of its grounds is undone, which moves no line that the start was
//! beyond. So the settling of the plan is not touched: `docs/design/fair-share.md` has the proof.

use std::collections::HashMap;

use super::cluster::Spot;
use super::cycle::{Phase, State};
use super::ledger::Standing;
use super::plan::{Cause, Grounds, Preemption};
use super::snapshot::JobId;

impl State<'_> {
    /// Takes back each pause that nobody needs any more, the worthiest job first: a later one may have
    /// made room enough below a limit, or on the same GPUs. Says whether there was one.
    pub fn spare_needless(&mut self) -> bool {
        let paused: Vec<u32> = self.plan.preemptions.iter().filter_map(|pause| self.needed_pause(pause)).collect();
        let mut needless: Vec<u32> = paused.into_iter().filter(|number| self.could_go_on(*number)).collect();
        needless.sort_by(|a, b| self.rather(*b, *a, &HashMap::new()));
        for number in &needless {
            // Those before it may have what it needs.
            if self.could_go_on(*number) {
                self.give_back(*number);
            }
        }
        !needless.is_empty()
    }

    /// The job's number, unless its node is draining.
    fn needed_pause(&self, pause: &Preemption) -> Option<u32> {
        match pause.cause {
            Cause::Needed { .. } => self.number(&pause.job),
            Cause::Draining { .. } => None,
        }
    }

    fn number(&self, id: &JobId) -> Option<u32> {
        let found = self.jobs.binary_search_by(|work| work.job.id.cmp(id)).ok();
        found.and_then(|number| u32::try_from(number).ok())
    }

    /// Says whether a paused job's GPUs are free and its project's limit has room for it.
    fn could_go_on(&mut self, number: u32) -> bool {
        let work = &self.jobs[number as usize];
        let account = &self.accounts[work.project as usize];
        let below = account.allocated.saturating_add(work.size) <= account.limit;
        work.phase == Phase::Leaving && below && self.has_its_gpus(number)
    }

    /// Says whether all GPUs that a paused job had are free.
    fn has_its_gpus(&mut self, number: u32) -> bool {
        let spots = &self.jobs[number as usize].spots;
        // Several processes may share a GPU, so they are tried together.
        let taken = spots.iter().take_while(|spot| self.cluster.take(spot).is_ok()).count();
        spots.iter().take(taken).for_each(|spot| self.cluster.release(spot));
        taken == spots.len()
    }

    /// Takes a pause back, and each start of the project that was within its line only without the job.
    fn give_back(&mut self, number: u32) {
        let work = &self.jobs[number as usize];
        let (project, id) = (work.project, &work.job.id);
        self.plan.preemptions.retain(|pause| pause.job != *id);
        let within = self.starts_within(project);
        self.unpause(number);
        let still = self.starts_within(project);
        for start in within.into_iter().filter(|start| !still.contains(start)) {
            self.undo(start);
        }
    }

    /// Starts of the project that stand within the line of their grounds.
    fn starts_within(&self, project: u32) -> Vec<u32> {
        let numbers = self.plan.starts.iter().filter_map(|start| Some((self.number(&start.job)?, start.grounds)));
        let own = numbers.filter(|(number, _)| self.jobs[*number as usize].project == project);
        let within = own.filter(|(number, grounds)| match grounds {
            Grounds::Quota => self.jobs[*number as usize].standing == Standing::Kept,
            Grounds::Share => self.jobs[*number as usize].standing <= Standing::Fair,
            Grounds::Idle => false,
        });
        within.map(|(number, _)| number).collect()
    }

    /// Takes a start back: the job waits, and whom it paused is needed by another now, or goes on.
    fn undo(&mut self, number: u32) {
        let work = &mut self.jobs[number as usize];
        work.phase = Phase::Waiting;
        for spot in work.spots.drain(..) {
            self.cluster.release(&spot);
        }
        let (project, id) = (work.project, &work.job.id);
        self.accounts[project as usize].remove(number);
        self.lowered += 1;
        self.draw(project);
        self.plan.starts.retain(|start| start.job != *id);
        let (own, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.plan.preemptions)
            .into_iter()
            .partition(|pause| matches!(&pause.cause, Cause::Needed { by, .. } if by == id));
        self.plan.preemptions = others;
        for pause in own {
            let Some(victim) = self.number(&pause.job) else {
                continue;
            };
            match self.who_needs(victim) {
                Some(cause) if !self.could_go_on(victim) => {
                    self.plan.preemptions.push(Preemption { job: pause.job, cause });
                }
                _ => self.give_back(victim),
            }
        }
    }

    /// The first start on GPUs that the paused job had, or else the last of its project.
    fn who_needs(&self, victim: u32) -> Option<Cause> {
        let project = self.jobs[victim as usize].project;
        let starts = || self.plan.starts.iter().filter_map(|start| Some((start, self.number(&start.job)?)));
        let beside = starts().find(|(_, number)| self.share_gpus(victim, *number));
        let own = || starts().rfind(|(_, number)| self.jobs[*number as usize].project == project);
        beside.or_else(own).map(|(start, number)| {
            let by = self.jobs[number as usize].job;
            Cause::Needed { by: by.id.clone(), project: by.project.clone(), grounds: start.grounds }
        })
    }

    fn share_gpus(&self, one: u32, other: u32) -> bool {
        let (one, other) = (&self.jobs[one as usize].spots, &self.jobs[other as usize].spots);
        let share = |a: &Spot, b: &Spot| a.node == b.node && a.gpus.iter().any(|gpu| b.gpus.contains(gpu));
        one.iter().any(|a| other.iter().any(|b| share(a, b)))
    }
}
