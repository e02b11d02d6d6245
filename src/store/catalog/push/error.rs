//! Why a push fails, and what it lists.

use std::path::PathBuf;

use crate::format::ids::CommitId;
use crate::format::tree::build::BuildError;
use crate::format::tree::nav::NavError;
use crate::store::catalog::open::CatalogError;
use crate::store::catalog::refs::RefError;
use crate::store::lake::LakeError;
use crate::store::meta::MetaError;

/// Why one name cannot be pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// Permission denied, or the file system failed.
    Unreadable,
    Socket,
    Fifo,
    BlockDevice,
    CharDevice,
    /// A name or a path that no tree can hold.
    Name,
    /// It changed, or went away, while it was read.
    Changed,
}

impl ProblemKind {
    /// Says whether it is something that has no contents.
    pub fn is_special(self) -> bool {
        match self {
            Self::Socket | Self::Fifo | Self::BlockDevice | Self::CharDevice => true,
            Self::Unreadable | Self::Name | Self::Changed => false,
        }
    }
}

/// One name that cannot be pushed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// Below the directory; bytes that are not UTF-8 are shown as replacement characters.
    pub path: String,
    pub kind: ProblemKind,
    pub reason: String,
}

impl Problem {
    /// Makes one for a path in bytes.
    pub fn new(path: &[u8], kind: ProblemKind, reason: impl Into<String>) -> Self {
        Self { path: String::from_utf8_lossy(path).into_owned(), kind, reason: reason.into() }
    }
}

/// Why a push failed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    #[error("{}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("`{glob}` is not a glob")]
    Glob {
        glob: String,
        #[source]
        source: globset::Error,
    },
    /// Listed by the command; `--skip-unreadable` leaves them out.
    #[error("{} of the directory's names cannot be pushed; nothing was committed. Leave them out with --exclude or --skip-unreadable", problems.len())]
    Problems { problems: Vec<Problem> },
    #[error("{} files changed while they were read; nothing was committed. Push again when they are at rest", problems.len())]
    Changed { problems: Vec<Problem> },
    #[error("another push of {} to `{dataset}` is running on this node (it holds {}); wait for it", dir.display(), index.display())]
    Busy { dir: PathBuf, dataset: String, index: PathBuf },
    #[error("the push index {} is damaged; remove it and push again (files are then read again)", path.display())]
    Index {
        path: PathBuf,
        #[source]
        source: Box<redb::Error>,
    },
    #[error("the walk's temporary file {} does not read back as written ({why}); is the state directory full or damaged?", path.display())]
    Spool { path: PathBuf, why: &'static str },
    #[error(
        "`{dataset}@{branch}` is at {head}, not at the commit to push onto; name another branch with --branch, or push onto `{dataset}@{branch}`"
    )]
    NotHead { dataset: String, branch: String, head: CommitId },
    #[error("commit {commit} is stored, but `{dataset}@{branch}` moved to another commit meanwhile; push again to put this one behind it, or keep it with `larder branch {dataset} NAME {short}`", short = commit.short())]
    Lost { commit: CommitId, dataset: String, branch: String },
    #[error(
        "commit {commit} is stored and `{dataset}@{branch}` points at it, but the tag `{tag}` exists already and names another commit; choose another with `larder tag`"
    )]
    TagTaken { commit: CommitId, dataset: String, branch: String, tag: String },
    #[error("`{dataset}` has a {kind} named `{name}` already; choose another name")]
    NameTaken { dataset: String, kind: &'static str, name: String },
    #[error("--at {path}: {why}")]
    At { path: String, why: &'static str },
    #[error("a pack that this push relied on is being collected; push again")]
    Condemned,
    #[error("a reading thread ended unexpectedly; please report this")]
    Thread,
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Nav(#[from] NavError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Ref(#[from] RefError),
    #[error(transparent)]
    Meta(#[from] MetaError),
    #[error(transparent)]
    Lake(#[from] LakeError),
}

/// Gives I/O errors the path they belong to.
pub(super) trait AtPath<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T, PushError>;
}

impl<T> AtPath<T> for std::io::Result<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T, PushError> {
        self.map_err(|source| PushError::Io { path: path.into(), source })
    }
}

impl<T> AtPath<T> for nix::Result<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T, PushError> {
        self.map_err(std::io::Error::from).at(path)
    }
}
