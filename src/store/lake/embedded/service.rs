//! The S3 operations over a [`Disk`]: between the protocol's types and the directory.
//!
//! What Larder, the usual command-line clients and imports need: objects with conditions and ranges,
//! listings, multipart uploads, copies, versions. No ACLs, policies, tags or lifecycle; nothing is
//! encrypted (the headers of server-side encryption are kept and, for customer keys, asked for
//! again). Everything else answers NotImplemented.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use s3s::dto::*;
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};

use super::body::{blocking, receive, send};
use super::disk::{Bucket, Condition, Disk, OpError, Opened};
use super::list::{After, Query};
use super::object::{Headers, ObjectInfo};

/// Keys of a page, at most: S3's own limit.
const PAGE_KEYS_MAX: i32 = 1000;

/// The operations on one directory.
#[derive(Debug, Clone)]
pub struct Service(pub Arc<Disk>);

/// Says a refusal in S3's words.
pub fn refusal(error: OpError) -> S3Error {
    let message = error.to_string();
    let code = match error {
        OpError::NoSuchBucket => S3ErrorCode::NoSuchBucket,
        OpError::NoSuchKey => S3ErrorCode::NoSuchKey,
        OpError::NoSuchVersion => S3ErrorCode::NoSuchVersion,
        OpError::NoSuchUpload => S3ErrorCode::NoSuchUpload,
        OpError::Precondition => S3ErrorCode::PreconditionFailed,
        OpError::InvalidPart => S3ErrorCode::InvalidPart,
        OpError::InvalidPartOrder => S3ErrorCode::InvalidPartOrder,
        OpError::PartTooSmall => S3ErrorCode::EntityTooSmall,
        OpError::NotEmpty => S3ErrorCode::BucketNotEmpty,
        OpError::Store(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "the embedded lake's directory failed");
            S3ErrorCode::InternalError
        }
    };
    S3Error::with_message(code, message)
}

fn timestamp(unix_ms: i64) -> Timestamp {
    let time = UNIX_EPOCH + Duration::from_millis(u64::try_from(unix_ms).unwrap_or(0));
    Timestamp::from(time)
}

fn etag_of(info: &ObjectInfo) -> ETag {
    ETag::Strong(info.etag.clone())
}

fn size_of(len: u64) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}

fn limit_of(asked: Option<i32>) -> usize {
    usize::try_from(asked.unwrap_or(PAGE_KEYS_MAX).clamp(0, PAGE_KEYS_MAX)).unwrap_or(0)
}

fn put_condition(absent: Option<&ETagCondition>, same: Option<&ETagCondition>) -> S3Result<Condition> {
    let absent = match absent {
        None => false,
        Some(ETagCondition::Any) => true,
        Some(ETagCondition::ETag(_)) => {
            return Err(s3_error!(NotImplemented, "If-None-Match takes only *"));
        }
    };
    let etag = match same {
        None => None,
        Some(ETagCondition::Any) => {
            return Err(s3_error!(NotImplemented, "If-Match takes only an ETag"));
        }
        Some(ETagCondition::ETag(etag)) => Some(etag.value().to_owned()),
    };
    Ok(Condition { absent, etag })
}

fn meets(condition: &ETagCondition, info: &ObjectInfo) -> bool {
    match condition {
        ETagCondition::Any => true,
        ETagCondition::ETag(etag) => etag.value() == info.etag,
    }
}

/// Checks the conditions of a read.
fn check_read(
    info: &ObjectInfo,
    same: Option<&ETagCondition>,
    other: Option<&ETagCondition>,
    customer_key_md5: Option<&String>,
) -> S3Result<()> {
    if info.headers.sse_customer_key_md5.as_ref() != customer_key_md5 {
        return Err(s3_error!(InvalidRequest, "the object was stored with another customer key, or with none"));
    }
    if same.is_some_and(|condition| !meets(condition, info)) {
        return Err(s3_error!(PreconditionFailed));
    }
    if other.is_some_and(|condition| meets(condition, info)) {
        return Err(s3_error!(NotModified));
    }
    Ok(())
}

fn check_key(key: &str) -> S3Result<()> {
    if key.len() > 1024 {
        return Err(s3_error!(KeyTooLongError));
    }
    Ok(())
}

/// Percent-encodes a key for a listing that asks for it: XML cannot hold every character.
fn url_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for &byte in text.as_bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Encodes keys as the request asks for.
struct KeyCoding(bool);

impl KeyCoding {
    fn of(asked: Option<&EncodingType>) -> Self {
        Self(asked.is_some_and(|coding| coding.as_str() == EncodingType::URL))
    }

    fn key(&self, key: String) -> String {
        if self.0 { url_encode(&key) } else { key }
    }

    fn header(&self) -> Option<EncodingType> {
        self.0.then(|| EncodingType::from_static(EncodingType::URL))
    }
}

/// What of a request's headers an object keeps.
struct Given {
    content_type: Option<String>,
    metadata: Option<Metadata>,
    sse: Option<ServerSideEncryption>,
    kms: Option<String>,
    customer_md5: Option<String>,
}

impl From<Given> for Headers {
    fn from(given: Given) -> Self {
        Self {
            content_type: given.content_type,
            metadata: given.metadata.unwrap_or_default().into_iter().collect(),
            sse: given.sse.map(|sse| sse.as_str().to_owned()),
            sse_kms_key_id: given.kms,
            sse_customer_key_md5: given.customer_md5,
        }
    }
}

fn sse_of(headers: &Headers) -> Option<ServerSideEncryption> {
    headers.sse.clone().map(ServerSideEncryption::from)
}

fn metadata_of(headers: &Headers) -> Option<Metadata> {
    (!headers.metadata.is_empty()).then(|| headers.metadata.clone().into_iter().collect())
}

impl Service {
    async fn bucket(&self, name: &str) -> S3Result<Bucket> {
        let (disk, name) = (self.0.clone(), name.to_owned());
        blocking(move || disk.bucket(&name)).await
    }

    async fn open(&self, bucket: &str, key: &str, version: Option<String>) -> S3Result<Opened> {
        let (bucket, key) = (self.bucket(bucket).await?, key.to_owned());
        blocking(move || bucket.open(&key, version.as_deref())).await
    }

    async fn list(&self, bucket: &str, query: Query) -> S3Result<super::list::Page> {
        let bucket = self.bucket(bucket).await?;
        blocking(move || Ok(bucket.list(&query)?)).await
    }

    async fn delete_one(&self, bucket: &Bucket, key: String, version: Option<String>) -> S3Result<Option<String>> {
        let bucket = bucket.clone();
        blocking(move || match version {
            Some(version) => bucket.delete_version(&key, &version).map(|()| None),
            None => bucket.delete(&key, &Condition::default()),
        })
        .await
    }
}

fn range_of(asked: Option<s3s::dto::Range>, size: u64) -> S3Result<(Range<u64>, Option<String>)> {
    let Some(asked) = asked else {
        return Ok((0..size, None));
    };
    let range = asked.check(size)?;
    let header = format!("bytes {}-{}/{size}", range.start, range.end.saturating_sub(1));
    Ok((range, Some(header)))
}

fn objects_of(page: &super::list::Page, coding: &KeyCoding) -> Vec<Object> {
    let object = |(key, info): &(String, ObjectInfo)| Object {
        key: Some(coding.key(key.clone())),
        e_tag: Some(etag_of(info)),
        size: Some(size_of(info.size)),
        last_modified: Some(timestamp(info.modified_ms)),
        ..Object::default()
    };
    page.objects.iter().map(object).collect()
}

fn prefixes_of(page: &super::list::Page, coding: &KeyCoding) -> Vec<CommonPrefix> {
    let prefix = |prefix: &String| CommonPrefix { prefix: Some(coding.key(prefix.clone())) };
    page.prefixes.iter().map(prefix).collect()
}

#[async_trait::async_trait]
impl S3 for Service {
    async fn create_bucket(&self, req: S3Request<CreateBucketInput>) -> S3Result<S3Response<CreateBucketOutput>> {
        let (disk, name) = (self.0.clone(), req.input.bucket);
        blocking(move || Ok(disk.ensure_bucket(&name)?)).await?;
        Ok(S3Response::new(CreateBucketOutput::default()))
    }

    async fn delete_bucket(&self, req: S3Request<DeleteBucketInput>) -> S3Result<S3Response<DeleteBucketOutput>> {
        let bucket = self.bucket(&req.input.bucket).await?;
        blocking(move || bucket.remove()).await?;
        Ok(S3Response::new(DeleteBucketOutput {}))
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.bucket(&req.input.bucket).await?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn get_bucket_location(
        &self,
        req: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        self.bucket(&req.input.bucket).await?;
        Ok(S3Response::new(GetBucketLocationOutput::default()))
    }

    async fn list_buckets(&self, _: S3Request<ListBucketsInput>) -> S3Result<S3Response<ListBucketsOutput>> {
        let disk = self.0.clone();
        let found = blocking(move || Ok(disk.buckets()?)).await?;
        let bucket = |(name, time)| s3s::dto::Bucket {
            name: Some(name),
            creation_date: Some(Timestamp::from(time)),
            ..s3s::dto::Bucket::default()
        };
        let buckets = Some(found.into_iter().map(bucket).collect());
        Ok(S3Response::new(ListBucketsOutput { buckets, ..ListBucketsOutput::default() }))
    }

    async fn get_bucket_versioning(
        &self,
        req: S3Request<GetBucketVersioningInput>,
    ) -> S3Result<S3Response<GetBucketVersioningOutput>> {
        let bucket = self.bucket(&req.input.bucket).await?;
        let enabled = || BucketVersioningStatus::from_static(BucketVersioningStatus::ENABLED);
        let status = bucket.keeps_versions().then(enabled);
        Ok(S3Response::new(GetBucketVersioningOutput { status, ..GetBucketVersioningOutput::default() }))
    }

    async fn put_bucket_versioning(
        &self,
        req: S3Request<PutBucketVersioningInput>,
    ) -> S3Result<S3Response<PutBucketVersioningOutput>> {
        let bucket = self.bucket(&req.input.bucket).await?;
        let status = req.input.versioning_configuration.status;
        let on = status.is_some_and(|status| status.as_str() == BucketVersioningStatus::ENABLED);
        blocking(move || Ok(bucket.set_versioning(on)?)).await?;
        Ok(S3Response::new(PutBucketVersioningOutput {}))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        let opened = self.open(&input.bucket, &input.key, input.version_id).await?;
        let info = opened.info.clone();
        let (same, other) = (input.if_match.as_ref(), input.if_none_match.as_ref());
        check_read(&info, same, other, input.sse_customer_key_md5.as_ref())?;
        let (range, content_range) = range_of(input.range, info.size)?;
        let output = GetObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(size_of(range.end - range.start)),
            content_range,
            content_type: info.headers.content_type.clone(),
            e_tag: Some(etag_of(&info)),
            last_modified: Some(timestamp(info.modified_ms)),
            metadata: metadata_of(&info.headers),
            server_side_encryption: sse_of(&info.headers),
            ssekms_key_id: info.headers.sse_kms_key_id.clone(),
            sse_customer_key_md5: info.headers.sse_customer_key_md5.clone(),
            version_id: info.version.clone(),
            body: Some(send(opened, range)),
            ..GetObjectOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = req.input;
        let info = self.open(&input.bucket, &input.key, input.version_id).await?.info;
        let (same, other) = (input.if_match.as_ref(), input.if_none_match.as_ref());
        check_read(&info, same, other, input.sse_customer_key_md5.as_ref())?;
        let output = HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(size_of(info.size)),
            content_type: info.headers.content_type.clone(),
            e_tag: Some(etag_of(&info)),
            last_modified: Some(timestamp(info.modified_ms)),
            metadata: metadata_of(&info.headers),
            server_side_encryption: sse_of(&info.headers),
            ssekms_key_id: info.headers.sse_kms_key_id.clone(),
            sse_customer_key_md5: info.headers.sse_customer_key_md5.clone(),
            version_id: info.version,
            ..HeadObjectOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let input = req.input;
        check_key(&input.key)?;
        let when = put_condition(input.if_none_match.as_ref(), input.if_match.as_ref())?;
        let bucket = self.bucket(&input.bucket).await?;
        let headers = Headers::from(Given {
            content_type: input.content_type,
            metadata: input.metadata,
            sse: input.server_side_encryption,
            kms: input.ssekms_key_id,
            customer_md5: input.sse_customer_key_md5,
        });
        let temp = receive(bucket.clone(), input.body, input.content_length, input.content_md5).await?;
        let key = input.key;
        let info = blocking(move || {
            let etag = hex::encode(temp.md5());
            bucket.publish(&key, temp, etag, headers, &when)
        })
        .await?;
        let output = PutObjectOutput {
            e_tag: Some(etag_of(&info)),
            server_side_encryption: sse_of(&info.headers),
            ssekms_key_id: info.headers.sse_kms_key_id.clone(),
            sse_customer_key_md5: info.headers.sse_customer_key_md5.clone(),
            version_id: info.version,
            ..PutObjectOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn copy_object(&self, req: S3Request<CopyObjectInput>) -> S3Result<S3Response<CopyObjectOutput>> {
        let input = req.input;
        check_key(&input.key)?;
        let CopySource::Bucket { bucket: from, key: from_key, version_id } = input.copy_source else {
            return Err(s3_error!(NotImplemented));
        };
        let opened = self.open(&from, &from_key, version_id.map(String::from)).await?;
        let (same, other) = (input.copy_source_if_match.as_ref(), input.copy_source_if_none_match.as_ref());
        check_read(&opened.info, same, other, input.copy_source_sse_customer_key_md5.as_ref())?;
        let bucket = self.bucket(&input.bucket).await?;
        let key = input.key;
        let info = blocking(move || {
            let mut temp = bucket.temp()?;
            temp.append(&opened)?;
            let Opened { info, .. } = opened;
            bucket.publish(&key, temp, info.etag, info.headers, &Condition::default())
        })
        .await?;
        let result = CopyObjectResult {
            e_tag: Some(etag_of(&info)),
            last_modified: Some(timestamp(info.modified_ms)),
            ..CopyObjectResult::default()
        };
        let output = CopyObjectOutput {
            copy_object_result: Some(result),
            version_id: info.version,
            ..CopyObjectOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = req.input;
        let bucket = self.bucket(&input.bucket).await?;
        let marker = match (input.version_id.clone(), put_condition(None, input.if_match.as_ref())?) {
            (None, when) if when.etag.is_some() => blocking(move || bucket.delete(&input.key, &when)).await?,
            (version, _) => self.delete_one(&bucket, input.key, version).await?,
        };
        let output = DeleteObjectOutput {
            delete_marker: marker.is_some().then_some(true),
            version_id: marker.or(input.version_id),
            ..DeleteObjectOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn delete_objects(&self, req: S3Request<DeleteObjectsInput>) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let input = req.input;
        let bucket = self.bucket(&input.bucket).await?;
        let mut deleted = Vec::new();
        for object in input.delete.objects {
            let marker = self.delete_one(&bucket, object.key.clone(), object.version_id.clone()).await?;
            deleted.push(DeletedObject {
                key: Some(object.key),
                version_id: object.version_id,
                delete_marker: marker.is_some().then_some(true),
                delete_marker_version_id: marker,
            });
        }
        let deleted = (!input.delete.quiet.unwrap_or(false)).then_some(deleted);
        Ok(S3Response::new(DeleteObjectsOutput { deleted, ..DeleteObjectsOutput::default() }))
    }

    async fn list_objects_v2(&self, req: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        let after = match (&input.continuation_token, &input.start_after) {
            (Some(token), _) => After::decode(token).ok_or_else(|| s3_error!(InvalidArgument, "no such token"))?,
            (None, Some(key)) => After::Key(key.clone()),
            (None, None) => After::Nothing,
        };
        let prefix = input.prefix.clone().unwrap_or_default();
        let limit = limit_of(input.max_keys);
        let query = Query { prefix, delimiter: input.delimiter.clone(), after, limit };
        let page = self.list(&input.bucket, query).await?;
        let coding = KeyCoding::of(input.encoding_type.as_ref());
        let (contents, common) = (objects_of(&page, &coding), prefixes_of(&page, &coding));
        let output = ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: input.prefix.map(|prefix| coding.key(prefix)),
            delimiter: input.delimiter,
            max_keys: Some(i32::try_from(limit).unwrap_or(PAGE_KEYS_MAX)),
            key_count: i32::try_from(contents.len() + common.len()).ok(),
            continuation_token: input.continuation_token,
            start_after: input.start_after,
            is_truncated: Some(page.next.is_some()),
            next_continuation_token: page.next.map(|after| after.encode()),
            encoding_type: coding.header(),
            contents: Some(contents),
            common_prefixes: Some(common),
            ..ListObjectsV2Output::default()
        };
        Ok(S3Response::new(output))
    }

    async fn list_objects(&self, req: S3Request<ListObjectsInput>) -> S3Result<S3Response<ListObjectsOutput>> {
        let input = req.input;
        let prefix = input.prefix.clone().unwrap_or_default();
        let delimiter = input.delimiter.clone();
        // A marker may be a common prefix that the last page ended with.
        let after = match &input.marker {
            None => After::Nothing,
            Some(marker) if delimiter.as_ref().is_some_and(|end| !end.is_empty() && marker.ends_with(end)) => {
                After::Prefix(marker.clone())
            }
            Some(marker) => After::Key(marker.clone()),
        };
        let query = Query { prefix, delimiter, after, limit: limit_of(input.max_keys) };
        let page = self.list(&input.bucket, query).await?;
        let coding = KeyCoding::of(input.encoding_type.as_ref());
        let next = page.next.clone().and_then(|after| match after {
            After::Key(text) | After::Prefix(text) => Some(coding.key(text)),
            After::Nothing => None,
        });
        let output = ListObjectsOutput {
            name: Some(input.bucket),
            prefix: input.prefix,
            marker: input.marker,
            delimiter: input.delimiter,
            max_keys: input.max_keys,
            is_truncated: Some(next.is_some()),
            contents: Some(objects_of(&page, &coding)),
            common_prefixes: Some(prefixes_of(&page, &coding)),
            encoding_type: coding.header(),
            next_marker: next,
            ..ListObjectsOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn list_object_versions(
        &self,
        req: S3Request<ListObjectVersionsInput>,
    ) -> S3Result<S3Response<ListObjectVersionsOutput>> {
        let input = req.input;
        let bucket = self.bucket(&input.bucket).await?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let marker = input.key_marker.clone().unwrap_or_default();
        let limit = limit_of(input.max_keys);
        let page = blocking(move || Ok(bucket.list_versions(&prefix, &marker, limit)?)).await?;
        let coding = KeyCoding::of(input.encoding_type.as_ref());
        let (mut versions, mut markers) = (Vec::new(), Vec::new());
        for (key, info, latest) in page.versions {
            let (key, time) = (Some(coding.key(key)), Some(timestamp(info.modified_ms)));
            let version_id = Some(info.version_id().to_owned());
            if info.delete_marker {
                let marker =
                    DeleteMarkerEntry { key, version_id, is_latest: Some(latest), last_modified: time, owner: None };
                markers.push(marker);
                continue;
            }
            versions.push(ObjectVersion {
                key,
                version_id,
                is_latest: Some(latest),
                last_modified: time,
                e_tag: Some(etag_of(&info)),
                size: Some(size_of(info.size)),
                ..ObjectVersion::default()
            });
        }
        let output = ListObjectVersionsOutput {
            name: Some(input.bucket),
            prefix: input.prefix,
            key_marker: input.key_marker,
            is_truncated: Some(page.next.is_some()),
            next_key_marker: page.next.map(|key| coding.key(key)),
            encoding_type: coding.header(),
            versions: Some(versions),
            delete_markers: Some(markers),
            ..ListObjectVersionsOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = req.input;
        check_key(&input.key)?;
        let bucket = self.bucket(&input.bucket).await?;
        let headers = Headers::from(Given {
            content_type: input.content_type,
            metadata: input.metadata,
            sse: input.server_side_encryption,
            kms: input.ssekms_key_id,
            customer_md5: input.sse_customer_key_md5,
        });
        let key = input.key.clone();
        let id = blocking(move || bucket.upload_begin(&key, headers)).await?;
        let output = CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..CreateMultipartUploadOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        let input = req.input;
        let number = u32::try_from(input.part_number).ok().filter(|number| (1..=10_000).contains(number));
        let number = number.ok_or_else(|| s3_error!(InvalidArgument, "part numbers are 1 to 10000"))?;
        let bucket = self.bucket(&input.bucket).await?;
        let temp = receive(bucket.clone(), input.body, input.content_length, input.content_md5).await?;
        let info = blocking(move || bucket.upload_part(&input.key, &input.upload_id, number, temp)).await?;
        Ok(S3Response::new(UploadPartOutput { e_tag: Some(etag_of(&info)), ..UploadPartOutput::default() }))
    }

    async fn list_parts(&self, req: S3Request<ListPartsInput>) -> S3Result<S3Response<ListPartsOutput>> {
        let input = req.input;
        let bucket = self.bucket(&input.bucket).await?;
        let (key, id) = (input.key.clone(), input.upload_id.clone());
        let mut parts = blocking(move || bucket.upload_parts(&key, &id)).await?;
        let after = input.part_number_marker.unwrap_or(0);
        parts.retain(|(number, _)| i64::from(*number) > i64::from(after));
        let limit = limit_of(input.max_parts);
        let truncated = parts.len() > limit;
        parts.truncate(limit);
        let part = |(number, info): &(u32, ObjectInfo)| Part {
            part_number: i32::try_from(*number).ok(),
            e_tag: Some(etag_of(info)),
            size: Some(size_of(info.size)),
            last_modified: Some(timestamp(info.modified_ms)),
            ..Part::default()
        };
        let last = parts.last().and_then(|(number, _)| i32::try_from(*number).ok());
        let output = ListPartsOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(input.upload_id),
            part_number_marker: input.part_number_marker,
            max_parts: input.max_parts,
            is_truncated: Some(truncated),
            next_part_number_marker: last.filter(|_| truncated),
            parts: Some(parts.iter().map(part).collect()),
            ..ListPartsOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = req.input;
        let bucket = self.bucket(&input.bucket).await?;
        let when = put_condition(input.if_none_match.as_ref(), input.if_match.as_ref())?;
        let named = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let mut parts = Vec::new();
        for part in named {
            let number = part.part_number.and_then(|number| u32::try_from(number).ok());
            let etag = part.e_tag.map(ETag::into_value);
            let (Some(number), Some(etag)) = (number, etag) else {
                return Err(s3_error!(InvalidPart));
            };
            parts.push((number, etag));
        }
        let (key, id) = (input.key.clone(), input.upload_id);
        let info = blocking(move || bucket.upload_complete(&key, &id, &parts, &when)).await?;
        let output = CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(etag_of(&info)),
            version_id: info.version,
            ..CompleteMultipartUploadOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = req.input;
        let bucket = self.bucket(&input.bucket).await?;
        blocking(move || bucket.upload_abort(&input.key, &input.upload_id)).await?;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let input = req.input;
        let bucket = self.bucket(&input.bucket).await?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let mut found = blocking(move || Ok(bucket.uploads(&prefix)?)).await?;
        let key_marker = input.key_marker.clone().unwrap_or_default();
        let id_marker = input.upload_id_marker.clone().unwrap_or_default();
        found.retain(|(id, upload)| {
            let same_key_later = upload.key == key_marker && !id_marker.is_empty() && *id > id_marker;
            key_marker.is_empty() || upload.key > key_marker || same_key_later
        });
        let limit = limit_of(input.max_uploads);
        let truncated = found.len() > limit;
        found.truncate(limit);
        let coding = KeyCoding::of(input.encoding_type.as_ref());
        let last = found.last().filter(|_| truncated).map(|(id, upload)| (id.clone(), coding.key(upload.key.clone())));
        let upload = |(id, upload): (String, super::uploads::UploadInfo)| MultipartUpload {
            key: Some(coding.key(upload.key)),
            upload_id: Some(id),
            initiated: Some(timestamp(upload.begun_ms)),
            ..MultipartUpload::default()
        };
        let output = ListMultipartUploadsOutput {
            bucket: Some(input.bucket),
            prefix: input.prefix,
            is_truncated: Some(truncated),
            next_key_marker: last.as_ref().map(|(_, key)| key.clone()),
            next_upload_id_marker: last.map(|(id, _)| id),
            encoding_type: coding.header(),
            uploads: Some(found.into_iter().map(upload).collect()),
            ..ListMultipartUploadsOutput::default()
        };
        Ok(S3Response::new(output))
    }
}
