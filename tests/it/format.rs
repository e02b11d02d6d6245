//! The formats from outside: golden files, hostile files, and bytes that were damaged at random.
//!
//! `tests/golden/v1/` has one file per format as version 1 writes it, and `ids.txt` what they are
//! called. They never change: a larder that writes version 2 still reads these. To add one, put it
//! into [`samples`] and run with `LARDER_GOLDEN_WRITE=1`.
//! `tests/golden/small/v1/` has the small JSON files of lakes and tiers; the modules that own them read those.
//! `tests/golden/hostile/<target>/` has inputs that must be refused, or survived.

use std::path::{Path, PathBuf};

use larder::format::commit::{Commit, Lineage};
use larder::format::digest::ContentHasher;
use larder::format::ids::{CommitId, ContentDigest, ContentId, PackId};
use larder::format::pack::{Layout, PackDraft, PackIndex, PackOutboard, PackPlanner, Proof, Recipe, Source};
use larder::format::placement::{Extent, Location, PlacedBlock, PlacementRoot};
use larder::format::refs::{RefLogEntry, RefValue};
use larder::format::tree::build::{BlockOf, TreeBuilder};
use larder::format::tree::entry::empty_digest;
use larder::format::tree::{Block, Entry, EntryKind, Mtime, Pin, TreeRoot};
use proptest::prelude::*;

#[path = "../../fuzz/targets.rs"]
mod targets;

/// A fuzz target: it takes any bytes and must not panic.
type Target = fn(&[u8]);

/// The fuzz targets by the name of their corpus.
const TARGETS: [(&str, Target); 12] = [
    ("tree_block", targets::tree_block),
    ("tree_root", targets::tree_root),
    ("placement_root", targets::placement_root),
    ("placed_block", targets::placed_block),
    ("pack_index", targets::pack_index),
    ("recipe", targets::recipe),
    ("outboard", targets::outboard),
    ("proof", targets::proof),
    ("commit", targets::commit),
    ("refs", targets::refs),
    ("nav", targets::nav),
    ("config", targets::config),
];

fn golden(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(part)
}

fn writes() -> bool {
    std::env::var_os("LARDER_GOLDEN_WRITE").is_some()
}

fn entry(name: &str, mode: u32, kind: EntryKind) -> Entry {
    Entry {
        name: name.as_bytes().into(),
        mode,
        mtime: Mtime { secs: 1_700_000_000, nanos: 123_456_789 },
        nlink: 1,
        kind,
    }
}

fn file(size: u64, seed: u8) -> EntryKind {
    let digest = if size == 0 { empty_digest() } else { ContentDigest([seed; 32]) };
    EntryKind::File { size, content: ContentId::Digest(digest), pin: None }
}

fn pin() -> Pin {
    Pin {
        bucket: "scans".into(),
        key: "2026/ä.dcm".into(),
        version: Some("v7".into()),
        etag: "\"0f-2\"".into(),
        size: 12,
    }
}

/// Every kind of entry once, in tree order.
fn small_tree() -> TreeBuilder {
    let pack = PackId([0xaa; 32]);
    let mut builder = TreeBuilder::new(0o2755, Mtime { secs: -1, nanos: 999_999_999 }, 8, 2);
    let linked = Entry { nlink: 2, ..entry("c.bin", 0o755, file(5000, 3)) };
    let hard_link =
        Entry { mtime: Mtime::default(), ..entry("z", 0, EntryKind::HardLink { first: (*b"c.bin").into() }) };
    let pinned = EntryKind::File { size: 12, content: ContentId::Pin(pin().id()), pin: Some(Box::new(pin())) };
    let extents =
        vec![Extent { logical: 4096, offset: 12288, len: 10 }, Extent { logical: 1 << 33, offset: 16384, len: 4096 }];
    let run = |offset| Location::Run { pack, offset };
    let entries = [
        (entry("a", 0o700, EntryKind::Dir { children: 2, descendants: 2, subdirs: 0 }), Location::None),
        (entry("b", 0o755, EntryKind::Dir { children: 0, descendants: 0, subdirs: 0 }), Location::None),
        (linked, run(0)),
        (entry("d.dcm", 0o444, pinned), Location::Run { pack: PackId([0xbb; 32]), offset: 0 }),
        (entry("e", 0o644, file(0, 0)), Location::None),
        (entry("f.sparse", 0o600, file((1 << 33) + 4096, 6)), Location::Sparse { pack, extents }),
        (entry("g", 0o777, EntryKind::Symlink { target: (*b"../\xff").into() }), Location::None),
        (entry("h", 0o644, file(1, 8)), run(8192)),
        (entry("x", 0o4711, file(5000, 3)), run(0)),
        (hard_link, Location::None),
    ];
    for (entry, location) in entries {
        builder.push(entry, location).expect("a good tree");
    }
    builder.declare_pack(pack, 20480);
    builder
}

/// More entries than a segment holds: pins where blocks are cut, for good.
fn cut_tree() -> TreeBuilder {
    let mut builder = TreeBuilder::new(0o755, Mtime::default(), 20_000, 0);
    for number in 0..20_000_u64 {
        let digest = *larder::format::digest::digest(&number.to_le_bytes()).as_bytes();
        let kind = EntryKind::File { size: 1 + number, content: ContentId::Digest(ContentDigest(digest)), pin: None };
        builder.push(entry(&format!("{number:06}.png"), 0o644, kind), Location::None).expect("a good tree");
    }
    builder
}

fn pack() -> (PackIndex, PackOutboard) {
    let mut planner = PackPlanner::new(Layout { pack_len: 1 << 40, whole_len: 1 << 39 });
    let (mut draft, mut outboard) = (PackDraft::default(), PackOutboard::default());
    let sizes = [5_u64, 4096, 700_000];
    for size in sizes {
        let slot = planner.push(size).expect("not empty");
        let mut hasher = ContentHasher::new();
        hasher.update_zeros(size);
        let (digest, values) = hasher.finish();
        outboard.contents.extend(values.map(|values| (slot.position, values)));
        draft.fill(&slot, size, ContentId::Digest(digest));
    }
    let slot = planner.push_sparse(1 << 33, &[(0, 10), (1 << 32, 5000)]).expect("in order");
    draft.fill(&slot, 1 << 33, ContentId::Pin(pin().id()));
    draft.close(planner.finish().expect("one is open"));
    (draft.finish().expect("all are known"), outboard)
}

struct Sample {
    name: &'static str,
    bytes: Vec<u8>,
    id: String,
}

/// One value of each format, encoded by this larder.
fn samples() -> Vec<Sample> {
    let mut samples = Vec::new();
    let mut add = |name, bytes: Vec<u8>, id: String| samples.push(Sample { name, bytes, id });
    let (built, blocks) = small_tree().finish().expect("a good tree");
    for block in blocks {
        let name = if block.of == BlockOf::Tree { "tree_block" } else { "placed_block" };
        add(name, block.bytes, block.id.to_string());
    }
    add("tree_root", built.root.encode(), built.tree.to_string());
    add("placement_root", built.placement.encode(), built.placement.id().to_string());
    let (cut, _) = cut_tree().finish().expect("a good tree");
    add("tree_root.cut", cut.root.encode(), cut.tree.to_string());
    let (index, outboard) = pack();
    add("pack_index", index.encode(), index.id().to_string());
    add("outboard", outboard.encode(), String::new());
    let recipe = |source| Recipe { pack: index.id(), len: index.len, index_len: 1, outboard_len: 2, source };
    add("recipe", recipe(Source::Native { key: "k/1".into() }).encode(), String::new());
    add("recipe.assembled", recipe(Source::Assembled { pins: vec![pin(), pin()] }).encode(), pin().id().to_string());
    let proof = Proof { pack: index.id(), digests: vec![None, Some(empty_digest())] };
    add("proof", proof.encode(), String::new());
    let commit = Commit {
        format: 1,
        tree: built.tree,
        parents: vec![CommitId([1; 32])],
        time_ms: 1_700_000_000_123,
        message: "first \"version\"\n".into(),
        author: "a@b".into(),
        meta: [("k".to_owned(), "v".to_owned())].into(),
        lineage: Lineage { inputs: vec![CommitId([2; 32])], job: Some("j".into()), ..Lineage::default() },
    };
    add("commit", commit.encode(), Commit::id_of(&commit.encode()).to_string());
    let value = RefValue { format: 1, commit: Some(CommitId([3; 32])), time_ms: 1, by: "a@b".into() };
    add("refs", value.encode(), String::new());
    let entry =
        RefLogEntry { format: 1, commit: None, supersedes: vec!["0001-x".into()], time_ms: 2, by: "c@d".into() };
    add("refs.log", entry.encode(), String::new());
    samples
}

#[test]
fn what_version_1_wrote_is_read_and_written_the_same_and_has_the_same_ids() {
    let ids: String = samples().iter().map(|sample| format!("{} {}\n", sample.name, sample.id)).collect();
    if writes() {
        std::fs::create_dir_all(golden("v1")).expect("writable");
        std::fs::write(golden("v1/ids.txt"), &ids).expect("writable");
        samples()
            .iter()
            .for_each(|sample| std::fs::write(golden("v1").join(sample.name), &sample.bytes).expect("writable"));
    }
    for sample in samples() {
        let kept = std::fs::read(golden("v1").join(sample.name)).expect(sample.name);
        assert!(kept == sample.bytes, "{} is written in another way than version 1 did", sample.name);
        decode(sample.name, &kept).unwrap_or_else(|error| panic!("{}: {error}", sample.name));
    }
    assert_eq!(std::fs::read_to_string(golden("v1/ids.txt")).expect("ids.txt"), ids);
}

/// Decodes a sample by the name of its format.
fn decode(name: &str, bytes: &[u8]) -> Result<(), String> {
    let done = match name.split('.').next().unwrap_or(name) {
        "tree_block" => Block::decode(bytes).map(drop),
        "placed_block" => PlacedBlock::decode(bytes).map(drop),
        "tree_root" => TreeRoot::decode(bytes).map(drop),
        "placement_root" => PlacementRoot::decode(bytes).map(drop),
        "pack_index" => PackIndex::decode(bytes).map(drop),
        "outboard" => PackOutboard::decode(bytes).map(drop),
        "recipe" => Recipe::decode(bytes).map(drop),
        "proof" => Proof::decode(bytes).map(drop),
        "commit" => Commit::decode(bytes).map(drop),
        "refs" if name == "refs.log" => RefLogEntry::decode(bytes).map(drop),
        "refs" => RefValue::decode(bytes).map(drop),
        other => panic!("no decoder for {other}"),
    };
    done.map_err(|error| error.to_string())
}

#[test]
fn a_newer_version_of_any_format_is_refused_with_the_next_step() {
    for sample in samples() {
        let mut bytes = sample.bytes;
        match bytes.first() {
            Some(b'{') => {
                bytes = String::from_utf8(bytes).expect("JSON").replace("\"format\":1", "\"format\":2").into_bytes()
            }
            _ => bytes[4] = 2,
        }
        let error = decode(sample.name, &bytes).expect_err(sample.name);
        assert!(error.contains("format version 2") && error.contains("newer larder"), "{}: {error}", sample.name);
    }
}

/// Inputs that must not be taken: the name says why.
fn hostile() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let head = |magic: &[u8; 4], rest: &[u8]| [magic.as_slice(), &[1, 0, 0, 0], rest].concat();
    let many = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
    let segment = |count: u8, entries: &[u8]| head(b"LDTB", &[&[0, count], entries].concat());
    let file_of = |name: &[u8], size: u8, digest: [u8; 32]| {
        [&[0, name.len() as u8], name, &[0, 0, 0, size], digest.as_slice()].concat()
    };
    let named = |name: &[u8]| segment(1, &file_of(name, 1, [7; 32]));
    let dir_of = |counts: [u8; 3]| segment(1, &[&[2, 1, b'd', 0, 0, 0], counts.as_slice()].concat());
    let child = |counts: [u8; 6], name: &[u8]| [&[9; 32], &[1][..], &counts, &[name.len() as u8], name].concat();
    let index = |level: u8, child: &[u8]| head(b"LDTB", &[&[level, 1], child].concat());
    let mut all = vec![
        ("tree_block", "empty", Vec::new()),
        ("tree_block", "no_entries", segment(0, &[])),
        ("tree_block", "count_beyond_the_end", head(b"LDTB", &[&[0], many.as_slice()].concat())),
        ("tree_block", "level_99", index(99, &child([1, 0, 1, 0, 0, 1], b"a"))),
        ("tree_block", "dot_dot", named(b"..")),
        ("tree_block", "dot", named(b".")),
        ("tree_block", "slash", named(b"a/b")),
        ("tree_block", "nul", named(b"a\0b")),
        ("tree_block", "empty_name", named(b"")),
        (
            "tree_block",
            "mode_with_type",
            segment(1, &[&[0, 1, b'a', 0x80, 0x80, 2, 0, 0, 1], [7; 32].as_slice()].concat()),
        ),
        (
            "tree_block",
            "nanos_of_a_second",
            segment(1, &[&[0, 1, b'a', 0, 0, 0x80, 0x94, 0xeb, 0xdc, 3, 1], [7; 32].as_slice()].concat()),
        ),
        (
            "tree_block",
            "mode_not_shortest",
            segment(1, &[&[0, 1, b'a', 0x80, 0, 0, 0, 1], [7; 32].as_slice()].concat()),
        ),
        ("tree_block", "empty_file_with_a_digest", segment(1, &file_of(b"a", 0, [7; 32]))),
        ("tree_block", "bytes_with_the_digest_of_none", segment(1, &file_of(b"a", 1, *empty_digest().as_bytes()))),
        ("tree_block", "one_link_written", segment(1, &[&[8, 1, b'a', 0, 0, 0, 1, 1], [7; 32].as_slice()].concat())),
        ("tree_block", "directory_with_links", segment(1, &[8 | 2, 1, b'a', 0, 0, 0, 2, 0, 0, 0])),
        ("tree_block", "unknown_kind", segment(1, &[7, 1, b'a', 0, 0, 0])),
        ("tree_block", "unknown_flag", segment(1, &[0x80, 1, b'a', 0, 0, 0])),
        ("tree_block", "below_no_directory", dir_of([1, 2, 0])),
        ("tree_block", "more_children_than_descendants", dir_of([3, 2, 1])),
        ("tree_block", "more_directories_than_children", dir_of([1, 1, 2])),
        ("tree_block", "empty_target", segment(1, &[3, 1, b'a', 0, 0, 0, 0])),
        ("tree_block", "target_with_nul", segment(1, &[3, 1, b'a', 0, 0, 0, 1, 0])),
        ("tree_block", "link_that_climbs", segment(1, &[4, 1, b'a', 4, b'.', b'.', b'/', b'x'])),
        ("tree_block", "link_from_the_top", segment(1, &[4, 1, b'a', 2, b'/', b'x'])),
        ("tree_block", "trailing", [named(b"a"), vec![0]].concat()),
        ("tree_block", "child_without_entries", index(1, &child([0, 0, 0, 0, 0, 0], b"a"))),
        ("tree_block", "child_with_more_kinds_than_entries", index(1, &child([1, 0, 1, 1, 0, 1], b"a"))),
        ("tree_block", "child_with_a_bad_name", index(1, &child([1, 0, 1, 0, 0, 1], b".."))),
        (
            "tree_root",
            "directory_larger_than_the_tree",
            head(b"LDTR", &[&[0, 0, 0, 9, 0, 1, 1], child([1, 0, 1, 0, 0, 1], b"a").as_slice()].concat()),
        ),
        (
            "tree_root",
            "entries_of_nobody",
            head(b"LDTR", &[&[0, 0, 0, 0, 0, 1, 1], child([1, 0, 1, 0, 0, 1], b"a").as_slice()].concat()),
        ),
        ("tree_root", "empty_with_a_level", head(b"LDTR", &[0, 0, 0, 0, 0, 5, 0])),
        ("tree_root", "segment_as_top", head(b"LDTR", &[0, 0, 0, 0, 0, 0, 0])),
        ("placement_root", "packs_beyond_the_end", head(b"LDPR", &[&[0; 32], many.as_slice()].concat())),
        ("placed_block", "unknown_pack", head(b"LDPB", &[0, 0, 1, 1, 0])),
        ("placed_block", "unused_pack", head(b"LDPB", &[&[0, 1], [1; 32].as_slice(), &[1, 0]].concat())),
        (
            "placed_block",
            "offset_above_64_bits",
            head(b"LDPB", &[&[0, 1], [1; 32].as_slice(), &[1, 1], &many].concat()),
        ),
        ("placed_block", "no_extents", head(b"LDPB", &[&[0, 1], [1; 32].as_slice(), &[1, 2, 0]].concat())),
        ("placed_block", "unknown_kind", head(b"LDPB", &[2, 0])),
        ("pack_index", "no_contents", head(b"LDPI", &[0, 0])),
        (
            "pack_index",
            "two_in_a_whole",
            head(b"LDPI", &[&[1, 2, 0], [1; 32].as_slice(), &[1, 0], &[2; 32], &[1]].concat()),
        ),
        ("pack_index", "empty_content", head(b"LDPI", &[&[0, 1, 0], [1; 32].as_slice(), &[0]].concat())),
        ("pack_index", "longer_than_2_63", head(b"LDPI", &[&[0, 1, 0], [1; 32].as_slice(), &many].concat())),
        (
            "pack_index",
            "extent_behind_the_end",
            head(b"LDPI", &[&[0, 1, 2], [1; 32].as_slice(), &[5, 1, 4, 2]].concat()),
        ),
        (
            "pack_index",
            "packed_that_is_whole",
            head(b"LDPI", &[&[0, 1, 0], [1; 32].as_slice(), &[0x80, 0x20]].concat()),
        ),
        ("recipe", "key_that_climbs", head(b"LDRC", &[&[1; 32], [1, 1, 0, 0, 4].as_slice(), b"../x"].concat())),
        ("recipe", "pins_beyond_the_end", head(b"LDRC", &[&[1; 32], [1, 1, 0, 1].as_slice(), &many].concat())),
        (
            "recipe",
            "key_longer_than_the_one_before",
            head(b"LDRC", &[&[1; 32], [1, 1, 0, 1, 1, 0, 0, 1, b'b', 9, 1, b'k', 0].as_slice()].concat()),
        ),
        ("outboard", "rows_beyond_the_end", head(b"LDOB", &[0xff, 0xff, 0xff, 0xff])),
        ("outboard", "exabytes", head(b"LDOB", &[&[1, 0, 0, 0, 0, 0, 0, 0], [0xff; 8].as_slice(), &[0; 64]].concat())),
        ("proof", "unknown_mark", head(b"LDPF", &[&[1; 32], [1, 2].as_slice()].concat())),
        ("commit", "not_json", b"{".to_vec()),
        ("commit", "deep", b"[".repeat(100_000)),
        ("commit", "no_format", b"{}".to_vec()),
        ("commit", "huge_format", br#"{"format":4294967296}"#.to_vec()),
        ("refs", "format_zero", br#"{"format":0}"#.to_vec()),
    ];
    all.push(("tree_block", "longer_than_a_block", [named(b"a"), vec![0; 1 << 18]].concat()));
    all
}

#[test]
fn hostile_inputs_are_refused_and_nothing_panics() {
    for (target, name, bytes) in hostile() {
        let path = golden("hostile").join(target).join(name);
        if writes() {
            std::fs::create_dir_all(path.parent().expect("it has one")).expect("writable");
            std::fs::write(&path, &bytes).expect("writable");
        }
        assert!(decode(target, &bytes).is_err(), "{target}/{name} was taken");
        assert!(std::fs::read(&path).expect(name) == bytes, "{target}/{name} is not in tests/golden/hostile");
    }
}

#[test]
fn every_file_of_the_corpus_is_survived_by_every_target() {
    let mut files = Vec::new();
    let dirs = std::fs::read_dir(golden("hostile")).expect("a corpus").map(|dir| dir.expect("readable").path());
    for dir in dirs.chain([golden("v1")]) {
        files.extend(
            std::fs::read_dir(dir)
                .expect("a corpus")
                .map(|file| std::fs::read(file.expect("readable").path()).expect("readable")),
        );
    }
    assert!(files.len() > 60, "the corpus is there");
    for bytes in &files {
        TARGETS.iter().for_each(|(_, target)| target(bytes));
    }
}

/// Damage: flip, cut, insert, repeat.
#[derive(Debug, Clone)]
enum Damage {
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        4 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        1 => at().prop_map(Damage::Cut),
        1 => (at(), prop::collection::vec(any::<u8>(), 1..12)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        1 => (at(), 1..9_u8).prop_map(|(at, len)| Damage::Remove(at, len)),
    ]
}

fn apply(mut bytes: Vec<u8>, damage: &Damage) -> Vec<u8> {
    if bytes.is_empty() {
        return bytes;
    }
    match damage {
        Damage::Set(at, byte) => {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        Damage::Cut(at) => bytes.truncate(at.index(bytes.len())),
        Damage::Insert(at, more) => {
            let at = at.index(bytes.len());
            bytes.splice(at..at, more.iter().copied());
        }
        Damage::Remove(at, len) => {
            let at = at.index(bytes.len());
            bytes.drain(at..(at + usize::from(*len)).min(bytes.len()));
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_bytes_never_panic_and_what_decodes_has_one_encoding(
        sample in any::<prop::sample::Index>(), damages in prop::collection::vec(damage(), 1..4),
    ) {
        let samples = samples_once();
        let (name, bytes) = &samples[sample.index(samples.len())];
        let bytes = damages.iter().fold(bytes.clone(), apply);
        let target = name.split('.').next().unwrap_or(name);
        let (_, run) = TARGETS.iter().find(|(known, _)| *known == target).expect("each sample has a target");
        run(&bytes);
    }

    #[test]
    fn a_damaged_configuration_is_read_or_its_problems_are_listed(damages in prop::collection::vec(damage(), 0..6)) {
        targets::config(&damages.iter().fold(CONFIG.as_bytes().to_vec(), apply));
    }

    #[test]
    fn navigating_what_nobody_made_in_good_faith_ends(bytes in prop::collection::vec(any::<u8>(), 0..1500)) {
        targets::nav(&bytes);
    }
}

/// A configuration with every kind of value, to be damaged.
const CONFIG: &str = r#"
[lake]
url = "s3://bucket/prefix"
endpoint = "http://127.0.0.1:9000"
path_style = true

[tier.default]
path = "/cache"
capacity = "10GiB"

[mount]
verify = "node"
prefetch = "all"

[dataset.photos]
ttl = "7d"
"#;

/// The samples whose damage is worth a look: the large one would only be damaged in ids.
fn samples_once() -> &'static [(&'static str, Vec<u8>)] {
    static SAMPLES: std::sync::OnceLock<Vec<(&'static str, Vec<u8>)>> = std::sync::OnceLock::new();
    SAMPLES.get_or_init(|| samples().into_iter().map(|sample| (sample.name, sample.bytes)).collect())
}
