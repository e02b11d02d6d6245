//! `larder mount`: mounts a commit.

use super::Context;

/// Flags of `larder mount`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder mount photos@v2 /data/photos")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder mount is not built yet")
}
