//! A file system in memory that behaves like an NFS server with several clients, and that can crash.
//!
//! * [`SimWorld`]: the server: names, files, its clock, its capacity. [`SimWorld::crash`] gives what a
//!   power cut leaves: names as of any point since the last sync, unsynced bytes lost or torn.
//! * [`SimIo`]: one client: remembers failed lookups (and names whose file lives on elsewhere) for 30 s
//!   until it refreshes the folder; can be killed or fail at its n-th operation.
//! * [`Schedule`]: two clients on two threads take turns operation by operation, as a seed or a list
//!   of switches says.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::Arc;

use nix::libc;
use parking_lot::{Condvar, Mutex};

use crate::store::tier::io::Listed;
use crate::store::tier::{Clock, Space, Stat, TierFile, TierIo};

/// How long a client trusts what it remembers of a name.
const DENTRY_MS: u64 = 30_000;
const ROOT: u64 = 1;

/// A small generator: the same seed, the same run.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit.max(1)
    }
}

#[derive(Debug, Clone)]
enum Node {
    Dir { names: BTreeMap<String, u64>, mtime_ns: i64 },
    File { data: Vec<u8>, durable: Vec<u8>, mtime_ns: i64 },
}

/// A change of a name, as the server's journal has it.
#[derive(Debug, Clone)]
struct NameChange {
    set: Vec<(u64, String, u64)>,
    cleared: Vec<(u64, String)>,
}

#[derive(Debug, Default)]
struct World {
    nodes: HashMap<u64, Node>,
    next_node: u64,
    /// How many names each file and folder has.
    links: HashMap<u64, u32>,
    now_ns: i64,
    /// Names that are durable, and what happened since.
    durable_names: HashMap<u64, BTreeMap<String, u64>>,
    journal: Vec<NameChange>,
    capacity: Option<u64>,
    /// NFSv3: an open file that was removed is gone.
    stale_when_removed: bool,
    clients: u64,
}

/// The server.
#[derive(Debug, Clone)]
pub(crate) struct SimWorld(Arc<Mutex<World>>);

#[derive(Debug, Clone, Copy)]
struct Remembered {
    node: Option<u64>,
    at_ns: i64,
}

#[derive(Debug, Default)]
struct Client {
    names: HashMap<(u64, String), Remembered>,
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
    schedule: Option<Arc<Schedule>>,
}

/// An open file.
#[derive(Debug)]
pub(crate) struct SimFile {
    io: SimIo,
    node: u64,
}

fn os(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Default for SimWorld {
    fn default() -> Self {
        let mut world = World { next_node: ROOT + 1, now_ns: 1_000_000_000_000_000_000, ..World::default() };
        world.nodes.insert(ROOT, Node::Dir { names: BTreeMap::new(), mtime_ns: world.now_ns });
        world.durable_names.insert(ROOT, BTreeMap::new());
        Self(Arc::new(Mutex::new(world)))
    }
}

impl SimWorld {
    /// Mounts it once more.
    pub(crate) fn client(&self) -> SimIo {
        let mut world = self.0.lock();
        world.clients += 1;
        SimIo { world: self.clone(), client: Arc::default(), id: world.clients, schedule: None }
    }

    /// A second server with the same files, and no clients.
    pub(crate) fn fork(&self) -> Self {
        let world = self.0.lock();
        let copy = World {
            nodes: world.nodes.clone(),
            links: world.links.clone(),
            durable_names: world.durable_names.clone(),
            journal: world.journal.clone(),
            ..*world
        };
        Self(Arc::new(Mutex::new(copy)))
    }

    pub(crate) fn advance_ms(&self, ms: u64) {
        self.0.lock().now_ns += i64::try_from(ms).expect("tests advance by little") * 1_000_000;
    }

    pub(crate) fn set_capacity(&self, bytes: Option<u64>) {
        self.0.lock().capacity = bytes;
    }

    pub(crate) fn set_stale_when_removed(&self, stale: bool) {
        self.0.lock().stale_when_removed = stale;
    }

    /// Every file: path, bytes.
    pub(crate) fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let world = self.0.lock();
        let mut found = BTreeMap::new();
        let mut dirs = vec![(ROOT, String::new())];
        while let Some((dir, at)) = dirs.pop() {
            let Some(Node::Dir { names, .. }) = world.nodes.get(&dir) else {
                continue;
            };
            for (name, node) in names {
                let path = if at.is_empty() { name.clone() } else { format!("{at}/{name}") };
                match world.nodes.get(node) {
                    Some(Node::Dir { .. }) => dirs.push((*node, path)),
                    Some(Node::File { data, .. }) => drop(found.insert(path, data.clone())),
                    None => {}
                }
            }
        }
        found
    }

    /// Changes bytes behind everybody's back.
    pub(crate) fn damage(&self, path: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut world = self.0.lock();
        let mut at = ROOT;
        for part in path.split('/') {
            at = match world.nodes.get(&at) {
                Some(Node::Dir { names, .. }) => *names.get(part).expect("the path to damage exists"),
                _ => panic!("{path}: no folder"),
            };
        }
        match world.nodes.get_mut(&at) {
            Some(Node::File { data, .. }) => change(data),
            _ => panic!("{path}: not a file"),
        }
    }

    /// A power cut: names are as of some moment since they were last made durable; bytes that were
    /// not synced are lost, torn or there. Every client is dead.
    pub(crate) fn crash(&self, rng: &mut Rng) {
        let mut world = self.0.lock();
        let keep = rng.below(world.journal.len() as u64 + 1);
        let mut names = world.durable_names.clone();
        for change in world.journal.iter().take(usize::try_from(keep).unwrap_or(0)) {
            apply(&mut names, change);
        }
        for node in world.nodes.values_mut() {
            if let Node::File { data, durable, .. } = node {
                *data = torn(data, durable, rng);
                *durable = data.clone();
            }
        }
        for (dir, names) in &names {
            let now_ns = world.now_ns;
            if let Some(Node::Dir { names: current, .. }) = world.nodes.get_mut(dir) {
                *current = names.clone();
            } else {
                world.nodes.insert(*dir, Node::Dir { names: names.clone(), mtime_ns: now_ns });
            }
        }
        world.durable_names = names;
        world.count_links();
        world.journal.clear();
    }
}

/// What of unsynced bytes a crash leaves: block by block, the old, the new, or zeros.
fn torn(data: &[u8], durable: &[u8], rng: &mut Rng) -> Vec<u8> {
    if data == durable {
        return data.to_vec();
    }
    let len = match rng.below(3) {
        0 => durable.len(),
        1 => data.len(),
        _ => durable.len().max(rng.below(data.len() as u64 + 1) as usize),
    };
    let mut left = vec![0; len];
    for (at, byte) in left.iter_mut().enumerate() {
        let old = durable.get(at).copied().unwrap_or(0);
        // Half of the blocks of 16 bytes arrived.
        let arrived = (at / 16 + len).is_multiple_of(2) || rng.0.is_multiple_of(3);
        *byte = if arrived { data.get(at).copied().unwrap_or(old) } else { old };
    }
    left
}

fn apply(names: &mut HashMap<u64, BTreeMap<String, u64>>, change: &NameChange) {
    for (dir, name) in &change.cleared {
        if let Some(dir) = names.get_mut(dir) {
            dir.remove(name);
        }
    }
    for (dir, name, node) in &change.set {
        names.entry(*dir).or_default().insert(name.clone(), *node);
    }
}

impl World {
    fn used(&self) -> u64 {
        let mut seen = BTreeSet::new();
        for node in self.nodes.values() {
            if let Node::Dir { names, .. } = node {
                seen.extend(names.values().copied());
            }
        }
        let size = |node: &u64| match self.nodes.get(node) {
            Some(Node::File { data, .. }) => data.len() as u64,
            _ => 0,
        };
        seen.iter().map(size).sum()
    }

    fn has_name(&self, node: u64) -> bool {
        node == ROOT || self.links.get(&node).is_some_and(|links| *links > 0)
    }

    fn count_links(&mut self) {
        self.links.clear();
        for node in self.nodes.values() {
            if let Node::Dir { names, .. } = node {
                for target in names.values() {
                    *self.links.entry(*target).or_insert(0) += 1;
                }
            }
        }
    }

    fn names_mut(&mut self, dir: u64) -> io::Result<&mut BTreeMap<String, u64>> {
        let now_ns = self.now_ns;
        match self.nodes.get_mut(&dir) {
            Some(Node::Dir { names, mtime_ns }) => {
                *mtime_ns = now_ns;
                Ok(names)
            }
            _ => Err(os(libc::ENOTDIR)),
        }
    }

    fn names(&self, dir: u64) -> io::Result<&BTreeMap<String, u64>> {
        match self.nodes.get(&dir) {
            Some(Node::Dir { names, .. }) => Ok(names),
            _ => Err(os(libc::ENOTDIR)),
        }
    }

    fn change(&mut self, set: Vec<(u64, String, u64)>, cleared: Vec<(u64, String)>) -> io::Result<()> {
        for (dir, name) in &cleared {
            if let Some(node) = self.names_mut(*dir)?.remove(name) {
                *self.links.entry(node).or_insert(1) -= 1;
            }
        }
        for (dir, name, node) in &set {
            if let Some(replaced) = self.names_mut(*dir)?.insert(name.clone(), *node) {
                *self.links.entry(replaced).or_insert(1) -= 1;
            }
            *self.links.entry(*node).or_insert(0) += 1;
        }
        self.journal.push(NameChange { set, cleared });
        Ok(())
    }

    fn room_for(&self, more: u64) -> io::Result<()> {
        match self.capacity {
            Some(capacity) if self.used() + more > capacity => Err(os(libc::ENOSPC)),
            _ => Ok(()),
        }
    }

    fn add(&mut self, node: Node) -> u64 {
        let id = self.next_node;
        self.next_node += 1;
        self.nodes.insert(id, node);
        id
    }

    fn stat(&self, node: u64) -> io::Result<Stat> {
        match self.nodes.get(&node) {
            Some(Node::Dir { mtime_ns, .. }) => {
                Ok(Stat { file_id: node, size_bytes: 0, allocated_bytes: 0, mtime_ns: *mtime_ns, is_dir: true })
            }
            Some(Node::File { data, mtime_ns, .. }) => Ok(Stat {
                file_id: node,
                size_bytes: data.len() as u64,
                allocated_bytes: data.len() as u64,
                mtime_ns: *mtime_ns,
                is_dir: false,
            }),
            None => Err(os(libc::ESTALE)),
        }
    }

    fn sync_names(&mut self) {
        for change in std::mem::take(&mut self.journal) {
            apply(&mut self.durable_names, &change);
        }
    }
}

impl SimIo {
    pub(crate) fn with_schedule(mut self, schedule: &Arc<Schedule>) -> Self {
        self.schedule = Some(Arc::clone(schedule));
        self
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
    fn op<T>(&self, act: impl FnOnce(&mut World, &mut Client) -> io::Result<T>) -> io::Result<T> {
        if let Some(schedule) = &self.schedule {
            schedule.wait(self.id);
        }
        let mut client = self.client.lock();
        let mut world = self.world.0.lock();
        let at = client.ops;
        client.ops += 1;
        world.now_ns += 1_000_000;
        let done = if client.kill_at.is_some_and(|kill| at >= kill) {
            Err(os(libc::EIO))
        } else {
            match client.fail_at {
                Some((fail, errno, sticky)) if at == fail || (sticky && at > fail) => Err(os(errno)),
                _ => act(&mut world, &mut client),
            }
        };
        drop(world);
        drop(client);
        if let Some(schedule) = &self.schedule {
            schedule.done(self.id);
        }
        done
    }
}

/// Looks a name up as a client does: what it remembers counts for a while.
fn lookup(world: &World, client: &mut Client, dir: u64, name: &str) -> io::Result<u64> {
    let fresh_ns = i64::try_from(DENTRY_MS).expect("small") * 1_000_000;
    let key = (dir, name.to_owned());
    if let Some(known) = client.names.get(&key).filter(|known| world.now_ns - known.at_ns < fresh_ns) {
        match known.node {
            None => return Err(os(libc::ENOENT)),
            // A file that lives on under another name is found under the old one.
            Some(node) if world.has_name(node) => return Ok(node),
            Some(_) => {}
        }
    }
    let node = world.names(dir)?.get(name).copied();
    client.names.insert(key, Remembered { node, at_ns: world.now_ns });
    node.ok_or_else(|| os(libc::ENOENT))
}

fn walk(world: &World, client: &mut Client, path: &str) -> io::Result<u64> {
    let mut at = ROOT;
    for part in path.split('/').filter(|part| !part.is_empty()) {
        at = lookup(world, client, at, part)?;
    }
    Ok(at)
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn forget(client: &mut Client, dir: u64) {
    client.names.retain(|(of, _), _| *of != dir);
}

impl TierIo for SimIo {
    type File = SimFile;

    fn open(&self, path: &str, _write: bool) -> io::Result<SimFile> {
        let node = self.op(|world, client| {
            let node = walk(world, client, path)?;
            match world.nodes.get(&node) {
                Some(Node::File { .. }) => Ok(node),
                _ => Err(os(libc::EISDIR)),
            }
        })?;
        Ok(SimFile { io: self.clone(), node })
    }

    fn create(&self, path: &str) -> io::Result<SimFile> {
        let (dir, name) = split(path);
        let node = self.op(|world, client| {
            let dir = walk(world, client, dir)?;
            if !world.has_name(dir) {
                return Err(os(libc::ENOENT));
            }
            if world.names(dir)?.contains_key(name) {
                return Err(os(libc::EEXIST));
            }
            world.room_for(1)?;
            let mtime_ns = world.now_ns;
            let node = world.add(Node::File { data: Vec::new(), durable: Vec::new(), mtime_ns });
            world.change(vec![(dir, name.to_owned(), node)], Vec::new())?;
            forget(client, dir);
            Ok(node)
        })?;
        Ok(SimFile { io: self.clone(), node })
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let (dir, name) = split(to);
        self.op(|world, client| {
            let node = walk(world, client, from)?;
            let dir = walk(world, client, dir)?;
            if !world.has_name(node) || (!world.has_name(dir)) {
                return Err(os(libc::ENOENT));
            }
            // A name that the client remembers is taken, without asking the server.
            if lookup(world, client, dir, name).is_ok() || world.names(dir)?.contains_key(name) {
                return Err(os(libc::EEXIST));
            }
            world.change(vec![(dir, name.to_owned(), node)], Vec::new())?;
            forget(client, dir);
            Ok(())
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let ((from_dir, from_name), (to_dir, to_name)) = (split(from), split(to));
        self.op(|world, client| {
            let from_dir = walk(world, client, from_dir)?;
            lookup(world, client, from_dir, from_name)?;
            // The server moves what has the name now, whatever the client remembers.
            let Some(node) = world.names(from_dir)?.get(from_name).copied() else {
                return Err(os(libc::ENOENT));
            };
            let to_dir = walk(world, client, to_dir)?;
            if !world.has_name(to_dir) {
                return Err(os(libc::ENOENT));
            }
            if world.names(to_dir)?.get(to_name) != Some(&node) {
                let set = vec![(to_dir, to_name.to_owned(), node)];
                world.change(set, vec![(from_dir, from_name.to_owned())])?;
            }
            forget(client, from_dir);
            forget(client, to_dir);
            Ok(())
        })
    }

    fn unlink(&self, path: &str) -> io::Result<()> {
        let (dir, name) = split(path);
        self.op(|world, client| {
            let dir = walk(world, client, dir)?;
            lookup(world, client, dir, name)?;
            match world.names(dir)?.get(name).map(|node| world.nodes.get(node)) {
                None => return Err(os(libc::ENOENT)),
                Some(Some(Node::Dir { .. })) => return Err(os(libc::EISDIR)),
                Some(_) => {}
            }
            world.change(Vec::new(), vec![(dir, name.to_owned())])?;
            forget(client, dir);
            Ok(())
        })
    }

    fn mkdir(&self, path: &str) -> io::Result<()> {
        let (dir, name) = split(path);
        self.op(|world, client| {
            let dir = walk(world, client, dir)?;
            if !world.has_name(dir) {
                return Err(os(libc::ENOENT));
            }
            if world.names(dir)?.contains_key(name) {
                forget(client, dir);
                return Err(os(libc::EEXIST));
            }
            world.room_for(1)?;
            let mtime_ns = world.now_ns;
            let node = world.add(Node::Dir { names: BTreeMap::new(), mtime_ns });
            world.change(vec![(dir, name.to_owned(), node)], Vec::new())?;
            forget(client, dir);
            Ok(())
        })
    }

    fn rmdir(&self, path: &str) -> io::Result<()> {
        let (dir, name) = split(path);
        self.op(|world, client| {
            let dir = walk(world, client, dir)?;
            let Some(node) = world.names(dir)?.get(name).copied() else {
                return Err(os(libc::ENOENT));
            };
            if !world.names(node)?.is_empty() {
                return Err(os(libc::ENOTEMPTY));
            }
            world.change(Vec::new(), vec![(dir, name.to_owned())])?;
            forget(client, dir);
            Ok(())
        })
    }

    fn list(&self, dir: &str) -> io::Result<Vec<Listed>> {
        self.op(|world, client| {
            let dir = walk(world, client, dir)?;
            forget(client, dir);
            let names = world.names(dir)?;
            let is_dir = |node: &u64| matches!(world.nodes.get(node), Some(Node::Dir { .. }));
            Ok(names.iter().map(|(name, node)| Listed { name: name.clone(), is_dir: is_dir(node) }).collect())
        })
    }

    fn stat(&self, path: &str) -> io::Result<Stat> {
        self.op(|world, client| {
            let node = walk(world, client, path)?;
            world.stat(node)
        })
    }

    fn touch(&self, path: &str) -> io::Result<Stat> {
        self.op(|world, client| {
            let node = walk(world, client, path)?;
            let now_ns = world.now_ns;
            match world.nodes.get_mut(&node) {
                Some(Node::File { mtime_ns, .. }) => *mtime_ns = now_ns,
                _ => return Err(os(libc::EISDIR)),
            }
            world.stat(node)
        })
    }

    fn refresh(&self, dir: &str) -> io::Result<()> {
        self.op(|world, client| {
            let dir = walk(world, client, dir)?;
            forget(client, dir);
            Ok(())
        })
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.op(|world, client| {
            walk(world, client, dir)?;
            world.sync_names();
            Ok(())
        })
    }

    fn space(&self) -> io::Result<Space> {
        self.op(|world, _| {
            let total_bytes = world.capacity.unwrap_or(1 << 40);
            Ok(Space { total_bytes, free_bytes: total_bytes.saturating_sub(world.used()) })
        })
    }
}

impl SimFile {
    fn check_open(&self, world: &World) -> io::Result<()> {
        if world.stale_when_removed && !world.has_name(self.node) {
            return Err(os(libc::ESTALE));
        }
        Ok(())
    }
}

impl TierFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.io.op(|world, _| {
            self.check_open(world)?;
            let Some(Node::File { data, .. }) = world.nodes.get(&self.node) else {
                return Err(os(libc::ESTALE));
            };
            let rest = data.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
            let len = rest.len().min(buf.len());
            buf[..len].copy_from_slice(&rest[..len]);
            Ok(len)
        })
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.io.op(|world, _| {
            self.check_open(world)?;
            let end = usize::try_from(offset).expect("small") + bytes.len();
            let has = world.stat(self.node)?.size_bytes;
            world.room_for((end as u64).saturating_sub(has))?;
            let now_ns = world.now_ns;
            let Some(Node::File { data, mtime_ns, .. }) = world.nodes.get_mut(&self.node) else {
                return Err(os(libc::ESTALE));
            };
            if data.len() < end {
                data.resize(end, 0);
            }
            data[end - bytes.len()..end].copy_from_slice(bytes);
            *mtime_ns = now_ns;
            Ok(())
        })
    }

    fn extend(&self, len_bytes: u64) -> io::Result<()> {
        self.io.op(|world, _| {
            self.check_open(world)?;
            let Some(Node::File { data, .. }) = world.nodes.get_mut(&self.node) else {
                return Err(os(libc::ESTALE));
            };
            let len = usize::try_from(len_bytes).expect("small");
            if data.len() < len {
                data.resize(len, 0);
            }
            Ok(())
        })
    }

    fn stat(&self) -> io::Result<Stat> {
        self.io.op(|world, _| {
            self.check_open(world)?;
            world.stat(self.node)
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.io.op(|world, _| {
            self.check_open(world)?;
            if let Some(Node::File { data, durable, .. }) = world.nodes.get_mut(&self.node) {
                *durable = data.clone();
            }
            world.sync_names();
            Ok(())
        })
    }
}

/// Who does the next operation.
#[derive(Debug)]
pub(crate) struct Schedule {
    state: Mutex<Turns>,
    changed: Condvar,
}

#[derive(Debug)]
struct Turns {
    /// Clients that still run; the first one has the turn.
    running: Vec<u64>,
    /// After so many operations the turn goes to the next client; then the rest runs on.
    switches: Vec<u64>,
    rng: Option<Rng>,
    done: u64,
}

impl Schedule {
    /// The first of `clients` begins; the turn changes after each of these numbers of operations, and
    /// when one has finished.
    pub(crate) fn switching(clients: &[&SimIo], mut switches: Vec<u64>) -> Arc<Self> {
        switches.reverse();
        let running = clients.iter().map(|io| io.id).collect();
        let state = Mutex::new(Turns { running, switches, rng: None, done: 0 });
        Arc::new(Self { state, changed: Condvar::new() })
    }

    /// Each next operation is anybody's.
    pub(crate) fn random(clients: &[&SimIo], seed: u64) -> Arc<Self> {
        let running = clients.iter().map(|io| io.id).collect();
        let state = Mutex::new(Turns { running, switches: Vec::new(), rng: Some(Rng::new(seed)), done: 0 });
        Arc::new(Self { state, changed: Condvar::new() })
    }

    fn wait(&self, id: u64) {
        let mut turns = self.state.lock();
        while turns.running.contains(&id) && turns.running.first() != Some(&id) {
            self.changed.wait(&mut turns);
        }
    }

    fn done(&self, id: u64) {
        let mut turns = self.state.lock();
        if turns.running.first() != Some(&id) {
            return;
        }
        turns.done += 1;
        let others = turns.running.len() as u64;
        let due = turns.switches.last() == Some(&turns.done);
        let step = if let Some(rng) = &mut turns.rng {
            rng.below(others)
        } else if due {
            turns.switches.pop();
            turns.done = 0;
            1
        } else {
            0
        };
        if !turns.running.is_empty() {
            let len = turns.running.len();
            turns.running.rotate_left(usize::try_from(step).unwrap_or(0) % len);
        }
        self.changed.notify_all();
    }

    /// This client does no more.
    pub(crate) fn finish(&self, io: &SimIo) {
        let mut turns = self.state.lock();
        turns.running.retain(|id| *id != io.id);
        turns.done = 0;
        self.changed.notify_all();
    }
}

/// The clock of a simulated node: as far ahead of the server's as a test wants.
#[derive(Debug)]
pub(crate) struct SimClock {
    pub(crate) world: SimWorld,
    pub(crate) skew_ms: i64,
}

impl Clock for SimClock {
    fn monotonic_ms(&self) -> u64 {
        u64::try_from(self.world.0.lock().now_ns / 1_000_000).unwrap_or(0)
    }

    fn wall_ms(&self) -> i64 {
        self.world.0.lock().now_ns / 1_000_000 + self.skew_ms
    }
}
