//! `larder job` on a Kubernetes cluster: `--cluster CONTEXT`, or `LARDER_CLUSTER`, asks the cluster instead of the scheduler
//! of this machine.

use std::io::Write as _;

use anyhow::Context as _;
use futures::AsyncReadExt as _;

use super::{Command, Many, One, show, submit};
use crate::cli::Context;
use crate::cli::report::{HintExt as _, usage};
use crate::cli::scheduler::client::{LOOK_INTERVAL, default_project, project_or_default};
use crate::scheduler::job::{State, Submitter};
use crate::scheduler::kubernetes::connect;
use crate::scheduler::kubernetes::jobs::{JobError, Jobs};
use crate::scheduler::view::JobView;

/// Which cluster.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ClusterArgs {
    /// Asks this Kubernetes cluster, a context of the kubeconfig (`current`: its current one), instead of the
    /// scheduler of this machine
    #[arg(long, global = true, value_name = "CONTEXT", env = "LARDER_CLUSTER", hide_env = true)]
    cluster: Option<String>,
    /// Namespace on the cluster (default: that of the context)
    #[arg(short = 'n', long, global = true, value_name = "NAMESPACE")]
    namespace: Option<String>,
}

impl ClusterArgs {
    /// Gives the cluster that is named; None: this machine.
    pub(super) fn context(&self) -> Option<Option<&str>> {
        let named = self.cluster.as_deref().filter(|name| !name.is_empty())?;
        Some(Some(named).filter(|name| *name != "current"))
    }

    async fn jobs(&self, context: Option<&str>) -> anyhow::Result<Jobs> {
        let (client, namespace) = connect(None, context).await?;
        Ok(Jobs::new(client, self.namespace.clone().unwrap_or(namespace)))
    }
}

/// Runs a command on the cluster.
pub(super) fn run(ctx: &Context, args: &ClusterArgs, context: Option<&str>, command: Command) -> anyhow::Result<()> {
    if let Command::Submit(submit) = command {
        return submit_job(ctx, args, context, *submit);
    }
    ctx.block_on(async {
        let jobs = args.jobs(context).await?;
        match command {
            Command::List { project, all } => {
                let project = project.or_else(|| default_project(ctx)).filter(|_| !all);
                show::list(ctx, &told(jobs.list(project.as_deref()).await)?)
            }
            Command::Describe(one) => show::describe(ctx, &find(&jobs, &one).await?),
            Command::Why(one) => show::why(ctx, &find(&jobs, &one).await?),
            Command::Logs { one, follow, rank } => logs(ctx, &jobs, &one, follow, rank).await,
            Command::Cancel(many) => end(ctx, &jobs, &many, true).await,
            Command::Delete(many) => end(ctx, &jobs, &many, false).await,
            Command::Wait(many) => wait(ctx, &jobs, &many).await,
            _ => usage("this is not possible on a cluster")
                .hint("submit, list, describe, why, logs, wait, cancel and delete are; kubectl has the rest"),
        }
    })
}

/// Submits a job to the cluster.
pub(super) fn submit_job(
    ctx: &Context,
    args: &ClusterArgs,
    context: Option<&str>,
    submit: submit::Args,
) -> anyhow::Result<()> {
    ctx.block_on(async {
        let request = submit.request(ctx).await?;
        let submitter = Submitter { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
        let view = told(args.jobs(context).await?.submit(&request, submitter).await)?;
        submit::tell(ctx, &view)
    })
}

fn told<T>(answer: Result<T, JobError>) -> anyhow::Result<T> {
    let hint = match &answer {
        Err(JobError::NoJob { .. }) => {
            "`larder job list -A` shows all jobs of the namespace; `--namespace` names another one"
        }
        Err(JobError::Api { .. }) => "`kubectl auth can-i --list` shows what you may do there",
        _ => return Ok(answer?),
    };
    answer.hint(hint)
}

async fn find(jobs: &Jobs, one: &One) -> anyhow::Result<JobView> {
    let view = told(jobs.get(&one.name).await)?;
    match &one.project {
        Some(project) if *project != view.job.project => {
            usage(format!("the job `{}` is in project {}, not in {project}", one.name, view.job.project))
        }
        _ => Ok(view),
    }
}

async fn views(ctx: &Context, jobs: &Jobs, many: &Many) -> anyhow::Result<Vec<JobView>> {
    if many.all {
        let project = project_or_default(ctx, many.project.as_deref())?;
        return told(jobs.list(Some(&project)).await);
    }
    let mut views = Vec::new();
    for name in &many.names {
        views.push(find(jobs, &One { name: name.clone(), project: many.project.clone() }).await?);
    }
    Ok(views)
}

async fn end(ctx: &Context, jobs: &Jobs, many: &Many, cancel: bool) -> anyhow::Result<()> {
    let mut ended = Vec::new();
    for view in views(ctx, jobs, many).await? {
        let name = &view.job.name;
        ended.push(told(if cancel { jobs.cancel(name).await } else { jobs.delete(name).await })?);
        if !ctx.json() {
            let done = if cancel { "cancelled" } else { "deleted" };
            ctx.say(format!("job {name} of project {} is {done}", view.job.project));
        }
    }
    if ctx.json() { ctx.print_json(&ended) } else { Ok(()) }
}

async fn logs(ctx: &Context, jobs: &Jobs, one: &One, follow: bool, rank: u32) -> anyhow::Result<()> {
    let mut log = Box::pin(told(jobs.log(&one.name, rank, follow).await)?);
    let mut piece = vec![0; 64 << 10];
    loop {
        let length = log.read(&mut piece).await.context("the cluster stopped giving the log")?;
        if length == 0 {
            return Ok(());
        }
        let mut out = ctx.out();
        out.write_all(piece.get(..length).unwrap_or_default())?;
        out.finish()?;
    }
}

async fn wait(ctx: &Context, jobs: &Jobs, many: &Many) -> anyhow::Result<()> {
    let mut ended = views(ctx, jobs, many).await?;
    for view in &mut ended {
        while !view.job.state.is_over() {
            tokio::time::sleep(LOOK_INTERVAL.max(std::time::Duration::from_secs(2))).await;
            *view = told(jobs.get(&view.job.name).await)?;
        }
        if !ctx.json() {
            ctx.say(format!("job {} is {}", view.job.name, view.status));
        }
    }
    if ctx.json() {
        ctx.print_json(&ended)?;
    }
    let bad: Vec<&str> =
        ended.iter().filter(|view| view.job.state != State::Succeeded).map(|view| view.job.name.as_str()).collect();
    if !bad.is_empty() {
        anyhow::bail!("did not succeed: {}", bad.join(", "));
    }
    Ok(())
}
