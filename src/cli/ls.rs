//! `larder ls`: lists files of a commit.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use serde::Serialize;

use super::Context;
use super::output::{self, Out};
use crate::format::ids::ContentId;
use crate::format::refs::Revision;
use crate::format::tree::nav;
use crate::format::tree::{Entry, EntryKind};
use crate::store::catalog::get;
use crate::store::catalog::scan::{Walk, Walked};

/// Flags of `larder ls`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder ls photos@v2
  larder ls -lR photos cats/2024")]
pub struct Args {
    /// Revision: DATASET, DATASET@TAG, DATASET@BRANCH or DATASET@ID-PREFIX
    #[arg(value_name = "REV")]
    rev: String,
    /// Path inside the commit
    #[arg(value_name = "PATH", default_value = "")]
    path: OsString,
    /// Lists directories with all that is below them
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Shows mode, size and time as well
    #[arg(short, long)]
    long: bool,
}

/// One entry, as JSON.
#[derive(Debug, Serialize)]
pub(super) struct EntryRow {
    path: String,
    /// The path's bytes in hex, where they are not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
    kind: &'static str,
    mode: String,
    mtime_s: i64,
    mtime_ns: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    /// The user's own object, of an imported file.
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

/// Gives what JSON says of an entry.
pub(super) fn row(path: &[u8], entry: &Entry) -> EntryRow {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (kind, size, digest, object, target) = match &entry.kind {
        EntryKind::File { size, content, pin } => {
            let digest = match content {
                ContentId::Digest(digest) => Some(digest.to_string()),
                ContentId::Pin(_) => None,
            };
            let object = pin.as_ref().map(|pin| format!("s3://{}/{}", pin.bucket, pin.key));
            ("file", Some(*size), digest, object, None)
        }
        EntryKind::Dir { .. } => ("dir", None, None, None, None),
        EntryKind::Symlink { target } => ("symlink", None, None, None, Some(text(target))),
        EntryKind::HardLink { first } => ("hard_link", None, None, None, Some(text(first))),
    };
    EntryRow {
        path: text(path),
        path_hex: std::str::from_utf8(path).is_err().then(|| hex::encode(path)),
        kind,
        mode: format!("{:04o}", entry.mode),
        mtime_s: entry.mtime.secs,
        mtime_ns: entry.mtime.nanos,
        size,
        digest,
        object,
        target,
    }
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let rev = Revision::parse(&args.rev)?;
    ctx.block_on(list(ctx, &rev, &args))
}

async fn list(ctx: &Context, rev: &Revision, args: &Args) -> anyhow::Result<()> {
    let catalog = ctx.catalog().await?;
    let snap = catalog.snapshot(rev).await?;
    let found = get::find(&catalog, &snap, args.path.as_bytes()).await?;
    let mut lines = Lines::new(ctx, args);
    let dir = match &found.at {
        None => nav::root_dir(&snap.root),
        Some(at) => match at.dir {
            Some(dir) => dir,
            None => {
                let one = Walked { path: found.path, at: at.clone() };
                lines.add(&one)?;
                return lines.finish();
            }
        },
    };
    // Names are shown below the path that was asked for, as they stand in the commit.
    let mut walk = Walk::new(&catalog.meta, &snap, dir, found.path, args.recursive);
    loop {
        let walked = walk.next().await?;
        if walked.is_empty() {
            return lines.finish();
        }
        for item in &walked {
            lines.add(item)?;
        }
    }
}

/// Prints entries as they come: a commit may have more than memory should hold.
struct Lines {
    out: Out,
    json: bool,
    long: bool,
    first: bool,
}

impl Lines {
    fn new(ctx: &Context, args: &Args) -> Self {
        Self { out: ctx.out(), json: ctx.json(), long: args.long, first: true }
    }

    fn add(&mut self, item: &Walked) -> anyhow::Result<()> {
        let entry = &item.at.entry;
        if self.json {
            let lead = if self.first { "[" } else { "," };
            self.first = false;
            let text = serde_json::to_string(&row(&item.path, entry))?;
            return Ok(writeln!(self.out, "{lead}{text}")?);
        }
        let path = output::printable(&item.path);
        let slash = if item.at.dir.is_some() { "/" } else { "" };
        if !self.long {
            return Ok(writeln!(self.out, "{path}{slash}")?);
        }
        let (kind, size, more) = match &entry.kind {
            EntryKind::File { size, .. } => ('-', size.to_string(), String::new()),
            EntryKind::Dir { .. } => ('d', "-".to_owned(), String::new()),
            EntryKind::Symlink { target } => {
                ('l', target.len().to_string(), format!(" -> {}", output::printable(target)))
            }
            EntryKind::HardLink { first } => ('h', "-".to_owned(), format!(" == {}", output::printable(first))),
        };
        let time = output::time(entry.mtime.secs.saturating_mul(1000));
        let mode = entry.mode;
        Ok(writeln!(self.out, "{kind}{mode:04o} {size:>14} {time} {path}{slash}{more}")?)
    }

    fn finish(mut self) -> anyhow::Result<()> {
        if self.json {
            writeln!(self.out, "{}", if self.first { "[]" } else { "]" })?;
        }
        Ok(self.out.finish()?)
    }
}
