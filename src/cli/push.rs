//! `larder push`: stores a directory as a new commit.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use indicatif::ProgressBar;

use super::output::{bytes, span};
use super::report::{HintExt as _, usage};
use super::{Context, output};
use crate::format::commit::Lineage;
use crate::format::refs::{DatasetName, RefName, Revision};
use crate::store::catalog::Catalog;
use crate::store::catalog::push::{Onto, Phase, Problem, Progress, PushError, PushOptions, PushOutcome, push};

/// Problems that are listed; a tree of a million sockets should not fill a terminal.
const LISTED_MAX: usize = 100;

/// How often the push of a job is given again that lost its place to another.
const LOST_TRIES: u32 = 64;

/// Flags of `larder push`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder push ./photos photos -m 'first version'
  larder push ./photos photos --tag v2 --exclude '*.tmp' --exclude /cache/
  larder push ./new photos --onto photos@v2 --at 2026/11
  larder push ./model models --input photos@v2 --code $(git rev-parse HEAD)

Pushing again stores only what changed, and an unchanged directory makes no new commit (unless
-m or --meta asks for one). A push that was interrupted goes on where it stopped.

A glob without `/` matches a name at any depth, one with `/` a path from DIR, one that ends
with `/` directories only.")]
pub struct Args {
    /// Directory to store
    pub dir: PathBuf,
    /// Dataset that gets the commit; made if it is new
    pub dataset: String,
    /// Describes the commit
    #[arg(short, long, value_name = "TEXT")]
    pub message: Option<String>,
    /// Tags the commit
    #[arg(long, value_name = "TAG")]
    pub tag: Option<String>,
    /// Moves (or begins) this branch instead of `main`
    #[arg(long, value_name = "BRANCH")]
    pub branch: Option<String>,
    /// Adds metadata to the commit (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    pub meta: Vec<String>,
    /// Adds the metadata of a JSON file, an object of strings: command lines are everybody's to read
    #[arg(long, value_name = "FILE")]
    pub meta_file: Option<PathBuf>,
    /// Names a commit that DIR was made from; gc keeps it as long as the new one (repeatable)
    #[arg(long, value_name = "REV")]
    pub input: Vec<String>,
    /// Says which job made DIR; the same job pushing the same files again makes no other commit
    #[arg(long, value_name = "ID")]
    pub job: Option<String>,
    /// Says in which container image DIR was made
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<String>,
    /// Says which version of the code made DIR
    #[arg(long, value_name = "TEXT")]
    pub code: Option<String>,
    /// Leaves out what matches (repeatable)
    #[arg(long, value_name = "GLOB")]
    pub exclude: Vec<String>,
    /// Adds DIR to this commit instead of storing DIR alone
    #[arg(long, value_name = "REV")]
    pub onto: Option<String>,
    /// Where in that commit: PATH becomes DIR as a whole (without it, DIR is merged into the root)
    #[arg(long, value_name = "PATH", requires = "onto")]
    pub at: Option<String>,
    /// Leaves out sockets, devices and what cannot be read, instead of failing
    #[arg(long)]
    pub skip_unreadable: bool,
    /// Leaves out sockets, pipes and devices, and fails for what cannot be read
    #[arg(long)]
    pub skip_special: bool,
    /// Pushes in the name of another user: goes by their grants (only root may)
    #[arg(long = "for", value_name = "UID:GID", value_parser = user)]
    pub for_user: Option<(u32, u32)>,
}

fn user(text: &str) -> Result<(u32, u32), String> {
    let pair = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    pair.ok_or_else(|| "write UID:GID, two numbers".to_owned())
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let mut options = options_of(&args)?;
    if !args.dir.is_dir() {
        return usage(format!("{} is not a directory", args.dir.display()));
    }
    let catalog = ctx.block_on(ctx.catalog_or_create())?;
    ctx.block_on(async {
        match args.for_user {
            Some(user) => super::grant::may_push_for(&catalog, &options.dataset, user).await,
            None => super::grant::may_push(&catalog, &options.dataset).await,
        }
    })?;
    options.author.clone_from(&catalog.by);
    options.lineage = ctx.block_on(lineage_of(&catalog, &args))?;
    let progress = Arc::new(Progress::default());
    let watch = Watch::start(ctx.progress(0), progress.clone());
    let mut result = push(&catalog, ctx.rt().handle(), &options, &progress);
    // Many jobs may end at once and store into one dataset: a job's push that lost its place goes behind the winner.
    for _ in 0..LOST_TRIES {
        if args.job.is_none() || !matches!(result, Err(PushError::Lost { .. })) {
            break;
        }
        result = push(&catalog, ctx.rt().handle(), &options, &progress);
    }
    watch.stop();
    match result {
        Ok(outcome) => tell(ctx, &outcome),
        Err(error) => {
            if let PushError::Problems { problems } | PushError::Changed { problems } = &error {
                if ctx.json() {
                    ctx.print_json(&Refused { problems })?;
                } else {
                    list(problems).for_each(|line| eprintln!("{line}"));
                }
            }
            let hint = "what was uploaded is kept: run the same push again to go on";
            if matches!(error, PushError::Lake(_)) { Err(error).hint(hint) } else { Err(error.into()) }
        }
    }
}

fn options_of(args: &Args) -> anyhow::Result<PushOptions> {
    let named = |text: &Option<String>| -> anyhow::Result<Option<RefName>> {
        match text.as_deref().map(RefName::parse) {
            Some(Err(error)) => usage(error.to_string()),
            Some(Ok(name)) => Ok(Some(name)),
            None => Ok(None),
        }
    };
    let dataset = match DatasetName::parse(&args.dataset) {
        Ok(dataset) => dataset,
        Err(error) => return usage(error.to_string()),
    };
    let mut options = PushOptions::new(&args.dir, dataset);
    options.message.clone_from(&args.message);
    options.tag = named(&args.tag)?;
    options.branch = named(&args.branch)?;
    for pair in &args.meta {
        let Some((key, value)) = pair.split_once('=').filter(|(key, _)| !key.is_empty()) else {
            return usage(format!("--meta {pair}: expected KEY=VALUE"));
        };
        options.meta.push((key.to_owned(), value.to_owned()));
    }
    if let Some(path) = &args.meta_file {
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let meta: std::collections::BTreeMap<String, String> =
            serde_json::from_slice(&text).with_context(|| format!("{} is no object of strings", path.display()))?;
        options.meta.extend(meta);
    }
    options.excludes.clone_from(&args.exclude);
    if let Some(onto) = &args.onto {
        let rev = match Revision::parse(onto) {
            Ok(rev) => rev,
            Err(error) => return usage(error.to_string()),
        };
        options.onto = Some(Onto { rev, at: args.at.as_ref().map(|at| at.clone().into_bytes()) });
    }
    options.skip_unreadable = args.skip_unreadable;
    options.skip_special = args.skip_special;
    Ok(options)
}

async fn lineage_of(catalog: &Catalog, args: &Args) -> anyhow::Result<Lineage> {
    let mut inputs = Vec::new();
    for input in &args.input {
        let rev = match Revision::parse(input) {
            Ok(rev) => rev,
            Err(error) => return usage(format!("--input {input}: {error}")),
        };
        let commit = catalog.resolve(&rev).await.with_context(|| format!("cannot find the input {input}"))?;
        if !inputs.contains(&commit) {
            inputs.push(commit);
        }
    }
    let (job, image, code) = (args.job.clone(), args.image.clone(), args.code.clone());
    Ok(Lineage { inputs, job, image, code, imported_from: None })
}

/// What `--json` prints of a push that was refused: every name, however many.
#[derive(serde::Serialize)]
struct Refused<'a> {
    problems: &'a [Problem],
}

/// Gives a line for each name, and how many more there are where they are too many to read.
fn list(problems: &[Problem]) -> impl Iterator<Item = String> {
    let line = |problem: &Problem| format!("  {}: {}", output::printable(problem.path.as_bytes()), problem.reason);
    let more = problems.len().checked_sub(LISTED_MAX).filter(|more| *more > 0);
    let rest = more.map(|more| format!("  and {more} more; `--json` lists all"));
    problems.iter().take(LISTED_MAX).map(line).chain(rest)
}

fn tell(ctx: &Context, outcome: &PushOutcome) -> anyhow::Result<()> {
    if !outcome.skipped.is_empty() {
        ctx.say(format!("left out {} names:", outcome.skipped.len()));
        list(&outcome.skipped).for_each(|line| ctx.say(line));
    }
    if outcome.xattrs_dropped > 0 {
        let count = outcome.xattrs_dropped;
        ctx.say(format!("extended attributes and ACLs of {count} files and directories are not stored"));
    }
    if outcome.heads.len() > 1 {
        let heads: Vec<String> = outcome.heads.iter().map(|head| head.short()).collect();
        let branch = outcome.branch.as_deref().unwrap_or_default();
        ctx.say(format!(
            "{}@{branch} has {} heads now, because another push came at the same time: {}; push again to merge them",
            outcome.dataset,
            heads.len(),
            heads.join(", ")
        ));
    }
    if ctx.json() {
        return ctx.print_json(outcome);
    }
    let mut out = ctx.out();
    let say = |out: &mut output::Out, text: String| {
        use std::io::Write as _;
        writeln!(out, "{text}").context("cannot write to stdout")
    };
    let what = if outcome.unchanged { "nothing changed, it is still " } else { "" };
    say(&mut out, format!("{what}{}@{}", outcome.dataset, outcome.commit.short()))?;
    say(&mut out, format!("commit    {}", outcome.commit))?;
    if let Some(branch) = &outcome.branch {
        say(&mut out, format!("branch    {branch}"))?;
    }
    if let Some(tag) = &outcome.tag {
        say(&mut out, format!("tag       {tag}"))?;
    }
    say(
        &mut out,
        format!(
            "files     {} ({}), {} directories, {} symbolic links",
            outcome.files,
            bytes(outcome.bytes),
            outcome.dirs,
            outcome.symlinks
        ),
    )?;
    say(&mut out, format!("read      {} files ({})", outcome.files_read, bytes(outcome.bytes_read)))?;
    say(&mut out, format!("new       {}, reused {}", bytes(outcome.new_bytes), bytes(outcome.reused_bytes)))?;
    say(&mut out, format!("uploaded  {} in {}", bytes(outcome.uploaded_bytes), span_of(outcome.elapsed_ms)))?;
    Ok(out.finish()?)
}

fn span_of(elapsed_ms: u64) -> String {
    if elapsed_ms < 60_000 {
        format!("{}.{} s", elapsed_ms / 1000, elapsed_ms % 1000 / 100)
    } else {
        span(elapsed_ms / 1000)
    }
}

/// Moves the progress bar along with the counters.
struct Watch {
    stop: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watch {
    fn start(bar: ProgressBar, progress: Arc<Progress>) -> Self {
        let stop = Arc::new(AtomicU64::new(0));
        let seen = stop.clone();
        let thread = std::thread::Builder::new().name("push-progress".to_owned()).spawn(move || {
            while seen.load(Ordering::Relaxed) == 0 {
                show(&bar, &progress);
                std::thread::park_timeout(Duration::from_millis(100));
            }
            bar.finish_and_clear();
        });
        Self { stop, thread: thread.ok() }
    }

    fn stop(self) {
        self.stop.store(1, Ordering::Relaxed);
        if let Some(thread) = self.thread {
            thread.thread().unpark();
            // A bar that could not be drawn is no reason to fail.
            let _ = thread.join();
        }
    }
}

fn show(bar: &ProgressBar, progress: &Progress) {
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    match progress.phase() {
        Phase::Opening => bar.set_message("opening the lake"),
        Phase::Walking => bar.set_message(format!("{} names", load(&progress.walked))),
        Phase::Contents => {
            bar.set_message(format!("{}/{} files", load(&progress.files_done), load(&progress.files_total)));
            bar.set_length(load(&progress.bytes_total));
            bar.set_position(load(&progress.bytes_done));
        }
        Phase::Building => bar.set_message("storing names"),
        Phase::Committing | Phase::Done => bar.set_message("committing"),
    }
    bar.tick();
}
