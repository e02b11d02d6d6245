//! `larder node`: where GPUs are.

use std::collections::{BTreeMap, BTreeSet};

use http::Method;

use super::Context;
use super::output::Table;
use super::report::usage;
use super::scheduler::client::{Client, quoted};
use crate::quota::NodeState;
use crate::scheduler::registry::{NodeChange, NodeRequest, NodeView};

/// Flags of `larder node`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Adds a node: this machine with its GPUs, or with --gpus a simulated one
    #[command(after_help = "Examples:
  larder node add this-machine
  larder node add n1 --gpus 8 --pool big --label zone=west")]
    Add {
        /// Its name
        name: String,
        /// Simulates so many GPUs: they are counted, and no container gets a device
        #[arg(short, long, value_name = "N")]
        gpus: Option<u32>,
        /// Puts it into a pool (repeatable)
        #[arg(long, value_name = "POOL")]
        pool: Vec<String>,
        /// Gives it a label (repeatable)
        #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
        label: Vec<(String, String)>,
    },
    /// Lists the nodes and who uses their GPUs
    #[command(visible_alias = "ls", after_help = "Examples:\n  larder node list --json")]
    List,
    /// Sets (KEY=VALUE) and takes away (KEY-) labels, sets the pools
    #[command(after_help = "Examples:
  larder node label n1 zone=west old-
  larder node label n1 --pool big --pool new")]
    Label {
        /// Its name
        name: String,
        /// KEY=VALUE, or KEY- to take it away
        #[arg(value_name = "LABEL")]
        labels: Vec<String>,
        /// The pools that it is in from now on (repeatable; one that is empty: none)
        #[arg(long, value_name = "POOL")]
        pool: Vec<String>,
    },
    /// Lets nothing new start there; what runs goes on
    #[command(after_help = "Examples:\n  larder node cordon n1")]
    Cordon {
        /// Its name
        name: String,
    },
    /// Pauses what can be paused there, and lets nothing new start
    #[command(after_help = "Examples:\n  larder node drain n1")]
    Drain {
        /// Its name
        name: String,
    },
    /// Lets jobs start there again
    #[command(after_help = "Examples:\n  larder node uncordon n1")]
    Uncordon {
        /// Its name
        name: String,
    },
    /// Takes a node away
    #[command(visible_alias = "delete", after_help = "Examples:\n  larder node rm n1 --force")]
    Rm {
        /// Its name
        name: String,
        /// Also where jobs run: they are stopped and go back to the queue with their place
        #[arg(long)]
        force: bool,
    },
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let client = Client::new(ctx);
    let path = |name: &str| format!("/v1/nodes/{}", quoted(name));
    let state = |name: &str, state: NodeState, done: &str| {
        let change = NodeChange { state: Some(state), ..NodeChange::default() };
        let view: NodeView = client.send(Method::PATCH, &path(name), &change)?;
        tell(ctx, &view, done)
    };
    match args.command {
        Command::Add { name, gpus, pool, label } => {
            let (gpus, simulated) = (gpus.unwrap_or(0), gpus.is_some());
            let (labels, pools) = (label.into_iter().collect(), pool.into_iter().collect());
            let request = NodeRequest { name, gpus, simulated, labels, pools };
            tell(ctx, &client.send(Method::POST, "/v1/nodes", &request)?, "added")
        }
        Command::List => list(ctx, &client.get::<Vec<NodeView>>("/v1/nodes")?),
        Command::Label { name, labels, pool } => {
            let pools: Option<BTreeSet<String>> =
                (!pool.is_empty()).then(|| pool.into_iter().filter(|pool| !pool.is_empty()).collect());
            let change = NodeChange { state: None, labels: changes(&labels)?, pools };
            tell(ctx, &client.send(Method::PATCH, &path(&name), &change)?, "changed")
        }
        Command::Cordon { name } => state(&name, NodeState::Cordoned, "cordoned"),
        Command::Drain { name } => state(&name, NodeState::Draining, "draining"),
        Command::Uncordon { name } => state(&name, NodeState::Ready, "ready"),
        Command::Rm { name, force } => {
            let force = if force { "?force=true" } else { "" };
            tell(ctx, &client.delete(&format!("{}{force}", path(&name)))?, "taken away")
        }
    }
}

fn changes(labels: &[String]) -> anyhow::Result<BTreeMap<String, Option<String>>> {
    let mut changes = BTreeMap::new();
    for text in labels {
        match (label(text), text.strip_suffix('-')) {
            (Ok((key, value)), _) => changes.insert(key, Some(value)),
            (Err(_), Some(key)) if !key.is_empty() => changes.insert(key.to_owned(), None),
            _ => return usage(format!("`{text}`: write KEY=VALUE, or KEY- to take it away")),
        };
    }
    Ok(changes)
}

fn tell(ctx: &Context, view: &NodeView, done: &str) -> anyhow::Result<()> {
    if ctx.json() {
        return ctx.print_json(view);
    }
    ctx.say(format!("node {} is {done}", view.node.node.id));
    Ok(())
}

fn list(ctx: &Context, views: &[NodeView]) -> anyhow::Result<()> {
    if ctx.json() {
        return ctx.print_json(&views);
    }
    let mut table = Table::new(&["NODE", "STATE", ">GPUS", ">ALLOCATED", "POOLS", "LABELS", "JOBS"]);
    for view in views {
        let node = &view.node.node;
        let state = match (view.node.leaving, node.state) {
            (true, _) => "leaving",
            (_, NodeState::Ready) => "ready",
            (_, NodeState::Cordoned) => "cordoned",
            (_, NodeState::Draining) => "draining",
        };
        let labels: Vec<String> = node.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let jobs: BTreeSet<&str> = view.uses.iter().map(|one| one.job.as_str()).collect();
        table.row([
            node.id.to_string(),
            state.to_owned(),
            format!("{}{}", node.gpus, if view.node.simulated { " (simulated)" } else { "" }),
            view.allocated.to_string(),
            node.pools.iter().cloned().collect::<Vec<_>>().join(","),
            labels.join(","),
            jobs.into_iter().collect::<Vec<_>>().join(" "),
        ]);
    }
    ctx.print_table(&table)
}
