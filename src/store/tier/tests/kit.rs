//! Small packs, small records, and what must be true of a tier at any moment.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use crate::format::digest::digest;
use crate::format::ids::{CommitId, ContentId, LakeId, NodeId, PackId, PlacementId};
use crate::format::pack::{PackIndex, PackedContent, Place};
use crate::format::placement::PackUse;
use crate::store::tier::layout::{ObjectName, parse_object};
use crate::store::tier::{CommitKey, InitOptions, Record, Sidecar, Tier, TierConfig, TierError, TierIo, marker};
use crate::testkit::sim_tier::{SimClock, SimIo, SimWorld};

pub(super) const SPAN: u64 = 128;
pub(super) const GRACE_MS: u64 = 100_000;
pub(super) const TTL_MS: u64 = 1_000_000;

/// A pack of one content of a few spans.
#[derive(Debug, Clone)]
pub(super) struct Pack {
    pub id: PackId,
    pub bytes: Vec<u8>,
    pub index: Vec<u8>,
}

pub(super) fn pack(seed: u8) -> Pack {
    let len = 200 + usize::from(seed) * 7;
    let bytes: Vec<u8> = (0..len).map(|at| (at as u8).wrapping_mul(31) ^ seed | 1).collect();
    let content =
        PackedContent { content: ContentId::Digest(digest(&bytes)), size: len as u64, place: Place::Run { offset: 0 } };
    let index = PackIndex { len: len as u64, contents: vec![content] };
    Pack { id: index.id(), bytes, index: index.encode() }
}

pub(super) fn commit_key(n: u8) -> CommitKey {
    CommitKey { lake: LakeId(Uuid::from_u128(77)), commit: CommitId([n; 32]) }
}

pub(super) fn record(n: u8, packs: &[Pack]) -> Record {
    let mut uses: Vec<PackUse> = packs
        .iter()
        .map(|p| PackUse { pack: p.id, len: p.bytes.len() as u64, referenced: p.bytes.len() as u64 })
        .collect();
    uses.sort_by_key(|u| u.pack);
    Record { key: commit_key(n), dataset: "xray".to_owned(), placement: PlacementId([n; 32]), packs: uses }
}

pub(super) fn config() -> TierConfig {
    TierConfig {
        ttl_ms: Some(TTL_MS),
        grace_ms: GRACE_MS,
        lease_ttl_ms: 500_000,
        claim_ttl_ms: 60_000,
        staging_ttl_ms: 2_000_000,
        span_len_bytes: SPAN,
        ..TierConfig::default()
    }
}

/// A server with an empty tier.
pub(super) fn new_world() -> SimWorld {
    let world = SimWorld::default();
    let io = world.client();
    let clock = SimClock { world: world.clone(), skew_ms: 0 };
    marker::init(&io, Path::new("/tier"), &InitOptions::default(), &clock).expect("an empty directory becomes a tier");
    world
}

/// Opens the tier on a node of its own; its clock is far off.
pub(super) fn open(world: &SimWorld, io: SimIo, node: u8) -> Tier<SimIo> {
    let clock = SimClock { world: world.clone(), skew_ms: i64::from(node) * 3_600_000 };
    let id = NodeId(Uuid::from_u128(u128::from(node)));
    let instance = Uuid::from_u128(
        (u128::from(node) << 100) | (u128::from(io.ops()) << 64) | u128::from(rand::random::<u32>()) << 72,
    );
    Tier::open_with(io, Arc::new(clock), Path::new("/tier"), id, instance, config()).expect("the tier opens")
}

/// A node that was told the tier's capacity.
pub(super) fn node_with(world: &SimWorld, n: u8, capacity_bytes: u64) -> (Tier<SimIo>, SimIo) {
    let (io, id) = (world.client(), NodeId(Uuid::from_u128(u128::from(n))));
    let clock = SimClock { world: world.clone(), skew_ms: 0 };
    let config = TierConfig { capacity_bytes: Some(capacity_bytes), ..config() };
    let instance = Uuid::from_u128(u128::from(n) << 100);
    let tier = Tier::open_with(io.clone(), Arc::new(clock), Path::new("/tier"), id, instance, config);
    (tier.expect("the tier opens"), io)
}

pub(super) fn node(world: &SimWorld, n: u8) -> (Tier<SimIo>, SimIo) {
    let io = world.client();
    (open(world, io.clone(), n), io)
}

/// Brings a pack as fetching does: what is done already is not written again.
pub(super) fn fill<I: TierIo>(tier: &Tier<I>, pack: &Pack) -> Result<(), TierError> {
    if tier.pack(&pack.id)?.is_some() {
        return Ok(());
    }
    let stage = tier.stage(&pack.id, pack.bytes.len() as u64)?;
    for span in 0..stage.spans() {
        if stage.is_done(span) {
            continue;
        }
        let range = stage.span_range(span);
        let bytes = &pack.bytes[range.start as usize..range.end as usize];
        stage.write_at(bytes, range.start)?;
        stage.span_done(span)?;
    }
    tier.put_sidecar(&pack.id, Sidecar::Index, &pack.index)?;
    stage.publish().map(drop)
}

/// Reads a published pack whole.
pub(super) fn read<I: TierIo>(tier: &Tier<I>, pack: &Pack) -> Option<Vec<u8>> {
    use crate::store::tier::io::{TierFile, read_full};
    let found = tier.pack(&pack.id).expect("the tier can be read")?;
    let mut bytes = vec![0; found.file.stat().expect("an open file").size_bytes as usize];
    let len = read_full(&found.file, &mut bytes, 0).expect("a published pack can be read");
    bytes.truncate(len);
    Some(bytes)
}

/// Whatever is under its final name is complete and equals the source.
pub(super) fn check_published(world: &SimWorld, packs: &[Pack]) {
    for (path, bytes) in world.files() {
        let Some(name) = path.strip_prefix("objects/").and_then(|rest| rest.get(3..)) else {
            continue;
        };
        match parse_object(name) {
            Some(ObjectName::Pack(id)) => {
                let source = packs.iter().find(|p| p.id == id).expect("only packs of the test are published");
                assert!(bytes == source.bytes, "{path}: published, but not what the source has");
            }
            Some(ObjectName::Sidecar(id, Sidecar::Index)) => {
                let source = packs.iter().find(|p| p.id == id).expect("only packs of the test");
                assert!(bytes == source.index, "{path}: not the index");
            }
            other => panic!("{path}: {other:?} was never made"),
        }
    }
}

pub(super) fn is_published(world: &SimWorld, pack: &Pack) -> bool {
    let hex = pack.id.to_string();
    world.files().contains_key(&format!("objects/{}/{hex}", &hex[..2]))
}

/// Everything that passes by itself has passed; then nothing may be left that nobody needs.
pub(super) fn settle(world: &SimWorld, tier: &Tier<SimIo>) {
    for _ in 0..5 {
        world.advance_ms(4_000_000);
        let report = tier.steward_step(&tier.policy()).expect("a sweep runs");
        assert!(report.failed.is_empty(), "a sweep on a healthy tier fails nowhere: {:?}", report.failed);
    }
}

/// Names that a settled tier without commits may have.
pub(super) fn leaks(world: &SimWorld) -> Vec<String> {
    let stays = ["larder-tier.json", "nodes/", "steward/", "datasets/"];
    world.files().into_keys().filter(|path| !stays.iter().any(|s| path.starts_with(s))).collect()
}

/// The accounting equals a walk over every file.
pub(super) fn check_accounting(tier: &Tier<SimIo>) {
    let report = tier.check(false).expect("a healthy tier can be checked");
    assert_eq!(report.walked_bytes, report.usage.total_bytes, "the accounting equals a full scan");
}
