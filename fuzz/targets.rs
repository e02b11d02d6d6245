//! What the fuzzers and the ordinary tests feed with bytes nobody trusts.
//!
//! Each function takes any bytes and must come back: no panic, no allocation that the bytes do not
//! justify, no endless walk. What decodes must encode to the same bytes, so that one value has one
//! encoding and an id names a value.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use larder::config::load::{Env, merge};
use larder::format::codec::DecodeError;
use larder::format::commit::Commit;
use larder::format::digest::{BLOCK_LEN, ChainingValue};
use larder::format::ids::{BlockId, ContentDigest, ContentId, TreeId};
use larder::format::pack::piece::Known;
use larder::format::pack::{OutboardLayout, PackIndex, PackOutboard, Proof, Recipe};
use larder::format::placement::{Location, PlacedBlock, PlacementRoot};
use larder::format::refs::{DatasetName, RefLogEntry, RefName, RefValue, Revision};
use larder::format::tree::diff::Differ;
use larder::format::tree::nav::{self, Blocks, DirAt, NavError};
use larder::format::tree::walk::Walk;
use larder::format::tree::{Block, ChildRef, Counts, Entry, EntryKind, IndexBlock, Mtime, Segment, TreeRoot};

fn canonical<T>(bytes: &[u8], decoded: Result<T, DecodeError>, encode: impl Fn(&T) -> Vec<u8>) -> Option<T> {
    match decoded {
        Ok(value) => {
            assert!(encode(&value) == bytes, "what was decoded has another encoding");
            Some(value)
        }
        Err(error) => {
            assert!(error.offset <= bytes.len(), "the error is behind the end: {error}");
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

/// Any text is a configuration or a list of problems.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let env = Env { vars: [("HOME".to_owned(), "/home/ada".to_owned())].into(), cwd: "/".into() };
    if let Err(error) = merge(text, Path::new("/f.toml"), &env, &Default::default()) {
        assert!(!error.problems().is_empty());
    }
}

pub fn tree_block(bytes: &[u8]) {
    if let Some(block) = canonical(bytes, Block::decode(bytes), Block::encode) {
        assert!(block.heap_bytes() <= 64 * bytes.len() + 1024, "{} bytes from {}", block.heap_bytes(), bytes.len());
    }
}

pub fn tree_root(bytes: &[u8]) {
    canonical(bytes, TreeRoot::decode(bytes), TreeRoot::encode);
}

pub fn placement_root(bytes: &[u8]) {
    canonical(bytes, PlacementRoot::decode(bytes), PlacementRoot::encode);
}

pub fn placed_block(bytes: &[u8]) {
    if let Some(block) = canonical(bytes, PlacedBlock::decode(bytes), PlacedBlock::encode) {
        assert!(block.heap_bytes() <= 96 * bytes.len() + 1024);
    }
}

/// Nothing is known, or everything is this.
struct Nothing;

impl Known for Nothing {
    fn digest(&self, _: u32) -> Option<ContentDigest> {
        Some(ContentDigest([0; 32]))
    }
    fn block(&self, _: u32, _: u64) -> Option<ChainingValue> {
        None
    }
}

pub fn pack_index(bytes: &[u8]) {
    let Some(index) = canonical(bytes, PackIndex::decode(bytes), PackIndex::encode) else {
        return;
    };
    for offset in [0, 1, 4095, 4096, index.len / 2, index.len.saturating_sub(1), index.len, u64::MAX] {
        index.content_at(offset);
    }
    let layout = OutboardLayout::of(&index);
    assert!(layout.is_none_or(|layout| layout.blocks(u32::MAX, 0).is_none()));
    // A few contents can be exabytes: no more pieces than a fetch would plan for at a time.
    let pieces = index.pieces((index.len / 64).max(BLOCK_LEN));
    assert_eq!(pieces.first().map(|piece| piece.offset), Some(0));
    assert_eq!(pieces.last().map(|piece| piece.end()), Some(index.len));
    assert!(pieces.windows(2).all(|pair| pair[0].end() == pair[1].offset && pair[0].len > 0));
    for piece in pieces.iter().take(16) {
        let blocks = index.blocks_of(piece);
        assert!(blocks.is_none_or(|blocks| !blocks.is_empty()));
        if piece.len < 1 << 20 {
            let zeros = vec![0; piece.len as usize];
            assert!(index.check_piece(piece, &zeros, &Nothing).is_err());
        }
    }
}

pub fn recipe(bytes: &[u8]) {
    canonical(bytes, Recipe::decode(bytes), Recipe::encode);
}

pub fn outboard(bytes: &[u8]) {
    if let Some(outboard) = canonical(bytes, PackOutboard::decode(bytes), PackOutboard::encode) {
        for (position, values) in &outboard.contents {
            assert!(outboard.get(*position) == Some(values));
            assert!(!values.verify(&ContentDigest([0; 32])));
        }
    }
}

pub fn proof(bytes: &[u8]) {
    canonical(bytes, Proof::decode(bytes), Proof::encode);
}

pub fn commit(bytes: &[u8]) {
    if let Ok(commit) = Commit::decode(bytes) {
        assert!(Commit::decode(&commit.encode()) == Ok(commit));
    }
}

pub fn refs(bytes: &[u8]) {
    if let Ok(value) = RefValue::decode(bytes) {
        assert!(RefValue::decode(&value.encode()) == Ok(value));
    }
    if let Ok(entry) = RefLogEntry::decode(bytes) {
        assert!(RefLogEntry::decode(&entry.encode()) == Ok(entry));
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(revision) = Revision::parse(text) {
        assert!(Revision::parse(&revision.to_string()) == Ok(revision));
    }
    let names =
        [DatasetName::parse(text).map(|name| name.to_string()), RefName::parse(text).map(|name| name.to_string())];
    for name in names.into_iter().flatten() {
        assert!(name.split('/').all(|part| !part.is_empty() && !part.starts_with('.')), "{name} is no safe key");
    }
}

/// Blocks that any bytes describe: counts that lie, children that repeat, names out of order.
#[derive(Default)]
struct Graph {
    tree: HashMap<BlockId, Arc<Block>>,
    placed: HashMap<BlockId, Arc<PlacedBlock>>,
}

impl Blocks for Graph {
    fn tree_block(&self, id: BlockId) -> Option<Arc<Block>> {
        self.tree.get(&id).cloned()
    }
    fn placed_block(&self, id: BlockId) -> Option<Arc<PlacedBlock>> {
        self.placed.get(&id).cloned()
    }
}

/// Bytes as a stream of choices; zeros behind the end.
struct Choices<'a>(std::slice::Iter<'a, u8>);

impl Choices<'_> {
    fn next(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }

    /// Mostly small, now and then huge.
    fn number(&mut self) -> u64 {
        match self.next() {
            255 => u64::MAX,
            254 => 1 << 47,
            253 => u64::from(self.next()) << 32,
            small => u64::from(small % 16),
        }
    }

    fn entry(&mut self) -> Entry {
        let name = vec![b'a' + self.next() % 8; 1 + usize::from(self.next() % 3)];
        let kind = match self.next() % 4 {
            0 => EntryKind::File {
                size: self.number(),
                content: ContentId::Digest(ContentDigest([self.next(); 32])),
                pin: None,
            },
            1 => EntryKind::HardLink { first: vec![b'a' + self.next() % 8].into() },
            _ => EntryKind::Dir { children: self.number(), descendants: self.number(), subdirs: self.number() },
        };
        Entry { name: name.into(), mode: 0, mtime: Mtime::default(), nlink: 1 + u32::from(self.next() % 2), kind }
    }

    fn graph(&mut self) -> (Graph, Vec<BlockId>) {
        let mut graph = Graph::default();
        let mut ids: Vec<BlockId> = Vec::new();
        for number in 0..1 + self.next() % 24 {
            let id = BlockId([number; 32]);
            let level = if ids.is_empty() { 0 } else { self.next() % 4 };
            let count = 1 + self.next() % 12;
            let block = match level {
                0 => Block::Segment(Segment::new((0..count).map(|_| self.entry()).collect())),
                level => Block::Index(self.index(level, count, &graph, &ids)),
            };
            graph.tree.insert(id, Arc::new(block));
            let placed = match self.next() % 2 {
                0 => PlacedBlock::Segment(vec![Location::None; usize::from(self.next() % 12)]),
                _ => PlacedBlock::Index((0..self.next() % 12).map(|_| BlockId([self.next() % 24; 32])).collect()),
            };
            graph.placed.insert(id, Arc::new(placed));
            ids.push(id);
        }
        (graph, ids)
    }

    fn index(&mut self, level: u8, count: u8, graph: &Graph, ids: &[BlockId]) -> IndexBlock {
        let children = (0..count).map(|_| {
            // Now and then a child that does not exist, or this very block.
            let id = ids.get(usize::from(self.next()) % (ids.len() + 2)).copied().unwrap_or(BlockId([self.next(); 32]));
            let child = graph.tree.get(&id);
            let mut counts = child.map_or(Counts::default(), |block| *block.counts());
            if self.next().is_multiple_of(8) {
                counts.entries = self.number().max(1);
                counts.descendants = self.number();
            }
            let first_name = child.and_then(|block| block.first_name()).unwrap_or(b"x").into();
            ChildRef { id, encoded_len: 1, counts, first_name }
        });
        IndexBlock::new(level, children.collect())
    }
}

/// Walks a block graph that nobody made in good faith.
pub fn nav(bytes: &[u8]) {
    let mut choices = Choices(bytes.iter());
    let (graph, ids) = choices.graph();
    let roots = [(); 2].map(|()| {
        let level = 1 + choices.next() % 3;
        let count = 1 + choices.next() % 8;
        let top = choices.index(level, count, &graph, &ids);
        let counts = *top.counts();
        let (children, subdirs) = (choices.number().min(counts.entries), choices.number());
        TreeRoot { mode: 0, mtime: Mtime::default(), children, subdirs, counts, top }
    });
    for root in &roots {
        navigate(root, &graph, &mut choices);
    }
    let [before, after] = roots;
    let mut differ = Differ::new(before, after);
    for _ in 0..STEPS {
        match differ.next(&graph) {
            Ok(Some(change)) => assert!(change.before != change.after),
            Ok(None) | Err(_) => break,
        }
    }
}

/// A graph of few blocks can stand for 2^48 entries: no walk is followed to its end.
const STEPS: usize = 2000;

fn navigate(root: &TreeRoot, graph: &Graph, choices: &mut Choices<'_>) {
    let placement = PlacementRoot {
        tree: TreeId([0; 32]),
        packs: Vec::new(),
        top: root.top.children.iter().map(|child| child.id).collect(),
    };
    let mut dirs: Vec<DirAt> = vec![nav::root_dir(root)];
    for _ in 0..24 {
        let rank = choices.number();
        if let Ok(found) = nav::entry_at(root, graph, rank) {
            assert_eq!(found.rank, rank);
            dirs.extend(found.dir);
            let _ = nav::resolve_link(root, graph, &found);
        }
        if let Ok(path) = nav::path_of(root, graph, rank) {
            // Names out of order may hide an entry from a lookup, never show another place.
            let _ = nav::resolve(root, graph, &path);
        }
        let _ = nav::location(root, &placement, graph, rank);
        let _ = nav::segment_at(root, graph, rank);
        let dir = dirs[usize::from(choices.next()) % dirs.len()];
        let _ = nav::lookup(root, graph, &dir, &[b'a' + choices.next() % 8]);
        let _ = nav::subtree_counts(root, graph, &dir);
        match nav::list(root, graph, &dir, choices.number(), 1 + usize::from(choices.next())) {
            Ok(listed) => assert!(listed.windows(2).all(|pair| pair[0].entry.name < pair[1].entry.name)),
            Err(NavError::NotFound) => panic!("a listing finds its directory or damage"),
            Err(_) => {}
        }
    }
    let mut walk = Walk::new(nav::root_dir(root), b"");
    let mut last = 0;
    for _ in 0..STEPS {
        match walk.next(root, graph) {
            Ok(Some(walked)) => {
                assert!(last == 0 || walked.at.rank >= last, "a walk goes up");
                last = walked.at.rank + 1;
            }
            Ok(None) | Err(_) => break,
        }
    }
}
