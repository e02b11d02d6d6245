//! What the scheduler needs of the data: commits mounted, warmed and made. The scheduler does not know a
//! lake; whoever runs it gives it this, which speaks with the node's daemon as any client does.

use std::path::{Path, PathBuf};

use super::job::Submitter;

/// Why something with data did not work; told to the job's owner with its causes.
pub type DataError = Box<dyn std::error::Error + Send + Sync>;

/// A directory that is to become a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCommit {
    pub dir: PathBuf,
    pub dataset: String,
    pub message: String,
    /// A JSON file with the metadata: it may hold what no command line should show.
    pub meta_file: PathBuf,
    /// Commits that it was made from, as `dataset@commit`.
    pub inputs: Vec<String>,
    /// The job's id.
    pub job: String,
    pub image: Option<String>,
    pub code: Option<String>,
    /// Whose it is, and so who has to be allowed to make it; None: the scheduler's own user.
    pub user: Option<Submitter>,
}

/// What a job does with a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    Read,
    Store,
}

/// Mounts, warms and makes commits. Calls may take long and come from several threads.
///
/// The scheduler may do more than those who submit jobs to it, so it says for whom it asks; nobody: its own user.
pub trait LakeSide: Send + Sync + std::fmt::Debug {
    /// Says whether a user may do that with a dataset.
    fn permit(&self, dataset: &str, need: Need, user: Submitter) -> Result<(), DataError>;

    /// Mounts a commit at a directory, made where it is missing. Done already: fine, if the user may still see it.
    fn mount(&self, dataset: &str, commit: &str, dir: &Path, user: Option<Submitter>) -> Result<(), DataError>;

    /// Says whether what failed so fails for ever: there is no such commit, or the user may not. Otherwise it is tried
    /// again.
    fn is_final(&self, error: &DataError) -> bool;

    /// Unmounts a directory. Not mounted: fine.
    fn umount(&self, dir: &Path) -> Result<(), DataError>;

    /// Begins to bring a commit near; does not wait.
    fn warm(&self, dataset: &str, commit: &str) -> Result<(), DataError>;

    /// Gives the command that makes a commit and prints it as JSON; it is run in the scheduler's environment. Run again
    /// for the same job after it succeeded, it must find the commit and make no other.
    fn push(&self, commit: &NewCommit) -> Vec<String>;
}
