//! `larder job submit`, short `larder submit`: from flags to what the scheduler takes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context as _;
use http::Method;

use crate::cli::Context;
use crate::cli::report::{HintExt as _, usage};
use crate::cli::scheduler::client::{Client, project_or_default};
use crate::config::Span;
use crate::format::refs::Revision;
use crate::quota::{Kind, MilliGpus, Template};
use crate::scheduler::api::SubmitRequest;
use crate::scheduler::job::{DatasetMount, HostPath, JobSpec, Output, Volume};
use crate::scheduler::registry::TemplateView;
use crate::scheduler::view::JobView;

/// Flags of `larder job submit`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder job submit train-1 -p team-a -g 1 --dataset xray@v2:/data --output model:/out -- python train.py
  larder submit shell -g 0.5 --interactive -- sleep infinity
  larder submit big -g 2 --processes 4 -i registry/train:7 --max-runtime 12h -- torchrun train.py
  larder submit any --template gpus=8,pool=big --template gpus=4,processes=2 -- ./train
  larder submit any --template gpu-real,cloud-small -v /srv/scratch:/scratch -- ./train
  larder submit train-2 --cluster training -n team-a -i registry/train:7 -g 2 --dataset xray@v2:/data -- python train.py

A job without --image runs as a process of the machine: what it names by path is where LARDER_DATASET_XRAY,
LARDER_OUTPUT_MODEL, LARDER_VOLUME_NAME and so on say. It works in a directory of its own, which it finds again
when it was paused.")]
pub struct Args {
    /// Name, unlike any other of the project
    name: String,
    /// Project (default: that of `larder project use`)
    #[arg(short, long)]
    project: Option<String>,
    /// Container image; without one the job is a plain process
    #[arg(short, long)]
    image: Option<String>,
    /// GPUs of each process: a fraction of one, or whole ones
    #[arg(short, long, value_name = "GPUS", conflicts_with = "template")]
    gpus: Option<MilliGpus>,
    /// Processes that start together or not at all
    #[arg(long, value_name = "N", conflicts_with = "template")]
    processes: Option<u32>,
    /// A shape such as gpus=2,processes=4,pool=big,label.zone=west, or names of `larder job template` with commas
    /// between; of several the first that can be had (repeatable)
    #[arg(long, value_name = "SHAPE", value_parser = wanted)]
    template: Vec<Wanted>,
    /// A person works in it: short for --priority interactive
    #[arg(long, conflicts_with = "priority")]
    interactive: bool,
    /// What it is for; only train jobs are ever paused
    #[arg(long, value_enum)]
    priority: Option<Priority>,
    /// Place among the project's own jobs, greater first (default: by --priority)
    #[arg(long, value_name = "N")]
    rank: Option<u32>,
    /// Shows a commit to the job: REV:PATH (repeatable; without a path: /data/DATASET)
    #[arg(long, value_name = "REV:PATH")]
    dataset: Vec<String>,
    /// Makes a commit of this directory when the job succeeds: DATASET:PATH (repeatable)
    #[arg(long, value_name = "DATASET:PATH")]
    output: Vec<String>,
    /// Shows a directory that the project's jobs share: NAME:PATH (repeatable)
    #[arg(long, value_name = "NAME:PATH")]
    volume: Vec<String>,
    /// Shows a path of the machine: HOST:PATH, as far as the scheduler allows; -v HOST:PATH is short for it
    /// (repeatable)
    #[arg(long, value_name = "HOST:PATH")]
    host_path: Vec<String>,
    /// Sets a variable (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Containers: shares the machine's shared memory
    #[arg(long)]
    large_shm: bool,
    /// Containers: publishes a port (repeatable)
    #[arg(long, value_name = "PORT")]
    port: Vec<String>,
    /// Runs only on nodes of this pool
    #[arg(long, value_name = "POOL", conflicts_with = "template")]
    node_pool: Option<String>,
    /// Ends it after so much time
    #[arg(long, value_name = "DURATION")]
    max_runtime: Option<Span>,
    /// How long it may take to end when it is paused or cancelled
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    grace: Span,
    /// Which version of the code it is: its outputs remember that
    #[arg(long, value_name = "TEXT")]
    code: Option<String>,
    /// Program and arguments
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Priority {
    /// Runs to its end without a person; may be paused
    Train,
    /// A person waits for it
    Build,
    /// A person works in it
    Interactive,
    /// Answers requests
    Inference,
}

impl From<Priority> for Kind {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Train => Self::Train,
            Priority::Build => Self::Build,
            Priority::Interactive => Self::Interactive,
            Priority::Inference => Self::Inference,
        }
    }
}

/// One `--template`.
#[derive(Debug, Clone)]
enum Wanted {
    Shape(Template),
    Names(Vec<String>),
}

fn wanted(text: &str) -> Result<Wanted, String> {
    match text.contains('=') {
        true => Ok(Wanted::Shape(template(text)?)),
        false if text.split(',').all(|name| !name.is_empty()) => {
            Ok(Wanted::Names(text.split(',').map(str::to_owned).collect()))
        }
        false => Err("write KEY=VALUE, or names, with commas between".to_owned()),
    }
}

/// Reads a shape.
pub(super) fn template(text: &str) -> Result<Template, String> {
    let mut template = Template::new(MilliGpus::ONE);
    for part in text.split(',') {
        let (key, value) = part.split_once('=').ok_or("write KEY=VALUE, with commas between")?;
        match key {
            "gpus" => template.gpus = value.parse().map_err(|error| format!("{error}"))?,
            "processes" => template.processes = value.parse().map_err(|_| format!("`{value}` is no number"))?,
            "pool" => template.pool = Some(value.to_owned()),
            _ => match key.strip_prefix("label.") {
                Some(label) => {
                    template.labels.insert(label.to_owned(), value.to_owned());
                }
                None => return Err(format!("`{key}` is none of gpus, processes, pool, label.NAME")),
            },
        }
    }
    Ok(template)
}

fn shape_of(name: &str, known: &[TemplateView]) -> anyhow::Result<Template> {
    match known.iter().find(|view| view.name == name) {
        Some(view) => Ok(view.template.shape.clone()),
        None => usage(format!("there is no template `{name}`")).hint("`larder job template list` shows the templates"),
    }
}

/// Cuts `WHAT:/path` at its path.
fn cut<'a>(flag: &str, text: &'a str) -> anyhow::Result<(&'a str, &'a str)> {
    match text.find(":/").map(|at| text.split_at(at)) {
        Some((what, path)) if !what.is_empty() => Ok((what, path.trim_start_matches(':'))),
        _ => usage(format!("--{flag} {text}: write NAME:/path")),
    }
}

impl Args {
    /// Gives the shapes that are wanted; names are looked up now, so that the job keeps them.
    fn templates(&self, client: &Client<'_>) -> anyhow::Result<Vec<Template>> {
        if !self.template.is_empty() {
            let named = self.template.iter().any(|wanted| matches!(wanted, Wanted::Names(_)));
            let known: Vec<TemplateView> = if named { client.get("/v1/templates")? } else { Vec::new() };
            let mut templates = Vec::new();
            for wanted in &self.template {
                match wanted {
                    Wanted::Shape(shape) => templates.push(shape.clone()),
                    Wanted::Names(names) => {
                        for name in names {
                            templates.push(shape_of(name, &known)?);
                        }
                    }
                }
            }
            return Ok(templates);
        }
        Ok(vec![self.shape()])
    }

    /// Gives what is asked of a cluster, which knows no named shapes.
    pub(super) async fn request(self, ctx: &Context) -> anyhow::Result<SubmitRequest> {
        let project = project_or_default(ctx, self.project.as_deref())?;
        let mut templates = Vec::new();
        for wanted in &self.template {
            match wanted {
                Wanted::Shape(shape) => templates.push(shape.clone()),
                Wanted::Names(_) => {
                    return usage("a cluster knows no named templates: write --template gpus=2,pool=big");
                }
            }
        }
        if templates.is_empty() {
            templates.push(self.shape());
        }
        let spec = self.spec(ctx, templates).await?;
        Ok(SubmitRequest { project, name: self.name, spec })
    }

    /// Gives the shape that the plain flags describe.
    fn shape(&self) -> Template {
        let processes = self.processes.unwrap_or(1);
        let (gpus, pool) = (self.gpus.unwrap_or(MilliGpus::ONE), self.node_pool.clone());
        Template { gpus, processes, pool, labels: BTreeMap::new() }
    }

    fn env(&self) -> anyhow::Result<BTreeMap<String, String>> {
        let mut env = BTreeMap::new();
        for pair in &self.env {
            match pair.split_once('=') {
                Some((key, value)) if !key.is_empty() => env.insert(key.to_owned(), value.to_owned()),
                _ => return usage(format!("--env {pair}: write KEY=VALUE")),
            };
        }
        Ok(env)
    }

    async fn datasets(&self, ctx: &Context) -> anyhow::Result<Vec<DatasetMount>> {
        if self.dataset.is_empty() {
            return Ok(Vec::new());
        }
        let catalog = ctx.catalog().await?;
        let mut datasets = Vec::new();
        for text in &self.dataset {
            let (revision, path) = match text.find(":/") {
                Some(_) => cut("dataset", text)?,
                None => (text.as_str(), ""),
            };
            let rev = Revision::parse(revision)?;
            // What a name means may change until the job runs: it is fixed now.
            let commit = catalog.resolve(&rev).await.with_context(|| format!("cannot find {revision}"))?;
            let dataset = rev.dataset.as_str().to_owned();
            let path = if path.is_empty() { format!("/data/{dataset}") } else { path.to_owned() };
            datasets.push(DatasetMount { dataset, revision: revision.to_owned(), commit: commit.to_string(), path });
        }
        Ok(datasets)
    }

    async fn spec(&self, ctx: &Context, templates: Vec<Template>) -> anyhow::Result<JobSpec> {
        let mut spec = JobSpec {
            kind: if self.interactive { Kind::Interactive } else { self.priority.map_or(Kind::Train, Kind::from) },
            priority: self.rank,
            templates,
            image: self.image.clone(),
            command: self.command.clone(),
            env: self.env()?,
            datasets: self.datasets(ctx).await?,
            outputs: Vec::new(),
            volumes: Vec::new(),
            host_paths: Vec::new(),
            large_shm: self.large_shm,
            ports: self.port.clone(),
            grace_ms: self.grace.as_ms(),
            max_runtime_ms: self.max_runtime.map(|span| span.as_ms()),
            code: self.code.clone(),
            restore: None,
        };
        for text in &self.output {
            let (dataset, path) = cut("output", text)?;
            spec.outputs.push(Output { dataset: dataset.to_owned(), path: path.to_owned() });
        }
        for text in &self.volume {
            let (name, path) = cut("volume", text)?;
            spec.volumes.push(Volume { name: name.to_owned(), path: path.to_owned() });
        }
        for text in &self.host_path {
            let (host, path) = cut("host-path", text)?;
            spec.host_paths.push(HostPath { host: PathBuf::from(host), path: path.to_owned() });
        }
        Ok(spec)
    }
}

/// Runs the command.
pub fn run(ctx: &Context, args: Args) -> anyhow::Result<()> {
    let project = project_or_default(ctx, args.project.as_deref())?;
    let client = Client::new(ctx);
    let templates = args.templates(&client)?;
    let spec = ctx.block_on(args.spec(ctx, templates))?;
    let request = SubmitRequest { project, name: args.name, spec };
    let view: JobView = client.send(Method::POST, "/v1/jobs", &request)?;
    tell(ctx, &view)
}

/// Says that a job is submitted.
pub(super) fn tell(ctx: &Context, view: &JobView) -> anyhow::Result<()> {
    if ctx.json() {
        return ctx.print_json(view);
    }
    let (name, project) = (&view.job.name, &view.job.project);
    ctx.say(format!("job {name} is submitted to project {project}; `larder job describe {name}` says how it does"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_read_and_what_is_no_shape_is_refused() {
        let shape = template("gpus=0.5,processes=3,pool=big,label.zone=west").expect("reads");
        assert_eq!((shape.gpus, shape.processes, shape.pool.as_deref()), (MilliGpus(500), 3, Some("big")));
        assert_eq!(shape.labels.get("zone").map(String::as_str), Some("west"));
        for bad in ["", "gpus", "gpus=x", "size=3", "processes=-1"] {
            assert!(template(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_shown_at_a_path_is_cut_at_the_path() {
        assert_eq!(cut("dataset", "xray@v2:/data/x").ok(), Some(("xray@v2", "/data/x")));
        assert_eq!(cut("host-path", "/srv/a:/b").ok(), Some(("/srv/a", "/b")));
        for bad in ["xray", ":/data", "xray:data"] {
            assert!(cut("output", bad).is_err(), "{bad}");
        }
    }
}
