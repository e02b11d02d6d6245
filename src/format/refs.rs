//! Names: datasets, tags, branches, revisions; and what a ref object or a ref log entry holds.
//!
//! A dataset's name is 1 to 100 of `a-z 0-9 . _ -`, beginning with a letter or digit. A tag's or a
//! branch's is the same with upper case and `/` allowed between parts, and may not look like an id
//! prefix (4 to 64 hex digits only). `main` is the branch that a push moves when none is named.

use crate::format::ids::CommitId;

/// The branch that a push without `--branch` moves and a revision without `@` means.
pub const DEFAULT_BRANCH: &str = "main";

/// A checked dataset name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DatasetName(String);

/// A checked tag or branch name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RefName(String);

/// What of a dataset is meant: `xray`, `xray@v2`, `xray@main`, `xray@3fa9c1`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Revision {
    pub dataset: DatasetName,
    pub at: At,
}

/// The part behind the `@`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum At {
    /// Nothing: the head of the default branch.
    Default,
    /// A tag or a branch (a tag wins; push and tag refuse a name that the other kind has).
    Named(RefName),
    /// 4 to 64 hex digits of a commit id.
    Prefix(String),
}

/// Whether a ref is a tag or a branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefKind {
    Branch,
    Tag,
}

/// Says what is wrong with a name and how names look.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind}: {why}")]
pub struct NameError {
    pub kind: &'static str,
    pub text: String,
    pub why: &'static str,
}

impl DatasetName {
    pub fn parse(_text: &str) -> Result<Self, NameError> {
        todo!()
    }
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl RefName {
    pub fn parse(_text: &str) -> Result<Self, NameError> {
        todo!()
    }
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Revision {
    pub fn parse(_text: &str) -> Result<Self, NameError> {
        todo!()
    }
}

/// The value of a ref in `cas` mode (`datasets/<name>/refs/<kind>/<ref>`), JSON.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RefValue {
    pub format: u32,
    pub commit: CommitId,
    /// Unix time in milliseconds of the last move.
    pub time_ms: i64,
    /// Who moved it.
    pub by: String,
}

/// One entry of a ref's log in `log` mode (`datasets/<name>/log/<kind>/<ref>/<entry id>`), JSON,
/// never overwritten. The heads of a ref are the entries that no other entry supersedes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RefLogEntry {
    pub format: u32,
    /// None: a tombstone, the ref was deleted.
    pub commit: Option<CommitId>,
    /// Entry ids that this one replaces.
    pub supersedes: Vec<String>,
    pub time_ms: i64,
    pub by: String,
}
