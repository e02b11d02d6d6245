//! The same behaviours in both modes; then what only one of them shows.

use super::*;
use crate::format::ids::CommitId;
use crate::testkit::faulty_lake::{Fault, FaultyLake, MemLake, Op, Rule};

fn commit(n: u8) -> CommitId {
    CommitId([n; 32])
}

fn dataset() -> DatasetName {
    DatasetName::parse("xray").unwrap()
}

fn name(text: &str) -> RefName {
    RefName::parse(text).unwrap()
}

fn revision(text: &str) -> Revision {
    Revision::parse(text).unwrap()
}

/// Both modes, each over a store of its kind, with a dataset in it.
async fn both() -> Vec<Refs> {
    let stores: [(RefMode, Arc<dyn Lake>); 2] =
        [(RefMode::Cas, Arc::new(MemLake::with_page(3))), (RefMode::Log, Arc::new(MemLake::without_conditions()))];
    let mut all = Vec::new();
    for (mode, lake) in stores {
        let refs = Refs::new(lake, mode, "ann@here".into());
        refs.ensure_dataset(&dataset()).await.unwrap();
        all.push(refs);
    }
    all
}

fn commits(heads: &[Head]) -> Vec<CommitId> {
    heads.iter().map(|head| head.commit).collect()
}

#[tokio::test]
async fn a_branch_moves_from_what_it_was_and_from_nothing_else() {
    for refs in both().await {
        let (xray, main) = (dataset(), name("main"));
        let heads = refs.move_branch(&xray, &main, commit(1), Expect::Heads(vec![])).await.unwrap();
        assert_eq!(commits(&heads), [commit(1)]);
        let expect = Expect::Heads(vec![commit(1)]);
        refs.move_branch(&xray, &main, commit(2), expect.clone()).await.unwrap();
        let late = refs.move_branch(&xray, &main, commit(3), expect).await.unwrap_err();
        assert!(late.to_string().contains(&commit(2).short()), "{late}");
        assert!(late.to_string().contains("ann@here"), "{late}");
        assert_eq!(refs.resolve(&revision("xray")).await.unwrap(), commit(2));
        assert_eq!(refs.resolve(&revision("xray@main")).await.unwrap(), commit(2));
        refs.move_branch(&xray, &main, commit(4), Expect::Any).await.unwrap();
        assert_eq!(refs.resolve(&revision("xray")).await.unwrap(), commit(4));
    }
}

#[tokio::test]
async fn a_tag_is_never_moved_silently() {
    for refs in both().await {
        let (xray, v1) = (dataset(), name("v1"));
        refs.tag(&xray, &v1, commit(1), false).await.unwrap();
        refs.tag(&xray, &v1, commit(1), false).await.unwrap();
        let refused = refs.tag(&xray, &v1, commit(2), false).await;
        assert!(matches!(refused, Err(RefError::TagExists { .. })));
        refs.tag(&xray, &v1, commit(2), true).await.unwrap();
        assert_eq!(refs.resolve(&revision("xray@v1")).await.unwrap(), commit(2));
    }
}

#[tokio::test]
async fn one_name_is_not_both_a_tag_and_a_branch() {
    for refs in both().await {
        let (xray, both) = (dataset(), name("both"));
        refs.tag(&xray, &both, commit(1), false).await.unwrap();
        let refused = refs.move_branch(&xray, &both, commit(1), Expect::Any).await;
        assert!(matches!(refused, Err(RefError::OtherKind { other: RefKind::Tag, .. })));
        refs.delete(&xray, RefKind::Tag, &both).await.unwrap();
        refs.move_branch(&xray, &both, commit(1), Expect::Any).await.unwrap();
        let refused = refs.tag(&xray, &both, commit(1), true).await;
        assert!(matches!(refused, Err(RefError::OtherKind { other: RefKind::Branch, .. })));
    }
}

#[tokio::test]
async fn a_deleted_ref_is_gone_and_may_come_back() {
    for refs in both().await {
        let (xray, main) = (dataset(), name("main"));
        refs.move_branch(&xray, &main, commit(1), Expect::Any).await.unwrap();
        let was = refs.delete(&xray, RefKind::Branch, &main).await.unwrap();
        assert_eq!(commits(&was), [commit(1)]);
        assert!(refs.list(&xray).await.unwrap().is_empty());
        assert!(matches!(refs.resolve(&revision("xray")).await, Err(RefError::NoDefault { .. })));
        let again = refs.delete(&xray, RefKind::Branch, &main).await;
        assert!(matches!(again, Err(RefError::NoRef { .. })));
        let stale = Expect::Heads(vec![commit(1)]);
        let stale = refs.move_branch(&xray, &main, commit(2), stale).await.unwrap_err();
        assert!(stale.to_string().contains("it was deleted"), "{stale}");
        refs.move_branch(&xray, &main, commit(3), Expect::Heads(vec![])).await.unwrap();
        assert_eq!(refs.resolve(&revision("xray")).await.unwrap(), commit(3));
    }
}

#[tokio::test]
async fn refs_are_listed_branches_first_also_where_one_name_begins_another() {
    for refs in both().await {
        let xray = dataset();
        for (n, text) in ["a", "a/b", "a/b/c", "zz"].into_iter().enumerate() {
            let to = commit(n as u8);
            refs.move_branch(&xray, &name(text), to, Expect::Any).await.unwrap();
            refs.tag(&xray, &name(&format!("t/{text}")), to, false).await.unwrap();
        }
        let listed = refs.list(&xray).await.unwrap();
        let shown: Vec<_> = listed
            .iter()
            .map(|state| format!("{} {} {}", state.kind, state.name, state.heads[0].commit.short()))
            .collect();
        let expected: Vec<_> = [("branch", ""), ("tag", "t/")]
            .into_iter()
            .flat_map(|(kind, pre)| {
                ["a", "a/b", "a/b/c", "zz"]
                    .into_iter()
                    .enumerate()
                    .map(move |(n, text)| format!("{kind} {pre}{text} {}", commit(n as u8).short()))
            })
            .collect();
        assert_eq!(shown, expected);
    }
}

#[tokio::test]
async fn commits_are_found_by_a_unique_prefix() {
    for refs in both().await {
        let xray = dataset();
        let mut near = [0x11; 32];
        near[31] = 0;
        for id in [commit(0x11), CommitId(near), commit(0x22)] {
            refs.add_commit(&xray, &id).await.unwrap();
        }
        assert_eq!(refs.commits(&xray, "").await.unwrap().len(), 3);
        assert_eq!(refs.resolve(&revision("xray@2222")).await.unwrap(), commit(0x22));
        let ambiguous = refs.resolve(&revision("xray@1111")).await;
        assert!(matches!(ambiguous, Err(RefError::Ambiguous { found, .. }) if found.len() == 2));
        let full = revision(&format!("xray@{}", commit(0x11)));
        assert_eq!(refs.resolve(&full).await.unwrap(), commit(0x11));
        let none = refs.resolve(&revision("xray@3333")).await;
        assert!(matches!(none, Err(RefError::NoCommit { .. })));
        refs.remove_commit(&xray, &commit(0x22)).await.unwrap();
        assert!(refs.resolve(&revision("xray@2222")).await.is_err());
    }
}

#[tokio::test]
async fn a_removed_dataset_leaves_nothing_to_one_of_the_same_name() {
    for refs in both().await {
        let (xray, main) = (dataset(), name("main"));
        for n in 0..5 {
            refs.move_branch(&xray, &main, commit(n), Expect::Any).await.unwrap();
            refs.add_commit(&xray, &commit(n)).await.unwrap();
        }
        let other = DatasetName::parse("xray-2").unwrap();
        refs.ensure_dataset(&other).await.unwrap();
        assert_eq!(refs.datasets().await.unwrap(), [xray.clone(), other.clone()]);
        refs.remove_dataset(&xray).await.unwrap();
        assert_eq!(refs.datasets().await.unwrap(), [other]);
        let gone = refs.resolve(&revision("xray")).await;
        assert!(matches!(gone, Err(RefError::NoDataset { .. })));
        assert!(matches!(refs.list(&xray).await, Err(RefError::NoDataset { .. })));
        refs.ensure_dataset(&xray).await.unwrap();
        assert!(refs.list(&xray).await.unwrap().is_empty());
        assert!(refs.commits(&xray, "").await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn writers_at_once_lose_no_commit_silently() {
    for refs in both().await {
        let (xray, main) = (dataset(), name("main"));
        refs.move_branch(&xray, &main, commit(0), Expect::Any).await.unwrap();
        let racers = (1..=8).map(|n| {
            let (refs, main) = (refs.clone(), main.clone());
            tokio::spawn(async move {
                let expect = Expect::Heads(vec![commit(0)]);
                refs.move_branch(&dataset(), &main, commit(n), expect).await.is_ok()
            })
        });
        let won = futures::future::join_all(racers).await.into_iter().filter(|w| *w.as_ref().unwrap());
        let won = won.count();
        let heads = refs.heads(&xray, RefKind::Branch, &main).await.unwrap();
        assert_eq!(heads.len(), won, "who was told that he won is a head");
        assert!(won >= 1 && (refs.mode() == RefMode::Log || won == 1));
    }
}

#[tokio::test]
async fn a_lost_answer_is_not_taken_for_somebody_elses_move() {
    let (lake, _) = FaultyLake::over_memory();
    let refs = Refs::new(lake.clone(), RefMode::Cas, "ann@here".into());
    lake.rule(Rule::next(Op::Put, Fault::LostAnswer).on("refs/branch"));
    let moved = refs.move_branch(&dataset(), &name("main"), commit(1), Expect::Heads(vec![])).await;
    assert_eq!(commits(&moved.unwrap()), [commit(1)]);
}

/// Makes the two heads that racing writers leave: one of them saw the log before the other wrote.
async fn raced() -> (Refs, Arc<MemLake>) {
    let lake = Arc::new(MemLake::without_conditions());
    let refs = Refs::new(lake.clone(), RefMode::Log, "ann@here".into());
    refs.ensure_dataset(&dataset()).await.unwrap();
    let main = name("main");
    refs.move_branch(&dataset(), &main, commit(1), Expect::Any).await.unwrap();
    let before = lake.keys();
    refs.move_branch(&dataset(), &main, commit(2), Expect::Any).await.unwrap();
    let winner = lake.keys().into_iter().find(|key| !before.contains(key)).unwrap();
    let body = lake.bytes_of(&winner).unwrap();
    lake.unset(&winner);
    refs.move_branch(&dataset(), &main, commit(3), Expect::Any).await.unwrap();
    lake.set(&winner, body);
    (refs, lake)
}

#[tokio::test]
async fn two_heads_are_refused_and_listed_until_a_write_names_both() {
    let (refs, _) = raced().await;
    let main = name("main");
    let error = refs.resolve(&revision("xray")).await.unwrap_err();
    for head in [commit(2), commit(3)] {
        assert!(error.to_string().contains(&head.short()), "{error}");
    }
    assert_eq!(refs.list(&dataset()).await.unwrap()[0].heads.len(), 2);
    let one = Expect::Heads(vec![commit(3)]);
    let refused = refs.move_branch(&dataset(), &main, commit(4), one).await;
    assert!(matches!(refused, Err(RefError::Conflict { now, .. }) if now.len() == 2));
    let both = Expect::Heads(vec![commit(3), commit(2)]);
    let heads = refs.move_branch(&dataset(), &main, commit(4), both).await.unwrap();
    assert_eq!(commits(&heads), [commit(4)]);
    assert_eq!(refs.resolve(&revision("xray")).await.unwrap(), commit(4));
}

#[tokio::test]
async fn a_deletion_that_raced_a_move_does_not_hide_it() {
    let (refs, lake) = raced().await;
    let main = name("main");
    let before = lake.keys();
    refs.delete(&dataset(), RefKind::Branch, &main).await.unwrap();
    let tombstone = lake.keys().into_iter().find(|key| !before.contains(key)).unwrap();
    let body = lake.bytes_of(&tombstone).unwrap();
    lake.unset(&tombstone);
    refs.move_branch(&dataset(), &main, commit(9), Expect::Any).await.unwrap();
    lake.set(&tombstone, body);
    assert_eq!(refs.resolve(&revision("xray")).await.unwrap(), commit(9));
}

#[tokio::test]
async fn a_long_log_is_read_by_one_listing_and_one_get_and_is_pruned() {
    let (lake, memory) = FaultyLake::over_memory();
    let refs = Refs::new(lake.clone(), RefMode::Log, "ann@here".into());
    let main = name("main");
    for n in 0..200 {
        refs.move_branch(&dataset(), &main, commit(n), Expect::Any).await.unwrap();
    }
    assert!(memory.keys().len() <= 130, "{}", memory.keys().len());
    lake.reset_counters();
    assert_eq!(refs.resolve(&revision("xray")).await.unwrap(), commit(199));
    assert_eq!((lake.counters().of(Op::List), lake.counters().of(Op::Get)), (1, 1));
}

#[tokio::test]
async fn a_clock_that_runs_behind_does_not_hide_a_move() {
    let (refs, lake) = raced().await;
    // An entry from the far future is superseded by one of today.
    let future = uuid::Builder::from_unix_timestamp_millis(1 << 45, &[7; 10]).into_uuid();
    let log = "datasets/xray/log/branch/main/";
    let sample = lake.keys().into_iter().find(|key| key.starts_with(log)).unwrap();
    lake.set(&format!("{log}{future}"), lake.bytes_of(&sample).unwrap());
    refs.move_branch(&dataset(), &name("main"), commit(5), Expect::Any).await.unwrap();
    assert_eq!(refs.resolve(&revision("xray")).await.unwrap(), commit(5));
}

#[test]
fn the_object_of_a_dataset_is_read_and_written_as_version_1_did() {
    let info = DatasetInfo { format: 1, created_ms: 1_700_000_000_000, by: "ada@gpu7".to_owned() };
    crate::testkit::golden::assert_golden("lake-dataset", &info);
}
