//! `larder gc`: removes what no commit needs.

use super::Context;

/// Flags of `larder gc`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder gc --dry-run")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder gc is not built yet")
}
