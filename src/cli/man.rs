//! `larder man`: writes the manual pages.

use super::Context;

/// Flags of `larder man`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder man /usr/local/share/man/man1")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder man is not built yet")
}
