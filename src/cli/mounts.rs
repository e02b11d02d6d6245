//! `larder mounts`: lists the mounts.

use super::Context;

/// Flags of `larder mounts`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder mounts")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder mounts is not built yet")
}
