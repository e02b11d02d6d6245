//! Import: a commit over objects that already lie in a bucket, without copying a byte.
//!
//! 1. [`listing`]: the bucket is listed; keys become entries, sorted on disk into tree order.
//! 2. [`digests`]: with `--digest`, every object is read once and digested.
//! 3. [`packs`]: sizes are known, so the packs' layout is fixed now; each pack's bytes are gathered
//!    from the user's own objects when needed (an assembled recipe).
//! 4. The tree is built and stored; commit, marker, ref follow, each only when what it names is there.
//!
//! Memory is bounded however many keys there are: what grows with them lies in unnamed temporary
//! files. What grows with one pack (its index and pins) is held for the packs on their way.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::format::commit::{Commit, Lineage};
use crate::format::ids::{CommitId, ContentId, PackId, TreeId};
use crate::format::pack::{PackPlanner, Place};
use crate::format::paths;
use crate::format::placement::Location;
use crate::format::refs::{DEFAULT_BRANCH, DatasetName, RefKind, RefName};
use crate::format::tree::build::{BlockOf, BuildError, Built, TreeBuilder};
use crate::format::tree::{Entry, EntryKind, Mtime, Pin};
use crate::store::catalog::gc::CondemnedSet;
use crate::store::catalog::puts::{self, Puts};
use crate::store::catalog::refs::{Expect, RefError};
use crate::store::catalog::{Catalog, CatalogError};
use crate::store::lake::LakeError;

pub mod digests;
pub mod keys;
pub mod listing;
pub mod packs;
pub mod proof;

use keys::{DirCounts, Found, Object};
use listing::{Listed, Row};

/// Mode of imported files and directories: a mount may show others.
const FILE_MODE: u32 = 0o644;
const DIR_MODE: u32 = 0o755;
/// How many odd keys an outcome names; the rest is counted.
pub const ODD_NAMED_MAX: usize = 10_000;

/// What to import, and as what.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    pub bucket: String,
    /// A directory of the bucket: empty, or with a `/` at its end.
    pub prefix: String,
    pub dataset: DatasetName,
    pub message: String,
    pub meta: Vec<(String, String)>,
    pub branch: Option<RefName>,
    pub tag: Option<RefName>,
    pub exclude: Vec<String>,
    /// Reads every object once and makes a digested tree.
    pub digest: bool,
}

/// How far an import is.
#[derive(Debug, Default)]
pub struct ImportProgress {
    pub keys_listed: AtomicU64,
    /// Known once the listing is complete.
    pub bytes_total: AtomicU64,
    pub bytes_digested: AtomicU64,
}

/// A key that no tree can hold as a file, and what was done with it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct OddKey {
    pub key: String,
    pub done: &'static str,
}

/// What an import made.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ImportOutcome {
    pub commit: CommitId,
    pub tree: TreeId,
    pub branch: String,
    /// The branch had this tree already: nothing was written.
    pub unchanged: bool,
    pub files: u64,
    pub dirs: u64,
    pub bytes: u64,
    pub packs: u64,
    pub digested: bool,
    pub excluded: u64,
    /// How many keys were odd; `odd` names the first of them.
    pub odd_count: u64,
    pub odd: Vec<OddKey>,
    /// Heads of the branch: more than one if another writer raced (log mode).
    pub heads: Vec<CommitId>,
}

/// Why an import did not end with a commit.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("cannot list s3://{bucket}/{prefix}")]
    List {
        bucket: String,
        prefix: String,
        #[source]
        source: LakeError,
    },
    #[error("there is no object below s3://{bucket}/{prefix}; check the bucket and the prefix")]
    Empty { bucket: String, prefix: String },
    #[error("`{glob}` is not a glob")]
    Glob {
        glob: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("s3://{bucket}/{key} was changed or deleted while it was imported; run the import again")]
    Changed { bucket: String, key: String },
    #[error("s3://{bucket}/{key} cannot be read")]
    Read {
        bucket: String,
        key: String,
        #[source]
        source: LakeError,
    },
    #[error("cannot use the spool directory {}", path.display())]
    Spool {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the listed keys do not make a tree")]
    Build(#[from] BuildError),
    #[error("the sizes of the objects do not make packs")]
    Layout(#[from] crate::format::pack::plan::PlanError),
    #[error("`{dataset}@{branch}` was moved by another writer; commit {commit} exists: tag it, or import again")]
    Lost { commit: CommitId, dataset: String, branch: String },
    #[error("`{dataset}@{branch}` has more than one head; choose one with `larder branch` first")]
    Heads { dataset: String, branch: String },
    #[error("cannot write to the lake")]
    Lake(#[from] LakeError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("commit {commit} exists, but the tag was not made")]
    Tag {
        commit: CommitId,
        #[source]
        source: RefError,
    },
    #[error("cannot read or move the refs")]
    Refs(#[from] RefError),
}

/// Makes a commit over the objects below a prefix.
pub async fn import(
    catalog: &Catalog,
    options: &ImportOptions,
    progress: &ImportProgress,
) -> Result<ImportOutcome, ImportError> {
    let spool = catalog.state_dir.join("spool");
    let spool_error = |source| ImportError::Spool { path: spool.clone(), source };
    std::fs::create_dir_all(&spool).map_err(spool_error)?;
    let target = Target::find(catalog, options).await?;
    let intent = super::gc::intent::Intent::begin(catalog, &options.dataset).await?;
    // After the intent: a gc that condemns from now on sees it.
    let condemned = CondemnedSet::load(&catalog.lake).await?;

    let mut listed = listing::list(catalog, options, progress, &spool).await?;
    if listed.rows.count() == 0 {
        return Err(ImportError::Empty { bucket: options.bucket.clone(), prefix: options.prefix.clone() });
    }
    if options.digest {
        listed.rows = digests::digest_all(catalog, options, listed.rows, progress, &spool).await?;
    }
    let packs = packs::store(catalog, options, &condemned, &mut listed).await?;
    let built = build(catalog, options, &condemned, &mut listed, &packs).await?;
    let made = commit(catalog, options, &condemned, &target, &built).await?;
    intent.end().await?;
    Ok(outcome(options, &target, listed, packs.len(), &built, made))
}

fn outcome(
    options: &ImportOptions,
    target: &Target,
    listed: Listed,
    packs: usize,
    built: &Built,
    made: Made,
) -> ImportOutcome {
    ImportOutcome {
        commit: made.commit,
        tree: built.tree,
        branch: target.branch.as_str().to_owned(),
        unchanged: made.unchanged,
        files: built.root.counts.files,
        dirs: built.root.counts.dirs,
        bytes: built.root.counts.bytes,
        packs: packs as u64,
        digested: options.digest,
        excluded: listed.excluded,
        odd_count: listed.odd_count,
        odd: listed.odd,
        heads: made.heads,
    }
}

/// Gives the pin of an object.
fn pin_of(options: &ImportOptions, path: &[u8], object: &Object) -> Pin {
    // Keys of a listing are UTF-8, and a path is a key without the prefix.
    let key = format!("{}{}", options.prefix, String::from_utf8_lossy(path));
    Pin {
        bucket: options.bucket.clone(),
        key,
        version: object.version.clone(),
        etag: object.etag.clone(),
        size: object.size,
    }
}

/// Builds the tree with its placement, and stores the blocks.
async fn build(
    catalog: &Catalog,
    options: &ImportOptions,
    condemned: &CondemnedSet,
    listed: &mut Listed,
    packs: &[(PackId, u64)],
) -> Result<Built, ImportError> {
    let spool_error = |source| ImportError::Spool { path: catalog.state_dir.join("spool"), source };
    let DirCounts { children, subdirs, .. } = listed.root;
    let mut builder = TreeBuilder::new(DIR_MODE, Mtime::default(), children, subdirs);
    for (pack, len) in packs {
        builder.declare_pack(*pack, *len);
    }
    // The same sizes in the same order: the same slots as when the packs were stored.
    let mut planner = PackPlanner::new(listed.layout());
    let mut puts = Puts::new(catalog.lake.clone(), catalog.meta.clone(), condemned.clone());
    let mut since_drain = 0_u32;
    for row in listed.rows().map_err(spool_error)? {
        let row = row.map_err(spool_error)?;
        let location = locate(&mut planner, packs, &row)?;
        builder.push(entry(options, row), location)?;
        since_drain += 1;
        if since_drain == 256 {
            since_drain = 0;
            store_blocks(&mut puts, builder.drain()).await?;
        }
    }
    let (built, blocks) = builder.finish()?;
    store_blocks(&mut puts, blocks).await?;
    puts.all().await?;
    Ok(built)
}

async fn store_blocks(puts: &mut Puts, blocks: Vec<crate::format::tree::build::BuiltBlock>) -> Result<(), LakeError> {
    for block in blocks {
        let key = match block.of {
            BlockOf::Tree => paths::node_key(&block.id),
            BlockOf::Placement => paths::placed_key(&block.id),
        };
        puts.put(key, block.bytes).await?;
    }
    Ok(())
}

fn locate(planner: &mut PackPlanner, packs: &[(PackId, u64)], row: &Row) -> Result<Location, ImportError> {
    let Found::File(object) = &row.found else {
        return Ok(Location::None);
    };
    if object.size == 0 {
        return Ok(Location::None);
    }
    let slot = planner.push(object.size)?;
    let number = usize::try_from(slot.pack).expect("packs are few");
    let (pack, _) = packs.get(number).expect("the same plan has the same packs");
    Ok(match slot.place {
        Place::Run { offset } => Location::Run { pack: *pack, offset },
        Place::Sparse { extents } => Location::Sparse { pack: *pack, extents },
    })
}

fn entry(options: &ImportOptions, row: Row) -> Entry {
    let name = row.path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    let (mode, mtime, kind) = match &row.found {
        Found::Dir(counts) => {
            let kind =
                EntryKind::Dir { children: counts.children, descendants: counts.descendants, subdirs: counts.subdirs };
            (DIR_MODE, Mtime::default(), kind)
        }
        Found::File(object) => {
            let mtime = Mtime { secs: object.modified_ms.div_euclid(1000), nanos: 0 };
            let (content, pin) = content_of(options, &row, object);
            (FILE_MODE, mtime, EntryKind::File { size: object.size, content, pin: pin.map(Box::new) })
        }
    };
    Entry { name: name.into(), mode, mtime, nlink: 1, kind }
}

/// Gives the content id of a file: its digest where known (an empty file's always is), else its pin.
fn content_of(options: &ImportOptions, row: &Row, object: &Object) -> (ContentId, Option<Pin>) {
    if object.size == 0 {
        return (ContentId::Digest(crate::format::digest::digest(b"")), None);
    }
    if let Some(digested) = &row.digested {
        return (ContentId::Digest(digested.digest), None);
    }
    let pin = pin_of(options, &row.path, object);
    (ContentId::Pin(pin.id()), Some(pin))
}

/// Where the commit goes.
#[derive(Debug)]
struct Target {
    branch: RefName,
    head: Option<CommitId>,
}

impl Target {
    async fn find(catalog: &Catalog, options: &ImportOptions) -> Result<Self, ImportError> {
        let branch = match &options.branch {
            Some(branch) => branch.clone(),
            None => RefName::parse(DEFAULT_BRANCH).expect("the default branch is a name"),
        };
        let heads = catalog.refs.heads(&options.dataset, RefKind::Branch, &branch).await?;
        match heads.as_slice() {
            [] => Ok(Self { branch, head: None }),
            [only] => Ok(Self { branch, head: Some(only.commit) }),
            _ => Err(ImportError::Heads {
                dataset: options.dataset.as_str().to_owned(),
                branch: branch.as_str().to_owned(),
            }),
        }
    }
}

struct Made {
    commit: CommitId,
    unchanged: bool,
    heads: Vec<CommitId>,
}

/// Stores the roots and the commit, moves the branch, tags.
async fn commit(
    catalog: &Catalog,
    options: &ImportOptions,
    condemned: &CondemnedSet,
    target: &Target,
    built: &Built,
) -> Result<Made, ImportError> {
    let made = match target.head {
        Some(head) if catalog.commit(&head).await?.tree == built.tree => {
            store_roots(catalog, condemned, built).await?;
            Made { commit: head, unchanged: true, heads: vec![head] }
        }
        _ => {
            store_roots(catalog, condemned, built).await?;
            let commit = store_commit(catalog, options, target, built).await?;
            let heads = move_branch(catalog, options, target, commit).await?;
            Made { commit, unchanged: false, heads }
        }
    };
    if let Some(tag) = &options.tag {
        let tagged = catalog.refs.tag(&options.dataset, tag, made.commit, false).await;
        tagged.map_err(|source| ImportError::Tag { commit: made.commit, source })?;
    }
    Ok(made)
}

async fn store_roots(catalog: &Catalog, condemned: &CondemnedSet, built: &Built) -> Result<(), LakeError> {
    let placement = built.placement.id();
    for (key, bytes) in [
        (paths::tree_key(&built.tree), built.root.encode()),
        (paths::placement_key(&built.tree, &placement), built.placement.encode()),
    ] {
        catalog.meta.keep(&key, &bytes);
        puts::save(condemned, &key).await?;
        puts::put(catalog.lake.as_ref(), &key, bytes.into()).await?;
    }
    Ok(())
}

async fn store_commit(
    catalog: &Catalog,
    options: &ImportOptions,
    target: &Target,
    built: &Built,
) -> Result<CommitId, ImportError> {
    let from = format!("s3://{}/{}", options.bucket, options.prefix);
    let body = Commit {
        format: 1,
        tree: built.tree,
        parents: target.head.into_iter().collect(),
        time_ms: jiff::Timestamp::now().as_millisecond(),
        message: options.message.clone(),
        author: catalog.by.clone(),
        meta: options.meta.iter().cloned().collect(),
        lineage: Lineage { imported_from: Some(from), ..Lineage::default() },
    };
    let bytes = body.encode();
    let id = Commit::id_of(&bytes);
    let key = paths::commit_key(&id);
    catalog.meta.keep(&key, &bytes);
    puts::put(catalog.lake.as_ref(), &key, bytes.into()).await?;
    catalog.refs.ensure_dataset(&options.dataset).await?;
    catalog.refs.add_commit(&options.dataset, &id).await?;
    Ok(id)
}

async fn move_branch(
    catalog: &Catalog,
    options: &ImportOptions,
    target: &Target,
    commit: CommitId,
) -> Result<Vec<CommitId>, ImportError> {
    let expect = Expect::Heads(target.head.into_iter().collect());
    match catalog.refs.move_branch(&options.dataset, &target.branch, commit, expect).await {
        Ok(heads) => Ok(heads.iter().map(|head| head.commit).collect()),
        Err(RefError::Conflict { .. }) => Err(ImportError::Lost {
            commit,
            dataset: options.dataset.as_str().to_owned(),
            branch: target.branch.as_str().to_owned(),
        }),
        Err(error) => Err(error.into()),
    }
}

/// Adds to a counter that only a progress bar reads.
fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
