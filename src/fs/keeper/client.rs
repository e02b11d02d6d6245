//! What the daemon calls: one connection for each request, so that nothing has to be kept in step.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::fs::sys;

use super::SOCKET_NAME;
use super::wire::{Answer, KeptMount, MountId, MountRequest, PACKET_BYTES_MAX, Request, Restart};

/// How long an answer may take: a mount may have to wait for a slow directory.
const ANSWER_TIMEOUT_S: i64 = 30;

/// Why the keeper did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// There is no keeper, or it did not answer in time.
    #[error("the keeper at {socket} does not answer; `larder doctor` says why")]
    Unreachable {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The keeper could not be started.
    #[error("cannot start the keeper ({exe} keeper --state {state}): {why}")]
    Start { exe: PathBuf, state: PathBuf, why: String },
    /// Somebody still uses the mount.
    #[error("{dir} is in use; close what is open there (`lsof {dir}` shows it), or unmount with --force")]
    Busy { dir: PathBuf },
    /// The keeper refused or failed.
    #[error("{what}")]
    Refused { errno: i32, what: String },
    /// The keeper speaks another protocol: it is of another version.
    #[error(
        "the keeper at {socket} is of another version; unmount all, then end its process (`fuser {socket}` shows it)"
    )]
    Protocol { socket: PathBuf },
}

impl KeeperError {
    /// Says that there is no keeper; any other error may come from one that lives.
    pub fn is_absent(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        matches!(self, Self::Unreachable { source, .. } if matches!(source.kind(), NotFound | ConnectionRefused))
    }
}

/// The descriptors of a mount.
#[derive(Debug)]
pub struct MountFds {
    pub id: MountId,
    /// A duplicate of the keeper's /dev/fuse descriptor.
    pub fuse: OwnedFd,
    /// A duplicate of the memory file for the records of what is open.
    pub slots: OwnedFd,
}

/// A daemon's connection to the keeper that watches it. The keeper takes its end for the daemon's.
#[derive(Debug)]
pub struct Watching {
    connection: OwnedFd,
}

impl Watching {
    /// Waits until the keeper is gone.
    pub fn wait(&self) {
        loop {
            match sys::receive_message(self.connection.as_fd(), 64) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => return,
            }
        }
    }
}

/// A keeper, by its socket.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    /// Of the process that answered first.
    instance: u64,
}

impl Client {
    /// Finds the keeper of a state directory; an error where none answers.
    pub fn connect(state: &Path) -> Result<Self, KeeperError> {
        let mut client = Self { socket: state.join(SOCKET_NAME), instance: 0 };
        client.instance = client.list_all()?.1;
        Ok(client)
    }

    /// Finds the keeper of a state directory, or starts one: `exe keeper --state DIR`.
    pub fn start_or_connect(state: &Path, exe: &Path) -> Result<Self, KeeperError> {
        if let Ok(client) = Self::connect(state) {
            return Ok(client);
        }
        let failed = |why: String| KeeperError::Start { exe: exe.to_owned(), state: state.to_owned(), why };
        // It answers when its socket accepts; the keeper itself is its detached child.
        let output = Command::new(exe)
            .args(["keeper", "--state"])
            .arg(state)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        Self::connect(state)
    }

    /// Makes a mount.
    pub fn mount(&self, request: MountRequest) -> Result<MountFds, KeeperError> {
        self.fds(&Request::Mount(request))
    }

    /// Gives the descriptors of a mount again: for a daemon that takes over.
    pub fn attach(&self, id: MountId) -> Result<MountFds, KeeperError> {
        self.fds(&Request::Attach { id })
    }

    /// Gives a mount to a keeper that does not have it: its own was killed.
    pub fn adopt(&self, request: MountRequest, fuse: &OwnedFd, slots: &OwnedFd) -> Result<MountId, KeeperError> {
        match self.ask_with(&Request::Adopt(request), &[fuse.as_fd(), slots.as_fd()])? {
            (Answer::Mount(id), _) => Ok(id),
            _ => Err(self.protocol()),
        }
    }

    /// Lets the keeper watch this process: when it dies, the keeper starts `restart`.
    pub fn watch(&self, restart: Option<Restart>) -> Result<Watching, KeeperError> {
        self.be_watched(&Request::Watch { restart, ends_mounts: false })
    }

    /// Lets the keeper watch this process: when it dies, the keeper takes its mounts away and ends.
    pub fn watch_to_the_end(&self) -> Result<Watching, KeeperError> {
        self.be_watched(&Request::Watch { restart: None, ends_mounts: true })
    }

    fn be_watched(&self, request: &Request) -> Result<Watching, KeeperError> {
        let (bytes, _, connection) = self
            .exchange(request, &[])
            .map_err(|source| KeeperError::Unreachable { socket: self.socket.clone(), source })?;
        match serde_json::from_slice(&bytes) {
            Ok(Answer::Done) => Ok(Watching { connection }),
            _ => Err(self.protocol()),
        }
    }

    /// Tells the keeper that this process serves its mounts.
    pub fn ready(&self) -> Result<(), KeeperError> {
        self.done(&Request::Ready)
    }

    /// Tells the keeper that this process will end, and that no other one is to be started.
    pub fn unwatch(&self) -> Result<(), KeeperError> {
        self.done(&Request::Unwatch)
    }

    /// Tells the keeper what to start when this process ends: another daemon, for an upgrade.
    pub fn replace(&self, restart: Restart) -> Result<(), KeeperError> {
        self.done(&Request::Replace(restart))
    }

    /// Says whether the keeper that was found answers: not one that was started since.
    pub fn is_same(&self) -> bool {
        self.list_all().is_ok_and(|(_, instance)| instance == self.instance)
    }

    /// Lists the keeper's mounts, by id.
    pub fn list(&self) -> Result<Vec<KeptMount>, KeeperError> {
        Ok(self.list_all()?.0)
    }

    fn list_all(&self) -> Result<(Vec<KeptMount>, u64), KeeperError> {
        let mut all: Vec<KeptMount> = Vec::new();
        loop {
            let after = all.last().map(|mount| mount.id);
            match self.ask(&Request::List { after })? {
                (Answer::Mounts { mounts, more, instance }, _) => {
                    let ends = !more || mounts.is_empty();
                    all.extend(mounts);
                    if ends {
                        return Ok((all, instance));
                    }
                }
                _ => return Err(self.protocol()),
            }
        }
    }

    /// Unmounts what Larder has mounted at `dir`, also where its keeper or daemon is gone. Lazily: at
    /// once, whoever uses it.
    pub fn unmount(&self, dir: &Path, lazy: bool) -> Result<(), KeeperError> {
        let asked = Request::Unmount { dir: dir.to_owned(), lazy };
        self.done(&asked).map_err(|error| match error {
            KeeperError::Refused { errno, .. } if errno == Errno::EBUSY as i32 => {
                KeeperError::Busy { dir: dir.to_owned() }
            }
            other => other,
        })
    }

    /// Has the keeper let go of a mount, whatever stands at its directory now.
    pub fn forget(&self, id: MountId) -> Result<(), KeeperError> {
        self.done(&Request::Forget { id })
    }

    /// Puts a mount of the kernel's own at a directory; `instead`: in the place of our mount there, which
    /// goes when nothing of it is open any more.
    /// `owner`: whose the directory has to be.
    pub fn place(&self, mount: &OwnedFd, dir: &Path, instead: bool, owner: Option<u32>) -> Result<(), KeeperError> {
        match self.ask_with(&Request::Place { dir: dir.to_owned(), instead, owner }, &[mount.as_fd()]) {
            Ok((Answer::Done, _)) => Ok(()),
            Ok(_) => Err(self.protocol()),
            // A keeper of before there was this request hangs up.
            Err(KeeperError::Unreachable { source, .. }) if source.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.protocol())
            }
            Err(error) => Err(error),
        }
    }

    /// Shows the mount of ours at `from` at another directory too.
    pub fn bind(&self, from: &Path, dir: &Path) -> Result<(), KeeperError> {
        self.done(&Request::Bind { from: from.to_owned(), dir: dir.to_owned() })
    }

    /// Replaces the note of a mount.
    pub fn set_note(&self, id: MountId, note: &str) -> Result<(), KeeperError> {
        self.done(&Request::Note { id, note: note.to_owned() })
    }

    /// Raises the kernel's read-ahead of a mount that is being served. Needs root.
    pub fn raise_read_ahead(&self, id: MountId, kib: u32) -> Result<(), KeeperError> {
        self.done(&Request::ReadAhead { id, kib })
    }

    /// Ends the keeper. Refused while it has mounts.
    pub fn stop(&self) -> Result<(), KeeperError> {
        self.done(&Request::Stop)
    }

    fn protocol(&self) -> KeeperError {
        KeeperError::Protocol { socket: self.socket.clone() }
    }

    fn done(&self, request: &Request) -> Result<(), KeeperError> {
        match self.ask(request)? {
            (Answer::Done, _) => Ok(()),
            _ => Err(self.protocol()),
        }
    }

    fn fds(&self, request: &Request) -> Result<MountFds, KeeperError> {
        let (answer, fds) = self.ask(request)?;
        let mut fds = fds.into_iter();
        match (answer, fds.next(), fds.next()) {
            (Answer::Mount(id), Some(fuse), Some(slots)) => Ok(MountFds { id, fuse, slots }),
            _ => Err(self.protocol()),
        }
    }

    fn ask(&self, request: &Request) -> Result<(Answer, Vec<OwnedFd>), KeeperError> {
        self.ask_with(request, &[])
    }

    fn ask_with(&self, request: &Request, given: &[BorrowedFd<'_>]) -> Result<(Answer, Vec<OwnedFd>), KeeperError> {
        let (bytes, fds, _) = self
            .exchange(request, given)
            .map_err(|source| KeeperError::Unreachable { socket: self.socket.clone(), source })?;
        match serde_json::from_slice(&bytes) {
            Ok(Answer::Failed { errno, .. }) if errno == Errno::ENOSYS as i32 => Err(self.protocol()),
            Ok(Answer::Failed { errno, what }) => Err(KeeperError::Refused { errno, what }),
            Ok(answer) => Ok((answer, fds)),
            Err(_) => Err(self.protocol()),
        }
    }

    fn exchange(&self, request: &Request, given: &[BorrowedFd<'_>]) -> io::Result<(Vec<u8>, Vec<OwnedFd>, OwnedFd)> {
        let connection = sys::connect_to(&self.socket)?;
        setsockopt(&connection, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT_S))?;
        let packet = serde_json::to_vec(request)?;
        if packet.len() > PACKET_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message is too long"));
        }
        sys::send_message(connection.as_fd(), &packet, given)?;
        let (bytes, fds) = sys::receive_message(connection.as_fd(), PACKET_BYTES_MAX)?;
        if bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((bytes, fds, connection))
    }
}
