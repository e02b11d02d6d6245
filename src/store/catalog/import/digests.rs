//! `--digest`: every object is read once, pinned, and digested.

use std::path::Path;
use std::time::Instant;

use futures::{StreamExt, TryStreamExt, stream};

use crate::format::digest::ContentHasher;
use crate::format::tree::Pin;
use crate::store::catalog::Catalog;
use crate::store::catalog::spool::Records;
use crate::store::lake::LakeError;
use crate::store::lake::retry::{Retry, RetryPolicy, Verdict};

use super::keys::Found;
use super::listing::{Digested, Row, decode, encode};
use super::{ImportError, ImportOptions, ImportProgress, count, pin_of};

/// How many objects are read at a time.
const PARALLEL: usize = 16;

/// Reads and digests all files; gives the same rows with their digests.
pub(super) async fn digest_all(
    catalog: &Catalog,
    options: &ImportOptions,
    mut rows: Records,
    progress: &ImportProgress,
    spool: &Path,
) -> Result<Records, ImportError> {
    let spool_error = |source| ImportError::Spool { path: spool.to_owned(), source };
    let mut digested = Records::create(spool).map_err(spool_error)?;
    let read = rows.read().map_err(spool_error)?;
    let mut done = stream::iter(read)
        .map(|record| async move {
            let record = record.map_err(spool_error)?;
            let row = decode(&record).map_err(spool_error)?;
            let found = digest_row(catalog, options, &row, progress).await?;
            Ok::<_, ImportError>((record.0, encode(row.found, found).map_err(spool_error)?))
        })
        .buffered(PARALLEL);
    while let Some((key, value)) = done.try_next().await? {
        digested.push(&key, &value).map_err(spool_error)?;
    }
    drop(done);
    Ok(digested)
}

async fn digest_row(
    catalog: &Catalog,
    options: &ImportOptions,
    row: &Row,
    progress: &ImportProgress,
) -> Result<Option<Digested>, ImportError> {
    let object = match &row.found {
        Found::File(object) if object.size > 0 => object,
        Found::File(_) | Found::Dir(_) => return Ok(None),
    };
    let pin = pin_of(options, &row.path, object);
    match digest_pinned(catalog, &pin, progress).await {
        Ok(digested) => Ok(Some(digested)),
        Err(LakeError::Precondition { .. } | LakeError::NotFound { .. }) => {
            Err(ImportError::Changed { bucket: pin.bucket, key: pin.key })
        }
        Err(source) => Err(ImportError::Read { bucket: pin.bucket, key: pin.key, source }),
    }
}

/// Reads one object to its end; a body that breaks goes on at the byte where it broke.
async fn digest_pinned(catalog: &Catalog, pin: &Pin, progress: &ImportProgress) -> Result<Digested, LakeError> {
    let began = Instant::now();
    let mut retry = Retry::new(RetryPolicy::default());
    let mut hasher = ContentHasher::new();
    loop {
        let before = hasher.len();
        let error = match read_on(catalog, pin, &mut hasher, progress).await {
            Ok(()) if hasher.len() == pin.size => {
                let (digest, outboard) = hasher.finish();
                return Ok(Digested { digest, outboard });
            }
            Ok(()) if hasher.len() > pin.size => {
                return Err(LakeError::Precondition { key: pin.key.clone() });
            }
            Ok(()) => LakeError::Passing { key: pin.key.clone(), source: "the body ended too early".into() },
            Err(error) => error,
        };
        if hasher.len() > before {
            retry.progressed();
        }
        match retry.failed(&error, began.elapsed(), rand::random()) {
            Verdict::After(wait) => tokio::time::sleep(wait).await,
            Verdict::GiveUp => return Err(error),
        }
    }
}

async fn read_on(
    catalog: &Catalog,
    pin: &Pin,
    hasher: &mut ContentHasher,
    progress: &ImportProgress,
) -> Result<(), LakeError> {
    let from = hasher.len();
    let range = (from > 0).then_some(from..pin.size);
    let mut body = catalog.lake.get_pinned(pin, range).await?;
    while let Some(chunk) = body.stream.try_next().await? {
        hasher.update(&chunk);
        count(&progress.bytes_digested, chunk.len() as u64);
    }
    Ok(())
}
