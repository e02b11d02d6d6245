//! The clock, the events and the cycles of a simulation.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::report::{Action, JobRecord, Report, Sample};
use super::scenario::{Event, Scenario};
use crate::quota::{Job, JobId, JobState, Kind, MilliGpus, Plan, Project, Snapshot, SnapshotError, Why, after, plan};

/// Cycles at one moment; the system settles long before.
const CYCLES_MAX: u32 = 1000;

/// How it is decided who runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Guaranteed quota, surplus lent and taken back.
    #[default]
    Fair,
    /// Each project within its quota, nothing is lent.
    Quota,
    /// One queue, in the order of the submissions; who can't start holds up the others.
    Fifo,
}

/// Says why a scenario can't be played.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// Something names what is not there, or is there twice.
    #[error("the scenario contradicts itself at {at_s} s: {source}")]
    Snapshot {
        /// When.
        at_s: u64,
        /// How.
        source: SnapshotError,
    },
    /// An event names what is not there.
    #[error("the event at {at_s} s names {kind} {name}, which is not there at that time")]
    Unknown {
        /// When.
        at_s: u64,
        /// A job, node or project.
        kind: &'static str,
        /// What the event calls it.
        name: String,
    },
}

/// Plays a scenario.
pub fn simulate(scenario: &Scenario, policy: Policy) -> Result<Report, SimulateError> {
    let mut engine = Engine::new(scenario, policy);
    let mut events: Vec<&Event> = scenario.events.iter().collect();
    events.sort_by_key(|event| event.at);
    let mut events = events.into_iter().peekable();
    loop {
        let next = [events.peek().map(|event| event.at.ms), engine.next_end()].into_iter().flatten().min();
        let Some(now) = next.filter(|now| scenario.until.is_none_or(|until| *now <= until.ms)) else {
            break;
        };
        engine.advance(now);
        let mut label = None;
        while let Some(event) = events.next_if(|event| event.at.ms <= now) {
            engine.apply(event)?;
            label = event.label.clone().or(label);
        }
        engine.settle(label)?;
    }
    let end = scenario.until.map_or(engine.now, |until| until.ms);
    engine.advance(end);
    Ok(engine.report)
}

struct Engine {
    policy: Policy,
    snapshot: Snapshot,
    now: u64,
    /// Milliseconds of work left, of jobs that end by themselves.
    left: BTreeMap<JobId, u64>,
    next_seq: u64,
    why: BTreeMap<JobId, Why>,
    report: Report,
}

impl Engine {
    fn new(scenario: &Scenario, policy: Policy) -> Self {
        let nodes: Vec<_> = scenario.nodes.iter().flat_map(super::scenario::NodeSpec::nodes).collect();
        let report = Report {
            policy,
            projects: scenario.projects.clone(),
            gpus: MilliGpus::whole(nodes.iter().map(|node| u64::from(node.gpus)).sum()),
            ..Report::default()
        };
        let (projects, held) = (scenario.projects.clone(), scenario.held.clone());
        let snapshot = Snapshot { projects, nodes, jobs: Vec::new(), held };
        Self { policy, snapshot, now: 0, left: BTreeMap::new(), next_seq: 0, why: BTreeMap::new(), report }
    }

    fn running(job: &Job) -> Option<MilliGpus> {
        match &job.state {
            JobState::Running { placement, .. } => Some(placement.size()),
            JobState::Waiting | JobState::Stopping { .. } => None,
        }
    }

    /// When the next running job ends.
    fn next_end(&self) -> Option<u64> {
        let running = self.snapshot.jobs.iter().filter(|job| Self::running(job).is_some());
        running.filter_map(|job| self.left.get(&job.id)).min().map(|left| self.now.saturating_add(*left))
    }

    /// Lets time pass: running jobs work, and end.
    fn advance(&mut self, to: u64) {
        let passed = to.saturating_sub(self.now);
        self.now = to.max(self.now);
        let mut ended = BTreeSet::new();
        for job in &self.snapshot.jobs {
            let Some(size) = Self::running(job) else {
                continue;
            };
            *self.report.service_ms.entry(job.project.clone()).or_default() += size.0.saturating_mul(passed);
            if let Some(left) = self.left.get_mut(&job.id) {
                *left = left.saturating_sub(passed);
                if *left == 0 {
                    ended.insert(job.id.clone());
                }
            }
        }
        ended.iter().for_each(|id| self.remove(id, Action::Ended(id.clone())));
        self.report.end_ms = self.now;
    }

    fn remove(&mut self, id: &JobId, action: Action) {
        self.snapshot.jobs.retain(|job| job.id != *id);
        self.left.remove(id);
        if let Some(record) = self.report.jobs.get_mut(id) {
            record.ended_ms = Some(self.now);
        }
        self.report.actions.push((self.now, action));
    }

    fn unknown(&self, kind: &'static str, name: &str) -> SimulateError {
        SimulateError::Unknown { at_s: self.now / 1000, kind, name: name.to_owned() }
    }

    fn apply(&mut self, event: &Event) -> Result<(), SimulateError> {
        for spec in &event.submit {
            for job in spec.jobs(self.next_seq) {
                self.next_seq = job.seq + 1;
                let work = spec.runs.map(|span| span.ms.max(1));
                self.left.extend(work.map(|work| (job.id.clone(), work)));
                let size = job.templates.first().map_or(MilliGpus(0), crate::quota::Template::size);
                let record =
                    JobRecord { submitted_ms: self.now, work_ms: work, size, ..JobRecord::new(job.project.clone()) };
                self.report.jobs.insert(job.id.clone(), record);
                self.report.actions.push((self.now, Action::Submitted(job.id.clone())));
                self.snapshot.jobs.push(job);
            }
        }
        for id in &event.delete {
            if !self.snapshot.jobs.iter().any(|job| job.id == *id) {
                return Err(self.unknown("job", id.as_str()));
            }
            self.remove(id, Action::Deleted(id.clone()));
        }
        for project in &event.delete_jobs_of {
            let theirs = self.snapshot.jobs.iter().filter(|job| job.project == *project);
            let ids: Vec<JobId> = theirs.map(|job| job.id.clone()).collect();
            ids.iter().for_each(|id| self.remove(id, Action::Deleted(id.clone())));
        }
        for (id, state) in &event.nodes {
            let missing = self.unknown("node", id.as_str());
            self.snapshot.nodes.iter_mut().find(|node| node.id == *id).ok_or(missing)?.state = *state;
        }
        for (id, quota) in &event.quotas {
            let missing = self.unknown("project", id.as_str());
            self.snapshot.projects.iter_mut().find(|project| project.id == *id).ok_or(missing)?.quota = *quota;
        }
        Ok(())
    }

    /// Cycles until nothing changes any more.
    fn settle(&mut self, label: Option<String>) -> Result<(), SimulateError> {
        for _ in 0..CYCLES_MAX {
            let plan = self.decide().map_err(|source| SimulateError::Snapshot { at_s: self.now / 1000, source })?;
            self.record(&plan);
            let snapshot = std::mem::take(&mut self.snapshot);
            self.snapshot = after(snapshot, &plan);
            if plan.starts.is_empty() && plan.preemptions.is_empty() {
                break;
            }
        }
        self.sample(label);
        Ok(())
    }

    fn decide(&mut self) -> Result<Plan, SnapshotError> {
        match self.policy {
            Policy::Fair => plan(&self.snapshot),
            Policy::Quota => {
                let mut strict = self.snapshot.clone();
                strict.projects.iter_mut().for_each(|project| project.limit = Some(project.quota));
                plan(&strict)
            }
            Policy::Fifo => plan(&self.one_queue()),
        }
    }

    /// What plain FIFO sees: all jobs alike in one project, and of the waiting ones only the first.
    fn one_queue(&self) -> Snapshot {
        let mut queue = self.snapshot.clone();
        let first = queue.jobs.iter().filter(|job| Self::running(job).is_none()).min_by_key(|job| job.seq);
        let first = first.map(|job| job.id.clone());
        queue.jobs.retain(|job| Self::running(job).is_some() || Some(&job.id) == first.as_ref());
        let everyone = Project::new("everyone", self.report.gpus);
        for job in &mut queue.jobs {
            job.project = everyone.id.clone();
            (job.kind, job.priority, job.preemptible) = (Kind::Train, Kind::Train.priority(), true);
        }
        queue.projects = vec![everyone];
        queue
    }

    fn record(&mut self, plan: &Plan) {
        for preemption in &plan.preemptions {
            let action = Action::Paused(preemption.job.clone(), preemption.cause.clone());
            self.report.actions.push((self.now, action));
            if let Some(record) = self.report.jobs.get_mut(&preemption.job) {
                record.pauses += 1;
            }
        }
        for start in &plan.starts {
            self.report.actions.push((self.now, Action::Started(start.job.clone(), start.grounds)));
            if let Some(record) = self.report.jobs.get_mut(&start.job) {
                record.started_ms.get_or_insert(self.now);
                record.size = start.placement.size();
            }
        }
        self.why = plan.waiting.iter().map(|waiting| (waiting.job.clone(), waiting.why.clone())).collect();
        self.report.fair_shares = plan.shares.iter().map(|share| (share.project.clone(), share.fair_share)).collect();
    }

    fn sample(&mut self, label: Option<String>) {
        let mut sample = Sample { at_ms: self.now, label, ..Sample::default() };
        for project in &self.snapshot.projects {
            let theirs = || self.snapshot.jobs.iter().filter(|job| job.project == project.id);
            sample.allocated.insert(project.id.clone(), theirs().filter_map(Self::running).sum());
            let waiting: Vec<JobId> =
                theirs().filter(|job| Self::running(job).is_none()).map(|job| job.id.clone()).collect();
            sample.waiting.insert(project.id.clone(), waiting);
            let share = self.report.fair_shares.get(&project.id).copied();
            sample.fair_shares.insert(project.id.clone(), share.unwrap_or(project.quota));
        }
        sample.why = self.why.clone();
        self.report.samples.push(sample);
    }
}
