//! Random trees and random reads, through the kernel, against the model: whatever lies in the page
//! cache, in memory, in the tier or only in the lake.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::rig::{Mount, Rig, can_mount, files, forget_pages, noise, open, options, read_range};
use crate::fs::session::ServeOptions;
use crate::fs::view::ViewOptions;
use crate::store::fetch::Verify;
use crate::testkit::model::{Dir, File, Node, Packing};

/// One step of one reader.
#[derive(Debug, Clone)]
enum Step {
    /// Of the file with this number: an offset in parts of 1000 of its size, and a length.
    Read {
        file: usize,
        offset: usize,
        len: usize,
        direct: bool,
        forget: bool,
    },
    /// All of a file.
    Whole {
        file: usize,
    },
    Fill,
    Evict,
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        Just(0),
        1usize..100,
        prop::sample::select(vec![4095, 4096, 4097, 262_143, 262_144, 262_145, 524_288]),
        1usize..20_000,
        1usize..900_000,
    ]
}

fn node() -> impl Strategy<Value = Node> {
    let plain = (any::<u64>(), size()).prop_map(|(seed, len)| noise(seed, len));
    let holes = (any::<u64>(), size(), 0usize..40).prop_map(|(seed, len, hole)| {
        let mut bytes = noise(seed, len);
        for (at, chunk) in bytes.chunks_mut(10_000).enumerate() {
            if (at * 7 + hole) % 3 != 0 {
                chunk.fill(0);
            }
        }
        bytes
    });
    let leaf = prop_oneof![
        4 => plain.prop_map(|bytes| Node::File(File { bytes, group: 0, sparse: false })),
        1 => holes.prop_map(|bytes| Node::File(File { bytes, group: 0, sparse: true })),
        1 => (1u8..3).prop_map(|group| Node::File(File { bytes: noise(group.into(), 70_000), group, sparse: false })),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| prop::collection::btree_map(name(), inner, 0..6).prop_map(Node::Dir))
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop::sample::select(vec![
        b"a".to_vec(),
        b"b".to_vec(),
        b"c c".to_vec(),
        b"d\xff".to_vec(),
        b"e\n".to_vec(),
        b"f".to_vec(),
    ])
}

fn step() -> impl Strategy<Value = Step> {
    let read =
        (any::<usize>(), 0usize..1010, prop_oneof![1usize..10_000, 1usize..700_000], any::<bool>(), any::<bool>());
    prop_oneof![
        12 => read.prop_map(|(file, offset, len, direct, forget)| Step::Read { file, offset, len, direct, forget }),
        2 => any::<usize>().prop_map(|file| Step::Whole { file }),
        1 => Just(Step::Fill),
        1 => Just(Step::Evict),
    ]
}

fn run(rig: &Rig, mount: &Mount, files: &[(PathBuf, Vec<u8>)], steps: &[Step]) {
    for step in steps {
        match *step {
            Step::Read { file, offset, len, direct, forget } => {
                let (path, bytes) = &files[file % files.len()];
                let offset = bytes.len() * offset / 1000;
                let opened = open(&mount.dir.join(path), direct).expect("opens");
                if forget {
                    forget_pages(&opened);
                }
                // Past the page cache the tier's own file system asks for whole sectors.
                let (offset, len) = if direct { (offset & !4095, (len + 4095) & !4095) } else { (offset, len) };
                let want = bytes.get(offset..).unwrap_or_default();
                let want = &want[..want.len().min(len)];
                let got = read_range(&opened, offset as u64, len).expect("reads");
                assert!(got == want, "{} at {offset} + {len}", path.display());
            }
            Step::Whole { file } => {
                let (path, bytes) = &files[file % files.len()];
                assert!(std::fs::read(mount.dir.join(path)).expect("reads") == *bytes, "{}", path.display());
            }
            Step::Fill => rig.fill(),
            Step::Evict => rig.evict(),
        }
    }
}

fn check(model: &Dir, readers: &[Vec<Step>], verify: Verify) {
    let packing = Packing { whole_len: 400_000, pack_len: 200_000 };
    let Some(rig) = Rig::new(model, packing) else {
        return;
    };
    let mut all = Vec::new();
    files(model, Path::new(""), &mut all);
    if all.is_empty() {
        return;
    }
    let serve = ServeOptions { workers: 2, stacked: true, ..ServeOptions::default() };
    let mount = rig.mount_as(ViewOptions { verify, ..options() }, serve);
    std::thread::scope(|scope| {
        for steps in readers {
            let (rig, mount, all) = (&rig, &mount, &all);
            scope.spawn(move || run(rig, mount, all, steps));
        }
    });
    assert_eq!(mount.mounted.stats().errors, 0);
}

#[test]
fn random_reads_of_random_trees_give_the_models_bytes() {
    if !can_mount() {
        return;
    }
    static CASES: AtomicUsize = AtomicUsize::new(0);
    let config = ProptestConfig { cases: 24, max_shrink_iters: 40, ..ProptestConfig::default() };
    let verify = prop::sample::select(vec![Verify::Tier, Verify::Node, Verify::Always]);
    let readers = prop::collection::vec(prop::collection::vec(step(), 1..25), 1..5);
    let model = prop::collection::btree_map(name(), node(), 1..6);
    proptest!(config, |(model in model, readers in readers, verify in verify)| {
        CASES.fetch_add(1, Ordering::Relaxed);
        check(&model, &readers, verify);
    });
    assert!(CASES.load(Ordering::Relaxed) >= 24);
}
