//! `larder man`: one manual page for each command.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::Context;

/// Flags of `larder man`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder man /usr/local/share/man/man1")]
pub struct Args {
    /// The directory, made where it is missing
    dir: PathBuf,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    std::fs::create_dir_all(&args.dir).with_context(|| format!("cannot make {}", args.dir.display()))?;
    let command = super::command().disable_help_subcommand(true);
    let count = write(&command, "larder", &args.dir)?;
    ctx.say(format!("{count} pages in {}", args.dir.display()));
    Ok(())
}

fn write(command: &clap::Command, name: &str, dir: &Path) -> anyhow::Result<usize> {
    let path = dir.join(format!("{name}.1"));
    let mut text = Vec::new();
    let titled = command.clone().name(name.to_owned());
    clap_mangen::Man::new(titled).render(&mut text).with_context(|| format!("cannot render {name}"))?;
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    let mut count = 1;
    for below in command.get_subcommands().filter(|below| !below.is_hide_set() && below.get_name() != "help") {
        count += write(below, &format!("{name}-{}", below.get_name()), dir)?;
    }
    Ok(count)
}
