//! The store fails in every way the wire allows; the tier is full. Reads succeed late or fail with EIO
//! within the stated time; the daemon lives; its memory stays bounded.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Campaign, peak_memory_mib};
use crate::kit::World;
use crate::kit::proxy::{Fault, Proxy, Rule};
use crate::kit::s3::{TestS3, env_at};

pub(super) fn random_fault(campaign: &mut Campaign) -> Fault {
    match campaign.below(8) {
        0 => Fault::Status(500),
        1 => Fault::Status(503),
        2 => Fault::CloseBefore,
        3 => Fault::CutBody(campaign.below(100_000)),
        4 => Fault::ShortBody(campaign.below(1000)),
        5 => Fault::WrongByte(campaign.below(4000)),
        6 => Fault::Stall(campaign.below(10_000)),
        _ => Fault::Late(Duration::from_millis(campaign.below(1500))),
    }
}

/// Reads a file by calls of 128 KiB; notes how long the longest call took, opening it included.
fn read_in_calls(path: &Path, longest: &mut Duration) -> io::Result<Vec<u8>> {
    let (mut bytes, mut part) = (Vec::new(), vec![0; 128 << 10]);
    let mut file = None;
    loop {
        let begun = Instant::now();
        let done = match &mut file {
            None => File::open(path).map(|opened| {
                file = Some(opened);
                1
            }),
            Some(file) => file.read(&mut part).inspect(|n| bytes.extend_from_slice(&part[..*n])),
        };
        *longest = begun.elapsed().max(*longest);
        if done? == 0 {
            return Ok(bytes);
        }
    }
}

#[test]
#[ignore = "long: make campaign PART=fault"]
fn reads_come_late_or_fail_in_time_whatever_the_store_does() {
    let mut campaign = Campaign::new();
    let s3 = TestS3::start();
    let proxy = Proxy::start(s3.addr());
    let mut world = World::new();
    world.set_all(env_at(&proxy.endpoint(), "lake"));
    let source = world.path("source");
    fs::create_dir_all(&source).expect("makes it");
    for number in 0..300 {
        fs::write(source.join(format!("f{number}")), campaign.bytes(30_000)).expect("writes");
    }
    fs::write(source.join("large"), campaign.bytes(80 << 20)).expect("writes");
    world.push(&source, "data");
    let pid = {
        world.mount("data", "m", &["--verify", "always"]);
        world.daemon_pid().expect("a daemon runs")
    };
    let (mut late, mut failed) = (0, 0);
    let mut longest = Duration::ZERO;
    for round in 0.. {
        if !campaign.goes_on(round, 40) {
            break;
        }
        proxy.heal();
        world.run(["umount", world.path("m").to_str().expect("plain")]);
        world.run(["uncache", "data"]);
        world.mount("data", "m", &["--verify", "always", "--prefetch", "none"]);
        for _ in 0..3 {
            let rule =
                Rule::every("GET", random_fault(&mut campaign)).after(campaign.below(4)).times(1 + campaign.below(4));
            proxy.rule(rule);
        }
        for number in 0..12 {
            let name = if number == 0 { "large".to_owned() } else { format!("f{}", campaign.below(300)) };
            match read_in_calls(&world.path("m").join(&name), &mut longest) {
                Ok(bytes) => {
                    assert!(bytes == fs::read(source.join(&name)).expect("reads"), "{name} has other bytes");
                    late += 1;
                }
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
                    failed += 1;
                }
            }
        }
        assert_eq!(world.daemon_pid(), Some(pid), "the daemon lives");
    }
    println!("{late} right, {failed} EIO, the longest call took {longest:?}, peak memory {} MiB", peak_memory_mib(pid));
    // docs/fetch.md: a read ends within `fetch.give_up`; a busy machine adds to it.
    assert!(longest < Duration::from_secs(30 + 10), "{longest:?}");
    assert!(peak_memory_mib(pid) < 1024);
}

#[test]
#[ignore = "long: make campaign PART=fault"]
fn no_read_fails_while_the_tier_is_full() {
    let mut campaign = Campaign::new();
    let mut world = World::new();
    let tier = world.make_dir("small-tier");
    let options = Some("size=24m");
    nix::mount::mount(Some("tmpfs"), &tier, Some("tmpfs"), nix::mount::MsFlags::empty(), options)
        .expect("mounts a tmpfs (needs root)");
    world.set("LARDER_TIER", tier.to_str().expect("plain"));
    world.ok(["tier", "init", tier.to_str().expect("plain")]);
    let source = world.path("source");
    fs::create_dir_all(&source).expect("makes it");
    for number in 0..600 {
        fs::write(source.join(format!("f{number}")), campaign.bytes(110_000)).expect("writes");
    }
    fs::write(source.join("large"), campaign.bytes(70 << 20)).expect("writes");
    world.push(&source, "data");
    let mount = world.mount("data", "m", &[]);
    for name in fs::read_dir(&source).expect("lists").flatten().map(|entry| entry.file_name()) {
        let bytes = fs::read(mount.join(&name)).expect("a full tier fails no read");
        assert!(bytes == fs::read(source.join(&name)).expect("reads"), "{name:?} has other bytes");
    }
    world.ok(["umount", mount.to_str().expect("plain")]);
    world.ok(["daemon", "stop"]);
}
