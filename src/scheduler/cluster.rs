//! Projects and nodes as they are kept: one file, `cluster.json`.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::gpus::Gpu;
use crate::quota::{MilliGpus, Node, Project, Template};

/// Version of the file.
pub const FORMAT: u32 = 1;

/// A project, and what holds for its jobs beyond the shares of GPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectRecord {
    #[serde(flatten)]
    pub shares: ProjectShares,
    /// How long an interactive job may run.
    #[serde(default)]
    pub interactive_limit_ms: Option<u64>,
    /// Users that may submit, by uid; none named: whoever may use the scheduler.
    #[serde(default)]
    pub users: BTreeSet<u32>,
}

/// The part that decides about GPUs, as [`Project`] has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectShares {
    pub quota: MilliGpus,
    #[serde(default)]
    pub weight: Option<MilliGpus>,
    #[serde(default)]
    pub limit: Option<MilliGpus>,
    #[serde(default)]
    pub train_pools: BTreeSet<String>,
    #[serde(default)]
    pub interactive_pools: BTreeSet<String>,
}

impl ProjectRecord {
    /// Gives what a decision sees.
    pub fn project(&self, name: &str) -> Project {
        let shares = self.shares.clone();
        Project {
            id: name.into(),
            quota: shares.quota,
            weight: shares.weight,
            limit: shares.limit,
            train_pools: shares.train_pools,
            interactive_pools: shares.interactive_pools,
        }
    }
}

/// A node, and what the scheduler does with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    pub node: Node,
    /// Its GPUs are only counted: nothing is handed to a container.
    pub simulated: bool,
    /// What the driver told of its GPUs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<Gpu>,
    /// It is taken away as soon as its jobs are gone.
    #[serde(default)]
    pub leaving: bool,
}

/// All projects and nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    pub format: u32,
    #[serde(default)]
    pub projects: BTreeMap<String, ProjectRecord>,
    #[serde(default)]
    pub nodes: BTreeMap<String, NodeRecord>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub templates: BTreeMap<String, TemplateRecord>,
}

/// A shape that jobs may name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateRecord {
    #[serde(flatten)]
    pub shape: Template,
    /// Where jobs of this shape run; None: on this scheduler's nodes. Others are not known yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
}

impl Default for Cluster {
    fn default() -> Self {
        Self { format: FORMAT, projects: BTreeMap::new(), nodes: BTreeMap::new(), templates: BTreeMap::new() }
    }
}
