//! `larder branch`: lists, moves and removes branches.

use super::Context;

/// Flags of `larder branch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder branch photos")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder branch is not built yet")
}
