//! Jobs of `larder job` on a cluster: each is a Job of Kubernetes with what was asked for in an annotation, so that
//! whoever looks finds all of it there. The scheduler itself knows nothing of them: it places their pods as any others.

use std::collections::BTreeMap;

use futures::io::AsyncBufRead;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::{DeleteParams, ListParams, LogParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

use super::manifest;
use super::names;
use super::pod::{PodRecord, Reading};
use crate::quota::{MilliGpus, Placement, Seat, Template};
use crate::scheduler::api::SubmitRequest;
use crate::scheduler::job::{Attempt, FORMAT, JobRecord, JobSpec, State, Stop, Submitter};
use crate::scheduler::view::JobView;

/// What was asked for, on the Job.
pub const RECORD: &str = "larder.io/record";
/// Somebody cancelled it, on the Job.
pub const CANCELLED: &str = "larder.io/cancelled";
/// Kubernetes' label of the pods of a Job.
pub const JOB_NAME: &str = "batch.kubernetes.io/job-name";

/// Why something with a job of a cluster did not work.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("there is no job `{name}` in namespace {namespace}")]
    NoJob { name: String, namespace: String },
    #[error("there is a job `{name}` in namespace {namespace} already")]
    Exists { name: String, namespace: String },
    #[error("{what}")]
    Wrong { what: String },
    #[error("the cluster did not {what}")]
    Api {
        what: &'static str,
        #[source]
        source: kube::Error,
    },
}

/// What a Job remembers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub format: u32,
    pub submitter: Submitter,
    pub spec: JobSpec,
}

/// Jobs of a namespace.
pub struct Jobs {
    client: Client,
    namespace: String,
}

fn failed(what: &'static str) -> impl Fn(kube::Error) -> JobError {
    move |source| JobError::Api { what, source }
}

impl Jobs {
    /// Makes a way to the jobs of a namespace.
    pub fn new(client: Client, namespace: String) -> Self {
        Self { client, namespace }
    }

    fn jobs(&self) -> Api<Job> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Submits a job.
    pub async fn submit(&self, request: &SubmitRequest, submitter: Submitter) -> Result<JobView, JobError> {
        let record = Record { format: FORMAT, submitter, spec: request.spec.clone() };
        let job = manifest::job(request, &record).map_err(|what| JobError::Wrong { what })?;
        let made = self.jobs().create(&PostParams::default(), &job).await.map_err(|error| match error {
            kube::Error::Api(status) if status.code == 409 => {
                JobError::Exists { name: request.name.clone(), namespace: self.namespace.clone() }
            }
            source => JobError::Api { what: "take the job", source },
        })?;
        if let Some(service) = manifest::service(request, &made) {
            let services: Api<Service> = Api::namespaced(self.client.clone(), &self.namespace);
            services.create(&PostParams::default(), &service).await.map_err(failed("take the gang's service"))?;
        }
        Ok(view(&made, &[]))
    }

    /// Gives all jobs, or those of a project, in the order of their submission.
    pub async fn list(&self, project: Option<&str>) -> Result<Vec<JobView>, JobError> {
        let selector = match project {
            Some(project) => format!("{}={project}", names::PROJECT),
            None => names::PROJECT.to_owned(),
        };
        let params = ListParams::default().labels(&selector);
        let jobs = self.jobs().list(&params).await.map_err(failed("list its jobs"))?;
        let pods = self.pods().list(&params).await.map_err(failed("list its pods"))?;
        let mut views: Vec<JobView> = jobs.items.iter().map(|job| view(job, &pods_of(job, &pods.items))).collect();
        views.sort_by(|a, b| (a.job.submitted_ms, &a.job.name).cmp(&(b.job.submitted_ms, &b.job.name)));
        Ok(views)
    }

    /// Gives a job.
    pub async fn get(&self, name: &str) -> Result<JobView, JobError> {
        let job = self.jobs().get_opt(name).await.map_err(failed("show the job"))?;
        let job = job.filter(|job| job.metadata.labels.as_ref().is_some_and(|all| all.contains_key(names::PROJECT)));
        let job = job.ok_or_else(|| JobError::NoJob { name: name.to_owned(), namespace: self.namespace.clone() })?;
        let params = ListParams::default().labels(&format!("{JOB_NAME}={name}"));
        let pods = self.pods().list(&params).await.map_err(failed("list the job's pods"))?;
        Ok(view(&job, &pods_of(&job, &pods.items)))
    }

    /// Ends a job; what it was stays.
    pub async fn cancel(&self, name: &str) -> Result<JobView, JobError> {
        let before = self.get(name).await?;
        if before.job.state.is_over() {
            return Ok(before);
        }
        let patch = json!({"metadata": {"annotations": {CANCELLED: "true"}}, "spec": {"suspend": true}});
        let patched = self.jobs().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.map_err(failed("cancel the job"))?;
        self.get(name).await
    }

    /// Ends a job and forgets it. Gives it as it was.
    pub async fn delete(&self, name: &str) -> Result<JobView, JobError> {
        let before = self.get(name).await?;
        self.jobs().delete(name, &DeleteParams::background()).await.map_err(failed("delete the job"))?;
        Ok(before)
    }

    /// Gives what the newest pod of a rank prints.
    pub async fn log(&self, name: &str, rank: u32, follow: bool) -> Result<impl AsyncBufRead + use<>, JobError> {
        self.get(name).await?;
        let params = ListParams::default().labels(&format!("{JOB_NAME}={name}"));
        let pods = self.pods().list(&params).await.map_err(failed("list the job's pods"))?;
        let of_rank = pods
            .items
            .into_iter()
            .filter(|pod| rank_of(pod) == rank && pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some()));
        let newest = of_rank.max_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));
        let pod = newest.and_then(|pod| pod.metadata.name);
        let pod = pod.ok_or_else(|| JobError::Wrong {
            what: format!("the job `{name}` has no pod of rank {rank} that has run"),
        })?;
        let params = LogParams { follow, ..LogParams::default() };
        self.pods().log_stream(&pod, &params).await.map_err(failed("give the log"))
    }
}

fn rank_of(pod: &Pod) -> u32 {
    let annotations = pod.metadata.annotations.as_ref();
    annotations.and_then(|all| all.get(names::COMPLETION_INDEX)).and_then(|index| index.parse().ok()).unwrap_or(0)
}

fn pods_of(job: &Job, pods: &[Pod]) -> Vec<PodRecord> {
    // What the resource is called here says only whether GPUs are whole: the record has how many.
    let reading =
        Reading { scheduler_name: manifest::SCHEDULER.to_owned(), gpu_resource: manifest::GPU_RESOURCE.to_owned() };
    let uid = job.metadata.uid.as_deref();
    let owned =
        |pod: &&Pod| pod.metadata.owner_references.iter().flatten().any(|owner| Some(owner.uid.as_str()) == uid);
    let mut records: Vec<PodRecord> = pods.iter().filter(owned).map(|pod| PodRecord::of(pod, &reading)).collect();
    records.sort_by(|a, b| (a.created_ms, &a.name).cmp(&(b.created_ms, &b.name)));
    records
}

/// Shows a Job as the scheduler of one machine shows its jobs.
fn view(job: &Job, pods: &[PodRecord]) -> JobView {
    let meta = &job.metadata;
    let label = |name: &str| meta.labels.as_ref().and_then(|all| all.get(name)).cloned().unwrap_or_default();
    let record = meta.annotations.as_ref().and_then(|all| all.get(RECORD));
    let record: Option<Record> = record.and_then(|text| serde_json::from_str(text).ok());
    let (submitter, spec) = match record {
        Some(record) => (record.submitter, record.spec),
        None => (Submitter { uid: 0, gid: 0 }, foreign(pods)),
    };
    let state = state(job, &spec, pods);
    let attempts = attempts(pods);
    let over = job.status.as_ref().and_then(|status| status.completion_time.as_ref());
    let record = JobRecord {
        format: FORMAT,
        id: meta.uid.as_deref().and_then(|uid| Uuid::parse_str(uid).ok()).unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
        project: label(names::PROJECT),
        seq: 0,
        submitter,
        submitted_ms: meta.creation_timestamp.as_ref().map_or(0, |time| time.0.as_millisecond()),
        ended_ms: over.map(|time| time.0.as_millisecond()),
        pauses: u32::try_from(attempts.len().saturating_sub(1)).unwrap_or(u32::MAX),
        attempts,
        losses: 0,
        outputs: Vec::new(),
        hold: None,
        holds: 0,
        push_tries: 0,
        snapshots: Vec::new(),
        restored: false,
        spec,
        state,
    };
    shown(record, pods)
}

fn shown(job: JobRecord, pods: &[PodRecord]) -> JobView {
    let has: Vec<&PodRecord> = pods.iter().filter(|pod| pod.is_bound()).collect();
    let mut nodes: Vec<String> = has.iter().filter_map(|pod| pod.node.clone()).collect();
    nodes.dedup();
    let asked = job.spec.templates.first().map_or(MilliGpus(0), Template::size);
    let waiting = pods.iter().rev().find(|pod| pod.node.is_none() && !pod.over).and_then(|pod| pod.told.as_ref());
    let why = match &job.state {
        State::Pending => {
            Some(waiting.map_or("it was not told yet why it waits".to_owned(), |told| told.message.clone()))
        }
        State::Stopping { .. } => Some("its pods are ending".to_owned()),
        State::Failed { why } => Some(why.clone()),
        _ => None,
    };
    JobView { status: job.state.word().to_owned(), gpus: asked, nodes, why, job }
}

/// What a Job of somebody else asks for, as far as its pods say.
fn foreign(pods: &[PodRecord]) -> JobSpec {
    let ask = pods.iter().rev().find_map(PodRecord::asked);
    JobSpec {
        kind: ask.map(|ask| ask.kind).unwrap_or_default(),
        priority: ask.map(|ask| ask.priority),
        templates: ask.map(|ask| Template::new(ask.gpus)).into_iter().collect(),
        image: None,
        command: Vec::new(),
        env: BTreeMap::new(),
        datasets: Vec::new(),
        outputs: Vec::new(),
        volumes: Vec::new(),
        host_paths: Vec::new(),
        large_shm: false,
        ports: Vec::new(),
        grace_ms: 0,
        max_runtime_ms: None,
        code: None,
        restore: None,
    }
}

fn state(job: &Job, spec: &JobSpec, pods: &[PodRecord]) -> State {
    let status = job.status.clone().unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    let is = |kind: &str| conditions.iter().find(|one| one.type_ == kind && one.status == "True");
    let cancelled = job.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(CANCELLED));
    let bound = pods.iter().filter(|pod| pod.is_bound());
    let (ending, running) =
        (bound.clone().filter(|pod| pod.deleting).count(), bound.filter(|pod| !pod.deleting).count());
    if is("Complete").is_some() {
        return State::Succeeded;
    }
    if let Some(condition) = is("Failed") {
        return State::Failed { why: condition.message.clone().or(condition.reason.clone()).unwrap_or_default() };
    }
    let needed = spec.templates.first().map_or(1, |template| template.processes) as usize;
    let succeeded = pods.iter().filter(|pod| pod.succeeded).count();
    match (cancelled, ending, running) {
        (true, 0, 0) => State::Cancelled,
        (true, ..) => State::Stopping { stop: Stop::Cancelled, since_ms: 0 },
        (false, _, running) if running > 0 && running + succeeded >= needed => State::Running,
        (false, 0, 0) => State::Pending,
        (false, 0, _) => State::Starting,
        (false, ..) => State::Stopping { stop: Stop::Preempted { why: "its pods are ending".to_owned() }, since_ms: 0 },
    }
}

/// Gives the starts: pods of one start have the same number.
fn attempts(pods: &[PodRecord]) -> Vec<Attempt> {
    let mut starts: BTreeMap<u64, Vec<&PodRecord>> = BTreeMap::new();
    for pod in pods {
        if let Some(held) = &pod.held {
            starts.entry(held.start).or_default().push(pod);
        }
    }
    let one = |(number, (start, mut pods)): (u32, (u64, Vec<&PodRecord>))| {
        pods.sort_by_key(|pod| (pod.index, &pod.name));
        let seat = |pod: &&PodRecord| {
            let held = pod.held.as_ref()?;
            let node = pod.node.as_deref()?.into();
            Some(Seat { node, gpus: held.gpus.clone(), each: MilliGpus(u64::from(held.each)) })
        };
        let begun_ms = pods.iter().map(|pod| pod.created_ms).min().unwrap_or(0);
        let seats = pods.iter().filter_map(seat).collect();
        let placement = Placement { template: 0, seats };
        Attempt { number, placement, start, begun_ms, ended_ms: None, exits: Vec::new(), stop: None, image: None }
    };
    (1..).zip(starts).map(one).collect()
}
