//! The control API: requests and answers, as JSON over HTTP on the daemon's socket.
//!
//! ```text
//! GET    /v1/info               who the daemon is and what it serves
//! POST   /v1/mounts             MountRequest -> MountInfo
//! GET    /v1/mounts             [MountInfo]
//! POST   /v1/resolve            ResolveRequest -> ResolveInfo; this and the next two for the daemon's own user
//! POST   /v1/bind               BindRequest; shows a mount at another directory too
//! POST   /v1/unbind             UnbindRequest
//! POST   /v1/umount             UmountRequest -> MountInfo
//! POST   /v1/permit             PermitRequest; 200 where that is allowed, 403 where not
//! POST   /v1/fills              FillRequest -> FillInfo
//! GET    /v1/fills/{id}?wait_ms=N   FillInfo, when something changed or the time is over
//! DELETE /v1/fills/{id}         ends a fill
//! POST   /v1/uncache            UncacheRequest -> UncacheInfo
//! POST   /v1/stop               ends the daemon
//! POST   /v1/upgrade            UpgradeRequest; ends the daemon for another one that takes its mounts over
//! GET    /healthz               200 while the daemon answers
//! GET    /readyz                200 when everything that should be mounted is; else 503 and what is missing
//! GET    /metrics               Prometheus text
//! ```
//!
//! An error is an `ApiError` with a status of 400 (asked wrongly), 403, 404, 409 (in the way) or 500. A
//! version of the API only ever gets more fields; what a field means does not change.
//!
//! `for_user` asks in the name of somebody else: what that user may counts, and what is mounted is shown as theirs.
//! Only root and the daemon's own user may ask so. A daemon of before there was this field refuses it (400), as any
//! field that it does not know.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::mounting::Caller;
use super::table::{MountOptions, Owner};
use crate::config::{EngineChoice, PrefetchLevel, Span, VerifyLevel};
use crate::format::grants::{PodPrincipal, Right};
use crate::format::ids::{CommitId, NodeId};
use crate::fs::session::MountStats;

/// Version of the API, in each path.
pub const API_VERSION: u32 = 1;

/// What the daemon is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    pub api: u32,
    pub version: String,
    pub pid: u32,
    pub uid: u32,
    pub node: NodeId,
    pub lake: String,
    #[serde(default)]
    pub endpoint: Option<String>,
    /// Why the lake has not answered the last requests; None: it has.
    #[serde(default)]
    pub lake_problem: Option<String>,
    /// Unix time in milliseconds of the first of them.
    #[serde(default)]
    pub lake_problem_since_ms: Option<i64>,
    pub state: PathBuf,
    pub started_ms: i64,
    pub tiers: Vec<TierInfo>,
    /// Its file.
    #[serde(default)]
    pub program: PathBuf,
    /// Whether it has tried all of its mounts.
    #[serde(default)]
    pub ready: bool,
}

/// What the daemon knows of a tier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierInfo {
    pub name: String,
    pub path: PathBuf,
    pub default: bool,
    /// Why it cannot be used; None where it can, or was not needed yet.
    #[serde(default)]
    pub problem: Option<String>,
}

/// Mount a revision at a directory; what is None is the daemon's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    pub revision: String,
    pub dir: PathBuf,
    #[serde(default)]
    pub subdir: Option<String>,
    #[serde(default)]
    pub engine: Option<EngineChoice>,
    #[serde(default)]
    pub verify: Option<VerifyLevel>,
    #[serde(default)]
    pub prefetch: Option<PrefetchLevel>,
    #[serde(default)]
    pub uid: Option<u32>,
    #[serde(default)]
    pub gid: Option<u32>,
    #[serde(default)]
    pub umask: Option<u32>,
    #[serde(default)]
    pub file_mode: Option<u32>,
    #[serde(default)]
    pub dir_mode: Option<u32>,
    #[serde(default)]
    pub allow_other: Option<bool>,
    #[serde(default)]
    pub tier: Option<String>,
    #[serde(default)]
    pub ttl: Option<Span>,
    /// Makes the directory where it is missing.
    #[serde(default)]
    pub mkdir: bool,
    /// Covers a directory that is not empty.
    #[serde(default)]
    pub nonempty: bool,
    /// For whom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_user: Option<Caller>,
}

/// Asks whether somebody may do something with a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PermitRequest {
    pub dataset: String,
    pub right: Right,
    /// None: who asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_user: Option<Caller>,
}

/// What a revision is now, and whether a pod may have it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    pub revision: String,
    /// On whose behalf; None: the caller's own.
    #[serde(default)]
    pub pod: Option<PodPrincipal>,
    /// What is to be done with it.
    #[serde(default)]
    pub rights: Vec<Right>,
}

/// What a revision is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolveInfo {
    pub dataset: String,
    pub commit: CommitId,
}

/// Show a mount at another directory too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BindRequest {
    pub dir: PathBuf,
    pub target: PathBuf,
}

/// Take it away there again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnbindRequest {
    pub target: PathBuf,
    /// Also where it is in use: what is open goes on.
    #[serde(default)]
    pub force: bool,
}

/// How a mount does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountState {
    Mounting,
    Mounted,
    Failed,
}

impl std::fmt::Display for MountState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Mounting => "mounting",
            Self::Mounted => "mounted",
            Self::Failed => "failed",
        })
    }
}

/// A mount, by one of its attachments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountInfo {
    pub id: Uuid,
    pub dir: PathBuf,
    pub dataset: String,
    pub revision: String,
    pub commit: CommitId,
    pub state: MountState,
    /// Why it failed.
    #[serde(default)]
    pub reason: Option<String>,
    pub owner: Owner,
    pub since_ms: i64,
    pub options: MountOptions,
    /// What serves it now: fuse or kernel; None where it is not mounted.
    #[serde(default)]
    pub engine: Option<EngineChoice>,
    /// Entries and bytes of the whole commit; None where it is not open.
    #[serde(default)]
    pub entries: Option<u64>,
    #[serde(default)]
    pub bytes: Option<u64>,
    /// What it has done since this daemon serves it.
    #[serde(default)]
    pub stats: Option<MountStats>,
}

/// Unmount a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UmountRequest {
    pub dir: PathBuf,
    /// Also where it is in use: what is open fails.
    #[serde(default)]
    pub force: bool,
}

/// End for another daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpgradeRequest {
    /// Its file, absolute.
    pub program: PathBuf,
    /// With which it is started.
    pub args: Vec<String>,
    /// The hand-over that it knows (`fs::session::HANDOVER`).
    pub handover: u32,
}

/// Bring a revision into a tier.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FillRequest {
    pub revision: String,
    #[serde(default)]
    pub tier: Option<String>,
    /// Some(true): keep; Some(false): no longer; None: as it is.
    #[serde(default)]
    pub keep: Option<bool>,
    #[serde(default)]
    pub ttl: Option<Span>,
    /// Changes `keep` and `ttl` of what is cached, and fetches nothing.
    #[serde(default)]
    pub only_settings: bool,
}

/// How a fill does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FillInfo {
    pub id: Uuid,
    pub dataset: String,
    pub commit: CommitId,
    pub tier: String,
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub packs_done: u64,
    pub packs_total: u64,
    pub finished: bool,
    /// Why it ended early.
    #[serde(default)]
    pub error: Option<String>,
}

/// Remove a revision from a tier now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UncacheRequest {
    pub revision: String,
    #[serde(default)]
    pub tier: Option<String>,
}

/// What left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UncacheInfo {
    pub dataset: String,
    pub commit: CommitId,
    pub tier: String,
    /// Bytes that no other cached commit needs: deleted after the tier's grace time.
    pub freed_bytes: u64,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    pub error: String,
    /// The causes, outermost first.
    #[serde(default)]
    pub causes: Vec<String>,
    #[serde(default)]
    pub hint: Option<String>,
}
