//! What a decision needs of a Pod: what it asks for, where it is, what it holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::constraints::Constraints;
use super::names;
use super::quantity::{Amounts, add, amounts, milli};
use crate::quota::{Kind, MilliGpus};

/// Which pods are this scheduler's, and how they ask for GPUs.
#[derive(Debug, Clone)]
pub struct Reading {
    pub scheduler_name: String,
    pub gpu_resource: String,
}

/// What a pod asks this scheduler for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    pub project: String,
    pub kind: Kind,
    pub priority: u32,
    pub preemptible: bool,
    pub gpus: MilliGpus,
    /// Name and size of its gang.
    pub gang: Option<(String, u32)>,
    /// Pools, tried in this order; none named: any.
    pub pools: Vec<String>,
}

/// GPUs that a pod was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub gpus: Vec<u32>,
    /// Thousandths of each.
    pub each: u32,
    pub start: u64,
}

/// What the pod's condition says of why it waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub reason: String,
    pub message: String,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRecord {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub version: String,
    /// When it was made, in milliseconds.
    pub created_ms: i64,
    /// Who made it, and the Job where it was one.
    pub owner: Option<String>,
    pub job: Option<String>,
    pub index: Option<u32>,
    pub queued_ns: Option<i128>,
    pub node: Option<String>,
    /// It has ended: it holds nothing any more.
    pub over: bool,
    pub succeeded: bool,
    pub deleting: bool,
    /// Somebody else decides when it may be placed.
    pub gated: bool,
    /// None: another scheduler's. An error: why it can't be understood.
    pub ask: Option<Result<Ask, String>>,
    /// Whole GPUs that it asks the kubelet for.
    pub whole: u32,
    /// All else that it asks for, with its place among the pods of a node.
    pub requests: Amounts,
    pub constraints: Arc<Constraints>,
    pub held: Option<Held>,
    pub told: Option<Told>,
    /// What it reads.
    pub datasets: Vec<String>,
}

impl PodRecord {
    /// Reads a pod.
    pub fn of(pod: &Pod, reading: &Reading) -> Self {
        let meta = &pod.metadata;
        let none = (BTreeMap::new(), PodSpec::default());
        let annotations = meta.annotations.as_ref().unwrap_or(&none.0);
        let spec = pod.spec.as_ref().unwrap_or(&none.1);
        let mut requests = requests(spec);
        let whole = requests.remove(&reading.gpu_resource).unwrap_or(0);
        let whole = u32::try_from(whole / 1000).unwrap_or(u32::MAX);
        requests.insert("pods".to_owned(), 1000);
        let ours = spec.scheduler_name.as_deref() == Some(reading.scheduler_name.as_str());
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending");
        let owners = meta.owner_references.iter().flatten();
        let owner = owners.clone().find(|owner| owner.controller == Some(true));
        let job = owner.filter(|owner| owner.kind == "Job");
        let queued = annotations.get(names::QUEUED_AT).and_then(|text| text.parse::<jiff::Timestamp>().ok());
        Self {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            version: meta.resource_version.clone().unwrap_or_default(),
            created_ms: meta.creation_timestamp.as_ref().map_or(0, |time| time.0.as_millisecond()),
            owner: owner.map(|owner| owner.uid.clone()),
            job: job.map(|owner| owner.uid.clone()),
            index: annotations.get(names::COMPLETION_INDEX).and_then(|index| index.parse().ok()),
            queued_ns: queued.map(jiff::Timestamp::as_nanosecond),
            node: spec.node_name.clone().filter(|node| !node.is_empty()),
            over: matches!(phase, "Succeeded" | "Failed"),
            succeeded: phase == "Succeeded",
            deleting: meta.deletion_timestamp.is_some(),
            gated: spec.scheduling_gates.as_ref().is_some_and(|gates| !gates.is_empty()),
            ask: ours.then(|| ask(pod, spec, annotations, whole)),
            whole,
            requests,
            constraints: Arc::new(Constraints::of(spec)),
            held: held(annotations),
            told: told(pod),
            datasets: datasets(spec, annotations),
        }
    }

    /// Gives the name by which decisions know it: unlike any other's in the cluster.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Gives what it asks for, where that is understood.
    pub fn asked(&self) -> Option<&Ask> {
        self.ask.as_ref()?.as_ref().ok()
    }

    /// Says whether it has a node and has not ended.
    pub fn is_bound(&self) -> bool {
        self.node.is_some() && !self.over
    }

    /// Says whether it waits for this scheduler.
    pub fn waits(&self) -> bool {
        self.ask.is_some() && self.node.is_none() && !self.over && !self.deleting && !self.gated
    }

    /// Says whether a decision sees no difference.
    pub fn decides_like(&self, other: &Self) -> bool {
        let plain = |pod: &Self| Self { version: String::new(), told: None, ..pod.clone() };
        self.version == other.version || plain(self) == plain(other)
    }

    /// Takes over from an older record of the same pod what never goes away again: news may come out of order.
    pub fn keep(&mut self, older: &Self) {
        if self.uid != older.uid {
            return;
        }
        if self.node.is_none() && older.node.is_some() {
            self.node.clone_from(&older.node);
            self.held.clone_from(&older.held);
        }
        self.deleting |= older.deleting;
        self.over |= older.over;
        self.succeeded |= older.succeeded;
    }
}

fn ask(pod: &Pod, spec: &PodSpec, annotations: &BTreeMap<String, String>, whole: u32) -> Result<Ask, String> {
    let label = |name: &str| pod.metadata.labels.as_ref().and_then(|labels| labels.get(name));
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let kind = kind(label(names::KIND), spec)?;
    let gpus = match annotations.get(names::FRACTION) {
        None => MilliGpus::whole(u64::from(whole)),
        Some(_) if whole > 0 => {
            return Err(format!("it asks for a part of a GPU ({}) and for whole ones: leave out one", names::FRACTION));
        }
        Some(text) => match text.parse::<MilliGpus>() {
            Ok(part) if part.0 > 0 && part < MilliGpus::ONE => part,
            _ => return Err(format!("{}: `{text}` is no part of a GPU: write 0.5 or 0.125", names::FRACTION)),
        },
    };
    if gpus.0 == 0 {
        return Err(
            "it asks for no GPU: leave out `schedulerName`, and the cluster's own scheduler places it".to_owned()
        );
    }
    let number = |name: &str| match annotations.get(name).map(|text| (text, text.parse::<u32>())) {
        None => Ok(None),
        Some((_, Ok(number))) => Ok(Some(number)),
        Some((text, Err(_))) => Err(format!("{name}: `{text}` is no whole number")),
    };
    let gang = match (label(names::GANG), number(names::GANG_SIZE)?) {
        (None, _) => None,
        (Some(gang), Some(size @ 1..=1024)) => Some((gang.clone(), size)),
        (Some(_), _) => return Err(format!("its gang needs the annotation {}: 1 to 1024 pods", names::GANG_SIZE)),
    };
    let of_class = spec.priority.and_then(|priority| u32::try_from(priority).ok()).filter(|priority| *priority > 0);
    let pools = annotations.get(names::POOLS).map_or("", String::as_str).split(',').map(str::trim);
    Ok(Ask {
        project: label(names::PROJECT).map_or(namespace, String::as_str).to_owned(),
        kind,
        priority: number(names::PRIORITY)?.or(of_class).unwrap_or_else(|| kind.priority()),
        preemptible: kind.preemptible() && annotations.get(names::PREEMPTIBLE).is_none_or(|text| text != "false"),
        gpus,
        gang,
        pools: pools.filter(|pool| !pool.is_empty()).map(str::to_owned).collect(),
    })
}

fn kind(label: Option<&String>, spec: &PodSpec) -> Result<Kind, String> {
    let known = |word: &str| match word {
        "train" => Some(Kind::Train),
        "build" => Some(Kind::Build),
        "interactive" => Some(Kind::Interactive),
        "inference" => Some(Kind::Inference),
        _ => None,
    };
    if let Some(word) = label {
        let error = || format!("{}: `{word}` is none of train, build, interactive, inference", names::KIND);
        return known(word).ok_or_else(error);
    }
    let class = spec.priority_class_name.as_deref().and_then(|class| class.strip_prefix(names::CLASS_PREFIX));
    Ok(class.and_then(known).unwrap_or_default())
}

fn held(annotations: &BTreeMap<String, String>) -> Option<Held> {
    let gpus: Option<Vec<u32>> = annotations.get(names::GPUS)?.split(',').map(|gpu| gpu.trim().parse().ok()).collect();
    let share = annotations.get(names::GPU_SHARE).map(|text| text.parse::<MilliGpus>());
    let each = match share {
        None => 1000,
        Some(share) => u32::try_from(share.ok()?.0).ok().filter(|each| (1..1000).contains(each))?,
    };
    let start = annotations.get(names::START).and_then(|text| text.parse().ok()).unwrap_or(0);
    Some(Held { gpus: gpus?, each, start })
}

fn told(pod: &Pod) -> Option<Told> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let condition = conditions.iter().find(|one| one.type_ == names::POD_SCHEDULED && one.status == "False")?;
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    Some(Told { reason: text(&condition.reason), message: text(&condition.message) })
}

/// Gives what it reads: of `xray@3fa9...` the commit where that is a whole id, else the text.
fn datasets(spec: &PodSpec, annotations: &BTreeMap<String, String>) -> Vec<String> {
    let said = annotations.get(names::DATASETS).into_iter().flat_map(|list| list.split(','));
    let volumes = spec.volumes.iter().flatten().filter_map(|volume| volume.csi.as_ref());
    let volumes = volumes.filter(|csi| csi.driver == names::CSI_DRIVER);
    let named = volumes.filter_map(|csi| csi.volume_attributes.as_ref()?.get(names::CSI_DATASET)).map(String::as_str);
    let all: Vec<&str> = said.chain(named).map(str::trim).filter(|text| !text.is_empty()).collect();
    all.into_iter().map(|text| commit_of(text).unwrap_or(text).to_owned()).collect()
}

fn commit_of(revision: &str) -> Option<&str> {
    let (_, commit) = revision.rsplit_once('@')?;
    (commit.len() == 64 && commit.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(commit)
}

/// Gives what a pod asks a node for: its containers together, or what one of those that run before them needs.
fn requests(spec: &PodSpec) -> Amounts {
    let of = |container: &Container| -> Amounts {
        let Some(resources) = container.resources.as_ref() else {
            return Amounts::new();
        };
        // What is only limited is asked for as much.
        let mut asked = amounts(resources.limits.as_ref());
        asked.extend(amounts(resources.requests.as_ref()));
        asked
    };
    let mut sum = Amounts::new();
    spec.containers.iter().for_each(|container| add(&mut sum, &of(container)));
    let mut before = Amounts::new();
    let mut most = Amounts::new();
    for container in spec.init_containers.iter().flatten() {
        let mut now = before.clone();
        add(&mut now, &of(container));
        if container.restart_policy.as_deref() == Some("Always") {
            // It goes on beside the others.
            before = now.clone();
            add(&mut sum, &of(container));
        }
        for (name, amount) in now {
            let max = most.entry(name).or_default();
            *max = amount.max(*max);
        }
    }
    for (name, amount) in most {
        let max = sum.entry(name).or_default();
        *max = amount.max(*max);
    }
    let whole_pod = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref());
    for (name, quantity) in whole_pod.into_iter().flatten() {
        if let Some(amount) = milli(&quantity.0) {
            sum.insert(name.clone(), amount);
        }
    }
    add(&mut sum, &amounts(spec.overhead.as_ref()));
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(pod: &Value) -> PodRecord {
        let reading = Reading { scheduler_name: "larder".to_owned(), gpu_resource: "nvidia.com/gpu".to_owned() };
        PodRecord::of(&serde_json::from_value(pod.clone()).expect("a pod"), &reading)
    }

    fn pod() -> Value {
        json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {}, "annotations": {}},
            "spec": {"schedulerName": "larder", "containers": [{"name": "c", "resources":
                {"limits": {"nvidia.com/gpu": "2", "cpu": "1"}, "requests": {"cpu": "500m"}}}]},
        })
    }

    #[test]
    fn a_pod_says_what_it_asks_for() {
        let record = read(&pod());
        let ask = record.asked().expect("is understood");
        assert_eq!((ask.project.as_str(), ask.kind, ask.gpus), ("ns", Kind::Train, MilliGpus::whole(2)));
        assert_eq!((ask.priority, ask.preemptible, record.waits()), (50, true, true));
        assert_eq!(record.requests, [("cpu".to_owned(), 500), ("pods".to_owned(), 1000)].into());
        let mut named = pod();
        named["metadata"]["labels"] = json!({"larder.io/project": "team-a", "larder.io/gang": "g"});
        named["metadata"]["annotations"] =
            json!({"larder.io/gang-size": "4", "larder.io/pools": "a, b", "larder.io/priority": "7"});
        named["spec"]["priorityClassName"] = json!("larder-interactive");
        let record = read(&named);
        let ask = record.asked().expect("is understood");
        assert_eq!((ask.project.as_str(), ask.kind, ask.preemptible), ("team-a", Kind::Interactive, false));
        assert_eq!((ask.gang.clone(), ask.priority), (Some(("g".to_owned(), 4)), 7));
        assert_eq!(ask.pools, ["a", "b"]);
    }

    #[test]
    fn what_can_not_be_understood_says_why() {
        let with = |annotations: Value, labels: Value, gpus: &str| {
            let mut pod = pod();
            pod["metadata"]["annotations"] = annotations;
            pod["metadata"]["labels"] = labels;
            pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = json!(gpus);
            read(&pod).ask.expect("is ours")
        };
        let half = || json!({"larder.io/gpu-fraction": "0.5"});
        assert_eq!(with(half(), json!({}), "0").map(|ask| ask.gpus), Ok(MilliGpus(500)));
        let wrong = [
            (half(), json!({}), "1", "leave out one"),
            (json!({"larder.io/gpu-fraction": "1.5"}), json!({}), "0", "is no part of a GPU"),
            (json!({}), json!({}), "0", "asks for no GPU"),
            (json!({}), json!({"larder.io/gang": "g"}), "1", "gang-size"),
            (json!({"larder.io/gang-size": "0"}), json!({"larder.io/gang": "g"}), "1", "gang-size"),
            (json!({"larder.io/priority": "high"}), json!({}), "1", "no whole number"),
            (json!({}), json!({"larder.io/kind": "batch"}), "1", "none of"),
        ];
        for (annotations, labels, gpus, told) in wrong {
            let error = with(annotations, labels, gpus).expect_err(told);
            assert!(error.contains(told), "{error}");
        }
        let mut other = pod();
        other["spec"]["schedulerName"] = json!("default-scheduler");
        assert_eq!((read(&other).ask, read(&other).whole), (None, 2));
    }

    #[test]
    fn a_container_that_runs_before_the_others_counts_only_where_it_needs_more() {
        let mut pod = pod();
        let cpu = |cpu: &str| json!({"requests": {"cpu": cpu}});
        pod["spec"]["containers"] = json!([{"name": "a", "resources": cpu("1")}, {"name": "b", "resources": cpu("1")}]);
        pod["spec"]["initContainers"] = json!([{"name": "i", "resources": cpu("3")}]);
        assert_eq!(read(&pod).requests["cpu"], 3000);
        pod["spec"]["initContainers"] = json!([
            {"name": "s", "restartPolicy": "Always", "resources": cpu("2")}, {"name": "i", "resources": cpu("1")}]);
        assert_eq!(read(&pod).requests["cpu"], 4000);
    }

    #[test]
    fn what_was_given_is_read_back_and_nonsense_is_not() {
        let with = |annotations: Value| {
            let mut pod = pod();
            pod["metadata"]["annotations"] = annotations;
            read(&pod).held
        };
        let whole = with(json!({"larder.io/gpus": "0,3", "larder.io/start": "17"}));
        assert_eq!(whole, Some(Held { gpus: vec![0, 3], each: 1000, start: 17 }));
        let part = with(json!({"larder.io/gpus": "1", "larder.io/gpu-share": "0.6"}));
        assert_eq!(part, Some(Held { gpus: vec![1], each: 600, start: 0 }));
        for bad in
            [json!({"larder.io/gpus": "x"}), json!({"larder.io/gpus": "0", "larder.io/gpu-share": "2"}), json!({})]
        {
            assert_eq!(with(bad), None);
        }
    }

    #[test]
    fn a_pod_that_has_a_node_never_loses_it_again() {
        let mut bound = pod();
        bound["spec"]["nodeName"] = json!("n0");
        bound["metadata"]["annotations"] = json!({"larder.io/gpus": "0,1"});
        let (older, mut late) = (read(&bound), read(&pod()));
        late.keep(&older);
        assert_eq!((late.node.as_deref(), late.held.is_some()), (Some("n0"), true));
        let mut another = read(&pod());
        another.uid = "v".to_owned();
        another.keep(&older);
        assert_eq!(another.node, None);
    }

    #[test]
    fn what_a_pod_reads_is_found_in_its_volumes_and_annotations() {
        let id = "3f".repeat(32);
        let mut pod = pod();
        pod["metadata"]["annotations"] = json!({"larder.io/datasets": format!("xray@{id}")});
        pod["spec"]["volumes"] = json!([
            {"name": "v", "csi": {"driver": "csi.larder.io", "volumeAttributes": {"dataset": "mri@v2"}}},
            {"name": "w", "csi": {"driver": "other", "volumeAttributes": {"dataset": "no"}}}]);
        assert_eq!(read(&pod).datasets, [id, "mri@v2".to_owned()]);
    }
}
