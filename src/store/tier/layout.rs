//! Names in the tier, in one place: what is written under a name is looked for under it.
//!
//! `docs/formats/tier.md` has the tree and the bytes. All paths are relative to the tier.

use uuid::Uuid;

use crate::format::ids::{CommitId, LakeId, NodeId, PackId, PlacementId};
use crate::store::tier::error::TierError;

pub(crate) const MARKER: &str = "larder-tier.json";
/// The key by which nodes know each other.
pub(crate) const PEER_KEY: &str = "peer-key";
pub(crate) const OBJECTS: &str = "objects";
pub(crate) const STAGING: &str = "staging";
pub(crate) const COMMITS: &str = "commits";
pub(crate) const DATASETS: &str = "datasets";
pub(crate) const HOLDS: &str = "holds";
pub(crate) const TRASH: &str = "trash";
pub(crate) const QUARANTINE: &str = "quarantine";
pub(crate) const NODES: &str = "nodes";
pub(crate) const STEWARD: &str = "steward";
pub(crate) const TEMP: &str = "tmp";

/// Every folder that `init` makes (and the 256 fans below `objects`).
pub(crate) const FOLDERS: [&str; 10] =
    [OBJECTS, STAGING, COMMITS, DATASETS, HOLDS, TRASH, QUARANTINE, NODES, STEWARD, TEMP];

/// Where things go when a full medium takes no new folder; made by `init`.
pub(crate) const TRASH_SPILL: &str = "trash/spill";
/// What is touched for the server's time when a full medium takes no new file; made by `init`.
pub(crate) const CLOCK: &str = "steward/clock";

pub(crate) const STEWARD_LEASE: &str = "steward/lease";
pub(crate) const DECISIONS: &str = "steward/decisions";
pub(crate) const STALL: &str = "steward/stall";
pub(crate) const SUSPICION: &str = "steward/suspicion";
pub(crate) const ROOM: &str = "steward/room";
pub(crate) const SCRUB_CURSOR: &str = "steward/scrub";

/// What lies beside a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sidecar {
    /// The pack's index: its digest is the pack's id.
    Index,
    /// Chaining values of the pack's large contents.
    Outboard,
    /// Digests of an imported pack, fixed when first read.
    Proof,
    /// Where the pack's bytes lie in the lake, as whoever filled it knew: needed to read its description while the
    /// lake is away.
    Recipe,
}

impl Sidecar {
    pub const ALL: [Self; 4] = [Self::Index, Self::Outboard, Self::Proof, Self::Recipe];

    /// Gives the word for it: the end of its file name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Index => "index",
            Self::Outboard => "outboard",
            Self::Proof => "proof",
            Self::Recipe => "recipe",
        }
    }

    /// Finds it by its word.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|part| part.name() == name)
    }
}

/// A commit of a lake: what records, leases and keeps belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct CommitKey {
    pub lake: LakeId,
    pub commit: CommitId,
}

pub(crate) fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}

pub(crate) fn file_name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

pub(crate) fn fan_dir(pack: &PackId) -> String {
    let hex = pack.to_string();
    format!("{OBJECTS}/{}", hex.get(..2).unwrap_or_default())
}

pub(crate) fn object(pack: &PackId) -> String {
    format!("{}/{pack}", fan_dir(pack))
}

pub(crate) fn sidecar(pack: &PackId, part: Sidecar) -> String {
    format!("{}/{pack}.{}", fan_dir(pack), part.name())
}

/// What a name below `objects/ab/` (or in the trash) stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ObjectName {
    Pack(PackId),
    Sidecar(PackId, Sidecar),
}

pub(crate) fn parse_object(name: &str) -> Option<ObjectName> {
    match name.split_once('.') {
        None => name.parse().ok().map(ObjectName::Pack),
        Some((pack, part)) => Some(ObjectName::Sidecar(pack.parse().ok()?, Sidecar::parse(part)?)),
    }
}

impl ObjectName {
    pub(crate) fn path(&self) -> String {
        match self {
            Self::Pack(pack) => object(pack),
            Self::Sidecar(pack, part) => sidecar(pack, *part),
        }
    }
}

pub(crate) fn staging_dir(pack: &PackId) -> String {
    format!("{STAGING}/{pack}")
}

pub(crate) fn generation(dir: &str) -> String {
    format!("{dir}/generation")
}

pub(crate) fn staging_data(dir: &str, generation: &Uuid) -> String {
    format!("{dir}/data.{}", generation.simple())
}

pub(crate) fn span_claim(dir: &str, span: u32, generation: &Uuid) -> String {
    format!("{dir}/span-{span}.{}.claim", generation.simple())
}

pub(crate) fn span_done(dir: &str, span: u32, generation: &Uuid) -> String {
    format!("{dir}/span-{span}.{}.done", generation.simple())
}

/// What a name below `staging/<pack>/` stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StagingName {
    Generation,
    Data(Uuid),
    Claim(u32, Uuid),
    Done(u32, Uuid),
}

pub(crate) fn parse_staging(name: &str) -> Option<StagingName> {
    let parts: Vec<&str> = name.split('.').collect();
    let span = |text: &str| text.strip_prefix("span-").and_then(|n| n.parse().ok());
    match parts.as_slice() {
        ["generation"] => Some(StagingName::Generation),
        ["data", generation] => Uuid::parse_str(generation).ok().map(StagingName::Data),
        [s, generation, "claim"] => Some(StagingName::Claim(span(s)?, Uuid::parse_str(generation).ok()?)),
        [s, generation, "done"] => Some(StagingName::Done(span(s)?, Uuid::parse_str(generation).ok()?)),
        _ => None,
    }
}

pub(crate) fn commit_dir(key: &CommitKey) -> String {
    format!("{COMMITS}/{}/{}", key.lake, key.commit)
}

pub(crate) fn record(key: &CommitKey, placement: &PlacementId) -> String {
    format!("{}/record.{placement}", commit_dir(key))
}

pub(crate) fn parse_record(name: &str) -> Option<PlacementId> {
    name.strip_prefix("record.")?.parse().ok()
}

pub(crate) fn leases_dir(key: &CommitKey) -> String {
    format!("{}/leases", commit_dir(key))
}

pub(crate) fn uses_dir(key: &CommitKey) -> String {
    format!("{}/uses", commit_dir(key))
}

pub(crate) fn lease(key: &CommitKey, node: &NodeId, instance: &Uuid) -> String {
    format!("{}/{node}.{}", leases_dir(key), instance.simple())
}

/// Whose lease a name below `leases/` is.
pub(crate) fn parse_lease(name: &str) -> Option<(NodeId, Uuid)> {
    let (node, id) = name.split_once('.')?;
    Some((node.parse().ok()?, Uuid::parse_str(id).ok()?))
}

pub(crate) fn use_file(key: &CommitKey, node: &NodeId) -> String {
    format!("{}/{node}", uses_dir(key))
}

pub(crate) fn keep(key: &CommitKey) -> String {
    format!("{}/keep", commit_dir(key))
}

pub(crate) fn commit_ttl(key: &CommitKey) -> String {
    format!("{}/ttl", commit_dir(key))
}

pub(crate) fn dataset_ttl(lake: &LakeId, dataset: &str) -> Result<String, TierError> {
    check_name(dataset)?;
    Ok(format!("{DATASETS}/{lake}/{dataset}"))
}

pub(crate) fn node_file(node: &NodeId) -> String {
    format!("{NODES}/{node}")
}

pub(crate) fn hold_dir(node: &NodeId, mount: &str) -> Result<String, TierError> {
    check_name(mount)?;
    Ok(format!("{HOLDS}/{node}/{mount}"))
}

/// The name that a record has in the trash: whose it was must be readable there.
pub(crate) fn trashed_record(key: &CommitKey, placement: &PlacementId) -> String {
    format!("record.{}.{}.{placement}", key.lake, key.commit)
}

pub(crate) fn parse_trashed_record(name: &str) -> Option<(CommitKey, PlacementId)> {
    let parts: Vec<&str> = name.split('.').collect();
    match parts.as_slice() {
        ["record", lake, commit, placement] => {
            let key = CommitKey { lake: lake.parse().ok()?, commit: commit.parse().ok()? };
            Some((key, placement.parse().ok()?))
        }
        _ => None,
    }
}

/// Refuses what could leave its folder or hide in it.
fn check_name(name: &str) -> Result<(), TierError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > 200 || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(TierError::BadName { name: name.to_owned() });
    }
    Ok(())
}
