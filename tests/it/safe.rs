//! Who may do what at the daemon of a machine that several users share, the API over TCP, and that secrets stay in.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use tokio_rustls::rustls;

use crate::kit::s3::{SECRET_KEY, TestS3};
use crate::kit::{World, copy_program, wait_for};

/// Members of this group may use the daemon: the group is there on every system.
const GROUP: (&str, u32) = ("daemon", 1);
const ANN: u32 = 4001;
const BOB: u32 = 4002;

/// A system's daemon, by root, and users of its group.
struct System {
    world: World,
    binary: PathBuf,
    _s3: TestS3,
}

impl System {
    /// None: needs root.
    fn start(policy: Option<&str>) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root, to be several users");
            return None;
        }
        let s3 = TestS3::start();
        let mut world = World::new();
        world.set_all(s3.env("shared"));
        world.set("LARDER_DAEMON_GROUP", GROUP.0);
        world.set("LARDER_SOCKET", world.path("run/daemon.sock").to_str().expect("plain"));
        fs::set_permissions(world.path(""), fs::Permissions::from_mode(0o755)).expect("opens the world");
        if let Some(policy) = policy {
            let path = world.path("policy.toml");
            fs::write(&path, policy).expect("writes the policy");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("closes it");
            world.set("LARDER_POLICY", path.to_str().expect("plain"));
        }
        let binary = world.path("larder-for-all");
        copy_program(world.binary(), &binary);
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).expect("opens it");
        for uid in [ANN, BOB] {
            let home = world.make_dir(&format!("home-{uid}/m"));
            for dir in [home.parent().expect("a parent"), &home] {
                std::os::unix::fs::chown(dir, Some(uid), Some(uid)).expect("gives it away");
            }
        }
        for name in ["photos", "secret"] {
            let source = world.files(name, &[("a.txt", b"alpha")]);
            world.push(&source, name);
        }
        world.ok(["daemon"]);
        Some(Self { world, binary, _s3: s3 })
    }

    fn dir(&self, uid: u32) -> String {
        self.world.path(&format!("home-{uid}/m")).to_str().expect("plain").to_owned()
    }

    /// Runs a program as a user who is in the group.
    fn program(&self, uid: u32, program: &Path, args: &[&str]) -> Output {
        Command::new(program)
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.world.path(&format!("home-{uid}")))
            .env("LARDER_SOCKET", self.world.path("run/daemon.sock"))
            .env("LARDER_DAEMON_ON_DEMAND", "false")
            .current_dir("/")
            .stdin(Stdio::null())
            .uid(uid)
            .gid(GROUP.1)
            .output()
            .expect("runs")
    }

    #[track_caller]
    fn may(&self, uid: u32, args: &[&str]) {
        let ran = self.program(uid, &self.binary, args);
        assert!(ran.status.success(), "{uid} {args:?}: {}", String::from_utf8_lossy(&ran.stderr));
    }

    #[track_caller]
    fn may_not(&self, uid: u32, args: &[&str], why: &str) {
        let ran = self.program(uid, &self.binary, args);
        let told = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(!ran.status.success() && told.contains(why), "{uid} {args:?}: {told}");
    }
}

#[test]
fn grants_of_a_dataset_decide_who_mounts_caches_and_uncaches_it_and_who_sees_the_mount() {
    let Some(system) = System::start(None) else {
        return;
    };
    let (ann, bob) = (system.dir(ANN), system.dir(BOB));
    system.may(BOB, &["mount", "secret", &bob]);
    system.may(BOB, &["umount", &bob]);
    system.world.ok(["grant", "secret", "--to", "user:4001", "mount", "cache"]);
    let listed = system.world.json(&["grant", "secret"]);
    assert_eq!(listed["heads"][0][0]["who"], "user:4001", "{listed}");

    system.may_not(BOB, &["mount", "secret", &bob], "grants");
    system.may_not(BOB, &["cache", "secret"], "grants");
    system.may(BOB, &["mount", "photos", &bob]);
    system.may(ANN, &["cache", "secret"]);
    system.may_not(ANN, &["uncache", "secret"], "grants");
    system.may_not(ANN, &["cache", "secret", "--no-keep"], "grants");
    system.may_not(ANN, &["mount", "secret", &ann, "--uid", "4002"], "may not show files");
    let roots = system.world.make_dir("roots");
    system.may_not(ANN, &["mount", "secret", roots.to_str().expect("plain")], "is not theirs");
    system.may(ANN, &["mount", "secret", &ann]);
    let file = format!("{ann}/a.txt");
    assert_eq!(system.program(ANN, Path::new("cat"), &[&file]).stdout, b"alpha");
    assert!(!system.program(BOB, Path::new("cat"), &[&file]).status.success(), "who may not mount it may not look in");
    system.may_not(BOB, &["umount", &ann], "may not unmount");

    // A group, by the name that the node's user database has.
    system.world.ok(["grant", "secret", "--to", "group:daemon", "uncache", "mount"]);
    system.may(BOB, &["umount", &bob]);
    system.may(BOB, &["mount", "secret", &bob]);
    system.may(BOB, &["umount", &bob]);
    system.may(ANN, &["umount", &ann]);
    system.may(BOB, &["uncache", "secret"]);
    system.world.ok(["grant", "secret", "--clear"]);
    system.may(BOB, &["cache", "secret"]);
}

#[test]
fn the_policy_of_a_node_is_asked_at_each_request() {
    let rule = |who: &str| {
        format!("[[rule]]\nwho = [\"{who}\"]\ndatasets = [\"*\"]\nrights = [\"mount\", \"cache\", \"uncache\"]\n")
    };
    let Some(system) = System::start(Some(&rule("user:4001"))) else {
        return;
    };
    let (ann, bob) = (system.dir(ANN), system.dir(BOB));
    system.may(ANN, &["mount", "photos", &ann]);
    system.may_not(BOB, &["mount", "photos", &bob], "policy");
    system.may_not(BOB, &["uncache", "photos"], "policy");
    assert!(!system.program(BOB, Path::new("cat"), &[&format!("{ann}/a.txt")]).status.success());
    let policy = system.world.path("policy.toml");
    fs::write(&policy, rule("group:daemon")).expect("writes the policy");
    system.may(BOB, &["mount", "photos", &bob]);
    // Grants and policy both have to allow it.
    system.world.ok(["grant", "secret", "--to", "user:4001", "mount"]);
    system.may(BOB, &["umount", &bob]);
    system.may_not(BOB, &["mount", "secret", &bob], "grants");
    // A file that others may write, or that is wrong, allows nobody anything.
    fs::set_permissions(&policy, fs::Permissions::from_mode(0o666)).expect("opens it");
    system.may_not(BOB, &["mount", "photos", &bob], "may write the policy");
    fs::set_permissions(&policy, fs::Permissions::from_mode(0o644)).expect("closes it");
    fs::write(&policy, "[[rule]]\nwho = 1").expect("writes nonsense");
    system.may_not(BOB, &["mount", "photos", &bob], "the policy is wrong");
    // Root needs no rule, and is told of the nonsense at the next start.
    let own = system.world.mount("secret", "own", &[]);
    assert_eq!(fs::read(own.join("a.txt")).expect("reads"), b"alpha");
}

#[test]
fn a_user_who_puts_a_link_in_the_place_of_a_mounted_directory_gets_nothing_mounted_through_it() {
    let Some(system) = System::start(None) else {
        return;
    };
    let ann = system.dir(ANN);
    system.may(ANN, &["mount", "photos", &ann]);
    system.world.ok(["daemon", "stop"]);
    let (home, victim) = (system.world.path("home-4001"), system.world.make_dir("victim/m"));
    fs::rename(&home, system.world.path("moved")).expect("moves");
    std::os::unix::fs::symlink(system.world.path("victim"), &home).expect("links");
    system.world.ok(["daemon"]);
    let failed = || system.world.json(&["mounts"])[0]["state"] == "failed";
    wait_for("the mount to be refused", failed);
    assert_eq!(fs::read_dir(&victim).expect("lists").count(), 0, "nothing is mounted over what is not theirs");
}

/// Sends a request over a connection that is made; gives the answer.
fn exchange(mut stream: impl Read + Write, method: &str, path: &str, token: Option<&str>, body: &str) -> String {
    let token = token.map_or_else(String::new, |token| format!("authorization: Bearer {token}\r\n"));
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: larder\r\nconnection: close\r\ncontent-type: application/json\r\n{token}content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).expect("asks");
    let mut answer = Vec::new();
    // Who closes without a close_notify has said all the same.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or(answer)
}

/// Gives the address that the log tells.
fn api_address(world: &World) -> String {
    let mut address = None;
    wait_for("the API's address in the log", || {
        let log = world.log();
        let at = log.lines().rfind(|line| line.contains("the API is given over TCP")).and_then(|line| {
            let digits = line.rsplit("127.0.0.1:").next()?;
            digits.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<u16>().ok()
        });
        address = at.map(|port| format!("127.0.0.1:{port}"));
        address.is_some()
    });
    address.expect("was found")
}

#[test]
fn the_api_over_tcp_serves_who_has_a_token_and_nobody_else() {
    let mut world = World::new();
    let tokens = world.path("tokens");
    world.set("LARDER_API_LISTEN", "127.0.0.1:0");
    world.set("LARDER_API_TOKENS", tokens.to_str().expect("plain"));
    let read = world.ok(["daemon", "token", "prometheus"]).trim().to_owned();
    let control = world.ok(["daemon", "token", "hub", "--control"]).trim().to_owned();
    let kept = fs::read_to_string(&tokens).expect("is there");
    assert!(!kept.contains(&read) && !kept.contains(&control), "only digests are kept");
    assert_eq!(fs::metadata(&tokens).expect("stat").permissions().mode() & 0o777, 0o600);
    world.ok(["daemon"]);
    let address = api_address(&world);
    let ask = |method: &str, path: &str, token: Option<&str>| {
        exchange(TcpStream::connect(&address).expect("connects"), method, path, token, "{}")
    };
    for path in ["/v1/info", "/v1/mounts", "/metrics", "/healthz", "/readyz"] {
        assert_eq!(status(&ask("GET", path, None)), "401", "{path}");
        assert_eq!(status(&ask("GET", path, Some("larder_0000"))), "401", "{path}");
        wait_for(path, || status(&ask("GET", path, Some(&read))) == "200");
    }
    assert_eq!(status(&ask("POST", "/v1/stop", Some(&read))), "403");
    assert_eq!(status(&ask("POST", "/v1/stop", None)), "401");
    let digest = kept.split_whitespace().nth(2).expect("a digest");
    assert_eq!(status(&ask("GET", "/v1/info", Some(digest))), "401", "what is in the file is no token");
    // A line that is taken out counts at once.
    let without: String = kept.lines().filter(|line| !line.starts_with("prometheus")).collect();
    fs::write(&tokens, without + "\n").expect("writes");
    assert_eq!(status(&ask("GET", "/v1/info", Some(&read))), "401");
    let log = world.log();
    assert!(!log.contains(&read) && !log.contains(&control), "no token is logged");
    // What it allows: anything but to say which program runs on this machine.
    assert_eq!(status(&ask("POST", "/v1/umount", Some(&control))), "400");
    assert_eq!(status(&ask("POST", "/v1/stop", Some(&control))), "403");
    let other = r#"{"program":"/bin/sh","args":["-c","true"],"handover":2}"#;
    let asked = exchange(TcpStream::connect(&address).expect("connects"), "POST", "/v1/upgrade", Some(&control), other);
    assert_eq!(status(&asked), "403", "{asked}");
    assert!(world.daemon_pid().is_some(), "it serves on");
    world.ok(["daemon", "stop"]);
}

#[test]
fn the_api_over_tcp_is_closed_to_other_machines_without_tls_and_speaks_tls_with_a_certificate() {
    let mut world = World::new();
    let tokens = world.path("tokens");
    world.set("LARDER_API_TOKENS", tokens.to_str().expect("plain"));
    world.set("LARDER_API_LISTEN", "0.0.0.0:0");
    let told = world.fails(2, ["daemon"]);
    assert!(told.contains("daemon.api_cert"), "{told}");
    world.set("LARDER_API_LISTEN", "127.0.0.1:0");
    let Some(certs) = certificates(&world) else { return };
    world.set("LARDER_API_CERT", certs.join("cert.pem").to_str().expect("plain"));
    world.set("LARDER_API_KEY", certs.join("key.pem").to_str().expect("plain"));
    let token = world.ok(["daemon", "token", "prometheus"]).trim().to_owned();
    world.ok(["daemon"]);
    let address = api_address(&world);
    let plain = exchange(TcpStream::connect(&address).expect("connects"), "GET", "/v1/info", Some(&token), "");
    assert!(!plain.starts_with("HTTP/1.1 200"), "nothing is said without TLS: {plain}");
    let client = tls_client(&certs.join("ca.pem"));
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").expect("a name");
    let session = rustls::ClientConnection::new(client, name).expect("a session");
    let stream = rustls::StreamOwned::new(session, TcpStream::connect(&address).expect("connects"));
    let answer = exchange(stream, "GET", "/v1/info", Some(&token), "");
    assert_eq!(status(&answer), "200", "{answer}");
}

/// Makes an authority and a certificate for 127.0.0.1; None where nothing here can.
fn certificates(world: &World) -> Option<std::path::PathBuf> {
    let certs = world.make_dir("certs");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kit/certs.py");
    let made = Command::new("python3").arg(script).arg(&certs).output();
    let has = made.is_ok_and(|made| made.status.success());
    if !has {
        eprintln!("skipped: certificates need python3 with `cryptography`");
    }
    has.then_some(certs)
}

/// Writes a token where only its owner reads it.
fn keep_token(world: &World, name: &str, token: &str) -> String {
    let path = world.path(name);
    fs::write(&path, token).expect("writes");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("closes it");
    path.to_str().expect("plain").to_owned()
}

#[test]
fn commands_reach_a_daemon_over_tcp_with_a_token_and_the_authority_of_its_certificate() {
    let mut world = World::new();
    let Some(certs) = certificates(&world) else { return };
    let plain = |path: std::path::PathBuf| path.to_str().expect("plain").to_owned();
    let source = world.files("source", &[("a.txt", b"alpha")]);
    world.push(&source, "data");
    let service = [
        ("LARDER_API_LISTEN", "127.0.0.1:0".to_owned()),
        ("LARDER_API_TOKENS", plain(world.path("tokens"))),
        ("LARDER_API_CERT", plain(certs.join("cert.pem"))),
        ("LARDER_API_KEY", plain(certs.join("key.pem"))),
    ];
    for (name, value) in &service {
        world.set(name, value);
    }
    let control = keep_token(&world, "control", &world.ok(["daemon", "token", "ann", "--control"]));
    let read = keep_token(&world, "read", &world.ok(["daemon", "token", "bob"]));
    world.ok(["daemon"]);
    let url = format!("https://{}", api_address(&world));
    // Another machine: its own socket leads to nobody.
    let at = |more: &[&str], args: &[&str]| {
        let nobody = format!("--socket={}", plain(world.path("nobody.sock")));
        let mut all: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        all.extend([nobody, format!("--daemon={url}")]);
        all.extend(more.iter().map(|&arg| arg.to_owned()));
        world.run(all)
    };
    let (control, read) = (format!("--daemon-token-file={control}"), format!("--daemon-token-file={read}"));
    let ca = format!("--daemon-ca={}", plain(certs.join("ca.pem")));
    let says = |code: i32, what: &str, more: &[&str], args: &[&str]| {
        let ran = at(more, args);
        assert!(ran.code == code && ran.stderr.contains(what), "{args:?} {more:?}: {} {}", ran.code, ran.stderr);
    };
    says(2, "daemon.token_file", &[&ca], &["mounts"]);
    says(1, "daemon.ca", &[&control], &["mounts"]);
    says(0, "", &[&read, &ca], &["mounts"]);
    says(1, "this token may only look", &[&read, &ca], &["cache", "data"]);
    says(0, "is in the tier", &[&control, &ca], &["cache", "data"]);
    says(2, "no absolute path on the daemon's machine", &[&control, &ca], &["mount", "data", "m"]);
    says(2, "own machine only", &[&control, &ca], &["daemon", "stop"]);
    says(0, "left the tier", &[&control, &ca], &["uncache", "data"]);
    let told = at(&[&control, &ca], &["daemon", "status", "--json"]).stdout;
    assert!(told.contains(&format!("\"pid\": {}", world.daemon_pid().expect("runs"))), "{told}");
    // A token that others may read is not sent.
    fs::set_permissions(world.path("read"), fs::Permissions::from_mode(0o644)).expect("opens it");
    says(1, "others may read this token", &[&read, &ca], &["mounts"]);
    fs::remove_file(world.path("tokens")).expect("takes all tokens away");
    says(1, "not known here", &[&control, &ca], &["mounts"]);
}

fn tls_client(authority: &Path) -> Arc<rustls::ClientConfig> {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    let mut roots = rustls::RootCertStore::empty();
    for cert in CertificateDer::pem_file_iter(authority).expect("reads") {
        roots.add(cert.expect("a certificate")).expect("is one");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Arc::new(builder.expect("versions").with_root_certificates(roots).with_no_client_auth())
}

/// Gives the command lines of all processes.
fn command_lines() -> String {
    let pids = fs::read_dir("/proc").expect("lists").flatten();
    let lines = pids.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ") + "\n").collect()
}

#[test]
fn the_secret_of_the_lake_is_in_no_log_no_answer_and_no_command_line() {
    let s3 = TestS3::start();
    let mut world = World::new();
    world.set_all(s3.env("shared"));
    world.set("LARDER_LOG", "trace");
    let source = world.files("source", &[("a.txt", b"alpha")]);
    world.push(&source, "photos");
    let mut told = String::new();
    let dir = world.make_dir("m");
    let mount = world.run(["-v", "-v", "mount", "photos", dir.to_str().expect("plain")]);
    let can_mount = mount.code == 0;
    told += &(mount.stdout + &mount.stderr);
    for args in [
        &["-v", "-v", "-v", "ls", "photos"][..],
        &["-v", "-v", "-v", "status"],
        &["-v", "-v", "-v", "cat", "photos", "gone"],
        &["config", "show"],
        &["daemon", "metrics"],
        &["daemon", "status", "--json"],
        &["mounts", "--json"],
        &["doctor"],
    ] {
        let ran = world.run(args);
        told += &(ran.stdout + &ran.stderr);
    }
    // What the keeper would start again has the environment: it is passed on by a socket, not by a command line.
    if can_mount {
        world.kill_daemon();
        wait_for("another daemon", || world.daemon_pid().is_some());
    }
    let lines = command_lines();
    assert!(lines.contains("larder daemon run"), "the daemon's command line was seen: {lines}");
    told += &lines;
    // A wrong secret is told of, not told.
    let wrong = "wrong-secret-key-0123456789";
    world.ok(["daemon", "stop"]);
    told += &world.log();
    let daemon_log = world.log();
    assert!(daemon_log.contains("TRACE") || daemon_log.contains("DEBUG"), "everything was logged");
    world.set("AWS_SECRET_ACCESS_KEY", wrong);
    let ran = world.run(["-v", "-v", "-v", "ls", "photos"]);
    assert_ne!(ran.code, 0);
    told += &(ran.stdout + &ran.stderr);
    for secret in [SECRET_KEY, wrong] {
        let at = told.find(secret);
        let around = at.map(|at| &told[at.saturating_sub(200)..at]);
        assert!(at.is_none(), "{secret} is told after: {around:?}");
    }
}

#[test]
fn no_core_dump_and_no_other_process_of_the_user_shows_what_a_daemon_has_in_memory() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root, to be another user");
        return;
    }
    let world = World::of_user(ANN);
    world.make_dir("home/.local/state/larder");
    for dir in ["home/.local", "home/.local/state"] {
        std::os::unix::fs::chown(world.path(dir), Some(ANN), Some(ANN)).expect("gives it away");
    }
    let mut command = world.command(["daemon", "--foreground"]);
    let mut daemon = with_core_dumps(&mut command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
    wait_for("the daemon", || world.daemon_pid().is_some());
    let pid = daemon.id();
    let as_ann = |path: String| {
        let ran = Command::new("cat").arg(path).uid(ANN).gid(ANN).stdout(Stdio::null()).stderr(Stdio::null()).status();
        ran.expect("runs").success()
    };
    assert!(as_ann(format!("/proc/{pid}/cmdline")), "she sees that it runs");
    assert!(!as_ann(format!("/proc/{pid}/environ")), "its environment is not shown to her other processes");
    let mut sleep = with_core_dumps(Command::new("sleep").arg("1000").current_dir(world.path("")).uid(ANN).gid(ANN))
        .spawn()
        .expect("starts");
    for child in [&mut daemon, &mut sleep] {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGABRT).expect("kills");
    }
    let dumped = sleep.wait().expect("ends").core_dumped();
    assert!(!daemon.wait().expect("ends").core_dumped(), "no core of a process with credentials");
    if !dumped {
        eprintln!("core dumps are switched off here: that none is written of the daemon shows nothing");
    }
}

/// Lets a command dump core where the system's limit allows it.
fn with_core_dumps(command: &mut Command) -> &mut Command {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raise = || {
        let (_, hard) = getrlimit(Resource::RLIMIT_CORE)?;
        setrlimit(Resource::RLIMIT_CORE, hard, hard)?;
        Ok(())
    };
    // SAFETY: two system calls that may be made between fork and exec.
    unsafe { command.pre_exec(raise) }
}
