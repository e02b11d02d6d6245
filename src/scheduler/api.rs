//! The requests and answers of the scheduler's API, as JSON over HTTP on a unix socket.
//!
//! ```text
//! GET    /v1/info                              who the scheduler is
//! GET    /v1/projects                          [ProjectView]
//! POST   /v1/projects/{name}                   ProjectChange -> ProjectView; makes it
//! PATCH  /v1/projects/{name}                   ProjectChange -> ProjectView
//! DELETE /v1/projects/{name}                   ProjectView
//! GET    /v1/nodes                             [NodeView]
//! POST   /v1/nodes                             NodeRequest -> NodeView
//! PATCH  /v1/nodes/{name}                      NodeChange -> NodeView
//! DELETE /v1/nodes/{name}?force=true           NodeView
//! GET    /v1/jobs?project=P                    [JobView]
//! POST   /v1/jobs                              SubmitRequest -> JobView
//! GET    /v1/jobs/{name}?project=P             JobView
//! DELETE /v1/jobs/{name}?project=P             JobView, as it was
//! POST   /v1/jobs/{name}/cancel?project=P      JobView
//! POST   /v1/jobs/{name}/rerun?project=P       RerunRequest -> JobView
//! POST   /v1/jobs/{name}/exec?project=P        ExecRequest -> ExecPlan
//! POST   /v1/jobs/{name}/snapshot?project=P    SnapshotRequest -> JobView: begins one, the last of its list
//! GET    /v1/jobs/{name}/log?project=P&rank=R&offset=N   LogPart
//! GET    /v1/templates                         [TemplateView]
//! POST   /v1/templates/{name}                  TemplateRecord -> TemplateView; makes it, or replaces it
//! DELETE /v1/templates/{name}                  TemplateView
//! GET    /v1/top                               Top: who uses which GPU, how busy it is, how far each job is
//! GET    /v1/snapshot                          what the next decision starts from (quota's Snapshot)
//! POST   /v1/stop                              ends the scheduler; jobs go on
//! GET    /metrics                              Prometheus text
//! ```
//!
//! Errors are as the daemon's: `error`, `causes`, `hint`, with a status of 400, 403, 404, 409 or 500.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::gpus::GpuLoad;
use super::job::JobSpec;
use super::registry::NodeView;

/// Who the scheduler is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchedulerInfo {
    pub version: String,
    pub pid: u32,
    pub dir: PathBuf,
    pub jobs: usize,
    pub cycles: u64,
}

/// A job to submit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubmitRequest {
    pub project: String,
    pub name: String,
    pub spec: JobSpec,
}

/// A job to submit again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RerunRequest {
    #[serde(default)]
    pub name: Option<String>,
}

/// A snapshot of a job that is to be stored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// None: the job's own.
    #[serde(default)]
    pub dataset: Option<String>,
}

/// Who uses which GPU now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Top {
    pub nodes: Vec<NodeView>,
    /// Of the GPUs of this machine, where the driver tells.
    pub loads: Vec<GpuLoad>,
    /// What running jobs say of how far they are, by `project/name`.
    pub progress: BTreeMap<String, String>,
}

/// A command to run beside a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    pub argv: Vec<String>,
    #[serde(default)]
    pub rank: u32,
    /// Somebody types in a terminal.
    #[serde(default)]
    pub terminal: bool,
}

/// A piece of what a job printed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPart {
    /// The bytes, as base64: a job prints what it likes.
    pub base64: String,
    /// Where they begin: behind what was asked for where the log has given up that.
    #[serde(default)]
    pub begin: u64,
    /// Where the next piece begins.
    pub next: u64,
    /// Nothing comes behind this piece any more.
    pub last: bool,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub error: String,
    #[serde(default)]
    pub causes: Vec<String>,
    #[serde(default)]
    pub hint: Option<String>,
}
