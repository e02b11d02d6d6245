//! The CSI driver, and what the kubelet says to it: gRPC over its socket, real directories of pods.

use std::collections::HashMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use axum::http::Uri;
use axum::routing::{get, post};
use axum::{Json, Router};
use larder::node::csi::proto::csi::controller_client::ControllerClient;
use larder::node::csi::proto::csi::identity_client::IdentityClient;
use larder::node::csi::proto::csi::node_client::NodeClient;
use larder::node::csi::proto::csi::volume_capability::access_mode::Mode;
use larder::node::csi::proto::csi::volume_capability::{AccessMode, AccessType, MountVolume};
use larder::node::csi::proto::csi::{
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodeUnpublishVolumeRequest,
    VolumeCapability,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::{World, runtime, wait_for};

/// What a reader asks for.
pub fn reading(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(MountVolume::default())),
    }
}

/// A driver that runs, and the kubelet's folder.
#[derive(Debug)]
pub struct Csi {
    child: Child,
    kubelet: PathBuf,
    log: PathBuf,
}

impl Csi {
    /// Says whether this machine can show volumes at all.
    pub fn can_run() -> bool {
        let can = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
        if !can {
            eprintln!("skipped: needs root and /dev/fuse");
        }
        can
    }

    /// Starts the driver beside the world's daemon.
    pub fn start(world: &World) -> Self {
        Self::start_with(world, &[], &[])
    }

    /// Starts it with more flags and variables.
    pub fn start_with(world: &World, more: &[&str], env: &[(&str, &str)]) -> Self {
        let kubelet = world.make_dir("k");
        let folder = kubelet.to_str().expect("a plain path").to_owned();
        let args = ["csi", "--kubelet-dir", &folder, "--node", "node-1"];
        let mut command = world.command(args.iter().chain(more));
        command.envs(env.iter().copied());
        Self::spawn(world, command)
    }

    /// Starts it by a command of one's own.
    pub fn spawn(world: &World, mut command: Command) -> Self {
        let (kubelet, log) = (world.make_dir("k"), world.path("csi.log"));
        fs::create_dir_all(kubelet.join("plugins_registry")).expect("makes it");
        let out = fs::OpenOptions::new().create(true).append(true).open(&log).expect("opens the log");
        let socket = kubelet.join("plugins/csi.larder.io/csi.sock");
        // What is left over of one that was killed accepts nobody.
        let child = command.stdout(Stdio::null()).stderr(out).spawn().expect("starts");
        let mut csi = Self { child, kubelet, log };
        wait_for("the driver's socket", || {
            let ended = csi.child.try_wait().expect("asks");
            assert!(ended.is_none(), "the driver ended: {ended:?}\n{}", csi.log());
            UnixStream::connect(&socket).is_ok()
        });
        csi
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn kubelet(&self) -> &Path {
        &self.kubelet
    }

    /// Gives the driver's own folder.
    pub fn dir(&self) -> PathBuf {
        self.kubelet.join("plugins/csi.larder.io")
    }

    pub fn registration_socket(&self) -> PathBuf {
        self.kubelet.join("plugins_registry/csi.larder.io@reg.sock")
    }

    /// Makes the folder of a pod as the kubelet does; gives the target in it.
    pub fn pod(&self, pod: &str) -> PathBuf {
        let parent = self.kubelet.join("pods").join(pod).join("volumes/kubernetes.io~csi/data");
        fs::create_dir_all(&parent).expect("makes the pod's folder");
        parent.join("mount")
    }

    /// Removes the folder of a pod as the kubelet does, which unmounts nothing.
    pub fn remove_pod(&self, pod: &str) {
        fs::remove_dir_all(self.kubelet.join("pods").join(pod)).expect("removes the pod's folder");
    }

    /// Gives a connection to a socket.
    pub fn channel(socket: &Path) -> Result<Channel, Status> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("is an address");
        let connected = runtime().block_on(endpoint.connect());
        connected.map_err(|error| Status::new(Code::Unavailable, format!("no connection: {error}")))
    }

    fn connect(&self) -> Result<Channel, Status> {
        Self::channel(&self.dir().join("csi.sock"))
    }

    pub fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.connect().expect("connects"))
    }

    pub fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.connect().expect("connects"))
    }

    pub fn identity(&self) -> IdentityClient<Channel> {
        IdentityClient::new(self.connect().expect("connects"))
    }

    /// Gives what the kubelet says to publish a volume of a PersistentVolume.
    pub fn request(volume: &str, target: &Path, attributes: &[(&str, &str)]) -> NodePublishVolumeRequest {
        let context: HashMap<String, String> =
            attributes.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        NodePublishVolumeRequest {
            volume_id: volume.to_owned(),
            target_path: target.to_str().expect("a plain path").to_owned(),
            volume_capability: Some(reading(Mode::MultiNodeReaderOnly)),
            readonly: true,
            volume_context: context,
            ..NodePublishVolumeRequest::default()
        }
    }

    /// Publishes a volume.
    pub fn publish(&self, volume: &str, target: &Path, attributes: &[(&str, &str)]) -> Result<(), Status> {
        self.publish_as(Self::request(volume, target, attributes))
    }

    pub fn publish_as(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        let mut node = NodeClient::new(self.connect()?);
        runtime().block_on(node.node_publish_volume(request)).map(drop)
    }

    pub fn unpublish(&self, volume: &str, target: &Path) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: volume.to_owned(),
            target_path: target.to_str().expect("a plain path").to_owned(),
        };
        let mut node = NodeClient::new(self.connect()?);
        runtime().block_on(node.node_unpublish_volume(request)).map(drop)
    }

    pub fn stats(&self, volume: &str, target: &Path) -> Result<NodeGetVolumeStatsResponse, Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: volume.to_owned(),
            volume_path: target.to_str().expect("a plain path").to_owned(),
            ..NodeGetVolumeStatsRequest::default()
        };
        let answer = runtime().block_on(self.node().node_get_volume_stats(request));
        answer.map(tonic::Response::into_inner)
    }

    /// Waits until it has died by itself.
    pub fn wait_for_death(mut self) {
        wait_for("the driver's death", || self.child.try_wait().expect("asks").is_some());
    }

    /// Kills it.
    pub fn kill(mut self) {
        self.kill_now();
    }

    /// Kills it, and leaves this to be replaced.
    pub fn kill_now(&mut self) {
        kill_whole(&mut self.child);
    }

    /// Gives its pid.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("fits")
    }

    /// Lists what is left of volumes in the driver's folder: records, and directories of mounts.
    pub fn left(dir: &Path) -> Vec<PathBuf> {
        let listed = |name: &str| fs::read_dir(dir.join(name)).expect("lists").flatten().map(|entry| entry.path());
        listed("volumes").chain(listed("mounts")).collect()
    }

    /// Makes sure that nothing is left of any volume.
    #[track_caller]
    pub fn nothing_is_left(&self, world: &World) {
        wait_for("the sweep", || Self::left(&self.dir()).is_empty());
        assert_eq!(world.json(&["mounts"]), serde_json::json!([]), "the daemon's mounts");
        let below: Vec<_> = world.mounted().into_iter().filter(|at| *at != self.kubelet).collect();
        assert_eq!(below, Vec::<PathBuf>::new(), "the mount table");
    }
}

/// Kills a process with the one that it has started, and waits until both are dead.
pub fn kill_whole(child: &mut Child) {
    let pid = child.id();
    let below = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let _ = child.kill();
    let _ = child.wait();
    for below in below.split_whitespace() {
        // One that is dead may stay in the table until somebody asks how it ended.
        let is_dead = || {
            let text = fs::read_to_string(format!("/proc/{below}/stat")).unwrap_or_default();
            text.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with(['Z', 'X']))
        };
        wait_for("the end of what it ran", is_dead);
    }
}

impl Drop for Csi {
    fn drop(&mut self) {
        kill_whole(&mut self.child);
        if std::thread::panicking() {
            eprintln!("the driver's log:\n{}", self.log());
        }
    }
}

/// A Kubernetes API of one claim, which writes down the events that it is told.
#[derive(Debug)]
pub struct FakeApi {
    port: u16,
    events: Arc<Mutex<Vec<(String, Value)>>>,
}

impl FakeApi {
    /// Serves on loopback. `annotations`: of the claim `ns/claim`.
    pub fn start(annotations: &[(&str, &str)]) -> Self {
        let annotations: HashMap<String, String> =
            annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let events = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&events);
        let claim = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": { "name": "claim", "namespace": "ns", "annotations": annotations },
        });
        let tell = move |uri: Uri, Json(event): Json<Value>| async move {
            told.lock().expect("is whole").push((uri.path().to_owned(), event.clone()));
            Json(event)
        };
        let app = Router::new()
            .route("/api/v1/namespaces/ns/persistentvolumeclaims/claim", get(move || async move { Json(claim) }))
            .route("/apis/events.k8s.io/v1/namespaces/{namespace}/events", post(tell));
        let listener = runtime().block_on(TcpListener::bind("127.0.0.1:0")).expect("listens");
        let port = listener.local_addr().expect("has an address").port();
        runtime().spawn(async move { axum::serve(listener, app).await });
        Self { port, events }
    }

    /// Writes a file that leads there; gives its path.
    pub fn kubeconfig(&self, world: &World) -> String {
        let path = world.path("kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": { "server": format!("http://127.0.0.1:{}", self.port) } }],
            "users": [{ "name": "u", "user": {} }],
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        });
        fs::write(&path, text.to_string()).expect("writes");
        path.display().to_string()
    }

    /// Gives what was told: the path, and the event.
    pub fn events(&self) -> Vec<(String, Value)> {
        self.events.lock().expect("is whole").clone()
    }
}
