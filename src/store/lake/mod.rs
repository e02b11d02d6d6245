//! The lake: the object store seam.
//!
//! * [`Lake`]: what Larder asks of an object store. Keys are relative to the lake's prefix.
//! * [`s3`]: the one implementation, on aws-sdk-s3: any S3-compatible store.
//! * [`embedded`]: an S3 server over a local directory, for the laptop, the demo and tests; reached
//!   through [`s3`] as well, so that there is one S3 path and it is always the real one.
//! * [`watch`]: what the lake answers and how fast; throttling; credentials that were rotated.
//! * [`retry`]: which errors pass, and how long to wait.
//!
//! A `Lake` promises: a `get` gives bytes of one version of the object; a conditional `put` has one
//! winner where the store can do that; errors say whether trying again may help.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::BoxStream;

use crate::format::tree::Pin;

pub mod embedded;
pub(crate) mod patience;
pub mod retry;
pub mod s3;
pub mod watch;

#[cfg(test)]
mod conformance;

/// What a store says of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectMeta {
    /// Relative to the prefix (for a listing of a foreign bucket: the whole key).
    pub key: String,
    pub size: u64,
    pub etag: String,
    pub version: Option<String>,
    /// Unix time in milliseconds of the store's clock.
    pub modified_ms: i64,
}

/// When a put may take effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutIf {
    Always,
    /// Only where no object has the key (If-None-Match: *).
    Absent,
    /// Only where the object has this ETag.
    Match(String),
}

/// A body that arrives in pieces; an error may come in its middle.
pub struct Body {
    /// Length of the whole body as announced.
    pub len: u64,
    pub etag: String,
    pub stream: BoxStream<'static, Result<Bytes, LakeError>>,
}

/// A page of a listing, in key order.
#[derive(Debug, Clone, Default)]
pub struct ListPage {
    pub objects: Vec<ObjectMeta>,
    /// Pass to the next call; None at the end.
    pub next: Option<String>,
}

/// A running multipart upload.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UploadId {
    pub key: String,
    pub id: String,
}

/// A multipart upload that was found in the lake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningUpload {
    pub upload: UploadId,
    /// Unix time in milliseconds of the store's clock.
    pub begun_ms: i64,
}

/// A part that arrived.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UploadedPart {
    /// From 1.
    pub number: u32,
    pub etag: String,
    pub size: u64,
}

/// Why the lake did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LakeError {
    #[error("{key}: no such object in the lake")]
    NotFound { key: String },
    #[error("{key}: the object is not what was expected (changed or already there)")]
    Precondition { key: String },
    #[error("{key}: access denied; check the credentials and the bucket's policy")]
    Denied {
        key: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Passing: throttled, overloaded, connection lost, timeout. Trying again may help.
    #[error("{key}: the lake is unreachable or overloaded")]
    Passing {
        key: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Anything that trying again does not change.
    #[error("{key}: the lake refused")]
    Permanent {
        key: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl LakeError {
    /// Says whether trying again may help.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Passing { .. })
    }
}

/// The object store, below one prefix of one bucket.
#[async_trait::async_trait]
pub trait Lake: std::fmt::Debug + Send + Sync + 'static {
    /// `s3://bucket/prefix`, or the directory of an embedded lake: for messages.
    fn url(&self) -> String;

    /// Gets an object, or a range of it (within its length).
    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Body, LakeError>;

    /// Gets a range of a user's own object, pinned: another version is `Precondition`.
    async fn get_pinned(&self, pin: &Pin, range: Option<Range<u64>>) -> Result<Body, LakeError>;

    async fn head(&self, key: &str) -> Result<ObjectMeta, LakeError>;

    /// Puts a whole object; gives its ETag.
    async fn put(&self, key: &str, body: Bytes, when: PutIf) -> Result<String, LakeError>;

    /// Deletes; no error where there is none.
    async fn delete(&self, key: &str) -> Result<(), LakeError>;

    /// Lists below `prefix` (relative to the lake's), a page at a time.
    async fn list(&self, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError>;

    /// Lists the names directly below `prefix` that have keys below them (`prefix` ends with `/`,
    /// the names have none), in order.
    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>, LakeError>;

    /// Lists a foreign `bucket` below `prefix`; keys are whole, versions are given where kept.
    async fn list_foreign(&self, bucket: &str, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError>;

    /// Lists the multipart uploads below `prefix` that were neither finished nor aborted.
    async fn list_uploads(&self, prefix: &str) -> Result<Vec<RunningUpload>, LakeError>;

    /// Begins a multipart upload.
    async fn upload_begin(&self, key: &str) -> Result<UploadId, LakeError>;
    /// Uploads a part (5 MiB at least but for the last).
    async fn upload_part(&self, upload: &UploadId, number: u32, body: Bytes) -> Result<UploadedPart, LakeError>;
    /// Lists the parts that arrived: for resuming.
    async fn upload_parts(&self, upload: &UploadId) -> Result<Vec<UploadedPart>, LakeError>;
    async fn upload_finish(&self, upload: &UploadId, parts: Vec<UploadedPart>) -> Result<String, LakeError>;
    async fn upload_abort(&self, upload: &UploadId) -> Result<(), LakeError>;
}

/// Reads a whole small object into memory, refusing more than `limit` bytes; retries what passes.
pub async fn get_all(lake: &dyn Lake, key: &str, limit: u64) -> Result<Bytes, LakeError> {
    get_with_etag(lake, key, limit).await.map(|(bytes, _)| bytes)
}

/// Like [`get_all`], with the object's ETag.
pub async fn get_with_etag(lake: &dyn Lake, key: &str, limit: u64) -> Result<(Bytes, String), LakeError> {
    retry::with_retry(&retry::RetryPolicy::default(), || get_once(lake, key, limit)).await
}

/// Lists everything below `prefix`; retries what passes.
pub async fn list_all(lake: &dyn Lake, prefix: &str) -> Result<Vec<ObjectMeta>, LakeError> {
    let policy = retry::RetryPolicy::default();
    let (mut objects, mut next) = (Vec::new(), None);
    loop {
        let page = retry::with_retry(&policy, || lake.list(prefix, next.clone())).await?;
        objects.extend(page.objects);
        next = page.next;
        if next.is_none() {
            return Ok(objects);
        }
    }
}

async fn get_once(lake: &dyn Lake, key: &str, limit: u64) -> Result<(Bytes, String), LakeError> {
    let body = lake.get(key, None).await?;
    if body.len > limit {
        return Err(too_large(key, body.len, limit));
    }
    let mut bytes = BytesMut::with_capacity(usize::try_from(body.len).unwrap_or(0));
    let mut stream = body.stream;
    while let Some(chunk) = stream.next().await {
        let chunk = chunk?;
        if (bytes.len() + chunk.len()) as u64 > body.len {
            return Err(wrong_length(key, body.len));
        }
        bytes.extend_from_slice(&chunk);
    }
    if bytes.len() as u64 != body.len {
        return Err(wrong_length(key, body.len));
    }
    Ok((bytes.freeze(), body.etag))
}

fn too_large(key: &str, len_bytes: u64, limit_bytes: u64) -> LakeError {
    let source = BodyError::TooLarge { len_bytes, limit_bytes }.into();
    LakeError::Permanent { key: key.to_owned(), source }
}

fn wrong_length(key: &str, announced_bytes: u64) -> LakeError {
    let source = BodyError::WrongLength { announced_bytes }.into();
    LakeError::Passing { key: key.to_owned(), source }
}

/// What can be wrong with a body.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("the object has {len_bytes} bytes, but at most {limit_bytes} make sense here")]
    TooLarge { len_bytes: u64, limit_bytes: u64 },
    #[error("the body has not the {announced_bytes} bytes that were announced")]
    WrongLength { announced_bytes: u64 },
    #[error("no byte came for {waited_ms} ms in the middle of the body")]
    Stalled { waited_ms: u64 },
    #[error("the store answered another range than the one that was asked for")]
    WrongRange,
}
