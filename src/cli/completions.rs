//! `larder completions`: a shell's completions on stdout.

use std::io::Write as _;

use clap_complete::Shell;

use super::Context;

/// Flags of `larder completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder completions bash > /etc/bash_completion.d/larder
  larder completions zsh > ~/.zfunc/_larder")]
pub struct Args {
    /// The shell
    shell: Shell,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut super::command(), "larder", &mut text);
    let mut out = ctx.out();
    out.write_all(&text)?;
    Ok(out.finish()?)
}
