//! Two nodes in every order: mounting against evicting, publishing against publishing.
//!
//! Each pair runs on two threads that take turns operation by operation: every schedule with two
//! switches (a does k operations, b does m, a the rest, b the rest), and random ones.

use std::sync::Arc;

use super::kit::{
    GRACE_MS, Pack, TTL_MS, check_published, commit_key, fill, is_published, new_world, node, open, pack, read, record,
};
use crate::store::tier::{Decision, Sidecar, Tier, TierError};
use crate::testkit::sim_tier::{Schedule, SimIo, SimWorld};

/// Runs both to their ends under a schedule.
fn race<A: Send, B: Send>(
    schedule: &Arc<Schedule>,
    a: (&SimIo, impl FnOnce() -> A + Send),
    b: (&SimIo, impl FnOnce() -> B + Send),
) -> (A, B) {
    struct Finish<'a>(&'a Schedule, &'a SimIo);
    impl Drop for Finish<'_> {
        fn drop(&mut self) {
            self.0.finish(self.1);
        }
    }
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let _finish = Finish(schedule, a.0);
            a.1()
        });
        let second = scope.spawn(|| {
            let _finish = Finish(schedule, b.0);
            b.1()
        });
        (first.join().expect("the first ends"), second.join().expect("the second ends"))
    })
}

/// Mounts: lease, record, then every pack is looked at and fetched where it is missing.
fn mount(tier: &Tier<SimIo>, packs: &[Pack]) -> Result<(), TierError> {
    for source in packs {
        // What is remembered from before the lease must not count after it.
        let _ = tier.pack(&source.id);
    }
    let lease = tier.lease(&record(1, packs))?;
    for source in packs {
        // What is given up under us (ENOENT) is tried again, as fetching does.
        let mut tries = 0;
        while let Err(error) = fill(tier, source) {
            tries += 1;
            assert!(error.is_gone() && tries < 5, "{error:?}");
        }
    }
    std::mem::forget(lease);
    Ok(())
}

/// A commit whose time to live has passed, and the decision that it leaves.
fn aged_world(packs: &[Pack]) -> (SimWorld, Decision) {
    let world = new_world();
    let (tier, _) = node(&world, 1);
    tier.add_record(&record(1, packs)).expect("a record");
    for source in packs {
        fill(&tier, source).expect("filled");
    }
    world.advance_ms(TTL_MS + 1000);
    let plan = tier.dry_run(&tier.policy()).expect("a plan");
    let decision = plan.leaving().next().expect("it has aged out").clone();
    (world, decision)
}

/// One race; with `settle`, what later sweeps make of it as well.
fn mount_against_evict(
    base: &SimWorld,
    packs: &[Pack],
    decision: &Decision,
    schedule: impl Fn(&[&SimIo]) -> Arc<Schedule>,
    name: &str,
    settle: bool,
) {
    let world = base.fork();
    let (io_a, io_b) = (world.client(), world.client());
    let plain_a = open(&world, io_a.clone(), 1);
    // It has looked around before: it remembers names.
    for source in packs {
        let _ = plain_a.pack(&source.id);
    }
    let schedule = schedule(&[&io_a, &io_b]);
    let tier_a = with_schedule(&world, &io_a, &schedule, 1);
    let tier_b = with_schedule(&world, &io_b, &schedule, 2);
    let (mounted, evicted) =
        race(&schedule, (&io_a, || mount(&tier_a, packs)), (&io_b, || tier_b.core.evict(decision).map(drop)));
    mounted.expect("mounting works");
    evicted.expect("evicting works");
    check_published(&world, packs);
    let (after, _) = node(&world, 3);
    assert_eq!(after.records(&commit_key(1)).expect("records").len(), 1, "{name}: a mounted commit has its record");
    for source in packs {
        assert!(is_published(&world, source), "{name}: a mounted commit's objects stay");
    }
    if !settle {
        return;
    }
    // And later sweeps take nothing of it away, and leave nothing behind.
    for _ in 0..2 {
        world.advance_ms(GRACE_MS + 1000);
        assert_eq!(tier_a_heartbeat(&plain_a, packs), 0);
        after.steward_step(&after.policy()).expect("a sweep");
    }
    for source in packs {
        assert_eq!(read(&after, source), Some(source.bytes.clone()), "{name}: still there after sweeps");
    }
    assert_eq!(after.usage().expect("usage").trash_bytes, 0, "{name}");
}

/// The first node goes on using the commit.
fn tier_a_heartbeat(tier: &Tier<SimIo>, packs: &[Pack]) -> usize {
    tier.add_record(&record(1, packs)).expect("used");
    tier.heartbeat().failed.len()
}

fn with_schedule(world: &SimWorld, io: &SimIo, schedule: &Arc<Schedule>, n: u8) -> Tier<SimIo> {
    // Opening takes an operation of its own, outside of the schedule.
    let mut tier = open(world, io.clone(), n);
    let core = Arc::get_mut(&mut tier.core).expect("not shared yet");
    core.io = io.clone().with_schedule(schedule);
    tier
}

#[test]
fn mounting_against_evicting_with_every_pair_of_switches() {
    let packs = [pack(1)];
    let (base, decision) = aged_world(&packs);
    // Who begins stops after every operation; how far the other gets matters less.
    for first in 1..100 {
        for second in (1..90).step_by(11) {
            for order in 0..2 {
                let name = format!("order {order}, switches after {first} and {second}");
                let schedule = |ios: &[&SimIo]| {
                    let mut ios = ios.to_vec();
                    ios.rotate_left(order);
                    Schedule::switching(&ios, vec![first, second])
                };
                let settle = (first + second) % 16 == 0;
                mount_against_evict(&base, &packs, &decision, schedule, &name, settle);
            }
        }
    }
}

#[test]
fn mounting_against_evicting_in_random_orders() {
    let packs = [pack(1), pack(2)];
    let (base, decision) = aged_world(&packs);
    for seed in 0..400 {
        let schedule = |ios: &[&SimIo]| Schedule::random(ios, seed);
        let name = format!("seed {seed}");
        mount_against_evict(&base, &packs, &decision, schedule, &name, seed % 8 == 0);
    }
}

#[test]
fn keeping_against_evicting_keeps_or_says_that_it_is_not_cached() {
    let packs = [pack(1)];
    let (base, decision) = aged_world(&packs);
    for first in 1..60 {
        for order in 0..2 {
            let world = base.fork();
            let (io_a, io_b) = (world.client(), world.client());
            let mut ios = [&io_a, &io_b];
            ios.rotate_left(order);
            let schedule = Schedule::switching(&ios, vec![first]);
            let a = with_schedule(&world, &io_a, &schedule, 1);
            let b = with_schedule(&world, &io_b, &schedule, 2);
            let evict = || b.core.evict(&decision).map(drop);
            let (kept, evicted) = race(&schedule, (&io_a, || a.keep(&commit_key(1))), (&io_b, evict));
            evicted.expect("evicting works");
            let (after, _) = node(&world, 3);
            let records = after.records(&commit_key(1)).expect("records").len();
            match kept {
                Ok(()) => assert!(
                    records == 1 && is_published(&world, &packs[0]),
                    "kept, so it stays: order {order}, switch after {first}"
                ),
                Err(error) => assert!(matches!(error, TierError::NotCached { .. }), "{error:?}"),
            }
        }
    }
}

#[test]
fn what_is_published_has_its_index_though_a_steward_clears_loose_ones() {
    let base = new_world();
    let source = pack(5);
    let (tier, _) = node(&base, 1);
    tier.put_sidecar(&source.id, Sidecar::Index, &source.index).expect("its own index");
    let batch = tier.core.new_batch().expect("a batch");
    for first in 1..80 {
        for second in 1..12 {
            let world = base.fork();
            let (io_a, io_b) = (world.client(), world.client());
            let schedule = Schedule::switching(&[&io_a, &io_b], vec![first, second]);
            let a = with_schedule(&world, &io_a, &schedule, 1);
            let b = with_schedule(&world, &io_b, &schedule, 2);
            // The index may be away for a moment: then publishing is tried again.
            let publish = || (0..3).any(|_| fill(&a, &source).is_ok());
            let clear = || b.core.move_sidecars(&source.id, &[Sidecar::Index], &batch);
            let (published, cleared) = race(&schedule, (&io_a, publish), (&io_b, clear));
            cleared.expect("clearing works");
            assert!(published, "switches after {first} and {second}");
            let (after, _) = node(&world, 3);
            assert_eq!(
                after.sidecar(&source.id, Sidecar::Index).expect("readable"),
                Some(source.index.clone()),
                "switches after {first} and {second}"
            );
        }
    }
}

#[test]
fn two_nodes_that_fill_the_same_pack_publish_it_once_and_right() {
    let base = new_world();
    let source = pack(5);
    for seed in 0..300 {
        let world = base.fork();
        world.set_stale_when_removed(seed % 2 == 0);
        let (io_a, io_b) = (world.client(), world.client());
        let schedule = Schedule::random(&[&io_a, &io_b], seed);
        let (a, b) = (with_schedule(&world, &io_a, &schedule, 1), with_schedule(&world, &io_b, &schedule, 2));
        let run = |tier: &Tier<SimIo>| {
            for _ in 0..4 {
                match fill(tier, &source) {
                    Ok(()) => return,
                    Err(error) => assert!(error.is_gone(), "seed {seed}: {error:?}"),
                }
            }
            panic!("seed {seed}: four tries are enough");
        };
        race(&schedule, (&io_a, || run(&a)), (&io_b, || run(&b)));
        check_published(&world, std::slice::from_ref(&source));
        let (after, _) = node(&world, 3);
        assert_eq!(read(&after, &source), Some(source.bytes.clone()), "seed {seed}");
    }
}

#[test]
fn filling_against_a_sweep_that_gives_staging_up() {
    let base = new_world();
    let source = pack(5);
    {
        // An old, half-filled staging folder lies there.
        let (tier, _) = node(&base, 1);
        let stage = tier.stage(&source.id, source.bytes.len() as u64).expect("staging");
        stage.write_at(&source.bytes[..128], 0).expect("inside");
        stage.span_done(0).expect("a mark");
        base.advance_ms(GRACE_MS + 10_000);
    }
    for seed in 0..200 {
        let world = base.fork();
        let (io_a, io_b) = (world.client(), world.client());
        let schedule = Schedule::random(&[&io_a, &io_b], seed);
        let (a, b) = (with_schedule(&world, &io_a, &schedule, 1), with_schedule(&world, &io_b, &schedule, 2));
        let run = || {
            a.add_record(&record(1, std::slice::from_ref(&source))).expect("a record");
            for _ in 0..5 {
                match fill(&a, &source) {
                    Ok(()) => return,
                    Err(error) => assert!(error.is_gone(), "seed {seed}: {error:?}"),
                }
            }
            panic!("seed {seed}: five tries are enough");
        };
        let sweep = || {
            let dir = crate::store::tier::layout::staging_dir(&source.id);
            b.core.give_up_staging(&dir).expect("moved");
            b.core.move_objects(&[source.id], &b.core.new_batch().expect("a batch")).expect("moved");
        };
        race(&schedule, (&io_a, run), (&io_b, sweep));
        check_published(&world, std::slice::from_ref(&source));
        assert!(is_published(&world, &source), "seed {seed}: a record names it, so it stays");
        let (after, _) = node(&world, 3);
        world.advance_ms(GRACE_MS + 1000);
        after.steward_step(&after.policy()).expect("a sweep");
        assert_eq!(read(&after, &source), Some(source.bytes.clone()), "seed {seed}");
        assert!(after.check(false).expect("a check").is_good(), "seed {seed}");
    }
}

#[test]
fn a_steward_that_pauses_over_a_heartbeat_does_not_take_a_live_lease() {
    let world = new_world();
    let (mounter, _) = node(&world, 1);
    let lease = mounter.lease(&record(1, &[pack(1)])).expect("a lease");
    world.advance_ms(600_000);
    let (steward, _) = node(&world, 2);
    let seen = steward.scan().expect("a scan").commits.first().and_then(|c| c.leases.first().cloned());
    let seen = seen.expect("an expired lease");
    assert!(!seen.live);
    // The steward pauses; the sleeper wakes up and renews.
    assert_eq!(mounter.heartbeat().held, 1);
    assert!(!steward.core.take_over(&seen.path, seen.stat).expect("an answer"), "it was renewed");
    assert_eq!(steward.scan().expect("a scan").commits.first().map(|c| c.live_leases()), Some(1));
    lease.release().expect("released");
}

#[test]
fn a_mark_from_a_staging_that_was_given_up_says_nothing_about_the_next() {
    let world = new_world();
    let source = pack(5);
    let len = source.bytes.len() as u64;
    let (a, _) = node(&world, 1);
    let (b, _) = node(&world, 2);
    let old = a.stage(&source.id, len).expect("staging");
    old.write_at(&source.bytes, 0).expect("inside");
    b.core.give_up_staging(&crate::store::tier::layout::staging_dir(&source.id)).expect("given up");
    let new = b.stage(&source.id, len).expect("a new staging");
    a.core.refresh(&crate::store::tier::layout::staging_dir(&source.id));
    // The paused owner goes on: its bytes are in the trash, its mark may not count for the new file.
    let _ = old.spans_done(&[0, 1]);
    assert_eq!(new.refresh_done().expect("marks"), 0);
    b.put_sidecar(&source.id, crate::store::tier::Sidecar::Index, &source.index).expect("its own index");
    assert!(matches!(new.publish(), Err(TierError::Incomplete { .. })));
}

#[test]
fn a_miss_is_believed_only_after_a_look_at_the_server() {
    let world = new_world();
    let source = pack(1);
    let (a, _) = node(&world, 1);
    let (b, _) = node(&world, 2);
    assert_eq!(read(&b, &source), None, "b now remembers that there is none");
    fill(&a, &source).expect("filled");
    assert_eq!(read(&b, &source), Some(source.bytes), "and looks again all the same");
}

#[test]
fn a_quarantine_that_pauses_puts_a_good_replacement_back() {
    let base = new_world();
    let source = pack(5);
    let bad = Pack { bytes: source.bytes.iter().map(|b| b ^ 1).collect(), ..source.clone() };
    let (tier, _) = node(&base, 1);
    fill(&tier, &bad).expect("a publisher that did not verify");
    let identity = tier.pack(&source.id).expect("readable").expect("there");
    for step in 1..30 {
        let world = base.fork();
        let (io_a, io_b) = (world.client(), world.client());
        let schedule = Schedule::switching(&[&io_a, &io_b], vec![step]);
        let a = with_schedule(&world, &io_a, &schedule, 1);
        let b = with_schedule(&world, &io_b, &schedule, 2);
        let mend = || {
            // An operation waits for this one's turn: the time must pass while the first one pauses, not before
            // it began.
            b.pack(&source.id).expect("readable");
            // The first one pauses for longer than its claim lives.
            world.advance_ms(70_000);
            b.quarantine(&source.id, &identity.identity, "bad").expect("an answer");
            fill(&b, &source).expect("fetched again");
        };
        let pause = || a.quarantine(&source.id, &identity.identity, "bad");
        let (paused, ()) = race(&schedule, (&io_a, pause), (&io_b, mend));
        paused.expect("an answer");
        let (after, _) = node(&world, 3);
        assert_eq!(read(&after, &source), Some(source.bytes.clone()), "paused after {step}");
    }
}
