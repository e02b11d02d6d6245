//! `larder get`: copies files of a commit out.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Context;
use super::output;
use crate::format::refs::Revision;
use crate::store::catalog::get::{self, GetProgress};

/// Flags of `larder get`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder get photos@v2 ./out
  larder get photos@v2 cats/2024 ./cats")]
pub struct Args {
    /// Revision: DATASET, DATASET@TAG, DATASET@BRANCH or DATASET@ID-PREFIX
    #[arg(value_name = "REV")]
    rev: String,
    /// Path inside the commit (all of it where left out), then where to copy it to: must not exist yet
    #[arg(value_name = "[PATH] DEST", required = true, num_args = 1..=2)]
    paths: Vec<OsString>,
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let rev = Revision::parse(&args.rev)?;
    let (path, dest) = match args.paths.as_slice() {
        [path, dest] => (path.clone(), PathBuf::from(dest)),
        [dest] => (OsString::new(), PathBuf::from(dest)),
        _ => return super::report::usage("name where to copy to"),
    };
    let bar = ctx.progress(0);
    let progress = Arc::new(GetProgress::default());
    let report = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        let fetcher = ctx.fetcher(&catalog).await?;
        let snap = catalog.snapshot(&rev).await?;
        if path.is_empty() {
            bar.set_length(snap.root.counts.bytes);
        }
        let (ticker, shown) = (bar.clone(), progress.clone());
        let tick = tokio::spawn(async move {
            loop {
                ticker.set_position(shown.bytes.load(Ordering::Relaxed));
                ticker.set_message(format!("{} files", shown.files.load(Ordering::Relaxed)));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        let report = get::get(&catalog, &fetcher, &snap, path.as_bytes(), &dest, &progress).await;
        tick.abort();
        anyhow::Ok(report?)
    })?;
    bar.finish_and_clear();
    if ctx.json() {
        ctx.print_json(&report)?;
    }
    for failed in &report.failed {
        ctx.say(format!("{}: {}", output::printable(failed.path.as_bytes()), failed.why));
    }
    if report.failed_count > 0 {
        anyhow::bail!("{} files could not be copied out", report.failed_count);
    }
    if !ctx.json() {
        ctx.say(format!(
            "{} files, {} directories, {} symbolic links, {} copied to {}",
            report.files,
            report.dirs,
            report.symlinks,
            output::bytes(report.bytes),
            dest.display()
        ));
    }
    Ok(())
}
