//! The CSI driver (`larder csi`): commits as volumes of pods.
//!
//! `docs/formats/csi.md` is its contract: processes, sockets, keys, records, the order of steps and what a crash
//! leaves. In short: a volume is published by one mount of the daemon's for each commit and set of options, which
//! the keeper shows at as many directories as pods ask for; the driver keeps the books and makes no mount itself.
//!
//! * [`proto`]: the protocols. [`volume`]: what a volume says, checked; pure. [`error`]: words and codes.
//! * [`books`]: records on disk. `driver`: locks, daemon, API. `publish`: publish, unpublish, sweep.
//! * `node`, `identity`, `controller`: the services, thin. `kube`: annotations and events.
//! * [`in_use`]: which pods use volumes, asked before the driver is uninstalled.
//! * this file: sockets and life; the probe.
//!
//! It is a client of the node's daemon as any other: it may be killed at any time, and no reader notices.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Router;
use tonic::transport::{Endpoint, Server};

use self::controller::Provisioner;
use self::driver::Driver;
use self::error::CsiError;
use self::identity::{Plugin, Who};
use self::kube::Kube;
use self::proto::csi::ProbeRequest;
use self::proto::csi::controller_server::ControllerServer;
use self::proto::csi::identity_client::IdentityClient;
use self::proto::csi::identity_server::IdentityServer;
use self::proto::csi::node_server::NodeServer;
use self::proto::registration::registration_server::RegistrationServer;

pub mod books;
mod controller;
mod driver;
pub mod error;
mod identity;
pub mod in_use;
mod kube;
mod node;
pub mod proto;
mod publish;
pub mod volume;

/// How often mounts that no pod uses are looked for.
const SWEEP_PERIOD: Duration = Duration::from_secs(600);
/// How soon again, where the daemon or the books could not be asked.
const SWEEP_AGAIN: Duration = Duration::from_secs(5);
/// How long a probe may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long calls under way may take to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Which services are answered beside Identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Node,
    Controller,
    All,
}

impl Mode {
    /// Says whether the kubelet is answered.
    pub fn has_node(self) -> bool {
        self != Self::Controller
    }

    /// Says whether the provisioner is answered.
    pub fn has_controller(self) -> bool {
        self != Self::Node
    }
}

/// How the driver is set up.
#[derive(Debug, Clone)]
pub struct Settings {
    pub mode: Mode,
    pub driver: String,
    /// Name of the Kubernetes node.
    pub node: String,
    /// The driver's socket.
    pub endpoint: PathBuf,
    /// The folder that the kubelet watches; None: it is not told.
    pub registry: Option<PathBuf>,
    /// The driver's own folder.
    pub dir: PathBuf,
    /// The daemon's socket.
    pub daemon: PathBuf,
    pub timeout: Duration,
}

/// Why the driver cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("cannot listen at {}", socket.display())]
    Listen {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Csi(#[from] CsiError),
    #[error("the sockets cannot be served")]
    Serve(#[source] tonic::transport::Error),
    #[error("the driver at {} does not answer: {why}", socket.display())]
    NoAnswer { socket: PathBuf, why: String },
    #[error("the driver at {} answers, the daemon of the node does not answer it", socket.display())]
    NotReady { socket: PathBuf },
}

/// Serves until told to stop.
pub async fn run(settings: Settings, stop: CancellationToken) -> Result<(), RunError> {
    let kube = Kube::find(&settings.driver, &settings.node).await;
    let driver = match settings.mode.has_node() {
        true => {
            let (settings, kube) = (settings.clone(), kube.clone());
            let opened = tokio::task::spawn_blocking(move || Driver::open(settings, kube)).await;
            Some(opened.map_err(|_| CsiError::Panicked { what: "opening the books" })??)
        }
        false => None,
    };
    let who = Who { name: settings.driver.clone(), mode: settings.mode, driver: driver.clone() };
    let router = Server::builder()
        .add_service(IdentityServer::new(who))
        .add_optional_service(driver.clone().map(NodeServer::new))
        .add_optional_service(settings.mode.has_controller().then(|| ControllerServer::new(Provisioner::new(kube))));
    let listener = listen(&settings.endpoint)?;
    tracing::info!(socket = %settings.endpoint.display(), driver = settings.driver, node = settings.node, "the driver serves");
    let serving = tokio::spawn(serve(router, listener, stop.clone()));
    let mut registered = None;
    if let Some(driver) = driver {
        registered = register(&settings, &stop)?;
        tokio::spawn(keep_clean(driver, stop.clone()));
    }
    let ended = serving.await.map_err(|_| CsiError::Panicked { what: "serving" })?;
    if let Some(socket) = registered {
        let _ = std::fs::remove_file(socket);
    }
    let _ = std::fs::remove_file(&settings.endpoint);
    ended
}

/// Serves one socket until told to stop, and a moment longer for calls that are under way.
async fn serve(router: Router, listener: UnixListener, stop: CancellationToken) -> Result<(), RunError> {
    let until = stop.clone().cancelled_owned();
    let serving = router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), until);
    let drained = async {
        stop.cancelled().await;
        tokio::time::sleep(DRAIN_TIMEOUT).await;
    };
    tokio::select! {
        ended = serving => ended.map_err(RunError::Serve),
        () = drained => Ok(()),
    }
}

/// Name of the socket that the kubelet finds. It connects with the socket's path, percent-encoded, as the authority of
/// its requests, and that is none to us unless an `@` makes the encoded part look like a user's name.
fn registration_name(driver: &str) -> String {
    format!("{driver}@reg.sock")
}

/// Makes the driver known to the kubelet: it watches a folder for sockets, and asks who is there. Gives the socket.
fn register(settings: &Settings, stop: &CancellationToken) -> Result<Option<PathBuf>, RunError> {
    let Some(folder) = &settings.registry else {
        return Ok(None);
    };
    let socket = folder.join(registration_name(&settings.driver));
    let endpoint = settings.endpoint.to_string_lossy().into_owned();
    let plugin = Plugin { name: settings.driver.clone(), endpoint };
    let router = Server::builder().add_service(RegistrationServer::new(plugin));
    let listener = listen(&socket)?;
    tokio::spawn(serve(router, listener, stop.clone()));
    Ok(Some(socket))
}

/// Opens a socket in the place of one that is left over.
fn listen(socket: &Path) -> Result<UnixListener, RunError> {
    let at = |source| RunError::Listen { socket: socket.to_owned(), source };
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir).map_err(at)?;
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(error)),
        _ => {}
    }
    // Nobody connects between bind and chmod who may not.
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(socket);
    nix::sys::stat::umask(before);
    let listener = bound.map_err(at)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o660)).map_err(at)?;
    Ok(listener)
}

/// Takes away what no pod uses: at the start, when the daemon has come, and from time to time.
async fn keep_clean(driver: Driver, stop: CancellationToken) {
    loop {
        driver.forget_gone_pods().await;
        let pause = if driver.sweep().await { SWEEP_PERIOD } else { SWEEP_AGAIN };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Asks the driver at a socket whether it answers; with `ready`: and whether its daemon does.
pub async fn probe(socket: &Path, ready: bool) -> Result<(), RunError> {
    let no = |why: String| RunError::NoAnswer { socket: socket.to_owned(), why };
    let ask = async {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        let mut client = IdentityClient::new(endpoint.connect().await?);
        Ok::<_, tonic::transport::Error>(client.probe(ProbeRequest {}).await)
    };
    let answer = match tokio::time::timeout(PROBE_TIMEOUT, ask).await {
        Ok(Ok(Ok(answer))) => answer.into_inner(),
        Ok(Ok(Err(status))) => return Err(no(status.to_string())),
        Ok(Err(error)) => return Err(no(error.to_string())),
        Err(_) => return Err(no(format!("not within {} s", PROBE_TIMEOUT.as_secs()))),
    };
    if ready && answer.ready == Some(false) {
        return Err(RunError::NotReady { socket: socket.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tonic::codegen::http::uri::Authority;

    use super::*;

    // What a kubelet of 1.36 sends, as seen: with another name every request ended with PROTOCOL_ERROR.
    #[test]
    fn the_kubelets_name_for_the_registration_socket_is_an_authority() {
        let path = format!("/var/lib/kubelet/plugins_registry/{}", registration_name("csi.larder.io"));
        assert!(path.replace('/', "%2F").parse::<Authority>().is_ok());
        assert!(
            path.replace('/', "%2F").replace('@', "-").parse::<Authority>().is_err(),
            "then the name need not be odd"
        );
    }
}
