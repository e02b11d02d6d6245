//! `larder scheduler`: shares GPUs among projects, for real (`serve`) and in simulation.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Value, json};

use super::Context;
use super::output::{self, Table};
use crate::quota::Cause;
use crate::scheduler::simulate::plot::plot;
use crate::scheduler::simulate::report::{Action, Report, Sample};
use crate::scheduler::simulate::{Policy, Scenario, simulate};

pub mod broker;
pub mod client;
mod data;
mod kubernetes;
mod serve;

/// Flags of `larder scheduler`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Runs the scheduler in this process, until SIGINT, SIGTERM or `scheduler stop`; jobs outlive it
    Run(serve::RunArgs),
    /// Places the pods of a Kubernetes cluster, until SIGINT or SIGTERM
    #[command(visible_alias = "kubernetes")]
    Kube(Box<kubernetes::KubeArgs>),
    /// Ends the scheduler; its jobs go on, and the next one takes them up
    #[command(after_help = "Examples:\n  larder scheduler stop")]
    Stop,
    /// Shows whether a scheduler runs; exit status 1 where none does
    #[command(after_help = "Examples:\n  larder scheduler status --json")]
    Status,
    /// Prints the metrics as Prometheus text
    #[command(after_help = "Examples:\n  larder scheduler metrics | grep project_gpus")]
    Metrics,
    /// Prints what the next decision starts from, as JSON
    #[command(after_help = "Examples:\n  larder scheduler snapshot > snapshot.json")]
    Snapshot,
    /// Plays a scenario and prints who had which GPUs when
    Simulate(SimulateArgs),
}

/// Flags of `larder scheduler simulate`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder scheduler simulate examples/scenarios/golden.yaml
  larder scheduler simulate examples/scenarios/reclaim.yaml --compare
  larder scheduler simulate scenario.yaml --actions --why --json")]
struct SimulateArgs {
    /// Scenario (docs/formats/scenario.md)
    #[arg(value_name = "FILE")]
    scenario: PathBuf,
    /// Decides by this rule
    #[arg(long, value_enum, default_value = "fair")]
    policy: PolicyArg,
    /// Plays the scenario by each rule and compares
    #[arg(long, conflicts_with = "policy")]
    compare: bool,
    /// Says at each moment what each waiting job waits for, not only at the end
    #[arg(long)]
    why: bool,
    /// Lists what happened to each job
    #[arg(long)]
    actions: bool,
    /// Columns of the plot; 0: no plot
    #[arg(long, value_name = "N", default_value_t = 72)]
    columns: usize,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum PolicyArg {
    /// Guaranteed quota, surplus lent and taken back
    Fair,
    /// Each project within its quota, nothing is lent
    Quota,
    /// One queue; who can't start holds up the others
    Fifo,
}

impl From<PolicyArg> for Policy {
    fn from(policy: PolicyArg) -> Self {
        match policy {
            PolicyArg::Fair => Self::Fair,
            PolicyArg::Quota => Self::Quota,
            PolicyArg::Fifo => Self::Fifo,
        }
    }
}

impl Args {
    /// Says whether the command needs a configuration; a simulation has none.
    pub(super) fn needs_config(&self) -> bool {
        !matches!(self.command, Command::Simulate(_) | Command::Kube(_))
    }

    /// Says whether the command is a service without a configuration of its own: it logs as one.
    pub(super) fn is_service(&self) -> bool {
        !matches!(self.command, Command::Simulate(_))
    }
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Run(args) => serve::run(ctx, &args),
        Command::Kube(args) => kubernetes::serve_until_stopped(ctx, &args),
        Command::Stop => serve::stop(ctx),
        Command::Status => serve::status(ctx),
        Command::Metrics => serve::metrics(ctx),
        Command::Snapshot => serve::snapshot(ctx),
        Command::Simulate(args) => play(ctx, &args),
    }
}

fn play(ctx: &Context, args: &SimulateArgs) -> anyhow::Result<()> {
    let scenario = read(&args.scenario)?;
    if args.compare {
        return compare(ctx, &scenario);
    }
    let report = simulate(&scenario, args.policy.into())?;
    if ctx.json() {
        return ctx.print_json(&document(&report));
    }
    if !scenario.about.is_empty() {
        ctx.say(&scenario.about);
    }
    ctx.print_table(&timeline(&report))?;
    let mut out = ctx.out();
    if args.columns > 0 {
        writeln!(out)?;
        for line in plot(&report, args.columns) {
            writeln!(out, "{line}")?;
        }
    }
    if args.actions {
        writeln!(out)?;
        for (at_ms, action) in &report.actions {
            writeln!(out, "{:>8}  {}", output::span(at_ms / 1000), told(action))?;
        }
    }
    let last = report.samples.len().saturating_sub(1);
    for sample in report.samples.iter().enumerate().filter(|(at, _)| args.why || *at == last).map(|(_, sample)| sample)
    {
        reasons(&mut out, sample)?;
    }
    writeln!(out, "\n{}", summary(&report))?;
    Ok(out.finish()?)
}

fn read(path: &Path) -> anyhow::Result<Scenario> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the scenario {}", path.display()))?;
    Scenario::parse(&text).with_context(|| format!("{} is no scenario", path.display()))
}

/// A row for each moment: what each project has of its quota, and how many of its jobs wait.
fn timeline(report: &Report) -> Table {
    let mut headers = vec![">TIME".to_owned()];
    headers.extend(report.projects.iter().map(|project| format!(">{}", project.id.as_str().to_uppercase())));
    headers.extend([">IDLE".to_owned(), ">WAIT".to_owned(), "EVENT".to_owned()]);
    let mut table = Table::new(&headers.iter().map(String::as_str).collect::<Vec<_>>());
    for sample in &report.samples {
        let mut cells = vec![output::span(sample.at_ms / 1000)];
        for project in &report.projects {
            let has = sample.allocated.get(&project.id).copied().unwrap_or_default();
            cells.push(match sample.waiting.get(&project.id).map_or(0, Vec::len) {
                0 => format!("{has}/{}", project.quota),
                waiting => format!("{has}/{} +{waiting}", project.quota),
            });
        }
        cells.push(report.gpus.saturating_sub(sample.allocated.values().copied().sum()).to_string());
        cells.push(sample.waiting.values().map(Vec::len).sum::<usize>().to_string());
        cells.push(sample.label.clone().unwrap_or_default());
        table.row(cells);
    }
    table
}

fn reasons(out: &mut impl Write, sample: &Sample) -> std::io::Result<()> {
    if !sample.why.is_empty() {
        writeln!(out, "\nwaiting after {}:", output::span(sample.at_ms / 1000))?;
    }
    for (job, why) in &sample.why {
        writeln!(out, "  {job}: {why}")?;
    }
    Ok(())
}

fn told(action: &Action) -> String {
    match action {
        Action::Submitted(job) => format!("{job} is submitted"),
        Action::Started(job, grounds) => {
            let grounds = serde_json::to_value(grounds).unwrap_or_default();
            format!("{job} starts ({})", grounds.as_str().unwrap_or_default())
        }
        Action::Paused(job, Cause::Needed { by, project, .. }) => format!("{job} is paused for {by} of {project}"),
        Action::Paused(job, Cause::Draining { node }) => format!("{job} is paused: {node} is draining"),
        Action::Ended(job) => format!("{job} ends"),
        Action::Deleted(job) => format!("{job} is deleted"),
    }
}

fn percent(permille: u64) -> String {
    format!("{}.{} %", permille / 10, permille % 10)
}

fn summary(report: &Report) -> String {
    let jain = report.jain_permille();
    format!(
        "used {} of the GPUs (no schedule can use more than {}), Jain index of service per quota {}.{:03}, {} pauses, mean wait {}",
        percent(report.utilisation_permille()),
        percent(report.utilisation_bound_permille()),
        jain / 1000,
        jain % 1000,
        report.pauses(),
        output::span(report.mean_wait_ms() / 1000)
    )
}

fn figures(report: &Report) -> Value {
    json!({
        "policy": report.policy,
        "end_ms": report.end_ms,
        "gpus": report.gpus,
        "used_permille": report.utilisation_permille(),
        "used_bound_permille": report.utilisation_bound_permille(),
        "jain_permille": report.jain_permille(),
        "pauses": report.pauses(),
        "mean_wait_ms": report.mean_wait_ms(),
    })
}

fn document(report: &Report) -> Value {
    let sample = |sample: &Sample| {
        let why: BTreeMap<&str, _> = sample.why.iter().map(|(job, why)| (job.as_str(), why)).collect();
        let projects = report.projects.iter().map(|project| {
            json!({
                "project": project.id,
                "quota": project.quota,
                "fair_share": sample.fair_shares.get(&project.id),
                "allocated": sample.allocated.get(&project.id),
                "waiting": sample.waiting.get(&project.id),
            })
        });
        json!({
            "at_ms": sample.at_ms,
            "label": sample.label,
            "projects": projects.collect::<Vec<_>>(),
            "why": why,
        })
    };
    let actions = report.actions.iter().map(|(at_ms, action)| json!({"at_ms": at_ms, "action": action}));
    json!({
        "summary": figures(report),
        "samples": report.samples.iter().map(sample).collect::<Vec<_>>(),
        "actions": actions.collect::<Vec<_>>(),
        "jobs": report.jobs.iter().map(|(id, job)| (id.as_str(), job)).collect::<BTreeMap<_, _>>(),
    })
}

fn compare(ctx: &Context, scenario: &Scenario) -> anyhow::Result<()> {
    let mut reports = Vec::new();
    for policy in [Policy::Fair, Policy::Quota, Policy::Fifo] {
        reports.push(simulate(scenario, policy)?);
    }
    if ctx.json() {
        return ctx.print_json(&reports.iter().map(figures).collect::<Vec<_>>());
    }
    let mut table = Table::new(&["POLICY", ">USED", ">AT MOST", ">JAIN", ">PAUSES", ">MEAN WAIT", ">END"]);
    for report in &reports {
        let jain = report.jain_permille();
        let policy = serde_json::to_value(report.policy)?;
        table.row([
            policy.as_str().unwrap_or_default().to_owned(),
            percent(report.utilisation_permille()),
            percent(report.utilisation_bound_permille()),
            format!("{}.{:03}", jain / 1000, jain % 1000),
            report.pauses().to_string(),
            output::span(report.mean_wait_ms() / 1000),
            output::span(report.end_ms / 1000),
        ]);
    }
    ctx.print_table(&table)
}
