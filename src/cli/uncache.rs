//! `larder uncache`: removes a commit from the cache.

use super::Context;

/// Flags of `larder uncache`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder uncache photos@v2")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder uncache is not built yet")
}
