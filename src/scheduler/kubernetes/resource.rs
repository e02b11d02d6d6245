//! The Project resource, as `helm/larder/crds/project.yaml` defines it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::quota::{self, MilliGpus};

/// A team's claim on the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, kube::CustomResource)]
#[kube(group = "larder.io", version = "v1", kind = "Project", status = "ProjectStatus", schema = "disabled")]
#[serde(rename_all = "camelCase")]
pub struct ProjectSpec {
    pub quota: MilliGpus,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<MilliGpus>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<MilliGpus>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub train_pools: BTreeSet<String>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub interactive_pools: BTreeSet<String>,
    /// Whose pods may name it; none named: all.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub namespaces: BTreeSet<String>,
}

/// How it stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProjectStatus {
    pub allocated: MilliGpus,
    pub over_quota: MilliGpus,
    pub fair_share: MilliGpus,
    pub running: u32,
    pub waiting: u32,
    pub waiting_gpus: MilliGpus,
}

impl ProjectSpec {
    /// Gives what a decision sees.
    pub fn project(&self, name: &str) -> quota::Project {
        quota::Project {
            id: name.into(),
            quota: self.quota,
            weight: self.weight,
            limit: self.limit,
            train_pools: self.train_pools.clone(),
            interactive_pools: self.interactive_pools.clone(),
        }
    }

    /// Says whether pods of a namespace may name it.
    pub fn admits(&self, namespace: &str) -> bool {
        self.namespaces.is_empty() || self.namespaces.contains(namespace)
    }
}
