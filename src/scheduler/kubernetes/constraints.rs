//! On which nodes a pod may be, by what it says itself: node selector, required node affinity, tolerations.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, PodSpec, Taint, Toleration};

use super::node::NodeRecord;

/// Taints that say what the node's state says already: such a node takes nothing new, whatever is tolerated.
const STATE_TAINTS: [&str; 3] =
    ["node.kubernetes.io/unschedulable", "node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];

/// What a pod says about nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Constraints {
    selector: BTreeMap<String, String>,
    /// One of them must hold; None: no node affinity.
    terms: Option<Vec<Term>>,
    tolerations: Vec<Tolerated>,
}

/// All of it must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Term {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Requirement {
    key: String,
    operator: String,
    values: Vec<String>,
}

/// A taint, or what tolerates it: None where any does.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Tolerated {
    key: Option<String>,
    value: Option<String>,
    effect: Option<String>,
}

/// A taint of a node that keeps pods away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repels {
    key: String,
    value: String,
    effect: String,
}

impl Constraints {
    /// Reads what a pod says.
    pub fn of(spec: &PodSpec) -> Self {
        let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
        let required = affinity.and_then(|node| node.required_during_scheduling_ignored_during_execution.as_ref());
        let requirements = |list: &Option<Vec<NodeSelectorRequirement>>| -> Vec<Requirement> {
            list.iter().flatten().map(Requirement::of).collect()
        };
        let terms = required.map(|required| {
            let terms = required.node_selector_terms.iter();
            let one = |term: &k8s_openapi::api::core::v1::NodeSelectorTerm| Term {
                labels: requirements(&term.match_expressions),
                fields: requirements(&term.match_fields),
            };
            terms.map(one).collect()
        });
        let mut tolerations: Vec<Tolerated> = spec.tolerations.iter().flatten().map(Tolerated::of).collect();
        tolerations.sort();
        Self { selector: spec.node_selector.clone().unwrap_or_default(), terms, tolerations }
    }

    /// Says whether a pod may be on a node.
    pub fn allow(&self, node: &NodeRecord) -> bool {
        let selected = self.selector.iter().all(|(name, value)| node.labels.get(name) == Some(value));
        let wanted = self.terms.as_ref().is_none_or(|terms| terms.iter().any(|term| term.holds(node)));
        selected && wanted && node.taints.iter().all(|taint| self.tolerations.iter().any(|one| one.covers(taint)))
    }
}

impl Term {
    /// An empty one holds nowhere.
    fn holds(&self, node: &NodeRecord) -> bool {
        let some = !(self.labels.is_empty() && self.fields.is_empty());
        let field = |one: &Requirement| one.key == "metadata.name" && one.holds(Some(&node.name));
        some && self.labels.iter().all(|one| one.holds(node.labels.get(&one.key))) && self.fields.iter().all(field)
    }
}

impl Requirement {
    fn of(requirement: &NodeSelectorRequirement) -> Self {
        let NodeSelectorRequirement { key, operator, values } = requirement.clone();
        Self { key, operator, values: values.unwrap_or_default() }
    }

    fn holds(&self, value: Option<&String>) -> bool {
        let is_in = value.is_some_and(|value| self.values.contains(value));
        let compared = || -> Option<std::cmp::Ordering> {
            let bound: i64 = self.values.first()?.parse().ok()?;
            Some(value?.parse::<i64>().ok()?.cmp(&bound))
        };
        match self.operator.as_str() {
            "In" => is_in,
            "NotIn" => !is_in,
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            "Gt" => compared().is_some_and(std::cmp::Ordering::is_gt),
            "Lt" => compared().is_some_and(std::cmp::Ordering::is_lt),
            _ => false,
        }
    }
}

impl Tolerated {
    fn of(toleration: &Toleration) -> Self {
        let exists = toleration.operator.as_deref() == Some("Exists");
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        Self {
            key: given(&toleration.key),
            value: (!exists).then(|| toleration.value.clone().unwrap_or_default()),
            effect: given(&toleration.effect),
        }
    }

    fn covers(&self, taint: &Repels) -> bool {
        self.key.as_ref().is_none_or(|key| *key == taint.key)
            && self.value.as_ref().is_none_or(|value| *value == taint.value)
            && self.effect.as_ref().is_none_or(|effect| *effect == taint.effect)
    }
}

/// Gives the taints of a node that keep pods away.
pub fn repelling(taints: &[Taint]) -> Vec<Repels> {
    let keeps_away = |taint: &&Taint| taint.effect != "PreferNoSchedule" && !STATE_TAINTS.contains(&taint.key.as_str());
    let one = |taint: &Taint| Repels {
        key: taint.key.clone(),
        value: taint.value.clone().unwrap_or_default(),
        effect: taint.effect.clone(),
    };
    taints.iter().filter(keeps_away).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn allowed(pod: Value, node: Value) -> bool {
        let spec: PodSpec = serde_json::from_value(pod).expect("a pod's spec");
        let node = serde_json::from_value(node).expect("a node");
        Constraints::of(&spec).allow(&NodeRecord::of(&node, "nvidia.com/gpu", "larder.io/pool"))
    }

    #[test]
    fn a_pod_is_kept_to_the_nodes_that_it_names() {
        let node = || json!({"metadata": {"name": "n0", "labels": {"zone": "west", "cores": "16"}}});
        let affinity = |terms: Value| {
            json!({"containers": [], "affinity": {"nodeAffinity":
                {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}})
        };
        let label = |key: &str, operator: &str, values: Value| {
            affinity(json!([{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]))
        };
        let table = [
            ("nothing is asked for", json!({"containers": []}), true),
            ("the selector matches", json!({"containers": [], "nodeSelector": {"zone": "west"}}), true),
            ("the selector does not match", json!({"containers": [], "nodeSelector": {"zone": "east"}}), false),
            ("In", label("zone", "In", json!(["east", "west"])), true),
            ("NotIn", label("zone", "NotIn", json!(["west"])), false),
            ("NotIn of a label that is not there", label("rack", "NotIn", json!(["1"])), true),
            ("Exists", label("zone", "Exists", json!([])), true),
            ("DoesNotExist", label("zone", "DoesNotExist", json!([])), false),
            ("Gt", label("cores", "Gt", json!(["8"])), true),
            ("Lt", label("cores", "Lt", json!(["16"])), false),
            ("an operator that nobody knows", label("zone", "Like", json!(["w"])), false),
            ("a term without requirements", affinity(json!([{}])), false),
            (
                "one of two terms",
                affinity(json!([{}, {"matchExpressions": [{"key": "zone", "operator": "Exists"}]}])),
                true,
            ),
            (
                "by name",
                affinity(json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n0"]}]}])),
                true,
            ),
            (
                "by another name",
                affinity(json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}])),
                false,
            ),
        ];
        for (what, pod, wanted) in table {
            assert_eq!(allowed(pod, node()), wanted, "{what}");
        }
    }

    #[test]
    fn a_taint_keeps_away_who_does_not_tolerate_it() {
        let node = |key: &str, effect: &str| json!({"metadata": {"name": "n"}, "spec": {"taints": [{"key": key, "value": "yes", "effect": effect}]}});
        let tolerating = |toleration: Value| json!({"containers": [], "tolerations": [toleration]});
        let bare = || json!({"containers": []});
        assert!(!allowed(bare(), node("gpu", "NoSchedule")));
        assert!(!allowed(bare(), node("gpu", "NoExecute")));
        assert!(allowed(bare(), node("gpu", "PreferNoSchedule")));
        assert!(allowed(bare(), node("node.kubernetes.io/unschedulable", "NoSchedule")), "the node's state says that");
        assert!(allowed(tolerating(json!({"operator": "Exists"})), node("gpu", "NoSchedule")));
        assert!(allowed(tolerating(json!({"key": "gpu", "value": "yes"})), node("gpu", "NoSchedule")));
        assert!(!allowed(tolerating(json!({"key": "gpu", "value": "no"})), node("gpu", "NoSchedule")));
        assert!(!allowed(
            tolerating(json!({"key": "gpu", "operator": "Exists", "effect": "NoExecute"})),
            node("gpu", "NoSchedule")
        ));
    }
}
