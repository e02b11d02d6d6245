//! `larder supervise`: runs one command of a job and writes down how it ended. Hidden: the scheduler
//! starts it.

use std::path::PathBuf;

use super::Context;

/// Flags of `larder supervise`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory of the task
    dir: PathBuf,
}

/// Runs the command.
pub fn run(_ctx: &Context, args: &Args) -> anyhow::Result<()> {
    Ok(crate::scheduler::supervise::run(&args.dir)?)
}
