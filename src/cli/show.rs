//! `larder show`: shows a commit.

use super::Context;

/// Flags of `larder show`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder show photos@v2")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder show is not built yet")
}
