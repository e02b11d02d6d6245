//! What goes on when the daemon does not: the keeper holds the mounts.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::kit::{World, wait_for};

/// Longer than what is packed together with others.
const LEN: usize = 66 << 20;

/// Bytes that differ everywhere.
fn byte_at(at: usize) -> u8 {
    ((at >> 16) ^ (at >> 8) ^ at) as u8
}

fn has_passthrough() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|word| word.parse::<u32>().ok());
    let has = (numbers.next(), numbers.next()) >= (Some(6), Some(9))
        && nix::unistd::geteuid().is_root()
        && Path::new("/dev/fuse").exists();
    if !has {
        eprintln!("skipped: needs root, /dev/fuse and Linux 6.9");
    }
    has
}

#[test]
fn a_file_that_the_kernel_reads_itself_is_read_on_without_a_daemon() {
    if !has_passthrough() {
        return;
    }
    let mut world = World::new();
    world.set("LARDER_DAEMON_RESTART", "false");
    let source = world.make_dir("source");
    let bytes: Vec<u8> = (0..LEN).map(byte_at).collect();
    fs::write(source.join("large"), &bytes).expect("writes");
    world.push(&source, "large");
    world.ok(["cache", "large"]);
    let mounted = world.mount("large", "m", &["--verify", "tier"]);
    let mut file = File::open(mounted.join("large")).expect("opens");
    // The daemon counts what it reads itself: nothing, once the kernel has the file.
    wait_for("the kernel to have the file", || {
        let metrics = world.ok(["daemon", "metrics"]);
        let has = metrics.lines().any(|line| line.contains("passthrough") && line.ends_with(" 1"));
        if !has {
            file = File::open(mounted.join("large")).expect("opens again");
        }
        has
    });
    world.kill_daemon();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("advises");
    let mut read = vec![0; 1 << 20];
    for at in [0, 33 << 20, LEN - (1 << 20)] {
        file.read_exact_at(&mut read, at as u64).expect("reads without a daemon");
        assert!(read == bytes[at..at + (1 << 20)], "at {at}");
    }
    assert_eq!(file.metadata().expect("stats without a daemon").len(), LEN as u64);
    drop(file);
    // The next command starts a daemon, which takes the mount over.
    let other = world.mount("large", "m2", &[]);
    assert_eq!(fs::metadata(other.join("large")).expect("stats").len(), LEN as u64);
    wait_for("the first mount", || fs::read(mounted.join("large")).is_ok_and(|read| read == bytes));
}
