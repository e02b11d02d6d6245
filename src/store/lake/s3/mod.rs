//! The lake on aws-sdk-s3: any S3-compatible store, over the network or in this process.
//!
//! * [`config`]: where the store is, how to sign, what to trust, what to wait for.
//! * [`errors`]: which failures pass.
//! * [`S3Lake`]: the operations.
//!
//! Each body is checked for its length and may not be silent for longer than the read timeout, so
//! that a reader has all bytes or an error. An upload's try has more time the larger it is. A body's
//! SHA-256 is signed only over plain http: TLS guards it already, and the digest costs more than
//! any other part of a push.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{
    CompletedMultipartUpload, CompletedPart, EncodingType, Object, ObjectVersion, ServerSideEncryption,
};
use bytes::Bytes;
use futures::StreamExt;

use super::patience::within;
use super::{
    Body, BodyError, Lake, LakeError, ListPage, ObjectMeta, PutIf, RunningUpload, UploadId, UploadedPart, embedded,
};
use crate::format::tree::Pin;

mod config;
mod errors;

pub use config::{Checksums, LakeOpenError, LakeUrlError, S3Config, SecretKey, Sse, StaticKeys};
pub use errors::S3Failure;

use errors::{About, lake_error};

/// The slowest upload that is not taken for a dead one.
const UPLOAD_BYTES_PER_SEC_MIN: u64 = 64 * 1024;
/// How long a store may join the parts of an upload.
const JOIN_TIMEOUT: Duration = Duration::from_secs(600);

/// A lake in an S3-compatible store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct S3Lake {
    client: aws_sdk_s3::Client,
    config: Arc<S3Config>,
    sse: SseHeaders,
    url: String,
}

/// The headers of server-side encryption.
#[derive(Clone, Default)]
struct SseHeaders {
    server: Option<ServerSideEncryption>,
    kms_key_id: Option<String>,
    /// Algorithm, key, MD5 of the key: sent with each request, reads included.
    customer: Option<(String, String, String)>,
}

impl std::fmt::Debug for SseHeaders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SseHeaders({:?}, customer key: {})", self.server, self.customer.is_some())
    }
}

impl From<&Sse> for SseHeaders {
    fn from(sse: &Sse) -> Self {
        use embedded::body::base64_of;
        use md5::{Digest, Md5};
        match sse {
            Sse::None => Self::default(),
            Sse::S3 => Self { server: Some(ServerSideEncryption::Aes256), ..Self::default() },
            Sse::Kms { key_id } => {
                Self { server: Some(ServerSideEncryption::AwsKms), kms_key_id: key_id.clone(), customer: None }
            }
            Sse::Customer { key } => {
                let digest: [u8; 16] = Md5::digest(key.0).into();
                let customer = ("AES256".to_owned(), base64_of(&key.0), base64_of(&digest));
                Self { customer: Some(customer), ..Self::default() }
            }
        }
    }
}

impl SseHeaders {
    fn algorithm(&self) -> Option<String> {
        self.customer.as_ref().map(|(algorithm, _, _)| algorithm.clone())
    }

    fn key(&self) -> Option<String> {
        self.customer.as_ref().map(|(_, key, _)| key.clone())
    }

    fn key_md5(&self) -> Option<String> {
        self.customer.as_ref().map(|(_, _, md5)| md5.clone())
    }
}

impl S3Lake {
    /// Sets up the client; speaks to nobody yet.
    pub async fn connect(config: S3Config) -> Result<Self, LakeOpenError> {
        let client = config::client(&config, config::Transport::Network).await?;
        Ok(Self::new(client, config))
    }

    /// Opens the embedded lake in `dir`, in this process and without a port; other processes may
    /// use the same directory at the same time.
    pub async fn embedded(dir: &Path) -> Result<Self, LakeOpenError> {
        let store = embedded::Store::open(dir, embedded::StoreOptions::default())?;
        store.ensure_bucket(embedded::DEFAULT_BUCKET)?;
        let config = S3Config::new(embedded::DEFAULT_BUCKET, "");
        let lake = Self::in_process(&store, config).await?;
        Ok(Self { url: dir.display().to_string(), ..lake })
    }

    /// Speaks to a store in this process; of `config`, where and how to connect does not count.
    pub async fn in_process(store: &embedded::Store, config: S3Config) -> Result<Self, LakeOpenError> {
        let config = S3Config {
            endpoint: Some("http://embedded.lake".to_owned()),
            path_style: Some(true),
            attempts_max: 1,
            ..config
        };
        let http_client = embedded::in_process::http_client(store.service(None));
        let client = config::client(&config, config::Transport::InProcess(http_client)).await?;
        Ok(Self::new(client, config))
    }

    fn new(client: aws_sdk_s3::Client, config: S3Config) -> Self {
        Self { sse: SseHeaders::from(&config.sse), url: config.url(), client, config: Arc::new(config) }
    }

    /// Gives the configuration.
    pub fn config(&self) -> &S3Config {
        &self.config
    }

    /// Makes the bucket; one that is there already is no error.
    pub async fn create_bucket(&self) -> Result<(), LakeError> {
        let made = self.client.create_bucket().bucket(&self.config.bucket).send().await;
        match made {
            Ok(_) => Ok(()),
            Err(error) => {
                let exists = error
                    .as_service_error()
                    .is_some_and(|error| error.is_bucket_already_owned_by_you() || error.is_bucket_already_exists());
                if exists { Ok(()) } else { Err(lake_error(&self.config.bucket, error)) }
            }
        }
    }

    /// Lets the bucket keep older versions from now on, or no longer.
    pub async fn set_versioning(&self, on: bool) -> Result<(), LakeError> {
        use aws_sdk_s3::types::{BucketVersioningStatus, VersioningConfiguration};
        let status = if on { BucketVersioningStatus::Enabled } else { BucketVersioningStatus::Suspended };
        let setting = VersioningConfiguration::builder().status(status).build();
        let bucket = &self.config.bucket;
        let set = self.client.put_bucket_versioning().bucket(bucket).versioning_configuration(setting);
        set.send().await.map(drop).about(bucket)
    }

    fn full(&self, key: &str) -> String {
        if self.config.prefix.is_empty() {
            return key.to_owned();
        }
        format!("{}/{key}", self.config.prefix)
    }

    /// Gives the key below the prefix; None for what lies elsewhere.
    fn relative(&self, full: &str) -> Option<String> {
        if self.config.prefix.is_empty() {
            return Some(full.to_owned());
        }
        full.strip_prefix(&self.config.prefix)?.strip_prefix('/').map(str::to_owned)
    }

    /// Overrides the timeout of one try.
    fn patience(&self, attempt: Duration) -> aws_sdk_s3::config::Builder {
        aws_sdk_s3::Config::builder().timeout_config(config::timeouts(&self.config, attempt))
    }

    fn upload_patience(&self, len: usize) -> aws_sdk_s3::config::Builder {
        let sending = Duration::from_secs(len as u64 / UPLOAD_BYTES_PER_SEC_MIN);
        self.patience(self.config.read_timeout + sending)
    }

    /// Turns an answer into a body that has the asked-for length or fails.
    fn body(
        &self,
        key: &str,
        answer: aws_sdk_s3::operation::get_object::GetObjectOutput,
        range: Option<&Range<u64>>,
    ) -> Result<Body, LakeError> {
        let len = answer.content_length().and_then(|len| u64::try_from(len).ok());
        let asked = range.map(|range| range.end - range.start);
        let whole = range.is_none_or(|range| range.start == 0) && answer.content_range().is_none();
        let right = match range {
            None => true,
            Some(range) => whole || is_range(answer.content_range(), range),
        };
        let Some(len) = len.filter(|len| right && asked.is_none_or(|asked| asked == *len)) else {
            let source = BodyError::WrongRange.into();
            return Err(LakeError::Permanent { key: key.to_owned(), source });
        };
        let etag = answer.e_tag().unwrap_or_default().to_owned();
        let stream = checked(key.to_owned(), answer.body, len, self.config.read_timeout);
        Ok(Body { len, etag, stream })
    }

    async fn list_page(&self, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        let listing = self.list_objects(&self.config.bucket, &self.full(prefix), page).await?;
        let objects = listing.objects.into_iter().filter_map(|object| {
            let key = self.relative(&object.key)?;
            Some(ObjectMeta { key, ..object })
        });
        Ok(ListPage { objects: objects.collect(), next: listing.next })
    }

    /// Lists whole keys of any bucket.
    async fn list_objects(&self, bucket: &str, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        let answer = self
            .client
            .list_objects_v2()
            .bucket(bucket)
            .prefix(prefix)
            .set_continuation_token(page)
            .encoding_type(EncodingType::Url)
            .send()
            .await
            .about(prefix)?;
        let encoded = answer.encoding_type() == Some(&EncodingType::Url);
        let objects = answer.contents().iter().map(|object| meta_of(object, encoded)).collect();
        let next = answer.next_continuation_token().filter(|_| answer.is_truncated() == Some(true));
        Ok(ListPage { objects, next: next.map(str::to_owned) })
    }

    /// Lists the latest versions of any bucket's keys.
    async fn list_versions(&self, bucket: &str, prefix: &str, page: VersionsPage) -> Result<ListPage, LakeError> {
        let answer = self
            .client
            .list_object_versions()
            .bucket(bucket)
            .prefix(prefix)
            .set_key_marker(page.key)
            .set_version_id_marker(page.version)
            .encoding_type(EncodingType::Url)
            .send()
            .await
            .about(prefix)?;
        let encoded = answer.encoding_type() == Some(&EncodingType::Url);
        let latest = answer.versions().iter().filter(|version| version.is_latest() == Some(true));
        let objects = latest.map(|version| version_meta_of(version, encoded)).collect();
        let next = VersionsPage {
            key: answer.next_key_marker().map(|key| decoded(key, encoded)),
            version: answer.next_version_id_marker().map(str::to_owned),
        };
        let more = answer.is_truncated() == Some(true) && next.key.is_some();
        Ok(ListPage { objects, next: more.then(|| next.encode()) })
    }
}

/// Where a page of versions begins.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
struct VersionsPage {
    key: Option<String>,
    version: Option<String>,
}

/// How the page tokens of a versioned listing begin; the others belong to the store.
const VERSIONS_TOKEN: &str = "larder-versions:";

impl VersionsPage {
    fn encode(&self) -> String {
        let text = serde_json::to_string(self).expect("two texts encode");
        format!("{VERSIONS_TOKEN}{text}")
    }

    fn decode(token: &str) -> Option<Self> {
        serde_json::from_str(token.strip_prefix(VERSIONS_TOKEN)?).ok()
    }
}

/// Says whether an answer's Content-Range is the range that was asked for.
fn is_range(header: Option<&str>, range: &Range<u64>) -> bool {
    let wanted = format!("bytes {}-{}/", range.start, range.end.saturating_sub(1));
    header.is_some_and(|header| header.starts_with(&wanted))
}

/// Undoes the URL encoding of a listing's key (in which a space may be a plus).
fn decoded(key: &str, encoded: bool) -> String {
    if !encoded {
        return key.to_owned();
    }
    let mut bytes = Vec::with_capacity(key.len());
    let mut rest = key.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        let mut raw = [0];
        match (byte, after.split_at_checked(2)) {
            (b'+', _) => bytes.push(b' '),
            (b'%', Some((digits, beyond))) if hex::decode_to_slice(digits, &mut raw).is_ok() => {
                bytes.extend_from_slice(&raw);
                rest = beyond;
            }
            _ => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| key.to_owned())
}

fn meta_of(object: &Object, encoded: bool) -> ObjectMeta {
    ObjectMeta {
        key: decoded(object.key().unwrap_or_default(), encoded),
        size: object.size().and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
        etag: object.e_tag().unwrap_or_default().to_owned(),
        version: None,
        modified_ms: object.last_modified().and_then(|time| time.to_millis().ok()).unwrap_or(0),
    }
}

fn version_meta_of(version: &ObjectVersion, encoded: bool) -> ObjectMeta {
    ObjectMeta {
        key: decoded(version.key().unwrap_or_default(), encoded),
        size: version.size().and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
        etag: version.e_tag().unwrap_or_default().to_owned(),
        // "null" is no version that stays: it was written while the bucket kept none.
        version: version.version_id().filter(|id| *id != "null").map(str::to_owned),
        modified_ms: version.last_modified().and_then(|time| time.to_millis().ok()).unwrap_or(0),
    }
}

/// Passes a body on, checking its length and that it does not stall.
fn checked(
    key: String,
    body: ByteStream,
    len: u64,
    patience: Duration,
) -> futures::stream::BoxStream<'static, Result<Bytes, LakeError>> {
    let passing = |key: &str, source: Box<dyn std::error::Error + Send + Sync>| LakeError::Passing {
        key: key.to_owned(),
        source,
    };
    let step = move |state: Option<(ByteStream, u64)>| {
        let key = key.clone();
        async move {
            let (mut body, left) = state?;
            let failed = |source| Some((Err(passing(&key, source)), None));
            let Ok(chunk) = within(patience, body.next()).await else {
                let waited_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
                return failed(BodyError::Stalled { waited_ms }.into());
            };
            let chunk = match chunk {
                None if left == 0 => return None,
                None => {
                    return failed(BodyError::WrongLength { announced_bytes: len }.into());
                }
                Some(Err(error)) => return failed(error.into()),
                Some(Ok(chunk)) => chunk,
            };
            match left.checked_sub(chunk.len() as u64) {
                Some(left) => Some((Ok(chunk), Some((body, left)))),
                None => failed(BodyError::WrongLength { announced_bytes: len }.into()),
            }
        }
    };
    futures::stream::unfold(Some((body, len)), step).boxed()
}

fn empty_body(etag: String) -> Body {
    Body { len: 0, etag, stream: futures::stream::empty().boxed() }
}

fn range_header(range: Option<&Range<u64>>) -> Option<String> {
    range.map(|range| format!("bytes={}-{}", range.start, range.end.saturating_sub(1)))
}

#[async_trait::async_trait]
impl Lake for S3Lake {
    fn url(&self) -> String {
        self.url.clone()
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Body, LakeError> {
        if range.as_ref().is_some_and(Range::is_empty) {
            return Ok(empty_body(self.head(key).await?.etag));
        }
        let answer = self
            .client
            .get_object()
            .bucket(&self.config.bucket)
            .key(self.full(key))
            .set_range(range_header(range.as_ref()))
            .set_sse_customer_algorithm(self.sse.algorithm())
            .set_sse_customer_key(self.sse.key())
            .set_sse_customer_key_md5(self.sse.key_md5())
            .send()
            .await
            .about(key)?;
        self.body(key, answer, range.as_ref())
    }

    async fn get_pinned(&self, pin: &Pin, range: Option<Range<u64>>) -> Result<Body, LakeError> {
        if range.as_ref().is_some_and(Range::is_empty) {
            return Ok(empty_body(pin.etag.clone()));
        }
        let answer = self
            .client
            .get_object()
            .bucket(&pin.bucket)
            .key(&pin.key)
            .set_version_id(pin.version.clone())
            .if_match(&pin.etag)
            .set_range(range_header(range.as_ref()))
            .send()
            .await
            .about(&pin.key)?;
        // A store that ignores If-Match must not slip other bytes in.
        if answer.e_tag().is_none_or(|etag| !same_etag(etag, &pin.etag)) {
            return Err(LakeError::Precondition { key: pin.key.clone() });
        }
        self.body(&pin.key, answer, range.as_ref())
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta, LakeError> {
        let answer = self
            .client
            .head_object()
            .bucket(&self.config.bucket)
            .key(self.full(key))
            .set_sse_customer_algorithm(self.sse.algorithm())
            .set_sse_customer_key(self.sse.key())
            .set_sse_customer_key_md5(self.sse.key_md5())
            .send()
            .await
            .about(key)?;
        Ok(ObjectMeta {
            key: key.to_owned(),
            size: answer.content_length().and_then(|len| u64::try_from(len).ok()).unwrap_or(0),
            etag: answer.e_tag().unwrap_or_default().to_owned(),
            version: answer.version_id().filter(|id| *id != "null").map(str::to_owned),
            modified_ms: answer.last_modified().and_then(|time| time.to_millis().ok()).unwrap_or(0),
        })
    }

    async fn put(&self, key: &str, body: Bytes, when: PutIf) -> Result<String, LakeError> {
        let (absent, same) = match when {
            PutIf::Always => (None, None),
            PutIf::Absent => (Some("*".to_owned()), None),
            PutIf::Match(etag) => (None, Some(etag)),
        };
        let conditional = same.is_some();
        let len = body.len();
        let call = self
            .client
            .put_object()
            .bucket(&self.config.bucket)
            .key(self.full(key))
            .body(ByteStream::from(body))
            .set_if_none_match(absent)
            .set_if_match(same)
            .set_server_side_encryption(self.sse.server.clone())
            .set_ssekms_key_id(self.sse.kms_key_id.clone())
            .set_sse_customer_algorithm(self.sse.algorithm())
            .set_sse_customer_key(self.sse.key())
            .set_sse_customer_key_md5(self.sse.key_md5())
            .customize()
            .config_override(self.upload_patience(len));
        let call = if self.config.has_tls() { call.disable_payload_signing() } else { call };
        let answer = call.send().await;
        let answer = answer.map_err(|error| match lake_error(key, error) {
            // The object that had to be there unchanged is not there at all.
            LakeError::NotFound { key } if conditional => LakeError::Precondition { key },
            error => error,
        })?;
        Ok(answer.e_tag().unwrap_or_default().to_owned())
    }

    async fn delete(&self, key: &str) -> Result<(), LakeError> {
        let gone = self.client.delete_object().bucket(&self.config.bucket).key(self.full(key)).send().await;
        match gone.about(key) {
            Ok(_) | Err(LakeError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn list(&self, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        self.list_page(prefix, page).await
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>, LakeError> {
        let full = self.full(prefix);
        let (mut names, mut token) = (Vec::new(), None);
        loop {
            let answer = self
                .client
                .list_objects_v2()
                .bucket(&self.config.bucket)
                .prefix(&full)
                .delimiter("/")
                .set_continuation_token(token)
                .encoding_type(EncodingType::Url)
                .send()
                .await
                .about(prefix)?;
            let encoded = answer.encoding_type() == Some(&EncodingType::Url);
            for common in answer.common_prefixes() {
                let common = decoded(common.prefix().unwrap_or_default(), encoded);
                let name = common.strip_prefix(&full).and_then(|name| name.strip_suffix('/'));
                names.extend(name.map(str::to_owned));
            }
            token = answer.next_continuation_token().filter(|_| answer.is_truncated() == Some(true)).map(str::to_owned);
            if token.is_none() {
                // The store's order counts the slash behind each name.
                names.sort_unstable();
                return Ok(names);
            }
        }
    }

    async fn list_foreign(&self, bucket: &str, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        let Some(token) = page else {
            // Whether the bucket keeps versions shows in the listing. A store that has none to list,
            // or that does not let us, lists without.
            return match self.list_versions(bucket, prefix, VersionsPage::default()).await {
                Err(error) if !error.is_passing() => self.list_objects(bucket, prefix, None).await,
                listed => listed,
            };
        };
        match VersionsPage::decode(&token) {
            Some(page) => self.list_versions(bucket, prefix, page).await,
            None => self.list_objects(bucket, prefix, Some(token)).await,
        }
    }

    async fn list_uploads(&self, prefix: &str) -> Result<Vec<RunningUpload>, LakeError> {
        let (mut found, mut key_marker, mut id_marker) = (Vec::new(), None, None);
        loop {
            let answer = self
                .client
                .list_multipart_uploads()
                .bucket(&self.config.bucket)
                .prefix(self.full(prefix))
                .set_key_marker(key_marker)
                .set_upload_id_marker(id_marker)
                .send()
                .await
                .about(prefix)?;
            for upload in answer.uploads() {
                let key = upload.key().and_then(|key| self.relative(key));
                let (Some(key), Some(id)) = (key, upload.upload_id()) else {
                    continue;
                };
                let begun_ms = upload.initiated().and_then(|time| time.to_millis().ok()).unwrap_or(0);
                found.push(RunningUpload { upload: UploadId { key, id: id.to_owned() }, begun_ms });
            }
            if answer.is_truncated() != Some(true) || answer.next_key_marker().is_none() {
                return Ok(found);
            }
            key_marker = answer.next_key_marker().map(str::to_owned);
            id_marker = answer.next_upload_id_marker().map(str::to_owned);
        }
    }

    async fn upload_begin(&self, key: &str) -> Result<UploadId, LakeError> {
        let answer = self
            .client
            .create_multipart_upload()
            .bucket(&self.config.bucket)
            .key(self.full(key))
            .set_server_side_encryption(self.sse.server.clone())
            .set_ssekms_key_id(self.sse.kms_key_id.clone())
            .set_sse_customer_algorithm(self.sse.algorithm())
            .set_sse_customer_key(self.sse.key())
            .set_sse_customer_key_md5(self.sse.key_md5())
            .send()
            .await
            .about(key)?;
        Ok(UploadId { key: key.to_owned(), id: answer.upload_id().unwrap_or_default().to_owned() })
    }

    async fn upload_part(&self, upload: &UploadId, number: u32, body: Bytes) -> Result<UploadedPart, LakeError> {
        let size = body.len() as u64;
        let call = self
            .client
            .upload_part()
            .bucket(&self.config.bucket)
            .key(self.full(&upload.key))
            .upload_id(&upload.id)
            .part_number(i32::try_from(number).unwrap_or(i32::MAX))
            .body(ByteStream::from(body))
            .set_sse_customer_algorithm(self.sse.algorithm())
            .set_sse_customer_key(self.sse.key())
            .set_sse_customer_key_md5(self.sse.key_md5())
            .customize()
            .config_override(self.upload_patience(usize::try_from(size).unwrap_or(usize::MAX)));
        let call = if self.config.has_tls() { call.disable_payload_signing() } else { call };
        let answer = call.send().await.about(&upload.key)?;
        Ok(UploadedPart { number, etag: answer.e_tag().unwrap_or_default().to_owned(), size })
    }

    async fn upload_parts(&self, upload: &UploadId) -> Result<Vec<UploadedPart>, LakeError> {
        let (mut parts, mut marker) = (Vec::new(), None);
        loop {
            let answer = self
                .client
                .list_parts()
                .bucket(&self.config.bucket)
                .key(self.full(&upload.key))
                .upload_id(&upload.id)
                .set_part_number_marker(marker)
                .send()
                .await
                .about(&upload.key)?;
            parts.extend(answer.parts().iter().map(|part| UploadedPart {
                number: part.part_number().and_then(|number| u32::try_from(number).ok()).unwrap_or(0),
                etag: part.e_tag().unwrap_or_default().to_owned(),
                size: part.size().and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
            }));
            marker =
                answer.next_part_number_marker().filter(|_| answer.is_truncated() == Some(true)).map(str::to_owned);
            if marker.is_none() {
                return Ok(parts);
            }
        }
    }

    async fn upload_finish(&self, upload: &UploadId, parts: Vec<UploadedPart>) -> Result<String, LakeError> {
        let size: u64 = parts.iter().map(|part| part.size).sum();
        let named = parts.into_iter().map(|part| {
            let number = i32::try_from(part.number).unwrap_or(i32::MAX);
            CompletedPart::builder().part_number(number).e_tag(part.etag).build()
        });
        let list = CompletedMultipartUpload::builder().set_parts(Some(named.collect())).build();
        let answer = self
            .client
            .complete_multipart_upload()
            .bucket(&self.config.bucket)
            .key(self.full(&upload.key))
            .upload_id(&upload.id)
            .multipart_upload(list)
            .set_sse_customer_algorithm(self.sse.algorithm())
            .set_sse_customer_key(self.sse.key())
            .set_sse_customer_key_md5(self.sse.key_md5())
            .customize()
            .config_override(self.patience(JOIN_TIMEOUT))
            .send()
            .await;
        match answer.about(&upload.key) {
            Ok(answer) => Ok(answer.e_tag().unwrap_or_default().to_owned()),
            // Finished already: the answer was lost and the SDK asked again, or a run before this one
            // was killed. The keys of uploads are random, so an object there is this one.
            Err(LakeError::NotFound { key }) => match self.head(&key).await {
                Ok(meta) if meta.size == size => Ok(meta.etag),
                _ => Err(LakeError::NotFound { key }),
            },
            Err(error) => Err(error),
        }
    }

    async fn upload_abort(&self, upload: &UploadId) -> Result<(), LakeError> {
        let gone = self
            .client
            .abort_multipart_upload()
            .bucket(&self.config.bucket)
            .key(self.full(&upload.key))
            .upload_id(&upload.id)
            .send()
            .await;
        match gone.about(&upload.key) {
            Ok(_) | Err(LakeError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Compares ETags, with or without their quotes.
fn same_etag(a: &str, b: &str) -> bool {
    a.trim_matches('"') == b.trim_matches('"')
}

#[cfg(test)]
mod tests {
    use aws_smithy_runtime_api::client::http::{
        HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn,
    };
    use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};

    use super::*;

    #[test]
    fn listed_keys_are_decoded_as_s3_encodes_them() {
        assert_eq!(decoded("a%2Fb+c%2B%C3%A4", true), "a/b c+ä");
        assert_eq!(decoded("a+b%2F", false), "a+b%2F");
        assert_eq!(decoded("100%", true), "100%");
        assert_eq!(decoded("%FF", true), "%FF", "what is no UTF-8 stays as it came");
    }

    #[test]
    fn a_content_range_has_to_be_the_one_asked_for() {
        assert!(is_range(Some("bytes 5-9/100"), &(5..10)));
        for other in [Some("bytes 5-8/100"), Some("bytes 0-9/100"), None] {
            assert!(!is_range(other, &(5..10)));
        }
    }

    #[test]
    fn the_token_of_versions_comes_back_and_no_other_does() {
        let page = VersionsPage { key: Some("a b".into()), version: Some("v".into()) };
        let back = VersionsPage::decode(&page.encode()).unwrap();
        assert_eq!((back.key, back.version), (page.key, page.version));
        assert!(VersionsPage::decode("k6162").is_none());
    }

    type Headers = Vec<(String, String)>;

    /// Notes the headers of requests, and answers with success.
    #[derive(Debug, Clone, Default)]
    struct Notes(Arc<parking_lot::Mutex<Vec<Headers>>>);

    impl HttpConnector for Notes {
        fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
            let said = request.headers().iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
            self.0.lock().push(said.collect());
            HttpConnectorFuture::ready(Ok(HttpResponse::new(200.try_into().unwrap(), "".into())))
        }
    }

    async fn put_and_upload(lake: &S3Lake) {
        lake.put("key", Bytes::from_static(b"body"), PutIf::Always).await.unwrap();
        let upload = UploadId { key: "key".into(), id: "id".into() };
        lake.upload_part(&upload, 1, Bytes::from_static(b"body")).await.unwrap();
    }

    /// Many third-party stores refuse a body with a trailer, or a checksum that they do not know.
    #[tokio::test]
    async fn a_store_that_is_not_of_aws_gets_checksums_only_if_told_so() {
        let own = || Some("http://store".to_owned());
        for (endpoint, checksums, sends) in [
            (own(), Checksums::Auto, false),
            (own(), Checksums::WhenRequired, false),
            (own(), Checksums::WhenSupported, true),
            (None, Checksums::Auto, true),
        ] {
            let notes = Notes::default();
            let connector = notes.clone();
            let http_client = http_client_fn(move |_, _| SharedHttpConnector::new(connector.clone()));
            let config = S3Config { endpoint, checksums, ..S3Config::new("bucket", "") };
            let client = config::client(&config, config::Transport::InProcess(http_client)).await.unwrap();
            put_and_upload(&S3Lake::new(client, config)).await;
            let is_checksum = |(name, value): &(String, String)| {
                name.starts_with("x-amz-checksum") || name == "x-amz-trailer" || value.contains("aws-chunked")
            };
            for headers in notes.0.lock().iter() {
                assert_eq!(headers.iter().any(is_checksum), sends, "{checksums:?}: {headers:?}");
            }
            assert_eq!(notes.0.lock().len(), 2);
        }
    }

    #[tokio::test]
    async fn a_body_is_signed_where_no_tls_guards_it() {
        let keys = aws_credential_types::Credentials::from_keys("key", "secret", None);
        for (endpoint, signed) in [(Some("http://store"), true), (Some("https://store"), false), (None, false)] {
            let (notes, config) = (Notes::default(), S3Config::new("bucket", ""));
            let config = S3Config { endpoint: endpoint.map(str::to_owned), ..config };
            let connector = notes.clone();
            let mut client = aws_sdk_s3::Config::builder()
                .behavior_version(aws_sdk_s3::config::BehaviorVersion::latest())
                .region(aws_sdk_s3::config::Region::new("us-east-1"))
                .credentials_provider(keys.clone())
                .http_client(http_client_fn(move |_, _| SharedHttpConnector::new(connector.clone())));
            client.set_endpoint_url(config.endpoint.clone());
            put_and_upload(&S3Lake::new(aws_sdk_s3::Client::from_conf(client.build()), config)).await;
            for headers in notes.0.lock().iter() {
                let said = headers.iter().find(|(name, _)| name == "x-amz-content-sha256").expect("it is always sent");
                assert_eq!(said.1 != "UNSIGNED-PAYLOAD", signed, "{endpoint:?}: {said:?}");
            }
            assert_eq!(notes.0.lock().len(), 2);
        }
    }
}
