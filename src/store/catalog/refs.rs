//! Datasets and their refs: one API over both ways in which refs move.
//!
//! See [`super::lakefmt::RefMode`]. In `cas` mode a ref is one object, moved by a conditional write.
//! In `log` mode it is a set of entries that are only ever added; its heads are the entries that no
//! other names as superseded. One head is the normal state. Two heads say that two writers raced:
//! reading refuses and lists both, the next write that names both merges them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};

use super::lakefmt::RefMode;
use crate::format::codec::DecodeError;
use crate::format::ids::CommitId;
use crate::format::refs::{At, DEFAULT_BRANCH, DatasetName, RefKind, RefName, Revision};
use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{Lake, LakeError, PutIf, get_all, list_all};

mod cas;
mod log;

pub(super) use log::next_id;

#[cfg(test)]
mod tests;

/// Small objects that are read or written at once.
const PARALLEL: usize = 32;
/// No ref, log entry or dataset object is longer.
const SMALL_BYTES_MAX: u64 = crate::format::refs::REF_LEN_MAX as u64;
/// How often a move to whatever is there is tried against others who move too.
const TRIES_MAX: u32 = 50;

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
    #[error("{dataset} has no branch `{branch}` yet; push one, or name a tag, branch or commit behind `@`")]
    NoDefault { dataset: String, branch: String },
    #[error("{dataset}@{prefix}: no commit of {dataset} begins so")]
    NoCommit { dataset: String, prefix: String },
    #[error("{dataset}@{prefix}: several commits begin so: {}; give more digits", list_ids(.found))]
    Ambiguous { dataset: String, prefix: String, found: Vec<CommitId> },
    #[error("{dataset}@{name} has {} heads, because writers raced: {}; choose one by its id, or push again to merge them", .heads.len(), list_heads(.heads))]
    Heads { dataset: String, name: String, heads: Vec<Head> },
    #[error("{dataset}@{name} was moved meanwhile to {}; look at it, and try again", list_heads(.now))]
    Conflict {
        dataset: String,
        name: String,
        /// Empty: it was deleted.
        now: Vec<Head>,
    },
    #[error("{dataset}@{name}: the tag is there already, at {}; --force moves it", list_heads(.heads))]
    TagExists { dataset: String, name: String, heads: Vec<Head> },
    #[error("{dataset}@{name} is a {other} already; one name cannot be both", other = kind_word(.other))]
    OtherKind { dataset: String, name: String, other: RefKind },
    #[error("{key}: cannot be read as a ref")]
    Damaged {
        key: String,
        #[source]
        source: DecodeError,
    },
    #[error("{dataset}@{name} moves all the time; try again when the others are done")]
    Busy { dataset: String, name: String },
    #[error("cannot read or write the refs of the lake")]
    Lake(#[from] LakeError),
}

fn list_ids(ids: &[CommitId]) -> String {
    ids.iter().map(CommitId::short).collect::<Vec<_>>().join(", ")
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

/// One ref, for the two modes.
struct RefAt<'a> {
    dataset: &'a DatasetName,
    kind: RefKind,
    name: &'a RefName,
}

impl RefAt<'_> {
    fn conflict(&self, now: Vec<Head>) -> RefError {
        RefError::Conflict { dataset: self.dataset.to_string(), name: self.name.to_string(), now }
    }

    fn busy(&self) -> RefError {
        RefError::Busy { dataset: self.dataset.to_string(), name: self.name.to_string() }
    }
}

pub(super) fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

fn dataset_key(dataset: &DatasetName) -> String {
    format!("datasets/{dataset}/dataset.json")
}

fn commits_prefix(dataset: &DatasetName) -> String {
    format!("datasets/{dataset}/commits/")
}

/// Says whether the heads are what was expected, in any order.
fn is_expected(heads: &[Head], expect: &Expect) -> bool {
    match expect {
        Expect::Any => true,
        Expect::Heads(expected) => {
            let mut found: Vec<CommitId> = heads.iter().map(|head| head.commit).collect();
            let mut expected = expected.clone();
            found.sort_unstable();
            found.dedup();
            expected.sort_unstable();
            expected.dedup();
            found == expected
        }
    }
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
        let policy = RetryPolicy::default();
        let names = with_retry(&policy, || self.lake.list_dirs("datasets/")).await?;
        let names = names.into_iter().filter_map(|name| DatasetName::parse(&name).ok());
        let found: Vec<Option<DatasetName>> = futures::stream::iter(names)
            .map(|name| async move {
                let info = self.dataset(&name).await?;
                Ok::<_, RefError>(info.map(|_| name))
            })
            .buffered(PARALLEL)
            .try_collect()
            .await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Reads a dataset's object; None where there is no such dataset.
    pub async fn dataset(&self, dataset: &DatasetName) -> Result<Option<DatasetInfo>, RefError> {
        let key = dataset_key(dataset);
        match get_all(&*self.lake, &key, SMALL_BYTES_MAX).await {
            Ok(bytes) => decode_dataset(key, &bytes).map(Some),
            Err(LakeError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes the dataset where there is none.
    pub async fn ensure_dataset(&self, dataset: &DatasetName) -> Result<(), RefError> {
        if self.dataset(dataset).await?.is_some() {
            return Ok(());
        }
        let info = DatasetInfo { format: 1, created_ms: now_ms(), by: self.by.clone() };
        let body = Bytes::from(crate::format::json::encode(&info));
        let when = match self.mode {
            RefMode::Cas => PutIf::Absent,
            RefMode::Log => PutIf::Always,
        };
        match self.put(&dataset_key(dataset), body, when).await {
            Ok(_) | Err(LakeError::Precondition { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a dataset with its refs and commit markers; `gc` then finds what nobody needs.
    ///
    /// First the refs, so that a dataset of the same name never has them; then the dataset; then
    /// the markers. Killed on the way, it is run again.
    pub async fn remove_dataset(&self, dataset: &DatasetName) -> Result<(), RefError> {
        if self.dataset(dataset).await?.is_none() {
            return Err(self.no_dataset(dataset));
        }
        for part in ["refs", "log"] {
            self.delete_below(&format!("datasets/{dataset}/{part}/")).await?;
        }
        let policy = RetryPolicy::default();
        let key = dataset_key(dataset);
        with_retry(&policy, || self.lake.delete(&key)).await?;
        self.delete_below(&format!("datasets/{dataset}/")).await
    }

    /// Deletes in key order: of a log, the oldest entries first, so that none comes back to life.
    async fn delete_below(&self, prefix: &str) -> Result<(), RefError> {
        let policy = RetryPolicy::default();
        for object in list_all(&*self.lake, prefix).await? {
            with_retry(&policy, || self.lake.delete(&object.key)).await?;
        }
        Ok(())
    }

    fn no_dataset(&self, dataset: &DatasetName) -> RefError {
        RefError::NoDataset { dataset: dataset.to_string(), url: self.lake.url() }
    }

    /// Lists the tags and branches of a dataset, branches first, in order.
    pub async fn list(&self, dataset: &DatasetName) -> Result<Vec<RefState>, RefError> {
        let (info, names) = futures::join!(self.dataset(dataset), self.ref_names(dataset));
        if info?.is_none() {
            return Err(self.no_dataset(dataset));
        }
        let states: Vec<RefState> = futures::stream::iter(names?)
            .map(|((kind, name), entries)| async move {
                let at = RefAt { dataset, kind, name: &name };
                let heads = match self.mode {
                    RefMode::Cas => self.cas_read(&at).await?.heads(),
                    RefMode::Log => self.log_read_entries(&at, entries).await?.heads(),
                };
                Ok::<_, RefError>(RefState { kind, name, heads })
            })
            .buffered(PARALLEL)
            .try_collect()
            .await?;
        Ok(states.into_iter().filter(|state| !state.heads.is_empty()).collect())
    }

    /// Lists the refs that have an object, in log mode with their entry ids.
    async fn ref_names(&self, dataset: &DatasetName) -> Result<BTreeMap<(RefKind, RefName), Vec<String>>, RefError> {
        let part = match self.mode {
            RefMode::Cas => "refs",
            RefMode::Log => "log",
        };
        let prefix = format!("datasets/{dataset}/{part}/");
        let mut names: BTreeMap<_, Vec<String>> = BTreeMap::new();
        for object in list_all(&*self.lake, &prefix).await? {
            let Some((kind, rest)) = object.key.strip_prefix(&prefix).and_then(|rest| rest.split_once('/')) else {
                continue;
            };
            let (name, entry) = match self.mode {
                RefMode::Cas => (rest, None),
                RefMode::Log => rest.rsplit_once('/').map_or((rest, None), |(n, e)| (n, Some(e))),
            };
            let kind = match kind {
                "branch" => RefKind::Branch,
                "tag" => RefKind::Tag,
                _ => continue,
            };
            let Ok(name) = RefName::parse(name) else {
                continue;
            };
            names.entry((kind, name)).or_default().extend(entry.map(str::to_owned));
        }
        Ok(names)
    }

    /// Reads one ref's heads; empty where there is no such ref.
    pub async fn heads(&self, dataset: &DatasetName, kind: RefKind, name: &RefName) -> Result<Vec<Head>, RefError> {
        let at = RefAt { dataset, kind, name };
        match self.mode {
            RefMode::Cas => Ok(self.cas_read(&at).await?.heads()),
            RefMode::Log => Ok(self.log_read(&at).await?.heads()),
        }
    }

    /// Finds the commit that a revision means. Two heads are `Heads`.
    pub async fn resolve(&self, revision: &Revision) -> Result<CommitId, RefError> {
        let dataset = &revision.dataset;
        let found = match &revision.at {
            At::Default => {
                let name = RefName::parse(DEFAULT_BRANCH).expect("the default branch is a name");
                let no_default =
                    || RefError::NoDefault { dataset: dataset.to_string(), branch: DEFAULT_BRANCH.to_owned() };
                let heads = self.heads(dataset, RefKind::Branch, &name).await?;
                only_head(dataset, &name, heads)?.ok_or_else(no_default)
            }
            At::Named(name) => {
                let (tag, branch) =
                    futures::join!(self.heads(dataset, RefKind::Tag, name), self.heads(dataset, RefKind::Branch, name));
                let heads = Some(tag?).filter(|heads| !heads.is_empty());
                let heads = heads.map_or(branch, Ok)?;
                let no_ref = || RefError::NoRef { dataset: dataset.to_string(), name: name.to_string() };
                only_head(dataset, name, heads)?.ok_or_else(no_ref)
            }
            At::Prefix(prefix) => only_commit(dataset, prefix, self.commits(dataset, prefix).await?),
        };
        // What is missing may be the whole dataset: say so.
        let missing =
            matches!(found, Err(RefError::NoDefault { .. } | RefError::NoRef { .. } | RefError::NoCommit { .. }));
        if missing && self.dataset(dataset).await?.is_none() {
            return Err(self.no_dataset(dataset));
        }
        found
    }

    /// Moves (or begins) a branch; gives its heads afterwards: more than one if somebody raced.
    pub async fn move_branch(
        &self,
        dataset: &DatasetName,
        branch: &RefName,
        to: CommitId,
        expect: Expect,
    ) -> Result<Vec<Head>, RefError> {
        let at = RefAt { dataset, kind: RefKind::Branch, name: branch };
        self.refuse_other_kind(&at).await?;
        self.write(&at, Some(to), &expect).await
    }

    /// Makes a tag; one that is there at another commit is moved only with `force`.
    pub async fn tag(
        &self,
        dataset: &DatasetName,
        tag: &RefName,
        commit: CommitId,
        force: bool,
    ) -> Result<Vec<Head>, RefError> {
        let at = RefAt { dataset, kind: RefKind::Tag, name: tag };
        self.refuse_other_kind(&at).await?;
        let exists = |heads: Vec<Head>| match heads.as_slice() {
            [only] if only.commit == commit => Ok(heads),
            _ => Err(RefError::TagExists { dataset: dataset.to_string(), name: tag.to_string(), heads }),
        };
        if force {
            return self.write(&at, Some(commit), &Expect::Any).await;
        }
        match self.write(&at, Some(commit), &Expect::Heads(Vec::new())).await {
            Err(RefError::Conflict { now, .. }) => exists(now),
            written => written,
        }
    }

    /// Deletes a tag or a branch; gives what it was, or `NoRef`.
    pub async fn delete(&self, dataset: &DatasetName, kind: RefKind, name: &RefName) -> Result<Vec<Head>, RefError> {
        let at = RefAt { dataset, kind, name };
        let before = self.heads(dataset, kind, name).await?;
        if before.is_empty() {
            let (dataset, name) = (dataset.to_string(), name.to_string());
            return Err(RefError::NoRef { dataset, name });
        }
        self.write(&at, None, &Expect::Any).await?;
        Ok(before)
    }

    async fn write(&self, at: &RefAt<'_>, to: Option<CommitId>, expect: &Expect) -> Result<Vec<Head>, RefError> {
        match self.mode {
            RefMode::Cas => self.cas_write(at, to, expect).await,
            RefMode::Log => self.log_write(at, to, expect).await,
        }
    }

    /// One name is a tag or a branch. Two who begin both at once are not kept apart: then the tag
    /// wins when the name is resolved.
    async fn refuse_other_kind(&self, at: &RefAt<'_>) -> Result<(), RefError> {
        let other = match at.kind {
            RefKind::Branch => RefKind::Tag,
            RefKind::Tag => RefKind::Branch,
        };
        if self.heads(at.dataset, other, at.name).await?.is_empty() {
            return Ok(());
        }
        let (dataset, name) = (at.dataset.to_string(), at.name.to_string());
        Err(RefError::OtherKind { dataset, name, other })
    }

    /// Notes that the dataset has a commit (before any ref points to it).
    pub async fn add_commit(&self, dataset: &DatasetName, commit: &CommitId) -> Result<(), RefError> {
        let marker = DatasetInfo { format: 1, created_ms: now_ms(), by: self.by.clone() };
        let body = Bytes::from(crate::format::json::encode(&marker));
        self.put(&format!("{}{commit}", commits_prefix(dataset)), body, PutIf::Always).await?;
        Ok(())
    }

    /// Takes the note back (the commit is removed from the dataset).
    pub async fn remove_commit(&self, dataset: &DatasetName, commit: &CommitId) -> Result<(), RefError> {
        let key = format!("{}{commit}", commits_prefix(dataset));
        Ok(with_retry(&RetryPolicy::default(), || self.lake.delete(&key)).await?)
    }

    /// Lists a dataset's commits whose hex begins with `prefix` (empty: all), in order of ids.
    pub async fn commits(&self, dataset: &DatasetName, prefix: &str) -> Result<Vec<CommitId>, RefError> {
        let below = commits_prefix(dataset);
        let objects = list_all(&*self.lake, &format!("{below}{prefix}")).await?;
        let ids = objects.iter().filter_map(|object| object.key.strip_prefix(&below)?.parse().ok());
        Ok(ids.collect())
    }

    async fn put(&self, key: &str, body: Bytes, when: PutIf) -> Result<String, LakeError> {
        let policy = RetryPolicy::default();
        with_retry(&policy, || self.lake.put(key, body.clone(), when.clone())).await
    }
}

fn decode_dataset(key: String, bytes: &[u8]) -> Result<DatasetInfo, RefError> {
    let max = crate::format::refs::REF_LEN_MAX;
    crate::format::json::decode("dataset", bytes, 1, max).map_err(|source| RefError::Damaged { key, source })
}

fn only_head(dataset: &DatasetName, name: &RefName, heads: Vec<Head>) -> Result<Option<CommitId>, RefError> {
    let mut commits: Vec<CommitId> = heads.iter().map(|head| head.commit).collect();
    commits.sort_unstable();
    commits.dedup();
    match commits.as_slice() {
        [] => Ok(None),
        [only] => Ok(Some(*only)),
        _ => Err(RefError::Heads { dataset: dataset.to_string(), name: name.to_string(), heads }),
    }
}

fn only_commit(dataset: &DatasetName, prefix: &str, found: Vec<CommitId>) -> Result<CommitId, RefError> {
    let (dataset, prefix) = (dataset.to_string(), prefix.to_owned());
    match found.as_slice() {
        [] => Err(RefError::NoCommit { dataset, prefix }),
        [only] => Ok(*only),
        _ => Err(RefError::Ambiguous { dataset, prefix, found }),
    }
}
