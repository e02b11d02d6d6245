//! The system calls that have no safe wrapper: sockets that carry file descriptors, one descriptor in
//! the place of another, descriptors that a process is started with, and the ioctl that closes backing files. The only `unsafe` of the mounted view, but for one line in `fuse.rs`.
//!
//! Sockets are unix SEQPACKET: one message is one packet, descriptors travel with it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    connect, listen, recvmsg, sendmsg, setsockopt, socket, socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// How many descriptors one message carries at most.
const FDS_MAX: usize = 4;
/// The number of the first descriptor that systemd passes.
const PASSED_FIRST: RawFd = 3;
/// The variable in which one program tells the next one what it leaves to it.
const PASSED_NAME: &str = "KEEPER_PASSED";
/// How long a service manager may take to read what it is told.
const MANAGER_TIMEOUT_S: i64 = 2;

/// Opens the directory of a socket, so that its name fits into a socket address however long the
/// directory's path is.
fn short_path(path: &Path) -> io::Result<(File, PathBuf)> {
    let parent = path.parent().unwrap_or_else(|| Path::new("."));
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let dir = File::open(parent)?;
    let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    Ok((dir, short))
}

fn seqpacket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
}

/// Makes two sockets that are connected to each other.
pub(crate) fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Makes `number`, which is open in this process, another name of `file`.
pub(crate) fn put_over(number: RawFd, file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both are open descriptors; what stood under the number is closed by the kernel in the same
    // step, and whoever owns the number goes on owning it.
    match unsafe { libc::dup3(file.as_raw_fd(), number, libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Listens on a new socket at `path`, which must not exist.
pub(crate) fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let (_dir, short) = short_path(path)?;
    let fd = seqpacket()?;
    bind(fd.as_raw_fd(), &UnixAddr::new(&short)?)?;
    listen(&fd, Backlog::new(64)?)?;
    Ok(fd)
}

/// Connects to the socket at `path`.
pub(crate) fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let (_dir, short) = short_path(path)?;
    let fd = seqpacket()?;
    connect(fd.as_raw_fd(), &UnixAddr::new(&short)?)?;
    Ok(fd)
}

/// Connects to the datagram socket of a service manager; a name that begins with `@` is an abstract one.
pub(crate) fn datagrams_to(name: &OsStr) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(MANAGER_TIMEOUT_S))?;
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => UnixAddr::new_abstract(name)?,
        None => UnixAddr::new(name)?,
    };
    connect(fd.as_raw_fd(), &address)?;
    Ok(fd)
}

/// Takes the descriptors that were passed to this process, with their names: by systemd (`LISTEN_PID`, `LISTEN_FDS`,
/// `LISTEN_FDNAMES`), or by the program that was here before ([`replace_by`]). A second call gives none.
pub(crate) fn take_passed() -> Vec<(String, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Vec::new();
    }
    let var = |name: &str| std::env::var(name).unwrap_or_default();
    let pid = std::process::id().to_string();
    let mut numbers = Vec::new();
    if var("LISTEN_PID") == pid {
        let (count, names) = (var("LISTEN_FDS").parse().unwrap_or(0), var("LISTEN_FDNAMES"));
        numbers.extend(names.split(':').map(str::to_owned).zip(PASSED_FIRST..).take(count));
    }
    numbers.extend(parse_passed(&var(PASSED_NAME), &pid));
    let passed = numbers.into_iter().filter_map(|(name, raw)| {
        // SAFETY: the number is only looked at; one that is not open gives an error.
        (unsafe { libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) } == 0).then(|| (name, own(raw)))
    });
    passed.collect()
}

/// Reads `PID NAME=NUMBER NAME=NUMBER ...`; another process's is none.
fn parse_passed(text: &str, pid: &str) -> Vec<(String, RawFd)> {
    let mut words = text.split(' ');
    if words.next() != Some(pid) {
        return Vec::new();
    }
    let pairs = words.filter_map(|word| word.split_once('='));
    pairs.filter_map(|(name, number)| Some((name.to_owned(), number.parse().ok()?))).collect()
}

/// Puts another program in this one's place, which finds the descriptors by [`take_passed`]. Comes back only where
/// that failed; then nothing has changed.
pub(crate) fn replace_by(command: &mut Command, passed: &[(String, OwnedFd)]) -> io::Error {
    let set = |flags: FdFlag| {
        passed.iter().try_for_each(|(_, fd)| fcntl(fd, FcntlArg::F_SETFD(flags)).map(drop)).map_err(io::Error::from)
    };
    if let Err(error) = set(FdFlag::empty()) {
        return error;
    }
    let mut words = vec![std::process::id().to_string()];
    words.extend(passed.iter().map(|(name, fd)| format!("{name}={}", fd.as_raw_fd())));
    // What systemd has passed to this process bears other numbers by now.
    for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        command.env_remove(name);
    }
    let error = command.env(PASSED_NAME, words.join(" ")).exec();
    match set(FdFlag::FD_CLOEXEC) {
        Ok(()) => error,
        Err(second) => second,
    }
}

/// Takes a new descriptor number into ownership.
fn own(raw: RawFd) -> OwnedFd {
    // SAFETY: callers pass a number that the kernel has just created for this process and that
    // nobody else knows, so this is its only owner.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// Accepts a connection.
pub(crate) fn accept_from(listener: &OwnedFd) -> io::Result<OwnedFd> {
    Ok(own(accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?))
}

/// Sends one message, with descriptors.
pub(crate) fn send_message(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let iov = [IoSlice::new(bytes)];
    loop {
        match sendmsg::<UnixAddr>(socket.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives one message of at most `len_max` bytes with its descriptors. Empty: the peer is gone.
pub(crate) fn receive_message(socket: BorrowedFd<'_>, len_max: usize) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; len_max];
    let mut space = nix::cmsg_space!([RawFd; FDS_MAX]);
    let (len, raw, flags) = loop {
        let mut iov = [IoSliceMut::new(&mut bytes)];
        match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => {
                let mut raw = Vec::new();
                for control in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(fds) = control {
                        raw.extend(fds);
                    }
                }
                break (message.bytes, raw, message.flags);
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    let fds = raw.into_iter().map(own).collect();
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is longer than expected"));
    }
    bytes.truncate(len);
    Ok((bytes, fds))
}

/// Ends this process at once and well, whatever its threads do: nothing is run at the exit that one of them may still use.
pub(crate) fn exit_now() -> ! {
    // SAFETY: no memory is touched; the kernel ends all threads.
    unsafe { libc::_exit(0) }
}

mod raw {
    nix::ioctl_write_ptr!(backing_close, 229, 2, u32);
}

/// Closes a backing id. ENOENT where the kernel does not know it.
pub(crate) fn backing_close(fuse: &impl AsFd, id: u32) -> io::Result<()> {
    // SAFETY: the ioctl reads four bytes at the pointer, which points to a live u32.
    unsafe { raw::backing_close(fuse.as_fd().as_raw_fd(), &raw const id) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_passed_to_another_process_is_not_taken() {
        assert_eq!(parse_passed("12 a=3 b=77", "12"), [("a".to_owned(), 3), ("b".to_owned(), 77)]);
        assert_eq!(parse_passed("12 a=3", "13"), []);
        assert_eq!(parse_passed("", "13"), []);
        assert_eq!(parse_passed("12 a b=x c=5", "12"), [("c".to_owned(), 5)]);
    }
}
