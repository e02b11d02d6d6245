//! `larder cat`: prints files of a commit.

use super::Context;

/// Flags of `larder cat`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder cat photos@v2 labels.csv")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder cat is not built yet")
}
