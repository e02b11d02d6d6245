//! Why the tier did not do what was asked, told apart by what the caller can do about it.
//!
//! A reader never sees one of these: [`TierError::is_full`] stops staging and lets reads go on from
//! the lake, everything else sends that one read to the lake.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::format::ids::{CommitId, PackId};

/// Why the tier did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum TierError {
    /// The directory was never made a tier, or the export that has it is not mounted.
    #[error(
        "{}: no tier here (no larder-tier.json): mount the export that has it, or make it one with `larder tier init {}`",
        dir.display(), dir.display()
    )]
    NoMarker { dir: PathBuf },
    /// The directory is one already.
    #[error("{}: is a tier already (tier {tier}); nothing was changed", dir.display())]
    AlreadyTier { dir: PathBuf, tier: String },
    /// Somebody's files lie there.
    #[error("{}: not empty (`{name}`), so it is not made a tier; give an empty directory", dir.display())]
    NotEmpty { dir: PathBuf, name: String },
    /// A marker that is no marker of ours.
    #[error("{}: larder-tier.json is damaged; restore it, or clear the directory and run `larder tier init`", dir.display())]
    BadMarker {
        dir: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    /// Made by a newer larder.
    #[error("{}: the tier has format {found}, this larder knows up to {known}; use a newer larder", dir.display())]
    NewerFormat { dir: PathBuf, found: u32, known: u32 },
    /// What was there is not there any more (ENOENT, ESTALE, EBADF of a lost open).
    #[error("{path}: gone from the tier; reads go on from the lake")]
    Gone {
        path: String,
        #[source]
        source: io::Error,
    },
    /// ENOSPC, EDQUOT, or the configured capacity is used up.
    #[error(
        "{path}: the tier is full; free some with `larder uncache` or raise its capacity; reads go on from the lake"
    )]
    Full {
        path: String,
        #[source]
        source: io::Error,
    },
    /// We may read here, but not write (EROFS, EACCES, EPERM).
    #[error("{path}: the tier does not let us write; check the export's mode and owner")]
    ReadOnly {
        path: String,
        #[source]
        source: io::Error,
    },
    /// Everything else that the file system says: EIO and the like.
    #[error("{path}: the tier failed to {op}")]
    Io {
        op: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    /// A staged pack has another length than it must have.
    #[error("pack {pack}: staged with {found} bytes instead of {expected}; it was not published")]
    WrongSize { pack: PackId, expected: u64, found: u64 },
    /// A staged pack lacks a span.
    #[error("pack {pack}: span {span} has not arrived; it was not published")]
    Incomplete { pack: PackId, span: u32 },
    /// A write outside of the pack.
    #[error("pack {pack}: {len} bytes at {offset} lie outside of its {pack_len}")]
    OutOfRange { pack: PackId, offset: u64, len: u64, pack_len: u64 },
    /// Published objects carry their index, so that scrubbing needs no commit.
    #[error("pack {pack}: its index is not in the tier; put it before you publish")]
    NoIndex { pack: PackId },
    /// A sidecar that is not the pack's.
    #[error("pack {pack}: what was given as its {part} is not its {part}")]
    BadSidecar { pack: PackId, part: &'static str },
    /// A file of ours that we cannot parse.
    #[error("{path}: damaged ({problem}); `larder tier check --repair` removes it")]
    BadFile { path: String, problem: String },
    /// The commit has no record here.
    #[error("commit {commit}: not cached in this tier; bring it with `larder cache`")]
    NotCached { commit: CommitId },
    /// The commit cannot leave.
    #[error("commit {commit}: {why}")]
    Busy { commit: CommitId, why: String },
    /// A name that cannot be a file name here.
    #[error("`{name}` cannot be a name in the tier: letters, digits, `.`, `_` and `-` only")]
    BadName { name: String },
    /// Others changed the same names all the time.
    #[error("{path}: lost a race {times} times; try again")]
    Contended { path: String, times: u32 },
}

impl TierError {
    /// Sorts an error of the file system.
    pub(crate) fn io(op: &'static str, path: &str, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT | Errno::ESTALE | Errno::EBADF) => Self::Gone { path, source },
            Some(Errno::ENOSPC | Errno::EDQUOT) => Self::Full { path, source },
            Some(Errno::EROFS | Errno::EACCES | Errno::EPERM) => Self::ReadOnly { path, source },
            _ => Self::Io { op, path, source },
        }
    }

    /// Says whether there is no room: stop staging, go on reading.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }

    /// Says whether what was asked for is simply not there any more.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }

    /// The error of the file system below, where there is one.
    pub fn os_error(&self) -> Option<i32> {
        match self {
            Self::Gone { source, .. }
            | Self::Full { source, .. }
            | Self::ReadOnly { source, .. }
            | Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

impl From<TierError> for io::Error {
    fn from(error: TierError) -> Self {
        match error.os_error() {
            Some(code) => Self::from_raw_os_error(code),
            None => Self::other(error),
        }
    }
}
