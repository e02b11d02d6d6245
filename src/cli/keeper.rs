//! `larder keeper`: the process that makes the mounts and holds their descriptors. Hidden: a daemon
//! starts it.

use std::path::PathBuf;
use std::process::ExitCode;

use super::Context;

/// Flags of `larder keeper`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where its socket is
    #[arg(long, value_name = "DIR")]
    pub state: PathBuf,
    /// Stays in this process, for a service manager; on SIGTERM it unmounts everything, on SIGHUP it starts its program
    /// anew and keeps the mounts
    #[arg(long)]
    pub foreground: bool,
    /// Unmounts nothing on SIGTERM: the daemon gives the mounts to the next keeper
    #[arg(long, requires = "foreground")]
    pub keep_mounts: bool,
}

/// Runs the keeper where the command line asks for it: before anything has made a thread.
pub(super) fn run_if_asked() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let (first, flag, state) = (args.next()?, args.next()?, args.next()?);
    if first != "keeper" || flag != "--state" || args.next().is_some() {
        return None;
    }
    Some(match crate::fs::keeper::run(&PathBuf::from(state)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: the keeper cannot run: {error}");
            ExitCode::FAILURE
        }
    })
}

/// Runs the command (not reached where `run_if_asked` saw it).
pub fn run(_ctx: &Context, args: Args) -> anyhow::Result<()> {
    if args.foreground {
        return Ok(crate::fs::keeper::run_here(&args.state, args.keep_mounts)?);
    }
    Ok(crate::fs::keeper::run(&args.state)?)
}
