//! `larder config`: checks and shows the configuration.

use super::Context;

/// Flags of `larder config`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder config check")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder config is not built yet")
}
