//! Pushes over a lake in memory, with faults; what arrived is read back straight from the lake.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use crate::format::ids::{CommitId, ContentId, PackId};
use crate::format::pack::{Layout, PackIndex, PackOutboard, Place, Recipe, Source};
use crate::format::paths::{PackPart, commit_key, data_key, pack_key};
use crate::format::placement::Location;
use crate::format::refs::{DatasetName, RefKind, RefName, Revision};
use crate::format::tree::nav::{self, DirAt};
use crate::format::tree::{EntryKind, Mtime};
use crate::store::catalog::Catalog;
use crate::store::lake::Lake;
use crate::testkit::faulty_lake::{FaultyLake, MemLake, Op, Rule};

use super::{Onto, Problem, ProblemKind, Progress, PushError, PushOptions, PushOutcome, Tuning, push};

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

#[test]
fn a_tree_of_everything_comes_back_as_it_was() {
    let bench = Bench::new();
    hostile(bench.source.path());
    let outcome = bench.push();
    bench.assert_round_trip(&outcome);
    assert!(!outcome.unchanged && outcome.files >= 18, "{outcome:?}");
    assert!(bench.memory.keys().iter().all(|key| !key.starts_with("intents/")), "the intent is gone");
    assert_eq!(bench.memory.uploads_open(), 0);
    // Holes are not stored.
    assert!(outcome.uploaded_data_bytes < 3 << 20, "{outcome:?}");
}

#[test]
fn pushing_an_unchanged_tree_reads_no_file_and_makes_no_commit() {
    let bench = Bench::new();
    hostile(bench.source.path());
    let first = bench.push();
    assert!(first.files_read > 0);
    let mut options = bench.options();
    bench.lake.reset_counters();
    let second = bench.push_with(&options).unwrap();
    assert_eq!((second.files_read, second.bytes_read, second.uploaded_data_bytes), (0, 0, 0));
    assert!(second.unchanged);
    assert_eq!(second.commit, first.commit);
    let puts: Vec<_> = bench
        .lake
        .counters()
        .log
        .into_iter()
        .filter(|(op, key)| *op == Op::Put && !key.starts_with("intents/"))
        .collect();
    assert_eq!(puts, []);
    // A message asks for a commit of its own, a tag does not.
    options.tag = Some(RefName::parse("v1").unwrap());
    let tagged = bench.push_with(&options).unwrap();
    assert_eq!(tagged.commit, first.commit);
    assert_eq!(tag_of(&bench, "v1"), [first.commit]);
    options.tag = None;
    options.message = Some("again".to_owned());
    let third = bench.push_with(&options).unwrap();
    assert_ne!(third.commit, first.commit);
    assert_eq!((third.tree, third.files_read), (first.tree, 0));
    bench.assert_round_trip(&third);
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

#[test]
fn a_change_uploads_only_what_is_new() {
    let bench = Bench::new();
    for number in 0..40 {
        bench.write(&format!("d{}/f{number}", number % 7), noise(number, 3000));
    }
    bench.push();
    let before = bench.data_bytes();
    bench.write("d3/f3", noise(1000, 2000));
    std::fs::rename(bench.path("d0/f0"), bench.path("d1/renamed")).unwrap();
    let second = bench.push();
    bench.assert_round_trip(&second);
    assert_eq!(second.new_bytes, 2000);
    assert_eq!(second.uploaded_data_bytes, 4096);
    assert_eq!(bench.data_bytes() - before, 4096);
    assert_eq!(second.files_read, 2, "the changed one and the renamed one");
    assert_eq!(main_of(&bench), [second.commit]);
}

#[test]
fn equal_contents_are_stored_once() {
    let bench = Bench::new();
    for number in 0..30 {
        bench.write(&format!("f{number}"), noise(7, 10_000));
        bench.write(&format!("large{number}"), noise(8, 400 << 10));
    }
    let outcome = bench.push();
    bench.assert_round_trip(&outcome);
    assert_eq!(outcome.new_bytes, 10_000 + (400 << 10));
    // A large file is sent while it is digested unless one of its size is known: one at first.
    assert_eq!(bench.data_keys().len(), 2);
}

#[test]
fn the_same_tree_has_the_same_id_from_anywhere_and_by_any_way() {
    let bench = Bench::new();
    hostile(bench.source.path());
    let first = bench.push();
    // Another place, another lake, another node, another packing.
    let other = Bench::new();
    hostile(other.source.path());
    copy_times(bench.source.path(), other.source.path());
    let mut options = other.options();
    options.tuning.layout = Some(Layout { pack_len: 32 << 10, whole_len: 1 << 30 });
    options.tuning.readers = 1;
    assert_eq!(other.push_with(&options).unwrap().tree, first.tree);
    // Other steps of history.
    bench.write("passing", "by");
    let second = bench.push();
    assert_ne!(second.tree, first.tree);
    std::fs::remove_file(bench.path("passing")).unwrap();
    copy_times(other.source.path(), bench.source.path());
    let third = bench.push();
    assert_eq!(third.tree, first.tree);
    bench.assert_round_trip(&third);
}

/// Gives everything in `to` (and `to` itself) the times that it has in `from`.
fn copy_times(from: &Path, to: &Path) {
    let mut paths: Vec<Vec<u8>> = scan(from).into_keys().collect();
    paths.sort_by_key(|path| std::cmp::Reverse(path.len()));
    paths.push(Vec::new());
    for path in paths {
        let (from, to) = (from.join(OsStr::from_bytes(&path)), to.join(OsStr::from_bytes(&path)));
        let meta = std::fs::symlink_metadata(&from).unwrap();
        set_mtime(&to, meta.mtime(), meta.mtime_nsec());
        if path.is_empty() {
            std::fs::set_permissions(&to, meta.permissions()).unwrap();
        }
    }
}

#[test]
fn a_push_that_fails_at_any_write_is_finished_by_running_it_again() {
    let expected = {
        let bench = Bench::new();
        many(&bench);
        bench.push()
    };
    let mut steps = 0;
    for fail_at in 0.. {
        let bench = Bench::new();
        many(&bench);
        copy_root(&bench);
        bench.lake.reset_counters();
        bench.lake.rule(Rule::crash_after(fail_at));
        let result = bench.push_with(&bench.options());
        bench.lake.heal();
        check_refs(&bench);
        if result.is_ok() {
            break;
        }
        steps += 1;
        let again = bench.push();
        assert_eq!(again.tree.to_string(), expected_tree(&expected, &bench), "failed at write {fail_at}");
        bench.assert_round_trip(&again);
        assert_eq!(bench.memory.uploads_open(), 0, "failed at write {fail_at}");
        let leftover = bench.memory.keys().into_iter().any(|key| key.starts_with("intents/"));
        assert!(!leftover, "failed at write {fail_at}");
    }
    assert!(steps > 15, "only {steps} steps could fail");
}

/// The tree id depends on times, which differ from one directory to the next.
fn expected_tree(_first: &PushOutcome, bench: &Bench) -> String {
    let lone = Bench::new();
    let mut options = bench.options();
    options.tuning.racy = Duration::ZERO;
    push(&lone.catalog, lone.rt.handle(), &options, &Arc::new(Progress::default())).unwrap().tree.to_string()
}

fn many(bench: &Bench) {
    for number in 0..12u64 {
        bench.write(&format!("d{}/f{number}", number % 3), noise(number, 20_000 + number as usize));
    }
    bench.write("large", noise(100, 700_000));
}

fn copy_root(bench: &Bench) {
    set_mtime(bench.source.path(), 1_000_000, 0);
}

/// No ref may point to a commit that is not complete.
fn check_refs(bench: &Bench) {
    let keys: HashSet<String> = bench.memory.keys().into_iter().collect();
    if !keys.iter().any(|key| key.contains("/refs/") || key.contains("/log/")) {
        return;
    }
    for commit in main_of(bench) {
        assert!(keys.contains(&commit_key(&commit)));
        bench.read_back(commit);
    }
}

#[test]
fn what_was_uploaded_before_a_failure_is_not_uploaded_again() {
    for fail_at in [3, 6, 9, 12, 15, 18] {
        let bench = Bench::new();
        for number in 0..60u64 {
            bench.write(&format!("f{number:02}"), noise(number, 30_000));
        }
        bench.write("large", noise(100, 900_000));
        let parts = |bench: &Bench| bench.lake.counters().of(Op::UploadPart);
        bench.lake.rule(Rule::crash_after(fail_at));
        assert!(bench.push_with(&bench.options()).is_err());
        bench.lake.heal();
        let before = parts(&bench);
        let again = bench.push();
        let total = 60 * 32_768 + 900_000;
        let sent_before = bench.lake.counters().bytes_in - again.uploaded_bytes;
        assert!(
            again.uploaded_data_bytes + (before * (64 << 10)).min(sent_before) <= total + 8 * (64 << 10) + 6 * 32_768,
            "failed at {fail_at}: {} bytes of {total} were sent again after {before} parts",
            again.uploaded_data_bytes
        );
        bench.assert_round_trip(&again);
    }
}

#[test]
fn an_interrupted_large_file_goes_on_with_its_next_part() {
    let bench = Bench::new();
    bench.write("large", noise(1, 1_000_000));
    // 16 parts; the intent, the begin and ten parts go well.
    bench.lake.rule(Rule::crash_after(12));
    assert!(bench.push_with(&bench.options()).is_err());
    bench.lake.heal();
    let again = bench.push();
    assert!(again.uploaded_data_bytes <= 1_000_000 - 8 * (64 << 10), "{}", again.uploaded_data_bytes);
    assert_eq!(again.bytes_read, 1_000_000, "it is digested again, not sent again");
    bench.assert_round_trip(&again);
    assert_eq!(bench.data_keys().len(), 1);
}

#[test]
fn a_large_file_that_changed_between_the_pushes_is_sent_as_it_is_now() {
    let bench = Bench::new();
    bench.write("large", noise(1, 1_000_000));
    bench.lake.rule(Rule::crash_after(12));
    assert!(bench.push_with(&bench.options()).is_err());
    bench.lake.heal();
    let mut bytes = noise(1, 1_000_000);
    bytes[300_000] ^= 1;
    bench.write("large", bytes);
    let again = bench.push();
    bench.assert_round_trip(&again);
}

#[test]
fn a_file_that_never_holds_still_fails_the_push() {
    let bench = Bench::new();
    for number in 0..5u64 {
        bench.write(&format!("calm{number}"), noise(number, 1000));
    }
    // Large enough to be read for longer than two writes are apart, even on a busy machine.
    bench.write("restless", vec![0; 32 << 20]);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (path, seen) = (bench.path("restless"), stop.clone());
    let writer = std::thread::spawn(move || {
        let mut at = 0u64;
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        while !seen.load(std::sync::atomic::Ordering::Relaxed) {
            file.write_all_at(&[at as u8; 8192], (at % 16) * 8192).unwrap();
            at += 1;
        }
    });
    std::thread::sleep(Duration::from_millis(20));
    let mut options = bench.options();
    options.tuning.layout = Some(Layout { pack_len: 64 << 20, whole_len: 64 << 20 });
    let result = bench.push_with(&options);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.join().unwrap();
    let Err(PushError::Changed { problems }) = result else { panic!("{result:?}") };
    assert_eq!(problems.len(), 1);
    assert_eq!((problems[0].path.as_str(), problems[0].kind), ("restless", ProblemKind::Changed));
    assert!(!bench.memory.keys().iter().any(|key| key.starts_with("commits/")));
    let again = bench.push();
    bench.assert_round_trip(&again);
}

#[test]
fn sockets_and_pipes_are_listed_and_can_be_left_out() {
    let bench = Bench::new();
    bench.write("dir/file", "x");
    let _socket = std::os::unix::net::UnixListener::bind(bench.path("dir/socket")).unwrap();
    nix::unistd::mkfifo(&bench.path("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let Err(PushError::Problems { problems }) = bench.push_with(&bench.options()) else { panic!() };
    let mut found: Vec<_> = problems.iter().map(|problem| (problem.path.as_str(), problem.kind)).collect();
    found.sort_by_key(|(path, _)| path.to_owned());
    assert_eq!(found, [("dir/socket", ProblemKind::Socket), ("fifo", ProblemKind::Fifo)]);
    assert!(!bench.memory.keys().iter().any(|key| key.starts_with("data/") || key.starts_with("intents/")));
    let mut options = bench.options();
    options.skip_unreadable = true;
    let outcome = bench.push_with(&options).unwrap();
    assert_eq!(outcome.skipped.len(), 2);
    let names: Vec<_> = bench.read_back(outcome.commit).into_keys().collect();
    assert_eq!(names, [b"dir".to_vec(), b"dir/file".to_vec()]);
}

#[test]
fn excluded_names_are_not_even_looked_at() {
    let bench = Bench::new();
    bench.write("keep/a.txt", "a");
    bench.write("keep/b.tmp", "b");
    bench.write("cache/deep/c", "c");
    let mut options = bench.options();
    options.excludes = vec!["*.tmp".to_owned(), "/cache/".to_owned()];
    let outcome = bench.push_with(&options).unwrap();
    let names: Vec<_> = bench.read_back(outcome.commit).into_keys().collect();
    assert_eq!(names, [b"keep".to_vec(), b"keep/a.txt".to_vec()]);
    assert_eq!(outcome.files_read, 1);
}

#[test]
fn two_pushes_of_one_directory_at_once_are_refused() {
    let bench = Bench::new();
    bench.write("a", "a");
    bench.push();
    let held = {
        let dir = bench.catalog.state_dir.join("push").join(bench.catalog.lake_id.to_string());
        let file = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.extension().is_some_and(|ext| ext == "redb"));
        redb::Database::open(file.unwrap()).unwrap()
    };
    assert!(matches!(bench.push_with(&bench.options()), Err(PushError::Busy { .. })));
    drop(held);
    assert!(bench.push().unchanged);
}

#[test]
fn a_pack_that_is_mostly_unused_is_written_again() {
    let bench = Bench::new();
    for number in 0..10u64 {
        bench.write(&format!("f{number}"), noise(number, 10_000));
    }
    let first = bench.push();
    assert_eq!(first.packs_total, 1);
    for number in 3..10u64 {
        std::fs::remove_file(bench.path(&format!("f{number}"))).unwrap();
    }
    let second = bench.push();
    bench.assert_round_trip(&second);
    assert_eq!((second.packs_total, second.packs_new), (1, 1));
    assert_eq!(second.uploaded_data_bytes, 3 * 12_288);
    assert_eq!(second.new_bytes, 0, "nothing of it is new");
    // Then it holds.
    assert!(bench.push().unchanged);
    assert_eq!(bench.push().files_read, 0);
}

#[test]
fn many_small_pushes_leave_few_packs() {
    let bench = Bench::new();
    let mut most = 0;
    for number in 0..24u64 {
        bench.write(&format!("f{number:02}"), noise(number, 4000));
        let outcome = bench.push();
        most = most.max(outcome.packs_total);
        if number % 6 == 5 {
            bench.assert_round_trip(&outcome);
        }
    }
    assert!(most <= 16, "{most} packs");
}

#[test]
fn a_fresh_node_reuses_what_the_lake_has() {
    let bench = Bench::new();
    many(&bench);
    let first = bench.push();
    let state = tempfile::tempdir().unwrap();
    let catalog = open(&bench.rt, bench.lake.clone(), state.path());
    let again = push(&catalog, bench.rt.handle(), &bench.options(), &Arc::new(Progress::default())).unwrap();
    assert!(again.unchanged);
    assert_eq!((again.commit, again.uploaded_data_bytes), (first.commit, 0));
    assert!(again.files_read > 0, "it knows nothing of the files");
}

#[test]
fn onto_replaces_a_part_and_leaves_the_rest() {
    let bench = Bench::new();
    hostile(bench.source.path());
    let first = bench.push();
    let whole = scan(bench.source.path());
    let part = tempfile::tempdir().unwrap();
    std::fs::write(part.path().join("fresh"), noise(50, 5000)).unwrap();
    std::fs::create_dir(part.path().join("sub")).unwrap();
    std::fs::write(part.path().join("sub/x"), "x").unwrap();
    std::fs::hard_link(part.path().join("sub/x"), part.path().join("sub/y")).unwrap();
    // `dir` goes away: `dir/linked` was the second of three links.
    let mut options = bench.options();
    options.dir = part.path().to_owned();
    options.onto = Some(Onto { rev: Revision::parse("photos").unwrap(), at: Some(b"dir".to_vec()) });
    let outcome = bench.push_with(&options).unwrap();
    let mut expected: Tree = whole.clone();
    expected.retain(|path, _| !path.starts_with(b"dir/"));
    let graft = |expected: &mut Tree, at: &str| {
        let root = std::fs::metadata(part.path()).unwrap();
        let mtime = Mtime { secs: root.mtime(), nanos: root.mtime_nsec() as u32 };
        expected.insert(at.as_bytes().to_vec(), Node::Dir { mode: root.mode() & 0o7777, mtime });
        for (path, node) in scan(part.path()) {
            let prefixed = |path: &[u8]| [at.as_bytes(), b"/", path].concat();
            let node = match node {
                Node::Link { first } => Node::Link { first: prefixed(&first) },
                node => node,
            };
            expected.insert(prefixed(&path), node);
        }
    };
    graft(&mut expected, "dir");
    assert_same(&expected, &bench.read_back(outcome.commit));
    assert_eq!(outcome.files_read, 2);
    assert_eq!(main_of(&bench), [outcome.commit]);
    // A path that is not there is made, on top of the first commit, on a branch of its own.
    options.onto = Some(Onto {
        rev: Revision::parse(&format!("photos@{}", first.commit)).unwrap(),
        at: Some(b"made/on/the/way".to_vec()),
    });
    assert!(matches!(bench.push_with(&options), Err(PushError::NotHead { .. })));
    options.branch = Some(RefName::parse("side").unwrap());
    let side = bench.push_with(&options).unwrap();
    let found = bench.read_back(side.commit);
    assert!(found.contains_key(b"made/on/the/way/sub/x".as_slice()) && found.contains_key(b"dir/twin".as_slice()));
    assert_eq!(found.len(), whole.len() + 4 + scan(part.path()).len());
}

#[test]
fn onto_moves_a_hard_link_group_whose_first_entry_goes_away() {
    let bench = Bench::new();
    bench.write("a/first", noise(1, 5000));
    std::fs::create_dir_all(bench.path("b")).unwrap();
    std::fs::hard_link(bench.path("a/first"), bench.path("b/second")).unwrap();
    std::fs::hard_link(bench.path("a/first"), bench.path("b/third")).unwrap();
    bench.push();
    let part = tempfile::tempdir().unwrap();
    let mut options = bench.options();
    options.dir = part.path().to_owned();
    options.onto = Some(Onto { rev: Revision::parse("photos").unwrap(), at: Some(b"a".to_vec()) });
    let outcome = bench.push_with(&options).unwrap();
    let found = bench.read_back(outcome.commit);
    assert!(matches!(&found[b"b/second".as_slice()], Node::File { bytes, .. } if *bytes == noise(1, 5000)));
    assert_eq!(found[b"b/third".as_slice()], Node::Link { first: b"b/second".to_vec() });
}

#[test]
fn onto_without_a_path_merges_into_the_root() {
    let bench = Bench::new();
    bench.write("both/old", "old");
    bench.write("both/same", "before");
    bench.write("left", "left");
    bench.push();
    let part = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(part.path().join("both/deep")).unwrap();
    std::fs::write(part.path().join("both/same"), "after").unwrap();
    std::fs::write(part.path().join("both/deep/new"), "new").unwrap();
    std::fs::write(part.path().join("right"), "right").unwrap();
    let mut options = bench.options();
    options.dir = part.path().to_owned();
    options.onto = Some(Onto { rev: Revision::parse("photos@main").unwrap(), at: None });
    let outcome = bench.push_with(&options).unwrap();
    let found = bench.read_back(outcome.commit);
    let names: Vec<String> = found.keys().map(|path| String::from_utf8(path.clone()).unwrap()).collect();
    assert_eq!(names, ["both", "both/deep", "both/deep/new", "both/old", "both/same", "left", "right"]);
    assert!(matches!(&found[b"both/same".as_slice()], Node::File { bytes, .. } if bytes == b"after"));
    assert!(matches!(&found[b"both/old".as_slice()], Node::File { bytes, .. } if bytes == b"old"));
}

#[test]
fn a_branch_that_moved_meanwhile_is_not_overwritten_and_the_commit_stays() {
    let bench = Bench::new();
    bench.write("a", "a");
    let first = bench.push();
    let part = tempfile::tempdir().unwrap();
    std::fs::write(part.path().join("b"), "b").unwrap();
    let mut options = bench.options();
    options.dir = part.path().to_owned();
    // The other push runs while this one has looked at the head but not moved it.
    let target = bench.rt.block_on(super::commit::Target::find(&bench.catalog, &options)).unwrap();
    let other = bench.push_with(&options).unwrap();
    assert_eq!(target.heads, [first.commit]);
    let moved = bench.rt.block_on(bench.catalog.refs.move_branch(
        &dataset(),
        &target.branch,
        first.commit,
        crate::store::catalog::refs::Expect::Heads(target.heads.clone()),
    ));
    assert!(moved.is_err());
    assert_eq!(main_of(&bench), [other.commit]);
}

#[test]
fn a_name_that_is_taken_is_refused_before_there_is_a_commit() {
    let bench = Bench::new();
    bench.write("a", "a");
    let mut options = bench.options();
    options.tag = Some(RefName::parse("v1").unwrap());
    bench.push_with(&options).unwrap();
    bench.write("a", "b");
    let head = main_of(&bench);
    assert!(matches!(bench.push_with(&options), Err(PushError::NameTaken { .. })));
    let commits = |bench: &Bench| bench.memory.keys().iter().filter(|key| key.starts_with("commits/")).count();
    assert_eq!(commits(&bench), 1);
    options.tag = Some(RefName::parse("main").unwrap());
    assert!(matches!(bench.push_with(&options), Err(PushError::NameTaken { .. })));
    options.tag = None;
    options.branch = Some(RefName::parse("v1").unwrap());
    assert!(matches!(bench.push_with(&options), Err(PushError::NameTaken { .. })));
    assert_eq!(main_of(&bench), head);
}

#[test]
fn an_unreadable_file_found_while_reading_is_left_out_with_its_links() {
    let bench = Bench::new();
    bench.write("dir/good", "good");
    bench.write("dir/bad", "bad");
    std::fs::hard_link(bench.path("dir/bad"), bench.path("dir/bad-link")).unwrap();
    let mut spool = super::walk::walk(
        bench.source.path(),
        bench._state.path(),
        &super::exclude::Excludes::new(&[]).unwrap(),
        &Progress::default(),
    )
    .unwrap()
    .spool;
    spool.flush().unwrap();
    // As the contents pass does it: the first entry and, later, its link leave the counts.
    spool.drop_item(1).unwrap();
    spool.drop_item(1).unwrap();
    assert_eq!((spool.counts(1).unwrap().children, spool.counts(1).unwrap().descendants), (1, 1));
    assert_eq!((spool.counts(0).unwrap().children, spool.counts(0).unwrap().descendants), (1, 2));
}

#[test]
fn what_gc_condemned_is_rescued_before_it_is_relied_on() {
    let bench = Bench::new();
    many(&bench);
    let first = bench.push();
    let condemned: Vec<String> = bench
        .memory
        .keys()
        .into_iter()
        .filter(|key| key.starts_with("packs/") || key.starts_with("nodes/"))
        .map(|key| key.rsplit_once('.').map_or(key.clone(), |(stem, _)| stem.to_owned()))
        .collect();
    bench.memory.set("condemned/run/list/00000000", condemned.join("\n"));
    let head = serde_json::json!({
        "format": 1, "run": "run", "by": "gc@there", "lists": 1, "keys": condemned.len(), "bytes": 0
    });
    bench.memory.set("condemned/run/head", head.to_string());
    bench.write("more", "more");
    let second = bench.push();
    bench.assert_round_trip(&second);
    assert_ne!(second.commit, first.commit);
    let rescued: HashSet<String> = bench
        .memory
        .keys()
        .iter()
        .filter(|key| key.starts_with("condemned/run/rescue/"))
        .flat_map(|key| {
            let text = String::from_utf8(bench.memory.bytes_of(key).unwrap().to_vec()).unwrap();
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    let snapshot = bench.rt.block_on(bench.catalog.snapshot_of(&dataset(), &second.commit)).unwrap();
    for pack in &snapshot.placement.packs {
        let key = pack_key(&pack.pack, PackPart::Recipe);
        let stem = key.strip_suffix(".recipe").unwrap();
        assert!(!condemned.iter().any(|key| key == stem) || rescued.contains(stem), "{stem}");
    }
    assert!(!rescued.is_empty());
}

#[test]
fn problems_show_paths_that_are_not_utf8() {
    let problem = Problem::new(b"a\xffb", ProblemKind::Changed, "why");
    assert_eq!(problem.path, "a\u{fffd}b");
}

/// A small random tree: paths by position, contents by a small alphabet so that some are equal.
#[derive(Debug, Clone)]
enum Made {
    File { dir: usize, name: u8, content: u8, len: usize, mode: u32 },
    Dir { dir: usize, name: u8 },
    Symlink { dir: usize, name: u8 },
    Hard { dir: usize, name: u8, of: usize },
    Sparse { dir: usize, name: u8, at: u64, len: usize },
    Remove { of: usize },
}

fn made() -> impl Strategy<Value = Made> {
    let dir = 0usize..6;
    let name = 0u8..12;
    let len = prop_oneof![Just(0usize), 1usize..200, 4000usize..9000, 100_000usize..400_000];
    prop_oneof![
        6 => (dir.clone(), name.clone(), 0u8..6, len, prop_oneof![Just(0o644u32), Just(0o755), Just(0o400)])
            .prop_map(|(dir, name, content, len, mode)| Made::File { dir, name, content, len, mode }),
        3 => (dir.clone(), name.clone()).prop_map(|(dir, name)| Made::Dir { dir, name }),
        1 => (dir.clone(), name.clone()).prop_map(|(dir, name)| Made::Symlink { dir, name }),
        1 => (dir.clone(), name.clone(), 0usize..20).prop_map(|(dir, name, of)| Made::Hard { dir, name, of }),
        1 => (dir, name, 0u64..3, 1usize..70_000)
            .prop_map(|(dir, name, at, len)| Made::Sparse { dir, name, at: at * 200_000, len }),
        1 => (0usize..20).prop_map(|of| Made::Remove { of }),
    ]
}

/// Carries a step out; one that makes no sense is skipped.
fn make(root: &Path, step: &Made, dirs: &mut Vec<PathBuf>, files: &mut Vec<PathBuf>) {
    let named = |dirs: &[PathBuf], dir: usize, name: u8| dirs[dir % dirs.len()].join(format!("n{name}"));
    match step {
        Made::File { dir, name, content, len, mode } => {
            let path = named(dirs, *dir, *name);
            if path.symlink_metadata().is_err() && std::fs::write(&path, noise(u64::from(*content), *len)).is_ok() {
                std::fs::set_permissions(&path, PermissionsExt::from_mode(*mode)).unwrap();
                files.push(path);
            }
        }
        Made::Dir { dir, name } => {
            let path = named(dirs, *dir, *name);
            if std::fs::create_dir(&path).is_ok() {
                dirs.push(path);
            }
        }
        Made::Symlink { dir, name } => {
            let _ = std::os::unix::fs::symlink(root, named(dirs, *dir, *name));
        }
        Made::Hard { dir, name, of } => {
            if !files.is_empty() {
                let _ = std::fs::hard_link(&files[of % files.len()], named(dirs, *dir, *name));
            }
        }
        Made::Sparse { dir, name, at, len } => {
            let path = named(dirs, *dir, *name);
            if path.symlink_metadata().is_err() {
                let file = std::fs::File::create(&path).unwrap();
                file.write_all_at(&noise(*at, *len), *at).unwrap();
                file.set_len(at + *len as u64 + 100_000).unwrap();
                files.push(path);
            }
        }
        Made::Remove { of } => {
            if !files.is_empty() {
                let _ = std::fs::remove_file(files.swap_remove(of % files.len()));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn random_trees_come_back_as_they_were(
        first in proptest::collection::vec(made(), 1..40),
        second in proptest::collection::vec(made(), 0..15),
        third in proptest::collection::vec(made(), 0..15),
    ) {
        let bench = Bench::new();
        let mut dirs = vec![bench.source.path().to_owned()];
        let mut files = Vec::new();
        for steps in [first, second, third] {
            for step in &steps {
                make(bench.source.path(), step, &mut dirs, &mut files);
            }
            let outcome = bench.push();
            bench.assert_round_trip(&outcome);
        }
        let fresh = Bench::new();
        let again = push(&fresh.catalog, fresh.rt.handle(), &bench.options(), &Arc::new(Progress::default())).unwrap();
        prop_assert_eq!(again.tree, bench.push().tree);
    }
}
