//! `larder mount`: a commit as a read-only directory, through the daemon or in the foreground.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::Context;
use super::output;
use super::report::{HintExt as _, usage};
use crate::config::{EngineChoice, PrefetchLevel, Span, VerifyLevel};
use crate::node::api::{MountInfo, MountRequest};
use crate::node::client::ClientError;
use crate::node::daemon::Daemon;
use crate::node::mounting::Caller;
use crate::node::place::Place;

/// Flags of `larder mount`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder mount photos /data/photos
  larder mount photos@v2 /data/v2 --subdir train --prefetch touched
  larder mount photos@3fa9c1 ./photos --mkdir --foreground
  larder cache photos@v2 && larder mount photos@v2 /data/v2 --engine kernel

DIR must be an existing, empty directory. The mount stays until `larder umount DIR`, also over a restart
of the daemon. Owner and group of all files are who mounts, or --uid and --gid.")]
pub struct Args {
    /// What to mount: name, name@tag, name@branch or name@id-prefix
    #[arg(value_name = "DATASET[@REV]")]
    revision: String,
    /// Where
    dir: PathBuf,
    /// Shows only this directory of the commit
    #[arg(long, value_name = "PATH")]
    subdir: Option<String>,
    /// What is brought into the tier behind the reads (default: mount.prefetch)
    #[arg(long, value_name = "WHAT")]
    prefetch: Option<PrefetchLevel>,
    /// What serves the mount (default: mount.engine)
    #[arg(long, value_name = "ENGINE")]
    engine: Option<EngineChoice>,
    /// When bytes are checked (default: mount.verify)
    #[arg(long, value_name = "WHEN")]
    verify: Option<VerifyLevel>,
    /// Owner of all files
    #[arg(long)]
    uid: Option<u32>,
    /// Group of all files
    #[arg(long)]
    gid: Option<u32>,
    /// Permission bits to take away, octal
    #[arg(long, value_name = "OCTAL", value_parser = octal)]
    umask: Option<u32>,
    /// Mode of all files, octal
    #[arg(long, value_name = "OCTAL", value_parser = octal)]
    file_mode: Option<u32>,
    /// Mode of all directories, octal
    #[arg(long, value_name = "OCTAL", value_parser = octal)]
    dir_mode: Option<u32>,
    /// Lets other users look in
    #[arg(long)]
    allow_other: bool,
    /// Serves from this process, until SIGINT, SIGTERM or an unmount
    #[arg(long)]
    foreground: bool,
    /// Name of the tier (default: the dataset's, else the one that has the commit, else default_tier)
    #[arg(long, value_name = "NAME")]
    tier: Option<String>,
    /// How long the commit stays in the tier after its last use
    #[arg(long, value_name = "DURATION")]
    ttl: Option<Span>,
    /// Makes DIR where it is missing
    #[arg(long)]
    mkdir: bool,
    /// Covers a DIR that is not empty
    #[arg(long)]
    nonempty: bool,
}

fn octal(text: &str) -> Result<u32, String> {
    let value = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
    value.ok_or_else(|| "write octal permission bits, such as 022 or 0755".to_owned())
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let foreground = args.foreground;
    if foreground {
        ctx.only_here("`mount --foreground`")?;
    }
    let dir = absolute(ctx, &args.dir)?;
    let request = MountRequest {
        revision: args.revision,
        dir,
        subdir: args.subdir,
        engine: args.engine,
        verify: args.verify,
        prefetch: args.prefetch,
        uid: args.uid,
        gid: args.gid,
        umask: args.umask,
        file_mode: args.file_mode,
        dir_mode: args.dir_mode,
        allow_other: args.allow_other.then_some(true),
        tier: args.tier,
        ttl: args.ttl,
        mkdir: args.mkdir,
        nonempty: args.nonempty,
        for_user: None,
    };
    // Said here already, so that a slip of the pen starts no daemon.
    crate::format::refs::Revision::parse(&request.revision)?;
    if foreground {
        return ctx.block_on(in_foreground(ctx, request));
    }
    let info = ctx.block_on(async {
        let client = ctx.node_client().await?;
        client.mount(&request).await.map_err(with_hint)
    })?;
    report(ctx, &info)
}

/// Makes a path absolute; what is there already is resolved by the daemon.
pub(super) fn absolute(ctx: &Context, dir: &Path) -> anyhow::Result<PathBuf> {
    if ctx.is_remote() && !dir.is_absolute() {
        return usage(format!("{} is no absolute path on the daemon's machine", dir.display()));
    }
    std::path::absolute(dir).with_context(|| format!("cannot tell where {} is", dir.display()))
}

/// Turns the daemon's answer into an error with its advice.
pub(super) fn with_hint(error: ClientError) -> anyhow::Error {
    match error.hint().map(str::to_owned) {
        Some(hint) => match Err::<(), _>(error).hint(hint) {
            Err(hinted) => hinted,
            Ok(()) => unreachable!("an error stays an error"),
        },
        None => error.into(),
    }
}

fn report(ctx: &Context, info: &MountInfo) -> anyhow::Result<()> {
    if ctx.json() {
        return ctx.print_json(info);
    }
    let size = match (info.entries, info.bytes) {
        (Some(entries), Some(bytes)) => format!(", {entries} entries, {}", output::bytes(bytes)),
        _ => String::new(),
    };
    ctx.say(format!("{} ({}{size}) is at {}", info.revision, info.commit.short(), info.dir.display()));
    Ok(())
}

/// Serves one mount from this process, with a keeper of its own.
async fn in_foreground(ctx: &Context, request: MountRequest) -> anyhow::Result<()> {
    let place = Place::open(&ctx.config().state)?;
    let dir = place.private().join(format!("{:08x}", rand::random::<u32>()));
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let served = serve_one(ctx, request, &dir).await;
    if let Ok(keeper) = crate::fs::keeper::Client::connect(&dir)
        && let Err(error) = keeper.stop()
    {
        tracing::warn!(%error, "the keeper goes on until the mount is gone");
    }
    let _ = std::fs::remove_dir_all(&dir);
    served
}

async fn serve_one(ctx: &Context, request: MountRequest, keeper_dir: &Path) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let daemon = Daemon::open_private(ctx.config().clone(), keeper_dir.to_owned()).await?;
    let caller = Caller { uid: nix::unistd::getuid().as_raw(), gid: nix::unistd::getgid().as_raw() };
    let made = daemon.mount(request, caller).await;
    let info = match made {
        Ok(info) => info,
        Err(error) => {
            let hint = error.hint();
            let failed = Err(anyhow::Error::new(error));
            return match hint {
                Some(hint) => failed.hint(hint),
                None => failed,
            };
        }
    };
    report(ctx, &info)?;
    let upkeep = tokio::spawn(daemon.clone().upkeep());
    let mut look = tokio::time::interval(std::time::Duration::from_millis(200));
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = look.tick() => if !daemon.is_mounted(&info.id) { break },
        }
    }
    daemon.stop();
    daemon.unmount_all().await;
    let _ = upkeep.await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::octal;

    #[test]
    fn modes_are_octal_permission_bits() {
        assert_eq!(octal("0755"), Ok(0o755));
        assert_eq!(octal("22"), Ok(0o22));
        for bad in ["8", "100000", "rwx", ""] {
            assert!(octal(bad).is_err(), "{bad}");
        }
    }
}
