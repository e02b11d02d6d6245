//! `larder tier`: makes tiers, says what they hold and why, sweeps, checks.
//!
//! Looks at the tier's directory itself: no daemon is needed, and no lake.

use std::path::PathBuf;

use serde::Serialize;

use super::Context;
use super::output::{self, Table};
use super::report::HintExt as _;
use crate::config::{Size, Span};
use crate::format::ids::NodeId;
use crate::store::tier::{
    CheckReport, Decision, InitOptions, Marker, Policy, Steward, StewardReport, SweepPlan, Tier, Verdict,
};
use crate::store::usage::{DatasetUsage, TierUsage};

mod moving;
mod why;

/// How often a waiting sweep looks whether it is its turn.
const LOOK_PERIOD: std::time::Duration = std::time::Duration::from_millis(200);
/// When a waiting sweep says that it waits.
const SAY_AFTER: std::time::Duration = std::time::Duration::from_secs(2);

/// Flags of `larder tier`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder tier init /mnt/tier --capacity 4TiB --ttl 1d
  larder tier df
  larder tier why 3fa9c1
  larder tier sweep --dry-run")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Makes an empty directory a tier
    Init(InitArgs),
    /// Shows used, free and leftover bytes
    #[command(after_help = "Examples:\n  larder tier df --json")]
    Df(TierArgs),
    /// Lists the tiers that are configured
    #[command(after_help = "Examples:\n  larder tier list --json")]
    List,
    /// Lists the cached commits and what they cost
    #[command(after_help = "Examples:\n  larder tier commits --tier fast")]
    Commits(TierArgs),
    /// Moves a commit to another tier
    Move(moving::Args),
    /// Compares the accounting with every file and finds what is out of order
    #[command(after_help = "Examples:\n  larder tier check")]
    Check(CheckArgs),
    /// Says why a commit stays, or why it left
    #[command(after_help = "Examples:\n  larder tier why 3fa9c1\n  larder tier why photos@v2 --json")]
    Why(WhyArgs),
    /// Removes what aged out, orphans and leftovers now
    #[command(after_help = "Examples:\n  larder tier sweep --dry-run")]
    Sweep(SweepArgs),
    /// Digests the objects again and sets damaged ones aside
    #[command(after_help = "Examples:\n  larder tier scrub")]
    Scrub(ScrubArgs),
    /// Drops what a node that will not come back left in the tier
    #[command(after_help = "Examples:\n  larder tier forget-node NODE-ID")]
    ForgetNode(ForgetArgs),
}

/// Flags of `larder tier init`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder tier init /mnt/tier
  larder tier init /mnt/tier --capacity 4TiB --ttl 12h --mode 0770
  larder tier init /mnt/tier --if-missing     # in scripts that run on every node")]
pub struct InitArgs {
    /// The directory: empty, or made now
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Bytes that the tier may take (default: what the file system has)
    #[arg(long, value_name = "SIZE")]
    capacity: Option<Size>,
    /// How long a commit stays after its last use (default: 1d)
    #[arg(long, value_name = "TIME")]
    ttl: Option<Span>,
    /// Permissions of its folders, octal; files get the same without `x`
    #[arg(long, value_name = "MODE", default_value = "0770", value_parser = parse_mode)]
    mode: u32,
    /// Owner of its files, where this process may give files away
    #[arg(long, value_name = "UID")]
    uid: Option<u32>,
    /// Group of its files
    #[arg(long, value_name = "GID")]
    gid: Option<u32>,
    /// Takes a directory that is a tier already as it is
    #[arg(long)]
    if_missing: bool,
}

/// Flags of commands about one tier.
#[derive(Debug, clap::Args)]
pub struct TierArgs {
    /// Name of the tier in the configuration (default: the default one)
    #[arg(long, value_name = "NAME")]
    tier: Option<String>,
}

/// Flags of `larder tier check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    #[command(flatten)]
    tier: TierArgs,
    /// Mends what can be mended
    #[arg(long)]
    repair: bool,
}

/// Flags of `larder tier why`.
#[derive(Debug, clap::Args)]
pub struct WhyArgs {
    /// The beginning of a commit's id, or a revision
    #[arg(value_name = "COMMIT|DATASET[@REV]")]
    commit: String,
    #[command(flatten)]
    tier: TierArgs,
}

/// Flags of `larder tier sweep`.
#[derive(Debug, clap::Args)]
pub struct SweepArgs {
    #[command(flatten)]
    tier: TierArgs,
    /// Says what would be done, and does nothing
    #[arg(long)]
    dry_run: bool,
    /// How long to wait while another process is sweeping; after it: exit status 1
    #[arg(long, value_name = "TIME", default_value = "3m")]
    wait: Span,
}

/// Flags of `larder tier scrub`.
#[derive(Debug, clap::Args)]
pub struct ScrubArgs {
    #[command(flatten)]
    tier: TierArgs,
    /// At most so many bytes a second
    #[arg(long, value_name = "SIZE", default_value = "200MiB")]
    rate: Size,
    /// At most so many objects (default: each once)
    #[arg(long, value_name = "N")]
    objects: Option<u64>,
}

/// Flags of `larder tier forget-node`.
#[derive(Debug, clap::Args)]
pub struct ForgetArgs {
    /// The node's id, as the tier's `nodes` folder has it
    #[arg(value_name = "NODE")]
    node: NodeId,
    #[command(flatten)]
    tier: TierArgs,
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).map_err(|_| "write octal digits, such as 0770".to_owned())?;
    if mode & 0o700 != 0o700 || mode > 0o7777 {
        return Err("the owner needs all of rwx, such as in 0770".to_owned());
    }
    Ok(mode)
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Init(args) => init(ctx, &args),
        Command::Df(args) => df(ctx, &args),
        Command::List => list(ctx),
        Command::Commits(args) => commits(ctx, &args),
        Command::Move(args) => moving::run(ctx, &args),
        Command::Check(args) => check(ctx, &args),
        Command::Why(args) => why::run(ctx, &args.commit, args.tier.tier.as_deref()),
        Command::Sweep(args) => sweep(ctx, &args),
        Command::Scrub(args) => scrub(ctx, &args),
        Command::ForgetNode(args) => {
            open(ctx, &args.tier)?.1.forget_node(&args.node)?;
            ctx.say(format_args!("forgot node {}", args.node));
            Ok(())
        }
    }
}

fn open(ctx: &Context, args: &TierArgs) -> anyhow::Result<(String, Tier)> {
    ctx.tier(args.tier.as_deref())
}

#[derive(Serialize)]
struct InitOutput<'a> {
    path: String,
    #[serde(flatten)]
    marker: &'a Marker,
}

fn init(ctx: &Context, args: &InitArgs) -> anyhow::Result<()> {
    let options = InitOptions {
        capacity_bytes: args.capacity.map(|size| size.0),
        ttl_ms: args.ttl.map(|span| span.as_ms()),
        dir_mode: args.mode,
        uid: args.uid,
        gid: args.gid,
    };
    let dir = std::path::absolute(&args.dir)?;
    let (marker, is_new) =
        if args.if_missing { Tier::init_if_missing(&dir, &options)? } else { (Tier::init(&dir, &options)?, true) };
    if ctx.json() {
        return ctx.print_json(&InitOutput { path: dir.display().to_string(), marker: &marker });
    }
    if !is_new {
        ctx.say(format_args!("{}: is a tier already ({})", dir.display(), marker.tier));
        return Ok(());
    }
    ctx.say(format_args!("{}: is a tier now ({})", dir.display(), marker.tier));
    ctx.say(format_args!("use it with `LARDER_TIER={}`, or a [tier.NAME] in the configuration", dir.display()));
    Ok(())
}

#[derive(Serialize)]
struct DfOutput<'a> {
    tier: &'a str,
    path: String,
    id: String,
    used_bytes: u64,
    capacity_bytes: u64,
    capacity_configured: bool,
    free_bytes: u64,
    staging_bytes: u64,
    trash_bytes: u64,
    orphan_bytes: u64,
    quarantine_bytes: u64,
    held_only_bytes: u64,
    temp_bytes: u64,
    total_bytes: u64,
    objects: u64,
    commits: usize,
    evictions_free_nothing: bool,
    datasets: &'a [DatasetUsage],
}

fn df(ctx: &Context, args: &TierArgs) -> anyhow::Result<()> {
    let (name, tier) = open(ctx, args)?;
    let usage = tier.usage()?;
    if ctx.json() {
        return ctx.print_json(&DfOutput {
            tier: &name,
            path: tier.dir().display().to_string(),
            id: tier.id().to_string(),
            used_bytes: usage.used_bytes,
            capacity_bytes: usage.capacity_bytes,
            capacity_configured: usage.capacity_configured,
            free_bytes: usage.free_bytes,
            staging_bytes: usage.staging_bytes,
            trash_bytes: usage.trash_bytes,
            orphan_bytes: usage.orphan_bytes,
            quarantine_bytes: usage.quarantine_bytes,
            held_only_bytes: usage.held_only_bytes,
            temp_bytes: usage.temp_bytes,
            total_bytes: usage.total_bytes,
            objects: usage.objects,
            commits: usage.commits.len(),
            evictions_free_nothing: usage.evictions_free_nothing,
            datasets: &usage.datasets,
        });
    }
    let mut table =
        Table::new(&["TIER", ">USED", ">CAPACITY", ">FREE", ">STAGING", ">TRASH", ">ORPHANS", ">COMMITS", "PATH"]);
    table.row([
        name,
        output::bytes(usage.used_bytes),
        output::bytes(usage.capacity_bytes),
        output::bytes(usage.free_bytes),
        output::bytes(usage.staging_bytes),
        output::bytes(usage.trash_bytes),
        output::bytes(usage.orphan_bytes),
        usage.commits.len().to_string(),
        tier.dir().display().to_string(),
    ]);
    ctx.print_table(&table)?;
    if usage.datasets.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(&["DATASET", ">COMMITS", ">USED", ">OWN"]);
    for of in &usage.datasets {
        let (used, own) = (output::bytes(of.cached_bytes), output::bytes(of.own_bytes));
        table.row([of.dataset.clone(), of.commits.to_string(), used, own]);
    }
    let mut out = ctx.out();
    std::io::Write::write_all(&mut out, format!("\n{}", table.render()).as_bytes())?;
    Ok(out.finish()?)
}

#[derive(Serialize)]
struct ListRow<'a> {
    name: &'a str,
    path: &'a std::path::Path,
    default: bool,
    /// Why it cannot be used.
    problem: Option<String>,
    /// Null where it cannot be used, or was not made yet.
    capacity_bytes: Option<u64>,
    used_bytes: Option<u64>,
    free_bytes: Option<u64>,
    commits: Option<usize>,
    ttl_ms: Option<u64>,
    /// Datasets for which the configuration names it.
    datasets: Vec<&'a str>,
}

fn list(ctx: &Context) -> anyhow::Result<()> {
    let config = ctx.config();
    let rows = config.tier.iter().map(|(name, section)| {
        let unmade = section.auto_init && !Tier::is_tier(&section.path);
        let asked = if unmade {
            None
        } else {
            Some(ctx.tier(Some(name)).and_then(|(_, tier)| Ok((tier.usage()?, tier.ttl_ms()))))
        };
        let problem = asked.as_ref().and_then(|asked| asked.as_ref().err().map(|error| format!("{error:#}")));
        let known = asked.and_then(Result::ok);
        let datasets = config.dataset.iter().filter(|(_, of)| of.tier.as_ref() == Some(name));
        ListRow {
            name,
            path: &section.path,
            default: config.default_tier.as_ref() == Some(name),
            problem,
            capacity_bytes: known.as_ref().map(|(usage, _)| usage.capacity_bytes),
            used_bytes: known.as_ref().map(|(usage, _)| usage.used_bytes),
            free_bytes: known.as_ref().map(|(usage, _)| usage.free_bytes),
            commits: known.as_ref().map(|(usage, _)| usage.commits.len()),
            ttl_ms: known.as_ref().map(|(_, ttl_ms)| *ttl_ms),
            datasets: datasets.map(|(dataset, _)| dataset.as_str()).collect(),
        }
    });
    let rows: Vec<ListRow<'_>> = rows.collect();
    if ctx.json() {
        return ctx.print_json(&rows);
    }
    let mut table =
        Table::new(&["TIER", "DEFAULT", ">USED", ">FREE", ">CAPACITY", ">COMMITS", ">LEAVES AFTER", "PATH", "PROBLEM"]);
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), output::bytes);
    for row in &rows {
        table.row([
            row.name.to_owned(),
            if row.default { "yes" } else { "no" }.to_owned(),
            size(row.used_bytes),
            size(row.free_bytes),
            size(row.capacity_bytes),
            row.commits.map_or_else(|| "-".to_owned(), |commits| commits.to_string()),
            row.ttl_ms.map_or_else(|| "-".to_owned(), |ttl_ms| output::span(ttl_ms / 1000)),
            row.path.display().to_string(),
            row.problem.clone().unwrap_or_default(),
        ]);
    }
    ctx.print_table(&table)
}

fn commits(ctx: &Context, args: &TierArgs) -> anyhow::Result<()> {
    let (_, tier) = open(ctx, args)?;
    let usage: TierUsage = tier.usage()?;
    if ctx.json() {
        return ctx.print_json(&usage);
    }
    let mut table = Table::new(&["DATASET", "COMMIT", ">CACHED", ">OWN", ">SHARED", "LAST USED", "STATE", "LEAVES"]);
    for commit in &usage.commits {
        let state = match (commit.mounts, commit.kept, commit.held) {
            (0, false, false) => "cached".to_owned(),
            (0, true, _) => "kept".to_owned(),
            (0, false, true) => "held".to_owned(),
            (mounts, kept, _) => format!("in use ({mounts}){}", if kept { ", kept" } else { "" }),
        };
        let leaves = commit.expires_ms.map_or_else(
            || "-".to_owned(),
            |at| match u64::try_from(at - usage.now_ms) {
                Ok(left) => format!("in {}", output::span(left / 1000)),
                Err(_) => "at the next sweep".to_owned(),
            },
        );
        table.row([
            commit.dataset.clone(),
            commit.commit.short(),
            format!("{}%", commit.percent_cached),
            output::bytes(commit.own_bytes),
            output::bytes(commit.shared_bytes),
            output::ago(Some(commit.last_used_ms), usage.now_ms),
            state,
            leaves,
        ]);
    }
    ctx.print_table(&table)
}

#[derive(Serialize)]
struct CheckOutput<'a> {
    good: bool,
    findings: &'a [crate::store::tier::Finding],
    accounted_bytes: u64,
    walked_bytes: u64,
}

fn check(ctx: &Context, args: &CheckArgs) -> anyhow::Result<()> {
    let (name, tier) = open(ctx, &args.tier)?;
    let report: CheckReport = tier.check(args.repair)?;
    if ctx.json() {
        ctx.print_json(&CheckOutput {
            good: report.is_good(),
            findings: &report.findings,
            accounted_bytes: report.usage.total_bytes,
            walked_bytes: report.walked_bytes,
        })?;
    } else if !report.findings.is_empty() {
        let mut table = Table::new(&["PATH", "PROBLEM", "REPAIRED"]);
        for found in &report.findings {
            let repaired = if found.repaired { "yes" } else { "no" };
            table.row([output::printable(found.path.as_bytes()), found.problem.clone(), repaired.to_owned()]);
        }
        ctx.print_table(&table)?;
    }
    if !report.is_good() {
        let next = if args.repair { "" } else { "; `larder tier check --repair` mends what can be mended" };
        anyhow::bail!("tier {name}: {} things are out of order{next}", report.findings.len());
    }
    ctx.say(format_args!("tier {name}: in order, {} accounted for and found", output::bytes(report.walked_bytes)));
    Ok(())
}

#[derive(Serialize)]
struct DryRun<'a> {
    decisions: &'a [Decision],
    orphans: usize,
    staging: usize,
    restores: usize,
    taken_bytes: u64,
    high_bytes: u64,
    low_bytes: u64,
}

fn sweep(ctx: &Context, args: &SweepArgs) -> anyhow::Result<()> {
    let (name, tier) = open(ctx, &args.tier)?;
    let policy = tier.policy();
    if args.dry_run {
        let plan: SweepPlan = tier.dry_run(&policy)?;
        if ctx.json() {
            return ctx.print_json(&DryRun {
                decisions: &plan.decisions,
                orphans: plan.orphans.len(),
                staging: plan.staging.len(),
                restores: plan.restore.len() + plan.innocent.len(),
                taken_bytes: plan.taken_bytes,
                high_bytes: plan.high_bytes,
                low_bytes: plan.low_bytes,
            });
        }
        return print_decisions(ctx, &plan.decisions);
    }
    let report: StewardReport = sweep_in_turn(ctx, &name, &tier, &policy, args.wait)?;
    if ctx.json() {
        ctx.print_json(&report)?;
    } else if !report.elsewhere {
        print_decisions(ctx, &report.decisions)?;
        ctx.say(format_args!(
            "tier {name}: {} commits left, {} moved to the trash, {} deleted (the trash is deleted {} later)",
            report.evicted,
            output::bytes(report.moved_bytes),
            output::bytes(report.deleted_bytes),
            output::span(policy.grace_ms.div_ceil(1000)),
        ));
    }
    if let Some(steward) = &report.steward {
        let who = steward_text(steward);
        return Err(anyhow::anyhow!("tier {name}: nothing was swept: {who} is sweeping it"))
            .hint("wait longer with --wait; a steward that died is replaced two minutes after its last sign of life");
    }
    if report.freed_nothing_bytes.is_some() {
        ctx.say(format_args!("tier {name}: deleting freed nothing; do snapshots hold the space?"));
    }
    if let Some(first) = report.failed.first() {
        anyhow::bail!("{} steps failed, the first: {first}", report.failed.len());
    }
    Ok(())
}

/// Sweeps when it is our turn; gives the last refusal where that takes too long.
fn sweep_in_turn(ctx: &Context, name: &str, tier: &Tier, policy: &Policy, wait: Span) -> anyhow::Result<StewardReport> {
    let begun = std::time::Instant::now();
    let mut told = false;
    loop {
        let report = tier.steward_step(policy)?;
        let left = wait.0.saturating_sub(begun.elapsed());
        let Some(steward) = report.steward.as_ref().filter(|_| !left.is_zero()) else {
            return Ok(report);
        };
        if !told && begun.elapsed() >= SAY_AFTER {
            told = true;
            ctx.say(format_args!("tier {name}: {} is sweeping it; waiting", steward_text(steward)));
        }
        std::thread::sleep(LOOK_PERIOD.min(left));
    }
}

fn steward_text(steward: &Steward) -> String {
    let host = steward.host.as_deref().unwrap_or("unknown host");
    let idle = output::span(u64::try_from(steward.idle_ms / 1000).unwrap_or(0));
    format!("node {} ({host}, last seen {idle} ago)", steward.node)
}

fn print_decisions(ctx: &Context, decisions: &[Decision]) -> anyhow::Result<()> {
    let mut table = Table::new(&["DATASET", "COMMIT", "DECISION", "REASON"]);
    for decision in decisions {
        let verdict = if decision.verdict == Verdict::Stays { "stays" } else { "leaves" };
        table.row([decision.dataset.clone(), decision.key.commit.short(), verdict.to_owned(), decision.reason.text()]);
    }
    ctx.print_table(&table)
}

fn scrub(ctx: &Context, args: &ScrubArgs) -> anyhow::Result<()> {
    let (name, tier) = open(ctx, &args.tier)?;
    let limit = match args.objects {
        Some(objects) => objects,
        None => tier.usage()?.objects,
    };
    let start = std::time::Instant::now();
    let (mut read, mut bad, mut reports) = (0u64, 0u64, Vec::new());
    let mut pace = |bytes: u64| {
        read += bytes;
        let due = std::time::Duration::from_secs_f64(read as f64 / args.rate.0.max(1) as f64);
        std::thread::sleep(due.saturating_sub(start.elapsed()));
    };
    for _ in 0..limit {
        let Some(pack) = tier.next_scrub()? else {
            break;
        };
        let report = tier.scrub(&pack, &mut pace)?;
        bad += u64::from(report.outcome.is_bad());
        reports.push(report);
    }
    if ctx.json() {
        ctx.print_json(&reports)?;
    }
    ctx.say(format_args!("tier {name}: {} objects scrubbed, {bad} damaged and set aside", reports.len()));
    Ok(())
}
