//! `larder tier move`: a commit goes from one tier to another, and nobody's reads break.
//!
//! First all of it is brought into the other tier, which has its own record then; only after that this
//! one lets go. Who has the commit mounted from here reads on from here: it leaves with its last user.

use serde::Serialize;

use super::why;
use crate::cli::Context;
use crate::cli::cache::follow;
use crate::cli::mount::with_hint;
use crate::cli::output;
use crate::cli::report::{HintExt as _, usage};
use crate::config::Span;
use crate::format::ids::CommitId;
use crate::format::refs::Revision;
use crate::node::api::FillRequest;

/// Flags of `larder tier move`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder tier move photos@v1 capacity
  larder tier move photos@v1 fast --from capacity

What is mounted from the old tier stays there until it is unmounted. `keep` and a time to live go along.")]
pub struct Args {
    /// What to move: name, name@tag, name@branch or name@id-prefix
    #[arg(value_name = "DATASET[@REV]")]
    revision: String,
    /// Name of the tier to move it to
    #[arg(value_name = "TIER")]
    to: String,
    /// Name of the tier to move it from (default: the dataset's, else default_tier)
    #[arg(long, value_name = "NAME")]
    from: Option<String>,
}

#[derive(Debug, Serialize)]
struct Moved {
    dataset: String,
    commit: CommitId,
    from: String,
    to: String,
    /// Bytes that the other tier has now.
    bytes: u64,
    /// Bytes that left here; null: it is in use here and leaves with its last user.
    left_bytes: Option<u64>,
}

/// Runs the command.
pub(super) fn run(ctx: &Context, args: &Args) -> anyhow::Result<()> {
    ctx.only_here("`tier move`")?;
    let revision = Revision::parse(&args.revision)?;
    let dataset = revision.dataset.as_str().to_owned();
    let (from, source) = ctx.tier(ctx.tier_of_dataset(args.from.as_deref(), &dataset))?;
    let (to, _) = ctx.tier_section(Some(&args.to))?;
    if from == to {
        return usage(format!("`{from}` is the tier that it is to be moved from; name another one, or use --from"));
    }
    let key = why::find(ctx, &from, &source, &args.revision)?;
    if !source.is_cached(&key)? {
        let message = format!("{} is not in the tier `{from}`", args.revision);
        return Err(anyhow::anyhow!(message)).hint(format!("`larder cache {} --tier {to}` brings it", args.revision));
    }
    let request = FillRequest {
        revision: format!("{dataset}@{}", key.commit),
        tier: Some(to.to_owned()),
        keep: source.is_kept(&key)?.then_some(true),
        ttl: source.own_ttl(&key)?.map(|ms| Span(std::time::Duration::from_millis(ms))),
        only_settings: false,
    };
    let filled = ctx.block_on(async {
        let client = ctx.node_client().await?;
        let begun = client.fill(&request).await.map_err(with_hint)?;
        follow(ctx, &client, begun).await
    })?;
    if let Some(error) = filled.error {
        anyhow::bail!("{} stays in the tier `{from}`: it did not get wholly into `{to}`: {error}", args.revision);
    }
    let left_bytes = source.let_go(&key)?;
    let moved = Moved { dataset, commit: key.commit, from, to: to.to_owned(), bytes: filled.bytes_total, left_bytes };
    if ctx.json() {
        return ctx.print_json(&moved);
    }
    let (from, to, size) = (&moved.from, &moved.to, output::bytes(moved.bytes));
    ctx.say(match moved.left_bytes {
        Some(left) => {
            format!("{} is in the tier `{to}` ({size}); {} left `{from}`", args.revision, output::bytes(left))
        }
        None => format!(
            "{} is in the tier `{to}` ({size}); it is in use in `{from}` and leaves there with its last user",
            args.revision
        ),
    });
    Ok(())
}
