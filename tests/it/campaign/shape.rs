//! The reference shape, and ten million: 627,615 files in 1,000 directories pushed, cached, mounted, read
//! once; a synthesised tree of ten million files mounted and walked.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use larder::format::commit::{Commit, Lineage};
use larder::format::ids::{CommitId, ContentDigest, ContentId};
use larder::format::paths;
use larder::format::placement::Location;
use larder::format::refs::{DatasetName, RefName};
use larder::format::tree::build::{BlockOf, BuiltBlock, TreeBuilder};
use larder::format::tree::{Entry, EntryKind, Mtime};
use larder::store::catalog::lakefmt::{self, RefChoice};
use larder::store::catalog::refs::{Expect, Refs};
use larder::store::lake::{Lake, PutIf};

use super::peak_memory_mib;
use crate::kit::proxy::Proxy;
use crate::kit::runtime;
use crate::kit::s3::{TestS3, env_at};
use crate::kit::{World, mount_by_kernel};

/// Times a step and says so.
fn timed<T>(what: &str, step: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    let done = step();
    println!("{what}: {:.2} s", begun.elapsed().as_secs_f64());
    (done, begun.elapsed())
}

#[test]
#[ignore = "long: make campaign PART=shape"]
fn the_reference_shape_is_right_within_its_memory() {
    const FILES: usize = 627_615;
    let s3 = TestS3::start();
    let mut world = World::new();
    world.set_all(s3.env("lake"));
    let source = world.path("source");
    timed("writing the source", || {
        for dir in 0..1000 {
            fs::create_dir_all(source.join(format!("d{dir:04}"))).expect("makes a directory");
        }
        for file in 0..FILES {
            let path = source.join(format!("d{:04}/image{file:06}.jpg", file % 1000));
            fs::write(path, format!("content of {file}")).expect("writes a file");
        }
    });
    timed("push", || world.push(&source, "shape"));
    timed("push again, unchanged", || world.push(&source, "shape"));
    timed("cache", || world.ok(["cache", "shape"]));
    // Another machine would have none of it at hand.
    world.ok(["daemon", "stop"]);
    let (mount, _) = timed("mount", || world.mount("shape", "m", &[]));
    let (count, _) = timed("read every file once", || read_all(&mount));
    assert_eq!(count, FILES);
    let pid = world.daemon_pid().expect("a daemon runs");
    println!("peak memory of the daemon: {} MiB", peak_memory_mib(pid));
    assert!(peak_memory_mib(pid) < 1024);
    let kernel = timed("mount by the kernel engine, image built", || mount_by_kernel(&world, "shape", "k", &[])).0;
    let Some(kernel) = kernel else { return };
    let (count, _) = timed("read every file once from the kernel's mount", || read_all(&kernel));
    assert_eq!(count, FILES);
    assert!(peak_memory_mib(pid) < 1024);
}

/// Reads every file through 8 readers; each has its own number's content.
fn read_all(mount: &Path) -> usize {
    let dirs: Vec<_> = fs::read_dir(mount).expect("lists").flatten().map(|entry| entry.path()).collect();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8)
            .map(|worker| {
                let dirs = &dirs;
                scope.spawn(move || {
                    let mut count = 0;
                    for dir in dirs.iter().skip(worker).step_by(8) {
                        for entry in fs::read_dir(dir).expect("lists").flatten() {
                            let name = entry.file_name().into_string().expect("plain");
                            let number: usize =
                                name["image".len()..].trim_end_matches(".jpg").parse().expect("a number");
                            let content = fs::read(entry.path()).expect("reads");
                            assert_eq!(content, format!("content of {number}").as_bytes(), "{name}");
                            count += 1;
                        }
                    }
                    count
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("reads on")).sum()
    })
}

#[test]
#[ignore = "long: make campaign PART=shape"]
fn a_mount_of_600_000_files_is_there_in_300_ms_with_a_store_20_ms_away() {
    let s3 = TestS3::start();
    runtime().block_on(synthesise(Arc::new(s3.lake("lake")), 1000, 600));
    let proxy = Proxy::start(s3.addr());
    let mut world = World::new();
    world.set_all(env_at(&proxy.endpoint(), "lake"));
    // The daemon runs and has spoken with the lake, as on any node; the commit is new to it.
    world.run(["daemon", "start"]);
    world.run(["datasets"]);
    proxy.set_delay(Duration::from_millis(20));
    world.make_dir("m");
    let mut times: Vec<Duration> = (0..5)
        .map(|round| {
            let _ = fs::remove_dir_all(world.state().join("meta"));
            let (_, took) = timed(&format!("mount {round}"), || world.mount("many", "m", &[]));
            assert_eq!(fs::read_dir(world.path("m")).expect("lists").count(), 1000);
            world.ok(["umount", world.path("m").to_str().expect("plain")]);
            took
        })
        .collect();
    times.sort();
    assert!(times[2] < Duration::from_millis(300), "the median of 5: {:?}", times[2]);
}

#[test]
#[ignore = "long: make campaign PART=shape"]
fn ten_million_files_mount_in_a_second_and_walk_in_300_mib() {
    const DIRS: u64 = 10_000;
    let s3 = TestS3::start();
    timed("synthesising 10 million entries", || runtime().block_on(synthesise(Arc::new(s3.lake("lake")), DIRS, 1000)));
    let mut world = World::new();
    world.set_all(s3.env("lake"));
    world.run(["daemon", "start"]);
    let (mount, took) = timed("mount", || world.mount("many", "m", &[]));
    assert!(took < Duration::from_secs(1), "{took:?}");
    let (count, _) = timed("find", || find(&mount));
    assert_eq!(count, DIRS as usize * 1001 + 1);
    let pid = world.daemon_pid().expect("a daemon runs");
    println!("peak memory of the daemon: {} MiB", peak_memory_mib(pid));
    assert!(peak_memory_mib(pid) < 300);
    let kernel = timed("mount by the kernel engine, image built", || mount_by_kernel(&world, "many", "k", &[])).0;
    let Some(kernel) = kernel else { return };
    println!("peak memory of the daemon: {} MiB", peak_memory_mib(pid));
    assert!(peak_memory_mib(pid) < 500);
    for _ in 0..2 {
        assert_eq!(timed("find on the kernel's mount", || find(&kernel)).0, DIRS as usize * 1001 + 1);
    }
}

/// Counts what find(1) sees.
fn find(at: &Path) -> usize {
    let done = std::process::Command::new("find").arg(at).args(["-printf", "x"]).output().expect("runs find");
    assert!(done.status.success());
    done.stdout.len()
}

/// Writes a tree of `dirs` directories with `files` empty files each into the lake, as dataset `many`.
async fn synthesise(lake: Arc<dyn Lake>, dirs: u64, files: u64) {
    let format = lakefmt::open_or_create(lake.as_ref(), RefChoice::Auto).await.expect("makes the lake");
    let mtime = Mtime { secs: 1_700_000_000, nanos: 5 };
    let mut builder = TreeBuilder::new(0o755, mtime, dirs, dirs);
    let entry = |name: String, mode, kind| Entry { name: name.into_bytes().into(), mode, mtime, nlink: 1, kind };
    for dir in 0..dirs {
        let kind = EntryKind::Dir { children: files, descendants: files, subdirs: 0 };
        builder.push(entry(format!("directory{dir:06}"), 0o755, kind), Location::None).expect("a good entry");
    }
    let nothing = ContentId::Digest(ContentDigest(*blake3::hash(b"").as_bytes()));
    for _ in 0..dirs {
        for file in 0..files {
            let kind = EntryKind::File { size: 0, content: nothing, pin: None };
            builder
                .push(entry(format!("some-picture-{file:06}.jpg"), 0o644, kind), Location::None)
                .expect("a good entry");
        }
        put_blocks(&lake, builder.drain()).await;
    }
    let (built, last) = builder.finish().expect("a good tree");
    put_blocks(&lake, last).await;
    put(&lake, paths::tree_key(&built.tree), built.root.encode()).await;
    put(&lake, paths::placement_key(&built.tree, &built.placement.id()), built.placement.encode()).await;
    let commit = Commit {
        format: 1,
        tree: built.tree,
        parents: Vec::new(),
        time_ms: 1_700_000_000_000,
        message: "synthesised".into(),
        author: "campaign".into(),
        meta: Default::default(),
        lineage: Lineage::default(),
    };
    let bytes = commit.encode();
    let id: CommitId = Commit::id_of(&bytes);
    put(&lake, paths::commit_key(&id), bytes).await;
    let refs = Refs::new(lake.clone(), format.refs, "campaign".into());
    let dataset = DatasetName::parse("many").expect("a good name");
    refs.ensure_dataset(&dataset).await.expect("makes the dataset");
    refs.add_commit(&dataset, &id).await.expect("adds the commit");
    refs.move_branch(&dataset, &RefName::parse("main").expect("a good name"), id, Expect::Any)
        .await
        .expect("moves the branch");
}

async fn put_blocks(lake: &Arc<dyn Lake>, blocks: Vec<BuiltBlock>) {
    futures::stream::iter(blocks)
        .for_each_concurrent(8, |block| async move {
            let key = match block.of {
                BlockOf::Tree => paths::node_key(&block.id),
                BlockOf::Placement => paths::placed_key(&block.id),
            };
            put(lake, key, block.bytes).await;
        })
        .await;
}

async fn put(lake: &Arc<dyn Lake>, key: String, bytes: Vec<u8>) {
    lake.put(&key, Bytes::from(bytes), PutIf::Always).await.expect("puts");
}
