//! The SDK's client over a store in this process, without a port.
//!
//! A request of the SDK is handed to the protocol's service as it is, and the answer back: bodies
//! stay streams both ways, nothing is collected. So the embedded lake runs through the same code as
//! a foreign one, down to the headers, and the tests of one count for the other.

use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use http::HeaderValue;
use http::header::HOST;
use s3s::service::S3Service;

/// Gives the SDK's HTTP client whose every request goes to `service`.
pub fn http_client(service: S3Service) -> SharedHttpClient {
    SharedHttpClient::new(InProcess(service))
}

#[derive(Debug, Clone)]
struct InProcess(S3Service);

impl HttpClient for InProcess {
    fn http_connector(&self, _: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        SharedHttpConnector::new(self.clone())
    }
}

impl HttpConnector for InProcess {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let service = self.0.clone();
        HttpConnectorFuture::new(async move {
            let answer = service.call(to_service(request)?).await;
            // The service's own failures become answers; what is left is a request it cannot read.
            let answer = answer.map_err(|error| ConnectorError::user(error.into()))?;
            from_service(answer)
        })
    }
}

fn to_service(request: HttpRequest) -> Result<s3s::HttpRequest, ConnectorError> {
    let mut request = request.try_into_http1x().map_err(|error| ConnectorError::user(error.into()))?;
    // A connection would add it, and the service looks for it.
    let host = request.uri().authority().map(|host| HeaderValue::from_str(host.as_str()));
    if let Some(Ok(host)) = host {
        request.headers_mut().entry(HOST).or_insert(host);
    }
    Ok(request.map(s3s::Body::http_body))
}

fn from_service(answer: s3s::HttpResponse) -> Result<HttpResponse, ConnectorError> {
    answer.map(SdkBody::from_body_1_x).try_into().map_err(|error| ConnectorError::other(Box::new(error), None))
}
