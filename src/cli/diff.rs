//! `larder diff`: shows what differs between two commits.

use super::Context;

/// Flags of `larder diff`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder diff photos@v1 photos@v2")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder diff is not built yet")
}
