//! kill -9 at random moments: during push, during fill, during age-out. No partial object is ever
//! visible, push resumes, mounts can be made again.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Campaign, assert_same_tree};
use crate::kit::World;

/// Every published object of the tier has the length its name's record says, and its digest holds.
#[track_caller]
fn assert_tier_is_sound(world: &World) {
    let report = world.run(["tier", "check", "--json"]);
    assert_eq!(report.code, 0, "tier check: {}\n{}", report.stdout, report.stderr);
}

fn source(campaign: &mut Campaign, world: &World) -> PathBuf {
    let root = world.path("source");
    campaign.write_tree(&root, 400);
    for number in 0..6 {
        fs::write(root.join(format!("large{number}")), campaign.bytes(9 << 20)).expect("writes a large file");
    }
    root
}

#[track_caller]
fn assert_mount_is(world: &World, source: &Path, revision: &str) {
    let mount = world.mount(revision, "m", &[]);
    assert_same_tree(source, &mount);
    world.ok(["umount", mount.to_str().expect("plain")]);
}

#[test]
#[ignore = "long: make campaign PART=kill"]
fn a_push_that_is_killed_resumes() {
    let mut campaign = Campaign::new();
    let world = World::new();
    let source = source(&mut campaign, &world);
    let begun = std::time::Instant::now();
    world.push(&source, "undisturbed");
    let whole = begun.elapsed().as_millis() as u64;
    let wanted = world.json(&["show", "undisturbed"])["tree"].clone();
    let mut kills = 0;
    for round in 0.. {
        if !campaign.goes_on(round, 100) {
            break;
        }
        let name = format!("killed{round}");
        // Killed until it gets through; each try may run a little longer.
        for attempt in 1.. {
            let mut push = world
                .command(["push", source.to_str().expect("plain"), &name])
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .expect("starts");
            std::thread::sleep(Duration::from_millis(campaign.below(whole * attempt / 2 + 1)));
            if push.try_wait().expect("looks").is_some_and(|status| status.success()) {
                break;
            }
            push.kill().expect("kills");
            push.wait().expect("waits");
            kills += 1;
        }
        assert_eq!(world.json(&["show", &name])["tree"], wanted, "round {round}");
    }
    println!("{kills} kills");
    assert_mount_is(&world, &source, "killed0");
}

#[test]
#[ignore = "long: make campaign PART=kill"]
fn a_daemon_that_is_killed_while_it_fills_leaves_no_partial_object() {
    let mut campaign = Campaign::new();
    let world = World::new();
    let source = source(&mut campaign, &world);
    world.push(&source, "data");
    let mut rounds = 0;
    for round in 0.. {
        if !campaign.goes_on(round, 100) {
            break;
        }
        rounds += 1;
        world.run(["uncache", "data"]);
        let mut cache = world
            .command(["cache", "data"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("starts");
        std::thread::sleep(Duration::from_millis(campaign.below(600)));
        // Waits for its end: a command that meets a dying daemon fails, rightly.
        if world.daemon_pid().is_some() {
            world.kill_daemon();
        }
        cache.wait().expect("waits");
        if round % 10 == 0 {
            // What a killed fill left in the trash although it is cached again, a sweep puts back.
            world.ok(["tier", "sweep"]);
            assert_tier_is_sound(&world);
            assert_mount_is(&world, &source, "data");
        }
    }
    world.ok(["cache", "data"]);
    assert_tier_is_sound(&world);
    assert_mount_is(&world, &source, "data");
    println!("{rounds} rounds");
}

#[test]
#[ignore = "long: make campaign PART=kill"]
fn a_sweep_that_is_killed_is_done_by_the_next() {
    let mut campaign = Campaign::new();
    let world = World::new();
    let source = source(&mut campaign, &world);
    world.push(&source, "data");
    for round in 0.. {
        if !campaign.goes_on(round, 100) {
            break;
        }
        world.ok(["cache", "data", "--ttl", "1ms"]);
        let mut sweep = world
            .command(["tier", "sweep"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("starts");
        std::thread::sleep(Duration::from_millis(campaign.below(60)));
        let _ = sweep.kill();
        sweep.wait().expect("waits");
        if campaign.below(3) == 0 && world.daemon_pid().is_some() {
            world.kill_daemon();
        }
        if round % 10 == 0 {
            assert_mount_is(&world, &source, "data");
        }
    }
    // What the last one left half done, the next one does, at once: the dead one has no turn.
    world.ok(["tier", "sweep", "--wait", "30s"]);
    assert_tier_is_sound(&world);
    assert_mount_is(&world, &source, "data");
}

#[test]
#[ignore = "long: make campaign PART=kill"]
fn mounts_are_made_again_after_the_daemon_was_killed() {
    let mut campaign = Campaign::new();
    let world = World::new();
    let source = source(&mut campaign, &world);
    world.push(&source, "data");
    let mount = world.mount("data", "m", &[]);
    for round in 0.. {
        if !campaign.goes_on(round, 30) {
            break;
        }
        world.kill_daemon();
        world.ok(["daemon"]);
        crate::kit::wait_for("the mount", || fs::read_dir(&mount).is_ok_and(|mut entries| entries.next().is_some()));
    }
    assert_same_tree(&source, &mount);
}
