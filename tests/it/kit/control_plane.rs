//! A real etcd, kube-apiserver and kube-controller-manager on loopback, with simulated nodes: who is placed there runs at
//! once, and ends at once when it is told to. `LARDER_K8S_BIN` names the directory of the programs; where it is not set, who
//! needs them skips. Everything ends with the value.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::api::{DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

use super::{runtime, wait_for};

/// The token of who may do all, and of the scheduler, which may do what its page says.
const TOKENS: &str = "all-of-it,admin,admin,\"system:masters\"\nsome-of-it,scheduler,scheduler\nkcm,system:kube-controller-manager,kcm,\"system:masters\"\n";

/// The processes, and a way to them.
pub struct ControlPlane {
    dir: tempfile::TempDir,
    children: Vec<Child>,
    pub client: Client,
    runner: tokio::task::JoinHandle<()>,
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

fn programs() -> Option<PathBuf> {
    let dir = PathBuf::from(std::env::var_os("LARDER_K8S_BIN")?);
    ["etcd", "kube-apiserver", "kube-controller-manager"].iter().all(|name| dir.join(name).exists()).then_some(dir)
}

fn spawn(dir: &Path, program: &Path, args: &[String]) -> Child {
    let name = program.file_name().expect("a name").to_string_lossy().into_owned();
    let log = || fs::File::options().create(true).append(true).open(dir.join(format!("{name}.log"))).expect("a log");
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(log()).stderr(log());
    command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

fn kubeconfig(dir: &Path, name: &str, token: &str, port: u16) -> PathBuf {
    let path = dir.join(name);
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "it",
        "clusters": [{"name": "it", "cluster": {"server": format!("https://127.0.0.1:{port}"), "certificate-authority": dir.join("pki/apiserver.crt")}}],
        "users": [{"name": "it", "user": {"token": token}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it", "namespace": "default"}}],
    });
    fs::write(&path, text.to_string()).expect("writes the kubeconfig");
    path
}

impl ControlPlane {
    /// Starts all; None where the programs are not there.
    pub fn start() -> Option<Self> {
        let programs = programs()?;
        let dir = tempfile::tempdir().expect("a directory");
        let at = dir.path();
        fs::create_dir(at.join("pki")).expect("a directory");
        fs::write(at.join("pki/tokens.csv"), TOKENS).expect("writes the tokens");
        let key = at.join("pki/sa.key");
        let made =
            Command::new("openssl").args(["genrsa", "-out"]).arg(&key).arg("2048").stderr(Stdio::null()).status();
        assert!(made.is_ok_and(|status| status.success()), "openssl makes a key");
        let (client_port, peer_port, port) = (free_port(), free_port(), free_port());
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let args = |list: &[(&str, String)]| -> Vec<String> {
            list.iter().map(|(name, value)| format!("--{name}={value}")).collect()
        };
        let mut children = vec![spawn(
            at,
            &programs.join("etcd"),
            &args(&[
                ("data-dir", at.join("etcd").display().to_string()),
                ("unsafe-no-fsync", "true".to_owned()),
                ("listen-client-urls", url(client_port)),
                ("advertise-client-urls", url(client_port)),
                ("listen-peer-urls", url(peer_port)),
                ("initial-advertise-peer-urls", url(peer_port)),
                ("initial-cluster", format!("default={}", url(peer_port))),
            ]),
        )];
        let path = |name: &str| at.join(name).display().to_string();
        children.push(spawn(
            at,
            &programs.join("kube-apiserver"),
            &args(&[
                ("etcd-servers", url(client_port)),
                ("bind-address", "127.0.0.1".to_owned()),
                ("secure-port", port.to_string()),
                ("advertise-address", "127.0.0.1".to_owned()),
                ("endpoint-reconciler-type", "none".to_owned()),
                ("cert-dir", path("pki")),
                ("token-auth-file", path("pki/tokens.csv")),
                ("authorization-mode", "RBAC".to_owned()),
                ("disable-admission-plugins", "ServiceAccount".to_owned()),
                ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
                ("service-account-key-file", path("pki/sa.key")),
                ("service-account-signing-key-file", path("pki/sa.key")),
                ("service-cluster-ip-range", "10.96.0.0/16".to_owned()),
            ]),
        ));
        wait_for("the API server's certificate", || at.join("pki/apiserver.crt").exists());
        let admin = kubeconfig(at, "admin.kubeconfig", "all-of-it", port);
        kubeconfig(at, "scheduler.kubeconfig", "some-of-it", port);
        let kcm = kubeconfig(at, "kcm.kubeconfig", "kcm", port);
        let client = runtime().block_on(client(&admin));
        wait_for("the API server", || {
            runtime().block_on(Api::<Node>::all(client.clone()).list(&ListParams::default())).is_ok()
        });
        children.push(spawn(
            at,
            &programs.join("kube-controller-manager"),
            &args(&[
                ("kubeconfig", kcm.display().to_string()),
                ("leader-elect", "false".to_owned()),
                ("secure-port", "0".to_owned()),
                ("controllers", "job,garbagecollector".to_owned()),
                ("kube-api-qps", "200".to_owned()),
                ("kube-api-burst", "400".to_owned()),
            ]),
        ));
        let runner = runtime().spawn(run_pods(client.clone()));
        // The API server makes it a moment after it answers.
        let namespaces = Api::<Namespace>::all(client.clone());
        wait_for("the default namespace", || runtime().block_on(namespaces.get("default")).is_ok());
        let plane = Self { dir, children, client, runner };
        plane.install();
        Some(plane)
    }

    /// Gives the kubeconfig of who may do all (`admin`), or of the scheduler (`scheduler`).
    pub fn kubeconfig(&self, whose: &str) -> PathBuf {
        self.dir.path().join(format!("{whose}.kubeconfig"))
    }

    /// The Project resource of the chart, and the rights that the page gives the scheduler.
    fn install(&self) {
        let crd = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("helm/larder/crds/project.yaml"))
            .expect("the resource");
        self.apply(serde_saphyr::from_str(&crd).expect("is YAML"));
        let rule = |group: &str, resources: &[&str], verbs: &[&str]| json!({"apiGroups": [group], "resources": resources, "verbs": verbs});
        let role = |kind: &str, rules: Value| json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": "scheduler"}, "rules": rules});
        let binding = |kind: &str, role: &str| {
            json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": "scheduler"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role, "name": "scheduler"}, "subjects": [{"kind": "User", "name": "scheduler"}]})
        };
        self.apply(role(
            "ClusterRole",
            json!([
                rule("", &["pods", "nodes"], &["get", "list", "watch"]),
                rule("", &["pods/binding", "pods/eviction"], &["create"]),
                rule("", &["pods/status"], &["patch"]),
                rule("", &["events"], &["create", "patch"]),
                rule("batch", &["jobs"], &["get", "list", "watch"]),
                rule("larder.io", &["projects"], &["get", "list", "watch"]),
                rule("larder.io", &["projects/status"], &["patch"]),
            ]),
        ));
        self.apply(binding("ClusterRoleBinding", "ClusterRole"));
        self.apply(role("Role", json!([rule("coordination.k8s.io", &["leases"], &["get", "create", "update"])])));
        self.apply(binding("RoleBinding", "Role"));
        let projects = || runtime().block_on(self.projects().list(&ListParams::default()));
        wait_for("the Project resource", || projects().is_ok());
    }

    pub fn projects(&self) -> Api<DynamicObject> {
        let kind = kube::core::ApiResource::from_gvk(&GroupVersionKind::gvk("larder.io", "v1", "Project"));
        Api::all_with(self.client.clone(), &kind)
    }

    /// Makes an object as it stands.
    pub fn apply(&self, object: Value) {
        let (group, version) = object["apiVersion"]
            .as_str()
            .expect("a version")
            .split_once('/')
            .unwrap_or(("", object["apiVersion"].as_str().expect("a version")));
        let gvk = GroupVersionKind::gvk(group, version, object["kind"].as_str().expect("a kind"));
        let resource = kube::core::ApiResource::from_gvk(&gvk);
        let namespaced =
            !["CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "Node", "Project", "Namespace"]
                .contains(&gvk.kind.as_str());
        let api: Api<DynamicObject> = match namespaced {
            true => Api::default_namespaced_with(self.client.clone(), &resource),
            false => Api::all_with(self.client.clone(), &resource),
        };
        let object: DynamicObject = serde_json::from_value(object).expect("an object");
        let name = object.name_any();
        let made = runtime().block_on(api.create(&PostParams::default(), &object));
        assert!(made.is_ok(), "{name}: {made:?}");
    }

    /// Makes a simulated node.
    pub fn node(&self, name: &str, gpus: u32) {
        self.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}));
        let amounts = json!({"nvidia.com/gpu": gpus.to_string(), "cpu": "64", "memory": "256Gi", "pods": "110"});
        let status = json!({"status": {"capacity": amounts, "allocatable": amounts, "conditions": [{"type": "Ready", "status": "True"}]}});
        let nodes: Api<Node> = Api::all(self.client.clone());
        let set = runtime().block_on(nodes.patch_status(name, &PatchParams::default(), &Patch::Merge(status)));
        assert!(set.is_ok(), "{set:?}");
    }

    /// Makes a project.
    pub fn project(&self, name: &str, quota: f64) {
        self.apply(json!({"apiVersion": "larder.io/v1", "kind": "Project", "metadata": {"name": name}, "spec": {"quota": quota}}));
    }

    pub fn pods(&self) -> Vec<Pod> {
        let pods: Api<Pod> = Api::default_namespaced(self.client.clone());
        runtime().block_on(pods.list(&ListParams::default())).map(|list| list.items).unwrap_or_default()
    }

    /// Deletes a Job with its pods.
    pub fn delete_job(&self, name: &str) {
        let jobs: Api<Job> = Api::default_namespaced(self.client.clone());
        runtime().block_on(jobs.delete(name, &DeleteParams::background())).expect("deletes the job");
    }

    /// What a process said.
    pub fn log(&self, program: &str) -> String {
        fs::read_to_string(self.dir.path().join(format!("{program}.log"))).unwrap_or_default()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.runner.abort();
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

async fn client(kubeconfig: &Path) -> Client {
    let file = kube::config::Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
    let config = kube::Config::from_custom_kubeconfig(file, &Default::default()).await.expect("a configuration");
    Client::try_from(config).expect("a client")
}

/// What kubelets would do: who has a node runs, who is to end has ended.
async fn run_pods(client: Client) {
    let pods: Api<Pod> = Api::default_namespaced(client);
    loop {
        for pod in pods.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default() {
            let phase = pod.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
            let bound = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
            let ends = pod.metadata.deletion_timestamp.is_some();
            let set = |phase: &str| Patch::Merge(json!({"status": {"phase": phase}}));
            let over = ["Failed", "Succeeded"].contains(&phase.as_str());
            let _ = match (bound, ends) {
                (true, false) if phase == "Pending" => {
                    pods.patch_status(&pod.name_any(), &PatchParams::default(), &set("Running")).await.map(drop)
                }
                (true, true) if !over => {
                    pods.patch_status(&pod.name_any(), &PatchParams::default(), &set("Failed")).await.map(drop)
                }
                (_, true) => pods.delete(&pod.name_any(), &DeleteParams::default().grace_period(0)).await.map(drop),
                _ => Ok(()),
            };
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
