//! `larder scheduler run` and what asks it how it does.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use http::Method;

use super::broker;
use super::client::{self, Client};
use super::data::DaemonSide;
use crate::cli::Context;
use crate::cli::report::{HintExt as _, usage};
use crate::config::Size;
use crate::node::daemon::own_exe;
use crate::node::server::listen;
use crate::scheduler::api::SchedulerInfo;
use crate::scheduler::core::Options;
use crate::scheduler::executor::Containers;
use crate::scheduler::gpus::mps_pipes;
use crate::scheduler::{server, service};

/// How long running requests may take to end when the scheduler stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long `scheduler stop` waits for the end.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Flags of `larder scheduler run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder scheduler run
  larder scheduler run --dir /var/lib/larder/scheduler --host-path /srv/scratch
  larder scheduler run --engine podman --engine-arg=--network=none

There is one scheduler for each directory. Jobs have supervisors of their own: they go on when the
scheduler ends or is killed, and the next one takes them up. A service manager must not kill them with it
(systemd: KillMode=process).")]
pub struct RunArgs {
    /// Where records, logs and work of the jobs lie (default: `scheduler` in the state directory)
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Lets jobs see this path of the machine and what lies below it (repeatable)
    #[arg(long, value_name = "PATH")]
    host_path: Vec<PathBuf>,
    /// Runs containers with this engine: podman or docker (default: the one that is installed)
    #[arg(long, value_name = "NAME")]
    engine: Option<String>,
    /// Gives the engine's `run` this argument (repeatable)
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    engine_arg: Vec<String>,
    /// Longest grace time that a job may ask for
    #[arg(long, value_name = "TIME", default_value = "1h")]
    grace_max: humantime::Duration,
    /// Does not bring a waiting job's commits into the cache
    #[arg(long)]
    no_warm: bool,
    /// How long what a process prints may grow before its beginning is given up
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    log_max: Size,
    /// How long a job that is over is remembered, with its logs and files; 0s: for ever
    #[arg(long, value_name = "TIME", default_value = "90d")]
    keep: humantime::Duration,
}

/// Runs the command.
pub fn run(ctx: &Context, args: &RunArgs) -> anyhow::Result<()> {
    let dir = args.dir.clone().unwrap_or_else(|| ctx.config().state.join("scheduler"));
    let mut host_paths = Vec::new();
    for path in &args.host_path {
        // Users write what the flag says, or where that leads.
        host_paths.push(std::path::absolute(path).with_context(|| format!("cannot find {}", path.display()))?);
        host_paths.push(std::fs::canonicalize(path).with_context(|| format!("cannot find {}", path.display()))?);
    }
    let containers = engine(args)?.map(|engine| Containers { engine, args: args.engine_arg.clone() });
    let dir = std::path::absolute(dir).context("cannot tell where the directory is")?;
    let grace_max = args.grace_max.into();
    let keep: Duration = args.keep.into();
    let options = Options {
        dir,
        exe: own_exe(),
        containers,
        host_paths,
        grace_max,
        warm: !args.no_warm,
        log_bytes_max: args.log_max.0,
        keep: (!keep.is_zero()).then_some(keep),
        mps_pipes: mps_pipes(),
    };
    ctx.block_on(serve_until_stopped(ctx, options))
}

fn engine(args: &RunArgs) -> anyhow::Result<Option<String>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = |name: &str| std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    match &args.engine {
        Some(name) if name.contains('/') || installed(name) => Ok(Some(name.clone())),
        Some(name) => usage(format!("there is no {name} in the PATH")),
        None => Ok(["podman", "docker"].into_iter().find(|name| installed(name)).map(str::to_owned)),
    }
}

async fn serve_until_stopped(ctx: &Context, options: Options) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let socket = client::socket(ctx);
    let rt = tokio::runtime::Handle::current();
    let data = DaemonSide { rt, reach: ctx.daemon_reach(), config_args: ctx.config_args() };
    let opened = service::open(options, Arc::new(data))?;
    let _socket_lock = service::lock_socket(&socket)?;
    // Behind the locks of the directory and of the socket: what is at the socket's place can only be left over. And before the
    // thread starts: the socket is made under another umask.
    let listener = listen(&socket, ctx.config().daemon.group.as_deref())?;
    let stop = tokio_util::sync::CancellationToken::new();
    let (handle, thread) = opened.start(stop.clone())?;
    broker::serve(&handle, &socket).context("cannot listen for commands in containers")?;
    tracing::info!(socket = %socket.display(), "the scheduler serves");
    let serving = tokio::spawn(server::serve(handle.clone(), listener, stop.clone()));
    tokio::select! {
        _ = term.recv() => tracing::info!("SIGTERM: stopping"),
        _ = int.recv() => tracing::info!("SIGINT: stopping"),
        () = stop.cancelled() => tracing::info!("told to stop, or the thread has ended"),
    }
    stop.cancel();
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, serving).await;
    handle.stop();
    let ended = tokio::task::spawn_blocking(move || thread.join()).await;
    let _ = std::fs::remove_file(broker::socket(&socket));
    let _ = std::fs::remove_file(&socket);
    if !matches!(ended, Ok(Ok(()))) {
        anyhow::bail!("the scheduler's thread ended by a panic; its log says why");
    }
    tracing::info!("the scheduler ends; its jobs go on");
    Ok(())
}

/// Tells the scheduler to stop and waits until it has gone.
pub fn stop(ctx: &Context) -> anyhow::Result<()> {
    let client = Client::new(ctx);
    let socket = client::socket(ctx);
    let _: serde_json::Value = client.send(Method::POST, "/v1/stop", &serde_json::json!({}))?;
    let begun = Instant::now();
    while socket.exists() {
        if begun.elapsed() > STOP_TIMEOUT {
            return Err(anyhow::anyhow!("the scheduler does not end")).hint("its log says what it waits for");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    ctx.say("the scheduler has stopped; its jobs go on");
    Ok(())
}

/// Says who the scheduler is.
pub fn status(ctx: &Context) -> anyhow::Result<()> {
    let info: SchedulerInfo = Client::new(ctx).get("/v1/info")?;
    if ctx.json() {
        return ctx.print_json(&info);
    }
    let mut out = ctx.out();
    writeln!(out, "pid       {}", info.pid)?;
    writeln!(out, "version   {}", info.version)?;
    writeln!(out, "dir       {}", info.dir.display())?;
    writeln!(out, "jobs      {}", info.jobs)?;
    writeln!(out, "cycles    {}", info.cycles)?;
    Ok(out.finish()?)
}

/// Prints the metrics.
pub fn metrics(ctx: &Context) -> anyhow::Result<()> {
    let text = Client::new(ctx).metrics()?;
    let mut out = ctx.out();
    out.write_all(text.as_bytes())?;
    Ok(out.finish()?)
}

/// Prints what the next decision starts from.
pub fn snapshot(ctx: &Context) -> anyhow::Result<()> {
    let snapshot: serde_json::Value = Client::new(ctx).get("/v1/snapshot")?;
    ctx.print_json(&snapshot)
}
