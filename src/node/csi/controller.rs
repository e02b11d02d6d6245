//! What the provisioner asks: volumes by StorageClass. Nothing is made anywhere: a volume is what its parameters and
//! the claim's annotations say, and its id is a function of its name.

use std::collections::HashMap;
use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;
use tonic::{Request, Response, Status};

use super::error::CsiError;
use super::kube::Kube;
use super::proto::csi::controller_server::Controller;
use super::proto::csi::controller_service_capability::rpc::Type as Rpc;
use super::proto::csi::controller_service_capability::{Rpc as RpcCapability, Type};
use super::proto::csi::validate_volume_capabilities_response::Confirmed;
use super::proto::csi::{
    ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse, ControllerServiceCapability,
    CreateVolumeRequest, CreateVolumeResponse, DeleteVolumeRequest, DeleteVolumeResponse,
    ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse, Volume, VolumeCapability,
};
use super::volume::{
    Attributes, Made, VolumeError, Wanted, check_capability, id_for, is_own_id, own_keys, with_annotations,
};

/// How many volumes are remembered, to tell one that is asked for again from another one of the same name.
const REMEMBERED_MAX: usize = 10_000;

/// The claim's names, given by the provisioner where it has `--extra-create-metadata`.
const CLAIM_NAME: &str = "csi.storage.k8s.io/pvc/name";
const CLAIM_NAMESPACE: &str = "csi.storage.k8s.io/pvc/namespace";

/// Answers the provisioner.
#[derive(Debug)]
pub struct Provisioner {
    kube: Option<Kube>,
    made: Mutex<LruCache<String, Made>>,
}

impl Provisioner {
    /// Makes one that reads annotations through the API, where there is one.
    pub fn new(kube: Option<Kube>) -> Self {
        let most = NonZeroUsize::new(REMEMBERED_MAX).expect("a constant above 0");
        Self { kube, made: Mutex::new(LruCache::new(most)) }
    }

    /// Gives what a claim's annotations add.
    async fn annotated(&self, own: Attributes, parameters: &HashMap<String, String>) -> Result<Attributes, CsiError> {
        let (Some(kube), Some(name), Some(namespace)) =
            (&self.kube, parameters.get(CLAIM_NAME), parameters.get(CLAIM_NAMESPACE))
        else {
            return Ok(own);
        };
        let read = kube.annotations(namespace, name).await;
        let annotations = read.map_err(|message| CsiError::Api { message })?;
        Ok(with_annotations(own, &annotations)?)
    }

    async fn create(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        check_create(&request)?;
        let own = own_keys(&request.parameters)?;
        let attributes = self.annotated(own, &request.parameters).await?;
        // The pod would learn it too, but who makes the claim is the one who can mend it.
        Wanted::parse(&attributes)?;
        let made = Made::new(&attributes, request.capacity_range.as_ref());
        let mut known = self.made.lock();
        if known.get(&request.name).is_some_and(|before| *before != made) {
            let text = format!("the volume {} was made with other parameters or another capacity", request.name);
            return Err(Status::already_exists(text));
        }
        let volume_id = id_for(&request.name);
        known.put(request.name, made);
        let volume_context = attributes.into_iter().collect();
        Ok(Volume { volume_id, volume_context, ..Volume::default() })
    }
}

fn check_create(request: &CreateVolumeRequest) -> Result<(), VolumeError> {
    if request.name.is_empty() {
        return Err(VolumeError::Missing { what: "name" });
    }
    check_all(&request.volume_capabilities)?;
    if !request.secrets.is_empty() {
        return Err(VolumeError::Secrets);
    }
    if request.volume_content_source.is_some() {
        let what = "a volume of another volume or of a snapshot is not offered: name the commit in `dataset`";
        return Err(VolumeError::NotOffered { what });
    }
    if !request.mutable_parameters.is_empty() {
        return Err(VolumeError::NotOffered { what: "a VolumeAttributesClass changes nothing of a larder volume" });
    }
    Ok(())
}

fn check_all(capabilities: &[VolumeCapability]) -> Result<(), VolumeError> {
    if capabilities.is_empty() {
        return Err(VolumeError::NoCapability);
    }
    capabilities.iter().try_for_each(|capability| check_capability(Some(capability), None))
}

#[tonic::async_trait]
impl Controller for Provisioner {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let volume = self.create(request.into_inner()).await?;
        Ok(Response::new(CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let id = request.into_inner().volume_id;
        if id.is_empty() {
            return Err(VolumeError::Missing { what: "volume id" }.into());
        }
        let mut made = self.made.lock();
        let names: Vec<String> =
            made.iter().filter(|(name, _)| id_for(name) == id).map(|(name, _)| name.clone()).collect();
        for name in names {
            made.pop(&name);
        }
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        if request.volume_id.is_empty() {
            return Err(VolumeError::Missing { what: "volume id" }.into());
        }
        if request.volume_capabilities.is_empty() {
            return Err(VolumeError::NoCapability.into());
        }
        if !is_own_id(&request.volume_id) {
            let text = format!("{} is no volume that this driver has made", request.volume_id);
            return Err(Status::not_found(text));
        }
        let checked = check_all(&request.volume_capabilities).and_then(|()| {
            own_keys(&request.volume_context)
                .and_then(|own| if own.is_empty() { Ok(()) } else { Wanted::parse(&own).map(drop) })
        });
        let answer = match checked {
            Err(error) => ValidateVolumeCapabilitiesResponse { message: error.to_string(), ..Default::default() },
            Ok(()) => ValidateVolumeCapabilitiesResponse {
                confirmed: Some(Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: request.mutable_parameters,
                }),
                ..Default::default()
            },
        };
        Ok(Response::new(answer))
    }

    async fn controller_get_capabilities(
        &self,
        _request: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let create_delete = ControllerServiceCapability {
            r#type: Some(Type::Rpc(RpcCapability { r#type: Rpc::CreateDeleteVolume.into() })),
        };
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities: vec![create_delete] }))
    }
}
