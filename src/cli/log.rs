//! `larder log`: shows the history of a dataset.

use super::Context;

/// Flags of `larder log`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder log photos")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder log is not built yet")
}
