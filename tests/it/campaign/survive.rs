//! Eight readers over cached and passthrough files while the daemon is killed, and replaced by `upgrade`,
//! every 200 to 800 ms: not one error, all bytes right, and nothing is left over in the kernel.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Campaign, peak_memory_mib};
use crate::kit::{World, wait_for};
use crate::survive::{Readers, Stage, count_backing_ids, fds_of};

const KILLS: u64 = 500;

#[test]
#[ignore = "long: make campaign PART=survive"]
fn five_hundred_kills_are_not_noticed() {
    let mut campaign = Campaign::new();
    let world = World::new();
    let stage = Stage::new(&world, 3);
    let seed = campaign.below(u64::MAX);
    let readers = Readers::start(&stage, 8, seed);
    let place = larder::node::place::Place::at(&world.state());
    let programs = ["larder-a", "larder-b"].map(|name| world.path(name));
    for program in &programs {
        std::fs::copy(world.binary(), program).expect("copies the program");
    }
    let (mut kills, mut upgrades) = (0, 0);
    while campaign.goes_on(kills, KILLS) {
        std::thread::sleep(Duration::from_millis(200 + campaign.below(600)));
        if campaign.below(8) == 0 {
            wait_for("the daemon", || world.run(["daemon", "status", "--json"]).stdout.contains("\"ready\": true"));
            world.ok(["daemon", "upgrade", programs[upgrades % 2].to_str().expect("plain")]);
            upgrades += 1;
            continue;
        }
        // At any moment of its life: also while it starts.
        if let Some(pid) = place.daemon_pid()
            && nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).is_ok()
        {
            kills += 1;
        }
    }
    // The last daemon stays alive, so that every reader comes to an end.
    let before = readers.rounds.load(Ordering::Relaxed);
    wait_for("reads after the last kill", || readers.rounds.load(Ordering::Relaxed) > before + 16);
    let rounds = readers.finish();
    wait_for("the daemon", || world.daemon_pid().is_some());
    wait_for("the releases", || {
        let metrics = world.run(["daemon", "metrics"]).stdout;
        metrics.lines().any(|line| line.starts_with("larder_mount_open_files{") && line.ends_with(" 0"))
    });
    let (keepers, ids) = (world.keeper_pids(), count_backing_ids(&world));
    println!(
        "{kills} kills, {upgrades} upgrades, {rounds} rounds of reads, {ids} backing ids left, keeper: {} descriptors, {} MiB",
        fds_of(keepers[0]),
        peak_memory_mib(keepers[0])
    );
    assert_eq!(ids, 0, "backing ids are left in the kernel");
    assert!(fds_of(keepers[0]) < 20);
}
