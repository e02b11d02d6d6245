//! The names of a mount against a simple model: nested maps.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use proptest::prelude::*;

use super::names::{Listed, Names, Origin};
use super::{Attr, Ino, Kind, Look, ROOT, XATTR_COMMIT, XATTR_DIGEST, XATTR_TREE};
use crate::format::digest::digest;
use crate::format::ids::{BlockId, CommitId, ContentId};
use crate::format::placement::PlacedBlock;
use crate::format::tree::Block;
use crate::format::tree::build::{BlockOf, BuiltBlock};
use crate::format::tree::nav::{Blocks, NavError, Need};
use crate::testkit::model::{DIR_MODE, Dir, FILE_MODE, File, MTIME, Node, Packing, dir, file, make, members, subdirs};

/// Blocks in memory, some of which may have to be fetched first.
#[derive(Debug, Default)]
struct Memory {
    tree: HashMap<BlockId, Arc<Block>>,
    placed: HashMap<BlockId, Arc<PlacedBlock>>,
    here: std::cell::RefCell<HashSet<Need>>,
    all_here: bool,
}

impl Blocks for Memory {
    fn tree_block(&self, id: BlockId) -> Option<Arc<Block>> {
        let here = self.all_here || self.here.borrow().contains(&Need::Tree(id));
        self.tree.get(&id).filter(|_| here).cloned()
    }

    fn placed_block(&self, id: BlockId) -> Option<Arc<PlacedBlock>> {
        let here = self.all_here || self.here.borrow().contains(&Need::Placed(id));
        self.placed.get(&id).filter(|_| here).cloned()
    }
}

impl Memory {
    fn keep(&mut self, blocks: Vec<BuiltBlock>) {
        for block in blocks {
            match block.of {
                BlockOf::Tree => {
                    let decoded = Block::decode(&block.bytes).expect("was built");
                    self.tree.insert(block.id, Arc::new(decoded));
                }
                BlockOf::Placement => {
                    let decoded = PlacedBlock::decode(&block.bytes).expect("was built");
                    self.placed.insert(block.id, Arc::new(decoded));
                }
            }
        }
    }

    /// Runs a navigation as `MetaStore::drive` does: fetches what it needs and calls again.
    fn drive<T>(&self, f: impl Fn(&dyn Blocks) -> Result<T, NavError>) -> Result<T, NavError> {
        loop {
            match f(self) {
                Err(NavError::Need(need)) => {
                    assert!(self.here.borrow_mut().insert(need), "{need:?} was fetched")
                }
                other => return other,
            }
        }
    }
}

const LOOK: Look = Look { uid: 1, gid: 2, umask: 0, file_mode: None, dir_mode: None };

/// Builds the tree of a model.
fn build(model: &Dir) -> (Origin, Memory, Vec<Vec<u8>>) {
    let made = make(model, Packing::default());
    let mut memory = Memory::default();
    memory.keep(made.blocks);
    let origin = Origin {
        root: Arc::new(made.built.root),
        placement: Arc::new(made.built.placement),
        commit: CommitId([7; 32]),
        tree: made.built.tree,
    };
    (origin, memory, made.order)
}

/// Lists a directory to its end, a few names at a time.
fn list_all(names: &Names, memory: &Memory, dir: Ino, limit: usize) -> Vec<Listed> {
    let mut all: Vec<Listed> = Vec::new();
    loop {
        let from = all.last().map_or(0, |last| last.next);
        let some = memory.drive(|blocks| names.list(blocks, dir, from, limit)).expect("lists");
        if some.is_empty() {
            return all;
        }
        all.extend(some);
    }
}

struct Check<'a> {
    names: &'a Names,
    memory: &'a Memory,
    order: &'a [Vec<u8>],
    /// Inodes of hard-link groups.
    firsts: HashMap<u8, Ino>,
    counts: HashMap<u8, u32>,
}

impl Check<'_> {
    fn lookup(&self, dir: Ino, name: &[u8]) -> Option<Attr> {
        self.memory.drive(|blocks| self.names.lookup(blocks, dir, name)).expect("looks up")
    }

    fn dir(&mut self, prefix: &[u8], ino: Ino, parent: Ino, model: &Dir) {
        let listed = list_all(self.names, self.memory, ino, 3);
        let dots: Vec<(&[u8], Ino, u64)> = listed.iter().take(2).map(|l| (&*l.name, l.attr.ino, l.next)).collect();
        assert_eq!(dots, [(b".".as_slice(), ino, 1), (b"..", parent, 2)]);
        let listed_names: Vec<&[u8]> = listed.iter().skip(2).map(|l| &*l.name).collect();
        assert_eq!(listed_names, model.keys().map(Vec::as_slice).collect::<Vec<_>>());
        let own = self.memory.drive(|blocks| self.names.attr(blocks, ino)).expect("stats");
        assert_eq!((own.ino, own.kind, u64::from(own.nlink)), (ino, Kind::Dir, 2 + subdirs(model)));
        assert_eq!(self.lookup(ino, b"no such name"), None);
        for ((name, node), listed) in model.iter().zip(listed.iter().skip(2)) {
            let attr = self.lookup(ino, name).expect("is there");
            assert_eq!(attr, listed.attr, "lookup and listing agree");
            let again = self.memory.drive(|blocks| self.names.attr(blocks, attr.ino)).expect("stats");
            assert_eq!(attr, again, "lookup and getattr agree");
            let path = if prefix.is_empty() { name.clone() } else { [prefix, b"/", name].concat() };
            self.node(&path, ino, node, attr);
        }
    }

    fn node(&mut self, path: &[u8], parent: Ino, node: &Node, attr: Attr) {
        let rank = self.order.iter().position(|other| other == path).expect("was emitted") as u64;
        match node {
            Node::Dir(below) => {
                assert_eq!((attr.ino, attr.kind, attr.mode), (Ino(rank + 2), Kind::Dir, DIR_MODE));
                self.dir(path, attr.ino, parent, below);
            }
            Node::Symlink(target) => {
                assert_eq!((attr.ino, attr.kind, attr.size_bytes), (Ino(rank + 2), Kind::Symlink, target.len() as u64));
                let read = self.memory.drive(|blocks| self.names.readlink(blocks, attr.ino)).expect("reads");
                assert_eq!(read.as_deref(), Some(target.as_slice()));
            }
            Node::File(File { bytes, group, .. }) => {
                let (ino, nlink) = match group {
                    0 => (Ino(rank + 2), 1),
                    group => (self.firsts[group], self.counts[group]),
                };
                assert_eq!((attr.ino, attr.kind, attr.nlink, attr.mode), (ino, Kind::File, nlink, FILE_MODE));
                let content =
                    self.memory.drive(|blocks| self.names.content(blocks, ino)).expect("found").expect("a file");
                assert_eq!((content.content, content.size), (ContentId::Digest(digest(bytes)), bytes.len() as u64));
                let shown = self.memory.drive(|blocks| self.names.xattr(blocks, ino, XATTR_DIGEST)).expect("asks");
                assert_eq!(shown, Some(digest(bytes).to_string()));
            }
        }
        assert_eq!((attr.mtime, attr.uid, attr.gid), (MTIME, 1, 2));
    }
}

/// Gives the inode of each hard-link group: that of its first member in tree order.
fn firsts(model: &Dir, order: &[Vec<u8>]) -> HashMap<u8, Ino> {
    let mut firsts = HashMap::new();
    for (rank, path) in (0..).zip(order) {
        let mut names = path.split(|&byte| byte == b'/');
        let top = model.get(names.next().expect("has a name")).expect("is in the model");
        let node = names.fold(top, |node, name| match node {
            Node::Dir(below) => &below[name],
            Node::File(_) | Node::Symlink(_) => panic!("only directories have names in them"),
        });
        if let Node::File(File { group: group @ 1.., .. }) = node {
            firsts.entry(*group).or_insert(Ino::of_rank(rank));
        }
    }
    firsts
}

fn check(model: &Dir, all_here: bool) {
    let (origin, mut memory, order) = build(model);
    memory.all_here = all_here;
    let names = memory.drive(|blocks| Names::new(origin.clone(), LOOK, b"", blocks)).expect("opens");
    let mut counts = HashMap::new();
    members(model, &mut counts);
    let mut check = Check { names: &names, memory: &memory, order: &order, firsts: firsts(model, &order), counts };
    check.dir(b"", ROOT, ROOT, model);
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => prop::sample::select(vec![b"a".to_vec(), b"b".to_vec(), b"ab".to_vec(), b"\xff\n".to_vec()]),
        1 => prop::collection::vec(any::<u8>().prop_filter("no slash, no NUL", |b| !matches!(b, b'/' | 0)), 1..=255)
            .prop_filter("no dots", |name| name != b"." && name != b".."),
    ]
}

fn node() -> impl Strategy<Value = Node> {
    let leaf = prop_oneof![
        3 => (prop::collection::vec(any::<u8>(), 0..20), Just(0u8)).prop_map(|(bytes, group)| Node::File(File { bytes, group, sparse: false })),
        1 => (1u8..4).prop_map(|group| Node::File(File { bytes: vec![group], group, sparse: false })),
        1 => prop::collection::vec(1u8..=255, 1..30).prop_map(Node::Symlink),
    ];
    leaf.prop_recursive(5, 200, 12, |inner| prop::collection::btree_map(name(), inner, 0..12).prop_map(Node::Dir))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn every_name_number_and_attribute_is_that_of_the_model(
        model in prop::collection::btree_map(name(), node(), 0..12), all_here in any::<bool>(),
    ) {
        check(&model, all_here);
    }
}

#[test]
fn a_large_directory_is_listed_whole_and_in_order() {
    let many: Dir = (0..20_000u32).map(|i| (format!("{i:08}").into_bytes(), file(b"x"))).collect();
    let model = dir([("many", Node::Dir(many.clone())), ("z", file(b"z"))]);
    let (origin, memory, _) = build(&model);
    let names = memory.drive(|blocks| Names::new(origin.clone(), LOOK, b"", blocks)).expect("opens");
    let many_ino = memory.drive(|blocks| names.lookup(blocks, ROOT, b"many")).expect("looks up").expect("is there").ino;
    let listed = list_all(&names, &memory, many_ino, 100);
    assert!(listed.iter().skip(2).map(|l| l.name.to_vec()).eq(many.keys().cloned()));
    // A listing goes on from anywhere, as seekdir does.
    let middle = memory.drive(|blocks| names.list(blocks, many_ino, 12_345 + 2, 1)).expect("lists");
    assert_eq!(&*middle.first().expect("one").name, b"00012345");
    assert_eq!(memory.drive(|blocks| names.list(blocks, many_ino, 20_002, 1)).expect("lists"), []);
    assert_eq!(memory.drive(|blocks| names.list(blocks, many_ino, u64::MAX, 1)).expect("lists"), []);
}

#[test]
fn a_subdirectory_as_root_has_number_1_and_is_its_own_parent() {
    let inner = dir([("deep", Node::Dir(dir([("f", file(b"1"))]))), ("g", file(b"2"))]);
    let model = dir([("a", Node::Dir(dir([("b", Node::Dir(inner))]))), ("h", file(b"3"))]);
    let (origin, memory, _) = build(&model);
    let names = memory.drive(|blocks| Names::new(origin.clone(), LOOK, b"a/b", blocks)).expect("opens");
    let listed = list_all(&names, &memory, ROOT, 10);
    let shown: Vec<(&[u8], u64)> = listed.iter().map(|l| (&*l.name, l.attr.ino.0)).collect();
    // Ranks: a 0, h 1, a/b 2, a/b/deep 3, a/b/g 4, a/b/deep/f 5.
    assert_eq!(shown, [(b".".as_slice(), 1), (b"..", 1), (b"deep", 5), (b"g", 6)]);
    let deep = list_all(&names, &memory, Ino(5), 10);
    let shown: Vec<(&[u8], u64)> = deep.iter().map(|l| (&*l.name, l.attr.ino.0)).collect();
    assert_eq!(shown, [(b".".as_slice(), 5), (b"..", 1), (b"f", 7)]);
    let missing = memory.drive(|blocks| Names::new(origin.clone(), LOOK, b"a/nope", blocks));
    assert_eq!(missing.err(), Some(NavError::NotFound));
    let file = memory.drive(|blocks| Names::new(origin.clone(), LOOK, b"h", blocks));
    assert_eq!(file.err(), Some(NavError::NotDir));
}

#[test]
fn numbers_that_no_inode_has_and_wrong_kinds_are_told_apart() {
    let model = dir([("d", Node::Dir(BTreeMap::new())), ("f", file(b"1"))]);
    let (origin, mut memory, _) = build(&model);
    memory.all_here = true;
    let names = Names::new(origin, LOOK, b"", &memory).expect("opens");
    assert_eq!(names.attr(&memory, Ino(4)), Err(NavError::NotFound));
    assert_eq!(names.attr(&memory, Ino(0)), Err(NavError::NotFound));
    assert_eq!(names.attr(&memory, Ino(u64::MAX)), Err(NavError::NotFound));
    assert_eq!(names.lookup(&memory, Ino(3), b"x"), Err(NavError::NotDir));
    assert_eq!(names.list(&memory, Ino(3), 0, 10), Err(NavError::NotDir));
    assert_eq!(names.readlink(&memory, Ino(3)), Ok(None));
    assert_eq!(names.readlink(&memory, ROOT), Ok(None));
    assert_eq!(names.content(&memory, Ino(2)), Ok(None));
    assert_eq!(names.content(&memory, ROOT), Ok(None));
}

#[test]
fn extended_attributes_name_commit_tree_and_digest() {
    let model = dir([("d", Node::Dir(BTreeMap::new())), ("f", file(b"1"))]);
    let (origin, mut memory, _) = build(&model);
    memory.all_here = true;
    let names = Names::new(origin.clone(), LOOK, b"", &memory).expect("opens");
    for ino in [ROOT, Ino(2), Ino(3)] {
        assert_eq!(names.xattr(&memory, ino, XATTR_COMMIT), Ok(Some(CommitId([7; 32]).to_string())));
        assert_eq!(names.xattr(&memory, ino, XATTR_TREE), Ok(Some(origin.tree.to_string())));
        assert_eq!(names.xattr(&memory, ino, b"user.other"), Ok(None));
    }
    assert_eq!(names.xattr_names(&memory, Ino(2)), Ok(vec![XATTR_COMMIT, XATTR_TREE]));
    assert_eq!(names.xattr_names(&memory, Ino(3)), Ok(vec![XATTR_COMMIT, XATTR_TREE, XATTR_DIGEST]));
}

#[test]
fn totals_count_each_inode_once() {
    let shared = Node::File(File { bytes: vec![1; 10], group: 1, sparse: false });
    let model = dir([
        ("a", shared.clone()),
        ("b", shared),
        ("c", file(&[0; 5])),
        ("d", Node::Dir(dir([("s", Node::Symlink(b"x".to_vec()))]))),
    ]);
    let (origin, mut memory, _) = build(&model);
    memory.all_here = true;
    let names = Names::new(origin, LOOK, b"", &memory).expect("opens");
    let totals = names.totals();
    assert_eq!((totals.bytes, totals.inodes), (15, 5));
}
