//! Push: from a directory to a commit, reading each file at most once and uploading nothing twice.
//!
//! ```text
//! walk     lstat everything once, in tree order, into a spool file          (walk, spool)
//! onto     merge with the entries of an existing commit, where asked       (onto)
//! contents read + digest in parallel, pack in tree order, upload           (read, contents, pack, upload)
//! repack   write again what lies in packs that are mostly waste            (reuse)
//! build    blocks of tree and placement from the spool, upload             (build)
//! commit   roots, commit, marker, ref, tag, in this order                  (commit)
//! ```
//!
//! * [`index`]: what this node remembers between pushes of one directory: digests of unchanged
//!   files, where contents lie, uploads that are not finished. One redb file each; no daemon.
//!
//! Invariants: nothing names an object before it is complete; a file whose bytes changed while they
//! were read is never part of a commit; memory and bytes in flight are bounded whatever the tree
//! (`docs/push.md` has the numbers). A push that is killed leaves an intent object, finished parts
//! and the index: the next one goes on from there.
//!
//! Why threads: reading and digesting is blocking work, so it runs on named threads of its own;
//! only uploads run on the tokio runtime. [`push`] blocks its caller.

use std::path::PathBuf;
use std::time::Duration;

use crate::format::commit::Lineage;
use crate::format::ids::{CommitId, TreeId};
use crate::format::pack::Layout;
use crate::format::refs::{DatasetName, RefName, Revision};

mod build;
mod codec;
mod commit;
mod contents;
mod error;
pub(super) mod exclude;
mod index;
mod intent;
mod onto;
mod packs;
mod places;
mod progress;
mod read;
mod recover;
mod reuse;
mod run;
mod spool;
mod sys;
mod upload;
mod walk;

pub use error::{Problem, ProblemKind, PushError};
pub use intent::{IntentBody, intent_key};
pub use progress::{Phase, Progress};
pub use run::push;

/// What is to be pushed, and how.
#[derive(Debug, Clone)]
pub struct PushOptions {
    /// The directory.
    pub dir: PathBuf,
    pub dataset: DatasetName,
    /// None: no message of one's own (an unchanged tree then makes no commit).
    pub message: Option<String>,
    pub tag: Option<RefName>,
    /// None: the default branch, or the one that `onto` names.
    pub branch: Option<RefName>,
    pub meta: Vec<(String, String)>,
    /// What the directory was made from. A job that pushes again what it pushed already makes no commit.
    pub lineage: Lineage,
    /// Globs over paths below `dir`.
    pub excludes: Vec<String>,
    pub onto: Option<Onto>,
    /// Leaves out what cannot be read or held instead of failing.
    pub skip_unreadable: bool,
    /// Leaves out what is neither file, directory nor link; what cannot be read fails all the same.
    pub skip_special: bool,
    /// Who commits: `user@host`.
    pub author: String,
    pub tuning: Tuning,
}

/// The commit that is added to.
#[derive(Debug, Clone)]
pub struct Onto {
    pub rev: Revision,
    /// Where the directory goes; None: its entries are merged into the root.
    pub at: Option<Vec<u8>>,
}

/// Limits of a push; the defaults are for people, others are for tests.
#[derive(Debug, Clone)]
pub struct Tuning {
    /// Threads that read and digest.
    pub readers: usize,
    /// Bytes of files that were read and wait for their turn in a pack.
    pub read_ahead_bytes: u64,
    /// Bytes of parts on their way to the lake.
    pub upload_bytes: u64,
    /// Length of an upload's part, at least.
    pub part_bytes: u64,
    /// A file above this is not held in memory but streamed.
    pub inline_bytes: u64,
    /// A file younger than this when it was read is read again by the next push.
    pub racy: Duration,
    /// Overrides the pack layout that follows from the bytes of the tree.
    pub layout: Option<Layout>,
}

impl Default for Tuning {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(4, std::num::NonZero::get);
        Self {
            readers: (2 * cores).clamp(4, 32),
            read_ahead_bytes: 192 << 20,
            upload_bytes: 96 << 20,
            part_bytes: 8 << 20,
            inline_bytes: 64 << 20,
            racy: Duration::from_secs(2),
            layout: None,
        }
    }
}

impl PushOptions {
    /// Makes options with everything at its default.
    pub fn new(dir: impl Into<PathBuf>, dataset: DatasetName) -> Self {
        Self {
            dir: dir.into(),
            dataset,
            message: None,
            tag: None,
            branch: None,
            meta: Vec::new(),
            lineage: Lineage::default(),
            excludes: Vec::new(),
            onto: None,
            skip_unreadable: false,
            skip_special: false,
            author: String::new(),
            tuning: Tuning::default(),
        }
    }
}

/// What a push did.
#[derive(Debug, Clone, serde::Serialize)]
pub struct PushOutcome {
    pub dataset: String,
    pub commit: CommitId,
    pub tree: TreeId,
    /// Whether the tree was that of the parent already, and no new commit was made.
    pub unchanged: bool,
    pub branch: Option<String>,
    pub tag: Option<String>,
    /// More than one after a race in log mode.
    pub heads: Vec<CommitId>,
    pub files: u64,
    pub dirs: u64,
    pub symlinks: u64,
    /// Logical bytes of the tree.
    pub bytes: u64,
    /// Files whose contents were read, and those bytes.
    pub files_read: u64,
    pub bytes_read: u64,
    /// Bytes of contents that no earlier push had.
    pub new_bytes: u64,
    /// Bytes sent to the lake, of contents and of everything.
    pub uploaded_data_bytes: u64,
    pub uploaded_bytes: u64,
    /// Bytes of contents that lay in the lake already.
    pub reused_bytes: u64,
    pub packs_new: u64,
    pub packs_total: u64,
    /// What was left out (only with `skip_unreadable` or `skip_special`).
    pub skipped: Vec<Problem>,
    /// Files and directories with ACLs or extended attributes, which are not stored.
    pub xattrs_dropped: u64,
    pub elapsed_ms: u64,
}

#[cfg(test)]
mod tests;
