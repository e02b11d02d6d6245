//! `larder config`: says what is wrong with the configuration, what holds, and where it came from.

use std::collections::BTreeMap;
use std::io::Write as _;

use serde::Serialize;

use super::Context;
use super::output::Table;
use crate::config::{self, Problem};

/// Flags of `larder config`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Says what is wrong and where; exit status 2 if anything is
    #[command(after_help = "Examples:
  larder config check
  larder config check --config ./larder.toml --json")]
    Check,
    /// Shows what holds and where each value came from
    #[command(after_help = "Examples:
  larder config show
  LARDER_FETCH_REQUESTS=64 larder config show --json")]
    Show,
    /// Prints the JSON schema of the file, or the reference page
    #[command(after_help = "Examples:
  larder config schema > larder.schema.json
  larder config schema --markdown")]
    Schema {
        /// The reference page instead
        #[arg(long)]
        markdown: bool,
    },
}

#[derive(Debug, Serialize)]
struct Checked {
    ok: bool,
    file: Option<std::path::PathBuf>,
    problems: Vec<Told>,
}

#[derive(Debug, Serialize)]
struct Told {
    #[serde(flatten)]
    problem: Problem,
    /// `FILE:LINE:COLUMN`, `$VARIABLE` or `--flag`.
    place: String,
}

#[derive(Debug, Serialize)]
struct Shown {
    value: serde_json::Value,
    origin: String,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    match args.command {
        What::Check => check(ctx),
        What::Show => show(ctx),
        What::Schema { markdown: true } => print(ctx, &config::reference::markdown()),
        What::Schema { markdown: false } => ctx.print_json(&config::reference::schema()),
    }
}

fn print(ctx: &Context, text: &str) -> anyhow::Result<()> {
    let mut out = ctx.out();
    out.write_all(text.as_bytes())?;
    Ok(out.finish()?)
}

fn check(ctx: &Context) -> anyhow::Result<()> {
    let error = match ctx.load_config() {
        Ok(loaded) => {
            if ctx.json() {
                return ctx.print_json(&Checked { ok: true, file: loaded.file.clone(), problems: Vec::new() });
            }
            match &loaded.file {
                Some(file) => ctx.say(format!("{}: all is well", file.display())),
                None => ctx.say("no configuration file; defaults, variables and flags are well"),
            }
            return Ok(());
        }
        Err(error) => error,
    };
    if ctx.json() {
        let told = |problem: Problem| Told { place: problem.origin.to_string(), problem };
        let problems = error.problems().into_iter().map(told).collect();
        ctx.print_json(&Checked { ok: false, file: ctx.config_file_looked_at(), problems })?;
    }
    Err(error.into())
}

fn show(ctx: &Context) -> anyhow::Result<()> {
    let loaded = ctx.load_config()?;
    let value = serde_json::to_value(&loaded.config)?;
    let mut shown: BTreeMap<String, Shown> = BTreeMap::new();
    for (key, origin) in &loaded.origins {
        let found = key.split('.').try_fold(&value, |at, part| at.get(part));
        // What is only derived is no key of the file.
        if let Some(found) = found.filter(|_| config::keys::find(key).is_some()) {
            shown.insert(key.clone(), Shown { value: found.clone(), origin: origin.to_string() });
        }
    }
    if ctx.json() {
        return ctx.print_json(&shown);
    }
    let mut table = Table::new(&["KEY", "VALUE", "FROM"]);
    for (key, of) in &shown {
        let value = of.value.as_str().map_or_else(|| of.value.to_string(), str::to_owned);
        table.row([key.clone(), value, of.origin.clone()]);
    }
    ctx.print_table(&table)
}
