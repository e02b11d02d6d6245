//! The lake on aws-sdk-s3.

use std::path::{Path, PathBuf};
use std::time::Duration;

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
    #[error(transparent)]
    Embedded(#[from] super::embedded::StoreError),
}

impl S3Config {
    /// Parses `s3://bucket/prefix`; everything else has its default.
    pub fn parse_url(_url: &str) -> Result<Self, LakeUrlError> {
        todo!()
    }
}

/// A lake in an S3-compatible store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct S3Lake {}

impl S3Lake {
    /// Sets up the client; speaks to nobody yet.
    pub async fn connect(_config: S3Config) -> Result<Self, LakeOpenError> {
        todo!()
    }

    /// Opens the embedded lake in `dir`, in this process and without a port; other processes may
    /// use the same directory at the same time.
    pub async fn embedded(_dir: &Path) -> Result<Self, LakeOpenError> {
        todo!()
    }
}
