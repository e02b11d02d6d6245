//! `larder keeper`: holds mounts for a daemon.

use super::Context;

/// Flags of `larder keeper`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder keeper")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder keeper is not built yet")
}
