//! What a decision needs of a Node.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Node;

use super::constraints::{Repels, repelling};
use super::names;
use super::quantity::{Amounts, amounts, milli};
use crate::quota::NodeState;

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub pools: BTreeSet<String>,
    pub taints: Vec<Repels>,
    pub state: NodeState,
    pub gpus: u32,
    /// What pods may ask for, GPUs left out.
    pub allocatable: Amounts,
    /// Commits that it says it has.
    pub commits: BTreeSet<String>,
}

impl NodeRecord {
    /// Reads a node.
    pub fn of(node: &Node, gpu_resource: &str, pool_label: &str) -> Self {
        let meta = &node.metadata;
        let labels = meta.labels.clone().unwrap_or_default();
        let annotation = |name: &str| meta.annotations.as_ref().and_then(|all| all.get(name)).map(String::as_str);
        let named = labels.get(pool_label).filter(|pool| !pool.is_empty()).cloned();
        let marked = labels.iter().filter(|(_, value)| *value != "false");
        let marked = marked.filter_map(|(name, _)| name.strip_prefix(names::POOL_PREFIX)).map(str::to_owned);
        let status = node.status.as_ref();
        let list = status.and_then(|status| status.allocatable.as_ref());
        let gpus = list.and_then(|list| list.get(gpu_resource)).and_then(|quantity| milli(&quantity.0));
        let mut allocatable = amounts(list);
        allocatable.remove(gpu_resource);
        let conditions = status.and_then(|status| status.conditions.as_ref());
        let is_ready =
            conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True");
        let cordoned = node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
        let commits = annotation(names::COMMITS).unwrap_or("").split(',').map(str::trim);
        Self {
            name: meta.name.clone().unwrap_or_default(),
            pools: named.into_iter().chain(marked).collect(),
            taints: repelling(node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default()),
            state: match (annotation(names::DRAIN) == Some("true"), is_ready && !cordoned) {
                (true, _) => NodeState::Draining,
                (false, true) => NodeState::Ready,
                (false, false) => NodeState::Cordoned,
            },
            gpus: gpus.and_then(|milli| u32::try_from(milli / 1000).ok()).unwrap_or(0),
            commits: commits.filter(|commit| !commit.is_empty()).map(str::to_owned).collect(),
            allocatable,
            labels,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_node_is_read_with_its_pools_and_its_state() {
        let node = json!({
            "metadata": {"name": "n0", "labels": {"larder.io/pool": "big", "pool.larder.io/west": "", "pool.larder.io/east": "false"},
                "annotations": {"larder.io/commits": "aa, bb,"}},
            "spec": {},
            "status": {"allocatable": {"nvidia.com/gpu": "8", "cpu": "4", "memory": "1Ki"},
                "conditions": [{"type": "Ready", "status": "True"}]},
        });
        let read = |node: &serde_json::Value| {
            NodeRecord::of(&serde_json::from_value(node.clone()).expect("a node"), "nvidia.com/gpu", "larder.io/pool")
        };
        let record = read(&node);
        assert_eq!((record.gpus, record.state), (8, NodeState::Ready));
        assert_eq!(record.pools, ["big", "west"].map(str::to_owned).into());
        assert_eq!(record.commits, ["aa", "bb"].map(str::to_owned).into());
        assert_eq!(record.allocatable, [("cpu".to_owned(), 4000), ("memory".to_owned(), 1_024_000)].into());
        let mut other = node.clone();
        other["spec"]["unschedulable"] = json!(true);
        assert_eq!(read(&other).state, NodeState::Cordoned);
        other = node.clone();
        other["status"]["conditions"][0]["status"] = json!("Unknown");
        assert_eq!(read(&other).state, NodeState::Cordoned);
        other["metadata"]["annotations"]["larder.io/drain"] = json!("true");
        assert_eq!(read(&other).state, NodeState::Draining);
    }
}
