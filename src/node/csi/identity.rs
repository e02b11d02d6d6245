//! Who the driver is, to the kubelet, to the provisioner and to probes; and how it makes itself known to the kubelet.

use tonic::{Request, Response, Status};

use super::Mode;
use super::driver::Driver;
use super::proto::csi::identity_server::Identity;
use super::proto::csi::plugin_capability::service::Type as ServiceType;
use super::proto::csi::plugin_capability::{Service, Type};
use super::proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};
use super::proto::registration::registration_server::Registration;
use super::proto::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};

/// What Kubernetes calls the versions of CSI that it speaks.
const CSI_VERSIONS: [&str; 1] = ["1.0.0"];

/// Answers who the driver is.
#[derive(Debug, Clone)]
pub struct Who {
    pub name: String,
    pub mode: Mode,
    /// Asked whether the daemon answers; None: there is none.
    pub driver: Option<Driver>,
}

#[tonic::async_trait]
impl Identity for Who {
    async fn get_plugin_info(
        &self,
        _request: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.name.clone(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..GetPluginInfoResponse::default()
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _request: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let controller =
            PluginCapability { r#type: Some(Type::Service(Service { r#type: ServiceType::ControllerService.into() })) };
        let capabilities = if self.mode.has_controller() { vec![controller] } else { Vec::new() };
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _request: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let ready = match &self.driver {
            Some(driver) => driver.info().await.is_ok(),
            None => true,
        };
        Ok(Response::new(ProbeResponse { ready: Some(ready) }))
    }
}

/// Answers the kubelet's plugin watcher.
#[derive(Debug, Clone)]
pub struct Plugin {
    pub name: String,
    /// The driver's socket, as the kubelet sees it.
    pub endpoint: String,
}

#[tonic::async_trait]
impl Registration for Plugin {
    async fn get_info(&self, _request: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: self.name.clone(),
            endpoint: self.endpoint.clone(),
            supported_versions: CSI_VERSIONS.map(str::to_owned).into(),
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if status.plugin_registered {
            tracing::info!(driver = self.name, "the kubelet knows the driver");
        } else {
            tracing::error!(error = status.error, driver = self.name, "the kubelet does not take the driver");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
