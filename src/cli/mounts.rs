//! `larder mounts`: lists the mounts of this node's daemon.

use super::Context;
use super::mount::with_hint;
use super::output::Table;
use crate::config::EngineChoice;
use crate::node::api::MountInfo;
use crate::node::table::Owner;

/// Flags of `larder mounts`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder mounts
  larder mounts --json")]
pub struct Args {}

/// Runs the command. No daemon is no mounts; none is started.
pub fn run(ctx: &Context, _args: Args) -> anyhow::Result<()> {
    let mounts = list(ctx)?;
    if ctx.json() {
        return ctx.print_json(&mounts);
    }
    if mounts.is_empty() {
        ctx.say("nothing is mounted");
        return Ok(());
    }
    let mut table = Table::new(&["DIR", "REVISION", "COMMIT", "STATE", "OWNER", "TIER", "ENGINE"]);
    for mount in &mounts {
        let owner = match &mount.owner {
            Owner::User { uid } => format!("user {uid}"),
            Owner::Job { id } => format!("job {id}"),
            Owner::Pod { uid } => format!("pod {uid}"),
        };
        table.row([
            mount.dir.display().to_string(),
            mount.revision.clone(),
            mount.commit.short(),
            mount.state.to_string(),
            owner,
            mount.options.tier.clone().unwrap_or_default(),
            mount.engine.map(EngineChoice::name).unwrap_or_default().to_owned(),
        ]);
    }
    ctx.print_table(&table)?;
    for mount in &mounts {
        if let Some(reason) = &mount.reason {
            ctx.say(format!("{}: {reason}", mount.dir.display()));
        }
    }
    Ok(())
}

/// Asks the daemon; none that runs has none.
pub(super) fn list(ctx: &Context) -> anyhow::Result<Vec<MountInfo>> {
    match ctx.block_on(ctx.node_client_at_rest().mounts()) {
        Ok(mounts) => Ok(mounts),
        Err(error) if error.is_absent() => Ok(Vec::new()),
        Err(error) => Err(with_hint(error)),
    }
}
