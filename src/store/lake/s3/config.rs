//! Where a lake is and how to talk to it; and the SDK client that follows from it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_credential_types::Credentials;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Region, RequestChecksumCalculation, ResponseChecksumValidation, SharedHttpClient,
    StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};

use super::errors::AsksForTime;

/// What AWS itself is called, and what most other stores accept.
const DEFAULT_REGION: &str = "us-east-1";

/// Server-side encryption that every write asks for (and, with a key of one's own, every read).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Sse {
    /// The bucket's default.
    #[default]
    None,
    /// SSE-S3: the store's own keys.
    S3,
    /// SSE-KMS; None: the account's default key.
    Kms { key_id: Option<String> },
    /// SSE-C: this 32-byte key, sent along with each request (TLS only).
    Customer { key: SecretKey },
}

/// A key that does not show in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretKey(pub [u8; 32]);

impl std::fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

/// When the SDK adds its checksum headers and trailers, which some stores choke on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checksums {
    /// On AWS, where no endpoint is configured; elsewhere only where S3 demands one.
    #[default]
    Auto,
    WhenRequired,
    WhenSupported,
}

/// A key pair that takes the place of the standard AWS chain.
#[derive(Clone, PartialEq, Eq)]
pub struct StaticKeys {
    pub access_key: String,
    pub secret_key: String,
}

impl std::fmt::Debug for StaticKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StaticKeys({}, ..)", self.access_key)
    }
}

/// Where a lake is and how to talk to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Config {
    pub bucket: String,
    /// Without slashes at its ends; empty: the whole bucket.
    pub prefix: String,
    /// None: AWS.
    pub endpoint: Option<String>,
    /// None: the AWS chain's, or `us-east-1` where an endpoint is given.
    pub region: Option<String>,
    /// None: path style where an endpoint is given.
    pub path_style: Option<bool>,
    /// A PEM file of further roots to trust.
    pub ca_file: Option<PathBuf>,
    pub sse: Sse,
    pub checksums: Checksums,
    /// None: the standard AWS chain (environment, profile, container, instance).
    pub keys: Option<StaticKeys>,
    pub connect_timeout: Duration,
    /// How long the store may be silent, before its answer and in the middle of a body.
    pub read_timeout: Duration,
    /// Tries of one request inside the SDK.
    pub attempts_max: u32,
}

/// Says why a lake's URL is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a lake: {why}; write s3://bucket/prefix")]
pub struct LakeUrlError {
    pub text: String,
    pub why: &'static str,
}

/// Says why a lake could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LakeOpenError {
    #[error("{path}: cannot read the certificates to trust")]
    CaFile {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path}: holds no PEM certificate")]
    CaContent { path: PathBuf },
    #[error("`{endpoint}` is not an endpoint: write http://host:port or https://host")]
    Endpoint { endpoint: String },
    #[error(transparent)]
    Embedded(#[from] crate::store::lake::embedded::StoreError),
}

impl S3Config {
    /// Makes the configuration of a bucket's prefix, everything else with its default.
    pub fn new(bucket: &str, prefix: &str) -> Self {
        Self {
            bucket: bucket.to_owned(),
            prefix: prefix.trim_matches('/').to_owned(),
            endpoint: None,
            region: None,
            path_style: None,
            ca_file: None,
            sse: Sse::None,
            checksums: Checksums::Auto,
            keys: None,
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(30),
            attempts_max: 4,
        }
    }

    /// Parses `s3://bucket/prefix`; everything else has its default.
    pub fn parse_url(url: &str) -> Result<Self, LakeUrlError> {
        let error = |why| LakeUrlError { text: url.to_owned(), why };
        let rest = url.strip_prefix("s3://").ok_or_else(|| error("it does not begin with s3://"))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(error("it names no bucket"));
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if !bucket.bytes().all(plain) || bucket.len() > 63 {
            return Err(error("the bucket's name is none"));
        }
        if prefix.contains("//") || prefix.split('/').any(|part| part == "." || part == "..") {
            return Err(error("the prefix has an empty part, or a part of dots"));
        }
        Ok(Self::new(bucket, prefix))
    }

    /// Says whether requests go through TLS, which keeps their bodies as they are.
    pub fn has_tls(&self) -> bool {
        self.endpoint.as_deref().is_none_or(|endpoint| endpoint.starts_with("https://"))
    }

    /// Gives `s3://bucket/prefix`.
    pub fn url(&self) -> String {
        if self.prefix.is_empty() {
            return format!("s3://{}", self.bucket);
        }
        format!("s3://{}/{}", self.bucket, self.prefix)
    }
}

/// Where the client sends its requests.
pub(super) enum Transport {
    Network,
    /// A service in this process; it asks for no signature.
    InProcess(SharedHttpClient),
}

/// Builds the SDK's client.
pub(super) async fn client(config: &S3Config, transport: Transport) -> Result<aws_sdk_s3::Client, LakeOpenError> {
    let builder = match (&transport, &config.keys) {
        (Transport::InProcess(_), _) => aws_sdk_s3::Config::builder().region(Region::new(DEFAULT_REGION)),
        (Transport::Network, Some(keys)) => {
            let keys = Credentials::from_keys(&keys.access_key, &keys.secret_key, None);
            aws_sdk_s3::Config::builder().credentials_provider(keys).region(region(config).await)
        }
        (Transport::Network, None) => chain(config).await?,
    };
    let http_client = match transport {
        Transport::Network => network_client(config)?,
        Transport::InProcess(client) => client,
    };
    let at_aws = config.endpoint.is_none();
    let (on_request, on_response) = match (config.checksums, at_aws) {
        (Checksums::Auto, true) | (Checksums::WhenSupported, _) => {
            (RequestChecksumCalculation::WhenSupported, ResponseChecksumValidation::WhenSupported)
        }
        (Checksums::Auto, false) | (Checksums::WhenRequired, _) => {
            (RequestChecksumCalculation::WhenRequired, ResponseChecksumValidation::WhenRequired)
        }
    };
    let mut builder = builder
        .behavior_version(BehaviorVersion::latest())
        .http_client(http_client)
        .force_path_style(config.path_style.unwrap_or(!at_aws))
        .request_checksum_calculation(on_request)
        .response_checksum_validation(on_response)
        .retry_config(RetryConfig::standard().with_max_attempts(config.attempts_max.max(1)))
        .retry_classifier(AsksForTime)
        .timeout_config(timeouts(config, config.read_timeout))
        // Bodies have a timeout of ours, per piece.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .allow_no_auth();
    if let Some(endpoint) = &config.endpoint {
        builder = builder.endpoint_url(endpoint);
    }
    Ok(aws_sdk_s3::Client::from_conf(builder.build()))
}

/// Makes the timeouts of one try that may take `attempt` until the answer begins.
pub(super) fn timeouts(config: &S3Config, attempt: Duration) -> TimeoutConfig {
    TimeoutConfig::builder().connect_timeout(config.connect_timeout).operation_attempt_timeout(attempt).build()
}

/// Asks the standard AWS chain for region and credentials (the latter at the first request).
async fn chain(config: &S3Config) -> Result<aws_sdk_s3::config::Builder, LakeOpenError> {
    let loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(https_client(TlsContext::default()))
        .region(region(config).await);
    Ok(aws_sdk_s3::config::Builder::from(&loader.load().await))
}

/// Finds the region. Where an endpoint is given, nobody has to say one, and no instance is asked.
async fn region(config: &S3Config) -> Option<Region> {
    let known = config.region.clone().map(Region::new);
    if known.is_some() {
        return known;
    }
    if config.endpoint.is_none() {
        return RegionProviderChain::default_provider().or_else(DEFAULT_REGION).region().await;
    }
    RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(ProfileFileRegionProvider::new())
        .or_else(DEFAULT_REGION)
        .region()
        .await
}

fn https_client(context: TlsContext) -> SharedHttpClient {
    aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .tls_context(context)
        .build_https()
}

fn network_client(config: &S3Config) -> Result<SharedHttpClient, LakeOpenError> {
    let endpoint = config.endpoint.as_deref().unwrap_or("https://");
    if endpoint.starts_with("http://") {
        return Ok(aws_smithy_http_client::Builder::new().build_http());
    }
    if !endpoint.starts_with("https://") {
        return Err(LakeOpenError::Endpoint { endpoint: endpoint.to_owned() });
    }
    let mut trust = TrustStore::default();
    if let Some(path) = &config.ca_file {
        trust = trust.with_pem_certificate(read_ca(path)?);
    }
    let context = TlsContext::builder().with_trust_store(trust).build();
    Ok(https_client(context.expect("a trust store alone is a valid TLS context")))
}

/// Reads a PEM file; refuses one that the TLS library would only meet later, with a panic.
fn read_ca(path: &Path) -> Result<Vec<u8>, LakeOpenError> {
    let text = std::fs::read(path).map_err(|source| LakeOpenError::CaFile { path: path.to_path_buf(), source })?;
    let content = || LakeOpenError::CaContent { path: path.to_path_buf() };
    let shown = std::str::from_utf8(&text).map_err(|_| content())?;
    let blocks: Vec<&str> = shown.split("-----BEGIN CERTIFICATE-----").skip(1).collect();
    if blocks.is_empty() || !blocks.into_iter().all(is_certificate) {
        return Err(content());
    }
    Ok(text)
}

fn is_certificate(block: &str) -> bool {
    use base64::Engine;
    let Some((text, _)) = block.split_once("-----END CERTIFICATE-----") else {
        return false;
    };
    let text: String = text.split_whitespace().collect();
    // A certificate is an ASN.1 sequence with a two-byte length.
    let der = base64::engine::general_purpose::STANDARD.decode(text).unwrap_or_default();
    matches!(der.as_slice(), [0x30, 0x82, high, low, rest @ ..]
        if rest.len() == usize::from(*high) * 256 + usize::from(*low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_give_bucket_and_prefix() {
        for (url, bucket, prefix) in
            [("s3://b", "b", ""), ("s3://b/", "b", ""), ("s3://b/a/c/", "b", "a/c"), ("s3://my.b-1/x", "my.b-1", "x")]
        {
            let config = S3Config::parse_url(url).unwrap();
            assert_eq!((config.bucket.as_str(), config.prefix.as_str()), (bucket, prefix), "{url}");
            assert_eq!(S3Config::parse_url(&config.url()).unwrap(), config);
        }
        for url in ["", "b/c", "http://b", "s3://", "s3:///x", "s3://b b/x", "s3://b/a//c", "s3://b/../c"] {
            assert!(S3Config::parse_url(url).is_err(), "{url}");
        }
    }

    #[tokio::test]
    async fn certificates_that_are_none_are_refused_before_any_request() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let config = |path: &Path| S3Config {
            endpoint: Some("https://127.0.0.1:1".into()),
            ca_file: Some(path.to_path_buf()),
            keys: Some(StaticKeys { access_key: "a".into(), secret_key: "b".into() }),
            ..S3Config::new("b", "")
        };
        assert!(matches!(client(&config(&path), Transport::Network).await, Err(LakeOpenError::CaFile { .. })));
        for text in ["", "hello", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            std::fs::write(&path, text).unwrap();
            assert!(matches!(client(&config(&path), Transport::Network).await, Err(LakeOpenError::CaContent { .. })));
        }
    }
}
