//! `larder rm`: removes a tag, a branch or a whole dataset.

use super::Context;
use super::report::usage;
use crate::format::refs::{At, RefKind, Revision};

/// Flags of `larder rm`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder rm photos@v2            removes the tag or branch v2
  larder rm photos --dataset     removes the dataset with its tags and branches
What nothing refers to any more is removed from the lake by `larder gc --delete`.")]
pub struct Args {
    /// DATASET@TAG, DATASET@BRANCH, or DATASET with --dataset
    #[arg(value_name = "REV")]
    rev: String,
    /// Removes the whole dataset
    #[arg(long)]
    dataset: bool,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let rev = Revision::parse(&args.rev)?;
    match (&rev.at, args.dataset) {
        (At::Default, true) => remove_dataset(ctx, &rev),
        (At::Default, false) => usage(format!(
            "`larder rm {0} --dataset` removes the whole dataset; name a tag or branch behind `@` to remove that",
            args.rev
        )),
        (At::Named(_) | At::Prefix(_), true) => usage("--dataset removes a whole dataset: name it without `@`"),
        (At::Prefix(_), false) => {
            usage("a commit is removed by removing the tags and branches that lead to it, then `larder gc`")
        }
        (At::Named(name), false) => {
            let kind = ctx.block_on(async {
                let catalog = ctx.catalog().await?;
                let tags = catalog.refs.heads(&rev.dataset, RefKind::Tag, name).await?;
                // A tag wins, as everywhere.
                anyhow::Ok(if tags.is_empty() { RefKind::Branch } else { RefKind::Tag })
            })?;
            super::branch::removed(ctx, &rev, kind, name)
        }
    }
}

fn remove_dataset(ctx: &Context, rev: &Revision) -> anyhow::Result<()> {
    let dataset = &rev.dataset;
    let refs = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        super::grant::may_push(&catalog, dataset).await?;
        let refs = catalog.ref_list(dataset).await?;
        catalog.refs.remove_dataset(dataset).await?;
        anyhow::Ok(refs.len())
    })?;
    if ctx.json() {
        return ctx.print_json(&serde_json::json!({
            "dataset": dataset.as_str(), "kind": "dataset", "refs_removed": refs,
        }));
    }
    ctx.say(format!(
        "{} is removed with {refs} tags and branches; `larder gc` finds what nobody needs now",
        dataset.as_str()
    ));
    Ok(())
}
