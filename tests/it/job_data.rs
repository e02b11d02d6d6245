//! What jobs share and keep: volumes, snapshots, shapes with names, paths of the machine; gangs that compute
//! something together; users; and commands that outlive a scheduler.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::kit::gpus::Gpus;
use crate::kit::s3::{SECRET_KEY, TestS3};
use crate::kit::{World, wait_for};

/// A scheduler with one node and one project that owns all of it.
fn one_project(gpus: &str, args: &[&str]) -> Gpus {
    let scheduler = Gpus::new(World::new(), args);
    scheduler.world.ok(["node", "add", "n0", "--gpus", gpus]);
    scheduler.world.ok(["project", "create", "team", "--gpus", gpus]);
    scheduler.world.ok(["project", "use", "team"]);
    scheduler
}

#[test]
fn a_snapshot_has_what_a_job_made_so_far_and_another_job_begins_with_it() {
    let mut gpus = one_project("2", &[]);
    let source = gpus.world.files("source", &[("a.txt", b"alpha")]);
    let input = gpus.world.push(&source, "xray");
    let script = "echo 41 > step; echo half > $LARDER_OUTPUT_MODEL/weights; echo begun; exec sleep 1000000";
    let mut submit = vec!["submit", "train", "--dataset", "xray:/data", "--output", "model:/out", "--code", "r7"];
    submit.extend(["-e", "TOKEN=s3cret", "--", "sh", "-c", script]);
    gpus.world.ok(submit);
    wait_for("the job's first words", || gpus.world.ok(["job", "logs", "train"]).contains("begun"));
    let taken = gpus.world.json(&["job", "snapshot", "train"]);
    let (dataset, commit) = (taken["dataset"].as_str().expect("a name"), taken["commit"].as_str().expect("an id"));
    assert_eq!(dataset, "team-train.snapshots");
    assert_eq!(gpus.job("team", "train")["status"], "Running", "it goes on meanwhile");
    assert_eq!(gpus.world.ok(["cat", dataset, "work/step", "out/model/weights", "logs/0"]), "41\nhalf\nbegun\n");
    let shown = gpus.world.json(&["show", dataset]);
    assert_eq!(shown["lineage"]["inputs"], serde_json::json!([input]));
    assert_eq!((&shown["lineage"]["job"], &shown["lineage"]["code"]), (&gpus.job("team", "train")["id"], &"r7".into()));
    // A scheduler that is killed in the middle: the next one stores it all the same.
    gpus.world.ok(["job", "snapshot", "train", "--to", "kept", "--no-wait"]);
    gpus.kill();
    gpus.start();
    gpus.wait("the snapshot", |gpus| gpus.job("team", "train")["snapshots"][1]["commit"].is_string());
    assert_eq!(gpus.world.ok(["cat", "kept", "work/step"]), "41\n");
    let revision = format!("{dataset}@{commit}");
    let script =
        "cat step $LARDER_OUTPUT_MODEL/weights $LARDER_DATASET_XRAY/a.txt; echo full > $LARDER_OUTPUT_MODEL/weights";
    gpus.world.ok(["job", "restore", &revision, "--name", "more", "--", "sh", "-c", script]);
    gpus.world.ok(["job", "wait", "more"]);
    assert_eq!(gpus.world.ok(["job", "logs", "more"]), "41\nhalf\nalpha");
    assert_eq!(gpus.world.ok(["cat", "model", "weights"]), "full\n");
    let shown = gpus.world.json(&["show", "model"]);
    assert_eq!(shown["lineage"]["inputs"], serde_json::json!([input, commit]), "it came from the snapshot too");
    assert!(gpus.world.fails(1, ["job", "restore", "model"]).contains("is no snapshot of a job"));
    gpus.world.ok(["job", "delete", "train"]);
}

#[test]
fn a_volume_is_shared_by_the_jobs_and_ranks_of_a_project_and_outlives_them() {
    let gpus = one_project("2", &[]);
    let world = &gpus.world;
    world.ok(["project", "create", "other", "--gpus", "1"]);
    let script = "echo $RANK > $LARDER_VOLUME_SHARED/rank-$RANK; \
                  until test -e $LARDER_VOLUME_SHARED/rank-$((1 - RANK)); do sleep 0.05; done";
    world.ok(["submit", "one", "--processes", "2", "--volume", "shared:/shared", "--", "sh", "-c", script]);
    world.ok(["job", "wait", "one"]);
    world.ok(["job", "delete", "one"]);
    world.ok(["submit", "two", "--volume", "shared:/v", "--", "sh", "-c", "cat $LARDER_VOLUME_SHARED/*"]);
    world.ok(["job", "wait", "two"]);
    assert_eq!(world.ok(["job", "logs", "two"]), "0\n1\n");
    let list =
        ["submit", "three", "-p", "other", "--volume", "shared:/v", "--", "sh", "-c", "ls $LARDER_VOLUME_SHARED"];
    world.ok(list);
    world.ok(["job", "wait", "three", "-p", "other"]);
    assert_eq!(world.ok(["job", "logs", "three", "-p", "other"]), "", "it is the project's own");
}

#[test]
fn shapes_have_names_and_are_tried_in_order_and_paths_of_the_machine_are_those_that_are_allowed() {
    let world = World::new();
    let shared = world.files("shared", &[("a.txt", b"alpha\n")]);
    let outside = world.files("outside", &[("b.txt", b"beta\n")]);
    std::os::unix::fs::symlink(&outside, shared.join("way-out")).expect("links");
    let (shared, outside) = (shared.display().to_string(), outside.display().to_string());
    let gpus = Gpus::new(world, &["--host-path", &shared]);
    let world = &gpus.world;
    world.ok(["node", "add", "n0", "--gpus", "2"]);
    world.ok(["project", "create", "team", "--gpus", "2"]);
    world.ok(["job", "template", "set", "gpu-real", "gpus=8"]);
    world.ok(["job", "template", "set", "cloud-small", "gpus=1,processes=2"]);
    let pair = format!("{shared}:/srv/shared");
    let script = "echo $WORLD_SIZE; cat $LARDER_PATH_SRV_SHARED/a.txt";
    let names = ["--template", "gpu-real,cloud-small", "-v", &pair, "--", "sh", "-c", script];
    world.ok(["submit", "job", "-p", "team"].iter().chain(&names));
    world.ok(["job", "wait", "job"]);
    assert_eq!(world.ok(["job", "logs", "job", "--rank", "1"]), "2\nalpha\n", "the first shape never fits here");
    world.ok(["job", "template", "rm", "gpu-real"]);
    assert_eq!(world.json(&["job", "template", "list"])[0]["name"], "cloud-small");
    assert!(world.fails(2, ["submit", "job2", "-p", "team"].iter().chain(&names)).contains("no template `gpu-real`"));
    let cloud = ["job", "template", "set", "far", "gpus=1,cluster=cloud"];
    assert!(world.fails(1, cloud).contains("no cluster cloud"), "its place is Kubernetes'");
    for path in [outside, format!("{shared}/way-out"), format!("{shared}/none")] {
        let pair = format!("{path}:/x");
        let told = world.fails(1, ["submit", "bad", "-p", "team", "--host-path", &pair, "--", "true"]);
        assert!(told.contains("not among the paths"), "{told}");
    }
}

#[test]
fn a_gang_reduces_over_a_ring_says_how_far_it_is_and_goes_on_where_it_was_paused() {
    let runs = Command::new("python3").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !runs.is_ok_and(|status| status.success()) {
        eprintln!("skipped: needs python3");
        return;
    }
    let gpus = one_project("3", &[]);
    let world = &gpus.world;
    let program = format!("{}/examples/jobs/allreduce.py", env!("CARGO_MANIFEST_DIR"));
    let gang = ["--processes", "3", "--grace", "10m", "--output", "model:/out"];
    let run = ["--", "python3", &program];
    world.ok(["submit", "ring"].iter().chain(&gang).chain(&run));
    world.ok(["job", "wait", "ring"]);
    let told = world.ok(["job", "logs", "ring", "--rank", "2"]);
    assert!(told.contains("rank 2 of 3: y = 3.000 x + 2.000"), "{told}");
    assert!(world.ok(["cat", "model", "weights.json"]).contains("\"ranks\": 3"));
    // It never ends by itself, so whenever it is paused it is in the middle.
    world.ok(["submit", "long", "-e", "STEPS=1000000000", "-e", "PAUSE=0.01"].iter().chain(&gang).chain(&run));
    let progress = || world.json(&["job", "top"])["progress"]["team/long"].as_str().unwrap_or_default().to_owned();
    wait_for("its progress", || progress().starts_with("step "));
    wait_for("its progress in the table", || world.ok(["job", "top"]).contains("step "));
    world.ok(["node", "drain", "n0"]);
    gpus.wait_status("team", "long", "Pending");
    world.ok(["node", "uncordon", "n0"]);
    gpus.wait("its going on", |gpus| {
        (0..3).all(|rank| {
            let told = gpus.world.ok(["job", "logs", "long", "--rank", &rank.to_string()]);
            told.contains(&format!("rank {rank} goes on at step"))
        })
    });
    world.ok(["job", "delete", "long"]);
}

#[test]
fn who_waits_for_a_job_or_follows_it_outlives_the_scheduler() {
    let mut gpus = one_project("1", &[]);
    let script = "echo up; until test -e go; do sleep 0.05; done; echo done";
    gpus.world.ok(["submit", "job", "--", "sh", "-c", script]);
    wait_for("its first words", || gpus.world.ok(["job", "logs", "job"]) == "up\n");
    let spawn = |args: &[&str]| {
        let mut command = gpus.world.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts")
    };
    let (wait, mut logs) = (spawn(&["job", "wait", "job"]), spawn(&["job", "logs", "-f", "job"]));
    let mut followed = [0u8; 3];
    let mut pipe = logs.stdout.take().expect("is a pipe");
    pipe.read_exact(&mut followed).expect("follows");
    assert_eq!(&followed, b"up\n");
    for _ in 0..2 {
        gpus.kill();
        gpus.start();
    }
    // The job may end, and all beside it with it, before this command has.
    gpus.world.run(["job", "exec", "job", "--", "touch", "go"]);
    let mut rest = String::new();
    pipe.read_to_string(&mut rest).expect("follows");
    assert_eq!(rest, "done\n", "neither lost nor twice");
    assert!(logs.wait().expect("ends").success());
    let waited = wait.wait_with_output().expect("ends");
    let said = String::from_utf8_lossy(&waited.stderr);
    // Nobody tells when it has found the job: it may have been too early for the first scheduler.
    let unlucky = said.contains("no scheduler listens") || said.contains("went away");
    assert!(waited.status.success() || unlucky, "{said}");
}

/// `nobody`, and its group.
const NOBODY: u32 = 65534;

#[test]
fn a_job_of_roots_scheduler_runs_as_who_submitted_it_and_nobody_else_reads_what_it_made() {
    let group = nix::unistd::Group::from_gid(nix::unistd::Gid::from_raw(NOBODY)).ok().flatten();
    let (true, Some(group)) = (nix::unistd::geteuid().is_root(), group) else {
        eprintln!("skipped: needs root and a group {NOBODY}");
        return;
    };
    let mut world = World::new();
    fs::set_permissions(world.path(""), fs::Permissions::from_mode(0o711)).expect("opens the way");
    let socket = world.make_dir("run").join("larder.sock").display().to_string();
    world.set("LARDER_SOCKET", &socket);
    world.set("LARDER_DAEMON_GROUP", &group.name);
    let dir = world.path("scheduler").display().to_string();
    let gpus = Gpus::new(world, &["--dir", &dir]);
    gpus.world.ok(["node", "add", "n0", "--gpus", "2"]);
    gpus.world.ok(["project", "create", "team", "--gpus", "2", "--users", &NOBODY.to_string()]);
    let mut user = World::of_user(NOBODY);
    user.set("LARDER_SOCKET", &socket);
    let script = "id -u; id -g; id -G; touch made $LARDER_VOLUME_SHARED/made; exec sleep 1000000";
    let submit = ["submit", "job", "-p", "team", "--volume", "shared:/v", "-e", "TOKEN=s3cret"];
    user.ok(submit.iter().chain(&["--", "sh", "-c", script]));
    let id = NOBODY.to_string();
    wait_for("who it is", || user.ok(["job", "logs", "job"]) == format!("{id}\n{id}\n{id}\n"));
    let whose = user.ok(["job", "exec", "job", "--", "sh", "-c", "id -u; ls made"]);
    assert_eq!(whose, format!("{id}\nmade\n"));
    let job = gpus.job("team", "job");
    let place = std::path::Path::new(&dir).join("jobs").join(job["id"].as_str().expect("an id"));
    let seen = |path: &str| {
        let meta = fs::metadata(place.join(path)).expect("is there");
        (meta.uid(), meta.gid(), meta.mode() & 0o777)
    };
    assert_eq!(seen(""), (0, NOBODY, 0o710), "only its user gets through");
    assert_eq!(seen("work/made").0, NOBODY);
    for path in ["work", "progress"] {
        assert_eq!((seen(path).0, seen(path).2), (NOBODY, 0o700), "{path}: others of its group are others");
    }
    for (path, closed) in [("record.json", 0o077), ("attempts/1/0/task.json", 0o077), ("logs/0", 0o007)] {
        assert_eq!(seen(path).2 & closed, 0, "{path}");
    }
    // Another member of the group sees the job, and may not end it.
    let mut other = user.command(["job", "delete", "job"]);
    let told = other.uid(1234).gid(NOBODY).output().expect("runs");
    assert!(String::from_utf8_lossy(&told.stderr).contains("may not act on another user's job"), "{told:?}");
    let mut other = user.command(["submit", "mine", "-p", "team", "--", "true"]);
    let told = other.uid(1234).gid(NOBODY).output().expect("runs");
    assert!(String::from_utf8_lossy(&told.stderr).contains("may not submit to this project"), "{told:?}");
    user.ok(["job", "delete", "job"]);
}

#[test]
fn a_job_reads_and_makes_only_what_its_submitter_may() {
    let group = nix::unistd::Group::from_gid(nix::unistd::Gid::from_raw(NOBODY)).ok().flatten();
    let (true, Some(group)) = (nix::unistd::geteuid().is_root(), group) else {
        eprintln!("skipped: needs root and a group {NOBODY}");
        return;
    };
    let s3 = TestS3::start();
    let mut world = World::new();
    world.set_all(s3.env("shared"));
    fs::set_permissions(world.path(""), fs::Permissions::from_mode(0o711)).expect("opens the way");
    let socket = world.make_dir("run").join("larder.sock").display().to_string();
    world.set("LARDER_SOCKET", &socket);
    world.set("LARDER_DAEMON_GROUP", &group.name);
    let source = world.files("source", &[("a.txt", b"alpha")]);
    let commit = world.push(&source, "xray");
    world.ok(["grant", "xray", "--to", "user:1234", "mount", "push"]);
    let dir = world.path("scheduler").display().to_string();
    let gpus = Gpus::new(world, &["--dir", &dir]);
    gpus.world.ok(["node", "add", "n0", "--gpus", "1"]);
    gpus.world.ok(["project", "create", "team", "--gpus", "1"]);
    let mut user = World::of_user(NOBODY);
    user.set_all(s3.env("shared"));
    user.set("LARDER_SOCKET", &socket);
    let read = ["--dataset", "xray:/data"];
    let made = ["--output", "xray:/out"];
    let script =
        "cat $LARDER_DATASET_XRAY/a.txt; until test -e go; do sleep 0.05; done; echo bad > $LARDER_OUTPUT_XRAY/f";
    let submit = |name: &str, what: &[&str]| {
        let args = [&["submit", name, "-p", "team", "-g", "1"], what, &["--", "sh", "-c", script]].concat();
        user.run(args)
    };
    for (what, right) in [(&read, "mount"), (&made, "push")] {
        let ran = submit("refused", what);
        assert!(ran.code == 1 && ran.stderr.contains(&format!("may not {right} xray: the grants")), "{ran:?}");
    }
    // May at first, and not any more when it ends, or begins.
    gpus.world.ok(["grant", "xray", "--to", &format!("user:{NOBODY}"), "mount", "push"]);
    assert_eq!(submit("first", &[read, made].concat()).code, 0);
    wait_for("the job to have read it", || user.ok(["job", "logs", "first"]) == "alpha");
    assert_eq!(submit("second", &read).code, 0);
    let file = format!("{dir}/mounts/{NOBODY}/{commit}/a.txt");
    let cat = |uid| std::process::Command::new("cat").arg(&file).uid(uid).gid(NOBODY).output().expect("runs");
    assert_eq!(cat(NOBODY).stdout, b"alpha");
    assert!(!cat(1235).status.success(), "another user, who may not mount it, sees nothing");
    gpus.world.ok(["grant", "xray", "--to", &format!("user:{NOBODY}"), "--none"]);
    user.ok(["job", "exec", "first", "--", "touch", "go"]);
    for (name, why) in [("first", "do not let"), ("second", "may not mount xray: the grants")] {
        gpus.wait_status("team", name, "Failed");
        let told = user.ok(["job", "why", name]);
        assert!(told.contains(why), "{told}");
    }
    assert_eq!(gpus.world.json(&["show", "xray"])["commit"], commit, "nothing was pushed");
    // The push was tried with the scheduler's credentials, which it was not given by a file.
    let first = gpus.job("team", "first")["id"].as_str().expect("an id").to_owned();
    assert!(std::path::Path::new(&format!("{dir}/jobs/{first}/push/0-0/task.json")).exists());
    let found = Command::new("grep").args(["-rl", SECRET_KEY]).arg(format!("{dir}/jobs")).output().expect("runs");
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
}

#[test]
fn a_daemon_that_a_job_of_a_users_own_scheduler_started_outlives_the_job() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root, to be another user");
        return;
    }
    // What root may read of a process a user may not: the daemon has closed its environment.
    let gpus = Gpus::new(World::of_user(NOBODY), &[]);
    gpus.world.ok(["node", "add", "n0", "--gpus", "1"]);
    gpus.world.ok(["project", "create", "team", "--gpus", "1"]);
    gpus.world.run(["daemon", "stop"]);
    let larder = gpus.world.binary().to_str().expect("plain").to_owned();
    let settings = [("HOME", gpus.world.path("home"))].map(|(name, path)| format!("{name}={}", path.display()));
    let mut submit = vec!["submit", "job", "-p", "team"];
    settings.iter().for_each(|setting| submit.extend(["-e", setting]));
    gpus.world.ok(submit.iter().copied().chain(["--", larder.as_str(), "daemon"]));
    gpus.world.ok(["job", "wait", "job", "-p", "team"]);
    let pid = gpus.world.daemon_pid().expect("it runs");
    assert_eq!(gpus.world.run(["daemon", "status"]).code, 0);
    assert_eq!(gpus.world.daemon_pid(), Some(pid), "it is the one that the job started");
    let told = gpus.world.fails(1, ["submit", "apart", "-p", "team", "-e", "LARDER_APART=1", "--", "true"]);
    assert!(told.contains("LARDER_APART"), "{told}");
    gpus.world.ok(["daemon", "stop"]);
}

#[test]
fn who_asks_for_a_command_and_says_nothing_keeps_no_place() {
    use nix::sys::socket::{self, sockopt};
    use nix::sys::time::{TimeVal, TimeValLike};
    use std::os::fd::AsRawFd as _;
    let mut world = World::new();
    let place = world.make_dir("run");
    world.set("LARDER_SOCKET", place.join("larder.sock").display().to_string());
    let _gpus = Gpus::new(world, &[]);
    let (family, kind) = (socket::AddressFamily::Unix, socket::SockType::SeqPacket);
    let client = socket::socket(family, kind, socket::SockFlag::SOCK_CLOEXEC, None).expect("makes a socket");
    let server = socket::UnixAddr::new(&place.join("scheduler-exec.sock")).expect("a name");
    socket::connect(client.as_raw_fd(), &server).expect("connects");
    socket::setsockopt(&client, sockopt::ReceiveTimeout, &TimeVal::seconds(180)).expect("bounds the wait");
    let mut answer = [0; 1024];
    let len = socket::recv(client.as_raw_fd(), &mut answer, socket::MsgFlags::empty()).expect("is answered");
    assert!(String::from_utf8_lossy(&answer[..len]).contains("error"), "{len}");
}
