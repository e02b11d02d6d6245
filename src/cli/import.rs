//! `larder import`: makes a commit over objects that already lie in the store.

use super::Context;

/// Flags of `larder import`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder import s3://bucket/photos photos")]
pub struct Args {}

/// Runs the command.
pub fn run(_ctx: &Context, _args: Args) -> anyhow::Result<()> {
    anyhow::bail!("larder import is not built yet")
}
