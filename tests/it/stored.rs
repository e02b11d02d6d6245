//! A service manager that holds the mounts as well: keeper and daemon may die together, and the keeper may take up
//! another program. `make campaign PART=systemd` shows the same with systemd itself.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use larder::fs::keeper::Client;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;

use crate::kit::{World, wait_for};

const LEN: usize = 300_000;

fn can_hand_over() -> bool {
    let can = crate::survive::has_resend() && nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("skipped: needs root, /dev/fuse and Linux 6.9");
    }
    can
}

type Held = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// Keeps what it is given and gives it to the next keeper, as systemd does.
struct Manager {
    path: PathBuf,
    held: Held,
}

impl Manager {
    fn start(world: &World) -> Self {
        let path = world.path("notify");
        let socket = UnixDatagram::bind(&path).expect("binds");
        let held = Held::default();
        let into = Arc::clone(&held);
        // Ends with the test's process.
        std::thread::spawn(move || {
            while let Some((text, fds)) = receive(&socket) {
                let mut held = into.lock().expect("no panic");
                let Some(name) = text.split("FDNAME=").nth(1) else { continue };
                if text.starts_with("FDSTORE=1") {
                    held.extend(fds.into_iter().map(|fd| (name.to_owned(), fd)));
                } else {
                    held.retain(|(known, _)| known != name);
                }
            }
        });
        Self { path, held }
    }

    fn names(&self) -> Vec<String> {
        self.held.lock().expect("no panic").iter().map(|(name, _)| name.clone()).collect()
    }

    fn holds_one_mount(&self) -> bool {
        let kinds = ["larder-fuse-", "larder-row-", "larder-slots-"];
        let mut names = self.names();
        names.sort();
        names.len() == 3 && names.iter().zip(kinds).all(|(name, kind)| name.starts_with(kind))
    }

    /// Starts a keeper with what is held.
    fn keeper(&self, world: &World) -> Ends {
        let mut command = keeper(world);
        let held = self.held.lock().expect("no panic");
        let passed: Vec<(String, OwnedFd)> =
            held.iter().map(|(name, fd)| (name.clone(), fd.try_clone().expect("dup"))).collect();
        let words: Vec<String> = passed.iter().map(|(name, fd)| format!("{name}={}", fd.as_raw_fd())).collect();
        command.env("NOTIFY_SOCKET", &self.path).env("PASSED", words.join(" "));
        // SAFETY: fcntl may be called between fork and exec; the numbers are open in the child.
        unsafe {
            command.pre_exec(move || {
                for (_, fd) in &passed {
                    libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0);
                }
                Ok(())
            });
        }
        Ends(command.spawn().expect("starts"))
    }
}

fn receive(socket: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let (mut bytes, mut space) = ([0; 512], nix::cmsg_space!([RawFd; 4]));
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).ok()?;
    let mut fds = Vec::new();
    for control in message.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these numbers for this process.
            fds.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
        }
    }
    let len = message.bytes;
    Some((String::from_utf8_lossy(&bytes[..len]).into_owned(), fds))
}

/// A keeper in the foreground, with the descriptors that the variable PASSED names.
fn keeper(world: &World) -> Command {
    let like = world.command(["keeper"]);
    let mut command = Command::new("sh");
    command.env_clear().envs(like.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.args(["-c", "KEEPER_PASSED=\"$$ ${PASSED:-}\" exec \"$@\"", "sh"]).arg(world.binary());
    command.args(["keeper", "--state"]).arg(world.state()).arg("--foreground").stdin(Stdio::null());
    command
}

/// Ends a process when a test ends.
struct Ends(Child);

impl Ends {
    fn kill(mut self) {
        self.0.kill().expect("kills");
        self.0.wait().expect("ends");
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn daemon(world: &World) -> Ends {
    let mut command = world.command(["daemon", "--foreground", "--keep-mounts"]);
    command.env("LARDER_DAEMON_RESTART", "false").stderr(Stdio::null());
    let daemon = Ends(command.spawn().expect("starts"));
    wait_for("the daemon", || world.daemon_pid() == i32::try_from(daemon.0.id()).ok());
    daemon
}

#[track_caller]
fn assert_reads_on(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("advises");
    let mut read = vec![0; LEN];
    file.read_exact_at(&mut read, 0).expect("reads on");
    assert!(read.iter().all(|&byte| byte == 7));
}

fn world_with_a_commit() -> World {
    let mut world = World::new();
    world.set("LARDER_DAEMON_ON_DEMAND", "false");
    let source = world.files("source", &[("a.bin", &[7; LEN])]);
    world.push(&source, "data");
    world
}

#[test]
fn keeper_and_daemon_may_die_together_where_a_service_manager_holds_the_mounts() {
    if !can_hand_over() {
        return;
    }
    let world = world_with_a_commit();
    let manager = Manager::start(&world);
    let mut serving = (manager.keeper(&world), daemon(&world));
    let mount = world.mount("data", "m", &[]);
    let file = File::open(mount.join("a.bin")).expect("opens");
    for _ in 0..2 {
        wait_for("the manager to hold the mount", || manager.holds_one_mount());
        let (keeper, former) = serving;
        keeper.kill();
        former.kill();
        assert_eq!(world.mounted(), std::slice::from_ref(&mount), "the mount stays");
        serving = (manager.keeper(&world), daemon(&world));
        assert_reads_on(&file);
    }
    drop(file);
    world.ok(["umount", mount.to_str().expect("plain")]);
    wait_for("the manager to hold nothing", || manager.names().is_empty());
}

#[test]
fn a_keeper_takes_up_its_program_anew_with_its_mounts_and_nobody_notices() {
    if !can_hand_over() {
        return;
    }
    let world = world_with_a_commit();
    let keeper = Ends(keeper(&world).spawn().expect("starts"));
    let serving = daemon(&world);
    let mount = world.mount("data", "m", &[]);
    let file = File::open(mount.join("a.bin")).expect("opens");
    for _ in 0..2 {
        let before = Client::connect(&world.state()).expect("answers");
        kill(Pid::from_raw(i32::try_from(keeper.0.id()).expect("a pid")), Signal::SIGHUP).expect("tells it");
        wait_for("the keeper to begin anew", || !before.is_same() && Client::connect(&world.state()).is_ok());
        assert_eq!(world.daemon_pid(), i32::try_from(serving.0.id()).ok(), "the daemon goes on");
        assert_reads_on(&file);
    }
    // What it kept is enough for a daemon that comes.
    serving.kill();
    let _serving = daemon(&world);
    assert_reads_on(&file);
    let kept = Client::connect(&world.state()).expect("answers").list().expect("lists");
    assert_eq!(kept.iter().map(|kept| kept.dir.as_path()).collect::<Vec<_>>(), [mount.as_path()]);
}
