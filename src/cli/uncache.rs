//! `larder uncache`: removes a commit from a tier now.

use super::Context;
use super::mount::with_hint;
use super::output;
use super::report::HintExt as _;
use crate::format::refs::Revision;
use crate::node::api::{UncacheInfo, UncacheRequest};
use crate::node::client::NodeClient;
use crate::store::tier::{CommitKey, TierError};

/// Flags of `larder uncache`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder uncache photos@v1
  larder uncache photos@v1 --tier fast

A mounted or kept commit is not removed. What other cached commits share with it stays.")]
pub struct Args {
    /// What to remove: name, name@tag, name@branch or name@id-prefix
    #[arg(value_name = "DATASET[@REV]")]
    revision: String,
    /// Name of the tier (default: the dataset's, else default_tier)
    #[arg(long, value_name = "NAME")]
    tier: Option<String>,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let removed = match asked_daemon(ctx) {
        Some(client) => {
            let request = UncacheRequest { revision: args.revision.clone(), tier: args.tier.clone() };
            ctx.block_on(client.uncache(&request)).map_err(with_hint)?
        }
        None => remove(ctx, &args)?,
    };
    if ctx.json() {
        return ctx.print_json(&removed);
    }
    ctx.say(format!("{} left the tier `{}`: {}", args.revision, removed.tier, output::bytes(removed.freed_bytes)));
    Ok(())
}

/// Gives another user's daemon, such as the system's, or another machine's: the tier is not ours to change then.
fn asked_daemon(ctx: &Context) -> Option<NodeClient> {
    let client = ctx.node_client_at_rest();
    if ctx.is_remote() {
        return Some(client);
    }
    let info = ctx.block_on(client.info()).ok()?;
    (info.uid != nix::unistd::geteuid().as_raw()).then_some(client)
}

fn remove(ctx: &Context, args: &Args) -> anyhow::Result<UncacheInfo> {
    let revision = Revision::parse(&args.revision)?;
    let (name, tier) = ctx.tier(ctx.tier_of_dataset(args.tier.as_deref(), revision.dataset.as_str()))?;
    let (commit, lake) = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        let commit = catalog.resolve(&revision).await?;
        Ok::<_, anyhow::Error>((commit, catalog.lake_id))
    })?;
    let freed = match tier.uncache(&CommitKey { lake, commit }) {
        Err(error @ TierError::Busy { .. }) => {
            return Err(error)
                .hint("`larder status` shows who uses it: unmount it, or `larder cache --no-keep` it, first");
        }
        other => other?,
    };
    let dataset = revision.dataset.as_str().to_owned();
    Ok(UncacheInfo { dataset, commit, tier: name, freed_bytes: freed })
}
