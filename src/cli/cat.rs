//! `larder cat`: prints files of a commit.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use super::Context;
use crate::format::refs::Revision;
use crate::store::catalog::get;

/// Flags of `larder cat`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder cat photos@v2 labels.csv")]
pub struct Args {
    /// Revision: DATASET, DATASET@TAG, DATASET@BRANCH or DATASET@ID-PREFIX
    #[arg(value_name = "REV")]
    rev: String,
    /// Files to print, one after the other
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let rev = Revision::parse(&args.rev)?;
    let mut out = ctx.out();
    ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        let fetcher = ctx.fetcher(&catalog).await?;
        let snap = catalog.snapshot(&rev).await?;
        for path in &args.paths {
            let sink = |bytes: &[u8]| out.write_all(bytes);
            get::cat(&catalog, &fetcher, &snap, path.as_bytes(), sink).await?;
        }
        anyhow::Ok(())
    })?;
    Ok(out.finish()?)
}
