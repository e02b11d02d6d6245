//! `larder umount`: takes a mount away.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::Context;
use super::mount::{absolute, with_hint};
use super::report::HintExt as _;
use crate::fs::keeper::is_ours;
use crate::node::api::{MountInfo, UmountRequest};
use crate::node::client::{ClientError, NodeClient};

/// Flags of `larder umount`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder umount /data/photos
  larder umount --force /data/photos")]
pub struct Args {
    /// Where it is mounted
    #[arg(required = true)]
    dir: Vec<PathBuf>,
    /// Also where it is in use: it leaves the tree at once, what is open can be read on
    #[arg(long)]
    force: bool,
}

/// Asks a daemon that was just started: it makes its mounts again before it can take one away.
fn umount_when_made_again(
    ctx: &Context,
    client: &NodeClient,
    request: &UmountRequest,
) -> Result<MountInfo, ClientError> {
    let until = Instant::now() + ctx.config().daemon.start_timeout.0;
    loop {
        match ctx.block_on(client.umount(request)) {
            Err(ClientError::Refused { status: 404 | 409, .. }) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(100));
            }
            asked => return asked,
        }
    }
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let client = ctx.node_client_at_rest();
    let mut ended = Vec::new();
    for dir in &args.dir {
        let path = absolute(ctx, dir)?;
        let is_ours = |dir: &std::path::Path| !ctx.is_remote() && is_ours(dir).unwrap_or(false);
        // The last part may be a symbolic link; the mount itself is never followed into.
        let dir = match (path.parent().map(std::fs::canonicalize), path.file_name()) {
            (Some(Ok(parent)), Some(name)) if !ctx.is_remote() => parent.join(name),
            _ => path,
        };
        let request = UmountRequest { dir: dir.clone(), force: args.force };
        let asked = match ctx.block_on(client.umount(&request)) {
            // A daemon that was killed knows its mounts again when it starts; else they would come back.
            Err(error) if error.is_absent() && is_ours(&dir) => {
                ctx.block_on(ctx.node_client())?;
                umount_when_made_again(ctx, &client, &request)
            }
            asked => asked,
        };
        match asked {
            Ok(info) => ended.push(info),
            Err(error @ ClientError::Absent { .. }) => return Err(error).hint("nothing is mounted there"),
            // The daemon does not know it, and it is there: left by a keeper that was killed.
            Err(error @ ClientError::Refused { status: 404, .. }) if is_ours(&dir) => {
                let hint = format!("a dead mount is there; clear it with `fusermount3 -uz {}`", dir.display());
                return Err(with_hint(error)).hint(hint);
            }
            Err(error) => return Err(with_hint(error)),
        }
    }
    if ctx.json() {
        return ctx.print_json(&ended);
    }
    for info in &ended {
        ctx.say(format!("{} is no longer at {}", info.revision, info.dir.display()));
    }
    Ok(())
}
