//! `larder lake`: works on the lake.

use super::Context;

/// Flags of `larder lake`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder lake serve ./lake --listen 127.0.0.1:9000")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder lake is not built yet")
}
