//! Branches, tags, two at once, and gc.

use super::*;

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
fn a_branch_that_moved_meanwhile_is_not_overwritten_and_the_commit_stays() {
    let bench = Bench::new();
    bench.write("a", "a");
    let first = bench.push();
    let part = tempfile::tempdir().unwrap();
    std::fs::write(part.path().join("b"), "b").unwrap();
    let mut options = bench.options();
    options.dir = part.path().to_owned();
    // The other push runs while this one has looked at the head but not moved it.
    let target = bench.rt.block_on(commit::Target::find(&bench.catalog, &options)).unwrap();
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
