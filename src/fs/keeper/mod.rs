//! The keeper: a tiny process that makes the mounts and holds what must outlive a daemon.
//!
//! ```text
//! <state>/keeper.sock    where it listens (mode 0600; the peer must be root or the same user)
//! <state>/keeper.lock    locked while a keeper lives
//! ```
//!
//! It holds, for each mount, the /dev/fuse descriptor and a memory file with the records of what is
//! open (`crate::fs::handles`), and passes duplicates of both to the daemon that serves the mount. It
//! never reads a request and never touches data, so there is nothing in it that can fail with a lake
//! or a tier. If the daemon dies, the mounts stay: what is open stays open, requests wait for the next
//! daemon, which the keeper starts and which asks for the descriptors. If the keeper dies, the daemon
//! starts another one and gives it the descriptors. `docs/formats/handover.md` has the whole of it.
//!
//! * [`wire`]: the messages. * [`mounts`]: mount(2) and fusermount3. * [`table`]: which mounts there
//!   are. * [`watch`]: the daemon's life. * [`client`]: what the daemon calls. * this file: the process.
//! * [`kernel`]: EROFS mounts, which the keeper puts at their directories and does not hold.
//! * [`stored`]: what a service manager holds as well, for when keeper and daemon both end.
//!
//! Single-threaded and without a runtime on purpose: one request after the other, none of them long.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::geteuid;

use crate::fs::sys;

mod client;
pub mod kernel;
mod mounts;
mod stored;
mod table;
mod watch;
mod wire;

pub use client::{Client, KeeperError, MountFds, Watching};
pub use mounts::{ImageLine, Shown, image_at, image_by_id, images_shown, is_dead, is_ours, shown_at, shows_image};
pub use wire::{KeptMount, MountId, MountRequest, NOTE_BYTES_MAX, Restart};

use stored::Store;
use table::Table;
use watch::Watch;
pub(crate) use wire::PACKET_BYTES_MAX;
use wire::{Answer, Request};

pub(crate) const SOCKET_NAME: &str = "keeper.sock";
const LOCK_NAME: &str = "keeper.lock";

/// How often the keeper looks for mounts that ended without a change of the mount table.
const LOOK_INTERVAL_MS: u16 = 30_000;
/// How long it waits for a client that connected to say what it wants.
const CLIENT_TIMEOUT_S: i64 = 2;

/// Runs the keeper of a state directory in this process, for a service manager: `larder keeper --state DIR
/// --foreground`. On SIGTERM and SIGINT it unmounts everything and ends, or leaves the mounts to the daemon, which
/// gives them to the next keeper; on SIGHUP the program that lies at its path now takes its place, with all mounts.
pub fn run_here(state: &Path, keep_mounts: bool) -> io::Result<()> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    signals.thread_block()?;
    let Some(mut keeper) = Keeper::open(state)? else {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another keeper has this state directory"));
    };
    keeper.keeps_mounts = keep_mounts;
    keeper.signals = Some(SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?);
    keeper.table.restore(Store::at(std::env::var_os("NOTIFY_SOCKET")), sys::take_passed());
    keeper.table.tell_ready();
    keeper.serve()
}

/// Runs the keeper of a state directory: `larder keeper --state DIR`.
///
/// Comes back at once in the calling process, when the keeper's socket accepts connections; the
/// keeper itself goes on in the background, detached from terminal and parent. Must be called before
/// the process has threads. Where a keeper lives already, nothing happens.
pub fn run(state: &Path) -> io::Result<()> {
    let Some(keeper) = Keeper::open(state)? else {
        return Ok(());
    };
    nix::unistd::daemon(false, false)?;
    keeper.serve()
}

/// A keeper that has its lock and its socket.
#[derive(Debug)]
pub struct Keeper {
    listener: OwnedFd,
    socket: std::path::PathBuf,
    table: Table,
    watch: Watch,
    /// Whether the mounts end with the process that is watched.
    ends_mounts: bool,
    /// None: signals end the process as they do.
    signals: Option<SignalFd>,
    /// The mounts stay when a signal ends it.
    keeps_mounts: bool,
    /// Held, never read.
    _lock: File,
}

impl Keeper {
    /// Takes the lock and opens the socket. None where another keeper has them.
    pub fn open(state: &Path) -> io::Result<Option<Self>> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(state)?;
        let lock = OpenOptions::new().create(true).append(true).mode(0o600).open(state.join(LOCK_NAME))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(None),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
        let socket = fs::canonicalize(state)?.join(SOCKET_NAME);
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = sys::listen_at(&socket)?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o600))?;
        let (table, watch) = (Table::new(), Watch::new());
        let (signals, keeps_mounts) = (None, false);
        Ok(Some(Self { listener, socket, table, watch, ends_mounts: false, signals, keeps_mounts, _lock: lock }))
    }

    /// Answers requests until it is told to stop, or its socket was removed and nothing is mounted.
    pub fn serve(mut self) -> io::Result<()> {
        let mount_table = mounts::open_table()?;
        loop {
            let seen = self.wait(mount_table.as_fd())?;
            self.table.forget_gone();
            if seen.signal == Some(Signal::SIGHUP) {
                self.make_way();
            } else if seen.signal.is_some() {
                if !self.keeps_mounts {
                    self.table.unmount_all();
                }
                let _ = fs::remove_file(&self.socket);
                return Ok(());
            }
            if seen.daemon_lost {
                self.watch.lost();
                if self.ends_mounts {
                    self.table.end_all();
                    let _ = fs::remove_file(&self.socket);
                    return Ok(());
                }
            }
            if seen.client && self.answer_one() {
                let _ = fs::remove_file(&self.socket);
                return Ok(());
            }
            if self.table.is_empty() && !self.socket.exists() {
                return Ok(());
            }
            let state = self.socket.parent().unwrap_or(Path::new("/"));
            self.watch.tick(state, !self.table.is_empty());
        }
    }

    /// Starts the program anew in this process: the one that lies at its path now. Where that is none, all stays.
    fn make_way(&self) {
        let mut args = std::env::args_os();
        let (Some(program), Ok(passed)) = (args.next(), self.table.pass_on()) else {
            return;
        };
        let error = sys::replace_by(Command::new(program).args(args), &passed);
        tracing::error!(%error, "the keeper goes on as it is");
    }

    /// Serves one connection; true: it was told to stop, and may.
    fn answer_one(&mut self) -> bool {
        let Ok(client) = sys::accept_from(&self.listener) else {
            return false;
        };
        let Ok(pid) = admit(&client) else {
            return false;
        };
        let Ok((bytes, fds)) = sys::receive_message(client.as_fd(), PACKET_BYTES_MAX) else {
            return false;
        };
        let Ok(request) = serde_json::from_slice::<Request>(&bytes) else {
            // Of a newer version, most likely: to be told from a keeper that died.
            let _ = sys::send_message(client.as_fd(), &unknown(), &[]);
            return false;
        };
        let (answer, fds, stop) = self.table.handle(request.clone(), fds, pid);
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(OwnedFd::as_fd).collect();
        let packet = serde_json::to_vec(&answer).unwrap_or_default();
        let _ = sys::send_message(client.as_fd(), &packet, &borrowed);
        match request {
            Request::Watch { restart, ends_mounts } => {
                self.ends_mounts = ends_mounts;
                self.watch.begin(client, restart);
            }
            Request::Ready => self.watch.ready(),
            Request::Unwatch => self.watch.end(),
            Request::Replace(restart) => self.watch.replace(restart),
            _ => {}
        }
        stop && answer == Answer::Done
    }

    /// Waits for a connection, a change of the mount table, the daemon's end, or what is due.
    fn wait(&self, mount_table: BorrowedFd<'_>) -> io::Result<Seen> {
        let due_ms = self.watch.idle_for(!self.table.is_empty()).map_or(LOOK_INTERVAL_MS, |idle| {
            u16::try_from(idle.as_millis() + 1).unwrap_or(LOOK_INTERVAL_MS).min(LOOK_INTERVAL_MS)
        });
        let events = |fd, flags| PollFd::new(fd, flags);
        let mut fds = vec![events(self.listener.as_fd(), PollFlags::POLLIN), events(mount_table, PollFlags::POLLPRI)];
        // A daemon says nothing more on its connection: whatever happens there is its end.
        fds.extend(self.watch.daemon().map(|daemon| events(daemon, PollFlags::POLLIN)));
        let signals_at = fds.len();
        fds.extend(self.signals.as_ref().map(|signals| events(signals.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::from(due_ms)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let has_event = |at: usize| fds.get(at).and_then(PollFd::any).unwrap_or(false);
        let daemon_lost = signals_at == 3 && has_event(2);
        let (client, is_told) = (has_event(0), has_event(signals_at));
        let said =
            if is_told { self.signals.as_ref().and_then(|signals| signals.read_signal().ok().flatten()) } else { None };
        let signal = said.and_then(|said| Signal::try_from(said.ssi_signo.cast_signed()).ok());
        Ok(Seen { client, daemon_lost, signal })
    }
}

/// The answer to what this keeper does not understand.
fn unknown() -> Vec<u8> {
    let what = "the keeper does not know this request".to_owned();
    serde_json::to_vec(&Answer::Failed { errno: Errno::ENOSYS as i32, what }).unwrap_or_default()
}

/// What the keeper has waited for.
struct Seen {
    client: bool,
    daemon_lost: bool,
    signal: Option<Signal>,
}

/// Lets in root and the keeper's own user; gives the peer's pid.
fn admit(client: &OwnedFd) -> io::Result<i32> {
    let peer = getsockopt(client, sockopt::PeerCredentials)?;
    if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    setsockopt(client, sockopt::ReceiveTimeout, &TimeVal::seconds(CLIENT_TIMEOUT_S))?;
    setsockopt(client, sockopt::SendTimeout, &TimeVal::seconds(CLIENT_TIMEOUT_S))?;
    Ok(peer.pid())
}

#[cfg(test)]
mod tests;
