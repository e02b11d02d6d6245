//! The server: names, files, its clock, its room, and what a power cut leaves of them.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use nix::libc;
use parking_lot::Mutex;

use super::client::SimIo;
use super::{Rng, os};
use crate::store::tier::Stat;

pub(crate) const ROOT: u32 = 1;

#[derive(Debug, Clone)]
pub(super) enum Body {
    Dir(BTreeMap<Box<str>, u32>),
    File { data: Arc<Vec<u8>>, durable: Arc<Vec<u8>> },
}

/// A file or folder. It stays in the table when it has no name any more: its number is never given again.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub body: Body,
    pub mtime_ns: i64,
    /// How many names it has.
    pub links: u32,
    /// A folder's own: where it is now.
    pub parent: u32,
    pub name: Box<str>,
}

/// A change of a name, as the server's journal has it: to be undone by a power cut.
#[derive(Debug, Clone)]
struct Change {
    dir: u32,
    name: Box<str>,
    was: Option<u32>,
    /// The first change of its operation.
    first: bool,
}

/// What an operation changed, for who watches.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    Named {
        dir: u32,
        name: Box<str>,
        was: Option<u32>,
        is: Option<u32>,
    },
    Touched {
        node: u32,
        was_ns: i64,
    },
    /// Bytes that were there, or the length, became others.
    Altered {
        node: u32,
    },
}

#[derive(Debug, Clone, Default)]
pub(crate) struct World {
    pub(super) nodes: Vec<Node>,
    pub(crate) now_ns: i64,
    journal: Vec<Change>,
    pub(super) capacity: Option<u64>,
    /// Bytes of files that have a name, and bytes that were ever added.
    live_bytes: u64,
    added_bytes: u64,
    /// NFSv3: an open file that was removed is gone.
    pub(super) stale_when_removed: bool,
    /// How often the server was restarted: what is open and has no name is lost then.
    pub(super) restarts: u32,
    clients: u64,
    /// Filled where somebody watches.
    pub(crate) events: Vec<Event>,
    pub(crate) watched: bool,
}

/// The server.
#[derive(Debug, Clone)]
pub(crate) struct SimWorld(pub(super) Arc<Mutex<World>>);

impl Default for SimWorld {
    fn default() -> Self {
        let mut world = World { now_ns: 1_000_000_000_000_000_000, ..World::default() };
        // Number 0 is nobody's.
        world.add(Body::Dir(BTreeMap::new()));
        let root = world.add(Body::Dir(BTreeMap::new()));
        debug_assert_eq!(root, ROOT);
        world.nodes[ROOT as usize].links = 1;
        Self(Arc::new(Mutex::new(world)))
    }
}

impl SimWorld {
    /// Mounts it once more.
    pub(crate) fn client(&self) -> SimIo {
        let mut world = self.0.lock();
        world.clients += 1;
        SimIo::new(self.clone(), world.clients)
    }

    /// A second server with the same files, and no clients.
    pub(crate) fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.0.lock().clone())))
    }

    /// Looks at, or changes, the server itself.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut World) -> T) -> T {
        look(&mut self.0.lock())
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
        world.each_file(|path, node| drop(found.insert(path.to_owned(), world.bytes(node).to_vec())));
        found
    }

    /// Changes bytes behind everybody's back.
    pub(crate) fn damage(&self, path: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut world = self.0.lock();
        let node = world.find(path).unwrap_or_else(|| panic!("{path}: the path to damage exists"));
        world.damage(node, change);
    }

    /// A power cut: names are as of some moment since they were last made durable; bytes that were
    /// not synced are lost, torn or there. Every client is dead.
    pub(crate) fn crash(&self, rng: &mut Rng) {
        self.0.lock().crash(rng);
    }
}

/// What of unsynced bytes a crash leaves: block by block, the old, the new, or zeros.
fn torn(data: &[u8], durable: &[u8], rng: &mut Rng) -> Vec<u8> {
    let len = match rng.below(3) {
        0 => durable.len(),
        1 => data.len(),
        _ => durable.len().max(rng.below(data.len() as u64 + 1) as usize),
    };
    let mut left = vec![0; len];
    for (at, byte) in left.iter_mut().enumerate() {
        let old = durable.get(at).copied().unwrap_or(0);
        // Half of the blocks of 16 bytes arrived.
        let arrived = (at / 16 + len).is_multiple_of(2) || rng.is_third();
        *byte = if arrived { data.get(at).copied().unwrap_or(old) } else { old };
    }
    left
}

impl World {
    /// Calls back with every file that has a name, once for each name.
    pub(crate) fn each_file(&self, mut found: impl FnMut(&str, u32)) {
        let mut dirs = vec![(ROOT, String::new())];
        while let Some((dir, at)) = dirs.pop() {
            for (name, node) in self.children(dir) {
                let path = if at.is_empty() { name.to_string() } else { format!("{at}/{name}") };
                match self.node(*node).body {
                    Body::Dir(_) => dirs.push((*node, path)),
                    Body::File { .. } => found(&path, *node),
                }
            }
        }
    }

    pub(super) fn node(&self, node: u32) -> &Node {
        &self.nodes[node as usize]
    }

    pub(crate) fn children(&self, dir: u32) -> impl Iterator<Item = (&Box<str>, &u32)> {
        match &self.node(dir).body {
            Body::Dir(names) => Some(names.iter()),
            Body::File { .. } => None,
        }
        .into_iter()
        .flatten()
    }

    pub(crate) fn bytes(&self, node: u32) -> &[u8] {
        match &self.node(node).body {
            Body::File { data, .. } => data,
            Body::Dir(_) => &[],
        }
    }

    pub(crate) fn mtime_ns(&self, node: u32) -> i64 {
        self.node(node).mtime_ns
    }

    /// How many names a file has.
    pub(crate) fn links(&self, node: u32) -> u32 {
        self.node(node).links
    }

    pub(crate) fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    pub(crate) fn added_bytes(&self) -> u64 {
        self.added_bytes
    }

    /// What has a path now.
    pub(crate) fn find(&self, path: &str) -> Option<u32> {
        let mut at = ROOT;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            at = *self.names(at).ok()?.get(part)?;
        }
        Some(at)
    }

    /// Where a folder is now.
    pub(crate) fn path_of(&self, dir: u32) -> String {
        let mut parts: Vec<&str> = Vec::new();
        let mut at = dir;
        while at != ROOT && at != 0 {
            parts.push(&self.node(at).name);
            at = self.node(at).parent;
        }
        parts.reverse();
        parts.join("/")
    }

    /// Changes a file's bytes without its time: bit rot.
    pub(crate) fn damage(&mut self, node: u32, change: impl FnOnce(&mut Vec<u8>)) {
        let Body::File { data, durable } = &mut self.nodes[node as usize].body else {
            panic!("{node}: not a file");
        };
        let mut bytes = data.to_vec();
        let had = bytes.len() as u64;
        change(&mut bytes);
        let has = bytes.len() as u64;
        *data = Arc::new(bytes);
        *durable = Arc::clone(data);
        self.resized(node, had, has);
    }

    pub(crate) fn crash(&mut self, rng: &mut Rng) {
        let operations = self.journal.iter().filter(|change| change.first).count() as u64;
        let mut undo = operations - rng.below(operations + 1);
        let journal = std::mem::take(&mut self.journal);
        for change in journal.into_iter().rev() {
            if undo == 0 {
                break;
            }
            undo -= u64::from(change.first);
            self.put(change.dir, &change.name, change.was);
        }
        self.journal.clear();
        for at in 0..self.nodes.len() {
            let Body::File { data, durable } = &mut self.nodes[at].body else {
                continue;
            };
            if Arc::ptr_eq(data, durable) || data == durable {
                continue;
            }
            let had = data.len() as u64;
            *data = Arc::new(torn(data, durable, rng));
            *durable = Arc::clone(data);
            let has = data.len() as u64;
            self.resized(at as u32, had, has);
        }
        self.restarts += 1;
    }

    pub(super) fn has_name(&self, node: u32) -> bool {
        self.node(node).links > 0
    }

    pub(super) fn names(&self, dir: u32) -> io::Result<&BTreeMap<Box<str>, u32>> {
        match &self.node(dir).body {
            Body::Dir(names) => Ok(names),
            Body::File { .. } => Err(os(libc::ENOTDIR)),
        }
    }

    /// Gives or takes a name; gives what had it.
    fn put(&mut self, dir: u32, name: &str, is: Option<u32>) -> Option<u32> {
        let now_ns = self.now_ns;
        let folder = &mut self.nodes[dir as usize];
        folder.mtime_ns = now_ns;
        let Body::Dir(names) = &mut folder.body else {
            return None;
        };
        let was = match is {
            Some(node) => names.insert(name.into(), node),
            None => names.remove(name),
        };
        if let Some(node) = was {
            let gone = &mut self.nodes[node as usize];
            gone.links = gone.links.saturating_sub(1);
            if gone.links == 0 {
                self.live_bytes -= self.bytes(node).len() as u64;
            }
        }
        if let Some(node) = is {
            let named = &mut self.nodes[node as usize];
            named.links += 1;
            if matches!(named.body, Body::Dir(_)) {
                (named.parent, named.name) = (dir, name.into());
            }
            if named.links == 1 {
                let len = self.bytes(node).len() as u64;
                self.live_bytes += len;
                self.added_bytes += len;
            }
        }
        if self.watched {
            self.events.push(Event::Named { dir, name: name.into(), was, is });
        }
        was
    }

    /// One operation's changes of names: what is set, then what is cleared.
    pub(super) fn change(&mut self, set: (u32, &str, u32), cleared: Option<(u32, &str)>) {
        let was = self.put(set.0, set.1, Some(set.2));
        self.journal.push(Change { dir: set.0, name: set.1.into(), was, first: true });
        if let Some((dir, name)) = cleared {
            let was = self.put(dir, name, None);
            self.journal.push(Change { dir, name: name.into(), was, first: false });
        }
    }

    pub(super) fn clear(&mut self, dir: u32, name: &str) {
        let was = self.put(dir, name, None);
        self.journal.push(Change { dir, name: name.into(), was, first: true });
    }

    pub(super) fn room_for(&self, more: u64) -> io::Result<()> {
        match self.capacity {
            Some(capacity) if self.live_bytes + more > capacity => Err(os(libc::ENOSPC)),
            _ => Ok(()),
        }
    }

    pub(super) fn add(&mut self, body: Body) -> u32 {
        let node = Node { body, mtime_ns: self.now_ns, links: 0, parent: 0, name: "".into() };
        self.nodes.push(node);
        u32::try_from(self.nodes.len() - 1).expect("tests make few files")
    }

    pub(super) fn stat(&self, node: u32) -> Stat {
        let found = self.node(node);
        let (len, is_dir) = match &found.body {
            Body::Dir(_) => (0, true),
            Body::File { data, .. } => (data.len() as u64, false),
        };
        let (file_id, mtime_ns) = (u64::from(node), found.mtime_ns);
        Stat { file_id, size_bytes: len, allocated_bytes: len, mtime_ns, is_dir }
    }

    pub(super) fn touch(&mut self, node: u32) {
        let now_ns = self.now_ns;
        let was_ns = std::mem::replace(&mut self.nodes[node as usize].mtime_ns, now_ns);
        if self.watched {
            self.events.push(Event::Touched { node, was_ns });
        }
    }

    fn resized(&mut self, node: u32, had: u64, has: u64) {
        if self.has_name(node) {
            self.live_bytes = self.live_bytes + has - had;
        }
        self.added_bytes += has.saturating_sub(had);
    }

    /// Writes, or only makes longer; gives the bytes as they are then.
    pub(super) fn write(&mut self, node: u32, bytes: &[u8], offset: u64, len: Option<usize>) -> io::Result<()> {
        let now_ns = self.now_ns;
        let start = usize::try_from(offset).expect("small");
        let end = len.unwrap_or(start + bytes.len());
        let has = self.bytes(node).len();
        self.room_for(end.saturating_sub(has) as u64)?;
        let found = &mut self.nodes[node as usize];
        let Body::File { data, .. } = &mut found.body else {
            return Err(os(libc::EISDIR));
        };
        let data = Arc::make_mut(data);
        if data.len() < end {
            data.resize(end, 0);
        }
        let mut altered = end > has;
        if let Some(target) = data.get_mut(start..start + bytes.len()).filter(|_| len.is_none()) {
            altered |= target != bytes;
            target.copy_from_slice(bytes);
            found.mtime_ns = now_ns;
        }
        let now_len = data.len();
        self.resized(node, has as u64, now_len as u64);
        if altered && self.watched {
            self.events.push(Event::Altered { node });
        }
        Ok(())
    }

    pub(super) fn truncate(&mut self, node: u32) {
        self.damage(node, Vec::clear);
        if self.watched {
            self.events.push(Event::Altered { node });
        }
    }

    pub(super) fn sync_file(&mut self, node: u32) {
        if let Body::File { data, durable } = &mut self.nodes[node as usize].body {
            *durable = Arc::clone(data);
        }
    }

    pub(super) fn sync_names(&mut self) {
        self.journal.clear();
    }

    pub(super) fn data(&self, node: u32) -> Option<Arc<Vec<u8>>> {
        match &self.node(node).body {
            Body::File { data, .. } => Some(Arc::clone(data)),
            Body::Dir(_) => None,
        }
    }
}
