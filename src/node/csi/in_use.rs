//! Which pods use volumes of the driver: asked before it is uninstalled, since what they have open would end.
//!
//! [`users`] finds them in what the API server lists; [`wait`] has them evicted and waits until they are gone. The kubelet
//! takes a pod's volumes away before it lets its object go: no user is left, so no mount is.
//!
//! Pods that are over have no volumes any more, and pods that have no node have none yet.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod, Volume};
use kube::api::{Api, EvictParams, ListParams};
use kube::{Client, ResourceExt};
use serde::Serialize;

/// How often is looked again.
const PERIOD: Duration = Duration::from_secs(2);
/// How many objects come with one answer.
const PAGE: u32 = 500;

/// What keeps the users of volumes from being known.
#[derive(Debug, thiserror::Error)]
pub enum InUseError {
    /// No API server, or it does not allow it.
    #[error("cannot ask the API server of Kubernetes for {what}")]
    Api {
        /// What was asked.
        what: &'static str,
        /// Why.
        source: Box<kube::Error>,
    },
}

/// A pod that uses volumes of the driver.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct User {
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// Where it runs.
    pub node: String,
    /// Names of its volumes, as the pod has them.
    pub volumes: Vec<String>,
}

/// Finds the pods that use volumes of `driver`: inline ones, or of claims that a volume of it is bound to.
pub fn users(driver: &str, pods: &[Pod], claims: &[PersistentVolumeClaim], volumes: &[PersistentVolume]) -> Vec<User> {
    let ours: HashSet<String> =
        volumes.iter().filter(|volume| is_of(volume, driver)).map(ResourceExt::name_any).collect();
    let bound: HashSet<(String, String)> = claims
        .iter()
        .filter(|claim| {
            claim.spec.as_ref().and_then(|spec| spec.volume_name.as_ref()).is_some_and(|name| ours.contains(name))
        })
        .map(|claim| (claim.namespace().unwrap_or_default(), claim.name_any()))
        .collect();
    let mut found: Vec<User> = pods.iter().filter_map(|pod| user(driver, pod, &bound)).collect();
    found.sort();
    found
}

fn is_of(volume: &PersistentVolume, driver: &str) -> bool {
    volume.spec.as_ref().and_then(|spec| spec.csi.as_ref()).is_some_and(|csi| csi.driver == driver)
}

fn user(driver: &str, pod: &Pod, bound: &HashSet<(String, String)>) -> Option<User> {
    let spec = pod.spec.as_ref()?;
    let node = spec.node_name.clone()?;
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if matches!(phase, Some("Succeeded" | "Failed")) {
        return None;
    }
    let (namespace, pod) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let uses = |volume: &&Volume| {
        let inline = volume.csi.as_ref().is_some_and(|csi| csi.driver == driver);
        // A claim that is made with its pod is named after both.
        let made = volume.ephemeral.as_ref().map(|_| format!("{pod}-{}", volume.name));
        let claim = volume.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.clone()).or(made);
        inline || claim.is_some_and(|claim| bound.contains(&(namespace.clone(), claim)))
    };
    let volumes: Vec<String> = spec.volumes.iter().flatten().filter(uses).map(|volume| volume.name.clone()).collect();
    (!volumes.is_empty()).then_some(User { namespace, pod, node, volumes })
}

async fn all<K>(client: &Client, what: &'static str) -> Result<Vec<K>, InUseError>
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::all(client.clone());
    let (mut found, mut params) = (Vec::new(), ListParams::default().limit(PAGE));
    loop {
        let page = api.list(&params).await.map_err(|source| InUseError::Api { what, source: Box::new(source) })?;
        let next = page.metadata.continue_.clone().filter(|token| !token.is_empty());
        found.extend(page.items);
        match next {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(found),
        }
    }
}

/// Asks the API server that this process is in the cluster of, or that KUBECONFIG names.
pub async fn list(client: &Client, driver: &str) -> Result<Vec<User>, InUseError> {
    let volumes = all(client, "persistent volumes").await?;
    let claims = all(client, "claims of volumes").await?;
    Ok(users(driver, &all(client, "pods").await?, &claims, &volumes))
}

/// Makes the client.
pub async fn client() -> Result<Client, InUseError> {
    Client::try_default().await.map_err(|source| InUseError::Api { what: "a connection", source: Box::new(source) })
}

/// Waits until nobody uses a volume, for `limit` at most, and gives who is left. With `evict` those who do are
/// evicted again and again: a budget may refuse it for a time.
pub async fn wait(client: &Client, driver: &str, evict: bool, limit: Duration) -> Result<Vec<User>, InUseError> {
    let until = Instant::now() + limit;
    loop {
        let left = list(client, driver).await?;
        if left.is_empty() || Instant::now() >= until {
            return Ok(left);
        }
        if evict {
            for user in &left {
                let api: Api<Pod> = Api::namespaced(client.clone(), &user.namespace);
                // Refused by a budget, gone meanwhile: the next look says.
                if let Err(error) = api.evict(&user.pod, &EvictParams::default()).await {
                    tracing::info!(namespace = user.namespace, pod = user.pod, %error, "not evicted");
                }
            }
        }
        tokio::time::sleep(PERIOD).await;
    }
}

#[cfg(test)]
mod tests {
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    use super::*;

    fn from<K: DeserializeOwned>(value: Value) -> K {
        serde_json::from_value(value).expect("an object")
    }

    fn pod(name: &str, phase: &str, node: Option<&str>, volume: &Value) -> Pod {
        from(json!({
            "metadata": {"namespace": "a", "name": name},
            "spec": {"containers": [], "nodeName": node, "volumes": [volume]},
            "status": {"phase": phase},
        }))
    }

    fn claim(namespace: &str, name: &str, volume: Option<&str>) -> PersistentVolumeClaim {
        from(json!({"metadata": {"namespace": namespace, "name": name}, "spec": {"volumeName": volume}}))
    }

    fn volume(name: &str, driver: &str) -> PersistentVolume {
        from(json!({"metadata": {"name": name}, "spec": {"csi": {"driver": driver, "volumeHandle": name}}}))
    }

    fn names(pods: &[Pod]) -> Vec<String> {
        let claims = [
            claim("a", "data", Some("pv")),
            claim("b", "data", None),
            claim("a", "new-v", Some("pv")),
            claim("a", "x", Some("other")),
        ];
        let volumes = [volume("pv", "csi.larder.io"), volume("other", "csi.example.org")];
        users("csi.larder.io", pods, &claims, &volumes).into_iter().map(|user| user.pod).collect()
    }

    #[test]
    fn inline_volumes_and_bound_claims_of_the_driver_count() {
        let inline = json!({"name": "v", "csi": {"driver": "csi.larder.io"}});
        let foreign = json!({"name": "v", "csi": {"driver": "csi.example.org"}});
        let by_claim = |name: &str| json!({"name": "v", "persistentVolumeClaim": {"claimName": name}});
        let made = json!({"name": "v", "ephemeral": {}});
        let found = names(&[
            pod("inline", "Running", Some("n"), &inline),
            pod("foreign", "Running", Some("n"), &foreign),
            pod("claim", "Pending", Some("n"), &by_claim("data")),
            pod("other-claim", "Running", Some("n"), &by_claim("x")),
            pod("unbound", "Running", Some("n"), &by_claim("nothing")),
            pod("new", "Running", Some("n"), &made),
        ]);
        assert_eq!(found, ["claim", "inline", "new"]);
    }

    #[test]
    fn pods_that_are_over_or_have_no_node_use_nothing() {
        let inline = json!({"name": "v", "csi": {"driver": "csi.larder.io"}});
        let found = names(&[
            pod("done", "Succeeded", Some("n"), &inline),
            pod("failed", "Failed", Some("n"), &inline),
            pod("waits", "Pending", None, &inline),
            pod("starts", "Pending", Some("n"), &inline),
        ]);
        assert_eq!(found, ["starts"]);
    }

    #[test]
    fn a_claim_of_the_same_name_in_another_namespace_is_another_claim() {
        let mut there =
            pod("there", "Running", Some("n"), &json!({"name": "v", "persistentVolumeClaim": {"claimName": "data"}}));
        there.metadata.namespace = Some("b".to_owned());
        assert!(names(&[there]).is_empty());
    }
}
