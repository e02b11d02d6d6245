//! How the scheduler does, over HTTP: health, metrics, the last decision. Nothing can be changed here.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio_util::sync::CancellationToken;

use super::decide::{Decision, nodes_of};
use super::requests::Requests;
use crate::quota::JobState;
use crate::scheduler::metrics::head;

/// A loop that does not turn for so long hangs.
const HANGS_AFTER: Duration = Duration::from_secs(60);

/// Where the process stands.
const STARTS: u8 = 0;
const WAITS: u8 = 1;
const LEADS: u8 = 2;
const LISTED: u8 = 3;

/// What the scheduler's loop lets others see.
#[derive(Debug)]
pub struct Shared {
    pub requests: Arc<Requests>,
    stage: AtomicU8,
    cycles: AtomicU64,
    begun: Instant,
    /// When the loop turned last, in milliseconds behind `begun`.
    turned_ms: AtomicU64,
    last: Mutex<Option<(Arc<Decision>, Duration)>>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            requests: Arc::default(),
            stage: AtomicU8::new(STARTS),
            cycles: AtomicU64::new(0),
            begun: Instant::now(),
            turned_ms: AtomicU64::new(0),
            last: Mutex::new(None),
        }
    }
}

impl Shared {
    pub fn waits_for_lease(&self) {
        self.stage.store(WAITS, Ordering::Relaxed);
    }

    pub fn leads(&self) {
        self.turns();
        self.stage.store(LEADS, Ordering::Relaxed);
    }

    pub fn has_listed(&self) {
        self.stage.store(LISTED, Ordering::Relaxed);
    }

    /// The loop has turned.
    pub fn turns(&self) {
        let now_ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.turned_ms.store(now_ms, Ordering::Relaxed);
    }

    /// A decision was made.
    pub fn decided(&self, decision: Decision, took: Duration) {
        self.cycles.fetch_add(1, Ordering::Relaxed);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((Arc::new(decision), took));
    }

    /// Gives the last decision.
    pub fn decision(&self) -> Option<Arc<Decision>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(decision, _)| decision.clone())
    }

    /// Gives how long the last decision took, and how many there were.
    pub fn cycles(&self) -> (Duration, u64) {
        let took = self.last.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(_, took)| *took);
        (took.unwrap_or_default(), self.cycles.load(Ordering::Relaxed))
    }

    fn is_leading(&self) -> bool {
        self.stage.load(Ordering::Relaxed) >= LEADS
    }

    fn is_healthy(&self) -> bool {
        let turned = Duration::from_millis(self.turned_ms.load(Ordering::Relaxed));
        !self.is_leading() || self.begun.elapsed().saturating_sub(turned) < HANGS_AFTER
    }

    /// Says whether it does what it should: schedules, or waits until it may.
    pub fn is_ready(&self) -> bool {
        matches!(self.stage.load(Ordering::Relaxed), WAITS | LISTED)
    }

    /// Renders the metrics.
    pub fn metrics(&self) -> String {
        let mut page = String::new();
        let leader = u8::from(self.is_leading());
        head(&mut page, "larder_scheduler_kube_leader", "gauge", "1 where this process holds the lease.");
        let _ = writeln!(page, "larder_scheduler_kube_leader {leader}");
        if let Some(decision) = self.decision() {
            projects(&mut page, &decision);
            nodes(&mut page, &decision);
            pods(&mut page, &decision);
        }
        let (took, cycles) = self.cycles();
        head(&mut page, "larder_scheduler_cycles_total", "counter", "Decisions since the start.");
        let _ = writeln!(page, "larder_scheduler_cycles_total {cycles}");
        head(&mut page, "larder_scheduler_cycle_seconds", "gauge", "How long the last decision took.");
        let _ = writeln!(page, "larder_scheduler_cycle_seconds {}", took.as_secs_f64());
        let name = "larder_scheduler_kube_requests_total";
        head(&mut page, name, "counter", "Requests to the API server by what they are for; code 0: no answer.");
        for ((verb, code), count) in self.requests.counts() {
            let _ = writeln!(page, "{name}{{verb=\"{}\",code=\"{code}\"}} {count}", verb.word());
        }
        page
    }
}

fn projects(page: &mut String, decision: &Decision) {
    let name = "larder_scheduler_project_gpus";
    head(page, name, "gauge", "GPUs of a project: its quota, its fair share, what it has.");
    for project in &decision.snapshot.projects {
        let Some(status) = decision.statuses.get(project.id.as_str()) else {
            continue;
        };
        let whats = [("quota", project.quota), ("fair_share", status.fair_share), ("allocated", status.allocated)];
        for (what, amount) in whats {
            let (id, gpus) = (&project.id, amount.0 as f64 / 1000.0);
            let _ = writeln!(page, "{name}{{project=\"{id}\",what=\"{what}\"}} {gpus}");
        }
    }
}

fn nodes(page: &mut String, decision: &Decision) {
    let name = "larder_scheduler_node_gpus";
    head(page, name, "gauge", "GPUs of a node: all of them, and those in use.");
    for (node, (all, used)) in nodes_of(&decision.snapshot) {
        let used = used.0 as f64 / 1000.0;
        let _ = writeln!(page, "{name}{{node=\"{node}\",what=\"all\"}} {all}");
        let _ = writeln!(page, "{name}{{node=\"{node}\",what=\"allocated\"}} {used}");
    }
}

fn pods(page: &mut String, decision: &Decision) {
    let name = "larder_scheduler_kube_jobs";
    head(page, name, "gauge", "Pods and gangs by what they do.");
    let count = |counts: fn(&JobState) -> bool| decision.snapshot.jobs.iter().filter(|job| counts(&job.state)).count();
    let waiting = count(|state| matches!(state, JobState::Waiting));
    let running = count(|state| matches!(state, JobState::Running { .. }));
    let stopping = count(|state| matches!(state, JobState::Stopping { .. }));
    for (state, count) in [("waiting", waiting), ("bound", running), ("stopping", stopping)] {
        let _ = writeln!(page, "{name}{{state=\"{state}\"}} {count}");
    }
}

/// Serves until it is told to stop.
pub async fn serve(listener: tokio::net::TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/snapshot", get(snapshot))
        .route("/v1/plan", get(plan))
        .with_state(shared);
    let serving = axum::serve(listener, router).with_graceful_shutdown(async move { stop.cancelled().await });
    if let Err(error) = serving.await {
        tracing::error!(%error, "the scheduler does not serve its metrics any more");
    }
}

fn status(is_well: bool) -> Response {
    match is_well {
        true => (StatusCode::OK, "ok\n").into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not now\n").into_response(),
    }
}

async fn healthz(State(shared): State<Arc<Shared>>) -> Response {
    status(shared.is_healthy())
}

async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    status(shared.is_ready())
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    ([("content-type", "text/plain; version=0.0.4")], shared.metrics()).into_response()
}

async fn snapshot(State(shared): State<Arc<Shared>>) -> Response {
    match shared.decision() {
        Some(decision) => axum::Json(&decision.snapshot).into_response(),
        None => status(false),
    }
}

async fn plan(State(shared): State<Arc<Shared>>) -> Response {
    match shared.decision() {
        Some(decision) => axum::Json(&decision.plan).into_response(),
        None => status(false),
    }
}
