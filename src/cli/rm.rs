//! `larder rm`: removes a tag, a branch or a dataset.

use super::Context;

/// Flags of `larder rm`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder rm photos@v1")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder rm is not built yet")
}
