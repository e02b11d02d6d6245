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
use super::stored::{self, Names, Row, Store};
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
    row: Row,
    fuse: OwnedFd,
    /// Records of what is open, written by the daemon.
    slots: OwnedFd,
    server_pid: i32,
    /// Of its descriptors in the store.
    names: Names,
}

/// The mounts by id.
#[derive(Debug)]
pub(super) struct Table {
    mounts: BTreeMap<MountId, Held>,
    last: u64,
    instance: u64,
    store: Store,
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
        Self { mounts: BTreeMap::new(), last: instance << ID_BITS, instance, store: Store::default() }
    }

    /// Has a service manager hold the mounts as well, and takes in those that were passed to this process.
    pub fn restore(&mut self, store: Store, passed: Vec<(String, OwnedFd)>) {
        self.store = store;
        let (whole, useless) = stored::assemble(passed);
        useless.iter().for_each(|name| self.store.drop_one(name));
        for stored in whole {
            let id = self.next_id();
            let stored::Stored { names, row, fuse, slots } = stored;
            self.mounts.insert(id, Held { row, fuse, slots, server_pid: 0, names });
        }
        self.forget_gone();
    }

    /// Tells a service manager that who asks is answered.
    pub fn tell_ready(&self) {
        self.store.tell_ready();
    }

    /// Gives what a keeper needs that takes this one's place.
    pub fn pass_on(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        let mut passed = Vec::new();
        for held in self.mounts.values() {
            passed.extend(stored::pass_on(&held.names, &held.row, held.fuse.as_fd(), held.slots.as_fd())?);
        }
        Ok(passed)
    }

    pub fn is_empty(&self) -> bool {
        self.mounts.is_empty()
    }

    /// Drops the mounts whose connection the kernel has ended.
    pub fn forget_gone(&mut self) {
        for (_, held) in self.mounts.extract_if(.., |_, held| mounts::is_gone(&held.fuse)) {
            self.store.remove(&held.names);
        }
    }

    /// Unmounts everything; what is in use, lazily.
    pub fn unmount_all(&mut self) {
        let held = self.mounts.values().rev().filter(|held| !held.row.detached);
        let dirs: Vec<PathBuf> = held.map(|held| held.row.request.dir.clone()).collect();
        // Images stay: they need nobody.
        for dir in dirs.into_iter().filter(|dir| !mounts::shows_image(dir)) {
            if let (Answer::Failed { .. }, ..) = self.unmount(&dir, false) {
                self.unmount(&dir, true);
            }
        }
    }

    /// Takes everything away of which nobody answers any more: who waits gets an error.
    pub fn end_all(&mut self) {
        self.unmount_all();
        let ids: Vec<MountId> = self.mounts.keys().copied().collect();
        ids.into_iter().for_each(|id| self.remove(id));
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
                self.remove(id);
                done()
            }
            Request::Note { id, note } => self.note(id, note),
            Request::ReadAhead { id, kib } => self.read_ahead(id, kib),
            Request::Place { dir, instead, owner } => self.place(&fds, &dir, instead, owner),
            Request::Bind { from, dir } => bind(&from, &dir),
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
        let id = self.insert(request, fuse, slots, pid);
        match self.mounts.get(&id) {
            Some(held) => give(id, held),
            None => refused(Errno::ENOENT, format_args!("there is no mount {id}")),
        }
    }

    fn insert(&mut self, request: MountRequest, fuse: OwnedFd, slots: OwnedFd, pid: i32) -> MountId {
        let id = self.next_id();
        let row = Row { request, detached: false };
        let held = Held { row, fuse, slots, server_pid: pid, names: Names::draw() };
        self.store.put(&held.names, &held.row, held.fuse.as_fd(), held.slots.as_fd());
        self.mounts.insert(id, held);
        id
    }

    fn remove(&mut self, id: MountId) {
        if let Some(held) = self.mounts.remove(&id) {
            self.store.remove(&held.names);
        }
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
        (Answer::Mount(self.insert(request, fuse, slots, pid)), Vec::new(), false)
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
        let left = left.find(|(_, held)| held.row.request.dir == dir && !held.row.detached);
        match left.map(|(&id, held)| (id, held)) {
            // Nobody can come back to it. The daemon that serves it holds it as long as something is
            // open; without one the kernel ends it now, and whoever waits gets an error.
            Some((id, _)) if lazy => self.remove(id),
            // Still mounted elsewhere (a bind mount, another mount namespace).
            Some((_, held)) => {
                held.row.detached = true;
                self.store.replace_row(&mut held.names, &held.row);
            }
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
                held.row.request.note = note;
                self.store.replace_row(&mut held.names, &held.row);
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
        let line = match mounts::find(&held.row.request.dir) {
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

/// Shows a mount of ours at another directory. Nothing that a file system would have to answer is asked: the daemon
/// that serves the mount may wait for this keeper.
fn bind(from: &Path, dir: &Path) -> Handled {
    match (mounts::is_ours(from), mounts::is_ours(dir)) {
        (Ok(true), Ok(false)) => {}
        (Ok(false), _) => return refused(Errno::EINVAL, format_args!("{} is not a Larder mount", from.display())),
        (_, Ok(true)) => {
            return refused(Errno::EEXIST, format_args!("a Larder mount is at {} already", dir.display()));
        }
        (Err(error), _) | (_, Err(error)) => return failed(&error, "/proc/self/mountinfo"),
    }
    match mounts::bind(from, dir) {
        Ok(()) => done(),
        Err(error) => failed(&error, dir.display()),
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
        let MountRequest { dir, source, note, .. } = &self.row.request;
        KeptMount {
            id,
            dir: PathBuf::from(dir),
            source: source.clone(),
            note: note.clone(),
            detached: self.row.detached,
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
