//! An import of 100,000 keys: right, and in memory that does not grow with their number.

use std::process::Stdio;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use larder::store::lake::{Lake, PutIf};

use crate::kit::World;
use crate::kit::runtime;
use crate::kit::s3::{BUCKET, TestS3};

use super::peak_memory_mib;

const KEYS: u64 = 100_000;
/// A page of the listing, the sorts' memory, one pack's index and the SDK stay far below.
const PEAK_MIB: u64 = 300;

#[test]
#[ignore = "long: make campaign PART=import"]
fn a_hundred_thousand_keys_are_imported_in_bounded_memory() {
    let s3 = TestS3::start();
    put_keys(&s3, 0..1_000, "few");
    put_keys(&s3, 0..KEYS, "many");
    let mut world = World::new();
    world.set_all(s3.env("lake"));
    let (few, _) = import(&world, "few");
    let (many, took) = import(&world, "many");
    println!("import of {KEYS} keys: {:.1} s, peak {many} MiB (1,000 keys: {few} MiB)", took.as_secs_f64());
    assert!(many < PEAK_MIB, "{many} MiB");
    let listed = world.json(&["show", "many"]);
    println!("{listed}");
    // Spot checks through the whole way: names in the middle of it, and their bytes.
    for number in [0, 1, 49_999, 50_000, KEYS - 1] {
        assert_eq!(world.ok(["cat", "many", &path_of(number)]), body_of(number));
    }
}

/// 100 directories of a thousand names each, in an order that is not the tree's.
fn path_of(number: u64) -> String {
    format!("d{:02}/object {:06}.bin", number % 100, number * 7919 % KEYS)
}

fn body_of(number: u64) -> String {
    format!("content of {number}")
}

fn put_keys(s3: &TestS3, numbers: std::ops::Range<u64>, prefix: &str) {
    let lake = s3.lake(prefix);
    runtime().block_on(futures::stream::iter(numbers).for_each_concurrent(32, |number| {
        let lake = &lake;
        async move {
            let body = Bytes::from(body_of(number));
            lake.put(&path_of(number), body, PutIf::Always).await.expect("puts");
        }
    }));
}

/// Runs the import; gives the most memory that it had, in MiB, and how long it took.
fn import(world: &World, prefix: &str) -> (u64, Duration) {
    let begun = Instant::now();
    let url = format!("s3://{BUCKET}/{prefix}/");
    let mut child = world
        .command(["import", &url, prefix])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("runs larder");
    let pid = i32::try_from(child.id()).expect("a pid");
    let mut peak = 0;
    let status = loop {
        if let Some(status) = child.try_wait().expect("waits") {
            break status;
        }
        // High water: what it says last, it had.
        peak = peak_memory_mib(pid).max(peak);
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
    (peak, begun.elapsed())
}
