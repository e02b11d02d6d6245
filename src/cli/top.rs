//! `larder top`: what each mount does, live.

use std::io::{IsTerminal, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::output::{self, Table};
use super::{Context, mounts};
use crate::fs::session::MountStats;
use crate::node::api::MountInfo;

/// Flags of `larder top`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder top
  larder top --interval 5s
  larder top --count 1 --json")]
pub struct Args {
    /// Time between two looks
    #[arg(long, default_value = "2s", value_name = "TIME", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Ends after so many (default: never)
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

/// What a mount did between two looks.
#[derive(Debug, PartialEq, Serialize)]
struct Line {
    dir: PathBuf,
    revision: String,
    state: String,
    read_bytes_per_s: u64,
    requests_per_s: u64,
    waited_per_s: u64,
    errors: u64,
    /// None: the kernel opens files of this mount without telling.
    open_files: Option<u64>,
    passthrough_files: u64,
    busy_workers: u64,
    workers: u64,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let (mut before, mut looked) = (mounts::list(ctx)?, Instant::now());
    for round in 1.. {
        std::thread::sleep(args.interval);
        let (now, elapsed) = (mounts::list(ctx)?, looked.elapsed());
        looked = Instant::now();
        show(ctx, &compare(&before, &now, elapsed))?;
        before = now;
        if args.count.is_some_and(|count| round >= count) {
            break;
        }
    }
    Ok(())
}

fn compare(before: &[MountInfo], now: &[MountInfo], elapsed: Duration) -> Vec<Line> {
    let millis = elapsed.as_millis().max(1) as u64;
    let lines = now.iter().map(|mount| {
        let stats = mount.stats.unwrap_or_default();
        let then = before.iter().find(|then| then.id == mount.id).and_then(|then| then.stats);
        // A daemon that was replaced counts from 0 again.
        let rate = |of: fn(&MountStats) -> u64| {
            let now = of(&stats);
            let grown = then.as_ref().and_then(|then| now.checked_sub(of(then))).unwrap_or(now);
            grown.saturating_mul(1000) / millis
        };
        Line {
            dir: mount.dir.clone(),
            revision: mount.revision.clone(),
            state: mount.state.to_string(),
            read_bytes_per_s: rate(|stats| stats.read_bytes),
            requests_per_s: rate(|stats| stats.requests),
            waited_per_s: rate(|stats| stats.waited),
            errors: stats.errors,
            open_files: (!stats.skips_opens).then_some(stats.open_files),
            passthrough_files: stats.passthrough_files,
            busy_workers: stats.busy_workers,
            workers: stats.workers,
        }
    });
    lines.collect()
}

fn show(ctx: &Context, lines: &[Line]) -> anyhow::Result<()> {
    if ctx.json() {
        return ctx.print_json(&lines);
    }
    let mut out = ctx.out();
    if std::io::stdout().is_terminal() {
        // To the upper left corner, and nothing below.
        write!(out, "\x1b[H\x1b[J")?;
    }
    let mut table =
        Table::new(&["DIR", "REVISION", "STATE", "READ/S", "REQ/S", "WAITED/S", "ERRORS", "OPEN", "BY KERNEL", "BUSY"]);
    for line in lines {
        table.row([
            line.dir.display().to_string(),
            line.revision.clone(),
            line.state.clone(),
            output::bytes(line.read_bytes_per_s),
            line.requests_per_s.to_string(),
            line.waited_per_s.to_string(),
            line.errors.to_string(),
            line.open_files.map_or_else(|| "-".to_owned(), |count| count.to_string()),
            line.passthrough_files.to_string(),
            format!("{}/{}", line.busy_workers, line.workers),
        ]);
    }
    write!(out, "{}", table.render())?;
    Ok(out.finish()?)
}
