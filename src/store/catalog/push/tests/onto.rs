//! Pushes onto a commit of which only a part is at hand.

use super::*;

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
