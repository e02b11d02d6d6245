//! Jobs in real containers, by podman: what they read and make, logs, exec, pausing, and kills in the
//! middle. Skipped, with a line, where podman can't run here.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::kit::gpus::Gpus;
use crate::kit::{World, wait_for};

const IMAGE: &str = "localhost/larder-test:1";
/// What podman's `run` needs in a container that is itself one.
const RUN_ARGS: [&str; 5] =
    ["--runtime", "runc", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000", "--network=none"];

/// Makes an image of busybox in a storage of this world's own, and a program that is podman with it. None,
/// with a line that says why, where that does not work.
fn engine(world: &World) -> Option<String> {
    let skip = |why: &str| {
        eprintln!("skipped: {why}");
        None
    };
    if !nix::unistd::geteuid().is_root() {
        return skip("containers are tried as root only");
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    let Some(busybox) = busybox else { return skip("there is no busybox (busybox-static) to make an image of") };
    let bin = world.make_dir("image/bin");
    fs::copy(busybox, bin.join("busybox")).expect("copies busybox");
    for name in ["sh", "cat", "echo", "sleep", "test", "touch"] {
        symlink("busybox", bin.join(name)).expect("links");
    }
    let (root, run) = (world.make_dir("containers"), world.make_dir("run"));
    let engine = world.path("engine");
    let text = format!(
        "#!/bin/sh\nexec podman --storage-driver vfs --root {} --runroot {} \"$@\"\n",
        root.display(),
        run.display()
    );
    fs::write(&engine, text).expect("writes the engine");
    fs::set_permissions(&engine, fs::Permissions::from_mode(0o755)).expect("makes it a program");
    let import = format!("tar -C {} -c . | {} import - {IMAGE}", world.path("image").display(), engine.display());
    let quiet = |command: &mut Command| {
        let done = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        done.is_ok_and(|status| status.success())
    };
    if !quiet(Command::new("sh").args(["-c", &import])) {
        return skip("there is no podman that imports an image");
    }
    if !quiet(Command::new(&engine).arg("run").args(RUN_ARGS).args(["--rm", IMAGE, "sh", "-c", "exit 0"])) {
        return skip("podman runs no container here");
    }
    Some(engine.to_str().expect("a plain path").to_owned())
}

/// It writes a checkpoint when it is told to stop, and goes on from it.
const SCRIPT: &str = "if test -e /out/step; then cat /data/a.txt >> /out/step; echo went on; exit 0; fi; \
    trap 'echo 41 > /out/step; exit 0' TERM; echo begun in $LARDER_DATASET_XRAY; while :; do sleep 1; done";

#[test]
fn a_container_reads_its_commit_outlives_kills_is_paused_goes_on_and_its_output_knows_where_it_came_from() {
    let world = World::new();
    let Some(engine) = engine(&world) else { return };
    let mut args = vec!["--engine".to_owned(), engine];
    args.extend(RUN_ARGS.iter().map(|arg| format!("--engine-arg={arg}")));
    let mut gpus = Gpus::new(world, &args.iter().map(String::as_str).collect::<Vec<_>>());
    gpus.world.ok(["node", "add", "n0", "--gpus", "1"]);
    gpus.world.ok(["project", "create", "team", "--gpus", "1"]);
    gpus.world.ok(["project", "create", "guest", "--gpus", "0", "--weight", "1"]);
    let source = gpus.world.files("source", &[("a.txt", b"alpha\n")]);
    let input = gpus.world.push(&source, "xray");
    let mut submit = vec!["submit", "train", "-p", "guest", "-i", IMAGE, "--grace", "10m"];
    submit.extend(["--dataset", "xray:/data", "--output", "model:/out", "--", "sh", "-c", SCRIPT]);
    gpus.world.ok(submit);
    let logs = |gpus: &Gpus| gpus.world.ok(["job", "logs", "train", "-p", "guest"]);
    gpus.wait("the container's first words", |gpus| logs(gpus).contains("begun in /data"));
    let exec = ["job", "exec", "train", "-p", "guest", "--", "cat", "/data/a.txt"];
    assert_eq!(gpus.world.ok(exec), "alpha\n");
    gpus.kill();
    gpus.world.kill_daemon();
    gpus.start();
    let exec = ["job", "exec", "train", "-p", "guest", "--", "echo", "alive"];
    assert_eq!(gpus.world.ok(exec), "alive\n");
    assert_eq!(gpus.job("guest", "train")["attempts"].as_array().map(Vec::len), Some(1), "it is the same container");
    gpus.world.ok([
        "submit",
        "shell",
        "-p",
        "team",
        "-i",
        IMAGE,
        "--interactive",
        "--grace",
        "0s",
        "--",
        "sleep",
        "100000",
    ]);
    gpus.wait_status("team", "shell", "Running");
    assert_eq!(gpus.job("guest", "train")["status"], "Pending");
    gpus.world.ok(["job", "delete", "shell", "-p", "team"]);
    gpus.wait("the job's end", |gpus| gpus.job("guest", "train")["status"] == "Succeeded");
    assert!(logs(&gpus).contains("went on"));
    assert_eq!(gpus.world.ok(["cat", "model", "step"]), "41\nalpha\n");
    let shown = gpus.world.json(&["show", "model"]);
    assert_eq!(shown["lineage"]["inputs"][0], input.as_str());
    let image = shown["lineage"]["image"].as_str().expect("an image");
    assert!(image.starts_with(&format!("{IMAGE}@sha256:")) && image.len() == IMAGE.len() + 8 + 64, "{image}");
    wait_for("the mount's end", || gpus.world.json(&["mounts"]) == serde_json::json!([]));
}

#[test]
fn who_submitted_a_job_gets_into_its_container_and_nobody_else_does() {
    const NOBODY: u32 = 65534;
    let mut world = World::new();
    let Some(engine) = engine(&world) else { return };
    let Some(group) = nix::unistd::Group::from_gid(NOBODY.into()).ok().flatten() else {
        eprintln!("skipped: there is no group {NOBODY}");
        return;
    };
    fs::set_permissions(world.path(""), fs::Permissions::from_mode(0o711)).expect("opens the way");
    let socket = world.make_dir("socket").join("larder.sock").display().to_string();
    world.set("LARDER_SOCKET", &socket);
    world.set("LARDER_DAEMON_GROUP", &group.name);
    let dir = world.path("scheduler").display().to_string();
    let mut args = vec!["--dir".to_owned(), dir, "--engine".to_owned(), engine];
    args.extend(RUN_ARGS.iter().map(|arg| format!("--engine-arg={arg}")));
    let gpus = Gpus::new(world, &args.iter().map(String::as_str).collect::<Vec<_>>());
    gpus.world.ok(["node", "add", "n0", "--gpus", "1"]);
    gpus.world.ok(["project", "create", "team", "--gpus", "1"]);
    let mut user = World::of_user(NOBODY);
    user.set("LARDER_SOCKET", &socket);
    let script = "echo $TOKEN begun; exec sleep 100000";
    let submit = ["submit", "job", "-p", "team", "-i", IMAGE, "--grace", "0s", "-e", "TOKEN=s3cret $x"];
    user.ok(submit.iter().chain(&["--", "sh", "-c", script]));
    gpus.wait("the container's first words", |gpus| gpus.world.ok(["job", "logs", "job"]) == "s3cret $x begun\n");
    let whole = fs::read_dir("/proc").expect("lists").flatten().map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).into_owned()
    });
    assert!(!whole.into_iter().any(|line| line.contains("podman") && line.contains("s3cret")), "everybody sees it");
    assert_eq!(user.ok(["job", "exec", "job", "--", "sh", "-c", "echo $TOKEN"]), "s3cret $x\n");
    let told = user.fails(7, ["job", "exec", "job", "--", "sh", "-c", "echo no >&2; exit 7"]);
    assert_eq!(told, "no\n");
    let mut other = user.command(["job", "exec", "job", "--", "echo", "in"]);
    let told = std::os::unix::process::CommandExt::gid(&mut other, NOBODY);
    let told = std::os::unix::process::CommandExt::uid(told, 1234).output().expect("runs");
    assert!(String::from_utf8_lossy(&told.stderr).contains("may not act on another user's job"), "{told:?}");
    user.ok(["job", "delete", "job"]);
    gpus.wait("the job's end", |gpus| gpus.world.json(&["job", "list", "-A"]) == serde_json::json!([]));
}
