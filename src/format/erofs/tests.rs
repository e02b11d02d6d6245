//! Images, read back: by what the format says, and by the tools of others where they are installed.

use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::format::ids::BlockId;
use crate::format::placement::{PackUse, PlacedBlock};
use crate::format::tree::build::BlockOf;
use crate::format::tree::nav::{self, Blocks, EntryAt};
use crate::format::tree::{Block, EntryKind, Mtime};
use crate::testkit::model::{Dir, File, MTIME, Made, Node, Packing, dir, file, make};

/// The blocks of a made tree.
struct Memory(HashMap<BlockId, Vec<u8>>, HashMap<BlockId, Vec<u8>>);

impl Memory {
    fn of(made: &Made) -> Self {
        let pick = |of: fn(&BlockOf) -> bool| {
            made.blocks.iter().filter(|b| of(&b.of)).map(|b| (b.id, b.bytes.clone())).collect()
        };
        Self(pick(|of| matches!(of, BlockOf::Tree)), pick(|of| matches!(of, BlockOf::Placement)))
    }
}

impl Blocks for Memory {
    fn tree_block(&self, id: BlockId) -> Option<Arc<Block>> {
        Some(Arc::new(Block::decode(self.0.get(&id)?).expect("was built")))
    }

    fn placed_block(&self, id: BlockId) -> Option<Arc<PlacedBlock>> {
        Some(Arc::new(PlacedBlock::decode(self.1.get(&id)?).expect("was built")))
    }
}

/// An image in memory.
#[derive(Default)]
struct Memo {
    names: Vec<u8>,
    inodes: Vec<u8>,
    copies: Vec<Copied>,
}

impl Sink for Memo {
    type Error = Infallible;

    fn write(&mut self, section: Section, offset: u64, bytes: &[u8]) -> Result<(), Infallible> {
        let part = if section == Section::Names { &mut self.names } else { &mut self.inodes };
        let (at, end) = (offset as usize, offset as usize + bytes.len());
        part.resize(part.len().max(end), 0);
        part[at..end].copy_from_slice(bytes);
        Ok(())
    }

    fn copy(&mut self, copied: &Copied) -> Result<(), Infallible> {
        self.copies.push(*copied);
        Ok(())
    }
}

struct Image {
    bytes: Vec<u8>,
    devices: Vec<Device>,
    copies: Vec<Copied>,
    tails_len: u64,
}

const ATTRIBUTES: Attributes = Attributes { mode: 0o644, mtime: Mtime { secs: 1, nanos: 2 }, nlink: 1 };

fn spec(packs: Vec<PackUse>, children: u64, subdirs: u64) -> Spec {
    Spec { uuid: [7; 16], uid: 1000, gid: 1001, packs, root: ATTRIBUTES, children, subdirs }
}

fn whole(writer: Writer, mut memo: Memo) -> Image {
    let done: Finished = writer.finish::<Infallible>().expect("is complete");
    assert_eq!(memo.names.len() as u64, done.names_len);
    memo.inodes.resize(done.inodes_len as usize, 0);
    let bytes = [done.head, memo.names, memo.inodes].concat();
    Image { bytes, devices: done.devices, copies: memo.copies, tails_len: done.tails_len }
}

/// Makes the image of a tree.
fn image_of(made: &Made) -> Image {
    let (root, placement, blocks) = (&made.built.root, &made.built.placement, Memory::of(made));
    let mut memo = Memo::default();
    let spec = spec(placement.packs.clone(), root.children, root.subdirs);
    let mut writer = Writer::new(spec, &mut memo).expect("begins");
    for rank in 0..root.counts.entries {
        let at = nav::entry_at(root, &blocks, rank).expect("is there");
        let location = nav::location(root, placement, &blocks, rank).expect("is there");
        let what = match &at.entry.kind {
            EntryKind::File { size, .. } => What::File { size: *size, location: &location },
            EntryKind::Dir { children, subdirs, .. } => What::Dir { children: *children, subdirs: *subdirs },
            EntryKind::Symlink { target } => What::Symlink { target },
            EntryKind::HardLink { .. } => {
                let first: EntryAt = nav::resolve_link(root, &blocks, &at).expect("is there");
                What::Link { rank: first.rank }
            }
        };
        let attributes = Attributes { mode: at.entry.mode, mtime: at.entry.mtime, nlink: at.entry.nlink };
        writer.add(&Item { name: &at.entry.name, attributes, what }, &mut memo).expect("is written");
    }
    whole(writer, memo)
}

fn bytes_at<'a>(model: &'a Dir, path: &[u8]) -> &'a [u8] {
    let (first, rest) = match path.iter().position(|b| *b == b'/') {
        Some(at) => (&path[..at], Some(&path[at + 1..])),
        None => (path, None),
    };
    match (&model[first], rest) {
        (Node::Dir(below), Some(rest)) => bytes_at(below, rest),
        (Node::File(file), None) => &file.bytes,
        other => panic!("no file: {other:?}"),
    }
}

/// Writes image, packs and tails to a folder; gives the devices' paths in order.
fn write_out(folder: &Path, model: &Dir, made: &Made, image: &Image) -> Vec<std::path::PathBuf> {
    std::fs::write(folder.join("image"), &image.bytes).expect("writes");
    let tails = std::fs::File::create(folder.join("tails")).expect("creates");
    tails.set_len(image.tails_len).expect("grows");
    for copied in &image.copies {
        let bytes = bytes_at(model, &made.order[copied.rank as usize]);
        let range = copied.logical as usize..(copied.logical + copied.len) as usize;
        tails.write_all_at(&bytes[range], copied.to).expect("writes");
    }
    for pack in &made.packs {
        std::fs::write(folder.join(pack.id.to_string()), &pack.bytes).expect("writes");
    }
    let path = |device: &Device| match device {
        Device::Pack(pack) => folder.join(pack.to_string()),
        Device::Tails => folder.join("tails"),
    };
    image.devices.iter().map(path).collect()
}

/// Compares a directory with the model.
fn assert_same(at: &Path, model: &Dir) {
    let mut names: Vec<Vec<u8>> =
        std::fs::read_dir(at).expect("lists").map(|e| e.expect("lists").file_name().as_bytes().to_vec()).collect();
    names.sort();
    assert!(names.iter().eq(model.keys()), "{}: {names:?}", at.display());
    for (name, node) in model {
        let path = at.join(OsStr::from_bytes(name));
        let meta = std::fs::symlink_metadata(&path).expect("is there");
        match node {
            Node::Dir(below) => assert_same(&path, below),
            Node::Symlink(target) => {
                let found = std::fs::read_link(&path).expect("is a link");
                assert_eq!(found.as_os_str().as_bytes(), target);
            }
            Node::File(file) => {
                assert_eq!((meta.mtime(), meta.mtime_nsec()), (MTIME.secs, i64::from(MTIME.nanos)));
                // The tool puts what stands behind a hole elsewhere (erofs-utils 1.5). The kernel does not: `fs::kernel`
                // compares sparse files as well.
                if file.sparse {
                    continue;
                }
                let bytes = std::fs::read(&path).expect("reads");
                assert!(bytes == file.bytes, "{}", path.display());
            }
        }
    }
}

/// Has fsck.erofs check an image and take it apart. False: it is not installed.
fn extract(image: &Path, devices: &[std::path::PathBuf], to: &Path) -> bool {
    let mut command = Command::new("fsck.erofs");
    for device in devices {
        command.arg(format!("--device={}", device.display()));
    }
    let Ok(output) = command.arg(format!("--extract={}", to.display())).arg(image).output() else {
        eprintln!("skipped: needs fsck.erofs (package erofs-utils)");
        return false;
    };
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    true
}

fn assert_extracts(model: &Dir, packing: Packing) {
    let made = make(model, packing);
    let image = image_of(&made);
    let folder = tempfile::tempdir().expect("a folder");
    let devices = write_out(folder.path(), model, &made, &image);
    let out = folder.path().join("out");
    if extract(&folder.path().join("image"), &devices, &out) {
        assert_same(&out, model);
    }
}

fn sparse(bytes: Vec<u8>) -> Node {
    Node::File(File { bytes, sparse: true, group: 0 })
}

fn small() -> Dir {
    let linked = || Node::File(File { bytes: vec![9; 5000], group: 1, sparse: false });
    let holes = [vec![0; 20_000], vec![5; 3000], vec![0; 50_000], vec![6; 1]].concat();
    dir([
        ("!before the dots", file(b"x")),
        ("a", file(&[1; 4096])),
        ("b", file(&[2; 10_001])),
        ("deep", Node::Dir(dir([("er", Node::Dir(dir([("est", linked())]))), ("none", Node::Dir(Dir::new()))]))),
        ("empty", file(b"")),
        ("hard", linked()),
        ("holes", sparse(holes)),
        ("link", Node::Symlink(b"deep/er".to_vec())),
        ("long link", Node::Symlink(vec![b'l'; 4095])),
        ("longer than inline", Node::Symlink(vec![b'm'; 4033])),
        ("only holes", sparse(vec![0; 100_000])),
        ("whole", file(&[3; (1 << 20) + 17])),
    ])
}

#[test]
fn the_image_of_a_small_tree_is_always_the_same() {
    let image = image_of(&make(&small(), Packing::default()));
    let digest = blake3::hash(&image.bytes).to_hex();
    // Another value: another IMAGE_FORMAT.
    assert_eq!((image.bytes.len(), digest.as_str()), GOLDEN);
}

const GOLDEN: (usize, &str) = (24576, "8e39bcb3e4007a733f5dfba949d30c57e77bbee7dd934382384d69342f840c9c");

#[test]
fn what_others_take_out_of_a_small_image_is_the_tree() {
    assert_extracts(&small(), Packing::default());
    // Every file a pack of its own, of exact length.
    assert_extracts(&small(), Packing { whole_len: 1, pack_len: 1 });
}

#[test]
fn directories_grow_over_blocks_with_names_of_any_length() {
    let long = (0..40_u8).map(|n| (vec![b'a' + n % 26; 255 - usize::from(n / 26)], file(&[n])));
    let many = (0..600).map(|n| (format!("{n:x}").into_bytes(), Node::Dir(dir([("in", file(b"in"))]))));
    let model: Dir = [
        (b"long".to_vec(), Node::Dir(long.collect())),
        (b"many".to_vec(), Node::Dir(many.collect())),
        (vec![b'z'; 255], Node::Dir(Dir::new())),
    ]
    .into();
    assert_extracts(&model, Packing::default());
}

#[test]
fn what_contradicts_itself_is_refused() {
    let add = |writer: &mut Writer, name: &[u8], what| {
        writer.add(&Item { name, attributes: ATTRIBUTES, what }, &mut Memo::default())
    };
    let begin = |children, subdirs| Writer::new(spec(Vec::new(), children, subdirs), &mut Memo::default());
    let empty = What::File { size: 0, location: &crate::format::placement::Location::None };

    let mut writer = begin(2, 0).expect("begins");
    add(&mut writer, b"b", empty).expect("is written");
    for name in [b"b", b"a"] {
        assert!(matches!(add(&mut begin_with_b(), name, empty), Err(WriteError::Tree { rank: 1, .. })));
    }
    assert!(matches!(writer.finish::<Infallible>(), Err(WriteError::Tree { rank: 1, .. })), "one is missing");

    let mut writer = begin(1, 0).expect("begins");
    add(&mut writer, b"b", empty).expect("is written");
    assert!(matches!(add(&mut writer, b"c", empty), Err(WriteError::Tree { rank: 1, .. })), "one too many");

    let mut writer = begin(1, 1).expect("begins");
    assert!(add(&mut writer, b"b", empty).is_err(), "it is no directory");
    let mut writer = begin(1, 0).expect("begins");
    assert!(add(&mut writer, b"b", What::Link { rank: 0 }).is_err(), "there is no such file");
    let nowhere = crate::format::placement::Location::Run { pack: crate::format::ids::PackId([1; 32]), offset: 0 };
    let mut writer = begin(1, 0).expect("begins");
    assert!(add(&mut writer, b"b", What::File { size: 1, location: &nowhere }).is_err(), "there is no such pack");
}

/// Two entries are to come, and the first was `b`.
fn begin_with_b() -> Writer {
    let mut memo = Memo::default();
    let mut writer = Writer::new(spec(Vec::new(), 2, 0), &mut memo).expect("begins");
    let what = What::File { size: 0, location: &crate::format::placement::Location::None };
    writer.add(&Item { name: b"b", attributes: ATTRIBUTES, what }, &mut memo).expect("is written");
    writer
}

fn node() -> impl Strategy<Value = Node> {
    let size = prop_oneof![Just(0_usize), 1..100_usize, 4000..4200_usize, 8190..30_000_usize];
    let bytes = (size, any::<u8>()).prop_map(|(len, seed)| (0..len).map(|i| (i as u8 ^ seed) | 1).collect::<Vec<u8>>());
    let piece = (any::<bool>(), prop_oneof![Just(4096_usize), 1..9000_usize]);
    let holes = prop::collection::vec(piece, 1..6)
        .prop_map(|pieces| pieces.into_iter().flat_map(|(data, len)| vec![u8::from(data); len]).collect());
    let leaf = prop_oneof![
        6 => (bytes, 0..4_u8).prop_map(|(bytes, group)| {
            // Files of one group have to be equal.
            let bytes = if group > 0 { vec![group; 3000 * usize::from(group)] } else { bytes };
            Node::File(File { bytes, group, sparse: false })
        }),
        2 => holes.prop_map(sparse),
        1 => prop_oneof![1..60_usize, 4020..4040_usize].prop_map(|len| Node::Symlink(vec![b't'; len])),
    ];
    leaf.prop_recursive(4, 60, 12, |inner| prop::collection::btree_map(name(), inner, 0..12).prop_map(Node::Dir))
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let hostile = prop::sample::select(vec![
        b"!".to_vec(),
        b"-".to_vec(),
        b"...".to_vec(),
        b"..a".to_vec(),
        b"\n".to_vec(),
        vec![0xff, 0xfe],
        vec![b'n'; 255],
        vec![0xff; 255],
    ]);
    prop_oneof![6 => "[a-f][0-9]?".prop_map(String::into_bytes), 1 => hostile]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    #[test]
    fn what_others_take_out_of_any_image_is_the_tree(
        model in prop::collection::btree_map(name(), node(), 0..12),
        whole_len in prop_oneof![Just(1_u64), Just(8192), Just(1 << 20)],
    ) {
        assert_extracts(&model, Packing { whole_len, pack_len: 64 << 10 });
    }
}
