//! What a service manager holds for the keeper: systemd's file descriptor store (`FileDescriptorStoreMax=`).
//!
//! Keeper and daemon hold the same descriptors, so that either may die. The store is for when both do: systemd stops
//! the daemon's unit itself before it starts the keeper's again, since the one requires the other. The keeper that
//! it starts then finds the descriptors among its own (`LISTEN_FDS`), as does a keeper that another version of the
//! program takes the place of (`SIGHUP`): both are read by [`assemble`].
//!
//! Three descriptors for each mount, told apart by their names; KEY is drawn for the mount, N counts rows:
//!
//! ```text
//! larder-fuse-KEY     the /dev/fuse descriptor
//! larder-slots-KEY    the memory file with the record
//! larder-row-KEY-N    a memory file with the request as JSON
//! ```
//!
//! A row that changes is another file under the next N, put in before the old one goes: so none is ever half
//! written. What is not whole is of no use: the store is told to drop it. Nothing is waited for and no failure fails
//! a mount: without the store the mount lives as long as one of keeper and daemon does.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::wire::{MountRequest, PACKET_BYTES_MAX};
use crate::fs::sys;

/// How every name begins.
const PREFIX: &str = "larder";

/// What is said of a mount beside its descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Row {
    pub request: MountRequest,
    pub detached: bool,
}

/// The names of one mount's descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    key: String,
    row: u64,
}

impl Names {
    /// Draws names that nobody has.
    pub fn draw() -> Self {
        Self { key: uuid::Uuid::new_v4().simple().to_string(), row: 0 }
    }

    fn of(&self, kind: Kind) -> String {
        match kind {
            Kind::Row(number) => format!("{PREFIX}-row-{}-{number}", self.key),
            Kind::Fuse => format!("{PREFIX}-fuse-{}", self.key),
            Kind::Slots => format!("{PREFIX}-slots-{}", self.key),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Fuse,
    Slots,
    Row(u64),
}

fn parse_name(name: &str) -> Option<(Kind, String)> {
    let mut words = name.split('-');
    if words.next()? != PREFIX {
        return None;
    }
    let (kind, key, number) = (words.next()?, words.next()?.to_owned(), words.next());
    match (kind, number) {
        ("fuse", None) => Some((Kind::Fuse, key)),
        ("slots", None) => Some((Kind::Slots, key)),
        ("row", Some(number)) => Some((Kind::Row(number.parse().ok()?), key)),
        _ => None,
    }
}

/// A mount as it was passed to this process.
#[derive(Debug)]
pub(super) struct Stored {
    pub names: Names,
    pub row: Row,
    pub fuse: OwnedFd,
    pub slots: OwnedFd,
}

/// The descriptor store; without a service manager one that takes nothing.
#[derive(Debug, Default)]
pub(super) struct Store {
    /// The manager's socket.
    socket: Option<OsString>,
}

impl Store {
    /// Gives the store of the manager that listens at this socket (`NOTIFY_SOCKET`).
    pub fn at(socket: Option<OsString>) -> Self {
        Self { socket }
    }

    /// Tells the manager that the keeper answers.
    pub fn tell_ready(&self) {
        self.tell("READY=1", &[]);
    }

    /// Puts a mount in.
    pub fn put(&self, names: &Names, row: &Row, fuse: BorrowedFd<'_>, slots: BorrowedFd<'_>) {
        self.put_one(&names.of(Kind::Fuse), fuse);
        self.put_one(&names.of(Kind::Slots), slots);
        self.put_row(names, row);
    }

    /// Puts another row in the place of a mount's row.
    pub fn replace_row(&self, names: &mut Names, row: &Row) {
        let before = names.of(Kind::Row(names.row));
        names.row += 1;
        self.put_row(names, row);
        self.drop_one(&before);
    }

    /// Takes a mount out.
    pub fn remove(&self, names: &Names) {
        for kind in [Kind::Fuse, Kind::Slots, Kind::Row(names.row)] {
            self.drop_one(&names.of(kind));
        }
    }

    fn put_row(&self, names: &Names, row: &Row) {
        if self.socket.is_none() {
            return;
        }
        match write_row(row) {
            Ok(file) => self.put_one(&names.of(Kind::Row(names.row)), file.as_fd()),
            Err(error) => tracing::warn!(%error, "a row is not in the service manager's store"),
        }
    }

    fn put_one(&self, name: &str, fd: BorrowedFd<'_>) {
        self.tell(&format!("FDSTORE=1\nFDNAME={name}"), &[fd]);
    }

    /// Tells the manager to drop what it has under a name.
    pub fn drop_one(&self, name: &str) {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]);
    }

    fn tell(&self, what: &str, fds: &[BorrowedFd<'_>]) {
        let Some(socket) = &self.socket else { return };
        let told = sys::datagrams_to(socket).and_then(|to| sys::send_message(to.as_fd(), what.as_bytes(), fds));
        if let Err(error) = told {
            tracing::warn!(%error, "the service manager was not told: if keeper and daemon die together, so do mounts");
        }
    }
}

fn write_row(row: &Row) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(c"larder-row", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&serde_json::to_vec(row)?)?;
    Ok(file.into())
}

fn read_row(fd: OwnedFd) -> io::Result<Row> {
    let mut file = File::from(fd);
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(PACKET_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// The descriptors of one key, as far as they came.
#[derive(Default)]
struct Parts {
    fuse: Option<OwnedFd>,
    slots: Option<OwnedFd>,
    rows: BTreeMap<u64, OwnedFd>,
}

/// Puts together what was passed. Also gives the names that are of no use any more.
pub(super) fn assemble(passed: Vec<(String, OwnedFd)>) -> (Vec<Stored>, Vec<String>) {
    let mut parts: BTreeMap<String, Parts> = BTreeMap::new();
    for (name, fd) in passed {
        // What somebody else put there is not ours to drop.
        let Some((kind, key)) = parse_name(&name) else { continue };
        let part = parts.entry(key).or_default();
        match kind {
            Kind::Fuse => part.fuse = Some(fd),
            Kind::Slots => part.slots = Some(fd),
            Kind::Row(number) => drop(part.rows.insert(number, fd)),
        }
    }
    let (mut whole, mut useless) = (Vec::new(), Vec::new());
    for (key, mut part) in parts {
        let newest = part.rows.pop_last();
        let names = Names { key, row: newest.as_ref().map_or(0, |(number, _)| *number) };
        useless.extend(part.rows.keys().map(|&number| names.of(Kind::Row(number))));
        let row = newest.and_then(|(_, fd)| read_row(fd).ok());
        match (part.fuse, part.slots, row) {
            (Some(fuse), Some(slots), Some(row)) => whole.push(Stored { names, row, fuse, slots }),
            _ => useless.extend([Kind::Fuse, Kind::Slots, Kind::Row(names.row)].map(|kind| names.of(kind))),
        }
    }
    (whole, useless)
}

/// Gives descriptors for a program that takes this one's place, with the names by which [`assemble`] knows them.
pub(super) fn pass_on<'fds>(
    names: &Names,
    row: &Row,
    fuse: BorrowedFd<'fds>,
    slots: BorrowedFd<'fds>,
) -> io::Result<Vec<(String, OwnedFd)>> {
    Ok(vec![
        (names.of(Kind::Fuse), fuse.try_clone_to_owned()?),
        (names.of(Kind::Slots), slots.try_clone_to_owned()?),
        (names.of(Kind::Row(names.row)), write_row(row)?),
    ])
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn row(note: &str) -> Row {
        let request = MountRequest {
            dir: "/m".into(),
            owner: None,
            source: "xray@v1".into(),
            allow_other: false,
            note: note.to_owned(),
        };
        Row { request, detached: false }
    }

    fn memory() -> OwnedFd {
        memfd_create(c"test", MFdFlags::MFD_CLOEXEC).expect("a memory file")
    }

    /// A manager that keeps what it is given, as systemd does.
    struct Manager {
        socket: UnixDatagram,
        held: Vec<(String, OwnedFd)>,
    }

    impl Manager {
        fn new(dir: &std::path::Path) -> (Self, Store) {
            let path = dir.join("notify");
            let socket = UnixDatagram::bind(&path).expect("binds");
            socket.set_nonblocking(true).expect("does not wait");
            (Self { socket, held: Vec::new() }, Store::at(Some(path.into())))
        }

        fn take(&mut self) {
            while let Ok((bytes, fds)) = sys::receive_message(self.socket.as_fd(), 4096) {
                let text = String::from_utf8(bytes).expect("is text");
                let name = text.split("FDNAME=").nth(1).expect("a name").to_owned();
                if text.starts_with("FDSTORE=1") {
                    self.held.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
                } else {
                    self.held.retain(|(known, _)| *known != name);
                }
            }
        }

        fn pass(&mut self) -> (Vec<Stored>, Vec<String>) {
            self.take();
            assemble(std::mem::take(&mut self.held))
        }
    }

    #[test]
    fn a_mount_that_was_stored_comes_back_with_its_newest_row() {
        let dir = tempfile::tempdir().expect("a directory");
        let (mut manager, store) = Manager::new(dir.path());
        let mut names = Names::draw();
        store.put(&names, &row("first"), memory().as_fd(), memory().as_fd());
        store.replace_row(&mut names, &row("second"));
        let (whole, useless) = manager.pass();
        assert_eq!(useless, [""; 0]);
        let [one] = whole.as_slice() else { panic!("{whole:?}") };
        assert_eq!((&one.names, &one.row), (&names, &row("second")));
    }

    #[test]
    fn a_mount_that_was_removed_does_not_come_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let (mut manager, store) = Manager::new(dir.path());
        let mut names = Names::draw();
        store.put(&names, &row("first"), memory().as_fd(), memory().as_fd());
        store.replace_row(&mut names, &row("second"));
        store.remove(&names);
        let (whole, useless) = manager.pass();
        assert!(whole.is_empty() && useless.is_empty(), "{whole:?} {useless:?}");
    }

    #[test]
    fn what_a_keeper_had_not_stored_whole_is_dropped_and_what_is_not_ours_is_left() {
        let dir = tempfile::tempdir().expect("a directory");
        let (mut manager, store) = Manager::new(dir.path());
        let mut names = Names::draw();
        store.put(&names, &row("first"), memory().as_fd(), memory().as_fd());
        manager.take();
        // Killed between the new row and the end of the old one; and in another mount before its row.
        names.row += 1;
        store.put_row(&names, &row("second"));
        store.put_one("larder-fuse-abc", memory().as_fd());
        store.put_one("connection", memory().as_fd());
        let (whole, mut useless) = manager.pass();
        assert_eq!(whole.iter().map(|one| one.row.request.note.as_str()).collect::<Vec<_>>(), ["second"]);
        useless.sort();
        let mut wanted = vec![Names { row: 0, ..names.clone() }.of(Kind::Row(0)), "larder-fuse-abc".to_owned()];
        wanted.extend(["larder-row-abc-0".to_owned(), "larder-slots-abc".to_owned()]);
        wanted.sort();
        assert_eq!(useless, wanted);
    }

    #[test]
    fn a_program_that_takes_the_place_finds_what_was_passed_on() {
        let names = Names { key: "k1".to_owned(), row: 7 };
        let passed = pass_on(&names, &row("n"), memory().as_fd(), memory().as_fd()).expect("passes");
        let (whole, useless) = assemble(passed);
        assert_eq!(whole.first().map(|one| (&one.names, &one.row)), Some((&names, &row("n"))));
        assert!(useless.is_empty());
    }
}
