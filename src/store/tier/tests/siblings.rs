//! What a killed process of the same node leaves blocks nobody; and a sweep puts back before it deletes.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::kit::{Pack, check_accounting, commit_key, fill, is_published, new_world, node, open, pack, read, record};
use crate::store::tier::siblings::{Fate, Purpose, Siblings};
use crate::store::tier::turns::Turn;
use crate::store::tier::{Tier, TierError, layout};
use crate::testkit::sim_tier::{SimIo, SimWorld};

/// The lock files of a node's state directory.
#[derive(Debug, Clone, Default)]
struct Dead(Arc<Mutex<BTreeMap<Uuid, Fate>>>);

impl Siblings for Dead {
    fn fate(&self, instance: &Uuid) -> Fate {
        self.0.lock().get(instance).copied().unwrap_or(Fate::Unknown)
    }
}

impl Dead {
    fn kill(&self, tier: &Tier<SimIo>, fate: Fate) {
        self.0.lock().insert(tier.core.instance, fate);
    }
}

fn sibling(world: &SimWorld, node: u8, dead: &Dead) -> Tier<SimIo> {
    open(world, world.client(), node).with_siblings(Arc::new(dead.clone()))
}

#[test]
fn a_killed_sibling_has_no_turn_and_another_node_keeps_its_own() {
    let world = new_world();
    let dead = Dead::default();
    let (first, second) = (sibling(&world, 1, &dead), sibling(&world, 1, &dead));
    let (stranger, _) = node(&world, 2);
    let take = |tier: &Tier<SimIo>| tier.core.take_turn(layout::STEWARD_LEASE, 60_000).expect("asks");
    assert_eq!(take(&first), Turn::Mine { taken_over: false });
    assert!(matches!(take(&second), Turn::Other { .. }), "its owner lives");
    dead.kill(&first, Fate::Ended);
    assert!(matches!(take(&stranger), Turn::Other { .. }), "another node has no proof");
    assert_eq!(take(&second), Turn::Mine { taken_over: true }, "its owner is dead");
    assert!(!first.core.renew_turn(layout::STEWARD_LEASE).expect("looks"), "who was not dead finds out");
}

#[test]
fn a_sweep_says_who_is_sweeping_where_it_is_not_its_turn() {
    let world = new_world();
    let ((first, _), (second, _)) = (node(&world, 1), node(&world, 2));
    assert_eq!(first.core.take_turn(layout::STEWARD_LEASE, 60_000).expect("asks"), Turn::Mine { taken_over: false });
    world.advance_ms(5000);
    let report = second.steward_step(&second.policy()).expect("asks");
    let steward = report.steward.expect("another one");
    assert!(report.elsewhere);
    // Each call takes a millisecond.
    assert_eq!((steward.node, steward.idle_ms / 1000), (first.core.node, 5));
}

fn leased(world: &SimWorld, dead: &Dead, purpose: Purpose) -> (Tier<SimIo>, Pack) {
    let source = pack(3);
    let tier = sibling(world, 1, dead);
    let lease = tier.lease_for(&record(1, std::slice::from_ref(&source)), purpose).expect("a lease");
    fill(&tier, &source).expect("filled");
    std::mem::forget(lease);
    (tier, source)
}

#[test]
fn a_fill_that_was_killed_does_not_keep_its_node_from_uncaching() {
    let world = new_world();
    let dead = Dead::default();
    let (filler, source) = leased(&world, &dead, Purpose::Fill);
    let (next, (stranger, _)) = (sibling(&world, 1, &dead), node(&world, 2));
    assert!(matches!(next.uncache(&commit_key(1)), Err(TierError::Busy { .. })), "it still fills");
    dead.kill(&filler, Fate::Ended);
    world.advance_ms(8000);
    let refused = stranger.uncache(&commit_key(1)).expect_err("another node has no proof").to_string();
    let named = format!("it is being filled by node {}", filler.core.node);
    assert!(refused.contains(&named) && refused.contains("renewed 8s ago"), "{refused}");
    assert!(refused.contains(&format!("larder tier forget-node {}", filler.core.node)), "{refused}");
    next.uncache(&commit_key(1)).expect("nothing protects it");
    assert!(!is_published(&world, &source));
}

#[test]
fn a_mount_outlives_its_daemon_until_the_next_one_has_made_it_again_or_the_machine_was_restarted() {
    for by_restart in [false, true] {
        let world = new_world();
        let dead = Dead::default();
        let (daemon, _) = leased(&world, &dead, Purpose::Mount);
        dead.kill(&daemon, Fate::Ended);
        let next = sibling(&world, 1, &dead);
        let refused = next.uncache(&commit_key(1)).expect_err("the keeper may still have the mount").to_string();
        assert!(refused.contains("the daemon that mounted it has ended: start one"), "{refused}");
        if by_restart {
            dead.kill(&daemon, Fate::Rebooted);
        } else {
            let own = next.lease(&record(2, &[pack(4)])).expect("a lease");
            assert_eq!(next.forget_ended().expect("forgets"), 1, "not its own");
            assert!(next.heartbeat().lapsed.is_empty());
            own.release().expect("released");
        }
        next.uncache(&commit_key(1)).expect("nothing protects it");
    }
}

#[test]
fn why_names_records_leases_and_what_is_left_of_the_time_to_live() {
    let world = new_world();
    let (mounter, _) = node(&world, 1);
    let lease = mounter.lease(&record(1, &[pack(1), pack(2)])).expect("a lease");
    fill(&mounter, &pack(1)).expect("filled");
    world.advance_ms(7000);
    let (other, _) = node(&world, 2);
    let why = other.why(&commit_key(1)).expect("an answer");
    assert_eq!(why.records.first().map(|r| (r.packs, r.packs_cached)), Some((2, 1)));
    let found = why.leases.first().expect("the lease");
    assert_eq!((found.node, found.age_ms / 1000, found.live), (Some(mounter.core.node), 7, true));
    assert_eq!(why.expires_in_ms, None, "mounted");
    lease.release().expect("released");
    let _hold = mounter.hold(&commit_key(1), "m").expect("held");
    let held = other.why(&commit_key(1)).expect("an answer");
    assert_eq!((held.holds.len(), held.expires_in_ms), (1, None));
    mounter.release_hold("m").expect("released");
    world.advance_ms(9000);
    let left = other.why(&commit_key(1)).expect("an answer").expires_in_ms.map(|ms| ms.div_euclid(1000));
    assert_eq!(left, i64::try_from(super::kit::TTL_MS / 1000 - 10).ok());
}

/// Moves what a commit has into a batch of the trash, as an eviction does that is killed then.
fn take_away(tier: &Tier<SimIo>, source: &Pack, with_record: bool) {
    let core = &tier.core;
    let batch = core.new_batch().expect("a batch");
    let key = commit_key(1);
    for placement in core.record_names(&key).expect("names").into_iter().filter(|_| with_record) {
        let to = format!("{batch}/{}", layout::trashed_record(&key, &placement));
        assert!(core.move_away(&layout::record(&key, &placement), &to).expect("moves"));
    }
    assert!(core.move_away(&layout::object(&source.id), &format!("{batch}/{}", source.id)).expect("moves"));
    core.move_sidecars(&source.id, &layout::Sidecar::ALL, &batch).expect("moves");
}

#[test]
fn one_sweep_puts_back_a_record_that_a_lease_needs_and_what_the_record_names() {
    let world = new_world();
    let (mounter, _) = node(&world, 1);
    let source = pack(3);
    let lease = mounter.lease(&record(1, std::slice::from_ref(&source))).expect("a lease");
    fill(&mounter, &source).expect("filled");
    take_away(&mounter, &source, true);
    let (next, _) = node(&world, 2);
    // The grace time is over as well: what is needed must be put back before anything is deleted.
    world.advance_ms(super::kit::GRACE_MS + 1000);
    next.steward_step(&next.policy()).expect("a sweep");
    assert_eq!(read(&next, &source), Some(source.bytes.clone()));
    let found = next.check(false).expect("a check").findings;
    assert!(found.is_empty(), "{found:?}");
    drop(lease);
}

#[test]
fn what_was_published_again_is_not_missed_in_the_trash() {
    let world = new_world();
    let (tier, _) = node(&world, 1);
    let source = pack(3);
    tier.add_record(&record(1, std::slice::from_ref(&source))).expect("a record");
    fill(&tier, &source).expect("filled");
    take_away(&tier, &source, false);
    let missed: Vec<String> = tier.check(false).expect("a check").findings.into_iter().map(|f| f.problem).collect();
    assert_eq!(missed, ["in the trash, but needed", "in the trash, but needed"], "pack and index");
    fill(&tier, &source).expect("filled again");
    let found = tier.check(false).expect("a check").findings;
    assert!(found.is_empty(), "{found:?}");
    world.advance_ms(super::kit::GRACE_MS + 1000);
    let report = tier.steward_step(&tier.policy()).expect("a sweep");
    assert_eq!(report.restored, 0);
    assert!(report.deleted_bytes >= source.bytes.len() as u64, "{report:?}");
    assert_eq!(read(&tier, &source), Some(source.bytes.clone()));
    check_accounting(&tier);
}
