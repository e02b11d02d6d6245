//! Datasets and their refs: one API over both ways in which refs move.
//!
//! See [`super::lakefmt::RefMode`]. In `cas` mode a ref is one object, moved by a conditional write.
//! In `log` mode it is a set of entries that are only ever added; its heads are the entries that no
//! other names as superseded. One head is the normal state. Two heads say that two writers raced:
//! reading refuses and lists both, the next write that names both merges them.

use std::sync::Arc;

use super::lakefmt::RefMode;
use crate::format::ids::CommitId;
use crate::format::refs::{DatasetName, RefKind, RefName, Revision};
use crate::store::lake::{Lake, LakeError};

/// What a ref points to, and who moved it there.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Head {
    pub commit: CommitId,
    /// Unix time in milliseconds of the mover's clock.
    pub time_ms: i64,
    pub by: String,
}

/// A ref of a dataset. More than one head: writers raced (log mode only).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefState {
    pub kind: RefKind,
    pub name: RefName,
    /// At least one; oldest first.
    pub heads: Vec<Head>,
}

/// What a branch has to be for a move to take effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// These commits, in any order: none for a new branch, several to merge heads.
    Heads(Vec<CommitId>),
    /// Whatever it is.
    Any,
}

/// What a dataset's own object says.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DatasetInfo {
    pub format: u32,
    pub created_ms: i64,
    pub by: String,
}

/// Says why a ref could not be read or moved.
#[derive(Debug, thiserror::Error)]
pub enum RefError {
    #[error("{dataset}: no such dataset in {url}")]
    NoDataset { dataset: String, url: String },
    #[error("{dataset}@{name}: no such tag or branch")]
    NoRef { dataset: String, name: String },
    #[error(
        "{dataset} has no branch `{branch}` yet; push one, or name a tag, branch or commit behind `@`"
    )]
    NoDefault { dataset: String, branch: String },
    #[error("{dataset}@{prefix}: no commit of {dataset} begins so")]
    NoCommit { dataset: String, prefix: String },
    #[error("{dataset}@{prefix}: several commits begin so: {}; give more digits", list_ids(.found))]
    Ambiguous {
        dataset: String,
        prefix: String,
        found: Vec<CommitId>,
    },
    #[error("{dataset}@{name} has {} heads, because writers raced: {}; choose one by its id, or push again to merge them", .heads.len(), list_heads(.heads))]
    Heads {
        dataset: String,
        name: String,
        heads: Vec<Head>,
    },
    #[error("{dataset}@{name} was moved meanwhile to {}; look at it, and try again", list_heads(.now))]
    Conflict {
        dataset: String,
        name: String,
        /// Empty: it was deleted.
        now: Vec<Head>,
    },
    #[error("{dataset}@{name}: the tag is there already, at {}; --force moves it", list_heads(.heads))]
    TagExists {
        dataset: String,
        name: String,
        heads: Vec<Head>,
    },
    #[error("{dataset}@{name} is a {other} already; one name cannot be both", other = kind_word(.other))]
    OtherKind {
        dataset: String,
        name: String,
        other: RefKind,
    },
    #[error("{key}: is not what a ref looks like; it was written by something else, or damaged")]
    Damaged {
        key: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("{key}: has format version {found}, this larder knows up to 1; use a newer larder")]
    Newer { key: String, found: u32 },
    #[error("cannot read or write the refs of the lake")]
    Lake(#[from] LakeError),
}

fn list_ids(ids: &[CommitId]) -> String {
    ids.iter()
        .map(CommitId::short)
        .collect::<Vec<_>>()
        .join(", ")
}

fn list_heads(heads: &[Head]) -> String {
    if heads.is_empty() {
        return "nothing: it was deleted".to_owned();
    }
    let line = |head: &Head| format!("{} (by {})", head.commit.short(), head.by);
    heads.iter().map(line).collect::<Vec<_>>().join(", ")
}

fn kind_word(kind: &RefKind) -> &'static str {
    match kind {
        RefKind::Branch => "branch",
        RefKind::Tag => "tag",
    }
}

/// The refs of all datasets of a lake. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Refs {
    lake: Arc<dyn Lake>,
    mode: RefMode,
    by: String,
}

impl Refs {
    /// Makes the API; `by` (user@host) is written into what it moves.
    pub fn new(lake: Arc<dyn Lake>, mode: RefMode, by: String) -> Self {
        Self { lake, mode, by }
    }

    pub fn mode(&self) -> RefMode {
        self.mode
    }

    /// Lists the datasets, in order.
    pub async fn datasets(&self) -> Result<Vec<DatasetName>, RefError> {
        todo!()
    }

    /// Reads a dataset's object; None where there is no such dataset.
    pub async fn dataset(&self, _dataset: &DatasetName) -> Result<Option<DatasetInfo>, RefError> {
        todo!()
    }

    /// Makes the dataset where there is none.
    pub async fn ensure_dataset(&self, _dataset: &DatasetName) -> Result<(), RefError> {
        todo!()
    }

    /// Removes a dataset with its refs and commit markers; `gc` then finds what nobody needs.
    pub async fn remove_dataset(&self, _dataset: &DatasetName) -> Result<(), RefError> {
        todo!()
    }

    /// Lists the tags and branches of a dataset, branches first, in order.
    pub async fn list(&self, _dataset: &DatasetName) -> Result<Vec<RefState>, RefError> {
        todo!()
    }

    /// Reads one ref's heads; empty where there is no such ref.
    pub async fn heads(
        &self,
        _dataset: &DatasetName,
        _kind: RefKind,
        _name: &RefName,
    ) -> Result<Vec<Head>, RefError> {
        todo!()
    }

    /// Finds the commit that a revision means. Two heads are `Heads`.
    pub async fn resolve(&self, _revision: &Revision) -> Result<CommitId, RefError> {
        todo!()
    }

    /// Moves (or begins) a branch; gives its heads afterwards: more than one if somebody raced.
    pub async fn move_branch(
        &self,
        _dataset: &DatasetName,
        _branch: &RefName,
        _to: CommitId,
        _expect: Expect,
    ) -> Result<Vec<Head>, RefError> {
        todo!()
    }

    /// Makes a tag; one that is there at another commit is moved only with `force`.
    pub async fn tag(
        &self,
        _dataset: &DatasetName,
        _tag: &RefName,
        _commit: CommitId,
        _force: bool,
    ) -> Result<Vec<Head>, RefError> {
        todo!()
    }

    /// Deletes a tag or a branch; gives what it was, or `NoRef`.
    pub async fn delete(
        &self,
        _dataset: &DatasetName,
        _kind: RefKind,
        _name: &RefName,
    ) -> Result<Vec<Head>, RefError> {
        todo!()
    }

    /// Notes that the dataset has a commit (before any ref points to it).
    pub async fn add_commit(
        &self,
        _dataset: &DatasetName,
        _commit: &CommitId,
    ) -> Result<(), RefError> {
        todo!()
    }

    /// Takes the note back (the commit is removed from the dataset).
    pub async fn remove_commit(
        &self,
        _dataset: &DatasetName,
        _commit: &CommitId,
    ) -> Result<(), RefError> {
        todo!()
    }

    /// Lists a dataset's commits whose hex begins with `prefix` (empty: all), in order of ids.
    pub async fn commits(
        &self,
        _dataset: &DatasetName,
        _prefix: &str,
    ) -> Result<Vec<CommitId>, RefError> {
        todo!()
    }
}
