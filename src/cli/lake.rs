//! `larder lake`: makes a lake, says what it is, and serves a directory as one.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;

use super::Context;
use super::report::{HintExt as _, usage};
use crate::node::open;
use crate::store::catalog::lakefmt::{self, Conditions, LakeFormat, RefChoice};
use crate::store::lake::Lake;
use crate::store::lake::embedded::{self, Server, Store, StoreOptions};
use crate::store::lake::s3::{S3Lake, StaticKeys};

/// Where a server keeps the key pair that it made for itself. No bucket has such a name.
const KEYS_FILE: &str = ".keys.json";

/// Flags of `larder lake`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: LakeCommand,
}

#[derive(Debug, clap::Subcommand)]
enum LakeCommand {
    /// Makes the configured bucket's prefix a lake; one that is a lake already stays as it is
    Init(InitArgs),
    /// Shows what the configured lake is
    Info(InfoArgs),
    /// Serves a directory as an S3 store
    Serve(ServeArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder lake init
  larder lake init --refs log --create-bucket")]
struct InitArgs {
    /// How refs move: by conditional writes, by an append-only log, or as the store can do it.
    /// StorageGRID without strong consistency needs `log`
    #[arg(long, value_enum, default_value_t = Refs::Auto)]
    refs: Refs,
    /// Makes the bucket too, where it is missing
    #[arg(long)]
    create_bucket: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Refs {
    Auto,
    Cas,
    Log,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder lake info
  larder lake info --json
  larder lake info --probe")]
struct InfoArgs {
    /// Finds out as well whether the store keeps conditions of writes (writes and deletes a little)
    #[arg(long)]
    probe: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder lake serve ./lake --listen 127.0.0.1:9000
  larder lake serve /srv/lake --bucket data --access-key team --secret-key \"$SECRET\"
Without a key pair one is made, kept in the directory, and printed.")]
struct ServeArgs {
    /// The directory that holds the buckets; made where it is missing
    dir: PathBuf,
    /// Address to listen on (plain HTTP)
    #[arg(long, default_value = "127.0.0.1:9000", value_name = "ADDR:PORT")]
    listen: String,
    /// Who may use it
    #[arg(long, env = "LARDER_SERVE_ACCESS_KEY", requires = "secret_key", value_name = "KEY")]
    access_key: Option<String>,
    /// The secret of the access key
    #[arg(
        long,
        env = "LARDER_SERVE_SECRET_KEY",
        hide_env_values = true,
        requires = "access_key",
        value_name = "SECRET"
    )]
    secret_key: Option<String>,
    /// Makes this bucket (again for more)
    #[arg(long = "bucket", default_value = embedded::DEFAULT_BUCKET, value_name = "NAME")]
    buckets: Vec<String>,
    /// Keeps older versions of overwritten objects in these buckets
    #[arg(long)]
    versions: bool,
    /// Does not flush objects to the disk before they are acknowledged
    #[arg(long)]
    no_fsync: bool,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    match args.command {
        LakeCommand::Init(args) => init(ctx, &args),
        LakeCommand::Info(args) => info(ctx, &args),
        LakeCommand::Serve(args) => serve(ctx, args),
    }
}

/// What `lake init` and `lake info` print with `--json`.
#[derive(Debug, Serialize)]
struct Info {
    url: String,
    endpoint: Option<String>,
    lake_id: String,
    refs: lakefmt::RefMode,
    format: u32,
    created_ms: i64,
    features: Vec<String>,
    /// Only with `--probe`.
    #[serde(skip_serializing_if = "Option::is_none")]
    conditional_writes: Option<bool>,
}

impl Info {
    fn new(ctx: &Context, lake: &dyn Lake, format: LakeFormat) -> Self {
        Self {
            url: lake.url(),
            endpoint: ctx.config().lake.endpoint.clone(),
            lake_id: format.lake_id.to_string(),
            refs: format.refs,
            format: format.format,
            created_ms: format.created_ms,
            features: format.features,
            conditional_writes: None,
        }
    }

    fn print(&self, ctx: &Context) -> anyhow::Result<()> {
        if ctx.json() {
            return ctx.print_json(self);
        }
        let created = jiff::Timestamp::from_millisecond(self.created_ms).unwrap_or_default();
        let mut out = ctx.out();
        writeln!(out, "lake      {}", self.url)?;
        if let Some(endpoint) = &self.endpoint {
            writeln!(out, "endpoint  {endpoint}")?;
        }
        writeln!(out, "id        {}", self.lake_id)?;
        writeln!(out, "refs      {}", self.refs)?;
        writeln!(out, "format    {}", self.format)?;
        writeln!(out, "created   {created:.0}")?;
        if let Some(kept) = self.conditional_writes {
            let text = if kept { "kept" } else { "not kept" };
            writeln!(out, "conditions of writes are {text} by the store")?;
        }
        Ok(out.finish()?)
    }
}

fn init(ctx: &Context, args: &InitArgs) -> anyhow::Result<()> {
    let choice = match args.refs {
        Refs::Auto => RefChoice::Auto,
        Refs::Cas => RefChoice::Cas,
        Refs::Log => RefChoice::Log,
    };
    ctx.block_on(async {
        let section = &ctx.config().lake;
        if args.create_bucket && !section.url.starts_with('/') {
            let client = S3Lake::connect(open::s3_config(section)?).await?;
            client.create_bucket().await.context("cannot make the bucket")?;
        }
        let lake = ctx.lake().await?;
        let format = lakefmt::open_or_create(&*lake, choice).await?;
        Info::new(ctx, &*lake, format).print(ctx)
    })
}

fn info(ctx: &Context, args: &InfoArgs) -> anyhow::Result<()> {
    ctx.block_on(async {
        let lake = ctx.lake().await?;
        let Some(format) = lakefmt::read(&*lake).await? else {
            return Err(lakefmt::FormatError::Missing { url: lake.url() }.into());
        };
        let mut info = Info::new(ctx, &*lake, format);
        if args.probe {
            let found = lakefmt::probe(&*lake).await.context("cannot probe the store")?;
            info.conditional_writes = Some(found == Conditions::Kept);
        }
        info.print(ctx)
    })
}

/// What `lake serve` prints with `--json` once it listens.
#[derive(Debug, Serialize)]
struct Serving<'a> {
    endpoint: String,
    access_key: &'a str,
    /// Only where the server made the pair itself.
    secret_key: Option<&'a str>,
    buckets: &'a [String],
    dir: &'a Path,
}

fn serve(ctx: &Context, args: ServeArgs) -> anyhow::Result<()> {
    for bucket in &args.buckets {
        if !embedded::is_bucket_name(bucket) {
            return usage(format!("`{bucket}` is no bucket name: 3 to 63 of a-z 0-9 . -"));
        }
    }
    let store = Store::open(&args.dir, StoreOptions { fsync: !args.no_fsync })?;
    for bucket in &args.buckets {
        store.ensure_bucket(bucket)?;
        if args.versions {
            store.set_versioning(bucket, true)?;
        }
    }
    let given = args.access_key.clone().zip(args.secret_key.clone());
    let made = given.is_none();
    let keys = match given {
        Some((access_key, secret_key)) => StaticKeys { access_key, secret_key },
        None => own_keys(&args.dir)?,
    };
    ctx.block_on(async {
        let listener = tokio::net::TcpListener::bind(&args.listen)
            .await
            .with_context(|| format!("cannot listen on {}", args.listen))
            .hint("choose another address with --listen")?;
        let server = Server::start(store, listener, Some(keys.clone()))?;
        if !server.addr().ip().is_loopback() {
            ctx.say("note: plain HTTP: keys are not sent, but data can be read on the way");
        }
        announce(ctx, &args, &server, &keys, made)?;
        stop_signal().await?;
        Ok(())
    })
}

fn announce(ctx: &Context, args: &ServeArgs, server: &Server, keys: &StaticKeys, made: bool) -> anyhow::Result<()> {
    let serving = Serving {
        endpoint: format!("http://{}", server.addr()),
        access_key: &keys.access_key,
        secret_key: made.then_some(keys.secret_key.as_str()),
        buckets: &args.buckets,
        dir: &args.dir,
    };
    if ctx.json() {
        return ctx.print_json(&serving);
    }
    let mut out = ctx.out();
    writeln!(out, "export LARDER_ENDPOINT={}", serving.endpoint)?;
    if let Some(bucket) = args.buckets.first() {
        writeln!(out, "export LARDER_LAKE=s3://{bucket}")?;
    }
    writeln!(out, "export AWS_ACCESS_KEY_ID={}", serving.access_key)?;
    if let Some(secret) = serving.secret_key {
        writeln!(out, "export AWS_SECRET_ACCESS_KEY={secret}")?;
    }
    out.finish()?;
    ctx.say(format!("serving {} at {}; stop with Ctrl-C", args.dir.display(), serving.endpoint));
    Ok(())
}

async fn stop_signal() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted.context("cannot wait for Ctrl-C"),
        _ = term.recv() => Ok(()),
    }
}

/// The key pair on disk.
#[derive(serde::Serialize, serde::Deserialize)]
struct KeysFile {
    access_key: String,
    secret_key: String,
}

/// Gives the directory's own key pair, made at the first start: a restart must not lock clients out.
fn own_keys(dir: &Path) -> anyhow::Result<StaticKeys> {
    let path = dir.join(KEYS_FILE);
    if !path.exists() {
        let pair = KeysFile {
            access_key: format!("larder{}", hex::encode(rand::random::<[u8; 7]>())),
            secret_key: hex::encode(rand::random::<[u8; 20]>()),
        };
        // Written aside and linked, so that of two servers that start at once one pair counts.
        let mut file = tempfile::Builder::new().prefix(".keys").tempfile_in(dir)?;
        serde_json::to_writer_pretty(&mut file, &pair)?;
        match file.persist_noclobber(&path) {
            Err(error) if error.error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error.error).with_context(|| path.display().to_string());
            }
            _ => {}
        }
    }
    let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let pair: KeysFile = serde_json::from_slice(&text)
        .with_context(|| path.display().to_string())
        .hint("remove the file: the next start makes another pair")?;
    Ok(StaticKeys { access_key: pair.access_key, secret_key: pair.secret_key })
}
