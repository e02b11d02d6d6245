//! What is not read or sent again.

use super::*;

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

/// The node's index of the pushed directory.
fn index_path(bench: &Bench) -> PathBuf {
    let dir = bench.catalog.state_dir.join("push").join(bench.catalog.lake_id.to_string());
    let mut files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.extension().is_some_and(|ext| ext == "redb")).unwrap()
}

#[test]
fn where_the_walk_saw_the_same_no_file_is_even_looked_up() {
    let bench = Bench::new();
    hostile(bench.source.path());
    let first = bench.push();
    // A push that looked files up would not find them now, and read them.
    let index = redb::Database::open(index_path(&bench)).unwrap();
    let transaction = index.begin_write().unwrap();
    transaction.delete_table(redb::TableDefinition::<&[u8], &[u8]>::new("files")).unwrap();
    transaction.commit().unwrap();
    drop(index);
    let second = bench.push();
    assert_eq!((second.unchanged, second.files_read, second.commit), (true, 0, first.commit));
    assert_eq!((second.files, second.bytes, second.reused_bytes), (first.files, first.bytes, first.bytes));
    // A commit of its own has the blocks that the parent has, and so does the push after it.
    let mut options = bench.options();
    options.message = Some("again".to_owned());
    let third = bench.push_with(&options).unwrap();
    assert_eq!((third.unchanged, third.files_read, third.tree), (false, 0, first.tree));
    bench.lake.reset_counters();
    bench.write("more", "more");
    let fourth = bench.push();
    bench.assert_round_trip(&fourth);
    let blocks = |key: &String| key.starts_with("nodes/") || key.starts_with("placed/");
    let log = bench.lake.counters().log;
    let sent = log.iter().filter(|(op, key)| *op == Op::Put && blocks(key)).count();
    assert!(sent <= 2, "{sent} blocks for one file more");
}

#[test]
fn whatever_changes_in_a_directory_makes_another_tree() {
    let bench = Bench::new();
    hostile(bench.source.path());
    let link = |from: &str, to: &str| std::os::unix::fs::symlink(from, bench.path(to)).unwrap();
    type Change<'a> = Box<dyn Fn() + 'a>;
    let changes: Vec<(&str, Change)> = vec![
        ("a mode", Box::new(|| std::fs::set_permissions(bench.path("old"), PermissionsExt::from_mode(0o600)).unwrap())),
        ("a file's time", Box::new(|| set_mtime(&bench.path("old"), 77, 7))),
        ("a directory's time", Box::new(|| set_mtime(&bench.path("void/void"), 78, 7))),
        ("the root's time", Box::new(|| set_mtime(bench.source.path(), 79, 7))),
        (
            "a link's target",
            Box::new(|| {
                std::fs::remove_file(bench.path("dangling")).unwrap();
                link("elsewhere", "dangling");
                set_mtime(bench.source.path(), 79, 7);
            }),
        ),
        ("a name", Box::new(|| std::fs::rename(bench.path("old"), bench.path("older")).unwrap())),
        (
            "bytes of the same length and time",
            Box::new(|| {
                bench.write("older", "From before 1970");
                set_mtime(&bench.path("older"), 77, 7);
                set_mtime(bench.source.path(), 79, 7);
            }),
        ),
        ("a hard link more", Box::new(|| std::fs::hard_link(bench.path("older"), bench.path("void/linked")).unwrap())),
    ];
    let mut before = bench.push();
    for (what, change) in changes {
        change();
        let after = bench.push();
        assert_ne!(after.tree, before.tree, "{what}");
        bench.assert_round_trip(&after);
        before = after;
    }
    assert!(bench.push().unchanged);
}

#[test]
fn attributes_that_are_not_stored_are_counted_by_every_push() {
    let bench = Bench::new();
    bench.write("dir/with", "x");
    bench.write("dir/empty", "");
    bench.write("dir/without", "x");
    for name in ["dir", "dir/with", "dir/empty"] {
        let path = std::ffi::CString::new(bench.path(name).as_os_str().as_bytes()).unwrap();
        // SAFETY: both strings end with NUL, and the value has the length given.
        let set = unsafe { libc::setxattr(path.as_ptr(), c"user.test".as_ptr(), b"1".as_ptr().cast(), 1, 0) };
        if set != 0 {
            return; // This file system has none.
        }
    }
    assert_eq!(bench.push().xattrs_dropped, 3);
    assert_eq!(bench.push().xattrs_dropped, 3);
    bench.write("dir/more", "x");
    assert_eq!(bench.push().xattrs_dropped, 3, "those of files that are not read again are known");
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
fn the_zeros_between_small_files_are_no_waste() {
    let bench = Bench::new();
    for number in 0..40u64 {
        bench.write(&format!("f{number:02}"), noise(number, 100));
    }
    bench.push();
    std::fs::remove_file(bench.path("f07")).unwrap();
    let second = bench.push();
    assert_eq!((second.files_read, second.uploaded_data_bytes, second.packs_total), (0, 0, 1));
    bench.assert_round_trip(&second);
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
