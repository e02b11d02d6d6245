//! Commands in containers, for users who may not use the container engine.
//!
//! The engine belongs to who runs the scheduler; a job's submitter may still look into the job's container. So the
//! client hands its terminal over: one message on a unix socket of its own (beside the scheduler's) with the request as
//! JSON and three descriptors, stdin, stdout and stderr. The kernel tells who sent it, the scheduler decides
//! whether that user may, and the engine is run here with those descriptors. One message comes back: how it ended.
//! Who hangs up ends the engine's command.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{PeerCredentials, ReceiveTimeout};
use nix::sys::socket::{getsockopt, setsockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::{Deserialize, Serialize};

use crate::fs::sys::{accept_from, connect_to, listen_at, receive_message, send_message};
use crate::scheduler::api::ExecRequest;
use crate::scheduler::core::{Caller, Named};
use crate::scheduler::service::Handle;

/// A request is no longer.
const MESSAGE_BYTES_MAX: usize = 128 << 10;
/// Commands at the same time.
const COMMANDS_MAX: usize = 64;
/// How long a client that has connected may take to say what it wants: it has one of the places meanwhile.
const REQUEST_TIMEOUT_S: i64 = 10;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often it is looked whether the command has ended; who hangs up is noticed at once.
const LOOK_INTERVAL_MS: u8 = 50;
/// The status of a shell for a command that a signal ended.
const SIGNALLED: i32 = 128;

/// What a client asks for.
#[derive(Debug, Serialize, Deserialize)]
struct Asked {
    project: Option<String>,
    name: String,
    request: ExecRequest,
}

/// How it ended.
#[derive(Debug, Serialize, Deserialize)]
struct Ended {
    code: Option<i32>,
    error: Option<String>,
}

/// Gives the socket: beside the scheduler's.
pub fn socket(scheduler: &Path) -> PathBuf {
    scheduler.with_file_name("scheduler-exec.sock")
}

/// Serves from threads of its own until the process ends. The scheduler's socket says who may connect.
pub fn serve(handle: &Handle, scheduler: &Path) -> io::Result<()> {
    let path = socket(scheduler);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Nobody but the owner may connect to what is made under an ordinary umask.
    let listener = listen_at(&path)?;
    let other = std::fs::metadata(scheduler)?;
    std::os::unix::fs::chown(&path, None, Some(other.gid()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(other.mode() & 0o777))?;
    let (handle, running) = (handle.clone(), Arc::new(AtomicUsize::new(0)));
    let rt = tokio::runtime::Handle::current();
    std::thread::Builder::new().name("exec".to_owned()).spawn(move || {
        loop {
            let Ok(client) = accept_from(&listener) else {
                // Out of files, most likely: not to be asked for again at once.
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            };
            if let Err(error) = setsockopt(&client, ReceiveTimeout, &TimeVal::seconds(REQUEST_TIMEOUT_S)) {
                tracing::warn!(%error, "a client of a command in a container is not heard");
                continue;
            }
            let (handle, rt, running) = (handle.clone(), rt.clone(), Arc::clone(&running));
            let one = move || {
                let is_one_more = running.fetch_add(1, Ordering::Relaxed) < COMMANDS_MAX;
                let ended = if is_one_more {
                    rt.block_on(plan(&handle, &client)).and_then(|command| run(command, &client))
                } else {
                    Err(anyhow::anyhow!("{COMMANDS_MAX} commands run already"))
                };
                running.fetch_sub(1, Ordering::Relaxed);
                answer(&client, ended);
            };
            if let Err(error) = std::thread::Builder::new().name("exec".to_owned()).spawn(one) {
                tracing::warn!(%error, "no thread for a command in a container");
            }
        }
    })?;
    Ok(())
}

/// Reads what is asked for and who asks, and gives the command if they may.
async fn plan(handle: &Handle, client: &OwnedFd) -> anyhow::Result<Command> {
    let cred = getsockopt(client, PeerCredentials).context("the kernel does not tell who asks")?;
    let caller = Caller { uid: cred.uid(), gid: cred.gid() };
    let received = {
        let client = client.try_clone()?;
        tokio::task::spawn_blocking(move || receive_message(client.as_fd(), MESSAGE_BYTES_MAX)).await??
    };
    let (bytes, fds) = received;
    let asked: Asked = serde_json::from_slice(&bytes).context("the request is no JSON")?;
    let [stdin, stdout, stderr] = <[OwnedFd; 3]>::try_from(fds).ok().context("three descriptors are needed")?;
    let named = Named { project: asked.project, name: asked.name };
    let plan = handle.ask(move |core| core.exec_plan(&named, &asked.request, caller)).await??;
    anyhow::ensure!(plan.by_engine, "this job is no container");
    let (program, args) = plan.argv.split_first().context("there is no command")?;
    let mut command = Command::new(program);
    command.args(args).env_clear().envs(&plan.env).current_dir(&plan.cwd);
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    Ok(command)
}

/// Runs it to its end, or until the client hangs up.
fn run(mut command: Command, client: &OwnedFd) -> anyhow::Result<i32> {
    let mut child: Child = command.spawn().context("cannot run the container engine")?;
    // The client's terminal is not held open longer than by the engine.
    drop(command);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code().unwrap_or_else(|| SIGNALLED + status.signal().unwrap_or(0)));
        }
        let mut polled = [PollFd::new(client.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, PollTimeout::from(LOOK_INTERVAL_MS))? > 0 {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("the client has hung up");
        }
    }
}

fn answer(client: &OwnedFd, ended: anyhow::Result<i32>) {
    let ended = match ended {
        Ok(code) => Ended { code: Some(code), error: None },
        Err(error) => Ended { code: None, error: Some(format!("{error:#}")) },
    };
    // Nobody may be there any more.
    let _ = send_message(client.as_fd(), &serde_json::to_vec(&ended).unwrap_or_default(), &[]);
}

/// Has the scheduler run a command in a job's container, with this process's terminal; gives its exit status.
pub fn ask(scheduler: &Path, project: Option<String>, name: String, request: ExecRequest) -> anyhow::Result<i32> {
    let path = socket(scheduler);
    let server = connect_to(&path).with_context(|| format!("cannot connect to {}", path.display()))?;
    let asked = serde_json::to_vec(&Asked { project, name, request })?;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    send_message(server.as_fd(), &asked, &[stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])?;
    let (bytes, _) = receive_message(server.as_fd(), MESSAGE_BYTES_MAX)?;
    let ended: Ended = serde_json::from_slice(&bytes).context("the scheduler went away")?;
    match ended {
        Ended { code: Some(code), .. } => Ok(code),
        Ended { error, .. } => anyhow::bail!(error.unwrap_or_default()),
    }
}
