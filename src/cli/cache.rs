//! `larder cache`: brings a commit into the cache.

use super::Context;

/// Flags of `larder cache`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder cache photos@v2 --keep")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder cache is not built yet")
}
