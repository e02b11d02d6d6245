//! A tree as nested maps: what tests compare the real thing with.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;
use proptest::prelude::*;

use super::build::{BlockOf, Built, BuiltBlock, TreeBuilder};
use super::cut::{Bounds, Cuts};
use super::entry::{Entry, EntryKind, Mtime, Pin, empty_digest};
use super::nav::{Blocks, NavError, Need};
use super::segment::Block;
use crate::format::ids::{BlockId, ContentDigest, ContentId, PackId};
use crate::format::placement::{Extent, Location, PlacedBlock};

/// Cuts so narrow that a hundred entries make an index of several levels.
pub(super) const NARROW: Cuts =
    Cuts { entries: Bounds { min: 2, mean: 5, max: 9 }, children: Bounds { min: 2, mean: 4, max: 6 } };

/// Cuts that make some hundred blocks of a few thousand entries.
pub(super) const MIDDLE: Cuts =
    Cuts { entries: Bounds { min: 8, mean: 32, max: 128 }, children: Bounds { min: 4, mean: 12, max: 40 } };

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    File { mode: u32, mtime: Mtime, size: u64, seed: u8 },
    Pinned(Pin),
    Symlink(Vec<u8>),
    Dir { mode: u32, nodes: BTreeMap<Vec<u8>, Node> },
}

/// A tree and the groups of paths that are one file.
#[derive(Debug, Clone)]
pub(super) struct Model {
    pub(super) nodes: BTreeMap<Vec<u8>, Node>,
    pub(super) groups: Vec<Vec<Vec<u8>>>,
}

/// An entry as the model says it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Expected {
    pub(super) path: Vec<u8>,
    pub(super) entry: Entry,
    pub(super) location: Location,
}

impl Model {
    /// Lists all entries in tree order.
    pub(super) fn entries(&self) -> Vec<Expected> {
        let mut listed = Vec::new();
        list_dir(&self.nodes, &[], &mut listed);
        let ranks: HashMap<Vec<u8>, usize> =
            listed.iter().enumerate().map(|(rank, e)| (e.path.clone(), rank)).collect();
        for group in &self.groups {
            let mut members: Vec<usize> = group.iter().filter_map(|path| ranks.get(path)).copied().collect();
            members.sort_unstable();
            members.dedup();
            members.retain(|rank| {
                matches!(listed[*rank].entry.kind, EntryKind::File { pin: None, .. }) && listed[*rank].entry.nlink == 1
            });
            let [first, later @ ..] = members.as_slice() else {
                continue;
            };
            if later.is_empty() {
                continue;
            }
            listed[*first].entry.nlink = members.len() as u32;
            let path = listed[*first].path.clone();
            for rank in later {
                let entry = &mut listed[*rank].entry;
                (entry.mode, entry.mtime) = (0, Mtime::default());
                entry.kind = EntryKind::HardLink { first: path.clone().into() };
                listed[*rank].location = Location::None;
            }
        }
        listed
    }

    pub(super) fn subdirs(&self) -> u64 {
        subdirs(&self.nodes)
    }

    pub(super) fn builder(&self) -> TreeBuilder {
        TreeBuilder::new(0o755, Mtime { secs: -5, nanos: 7 }, self.nodes.len() as u64, self.subdirs())
    }

    /// Builds, taking blocks out every `drain_every` entries.
    pub(super) fn build(&self, cuts: Cuts, drain_every: usize) -> (Built, Store) {
        let mut builder = self.builder().with_cuts(cuts);
        let store = Store::default();
        for (rank, expected) in self.entries().into_iter().enumerate() {
            builder.push(expected.entry, expected.location).expect("the model is a tree");
            if rank % drain_every == 0 {
                store.keep(builder.drain());
            }
        }
        let (built, blocks) = builder.finish().expect("the model is a tree");
        store.keep(blocks);
        (built, store)
    }
}

fn subdirs(nodes: &BTreeMap<Vec<u8>, Node>) -> u64 {
    nodes.values().filter(|node| matches!(node, Node::Dir { .. })).count() as u64
}

fn count(nodes: &BTreeMap<Vec<u8>, Node>) -> u64 {
    let below = |node: &Node| {
        if let Node::Dir { nodes, .. } = node { count(nodes) } else { 0 }
    };
    nodes.values().map(|node| 1 + below(node)).sum()
}

fn list_dir(nodes: &BTreeMap<Vec<u8>, Node>, path: &[u8], listed: &mut Vec<Expected>) {
    for (name, node) in nodes {
        let (entry, location) = entry_of(name, node);
        listed.push(Expected { path: [path, name].concat(), entry, location });
    }
    for (name, node) in nodes {
        if let Node::Dir { nodes, .. } = node {
            list_dir(nodes, &[path, name, b"/"].concat(), listed);
        }
    }
}

fn entry_of(name: &[u8], node: &Node) -> (Entry, Location) {
    let entry = |mode, mtime, kind| Entry { name: name.into(), mode, mtime, nlink: 1, kind };
    match node {
        Node::File { mode, mtime, size, seed } => {
            let digest = if *size == 0 { empty_digest() } else { ContentDigest(*blake3::hash(&[*seed]).as_bytes()) };
            let kind = EntryKind::File { size: *size, content: ContentId::Digest(digest), pin: None };
            (entry(*mode, *mtime, kind), location_of(*size, *seed))
        }
        Node::Pinned(pin) => {
            let kind =
                EntryKind::File { size: pin.size, content: ContentId::Pin(pin.id()), pin: Some(Box::new(pin.clone())) };
            (entry(0o444, Mtime::default(), kind), location_of(pin.size, 1))
        }
        Node::Symlink(target) => {
            (entry(0o777, Mtime::default(), EntryKind::Symlink { target: target.as_slice().into() }), Location::None)
        }
        Node::Dir { mode, nodes } => {
            let kind =
                EntryKind::Dir { children: nodes.len() as u64, descendants: count(nodes), subdirs: subdirs(nodes) };
            (entry(*mode, Mtime { secs: 1, nanos: 2 }, kind), Location::None)
        }
    }
}

/// Some place that depends on the content alone.
fn location_of(size: u64, seed: u8) -> Location {
    let pack = PackId([seed % 3; 32]);
    let offset = u64::from(seed) << 40;
    match (size, seed % 5) {
        (0, _) => Location::None,
        (2.., 4) => Location::Sparse { pack, extents: vec![Extent { logical: 1, offset, len: size - 1 }] },
        _ => Location::Run { pack, offset },
    }
}

/// Blocks in memory; counts what is asked for.
#[derive(Debug, Default)]
pub(super) struct Store {
    blocks: Mutex<HashMap<Need, Vec<u8>>>,
    decoded: Mutex<HashMap<BlockId, Arc<Block>>>,
    asked: Mutex<std::collections::HashSet<Need>>,
    /// Present blocks; None: all are.
    pub(super) at_hand: Mutex<Option<std::collections::HashSet<Need>>>,
}

impl Store {
    pub(super) fn keep(&self, blocks: Vec<BuiltBlock>) {
        for block in blocks {
            let need = match block.of {
                BlockOf::Tree => Need::Tree(block.id),
                BlockOf::Placement => Need::Placed(block.id),
            };
            self.blocks.lock().insert(need, block.bytes);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.lock().len()
    }

    pub(super) fn ids(&self) -> std::collections::HashSet<Need> {
        self.blocks.lock().keys().copied().collect()
    }

    pub(super) fn absorb(&self, other: &Store) {
        let blocks = other.blocks.lock().clone();
        self.blocks.lock().extend(blocks);
    }

    pub(super) fn take_asked(&self) -> usize {
        std::mem::take(&mut *self.asked.lock()).len()
    }

    /// Calls again and again, bringing what is needed, with nothing at hand at the start.
    pub(super) fn with_nothing_at_hand<T>(&self, mut f: impl FnMut() -> Result<T, NavError>) -> Result<T, NavError> {
        *self.at_hand.lock() = Some(std::collections::HashSet::new());
        let result = loop {
            match f() {
                Err(NavError::Need(need)) => {
                    assert!(self.blocks.lock().contains_key(&need), "{need:?} is no block of this tree");
                    let new = self.at_hand.lock().as_mut().is_some_and(|at_hand| at_hand.insert(need));
                    assert!(new, "{need:?} is asked for twice");
                }
                other => break other,
            }
        };
        *self.at_hand.lock() = None;
        result
    }

    fn is_at_hand(&self, need: Need) -> bool {
        self.asked.lock().insert(need);
        self.at_hand.lock().as_ref().is_none_or(|at_hand| at_hand.contains(&need))
    }
}

impl Blocks for Store {
    fn tree_block(&self, id: BlockId) -> Option<Arc<Block>> {
        if !self.is_at_hand(Need::Tree(id)) {
            return None;
        }
        let mut decoded = self.decoded.lock();
        if let Some(block) = decoded.get(&id) {
            return Some(block.clone());
        }
        let block = Arc::new(Block::decode(self.blocks.lock().get(&Need::Tree(id))?).expect("it was built"));
        decoded.insert(id, block.clone());
        Some(block)
    }

    fn placed_block(&self, id: BlockId) -> Option<Arc<PlacedBlock>> {
        if !self.is_at_hand(Need::Placed(id)) {
            return None;
        }
        Some(Arc::new(PlacedBlock::decode(self.blocks.lock().get(&Need::Placed(id))?).expect("it was built")))
    }
}

/// Names from a small set, so that they meet, and hostile ones.
pub(super) fn name() -> impl Strategy<Value = Vec<u8>> {
    let hostile = prop::sample::select(vec![
        vec![0xff, 0xfe],
        b"\n".to_vec(),
        b" ".to_vec(),
        b"...".to_vec(),
        b"-rf".to_vec(),
        vec![b'n'; 255],
        vec![0x80; 255],
        b"a\\b".to_vec(),
        "\u{202e}".as_bytes().to_vec(),
        vec![1],
        vec![0xff; 255],
    ]);
    prop_oneof![8 => "[a-f][0-9]?".prop_map(String::into_bytes), 1 => hostile]
}

fn leaf() -> impl Strategy<Value = Node> {
    let size = prop_oneof![Just(0_u64), 1..10_000_u64, Just(1 << 35)];
    let mtime = (any::<i64>(), 0..1_000_000_000_u32).prop_map(|(secs, nanos)| Mtime { secs, nanos });
    let file = (0..=0o7777_u32, mtime, size, any::<u8>()).prop_map(|(mode, mtime, size, seed)| Node::File {
        mode,
        mtime,
        size,
        seed,
    });
    let pin =
        ("[a-c]", "[a-c]/[a-z]{1,9}", prop::option::of("v[0-9]"), 0..9_u64).prop_map(|(bucket, key, version, size)| {
            Node::Pinned(Pin { bucket, key, version, etag: "\"e\"".into(), size })
        });
    let link = prop::collection::vec(1..=255_u8, 1..40).prop_map(Node::Symlink);
    prop_oneof![6 => file, 1 => pin, 1 => link]
}

fn dir(size: usize) -> impl Strategy<Value = BTreeMap<Vec<u8>, Node>> {
    let tree = leaf().prop_recursive(5, size as u32, 24, move |inner| {
        (0..=0o7777_u32, prop::collection::btree_map(name(), inner, 0..24))
            .prop_map(|(mode, nodes)| Node::Dir { mode, nodes })
    });
    prop::collection::btree_map(name(), tree, 0..32)
}

pub(super) fn model(size: usize) -> impl Strategy<Value = Model> {
    let groups = prop::collection::vec(prop::collection::vec(any::<prop::sample::Index>(), 2..5), 0..4);
    (dir(size), groups).prop_map(|(nodes, groups)| {
        let plain = Model { nodes, groups: Vec::new() };
        let paths: Vec<Vec<u8>> = plain.entries().into_iter().map(|e| e.path).collect();
        let pick = |group: Vec<prop::sample::Index>| {
            group.iter().filter(|_| !paths.is_empty()).map(|i| i.get(&paths).clone()).collect()
        };
        Model { groups: groups.into_iter().map(pick).collect(), nodes: plain.nodes }
    })
}
