//! `larder doctor`: finds out what does not work here.

use super::Context;

/// Flags of `larder doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder doctor")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder doctor is not built yet")
}
