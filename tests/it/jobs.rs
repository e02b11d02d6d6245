//! Jobs as processes: what they print, how they end, what they read and make, and what happens to them
//! when something dies.

use std::fs;

use crate::kit::gpus::{Gpus, processes_with, supervisor_of};
use crate::kit::{World, wait_for};

/// A scheduler with one node and one project that owns all of it.
fn one_project(gpus: &str) -> Gpus {
    let scheduler = Gpus::new(World::new(), &[]);
    scheduler.world.ok(["node", "add", "n0", "--gpus", gpus]);
    scheduler.world.ok(["project", "create", "team", "--gpus", gpus]);
    scheduler.world.ok(["project", "use", "team"]);
    scheduler
}

#[test]
fn a_job_runs_prints_and_ends_and_its_record_tells() {
    let gpus = one_project("2");
    let world = &gpus.world;
    world.ok([
        "submit",
        "hello",
        "-g",
        "2",
        "-e",
        "WHO=world",
        "--",
        "sh",
        "-c",
        "echo hello $WHO on $NVIDIA_VISIBLE_DEVICES",
    ]);
    world.ok(["job", "wait", "hello"]);
    assert_eq!(world.ok(["job", "logs", "hello"]), "hello world on 0,1\n");
    let told = world.ok(["job", "describe", "hello"]);
    assert!(told.contains("Succeeded") && told.contains("rank 0: node n0, GPU 0,1"), "{told}");
    world.ok(["submit", "bad", "--", "sh", "-c", "exit 3"]);
    assert!(world.fails(1, ["job", "wait", "bad"]).contains("did not succeed: bad"));
    assert_eq!(world.ok(["job", "why", "bad"]), "bad is Failed: exit status 3\n");
    world.ok(["submit", "nothing", "--", "/no/such/command"]);
    world.fails(1, ["job", "wait", "nothing"]);
    assert!(world.ok(["job", "why", "nothing"]).contains("could not be started"));
    assert!(world.fails(1, ["submit", "bad", "--", "true"]).contains("already"), "a name is one job's");
    world.ok(["job", "delete", "bad", "nothing", "hello"]);
    assert_eq!(world.json(&["job", "list", "-A"]), serde_json::json!([]));
}

#[test]
fn a_gang_starts_with_all_its_ranks_and_fails_as_a_whole() {
    let gpus = one_project("4");
    let world = &gpus.world;
    let script =
        "echo $RANK of $WORLD_SIZE at $MASTER_ADDR; test $MASTER_PORT -gt 0 && grep -q 'n0 slots=3' $LARDER_HOSTFILE";
    world.ok(["submit", "gang", "--processes", "3", "-g", "1", "--", "sh", "-c", script]);
    world.ok(["job", "wait", "gang"]);
    for rank in ["0", "1", "2"] {
        assert_eq!(world.ok(["job", "logs", "gang", "--rank", rank]), format!("{rank} of 3 at 127.0.0.1\n"));
    }
    world.ok([
        "submit",
        "broken",
        "--processes",
        "2",
        "--",
        "sh",
        "-c",
        "test $RANK = 0 || exit 7; exec sleep 1000000",
    ]);
    world.fails(1, ["job", "wait", "broken"]);
    assert!(world.ok(["job", "why", "broken"]).contains("rank 1: exit status 7"));
    let id = gpus.job("team", "broken")["id"].as_str().expect("an id").to_owned();
    assert_eq!(processes_with("LARDER_JOB_ID", &id), Vec::<i32>::new(), "the other rank has gone too");
    let told = world.fails(1, ["submit", "odd", "-g", "1.5", "--", "true"]);
    assert!(told.contains("1.5 GPUs can't be given"), "{told}");
}

#[test]
fn a_paused_job_goes_on_from_its_checkpoint_and_a_time_limit_ends_one() {
    let gpus = one_project("1");
    let world = &gpus.world;
    world.ok(["project", "create", "guest", "--gpus", "0", "--weight", "1"]);
    // It counts until it is told to stop, and says where it goes on.
    let script = "n=$(cat count 2>/dev/null || echo 0); test $n = 0 || { echo went on from $n; exit 0; }\n\
                  trap 'echo 41 > count; exit 0' TERM; echo begun; while :; do sleep 0.05; done";
    world.ok(["submit", "train", "-p", "guest", "--grace", "10m", "--", "sh", "-c", script]);
    gpus.wait_status("guest", "train", "Running");
    wait_for("the job's first words", || world.ok(["job", "logs", "train", "-p", "guest"]).contains("begun"));
    world.ok(["submit", "shell", "--interactive", "--", "sleep", "1000000"]);
    gpus.wait_status("team", "shell", "Running");
    let paused = gpus.job("guest", "train");
    assert_eq!((paused["status"].as_str(), paused["pauses"].as_u64()), (Some("Pending"), Some(1)), "{paused}");
    assert!(
        paused["attempts"][0]["stop"]["preempted"]["why"].as_str().expect("why").contains("team/shell"),
        "{paused}"
    );
    world.ok(["job", "delete", "shell"]);
    world.ok(["job", "wait", "train", "-p", "guest"]);
    let told = world.ok(["job", "logs", "train", "-p", "guest"]);
    // A shell may say in between that its sleep was terminated.
    assert!(told.starts_with("begun\n") && told.ends_with("\nwent on from 41\n"), "{told}");
    world.ok(["submit", "long", "--max-runtime", "1ms", "--grace", "0s", "--", "sleep", "1000000"]);
    world.fails(1, ["job", "wait", "long"]);
    assert!(world.ok(["job", "why", "long"]).contains("it ran longer than 1ms"));
}

#[test]
fn a_job_reads_a_commit_and_makes_one_that_knows_what_it_came_from() {
    let gpus = one_project("2");
    let world = &gpus.world;
    let source = world.files("source", &[("a.txt", b"alpha")]);
    let input = world.push(&source, "xray");
    world.ok(["tag", "xray", "v2"]);
    // The times are part of the tree: with fixed ones, a repeated job makes the same.
    let script = "cat $LARDER_DATASET_XRAY/a.txt > $LARDER_OUTPUT_MODEL/weights; echo more >> $LARDER_OUTPUT_MODEL/weights; \
                  touch -d @0 $LARDER_OUTPUT_MODEL/weights $LARDER_OUTPUT_MODEL";
    let mut submit = vec!["submit", "train", "--dataset", "xray@v2:/data", "--output", "model:/out", "--code", "r7"];
    submit.extend(["-e", "LR=0.1", "--", "sh", "-c", script]);
    world.ok(submit);
    // What the tag names later does not matter any more.
    fs::write(source.join("a.txt"), "beta").expect("changes the source");
    world.push(&source, "xray");
    world.ok(["tag", "xray", "v2", "--force"]);
    world.ok(["job", "wait", "train"]);
    assert_eq!(world.ok(["cat", "model", "weights"]), "alphamore\n");
    let job = gpus.job("team", "train");
    let shown = world.json(&["show", "model"]);
    assert_eq!(shown["lineage"]["inputs"], serde_json::json!([input]));
    assert_eq!((&shown["lineage"]["job"], &shown["lineage"]["code"]), (&job["id"], &"r7".into()));
    assert_eq!(shown["meta"]["environment"], "{\"LR\":\"0.1\"}");
    assert_eq!(job["outputs"][0]["commit"], shown["commit"]);
    assert!(world.ok(["job", "describe", "train"]).contains(shown["commit"].as_str().expect("an id")));
    wait_for("the mount's end", || world.json(&["mounts"]) == serde_json::json!([]));
    // The same commits again: the same bytes, and a commit of its own, for another job made it.
    world.ok(["job", "rerun", "train", "--name", "again"]);
    world.ok(["job", "wait", "again"]);
    let again = world.json(&["show", "model"]);
    assert_eq!((&again["tree"], &again["lineage"]["inputs"]), (&shown["tree"], &shown["lineage"]["inputs"]));
    assert_eq!(again["lineage"]["job"], gpus.job("team", "again")["id"]);
    assert_ne!(again["commit"], shown["commit"]);
    let told = |rev: &str| -> Vec<(String, serde_json::Value)> {
        let rows = world.json(&["log", "--lineage", rev]);
        let one =
            |row: &serde_json::Value| (row["direction"].as_str().expect("a word").to_owned(), row["commit"].clone());
        rows.as_array().expect("a list").iter().map(one).collect()
    };
    let made = [shown["commit"].clone(), again["commit"].clone()];
    let upwards = told("model");
    assert_eq!(upwards, [("input".to_owned(), input.clone().into()), ("itself".to_owned(), made[1].clone())]);
    let downwards = told(&format!("xray@{input}"));
    assert_eq!(downwards[0], ("itself".to_owned(), input.into()));
    assert!(made.iter().all(|commit| downwards.contains(&("output".to_owned(), commit.clone()))), "{downwards:?}");
}

#[test]
fn jobs_share_one_mount_that_a_killed_scheduler_neither_loses_nor_makes_twice() {
    let mut gpus = one_project("2");
    let source = gpus.world.files("source", &[("a.txt", b"alpha")]);
    gpus.world.push(&source, "xray");
    let script = "echo up; until test -e go; do sleep 0.05; done; cat $LARDER_DATASET_XRAY/a.txt";
    for name in ["one", "two"] {
        gpus.world.ok(["submit", name, "-g", "1", "--dataset", "xray:/data", "--", "sh", "-c", script]);
    }
    for name in ["one", "two"] {
        gpus.wait_status("team", name, "Running");
    }
    assert_eq!(gpus.world.json(&["mounts"]).as_array().map(Vec::len), Some(1));
    gpus.kill();
    gpus.start();
    for name in ["one", "two"] {
        assert_eq!(gpus.job("team", name)["status"], "Running");
        // The job may end, and all beside it with it, before this command has.
        gpus.world.run(["job", "exec", name, "--", "touch", "go"]);
    }
    gpus.world.ok(["job", "wait", "one", "two"]);
    assert_eq!(gpus.world.ok(["job", "logs", "two"]), "up\nalpha");
    assert_eq!(gpus.job("team", "one")["attempts"].as_array().map(Vec::len), Some(1));
    wait_for("the mount's end", || gpus.world.json(&["mounts"]) == serde_json::json!([]));
}

#[test]
fn a_job_whose_supervisor_dies_is_put_back_and_nothing_of_it_is_left_running() {
    let gpus = one_project("1");
    gpus.world.ok(["submit", "job", "--", "sh", "-c", "echo attempt $LARDER_ATTEMPT; setsid sleep 1000000 & wait"]);
    wait_for("the first attempt", || gpus.world.ok(["job", "logs", "job"]).contains("attempt 1"));
    let job = gpus.job("team", "job");
    let task = gpus.dir().join("jobs").join(job["id"].as_str().expect("an id")).join("attempts/1/0");
    let before = processes_with("LARDER_TASK", &format!("{}.1.0", job["id"].as_str().expect("an id")));
    let supervisor = supervisor_of(&task).expect("it has a supervisor");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL).expect("kills");
    wait_for("the second attempt", || gpus.world.ok(["job", "logs", "job"]).contains("attempt 2"));
    assert!(!before.is_empty());
    assert_eq!(
        processes_with("LARDER_TASK", &format!("{}.1.0", job["id"].as_str().expect("an id"))),
        Vec::<i32>::new()
    );
    assert_eq!(gpus.job("team", "job")["losses"], 1);
}

#[test]
fn nodes_are_drained_cordoned_and_taken_away_and_their_jobs_go_elsewhere() {
    let gpus = one_project("1");
    let world = &gpus.world;
    world.ok(["submit", "job", "--grace", "0s", "--", "sleep", "1000000"]);
    gpus.wait_status("team", "job", "Running");
    assert!(world.fails(1, ["node", "rm", "n0"]).contains("in use"));
    world.ok(["node", "drain", "n0"]);
    gpus.wait_status("team", "job", "Pending");
    assert!(world.ok(["job", "why", "job"]).contains("take no new jobs"), "{}", world.ok(["job", "why", "job"]));
    world.ok(["node", "add", "n1", "--gpus", "1", "--pool", "new"]);
    wait_for("the other node", || gpus.job("team", "job")["nodes"] == serde_json::json!(["n1"]));
    world.ok(["node", "uncordon", "n0"]);
    gpus.wait_status("team", "job", "Running");
    world.ok(["node", "rm", "n1", "--force"]);
    wait_for("the first node again", || gpus.job("team", "job")["nodes"] == serde_json::json!(["n0"]));
    wait_for("the node's end", || world.json(&["node", "list"]).as_array().map(Vec::len) == Some(1));
    assert!(world.fails(1, ["project", "rm", "team"]).contains("in use"));
    world.ok(["job", "cancel", "job"]);
    gpus.wait_status("team", "job", "Cancelled");
    world.ok(["project", "rm", "team"]);
}

/// Says whether a process lives; a zombie does not.
fn is_alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

#[test]
fn what_hides_its_environment_and_leaves_its_group_ends_with_its_job() {
    let gpus = one_project("1");
    let world = &gpus.world;
    // Nothing tells whose it is but that the supervisor is above it.
    let script = "env -i setsid sh -c 'echo $$ > hidden; exec sleep 1000000' & \
                  until test -s hidden; do sleep 0.05; done; cat hidden; exec sleep 1000000";
    world.ok(["submit", "job", "--grace", "0s", "--", "sh", "-c", script]);
    let logs = || world.ok(["job", "logs", "job"]);
    wait_for("the hidden process", || logs().ends_with('\n'));
    assert!(is_alive(&logs()), "{}", logs());
    world.ok(["job", "cancel", "job"]);
    gpus.wait_status("team", "job", "Cancelled");
    assert!(!is_alive(&logs()), "{}", logs());
}
