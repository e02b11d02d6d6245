//! A model of a tree (nested maps), and a commit of it in a lake, made without push.
//!
//! For tests of what reads commits: the model says what has to come back.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;

use crate::format::commit::{Commit, Lineage};
use crate::format::digest::ContentHasher;
use crate::format::ids::{CommitId, ContentId, LakeId, PackId};
use crate::format::pack::{ALIGN, PackIndex, PackOutboard, PackedContent, Place, Recipe, Source};
use crate::format::paths::{self, PackPart};
use crate::format::placement::{Extent, Location};
use crate::format::refs::DatasetName;
use crate::format::tree::build::{BlockOf, Built, BuiltBlock, TreeBuilder};
use crate::format::tree::{Entry, EntryKind, Mtime};
use crate::store::lake::{Lake, PutIf};
use crate::store::meta::Snapshot;

/// The names of one directory.
pub(crate) type Dir = BTreeMap<Vec<u8>, Node>;

/// What the model knows of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Node {
    File(File),
    Symlink(Vec<u8>),
    Dir(Dir),
}

/// A file of the model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct File {
    pub bytes: Vec<u8>,
    /// Files of one number are hard links of each other (and have to be equal); 0: alone.
    pub group: u8,
    /// Whether runs of zeros are holes.
    pub sparse: bool,
}

/// What every entry has.
pub(crate) const MTIME: Mtime = Mtime { secs: -77, nanos: 999 };
pub(crate) const FILE_MODE: u32 = 0o644;
pub(crate) const DIR_MODE: u32 = 0o751;

pub(crate) fn file(bytes: &[u8]) -> Node {
    Node::File(File { bytes: bytes.to_vec(), ..File::default() })
}

pub(crate) fn dir<const N: usize>(names: [(&str, Node); N]) -> Dir {
    names.into_iter().map(|(name, node)| (name.as_bytes().to_vec(), node)).collect()
}

/// Gives how many entries are below a directory.
pub(crate) fn descendants(dir: &Dir) -> u64 {
    dir.values().map(|node| 1 + if let Node::Dir(below) = node { descendants(below) } else { 0 }).sum()
}

/// Counts the directories in a directory.
pub(crate) fn subdirs(dir: &Dir) -> u64 {
    dir.values().filter(|node| matches!(node, Node::Dir(_))).count() as u64
}

/// Counts the members of each hard-link group.
pub(crate) fn members(dir: &Dir, counts: &mut HashMap<u8, u32>) {
    for node in dir.values() {
        match node {
            Node::File(file) if file.group > 0 => *counts.entry(file.group).or_default() += 1,
            Node::Dir(below) => members(below, counts),
            Node::File(_) | Node::Symlink(_) => {}
        }
    }
}

/// How files are packed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packing {
    /// A file of this length or more is a pack of its own.
    pub whole_len: u64,
    /// A pack is closed when it has this length.
    pub pack_len: u64,
}

impl Default for Packing {
    fn default() -> Self {
        Self { whole_len: 1 << 20, pack_len: 256 << 10 }
    }
}

/// A pack with everything that lies in the lake of it.
#[derive(Debug, Clone)]
pub(crate) struct MadePack {
    pub id: PackId,
    pub index: PackIndex,
    pub outboard: PackOutboard,
    pub bytes: Vec<u8>,
}

impl MadePack {
    /// The key of its bytes below `data/`.
    pub fn key(&self) -> String {
        format!("made-{}", self.id.short())
    }
}

/// A tree that was made from a model.
#[derive(Debug)]
pub(crate) struct Made {
    pub built: Built,
    pub blocks: Vec<BuiltBlock>,
    pub packs: Vec<MadePack>,
    /// Paths by rank.
    pub order: Vec<Vec<u8>>,
}

#[derive(Default)]
struct OpenPack {
    bytes: Vec<u8>,
    contents: Vec<PackedContent>,
    outboard: PackOutboard,
}

/// Where a file's data lies in its logical bytes: everything, or what is not zeros in blocks of 4 KiB.
fn data_of(file: &File) -> Vec<(usize, usize)> {
    if !file.sparse {
        return vec![(0, file.bytes.len())];
    }
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (at, block) in (0..).step_by(ALIGN as usize).zip(file.bytes.chunks(ALIGN as usize)) {
        if block.iter().all(|&byte| byte == 0) {
            continue;
        }
        match runs.last_mut() {
            Some((start, len)) if *start + *len == at => *len += block.len(),
            _ => runs.push((at, block.len())),
        }
    }
    runs
}

impl OpenPack {
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN as usize), 0);
    }

    /// Appends a file's data; gives its place.
    fn add(&mut self, file: &File, content: ContentId, outboard: Option<crate::format::digest::Outboard>) -> Place {
        let mut extents = Vec::new();
        for (at, len) in data_of(file) {
            self.pad();
            extents.push(Extent { logical: at as u64, offset: self.bytes.len() as u64, len: len as u64 });
            self.bytes.extend_from_slice(&file.bytes[at..at + len]);
        }
        let size = file.bytes.len() as u64;
        let place = match extents.as_slice() {
            [Extent { logical: 0, offset, len }] if *len == size => Place::Run { offset: *offset },
            _ => Place::Sparse { extents },
        };
        if let Some(outboard) = outboard {
            self.outboard.contents.push((self.contents.len() as u32, outboard));
        }
        self.contents.push(PackedContent { content, size, place: place.clone() });
        place
    }

    fn close(mut self, whole: bool) -> MadePack {
        if !whole {
            self.pad();
        }
        let index = PackIndex { len: self.bytes.len() as u64, contents: self.contents };
        MadePack { id: index.id(), index, outboard: self.outboard, bytes: self.bytes }
    }
}

/// Places each content once; a pack's id is known when it is closed, so places come before locations.
struct Packer {
    packing: Packing,
    open: OpenPack,
    packs: Vec<MadePack>,
    /// Content -> (number of its pack, place).
    places: HashMap<ContentId, (usize, Place)>,
}

impl Packer {
    fn place(&mut self, dir: &Dir) {
        for node in dir.values() {
            if let Node::File(file) = node {
                self.place_file(file);
            }
        }
        for node in dir.values() {
            if let Node::Dir(below) = node {
                self.place(below);
            }
        }
    }

    fn place_file(&mut self, file: &File) {
        let (content, outboard) = digest_of(file);
        if data_of(file).is_empty() || file.bytes.is_empty() || self.places.contains_key(&content) {
            return;
        }
        if file.bytes.len() as u64 >= self.packing.whole_len && !file.sparse {
            self.close();
            let place = self.open.add(file, content, outboard);
            self.places.insert(content, (self.packs.len(), place));
            self.packs.push(std::mem::take(&mut self.open).close(true));
            return;
        }
        let place = self.open.add(file, content, outboard);
        self.places.insert(content, (self.packs.len(), place));
        if self.open.bytes.len() as u64 >= self.packing.pack_len {
            self.close();
        }
    }

    fn close(&mut self) {
        if !self.open.contents.is_empty() {
            self.packs.push(std::mem::take(&mut self.open).close(false));
        }
    }

    fn location(&self, file: &File) -> Location {
        let Some((number, place)) = self.places.get(&digest_of(file).0) else {
            return Location::None;
        };
        let pack = self.packs[*number].id;
        match place {
            Place::Run { offset } => Location::Run { pack, offset: *offset },
            Place::Sparse { extents } => Location::Sparse { pack, extents: extents.clone() },
        }
    }
}

fn digest_of(file: &File) -> (ContentId, Option<crate::format::digest::Outboard>) {
    let mut hasher = ContentHasher::new();
    hasher.update(&file.bytes);
    let (digest, outboard) = hasher.finish();
    (ContentId::Digest(digest), outboard)
}

struct Emitter<'a> {
    builder: TreeBuilder,
    packer: &'a Packer,
    counts: HashMap<u8, u32>,
    firsts: HashMap<u8, Vec<u8>>,
    order: Vec<Vec<u8>>,
}

impl Emitter<'_> {
    fn entry(&mut self, path: &[u8], name: &[u8], node: &Node) -> (Entry, Location) {
        let (mut mode, mut mtime, mut nlink, mut location) = (FILE_MODE, MTIME, 1, Location::None);
        let kind = match node {
            Node::Symlink(target) => {
                mode = 0o777;
                EntryKind::Symlink { target: target.as_slice().into() }
            }
            Node::Dir(below) => {
                mode = DIR_MODE;
                EntryKind::Dir {
                    children: below.len() as u64,
                    descendants: descendants(below),
                    subdirs: subdirs(below),
                }
            }
            Node::File(file) if self.firsts.contains_key(&file.group) => {
                (mode, mtime) = (0, Mtime::default());
                EntryKind::HardLink { first: self.firsts[&file.group].as_slice().into() }
            }
            Node::File(file) => {
                if file.group > 0 {
                    self.firsts.insert(file.group, path.to_vec());
                    nlink = self.counts[&file.group];
                }
                location = self.packer.location(file);
                EntryKind::File { size: file.bytes.len() as u64, content: digest_of(file).0, pin: None }
            }
        };
        (Entry { name: name.into(), mode, mtime, nlink, kind }, location)
    }

    fn emit(&mut self, prefix: &[u8], dir: &Dir) {
        let join = |name: &[u8]| {
            if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
        };
        for (name, node) in dir {
            let path = join(name);
            let (entry, location) = self.entry(&path, name, node);
            self.order.push(path);
            self.builder.push(entry, location).expect("in order");
        }
        for (name, node) in dir {
            if let Node::Dir(below) = node {
                self.emit(&join(name), below);
            }
        }
    }
}

/// Builds tree, placement and packs of a model.
pub(crate) fn make(model: &Dir, packing: Packing) -> Made {
    let mut packer = Packer { packing, open: OpenPack::default(), packs: Vec::new(), places: HashMap::new() };
    packer.place(model);
    packer.close();
    let mut counts = HashMap::new();
    members(model, &mut counts);
    let mut builder = TreeBuilder::new(DIR_MODE, MTIME, model.len() as u64, subdirs(model));
    for pack in &packer.packs {
        builder.declare_pack(pack.id, pack.index.len);
    }
    let mut emitter = Emitter { builder, packer: &packer, counts, firsts: HashMap::new(), order: Vec::new() };
    emitter.emit(b"", model);
    let Emitter { mut builder, order, .. } = emitter;
    let mut blocks = builder.drain();
    let (built, last) = builder.finish().expect("complete");
    blocks.extend(last);
    Made { built, blocks, packs: packer.packs, order }
}

impl Made {
    /// Puts everything into a lake, as a push does; gives the snapshot of the new commit.
    pub async fn put(&self, lake: &dyn Lake) -> Snapshot {
        let put = async |key: String, bytes: Vec<u8>| {
            lake.put(&key, Bytes::from(bytes), PutIf::Always).await.expect("puts");
        };
        for block in &self.blocks {
            let key = match block.of {
                BlockOf::Tree => paths::node_key(&block.id),
                BlockOf::Placement => paths::placed_key(&block.id),
            };
            put(key, block.bytes.clone()).await;
        }
        for pack in &self.packs {
            let (index, outboard) = (pack.index.encode(), pack.outboard.encode());
            let outboard = if pack.outboard.contents.is_empty() { Vec::new() } else { outboard };
            let recipe = Recipe {
                pack: pack.id,
                len: pack.index.len,
                index_len: index.len() as u64,
                outboard_len: outboard.len() as u64,
                source: Source::Native { key: pack.key() },
            };
            put(paths::data_key(&pack.key()), pack.bytes.clone()).await;
            put(paths::pack_key(&pack.id, PackPart::Index), index).await;
            if !outboard.is_empty() {
                put(paths::pack_key(&pack.id, PackPart::Outboard), outboard).await;
            }
            put(paths::pack_key(&pack.id, PackPart::Recipe), recipe.encode()).await;
        }
        put(paths::tree_key(&self.built.tree), self.built.root.encode()).await;
        let placement_id = self.built.placement.id();
        put(paths::placement_key(&self.built.tree, &placement_id), self.built.placement.encode()).await;
        let commit = Commit {
            format: 1,
            tree: self.built.tree,
            parents: Vec::new(),
            time_ms: 0,
            message: "made".to_owned(),
            author: String::new(),
            meta: BTreeMap::new(),
            lineage: Lineage::default(),
        };
        let encoded = commit.encode();
        let id: CommitId = Commit::id_of(&encoded);
        put(paths::commit_key(&id), encoded).await;
        Snapshot {
            dataset: DatasetName::parse("made").expect("is a name"),
            commit: id,
            commit_body: Arc::new(commit),
            root: Arc::new(self.built.root.clone()),
            placement: Arc::new(self.built.placement.clone()),
            placement_id,
            lake_id: LakeId(uuid::Uuid::nil()),
        }
    }
}
