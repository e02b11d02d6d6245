//! Trees against a simple model: built, navigated, listed, compared; and lists that are no tree.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::build::{BuildError, TreeBuilder};
use super::cut::Cuts;
use super::diff::{Change, Differ};
use super::entry::{Entry, EntryKind, Mtime, empty_digest};
use super::model::{Expected, MIDDLE, Model, NARROW, Node, Store, model, name};
use super::nav::{self, DirAt, EntryAt, NavError};
use super::segment::{Block, Counts, TreeRoot};
use super::walk::Walk;
use crate::format::ids::{ContentDigest, ContentId};
use crate::format::placement::{Location, PlacementRoot};

fn parent(path: &[u8]) -> Option<&[u8]> {
    path.iter().rposition(|b| *b == b'/').map(|at| &path[..at])
}

/// Compares everything that navigation says with the model.
fn check_all(model: &Model, root: &TreeRoot, placement: &PlacementRoot, store: &Store) -> Result<(), TestCaseError> {
    let expected = model.entries();
    prop_assert_eq!(root.counts.entries, expected.len() as u64);
    let mut found: BTreeMap<&[u8], EntryAt> = BTreeMap::new();
    for (rank, e) in expected.iter().enumerate() {
        let at = nav::resolve(root, store, &e.path)
            .map_err(|error| TestCaseError::fail(format!("{error} {e:?}")))?
            .expect("not the root");
        prop_assert_eq!((at.rank, &at.entry), (rank as u64, &e.entry));
        prop_assert_eq!(&nav::entry_at(root, store, rank as u64), &Ok(at.clone()));
        prop_assert_eq!(&nav::path_of(root, store, rank as u64), &Ok(e.path.clone()));
        prop_assert_eq!(nav::location(root, placement, store, rank as u64), Ok(e.location.clone()));
        let up = parent(&e.path).map(|path| found[path].clone());
        let dir = up.as_ref().map_or(nav::root_dir(root), |up| up.dir.expect("a parent is a directory"));
        prop_assert_eq!(nav::dir_of(root, store, rank as u64), Ok(dir));
        if let Some(place) = at.dir {
            prop_assert_eq!(place.parent, up.map(|up| up.rank));
        }
        if let EntryKind::HardLink { first } = &at.entry.kind {
            prop_assert_eq!(&nav::resolve_link(root, store, &at).expect("it has a first"), &found[&**first]);
        }
        found.insert(&e.path, at);
    }
    for dir in std::iter::once(nav::root_dir(root)).chain(found.values().filter_map(|at| at.dir)) {
        check_dir(root, store, &dir, &expected)?;
    }
    let mut walk = Walk::new(nav::root_dir(root), b"");
    for e in &expected {
        let walked = walk.next(root, store).expect("a good tree").expect("as many as the model has");
        prop_assert_eq!((&walked.path, &walked.at), (&e.path, &found[&*e.path]));
    }
    prop_assert_eq!(walk.next(root, store), Ok(None));
    prop_assert_eq!(nav::entry_at(root, store, expected.len() as u64), Err(NavError::NotFound));
    Ok(())
}

fn check_dir(root: &TreeRoot, store: &Store, dir: &DirAt, expected: &[Expected]) -> Result<(), TestCaseError> {
    for limit in [1, 3, 10_000] {
        let mut listed = Vec::new();
        loop {
            let more = nav::list(root, store, dir, listed.len() as u64, limit).expect("a good tree");
            if more.is_empty() {
                break;
            }
            prop_assert!(more.len() <= limit);
            listed.extend(more);
        }
        prop_assert_eq!(listed.len() as u64, dir.children);
        for (rank, at) in (dir.first..).zip(&listed) {
            prop_assert_eq!((at.rank, &at.entry), (rank, &expected[rank as usize].entry));
            prop_assert_eq!(&nav::entry_at(root, store, rank), &Ok(at.clone()));
        }
    }
    let range = &expected[dir.first as usize..(dir.first + dir.descendants) as usize];
    let sum = range.iter().try_fold(Counts::default(), |sum, e| sum.plus(&Counts::of(&e.entry)));
    prop_assert_eq!(nav::subtree_counts(root, store, dir).ok(), sum);
    Ok(())
}

/// What differs, the simple way.
fn simple_diff(before: &Model, after: &Model) -> BTreeMap<Vec<u8>, (Option<Entry>, Option<Entry>)> {
    let mut all: BTreeMap<Vec<u8>, (Option<Entry>, Option<Entry>)> = BTreeMap::new();
    before.entries().into_iter().for_each(|e| all.entry(e.path).or_default().0 = Some(e.entry));
    after.entries().into_iter().for_each(|e| all.entry(e.path).or_default().1 = Some(e.entry));
    let plain = |entry: &Option<Entry>| {
        let mut entry = entry.clone()?;
        if let EntryKind::Dir { children, descendants, subdirs } = &mut entry.kind {
            (*children, *descendants, *subdirs) = (0, 0, 0);
        }
        Some(entry)
    };
    all.retain(|_, (a, b)| plain(a) != plain(b));
    all
}

fn diff(before: &TreeRoot, after: &TreeRoot, store: &Store) -> Vec<Change> {
    let mut differ = Differ::new(before.clone(), after.clone());
    std::iter::from_fn(|| differ.next(store).expect("good trees")).collect()
}

fn as_map(changes: Vec<Change>) -> BTreeMap<Vec<u8>, (Option<Entry>, Option<Entry>)> {
    let count = changes.len();
    let map: BTreeMap<_, _> = changes.into_iter().map(|c| (c.path, (c.before, c.after))).collect();
    assert_eq!(map.len(), count, "a path is told once");
    map
}

/// An edit of a model: paths are made of names, directories come into being on the way.
#[derive(Debug, Clone)]
enum Edit {
    Put(Vec<Vec<u8>>, u8),
    Remove(prop::sample::Index),
}

fn edit() -> impl Strategy<Value = Edit> {
    let put = (prop::collection::vec(name(), 1..4), any::<u8>()).prop_map(|(path, seed)| Edit::Put(path, seed));
    prop_oneof![2 => put, 1 => any::<prop::sample::Index>().prop_map(Edit::Remove)]
}

fn apply(model: &mut Model, edit: &Edit) {
    match edit {
        Edit::Put(path, seed) => {
            let (name, dirs) = path.split_last().expect("it has a name");
            let mut nodes = &mut model.nodes;
            for dir in dirs {
                let node =
                    nodes.entry(dir.clone()).or_insert_with(|| Node::Dir { mode: 0o700, nodes: BTreeMap::new() });
                match node {
                    Node::Dir { nodes: inner, .. } => nodes = inner,
                    _ => return,
                }
            }
            nodes.insert(
                name.clone(),
                Node::File { mode: 0o644, mtime: Mtime::default(), size: u64::from(*seed), seed: *seed },
            );
        }
        Edit::Remove(index) => {
            let entries = model.entries();
            if entries.is_empty() {
                return;
            }
            let path = index.get(&entries).path.clone();
            let mut nodes = &mut model.nodes;
            let mut names = path.split(|b| *b == b'/').peekable();
            while let Some(name) = names.next() {
                if names.peek().is_none() {
                    nodes.remove(name);
                    return;
                }
                match nodes.get_mut(name) {
                    Some(Node::Dir { nodes: inner, .. }) => nodes = inner,
                    _ => return,
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn navigation_says_what_the_model_says(model in model(200)) {
        let (built, store) = model.build(NARROW, 7);
        prop_assert_eq!(&TreeRoot::decode(&built.root.encode()).expect("good"), &built.root);
        prop_assert_eq!(&PlacementRoot::decode(&built.placement.encode()).expect("good"), &built.placement);
        check_all(&model, &built.root, &built.placement, &store)?;
    }

    #[test]
    fn navigation_goes_on_where_it_needed_a_block(model in model(120), at in any::<prop::sample::Index>()) {
        let (built, store) = model.build(NARROW, 1);
        let (root, expected) = (&built.root, model.entries());
        if !expected.is_empty() {
            let rank = at.index(expected.len());
            let e = &expected[rank];
            let found = store.with_nothing_at_hand(|| nav::resolve(root, &store, &e.path)).expect("good").expect("an entry");
            prop_assert_eq!(found.rank, rank as u64);
            prop_assert_eq!(store.with_nothing_at_hand(|| nav::entry_at(root, &store, rank as u64)), Ok(found));
            prop_assert_eq!(store.with_nothing_at_hand(|| nav::path_of(root, &store, rank as u64)), Ok(e.path.clone()));
            prop_assert_eq!(store.with_nothing_at_hand(|| nav::location(root, &built.placement, &store, rank as u64)), Ok(e.location.clone()));
            let dir = nav::dir_of(root, &store, rank as u64).expect("good");
            prop_assert!(store.with_nothing_at_hand(|| nav::list(root, &store, &dir, 0, 100)).is_ok());
        }
        let mut walk = Walk::new(nav::root_dir(root), b"");
        let walked = store.with_nothing_at_hand(|| walk.next(root, &store));
        prop_assert_eq!(walked.map(|walked| walked.map(|walked| walked.path)), Ok(expected.first().map(|e| e.path.clone())));
    }

    #[test]
    fn names_that_are_not_there_are_not_found(model in model(120), wanted in name()) {
        let (built, store) = model.build(NARROW, 1);
        let found = nav::resolve(&built.root, &store, &wanted);
        prop_assert_eq!(found.is_ok(), model.nodes.contains_key(&wanted));
        prop_assert_eq!(nav::resolve(&built.root, &store, b"/./"), Ok(None));
        prop_assert_eq!(nav::resolve(&built.root, &store, b".."), Err(NavError::NotFound));
    }

    #[test]
    fn the_same_tree_has_the_same_id_however_it_was_built(model in model(300), every in 1..50_usize) {
        let (a, _) = model.build(NARROW, 1);
        let (b, _) = model.build(NARROW, every);
        prop_assert_eq!((a.tree, a.placement.id()), (b.tree, b.placement.id()));
        let (c, store) = model.build(Cuts::FORMAT, every);
        check_all(&model, &c.root, &c.placement, &store)?;
    }

    #[test]
    fn a_difference_is_what_the_models_differ_in(before in model(150), edits in prop::collection::vec(edit(), 0..6)) {
        let mut after = before.clone();
        edits.iter().for_each(|edit| apply(&mut after, edit));
        let ((a, store), (b, more)) = (before.build(NARROW, 1), after.build(NARROW, 1));
        store.absorb(&more);
        prop_assert_eq!(as_map(diff(&a.root, &b.root, &store)), simple_diff(&before, &after));
        let mut differ = Differ::new(a.root.clone(), b.root.clone());
        let mut changes = Vec::new();
        while let Some(change) = store.with_nothing_at_hand(|| differ.next(&store)).expect("good") {
            changes.push(change);
        }
        prop_assert_eq!(as_map(changes), simple_diff(&before, &after));
    }

    #[test]
    fn trees_with_nothing_in_common_differ_in_everything(before in model(80), after in model(80)) {
        let ((a, store), (b, more)) = (before.build(NARROW, 1), after.build(Cuts::FORMAT, 1));
        store.absorb(&more);
        prop_assert_eq!(as_map(diff(&a.root, &b.root, &store)), simple_diff(&before, &after));
    }
}

/// Files of one directory, or of many, with contents of their own.
fn plain(dirs: usize, files: usize) -> Model {
    let file =
        |seed: usize| Node::File { mode: 0o644, mtime: Mtime::default(), size: 1 + seed as u64, seed: seed as u8 };
    let names = |count: usize, node: &dyn Fn(usize) -> Node| {
        (0..count).map(|i| (format!("{i:07}").into_bytes(), node(i))).collect()
    };
    let nodes = match dirs {
        0 => names(files, &file),
        _ => names(dirs, &|d| Node::Dir { mode: 0o755, nodes: names(files, &|f| file(d * 31 + f)) }),
    };
    Model { nodes, groups: Vec::new() }
}

#[test]
fn a_change_of_few_files_changes_few_blocks_and_is_found_by_reading_few() {
    for (dirs, files) in [(0, 4_000), (40, 100), (2_000, 1)] {
        let before = plain(dirs, files);
        let (a, store) = before.build(MIDDLE, 100);
        let old = store.ids();
        for at in [0, 1, 777, 3_990] {
            let mut after = before.clone();
            let dir = (dirs > 0).then(|| format!("{:07}", at % dirs).into_bytes());
            let path = dir.into_iter().chain([format!("{:07}x", at).into_bytes()]).collect();
            apply(&mut after, &Edit::Put(path, 9));
            let (b, more) = after.build(MIDDLE, 100);
            let new = more.ids().difference(&old).count();
            assert!(new <= 16, "{dirs} directories, {files} files, {at}: {new} new blocks of {}", more.len());
            store.absorb(&more);
            store.take_asked();
            let changes = diff(&a.root, &b.root, &store);
            assert_eq!(changes.len(), 1);
            let asked = store.take_asked();
            assert!(asked <= 40, "{dirs} directories, {files} files, {at}: {asked} blocks read of {}", store.len());
        }
    }
}

#[test]
fn blocks_keep_within_their_limits_whatever_the_names() {
    let long = |i: usize| format!("{i:0255}").into_bytes();
    let link = |i: usize| Node::Symlink(vec![1 + (i % 200) as u8; 4095]);
    let model = Model { nodes: (0..9000).map(|i| (long(i), link(i))).collect(), groups: Vec::new() };
    let (built, store) = model.build(Cuts::FORMAT, 10);
    check_sample(&built.root, &store, 9000);
    // Names and contents that give no natural cut: they are cut by force.
    let same = |_| Node::File { mode: 0o644, mtime: Mtime::default(), size: 1, seed: 1 };
    let model =
        Model { nodes: (0..20_000).map(|i| (format!("{i:05}").into_bytes(), same(i))).collect(), groups: Vec::new() };
    let (built, store) = model.build(Cuts::FORMAT, 10);
    check_sample(&built.root, &store, 20_000);
}

fn check_sample(root: &TreeRoot, store: &Store, entries: u64) {
    assert_eq!(root.counts.entries, entries);
    let mut rank = 0;
    while rank < entries {
        let (first, block) = nav::segment_at(root, store, rank).expect("good");
        assert_eq!(first, rank);
        let Block::Segment(segment) = &*block else { panic!("not a segment") };
        assert!(segment.entries.len() <= super::cut::ENTRIES_CUT);
        rank += segment.entries.len() as u64;
    }
    assert_eq!(nav::segment_at(root, store, entries).err(), Some(NavError::NotFound));
}

#[test]
fn a_directory_nested_as_deep_as_allowed_is_found_and_one_deeper_is_refused() {
    let nested = |depth: usize| {
        let mut builder = TreeBuilder::new(0o755, Mtime::default(), 1, 1);
        let store = Store::default();
        for at in 0..depth as u64 {
            let below = depth as u64 - 1 - at;
            let (children, subdirs) = (u64::from(below > 0), u64::from(below > 0));
            let kind = EntryKind::Dir { children, descendants: below, subdirs };
            builder.push(
                Entry { name: (*b"d").into(), mode: 0o755, mtime: Mtime::default(), nlink: 1, kind },
                Location::None,
            )?;
            store.keep(builder.drain());
        }
        let (built, blocks) = builder.finish()?;
        store.keep(blocks);
        Ok::<_, BuildError>((built, store))
    };
    let (built, store) = nested(4096).expect("4096 are allowed");
    let path = nav::path_of(&built.root, &store, 4095).expect("good");
    assert_eq!(path.len(), 2 * 4096 - 1);
    assert_eq!(nav::resolve(&built.root, &store, &path).expect("good").map(|at| at.rank), Some(4095));
    assert!(nested(4098).is_err());
}

fn file(name: &[u8]) -> Entry {
    let kind = EntryKind::File { size: 0, content: ContentId::Digest(empty_digest()), pin: None };
    Entry { name: name.into(), mode: 0o644, mtime: Mtime::default(), nlink: 1, kind }
}

fn dir(name: &[u8], children: u64, descendants: u64, subdirs: u64) -> Entry {
    Entry { kind: EntryKind::Dir { children, descendants, subdirs }, ..file(name) }
}

fn hard_link(name: &[u8], first: &[u8]) -> Entry {
    Entry { mode: 0, kind: EntryKind::HardLink { first: first.into() }, ..file(name) }
}

fn build_list(children: u64, subdirs: u64, entries: &[Entry]) -> Result<(), String> {
    let mut builder = TreeBuilder::new(0o755, Mtime::default(), children, subdirs);
    for entry in entries {
        builder.push(entry.clone(), Location::None).map_err(|error| error.to_string())?;
    }
    builder.finish().map(|_| ()).map_err(|error| error.to_string())
}

#[test]
fn lists_that_are_no_tree_are_refused_with_the_reason() {
    let twice = Entry { nlink: 2, ..file(b"a") };
    let cases: Vec<(&str, u64, u64, Vec<Entry>, &str)> = vec![
        ("nothing at all", 0, 0, vec![], ""),
        ("a file and an empty directory", 2, 1, vec![file(b"a"), dir(b"b", 0, 0, 0)], ""),
        ("a name twice", 2, 0, vec![file(b"a"), file(b"a")], "twice"),
        ("names out of order", 2, 0, vec![file(b"b"), file(b"a")], "byte order"),
        ("fewer entries than promised", 2, 0, vec![file(b"a")], "promise 2"),
        ("more entries than promised", 1, 0, vec![file(b"a"), file(b"b")], "2 entries were given"),
        ("fewer below a directory", 1, 1, vec![dir(b"a", 2, 2, 0), file(b"x")], "promise 3"),
        (
            "directories that hold more than is said",
            1,
            1,
            vec![dir(b"a", 1, 5, 1), dir(b"b", 0, 0, 0)],
            "as many entries below",
        ),
        ("an unpromised directory", 1, 0, vec![dir(b"a", 0, 0, 0)], "more directories"),
        ("a promised directory that is none", 1, 1, vec![file(b"a")], "fewer directories"),
        ("a name with a slash", 1, 0, vec![file(b"a/b")], "`/`"),
        ("a name that is dots", 1, 0, vec![file(b"..")], "`..`"),
        ("an empty name", 1, 0, vec![file(b"")], "empty"),
        ("a name with NUL", 1, 0, vec![file(b"a\0")], "NUL"),
        ("a name of 256 bytes", 1, 0, vec![file(&[b'n'; 256])], "255"),
        ("a mode with type bits", 1, 0, vec![Entry { mode: 0o100_644, ..file(b"a") }], "permission bits"),
        ("counts that contradict each other", 1, 1, vec![dir(b"a", 1, 0, 0)], "contradict"),
        ("things below no directories", 1, 1, vec![dir(b"a", 1, 2, 0)], "contradict"),
        ("a group of two", 2, 0, vec![twice.clone(), hard_link(b"b", b"a")], ""),
        ("a group that lacks one", 1, 0, vec![twice.clone()], "fewer links"),
        (
            "a group that has one too many",
            3,
            0,
            vec![twice.clone(), hard_link(b"b", b"a"), hard_link(b"c", b"a")],
            "does not come before",
        ),
        ("a hard link to nothing", 1, 0, vec![hard_link(b"b", b"a")], "does not come before"),
        (
            "a hard link to what comes later",
            2,
            0,
            vec![hard_link(b"a", b"b"), Entry { nlink: 2, ..file(b"b") }],
            "does not come before",
        ),
        ("a hard link that climbs", 2, 0, vec![twice, hard_link(b"b", b"../a")], "path"),
        ("a directory with two links", 1, 1, vec![Entry { nlink: 2, ..dir(b"a", 0, 0, 0) }], "more than one link"),
        (
            "an empty symbolic link",
            1,
            0,
            vec![Entry { kind: EntryKind::Symlink { target: (*b"").into() }, ..file(b"a") }],
            "target",
        ),
    ];
    for (what, children, subdirs, entries, why) in cases {
        match build_list(children, subdirs, &entries) {
            Ok(()) => assert_eq!(why, "", "{what} was taken"),
            Err(error) => assert!(!why.is_empty() && error.contains(why), "{what}: {error}"),
        }
    }
}

#[test]
fn places_that_do_not_fit_their_entry_are_refused() {
    use crate::format::ids::PackId;
    use crate::format::placement::Extent;
    let pack = PackId([1; 32]);
    let sized = Entry {
        kind: EntryKind::File { size: 10, content: ContentId::Digest(ContentDigest([1; 32])), pin: None },
        ..file(b"a")
    };
    let sparse = |extents: &[(u64, u64, u64)]| Location::Sparse {
        pack,
        extents: extents.iter().map(|&(logical, offset, len)| Extent { logical, offset, len }).collect(),
    };
    let bad = [
        (file(b"a"), Location::Run { pack, offset: 0 }),
        (dir(b"a", 0, 0, 0), Location::Run { pack, offset: 0 }),
        (sized.clone(), Location::Run { pack, offset: 1 }),
        (sized.clone(), Location::Run { pack, offset: u64::MAX / 4096 * 4096 }),
        (sized.clone(), sparse(&[])),
        (sized.clone(), sparse(&[(0, 0, 11)])),
        (sized.clone(), sparse(&[(0, 0, 5), (4, 4096, 2)])),
        (sized.clone(), sparse(&[(0, 7, 5)])),
    ];
    for (entry, location) in bad {
        let subdirs = u64::from(entry.is_dir());
        let pushed = TreeBuilder::new(0o755, Mtime::default(), 1, subdirs).push(entry, location.clone());
        assert!(matches!(pushed, Err(BuildError::Entry { .. })), "{location:?}");
    }
    let mut builder = TreeBuilder::new(0o755, Mtime::default(), 1, 0);
    builder.push(sized, Location::Run { pack, offset: 4096 }).expect("it fits");
    builder.declare_pack(pack, 4096);
    assert!(matches!(builder.finish(), Err(BuildError::Pack { end: 4106, .. })));
}
