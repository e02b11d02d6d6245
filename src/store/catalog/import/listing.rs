//! The listing of a foreign bucket, as rows in tree order.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::format::digest::Outboard;
use crate::format::ids::ContentDigest;
use crate::format::pack::Layout;
use crate::store::catalog::Catalog;
use crate::store::catalog::push::exclude::Excludes;
use crate::store::catalog::spool::{Records, SORT_BYTES_MAX, Sorter};
use crate::store::lake::retry::{RetryPolicy, with_retry};

use super::keys::{DirCounts, Found, KeyWalk, Object, Odd, Sink, path_of_sort_key, sort_key};
use super::{ImportError, ImportOptions, ImportProgress, ODD_NAMED_MAX, OddKey, count};

/// An entry of the tree to be, in tree order.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub path: Vec<u8>,
    pub found: Found,
    pub digested: Option<Digested>,
}

/// What reading an object gave.
#[derive(Debug, Clone)]
pub(super) struct Digested {
    pub digest: ContentDigest,
    pub outboard: Option<Outboard>,
}

/// A row as it lies in the spool.
#[derive(Debug, Serialize, Deserialize)]
struct StoredRow {
    found: Found,
    digest: Option<ContentDigest>,
    /// Chaining values of the blocks, one after the other: the groups' follow from them.
    blocks: Option<Vec<[u8; 32]>>,
}

/// Everything that the listing gave.
#[derive(Debug)]
pub(super) struct Listed {
    /// Sort key and stored row, in tree order.
    pub rows: Records,
    pub root: DirCounts,
    pub bytes: u64,
    pub excluded: u64,
    pub odd_count: u64,
    pub odd: Vec<OddKey>,
}

impl Listed {
    /// Reads the rows from the first on.
    pub(super) fn rows(&mut self) -> io::Result<impl Iterator<Item = io::Result<Row>> + use<>> {
        Ok(self.rows.read()?.map(|record| decode(&record?)))
    }

    /// Gives the layout of the packs: by the bytes of the whole tree.
    pub(super) fn layout(&self) -> Layout {
        Layout::for_bytes(self.bytes)
    }
}

/// Decodes a spooled row.
pub(super) fn decode((key, value): &(Vec<u8>, Vec<u8>)) -> io::Result<Row> {
    let stored: StoredRow = serde_json::from_slice(value).map_err(io::Error::other)?;
    let size = match &stored.found {
        Found::File(object) => object.size,
        Found::Dir(_) => 0,
    };
    let digested = stored.digest.map(|digest| Digested {
        digest,
        outboard: stored.blocks.and_then(|blocks| Outboard::of_blocks(size, blocks)).map(|(_, outboard)| outboard),
    });
    Ok(Row { path: path_of_sort_key(key), found: stored.found, digested })
}

/// Encodes a row for the spool.
pub(super) fn encode(found: Found, digested: Option<Digested>) -> io::Result<Vec<u8>> {
    let (digest, blocks) = match digested {
        Some(digested) => (Some(digested.digest), digested.outboard.map(|outboard| outboard.blocks)),
        None => (None, None),
    };
    serde_json::to_vec(&StoredRow { found, digest, blocks }).map_err(io::Error::other)
}

/// Lists the bucket below the prefix; gives the entries in tree order.
pub(super) async fn list(
    catalog: &Catalog,
    options: &ImportOptions,
    progress: &ImportProgress,
    spool: &Path,
) -> Result<Listed, ImportError> {
    let spool_error = |source| ImportError::Spool { path: spool.to_owned(), source };
    let excludes = Excludes::new(&options.exclude)
        .map_err(|source| ImportError::Glob { glob: options.exclude.join(" "), source: Box::new(source) })?;
    // Stores list in byte order, but not all of them; sorting costs little and is always right.
    let mut by_key = Sorter::new(spool, SORT_BYTES_MAX);
    let mut excluded = 0;
    let own = own_prefix(catalog, &options.bucket);
    let mut page = None;
    loop {
        let listed = with_retry(&RetryPolicy::default(), || {
            catalog.lake.list_foreign(&options.bucket, &options.prefix, page.clone())
        })
        .await
        .map_err(|source| ImportError::List {
            bucket: options.bucket.clone(),
            prefix: options.prefix.clone(),
            source,
        })?;
        for object in listed.objects {
            count(&progress.keys_listed, 1);
            let Some(path) = object.key.strip_prefix(&options.prefix) else {
                continue;
            };
            let is_own = own.as_ref().is_some_and(|own| object.key.starts_with(own));
            if is_own || is_excluded(&excludes, path) {
                excluded += 1;
                continue;
            }
            let value = Object {
                size: object.size,
                etag: object.etag,
                version: object.version,
                modified_ms: object.modified_ms,
            };
            let value = serde_json::to_vec(&value).map_err(|error| spool_error(error.into()))?;
            by_key.push(path.as_bytes(), &value).map_err(spool_error)?;
        }
        page = listed.next;
        if page.is_none() {
            break;
        }
    }
    let mut listed = walk(options, by_key, spool).map_err(spool_error)?;
    listed.excluded = excluded;
    progress.bytes_total.store(listed.bytes, std::sync::atomic::Ordering::Relaxed);
    Ok(listed)
}

/// The lake's own prefix where it lies in the imported bucket: its objects are nobody's data.
fn own_prefix(catalog: &Catalog, bucket: &str) -> Option<String> {
    let url = catalog.lake.url();
    let rest = url.strip_prefix("s3://")?;
    let (own_bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.trim_end_matches('/');
    (own_bucket == bucket && !prefix.is_empty()).then(|| format!("{prefix}/"))
}

/// Says whether a key, or a directory that it lies in, is excluded.
fn is_excluded(excludes: &Excludes, path: &str) -> bool {
    let slashes = path.bytes().enumerate().filter(|(_, byte)| *byte == b'/');
    let mut dirs = slashes.filter_map(|(at, _)| path.as_bytes().get(..at));
    dirs.any(|dir| excludes.matches(dir, true)) || excludes.matches(path.as_bytes(), false)
}

/// Collects what the walk over the keys tells.
struct Collect {
    by_tree: Sorter,
    bytes: u64,
    odd_count: u64,
    odd: Vec<OddKey>,
    prefix: String,
}

impl Sink for Collect {
    type Error = io::Error;

    fn entry(&mut self, path: &[u8], found: Found) -> io::Result<()> {
        if let Found::File(object) = &found {
            self.bytes = self.bytes.saturating_add(object.size);
        }
        self.by_tree.push(&sort_key(path), &encode(found, None)?)
    }

    fn odd(&mut self, path: &[u8], odd: Odd) -> io::Result<()> {
        self.odd_count += 1;
        if self.odd.len() < ODD_NAMED_MAX {
            let key = format!("{}{}", self.prefix, String::from_utf8_lossy(path));
            self.odd.push(OddKey { key, done: odd.done() });
        }
        Ok(())
    }
}

fn walk(options: &ImportOptions, by_key: Sorter, spool: &Path) -> io::Result<Listed> {
    let mut collect = Collect {
        by_tree: Sorter::new(spool, SORT_BYTES_MAX),
        bytes: 0,
        odd_count: 0,
        odd: Vec::new(),
        prefix: options.prefix.clone(),
    };
    let mut walk = KeyWalk::new();
    for record in by_key.finish()? {
        let (path, value) = record?;
        let object: Object = serde_json::from_slice(&value).map_err(io::Error::other)?;
        walk.add(&path, object, &mut collect)?;
    }
    let root = walk.finish(&mut collect)?;
    let mut rows = Records::create(spool)?;
    for record in collect.by_tree.finish()? {
        let (key, value) = record?;
        rows.push(&key, &value)?;
    }
    Ok(Listed { rows, root, bytes: collect.bytes, excluded: 0, odd_count: collect.odd_count, odd: collect.odd })
}
