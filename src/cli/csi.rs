//! `larder csi`: gives commits to the pods of Kubernetes as volumes.

use std::path::PathBuf;

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;

use super::Context;
use crate::config::Span;
use crate::node::csi::{self, Mode, Settings};

/// Where the socket is that a provisioner shares.
const CONTROLLER_SOCKET: &str = "/csi/csi.sock";

/// Flags of `larder csi`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder csi --mode node --node \"$NODE_NAME\"
  larder csi --mode controller --csi-endpoint /csi/csi.sock
  larder csi probe --ready

It speaks to the daemon of the node at daemon.socket (LARDER_SOCKET). docs/formats/csi.md is its contract.")]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,
    #[command(subcommand)]
    command: Option<What>,
}

/// Where the driver is and how it is called.
#[derive(Debug, Clone, clap::Args)]
struct RunArgs {
    /// Which services it answers beside Identity
    #[arg(global = true, long, value_enum, env = "LARDER_CSI_MODE", hide_env = true, default_value = "all")]
    mode: ModeArg,
    /// Its unix socket [default: <dir>/csi.sock; for the controller /csi/csi.sock]
    #[arg(global = true, long = "csi-endpoint", value_name = "PATH", env = "LARDER_CSI_ENDPOINT", hide_env = true)]
    endpoint: Option<String>,
    /// Name of the Kubernetes node [default: the host's name]
    #[arg(global = true, long, value_name = "NAME", env = "LARDER_CSI_NODE", hide_env = true)]
    node: Option<String>,
    /// Name of the CSIDriver
    #[arg(
        global = true,
        long,
        value_name = "NAME",
        env = "LARDER_CSI_DRIVER",
        hide_env = true,
        default_value = "csi.larder.io"
    )]
    driver: String,
    /// The kubelet's folder
    #[arg(
        global = true,
        long,
        value_name = "DIR",
        env = "LARDER_CSI_KUBELET_DIR",
        hide_env = true,
        default_value = "/var/lib/kubelet"
    )]
    kubelet_dir: PathBuf,
    /// Its own folder, where the keeper's mounts are seen [default: <kubelet dir>/plugins/<driver>]
    #[arg(global = true, long, value_name = "DIR", env = "LARDER_CSI_DIR", hide_env = true)]
    dir: Option<PathBuf>,
    /// Does not make itself known to the kubelet
    #[arg(global = true, long)]
    no_register: bool,
    /// How long one call may take
    #[arg(
        global = true,
        long,
        value_name = "SPAN",
        env = "LARDER_CSI_TIMEOUT",
        hide_env = true,
        default_value = "60s"
    )]
    timeout: Span,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum ModeArg {
    /// What the kubelet asks
    Node,
    /// What the provisioner asks
    Controller,
    /// Both
    All,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Node => Self::Node,
            ModeArg::Controller => Self::Controller,
            ModeArg::All => Self::All,
        }
    }
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Asks a driver that runs whether it answers: exit status 0 or 1
    #[command(after_help = "Examples:
  larder csi probe
  larder csi probe --ready --csi-endpoint /csi/csi.sock")]
    Probe {
        /// And whether the daemon of the node answers it
        #[arg(long)]
        ready: bool,
    },
    /// Says which pods of the cluster use volumes of the driver: exit status 1 where some do
    #[command(after_help = "Examples:
  larder csi in-use
  larder csi in-use --evict --wait 10m

It asks the API server of the cluster that it runs in, or that KUBECONFIG names.")]
    InUse {
        /// Evicts them; budgets of theirs are respected
        #[arg(long)]
        evict: bool,
        /// How long to wait until nobody uses any
        #[arg(long, value_name = "SPAN", default_value = "0s")]
        wait: Span,
    },
}

impl RunArgs {
    fn dir(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| self.kubelet_dir.join("plugins").join(&self.driver))
    }

    fn endpoint(&self) -> PathBuf {
        match &self.endpoint {
            Some(given) => given.strip_prefix("unix://").unwrap_or(given).into(),
            None if self.mode == ModeArg::Controller => CONTROLLER_SOCKET.into(),
            None => self.dir().join("csi.sock"),
        }
    }

    fn settings(&self, daemon: PathBuf) -> anyhow::Result<Settings> {
        let node = match &self.node {
            Some(node) => node.clone(),
            None => {
                let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
                name.context("the host has no name; give --node")?.trim().to_owned()
            }
        };
        Ok(Settings {
            mode: self.mode.into(),
            driver: self.driver.clone(),
            node,
            endpoint: self.endpoint(),
            registry: (!self.no_register).then(|| self.kubelet_dir.join("plugins_registry")),
            dir: self.dir(),
            daemon,
            timeout: self.timeout.0,
        })
    }
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    match args.command {
        Some(What::Probe { ready }) => Ok(ctx.block_on(csi::probe(&args.run.endpoint(), ready))?),
        Some(What::InUse { evict, wait }) => in_use(ctx, &args.run.driver, evict, wait),
        None => {
            let settings = args.run.settings(ctx.config().daemon.socket.clone())?;
            ctx.block_on(serve(settings))
        }
    }
}

fn in_use(ctx: &Context, driver: &str, evict: bool, wait: Span) -> anyhow::Result<()> {
    let left = ctx.block_on(async {
        let client = csi::in_use::client().await?;
        csi::in_use::wait(&client, driver, evict, wait.0).await
    })?;
    if ctx.json() {
        ctx.print_json(&left)?;
    }
    let names: Vec<String> =
        left.iter().map(|user| format!("{}/{} on {}", user.namespace, user.pod, user.node)).collect();
    anyhow::ensure!(
        left.is_empty(),
        "pods use volumes of {driver}: {}; end them, or have them evicted with --evict",
        names.join(", ")
    );
    ctx.say(format_args!("no pod uses a volume of {driver}"));
    Ok(())
}

async fn serve(settings: Settings) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::info!("told to stop");
        stopping.cancel();
    });
    Ok(csi::run(settings, stop).await?)
}
