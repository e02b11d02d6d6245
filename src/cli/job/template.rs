//! `larder job template`: shapes that have names.

use std::collections::BTreeMap;

use http::Method;

use super::submit::template;
use crate::cli::Context;
use crate::cli::output::Table;
use crate::cli::scheduler::client::{Client, quoted};
use crate::scheduler::cluster::TemplateRecord;
use crate::scheduler::registry::TemplateView;

/// Flags of `larder job template`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Names a shape, or gives a name another one; jobs that are submitted already keep theirs
    #[command(after_help = "Examples:
  larder job template set gpu-real gpus=8,pool=big
  larder job template set small gpus=0.5,label.zone=west")]
    Set {
        /// Its name
        name: String,
        /// gpus=N, processes=N, pool=NAME, label.NAME=VALUE, with commas between
        #[arg(value_name = "SHAPE", value_parser = record)]
        shape: TemplateRecord,
    },
    /// Lists the shapes that have names
    #[command(visible_alias = "ls", after_help = "Examples:\n  larder job template list --json")]
    List,
    /// Forgets a name
    #[command(visible_alias = "delete", after_help = "Examples:\n  larder job template rm small")]
    Rm {
        /// Its name
        name: String,
    },
}

/// Reads a shape that may say on which cluster it is.
fn record(text: &str) -> Result<TemplateRecord, String> {
    let (clusters, shape): (Vec<&str>, Vec<&str>) = text.split(',').partition(|part| part.starts_with("cluster="));
    let cluster = clusters.last().and_then(|part| part.strip_prefix("cluster=")).map(str::to_owned);
    Ok(TemplateRecord { shape: template(&shape.join(","))?, cluster })
}

/// Runs the command.
pub fn run(ctx: &Context, client: &Client<'_>, args: Args) -> anyhow::Result<()> {
    let path = |name: &str| format!("/v1/templates/{}", quoted(name));
    let (view, done): (TemplateView, &str) = match args.command {
        Command::Set { name, shape } => (client.send(Method::POST, &path(&name), &shape)?, "set"),
        Command::Rm { name } => (client.delete(&path(&name))?, "removed"),
        Command::List => return list(ctx, &client.get::<Vec<TemplateView>>("/v1/templates")?),
    };
    if ctx.json() {
        return ctx.print_json(&view);
    }
    ctx.say(format!("template {} is {done}", view.name));
    Ok(())
}

fn list(ctx: &Context, views: &[TemplateView]) -> anyhow::Result<()> {
    if ctx.json() {
        return ctx.print_json(&views);
    }
    let mut table = Table::new(&["TEMPLATE", ">GPUS", ">PROCESSES", "POOL", "LABELS"]);
    let pairs = |labels: &BTreeMap<String, String>| {
        labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
    };
    for view in views {
        let shape = &view.template.shape;
        table.row([
            view.name.clone(),
            shape.gpus.to_string(),
            shape.processes.to_string(),
            shape.pool.clone().unwrap_or_default(),
            pairs(&shape.labels),
        ]);
    }
    ctx.print_table(&table)
}
