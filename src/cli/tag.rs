//! `larder tag`: lists, makes and removes tags.

use super::Context;

/// Flags of `larder tag`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder tag photos v2")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder tag is not built yet")
}
