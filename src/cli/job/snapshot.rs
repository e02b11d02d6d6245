//! `larder job snapshot` and `larder job restore`: what a job made so far as a commit, and a job from such a commit.

use anyhow::Context as _;
use http::Method;

use super::One;
use crate::cli::Context;
use crate::cli::report::{HintExt as _, usage};
use crate::cli::scheduler::client::{Client, LOOK_INTERVAL};
use crate::format::refs::Revision;
use crate::scheduler::api::{SnapshotRequest, SubmitRequest};
use crate::scheduler::job::{JobSnapshot, Restore};
use crate::scheduler::snapshot::JobFile;
use crate::scheduler::view::JobView;
use crate::store::catalog::get;

/// What describes the job, in a snapshot.
const JOB_FILE: &[u8] = b"job.json";

/// Flags of `larder job restore`.
#[derive(Debug, clap::Args)]
pub struct RestoreArgs {
    /// Snapshot: DATASET, DATASET@TAG or DATASET@ID-PREFIX
    #[arg(value_name = "REV")]
    rev: String,
    /// Name of the new job (default: that of the old one, where it is free)
    #[arg(long)]
    name: Option<String>,
    /// Project (default: that of the old one)
    #[arg(short, long)]
    project: Option<String>,
    /// Another program and arguments (default: the same)
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Has a snapshot stored, and waits for it.
pub fn take(
    ctx: &Context,
    client: &Client<'_>,
    one: &One,
    dataset: Option<String>,
    no_wait: bool,
) -> anyhow::Result<()> {
    let path = client.job_path(one.project.as_deref(), &one.name, "/snapshot")?;
    let mut view: JobView = client.send(Method::POST, &path, &SnapshotRequest { dataset })?;
    let last = view.job.snapshots.last();
    let number = last.map(|last| last.number).context("the scheduler began no snapshot")?;
    loop {
        let found = view.job.snapshots.iter().find(|snapshot| snapshot.number == number);
        let snapshot = found.context("the job has forgotten its snapshot")?;
        if no_wait || !snapshot.is_running() {
            return tell(ctx, &view, snapshot);
        }
        std::thread::sleep(LOOK_INTERVAL);
        view = client.job_patiently(&view)?;
    }
}

fn tell(ctx: &Context, view: &JobView, snapshot: &JobSnapshot) -> anyhow::Result<()> {
    if let Some(error) = &snapshot.error {
        anyhow::bail!("the snapshot of {} could not be stored: {error}", view.job.name);
    }
    if ctx.json() {
        return ctx.print_json(snapshot);
    }
    match &snapshot.commit {
        Some(commit) => ctx.say(format!("job {} so far is {}@{commit}", view.job.name, snapshot.dataset)),
        None => ctx.say(format!("snapshot {} of {} is being stored", snapshot.number, view.job.name)),
    }
    Ok(())
}

/// Submits the job of a snapshot again.
pub fn restore(ctx: &Context, client: &Client<'_>, args: RestoreArgs) -> anyhow::Result<()> {
    let rev = Revision::parse(&args.rev)?;
    let mut text: Vec<u8> = Vec::new();
    let commit = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        let fetcher = ctx.fetcher(&catalog).await?;
        let snap = catalog.snapshot(&rev).await?;
        let sink = |bytes: &[u8]| {
            text.extend_from_slice(bytes);
            Ok(())
        };
        get::cat(&catalog, &fetcher, &snap, JOB_FILE, sink)
            .await
            .with_context(|| format!("{} is no snapshot of a job", args.rev))?;
        anyhow::Ok(catalog.resolve(&rev).await?)
    })?;
    let about: JobFile =
        serde_json::from_slice(&text).with_context(|| format!("{} is no snapshot of a job", args.rev))?;
    if about.format > crate::scheduler::job::FORMAT {
        return usage(format!("{} was made by a newer larder", args.rev)).hint("use that one");
    }
    let mut spec = about.spec;
    let (dataset, revision) = (rev.dataset.as_str().to_owned(), args.rev);
    spec.restore = Some(Restore { dataset, revision, commit: commit.to_string() });
    if !args.command.is_empty() {
        spec.command = args.command;
    }
    let (project, name) = (args.project.unwrap_or(about.project), args.name.unwrap_or(about.name));
    let view: JobView = client.send(Method::POST, "/v1/jobs", &SubmitRequest { project, name, spec })?;
    if ctx.json() {
        return ctx.print_json(&view);
    }
    ctx.say(format!("job {} is submitted to project {}", view.job.name, view.job.project));
    Ok(())
}
