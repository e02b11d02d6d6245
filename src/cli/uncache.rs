//! `larder uncache`: removes a commit from a tier now.

use serde::Serialize;

use super::Context;
use super::output;
use super::report::HintExt as _;
use crate::format::ids::CommitId;
use crate::format::refs::Revision;
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

#[derive(Debug, Serialize)]
struct Removed {
    dataset: String,
    commit: CommitId,
    tier: String,
    /// Bytes that no other cached commit needs: deleted after the tier's grace time.
    freed_bytes: u64,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
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
    let removed = Removed { dataset, commit, tier: name, freed_bytes: freed };
    if ctx.json() {
        return ctx.print_json(&removed);
    }
    ctx.say(format!("{} left the tier `{}`: {}", args.revision, removed.tier, output::bytes(removed.freed_bytes)));
    Ok(())
}
