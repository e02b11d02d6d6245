//! What the kubelet asks of the driver of a node.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use tonic::{Request, Response, Status};

use super::books::{Pod, Record};
use super::driver::{Driver, parent_is_gone, real, shown};
use super::error::CsiError;
use super::proto::csi::node_server::Node;
use super::proto::csi::node_service_capability::rpc::Type as Rpc;
use super::proto::csi::node_service_capability::{Rpc as RpcCapability, Type};
use super::proto::csi::volume_health::VolumeHealthEntry;
use super::proto::csi::volume_usage::Unit;
use super::proto::csi::{
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeHealthRequest, NodeGetVolumeHealthResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability, NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse, VolumeCondition, VolumeHealth, VolumeHealthErrorType as ErrorType, VolumeUsage,
};
use super::publish::Publish;
use super::volume::{VolumeError, check_capability, is_ephemeral, own_keys};
use crate::node::api::{MountInfo, MountState};

/// The kubelet's limit for ids, by the specification.
const ID_LEN_MAX: usize = 128;

/// Gives what the kubelet says of the pod.
fn pod_of(context: &HashMap<String, String>) -> Pod {
    let said = |key: &str| context.get(&format!("csi.storage.k8s.io/{key}")).cloned().unwrap_or_default();
    Pod {
        namespace: said("pod.namespace"),
        name: said("pod.name"),
        uid: said("pod.uid"),
        service_account: said("serviceAccount.name"),
    }
}

fn required<'a>(value: &'a str, what: &'static str) -> Result<&'a str, VolumeError> {
    if value.is_empty() { Err(VolumeError::Missing { what }) } else { Ok(value) }
}

fn target_of(path: &str) -> Result<PathBuf, VolumeError> {
    let path = Path::new(required(path, "target path")?);
    // Without the slash at the end: a directory has one name in the books.
    let path: PathBuf = path.components().collect();
    if path.is_absolute() { Ok(path) } else { Err(VolumeError::NotOffered { what: "the target path is not absolute" }) }
}

/// Checks what the kubelet wants published.
fn read(request: NodePublishVolumeRequest) -> Result<Publish, VolumeError> {
    let context = &request.volume_context;
    let volume_id = required(&request.volume_id, "volume id")?.to_owned();
    if volume_id.len() > ID_LEN_MAX {
        return Err(VolumeError::NotOffered { what: "the volume id is longer than 128 bytes" });
    }
    let target = target_of(&request.target_path)?;
    let inline = is_ephemeral(context).then_some(request.readonly);
    check_capability(request.volume_capability.as_ref(), inline)?;
    if !request.secrets.is_empty() {
        return Err(VolumeError::Secrets);
    }
    Ok(Publish { volume_id, target, attributes: own_keys(context)?, pod: pod_of(context) })
}

impl Driver {
    /// Does something in a task of its own, which a caller that goes away does not end half-way; answers in time.
    async fn in_time<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl Future<Output = Result<T, CsiError>> + Send + 'static,
    ) -> Result<T, CsiError> {
        let after = self.inner.settings.timeout;
        let ended = match tokio::time::timeout(after, tokio::spawn(work)).await {
            Ok(Ok(ended)) => ended,
            Ok(Err(_)) => Err(CsiError::Panicked { what }),
            Err(_) => Err(CsiError::Late { what, after }),
        };
        match ended {
            // What it waits for is most likely the lake.
            Err(error @ (CsiError::Late { .. } | CsiError::Busy { .. })) => {
                Err(self.lake_trouble().await.unwrap_or(error))
            }
            other => other,
        }
    }

    /// Gives the bytes and entries of a published volume, and what is wrong with it.
    async fn stats(&self, volume_id: &str, path: &Path) -> Result<NodeGetVolumeStatsResponse, CsiError> {
        let record = self.books().find(path)?.filter(|record| record.volume_id == volume_id);
        let record = record.ok_or_else(|| CsiError::NotPublished { target: path.to_owned() })?;
        let mounts = self.mounts().await;
        let trouble = self.trouble(&record, &mounts).await?;
        let mount = mounts.as_ref().ok().and_then(|mounts| mounts.get(&record.key));
        let usage = |unit: Unit, total: Option<u64>| {
            let total = i64::try_from(total.unwrap_or(0)).unwrap_or(i64::MAX);
            VolumeUsage { available: 0, total, used: total, unit: unit.into() }
        };
        let abnormal = trouble.is_some();
        let message = trouble.map_or_else(|| format!("{} is mounted", record.revision), |trouble| trouble.message);
        Ok(NodeGetVolumeStatsResponse {
            usage: vec![
                usage(Unit::Bytes, mount.and_then(|mount| mount.bytes)),
                usage(Unit::Inodes, mount.and_then(|mount| mount.entries)),
            ],
            volume_condition: Some(VolumeCondition { abnormal, message }),
        })
    }

    /// Gives what is wrong with a volume, at all targets or at one.
    async fn health(&self, volume_id: &str, path: Option<&Path>) -> Result<VolumeHealth, CsiError> {
        let mut records = self.books().all()?;
        records.retain(|record| record.volume_id == volume_id && path.is_none_or(|path| record.target == path));
        if records.is_empty() {
            let target = path.unwrap_or(Path::new("any target")).to_owned();
            return Err(CsiError::NotPublished { target });
        }
        let mounts = self.mounts().await;
        let mut health = VolumeHealth { volume_id: volume_id.to_owned(), health_statuses: Vec::new() };
        for record in &records {
            let Some(trouble) = self.trouble(record, &mounts).await? else {
                continue;
            };
            // The specification wants each reason once.
            if !health.health_statuses.iter().any(|entry| entry.reason == trouble.reason) {
                let Trouble { status, reason, message } = trouble;
                let reason = reason.to_owned();
                health.health_statuses.push(VolumeHealthEntry { status: status.into(), reason, message });
            }
        }
        Ok(health)
    }

    /// Says what is wrong with a volume.
    async fn trouble(
        &self,
        record: &Record,
        mounts: &Result<HashMap<String, MountInfo>, CsiError>,
    ) -> Result<Option<Trouble>, CsiError> {
        let trouble = |status, reason, message| Ok(Some(Trouble { status, reason, message }));
        let lost = "delete the pod, its successor mounts again";
        let seen = if parent_is_gone(&record.target) { None } else { shown(&real(&record.target)?)? };
        if seen.is_none() {
            let message = format!("nothing is mounted at the pod's directory; {lost}");
            return trouble(ErrorType::Inaccessible, "NotMounted", message);
        }
        if seen != shown(&self.books().mount_dir(&record.key))? {
            let message = format!("the mount that the pod sees is served no more; {lost}");
            return trouble(ErrorType::Inaccessible, "MountLost", message);
        }
        match mounts.as_ref().map(|mounts| mounts.get(&record.key)) {
            Err(error) => trouble(ErrorType::Degraded, "NoDaemon", error.text()),
            Ok(None) => trouble(ErrorType::Degraded, "NotServed", "the daemon does not serve the mount".to_owned()),
            Ok(Some(MountInfo { state: MountState::Failed, reason, .. })) => {
                let reason = reason.as_deref().unwrap_or("the daemon's log says why");
                trouble(ErrorType::Degraded, "NotServed", format!("the mount is not served now: {reason}"))
            }
            Ok(Some(_)) => match self.lake_trouble().await {
                Some(error) => {
                    let message = format!("{error}; what the tier has is read all the same");
                    trouble(ErrorType::Degraded, "LakeAway", message)
                }
                None => Ok(None),
            },
        }
    }
}

/// What is wrong with a volume.
#[derive(Debug)]
struct Trouble {
    status: ErrorType,
    reason: &'static str,
    message: String,
}

#[tonic::async_trait]
impl Node for Driver {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let ask = read(request.into_inner())?;
        let driver = self.clone();
        self.in_time("mounting the volume", async move { driver.publish(ask).await }).await?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let volume_id = required(&request.volume_id, "volume id")?.to_owned();
        let target = target_of(&request.target_path)?;
        let driver = self.clone();
        let work = async move { driver.unpublish(&volume_id, &target).await };
        self.in_time("unmounting the volume", work).await?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let volume_id = required(&request.volume_id, "volume id")?.to_owned();
        // One that is not absolute is no target, and so not found.
        let path: PathBuf = Path::new(required(&request.volume_path, "volume path")?).components().collect();
        let driver = self.clone();
        let work = async move { driver.stats(&volume_id, &path).await };
        Ok(Response::new(self.in_time("asking how the volume does", work).await?))
    }

    async fn node_get_volume_health(
        &self,
        request: Request<NodeGetVolumeHealthRequest>,
    ) -> Result<Response<NodeGetVolumeHealthResponse>, Status> {
        let request = request.into_inner();
        let volume_id = required(&request.volume_id, "volume id")?.to_owned();
        let path: PathBuf = Path::new(&request.volume_publish_path).components().collect();
        let driver = self.clone();
        let work = async move {
            let path = Some(path.as_path()).filter(|path| !path.as_os_str().is_empty());
            driver.health(&volume_id, path).await
        };
        let health = self.in_time("asking how the volume does", work).await?;
        Ok(Response::new(NodeGetVolumeHealthResponse { volume_health: Some(health) }))
    }

    async fn node_get_capabilities(
        &self,
        _request: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capabilities = [Rpc::GetVolumeStats, Rpc::VolumeCondition, Rpc::GetVolumeHealth]
            .map(|rpc| NodeServiceCapability { r#type: Some(Type::Rpc(RpcCapability { r#type: rpc.into() })) });
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: capabilities.into() }))
    }

    async fn node_get_info(
        &self,
        _request: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        let node_id = self.inner.settings.node.clone();
        Ok(Response::new(NodeGetInfoResponse { node_id, ..NodeGetInfoResponse::default() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::csi::proto::csi::VolumeCapability;
    use crate::node::csi::proto::csi::volume_capability::access_mode::Mode;
    use crate::node::csi::proto::csi::volume_capability::{AccessMode, AccessType, MountVolume};

    fn request() -> NodePublishVolumeRequest {
        let context = [
            ("dataset", "xray@v2"),
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("csi.storage.k8s.io/pod.name", "train-0"),
            ("csi.storage.k8s.io/pod.namespace", "vision"),
            ("csi.storage.k8s.io/pod.uid", "u-1"),
            ("csi.storage.k8s.io/serviceAccount.name", "nightly"),
        ];
        NodePublishVolumeRequest {
            volume_id: "csi-1".into(),
            target_path: "/pods/u-1/mount/".into(),
            readonly: true,
            volume_capability: Some(VolumeCapability {
                access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
                access_type: Some(AccessType::Mount(MountVolume::default())),
            }),
            volume_context: context.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            ..NodePublishVolumeRequest::default()
        }
    }

    #[test]
    fn a_request_says_which_pod_asks_and_what_for() {
        let ask = read(request()).expect("is right");
        assert_eq!((ask.volume_id.as_str(), ask.target.as_path()), ("csi-1", Path::new("/pods/u-1/mount")));
        assert_eq!(ask.attributes.len(), 1, "the kubelet's keys are no attributes");
        assert_eq!(ask.pod.principal().to_string(), "serviceaccount:vision/nightly");
        assert_eq!((ask.pod.name.as_str(), ask.pod.uid.as_str()), ("train-0", "u-1"));
    }

    #[test]
    fn a_request_that_lacks_something_or_brings_secrets_is_refused() {
        type Change = fn(&mut NodePublishVolumeRequest);
        let cases: [(&str, Change); 6] = [
            ("volume id", |request| request.volume_id.clear()),
            ("target path", |request| request.target_path.clear()),
            ("not absolute", |request| request.target_path = "pods/1".into()),
            ("volume capability", |request| request.volume_capability = None),
            ("readOnly: true", |request| request.readonly = false),
            ("no credentials of their own", |request| drop(request.secrets.insert("key".into(), "s3cret".into()))),
        ];
        for (said, change) in cases {
            let mut request = request();
            change(&mut request);
            let text = read(request).expect_err(said).to_string();
            assert!(text.contains(said) && !text.contains("s3cret"), "{said}: {text}");
        }
    }
}
