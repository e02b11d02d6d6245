//! Projects and nodes: what may be asked of them.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::check;
use super::cluster::{Cluster, NodeRecord, ProjectRecord, ProjectShares, TemplateRecord};
use super::core::{Caller, Core, now_ms};
use super::error::SchedulerError;
use super::gpus::Gpu;
use super::job::{State, Stop};
use crate::quota::{MilliGpus, Node, NodeState};

/// GPUs that a node may have; more than any machine does.
const GPUS_MAX: u32 = 1024;
const TEMPLATES_MAX: usize = 1024;

/// What is to be changed of a project; None: it stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProjectChange {
    #[serde(default)]
    pub quota: Option<MilliGpus>,
    #[serde(default)]
    pub weight: Option<MilliGpus>,
    #[serde(default)]
    pub limit: Option<MilliGpus>,
    #[serde(default)]
    pub train_pools: Option<BTreeSet<String>>,
    #[serde(default)]
    pub interactive_pools: Option<BTreeSet<String>>,
    #[serde(default)]
    pub interactive_limit_ms: Option<u64>,
    #[serde(default)]
    pub users: Option<BTreeSet<u32>>,
    /// Names of what is to be as if it had never been set: `weight`, `limit`, `interactive_limit_ms`.
    #[serde(default)]
    pub unset: BTreeSet<String>,
}

/// A node that is to be added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRequest {
    pub name: String,
    /// How many are simulated; those of this machine are found by the scheduler.
    #[serde(default)]
    pub gpus: u32,
    pub simulated: bool,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub pools: BTreeSet<String>,
}

/// What is to be changed of a node; None: it stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeChange {
    #[serde(default)]
    pub state: Option<NodeState>,
    /// None as a value: the label goes.
    #[serde(default)]
    pub labels: BTreeMap<String, Option<String>>,
    #[serde(default)]
    pub pools: Option<BTreeSet<String>>,
}

/// How a project stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectView {
    pub name: String,
    #[serde(flatten)]
    pub project: ProjectRecord,
    pub allocated: MilliGpus,
    /// None: no decision was made yet.
    pub fair_share: Option<MilliGpus>,
    pub running: usize,
    pub pending: usize,
}

/// A template, by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateView {
    pub name: String,
    #[serde(flatten)]
    pub template: TemplateRecord,
}

/// A job on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeUse {
    pub job: String,
    pub rank: u32,
    pub gpus: Vec<u32>,
    pub each: MilliGpus,
}

/// How a node stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    #[serde(flatten)]
    pub node: NodeRecord,
    pub allocated: MilliGpus,
    pub uses: Vec<NodeUse>,
}

fn master(caller: Caller, what: &'static str) -> Result<(), SchedulerError> {
    if caller.is_master() { Ok(()) } else { Err(SchedulerError::Denied { uid: caller.uid, what }) }
}

impl Core {
    fn change_cluster(&mut self, change: impl FnOnce(&mut Cluster)) -> Result<(), SchedulerError> {
        let mut cluster = self.cluster.clone();
        change(&mut cluster);
        self.store.keep_cluster(&cluster)?;
        self.cluster = cluster;
        self.dirty = true;
        Ok(())
    }

    /// Makes a project, or changes it.
    pub fn set_project(
        &mut self,
        name: &str,
        change: ProjectChange,
        new: bool,
        caller: Caller,
    ) -> Result<ProjectView, SchedulerError> {
        master(caller, "change projects")?;
        check::name("project", name)?;
        let had = self.cluster.projects.get(name).cloned();
        let record = match (new, had) {
            (true, Some(_)) => return Err(SchedulerError::Exists { kind: "project", name: name.to_owned() }),
            (false, None) => return Err(SchedulerError::NoProject { name: name.to_owned() }),
            (false, Some(record)) => record,
            (true, None) => ProjectRecord {
                shares: ProjectShares {
                    quota: MilliGpus(0),
                    weight: None,
                    limit: None,
                    train_pools: BTreeSet::new(),
                    interactive_pools: BTreeSet::new(),
                },
                interactive_limit_ms: None,
                users: BTreeSet::new(),
            },
        };
        let record = changed(record, change);
        self.change_cluster(|cluster| {
            cluster.projects.insert(name.to_owned(), record);
        })?;
        self.project(name)
    }

    /// Removes a project that has no jobs but such that are over, and forgets these.
    pub fn remove_project(&mut self, name: &str, caller: Caller) -> Result<ProjectView, SchedulerError> {
        master(caller, "remove projects")?;
        let view = self.project(name)?;
        let jobs = self
            .jobs
            .values()
            .filter(|job| job.project == name && (!job.state.is_over() || Self::is_storing(job)))
            .count();
        if jobs > 0 {
            return Err(SchedulerError::InUse { kind: "project", name: name.to_owned(), jobs });
        }
        let over: Vec<_> = self.jobs.values().filter(|job| job.project == name).map(|job| job.id).collect();
        over.iter().try_for_each(|id| self.forget(id))?;
        // The record first: a project that is still there has its volumes.
        self.change_cluster(|cluster| {
            cluster.projects.remove(name);
        })?;
        // A project of this name that is made later does not find what this one's jobs left.
        self.store.forget_volumes(name)?;
        Ok(view)
    }

    fn project(&self, name: &str) -> Result<ProjectView, SchedulerError> {
        let found = self.projects().into_iter().find(|view| view.name == name);
        found.ok_or_else(|| SchedulerError::NoProject { name: name.to_owned() })
    }

    /// Shows all projects.
    pub fn projects(&self) -> Vec<ProjectView> {
        let show = |(name, project): (&String, &ProjectRecord)| {
            let theirs = || self.jobs.values().filter(|job| job.project == *name);
            let with_gpus = || theirs().filter(|job| job.state.has_gpus());
            let attempts = with_gpus().filter_map(|job| job.attempt());
            let share = self.shares.iter().find(|share| share.project.as_str() == name);
            ProjectView {
                name: name.clone(),
                project: project.clone(),
                allocated: attempts.map(|attempt| attempt.placement.size()).sum(),
                fair_share: share.map(|share| share.fair_share),
                running: with_gpus().count(),
                pending: theirs().filter(|job| job.state == State::Pending).count(),
            }
        };
        self.cluster.projects.iter().map(show).collect()
    }

    /// Adds a node. `found`: the GPUs of this machine, where they are asked for.
    pub fn add_node(
        &mut self,
        request: NodeRequest,
        found: Vec<Gpu>,
        caller: Caller,
    ) -> Result<NodeView, SchedulerError> {
        master(caller, "add nodes")?;
        check::name("node", &request.name)?;
        if request.gpus > GPUS_MAX {
            return Err(SchedulerError::Wrong { what: format!("a node has {GPUS_MAX} GPUs at most") });
        }
        let name = request.name.clone();
        if self.cluster.nodes.contains_key(&name) {
            return Err(SchedulerError::Exists { kind: "node", name });
        }
        // All GPUs that are not simulated are those of this machine.
        let real = self.cluster.nodes.iter().find(|(_, record)| !record.simulated);
        if let Some((real, _)) = real.filter(|_| !request.simulated) {
            let what = format!("the node {real} is this machine already: its GPUs can't be given away twice");
            return Err(SchedulerError::Wrong { what });
        }
        let NodeRequest { gpus, simulated, labels, pools, .. } = request;
        let gpus = if simulated { gpus } else { u32::try_from(found.len()).unwrap_or(0) };
        if !simulated && gpus == 0 {
            let what = "this machine has no GPU that its driver tells of (NVML, or /dev/nvidia0 and so on); \
                        simulate some with --gpus N";
            return Err(SchedulerError::Wrong { what: what.to_owned() });
        }
        if !simulated && (0u32..).zip(&found).any(|(number, gpu)| gpu.index != number) {
            let what = "the GPUs of this machine are not numbered 0, 1, ...: one of them is missing";
            return Err(SchedulerError::Wrong { what: what.to_owned() });
        }
        let node = Node { labels, pools, ..Node::new(&name, gpus) };
        self.change_cluster(|cluster| {
            cluster.nodes.insert(name.clone(), NodeRecord { node, simulated, gpus: found, leaving: false });
        })?;
        self.node(&name)
    }

    /// Changes a node.
    pub fn change_node(&mut self, name: &str, change: NodeChange, caller: Caller) -> Result<NodeView, SchedulerError> {
        master(caller, "change nodes")?;
        if self.node(name)?.node.leaving {
            let what = format!("the node {name} is being taken away; add it again when it has gone");
            return Err(SchedulerError::Wrong { what });
        }
        self.change_cluster(|cluster| {
            let Some(record) = cluster.nodes.get_mut(name) else {
                return;
            };
            record.node.state = change.state.unwrap_or(record.node.state);
            if let Some(pools) = change.pools {
                record.node.pools = pools;
            }
            for (label, value) in change.labels {
                match value {
                    Some(value) => record.node.labels.insert(label, value),
                    None => record.node.labels.remove(&label),
                };
            }
        })?;
        self.node(name)
    }

    /// Takes a node away; by force also where jobs run: they go back to the queue.
    pub fn remove_node(&mut self, name: &str, force: bool, caller: Caller) -> Result<NodeView, SchedulerError> {
        master(caller, "remove nodes")?;
        let view = self.node(name)?;
        let here: Vec<_> = self.jobs_on(name);
        if !force && !here.is_empty() && !view.node.leaving {
            return Err(SchedulerError::InUse { kind: "node", name: name.to_owned(), jobs: here.len() });
        }
        self.change_cluster(|cluster| {
            if let Some(record) = cluster.nodes.get_mut(name) {
                record.leaving = true;
                record.node.state = NodeState::Cordoned;
            }
        })?;
        self.leave_nodes();
        Ok(view)
    }

    /// Stops the jobs on nodes that are leaving, and drops those that have none any more. Follows from the
    /// records, so that a crash or a full disk in the middle changes nothing.
    pub(super) fn leave_nodes(&mut self) {
        let leaving = self.cluster.nodes.iter().filter(|(_, record)| record.leaving).map(|(name, _)| name.clone());
        let leaving: Vec<String> = leaving.collect();
        let mut gone: BTreeSet<String> = BTreeSet::new();
        for name in leaving {
            let here = self.jobs_on(&name);
            if here.is_empty() {
                gone.insert(name);
                continue;
            }
            for id in here {
                if !self.jobs.get(&id).is_some_and(|job| matches!(job.state, State::Starting | State::Running)) {
                    continue;
                }
                let stop = Stop::NodeGone { node: name.clone() };
                if let Err(error) = self.change(&id, |job| job.stop(stop, now_ms())) {
                    tracing::error!(error = &error as &dyn std::error::Error, "a job could not be told to stop yet");
                }
            }
        }
        if gone.is_empty() {
            return;
        }
        if let Err(error) = self.change_cluster(|cluster| cluster.nodes.retain(|name, _| !gone.contains(name))) {
            tracing::error!(error = &error as &dyn std::error::Error, "a node could not be dropped");
        }
    }

    fn jobs_on(&self, node: &str) -> Vec<uuid::Uuid> {
        let with_gpus = self.jobs.values().filter(|job| job.state.has_gpus());
        let here = with_gpus.filter(|job| {
            let seats = job.attempt().into_iter().flat_map(|attempt| &attempt.placement.seats);
            seats.into_iter().any(|seat| seat.node.as_str() == node)
        });
        here.map(|job| job.id).collect()
    }

    fn node(&self, name: &str) -> Result<NodeView, SchedulerError> {
        let found = self.nodes().into_iter().find(|view| view.node.node.id.as_str() == name);
        found.ok_or_else(|| SchedulerError::NoNode { name: name.to_owned() })
    }

    /// Makes a template, or replaces it: jobs name it, and have its shape from when they are submitted.
    pub fn set_template(
        &mut self,
        name: &str,
        template: TemplateRecord,
        caller: Caller,
    ) -> Result<TemplateView, SchedulerError> {
        master(caller, "change templates")?;
        check::name("template", name)?;
        if let Some(cluster) = &template.cluster {
            let what = format!("there is no cluster {cluster}: this scheduler knows its own nodes only");
            return Err(SchedulerError::Wrong { what });
        }
        if !template.shape.is_sound() {
            let what = format!("{} GPUs can't be given to a process", template.shape.gpus);
            return Err(SchedulerError::Wrong { what });
        }
        if self.cluster.templates.len() >= TEMPLATES_MAX && !self.cluster.templates.contains_key(name) {
            return Err(SchedulerError::Wrong { what: format!("there are {TEMPLATES_MAX} templates already") });
        }
        let view = TemplateView { name: name.to_owned(), template: template.clone() };
        self.change_cluster(|cluster| {
            cluster.templates.insert(name.to_owned(), template);
        })?;
        Ok(view)
    }

    /// Removes a template; jobs that were submitted with it keep its shape.
    pub fn remove_template(&mut self, name: &str, caller: Caller) -> Result<TemplateView, SchedulerError> {
        master(caller, "remove templates")?;
        let found = self.templates().into_iter().find(|view| view.name == name);
        let view = found.ok_or_else(|| SchedulerError::NoTemplate { name: name.to_owned() })?;
        self.change_cluster(|cluster| {
            cluster.templates.remove(name);
        })?;
        Ok(view)
    }

    /// Shows all templates.
    pub fn templates(&self) -> Vec<TemplateView> {
        let show = |(name, template): (&String, &TemplateRecord)| TemplateView {
            name: name.clone(),
            template: template.clone(),
        };
        self.cluster.templates.iter().map(show).collect()
    }

    /// Shows all nodes.
    pub fn nodes(&self) -> Vec<NodeView> {
        let mut uses: BTreeMap<&str, Vec<NodeUse>> = BTreeMap::new();
        for job in self.jobs.values().filter(|job| job.state.has_gpus()) {
            let seats = job.attempt().into_iter().flat_map(|attempt| &attempt.placement.seats);
            for (rank, seat) in (0u32..).zip(seats) {
                uses.entry(seat.node.as_str()).or_default().push(NodeUse {
                    job: job.key().to_string(),
                    rank,
                    gpus: seat.gpus.clone(),
                    each: seat.each,
                });
            }
        }
        let show = |(name, node): (&String, &NodeRecord)| {
            let mut uses = uses.get(name.as_str()).cloned().unwrap_or_default();
            uses.sort_by(|a, b| (&a.gpus, &a.job).cmp(&(&b.gpus, &b.job)));
            let size = |one: &NodeUse| MilliGpus(one.each.0.saturating_mul(one.gpus.len() as u64));
            NodeView { node: node.clone(), allocated: uses.iter().map(size).sum(), uses }
        };
        self.cluster.nodes.iter().map(show).collect()
    }
}

fn changed(mut record: ProjectRecord, change: ProjectChange) -> ProjectRecord {
    let shares = &mut record.shares;
    shares.quota = change.quota.unwrap_or(shares.quota);
    shares.weight = change.weight.or(shares.weight).filter(|_| !change.unset.contains("weight"));
    shares.limit = change.limit.or(shares.limit).filter(|_| !change.unset.contains("limit"));
    if let Some(pools) = change.train_pools {
        shares.train_pools = pools;
    }
    if let Some(pools) = change.interactive_pools {
        shares.interactive_pools = pools;
    }
    let keep = !change.unset.contains("interactive_limit_ms");
    record.interactive_limit_ms = change.interactive_limit_ms.or(record.interactive_limit_ms).filter(|_| keep);
    if let Some(users) = change.users {
        record.users = users;
    }
    record
}
