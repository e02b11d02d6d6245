//! `larder daemon`: runs, stops and asks the daemon.

use super::Context;

/// Flags of `larder daemon`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder daemon status")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder daemon is not built yet")
}
