//! `larder datasets`: lists the datasets of the lake.

use serde::Serialize;

use super::Context;
use super::output::{self, Table};

/// Flags of `larder datasets`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder datasets
  larder datasets --json")]
pub struct Args {}

#[derive(Serialize)]
struct Listing {
    lake: String,
    datasets: Vec<crate::store::catalog::history::DatasetRow>,
}

/// Runs the command.
pub fn run(ctx: &Context, _args: Args) -> anyhow::Result<()> {
    let (lake, datasets) = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        anyhow::Ok((catalog.lake.url(), catalog.dataset_rows().await?))
    })?;
    if ctx.json() {
        return ctx.print_json(&Listing { lake, datasets });
    }
    if datasets.is_empty() {
        ctx.say(format!("there is no dataset in {lake} yet; make one with `larder push DIR DATASET`"));
        return Ok(());
    }
    let mut table = Table::new(&["DATASET", "HEAD", ">FILES", ">SIZE", "TIME", ">BRANCHES", ">TAGS"]);
    for row in &datasets {
        let head = match (row.head, row.heads.len()) {
            (Some(head), _) => head.short(),
            (None, 0) => "-".to_owned(),
            (None, several) => format!("{several} heads"),
        };
        table.row([
            row.dataset.clone(),
            head,
            row.files.map_or_else(|| "-".to_owned(), |files| files.to_string()),
            row.bytes.map_or_else(|| "-".to_owned(), output::bytes),
            row.time_ms.map_or_else(|| "-".to_owned(), output::time),
            row.branches.to_string(),
            row.tags.to_string(),
        ]);
    }
    ctx.print_table(&table)
}
