//! What is played: projects, nodes, and events at their times.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer};

use crate::quota::{Job, JobId, Kind, MilliGpus, Node, NodeState, Project, ProjectId, Template};

/// Nodes that one entry of a scenario may make.
const COUNT_MAX: u32 = 10_000;

/// A scenario, as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it shows, in a sentence.
    #[serde(default)]
    pub about: String,
    /// The projects.
    pub projects: Vec<Project>,
    /// The nodes.
    pub nodes: Vec<NodeSpec>,
    /// What each place holds: a commit, say, and the nodes.
    #[serde(default)]
    pub held: BTreeMap<String, BTreeSet<crate::quota::NodeId>>,
    /// What happens, in any order.
    pub events: Vec<Event>,
    /// When it ends; absent: when nothing happens any more.
    #[serde(default)]
    pub until: Option<Span>,
}

/// A node, or several alike.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSpec {
    /// Its name; of several, what their names begin with.
    pub id: String,
    /// How many GPUs each has.
    pub gpus: u32,
    /// How many nodes, named `id-0`, `id-1` and so on; absent: one, named `id`.
    #[serde(default)]
    pub count: Option<u32>,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Pools.
    #[serde(default)]
    pub pools: BTreeSet<String>,
}

/// Something that happens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// When.
    #[serde(default)]
    pub at: Span,
    /// What to call the moment in the output.
    #[serde(default)]
    pub label: Option<String>,
    /// Jobs that come, in this order.
    #[serde(default)]
    pub submit: Vec<JobSpec>,
    /// Jobs that are deleted.
    #[serde(default)]
    pub delete: Vec<JobId>,
    /// Projects all of whose jobs are deleted.
    #[serde(default)]
    pub delete_jobs_of: Vec<ProjectId>,
    /// Nodes that change.
    #[serde(default)]
    pub nodes: BTreeMap<crate::quota::NodeId, NodeState>,
    /// Quotas that change.
    #[serde(default)]
    pub quotas: BTreeMap<ProjectId, MilliGpus>,
}

/// A job, as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// Its name.
    pub id: String,
    /// Whose it is.
    pub project: ProjectId,
    /// GPUs of each process.
    #[serde(default)]
    pub gpus: Option<MilliGpus>,
    /// Processes that start together.
    #[serde(default)]
    pub processes: Option<u32>,
    /// What it is for.
    #[serde(default)]
    pub kind: Kind,
    /// Its priority; absent: that of its kind.
    #[serde(default)]
    pub priority: Option<u32>,
    /// Whether it may be paused; absent: as its kind.
    #[serde(default)]
    pub preemptible: Option<bool>,
    /// Shapes tried in order, instead of `gpus` and `processes`.
    #[serde(default)]
    pub templates: Vec<Template>,
    /// What it would like to find on its node.
    #[serde(default)]
    pub near: Option<String>,
    /// How long it runs; absent: until it is deleted.
    #[serde(default)]
    pub runs: Option<Span>,
    /// How many such jobs, named `id-0`, `id-1` and so on; absent: one, named `id`.
    #[serde(default)]
    pub count: Option<u32>,
}

/// A span of time, written `90s`, `30m`, `2h 5m`, or as a number of seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// Its length.
    pub ms: u64,
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Span;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a span of time such as 90s, 30m or 2h")
            }
            fn visit_u64<E: serde::de::Error>(self, seconds: u64) -> Result<Span, E> {
                Ok(Span { ms: seconds.saturating_mul(1000) })
            }
            fn visit_i64<E: serde::de::Error>(self, seconds: i64) -> Result<Span, E> {
                self.visit_u64(u64::try_from(seconds).map_err(|_| E::custom("a span of time is not negative"))?)
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Span, E> {
                if let Ok(seconds) = text.trim().parse::<u64>() {
                    return self.visit_u64(seconds);
                }
                let span = humantime::parse_duration(text.trim()).map_err(E::custom)?;
                Ok(Span { ms: u64::try_from(span.as_millis()).unwrap_or(u64::MAX) })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Says what is wrong with a scenario.
#[derive(Debug, thiserror::Error)]
#[error("the scenario can't be read; docs/formats/scenario.md lists the fields")]
pub struct ScenarioError {
    #[from]
    source: serde_saphyr::Error,
}

impl Scenario {
    /// Reads a scenario.
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        Ok(serde_saphyr::from_str(text)?)
    }
}

impl NodeSpec {
    /// Makes the nodes.
    pub fn nodes(&self) -> Vec<Node> {
        let named = |id: String| {
            let mut node = Node::new(&id, self.gpus);
            (node.labels, node.pools) = (self.labels.clone(), self.pools.clone());
            node
        };
        match self.count {
            None => vec![named(self.id.clone())],
            Some(count) => (0..count.min(COUNT_MAX)).map(|number| named(format!("{}-{number}", self.id))).collect(),
        }
    }
}

impl JobSpec {
    /// Makes the jobs, with numbers from `seq`.
    pub fn jobs(&self, seq: u64) -> Vec<Job> {
        let named = |id: &str, seq: u64| {
            let gpus = self.gpus.unwrap_or(MilliGpus::ONE);
            let mut job = Job::new(id, self.project.as_str(), self.kind, gpus, seq);
            job.priority = self.priority.unwrap_or(job.priority);
            job.preemptible = self.preemptible.unwrap_or(job.preemptible);
            job.near = self.near.clone();
            for template in &mut job.templates {
                template.processes = self.processes.unwrap_or(1);
            }
            if !self.templates.is_empty() {
                job.templates = self.templates.clone();
            }
            job
        };
        match self.count {
            None => vec![named(&self.id, seq)],
            Some(count) => {
                (0..u64::from(count.min(COUNT_MAX))).map(|at| named(&format!("{}-{at}", self.id), seq + at)).collect()
            }
        }
    }
}
