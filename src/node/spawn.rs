//! The daemon on demand: started detached, waited for until it answers.
//!
//! Many commands may do this at once: the daemons that come second find the lock taken and end, and
//! every command waits for whichever daemon answers.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::client::{ClientError, NodeClient};
use super::keeping::MANAGER_NAMES;
use super::place::{Place, PlaceError};

/// How often a command looks whether the daemon answers.
const LOOK_INTERVAL: Duration = Duration::from_millis(15);

/// Why no daemon could be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error("cannot start {}", exe.display())]
    Start {
        exe: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the daemon ended before it was ready ({status}); the end of {}:\n{tail}", log.display())]
    Ended { status: String, log: PathBuf, tail: String },
    #[error("the daemon did not answer within {waited_s} s; the end of {}:\n{tail}", log.display())]
    Slow { waited_s: u64, log: PathBuf, tail: String },
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// How a daemon is started.
#[derive(Debug, Clone)]
pub struct SpawnSpec {
    pub exe: PathBuf,
    /// The arguments, with the configuration that this command has.
    pub args: Vec<String>,
    pub state: PathBuf,
    pub socket: PathBuf,
    pub timeout: Duration,
}

/// Gives a daemon that answers: the one that is there, or one that is started now.
pub async fn connect_or_start(spec: &SpawnSpec) -> Result<NodeClient, SpawnError> {
    let client = NodeClient::at(&spec.socket);
    match client.info().await {
        Ok(_) => return Ok(client),
        Err(error) if error.is_absent() => {}
        Err(error) => return Err(error.into()),
    }
    let place = Place::open(&spec.state)?;
    let log_from = std::fs::metadata(place.log()).map_or(0, |meta| meta.len());
    let mut child = start(spec, &place)?;
    let begun = Instant::now();
    loop {
        match client.info().await {
            Ok(_) => return Ok(client),
            // Lost: it accepted and ended before it answered; its log says why in a moment.
            Err(ClientError::Absent { .. } | ClientError::Lost { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        // Another command's daemon may hold the lock: ours ends well and we wait for that one.
        let ended = child.try_wait().ok().flatten().filter(|status| !status.success());
        if let Some(status) = ended {
            let tail = place.log_tail(log_from, 20);
            return Err(SpawnError::Ended { status: status.to_string(), log: place.log(), tail });
        }
        if begun.elapsed() > spec.timeout {
            let tail = place.log_tail(log_from, 20);
            return Err(SpawnError::Slow { waited_s: spec.timeout.as_secs(), log: place.log(), tail });
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Starts the daemon; it leaves the terminal's session by itself (`--detached`).
fn start(spec: &SpawnSpec, place: &Place) -> Result<Child, SpawnError> {
    let log_path = place.log();
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(|source| PlaceError::Io { path: log_path.clone(), doing: "open the daemon's log", source })?;
    let log_too = log.try_clone().map_err(|source| PlaceError::Io { path: log_path, doing: "open twice", source })?;
    let mut command = Command::new(&spec.exe);
    // A service that runs this command is not the daemon's manager.
    for name in MANAGER_NAMES {
        command.env_remove(name);
    }
    command
        .args(&spec.args)
        // It serves others too: it does not end with the job that happened to start it.
        .env_remove("LARDER_TASK")
        .env("LARDER_APART", "1")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_too)
        .spawn()
        .map_err(|source| SpawnError::Start { exe: spec.exe.clone(), source })
}
