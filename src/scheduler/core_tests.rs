//! The state without its thread: what is asked of it, and the turns that follow, one by one.

use std::sync::mpsc::channel;

use serde_json::json;

use super::super::cluster::TemplateRecord;
use super::super::disk;
use super::super::gpus::Gpu;
use super::super::mounts::tests::Counted;
use super::super::registry::NodeRequest;
use super::*;

fn core(dir: &std::path::Path) -> Core {
    core_with(dir, false, Arc::new(Counted::default()))
}

fn core_with(dir: &std::path::Path, warm: bool, lake: Arc<Counted>) -> Core {
    let options = Options {
        dir: dir.to_owned(),
        exe: "/no/such/program".into(),
        containers: None,
        host_paths: Vec::new(),
        grace_max: Duration::from_secs(60),
        warm,
        log_bytes_max: 1 << 20,
        keep: Some(Duration::from_secs(3600)),
        mps_pipes: dir.join("mps"),
    };
    Core::open(options, lake, channel().0).expect("opens")
}

fn caller() -> Caller {
    Caller { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() }
}

/// Puts a job with one output into a state, as an earlier scheduler may have left it.
fn put(core: &mut Core, state: &serde_json::Value) -> Uuid {
    let id = Uuid::new_v4();
    let outputs = [json!({"dataset": "model", "path": "/out"})];
    let spec =
        json!({"kind": "train", "templates": [], "image": "img", "command": [], "outputs": outputs, "grace_ms": 0});
    let submitter = json!({"uid": caller().uid, "gid": caller().gid});
    let record = json!({"format": 1, "id": id, "name": "job", "project": "team", "seq": 0, "submitter": submitter,
        "submitted_ms": 0, "spec": spec, "state": state});
    let job: JobRecord = serde_json::from_value(record).expect("is a record");
    core.store.keep(&job).expect("writes");
    core.jobs.insert(id, job);
    id
}

fn named() -> Named {
    Named { project: None, name: "job".to_owned() }
}

#[test]
fn the_gpus_of_this_machine_are_those_of_one_node() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut core = core(dir.path());
    let node = |name: &str, simulated| NodeRequest {
        name: name.to_owned(),
        gpus: 1,
        simulated,
        labels: BTreeMap::new(),
        pools: std::collections::BTreeSet::new(),
    };
    let found = || vec![Gpu::default()];
    assert!(core.add_node(node("real", false), Vec::new(), caller()).is_err(), "it has none");
    core.add_node(node("real", false), found(), caller()).expect("adds");
    core.add_node(node("counted", true), Vec::new(), caller()).expect("adds");
    let told = core.add_node(node("again", false), found(), caller()).expect_err("refuses").to_string();
    assert!(told.contains("real"), "{told}");
}

#[test]
fn a_job_with_an_image_is_never_run_without_its_container() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut core = core(dir.path());
    let id = put(&mut core, &json!({"name": "starting"}));
    assert!(core.executor(&core.jobs[&id]).is_none());
    core.turn();
    core.turn();
    assert_eq!(core.jobs[&id].state, State::Pending);
    let hold = core.jobs[&id].hold.as_ref().expect("it is held");
    assert!(hold.why.contains("engine"), "{hold:?}");
}

#[test]
fn a_job_that_can_not_be_started_at_this_moment_is_tried_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut core = core(dir.path());
    let id = put(&mut core, &json!({"name": "starting"}));
    core.change(&id, |job| {
        let seats = json!([{"node": "n0", "each": 1, "gpus": [0]}]);
        let placement = serde_json::from_value(json!({"template": 0, "seats": seats})).expect("is a placement");
        job.begin(placement, 0, 0);
        (job.spec.image, job.spec.command) = (None, vec!["true".to_owned()]);
        job.state = State::Starting;
    })
    .expect("writes");
    let begun = Instant::now();
    while core.jobs[&id].state != State::Pending {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", core.jobs[&id].state);
        core.turn();
    }
    let hold = core.jobs[&id].hold.as_ref().expect("it is held");
    assert!(hold.why.contains("/no/such/program"), "{hold:?}");
}

#[test]
fn a_job_whose_outputs_are_being_stored_is_deleted_when_nobody_stores_them_any_more() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut core = core(dir.path());
    let id = put(&mut core, &json!({"name": "completing"}));
    let task = core.store.job(&id).push(0, 0);
    disk::make_dir(task.path(), 0o700).expect("makes");
    let supervisor = disk::try_lock(&task.lock_file()).expect("locks").expect("is free");
    core.delete(&named(), caller()).expect("is taken");
    core.turn();
    assert!(core.jobs.contains_key(&id) && task.stop_file().exists(), "the push was asked to end");
    drop(supervisor);
    core.turn();
    assert!(core.jobs.is_empty() && !task.path().exists());
}

#[test]
fn a_deletion_that_the_disk_refuses_is_told_and_the_job_is_still_there() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut core = core(dir.path());
    put(&mut core, &json!({"name": "succeeded"}));
    std::fs::remove_dir(dir.path().join("trash")).expect("removes");
    assert!(matches!(core.delete(&named(), caller()), Err(SchedulerError::Disk(_))));
    assert!(core.look_at(&named()).is_ok());
    std::fs::create_dir(dir.path().join("trash")).expect("makes");
    core.delete(&named(), caller()).expect("deletes");
    assert!(core.look_at(&named()).is_err());
}

#[test]
fn a_project_whose_removal_can_not_be_written_down_has_its_volumes() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut core = core(dir.path());
    core.set_project("team", crate::scheduler::registry::ProjectChange::default(), true, caller()).expect("makes");
    let volume = core.store.volume("team", "shared");
    std::fs::create_dir_all(&volume).expect("makes");
    let record = dir.path().join("cluster.json");
    std::fs::remove_file(&record).expect("removes");
    std::fs::create_dir(&record).expect("is in the way");
    assert!(matches!(core.remove_project("team", caller()), Err(SchedulerError::Disk(_))));
    assert!(volume.exists());
    std::fs::remove_dir(&record).expect("removes");
    core.remove_project("team", caller()).expect("removes");
    assert!(!volume.exists());
}

#[test]
fn a_copy_of_a_snapshot_that_is_stored_does_not_outlive_the_scheduler() {
    let dir = tempfile::tempdir().expect("a directory");
    let (id, left, needed) = {
        let mut core = core(dir.path());
        let id = put(&mut core, &json!({"name": "succeeded"}));
        core.change(&id, |job| {
            let snapshot = |number, commit: Option<&str>| -> super::super::job::JobSnapshot {
                serde_json::from_value(json!({"number": number, "dataset": "s", "begun_ms": 0, "commit": commit}))
                    .expect("is one")
            };
            job.snapshots = vec![snapshot(1, Some("c")), snapshot(2, None)];
        })
        .expect("writes");
        let copy = |number: &str| core.store.job(&id).path().join("snapshots").join(number);
        (id, copy("1"), copy("2"))
    };
    for copy in [&left, &needed] {
        std::fs::create_dir_all(copy.join("tree")).expect("makes");
    }
    let core = core(dir.path());
    assert!(core.jobs.contains_key(&id) && !left.exists() && needed.exists());
}

#[test]
fn the_dataset_of_a_jobs_snapshots_has_a_name_however_long_the_jobs_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut core = core(dir.path());
    let id = put(&mut core, &json!({"name": "succeeded"}));
    let name = |core: &Core| super::super::snapshot::default_dataset(&core.jobs[&id]);
    assert_eq!(name(&core), "team-job.snapshots");
    core.change(&id, |job| job.name = "J".repeat(63)).expect("writes");
    let long = name(&core);
    assert!(crate::scheduler::check::dataset(&long).is_ok() && long.ends_with(".snapshots"), "{long}");
}

#[test]
fn jobs_that_have_been_over_for_long_are_forgotten_and_others_are_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut core = core(dir.path());
    let id = put(&mut core, &json!({"name": "succeeded"}));
    core.turn();
    assert!(core.jobs.contains_key(&id), "nobody knows when it ended");
    core.change(&id, |job| job.ended_ms = Some(now_ms())).expect("writes");
    core.looked_at = None;
    core.turn();
    assert!(core.jobs.contains_key(&id), "it has just ended");
    core.change(&id, |job| job.ended_ms = Some(now_ms() - 3_600_001)).expect("writes");
    core.looked_at = None;
    core.turn();
    assert!(core.jobs.is_empty() && !core.store.job(&id).path().exists());
}

#[test]
fn a_job_whose_snapshot_is_being_stored_is_deleted_when_nobody_stores_it_any_more() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut core = core(dir.path());
    let id = put(&mut core, &json!({"name": "succeeded"}));
    core.change(&id, |job| {
        let placement = serde_json::from_value(json!({"template": 0, "seats": []})).expect("is a placement");
        job.begin(placement, 0, 0);
        job.state = State::Succeeded;
    })
    .expect("writes");
    core.snapshot_job(&named(), None, caller()).expect("begins");
    assert!(core.snapshot_job(&named(), None, caller()).is_err(), "one at a time");
    let task = TaskDir::at(&core.store.job(&id).path().join("snapshots/1/push-0"));
    disk::make_dir(task.path(), 0o700).expect("makes");
    let supervisor = disk::try_lock(&task.lock_file()).expect("locks").expect("is free");
    core.delete(&named(), caller()).expect("is taken");
    core.turn();
    assert!(core.jobs.contains_key(&id) && task.stop_file().exists(), "the push was asked to end");
    drop(supervisor);
    // A process that another test starts may have the lock for a moment.
    let begun = Instant::now();
    while !core.jobs.is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60), "not within a minute");
        core.turn();
    }
    assert!(!task.path().exists());
}

#[test]
fn a_template_of_another_cluster_has_no_place_to_run_yet() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut core = core(dir.path());
    let record = |cluster: Option<&str>| TemplateRecord {
        shape: crate::quota::Template::new(crate::quota::MilliGpus::ONE),
        cluster: cluster.map(str::to_owned),
    };
    core.set_template("here", record(None), caller()).expect("is taken");
    let told = core.set_template("there", record(Some("cloud")), caller()).expect_err("is refused").to_string();
    assert!(told.contains("cloud"), "{told}");
    let stranger = Caller { uid: caller().uid + 1, gid: 1 };
    assert!(core.set_template("here", record(None), stranger).is_err() || caller().uid == u32::MAX);
    assert_eq!(core.templates().len(), 1);
    core.remove_template("here", caller()).expect("removes");
    assert!(core.remove_template("here", caller()).is_err());
}

#[test]
fn a_waiting_jobs_commits_are_brought_near_unless_that_is_switched_off() {
    for warm in [true, false] {
        let dir = tempfile::tempdir().expect("a directory");
        let lake = Arc::new(Counted::default());
        let mut core = core_with(dir.path(), warm, Arc::clone(&lake));
        core.set_project("team", crate::scheduler::registry::ProjectChange::default(), true, caller()).expect("makes");
        let commit = "a".repeat(64);
        let data = json!({"dataset": "xray", "revision": "xray", "commit": commit, "path": "/data"});
        let templates = [json!({"gpus": 1, "processes": 1})];
        let spec =
            json!({"kind": "train", "templates": templates, "command": ["x"], "datasets": [data], "grace_ms": 0});
        core.submit("team", "job", serde_json::from_value(spec).expect("is a spec"), caller()).expect("is taken");
        // Commits are brought near one after the other: when this one is, so would the job's be.
        core.mounts.warm("xray", "last", None);
        let begun = Instant::now();
        while lake.warmed.lock().last().is_none_or(|last| last != "last") {
            assert!(begun.elapsed() < Duration::from_secs(60), "not within a minute");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(lake.warmed.lock().contains(&commit), warm);
    }
}
