//! `larder diff`: shows what differs between two commits.

use std::io::Write;

use serde::Serialize;

use super::Context;
use super::ls::{EntryRow, row};
use super::output;
use crate::format::refs::Revision;
use crate::store::catalog::compare::{self, ChangeKind, DiffStat};

/// Flags of `larder diff`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder diff photos@v1 photos@v2
  larder diff photos@v1 photos --stat
Letters: A added, D removed, M other content, m other mode or time, T another kind.")]
pub struct Args {
    /// Older revision
    #[arg(value_name = "A")]
    before: String,
    /// Newer revision; `@v2` means the dataset of A
    #[arg(value_name = "B")]
    after: String,
    /// Shows sums only
    #[arg(long)]
    stat: bool,
    /// Ends with exit status 1 where something differs
    #[arg(long)]
    exit_code: bool,
}

#[derive(Serialize)]
struct ChangeRow {
    path: String,
    change: ChangeKind,
    before: Option<EntryRow>,
    after: Option<EntryRow>,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let before = Revision::parse(&args.before)?;
    let after = match args.after.strip_prefix('@') {
        Some(at) => Revision::parse(&format!("{}@{at}", before.dataset.as_str()))?,
        None => Revision::parse(&args.after)?,
    };
    let mut out = ctx.out();
    let listed = !args.stat;
    let mut first = true;
    let stat = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        let (before, after) = (catalog.snapshot(&before).await?, catalog.snapshot(&after).await?);
        compare::diff(&catalog.meta, &before, &after, |kind, change| {
            if !listed {
                return anyhow::Ok(());
            }
            let path = &change.path;
            if !ctx.json() {
                writeln!(out, "{} {}", kind.letter(), output::printable(path))?;
                return Ok(());
            }
            let row = ChangeRow {
                path: String::from_utf8_lossy(path).into_owned(),
                change: kind,
                before: change.before.as_ref().map(|entry| row(path, entry)),
                after: change.after.as_ref().map(|entry| row(path, entry)),
            };
            let lead = if std::mem::take(&mut first) { "[" } else { "," };
            Ok(writeln!(out, "{lead}{}", serde_json::to_string(&row)?)?)
        })
        .await
    })?;
    match (ctx.json(), listed) {
        (true, true) => writeln!(out, "{}", if first { "[]" } else { "]" })?,
        (true, false) => writeln!(out, "{}", serde_json::to_string_pretty(&stat)?)?,
        (false, true) => {}
        (false, false) => print_stat(&mut out, &stat)?,
    }
    out.finish()?;
    if args.exit_code && !stat.is_empty() {
        return Err(Differs.into());
    }
    Ok(())
}

fn print_stat(out: &mut impl Write, stat: &DiffStat) -> std::io::Result<()> {
    writeln!(
        out,
        "{} added, {} removed, {} with other content, {} with other mode or time, {} of another kind",
        stat.added, stat.removed, stat.content, stat.attributes, stat.replaced
    )?;
    writeln!(out, "{} new, {} gone", output::bytes(stat.bytes_added), output::bytes(stat.bytes_removed))
}

/// The commits differ, and `--exit-code` was given.
#[derive(Debug, thiserror::Error)]
#[error("the commits differ")]
struct Differs;
