//! The control API over a unix socket.
//!
//! Who may connect is decided twice: by the mode of the socket (0600, or 0660 with a group), and by the
//! peer's credentials: root, the daemon's own user, and with a group its members.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use serde::Deserialize;
use tokio::net::UnixListener;
use uuid::Uuid;

use super::api::{
    BindRequest, FillInfo, FillRequest, MountInfo, MountRequest, MountState, NodeInfo, PermitRequest, ResolveInfo,
    ResolveRequest, UmountRequest, UnbindRequest, UncacheInfo, UncacheRequest, UpgradeRequest,
};
use super::daemon::{Daemon, blocking, now_ms};
use super::engine::Served;
use super::error::NodeError;
use super::metrics::{self, Page};
use super::mounting::{Caller, Live};

/// Who is at the other end.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// None where the kernel does not say.
    caller: Option<Caller>,
    /// On this machine.
    is_here: bool,
}

impl Peer {
    /// Somebody elsewhere who has a token: may do what the daemon's own user may, but for what decides which
    /// program runs on this machine.
    pub(super) fn by_token() -> Self {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        Self { caller: Some(Caller { uid, gid }), is_here: false }
    }
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let cred = stream.io().peer_cred().ok();
        Self { caller: cred.map(|cred| Caller { uid: cred.uid(), gid: cred.gid() }), is_here: true }
    }
}

struct Failure(NodeError);

impl<E: Into<NodeError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let api = self.0.to_api();
        let status = StatusCode::from_u16(self.0.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::error!(error = api.error, causes = ?api.causes, "a request failed");
        }
        (status, Json(api)).into_response()
    }
}

type Answer<T> = Result<Json<T>, Failure>;

/// Opens the socket of a daemon that has its lock, so that what is there can only be left over.
pub fn listen(socket: &Path, group: Option<&str>) -> Result<UnixListener, NodeError> {
    let at = |source| NodeError::Listen { socket: socket.to_owned(), source };
    if let Some(dir) = socket.parent() {
        // A group has to get through to the socket, whose own mode decides.
        let mode = if group.is_some() { 0o755 } else { 0o700 };
        std::fs::DirBuilder::new().recursive(true).mode(mode).create(dir).map_err(at)?;
    }
    // Before anybody can connect: a group that is not there must not look like a daemon that dies.
    let group = group.map(find_group).transpose()?;
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(at(error)),
        _ => {}
    }
    // Nobody connects between bind and chmod who may not: the umask leaves only the owner's bits.
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(socket);
    nix::sys::stat::umask(before);
    let listener = bound.map_err(at)?;
    if let Some(group) = group {
        nix::unistd::chown(socket, None, Some(group.gid)).map_err(|errno| at(errno.into()))?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o660)).map_err(at)?;
    }
    Ok(listener)
}

fn find_group(name: &str) -> Result<nix::unistd::Group, NodeError> {
    let found = nix::unistd::Group::from_name(name).ok().flatten();
    found.ok_or_else(|| NodeError::NoGroup { group: name.to_owned() })
}

/// Serves until the daemon stops.
pub async fn serve(daemon: Daemon, listener: UnixListener) -> std::io::Result<()> {
    let stop = daemon.stopping();
    let app = router(daemon).into_make_service_with_connect_info::<Peer>();
    axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await
}

pub(super) fn router(daemon: Daemon) -> Router {
    Router::new()
        .route("/v1/info", get(info))
        .route("/v1/mounts", get(mounts).post(mount))
        .route("/v1/umount", post(umount))
        .route("/v1/permit", post(permit))
        .route("/v1/resolve", post(resolve))
        .route("/v1/bind", post(bind))
        .route("/v1/unbind", post(unbind))
        .route("/v1/fills", post(fill))
        .route("/v1/fills/{id}", get(fill_info).delete(cancel_fill))
        .route("/v1/uncache", post(uncache))
        .route("/v1/stop", post(stop))
        .route("/v1/upgrade", post(upgrade))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_page))
        .fallback(unknown)
        .with_state(daemon)
}

impl Daemon {
    fn admit(&self, peer: Peer) -> Result<Caller, NodeError> {
        let nobody = Caller { uid: u32::MAX, gid: u32::MAX };
        let caller = peer.caller.unwrap_or(nobody);
        if peer.caller.is_some() && (caller.is_master() || self.config().daemon.group.is_some()) {
            return Ok(caller);
        }
        Err(NodeError::Denied { uid: caller.uid, what: "use this daemon".to_owned() })
    }

    /// For what decides which program runs here: nobody does that from elsewhere.
    fn admit_master(&self, peer: Peer, what: &str) -> Result<Caller, NodeError> {
        let caller = self.admit(peer)?;
        if !peer.is_here {
            return Err(NodeError::NotFromHere { what: what.to_owned() });
        }
        if caller.is_master() { Ok(caller) } else { Err(NodeError::Denied { uid: caller.uid, what: what.to_owned() }) }
    }
}

fn body<T>(given: Result<Json<T>, JsonRejection>) -> Result<T, NodeError> {
    given.map(|Json(value)| value).map_err(|rejection| NodeError::Wrong { what: rejection.body_text() })
}

async fn info(State(daemon): State<Daemon>, ConnectInfo(peer): ConnectInfo<Peer>) -> Answer<NodeInfo> {
    daemon.admit(peer)?;
    Ok(Json(daemon.info()))
}

async fn mounts(State(daemon): State<Daemon>, ConnectInfo(peer): ConnectInfo<Peer>) -> Answer<Vec<MountInfo>> {
    daemon.admit(peer)?;
    Ok(Json(daemon.mounts()))
}

async fn mount(
    State(daemon): State<Daemon>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<MountRequest>, JsonRejection>,
) -> Answer<MountInfo> {
    let caller = daemon.admit(peer)?;
    let request = body(request)?;
    // Its own task: a client that goes away does not leave half a mount.
    let made = tokio::spawn(async move { daemon.mount(request, caller).await });
    let made = made.await.map_err(|_| NodeError::Panicked { what: "mounting" })?;
    Ok(Json(made?))
}

async fn umount(
    State(daemon): State<Daemon>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<UmountRequest>, JsonRejection>,
) -> Answer<MountInfo> {
    let caller = daemon.admit(peer)?;
    let request = body(request)?;
    let done = tokio::spawn(async move { daemon.umount(request, caller).await });
    let done = done.await.map_err(|_| NodeError::Panicked { what: "unmounting" })?;
    Ok(Json(done?))
}

async fn permit(
    State(daemon): State<Daemon>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<PermitRequest>, JsonRejection>,
) -> Answer<serde_json::Value> {
    let caller = daemon.admit(peer)?;
    daemon.permits(body(request)?, caller).await?;
    Ok(Json(serde_json::json!({})))
}

async fn resolve(
    State(daemon): State<Daemon>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<ResolveRequest>, JsonRejection>,
) -> Answer<ResolveInfo> {
    daemon.admit_master(peer, "ask on behalf of a pod")?;
    Ok(Json(daemon.resolve(body(request)?).await?))
}

async fn bind(
    State(daemon): State<Daemon>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<BindRequest>, JsonRejection>,
) -> Answer<serde_json::Value> {
    daemon.admit_master(peer, "show a mount elsewhere")?;
    let request = body(request)?;
    let done = tokio::spawn(async move { daemon.bind(request).await });
    done.await.map_err(|_| NodeError::Panicked { what: "showing a mount elsewhere" })??;
    Ok(Json(serde_json::json!({})))
}

async fn unbind(
    State(daemon): State<Daemon>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<UnbindRequest>, JsonRejection>,
) -> Answer<serde_json::Value> {
    daemon.admit_master(peer, "unmount what pods see")?;
    let request = body(request)?;
    let done = tokio::spawn(async move { daemon.unbind(request).await });
    done.await.map_err(|_| NodeError::Panicked { what: "unmounting" })??;
    Ok(Json(serde_json::json!({})))
}

async fn fill(
    State(daemon): State<Daemon>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<FillRequest>, JsonRejection>,
) -> Answer<FillInfo> {
    let caller = daemon.admit(peer)?;
    Ok(Json(daemon.fill(body(request)?, caller).await?))
}

async fn uncache(
    State(daemon): State<Daemon>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<UncacheRequest>, JsonRejection>,
) -> Answer<UncacheInfo> {
    let caller = daemon.admit(peer)?;
    Ok(Json(daemon.uncache(body(request)?, caller).await?))
}

#[derive(Debug, Deserialize)]
struct Wait {
    #[serde(default)]
    wait_ms: u64,
}

async fn fill_info(
    State(daemon): State<Daemon>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    UrlPath(id): UrlPath<Uuid>,
    Query(wait): Query<Wait>,
) -> Answer<FillInfo> {
    daemon.admit(peer)?;
    Ok(Json(daemon.fill_info(id, Duration::from_millis(wait.wait_ms)).await?))
}

async fn cancel_fill(
    State(daemon): State<Daemon>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    UrlPath(id): UrlPath<Uuid>,
) -> Answer<FillInfo> {
    let caller = daemon.admit(peer)?;
    Ok(Json(daemon.cancel_fill(id, caller)?))
}

async fn stop(State(daemon): State<Daemon>, ConnectInfo(peer): ConnectInfo<Peer>) -> Answer<serde_json::Value> {
    daemon.admit_master(peer, "stop this daemon")?;
    daemon.stop();
    Ok(Json(serde_json::json!({})))
}

async fn upgrade(
    State(daemon): State<Daemon>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<UpgradeRequest>, JsonRejection>,
) -> Answer<serde_json::Value> {
    daemon.admit_master(peer, "replace this daemon")?;
    daemon.prepare_upgrade(body(request)?).await?;
    daemon.leave();
    Ok(Json(serde_json::json!({})))
}

/// Says that the daemon answers.
async fn healthz(State(daemon): State<Daemon>, ConnectInfo(peer): ConnectInfo<Peer>) -> Answer<serde_json::Value> {
    daemon.admit(peer)?;
    Ok(Json(serde_json::json!({ "status": "ok" })))
}

/// Says whether everything that should be mounted is: 503 and what is missing where not.
async fn readyz(State(daemon): State<Daemon>, ConnectInfo(peer): ConnectInfo<Peer>) -> Result<Response, Failure> {
    daemon.admit(peer)?;
    let missing = daemon.not_ready();
    let status = if missing.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let word = if missing.is_empty() { "ready" } else { "not ready" };
    Ok((status, Json(serde_json::json!({ "status": word, "missing": missing }))).into_response())
}

async fn metrics_page(State(daemon): State<Daemon>, ConnectInfo(peer): ConnectInfo<Peer>) -> Result<String, Failure> {
    daemon.admit(peer)?;
    Ok(daemon.metrics().await)
}

async fn unknown(uri: axum::http::Uri) -> Failure {
    Failure(NodeError::Wrong { what: format!("this daemon has no {uri}; is the client newer?") })
}

impl Daemon {
    /// Renders all metrics.
    pub async fn metrics(&self) -> String {
        let mut page = Page::default();
        let up_ms = now_ms() - self.inner.started_ms;
        page.add(metrics::UP_SECONDS, &[], up_ms as f64 / 1000.0);
        let mounts = self.mounts();
        for state in [MountState::Mounted, MountState::Mounting, MountState::Failed] {
            let count = mounts.iter().filter(|mount| mount.state == state).count();
            page.add(metrics::MOUNTS, &[&state.to_string()], count as f64);
        }
        page.add(metrics::TAKEN_OVER, &[], self.inner.taken_over.load(Ordering::Relaxed) as f64);
        for ((tier, reason), count) in self.inner.evictions.lock().iter() {
            page.add(metrics::EVICTIONS, &[tier, reason], *count as f64);
        }
        page.add(metrics::LEASES, &[], self.leases() as f64);
        let health = &self.inner.lake_health;
        page.add(metrics::LAKE_TROUBLE, &[], f64::from(u8::from(health.trouble().is_some())));
        page.add(metrics::LAKE_THROTTLED, &[], health.throttled() as f64);
        page.add(metrics::LAKE_RENEWALS, &[], health.renewals() as f64);
        for (kind, times) in health.times() {
            page.times(metrics::LAKE_SECONDS, &[kind], times);
        }
        page.add(metrics::WITHOUT_LEASE, &[], self.mounts_without_lease() as f64);
        for live in self.inner.live.lock().values() {
            if let Live::Mounted(mounted) = live {
                let dir = mounted.row.dir().to_string_lossy();
                page.add(metrics::MOUNT_ENGINE, &[&dir, mounted.served.engine().name()], 1.0);
                if let Served::Fuse(view) = &mounted.served {
                    page.mount(&dir, &view.stats());
                    page.times(metrics::MOUNT_WAIT_SECONDS, &[&dir], view.waits());
                }
            }
        }
        for opened in self.open_tiers() {
            page.fetch(&opened.name, &opened.fetcher.stats());
            if let Some(tier) = opened.tier
                && let Ok(Ok(usage)) = blocking("asking the tier", move || tier.usage()).await
            {
                page.tier(&opened.name, &usage);
            }
        }
        page.render()
    }
}
