//! `larder show`: shows a commit.

use std::io::Write;

use super::Context;
use super::output;
use crate::format::refs::Revision;
use crate::store::catalog::history::ProofState;

/// Flags of `larder show`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder show photos@v2")]
pub struct Args {
    /// Revision: DATASET, DATASET@TAG, DATASET@BRANCH or DATASET@ID-PREFIX
    #[arg(value_name = "REV")]
    rev: String,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let rev = Revision::parse(&args.rev)?;
    let (_, details) = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        anyhow::Ok(catalog.show(&rev).await?)
    })?;
    if ctx.json() {
        return ctx.print_json(&details);
    }
    let mut out = ctx.out();
    let row = &details.row;
    let mut line = |name: &str, value: String| writeln!(out, "{name:<10} {value}");
    line("commit", row.commit.to_string())?;
    line("dataset", details.dataset.clone())?;
    line("tree", row.tree.to_string())?;
    for parent in &row.parents {
        line("parent", parent.to_string())?;
    }
    for input in &details.lineage.inputs {
        line("input", input.to_string())?;
    }
    line("time", output::time(row.time_ms))?;
    line("author", output::printable(row.author.as_bytes()))?;
    if !row.branches.is_empty() {
        line("branches", row.branches.join(", "))?;
    }
    if !row.tags.is_empty() {
        line("tags", row.tags.join(", "))?;
    }
    if let Some(from) = &details.lineage.imported_from {
        line("imported", output::printable(from.as_bytes()))?;
    }
    for (key, value) in &row.meta {
        let pair = format!("{key}={value}");
        line("meta", output::printable(pair.as_bytes()))?;
    }
    let counts = format!(
        "{} files, {} directories, {} symbolic links, {}",
        details.files,
        details.dirs,
        details.symlinks,
        output::bytes(details.bytes)
    );
    line("holds", counts)?;
    let packs = format!(
        "{}, {} ({} of them used)",
        details.packs,
        output::bytes(details.pack_bytes),
        output::bytes(details.referenced_bytes)
    );
    line("packs", packs)?;
    let proof = match details.proof {
        ProofState::Digested => "every file has its digest".to_owned(),
        ProofState::PinnedProven => "pinned objects, read and fixed".to_owned(),
        ProofState::PinnedUnproven => format!(
            "pinned, unproven: {} of {} imported packs were read once",
            details.proven_packs, details.assembled_packs
        ),
    };
    line("proof", proof)?;
    writeln!(out)?;
    for text in row.message.lines() {
        writeln!(out, "    {}", output::printable(text.as_bytes()))?;
    }
    Ok(out.finish()?)
}
