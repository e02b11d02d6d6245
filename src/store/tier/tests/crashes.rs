//! Kills, power cuts and failing calls at every operation of publishing and of evicting.

use nix::libc;

use super::kit::{
    GRACE_MS, TTL_MS, check_accounting, check_published, commit_key, fill, is_published, leaks, new_world, node, open,
    pack, read, record, settle,
};
use crate::store::tier::{Reason, Verdict};
use crate::testkit::sim_tier::{Rng, SimWorld};

#[test]
fn a_publisher_killed_at_any_step_leaves_no_partial_object_and_resumes() {
    let base = new_world();
    let source = pack(3);
    let mut step = 0;
    loop {
        let world = base.fork();
        let io = world.client();
        let tier = open(&world, io.clone(), 1);
        io.kill_after(step);
        let survived = fill(&tier, &source).is_ok();
        drop(tier);
        check_published(&world, std::slice::from_ref(&source));
        let (again, _) = node(&world, 1);
        again.add_record(&record(1, std::slice::from_ref(&source))).expect("a record");
        fill(&again, &source).expect("a re-run completes");
        assert_eq!(read(&again, &source), Some(source.bytes.clone()), "killed before operation {step}");
        check_accounting(&again);
        again.uncache(&commit_key(1)).expect("nothing protects it");
        settle(&world, &again);
        assert_eq!(leaks(&world), Vec::<String>::new(), "killed before operation {step}");
        if survived {
            assert!(step > 20, "publishing has many steps");
            return;
        }
        step += 1;
    }
}

#[test]
fn a_power_cut_at_any_step_of_publishing_leaves_no_partial_object() {
    let base = new_world();
    let source = pack(3);
    let mut step = 0;
    loop {
        let mut survived = false;
        for seed in 0..12 {
            let world = base.fork();
            let io = world.client();
            let tier = open(&world, io.clone(), 1);
            io.kill_after(step);
            survived = fill(&tier, &source).is_ok();
            drop(tier);
            world.crash(&mut Rng::new(seed * 1000 + step));
            check_published(&world, std::slice::from_ref(&source));
            if survived {
                assert!(is_published(&world, &source), "what was published survives a power cut");
            }
            let (again, _) = node(&world, 1);
            again.add_record(&record(1, std::slice::from_ref(&source))).expect("a record");
            fill(&again, &source).expect("a re-run completes");
            assert_eq!(read(&again, &source), Some(source.bytes.clone()), "cut before operation {step}, seed {seed}");
            check_published(&world, std::slice::from_ref(&source));
        }
        if survived {
            return;
        }
        step += 1;
    }
}

#[test]
fn every_failing_call_of_publishing_is_an_error_and_the_next_try_completes() {
    let base = new_world();
    let source = pack(3);
    for errno in [libc::EIO, libc::ESTALE, libc::ENOSPC, libc::EDQUOT, libc::ENOENT] {
        let mut step = 0;
        loop {
            let world = base.fork();
            let io = world.client();
            let tier = open(&world, io.clone(), 1);
            let before = io.ops();
            io.fail_after(step, errno, false);
            let outcome = fill(&tier, &source);
            let reached = io.ops() - before > step;
            if let Err(error) = &outcome
                && (errno == libc::ENOSPC || errno == libc::EDQUOT)
            {
                assert!(error.is_full(), "{error:?}");
            }
            io.heal();
            check_published(&world, std::slice::from_ref(&source));
            fill(&tier, &source).expect("the next try completes");
            assert_eq!(read(&tier, &source), Some(source.bytes.clone()));
            if !reached {
                break;
            }
            step += 1;
        }
    }
}

/// Two commits that share a pack; the first has aged out, the second is used.
fn world_with_an_old_commit() -> (SimWorld, Vec<super::kit::Pack>) {
    let world = new_world();
    let packs = vec![pack(90), pack(2), pack(3)];
    let (tier, _) = node(&world, 1);
    tier.add_record(&record(1, &packs[..2])).expect("a record");
    for source in &packs {
        tier.add_record(&record(2, &packs[1..])).expect("a record");
        fill(&tier, source).expect("filled");
    }
    world.advance_ms(TTL_MS + 1000);
    tier.touch(&commit_key(2));
    assert!(tier.heartbeat().failed.is_empty());
    (world, packs)
}

#[test]
fn a_steward_killed_at_any_step_is_continued_by_the_next_one() {
    let (base, packs) = world_with_an_old_commit();
    let mut step = 0;
    loop {
        let world = base.fork();
        let io = world.client();
        let steward = open(&world, io.clone(), 1);
        // The scan is long and only reads: kill in what follows it. Another's first look costs the same.
        let (other, other_io) = node(&base.fork(), 1);
        let before = other_io.ops();
        other.dry_run(&other.policy()).expect("a plan");
        io.kill_after(other_io.ops() - before + step);
        let survived = steward.steward_step(&steward.policy()).is_ok_and(|report| report.failed.is_empty());
        drop(steward);
        check_published(&world, &packs);
        world.advance_ms(61_000);
        let (next, _) = node(&world, 2);
        let report = next.steward_step(&next.policy()).expect("the next one sweeps");
        assert!(!report.elsewhere && report.failed.is_empty(), "{:?}", report.failed);
        check_accounting(&next);
        assert!(!is_published(&world, &packs[0]), "killed at {step}: what aged out has left");
        assert_eq!(read(&next, &packs[1]), Some(packs[1].bytes.clone()), "killed at {step}: shared, so it stays");
        assert_eq!(read(&next, &packs[2]), Some(packs[2].bytes.clone()));
        world.advance_ms(GRACE_MS + 1000);
        next.steward_step(&next.policy()).expect("the trash is emptied");
        let usage = next.usage().expect("usage");
        assert_eq!((usage.trash_bytes, usage.orphan_bytes, usage.commits.len()), (0, 0, 1), "killed at {step}");
        if survived {
            assert!(step > 30, "an eviction has many steps: {step}");
            return;
        }
        step += 1;
    }
}

#[test]
fn a_power_cut_during_an_eviction_loses_nothing_that_is_needed() {
    let (base, packs) = world_with_an_old_commit();
    for step in (0..200).step_by(3) {
        let world = base.fork();
        let io = world.client();
        let steward = open(&world, io.clone(), 1);
        let before = io.ops();
        steward.dry_run(&steward.policy()).expect("a plan");
        io.kill_after(io.ops() - before + step);
        let _ = steward.steward_step(&steward.policy());
        drop(steward);
        world.crash(&mut Rng::new(step));
        check_published(&world, &packs);
        let (next, _) = node(&world, 2);
        world.advance_ms(61_000);
        next.steward_step(&next.policy()).expect("the next one sweeps");
        for needed in &packs[1..] {
            assert_eq!(read(&next, needed), Some(needed.bytes.clone()), "cut at {step}");
        }
        next.check(true).expect("a check");
        check_accounting(&next);
    }
}

#[test]
fn a_kept_commit_whose_record_a_dead_steward_took_away_gets_it_back() {
    let (world, packs) = world_with_an_old_commit();
    let key = commit_key(1);
    // The steward renamed the record away and died; the user's keep came just before.
    let (tier, _) = node(&world, 1);
    tier.keep(&key).expect("cached, so it can be kept");
    let core = &tier.core;
    let batch = core.new_batch().expect("a batch");
    for placement in core.record_names(&key).expect("records") {
        use crate::store::tier::layout;
        let to = format!("{batch}/{}", layout::trashed_record(&key, &placement));
        assert!(core.move_away(&layout::record(&key, &placement), &to).expect("moved"));
    }
    let (next, _) = node(&world, 2);
    let report = next.steward_step(&next.policy()).expect("a sweep");
    assert_eq!(report.restored, 1);
    assert_eq!(next.records(&key).expect("records").len(), 1);
    settle(&world, &next);
    assert_eq!(read(&next, &packs[0]), Some(packs[0].bytes.clone()));
}

#[test]
fn a_full_tier_refuses_to_stage_reads_on_and_can_be_swept() {
    let (world, packs) = world_with_an_old_commit();
    let (tier, _) = node(&world, 1);
    let used: usize = world.files().values().map(Vec::len).sum();
    world.set_capacity(Some(used as u64));
    let error = fill(&tier, &pack(9)).expect_err("there is no room");
    assert!(error.is_full(), "{error:?}");
    assert_eq!(read(&tier, &packs[2]), Some(packs[2].bytes.clone()), "reads go on");
    // A node that was never here cannot even write its own name, and still sweeps.
    let (steward, _) = node(&world, 7);
    let report = steward.steward_step(&steward.policy()).expect("a full tier can be swept");
    assert_eq!(report.evicted, 1, "{:?}", report.failed);
    world.advance_ms(GRACE_MS + 1000);
    steward.steward_step(&steward.policy()).expect("the trash is emptied");
    fill(&tier, &pack(9)).expect("there is room again");
}

#[test]
fn a_lease_protects_until_its_node_is_dead() {
    let world = new_world();
    let source = pack(1);
    let (mounter, _) = node(&world, 1);
    let lease = mounter.lease(&record(1, std::slice::from_ref(&source))).expect("a lease");
    fill(&mounter, &source).expect("filled");
    let (steward, _) = node(&world, 2);
    for _ in 0..6 {
        world.advance_ms(400_000);
        assert_eq!(mounter.heartbeat().held, 1);
        assert_eq!(steward.steward_step(&steward.policy()).expect("a sweep").evicted, 0);
    }
    let why = steward.why(&commit_key(1)).expect("an answer");
    assert_eq!(why.last.map(|d| (d.verdict, d.reason)), Some((Verdict::Stays, Reason::Mounted { leases: 1 })));
    // The node dies: its lease expires, then the time to live passes.
    std::mem::forget(lease);
    world.advance_ms(600_000);
    assert_eq!(steward.steward_step(&steward.policy()).expect("a sweep").evicted, 0, "used lately");
    world.advance_ms(TTL_MS);
    assert_eq!(steward.steward_step(&steward.policy()).expect("a sweep").evicted, 1);
    let why = steward.why(&commit_key(1)).expect("an answer");
    assert!(matches!(why.last.map(|d| d.reason), Some(Reason::AgedOut { .. })));
    // It was only asleep: its next heartbeat brings record and lease back, and says so.
    assert_eq!(mounter.heartbeat().lapsed, [commit_key(1)]);
    assert_eq!(steward.records(&commit_key(1)).expect("records").len(), 1);
}

#[test]
fn above_the_high_watermark_the_least_recently_used_leave_until_the_low_one() {
    let world = new_world();
    let (tier, _) = node(&world, 1);
    for n in 1..=5 {
        tier.add_record(&record(n, &[pack(n)])).expect("a record");
        fill(&tier, &pack(n)).expect("filled");
        world.advance_ms(1000);
    }
    tier.keep(&commit_key(1)).expect("kept");
    let total = tier.usage().expect("usage").total_bytes;
    let mut policy = tier.policy();
    policy.capacity_bytes = Some(total + 1);
    policy.high_watermark_percent = 99;
    policy.low_watermark_percent = 62;
    let report = tier.steward_step(&policy).expect("a sweep");
    let left: Vec<u8> = (1..=5).filter(|n| !is_published(&world, &pack(*n))).collect();
    assert_eq!((report.evicted, left), (2, vec![2, 3]), "the kept one stays, then the oldest leave");
    assert_eq!(tier.steward_step(&policy).expect("a sweep").evicted, 0, "enough is enough");
}

#[test]
fn what_would_not_fit_into_the_capacity_is_refused_until_the_steward_that_it_asked_has_made_room() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    let world = new_world();
    let (old, new, large) = (pack(10), pack(11), pack(250));
    let len = |source: &super::kit::Pack| source.bytes.len() as u64;
    let (tier, _) = super::kit::node_with(&world, 1, len(&old) + len(&new) - 1);
    let asked = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&asked);
    tier.on_room_wanted(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    tier.add_record(&record(1, std::slice::from_ref(&old))).expect("a record");
    fill(&tier, &old).expect("it fits");
    assert_eq!(asked.load(Ordering::Relaxed), 1, "nothing was known of the room");
    tier.steward_step(&tier.policy()).expect("a sweep");
    world.advance_ms(10_000);
    let lease = tier.lease(&record(2, std::slice::from_ref(&new))).expect("a lease");
    let refused = fill(&tier, &new).expect_err("it does not fit");
    assert!(refused.is_full(), "{refused:?}");
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    world.advance_ms(10_000);
    assert_eq!(tier.steward_step(&tier.policy()).expect("a sweep").evicted, 1, "the one that nobody uses");
    world.advance_ms(1000);
    fill(&tier, &new).expect("there is room now");
    assert!(!is_published(&world, &old) && is_published(&world, &new));
    // Without anything that may leave, what is too large stays out and what is there stays in.
    tier.add_record(&record(3, std::slice::from_ref(&large))).expect("a record");
    for _ in 0..3 {
        world.advance_ms(10_000);
        assert!(fill(&tier, &large).expect_err("never fits").is_full());
        tier.steward_step(&tier.policy()).expect("a sweep");
    }
    assert_eq!(read(&tier, &new), Some(new.bytes.clone()));
    drop(lease);
}

#[test]
fn time_to_live_of_the_commit_counts_before_the_datasets_and_the_tiers() {
    let world = new_world();
    let (tier, _) = node(&world, 1);
    for n in 1..=3 {
        tier.add_record(&record(n, &[pack(n)])).expect("a record");
    }
    tier.set_dataset_ttl(&commit_key(1).lake, "xray", Some(2 * TTL_MS)).expect("written");
    tier.set_ttl(&commit_key(1), Some(5000)).expect("written");
    let ttls = |tier: &crate::store::tier::Tier<_>| -> Vec<u64> {
        tier.usage().expect("usage").commits.iter().map(|c| c.ttl_ms).collect()
    };
    assert_eq!(ttls(&tier), [5000, 2 * TTL_MS, 2 * TTL_MS]);
    world.advance_ms(6000);
    assert_eq!(tier.steward_step(&tier.policy()).expect("a sweep").evicted, 1);
    tier.set_dataset_ttl(&commit_key(1).lake, "xray", None).expect("written");
    assert_eq!(ttls(&tier), [TTL_MS, TTL_MS]);
}

#[test]
fn check_finds_and_repairs_what_is_out_of_order() {
    let (world, packs) = world_with_an_old_commit();
    let (tier, _) = node(&world, 1);
    assert!(tier.check(false).expect("a check").is_good(), "a healthy tier has no findings");
    let hex = packs[2].id.to_string();
    let object = format!("objects/{}/{hex}", &hex[..2]);
    world.damage(&object, |bytes| bytes.truncate(5));
    let key = commit_key(2);
    let record = format!("commits/{}/{}/record.{}", key.lake, key.commit, super::kit::record(2, &[]).placement);
    world.damage(&record, |bytes| bytes.truncate(9));
    let before = tier.check(false).expect("a check");
    let paths: Vec<&str> = before.findings.iter().map(|f| f.path.as_str()).collect();
    assert!(paths.contains(&object.as_str()) && paths.contains(&record.as_str()), "{paths:?}");
    assert!(!before.is_good());
    assert!(tier.check(true).expect("a check").is_good(), "all of it can be mended");
    let after = tier.check(false).expect("a check");
    assert!(after.findings.iter().all(|f| !paths.contains(&f.path.as_str())), "{:?}", after.findings);
    assert_eq!(read(&tier, &packs[2]), None, "the short object is set aside");
}
