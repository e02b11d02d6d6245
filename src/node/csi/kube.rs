//! What the driver asks of the Kubernetes API: annotations of claims, and events of pods. Without it volumes come all
//! the same.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolumeClaim};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Config};

use super::books::Pod;

/// How long one request to the API may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Where one of these is set, there is an API to be asked.
const VARIABLES: [&str; 2] = ["KUBERNETES_SERVICE_HOST", "KUBECONFIG"];

/// The API, as far as the driver needs it.
#[derive(Clone)]
pub struct Kube {
    client: Client,
    recorder: Recorder,
}

impl std::fmt::Debug for Kube {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kube").finish_non_exhaustive()
    }
}

impl Kube {
    /// Finds the API of the cluster that this process is in. None where there is none.
    pub async fn find(driver: &str, node: &str) -> Option<Self> {
        if VARIABLES.iter().all(|name| std::env::var_os(name).is_none()) {
            tracing::info!("no Kubernetes API is configured: events are only logged");
            return None;
        }
        let made = match Config::infer().await {
            Ok(mut config) => {
                config.connect_timeout = Some(REQUEST_TIMEOUT);
                config.read_timeout = Some(REQUEST_TIMEOUT);
                Client::try_from(config).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        match made {
            Ok(client) => {
                let reporter = Reporter { controller: driver.to_owned(), instance: Some(node.to_owned()) };
                Some(Self { recorder: Recorder::new(client.clone(), reporter), client })
            }
            Err(error) => {
                tracing::warn!(error, "the Kubernetes API cannot be used: events are only logged");
                None
            }
        }
    }

    /// Reads the annotations of a claim.
    pub async fn annotations(&self, namespace: &str, claim: &str) -> Result<BTreeMap<String, String>, String> {
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace);
        match tokio::time::timeout(REQUEST_TIMEOUT, claims.get(claim)).await {
            Ok(Ok(claim)) => Ok(claim.metadata.annotations.unwrap_or_default()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs())),
        }
    }

    /// Tells a pod's events something, in the background.
    pub fn tell(&self, pod: &Pod, reason: &str, note: &str) {
        let reference = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(pod.name.clone()),
            namespace: Some(pod.namespace.clone()),
            uid: Some(pod.uid.clone()),
            ..ObjectReference::default()
        };
        let event = Event {
            type_: EventType::Normal,
            reason: reason.to_owned(),
            note: Some(note.to_owned()),
            action: "Mount".to_owned(),
            secondary: None,
        };
        let (recorder, pod) = (self.recorder.clone(), pod.clone());
        tokio::spawn(async move {
            let told = tokio::time::timeout(REQUEST_TIMEOUT, recorder.publish(&event, &reference)).await;
            let error = match told {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            tracing::warn!(error, namespace = pod.namespace, pod = pod.name, "the pod's events could not be told");
        });
    }
}
