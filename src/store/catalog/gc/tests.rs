//! gc over a lake in memory: what stays, what goes, what running writers save, what a crash leaves.

use std::time::Duration;

use super::condemned::{CondemnedSet, Relied, RunHead, run_key, runs};
use super::intent::IntentBody;
use super::{GcOptions, GcReport, gc};
use crate::format::paths::{PackPart, pack_key};
use crate::format::refs::{RefKind, RefName};
use crate::store::catalog::get::{GetProgress, get};
use crate::store::catalog::testing::{Bench, bench, rev};
use crate::store::lake::Lake;
use crate::testkit::faulty_lake::Rule;
use crate::testkit::golden::assert_golden;

#[test]
fn intents_and_runs_are_read_and_written_as_version_1_did() {
    let (format, by) = (1, "ada@gpu7".to_owned());
    let intent = IntentBody {
        format,
        push: "0190a1b2".to_owned(),
        dataset: "photos".to_owned(),
        by: by.clone(),
        start_ms: 1_700_000_000_000,
        refreshed_ms: 1_700_000_300_000,
    };
    assert_golden("lake-intent", &intent);
    let run = RunHead { format, run: "0190a1b3".to_owned(), by, lists: 2, keys: 1500, bytes: 1 << 40 };
    assert_golden("lake-condemned-run", &run);
}

fn at_once(delete: bool) -> GcOptions {
    GcOptions { delete, wait: Duration::ZERO, ..GcOptions::default() }
}

/// A dataset with a live commit on `main` and a dead one: its branch was deleted.
async fn with_garbage() -> (Bench, crate::format::ids::CommitId) {
    let bench = bench().await;
    for n in 0..40 {
        bench.object(&format!("live/{n}"), &format!("live {n}"));
        bench.object(&format!("dead/{n}"), &format!("dead {n}"));
    }
    bench.import("live/", "main", true).await.unwrap();
    let dead = bench.import("dead/", "side", true).await.unwrap();
    bench.make_native().await;
    let side = RefName::parse("side").unwrap();
    let dataset = rev("photos").dataset;
    bench.catalog.refs.delete(&dataset, RefKind::Branch, &side).await.unwrap();
    (bench, dead.commit)
}

/// Reads everything of the live commit, as a node that knows nothing yet.
async fn live_is_whole(bench: &Bench) {
    let (catalog, dir) = bench.fresh().await;
    let snap = catalog.snapshot(&rev("photos")).await.unwrap();
    let progress = std::sync::Arc::new(GetProgress::default());
    let dest = dir.path().join("out");
    let report = get(&catalog, &bench.fetcher(), &snap, b"", &dest, &progress).await.unwrap();
    assert_eq!((report.files, report.failed_count), (40, 0), "{report:?}");
    assert_eq!(std::fs::read(dest.join("7")).unwrap(), b"live 7");
}

async fn run(bench: &Bench, delete: bool) -> GcReport {
    gc(&bench.catalog, &at_once(delete)).await.unwrap()
}

#[tokio::test]
async fn a_dry_run_says_what_would_go_and_changes_nothing() {
    let (bench, _) = with_garbage().await;
    let before = bench.memory.keys();
    let report = run(&bench, false).await;
    assert!(report.condemned.objects > 5 && !report.acted, "{report:?}");
    assert_eq!(bench.memory.keys(), before);
}

#[tokio::test]
async fn what_nothing_refers_to_goes_at_the_second_look_and_the_rest_stays_whole() {
    let (bench, dead) = with_garbage().await;
    let condemned = run(&bench, true).await;
    assert_eq!(condemned.deleted.objects, 0);
    assert_eq!(condemned.pending.len(), 1);
    assert!(bench.catalog.snapshot(&rev(&format!("photos@{dead}"))).await.is_ok());
    let swept = run(&bench, true).await;
    assert_eq!(swept.deleted.objects, condemned.condemned.objects);
    assert_eq!(swept.deleted.bytes, condemned.condemned.bytes);
    let after = run(&bench, false).await;
    assert_eq!(after.condemned.objects + after.young.objects, 0, "{after:?}");
    let left = bench.memory.keys();
    assert!(!left.iter().any(|key| key.contains(&dead.to_string())), "{left:?}");
    assert!(!left.iter().any(|key| key.starts_with("condemned/")), "{left:?}");
    live_is_whole(&bench).await;
}

#[tokio::test]
async fn what_was_condemned_is_left_alone_until_its_wait_is_over() {
    let (bench, _) = with_garbage().await;
    let patient = GcOptions { wait: Duration::from_secs(60), ..at_once(true) };
    // The memory lake's clock ticks a millisecond a write: nothing is a minute old.
    let report = gc(&bench.catalog, &patient).await.unwrap();
    assert!(report.young.objects > 5 && report.condemned.objects == 0, "{report:?}");
    run(&bench, true).await;
    let report = gc(&bench.catalog, &patient).await.unwrap();
    assert_eq!(report.deleted.objects, 0, "condemned just now");
}

#[tokio::test]
async fn a_commit_that_gets_a_ref_again_is_kept() {
    let (bench, dead) = with_garbage().await;
    run(&bench, true).await;
    let tag = RefName::parse("v1").unwrap();
    bench.catalog.make_tag(&rev(&format!("photos@{dead}")), &tag, false).await.unwrap();
    let report = run(&bench, true).await;
    assert_eq!(report.deleted.objects, 0, "{report:?}");
    let (catalog, _dir) = bench.fresh().await;
    assert!(catalog.snapshot(&rev("photos@v1")).await.is_ok());
}

#[tokio::test]
async fn a_push_that_began_before_the_condemnation_stops_the_sweep() {
    let (bench, _) = with_garbage().await;
    let body = IntentBody {
        format: 1,
        push: "p".into(),
        dataset: "photos".into(),
        by: "ann@host".into(),
        start_ms: 1,
        refreshed_ms: 1,
    };
    run(&bench, true).await;
    bench.memory.set("intents/p", serde_json::to_vec(&body).unwrap());
    let report = run(&bench, true).await;
    assert_eq!(report.blocked_by, ["photos by ann@host"]);
    assert_eq!(report.deleted.objects, 0);
    bench.memory.unset("intents/p");
    assert!(run(&bench, true).await.deleted.objects > 5);
    live_is_whole(&bench).await;
}

#[tokio::test]
async fn a_pack_that_a_running_push_relies_on_is_kept_with_its_data() {
    let (bench, dead) = with_garbage().await;
    let snap = bench.catalog.snapshot(&rev(&format!("photos@{dead}"))).await.unwrap();
    let pack = snap.placement.packs[0].pack;
    run(&bench, true).await;
    let lake: std::sync::Arc<dyn Lake> = bench.faulty.clone();
    let set = CondemnedSet::load(&lake).await.unwrap();
    let recipe = pack_key(&pack, PackPart::Recipe);
    assert!(set.contains(&recipe) && !set.is_empty());
    assert_eq!(set.rely_on(&recipe).await.unwrap(), Relied::Safe);
    let report = run(&bench, true).await;
    assert!(report.rescued.objects >= 3, "index, recipe, data: {report:?}");
    assert!(report.deleted.objects > 0);
    let left = bench.memory.keys();
    for key in [recipe, pack_key(&pack, PackPart::Index), format!("data/{pack}")] {
        assert!(left.contains(&key), "{key} of {left:?}");
    }
}

#[tokio::test]
async fn a_writer_that_meets_a_sweep_waits_for_its_end_and_puts_again() {
    let (bench, dead) = with_garbage().await;
    run(&bench, true).await;
    let lake: std::sync::Arc<dyn Lake> = bench.faulty.clone();
    let run = runs(lake.as_ref()).await.unwrap().remove(0);
    let set = CondemnedSet::load(&lake).await.unwrap();
    bench.memory.set(&run_key(&run.head.run, "sweeping"), "gc");
    let key = crate::format::paths::commit_key(&dead);
    let waiting = tokio::spawn(async move { set.rely_on(&key).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished(), "it waits for the sweep");
    bench.memory.unset(&run_key(&run.head.run, "head"));
    bench.memory.unset(&run_key(&run.head.run, "sweeping"));
    assert_eq!(waiting.await.unwrap().unwrap(), Relied::PutAgain);
}

#[tokio::test]
async fn an_object_that_was_put_again_after_the_condemnation_is_kept() {
    let (bench, dead) = with_garbage().await;
    run(&bench, true).await;
    let key = crate::format::paths::commit_key(&dead);
    let bytes = bench.memory.bytes_of(&key).unwrap();
    bench.memory.set(&key, bytes);
    run(&bench, true).await;
    assert!(bench.memory.bytes_of(&key).is_some());
}

#[tokio::test]
async fn a_crash_at_any_write_leaves_the_live_commit_whole_and_the_next_gc_ends_the_work() {
    for writes in 0..60 {
        let (bench, dead) = with_garbage().await;
        bench.faulty.rule(Rule::crash_after(writes));
        let first = gc(&bench.catalog, &at_once(true)).await;
        let second = gc(&bench.catalog, &at_once(true)).await;
        bench.faulty.heal();
        live_is_whole(&bench).await;
        for _ in 0..3 {
            run(&bench, true).await;
        }
        let left = bench.memory.keys();
        assert!(!left.iter().any(|key| key.contains(&dead.to_string())), "after {writes} writes: {left:?}");
        live_is_whole(&bench).await;
        if first.is_ok() && second.is_ok() {
            assert!(writes > 10, "the crashes were inside of the work");
            return;
        }
    }
    panic!("the work takes more writes than were tried");
}

#[tokio::test]
async fn a_needed_commit_that_is_missing_stops_gc_before_anything_is_deleted() {
    let (bench, _) = with_garbage().await;
    run(&bench, true).await;
    let head = bench.catalog.resolve(&rev("photos")).await.unwrap();
    bench.memory.unset(&crate::format::paths::commit_key(&head));
    let (catalog, _dir) = bench.fresh().await;
    let before = bench.memory.keys().len();
    let error = gc(&catalog, &at_once(true)).await.unwrap_err();
    assert!(error.to_string().contains("nothing is deleted"), "{error}");
    assert!(bench.memory.keys().len() >= before - 1, "at most gc's own marks differ");
}
