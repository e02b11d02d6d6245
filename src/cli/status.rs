//! `larder status`: what is cached, mounted and kept, and whether daemon, lake and tiers are well.
//!
//! Works without a daemon: the tier is looked at directly, and what the daemon knows is added.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::Context;
use super::output::{self, Table};
use crate::format::ids::CommitId;
use crate::node::api::{MountInfo, NodeInfo};
use crate::store::catalog::lakefmt;
use crate::store::usage::{CommitUsage, TierUsage};

/// How long the lake may take to answer.
const LAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Flags of `larder status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder status
  larder status --json
  larder status --tier fast --no-lake")]
pub struct Args {
    /// Only this tier
    #[arg(long, value_name = "NAME")]
    tier: Option<String>,
    /// Does not ask the lake whether it is there
    #[arg(long)]
    no_lake: bool,
}

/// What `larder status --json` prints.
#[derive(Debug, Serialize)]
struct Status {
    daemon: DaemonStatus,
    lake: LakeStatus,
    tiers: Vec<TierStatus>,
    mounts: Vec<MountInfo>,
}

#[derive(Debug, Serialize)]
struct DaemonStatus {
    running: bool,
    #[serde(flatten)]
    info: Option<NodeInfo>,
    problem: Option<String>,
}

#[derive(Debug, Serialize)]
struct LakeStatus {
    url: String,
    /// None: not asked.
    ok: Option<bool>,
    problem: Option<String>,
}

#[derive(Debug, Serialize)]
struct TierStatus {
    name: String,
    path: PathBuf,
    default: bool,
    ok: bool,
    problem: Option<String>,
    /// The laptop's own tier is made on first use.
    made: bool,
    used_bytes: u64,
    capacity_bytes: u64,
    free_bytes: u64,
    staging_bytes: u64,
    /// Evicting freed nothing lately: do snapshots hold the space?
    evictions_free_nothing: bool,
    commits: Vec<CommitStatus>,
}

#[derive(Debug, Serialize)]
struct CommitStatus {
    dataset: String,
    commit: CommitId,
    percent_cached: u8,
    total_bytes: u64,
    cached_bytes: u64,
    own_bytes: u64,
    shared_bytes: u64,
    last_used_ms: i64,
    /// On all nodes.
    mounts: usize,
    kept: bool,
    ttl_ms: u64,
    /// Until it ages out; null while it is mounted or kept.
    ttl_left_ms: Option<i64>,
}

impl CommitStatus {
    fn new(usage: &CommitUsage, now_ms: i64) -> Self {
        Self {
            dataset: usage.dataset.clone(),
            commit: usage.commit,
            percent_cached: usage.percent_cached,
            total_bytes: usage.total_bytes,
            cached_bytes: usage.cached_bytes,
            own_bytes: usage.own_bytes,
            shared_bytes: usage.shared_bytes,
            last_used_ms: usage.last_used_ms,
            mounts: usage.mounts,
            kept: usage.kept,
            ttl_ms: usage.ttl_ms,
            ttl_left_ms: usage.expires_ms.map(|at| (at - now_ms).max(0)),
        }
    }
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let client = ctx.node_client_at_rest();
    let daemon = ctx.block_on(async {
        match client.info().await {
            Ok(info) => DaemonStatus { running: true, info: Some(info), problem: None },
            Err(error) if error.is_absent() => DaemonStatus { running: false, info: None, problem: None },
            Err(error) => DaemonStatus { running: true, info: None, problem: Some(error.to_string()) },
        }
    });
    let status = Status {
        daemon,
        lake: lake_status(ctx, args.no_lake),
        tiers: tier_statuses(ctx, args.tier.as_deref())?,
        mounts: super::mounts::list(ctx).unwrap_or_default(),
    };
    if ctx.json() {
        return ctx.print_json(&status);
    }
    print(ctx, &status)
}

fn lake_problem(info: &NodeInfo) -> Option<(&str, i64)> {
    Some((info.lake_problem.as_deref()?, info.lake_problem_since_ms?))
}

fn lake_status(ctx: &Context, unasked: bool) -> LakeStatus {
    let url = ctx.config().lake.url.clone();
    if unasked {
        return LakeStatus { url, ok: None, problem: None };
    }
    let asked = ctx.block_on(async {
        let ask = async {
            let lake = ctx.lake().await?;
            Ok::<_, anyhow::Error>(lakefmt::read(lake.as_ref()).await?)
        };
        tokio::time::timeout(LAKE_TIMEOUT, ask).await
    });
    let problem = match asked {
        Err(_) => Some(format!("did not answer within {} s", LAKE_TIMEOUT.as_secs())),
        Ok(Err(error)) => Some(format!("{error:#}")),
        Ok(Ok(None)) => Some("is empty; the first push makes it a lake".to_owned()),
        Ok(Ok(Some(_))) => None,
    };
    LakeStatus { url, ok: Some(problem.is_none()), problem }
}

fn tier_statuses(ctx: &Context, only: Option<&str>) -> anyhow::Result<Vec<TierStatus>> {
    if let Some(name) = only {
        ctx.tier_section(Some(name))?;
    }
    let config = ctx.config();
    let chosen = config.tier.iter().filter(|(name, _)| only.is_none_or(|only| only == *name));
    let mut all = Vec::new();
    for (name, section) in chosen {
        let unused = section.auto_init && !section.path.exists();
        let usage = if unused { Ok(None) } else { usage_of(ctx, name).map(Some) };
        let problem = usage.as_ref().err().map(|error| format!("{error:#}"));
        let usage = usage.ok().flatten();
        let now_ms = usage.as_ref().map_or(0, |usage| usage.now_ms);
        let of = |pick: fn(&TierUsage) -> u64| usage.as_ref().map_or(0, pick);
        all.push(TierStatus {
            name: name.clone(),
            path: section.path.clone(),
            default: config.default_tier.as_ref() == Some(name),
            ok: problem.is_none(),
            problem,
            made: !unused,
            used_bytes: of(|usage| usage.used_bytes),
            capacity_bytes: of(|usage| usage.capacity_bytes),
            free_bytes: of(|usage| usage.free_bytes),
            staging_bytes: of(|usage| usage.staging_bytes),
            evictions_free_nothing: usage.as_ref().is_some_and(|usage| usage.evictions_free_nothing),
            commits: usage.iter().flat_map(|u| &u.commits).map(|commit| CommitStatus::new(commit, now_ms)).collect(),
        });
    }
    Ok(all)
}

fn usage_of(ctx: &Context, name: &str) -> anyhow::Result<TierUsage> {
    let (_, tier) = ctx.tier(Some(name))?;
    Ok(tier.usage()?)
}

fn print(ctx: &Context, status: &Status) -> anyhow::Result<()> {
    let mut out = ctx.out();
    let daemon = match (&status.daemon.info, &status.daemon.problem) {
        (Some(info), _) => format!("runs (pid {})", info.pid),
        (None, Some(problem)) => format!("cannot be asked: {problem}"),
        (None, None) => "does not run; it is started when it is needed".to_owned(),
    };
    writeln!(out, "daemon  {daemon}")?;
    if let Some((problem, since_ms)) = status.daemon.info.as_ref().and_then(lake_problem) {
        let since = output::ago(Some(since_ms), jiff::Timestamp::now().as_millisecond());
        writeln!(out, "        its lake does not answer since {since}: {problem}")?;
        writeln!(out, "        what is cached is served; other reads fail with EIO after fetch.give_up")?;
    }
    let lake = match (&status.lake.ok, &status.lake.problem) {
        (_, Some(problem)) => format!(": {problem}"),
        (Some(true), None) => ": answers".to_owned(),
        _ => String::new(),
    };
    writeln!(out, "lake    {}{lake}", status.lake.url)?;
    for tier in &status.tiers {
        writeln!(out, "{}", tier_line(tier))?;
    }
    for tier in status.tiers.iter().filter(|tier| !tier.commits.is_empty()) {
        writeln!(out, "\n{}", tier.name)?;
        out.write_all(commit_table(tier, &status.mounts).render().as_bytes())?;
    }
    if !status.mounts.is_empty() {
        writeln!(out)?;
        let mut table = Table::new(&["MOUNT", "REVISION", "STATE"]);
        for mount in &status.mounts {
            let state = match (&mount.reason, mount.engine) {
                (Some(reason), _) => format!("{}: {reason}", mount.state),
                (None, Some(engine)) => format!("{} ({})", mount.state, engine.name()),
                (None, None) => mount.state.to_string(),
            };
            table.row([mount.dir.display().to_string(), mount.revision.clone(), state]);
        }
        out.write_all(table.render().as_bytes())?;
    }
    Ok(out.finish()?)
}

fn tier_line(tier: &TierStatus) -> String {
    let name = if tier.default { format!("{} (default)", tier.name) } else { tier.name.clone() };
    match &tier.problem {
        Some(problem) => format!("tier    {name} at {}: {problem}", tier.path.display()),
        None if !tier.made => format!("tier    {name} at {}: made on first use", tier.path.display()),
        None => format!(
            "tier    {name} at {}: {} used, {} free of {}{}",
            tier.path.display(),
            output::bytes(tier.used_bytes),
            output::bytes(tier.free_bytes),
            output::bytes(tier.capacity_bytes),
            if tier.evictions_free_nothing { "; evicting frees nothing (do snapshots hold the space?)" } else { "" }
        ),
    }
}

fn commit_table(tier: &TierStatus, mounts: &[MountInfo]) -> Table {
    let headers = ["COMMIT", ">CACHED", ">SIZE", ">OWN", ">SHARED", "LAST USED", ">MOUNTS", "KEPT", "LEAVES IN"];
    let mut table = Table::new(&headers);
    let now_ms = jiff::Timestamp::now().as_millisecond();
    for commit in &tier.commits {
        let mounted = mounts.iter().find(|mount| mount.commit == commit.commit && mount.revision.contains('@'));
        let name =
            mounted.map_or_else(|| format!("{}@{}", commit.dataset, commit.commit.short()), |m| m.revision.clone());
        let leaves = match commit.ttl_left_ms {
            None => "-".to_owned(),
            Some(left) => output::span(u64::try_from(left / 1000).unwrap_or(0)),
        };
        table.row([
            name,
            format!("{}%", commit.percent_cached),
            output::bytes(commit.total_bytes),
            output::bytes(commit.own_bytes),
            output::bytes(commit.shared_bytes),
            output::ago(Some(commit.last_used_ms), now_ms),
            commit.mounts.to_string(),
            if commit.kept { "yes" } else { "no" }.to_owned(),
            leaves,
        ]);
    }
    table
}
