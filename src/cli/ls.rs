//! `larder ls`: lists files of a commit.

use super::Context;

/// Flags of `larder ls`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder ls photos@v2")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder ls is not built yet")
}
