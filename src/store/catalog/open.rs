//! [`Catalog`]: a lake opened for work with versions, and the way from a revision to a [`Snapshot`].
//!
//! Round trips, one after the other: the format object, the ref, the commit, the tree's root
//! together with the list of its placements, the placement's root. Immutable objects are kept on the
//! node's disk, and so is what was found out once (which lake this is, that a dataset has a commit,
//! which placement was chosen): a revision given by full id opens with the lake away.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::format::commit::Commit;
use crate::format::ids::{CommitId, LakeId, PlacementId, TreeId};
use crate::format::paths;
use crate::format::refs::{At, DatasetName, Revision};
use crate::store::catalog::lakefmt::{self, FormatError, LakeFormat, RefChoice};
use crate::store::catalog::refs::{RefError, Refs};
use crate::store::lake::{Lake, LakeError};
use crate::store::meta::{MEMORY_BYTES_MAX, MetaError, MetaStore, Snapshot};

/// How long the lake may take to confirm what this node knows already.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(2);
/// How many datasets an error names.
const NAMED_MAX: usize = 20;

/// Why the catalog cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error("no dataset `{dataset}` in {lake}; {}", there_are(.others))]
    NoDataset { dataset: String, lake: String, others: Vec<DatasetName> },
    #[error("commit {commit} has no complete placement in {lake}; push its data again")]
    NoPlacement { commit: CommitId, lake: String },
    #[error("commit {commit} cannot be opened")]
    Commit {
        commit: CommitId,
        #[source]
        source: MetaError,
    },
    #[error("commit {commit} is being removed by gc right now; push its data again")]
    Swept { commit: CommitId },
    #[error(transparent)]
    Refs(RefError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Meta(#[from] MetaError),
    #[error(transparent)]
    Lake(#[from] LakeError),
}

impl CatalogError {
    /// Says whether the dataset, or the revision of it, does not exist.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::NoDataset { .. } => true,
            Self::Refs(error) => matches!(
                error,
                RefError::NoDataset { .. }
                    | RefError::NoRef { .. }
                    | RefError::NoDefault { .. }
                    | RefError::NoCommit { .. }
            ),
            _ => false,
        }
    }
}

fn there_are(others: &[DatasetName]) -> String {
    if others.is_empty() {
        return "there is none yet; make one with `larder push DIR DATASET`".to_owned();
    }
    let named: Vec<&str> = others.iter().take(NAMED_MAX).map(DatasetName::as_str).collect();
    let more = match others.len().checked_sub(NAMED_MAX) {
        Some(more @ 1..) => format!(" and {more} more"),
        _ => String::new(),
    };
    format!("there are: {}{more}; push one with `larder push DIR DATASET`", named.join(", "))
}

/// A lake opened for work with versions. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Catalog {
    pub lake: Arc<dyn Lake>,
    pub meta: MetaStore,
    pub refs: Refs,
    pub lake_id: LakeId,
    /// This node's own directory.
    pub state_dir: PathBuf,
    /// user@host, as commits and refs name it.
    pub by: String,
}

/// Gives user@host, as commits and refs name whoever wrote them.
pub fn author() -> String {
    let uid = nix::unistd::geteuid();
    let user = match nix::unistd::User::from_uid(uid) {
        Ok(Some(user)) => user.name,
        Ok(None) | Err(_) => uid.to_string(),
    };
    let host = match nix::sys::utsname::uname() {
        Ok(names) => names.nodename().to_string_lossy().into_owned(),
        Err(_) => "unknown".to_owned(),
    };
    format!("{user}@{host}")
}

/// The name under which this node keeps the format object of the lake at a URL.
fn format_cache_key(url: &str) -> String {
    let digest = blake3::hash(url.as_bytes()).to_hex();
    format!("local/format-{digest}.json")
}

fn known_key(lake: &LakeId, dataset: &DatasetName, commit: &CommitId) -> String {
    format!("local/{lake}/known/{}/{commit}", dataset.as_str())
}

fn chosen_key(lake: &LakeId, tree: &TreeId) -> String {
    format!("local/{lake}/chosen/{tree}")
}

/// Asks the lake; where this node knows an answer already, a lake that does not answer soon, or is
/// away, does not stand in the way.
async fn ask<T, E>(
    known: Option<T>,
    passing: impl Fn(&E) -> bool,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let Some(known) = known else {
        return answer.await;
    };
    match tokio::time::timeout(CONFIRM_TIMEOUT, answer).await {
        Ok(Err(error)) if passing(&error) => {
            tracing::warn!("the lake is away; going on with what this node knows");
            Ok(known)
        }
        Ok(result) => result,
        Err(_) => {
            tracing::warn!("the lake is slow; going on with what this node knows");
            Ok(known)
        }
    }
}

fn format_passing(error: &FormatError) -> bool {
    matches!(error, FormatError::Lake { source, .. } if source.is_passing())
}

fn ref_passing(error: &RefError) -> bool {
    matches!(error, RefError::Lake(source) if source.is_passing())
}

impl Catalog {
    /// Opens a lake that exists already.
    pub async fn open(lake: Arc<dyn Lake>, state_dir: &Path) -> Result<Self, CatalogError> {
        let meta = MetaStore::new(lake.clone(), state_dir.join("meta"), MEMORY_BYTES_MAX);
        let cache_key = format_cache_key(&lake.url());
        let known: Option<LakeFormat> = meta.kept(&cache_key).and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let found = ask(known.map(Some), format_passing, lakefmt::read(lake.as_ref())).await?;
        let format = found.ok_or_else(|| FormatError::Missing { url: lake.url() })?;
        Ok(Self::opened(lake, meta, &format, state_dir))
    }

    /// Opens a lake, and makes one where there is none.
    pub async fn open_or_create(lake: Arc<dyn Lake>, state_dir: &Path, refs: RefChoice) -> Result<Self, CatalogError> {
        let meta = MetaStore::new(lake.clone(), state_dir.join("meta"), MEMORY_BYTES_MAX);
        let format = lakefmt::open_or_create(lake.as_ref(), refs).await?;
        Ok(Self::opened(lake, meta, &format, state_dir))
    }

    fn opened(lake: Arc<dyn Lake>, meta: MetaStore, format: &LakeFormat, state: &Path) -> Self {
        let bytes = serde_json::to_vec(format).expect("a format object has plain fields only");
        let cache_key = format_cache_key(&lake.url());
        if meta.kept(&cache_key).is_none_or(|kept| kept != bytes) {
            meta.keep(&cache_key, &bytes);
        }
        let by = author();
        Self {
            refs: Refs::new(lake.clone(), format.refs, by.clone()),
            lake,
            meta,
            lake_id: format.lake_id,
            state_dir: state.to_owned(),
            by,
        }
    }

    /// Gives the same catalog with another bound for decoded blocks in memory.
    pub fn with_memory(mut self, bytes_max: u64) -> Self {
        self.meta = MetaStore::new(self.lake.clone(), self.state_dir.join("meta"), bytes_max);
        self
    }

    /// Finds the commit that a revision means.
    pub async fn resolve(&self, rev: &Revision) -> Result<CommitId, CatalogError> {
        let full: Option<CommitId> = match &rev.at {
            At::Prefix(hex) => hex.parse().ok(),
            At::Default | At::Named(_) => None,
        };
        let known = full.filter(|commit| {
            let key = known_key(&self.lake_id, &rev.dataset, commit);
            self.meta.has_on_disk(&key)
        });
        let commit = match ask(known, ref_passing, self.refs.resolve(rev)).await {
            Ok(commit) => commit,
            Err(error) => return Err(self.explain(error).await),
        };
        if known.is_none() {
            let key = known_key(&self.lake_id, &rev.dataset, &commit);
            if !self.meta.has_on_disk(&key) {
                self.meta.keep(&key, b"");
            }
        }
        Ok(commit)
    }

    /// Turns "no such dataset" into an error that says which there are.
    pub(super) async fn explain(&self, error: RefError) -> CatalogError {
        let RefError::NoDataset { dataset, .. } = &error else {
            return CatalogError::Refs(error);
        };
        CatalogError::NoDataset {
            dataset: dataset.clone(),
            lake: self.lake.url(),
            others: self.refs.datasets().await.unwrap_or_default(),
        }
    }

    /// Gives a commit's body.
    pub async fn commit(&self, id: &CommitId) -> Result<Arc<Commit>, CatalogError> {
        let commit = self.meta.commit(id).await;
        commit.map_err(|source| CatalogError::Commit { commit: *id, source })
    }

    /// Opens a revision for navigation and reading.
    pub async fn snapshot(&self, rev: &Revision) -> Result<Snapshot, CatalogError> {
        let commit = self.resolve(rev).await?;
        self.snapshot_of(&rev.dataset, &commit).await
    }

    /// Opens a commit whose dataset is known.
    pub async fn snapshot_of(&self, dataset: &DatasetName, commit: &CommitId) -> Result<Snapshot, CatalogError> {
        let body = self.commit(commit).await?;
        let wrap = |source| CatalogError::Commit { commit: *commit, source };
        let chosen_key = chosen_key(&self.lake_id, &body.tree);
        let remembered = self.remembered(&chosen_key, &body.tree);
        let list = ask(remembered.map(|id| vec![id]), LakeError::is_passing, self.placements(&body.tree));
        let (root, listed) = tokio::join!(self.meta.tree_root(&body.tree), list);
        let (root, listed) = (root.map_err(wrap)?, listed?);
        let mut failed = None;
        for id in listed {
            match self.meta.placement_root(&body.tree, &id).await {
                Ok(placement) => {
                    if remembered != Some(id) {
                        self.meta.keep(&chosen_key, id.to_string().as_bytes());
                    }
                    return Ok(Snapshot {
                        dataset: dataset.clone(),
                        commit: *commit,
                        commit_body: body,
                        root,
                        placement,
                        placement_id: id,
                        lake_id: self.lake_id,
                    });
                }
                // An older one may be whole.
                Err(error) => {
                    tracing::warn!(placement = %id, %error, "this placement cannot be used");
                    failed = Some(error);
                }
            }
        }
        Err(match failed {
            Some(source) => wrap(source),
            None => CatalogError::NoPlacement { commit: *commit, lake: self.lake.url() },
        })
    }

    /// Opens a commit with the placement that a mount recorded.
    pub async fn snapshot_with(
        &self,
        dataset: &DatasetName,
        commit: &CommitId,
        placement_id: &PlacementId,
    ) -> Result<Snapshot, CatalogError> {
        let wrap = |source| CatalogError::Commit { commit: *commit, source };
        let body = self.commit(commit).await?;
        let (root, placement) =
            futures::try_join!(self.meta.tree_root(&body.tree), self.meta.placement_root(&body.tree, placement_id))
                .map_err(wrap)?;
        Ok(Snapshot {
            dataset: dataset.clone(),
            commit: *commit,
            commit_body: body,
            root,
            placement,
            placement_id: *placement_id,
            lake_id: self.lake_id,
        })
    }

    /// The placement that was chosen before, where all of it is at hand.
    fn remembered(&self, chosen_key: &str, tree: &TreeId) -> Option<PlacementId> {
        let text = String::from_utf8(self.meta.kept(chosen_key)?).ok()?;
        let id: PlacementId = text.parse().ok()?;
        self.meta.has_on_disk(&paths::placement_key(tree, &id)).then_some(id)
    }

    /// Lists the placements of a tree, newest first; of equal age the one with the least id.
    pub async fn placements(&self, tree: &TreeId) -> Result<Vec<PlacementId>, LakeError> {
        let prefix = paths::placements_prefix(tree);
        let mut found: Vec<(i64, PlacementId)> = Vec::new();
        let mut page = None;
        loop {
            let listed = self.lake.list(&prefix, page).await?;
            for object in listed.objects {
                // What is not an id was not put there by us.
                if let Some(Ok(id)) = object.key.strip_prefix(&prefix).map(str::parse) {
                    found.push((object.modified_ms, id));
                }
            }
            page = listed.next;
            if page.is_none() {
                break;
            }
        }
        found.sort_by_key(|&(modified_ms, id)| (std::cmp::Reverse(modified_ms), id));
        Ok(found.into_iter().map(|(_, id)| id).collect())
    }
}
