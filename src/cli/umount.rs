//! `larder umount`: takes a mount away.

use std::path::PathBuf;

use super::Context;
use super::mount::{absolute, with_hint};
use super::report::HintExt as _;
use crate::node::api::UmountRequest;
use crate::node::client::ClientError;

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

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let client = ctx.node_client_at_rest();
    let mut ended = Vec::new();
    for dir in &args.dir {
        let path = absolute(dir)?;
        // The last part may be a symbolic link; the mount itself is never followed into.
        let dir = match (path.parent().map(std::fs::canonicalize), path.file_name()) {
            (Some(Ok(parent)), Some(name)) => parent.join(name),
            _ => path,
        };
        let request = UmountRequest { dir: dir.clone(), force: args.force };
        match ctx.block_on(client.umount(&request)) {
            Ok(info) => ended.push(info),
            Err(error @ ClientError::Absent { .. }) => {
                let hint = format!("if a dead mount is left there, clear it with `fusermount3 -uz {}`", dir.display());
                return Err(error).hint(hint);
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
