//! `larder branch`: lists, moves and removes branches.

use serde::Serialize;

use super::Context;
use super::output::{self, Table};
use super::report::usage;
use crate::format::ids::CommitId;
use crate::format::refs::{RefKind, RefName, Revision};

/// Flags of `larder branch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder branch photos                    lists the branches
  larder branch photos@v2 fixes           begins a branch at a commit
  larder branch photos@3fa9c1 main -f     moves a branch, and chooses among several heads
  larder branch photos fixes --delete     removes the branch")]
pub struct Args {
    /// Dataset, or revision that the branch is to point to
    #[arg(value_name = "REV")]
    rev: String,
    /// Name of the branch
    #[arg(value_name = "BRANCH")]
    branch: Option<String>,
    /// Moves a branch that exists
    #[arg(short, long, requires = "branch")]
    force: bool,
    /// Removes the branch
    #[arg(short, long, requires = "branch", conflicts_with = "force")]
    delete: bool,
}

#[derive(Serialize)]
struct RefRow {
    dataset: String,
    kind: RefKind,
    name: String,
    /// More than one: writers raced.
    heads: Vec<HeadRow>,
}

#[derive(Serialize)]
struct HeadRow {
    commit: CommitId,
    time_ms: i64,
    by: String,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let rev = Revision::parse(&args.rev)?;
    let Some(branch) = &args.branch else {
        return print_refs(ctx, &rev, RefKind::Branch);
    };
    let branch = RefName::parse(branch)?;
    if args.delete {
        if args.rev.contains('@') {
            return usage("name the dataset alone when a branch is removed");
        }
        return removed(ctx, &rev, RefKind::Branch, &branch);
    }
    let (commit, heads) = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        super::grant::may_push(&catalog, &rev.dataset).await?;
        anyhow::Ok(catalog.make_branch(&rev, &branch, args.force).await?)
    })?;
    let dataset = rev.dataset.as_str();
    if ctx.json() {
        let heads: Vec<CommitId> = heads.iter().map(|head| head.commit).collect();
        return ctx.print_json(&serde_json::json!({
            "dataset": dataset, "kind": "branch", "name": branch.as_str(),
            "commit": commit, "heads": heads,
        }));
    }
    ctx.say(format!("{dataset}@{} is {}", branch.as_str(), commit.short()));
    if heads.len() > 1 {
        ctx.say("another writer moved it at the same time: it has more than one head now");
    }
    Ok(())
}

/// Lists the tags or the branches of a dataset.
pub(super) fn print_refs(ctx: &Context, rev: &Revision, kind: RefKind) -> anyhow::Result<()> {
    let refs = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        anyhow::Ok(catalog.ref_list(&rev.dataset).await?)
    })?;
    let rows: Vec<RefRow> = refs
        .into_iter()
        .filter(|state| state.kind == kind)
        .map(|state| RefRow {
            dataset: rev.dataset.as_str().to_owned(),
            kind,
            name: state.name.as_str().to_owned(),
            heads: state
                .heads
                .into_iter()
                .map(|head| HeadRow { commit: head.commit, time_ms: head.time_ms, by: head.by })
                .collect(),
        })
        .collect();
    if ctx.json() {
        return ctx.print_json(&rows);
    }
    let mut table = Table::new(&["NAME", "COMMIT", "MOVED", "BY"]);
    for row in &rows {
        for head in &row.heads {
            table.row([
                row.name.clone(),
                head.commit.short(),
                output::time(head.time_ms),
                output::printable(head.by.as_bytes()),
            ]);
        }
    }
    if table.is_empty() {
        let word = if kind == RefKind::Tag { "tags" } else { "branches" };
        ctx.say(format!("{} has no {word}", rev.dataset.as_str()));
        return Ok(());
    }
    ctx.print_table(&table)
}

/// Removes a tag or a branch; says what it was.
pub(super) fn removed(ctx: &Context, rev: &Revision, kind: RefKind, name: &RefName) -> anyhow::Result<()> {
    let heads = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        super::grant::may_push(&catalog, &rev.dataset).await?;
        anyhow::Ok(catalog.refs.delete(&rev.dataset, kind, name).await?)
    })?;
    let dataset = rev.dataset.as_str();
    let commits: Vec<CommitId> = heads.iter().map(|head| head.commit).collect();
    if ctx.json() {
        return ctx.print_json(&serde_json::json!({
            "dataset": dataset, "kind": kind, "name": name.as_str(), "removed": commits,
        }));
    }
    let was: Vec<String> = commits.iter().map(ToString::to_string).collect();
    ctx.say(format!(
        "{dataset}@{} is removed; it was {} (still there until gc finds nothing refers to it)",
        name.as_str(),
        was.join(", ")
    ));
    Ok(())
}
