//! `larder job`: submits, shows and ends jobs.
//!
//! * [`submit`]: from flags to what the scheduler takes. [`template`]: shapes that have names.
//! * [`cluster`]: the same on a Kubernetes cluster, where one is named.
//! * [`show`]: listings and descriptions. [`snapshot`]: what a job made so far as a commit, and back.

use std::collections::BTreeSet;
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::process::CommandExt as _;

use anyhow::Context as _;
use http::Method;
use serde_json::json;

use super::Context;
use super::output::bytes as bytes_of;
use super::report::usage;
use super::scheduler::broker;
use super::scheduler::client::{Client, LOOK_INTERVAL, default_project, project_or_default, quoted};
use crate::scheduler::api::{ExecRequest, RerunRequest};
use crate::scheduler::executor::ExecPlan;
use crate::scheduler::job::State;
use crate::scheduler::view::JobView;

mod cluster;
mod show;
mod snapshot;
pub mod submit;
mod template;

/// Flags of `larder job`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    cluster: cluster::ClusterArgs,
    #[command(subcommand)]
    command: Command,
}

/// Flags of `larder submit`.
#[derive(Debug, clap::Args)]
pub struct SubmitArgs {
    #[command(flatten)]
    cluster: cluster::ClusterArgs,
    #[command(flatten)]
    submit: submit::Args,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Submits a job
    Submit(Box<submit::Args>),
    /// Lists the jobs of a project
    #[command(visible_alias = "ls", after_help = "Examples:\n  larder job list\n  larder job list -A --json")]
    List {
        /// Project (default: that of `larder project use`, else all)
        #[arg(short, long)]
        project: Option<String>,
        /// Jobs of all projects
        #[arg(short = 'A', long, conflicts_with = "project")]
        all: bool,
    },
    /// Says everything about a job: what it asked for, where it stands, what it read and made
    #[command(after_help = "Examples:\n  larder job describe train-1")]
    Describe(One),
    /// Prints what a job printed
    #[command(after_help = "Examples:\n  larder job logs train-1 -f\n  larder job logs gang --rank 2")]
    Logs {
        #[command(flatten)]
        one: One,
        /// Goes on until the job is over
        #[arg(short, long)]
        follow: bool,
        /// Which process of a gang
        #[arg(long, default_value_t = 0)]
        rank: u32,
    },
    /// Runs a command beside a job, with the same surroundings
    #[command(
        visible_alias = "bash",
        after_help = "Examples:\n  larder job exec train-1 -- nvidia-smi\n  larder job bash train-1"
    )]
    Exec {
        #[command(flatten)]
        one: One,
        /// Which process of a gang
        #[arg(long, default_value_t = 0)]
        rank: u32,
        /// Program and arguments (default: sh)
        #[arg(last = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// Ends jobs; their records and logs stay
    #[command(after_help = "Examples:\n  larder job cancel train-1")]
    Cancel(Many),
    /// Ends jobs and forgets them; what they committed stays
    #[command(
        visible_alias = "rm",
        after_help = "Examples:\n  larder job delete train-1 train-2\n  larder job delete --all -p team-d"
    )]
    Delete(Many),
    /// Waits until jobs are over; exit status 1 where one did not succeed
    #[command(after_help = "Examples:\n  larder job wait train-1 && larder mount model ./m --mkdir")]
    Wait(Many),
    /// Shows who uses which GPU now, how busy it is, and how far each job is
    #[command(after_help = "Examples:\n  larder job top")]
    Top,
    /// Says in one sentence what a job waits for, and what would let it run
    #[command(after_help = "Examples:\n  larder job why train-1")]
    Why(One),
    /// Makes a commit of what a job has made so far: its working directory, outputs and logs
    #[command(after_help = "Examples:
  larder job snapshot train-1
  larder job snapshot train-1 --to train-1-checkpoints")]
    Snapshot {
        #[command(flatten)]
        one: One,
        /// Dataset that gets the commit (default: PROJECT-JOB.snapshots)
        #[arg(long, value_name = "DATASET")]
        to: Option<String>,
        /// Does not wait until it is stored; `job describe` shows the commit
        #[arg(long)]
        no_wait: bool,
    },
    /// Submits the job of a snapshot again: it begins with the files of the snapshot
    #[command(after_help = "Examples:
  larder job restore team-a-train-1.snapshots --name train-1b
  larder job restore team-a-train-1.snapshots@3fa9c1 --name more -- python train.py --epochs 20")]
    Restore(snapshot::RestoreArgs),
    /// Names shapes, for `job submit --template NAME,NAME`
    Template(template::Args),
    /// Submits a job again, with the same commits
    #[command(after_help = "Examples:\n  larder job rerun train-1 --name train-1-again")]
    Rerun {
        #[command(flatten)]
        one: One,
        /// Its name (default: the old one with a number)
        #[arg(long)]
        name: Option<String>,
    },
}

/// A job.
#[derive(Debug, clap::Args)]
struct One {
    /// Job
    #[arg(id = "job", value_name = "NAME")]
    name: String,
    /// Project (default: that of `larder project use`, or the only one that has the job)
    #[arg(short, long)]
    project: Option<String>,
}

/// Some jobs.
#[derive(Debug, clap::Args)]
struct Many {
    /// Jobs
    #[arg(value_name = "NAME", required_unless_present = "all")]
    names: Vec<String>,
    /// All jobs of the project
    #[arg(long, conflicts_with = "names")]
    all: bool,
    /// Project (default: that of `larder project use`, or the only one that has the job)
    #[arg(short, long)]
    project: Option<String>,
}

impl Many {
    fn views(&self, ctx: &Context, client: &Client<'_>) -> anyhow::Result<Vec<JobView>> {
        if self.all {
            let project = project_or_default(ctx, self.project.as_deref())?;
            return client.get(&format!("/v1/jobs?project={}", quoted(&project)));
        }
        self.names.iter().map(|name| client.job(self.project.as_deref(), name)).collect()
    }
}

/// Runs `larder submit`.
pub fn run_submit(ctx: &Context, args: SubmitArgs) -> anyhow::Result<()> {
    match args.cluster.context() {
        Some(context) => cluster::submit_job(ctx, &args.cluster, context, args.submit),
        None => submit::run(ctx, args.submit),
    }
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    if let Some(context) = args.cluster.context() {
        return cluster::run(ctx, &args.cluster, context, args.command);
    }
    let client = Client::new(ctx);
    let job = |one: &One| client.job(one.project.as_deref(), &one.name);
    match args.command {
        Command::Submit(args) => submit::run(ctx, *args),
        Command::List { project, all } => list(ctx, &client, project, all),
        Command::Describe(one) => show::describe(ctx, &job(&one)?),
        Command::Logs { one, follow, rank } => logs(ctx, &client, &job(&one)?, follow, rank),
        Command::Exec { one, rank, command } => exec(ctx, &client, &one, rank, command),
        Command::Cancel(many) => end(ctx, many.views(ctx, &client)?, "cancelled", |path, query| {
            client.send(Method::POST, &format!("{path}/cancel{query}"), &json!({}))
        }),
        Command::Delete(many) => {
            end(ctx, many.views(ctx, &client)?, "deleted", |path, query| client.delete(&format!("{path}{query}")))
        }
        Command::Wait(many) => wait(ctx, &client, many.views(ctx, &client)?),
        Command::Top => show::top(ctx, &client),
        Command::Why(one) => show::why(ctx, &job(&one)?),
        Command::Snapshot { one, to, no_wait } => snapshot::take(ctx, &client, &one, to, no_wait),
        Command::Restore(args) => snapshot::restore(ctx, &client, args),
        Command::Template(args) => template::run(ctx, &client, args),
        Command::Rerun { one, name } => {
            let path = client.job_path(one.project.as_deref(), &one.name, "/rerun")?;
            let view: JobView = client.send(Method::POST, &path, &RerunRequest { name })?;
            if ctx.json() {
                return ctx.print_json(&view);
            }
            ctx.say(format!("job {} is submitted", view.job.name));
            Ok(())
        }
    }
}

fn list(ctx: &Context, client: &Client<'_>, project: Option<String>, all: bool) -> anyhow::Result<()> {
    let project = project.or_else(|| default_project(ctx)).filter(|_| !all);
    let query = project.map_or(String::new(), |project| format!("?project={}", quoted(&project)));
    let views: Vec<JobView> = client.get(&format!("/v1/jobs{query}"))?;
    show::list(ctx, &views)
}

/// Ends jobs, one after the other, and says so.
fn end(
    ctx: &Context,
    views: Vec<JobView>,
    done: &str,
    act: impl Fn(&str, &str) -> anyhow::Result<JobView>,
) -> anyhow::Result<()> {
    let mut ended = Vec::new();
    for view in views {
        let path = format!("/v1/jobs/{}", quoted(&view.job.name));
        ended.push(act(&path, &format!("?project={}", quoted(&view.job.project)))?);
        if !ctx.json() {
            ctx.say(format!("job {} of project {} is {done}", view.job.name, view.job.project));
        }
    }
    if ctx.json() { ctx.print_json(&ended) } else { Ok(()) }
}

fn logs(ctx: &Context, client: &Client<'_>, view: &JobView, follow: bool, rank: u32) -> anyhow::Result<()> {
    let mut offset = 0;
    loop {
        let (bytes, part) = client.log(view, rank, offset, follow)?;
        if part.begin > offset {
            ctx.say(format!(
                "{} of this log are given up (`larder scheduler run --log-max`)",
                bytes_of(part.begin - offset)
            ));
        }
        let mut out = ctx.out();
        out.write_all(&bytes)?;
        out.finish()?;
        let came = part.next > offset;
        offset = part.next;
        if part.last || !(follow || came) {
            return Ok(());
        }
        if !came {
            std::thread::sleep(LOOK_INTERVAL);
        }
    }
}

/// Becomes the command beside the job.
fn exec(ctx: &Context, client: &Client<'_>, one: &One, rank: u32, command: Vec<String>) -> anyhow::Result<()> {
    let argv = if command.is_empty() { vec!["sh".to_owned()] } else { command };
    let path = client.job_path(one.project.as_deref(), &one.name, "/exec")?;
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let request = ExecRequest { argv, rank, terminal };
    let plan: ExecPlan = client.send(Method::POST, &path, &request)?;
    let socket = super::scheduler::client::socket(ctx);
    if plan.by_engine && !belongs_to_me(&socket) {
        let view = client.job(one.project.as_deref(), &one.name)?;
        let code = broker::ask(&socket, Some(view.job.project), view.job.name, request)?;
        // As if this process had become the command.
        std::process::exit(code);
    }
    let Some((program, args)) = plan.argv.split_first() else {
        return usage("there is no command");
    };
    let mut command = std::process::Command::new(program);
    command.args(args).env_clear().envs(&plan.env).current_dir(&plan.cwd);
    if let Ok(term) = std::env::var("TERM") {
        command.env("TERM", term);
    }
    if let Some((uid, gid)) = plan.user.filter(|(uid, _)| *uid != nix::unistd::geteuid().as_raw()) {
        command.uid(uid).gid(gid);
    }
    Err(command.exec()).with_context(|| format!("cannot run {program}"))
}

/// Says whether the scheduler is run by who runs this.
fn belongs_to_me(socket: &std::path::Path) -> bool {
    let owner = std::fs::metadata(socket).map(|meta| std::os::unix::fs::MetadataExt::uid(&meta));
    owner.is_ok_and(|owner| owner == nix::unistd::geteuid().as_raw())
}

/// Waits until all are over.
fn wait(ctx: &Context, client: &Client<'_>, mut views: Vec<JobView>) -> anyhow::Result<()> {
    for view in &mut views {
        while !view.job.state.is_over() {
            std::thread::sleep(LOOK_INTERVAL);
            *view = client.job_patiently(view)?;
        }
        if !ctx.json() {
            ctx.say(format!("job {} is {}", view.job.name, view.status));
        }
    }
    if ctx.json() {
        ctx.print_json(&views)?;
    }
    let bad: BTreeSet<&str> =
        views.iter().filter(|view| view.job.state != State::Succeeded).map(|view| view.job.name.as_str()).collect();
    match bad.is_empty() {
        true => Ok(()),
        false => anyhow::bail!("did not succeed: {}", bad.into_iter().collect::<Vec<_>>().join(", ")),
    }
}
