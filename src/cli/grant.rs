//! `larder grant`: lists and changes who may do what with a dataset.

use std::collections::BTreeSet;

use serde::Serialize;

use super::Context;
use super::output::Table;
use super::report::{HintExt as _, usage};
use crate::format::grants::{Grant, Grants, Principal, Right, Who};
use crate::format::refs::DatasetName;
use crate::node::policy;
use crate::store::catalog::Catalog;

/// Flags of `larder grant`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder grant xray                                      lists who may do what
  larder grant xray --to group:vision mount cache        lets a group mount and cache, and nobody else
  larder grant xray --to user:ann mount cache uncache push
  larder grant xray --to group:vision --none             takes a group's rights away
  larder grant xray --clear                              everybody may do everything again

Rights: mount, cache, uncache, push. A change counts on every node from the next request on; what is mounted
stays mounted. docs/threat-model.md says what grants protect and what only the bucket's own policy does.")]
pub struct Args {
    /// The dataset
    #[arg(value_name = "DATASET")]
    dataset: String,
    /// Whom to give the rights: everyone, user:NAME, group:NAME; among pods namespace:NAME, serviceaccount:NAMESPACE/NAME.
    /// They take the place of those that they had
    #[arg(long, value_name = "WHO", conflicts_with = "clear")]
    to: Option<String>,
    /// The rights: mount, cache, uncache, push
    #[arg(value_name = "RIGHT", requires = "to", conflicts_with = "none")]
    rights: Vec<String>,
    /// Takes all rights away
    #[arg(long, requires = "to")]
    none: bool,
    /// Removes the list: everybody may do everything
    #[arg(long)]
    clear: bool,
}

#[derive(Serialize)]
struct Listing<'a> {
    dataset: &'a str,
    /// Whether somebody has made a list at all.
    restricted: bool,
    /// One; more where writers raced: then only what all of them allow counts.
    heads: &'a [Vec<Grant>],
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let dataset = match DatasetName::parse(&args.dataset) {
        Ok(dataset) => dataset,
        Err(error) => return usage(error.to_string()),
    };
    let grants = match (&args.to, args.clear) {
        (None, false) => ctx.block_on(async {
            let catalog = ctx.catalog().await?;
            catalog.ref_list(&dataset).await?;
            anyhow::Ok(catalog.grants(&dataset).await?)
        })?,
        (None, true) => change(ctx, &dataset, |_| Vec::new())?,
        (Some(who), _) => {
            let grant = grant_of(who, &args)?;
            change(ctx, &dataset, |list| replace(list, grant))?
        }
    };
    print(ctx, &dataset, &grants)
}

fn grant_of(who: &str, args: &Args) -> anyhow::Result<Grant> {
    let who: Who = match who.parse() {
        Ok(who) => who,
        Err(error) => return usage(format!("{error}")),
    };
    let mut rights = BTreeSet::new();
    for word in &args.rights {
        match word.parse::<Right>() {
            Ok(right) => rights.insert(right),
            Err(error) => return usage(format!("{error}")),
        };
    }
    if rights.is_empty() && !args.none {
        return usage("say which rights, or --none");
    }
    Ok(Grant { who, rights })
}

/// Puts a grant in the place of the one for the same people. A list is never empty because the last one lost their
/// rights: that would open the dataset.
fn replace(mut list: Vec<Grant>, grant: Grant) -> Vec<Grant> {
    list.retain(|other| other.who != grant.who);
    if !grant.rights.is_empty() || list.is_empty() {
        list.push(grant);
    }
    list
}

fn change(
    ctx: &Context,
    dataset: &DatasetName,
    change: impl FnOnce(Vec<Grant>) -> Vec<Grant>,
) -> anyhow::Result<Grants> {
    ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        may_push(&catalog, dataset).await?;
        let list = catalog.change_grants(dataset, change).await?;
        anyhow::Ok(Grants { heads: vec![list] })
    })
}

/// Refuses what the grants do not allow this user to change. The bucket's own policy is what keeps others out; this
/// keeps from slips, before anything is uploaded.
pub(super) async fn may_push(catalog: &Catalog, dataset: &DatasetName) -> anyhow::Result<()> {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    match refusal(catalog, dataset, uid, gid).await? {
        None => Ok(()),
        Some(why) => Err(anyhow::anyhow!(why)).hint(format!("`larder grant {dataset}` lists who may")),
    }
}

/// The same for a user in whose name this process pushes, with credentials that are not that user's. A refusal is a
/// usage error: nothing is gained by trying again.
pub(super) async fn may_push_for(catalog: &Catalog, dataset: &DatasetName, user: (u32, u32)) -> anyhow::Result<()> {
    let own = nix::unistd::geteuid();
    if !own.is_root() && user.0 != own.as_raw() {
        return usage("--for: only root pushes in the name of others");
    }
    match refusal(catalog, dataset, user.0, user.1).await? {
        None => Ok(()),
        Some(why) => usage(why),
    }
}

/// Says why a user may not push to a dataset; None: they may.
async fn refusal(catalog: &Catalog, dataset: &DatasetName, uid: u32, gid: u32) -> anyhow::Result<Option<String>> {
    if uid == 0 {
        return Ok(None);
    }
    let grants = catalog.grants(dataset).await?;
    let principal: Principal = tokio::task::spawn_blocking(move || policy::principal(uid, gid)).await?;
    let who = principal.user.clone().unwrap_or_else(|| uid.to_string());
    let may = grants.allow(&principal, Right::Push);
    Ok((!may).then(|| format!("the grants of {dataset} do not let {who} push to it")))
}

fn print(ctx: &Context, dataset: &DatasetName, grants: &Grants) -> anyhow::Result<()> {
    let is_open = grants.heads.iter().all(Vec::is_empty);
    if ctx.json() {
        let listing = Listing { dataset: dataset.as_str(), restricted: !is_open, heads: &grants.heads };
        return ctx.print_json(&listing);
    }
    if is_open {
        ctx.say(format!("{dataset} has no grants: everybody may do everything"));
        return Ok(());
    }
    if grants.heads.len() > 1 {
        ctx.say("writers raced: only what all of these lists allow counts, until the next change");
    }
    let mut table = Table::new(&["WHO", "RIGHTS"]);
    for grant in grants.heads.iter().flatten() {
        let rights: Vec<&str> = grant.rights.iter().map(|right| right.as_str()).collect();
        let rights = if rights.is_empty() { "none".to_owned() } else { rights.join(" ") };
        table.row([grant.who.to_string(), rights]);
    }
    ctx.print_table(&table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_the_last_rights_away_does_not_open_the_dataset() {
        let grant = |rights: &[Right]| Grant { who: Who::Everyone, rights: rights.iter().copied().collect() };
        let list = replace(vec![grant(&[Right::Mount])], grant(&[]));
        assert_eq!(list, [grant(&[])]);
        assert!(Grants { heads: vec![list] }.restrict(Right::Mount));
    }
}
