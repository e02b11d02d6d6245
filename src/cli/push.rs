//! `larder push`: stores a directory as a new commit.

use super::Context;

/// Flags of `larder push`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder push ./photos photos -m 'first version'")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder push is not built yet")
}
