//! `larder get`: copies files of a commit out.

use super::Context;

/// Flags of `larder get`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder get photos@v2 ./out")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder get is not built yet")
}
