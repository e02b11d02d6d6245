//! `larder tag`: lists, makes and removes tags.

use super::Context;
use super::branch::{print_refs, removed};
use super::report::usage;
use crate::format::refs::{RefKind, RefName, Revision};

/// Flags of `larder tag`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder tag photos                 lists the tags
  larder tag photos@3fa9c1 v2       tags a commit
  larder tag photos v2 --delete     removes the tag")]
pub struct Args {
    /// Dataset, or revision to tag
    #[arg(value_name = "REV")]
    rev: String,
    /// Name of the tag
    #[arg(value_name = "TAG")]
    tag: Option<String>,
    /// Moves a tag that is at another commit
    #[arg(short, long, requires = "tag")]
    force: bool,
    /// Removes the tag
    #[arg(short, long, requires = "tag", conflicts_with = "force")]
    delete: bool,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let rev = Revision::parse(&args.rev)?;
    let Some(tag) = &args.tag else {
        return print_refs(ctx, &rev, RefKind::Tag);
    };
    let tag = RefName::parse(tag)?;
    if args.delete {
        if args.rev.contains('@') {
            return usage("name the dataset alone when a tag is removed");
        }
        return removed(ctx, &rev, RefKind::Tag, &tag);
    }
    let commit = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        super::grant::may_push(&catalog, &rev.dataset).await?;
        anyhow::Ok(catalog.make_tag(&rev, &tag, args.force).await?)
    })?;
    let dataset = rev.dataset.as_str();
    if ctx.json() {
        return ctx.print_json(&serde_json::json!({
            "dataset": dataset, "kind": "tag", "name": tag.as_str(), "commit": commit,
        }));
    }
    ctx.say(format!("{dataset}@{} is {}", tag.as_str(), commit.short()));
    Ok(())
}
