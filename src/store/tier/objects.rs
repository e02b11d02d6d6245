//! What is published: opening it, what lies beside it, setting damaged ones aside, scrubbing.

use std::collections::BTreeSet;

use crate::format::codec::DecodeError;
use crate::format::digest::ContentHasher;
use crate::format::ids::{ContentDigest, ContentId, NodeId, PackId};
use crate::format::pack::{PackIndex, PackOutboard, PackedContent, Place, Proof, Recipe};
use crate::store::tier::error::TierError;
use crate::store::tier::io::{Stat, TierFile, TierIo, read_full};
use crate::store::tier::layout::{self, ObjectName, QUARANTINE, SCRUB_CURSOR, Sidecar, parse_object};
use crate::store::tier::turns::Turn;
use crate::store::tier::{Core, Tier};

/// What makes a file the same file. Not the ctime: a hard link elsewhere changes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct FileIdentity {
    pub file_id: u64,
    pub size_bytes: u64,
    pub mtime_ns: i64,
}

impl From<Stat> for FileIdentity {
    fn from(stat: Stat) -> Self {
        Self { file_id: stat.file_id, size_bytes: stat.size_bytes, mtime_ns: stat.mtime_ns }
    }
}

/// A published object, opened for reading.
#[derive(Debug)]
pub struct PackFile<F = std::fs::File> {
    pub file: F,
    pub len: u64,
    pub identity: FileIdentity,
}

/// What came of setting an object aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quarantined {
    /// It lies in `quarantine/` now; the name is free for a good one.
    SetAside,
    /// Another file has the name already: look again.
    Replaced,
    /// The name is free already.
    Gone,
    /// Another process is about it: look again soon.
    Elsewhere,
}

/// What lies beside an object in quarantine.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct QuarantineReport {
    pub format: u32,
    pub pack: PackId,
    pub identity: FileIdentity,
    pub why: String,
    pub node: NodeId,
    pub time_ms: i64,
}

/// What scrubbing one object found.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ScrubReport {
    pub pack: PackId,
    pub bytes: u64,
    pub outcome: ScrubOutcome,
}

/// How a scrubbed object is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum ScrubOutcome {
    Good,
    /// Set aside; it is fetched again when it is read.
    Damaged {
        content: usize,
    },
    /// The object has another length than its index says; set aside.
    WrongSize {
        expected: u64,
    },
    /// Its index is missing or damaged: nothing to check against.
    NoIndex,
    /// Some contents are pinned and unproven; the others are good.
    Unproven {
        contents: usize,
    },
    Gone,
}

impl ScrubOutcome {
    /// Says whether the object was set aside.
    pub fn is_bad(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::WrongSize { .. })
    }
}

#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
struct ScrubCursor {
    after: Option<PackId>,
}

impl<I: TierIo> Tier<I> {
    /// Opens a published object; None where the tier does not have it.
    pub fn pack(&self, pack: &PackId) -> Result<Option<PackFile<I::File>>, TierError> {
        let path = layout::object(pack);
        self.core.refresh_fan(pack);
        let Some(file) = self.core.open_read(&path)? else {
            return Ok(None);
        };
        match file.stat().map_err(|e| TierError::io("look at", &path, e)) {
            Ok(stat) => Ok(Some(PackFile { file, len: stat.size_bytes, identity: stat.into() })),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads what lies beside a pack; what is not the pack's is an error.
    pub fn sidecar(&self, pack: &PackId, part: Sidecar) -> Result<Option<Vec<u8>>, TierError> {
        let Some(bytes) = self.core.read_small(&layout::sidecar(pack, part))? else {
            return Ok(None);
        };
        check_sidecar(pack, part, &bytes)?;
        Ok(Some(bytes))
    }

    /// Says whether something lies beside a pack, whatever it holds.
    pub fn has_sidecar(&self, pack: &PackId, part: Sidecar) -> Result<bool, TierError> {
        Ok(self.core.look(&layout::sidecar(pack, part))?.is_some())
    }

    /// Keeps bytes beside a pack, by exclusive create; gives the bytes that are there afterwards.
    /// Damaged ones are replaced. Make the stage first: it protects a sidecar that has no pack yet.
    pub fn put_sidecar(&self, pack: &PackId, part: Sidecar, bytes: &[u8]) -> Result<Vec<u8>, TierError> {
        check_sidecar(pack, part, bytes)?;
        let path = layout::sidecar(pack, part);
        loop {
            if self.core.write_new(&path, bytes)? {
                return Ok(bytes.to_vec());
            }
            match self.sidecar(pack, part) {
                Ok(Some(there)) => return Ok(there),
                Ok(None) => {}
                Err(TierError::BadSidecar { .. }) => {
                    self.core.replace(&path, bytes)?;
                    return Ok(bytes.to_vec());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Sets a damaged object aside, if the name still has the file of that identity.
    pub fn quarantine(&self, pack: &PackId, bad: &FileIdentity, why: &str) -> Result<Quarantined, TierError> {
        let claim = format!("{QUARANTINE}/{pack}.claim");
        match self.core.take_turn(&claim, self.core.cfg.claim_ttl_ms)? {
            Turn::Mine { .. } => {}
            Turn::Other { .. } => return Ok(Quarantined::Elsewhere),
        }
        let done = self.core.set_aside(pack, bad, why);
        self.core.give_turn(&claim)?;
        done
    }

    /// Lists what is published, by names only.
    pub fn published(&self) -> Result<BTreeSet<PackId>, TierError> {
        let mut packs = BTreeSet::new();
        for fan in 0..=255u8 {
            for listed in self.core.list(&format!("{}/{fan:02x}", layout::OBJECTS))?.unwrap_or_default() {
                if let Some(ObjectName::Pack(pack)) = parse_object(&listed.name) {
                    packs.insert(pack);
                }
            }
        }
        Ok(packs)
    }

    /// Gives the next object to scrub, round and round; None where there is none.
    pub fn next_scrub(&self) -> Result<Option<PackId>, TierError> {
        let cursor: ScrubCursor = match self.core.read_json(SCRUB_CURSOR) {
            Ok(found) => found.unwrap_or_default(),
            Err(TierError::BadFile { .. }) => ScrubCursor::default(),
            Err(error) => return Err(error),
        };
        let after = cursor.after;
        let found = match self.core.first_object_after(after)? {
            None if after.is_some() => self.core.first_object_after(None)?,
            found => found,
        };
        if let Some(pack) = found {
            let text = serde_json::to_vec(&ScrubCursor { after: Some(pack) }).expect("plain fields");
            self.core.replace(SCRUB_CURSOR, &text)?;
        }
        Ok(found)
    }

    /// Checks one object against its index, without any commit. `pace` is called with the bytes just
    /// read and may sleep: so the rate is the caller's. What is damaged is set aside.
    pub fn scrub(&self, pack: &PackId, pace: &mut dyn FnMut(u64)) -> Result<ScrubReport, TierError> {
        let report = |bytes, outcome| Ok(ScrubReport { pack: *pack, bytes, outcome });
        let Some(object) = self.pack(pack)? else {
            return report(0, ScrubOutcome::Gone);
        };
        let index = match self.sidecar(pack, Sidecar::Index) {
            Ok(Some(bytes)) => PackIndex::decode(&bytes).ok(),
            Ok(None) | Err(TierError::BadSidecar { .. }) => None,
            Err(error) => return Err(error),
        };
        let Some(index) = index else {
            return report(0, ScrubOutcome::NoIndex);
        };
        if index.len != object.len {
            self.quarantine(pack, &object.identity, "wrong length")?;
            return report(0, ScrubOutcome::WrongSize { expected: index.len });
        }
        let proof = match self.sidecar(pack, Sidecar::Proof) {
            Ok(Some(bytes)) => Proof::decode(&bytes).ok(),
            _ => None,
        };
        let mut unproven = 0;
        for (at, content) in index.contents.iter().enumerate() {
            let Some(expected) = expected_digest(content, at, proof.as_ref()) else {
                unproven += 1;
                continue;
            };
            let found =
                digest_of(&object.file, content, pace).map_err(|e| TierError::io("read", &layout::object(pack), e))?;
            if found != Some(expected) {
                self.quarantine(pack, &object.identity, "scrub: a content has another digest")?;
                return report(object.len, ScrubOutcome::Damaged { content: at });
            }
        }
        match unproven {
            0 => report(object.len, ScrubOutcome::Good),
            contents => report(object.len, ScrubOutcome::Unproven { contents }),
        }
    }
}

impl<I: TierIo> Core<I> {
    /// After a record was written, what this client remembers of objects is older than the record: an
    /// eviction may have moved them away before it. So each fan is asked for once more.
    fn refresh_fan(&self, pack: &PackId) {
        let fan = pack.0.first().copied().unwrap_or(0);
        let promises = {
            let state = self.state.lock();
            if state.fans.get(&fan) == Some(&state.promises) {
                return;
            }
            state.promises
        };
        if self.io.refresh(&layout::fan_dir(pack)).is_ok() {
            self.state.lock().fans.insert(fan, promises);
        }
    }

    fn set_aside(&self, pack: &PackId, bad: &FileIdentity, why: &str) -> Result<Quarantined, TierError> {
        let object = layout::object(pack);
        match self.look(&object)? {
            None => return Ok(Quarantined::Gone),
            Some(stat) if FileIdentity::from(stat) != *bad => return Ok(Quarantined::Replaced),
            Some(_) => {}
        }
        let aside = format!("{QUARANTINE}/{pack}.{}", self.nonce().simple());
        let report = QuarantineReport {
            format: 1,
            pack: *pack,
            identity: *bad,
            why: why.to_owned(),
            node: self.node,
            time_ms: self.clock.wall_ms(),
        };
        let report_path = format!("{aside}.json");
        self.write_new(&report_path, &serde_json::to_vec_pretty(&report).expect("plain fields"))?;
        if !self.move_away(&object, &aside)? {
            self.remove(&report_path)?;
            return Ok(Quarantined::Gone);
        }
        // A pause between the look and the move may have let a good one in: put it back.
        let moved = self.look(&aside)?;
        if moved.is_none_or(|stat| stat.file_id != bad.file_id) {
            self.put_back(&aside, &object)?;
            self.remove(&report_path)?;
            return Ok(Quarantined::Replaced);
        }
        self.sync_dir(QUARANTINE)?;
        self.sync_dir(&layout::fan_dir(pack))?;
        Ok(Quarantined::SetAside)
    }

    fn first_object_after(&self, after: Option<PackId>) -> Result<Option<PackId>, TierError> {
        let from = after.map_or(0, |pack| pack.0.first().copied().unwrap_or(0));
        for fan in from..=255 {
            let names = self.list(&format!("{}/{fan:02x}", layout::OBJECTS))?.unwrap_or_default();
            let next = names
                .iter()
                .filter_map(|listed| match parse_object(&listed.name) {
                    Some(ObjectName::Pack(pack)) => Some(pack),
                    _ => None,
                })
                .filter(|pack| after.is_none_or(|after| *pack > after))
                .min();
            if next.is_some() {
                return Ok(next);
            }
        }
        Ok(None)
    }
}

/// Refuses what is not this pack's.
fn check_sidecar(pack: &PackId, part: Sidecar, bytes: &[u8]) -> Result<(), TierError> {
    let ours = |found: Result<bool, DecodeError>| found.unwrap_or(false);
    let good = match part {
        Sidecar::Index => PackIndex::id_of(bytes) == *pack,
        Sidecar::Outboard => ours(PackOutboard::decode(bytes).map(|_| true)),
        Sidecar::Proof => ours(Proof::decode(bytes).map(|proof| proof.pack == *pack)),
        Sidecar::Recipe => ours(Recipe::decode(bytes).map(|recipe| recipe.pack == *pack)),
    };
    if good { Ok(()) } else { Err(TierError::BadSidecar { pack: *pack, part: part.name() }) }
}

fn expected_digest(content: &PackedContent, at: usize, proof: Option<&Proof>) -> Option<ContentDigest> {
    match content.content {
        ContentId::Digest(digest) => Some(digest),
        ContentId::Pin(_) => proof.and_then(|proof| proof.digests.get(at).copied().flatten()),
    }
}

/// Digests one content's logical bytes; None where the object ends too early.
fn digest_of<F: TierFile>(
    file: &F,
    content: &PackedContent,
    pace: &mut dyn FnMut(u64),
) -> std::io::Result<Option<ContentDigest>> {
    let mut hasher = ContentHasher::new();
    let whole = match &content.place {
        Place::Run { offset } => feed(file, &mut hasher, *offset, content.size, pace)?,
        Place::Sparse { extents } => {
            let mut at = 0;
            let mut whole = true;
            for extent in extents {
                hasher.update_zeros(extent.logical.saturating_sub(at));
                whole &= feed(file, &mut hasher, extent.offset, extent.len, pace)?;
                at = extent.logical + extent.len;
            }
            hasher.update_zeros(content.size.saturating_sub(at));
            whole
        }
    };
    Ok(whole.then(|| hasher.finish().0))
}

fn feed<F: TierFile>(
    file: &F,
    hasher: &mut ContentHasher,
    offset: u64,
    len: u64,
    pace: &mut dyn FnMut(u64),
) -> std::io::Result<bool> {
    let mut buf = vec![0; usize::try_from(len.min(1 << 20)).unwrap_or(1 << 20)];
    let mut at = 0;
    while at < len {
        let want = usize::try_from((len - at).min(buf.len() as u64)).unwrap_or(0);
        let Some(part) = buf.get_mut(..want) else {
            return Ok(false);
        };
        if read_full(file, part, offset + at)? < want {
            return Ok(false);
        }
        hasher.update(part);
        pace(want as u64);
        at += want as u64;
    }
    Ok(true)
}
