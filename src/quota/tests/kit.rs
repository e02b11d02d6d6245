//! Short ways to make snapshots and to let time pass.

use super::super::{Job, JobId, JobState, Kind, MilliGpus, Node, NodeId, Plan, Project, Snapshot, Why, after, plan};

/// "0.5" as an amount.
pub fn gpus(text: &str) -> MilliGpus {
    text.parse().expect("is an amount of GPUs")
}

pub fn cluster(nodes: &[(&str, u32)], projects: &[(&str, &str)]) -> Snapshot {
    Snapshot {
        nodes: nodes.iter().map(|(id, gpus)| Node::new(id, *gpus)).collect(),
        projects: projects.iter().map(|(id, quota)| Project::new(id, gpus(quota))).collect(),
        ..Snapshot::default()
    }
}

impl Snapshot {
    /// Adds a waiting job; the amount ends in `i` for an interactive one.
    pub fn submit(&mut self, id: &str, project: &str, amount: &str) -> &mut Job {
        let seq = self.jobs.iter().map(|job| job.seq + 1).max().unwrap_or(0);
        let (amount, kind) = match amount.strip_suffix('i') {
            Some(amount) => (amount, Kind::Interactive),
            None => (amount, Kind::Train),
        };
        self.jobs.push(Job::new(id, project, kind, gpus(amount), seq));
        self.jobs.last_mut().expect("was pushed")
    }

    pub fn end(&mut self, id: &str) {
        self.jobs.retain(|job| job.id.as_str() != id);
    }

    /// Plans and carries it out.
    pub fn cycle(&mut self) -> Plan {
        let plan = plan(self).expect("the snapshot is sound");
        *self = after(std::mem::take(self), &plan);
        plan
    }

    pub fn running(&self, id: &str) -> bool {
        self.jobs.iter().any(|job| job.id.as_str() == id && matches!(job.state, JobState::Running { .. }))
    }

    pub fn node_of(&self, id: &str) -> Option<NodeId> {
        let job = self.jobs.iter().find(|job| job.id.as_str() == id)?;
        match &job.state {
            JobState::Running { placement, .. } => placement.seats.first().map(|seat| seat.node.clone()),
            JobState::Waiting | JobState::Stopping { .. } => None,
        }
    }

    pub fn allocated(&self, project: &str) -> MilliGpus {
        let jobs = self.jobs.iter().filter(|job| job.project.as_str() == project);
        jobs.map(|job| match &job.state {
            JobState::Running { placement, .. } => placement.size(),
            JobState::Waiting | JobState::Stopping { .. } => MilliGpus(0),
        })
        .sum()
    }

    pub fn waiting(&self, project: &str) -> usize {
        let jobs = self.jobs.iter().filter(|job| job.project.as_str() == project);
        jobs.filter(|job| job.state == JobState::Waiting).count()
    }
}

impl Plan {
    pub fn paused(&self) -> Vec<&str> {
        self.preemptions.iter().map(|preemption| preemption.job.as_str()).collect()
    }

    pub fn started(&self) -> Vec<&str> {
        self.starts.iter().map(|start| start.job.as_str()).collect()
    }

    pub fn why(&self, id: &str) -> &Why {
        let id = JobId::from(id);
        &self.waiting.iter().find(|waiting| waiting.job == id).expect("the job waits").why
    }
}
