//! How fast the formats are: digests, segments, building and navigating trees.
//!
//! `cargo bench --bench format`. The tree is of the reference shape: directories of some hundred
//! small pictures.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use larder::format::digest::{ContentHasher, digest};
use larder::format::ids::{BlockId, ContentDigest, ContentId, PackId};
use larder::format::placement::{Location, PlacedBlock, PlacementRoot};
use larder::format::tree::build::{BlockOf, TreeBuilder};
use larder::format::tree::diff::Differ;
use larder::format::tree::nav::{self, Blocks};
use larder::format::tree::walk::Walk;
use larder::format::tree::{Block, Entry, EntryKind, Mtime, TreeRoot};

const DIRS: u64 = 160;
const FILES: u64 = 625;

/// All blocks of a tree, decoded.
#[derive(Default)]
struct Warm {
    tree: HashMap<BlockId, Arc<Block>>,
    placed: HashMap<BlockId, Arc<PlacedBlock>>,
    encoded: Vec<Vec<u8>>,
}

impl Blocks for Warm {
    fn tree_block(&self, id: BlockId) -> Option<Arc<Block>> {
        self.tree.get(&id).cloned()
    }
    fn placed_block(&self, id: BlockId) -> Option<Arc<PlacedBlock>> {
        self.placed.get(&id).cloned()
    }
}

/// Entries in tree order; file `changed` has other contents.
fn entries(changed: u64) -> impl Iterator<Item = (Entry, Location)> {
    let entry = |name: String, kind| Entry {
        name: name.into_bytes().into(),
        mode: 0o644,
        mtime: Mtime { secs: 1_700_000_000, nanos: 0 },
        nlink: 1,
        kind,
    };
    let dir = move |d| {
        (
            entry(format!("patient-{d:06}"), EntryKind::Dir { children: FILES, descendants: FILES, subdirs: 0 }),
            Location::None,
        )
    };
    let file = move |d: u64, f: u64| {
        let number = d * FILES + f;
        let seed = if number == changed { u64::MAX } else { number };
        let content = ContentId::Digest(ContentDigest(*digest(&seed.to_le_bytes()).as_bytes()));
        let size = 100_000 + number % 300_000;
        let pack = PackId([(number / 700) as u8; 32]);
        (
            entry(format!("image-{f:05}.png"), EntryKind::File { size, content, pin: None }),
            Location::Run { pack, offset: number * (1 << 20) },
        )
    };
    (0..DIRS).map(dir).chain((0..DIRS).flat_map(move |d| (0..FILES).map(move |f| file(d, f))))
}

fn build(entries: impl IntoIterator<Item = (Entry, Location)>) -> (TreeRoot, PlacementRoot, Warm) {
    let mut builder = TreeBuilder::new(0o755, Mtime::default(), DIRS, DIRS);
    let mut blocks = Vec::new();
    for (entry, location) in entries {
        builder.push(entry, location).expect("a good tree");
        blocks.append(&mut builder.drain());
    }
    let (built, mut last) = builder.finish().expect("a good tree");
    blocks.append(&mut last);
    let mut warm = Warm::default();
    for block in blocks {
        match block.of {
            BlockOf::Tree => {
                warm.tree.insert(block.id, Arc::new(Block::decode(&block.bytes).expect("good")));
                warm.encoded.push(block.bytes);
            }
            BlockOf::Placement => {
                warm.placed.insert(block.id, Arc::new(PlacedBlock::decode(&block.bytes).expect("good")));
            }
        }
    }
    (built.root, built.placement, warm)
}

fn digests(c: &mut Criterion) {
    let mut group = c.benchmark_group("digest");
    for len in [4 << 10, 400 << 10, 64 << 20] {
        let bytes: Vec<u8> = (0..len).map(|i: usize| (i * 31) as u8).collect();
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("with_outboard/{}_kib", len >> 10), |b| {
            b.iter(|| {
                let mut hasher = ContentHasher::new();
                hasher.update(black_box(&bytes));
                hasher.finish()
            });
        });
    }
    group.finish();
}

fn trees(c: &mut Criterion) {
    let all: Vec<_> = entries(u64::MAX).collect();
    let (root, placement, warm) = build(all.clone());
    let mut group = c.benchmark_group("tree");
    group.throughput(Throughput::Elements(all.len() as u64));
    group.sample_size(10);
    group.bench_function("build_100k", |b| {
        b.iter_batched(
            || all.clone(),
            |all| {
                let mut builder = TreeBuilder::new(0o755, Mtime::default(), DIRS, DIRS);
                for (entry, location) in all {
                    builder.push(entry, location).expect("a good tree");
                    black_box(builder.drain());
                }
                builder.finish().expect("a good tree")
            },
            BatchSize::LargeInput,
        );
    });
    group.bench_function("decode_all_blocks", |b| {
        b.iter(|| warm.encoded.iter().map(|bytes| Block::decode(bytes).expect("good").counts().entries).sum::<u64>());
    });
    group.bench_function("encode_all_blocks", |b| {
        b.iter(|| warm.tree.values().map(|block| block.encode().len()).sum::<usize>());
    });
    group.bench_function("walk", |b| {
        b.iter(|| {
            let mut walk = Walk::new(nav::root_dir(&root), b"");
            let mut count = 0_u64;
            while let Some(walked) = walk.next(&root, &warm).expect("good") {
                count += walked.path.len() as u64;
            }
            count
        });
    });
    group.finish();
    navigation(c, &root, &placement, &warm);
}

fn navigation(c: &mut Criterion, root: &TreeRoot, placement: &PlacementRoot, warm: &Warm) {
    let mut group = c.benchmark_group("nav");
    let dir = nav::lookup(root, warm, &nav::root_dir(root), b"patient-000077")
        .expect("it is there")
        .dir
        .expect("a directory");
    group.bench_function("lookup_file", |b| b.iter(|| nav::lookup(root, warm, black_box(&dir), b"image-00300.png")));
    group.bench_function("lookup_dir", |b| {
        b.iter(|| nav::lookup(root, warm, &nav::root_dir(root), black_box(b"patient-000077")))
    });
    group.bench_function("entry_at", |b| b.iter(|| nav::entry_at(root, warm, black_box(77_777))));
    group.bench_function("location", |b| b.iter(|| nav::location(root, placement, warm, black_box(77_777))));
    group.bench_function("list_625", |b| {
        b.iter(|| {
            let mut listed = 0;
            while listed < dir.children {
                listed += nav::list(root, warm, &dir, listed, 1024).expect("good").len() as u64;
            }
            listed
        });
    });
    let (after, _, mut both) = build(entries(50_000));
    both.tree.extend(warm.tree.iter().map(|(id, block)| (*id, block.clone())));
    group.bench_function("diff_one_of_100k", |b| {
        b.iter(|| {
            let mut differ = Differ::new(root.clone(), after.clone());
            std::iter::from_fn(|| differ.next(&both).expect("good")).count()
        });
    });
    group.finish();
}

criterion_group!(benches, digests, trees);
criterion_main!(benches);
