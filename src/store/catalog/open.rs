//! [`Catalog`]: a lake opened for work with versions, and the way from a revision to a [`Snapshot`].
//!
//! Round trips, one after the other: the ref, the commit, the tree's root together with the list of
//! its placements, the placement's root. Immutable objects are kept on the node's disk, and so is
//! which placement was chosen: a revision given by full id opens with the lake away.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::format::ids::{CommitId, LakeId};
use crate::format::refs::{DatasetName, Revision};
use crate::store::lake::{Lake, LakeError};
use crate::store::meta::{MetaError, MetaStore, Snapshot};

/// Why the catalog cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error("no dataset `{dataset}` in {lake}; {hint}")]
    NoDataset {
        dataset: String,
        lake: String,
        hint: String,
    },
    #[error(
        "`{dataset}` has no tag, branch or commit `{at}`; `larder log {dataset}` lists what it has"
    )]
    NoRevision { dataset: String, at: String },
    #[error("`{dataset}@{prefix}` is ambiguous: {candidates}")]
    Ambiguous {
        dataset: String,
        prefix: String,
        candidates: String,
    },
    #[error(
        "`{dataset}@{name}` has more than one head: {heads}; name one by its id, or move the branch to one of them (or push again, which merges them)"
    )]
    Heads {
        dataset: String,
        name: String,
        heads: String,
    },
    #[error("commit {commit} has no complete placement in {lake}; push it again")]
    NoPlacement { commit: CommitId, lake: String },
    #[error(transparent)]
    Meta(#[from] MetaError),
    #[error(transparent)]
    Lake(#[from] LakeError),
    #[error("{}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// A lake opened for work with versions. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Catalog {
    pub lake: Arc<dyn Lake>,
    pub meta: MetaStore,
    pub lake_id: LakeId,
    /// This node's own directory.
    pub state_dir: PathBuf,
}

impl Catalog {
    /// Opens the lake: reads its format object, and makes one where there is none and the prefix is empty.
    pub async fn open(_lake: Arc<dyn Lake>, _state_dir: &Path) -> Result<Self, CatalogError> {
        todo!()
    }

    /// Finds the commit that a revision means.
    pub async fn resolve(&self, _rev: &Revision) -> Result<CommitId, CatalogError> {
        todo!()
    }

    /// Opens a revision for navigation and reading.
    pub async fn snapshot(&self, _rev: &Revision) -> Result<Snapshot, CatalogError> {
        todo!()
    }

    /// Opens a commit whose dataset is known (a mount that is made again).
    pub async fn snapshot_of(
        &self,
        _dataset: &DatasetName,
        _commit: &CommitId,
    ) -> Result<Snapshot, CatalogError> {
        todo!()
    }
}
