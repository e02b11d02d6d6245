//! Random trees and random reads - offset, length, threads, cold, warm, evicted - through the real mount.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::{Campaign, assert_same_tree};
use crate::kit::World;

#[test]
#[ignore = "long: make campaign PART=soak"]
fn random_reads_of_random_trees_are_right() {
    let mut campaign = Campaign::new();
    let world = World::new();
    for round in 0.. {
        if !campaign.goes_on(round, 60) {
            break;
        }
        let source = world.path(&format!("source{round}"));
        campaign.write_tree(&source, 120);
        let large = (campaign.below(3) as usize + 1) * (33 << 20);
        fs::write(source.join("large"), campaign.bytes(large)).expect("writes");
        let name = format!("soak{round}");
        world.push(&source, &name);
        let verify = ["tier", "node", "always"][campaign.below(3) as usize];
        let prefetch = ["none", "touched", "all"][campaign.below(3) as usize];
        if campaign.below(2) == 0 {
            world.ok(["cache", &name]);
        }
        let mount = world.mount(&name, &format!("m{round}"), &["--verify", verify, "--prefetch", prefetch]);
        let files: Vec<PathBuf> = fs::read_dir(&source)
            .expect("lists")
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
            .map(|entry| PathBuf::from(entry.file_name()))
            .collect();
        std::thread::scope(|scope| {
            for reader in 0..8 {
                let seed = campaign.below(u64::MAX);
                let (source, mount, files) = (&source, &mount, &files);
                scope.spawn(move || {
                    let mut random = SmallRng::seed_from_u64(seed);
                    for _ in 0..150 {
                        let name = &files[random.random_range(0..files.len())];
                        let have = fs::File::open(mount.join(name)).expect("opens on the mount");
                        let want = fs::File::open(source.join(name)).expect("opens the source");
                        let size = want.metadata().expect("looks").len();
                        let offset = random.random_range(0..=size + 10);
                        let len = [1, 4096, 128 << 10, 1 << 20, 3 << 20][random.random_range(0..5)];
                        let (mut a, mut b) = (vec![0; len], vec![0; len]);
                        let got = have.read_at(&mut a, offset).expect("reads the mount");
                        let wanted = want.read_at(&mut b, offset).expect("reads the source");
                        assert!(
                            got == wanted && a == b,
                            "reader {reader}: {} at {offset}, {len} bytes",
                            name.display()
                        );
                    }
                });
            }
        });
        assert_same_tree(&source, &mount);
        world.ok(["umount", mount.to_str().expect("plain")]);
        world.run(["uncache", &name]);
        fs::remove_dir_all(&source).expect("removes the source");
    }
}
