//! What looking costs: a scan that knows what was there asks only what may have changed.

use super::kit::{TTL_MS, commit_key, fill, new_world, node, pack, record};
use crate::store::tier::Tier;
use crate::testkit::sim_tier::{Rng, SimIo};

fn objects(scan: &crate::store::tier::Scan) -> Vec<String> {
    let sidecars = scan.sidecars.iter().map(|sidecar| format!("{sidecar:?}"));
    scan.objects.iter().map(|object| format!("{object:?}")).chain(sidecars).collect()
}

#[test]
fn a_second_scan_looks_at_folders_and_not_at_each_object() {
    let world = new_world();
    let (tier, io) = node(&world, 1);
    let packs: Vec<_> = (1..=200).map(pack).collect();
    tier.add_record(&record(1, &packs)).expect("a record");
    for source in &packs {
        fill(&tier, source).expect("filled");
    }
    world.advance_ms(10_000);
    let count = |tier: &Tier<SimIo>| {
        let before = io.ops();
        let scan = tier.scan().expect("a scan");
        assert_eq!(scan.objects.len(), 200);
        io.ops() - before
    };
    let (first, second) = (count(&tier), count(&tier));
    println!("200 packs with an index each: {first} calls, then {second}");
    assert!(first > 256 + 2 * 200, "each file is looked at once: {first}");
    assert!(second < 256 + 60, "one look for each of the 256 folders, and a few for the commit: {second}");
}

#[test]
fn what_is_remembered_is_what_a_fresh_look_gives_whoever_changes_the_tier() {
    for seed in 0..6 {
        let world = new_world();
        let (watcher, _) = node(&world, 1);
        let (other, _) = node(&world, 2);
        let mut rng = Rng::new(seed);
        for step in 0..60 {
            let n = 1 + u8::try_from(rng.below(5)).expect("small");
            match rng.below(6) {
                0 | 1 => {
                    other.add_record(&record(n, &[pack(n)])).expect("a record");
                    fill(&other, &pack(n)).expect("filled");
                }
                2 => drop(other.uncache(&commit_key(n))),
                3 => {
                    if let Some(found) = other.pack(&pack(n).id).expect("looks") {
                        other.quarantine(&pack(n).id, &found.identity, "a test").expect("set aside");
                    }
                }
                4 => drop(other.steward_step(&other.policy()).expect("a sweep")),
                _ => world.advance_ms(rng.below(TTL_MS / 4)),
            }
            let remembered = watcher.scan().expect("a scan");
            let fresh = watcher.core.scan_afresh().expect("a scan");
            assert_eq!(objects(&remembered), objects(&fresh), "seed {seed}, step {step}");
        }
    }
}
