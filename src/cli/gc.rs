//! `larder gc`: removes what no commit needs.

use super::Context;
use super::output;
use crate::config::Span;
use crate::store::catalog::gc::{self, Amount, GcOptions};

/// Flags of `larder gc`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder gc                 says what would be done, changes nothing
  larder gc --delete        condemns what nothing refers to; deletes what was condemned a day ago
Run `larder gc --delete` daily: each run deletes what the one before condemned.")]
pub struct Args {
    /// Only says what would be done (the default)
    #[arg(long, conflicts_with = "delete")]
    dry_run: bool,
    /// Condemns, and deletes what waited long enough
    #[arg(long)]
    delete: bool,
    /// How long condemned objects wait: longer than any push takes
    #[arg(long, value_name = "TIME", default_value = "1d")]
    wait: Span,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let options = GcOptions { delete: args.delete, wait: args.wait.0, ..GcOptions::default() };
    let report = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        anyhow::Ok(gc::gc(&catalog, &options).await?)
    })?;
    if ctx.json() {
        return ctx.print_json(&report);
    }
    let amount = |amount: Amount| format!("{} objects, {}", amount.objects, output::bytes(amount.bytes));
    let (condemned, deleted) = match report.acted {
        true => ("condemned", "deleted"),
        false => ("would be condemned", "would be deleted"),
    };
    println!("lake: {}", amount(report.listed));
    println!(
        "needed: {} commits of {} datasets, {} packs",
        report.live.commits, report.live.datasets, report.live.packs
    );
    println!("{deleted}: {}", amount(report.deleted));
    println!("{condemned}: {}", amount(report.condemned));
    if report.young.objects > 0 {
        println!("too young, or of a running push: {}", amount(report.young));
    }
    if report.rescued.objects > 0 {
        println!("condemned but needed again: {}", amount(report.rescued));
    }
    for run in &report.pending {
        let due = output::time(run.due_ms);
        println!("waiting until {due}: {} objects, {}", run.objects, output::bytes(run.bytes));
    }
    for push in &report.blocked_by {
        ctx.say(format!("nothing was deleted: a push that began earlier is running: {push}"));
    }
    if !report.acted {
        ctx.say("nothing was changed; `larder gc --delete` acts");
    }
    Ok(())
}
