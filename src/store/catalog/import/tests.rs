//! Imports over a lake in memory.

use super::{ImportError, ImportProgress, import};
use crate::format::refs::RefName;
use crate::format::tree::{EntryKind, nav};
use crate::store::catalog::get::{self, GetError, GetProgress};
use crate::store::catalog::history::ProofState;
use crate::store::catalog::scan::{Scan, Walk};
use crate::store::catalog::testing::{Bench, bench, options, rev};
use crate::testkit::faulty_lake::{Fault, Op, Rule};

async fn paths(bench: &Bench, revision: &str) -> Vec<String> {
    let snap = bench.catalog.snapshot(&rev(revision)).await.unwrap();
    let meta = &bench.catalog.meta;
    let mut walk = Walk::new(meta, &snap, nav::root_dir(&snap.root), Vec::new(), true);
    let mut paths = Vec::new();
    loop {
        let walked = walk.next().await.unwrap();
        if walked.is_empty() {
            return paths;
        }
        paths.extend(walked.iter().map(|item| String::from_utf8(item.path.clone()).unwrap()));
    }
}

async fn cat(bench: &Bench, path: &str) -> Result<String, GetError> {
    let snap = bench.catalog.snapshot(&rev("photos")).await.unwrap();
    let mut text = Vec::new();
    let sink = |bytes: &[u8]| {
        text.extend_from_slice(bytes);
        Ok(())
    };
    get::cat(&bench.catalog, &bench.fetcher(), &snap, path.as_bytes(), sink).await?;
    Ok(String::from_utf8(text).unwrap())
}

#[tokio::test]
async fn objects_become_files_without_a_byte_copied() {
    let bench = bench().await;
    for (key, body) in [("p/a/x", "ax"), ("p/a/y", "ay"), ("p/b", "b"), ("p/empty", ""), ("q/no", "")] {
        bench.object(key, body);
    }
    let outcome = bench.import("p/", "main", false).await.unwrap();
    assert_eq!((outcome.files, outcome.dirs, outcome.bytes), (4, 1, 5));
    assert_eq!(paths(&bench, "photos").await, ["a", "b", "empty", "a/x", "a/y"]);
    assert!(!bench.memory.keys().iter().any(|key| key.starts_with("data/")));
    assert_eq!(bench.faulty.counters().of(Op::GetPinned), 0, "nothing was read");
    assert_eq!(cat(&bench, "a/y").await.unwrap(), "ay");
    assert_eq!(cat(&bench, "empty").await.unwrap(), "");
}

#[tokio::test]
async fn the_same_objects_again_are_no_new_commit_and_others_are_one() {
    let bench = bench().await;
    bench.object("p/a", "1");
    let first = bench.import("p/", "main", false).await.unwrap();
    let again = bench.import("p/", "main", false).await.unwrap();
    assert!(again.unchanged && again.commit == first.commit);
    bench.object("p/b", "2");
    let second = bench.import("p/", "main", false).await.unwrap();
    let body = bench.catalog.commit(&second.commit).await.unwrap();
    assert_eq!(body.parents, [first.commit]);
    let log = bench.catalog.log(&rev("photos"), 10).await.unwrap();
    let ids: Vec<_> = log.iter().map(|row| row.commit).collect();
    assert_eq!(ids, [second.commit, first.commit]);
}

#[tokio::test]
async fn an_overwritten_object_is_an_error_for_its_own_file_only() {
    let bench = bench().await;
    for key in ["p/a", "p/b", "p/c"] {
        bench.object(key, key);
    }
    bench.import("p/", "main", false).await.unwrap();
    bench.object("p/b", "not");
    assert_eq!(cat(&bench, "a").await.unwrap(), "p/a");
    assert_eq!(cat(&bench, "c").await.unwrap(), "p/c");
    let error = cat(&bench, "b").await.unwrap_err();
    assert!(matches!(error, GetError::Fetch { .. }), "{error}");
    let snap = bench.catalog.snapshot(&rev("photos")).await.unwrap();
    let dest = bench.dir.path().join("out");
    let progress = std::sync::Arc::new(GetProgress::default());
    let got = get::get(&bench.catalog, &bench.fetcher(), &snap, b"", &dest, &progress).await.unwrap();
    assert_eq!((got.files, got.failed_count), (2, 1));
    assert_eq!(got.failed[0].path, "b");
    assert!(!dest.join("b").exists(), "half a file is worse than none");
}

#[tokio::test]
async fn digested_imports_of_equal_objects_are_equal_trees() {
    let bench = bench().await;
    let large = "large ".repeat(200_000);
    for prefix in ["p", "elsewhere/q"] {
        bench.object(&format!("{prefix}/d/small"), "small");
        bench.object(&format!("{prefix}/large"), &large);
    }
    let one = bench.import("p/", "main", true).await.unwrap();
    let two = bench.import("elsewhere/q/", "other", true).await.unwrap();
    assert_eq!(one.tree, two.tree);
    let (_, shown) = bench.catalog.show(&rev("photos")).await.unwrap();
    assert_eq!(shown.proof, ProofState::Digested);
    assert_eq!(cat(&bench, "large").await.unwrap(), large);
    let pinned = bench.import("p/", "pinned", false).await.unwrap();
    assert_ne!(pinned.tree, one.tree);
    let (_, shown) = bench.catalog.show(&rev("photos@pinned")).await.unwrap();
    assert_eq!(shown.proof, ProofState::PinnedUnproven);
}

#[tokio::test]
async fn a_body_that_breaks_while_it_is_digested_is_read_on() {
    let bench = bench().await;
    let large = "0123456789".repeat(100_000);
    bench.object("p/large", &large);
    bench.faulty.rule(Rule::next(Op::GetPinned, Fault::CutBody(300_000)));
    bench.import("p/", "main", true).await.unwrap();
    assert_eq!(bench.faulty.counters().of(Op::GetPinned), 2);
    assert_eq!(cat(&bench, "large").await.unwrap(), large);
}

#[tokio::test]
async fn an_import_that_fails_at_any_write_moves_no_ref_and_runs_again() {
    for writes in 0..40 {
        let bench = bench().await;
        for n in 0..5 {
            bench.object(&format!("p/{n}"), &format!("{n}"));
        }
        bench.faulty.rule(Rule::crash_after(writes));
        let outcome = bench.import("p/", "main", true).await;
        bench.faulty.heal();
        if outcome.is_ok() {
            assert!(writes > 5, "the crashes were inside of the work");
            return;
        }
        bench.import("p/", "main", true).await.unwrap();
        assert_eq!(cat(&bench, "3").await.unwrap(), "3");
    }
    panic!("an import takes more writes than were tried");
}

#[tokio::test]
async fn keys_that_no_tree_can_hold_are_named() {
    let bench = bench().await;
    for key in ["p/a", "p/a/b", "p/x//y", "p/../z", "p/dir/", "p/good"] {
        bench.object(key, "x");
    }
    let outcome = bench.import("p/", "main", false).await.unwrap();
    let odd: Vec<&str> = outcome.odd.iter().map(|odd| odd.key.as_str()).collect();
    assert_eq!(odd, ["p/../z", "p/a", "p/dir/", "p/x//y"]);
    assert_eq!(outcome.odd_count, 4);
    assert_eq!(paths(&bench, "photos").await, ["a", "dir", "good", "a/b"]);
}

#[tokio::test]
async fn excluded_keys_and_directories_are_left_out() {
    let bench = bench().await;
    for key in ["p/a.tmp", "p/cache/x", "p/deep/cache/y", "p/keep"] {
        bench.object(key, "x");
    }
    let mut options = options("p/", "main", false);
    options.exclude = vec!["*.tmp".into(), "cache/".into()];
    options.tag = Some(RefName::parse("v1").unwrap());
    let outcome = import(&bench.catalog, &options, &ImportProgress::default()).await.unwrap();
    assert_eq!(outcome.excluded, 3);
    assert_eq!(paths(&bench, "photos@v1").await, ["keep"]);
}

#[tokio::test]
async fn nothing_below_the_prefix_is_an_error_and_makes_no_dataset() {
    let bench = bench().await;
    bench.object("other", "x");
    let error = bench.import("p/", "main", false).await.unwrap_err();
    assert!(matches!(error, ImportError::Empty { .. }), "{error}");
    assert!(bench.catalog.dataset_rows().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_scan_gives_every_entry_with_its_place_in_tree_order() {
    let bench = bench().await;
    for n in 0..3000 {
        bench.object(&format!("p/{}/{n}", n % 7), &format!("{n}"));
    }
    bench.import("p/", "main", false).await.unwrap();
    let snap = bench.catalog.snapshot(&rev("photos")).await.unwrap();
    let mut scan = Scan::new(&bench.catalog.meta, &snap);
    let (mut next, mut files) = (0, 0);
    loop {
        let scanned = scan.next().await.unwrap();
        if scanned.is_empty() {
            break;
        }
        for item in scanned {
            assert_eq!(item.rank, next);
            next += 1;
            let is_file = matches!(item.entry.kind, EntryKind::File { .. });
            assert_eq!(is_file, item.location.pack().is_some());
            files += u64::from(is_file);
        }
    }
    assert_eq!((next, files), (3007, 3000));
}
