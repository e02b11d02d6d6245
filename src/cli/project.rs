//! `larder project`: who may use how many GPUs.

use http::Method;

use super::Context;
use super::output::{self, Table};
use super::scheduler::client::{Client, default_project, quoted, set_default_project};
use crate::config::Span;
use crate::quota::MilliGpus;
use crate::scheduler::registry::{ProjectChange, ProjectView};

/// Flags of `larder project`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Makes a project
    #[command(after_help = "Examples:
  larder project create team-a --gpus 4
  larder project create team-b --gpus 2 --weight 4 --limit 8 --interactive-limit 12h")]
    Create {
        /// Its name
        name: String,
        #[command(flatten)]
        change: Change,
    },
    /// Changes a project; what is not named stays
    #[command(after_help = "Examples:
  larder project set team-a --gpus 6
  larder project set team-a --limit none")]
    Set {
        /// Its name
        name: String,
        #[command(flatten)]
        change: Change,
    },
    /// Lists the projects: what they have, of which quota
    #[command(visible_alias = "ls", after_help = "Examples:\n  larder project list --json")]
    List,
    /// Makes a project the one that is meant where none is named
    #[command(after_help = "Examples:\n  larder project use team-a")]
    Use {
        /// Its name
        name: String,
    },
    /// Removes a project whose jobs are over
    #[command(visible_alias = "delete", after_help = "Examples:\n  larder project rm team-a")]
    Rm {
        /// Its name
        name: String,
    },
}

/// What may be set of a project.
#[derive(Debug, clap::Args)]
struct Change {
    /// GPUs that it is guaranteed (its quota)
    #[arg(short, long, value_name = "GPUS")]
    gpus: Option<MilliGpus>,
    /// Its part of what quotas leave over, relative to the others'; `none`: its quota
    #[arg(long, value_name = "N")]
    weight: Option<String>,
    /// GPUs that it never exceeds; `none`: no limit
    #[arg(long, value_name = "GPUS")]
    limit: Option<String>,
    /// Pools for its train jobs, with commas; empty: all
    #[arg(long, value_name = "POOL,...")]
    train_pools: Option<String>,
    /// Pools for its interactive jobs, with commas; empty: all
    #[arg(long, value_name = "POOL,...")]
    interactive_pools: Option<String>,
    /// How long an interactive job may run; `none`: as long as it likes
    #[arg(long, value_name = "DURATION")]
    interactive_limit: Option<String>,
    /// Users that may submit, by name or number, with commas; empty: all
    #[arg(long, value_name = "USER,...")]
    users: Option<String>,
}

fn parts(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

fn user(text: &str) -> anyhow::Result<u32> {
    if let Ok(uid) = text.parse() {
        return Ok(uid);
    }
    match nix::unistd::User::from_name(text) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        _ => super::report::usage(format!("there is no user `{text}`")),
    }
}

impl Change {
    fn request(&self) -> anyhow::Result<ProjectChange> {
        let mut change = ProjectChange { quota: self.gpus, ..ProjectChange::default() };
        let mut set = |name: &str, text: &Option<String>| match text.as_deref() {
            Some("none") => {
                change.unset.insert(name.to_owned());
                None
            }
            given => given.map(str::to_owned),
        };
        let (weight, limit) = (set("weight", &self.weight), set("limit", &self.limit));
        let interactive = set("interactive_limit_ms", &self.interactive_limit);
        change.weight = weight.map(|text| text.parse()).transpose()?;
        change.limit = limit.map(|text| text.parse()).transpose()?;
        change.interactive_limit_ms =
            interactive.map(|text| text.parse::<Span>()).transpose()?.map(|span| span.as_ms());
        let pools = |text: &Option<String>| text.as_deref().map(|text| parts(text).map(str::to_owned).collect());
        change.train_pools = pools(&self.train_pools);
        change.interactive_pools = pools(&self.interactive_pools);
        change.users = self.users.as_deref().map(|text| parts(text).map(user).collect()).transpose()?;
        Ok(change)
    }
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let client = Client::new(ctx);
    let path = |name: &str| format!("/v1/projects/{}", quoted(name));
    match args.command {
        Command::Create { name, change } => {
            let made: ProjectView = client.send(Method::POST, &path(&name), &change.request()?)?;
            tell(ctx, &made, "made")
        }
        Command::Set { name, change } => {
            let set: ProjectView = client.send(Method::PATCH, &path(&name), &change.request()?)?;
            tell(ctx, &set, "changed")
        }
        Command::Rm { name } => {
            let gone: ProjectView = client.delete(&path(&name))?;
            tell(ctx, &gone, "removed")
        }
        Command::Use { name } => {
            let projects: Vec<ProjectView> = client.get("/v1/projects")?;
            if !projects.iter().any(|view| view.name == name) {
                return super::report::usage(format!("there is no project `{name}`"));
            }
            set_default_project(ctx, &name)?;
            ctx.say(format!("{name} is the project that is meant where none is named"));
            Ok(())
        }
        Command::List => list(ctx, &client.get::<Vec<ProjectView>>("/v1/projects")?),
    }
}

fn tell(ctx: &Context, view: &ProjectView, done: &str) -> anyhow::Result<()> {
    if ctx.json() {
        return ctx.print_json(view);
    }
    ctx.say(format!("project {} is {done}: {} GPUs guaranteed", view.name, view.project.shares.quota));
    Ok(())
}

fn list(ctx: &Context, views: &[ProjectView]) -> anyhow::Result<()> {
    if ctx.json() {
        return ctx.print_json(&views);
    }
    let default = default_project(ctx);
    let mut table = Table::new(&[
        "PROJECT",
        ">QUOTA",
        ">ALLOCATED",
        ">FAIR SHARE",
        ">WEIGHT",
        ">LIMIT",
        ">RUNNING",
        ">PENDING",
        "INTERACTIVE",
    ]);
    for view in views {
        let shares = &view.project.shares;
        let mark = if default.as_ref() == Some(&view.name) { "*" } else { "" };
        let or_dash = |amount: Option<MilliGpus>| amount.map_or("-".to_owned(), |amount| amount.to_string());
        table.row([
            format!("{}{mark}", view.name),
            shares.quota.to_string(),
            view.allocated.to_string(),
            or_dash(view.fair_share),
            shares.weight.unwrap_or(shares.quota).to_string(),
            or_dash(shares.limit),
            view.running.to_string(),
            view.pending.to_string(),
            view.project.interactive_limit_ms.map_or("-".to_owned(), |limit| output::span(limit / 1000)),
        ]);
    }
    ctx.print_table(&table)
}
