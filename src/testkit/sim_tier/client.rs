//! One client of the server: what it remembers, what it has open, and the operations.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use nix::libc;
use parking_lot::Mutex;

use super::world::{Body, ROOT};
use super::{Call, Fate, Gate, SimWorld, Verb, World, os};
use crate::store::tier::io::Listed;
use crate::store::tier::{Space, Stat, TierFile, TierIo};

/// How long a client trusts what it remembers of a name.
const DENTRY_NS: i64 = 30_000_000_000;
/// How long it trusts what it knows of an open file.
const ATTRIBUTES_NS: i64 = 3_000_000_000;
/// What an operation takes where nobody says otherwise.
const OPERATION_NS: i64 = 1_000_000;

#[derive(Debug)]
struct Remembered {
    name: Box<str>,
    node: Option<u32>,
    at_ns: i64,
}

/// What a client knows of a file since it last asked.
#[derive(Debug)]
struct Pages {
    data: Arc<Vec<u8>>,
    stat: Stat,
    at_ns: i64,
}

#[derive(Debug, Default)]
struct Client {
    /// By folder.
    names: BTreeMap<u32, Vec<Remembered>>,
    /// Files that are open, and how often.
    open: BTreeMap<u32, u32>,
    pages: BTreeMap<u32, Pages>,
    ops: u64,
    /// From this operation on nothing works: the process is dead.
    kill_at: Option<u64>,
    /// This operation (or, sticky, every one from it on) fails so.
    fail_at: Option<(u64, i32, bool)>,
}

/// One client of the server.
#[derive(Debug, Clone)]
pub(crate) struct SimIo {
    world: SimWorld,
    client: Arc<Mutex<Client>>,
    id: u64,
    gate: Option<Arc<dyn Gate>>,
}

/// An open file.
#[derive(Debug)]
pub(crate) struct SimFile {
    io: SimIo,
    node: u32,
    /// How often the server had been restarted when it was opened.
    restarts: u32,
}

impl SimIo {
    pub(super) fn new(world: SimWorld, id: u64) -> Self {
        Self { world, client: Arc::default(), id, gate: None }
    }

    pub(crate) fn with_schedule<G: Gate + 'static>(mut self, gate: &Arc<G>) -> Self {
        self.gate = Some(Arc::clone(gate) as Arc<dyn Gate>);
        self
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// How many operations this client did.
    pub(crate) fn ops(&self) -> u64 {
        self.client.lock().ops
    }

    /// The process dies before its n-th operation from now.
    pub(crate) fn kill_after(&self, ops: u64) {
        let mut client = self.client.lock();
        client.kill_at = Some(client.ops + ops);
    }

    /// The n-th operation from now fails so, and with `sticky` every one after it.
    pub(crate) fn fail_after(&self, ops: u64, errno: i32, sticky: bool) {
        let mut client = self.client.lock();
        client.fail_at = Some((client.ops + ops, errno, sticky));
    }

    pub(crate) fn heal(&self) {
        let mut client = self.client.lock();
        client.fail_at = None;
        client.kill_at = None;
    }

    /// Takes a turn, counts, advances the clock a little, fails where a test wants it.
    fn op<T>(&self, call: Call<'_>, act: impl FnOnce(&mut World, &mut Client) -> io::Result<T>) -> io::Result<T> {
        let fate = self.gate.as_ref().map_or(Fate::Done { ns: OPERATION_NS }, |gate| gate.before(self.id, &call));
        if fate == Fate::Dead {
            return Err(os(libc::EIO));
        }
        // What a failed call would have given is let go of behind the locks.
        let mut lost = None;
        let mut client = self.client.lock();
        let mut world = self.world.0.lock();
        let at = client.ops;
        client.ops += 1;
        world.now_ns += if let Fate::Done { ns } = fate { ns } else { OPERATION_NS };
        let done = if client.kill_at.is_some_and(|kill| at >= kill) {
            Err(os(libc::EIO))
        } else {
            match (client.fail_at, fate) {
                (Some((fail, errno, sticky)), _) if at == fail || (sticky && at > fail) => Err(os(errno)),
                (_, Fate::Fails { errno, late: false }) => Err(os(errno)),
                (_, Fate::Fails { errno, late: true }) => {
                    lost = Some(act(&mut world, &mut client));
                    Err(os(errno))
                }
                _ => act(&mut world, &mut client),
            }
        };
        if let Some(gate) = &self.gate {
            gate.after(self.id, &call, &mut world, done.as_ref().err().and_then(io::Error::raw_os_error));
        }
        drop((world, client, lost));
        done
    }

    fn opened(&self, node: u32, world: &World, client: &mut Client) -> SimFile {
        *client.open.entry(node).or_insert(0) += 1;
        // Close to open: what was known of it counts only while it is the server's.
        let stat = world.stat(node);
        if client.pages.get(&node).is_some_and(|known| known.stat != stat) {
            client.pages.remove(&node);
        }
        SimFile { io: self.clone(), node, restarts: world.restarts }
    }
}

impl Client {
    fn forget(&mut self, dir: u32) {
        self.names.remove(&dir);
    }
}

/// Looks a name up as a client does: what it remembers counts for a while.
fn lookup(world: &World, client: &mut Client, dir: u32, name: &str) -> io::Result<u32> {
    let known = client.names.entry(dir).or_default();
    let place = known.iter().position(|remembered| *remembered.name == *name);
    if let Some(found) = place.and_then(|place| known.get(place)).filter(|k| world.now_ns - k.at_ns < DENTRY_NS) {
        match found.node {
            None => return Err(os(libc::ENOENT)),
            // A file that lives on under another name is found under the old one; on NFS 4 also one
            // that was removed and that this client has open.
            Some(node) if world.has_name(node) || (!world.stale_when_removed && client.open.contains_key(&node)) => {
                return Ok(node);
            }
            Some(_) => {}
        }
    }
    let node = world.names(dir)?.get(name).copied();
    let now = Remembered { name: name.into(), node, at_ns: world.now_ns };
    match place.and_then(|place| known.get_mut(place)) {
        Some(old) => *old = now,
        None => known.push(now),
    }
    node.ok_or_else(|| os(libc::ENOENT))
}

fn walk(world: &World, client: &mut Client, path: &str) -> io::Result<u32> {
    let mut at = ROOT;
    for part in path.split('/').filter(|part| !part.is_empty()) {
        at = lookup(world, client, at, part)?;
    }
    Ok(at)
}

/// Walks to a folder in which something is to change: one without a name takes nothing.
fn walk_to_change(world: &World, client: &mut Client, path: &str) -> io::Result<u32> {
    let dir = walk(world, client, path)?;
    if world.has_name(dir) { Ok(dir) } else { Err(os(libc::ENOENT)) }
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn one(verb: Verb, path: &str) -> Call<'_> {
    Call { verb, path, to: "" }
}

impl TierIo for SimIo {
    type File = SimFile;

    fn open(&self, path: &str, _write: bool) -> io::Result<SimFile> {
        self.op(one(Verb::Open, path), |world, client| {
            let node = walk(world, client, path)?;
            match world.node(node).body {
                Body::File { .. } => Ok(self.opened(node, world, client)),
                Body::Dir(_) => Err(os(libc::EISDIR)),
            }
        })
    }

    fn create(&self, path: &str) -> io::Result<SimFile> {
        let (dir, name) = split(path);
        self.op(one(Verb::Create, path), |world, client| {
            let dir = walk_to_change(world, client, dir)?;
            if world.names(dir)?.contains_key(name) {
                return Err(os(libc::EEXIST));
            }
            world.room_for(1)?;
            let node = world.add(Body::File { data: Arc::default(), durable: Arc::default() });
            world.change((dir, name, node), None);
            client.forget(dir);
            Ok(self.opened(node, world, client))
        })
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let (dir, name) = split(to);
        self.op(Call { verb: Verb::Link, path: from, to }, |world, client| {
            let node = walk(world, client, from)?;
            let dir = walk_to_change(world, client, dir)?;
            if !world.has_name(node) {
                return Err(os(libc::ENOENT));
            }
            // A name that the client remembers is taken, without asking the server.
            if lookup(world, client, dir, name).is_ok() || world.names(dir)?.contains_key(name) {
                return Err(os(libc::EEXIST));
            }
            world.change((dir, name, node), None);
            client.forget(dir);
            Ok(())
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let ((from_dir, from_name), (to_dir, to_name)) = (split(from), split(to));
        self.op(Call { verb: Verb::Rename, path: from, to }, |world, client| {
            let from_dir = walk(world, client, from_dir)?;
            lookup(world, client, from_dir, from_name)?;
            // The server moves what has the name now, whatever the client remembers.
            let Some(node) = world.names(from_dir)?.get(from_name).copied() else {
                return Err(os(libc::ENOENT));
            };
            let to_dir = walk_to_change(world, client, to_dir)?;
            if world.names(to_dir)?.get(to_name) != Some(&node) {
                world.change((to_dir, to_name, node), Some((from_dir, from_name)));
            }
            client.forget(from_dir);
            client.forget(to_dir);
            Ok(())
        })
    }

    fn unlink(&self, path: &str) -> io::Result<()> {
        let (dir, name) = split(path);
        self.op(one(Verb::Unlink, path), |world, client| {
            let dir = walk(world, client, dir)?;
            lookup(world, client, dir, name)?;
            match world.names(dir)?.get(name).map(|node| &world.node(*node).body) {
                None => return Err(os(libc::ENOENT)),
                Some(Body::Dir(_)) => return Err(os(libc::EISDIR)),
                Some(Body::File { .. }) => {}
            }
            world.clear(dir, name);
            client.forget(dir);
            Ok(())
        })
    }

    fn mkdir(&self, path: &str) -> io::Result<()> {
        let (dir, name) = split(path);
        self.op(one(Verb::Mkdir, path), |world, client| {
            let dir = walk_to_change(world, client, dir)?;
            if world.names(dir)?.contains_key(name) {
                client.forget(dir);
                return Err(os(libc::EEXIST));
            }
            world.room_for(1)?;
            let node = world.add(Body::Dir(BTreeMap::new()));
            world.change((dir, name, node), None);
            client.forget(dir);
            Ok(())
        })
    }

    fn rmdir(&self, path: &str) -> io::Result<()> {
        let (dir, name) = split(path);
        self.op(one(Verb::Rmdir, path), |world, client| {
            let dir = walk(world, client, dir)?;
            let Some(node) = world.names(dir)?.get(name).copied() else {
                return Err(os(libc::ENOENT));
            };
            if !world.names(node)?.is_empty() {
                return Err(os(libc::ENOTEMPTY));
            }
            world.clear(dir, name);
            client.forget(dir);
            Ok(())
        })
    }

    fn list(&self, dir: &str) -> io::Result<Vec<Listed>> {
        self.op(one(Verb::List, dir), |world, client| {
            let dir = walk(world, client, dir)?;
            client.forget(dir);
            let is_dir = |node: &u32| matches!(world.node(*node).body, Body::Dir(_));
            let names = world.names(dir)?.iter();
            Ok(names.map(|(name, node)| Listed { name: name.to_string(), is_dir: is_dir(node) }).collect())
        })
    }

    fn stat(&self, path: &str) -> io::Result<Stat> {
        self.op(one(Verb::Stat, path), |world, client| {
            let node = walk(world, client, path)?;
            Ok(world.stat(node))
        })
    }

    fn touch(&self, path: &str) -> io::Result<Stat> {
        self.op(one(Verb::Touch, path), |world, client| {
            let node = walk(world, client, path)?;
            if world.stat(node).is_dir {
                return Err(os(libc::EISDIR));
            }
            world.touch(node);
            Ok(world.stat(node))
        })
    }

    fn refresh(&self, dir: &str) -> io::Result<()> {
        self.op(one(Verb::Refresh, dir), |world, client| {
            let dir = walk(world, client, dir)?;
            client.forget(dir);
            Ok(())
        })
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.op(one(Verb::SyncDir, dir), |world, client| {
            walk(world, client, dir)?;
            world.sync_names();
            Ok(())
        })
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn space(&self) -> io::Result<Space> {
        self.op(one(Verb::Space, ""), |world, _| {
            let total_bytes = world.capacity.unwrap_or(1 << 40);
            Ok(Space { total_bytes, free_bytes: total_bytes.saturating_sub(world.live_bytes()) })
        })
    }
}

impl SimFile {
    /// The server's number of the file.
    pub(crate) fn node(&self) -> u32 {
        self.node
    }

    /// What a tier never does to a file: makes it empty.
    pub(crate) fn truncate(&self) -> io::Result<()> {
        self.op(Verb::Extend, |world, client| {
            client.pages.remove(&self.node);
            world.truncate(self.node);
            Ok(())
        })
    }

    /// Makes the bytes durable, and no names with them.
    pub(crate) fn sync_data(&self) -> io::Result<()> {
        self.op(Verb::Sync, |world, _| {
            world.sync_file(self.node);
            Ok(())
        })
    }

    fn op<T>(&self, verb: Verb, act: impl FnOnce(&mut World, &mut Client) -> io::Result<T>) -> io::Result<T> {
        self.io.op(one(verb, ""), |world, client| {
            if !world.has_name(self.node) {
                if world.stale_when_removed {
                    return Err(os(libc::ESTALE));
                }
                if world.restarts != self.restarts {
                    return Err(os(libc::EBADF));
                }
            }
            act(world, client)
        })
    }

    /// What the client knows of the file, no older than it may be.
    fn known<'a>(&self, world: &World, client: &'a mut Client) -> io::Result<&'a Pages> {
        let fresh = client.pages.get(&self.node).is_some_and(|known| world.now_ns - known.at_ns < ATTRIBUTES_NS);
        if !fresh {
            let data = world.data(self.node).ok_or_else(|| os(libc::ESTALE))?;
            let now = Pages { data, stat: world.stat(self.node), at_ns: world.now_ns };
            client.pages.insert(self.node, now);
        }
        client.pages.get(&self.node).ok_or_else(|| os(libc::ESTALE))
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut client = self.io.client.lock();
        if let Some(count) = client.open.get_mut(&self.node) {
            *count -= 1;
            if *count == 0 {
                client.open.remove(&self.node);
            }
        }
    }
}

impl TierFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.op(Verb::Read, |world, client| {
            let known = self.known(world, client)?;
            let rest = known.data.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
            let len = rest.len().min(buf.len());
            buf[..len].copy_from_slice(&rest[..len]);
            Ok(len)
        })
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.op(Verb::Write, |world, client| {
            client.pages.remove(&self.node);
            world.write(self.node, bytes, offset, None)
        })
    }

    fn extend(&self, len_bytes: u64) -> io::Result<()> {
        self.op(Verb::Extend, |world, client| {
            client.pages.remove(&self.node);
            let len = usize::try_from(len_bytes).expect("small");
            if world.bytes(self.node).len() >= len {
                return Ok(());
            }
            world.write(self.node, &[], 0, Some(len))
        })
    }

    fn stat(&self) -> io::Result<Stat> {
        self.op(Verb::StatOpen, |world, client| Ok(self.known(world, client)?.stat))
    }

    fn sync(&self) -> io::Result<()> {
        self.op(Verb::Sync, |world, _| {
            world.sync_file(self.node);
            world.sync_names();
            Ok(())
        })
    }
}
