//! `larder tier`: works on tiers.

use super::Context;

/// Flags of `larder tier`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder tier init /mnt/tier")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder tier is not built yet")
}
