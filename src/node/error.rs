//! Why the node did not do what was asked, told apart by who can mend it.

use std::path::PathBuf;

use crate::format::grants::{PodPrincipal, Right};
use crate::format::refs::NameError;
use crate::fs::keeper::KeeperError;
use crate::fs::mount::MountError;
use crate::fs::view::ViewError;
use crate::store::catalog::CatalogError;
use crate::store::catalog::grants::GrantsError;
use crate::store::catalog::refs::RefError;
use crate::store::tier::TierError;

use super::api::ApiError;
use super::engine::EngineError;
use super::open::OpenError;
use super::place::PlaceError;
use super::policy::PolicyError;
use super::table::TableError;

/// Why the node did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The daemon of this state directory lives already.
    #[error("a daemon runs already for {} (pid {pid})", state.display())]
    AlreadyRuns { state: PathBuf, pid: String },
    #[error("cannot listen at {}", socket.display())]
    Listen {
        socket: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("there is no group `{group}` (daemon.group)")]
    NoGroup { group: String },
    /// The request contradicts itself.
    #[error("{what}")]
    Wrong { what: String },
    #[error("{}: {why}", dir.display())]
    Dir { dir: PathBuf, why: &'static str, hint: String },
    #[error("{}: {doing}", dir.display())]
    DirIo {
        dir: PathBuf,
        doing: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("user {uid} may not {what}")]
    Denied { uid: u32, what: String },
    #[error("nobody may {what} over the network: ask at its socket, on the machine itself")]
    NotFromHere { what: String },
    #[error("user {uid} may not {right} {dataset}: {by} does not allow it")]
    NotGranted { uid: u32, right: Right, dataset: String, by: &'static str },
    #[error("{pod} may not {right} {dataset}: {by} does not allow it")]
    NotGrantedToPod { pod: PodPrincipal, right: Right, dataset: String, by: &'static str },
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Grants(GrantsError),
    #[error("{} is not a mount of this daemon", dir.display())]
    NotMounted { dir: PathBuf },
    #[error("{} is being mounted or unmounted by another command", dir.display())]
    Busy { dir: PathBuf },
    #[error("no tier is configured, so nothing can be cached")]
    NoTier,
    #[error("there is no tier `{name}`; the daemon knows: {known}")]
    UnknownTier { name: String, known: String },
    #[error("no fill {id} is known")]
    NoFill { id: uuid::Uuid },
    #[error("{open} of {limit} files are open in this daemon: too many for another mount")]
    Descriptors { open: u64, limit: u64 },
    /// Nothing was changed.
    #[error("this daemon stays: {why}")]
    NoUpgrade { why: String },
    #[error("the daemon is stopping")]
    Stopping,
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("{revision} has no directory `{subdir}`")]
    NoSubdir { revision: String, subdir: String },
    #[error("cannot show {revision}")]
    View {
        revision: String,
        #[source]
        source: ViewError,
    },
    #[error("the kernel cannot serve {revision} by itself")]
    Engine {
        revision: String,
        #[source]
        source: Box<EngineError>,
    },
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    #[error(transparent)]
    Tier(#[from] TierError),
    #[error(transparent)]
    Table(#[from] TableError),
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Kv(#[from] crate::store::kv::KvError),
    #[error("{what} ended without a result; the daemon's log says why")]
    Panicked { what: &'static str },
}

impl NodeError {
    /// Gives the HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Self::Wrong { .. } | Self::Dir { .. } | Self::DirIo { .. } | Self::Name(_) | Self::UnknownTier { .. } => {
                400
            }
            Self::Denied { .. } | Self::NotGranted { .. } | Self::NotGrantedToPod { .. } | Self::NotFromHere { .. } => {
                403
            }
            Self::NotMounted { .. } | Self::NoFill { .. } | Self::NoSubdir { .. } => 404,
            Self::Catalog(CatalogError::NoDataset { .. }) => 404,
            Self::Catalog(CatalogError::Refs(
                RefError::NoDataset { .. }
                | RefError::NoRef { .. }
                | RefError::NoDefault { .. }
                | RefError::NoCommit { .. }
                | RefError::Ambiguous { .. }
                | RefError::Heads { .. },
            )) => 404,
            Self::Busy { .. }
            | Self::NoUpgrade { .. }
            | Self::Table(TableError::Taken { .. })
            | Self::Keeper(KeeperError::Busy { .. }) => 409,
            _ => 500,
        }
    }

    /// Gives the next step, where there is one that the message does not say.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Dir { hint, .. } => Some(hint.clone()),
            Self::NotMounted { .. } => Some("`larder mounts` lists what is mounted".to_owned()),
            Self::Engine { revision, source } => source.hint(revision),
            Self::NotGranted { dataset, .. } | Self::NotGrantedToPod { dataset, .. } => {
                Some(format!("`larder grant {dataset}` lists who may; the node's policy is the file of daemon.policy"))
            }
            Self::Descriptors { .. } => {
                Some("raise the limit (LimitNOFILE in the service, `ulimit -n`), or unmount something".to_owned())
            }
            Self::NoTier => Some("set LARDER_TIER to a directory made with `larder tier init`".to_owned()),
            Self::AlreadyRuns { .. } => Some("`larder daemon stop` ends it".to_owned()),
            Self::Mount(_) | Self::Keeper(KeeperError::Refused { .. } | KeeperError::Start { .. }) => {
                Some("`larder doctor` checks what mounting needs".to_owned())
            }
            Self::Open(OpenError::Catalog { .. } | OpenError::Lake { .. } | OpenError::Reach(_)) => {
                Some("`larder doctor` checks whether the lake can be reached".to_owned())
            }
            _ => None,
        }
    }

    /// Makes the answer of it.
    pub fn to_api(&self) -> ApiError {
        let mut causes = Vec::new();
        let mut at = std::error::Error::source(self);
        while let Some(cause) = at {
            causes.push(cause.to_string());
            at = cause.source();
        }
        ApiError { error: self.to_string(), causes, hint: self.hint() }
    }
}
