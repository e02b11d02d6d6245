//! `larder completions`: prints a shell's completions.

use super::Context;

/// Flags of `larder completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder completions bash > /etc/bash_completion.d/larder")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder completions is not built yet")
}
