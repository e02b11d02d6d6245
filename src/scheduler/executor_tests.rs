//! Commands that ranks become.

use serde_json::json;
use uuid::Uuid;

use super::super::job::JobRecord;
use super::*;

/// A job with two ranks on one node, in a store of its own.
struct Rig {
    dir: tempfile::TempDir,
    store: Store,
    job: JobRecord,
    gpus: Vec<Gpu>,
    simulated: bool,
    real_paths: BTreeMap<PathBuf, PathBuf>,
}

impl Rig {
    fn new(each: &str, spec: &serde_json::Value) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(&dir.path().join("state")).expect("opens");
        let mut whole = json!({"kind": "train", "templates": [], "command": ["run", "it"], "grace_ms": 0});
        let more = spec.as_object().expect("an object").clone();
        whole.as_object_mut().expect("an object").extend(more);
        let seats = [0, 3].map(|gpu| json!({"node": "n0", "gpus": [gpu], "each": each}));
        let attempt = json!({"number": 1, "placement": {"template": 0, "seats": seats}, "start": 0, "begun_ms": 0});
        let own = json!({"uid": nix::unistd::geteuid().as_raw(), "gid": nix::unistd::getegid().as_raw()});
        let record = json!({"format": 1, "id": Uuid::from_u128(7), "name": "job", "project": "team", "seq": 0,
            "submitter": own, "submitted_ms": 0, "spec": whole, "state": {"name": "starting"}, "attempts": [attempt]});
        let job: JobRecord = serde_json::from_value(record).expect("is a record");
        store.keep(&job).expect("writes");
        let gpu = |index| Gpu { index, memory_bytes: Some(80 << 30), ..Gpu::default() };
        let real_paths = [("/srv/a".into(), "/real/a".into())].into();
        Self { dir, store, job, gpus: (0..4).map(gpu).collect(), simulated: false, real_paths }
    }

    fn pipes(&self) -> PathBuf {
        self.dir.path().join("mps")
    }

    fn begin_mps(&self) {
        fs::create_dir(self.pipes()).expect("makes");
        fs::write(self.pipes().join("control"), "").expect("writes");
    }

    fn task(&self, executor: &dyn Executor, rank: u32) -> TaskSpec {
        let attempt = self.job.attempt().expect("an attempt");
        let pipes = self.pipes();
        let launch = Launch {
            store: &self.store,
            job: &self.job,
            attempt,
            rank,
            seat: &attempt.placement.seats[rank as usize],
            simulated: self.simulated,
            beside_real: false,
            real_paths: &self.real_paths,
            gpus: &self.gpus,
            mps_pipes: &pipes,
        };
        launch.lay_out().expect("lays out");
        executor.task(&launch).expect("gives a command")
    }
}

fn podman(args: &[&str]) -> Containers {
    Containers { engine: "podman".to_owned(), args: args.iter().map(|arg| (*arg).to_owned()).collect() }
}

fn has(task: &TaskSpec, flag: &str, value: &str) -> bool {
    task.argv.windows(2).any(|pair| pair == [flag, value])
}

#[test]
fn a_container_gets_its_gpu_by_cdi_and_its_variables_by_a_file_that_only_the_engine_reads() {
    let spec = json!({"image": "img", "env": {"TOKEN": "s3cret \"quoted\""}, "large_shm": true, "ports": ["8888"],
        "host_paths": [{"host": "/srv/a", "path": "/a"}]});
    let rig = Rig::new("1", &spec);
    let task = rig.task(&podman(&["--runtime", "runc"]), 1);
    assert!(!task.argv.iter().chain(task.env.values()).any(|text| text.contains("s3cret")), "{task:?}");
    let file = task.argv.iter().skip_while(|arg| *arg != "--env-file").nth(1).expect("is named");
    let text = fs::read_to_string(file).expect("reads");
    for line in ["TOKEN=s3cret \"quoted\"", "NVIDIA_VISIBLE_DEVICES=3", "CUDA_VISIBLE_DEVICES=0", "RANK=1"] {
        assert!(text.lines().any(|have| have == line), "{line} in {text}");
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(file).expect("is there").permissions());
    assert_eq!(mode & 0o077, 0, "nobody else reads it");
    assert!(has(&task, "--device", "nvidia.com/gpu=3") && !has(&task, "--device", "nvidia.com/gpu=0"));
    assert!(has(&task, "--ipc", "host") && has(&task, "--publish", "8888") && has(&task, "--volume", "/real/a:/a"));
    let image = task.image.expect("the image is found by its place");
    assert_eq!(task.argv[image.at..], ["img", "run", "it"]);
}

#[test]
fn simulated_gpus_are_counted_and_no_container_gets_a_device() {
    let mut rig = Rig::new("1", &json!({"image": "img"}));
    rig.simulated = true;
    let task = rig.task(&podman(&[]), 0);
    assert!(!task.argv.iter().any(|arg| arg == "--device"), "{task:?}");
    assert!(has(&task, "--network", "host"), "ranks find each other");
    assert!(!has(&rig.task(&podman(&["--network=none"]), 0), "--network", "host"), "whoever runs it said how");
}

#[test]
fn a_part_of_a_gpu_is_kept_by_the_multi_process_service_where_that_runs() {
    let rig = Rig::new("0.25", &json!({}));
    let task = rig.task(&Processes, 1);
    assert_eq!(task.env["LARDER_GPU_MEMORY_SHARE"], "0.25");
    assert_eq!(task.env["LARDER_GPU_MEMORY_BYTES"], (20u64 << 30).to_string());
    assert!(!task.env.contains_key("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"), "nobody would keep it");
    rig.begin_mps();
    let task = rig.task(&Processes, 1);
    assert_eq!(task.env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"], format!("0={}M", 20 << 10));
    assert_eq!(task.env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"], "25");
    assert_eq!(task.env["CUDA_MPS_PIPE_DIRECTORY"], rig.pipes().to_str().expect("plain"));
    assert_eq!((&*task.env["CUDA_VISIBLE_DEVICES"], &*task.env["CUDA_DEVICE_ORDER"]), ("3", "PCI_BUS_ID"));
    let rig = Rig::new("0.25", &json!({"image": "img"}));
    rig.begin_mps();
    let task = rig.task(&podman(&[]), 1);
    let pipes = rig.pipes().to_str().expect("plain").to_owned();
    assert!(has(&task, "--volume", &format!("{pipes}:{pipes}")) && has(&task, "--ipc", "host"), "{task:?}");
}
