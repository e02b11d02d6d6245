//! `larder log`: shows the history of a dataset.

use std::io::Write;

use super::Context;
use super::output;
use crate::format::refs::Revision;

/// Flags of `larder log`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder log photos
  larder log photos@v2 -n 5 --json")]
pub struct Args {
    /// Dataset, or revision to begin at
    #[arg(value_name = "REV")]
    rev: String,
    /// Shows at most this many commits
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 1000)]
    limit: usize,
    /// One line for each commit
    #[arg(long)]
    oneline: bool,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let rev = Revision::parse(&args.rev)?;
    let rows = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        anyhow::Ok(catalog.log(&rev, args.limit).await?)
    })?;
    if ctx.json() {
        return ctx.print_json(&rows);
    }
    let mut out = ctx.out();
    for row in &rows {
        let refs: Vec<&str> = row.branches.iter().chain(&row.tags).map(String::as_str).collect();
        let refs = match refs.is_empty() {
            true => String::new(),
            false => format!(" ({})", refs.join(", ")),
        };
        let message = output::printable(row.message.lines().next().unwrap_or_default().as_bytes());
        if args.oneline {
            writeln!(out, "{}{refs} {message}", row.commit.short())?;
            continue;
        }
        writeln!(out, "commit {}{refs}", row.commit)?;
        writeln!(out, "time   {}", output::time(row.time_ms))?;
        writeln!(out, "author {}", output::printable(row.author.as_bytes()))?;
        if row.parents.len() > 1 {
            let parents: Vec<String> = row.parents.iter().map(|parent| parent.short()).collect();
            writeln!(out, "merges {}", parents.join(" "))?;
        }
        writeln!(out)?;
        for line in row.message.lines() {
            writeln!(out, "    {}", output::printable(line.as_bytes()))?;
        }
        writeln!(out)?;
    }
    Ok(out.finish()?)
}
