//! What the commands speak with a scheduler: the daemon's transport, on the scheduler's socket.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use base64::Engine as _;
use http::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cli::Context;
use crate::cli::mount::with_hint;
use crate::cli::report::{HintExt as _, usage};
use crate::node::client::{ClientError, NodeClient};
use crate::scheduler::api::LogPart;
use crate::scheduler::view::JobView;

/// How often a command that waits looks again.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// How long a command that waits for a job waits for a scheduler.
const PATIENCE: Duration = Duration::from_secs(600);

/// Says whether a scheduler that is started again would answer.
fn is_passing(error: &ClientError) -> bool {
    match error {
        ClientError::Refused { status, .. } => *status == 503,
        error => error.is_absent() || matches!(error, ClientError::Lost { .. }),
    }
}

/// Gives the scheduler's socket: beside the daemon's.
pub fn socket(ctx: &Context) -> PathBuf {
    ctx.config().daemon.socket.with_file_name("scheduler.sock")
}

/// A scheduler, and whose jobs are meant.
#[derive(Debug)]
pub struct Client<'a> {
    ctx: &'a Context,
    node: NodeClient,
}

/// No body.
const NOTHING: Option<&()> = None;

impl<'a> Client<'a> {
    /// Names the scheduler of this configuration; speaks to nobody yet.
    pub fn new(ctx: &'a Context) -> Self {
        Self { ctx, node: NodeClient::at(&socket(ctx)) }
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> anyhow::Result<T> {
        match self.node.call(method, path, body).await {
            Ok(answer) => Ok(answer),
            Err(error) if error.is_absent() => {
                let at = self.node.place();
                Err(anyhow::anyhow!("no scheduler listens at {at}")).hint("`larder scheduler run` runs one")
            }
            Err(error) => Err(with_hint(error)),
        }
    }

    /// Asks.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.ctx.block_on(self.call(Method::GET, path, NOTHING))
    }

    /// Asks, and waits where the scheduler is just being started again: jobs go on meanwhile.
    pub fn get_patiently<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let begun = Instant::now();
        let mut told = false;
        loop {
            match self.ctx.block_on(self.node.call(Method::GET, path, NOTHING)) {
                Ok(answer) => return Ok(answer),
                Err(error) if is_passing(&error) && begun.elapsed() < PATIENCE => {
                    if !std::mem::replace(&mut told, true) {
                        self.ctx.say("the scheduler does not answer now; waiting for it");
                    }
                    std::thread::sleep(LOOK_INTERVAL);
                }
                Err(error) => return Err(with_hint(error)),
            }
        }
    }

    /// Asks for a change.
    pub fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> anyhow::Result<T> {
        self.ctx.block_on(self.call(method, path, Some(body)))
    }

    /// Removes.
    pub fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.ctx.block_on(self.call(Method::DELETE, path, NOTHING))
    }

    /// Gives the metrics.
    pub fn metrics(&self) -> anyhow::Result<String> {
        self.ctx.block_on(self.node.metrics()).map_err(with_hint)
    }

    /// Gives the path of a job. Without a project that is named, the default one's where it has the job,
    /// else the only one of that name.
    pub fn job_path(&self, project: Option<&str>, name: &str, what: &str) -> anyhow::Result<String> {
        let path = |project: Option<&str>| {
            let query = project.map_or(String::new(), |project| format!("?project={}", quoted(project)));
            format!("/v1/jobs/{}{what}{query}", quoted(name))
        };
        if project.is_some() {
            return Ok(path(project));
        }
        if let Some(default) = default_project(self.ctx) {
            let jobs: Vec<JobView> = self.get(&format!("/v1/jobs?project={}", quoted(&default)))?;
            if jobs.iter().any(|view| view.job.name == name) {
                return Ok(path(Some(&default)));
            }
        }
        Ok(path(None))
    }

    /// Gives a job.
    pub fn job(&self, project: Option<&str>, name: &str) -> anyhow::Result<JobView> {
        self.get(&self.job_path(project, name, "")?)
    }

    /// Gives a job, likewise.
    pub fn job_patiently(&self, view: &JobView) -> anyhow::Result<JobView> {
        let (name, project) = (quoted(&view.job.name), quoted(&view.job.project));
        self.get_patiently(&format!("/v1/jobs/{name}?project={project}"))
    }

    /// Gives what a rank of a job printed from a position on. Who follows it waits for a scheduler too.
    pub fn log(&self, view: &JobView, rank: u32, offset: u64, follow: bool) -> anyhow::Result<(Vec<u8>, LogPart)> {
        let (name, project) = (quoted(&view.job.name), quoted(&view.job.project));
        let path = format!("/v1/jobs/{name}/log?project={project}&rank={rank}&offset={offset}");
        let part: LogPart = if follow { self.get_patiently(&path)? } else { self.get(&path)? };
        let bytes =
            base64::engine::general_purpose::STANDARD.decode(&part.base64).context("the scheduler sent no base64")?;
        Ok((bytes, part))
    }
}

/// Writes a name so that it can stand in a URL.
pub fn quoted(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let one = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    name.bytes().map(one).collect()
}

fn default_file(ctx: &Context) -> PathBuf {
    ctx.config().state.join("project")
}

/// Gives the project that `project use` named.
pub fn default_project(ctx: &Context) -> Option<String> {
    let text = std::fs::read_to_string(default_file(ctx)).ok()?;
    Some(text.trim().to_owned()).filter(|name| !name.is_empty())
}

/// Remembers a project as the default one.
pub fn set_default_project(ctx: &Context, name: &str) -> anyhow::Result<()> {
    let path = default_file(ctx);
    let dir = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    std::fs::write(&path, format!("{name}\n")).with_context(|| format!("cannot write {}", path.display()))
}

/// Gives the project that is named, or the default one.
pub fn project_or_default(ctx: &Context, named: Option<&str>) -> anyhow::Result<String> {
    match named.map(str::to_owned).or_else(|| default_project(ctx)) {
        Some(project) => Ok(project),
        None => {
            usage("no project is named").hint("name one with --project, or once and for all: `larder project use NAME`")
        }
    }
}
