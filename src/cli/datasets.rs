//! `larder datasets`: lists the datasets.

use super::Context;

/// Flags of `larder datasets`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder datasets")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder datasets is not built yet")
}
