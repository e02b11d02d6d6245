//! `larder umount`: unmounts a directory.

use super::Context;

/// Flags of `larder umount`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder umount /data/photos")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder umount is not built yet")
}
