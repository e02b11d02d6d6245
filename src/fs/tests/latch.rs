//! How an inode is read is decided at its first open and kept until its last release, while the file
//! comes into the tier and leaves it.

use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::rig::{Mount, Rig, forget_pages, noise, open, options, read_range};
use crate::fs::session::ServeOptions;
use crate::fs::view::ViewOptions;
use crate::store::fetch::Verify;
use crate::testkit::model::{Packing, dir, file};

const LEN: usize = 3 << 20;

fn trusting() -> ViewOptions {
    // The kernel may have a file as soon as the tier has it.
    ViewOptions { verify: Verify::Tier, ..options() }
}

fn rig() -> Option<Rig> {
    Rig::new(&dir([("big", file(&noise(1, LEN))), ("small", file(&noise(2, 1000)))]), Packing::default())
}

fn mount(rig: &Rig) -> Mount {
    rig.mount_as(trusting(), ServeOptions { workers: 2, stacked: true, ..ServeOptions::default() })
}

fn assert_reads(file: &File, what: &str) {
    let expected = noise(1, LEN);
    for offset in [0, LEN / 2 + 17, LEN - 100] {
        let len = (LEN - offset).min(70_000);
        assert!(
            read_range(file, offset as u64, len).expect(what) == expected[offset..offset + len],
            "{what} at {offset}"
        );
    }
}

/// Says whether the kernel takes backing files here; a test of passthrough makes no sense where not.
fn has_passthrough(mount: &Mount) -> bool {
    let has = mount.mounted.stats().passthrough;
    if !has {
        eprintln!("skipped: this kernel has no FUSE passthrough");
    }
    has
}

#[test]
fn a_whole_object_in_the_tier_is_read_by_the_kernel() {
    let Some(rig) = rig() else { return };
    let mount = mount(&rig);
    if !has_passthrough(&mount) {
        return;
    }
    rig.fill();
    let one = open(&mount.path("big"), false).expect("opens");
    assert_eq!(mount.mounted.stats().passthrough_files, 1);
    let two = open(&mount.path("big"), true).expect("opens past the page cache");
    let small = open(&mount.path("small"), false).expect("opens");
    assert_eq!((mount.mounted.stats().open_files, mount.mounted.stats().passthrough_files), (3, 2));
    assert_eq!((mount.mounted.stats().cached_opens, mount.mounted.stats().passthrough_opens), (1, 2));
    let before = mount.mounted.stats().read_bytes;
    assert_reads(&one, "the first");
    let mut direct = vec![0; 8192];
    std::os::unix::fs::FileExt::read_exact_at(&two, &mut direct, 4096).ok();
    assert_eq!(mount.mounted.stats().read_bytes, before, "the daemon was not asked");
    drop((one, two, small));
    mount.wait_for("the last release", |stats| stats.open_files == 0 && stats.passthrough_files == 0);
    assert_reads(&open(&mount.path("big"), false).expect("opens again"), "again");
}

#[test]
fn without_leave_the_kernel_reads_nothing_itself() {
    let Some(rig) = rig() else { return };
    rig.fill();
    let refused = rig.mount_as(trusting(), ServeOptions { passthrough: false, ..ServeOptions::default() });
    let always = rig.mount_as(ViewOptions { verify: Verify::Always, ..options() }, ServeOptions::default());
    for mount in [refused, always] {
        let file = open(&mount.path("big"), false).expect("opens");
        assert_reads(&file, "cached");
        assert_eq!(mount.mounted.stats().passthrough_files, 0);
    }
}

/// Opens a file anew until the kernel reads it itself. The page cache may still be in use after the last
/// release: by a read-ahead that is not answered yet.
fn open_backed(mount: &Mount, path: &str) -> File {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let file = open(&mount.path(path), false).expect("opens");
        if mount.mounted.stats().passthrough_files == 1 {
            return file;
        }
        assert!(Instant::now() < deadline, "no passthrough: {:?}", mount.mounted.stats());
        drop(file);
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_file_that_becomes_whole_while_it_is_open_stays_in_the_page_cache() {
    let Some(rig) = rig() else { return };
    let mount = mount(&rig);
    if !has_passthrough(&mount) {
        return;
    }
    let one = open(&mount.path("big"), false).expect("opens");
    assert_reads(&one, "from the lake");
    rig.fill();
    let two = open(&mount.path("big"), false).expect("opens");
    let three = open(&mount.path("big"), true).expect("opens");
    assert_eq!(mount.mounted.stats().passthrough_files, 0);
    forget_pages(&two);
    for file in [&one, &two, &three] {
        assert_reads(file, "latched");
    }
    drop((one, two, three));
    mount.wait_for("the releases", |stats| stats.open_files == 0);
    assert_reads(&open_backed(&mount, "big"), "by the kernel");
}

#[test]
fn a_mapping_alone_keeps_the_file_in_the_page_cache() {
    let Some(rig) = rig() else { return };
    let mount = mount(&rig);
    if !has_passthrough(&mount) {
        return;
    }
    let script = "import mmap,sys\nf=open(sys.argv[1],'rb')\nm=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)\nf.close()\nprint(m[0], flush=True)\nsys.stdin.read()\nprint(m[-1], flush=True)";
    let mut child = std::process::Command::new("python3");
    child.args(["-c", script]).arg(mount.path("big"));
    let Ok(mut child) = child.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn() else {
        eprintln!("skipped: needs python3");
        return;
    };
    let mut first = [0; 1];
    child.stdout.as_mut().expect("piped").read_exact(&mut first).expect("mapped");
    rig.fill();
    let file = open(&mount.path("big"), false).expect("opens beside the mapping");
    assert_eq!(mount.mounted.stats().passthrough_files, 0);
    assert_reads(&file, "beside a mapping");
    drop(child.stdin.take());
    assert!(child.wait().expect("ends").success());
}

#[test]
fn a_file_that_is_evicted_while_the_kernel_reads_it_stays_readable() {
    let Some(rig) = rig() else { return };
    let mount = mount(&rig);
    if !has_passthrough(&mount) {
        return;
    }
    rig.fill();
    let one = open(&mount.path("big"), false).expect("opens");
    rig.evict();
    forget_pages(&one);
    assert_reads(&one, "an evicted file");
    let two = open(&mount.path("big"), false).expect("opens");
    assert_eq!(mount.mounted.stats().passthrough_files, 2, "as long as it is open, it is read that way");
    assert_reads(&two, "an evicted file, opened again");
    drop((one, two));
    mount.wait_for("the releases", |stats| stats.open_files == 0);
    let later = open(&mount.path("big"), false).expect("opens");
    assert_reads(&later, "from the lake again");
}

#[test]
fn openers_readers_fills_and_evictions_may_come_in_any_order() {
    let Some(rig) = rig() else { return };
    let mount = mount(&rig);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (mount, stop) = (&mount, &stop);
            scope.spawn(move || {
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    let file = open(&mount.path("big"), (round + thread) % 3 == 0).expect("opens");
                    if round % 5 == 0 {
                        forget_pages(&file);
                    }
                    let offset = (round * 7919 * (thread + 1)) % (LEN - 4096);
                    let bytes = read_range(&file, (offset & !4095) as u64, 4096).expect("reads");
                    assert!(bytes == noise(1, LEN)[offset & !4095..][..4096], "at {offset}");
                }
            });
        }
        for _ in 0..8 {
            rig.fill();
            std::thread::sleep(Duration::from_millis(60));
            rig.evict();
            std::thread::sleep(Duration::from_millis(60));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(mount.mounted.stats().errors, 0);
    mount.wait_for("the releases", |stats| stats.open_files == 0 && stats.passthrough_files == 0);
}
