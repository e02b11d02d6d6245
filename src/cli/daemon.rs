//! `larder daemon`: runs, stops and asks the daemon that serves the mounts.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal};

use super::Context;
use super::mount::with_hint;
use super::output;
use super::report::{HintExt as _, usage};
use crate::config::Config;
use crate::fs::session::HANDOVER;
use crate::node::client::NodeClient;
use crate::node::daemon::Daemon;
use crate::node::error::NodeError;
use crate::node::place::{Place, raise_descriptors};
use crate::node::remote::{self, Access, Remote};
use crate::node::{policy, server};

mod notify;
mod upgrade;

/// How long running requests may take to end when the daemon stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a daemon that leaves its mounts takes to tell the keeper so.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a detached daemon waits for the lock of one that does not answer, and how often it looks.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
const LOCK_INTERVAL: Duration = Duration::from_millis(20);
/// How long `daemon stop` waits for the end.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Flags of `larder daemon`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "Examples:
  larder daemon                 starts it in the background, as other commands do on demand
  larder daemon --foreground    serves from this process, for a service manager
  larder daemon stop

There is one daemon for each state directory. Its mounts come back when it starts again.")]
pub struct Args {
    /// Serves from this process until SIGINT or SIGTERM
    #[arg(long)]
    foreground: bool,
    /// Leaves the mounts to the next daemon when this one is told to end: they are not unmounted, and who reads
    /// waits
    #[arg(long, requires = "foreground")]
    keep_mounts: bool,
    #[command(subcommand)]
    command: Option<What>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Serves from this process
    #[command(hide = true, after_help = "Examples:\n  larder daemon run")]
    Run {
        /// Leaves the terminal's session; a daemon that runs already is no error
        #[arg(long)]
        detached: bool,
    },
    /// Prints the version of the hand-over, after the configuration was found right
    #[command(
        hide = true,
        after_help = "Examples:
  larder daemon handover"
    )]
    Handover,
    /// Unmounts everything and ends the daemon; the mounts come back when it starts again
    #[command(after_help = "Examples:\n  larder daemon stop")]
    Stop,
    /// Has another larder take over from the daemon that runs: open files and running reads go on. Without a name
    /// it is the program of this command. What cannot take over changes nothing
    #[command(after_help = "Examples:
  larder daemon upgrade
  larder daemon upgrade /usr/local/bin/larder-new")]
    Upgrade {
        /// The other program
        #[arg(value_name = "PROGRAM")]
        program: Option<PathBuf>,
    },
    /// Shows whether a daemon runs and what it serves; exit status 1 where none does
    #[command(after_help = "Examples:\n  larder daemon status --json")]
    Status,
    /// Prints the metrics as Prometheus text
    #[command(after_help = "Examples:\n  larder daemon metrics | grep larder_lake")]
    Metrics,
    /// Makes a token for the API over TCP: prints it, and adds its digest to the file of daemon.api_tokens
    #[command(after_help = "Examples:
  larder daemon token prometheus
  larder daemon token hub --control

A token is told once. Taking its line out of the file ends it at once. One with --control mounts anything anywhere:
of root's daemon, it is as good as root on this machine.")]
    Token {
        /// Whose it is: for the file and the log
        #[arg(value_name = "NAME")]
        name: String,
        /// May do what the daemon's own user may (but for stopping and replacing it), instead of only look
        #[arg(long)]
        control: bool,
    },
    /// Prints the end of the log of a daemon that was started on demand
    #[command(after_help = "Examples:\n  larder daemon log --lines 50")]
    Log {
        /// How many lines
        #[arg(long, default_value_t = 200, value_name = "N")]
        lines: usize,
    },
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    match args.command {
        None if args.foreground => serve(ctx, false, args.keep_mounts),
        None => start(ctx),
        Some(What::Run { detached }) => serve(ctx, detached, false),
        Some(What::Upgrade { program }) => upgrade::run(ctx, program),
        Some(What::Handover) => {
            let mut out = ctx.out();
            writeln!(out, "{HANDOVER}")?;
            Ok(out.finish()?)
        }
        Some(What::Stop) => stop(ctx),
        Some(What::Status) => status(ctx),
        Some(What::Metrics) => {
            let text = ctx.block_on(ctx.node_client_at_rest().metrics()).map_err(with_hint)?;
            print(ctx, &text)
        }
        Some(What::Token { name, control }) => token(ctx, &name, control),
        Some(What::Log { lines }) => {
            ctx.only_here("`daemon log`")?;
            let tail = Place::at(&ctx.config().state).log_tail(0, lines);
            if tail.is_empty() { Ok(()) } else { print(ctx, &format!("{tail}\n")) }
        }
    }
}

fn print(ctx: &Context, text: &str) -> anyhow::Result<()> {
    let mut out = ctx.out();
    out.write_all(text.as_bytes())?;
    Ok(out.finish()?)
}

/// Makes a token; its digest goes to the file first, so that what is printed works.
fn token(ctx: &Context, name: &str, control: bool) -> anyhow::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let Some(path) = &ctx.config().daemon.api_tokens else {
        return usage("daemon.api_tokens names no file to keep the digest in");
    };
    if name.is_empty() || name.starts_with('#') || name.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return usage("a token's name is one word");
    }
    let access = if control { Access::Control } else { Access::Read };
    let (token, line) = remote::make_token(name, access);
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("{}: cannot be written", path.display()))?;
    file.write_all(format!("{line}\n").as_bytes()).with_context(|| format!("{}", path.display()))?;
    if ctx.json() {
        return ctx.print_json(&serde_json::json!({ "name": name, "access": access.as_str(), "token": token }));
    }
    ctx.say(format!("the token of {name}, told this once; its digest is in {}", path.display()));
    print(ctx, &format!("{token}\n"))
}

fn start(ctx: &Context) -> anyhow::Result<()> {
    let info = ctx.block_on(async {
        let client = ctx.node_client().await?;
        Ok::<_, anyhow::Error>(client.info().await?)
    })?;
    if ctx.json() {
        return ctx.print_json(&info);
    }
    ctx.say(format!("the daemon runs (pid {}), lake {}", info.pid, info.lake));
    Ok(())
}

fn status(ctx: &Context) -> anyhow::Result<()> {
    let info = ctx.block_on(ctx.node_client_at_rest().info()).hint("`larder daemon` starts one")?;
    if ctx.json() {
        return ctx.print_json(&info);
    }
    let mut out = ctx.out();
    writeln!(out, "pid       {}", info.pid)?;
    writeln!(out, "version   {}", info.version)?;
    writeln!(out, "node      {}", info.node)?;
    writeln!(out, "lake      {}", info.lake)?;
    writeln!(out, "state     {}", info.state.display())?;
    writeln!(out, "started   {}", output::time(info.started_ms))?;
    for tier in &info.tiers {
        let default = if tier.default { " (default)" } else { "" };
        writeln!(out, "tier      {}{default}: {}", tier.name, tier.path.display())?;
    }
    Ok(out.finish()?)
}

/// Tells the daemon to stop and waits until its lock is free.
fn stop(ctx: &Context) -> anyhow::Result<()> {
    ctx.only_here("`daemon stop`")?;
    let client = ctx.node_client_at_rest();
    let place = Place::at(&ctx.config().state);
    match ctx.block_on(client.stop()) {
        Ok(()) => {}
        Err(error) if error.is_absent() => {
            ctx.say("no daemon runs");
            return Ok(());
        }
        Err(error) => return Err(with_hint(error)),
    }
    let begun = Instant::now();
    while place.daemon_lives() {
        if begun.elapsed() > STOP_TIMEOUT {
            return Err(anyhow::anyhow!("the daemon does not end")).hint("`larder daemon log` says what it waits for");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    ctx.say("the daemon has stopped");
    Ok(())
}

fn serve(ctx: &Context, detached: bool, keep_mounts: bool) -> anyhow::Result<()> {
    if detached {
        // Fails only for a process that leads a group: then it is on its own already.
        let _ = nix::unistd::setsid();
    }
    // A keeper that waits for signals passes them on blocked. Before there are threads, which inherit that.
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    signals.thread_unblock().context("cannot be told to stop by signals")?;
    raise_descriptors();
    match ctx.block_on(serve_until_stopped(ctx, detached, keep_mounts)) {
        Err(error) if detached && matches!(error.downcast_ref(), Some(NodeError::AlreadyRuns { .. })) => Ok(()),
        other => other,
    }
}

/// Opens the daemon. A detached one waits for one that has the lock and does not answer: it is dying, or begins.
async fn open(config: &Config, detached: bool) -> Result<Daemon, NodeError> {
    let client = NodeClient::at(&config.daemon.socket);
    let until = Instant::now() + LOCK_TIMEOUT;
    loop {
        let opened = Daemon::open(config.clone()).await;
        let left = until.saturating_duration_since(Instant::now());
        let is_taken = matches!(opened, Err(NodeError::AlreadyRuns { .. }));
        if !is_taken
            || !detached
            || left.is_zero()
            || matches!(tokio::time::timeout(left, client.info()).await, Ok(Ok(_)))
        {
            return opened;
        }
        tokio::time::sleep(LOCK_INTERVAL).await;
    }
}

async fn serve_until_stopped(ctx: &Context, detached: bool, keep_mounts: bool) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let config = ctx.config();
    let daemon = open(config, detached).await?;
    // One that was started on demand may have the manager of whoever needed it in its environment.
    let is_managed = !detached && std::env::var_os("NOTIFY_SOCKET").is_some();
    if config.daemon.restart && !is_managed {
        daemon.restart_with(ctx.daemon_args());
    }
    if keep_mounts {
        daemon.expect_keeper();
    }
    daemon.find_left().await?;
    if let Some(path) = &config.daemon.policy {
        policy::Policy::read(path)?;
    }
    let remote = Remote::open(&config.daemon).await?;
    let listener = server::listen(&config.daemon.socket, config.daemon.group.as_deref())?;
    tracing::info!(socket = %config.daemon.socket.display(), lake = config.lake.url, "the daemon serves");
    // Before any tier is opened: its claims say where this node answers.
    daemon.answer_peers().await;
    let serving = tokio::spawn(server::serve(daemon.clone(), listener));
    if let Some(remote) = remote {
        tracing::info!(address = ?remote.address(), "the API is given over TCP");
        tokio::spawn(remote.serve(daemon.clone()));
    }
    // Sees by itself that the daemon stops; a mount that it is making then is waited for.
    tokio::spawn({
        let daemon = daemon.clone();
        async move {
            daemon.remount().await;
            daemon.tell_ready().await;
        }
    });
    let upkeep = tokio::spawn(daemon.clone().upkeep());
    if is_managed {
        notify::ready();
        notify::keep_watchdog_quiet(daemon.clone());
    }
    let stopping = daemon.stopping();
    tokio::select! {
        _ = term.recv() => {
            tracing::info!("SIGTERM: stopping");
            if keep_mounts {
                // Whoever sent the signal starts the next one, not the keeper. A keeper that is away itself may be
                // waited for elsewhere, and its manager may start it only when this daemon has ended.
                let _ = tokio::time::timeout(LEAVE_TIMEOUT, daemon.tell_end()).await;
                daemon.leave();
            }
        }
        _ = int.recv() => tracing::info!("SIGINT: stopping"),
        () = stopping.cancelled() => tracing::info!("told to stop"),
    }
    daemon.stop();
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, serving).await;
    end(&daemon, upkeep).await;
    Ok(())
}

/// Gives the mounts back, or leaves them to the next daemon.
async fn end(daemon: &Daemon, upkeep: tokio::task::JoinHandle<()>) {
    if daemon.leaves_mounts() {
        tracing::info!("the daemon ends; its mounts are left to the next one");
        // Where none comes, no socket is left that nobody answers. One that comes waits for the lock, which is still ours.
        let _ = std::fs::remove_file(&daemon.config().daemon.socket);
        // At once: leases and mounts are not given back, as if it had been killed.
        crate::fs::exit_now();
    }
    daemon.tell_end().await;
    daemon.unmount_all().await;
    daemon.stop_keeper().await;
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, upkeep).await;
    let _ = std::fs::remove_file(&daemon.config().daemon.socket);
    tracing::info!("the daemon ends");
}

/// Says in one line whether a daemon runs.
pub(super) async fn line(client: &NodeClient) -> String {
    match client.info().await {
        Ok(info) => format!("runs (pid {})", info.pid),
        Err(error) if error.is_absent() => "does not run; it is started when it is needed".to_owned(),
        Err(error) => format!("cannot be asked: {error}"),
    }
}
