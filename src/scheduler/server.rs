//! The scheduler's API over a unix socket. Who may connect is decided by the socket's mode and by the
//! peer's credentials; what a caller may do to which job is decided in [`super::core`].

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use base64::Engine as _;
use serde::Deserialize;
use tokio::net::UnixListener;

use super::api::{ExecRequest, LogPart, Refusal, RerunRequest, SchedulerInfo, SnapshotRequest, SubmitRequest, Top};
use super::cluster::TemplateRecord;
use super::core::{Caller, Core, Named};
use super::error::SchedulerError;
use super::executor::ExecPlan;
use super::job::JobSpec;
use super::lake_side::Need;
use super::logfile::read_piece;
use super::registry::{NodeChange, NodeRequest, NodeView, ProjectChange, ProjectView, TemplateView};
use super::service::Handle;
use super::view::JobView;
use super::{check, gpus};
use crate::quota::Snapshot;

/// A piece of a log, at most.
const LOG_PART_BYTES_MAX: u64 = 1 << 20;
/// What a job says of how far it is, at most.
const PROGRESS_BYTES_MAX: u64 = 200;

/// Who is at the other end; None where the kernel does not say.
#[derive(Debug, Clone, Copy)]
pub struct Peer(Option<Caller>);

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let cred = stream.io().peer_cred().ok();
        Self(cred.map(|cred| Caller { uid: cred.uid(), gid: cred.gid() }))
    }
}

impl Peer {
    /// Whoever got through to the socket may ask: its mode, and its group, decided that.
    fn admit(self) -> Result<Caller, SchedulerError> {
        self.0.ok_or(SchedulerError::Denied { uid: u32::MAX, what: "use this scheduler" })
    }
}

#[derive(Debug)]
struct Failure(SchedulerError);

impl From<SchedulerError> for Failure {
    fn from(error: SchedulerError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut causes = Vec::new();
        let mut cause = std::error::Error::source(&self.0);
        while let Some(next) = cause {
            causes.push(next.to_string());
            cause = next.source();
        }
        let status = StatusCode::from_u16(self.0.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let refusal = Refusal { error: self.0.to_string(), causes, hint: self.0.hint().map(str::to_owned) };
        if status.is_server_error() {
            tracing::error!(error = refusal.error, causes = ?refusal.causes, "a request failed");
        }
        (status, Json(refusal)).into_response()
    }
}

type Answer<T> = Result<Json<T>, Failure>;
type Given<T> = Result<Json<T>, JsonRejection>;

#[derive(Debug, Default, Deserialize)]
struct Asked {
    project: Option<String>,
    #[serde(default)]
    force: bool,
    #[serde(default)]
    rank: u32,
    #[serde(default)]
    offset: u64,
}

impl Asked {
    fn named(&self, name: String) -> Named {
        Named { project: self.project.clone(), name }
    }
}

/// Serves until the scheduler is told to stop.
pub async fn serve(
    handle: Handle,
    listener: UnixListener,
    stop: tokio_util::sync::CancellationToken,
) -> std::io::Result<()> {
    let served = Served { handle, stop: stop.clone() };
    let app = router(served).into_make_service_with_connect_info::<Peer>();
    axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await
}

#[derive(Debug, Clone)]
struct Served {
    handle: Handle,
    stop: tokio_util::sync::CancellationToken,
}

fn router(served: Served) -> Router {
    Router::new()
        .route("/v1/info", get(info))
        .route("/v1/projects", get(projects))
        .route("/v1/projects/{name}", post(make_project).patch(change_project).delete(remove_project))
        .route("/v1/nodes", get(nodes).post(add_node))
        .route("/v1/nodes/{name}", patch(change_node).delete(remove_node))
        .route("/v1/jobs", get(jobs).post(submit))
        .route("/v1/jobs/{name}", get(job).delete(delete))
        .route("/v1/jobs/{name}/cancel", post(cancel))
        .route("/v1/jobs/{name}/rerun", post(rerun))
        .route("/v1/jobs/{name}/exec", post(exec))
        .route("/v1/jobs/{name}/snapshot", post(snapshot_job))
        .route("/v1/jobs/{name}/log", get(log))
        .route("/v1/templates", get(templates))
        .route("/v1/templates/{name}", post(set_template).delete(remove_template))
        .route("/v1/top", get(top))
        .route("/v1/snapshot", get(snapshot))
        .route("/v1/stop", post(stop))
        .route("/metrics", get(metrics))
        .fallback(unknown)
        .with_state(served)
}

fn body<T>(given: Given<T>) -> Result<T, SchedulerError> {
    given.map(|Json(value)| value).map_err(|rejection| SchedulerError::Wrong { what: rejection.body_text() })
}

impl Served {
    /// Asks the scheduler's thread something that may be refused.
    async fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Core) -> Result<T, SchedulerError> + Send + 'static,
    ) -> Answer<T> {
        Ok(Json(self.handle.ask(what).await??))
    }
}

impl Served {
    /// Refuses what a caller may not read or make. The lake is asked, so not on the scheduler's thread.
    async fn refuse_without_rights(&self, spec: JobSpec, caller: Caller) -> Result<(), SchedulerError> {
        let lake = self.handle.ask(|core| Arc::clone(&core.lake)).await?;
        aside(move || check::rights(&spec, lake.as_ref(), caller)).await?
    }
}

type At = State<Served>;
type By = ConnectInfo<Peer>;
type Name = UrlPath<String>;

async fn info(State(served): At, ConnectInfo(peer): By) -> Answer<SchedulerInfo> {
    peer.admit()?;
    let told = |core: &mut Core| {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let dir = core.store.dir().to_owned();
        Ok(SchedulerInfo { version, pid: std::process::id(), dir, jobs: core.jobs.len(), cycles: core.cycles })
    };
    served.ask(told).await
}

async fn projects(State(served): At, ConnectInfo(peer): By) -> Answer<Vec<ProjectView>> {
    peer.admit()?;
    served.ask(|core| Ok(core.projects())).await
}

async fn make_project(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    change: Given<ProjectChange>,
) -> Answer<ProjectView> {
    let (caller, change) = (peer.admit()?, body(change)?);
    served.ask(move |core| core.set_project(&name, change, true, caller)).await
}

async fn change_project(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    change: Given<ProjectChange>,
) -> Answer<ProjectView> {
    let (caller, change) = (peer.admit()?, body(change)?);
    served.ask(move |core| core.set_project(&name, change, false, caller)).await
}

async fn remove_project(State(served): At, ConnectInfo(peer): By, UrlPath(name): Name) -> Answer<ProjectView> {
    let caller = peer.admit()?;
    served.ask(move |core| core.remove_project(&name, caller)).await
}

async fn nodes(State(served): At, ConnectInfo(peer): By) -> Answer<Vec<NodeView>> {
    peer.admit()?;
    served.ask(|core| Ok(core.nodes())).await
}

async fn add_node(State(served): At, ConnectInfo(peer): By, node: Given<NodeRequest>) -> Answer<NodeView> {
    let (caller, node) = (peer.admit()?, body(node)?);
    let found = if node.simulated { Vec::new() } else { aside(gpus::discover).await? };
    served.ask(move |core| core.add_node(node, found, caller)).await
}

async fn templates(State(served): At, ConnectInfo(peer): By) -> Answer<Vec<TemplateView>> {
    peer.admit()?;
    served.ask(|core| Ok(core.templates())).await
}

async fn set_template(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    template: Given<TemplateRecord>,
) -> Answer<TemplateView> {
    let (caller, template) = (peer.admit()?, body(template)?);
    served.ask(move |core| core.set_template(&name, template, caller)).await
}

async fn remove_template(State(served): At, ConnectInfo(peer): By, UrlPath(name): Name) -> Answer<TemplateView> {
    let caller = peer.admit()?;
    served.ask(move |core| core.remove_template(&name, caller)).await
}

/// Runs what may block on a thread that may be blocked.
async fn aside<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> Result<T, SchedulerError> {
    tokio::task::spawn_blocking(what).await.map_err(|_| SchedulerError::Stopping)
}

async fn top(State(served): At, ConnectInfo(peer): By) -> Answer<Top> {
    peer.admit()?;
    let (nodes, places) = served.handle.ask(|core| (core.nodes(), core.progress_files())).await?;
    let told = move || {
        let progress = places.into_iter().filter_map(|(job, path)| Some((job, read_progress(&path)?)));
        (gpus::loads(), progress.collect())
    };
    let (loads, progress) = aside(told).await?;
    Ok(Json(Top { nodes, loads, progress }))
}

/// Reads what a job says of how far it is: one line. The file is the job's, so no link is followed.
fn read_progress(path: &Path) -> Option<String> {
    let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK;
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).ok()?;
    file.metadata().ok().filter(std::fs::Metadata::is_file)?;
    let mut bytes = Vec::new();
    file.take(PROGRESS_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().next().unwrap_or_default().trim();
    (!line.is_empty()).then(|| line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}

async fn change_node(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    change: Given<NodeChange>,
) -> Answer<NodeView> {
    let (caller, change) = (peer.admit()?, body(change)?);
    served.ask(move |core| core.change_node(&name, change, caller)).await
}

async fn remove_node(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    Query(asked): Query<Asked>,
) -> Answer<NodeView> {
    let caller = peer.admit()?;
    served.ask(move |core| core.remove_node(&name, asked.force, caller)).await
}

async fn jobs(State(served): At, ConnectInfo(peer): By, Query(asked): Query<Asked>) -> Answer<Vec<JobView>> {
    peer.admit()?;
    served.ask(move |core| Ok(core.list(asked.project.as_deref()))).await
}

async fn submit(State(served): At, ConnectInfo(peer): By, request: Given<SubmitRequest>) -> Answer<JobView> {
    let (caller, request) = (peer.admit()?, body(request)?);
    if !request.spec.host_paths.is_empty() {
        // Looking at them may take as long as a file server that hangs.
        let allowed = served.handle.ask(|core| core.options.host_paths.clone()).await?;
        let spec = request.spec.clone();
        aside(move || check::host_paths(&spec, &allowed)).await??;
    }
    served.refuse_without_rights(request.spec.clone(), caller).await?;
    served.ask(move |core| core.submit(&request.project, &request.name, request.spec, caller)).await
}

async fn job(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    Query(asked): Query<Asked>,
) -> Answer<JobView> {
    peer.admit()?;
    served.ask(move |core| core.look_at(&asked.named(name))).await
}

async fn delete(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    Query(asked): Query<Asked>,
) -> Answer<JobView> {
    let caller = peer.admit()?;
    served.ask(move |core| core.delete(&asked.named(name), caller)).await
}

async fn cancel(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    Query(asked): Query<Asked>,
) -> Answer<JobView> {
    let caller = peer.admit()?;
    served.ask(move |core| core.cancel(&asked.named(name), caller)).await
}

async fn rerun(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    Query(asked): Query<Asked>,
    request: Given<RerunRequest>,
) -> Answer<JobView> {
    let (caller, request) = (peer.admit()?, body(request)?);
    let named = asked.named(name.clone());
    let spec = served.handle.ask(move |core| core.find(&named).map(|job| job.spec.clone())).await??;
    served.refuse_without_rights(spec, caller).await?;
    served.ask(move |core| core.rerun(&asked.named(name), request.name, caller)).await
}

async fn exec(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    Query(asked): Query<Asked>,
    request: Given<ExecRequest>,
) -> Answer<ExecPlan> {
    let (caller, request) = (peer.admit()?, body(request)?);
    served.ask(move |core| core.exec_plan(&asked.named(name), &request, caller)).await
}

async fn snapshot_job(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    Query(asked): Query<Asked>,
    request: Given<SnapshotRequest>,
) -> Answer<JobView> {
    let (caller, request) = (peer.admit()?, body(request)?);
    if let Some(dataset) = request.dataset.clone() {
        let lake = served.handle.ask(|core| Arc::clone(&core.lake)).await?;
        aside(move || check::right(&dataset, Need::Store, lake.as_ref(), caller)).await??;
    }
    served.ask(move |core| core.snapshot_job(&asked.named(name), request.dataset, caller)).await
}

async fn log(
    State(served): At,
    ConnectInfo(peer): By,
    UrlPath(name): Name,
    Query(asked): Query<Asked>,
) -> Answer<LogPart> {
    peer.admit()?;
    let (rank, offset) = (asked.rank, asked.offset);
    // Asked before the file is read: what was printed before the end is in the file then.
    let (path, open) = served.handle.ask(move |core| core.log_of(&asked.named(name), rank)).await??;
    let (begin, bytes) = aside(move || read_log(&path, offset)).await?;
    let next = begin.saturating_add(bytes.len() as u64);
    let last = !open && (bytes.len() as u64) < LOG_PART_BYTES_MAX;
    let base64 = base64::engine::general_purpose::STANDARD.encode(&bytes);
    Ok(Json(LogPart { base64, begin, next, last }))
}

/// Reads a piece of a log and gives where it begins; nothing where there is none (yet).
fn read_log(path: &Path, offset: u64) -> (u64, Vec<u8>) {
    read_piece(path, offset, LOG_PART_BYTES_MAX).unwrap_or_else(|error| {
        tracing::warn!(%error, path = %path.display(), "a job's output can't be read");
        (offset, Vec::new())
    })
}

async fn snapshot(State(served): At, ConnectInfo(peer): By) -> Answer<Snapshot> {
    peer.admit()?;
    served.ask(|core| Ok(core.snapshot())).await
}

async fn stop(State(served): At, ConnectInfo(peer): By) -> Answer<serde_json::Value> {
    let caller = peer.admit()?;
    if !caller.is_master() {
        return Err(SchedulerError::Denied { uid: caller.uid, what: "stop this scheduler" }.into());
    }
    served.handle.stop();
    served.stop.cancel();
    Ok(Json(serde_json::json!({})))
}

async fn metrics(State(served): At, ConnectInfo(peer): By) -> Result<String, Failure> {
    peer.admit()?;
    Ok(served.handle.ask(|core| super::metrics::page(core)).await?)
}

async fn unknown(uri: axum::http::Uri) -> Failure {
    Failure(SchedulerError::Wrong { what: format!("this scheduler has no {uri}; is the client newer?") })
}
