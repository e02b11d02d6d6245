//! Pushes over a lake in memory, with faults; what arrived is read back straight from the lake.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::format::ids::{CommitId, ContentId, PackId, TreeId};
use crate::format::pack::{Layout, PackIndex, PackOutboard, Place, Recipe, Source};
use crate::format::paths::{PackPart, commit_key, data_key, pack_key};
use crate::format::placement::Location;
use crate::format::refs::{DatasetName, RefKind, RefName, Revision};
use crate::format::tree::nav::{self, DirAt};
use crate::format::tree::{EntryKind, Mtime};
use crate::store::catalog::Catalog;
use crate::store::lake::Lake;
use crate::testkit::faulty_lake::{FaultyLake, MemLake, Op, Rule};

use super::{
    Onto, Problem, ProblemKind, Progress, PushError, PushOptions, PushOutcome, Tuning, commit, exclude, push, walk,
};

/// Pushes and imports write the same intent: one golden file for both.
#[test]
fn an_intent_is_read_and_written_as_version_1_did() {
    let intent = super::intent::IntentBody {
        format: 1,
        push: "0190a1b2".to_owned(),
        dataset: "photos".to_owned(),
        by: "ada@gpu7".to_owned(),
        start_ms: 1_700_000_000_000,
        refreshed_ms: 1_700_000_300_000,
    };
    crate::testkit::golden::assert_golden("lake-intent", &intent);
}

mod onto;
mod refs;
mod resume;
mod reuse;
mod trees;

/// What a name is, for comparing.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    File { mode: u32, mtime: Mtime, bytes: Vec<u8> },
    Link { first: Vec<u8> },
    Dir { mode: u32, mtime: Mtime },
    Symlink { target: Vec<u8>, mtime: Mtime },
}

type Tree = BTreeMap<Vec<u8>, Node>;

/// A lake, a node, and a directory to push.
struct Bench {
    rt: tokio::runtime::Runtime,
    lake: Arc<FaultyLake>,
    memory: Arc<MemLake>,
    catalog: Catalog,
    source: tempfile::TempDir,
    _state: tempfile::TempDir,
}

fn tuning() -> Tuning {
    Tuning {
        readers: 3,
        read_ahead_bytes: 1 << 20,
        upload_bytes: 1 << 20,
        part_bytes: 64 << 10,
        inline_bytes: 160 << 10,
        racy: Duration::ZERO,
        layout: Some(Layout { pack_len: 256 << 10, whole_len: 320 << 10 }),
    }
}

impl Bench {
    fn new() -> Self {
        let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (lake, memory) = FaultyLake::over_memory();
        let state = tempfile::tempdir().unwrap();
        let catalog = open(&rt, lake.clone(), state.path());
        Self { rt, lake, memory, catalog, source: tempfile::tempdir().unwrap(), _state: state }
    }

    fn options(&self) -> PushOptions {
        let mut options = PushOptions::new(self.source.path(), dataset());
        options.tuning = tuning();
        options.author = "tester@here".to_owned();
        options
    }

    fn push(&self) -> PushOutcome {
        self.push_with(&self.options()).unwrap()
    }

    fn push_with(&self, options: &PushOptions) -> Result<PushOutcome, PushError> {
        push(&self.catalog, self.rt.handle(), options, &Arc::new(Progress::default()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.source.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    fn read_back(&self, commit: CommitId) -> Tree {
        read_back(&self.rt, &self.catalog, commit)
    }

    fn assert_round_trip(&self, outcome: &PushOutcome) {
        assert_same(&scan(self.source.path()), &self.read_back(outcome.commit));
    }

    fn data_keys(&self) -> HashSet<String> {
        self.memory.keys().into_iter().filter(|key| key.starts_with("data/")).collect()
    }

    fn data_bytes(&self) -> u64 {
        self.data_keys().iter().map(|key| self.memory.bytes_of(key).unwrap().len() as u64).sum()
    }
}

fn open(rt: &tokio::runtime::Runtime, lake: Arc<dyn Lake>, state: &Path) -> Catalog {
    rt.block_on(Catalog::open_or_create(lake, state, Default::default())).unwrap()
}

fn dataset() -> DatasetName {
    DatasetName::parse("photos").unwrap()
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Reads a directory as a tree that hard-link groups are told apart in.
fn scan(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut firsts = HashMap::new();
    scan_dir(root, &[], &mut tree, &mut firsts);
    tree
}

fn scan_dir(dir: &Path, prefix: &[u8], tree: &mut Tree, firsts: &mut HashMap<(u64, u64), Vec<u8>>) {
    let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
    let mut dirs = Vec::new();
    for name in names {
        let path = dir.join(&name);
        let mut key = prefix.to_vec();
        super::walk::join(&mut key, name.as_bytes());
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let mode = meta.mode() & 0o7777;
        let mtime = Mtime { secs: meta.mtime(), nanos: meta.mtime_nsec() as u32 };
        let node = if meta.is_dir() {
            dirs.push((path, key.clone()));
            Node::Dir { mode, mtime }
        } else if meta.is_symlink() {
            let target = std::fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec();
            Node::Symlink { target, mtime }
        } else if let Some(first) = firsts.get(&(meta.dev(), meta.ino())).filter(|_| meta.nlink() > 1) {
            Node::Link { first: first.clone() }
        } else {
            firsts.insert((meta.dev(), meta.ino()), key.clone());
            Node::File { mode, mtime, bytes: std::fs::read(&path).unwrap() }
        };
        tree.insert(key, node);
    }
    for (path, key) in dirs {
        scan_dir(&path, &key, tree, firsts);
    }
}

fn assert_same(expected: &Tree, found: &Tree) {
    let shown = |path: &[u8]| String::from_utf8_lossy(path).into_owned();
    for (path, node) in expected {
        let other = found.get(path).unwrap_or_else(|| panic!("{} is missing", shown(path)));
        if let (Node::File { bytes, .. }, Node::File { bytes: read, .. }) = (node, other) {
            assert!(bytes == read, "{}: bytes differ ({} and {})", shown(path), bytes.len(), read.len());
        }
        assert_eq!(node, other, "{}", shown(path));
    }
    for path in found.keys() {
        assert!(expected.contains_key(path), "{} was never there", shown(path));
    }
}

/// Reads a whole commit: blocks through the metadata store, bytes straight from the lake's objects,
/// every pack checked against its index and every content against its digest.
fn read_back(rt: &tokio::runtime::Runtime, catalog: &Catalog, commit: CommitId) -> Tree {
    let snapshot = rt.block_on(catalog.snapshot_of(&dataset(), &commit)).unwrap();
    let root = snapshot.root.clone();
    let mut tree = Tree::new();
    let mut packs: HashMap<PackId, Vec<u8>> = HashMap::new();
    let mut stack: Vec<(DirAt, Vec<u8>)> = vec![(nav::root_dir(&root), Vec::new())];
    let mut used: HashSet<PackId> = HashSet::new();
    while let Some((dir, prefix)) = stack.pop() {
        let mut from = 0;
        while from < dir.children {
            let listed = rt.block_on(catalog.meta.drive(|blocks| nav::list(&root, blocks, &dir, from, 100))).unwrap();
            from += listed.len() as u64;
            for entry in listed {
                let mut path = prefix.clone();
                super::walk::join(&mut path, &entry.entry.name);
                let (mode, mtime) = (entry.entry.mode, entry.entry.mtime);
                let node = match &entry.entry.kind {
                    EntryKind::Dir { .. } => {
                        stack.push((entry.dir.unwrap(), path.clone()));
                        Node::Dir { mode, mtime }
                    }
                    EntryKind::Symlink { target } => Node::Symlink { target: target.to_vec(), mtime },
                    EntryKind::HardLink { first } => Node::Link { first: first.to_vec() },
                    EntryKind::File { size, content, .. } => {
                        let location = rt
                            .block_on(
                                catalog
                                    .meta
                                    .drive(|blocks| nav::location(&root, &snapshot.placement, blocks, entry.rank)),
                            )
                            .unwrap();
                        if let Location::Run { pack, .. } | Location::Sparse { pack, .. } = &location {
                            used.insert(*pack);
                            packs.entry(*pack).or_insert_with(|| pack_bytes(rt, catalog, *pack));
                        }
                        let bytes = assemble(&location, *size, &packs);
                        let digest = crate::format::digest::digest(&bytes);
                        assert_eq!(*content, ContentId::Digest(digest), "{}", String::from_utf8_lossy(&path));
                        Node::File { mode, mtime, bytes }
                    }
                };
                tree.insert(path, node);
            }
        }
    }
    let listed: HashSet<PackId> = snapshot.placement.packs.iter().map(|pack| pack.pack).collect();
    assert_eq!(listed, used, "the placement's root lists the packs that are used");
    for pack in &snapshot.placement.packs {
        assert_eq!(pack.len, packs[&pack.pack].len() as u64, "the placement knows the length of each pack");
    }
    tree
}

fn get(rt: &tokio::runtime::Runtime, catalog: &Catalog, key: &str) -> Vec<u8> {
    let got = rt.block_on(crate::store::lake::get_all(&*catalog.lake, key, 1 << 30));
    got.unwrap_or_else(|error| panic!("{key}: {error}")).to_vec()
}

fn pack_bytes(rt: &tokio::runtime::Runtime, catalog: &Catalog, pack: PackId) -> Vec<u8> {
    let recipe = Recipe::decode(&get(rt, catalog, &pack_key(&pack, PackPart::Recipe))).unwrap();
    let index_bytes = get(rt, catalog, &pack_key(&pack, PackPart::Index));
    let index = PackIndex::decode(&index_bytes).unwrap();
    assert_eq!((index.id(), index.len, index_bytes.len() as u64), (pack, recipe.len, recipe.index_len));
    let Source::Native { key } = recipe.source else { panic!("a pushed pack has bytes of its own") };
    let mut bytes = get(rt, catalog, &data_key(&key));
    bytes.truncate(usize::try_from(recipe.len).unwrap());
    assert_eq!(bytes.len() as u64, recipe.len);
    let packs = HashMap::from([(pack, bytes)]);
    for content in &index.contents {
        let location = match &content.place {
            Place::Run { offset } => Location::Run { pack, offset: *offset },
            Place::Sparse { extents } => Location::Sparse { pack, extents: extents.clone() },
        };
        let digest = crate::format::digest::digest(&assemble(&location, content.size, &packs));
        assert_eq!(content.content, ContentId::Digest(digest), "each content of a pack is what its index says");
    }
    if recipe.outboard_len > 0 {
        let outboard = PackOutboard::decode(&get(rt, catalog, &pack_key(&pack, PackPart::Outboard))).unwrap();
        for (position, values) in &outboard.contents {
            let ContentId::Digest(digest) = index.contents[*position as usize].content else { panic!() };
            assert!(values.verify(&digest), "chaining values merge to the digest");
        }
    }
    packs.into_values().next().unwrap()
}

fn assemble(location: &Location, size: u64, packs: &HashMap<PackId, Vec<u8>>) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    match location {
        Location::None => {}
        Location::Run { pack, offset } => {
            bytes.copy_from_slice(&packs[pack][*offset as usize..(*offset + size) as usize]);
        }
        Location::Sparse { pack, extents } => {
            for extent in extents {
                let (at, len) = (extent.logical as usize, extent.len as usize);
                bytes[at..at + len].copy_from_slice(&packs[pack][extent.offset as usize..][..len]);
            }
        }
    }
    bytes
}

fn set_mtime(path: &Path, secs: i64, nanos: i64) {
    use nix::sys::stat::{UtimensatFlags, utimensat};
    use nix::sys::time::TimeSpec;
    let time = TimeSpec::new(secs, nanos);
    utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink).unwrap();
}

/// Fills a directory with one of everything.
fn hostile(root: &Path) {
    let write = |name: &[u8], bytes: &[u8]| {
        let path = root.join(OsStr::from_bytes(name));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    };
    write(b"empty", b"");
    write(b"small", b"hello");
    write(&[b'n'; 255], b"a long name");
    write(b"\xff\xfe not utf-8 \x01", b"bytes");
    write(b"new\nline and \"quotes\"", b"bytes");
    write(b"dir/inner/deep", &noise(1, 5000));
    write(b"dir.x/sorts-between", b"x");
    write(b"dir/twin", &noise(2, 9000));
    write(b"other/twin", &noise(2, 9000));
    std::fs::create_dir_all(root.join("void/void")).unwrap();
    let setuid = write(b"setuid", b"#!/bin/sh\n");
    std::fs::set_permissions(setuid, PermissionsExt::from_mode(0o6755)).unwrap();
    let secret = write(b"secret", b"nobody may read me");
    std::fs::set_permissions(secret, PermissionsExt::from_mode(0o000)).unwrap();
    let old = write(b"old", b"from before 1970");
    set_mtime(&old, -12345, 999_999_999);
    let new = write(b"new", b"from the year 2100");
    set_mtime(&new, 4_102_444_800, 1);
    let first = write(b"zz-linked", &noise(3, 4097));
    std::fs::hard_link(&first, root.join("dir/linked")).unwrap();
    std::fs::hard_link(&first, root.join("aa-linked")).unwrap();
    std::os::unix::fs::symlink("nowhere/at all", root.join("dangling")).unwrap();
    std::os::unix::fs::symlink("..", root.join("dir/up")).unwrap();
    let sparse = std::fs::File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(&noise(4, 10_000), 1 << 20).unwrap();
    sparse.write_all_at(&noise(5, 3), (2 << 20) + 777).unwrap();
    let holes = std::fs::File::create(root.join("holes-only")).unwrap();
    holes.set_len(3 << 20).unwrap();
    write(b"middle", &noise(6, 300 << 10));
    write(b"large", &noise(7, 1_000_003));
    let sparse = std::fs::File::create(root.join("large-sparse")).unwrap();
    sparse.write_all_at(&noise(8, 600_000), 5 << 20).unwrap();
    sparse.set_len(9 << 20).unwrap();
    set_mtime(&root.join("void"), 1_000_000, 5);
}

fn tag_of(bench: &Bench, name: &str) -> Vec<CommitId> {
    let name = RefName::parse(name).unwrap();
    let heads = bench.rt.block_on(bench.catalog.refs.heads(&dataset(), RefKind::Tag, &name)).unwrap();
    heads.into_iter().map(|head| head.commit).collect()
}

fn main_of(bench: &Bench) -> Vec<CommitId> {
    let name = RefName::parse("main").unwrap();
    let heads = bench.rt.block_on(bench.catalog.refs.heads(&dataset(), RefKind::Branch, &name)).unwrap();
    heads.into_iter().map(|head| head.commit).collect()
}

fn many(bench: &Bench) {
    for number in 0..12u64 {
        bench.write(&format!("d{}/f{number}", number % 3), noise(number, 20_000 + number as usize));
    }
    bench.write("large", noise(100, 700_000));
}
