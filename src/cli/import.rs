//! `larder import`: makes a commit over objects that already lie in the store.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Context;
use super::output;
use super::report::usage;
use crate::format::refs::{DatasetName, RefName};
use crate::store::catalog::import::{self, ImportOptions, ImportProgress};

/// Flags of `larder import`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder import s3://bucket/photos photos
  larder import s3://bucket/photos photos --digest --tag v1")]
pub struct Args {
    /// Where the objects lie
    #[arg(value_name = "s3://BUCKET/PREFIX")]
    url: String,
    /// Dataset that gets the commit
    #[arg(value_name = "DATASET")]
    dataset: String,
    /// Message of the commit
    #[arg(short, long, value_name = "TEXT", default_value = "")]
    message: String,
    /// Tags the commit
    #[arg(long, value_name = "TAG")]
    tag: Option<String>,
    /// Moves this branch instead of main
    #[arg(long, value_name = "BRANCH")]
    branch: Option<String>,
    /// Notes KEY=VALUE in the commit; may be given more than once
    #[arg(long, value_name = "KEY=VALUE")]
    meta: Vec<String>,
    /// Leaves out what matches; may be given more than once
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Reads every object once and names files by their digests
    #[arg(long)]
    digest: bool,
}

fn options(args: Args) -> anyhow::Result<ImportOptions> {
    let Some(rest) = args.url.strip_prefix("s3://") else {
        return usage(format!("`{}` is not s3://BUCKET/PREFIX", args.url));
    };
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return usage(format!("`{}` names no bucket", args.url));
    }
    let slash = if prefix.is_empty() || prefix.ends_with('/') { "" } else { "/" };
    let pairs = args.meta.iter().map(|pair| match pair.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => usage(format!("`{pair}` is not KEY=VALUE")),
    });
    Ok(ImportOptions {
        bucket: bucket.to_owned(),
        prefix: format!("{prefix}{slash}"),
        dataset: DatasetName::parse(&args.dataset)?,
        message: args.message,
        meta: pairs.collect::<anyhow::Result<_>>()?,
        branch: args.branch.as_deref().map(RefName::parse).transpose()?,
        tag: args.tag.as_deref().map(RefName::parse).transpose()?,
        exclude: args.exclude,
        digest: args.digest,
    })
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let options = options(args)?;
    let line = ctx.spinner();
    let progress = std::sync::Arc::new(ImportProgress::default());
    let outcome = ctx.block_on(async {
        let catalog = ctx.catalog_or_create().await?;
        super::grant::may_push(&catalog, &options.dataset).await?;
        let (shown, ticker) = (progress.clone(), line.clone());
        let tick = tokio::spawn(async move {
            loop {
                let keys = shown.keys_listed.load(Ordering::Relaxed);
                let read = output::bytes(shown.bytes_digested.load(Ordering::Relaxed));
                let all = output::bytes(shown.bytes_total.load(Ordering::Relaxed));
                ticker.set_message(format!("{keys} keys, {read} of {all} digested"));
                ticker.tick();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        let outcome = import::import(&catalog, &options, &progress).await;
        tick.abort();
        anyhow::Ok(outcome?)
    })?;
    line.finish_and_clear();
    if ctx.json() {
        return ctx.print_json(&outcome);
    }
    for odd in &outcome.odd {
        ctx.say(format!("{}: {}", output::printable(odd.key.as_bytes()), odd.done));
    }
    let unnamed = outcome.odd_count - outcome.odd.len() as u64;
    if unnamed > 0 {
        ctx.say(format!("and {unnamed} more keys of that kind"));
    }
    let what = if outcome.unchanged { "is unchanged" } else { "has a new commit" };
    ctx.say(format!(
        "{}@{} {what}: {} files, {}, {} packs{}",
        options.dataset.as_str(),
        outcome.branch,
        outcome.files,
        output::bytes(outcome.bytes),
        outcome.packs,
        if outcome.digested { "" } else { "; pinned, unproven until read" }
    ));
    println!("{}", outcome.commit);
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &[&str]) -> anyhow::Result<ImportOptions> {
        options(Line::try_parse_from([&["import"], line].concat())?.args)
    }

    #[test]
    fn every_option_reaches_the_import() {
        let line = "s3://raw/2024 xray -m text --tag t1 --branch dev --meta a=1 --meta b=x=y --exclude *.tmp --digest";
        let options = parse(&line.split(' ').collect::<Vec<_>>()).expect("is valid");
        assert_eq!((options.bucket.as_str(), options.prefix.as_str()), ("raw", "2024/"), "whole names only");
        assert_eq!((options.dataset.as_str(), options.message.as_str()), ("xray", "text"));
        assert_eq!(options.meta.iter().map(|(k, v)| format!("{k}:{v}")).collect::<Vec<_>>(), ["a:1", "b:x=y"]);
        assert_eq!(options.branch.map(|name| name.as_str().to_owned()).as_deref(), Some("dev"));
        assert_eq!(options.tag.map(|name| name.as_str().to_owned()).as_deref(), Some("t1"));
        assert_eq!((options.exclude, options.digest), (vec!["*.tmp".to_owned()], true));
    }

    #[test]
    fn what_is_no_place_in_a_store_is_refused() {
        for wrong in ["raw/2024", "s3:///x", "/srv/raw"] {
            assert!(parse(&[wrong, "xray"]).is_err(), "{wrong}");
        }
        assert!(parse(&["s3://raw", "xray", "--meta", "novalue"]).is_err());
        assert_eq!(parse(&["s3://raw", "xray"]).expect("a whole bucket").prefix, "");
    }
}
