//! `larder status`: shows what is cached, mounted and kept.

use super::Context;

/// Flags of `larder status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder status")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder status is not built yet")
}
