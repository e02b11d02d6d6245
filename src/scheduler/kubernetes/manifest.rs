//! What was asked for as a Job of Kubernetes.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Service;
use serde_json::{Map, Value, json};

use super::jobs::{JOB_NAME, RECORD, Record};
use super::names;
use crate::quota::{Kind, MilliGpus, Template};
use crate::scheduler::api::SubmitRequest;
use crate::scheduler::job::JobSpec;

/// Who places its pods, and what these call a GPU.
pub const SCHEDULER: &str = "larder";
pub const GPU_RESOURCE: &str = "nvidia.com/gpu";
/// Where the ranks of a gang meet, on the host of rank 0.
const MASTER_PORT: u16 = 29_500;

/// Makes the Job, or says what can't be had on a cluster.
pub fn job(request: &SubmitRequest, record: &Record) -> Result<Job, String> {
    let spec = &request.spec;
    check(request)?;
    let template = spec.templates.first().ok_or("a job needs a template")?;
    let record = serde_json::to_string(record).map_err(|error| error.to_string())?;
    let gang = template.processes > 1;
    let job = json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": request.name,
            "labels": {names::PROJECT: request.project, names::KIND: word(spec.kind)},
            "annotations": {RECORD: record},
        },
        "spec": {
            "completions": template.processes,
            "parallelism": template.processes,
            "completionMode": if gang { "Indexed" } else { "NonIndexed" },
            "podReplacementPolicy": gang.then_some("Failed"),
            // A job that fails has failed; one that is paused or loses its node goes on.
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]},
            "template": {"metadata": metadata(request, template), "spec": pod(request, template)},
        },
    });
    serde_json::from_value(job).map_err(|error| error.to_string())
}

/// Gives the service by which the pods of a gang find each other. It goes with the job.
pub fn service(request: &SubmitRequest, job: &Job) -> Option<Service> {
    let gang = request.spec.templates.first().is_some_and(|template| template.processes > 1);
    let owner = json!([{"apiVersion": "batch/v1", "kind": "Job", "name": request.name, "uid": job.metadata.uid}]);
    let service = json!({
        "metadata": {"name": request.name, "ownerReferences": owner},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": true, "selector": {JOB_NAME: request.name}},
    });
    gang.then(|| serde_json::from_value(service).ok()).flatten()
}

fn check(request: &SubmitRequest) -> Result<(), String> {
    let spec = &request.spec;
    let small = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let name = &request.name;
    if name.is_empty() || name.len() > 52 || !name.chars().all(small) || name.starts_with('-') || name.ends_with('-') {
        return Err(format!(
            "`{name}` can't be the name of a job on a cluster: use up to 52 small letters, digits and `-`"
        ));
    }
    if spec.image.is_none() {
        return Err("a job on a cluster needs an image: name one with --image".to_owned());
    }
    if !spec.outputs.is_empty() || spec.restore.is_some() {
        return Err(
            "a job on a cluster makes no commit by itself yet: leave out --output, and let the job push".to_owned()
        );
    }
    let Some(first) = spec.templates.first() else {
        return Err("a job needs a template".to_owned());
    };
    if spec.templates.iter().any(|template| !template.is_sound()) {
        return Err("ask for a part of a GPU below 1, or for whole ones".to_owned());
    }
    let alike =
        |one: &&Template| (one.gpus, one.processes, &one.labels) == (first.gpus, first.processes, &first.labels);
    if !spec.templates.iter().all(|one| alike(&one)) {
        let what = "the shapes of a job on a cluster differ in their pools only: its pods are made with their GPUs";
        return Err(what.to_owned());
    }
    if spec.templates.len() > 1 && spec.templates.iter().any(|template| template.pool.is_none()) {
        return Err("where a job on a cluster has several shapes, each names a pool".to_owned());
    }
    Ok(())
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Train => "train",
        Kind::Build => "build",
        Kind::Interactive => "interactive",
        Kind::Inference => "inference",
    }
}

fn metadata(request: &SubmitRequest, template: &Template) -> Value {
    let spec = &request.spec;
    let mut labels: BTreeMap<&str, String> = BTreeMap::new();
    labels.insert(names::PROJECT, request.project.clone());
    labels.insert(names::KIND, word(spec.kind).to_owned());
    let mut annotations: BTreeMap<&str, String> = BTreeMap::new();
    annotations.insert(names::QUEUED_AT, jiff::Timestamp::now().to_string());
    if let Some(priority) = spec.priority {
        annotations.insert(names::PRIORITY, priority.to_string());
    }
    if template.gpus < MilliGpus::ONE {
        annotations.insert(names::FRACTION, template.gpus.to_string());
    }
    if template.processes > 1 {
        labels.insert(names::GANG, request.name.clone());
        annotations.insert(names::GANG_SIZE, template.processes.to_string());
    }
    let pools: Vec<&str> = spec.templates.iter().filter_map(|template| template.pool.as_deref()).collect();
    if !pools.is_empty() {
        annotations.insert(names::POOLS, pools.join(","));
    }
    json!({"labels": labels, "annotations": annotations})
}

fn pod(request: &SubmitRequest, template: &Template) -> Value {
    let spec = &request.spec;
    let (volumes, mounts) = volumes(spec);
    let whole = template.gpus >= MilliGpus::ONE;
    let container = json!({
        "name": "job",
        "image": spec.image,
        "command": (!spec.command.is_empty()).then_some(&spec.command),
        "resources": whole.then(|| json!({"limits": {GPU_RESOURCE: template.gpus.to_string()}})),
        "env": env(request, template),
        "volumeMounts": mounts,
        "ports": spec.ports.iter().filter_map(|port| port.rsplit(':').next()?.parse::<u16>().ok())
            .map(|port| json!({"containerPort": port})).collect::<Vec<_>>(),
    });
    json!({
        "schedulerName": SCHEDULER,
        "restartPolicy": "Never",
        "activeDeadlineSeconds": spec.max_runtime_ms.map(|max_ms| max_ms.div_ceil(1000).max(1)),
        // With it rank N of a gang has the host name NAME-N in the gang's service.
        "subdomain": (template.processes > 1).then_some(&request.name),
        "terminationGracePeriodSeconds": spec.grace_ms.div_ceil(1000),
        "nodeSelector": template.labels,
        "tolerations": [{"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": volumes,
    })
}

fn env(request: &SubmitRequest, template: &Template) -> Vec<Value> {
    let plain = |name: &str, value: &str| json!({"name": name, "value": value});
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let mut env: Vec<Value> = request.spec.env.iter().map(|(name, value)| plain(name, value)).collect();
    env.extend([
        plain("LARDER_JOB", &request.name),
        plain("LARDER_PROJECT", &request.project),
        field("LARDER_NODE", "spec.nodeName"),
        plain("WORLD_SIZE", &template.processes.to_string()),
        plain("LOCAL_RANK", "0"),
        plain("LOCAL_WORLD_SIZE", "1"),
        plain("MASTER_PORT", &MASTER_PORT.to_string()),
    ]);
    if template.processes > 1 {
        env.push(field("RANK", &format!("metadata.annotations['{}']", names::COMPLETION_INDEX)));
        env.push(plain("MASTER_ADDR", &format!("{0}-0.{0}", request.name)));
    } else {
        env.extend([plain("RANK", "0"), plain("MASTER_ADDR", "127.0.0.1")]);
    }
    if template.gpus < MilliGpus::ONE {
        env.push(field("NVIDIA_VISIBLE_DEVICES", &format!("metadata.annotations['{}']", names::GPUS)));
        env.push(plain("LARDER_GPU_MEMORY_SHARE", &template.gpus.to_string()));
    }
    for data in &request.spec.datasets {
        let letter = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        let name: String = data.dataset.chars().map(letter).collect();
        env.push(plain(&format!("LARDER_DATASET_{name}"), &data.path));
    }
    env
}

/// Gives the volumes and where they are shown: commits by the driver, a project's volumes as claims.
fn volumes(spec: &JobSpec) -> (Vec<Value>, Vec<Value>) {
    let mut volumes: Vec<Map<String, Value>> = Vec::new();
    let mut mounts = Vec::new();
    let mut add = |kind: &str, source: Value, path: &str, read_only: bool| {
        let name = format!("v{}", volumes.len());
        mounts.push(json!({"name": name, "mountPath": path, "readOnly": read_only}));
        volumes.push(Map::from_iter([("name".to_owned(), json!(name)), (kind.to_owned(), source)]));
    };
    for data in &spec.datasets {
        let revision = format!("{}@{}", data.dataset, data.commit);
        let attributes = json!({names::CSI_DATASET: revision});
        let source = json!({"driver": names::CSI_DRIVER, "readOnly": true, "volumeAttributes": attributes});
        add("csi", source, &data.path, true);
    }
    for volume in &spec.volumes {
        add("persistentVolumeClaim", json!({"claimName": volume.name}), &volume.path, false);
    }
    for host in &spec.host_paths {
        add("hostPath", json!({"path": host.host}), &host.path, false);
    }
    if spec.large_shm {
        add("emptyDir", json!({"medium": "Memory"}), "/dev/shm", false);
    }
    (volumes.into_iter().map(Value::Object).collect(), mounts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::job::{DatasetMount, Submitter};
    use crate::scheduler::kubernetes::pod::{PodRecord, Reading};

    fn request(gpus: &str, processes: u32) -> SubmitRequest {
        let template = Template { processes, ..Template::new(gpus.parse().expect("an amount")) };
        let spec = json!({"kind": "train", "templates": [template], "image": "registry/train:7", "command": ["python", "train.py"],
            "env": {"LR": "0.1"}, "grace_ms": 30_500});
        let spec = serde_json::from_value(spec).expect("a spec");
        SubmitRequest { project: "team-a".to_owned(), name: "train-1".to_owned(), spec }
    }

    fn made(request: &SubmitRequest) -> Result<Value, String> {
        let record = Record { format: 1, submitter: Submitter { uid: 1, gid: 1 }, spec: request.spec.clone() };
        job(request, &record).map(|job| serde_json::to_value(job).expect("plain fields"))
    }

    /// The pod that a controller would make of it, as the scheduler reads it.
    fn read(job: &Value) -> PodRecord {
        let pod = serde_json::from_value(job["spec"]["template"].clone()).expect("a pod");
        PodRecord::of(&pod, &Reading { scheduler_name: SCHEDULER.to_owned(), gpu_resource: GPU_RESOURCE.to_owned() })
    }

    #[test]
    fn what_is_submitted_is_what_the_scheduler_reads() {
        let mut request = request("2", 4);
        let commit = "3f".repeat(32);
        request.spec.datasets = vec![DatasetMount {
            dataset: "xray".to_owned(),
            revision: "xray@v2".to_owned(),
            commit: commit.clone(),
            path: "/data".to_owned(),
        }];
        let job = made(&request).expect("can be had");
        let pod = read(&job);
        let ask = pod.asked().expect("is understood");
        assert_eq!(
            (ask.project.as_str(), ask.gpus, ask.gang.clone()),
            ("team-a", MilliGpus::whole(2), Some(("train-1".to_owned(), 4)))
        );
        assert_eq!(pod.datasets, [commit]);
        assert!(pod.queued_ns.is_some());
        assert_eq!(job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"], 31);
        assert_eq!(job["spec"]["completionMode"], "Indexed");
        let record: Record =
            serde_json::from_str(job["metadata"]["annotations"][RECORD].as_str().expect("a record")).expect("reads");
        assert_eq!(record.spec, request.spec);
    }

    #[test]
    fn a_part_of_a_gpu_is_asked_for_beside_the_kubelet() {
        let job = made(&request("0.5", 1)).expect("can be had");
        assert_eq!(read(&job).asked().expect("is understood").gpus, MilliGpus(500));
        assert!(job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"].is_null());
        let env = job["spec"]["template"]["spec"]["containers"][0]["env"].to_string();
        assert!(env.contains("metadata.annotations['larder.io/gpus']"), "{env}");
    }

    #[test]
    fn what_a_cluster_does_not_have_is_refused_with_the_next_step() {
        let mut without = request("1", 1);
        without.spec.image = None;
        let mut named = request("1", 1);
        named.name = "Train_1".to_owned();
        let mut shapes = request("1", 1);
        shapes.spec.templates.push(Template::new(MilliGpus::whole(2)));
        for (request, told) in [(without, "--image"), (named, "small letters"), (shapes, "pools only")] {
            let error = made(&request).expect_err(told);
            assert!(error.contains(told), "{error}");
        }
    }
}
