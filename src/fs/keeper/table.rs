//! Which mounts the keeper has, and what each request does to them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;

use super::kernel;
use super::mounts;
use super::wire::{Answer, KeptMount, MountId, MountRequest, NOTE_BYTES_MAX, PACKET_BYTES_MAX, Request};

/// How many mounts one keeper makes: each takes two descriptors.
const MOUNTS_MAX: usize = 400;
/// What an answer may take beside its mounts.
const ENVELOPE_BYTES: usize = 1 << 10;
/// An id is the keeper's instance and a number in it: a daemon that remembers an id of a keeper that died
/// never gets another mount for it.
const ID_BITS: u32 = 24;
const INSTANCE_MASK: u64 = (1 << 36) - 1;

#[derive(Debug)]
struct Held {
    request: MountRequest,
    fuse: OwnedFd,
    /// Records of what is open, written by the daemon.
    slots: OwnedFd,
    detached: bool,
    server_pid: i32,
}

/// The mounts by id.
#[derive(Debug)]
pub(super) struct Table {
    mounts: BTreeMap<MountId, Held>,
    last: u64,
    instance: u64,
}

/// An answer, the descriptors that go with it, and whether the keeper is to end.
type Handled = (Answer, Vec<OwnedFd>, bool);

fn failed(error: &io::Error, what: impl std::fmt::Display) -> Handled {
    let errno = error.raw_os_error().unwrap_or(Errno::EIO as i32);
    (Answer::Failed { errno, what: format!("{what}: {error}") }, Vec::new(), false)
}

fn refused(errno: Errno, what: impl std::fmt::Display) -> Handled {
    (Answer::Failed { errno: errno as i32, what: what.to_string() }, Vec::new(), false)
}

fn done() -> Handled {
    (Answer::Done, Vec::new(), false)
}

impl Table {
    /// Makes an empty one, whose instance and ids no keeper before it has used.
    pub fn new() -> Self {
        let instance = (uuid::Uuid::new_v4().as_u64_pair().1 & INSTANCE_MASK) | 1;
        Self { mounts: BTreeMap::new(), last: instance << ID_BITS, instance }
    }

    pub fn is_empty(&self) -> bool {
        self.mounts.is_empty()
    }

    /// Drops the mounts whose connection the kernel has ended.
    pub fn forget_gone(&mut self) {
        self.mounts.retain(|_, held| !mounts::is_gone(&held.fuse));
    }

    /// Unmounts everything; what is in use, lazily.
    pub fn unmount_all(&mut self) {
        let held = self.mounts.values().rev().filter(|held| !held.detached);
        let dirs: Vec<PathBuf> = held.map(|held| held.request.dir.clone()).collect();
        // Images stay: they need nobody.
        for dir in dirs.into_iter().filter(|dir| !mounts::shows_image(dir)) {
            if let (Answer::Failed { .. }, ..) = self.unmount(&dir, false) {
                self.unmount(&dir, true);
            }
        }
    }

    /// Does what a client asks.
    pub fn handle(&mut self, request: Request, fds: Vec<OwnedFd>, pid: i32) -> Handled {
        match request {
            Request::Mount(request) => self.mount(request, pid),
            Request::Adopt(request) => self.adopt(request, fds, pid),
            Request::Watch { .. } | Request::Ready | Request::Unwatch | Request::Replace(_) => done(),
            Request::Attach { id } => match self.mounts.get_mut(&id) {
                Some(held) => {
                    held.server_pid = pid;
                    give(id, held)
                }
                None => refused(Errno::ENOENT, format_args!("there is no mount {id}")),
            },
            Request::List { after } => (self.list(after), Vec::new(), false),
            Request::Unmount { dir, lazy } => self.unmount(&dir, lazy),
            Request::Forget { id } => {
                self.mounts.remove(&id);
                done()
            }
            Request::Note { id, note } => self.note(id, note),
            Request::ReadAhead { id, kib } => self.read_ahead(id, kib),
            Request::Place { dir, instead, owner } => self.place(&fds, &dir, instead, owner),
            Request::Stop if self.mounts.is_empty() => (Answer::Done, Vec::new(), true),
            Request::Stop => refused(Errno::EBUSY, format_args!("{} mounts are left", self.mounts.len())),
        }
    }

    fn mount(&mut self, request: MountRequest, pid: i32) -> Handled {
        if let Err(refusal) = self.check(&request) {
            return refusal;
        }
        let slots = match memfd_create(c"larder-slots", MFdFlags::MFD_CLOEXEC) {
            Ok(fd) => fd,
            Err(errno) => return failed(&errno.into(), "memfd_create"),
        };
        let fuse = match mounts::make(&request) {
            Ok(fd) => fd,
            Err(error) => return failed(&error, request.dir.display()),
        };
        let held = Held { request, fuse, slots, detached: false, server_pid: pid };
        let id = self.next_id();
        let answer = give(id, &held);
        self.mounts.insert(id, held);
        answer
    }

    /// Takes in a mount that another keeper has left to the daemon. One that is there already keeps its id.
    fn adopt(&mut self, request: MountRequest, fds: Vec<OwnedFd>, pid: i32) -> Handled {
        if let Err(refusal) = self.check(&request) {
            return refusal;
        }
        let mut fds = fds.into_iter();
        let (Some(fuse), Some(slots)) = (fds.next(), fds.next()) else {
            return refused(Errno::EINVAL, "a mount comes with two descriptors");
        };
        let known = self.mounts.iter_mut().find(|(_, held)| is_same_file(&held.slots, &slots));
        if let Some((&id, held)) = known {
            held.server_pid = pid;
            return (Answer::Mount(id), Vec::new(), false);
        }
        let id = self.next_id();
        self.mounts.insert(id, Held { request, fuse, slots, detached: false, server_pid: pid });
        (Answer::Mount(id), Vec::new(), false)
    }

    fn check(&self, request: &MountRequest) -> Result<(), Handled> {
        if self.mounts.len() >= MOUNTS_MAX {
            return Err(refused(Errno::EMFILE, format_args!("{MOUNTS_MAX} mounts are the most")));
        }
        if request.note.len() > NOTE_BYTES_MAX || !request.dir.is_absolute() {
            return Err(refused(Errno::EINVAL, "the note is too long or the directory is not absolute"));
        }
        Ok(())
    }

    fn next_id(&mut self) -> MountId {
        self.last += 1;
        MountId(self.last)
    }

    fn list(&self, after: Option<MountId>) -> Answer {
        let first = after.map_or(0, |id| id.0 + 1);
        let mut mounts = Vec::new();
        let mut room = PACKET_BYTES_MAX - ENVELOPE_BYTES;
        for (&id, held) in self.mounts.range(MountId(first)..) {
            let mount = held.describe(id);
            let len = serde_json::to_vec(&mount).map_or(0, |bytes| bytes.len() + 1);
            let Some(left) = room.checked_sub(len) else {
                return Answer::Mounts { mounts, more: true, instance: self.instance };
            };
            room = left;
            mounts.push(mount);
        }
        Answer::Mounts { mounts, more: false, instance: self.instance }
    }

    fn unmount(&mut self, dir: &Path, lazy: bool) -> Handled {
        let line = match mounts::find_ours(dir) {
            Ok(Some(line)) => line,
            Ok(None) => {
                return refused(Errno::EINVAL, format_args!("{} is not a Larder mount", dir.display()));
            }
            Err(error) => return failed(&error, "/proc/self/mountinfo"),
        };
        let was_image = mounts::shows_image(dir);
        if let Err(error) = mounts::unmake(&line, lazy) {
            return failed(&error, dir.display());
        }
        self.forget_gone();
        // None of ours to hold: what is listed for this directory was detached before, or lies beneath.
        if was_image {
            return done();
        }
        // The topmost at a directory is the newest that is not detached.
        let mut left = self.mounts.iter_mut().rev();
        let left = left.find(|(_, held)| held.request.dir == dir && !held.detached);
        match left.map(|(&id, held)| (id, held)) {
            // Nobody can come back to it. The daemon that serves it holds it as long as something is
            // open; without one the kernel ends it now, and whoever waits gets an error.
            Some((id, _)) if lazy => {
                self.mounts.remove(&id);
            }
            // Still mounted elsewhere (a bind mount, another mount namespace).
            Some((_, held)) => held.detached = true,
            None => {}
        }
        done()
    }

    /// Puts a mount of the kernel's own at a directory.
    fn place(&mut self, given: &[OwnedFd], dir: &Path, instead: bool, owner: Option<u32>) -> Handled {
        let [mount] = given else {
            return refused(Errno::EINVAL, "no mount came with the message");
        };
        if instead && !matches!(mounts::is_ours(dir), Ok(true)) {
            return refused(Errno::EINVAL, format_args!("{} is not a Larder mount", dir.display()));
        }
        // A second one would only hide the first, which nobody would find again.
        if !instead && !matches!(mounts::is_ours(dir), Ok(false)) {
            return refused(Errno::EEXIST, format_args!("a Larder mount is at {} already", dir.display()));
        }
        if let Err(error) = kernel::place(mount.as_fd(), dir, instead, owner) {
            return failed(&error, dir.display());
        }
        if instead { self.unmount(dir, true) } else { done() }
    }

    fn note(&mut self, id: MountId, note: String) -> Handled {
        match self.mounts.get_mut(&id) {
            Some(held) if note.len() <= NOTE_BYTES_MAX => {
                held.request.note = note;
                done()
            }
            Some(_) => refused(Errno::EINVAL, "the note is too long"),
            None => refused(Errno::ENOENT, format_args!("there is no mount {id}")),
        }
    }

    fn read_ahead(&self, id: MountId, kib: u32) -> Handled {
        let Some(held) = self.mounts.get(&id) else {
            return refused(Errno::ENOENT, format_args!("there is no mount {id}"));
        };
        let line = match mounts::find(&held.request.dir) {
            Ok(Some(line)) => line,
            Ok(None) => return refused(Errno::ENOENT, "it is not in the mount table"),
            Err(error) => return failed(&error, "/proc/self/mountinfo"),
        };
        match mounts::raise_read_ahead(&line.dev, kib) {
            Ok(()) => done(),
            Err(error) => failed(&error, format_args!("/sys/class/bdi/{}/read_ahead_kb", line.dev)),
        }
    }
}

/// Says whether two descriptors are of the same memory file, and so of the same mount.
fn is_same_file(one: &OwnedFd, other: &OwnedFd) -> bool {
    let file = |fd: &OwnedFd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).ok();
    file(one).is_some_and(|one| Some(one) == file(other))
}

fn give(id: MountId, held: &Held) -> Handled {
    let duplicates = || -> io::Result<Vec<OwnedFd>> { Ok(vec![held.fuse.try_clone()?, held.slots.try_clone()?]) };
    match duplicates() {
        Ok(fds) => (Answer::Mount(id), fds, false),
        Err(error) => failed(&error, "dup"),
    }
}

impl Held {
    fn describe(&self, id: MountId) -> KeptMount {
        let MountRequest { dir, source, note, .. } = &self.request;
        KeptMount {
            id,
            dir: PathBuf::from(dir),
            source: source.clone(),
            note: note.clone(),
            detached: self.detached,
            server_pid: self.server_pid,
        }
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fuse.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> OwnedFd {
        memfd_create(c"test", MFdFlags::MFD_CLOEXEC).expect("a memory file")
    }

    fn adopt(table: &mut Table, fuse: &OwnedFd, slots: &OwnedFd) -> Answer {
        let request = MountRequest {
            dir: "/m".into(),
            owner: None,
            source: "xray@v1".into(),
            allow_other: false,
            note: String::new(),
        };
        let fds = vec![fuse.try_clone().expect("dup"), slots.try_clone().expect("dup")];
        table.handle(Request::Adopt(request), fds, 1).0
    }

    #[test]
    fn a_mount_that_is_given_twice_is_one_mount() {
        let mut table = Table::new();
        let (fuse, slots) = (memory(), memory());
        let first = adopt(&mut table, &fuse, &slots);
        assert_eq!(adopt(&mut table, &fuse, &slots), first);
        assert_eq!(table.mounts.len(), 1);
        assert_ne!(adopt(&mut table, &fuse, &memory()), first, "another mount");
        assert_eq!(table.mounts.len(), 2);
    }

    #[test]
    fn an_id_of_one_keeper_names_no_mount_of_the_next() {
        let (fuse, slots) = (memory(), memory());
        let ids: Vec<Answer> = (0..2).map(|_| adopt(&mut Table::new(), &fuse, &slots)).collect();
        assert_ne!(ids.first(), ids.last());
    }
}
