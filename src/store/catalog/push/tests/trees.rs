//! What is stored: everything a directory can hold, what is left out, and that the id depends on nothing else.

use proptest::prelude::*;

use super::*;
use crate::store::catalog::scan::Scan;

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
    for skip_unreadable in [true, false] {
        let mut options = bench.options();
        (options.skip_unreadable, options.skip_special) = (skip_unreadable, !skip_unreadable);
        let outcome = bench.push_with(&options).unwrap();
        assert_eq!(outcome.skipped.len(), 2);
        let names: Vec<_> = bench.read_back(outcome.commit).into_keys().collect();
        assert_eq!(names, [b"dir".to_vec(), b"dir/file".to_vec()]);
    }
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
fn an_unreadable_file_found_while_reading_is_left_out_with_its_links() {
    let bench = Bench::new();
    bench.write("dir/good", "good");
    bench.write("dir/bad", "bad");
    std::fs::hard_link(bench.path("dir/bad"), bench.path("dir/bad-link")).unwrap();
    let mut spool = walk::walk(
        bench.source.path(),
        bench._state.path(),
        &exclude::Excludes::new(&[]).unwrap(),
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
fn packs_are_told_in_the_order_in_which_the_tree_refers_to_them() {
    let bench = Bench::new();
    for number in 0..30u64 {
        bench.write(&format!("d{}/f{number:02}", number % 3), noise(number, 60_000));
    }
    bench.write("d1/large", noise(100, 400 << 10));
    bench.push();
    bench.write("d0/later", noise(200, 70_000));
    let outcome = bench.push();
    let found = bench.rt.block_on(async {
        let snap = bench.catalog.snapshot_of(&dataset(), &outcome.commit).await.unwrap();
        let mut scan = Scan::new(&bench.catalog.meta, &snap);
        let mut expected: Vec<PackId> = Vec::new();
        loop {
            let scanned = scan.next().await.unwrap();
            if scanned.is_empty() {
                break;
            }
            for pack in scanned.iter().filter_map(|scanned| scanned.location.pack()) {
                if !expected.contains(&pack) {
                    expected.push(pack);
                }
            }
        }
        assert_eq!(expected.len() as u64, outcome.packs_total);
        let listed: Vec<PackId> = snap.placement.packs.iter().map(|used| used.pack).collect();
        assert_ne!(listed, expected, "the list of the placement is in another order");
        let mut told = Vec::new();
        let tell = |packs: Vec<PackId>| {
            told.extend(packs);
            true
        };
        bench.catalog.meta.packs_in_tree_order(&snap, tell).await.unwrap();
        (expected, told)
    });
    assert!(found.0.len() > 6);
    assert_eq!(found.0, found.1);
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
