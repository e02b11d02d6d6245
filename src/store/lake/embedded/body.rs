//! Bodies in and out of object files, a bounded piece at a time, file work off the async threads.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, TryStreamExt};
use s3s::dto::StreamingBlob;
use s3s::{S3Result, s3_error};

use super::disk::{Bucket, OpError, Opened, TempObject};
use super::service::refusal;

/// Bytes that one body holds in memory: enough to make a system call cheap.
const PIECE_BYTES: usize = 512 * 1024;

/// Runs file work on a thread that may block.
pub async fn blocking<T, F>(work: F) -> S3Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, OpError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(refusal),
        Err(error) => Err(s3_error!(error, InternalError)),
    }
}

/// Writes a body to a temporary object; it has to have the announced length and MD5, if any.
pub async fn receive(
    bucket: Bucket,
    body: Option<StreamingBlob>,
    announced: Option<i64>,
    content_md5: Option<String>,
) -> S3Result<TempObject> {
    let mut temp = None;
    let mut pending = BytesMut::new();
    let mut body = body.map(StreamExt::fuse);
    loop {
        let chunk = match &mut body {
            Some(body) => body.next().await,
            None => None,
        };
        let ended = chunk.is_none();
        if let Some(chunk) = chunk {
            pending.extend_from_slice(&chunk.map_err(|_| s3_error!(IncompleteBody, "the body broke off"))?);
        }
        if ended || pending.len() >= PIECE_BYTES {
            let (piece, bucket) = (pending.split().freeze(), bucket.clone());
            temp = Some(blocking(move || write(temp, &bucket, &piece)).await?);
        }
        if ended {
            break;
        }
    }
    let temp = temp.ok_or_else(|| s3_error!(InternalError))?;
    if announced.is_some_and(|len| u64::try_from(len) != Ok(temp.len_bytes())) {
        return Err(s3_error!(IncompleteBody, "the body has not the announced length"));
    }
    if content_md5.is_some_and(|text| text != base64_of(&temp.md5())) {
        return Err(s3_error!(BadDigest, "the body has another MD5 than Content-MD5 says"));
    }
    Ok(temp)
}

fn write(temp: Option<TempObject>, bucket: &Bucket, piece: &[u8]) -> Result<TempObject, OpError> {
    let mut temp = match temp {
        Some(temp) => temp,
        None => bucket.temp()?,
    };
    temp.write(piece)?;
    Ok(temp)
}

/// Encodes to base64, as headers want digests.
pub fn base64_of(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Streams a range of an object's body.
pub fn send(opened: Opened, range: Range<u64>) -> StreamingBlob {
    let file = Arc::new(opened.file);
    let pieces = futures::stream::try_unfold(range, move |left: Range<u64>| {
        let file = file.clone();
        async move {
            if left.is_empty() {
                return Ok(None);
            }
            let len = (left.end - left.start).min(PIECE_BYTES as u64);
            let piece = tokio::task::spawn_blocking(move || read_piece(&file, left.start, len as usize));
            let piece = piece.await.map_err(io::Error::other)??;
            Ok(Some((piece, left.start + len..left.end)))
        }
    });
    StreamingBlob::wrap(check_sync(pieces.into_stream()))
}

fn check_sync<S: Stream<Item = Result<Bytes, io::Error>> + Send + Sync>(stream: S) -> S {
    stream
}

fn read_piece(file: &std::fs::File, at: u64, len: usize) -> io::Result<Bytes> {
    let mut piece = BytesMut::zeroed(len);
    file.read_exact_at(&mut piece, at)?;
    Ok(piece.freeze())
}
