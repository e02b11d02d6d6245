//! The golden trace through a real API server and its Job controller, with simulated nodes: by plain manifests and by
//! `larder job`, with a scheduler that has just the rights that its page gives it, and that is killed now and then.

use std::collections::BTreeMap;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use kube::ResourceExt;
use serde_json::{Value, json};

use super::Campaign;
use crate::kit::World;
use crate::kit::control_plane::ControlPlane;

/// What each project has in thousandths, and how many of its pods wait.
type Shares = BTreeMap<String, (u64, u64)>;

struct Golden {
    world: World,
    plane: ControlPlane,
    scheduler: Option<Child>,
    /// By `larder job`, or by manifests.
    by_larder: bool,
}

impl Golden {
    fn new(by_larder: bool) -> Option<Self> {
        let Some(plane) = ControlPlane::start() else {
            println!(
                "skipped: LARDER_K8S_BIN names no directory with etcd, kube-apiserver and kube-controller-manager"
            );
            return None;
        };
        for node in ["n0", "n1"] {
            plane.node(node, 8);
        }
        for (project, quota) in [("a", 4.0), ("b", 2.0), ("c", 2.0), ("d", 8.0)] {
            plane.project(project, quota);
        }
        let mut world = World::new();
        world.set("KUBECONFIG", plane.kubeconfig("admin").display().to_string());
        world.set("LARDER_CLUSTER", "it");
        let mut golden = Self { world, plane, scheduler: None, by_larder };
        golden.start();
        Some(golden)
    }

    fn start(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.world.path("scheduler.log"));
        let mut command =
            self.world.command(["scheduler", "kube", "--listen", "127.0.0.1:0", "--lease-namespace", "default"]);
        command.arg("--kubeconfig").arg(self.plane.kubeconfig("scheduler"));
        command.stdout(Stdio::null()).stderr(log.expect("a log"));
        self.scheduler = Some(command.spawn().expect("starts the scheduler"));
    }

    fn kill(&mut self) {
        if let Some(mut scheduler) = self.scheduler.take() {
            scheduler.kill().expect("kills it");
            scheduler.wait().expect("waits for its end");
        }
    }

    fn submit(&self, project: &str, first: u32, sizes: &[&str]) {
        for (number, size) in (first..).zip(sizes) {
            let name = format!("{project}{number}");
            let (gpus, interactive) = size.strip_suffix('i').map_or((*size, false), |gpus| (gpus, true));
            if self.by_larder {
                let mut args = vec!["submit", &name, "-p", project, "-g", gpus, "-i", "train:7"];
                args.extend(interactive.then_some("--interactive"));
                args.extend(["--", "sleep", "infinity"]);
                self.world.ok(args);
            } else {
                self.plane.apply(manifest(project, &name, gpus, interactive));
            }
        }
    }

    fn delete(&self, project: &str, names: &[&str]) {
        match self.by_larder {
            true => drop(self.world.ok(["job", "delete", "--all", "-p", project])),
            false => names.iter().for_each(|name| self.plane.delete_job(name)),
        }
    }

    fn shares(&self) -> Shares {
        let mut shares: Shares = ["a", "b", "c", "d"].map(|name| (name.to_owned(), (0, 0))).into();
        let mut used: BTreeMap<(String, String), u64> = BTreeMap::new();
        for pod in self.plane.pods() {
            let share = shares.entry(pod.labels().get("larder.io/project").cloned().unwrap_or_default()).or_default();
            let part = pod
                .annotations()
                .get("larder.io/gpu-fraction")
                .map(|part| (part.parse::<f64>().expect("a number") * 1000.0) as u64);
            let limits = pod.spec.as_ref().and_then(|spec| spec.containers[0].resources.as_ref()?.limits.clone());
            let whole =
                limits.and_then(|all| all.get("nvidia.com/gpu").map(|gpus| gpus.0.parse::<u64>().expect("a number")));
            let size = part.unwrap_or(whole.unwrap_or(0) * 1000);
            let over = pod
                .status
                .as_ref()
                .and_then(|status| status.phase.as_deref())
                .is_some_and(|phase| phase == "Failed" || phase == "Succeeded");
            match pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) {
                Some(node) if !over => {
                    for gpu in pod.annotations()["larder.io/gpus"].split(',') {
                        *used.entry((node.clone(), gpu.to_owned())).or_default() += size.min(1000);
                    }
                    if pod.metadata.deletion_timestamp.is_none() {
                        share.0 += size;
                    }
                }
                None if pod.metadata.deletion_timestamp.is_none() => share.1 += 1,
                _ => {}
            }
        }
        assert!(used.values().all(|used| *used <= 1000), "a GPU was given twice: {used:?}");
        shares
    }

    #[track_caller]
    fn settles(&self, what: &str, is_so: impl Fn(&Shares) -> bool) {
        let begun = Instant::now();
        loop {
            let shares = self.shares();
            if is_so(&shares) {
                return;
            }
            let log = || std::fs::read_to_string(self.world.path("scheduler.log")).unwrap_or_default();
            assert!(
                begun.elapsed() < Duration::from_secs(180),
                "{what}: {shares:?}\n{}\n{}",
                log(),
                self.plane.log("kube-controller-manager")
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Plays the trace. `disturb` is called behind each step.
    fn play(&mut self, disturb: &mut dyn FnMut(&mut Self)) {
        let is = |wanted: [(u64, u64); 4]| {
            let wanted: Shares = ["a", "b", "c", "d"]
                .map(str::to_owned)
                .into_iter()
                .zip(wanted.map(|(gpus, waiting)| (gpus * 1000, waiting)))
                .collect();
            move |shares: &Shares| *shares == wanted
        };
        self.submit("a", 1, &["1i", "1", "2"]);
        self.submit("b", 1, &["0.6i", "0.4i", "1", "2"]);
        self.submit("c", 1, &["0.5i", "0.3i", "0.2i", "2", "1"]);
        self.submit("d", 1, &["4"]);
        disturb(self);
        self.settles("everybody begins", is([(4, 0), (4, 0), (4, 0), (4, 0)]));
        self.submit("d", 2, &["2"]);
        disturb(self);
        self.settles("the first pause", |shares| {
            is([(4, 0), (2, 1), (4, 0), (6, 0)])(shares) || is([(4, 0), (4, 0), (2, 1), (6, 0)])(shares)
        });
        self.submit("d", 3, &["2"]);
        disturb(self);
        self.settles("the second pause", is([(4, 0), (2, 1), (2, 1), (8, 0)]));
        self.submit("a", 4, &["2", "2"]);
        self.submit("b", 5, &["2"]);
        self.submit("c", 6, &["2"]);
        disturb(self);
        self.settles("the queues", is([(4, 2), (2, 2), (2, 2), (8, 0)]));
        self.delete("d", &["d1", "d2", "d3"]);
        disturb(self);
        self.settles("d goes home", is([(8, 0), (4, 1), (4, 1), (0, 0)]));
    }

    /// The projects say how they stand, and who waits says why.
    fn assert_told(&self) {
        let begun = Instant::now();
        loop {
            let list = crate::kit::runtime().block_on(self.plane.projects().list(&Default::default())).expect("lists");
            let status = |name: &str| {
                list.items
                    .iter()
                    .find(|one| one.name_any() == name)
                    .map(|one| one.data["status"].clone())
                    .unwrap_or_default()
            };
            let (b, d) = (status("b"), status("d"));
            let stands = b["allocated"] == 4 && b["overQuota"] == 2 && b["waiting"] == 1 && d["allocated"] == 0;
            let waiting = self
                .plane
                .pods()
                .into_iter()
                .find(|pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_none()));
            let told = waiting
                .and_then(|pod| pod.status?.conditions?.into_iter().find(|one| one.type_ == "PodScheduled")?.message);
            if stands && told.as_ref().is_some_and(|told| told.contains("fair share")) {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(120), "{b} {d} {told:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Golden {
    fn drop(&mut self) {
        self.kill();
    }
}

fn manifest(project: &str, name: &str, gpus: &str, interactive: bool) -> Value {
    let mut job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
        "spec": {
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]},
            "template": {
                "metadata": {"labels": {"larder.io/project": project, "larder.io/kind": if interactive { "interactive" } else { "train" }}, "annotations": {}},
                "spec": {"schedulerName": "larder", "restartPolicy": "Never", "containers": [{"name": "c", "image": "train:7"}]},
            },
        },
    });
    let template = &mut job["spec"]["template"];
    match gpus.contains('.') {
        true => template["metadata"]["annotations"]["larder.io/gpu-fraction"] = json!(gpus),
        false => template["spec"]["containers"][0]["resources"] = json!({"limits": {"nvidia.com/gpu": gpus}}),
    }
    job
}

#[test]
#[ignore = "long: make campaign PART=kube"]
fn the_golden_trace_by_manifests_through_a_real_api_server() {
    let Some(mut golden) = Golden::new(false) else {
        return;
    };
    golden.play(&mut |_| {});
    golden.assert_told();
}

#[test]
#[ignore = "long: make campaign PART=kube"]
fn the_golden_trace_by_larder_job_with_a_scheduler_that_is_killed() {
    let Some(mut golden) = Golden::new(true) else {
        return;
    };
    let mut campaign = Campaign::new();
    golden.play(&mut |golden| {
        std::thread::sleep(Duration::from_millis(campaign.below(400)));
        golden.kill();
        golden.start();
    });
    let jobs = golden.world.json(&["job", "list", "-A"]);
    let jobs = jobs.as_array().expect("a list");
    assert_eq!(jobs.len(), 16, "{jobs:?}");
    let waiting = jobs.iter().find(|job| job["status"] == "Pending").expect("somebody waits");
    let name = waiting["name"].as_str().expect("a name").to_owned();
    crate::kit::wait_for("the reason", || golden.world.ok(["job", "why", &name]).contains("it runs when"));
    golden.world.ok(["job", "cancel", "a1"]);
    crate::kit::wait_for("the end", || golden.world.json(&["job", "describe", "a1"])["status"] == "Cancelled");
}
