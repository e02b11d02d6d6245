//! `larder cache`: brings a commit into a tier through the daemon, with progress; keeps it, or no longer.

use std::time::Duration;

use super::Context;
use super::mount::with_hint;
use super::output;
use crate::config::Span;
use crate::node::api::{FillInfo, FillRequest};
use crate::node::client::NodeClient;

/// How long one question after the progress waits for news.
const NEWS_WAIT: Duration = Duration::from_secs(10);

/// Flags of `larder cache`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder cache photos@v2
  larder cache photos@v2 --keep
  larder cache photos@v2 --no-keep
  larder cache photos --ttl 7d --no-wait

When the last byte has arrived the time to live starts. An interrupted command does not end the filling.")]
pub struct Args {
    /// What to bring: name, name@tag, name@branch or name@id-prefix
    #[arg(value_name = "DATASET[@REV]")]
    revision: String,
    /// Keeps the commit until --no-keep
    #[arg(long, conflicts_with = "no_keep")]
    keep: bool,
    /// Keeps the commit no longer; fetches nothing
    #[arg(long)]
    no_keep: bool,
    /// How long the commit stays after its last use
    #[arg(long, value_name = "DURATION")]
    ttl: Option<Span>,
    /// Name of the tier (default: the dataset's, else the one that has the commit, else default_tier)
    #[arg(long, value_name = "NAME")]
    tier: Option<String>,
    /// Waits until all has arrived (the default)
    #[arg(long, conflicts_with = "no_wait")]
    wait: bool,
    /// Comes back at once
    #[arg(long)]
    no_wait: bool,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    crate::format::refs::Revision::parse(&args.revision)?;
    let request = FillRequest {
        revision: args.revision.clone(),
        tier: args.tier,
        keep: if args.keep { Some(true) } else { args.no_keep.then_some(false) },
        ttl: args.ttl,
        only_settings: args.no_keep,
    };
    let wait = args.wait || !args.no_wait;
    let info = ctx.block_on(async {
        let client = ctx.node_client().await?;
        let begun = client.fill(&request).await.map_err(with_hint)?;
        if wait { follow(ctx, &client, begun).await } else { Ok(begun) }
    })?;
    if ctx.json() {
        ctx.print_json(&info)?;
    } else if info.error.is_none() {
        ctx.say(told(&args.revision, &info, request.only_settings));
    }
    match info.error {
        Some(error) => anyhow::bail!("{} is not wholly in the tier `{}`: {error}", args.revision, info.tier),
        None => Ok(()),
    }
}

fn told(revision: &str, info: &FillInfo, only_settings: bool) -> String {
    let commit = info.commit.short();
    if only_settings {
        return format!("{revision} ({commit}) is no longer kept in the tier `{}`", info.tier);
    }
    if info.finished {
        let size = output::bytes(info.bytes_total);
        return format!("{revision} ({commit}) is in the tier `{}`: {size} in {} packs", info.tier, info.packs_total);
    }
    format!("{revision} ({commit}) is on its way into the tier `{}`; `larder status` shows how far", info.tier)
}

/// Waits for the end and shows the progress.
pub(super) async fn follow(ctx: &Context, client: &NodeClient, begun: FillInfo) -> anyhow::Result<FillInfo> {
    let bar = ctx.progress(begun.bytes_total);
    bar.set_message(begun.dataset.clone());
    let mut info = begun;
    while !info.finished {
        info = client.fill_info(&info.id, NEWS_WAIT).await.map_err(with_hint)?;
        bar.set_length(info.bytes_total);
        bar.set_position(info.bytes_done);
    }
    bar.finish_and_clear();
    Ok(info)
}
