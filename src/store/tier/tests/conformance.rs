//! One battery over each `TierIo`: what the tier promises on a healthy file system.

use std::sync::Arc;

use uuid::Uuid;

use super::kit::{Pack, commit_key, config, fill, new_world, node, pack, read, record};
use crate::format::ids::NodeId;
use crate::store::tier::{
    Claimed, InitOptions, Quarantined, RealClock, RealIo, ScrubOutcome, Sidecar, Tier, TierError, TierIo,
};

/// One behaviour, shown on a tier that two nodes see.
type Behaviour<I> = fn(Tier<I>, Tier<I>);

/// Runs each behaviour on a fresh tier, seen by two nodes.
fn battery<I: TierIo>(two_nodes: impl Fn() -> (Tier<I>, Tier<I>)) {
    let behaviours: [(&str, Behaviour<I>); 13] = [
        ("a filled pack is read by every node", published_is_read_everywhere),
        ("a pack without its index is not published", no_index_no_publish),
        ("a pack that lacks a span is not published", incomplete_is_not_published),
        ("a second publisher finds the first one's object", second_publisher_wins_nothing),
        ("what was staged before is not staged again", staging_resumes),
        ("writes outside of the pack are refused", writes_stay_inside),
        ("a foreign index is refused", foreign_index_is_refused),
        ("a span is claimed by one node", one_claim),
        ("a damaged object is set aside, its replacement never", quarantine_spares_the_good),
        ("an object that was set aside costs nobody a claim", old_name_costs_no_claim),
        ("a mounted, kept or held commit cannot be uncached", protected_stays),
        ("uncaching frees what no other commit needs", uncache_spares_shared),
        ("scrubbing finds a flipped byte", scrub_finds_damage),
    ];
    for (behaviour, run) in behaviours {
        let (a, b) = two_nodes();
        println!("{behaviour}");
        run(a, b);
    }
}

#[test]
fn the_simulated_tier_conforms() {
    battery(|| {
        let world = new_world();
        (node(&world, 1).0, node(&world, 2).0)
    });
}

#[test]
fn the_real_tier_conforms() {
    let dirs = parking_lot::Mutex::new(Vec::new());
    battery(|| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("tier");
        Tier::init(&path, &InitOptions::default()).expect("an empty directory becomes a tier");
        dirs.lock().push(dir);
        let open = |n| Tier::open(&path, NodeId(Uuid::from_u128(n)), config()).expect("a tier opens");
        (open(1), open(2))
    });
}

/// The same directory through two NFS clients: `tests/nfs/` boots a guest that has them, and names the
/// two mounts in LARDER_TEST_TIER_MOUNTS (`/mnt/a:/mnt/b`). It has made the tiers (`tier-1` to `tier-12`) on the
/// server: through the emulated network each would take half a minute.
#[test]
fn the_tier_conforms_through_two_nfs_clients() {
    let Some(mounts) = std::env::var_os("LARDER_TEST_TIER_MOUNTS") else {
        eprintln!("skipped: needs two mounts of one export in LARDER_TEST_TIER_MOUNTS (make campaign PART=nfs)");
        return;
    };
    let mounts: Vec<_> = std::env::split_paths(&mounts).collect();
    let made = std::cell::Cell::new(0);
    battery(|| {
        made.set(made.get() + 1);
        let name = format!("tier-{}", made.get());
        let open = |n: usize| {
            let id = NodeId(Uuid::from_u128(n as u128 + 1));
            Tier::open(&mounts[n].join(&name), id, config()).expect("a tier opens")
        };
        (open(0), open(1))
    });
}

fn published_is_read_everywhere<I: TierIo>(a: Tier<I>, b: Tier<I>) {
    let source = pack(1);
    assert_eq!(read(&b, &source), None);
    fill(&a, &source).expect("a healthy tier takes a pack");
    assert_eq!(read(&b, &source), Some(source.bytes.clone()));
    assert_eq!(b.sidecar(&source.id, Sidecar::Index).expect("readable"), Some(source.index));
    assert!(a.scan().expect("a scan").staging.is_empty(), "publishing clears its staging");
}

fn no_index_no_publish<I: TierIo>(a: Tier<I>, _: Tier<I>) {
    let source = pack(1);
    let stage = staged(&a, &source);
    assert!(matches!(stage.publish(), Err(TierError::NoIndex { .. })));
    assert_eq!(read(&a, &source), None);
}

fn staged<I: TierIo>(tier: &Tier<I>, source: &Pack) -> crate::store::tier::Stage<I> {
    let stage = tier.stage(&source.id, source.bytes.len() as u64).expect("staging");
    stage.write_at(&source.bytes, 0).expect("inside of the pack");
    stage.spans_done(&(0..stage.spans()).collect::<Vec<_>>()).expect("marks");
    stage
}

fn incomplete_is_not_published<I: TierIo>(a: Tier<I>, _: Tier<I>) {
    let source = pack(1);
    let stage = a.stage(&source.id, source.bytes.len() as u64).expect("staging");
    a.put_sidecar(&source.id, Sidecar::Index, &source.index).expect("its own index");
    stage.write_at(&source.bytes, 0).expect("inside of the pack");
    stage.span_done(1).expect("a mark");
    assert!(matches!(stage.publish(), Err(TierError::Incomplete { span: 0, .. })));
    assert_eq!(read(&a, &source), None);
}

fn second_publisher_wins_nothing<I: TierIo>(a: Tier<I>, b: Tier<I>) {
    let source = pack(1);
    a.put_sidecar(&source.id, Sidecar::Index, &source.index).expect("its own index");
    let (first, second) = (staged(&a, &source), staged(&b, &source));
    let first = first.publish().expect("the first publishes");
    // The staging folder is gone with the first; its own handle still publishes or says so.
    match second.publish() {
        Ok(found) => assert_eq!(found.identity, first.identity),
        Err(error) => assert!(error.is_gone(), "{error}"),
    }
    assert_eq!(read(&b, &source), Some(source.bytes));
}

fn staging_resumes<I: TierIo>(a: Tier<I>, b: Tier<I>) {
    let source = pack(1);
    let stage = a.stage(&source.id, source.bytes.len() as u64).expect("staging");
    stage.write_at(&source.bytes[..128], 0).expect("inside");
    stage.span_done(0).expect("a mark");
    drop(stage);
    let stage = b.stage(&source.id, source.bytes.len() as u64).expect("staging again");
    assert!(stage.is_done(0) && !stage.is_done(1));
    let mut bytes = vec![0; 128];
    assert_eq!(stage.read_at(&mut bytes, 0).expect("readable"), 128);
    assert_eq!(bytes, source.bytes[..128]);
    fill(&b, &source).expect("the rest arrives");
    assert_eq!(read(&a, &source), Some(source.bytes));
}

fn writes_stay_inside<I: TierIo>(a: Tier<I>, _: Tier<I>) {
    let source = pack(1);
    let stage = a.stage(&source.id, source.bytes.len() as u64).expect("staging");
    assert!(matches!(stage.write_at(&source.bytes, 1), Err(TierError::OutOfRange { .. })));
    assert!(matches!(stage.write_at(&[1], u64::MAX), Err(TierError::OutOfRange { .. })));
    let other_len = a.stage(&source.id, 5).map(drop);
    assert!(matches!(other_len, Err(TierError::WrongSize { .. })));
}

fn foreign_index_is_refused<I: TierIo>(a: Tier<I>, _: Tier<I>) {
    let refused = a.put_sidecar(&pack(1).id, Sidecar::Index, &pack(2).index);
    assert!(matches!(refused, Err(TierError::BadSidecar { .. })));
}

fn one_claim<I: TierIo>(a: Tier<I>, b: Tier<I>) {
    let source = pack(1);
    let len = source.bytes.len() as u64;
    let (first, second) = (a.stage(&source.id, len).expect("staging"), b.stage(&source.id, len).expect("staging"));
    assert_eq!(first.claim(0).expect("a claim"), Claimed::Mine);
    assert_eq!(first.claim(0).expect("still ours"), Claimed::Mine);
    assert!(matches!(second.claim(0).expect("an answer"), Claimed::Other { .. }));
    assert_eq!(second.claim(1).expect("another span"), Claimed::Mine);
    first.write_at(&source.bytes[..128], 0).expect("inside");
    first.span_done(0).expect("a mark");
    assert_eq!(second.claim(0).expect("an answer"), Claimed::Done);
    second.abandon().expect("given up");
    assert_eq!(first.claim(1).expect("free again"), Claimed::Mine);
}

fn quarantine_spares_the_good<I: TierIo>(a: Tier<I>, b: Tier<I>) {
    let source = pack(1);
    fill(&a, &source).expect("filled");
    let bad = a.pack(&source.id).expect("readable").expect("there").identity;
    assert_eq!(a.quarantine(&source.id, &bad, "test").expect("an answer"), Quarantined::SetAside);
    assert_eq!(b.quarantine(&source.id, &bad, "test").expect("an answer"), Quarantined::Gone);
    fill(&b, &source).expect("fetched again");
    assert_eq!(a.quarantine(&source.id, &bad, "late").expect("an answer"), Quarantined::Replaced);
    assert_eq!(read(&a, &source), Some(source.bytes));
    assert!(a.usage().expect("usage").quarantine_bytes > 0);
}

/// A client that has looked the object up before finds it under its old name for a while.
fn old_name_costs_no_claim<I: TierIo>(a: Tier<I>, b: Tier<I>) {
    let source = pack(1);
    let len = source.bytes.len() as u64;
    fill(&a, &source).expect("filled");
    let bad = b.pack(&source.id).expect("readable").expect("there").identity;
    assert_eq!(a.quarantine(&source.id, &bad, "test").expect("an answer"), Quarantined::SetAside);
    let first = a.stage(&source.id, len).expect("staging");
    assert_eq!(first.claim(0).expect("a claim"), Claimed::Mine);
    let second = b.stage(&source.id, len).expect("it is not there any more");
    assert!(matches!(second.claim(0).expect("an answer"), Claimed::Other { .. }));
}

fn protected_stays<I: TierIo>(a: Tier<I>, b: Tier<I>) {
    let source = pack(1);
    let key = commit_key(1);
    let lease = a.lease(&record(1, std::slice::from_ref(&source))).expect("a lease");
    fill(&a, &source).expect("filled");
    assert!(matches!(b.uncache(&key), Err(TierError::Busy { .. })));
    b.keep(&key).expect("kept");
    lease.release().expect("released");
    assert!(matches!(b.uncache(&key), Err(TierError::Busy { .. })));
    let hold = a.hold(&key, "m1").expect("a hold");
    assert!(hold.add(&source.id).expect("a link"));
    b.unkeep(&key).expect("not kept");
    assert!(matches!(b.uncache(&key), Err(TierError::Busy { .. })));
    hold.release().expect("dropped");
    assert_eq!(b.uncache(&key).expect("nothing protects it"), source.bytes.len() as u64);
    assert!(matches!(b.uncache(&key), Err(TierError::NotCached { .. })));
    assert!(matches!(b.keep(&key), Err(TierError::NotCached { .. })));
}

fn uncache_spares_shared<I: TierIo>(a: Tier<I>, b: Tier<I>) {
    let (own, shared) = (pack(1), pack(2));
    a.add_record(&record(1, &[own.clone(), shared.clone()])).expect("a record");
    a.add_record(&record(2, std::slice::from_ref(&shared))).expect("a record");
    for source in [&own, &shared] {
        fill(&a, source).expect("filled");
    }
    let usage = b.usage().expect("usage");
    let costs: Vec<_> = usage.commits.iter().map(|c| (c.percent_cached, c.shared_bytes > 0, c.own_bytes > 0)).collect();
    assert_eq!(costs, [(100, true, true), (100, true, false)]);
    b.uncache(&commit_key(1)).expect("nothing protects it");
    assert_eq!((read(&b, &own), read(&a, &shared)), (None, Some(shared.bytes)));
    let usage = b.usage().expect("usage");
    assert_eq!((usage.commits.len(), usage.orphan_bytes), (1, 0));
    assert_eq!(b.check(false).expect("a check").walked_bytes, usage.total_bytes);
}

fn scrub_finds_damage<I: TierIo>(a: Tier<I>, _: Tier<I>) {
    let (good, bad) = (pack(1), pack(2));
    fill(&a, &good).expect("filled");
    // A publisher that did not verify.
    let wrong = Pack { bytes: bad.bytes.iter().map(|b| b ^ 1).collect(), ..bad.clone() };
    fill(&a, &wrong).expect("filled");
    let mut found = Vec::new();
    for _ in 0..2 {
        let next = a.next_scrub().expect("a cursor").expect("there are objects");
        found.push((next, a.scrub(&next, &mut |_| ()).expect("scrubbed").outcome));
    }
    found.sort_by_key(|(id, _)| *id == bad.id);
    assert_eq!(found[0], (good.id, ScrubOutcome::Good));
    assert_eq!(found[1], (bad.id, ScrubOutcome::Damaged { content: 0 }));
    assert_eq!(a.next_scrub().expect("a cursor"), Some(good.id), "what is damaged is set aside");
}

#[test]
fn a_directory_without_a_marker_is_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let opened = Tier::open(dir.path(), NodeId(Uuid::from_u128(1)), config());
    assert!(matches!(opened, Err(TierError::NoMarker { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 0);
    let missing = Tier::open(&dir.path().join("no"), NodeId(Uuid::from_u128(1)), config());
    assert!(matches!(missing, Err(TierError::NoMarker { .. })));
    assert!(!dir.path().join("no").exists());
}

#[test]
fn init_refuses_what_is_a_tier_and_what_has_other_files() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let tier = dir.path().join("tier");
    let made = Tier::init(&tier, &InitOptions::default()).expect("a new tier");
    assert!(matches!(Tier::init(&tier, &InitOptions::default()), Err(TierError::AlreadyTier { .. })));
    let opened = Tier::open(&tier, NodeId(Uuid::from_u128(1)), config()).expect("it opens");
    assert_eq!(opened.id(), made.tier);
    std::fs::write(dir.path().join("letter.txt"), "x").expect("writable");
    assert!(matches!(Tier::init(dir.path(), &InitOptions::default()), Err(TierError::NotEmpty { .. })));
}

#[test]
fn a_newer_format_is_refused_by_its_number() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    Tier::init(dir.path(), &InitOptions::default()).expect("a new tier");
    let marker = dir.path().join("larder-tier.json");
    std::fs::write(&marker, r#"{"format": 2, "what": "nobody knows"}"#).expect("writable");
    let opened = Tier::open(dir.path(), NodeId(Uuid::from_u128(1)), config());
    assert!(matches!(opened, Err(TierError::NewerFormat { found: 2, known: 1, .. })));
    std::fs::write(&marker, "{").expect("writable");
    let opened = Tier::open(dir.path(), NodeId(Uuid::from_u128(1)), config());
    assert!(matches!(opened, Err(TierError::BadMarker { .. })));
}

#[test]
fn files_and_folders_get_the_modes_of_the_marker() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let options = InitOptions { dir_mode: 0o2775, ..InitOptions::default() };
    Tier::init(dir.path(), &options).expect("a new tier");
    let tier = Tier::open(dir.path(), NodeId(Uuid::from_u128(1)), config()).expect("it opens");
    let source = pack(1);
    fill(&tier, &source).expect("filled");
    let hex = source.id.to_string();
    let mode = |path: std::path::PathBuf| std::fs::metadata(path).expect("there").permissions().mode() & 0o7777;
    assert_eq!(mode(dir.path().join("objects").join(&hex[..2]).join(&hex)), 0o664);
    assert_eq!(mode(dir.path().join("staging")), 0o2775);
}

#[test]
fn many_threads_of_one_node_write_one_staging_file() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    Tier::init(dir.path(), &InitOptions::default()).expect("a new tier");
    let io = RealIo::new(dir.path());
    let id = NodeId(Uuid::from_u128(1));
    let clock = Arc::new(RealClock::default());
    let tier = Tier::open_with(io, clock, dir.path(), id, Uuid::from_u128(9), config()).expect("it opens");
    let source = pack(200);
    let stage = tier.stage(&source.id, source.bytes.len() as u64).expect("staging");
    std::thread::scope(|scope| {
        for span in 0..stage.spans() {
            let (stage, source) = (&stage, &source);
            scope.spawn(move || {
                let range = stage.span_range(span);
                stage.write_at(&source.bytes[range.start as usize..range.end as usize], range.start).expect("inside");
                stage.span_done(span).expect("a mark");
            });
        }
    });
    tier.put_sidecar(&source.id, Sidecar::Index, &source.index).expect("its own index");
    stage.publish().expect("published");
    assert_eq!(read(&tier, &source), Some(source.bytes));
}
