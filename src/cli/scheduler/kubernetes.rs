//! `larder scheduler kube`: places the pods of a cluster by the quotas of their projects.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;

use crate::cli::Context;
use crate::scheduler::kubernetes::lease::Times;
use crate::scheduler::kubernetes::run::{Options, run};
use crate::scheduler::kubernetes::serve::{Shared, serve};
use crate::scheduler::kubernetes::{KubeError, connect};

/// Flags of `larder scheduler kube`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder scheduler kube
  larder scheduler kube --context training --no-lease --listen 127.0.0.1:9475
  larder scheduler kube --lease-namespace larder --requests-per-second 200

It places pods with `schedulerName: larder`, and reads and writes nothing but the API server of the cluster:
docs/formats/kube-scheduler.md. Several of them may run; the one that holds the lease decides.")]
pub struct KubeArgs {
    /// Reads this kubeconfig (default: KUBECONFIG, ~/.kube/config, or the service account of the pod)
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Takes this context of the kubeconfig
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Places pods that name this scheduler
    #[arg(long, value_name = "NAME", default_value = "larder")]
    name: String,
    /// The resource by which pods ask for GPUs
    #[arg(long, value_name = "RESOURCE", default_value = "nvidia.com/gpu")]
    gpu_resource: String,
    /// The label of a node that names its pool
    #[arg(long, value_name = "LABEL", default_value = "larder.io/pool")]
    pool_label: String,
    /// Namespace of the lease (default: that of the pod, or of the context)
    #[arg(long, value_name = "NAMESPACE")]
    lease_namespace: Option<String>,
    /// Name of the lease that one of several schedulers holds
    #[arg(long, value_name = "NAME", default_value = "larder-scheduler")]
    lease: String,
    /// Takes no lease: this is the only one
    #[arg(long)]
    no_lease: bool,
    /// Name of this process in the lease (default: the host's)
    #[arg(long, value_name = "NAME")]
    identity: Option<String>,
    /// Bindings and evictions in a second, at most; what is told to people has a quarter of that beside it
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000), alias = "qps")]
    requests_per_second: u32,
    /// Bindings and evictions that may be under way or follow at once
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    burst: u32,
    /// Serves health, metrics and the last decision here
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:9475")]
    listen: SocketAddr,
}

/// Runs the command.
pub fn serve_until_stopped(ctx: &Context, args: &KubeArgs) -> anyhow::Result<()> {
    ctx.block_on(work(args))
}

async fn work(args: &KubeArgs) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let (client, namespace) = connect(args.kubeconfig.as_deref(), args.context.as_deref()).await?;
    let host = nix::sys::utsname::uname().map(|names| names.nodename().to_string_lossy().into_owned());
    let name = args.identity.clone().or(host.ok()).unwrap_or_else(|| "larder".to_owned());
    let options = Options {
        scheduler_name: args.name.clone(),
        gpu_resource: args.gpu_resource.clone(),
        pool_label: args.pool_label.clone(),
        lease: (!args.no_lease).then(|| (args.lease_namespace.clone().unwrap_or(namespace), args.lease.clone())),
        times: Times::default(),
        // Whoever starts again under the same name is another one: what the one before asked for may still be under way.
        identity: format!("{name}_{}", uuid::Uuid::new_v4()),
        requests_per_second: f64::from(args.requests_per_second),
        burst: args.burst,
    };
    let address = args.listen;
    let listener = tokio::net::TcpListener::bind(address).await;
    let listener = listener.map_err(|source| KubeError::Listen { address, source })?;
    let (shared, stop) = (Arc::new(Shared::default()), CancellationToken::new());
    let serving = tokio::spawn(serve(listener, shared.clone(), stop.clone()));
    let signalled = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::info!("told to stop");
        signalled.cancel();
    });
    let ended = run(client, &options, shared, stop.clone()).await;
    stop.cancel();
    serving.abort();
    Ok(ended?)
}
