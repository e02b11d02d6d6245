//! `larder log`: shows the history of a dataset.

use std::io::Write;

use super::Context;
use super::output::{self, Table};
use crate::format::refs::Revision;
use crate::store::catalog::lineage::Direction;

/// Flags of `larder log`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder log photos
  larder log photos@v2 -n 5 --json
  larder log --lineage model@v1")]
pub struct Args {
    /// Dataset, or revision to begin at
    #[arg(value_name = "REV")]
    rev: String,
    /// Shows at most this many commits
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 1000)]
    limit: usize,
    /// Shows instead what the commit was made from, and what was made from it (in any dataset)
    #[arg(long, conflicts_with_all = ["limit", "oneline"])]
    lineage: bool,
    /// One line for each commit
    #[arg(long)]
    oneline: bool,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let rev = Revision::parse(&args.rev)?;
    if args.lineage {
        return lineage(ctx, &rev);
    }
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

fn lineage(ctx: &Context, rev: &Revision) -> anyhow::Result<()> {
    let rows = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        anyhow::Ok(catalog.lineage(rev).await?)
    })?;
    if ctx.json() {
        return ctx.print_json(&rows);
    }
    let mut table = Table::new(&["", "COMMIT", "TIME", "JOB", "CODE", "MESSAGE"]);
    for row in &rows {
        let mark = match row.direction {
            Direction::Input => "from",
            Direction::Itself => "this",
            Direction::Output => "into",
        };
        let dataset = row.dataset.as_deref().unwrap_or("(no ref)");
        table.row([
            mark.to_owned(),
            format!("{dataset}@{}", row.commit.short()),
            row.time_ms.map_or("gone".to_owned(), output::time),
            output::printable(row.job.as_deref().unwrap_or_default().as_bytes()),
            output::printable(row.code.as_deref().unwrap_or_default().as_bytes()),
            output::printable(row.message.lines().next().unwrap_or_default().as_bytes()),
        ]);
    }
    ctx.print_table(&table)
}
