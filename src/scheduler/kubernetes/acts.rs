//! What is asked of the API server: bindings and evictions. Each may be asked again: a pod gets a node once, whoever asks.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Binding, ObjectReference, Pod};
use k8s_openapi::api::policy::v1::Eviction;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, ObjectMeta, Preconditions};
use kube::api::PostParams;
use kube::{Api, Client};

use super::decide::{Bind, Evict};
use super::lease::Leading;
use super::pod::{PodRecord, Reading};
use super::requests::{Requests, Throttle, Verb, code};

/// Before a request is repeated that had no answer.
const REPEAT_PAUSE: Duration = Duration::from_millis(300);
const REPEAT_PAUSE_MAX: Duration = Duration::from_secs(5);

/// What became of something that was asked for.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there are few at a time, and none is kept")]
pub enum Done {
    Bound(Bind),
    /// It has no node by this. `pod`: as it was seen then (None: gone), where it was looked at.
    NotBound {
        bind: Bind,
        pod: Option<Option<PodRecord>>,
        why: String,
    },
    Evicted(Evict),
    NotEvicted {
        evict: Evict,
        pod: Option<Option<PodRecord>>,
        why: String,
    },
}

/// Who asks.
pub struct Actor {
    pub client: Client,
    pub requests: Arc<Requests>,
    pub leading: Arc<Leading>,
    pub throttle: Throttle,
    pub reading: Reading,
}

impl std::fmt::Display for Evict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Actor {
    fn pods(&self, namespace: &str) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Gives a pod its node, and asks until it is known whether it has it.
    pub async fn bind(&self, bind: Bind) -> Done {
        let pods = self.pods(&bind.namespace);
        let (body, params) = (binding(&bind), PostParams::default());
        let mut pause = REPEAT_PAUSE;
        loop {
            self.throttle.take().await;
            if !self.leading.now() {
                return Done::NotBound { bind, pod: None, why: "this scheduler leads no more".to_owned() };
            }
            let sent = pods.create_subresource::<_, serde_json::Value>("binding", &bind.name, &params, &body);
            let error = match self.requests.send(Verb::Bind, sent).await {
                Ok(_) => return Done::Bound(bind),
                Err(error) => error,
            };
            match code(&error) {
                // Not even looked at.
                429 => return Done::NotBound { bind, pod: None, why: told(&error) },
                // Who knows: the same again tells, and changes nothing where it was done.
                0 | 500.. => tokio::time::sleep(pause).await,
                _ => {
                    let pod = self.look(&bind.namespace, &bind.name, &bind.uid).await;
                    return Done::NotBound { bind, pod, why: told(&error) };
                }
            }
            pause = (pause * 2).min(REPEAT_PAUSE_MAX);
        }
    }

    /// Asks a pod to go, with its own grace time.
    pub async fn evict(&self, evict: Evict) -> Done {
        self.throttle.take().await;
        if !self.leading.now() {
            return Done::NotEvicted { evict, pod: None, why: "this scheduler leads no more".to_owned() };
        }
        let (pods, body, params) = (self.pods(&evict.namespace), eviction(&evict), PostParams::default());
        let sent = pods.create_subresource::<_, serde_json::Value>("eviction", &evict.name, &params, &body);
        let error = match self.requests.send(Verb::Evict, sent).await {
            Ok(_) => return Done::Evicted(evict),
            Err(error) => error,
        };
        let why = told(&error);
        match code(&error) {
            404 | 409 => {
                let pod = self.look(&evict.namespace, &evict.name, &evict.uid).await;
                Done::NotEvicted { evict, pod, why }
            }
            _ => Done::NotEvicted { evict, pod: None, why },
        }
    }

    /// Looks at a pod: Some(None) where the one with this uid is gone. None: nobody answers, or others lead.
    async fn look(&self, namespace: &str, name: &str, uid: &str) -> Option<Option<PodRecord>> {
        let mut pause = REPEAT_PAUSE;
        while self.leading.now() {
            self.throttle.take().await;
            match self.requests.send(Verb::Get, self.pods(namespace).get_opt(name)).await {
                Ok(pod) => {
                    let record = pod.map(|pod| PodRecord::of(&pod, &self.reading));
                    return Some(record.filter(|record| record.uid == uid));
                }
                Err(error) => tracing::warn!(%error, pod = name, "a pod can't be looked at"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(REPEAT_PAUSE_MAX);
        }
        None
    }
}

fn binding(bind: &Bind) -> Binding {
    Binding {
        metadata: ObjectMeta {
            name: Some(bind.name.clone()),
            namespace: Some(bind.namespace.clone()),
            uid: Some(bind.uid.clone()),
            annotations: Some(bind.annotations()),
            ..ObjectMeta::default()
        },
        target: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(bind.node.clone()),
            ..ObjectReference::default()
        },
    }
}

/// The pod with this uid, and no other of its name.
fn eviction(evict: &Evict) -> Eviction {
    let preconditions = Preconditions { uid: Some(evict.uid.clone()), ..Preconditions::default() };
    Eviction {
        metadata: ObjectMeta {
            name: Some(evict.name.clone()),
            namespace: Some(evict.namespace.clone()),
            ..ObjectMeta::default()
        },
        delete_options: Some(DeleteOptions { preconditions: Some(preconditions), ..DeleteOptions::default() }),
    }
}

/// Gives what the API server said.
fn told(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}
