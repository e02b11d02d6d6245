//! The metadata store and opening of revisions, over a lake in memory.

use std::sync::Arc;

use crate::format::paths::{self, node_key};
use crate::format::tree::nav::{self, NavError, Need};
use crate::store::catalog::testing::{Bench, bench, rev};
use crate::store::catalog::{Catalog, CatalogError};
use crate::store::meta::{MetaError, MetaStore};
use crate::testkit::faulty_lake::{Fault, Op, Rule};

async fn filled() -> Bench {
    let bench = bench().await;
    for n in 0..2000 {
        bench.object(&format!("p/{}/{n}", n % 10), &format!("{n}"));
    }
    bench.import("p/", "main", false).await.unwrap();
    bench
}

/// A store that has nothing on disk and next to nothing in memory.
fn empty_store(bench: &Bench, dir: &tempfile::TempDir, memory: u64) -> MetaStore {
    MetaStore::new(bench.faulty.clone(), dir.path().join("meta"), memory)
}

#[tokio::test]
async fn many_who_want_one_block_cost_the_lake_one_get() {
    let bench = filled().await;
    let snap = bench.catalog.snapshot(&rev("photos")).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let store = empty_store(&bench, &dir, 1 << 20);
    let need = Need::Tree(snap.root.top.children[0].id);
    bench.faulty.reset_counters();
    let all = (0..50).map(|_| store.fetch(need));
    for result in futures::future::join_all(all).await {
        result.unwrap();
    }
    assert_eq!(bench.faulty.counters().of(Op::Get), 1);
}

#[tokio::test]
async fn a_store_without_memory_still_ends_every_navigation() {
    let bench = filled().await;
    let snap = bench.catalog.snapshot(&rev("photos")).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let store = empty_store(&bench, &dir, 0);
    let found = store.drive(|blocks| nav::resolve(&snap.root, blocks, b"3/1003")).await.unwrap();
    assert_eq!(&*found.unwrap().entry.name, b"1003");
    assert_eq!(store.memory_bytes(), 0);
}

#[tokio::test]
async fn a_damaged_file_on_disk_is_fetched_again() {
    let bench = filled().await;
    let snap = bench.catalog.snapshot(&rev("photos")).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let id = snap.root.top.children[0].id;
    empty_store(&bench, &dir, 0).fetch(Need::Tree(id)).await.unwrap();
    let file = dir.path().join("meta").join(node_key(&id));
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[10] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    bench.faulty.reset_counters();
    empty_store(&bench, &dir, 0).fetch(Need::Tree(id)).await.unwrap();
    assert_eq!(bench.faulty.counters().of(Op::Get), 1);
    assert_ne!(std::fs::read(&file).unwrap(), bytes, "mended on disk too");
}

#[tokio::test]
async fn a_damaged_block_in_the_lake_is_an_error_that_names_it() {
    let bench = filled().await;
    let snap = bench.catalog.snapshot(&rev("photos")).await.unwrap();
    let id = snap.root.top.children[0].id;
    bench.memory.flip(&node_key(&id), 20);
    let dir = tempfile::tempdir().unwrap();
    let error = empty_store(&bench, &dir, 1 << 20).fetch(Need::Tree(id)).await.unwrap_err();
    assert!(matches!(&error, MetaError::Corrupt { key } if *key == node_key(&id)), "{error}");
}

#[tokio::test]
async fn try_now_never_asks_the_lake() {
    let bench = filled().await;
    let snap = bench.catalog.snapshot(&rev("photos")).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let store = empty_store(&bench, &dir, 1 << 20);
    bench.faulty.reset_counters();
    let resolve = |blocks: &dyn nav::Blocks| nav::resolve(&snap.root, blocks, b"3/1003");
    assert!(matches!(store.try_now(resolve), Err(NavError::Need(_))));
    assert_eq!(bench.faulty.counters().gets(), 0);
    store.drive(|blocks| resolve(blocks)).await.unwrap();
    assert!(store.try_now(resolve).unwrap().is_some());
}

#[tokio::test]
async fn a_prefetched_snapshot_is_walked_with_the_lake_away() {
    let bench = filled().await;
    let (catalog, _dir) = bench.fresh().await;
    let snap = catalog.snapshot(&rev("photos")).await.unwrap();
    assert!(catalog.meta.prefetch_tree(&snap).await.unwrap() > 2);
    assert_eq!(catalog.meta.prefetch_tree(&snap).await.unwrap(), 0, "all is there");
    bench.faulty.rule(Rule::every(Op::Get, Fault::Permanent));
    let mut scan = crate::store::catalog::scan::Scan::new(&catalog.meta, &snap);
    let mut entries = 0;
    loop {
        let scanned = scan.next().await.unwrap();
        if scanned.is_empty() {
            break;
        }
        entries += scanned.len();
    }
    assert_eq!(entries, 2010);
}

#[tokio::test]
async fn a_revision_takes_few_round_trips() {
    let bench = filled().await;
    let (catalog, _dir) = bench.fresh().await;
    bench.faulty.reset_counters();
    catalog.snapshot(&rev("photos")).await.unwrap();
    let counters = bench.faulty.counters();
    // Ref (branch and tag at once), commit, root, placement; and the list beside the root.
    let calls: u64 = counters.calls.values().sum();
    assert!(calls <= 7, "{:?}", counters.log);
}

#[tokio::test]
async fn a_full_id_opens_a_second_time_with_the_lake_away() {
    let bench = filled().await;
    let (catalog, dir) = bench.fresh().await;
    let snap = catalog.snapshot(&rev("photos")).await.unwrap();
    let by_id = rev(&format!("photos@{}", snap.commit));
    for op in [Op::Get, Op::List, Op::Head] {
        bench.faulty.rule(Rule::every(op, Fault::Passing));
    }
    let again = Catalog::open(bench.faulty.clone(), dir.path()).await.unwrap();
    let reopened = again.snapshot(&by_id).await.unwrap();
    assert_eq!(reopened.placement_id, snap.placement_id);
}

#[tokio::test]
async fn a_missing_dataset_is_an_error_that_says_which_there_are() {
    let bench = filled().await;
    let error = bench.catalog.snapshot(&rev("phots")).await.unwrap_err();
    assert!(matches!(error, CatalogError::NoDataset { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("`phots`") && text.contains("there are: photos"), "{text}");
    assert!(error.is_not_found());
    let _: Arc<_> = bench.faulty;
}

#[tokio::test]
async fn a_damaged_placement_gives_way_to_an_older_one() {
    let bench = filled().await;
    let snap = bench.catalog.snapshot(&rev("photos")).await.unwrap();
    let tree = snap.commit_body.tree;
    let newer = crate::format::paths::placement_key(&tree, &crate::format::ids::PlacementId([7; 32]));
    bench.memory.set(&newer, "nonsense");
    let (catalog, _dir) = bench.fresh().await;
    let opened = catalog.snapshot(&rev("photos")).await.unwrap();
    assert_eq!(opened.placement_id, snap.placement_id);
}

#[tokio::test]
async fn a_snapshot_that_is_new_to_the_node_takes_four_trips() {
    let bench = filled().await;
    let (catalog, _dir) = bench.fresh().await;
    bench.faulty.reset_counters();
    let snap = catalog.snapshot(&rev("photos")).await.unwrap();
    let mut log = bench.faulty.counters().log;
    let tree = snap.commit_body.tree;
    // The third trip asks for two at once, in any order.
    log[2..4].sort();
    let expected = [
        (Op::Get, "datasets/photos/refs/branch/main".to_owned()),
        (Op::Get, paths::commit_key(&snap.commit)),
        (Op::Get, paths::tree_key(&tree)),
        (Op::List, paths::placements_prefix(&tree)),
        (Op::Get, paths::placement_key(&tree, &snap.placement_id)),
    ];
    assert_eq!(log, expected);
    // Then the ref alone, and whether there is a newer placement.
    bench.faulty.reset_counters();
    catalog.snapshot(&rev("photos")).await.unwrap();
    assert_eq!(bench.faulty.counters().log.len(), 2);
}
