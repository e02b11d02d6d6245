//! What is told to people: conditions and events of pods, statuses of projects. Nothing depends on it, so it waits behind what
//! counts, and is left out where there is too much of it.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::mpsc;

use super::decide::Tell;
use super::lease::Leading;
use super::names;
use super::requests::{Requests, Throttle, Verb};
use super::resource::{Project, ProjectStatus};

/// Words that wait, at most.
const QUEUE_MAX: usize = 100;

/// Something to tell.
#[derive(Debug)]
pub enum Word {
    /// Why a pod waits; with an event where that is new to it.
    Waits {
        tell: Tell,
        event: bool,
    },
    Event(PodEvent),
    Status {
        project: String,
        status: ProjectStatus,
    },
}

/// Something that happened to a pod.
#[derive(Debug)]
pub struct PodEvent {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub kind: &'static str,
    pub reason: &'static str,
    pub message: String,
}

/// Who tells.
pub struct Teller {
    pub client: Client,
    pub requests: Arc<Requests>,
    pub leading: Arc<Leading>,
    pub throttle: Throttle,
    pub identity: String,
}

/// Makes the queue of words.
pub fn queue() -> (mpsc::Sender<Word>, mpsc::Receiver<Word>) {
    mpsc::channel(QUEUE_MAX)
}

impl Teller {
    /// Tells what comes, one after the other, until nobody sends any more.
    pub async fn run(&self, mut words: mpsc::Receiver<Word>) {
        while let Some(word) = words.recv().await {
            if let Err(error) = self.tell(word).await {
                // Most often: the pod is another one meanwhile.
                tracing::debug!(%error, "something was not told");
            }
        }
    }

    async fn tell(&self, word: Word) -> Result<(), kube::Error> {
        self.throttle.take().await;
        if !self.leading.now() {
            return Ok(());
        }
        match word {
            Word::Waits { tell, event } => {
                self.condition(&tell).await?;
                let Tell { namespace, name, uid, told, .. } = tell;
                let (kind, reason, message) = ("Warning", "FailedScheduling", told.message);
                match event {
                    true => self.event(PodEvent { namespace, name, uid, kind, reason, message }).await,
                    false => Ok(()),
                }
            }
            Word::Event(event) => self.event(event).await,
            Word::Status { project, status } => {
                let projects: Api<Project> = Api::all(self.client.clone());
                let patch = Patch::Merge(json!({"status": status}));
                let params = PatchParams::default();
                self.requests.send(Verb::Tell, projects.patch_status(&project, &params, &patch)).await.map(drop)
            }
        }
    }

    /// The version says of which pod: one that got its node meanwhile keeps its condition.
    async fn condition(&self, tell: &Tell) -> Result<(), kube::Error> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &tell.namespace);
        let condition = json!({
            "type": names::POD_SCHEDULED,
            "status": "False",
            "reason": tell.told.reason,
            "message": tell.told.message,
            "lastTransitionTime": Time(jiff::Timestamp::now()),
        });
        let patch = json!({
            "metadata": {"uid": tell.uid, "resourceVersion": tell.version},
            "status": {"conditions": [condition]},
        });
        let (patch, params) = (Patch::Strategic(patch), PatchParams::default());
        let sent = pods.patch_status(&tell.name, &params, &patch);
        self.requests.send(Verb::Tell, sent).await.map(drop)
    }

    async fn event(&self, event: PodEvent) -> Result<(), kube::Error> {
        let now = jiff::Timestamp::now();
        let events: Api<Event> = Api::namespaced(self.client.clone(), &event.namespace);
        // A name may have 253 bytes; the pod's may have them all.
        let prefix: String = event.name.chars().take(200).collect();
        let object = Event {
            metadata: ObjectMeta {
                name: Some(format!("{prefix}.{:x}", now.as_nanosecond())),
                namespace: Some(event.namespace.clone()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                namespace: Some(event.namespace),
                name: Some(event.name),
                uid: Some(event.uid),
                ..ObjectReference::default()
            },
            type_: Some(event.kind.to_owned()),
            reason: Some(event.reason.to_owned()),
            message: Some(event.message.chars().take(1000).collect()),
            action: Some(event.reason.to_owned()),
            event_time: Some(MicroTime(now)),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            count: Some(1),
            source: Some(EventSource { component: Some(names::COMPONENT.to_owned()), host: None }),
            reporting_component: Some(names::COMPONENT.to_owned()),
            reporting_instance: Some(self.identity.clone()),
            ..Event::default()
        };
        let params = PostParams::default();
        let sent = events.create(&params, &object);
        self.requests.send(Verb::Tell, sent).await.map(drop)
    }
}
