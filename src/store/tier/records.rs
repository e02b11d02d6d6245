//! Which commits are cached, mounted, used, kept.
//!
//! A record says which packs a commit needs; it is never changed, and there is one per placement. A
//! lease says "mounted (or being filled) here" and is renewed by [`Tier::heartbeat`].
//!
//! The order is what counts. Who mounts: lease, then record, then the objects. Who evicts: record
//! away, then look at the leases; objects away, then look at the records. So either the one sees the
//! record missing and writes it again, or the other sees the lease and puts the record back.

use std::sync::Arc;

use uuid::Uuid;

use crate::format::ids::{CommitId, LakeId, NodeId, PackId, PlacementId};
use crate::format::placement::PackUse;
use crate::store::tier::error::TierError;
use crate::store::tier::io::TierIo;
use crate::store::tier::layout::{self, CommitKey};
use crate::store::tier::real::RealIo;
use crate::store::tier::siblings::{Fate, Purpose};
use crate::store::tier::{Core, Tier};

/// What a commit needs of the tier, by one of its placements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub key: CommitKey,
    /// The dataset it was mounted or cached as.
    pub dataset: String,
    pub placement: PlacementId,
    /// Sorted by pack id, no duplicates: as the placement root has them.
    pub packs: Vec<PackUse>,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct RecordText {
    format: u32,
    lake: LakeId,
    commit: CommitId,
    dataset: String,
    placement: PlacementId,
    created_ms: i64,
    packs: Vec<PackText>,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct PackText {
    pack: PackId,
    len: u64,
    referenced: u64,
}

impl Record {
    pub(crate) fn encode(&self, created_ms: i64) -> Vec<u8> {
        let packs =
            self.packs.iter().map(|p| PackText { pack: p.pack, len: p.len, referenced: p.referenced }).collect();
        let text = RecordText {
            format: 1,
            lake: self.key.lake,
            commit: self.key.commit,
            dataset: self.dataset.clone(),
            placement: self.placement,
            created_ms,
            packs,
        };
        serde_json::to_vec(&text).expect("a record has only plain fields")
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let text: RecordText = serde_json::from_slice(bytes)?;
        let packs =
            text.packs.into_iter().map(|p| PackUse { pack: p.pack, len: p.len, referenced: p.referenced }).collect();
        Ok(Self {
            key: CommitKey { lake: text.lake, commit: text.commit },
            dataset: text.dataset,
            placement: text.placement,
            packs,
        })
    }

    fn path(&self) -> String {
        layout::record(&self.key, &self.placement)
    }
}

/// What a small file about a node says (nodes, leases, uses): for people. Of a lease, instance and
/// purpose say whether it ends with a process of this node.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Note {
    pub format: u32,
    pub node: NodeId,
    pub host: String,
    pub time_ms: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Uuid>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub purpose: Option<Purpose>,
}

/// This machine's name, for people.
pub(crate) fn host() -> String {
    nix::sys::utsname::uname().map(|u| u.nodename().to_string_lossy().into_owned()).unwrap_or_default()
}

pub(crate) fn node_note(node: &NodeId, time_ms: i64) -> Vec<u8> {
    let note = Note { format: 1, node: *node, host: host(), time_ms, instance: None, purpose: None };
    serde_json::to_vec(&note).expect("a note has only plain fields")
}

/// What `commits/…/ttl` and `datasets/…` hold.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct TtlText {
    pub format: u32,
    pub ttl_ms: u64,
}

/// A lease that this process renews.
#[derive(Debug, Clone)]
pub(crate) struct LeaseState {
    pub record: Record,
    pub purpose: Purpose,
}

/// "This commit is mounted, or being filled, here." Released when it is dropped; a process that dies
/// leaves it to expire.
#[derive(Debug)]
pub struct Lease<I: TierIo = RealIo> {
    tier: Tier<I>,
    id: Uuid,
    key: CommitKey,
    released: bool,
}

/// What a heartbeat found.
#[derive(Debug, Default)]
pub struct Renewed {
    /// Leases that are as they should be.
    pub held: usize,
    /// Commits whose lease or record was gone (this node slept longer than a lease lives): both are
    /// there again, but objects may have left meanwhile and are fetched again when read.
    pub lapsed: Vec<CommitKey>,
    /// What could not be renewed.
    pub failed: Vec<TierError>,
}

impl<I: TierIo> Tier<I> {
    /// Says that a commit is in use here, and what it needs. First the lease, then the record: look
    /// at the objects only afterwards.
    pub fn lease(&self, record: &Record) -> Result<Lease<I>, TierError> {
        self.lease_for(record, Purpose::Mount)
    }

    /// The same for a purpose: a fill ends with its process, a mount may not.
    pub fn lease_for(&self, record: &Record, purpose: Purpose) -> Result<Lease<I>, TierError> {
        let core = &self.core;
        let id = core.nonce();
        let state = LeaseState { record: record.clone(), purpose };
        core.state.lock().leases.insert(id, state.clone());
        let lease = Lease { tier: self.clone(), id, key: record.key, released: false };
        core.renew(&id, &state)?;
        core.state.lock().promises += 1;
        core.write_use(&record.key)?;
        Ok(lease)
    }

    /// Says that a commit is cached and used now, without mounting it: its time to live starts.
    pub fn add_record(&self, record: &Record) -> Result<(), TierError> {
        self.core.ensure_record(record)?;
        self.core.write_use(&record.key)?;
        // Whoever removes a commit may have taken the record between the two.
        self.core.ensure_record(record)?;
        self.core.state.lock().promises += 1;
        Ok(())
    }

    /// Notes that a commit was read; written down by the next heartbeat.
    pub fn touch(&self, key: &CommitKey) {
        self.core.state.lock().used.insert(*key);
    }

    /// Renews every lease and claim of this process and writes down what was used. Call it once a
    /// minute, and at once after a suspension.
    pub fn heartbeat(&self) -> Renewed {
        let core = &self.core;
        let (leases, used, claims) = {
            let mut state = core.state.lock();
            let used = std::mem::take(&mut state.used);
            (state.leases.clone(), used, state.claims.clone())
        };
        let mut renewed = Renewed::default();
        if let Err(error) = core.now_ms() {
            renewed.failed.push(error);
        }
        let mut written: Vec<CommitKey> = Vec::new();
        for (id, lease) in leases {
            match core.renew(&id, &lease) {
                Ok(true) => renewed.held += 1,
                Ok(false) => {
                    core.state.lock().promises += 1;
                    renewed.lapsed.push(lease.record.key);
                }
                Err(error) => renewed.failed.push(error),
            }
            if !written.contains(&lease.record.key) {
                written.push(lease.record.key);
            }
            // A release that came between our look and our write must win.
            if !core.state.lock().leases.contains_key(&id) {
                let _ = core.remove(&layout::lease(&lease.record.key, &core.node, &id));
            }
        }
        written.extend(used.into_iter().filter(|key| !written.contains(key)).collect::<Vec<_>>());
        for key in written {
            if let Err(error) = core.write_use(&key) {
                renewed.failed.push(error);
            }
        }
        for path in claims {
            match core.renew_turn(&path) {
                Ok(true) => {}
                Ok(false) => {
                    core.state.lock().claims.remove(&path);
                }
                Err(error) => renewed.failed.push(error),
            }
        }
        renewed
    }

    /// Lists the placements of a commit that have a record here.
    pub fn records(&self, key: &CommitKey) -> Result<Vec<Record>, TierError> {
        let mut records = Vec::new();
        for placement in self.core.record_names(key)? {
            let path = layout::record(key, &placement);
            if let Some(bytes) = self.core.read_small(&path)?
                && let Ok(record) = Record::decode(&bytes)
            {
                records.push(record);
            }
        }
        Ok(records)
    }

    /// Keeps a commit until `unkeep`: it does not age out and is not evicted.
    pub fn keep(&self, key: &CommitKey) -> Result<(), TierError> {
        let core = &self.core;
        if core.record_names(key)?.is_empty() {
            return Err(TierError::NotCached { commit: key.commit });
        }
        core.write_new(&layout::keep(key), &node_note(&core.node, core.clock.wall_ms()))?;
        // An eviction that was ahead of us has taken the record away and looks for keeps again.
        if core.record_names(key)?.is_empty() {
            core.remove(&layout::keep(key))?;
            return Err(TierError::NotCached { commit: key.commit });
        }
        Ok(())
    }

    /// Lets a commit age out again; its time to live starts now.
    pub fn unkeep(&self, key: &CommitKey) -> Result<(), TierError> {
        if self.core.remove(&layout::keep(key))? {
            self.core.write_use(key)?;
        }
        Ok(())
    }

    /// Says whether a commit is kept.
    pub fn is_kept(&self, key: &CommitKey) -> Result<bool, TierError> {
        Ok(self.core.look(&layout::keep(key))?.is_some())
    }

    /// Sets a commit's own time to live; None: what its dataset or the tier has.
    pub fn set_ttl(&self, key: &CommitKey, ttl_ms: Option<u64>) -> Result<(), TierError> {
        self.core.write_ttl(&layout::commit_ttl(key), ttl_ms)
    }

    /// Gives a commit's own time to live, where it has one.
    pub fn own_ttl(&self, key: &CommitKey) -> Result<Option<u64>, TierError> {
        self.core.read_ttl(&layout::commit_ttl(key))
    }

    /// Says whether a commit has a record here and is not about to leave with its last user.
    pub fn is_cached(&self, key: &CommitKey) -> Result<bool, TierError> {
        Ok(!self.core.record_names(key)?.is_empty() && self.own_ttl(key)? != Some(0))
    }

    /// Lets a commit go without disturbing who uses it: at once where nobody does, else with its last
    /// user. None: it leaves later; else the bytes that left.
    pub fn let_go(&self, key: &CommitKey) -> Result<Option<u64>, TierError> {
        self.unkeep(key)?;
        match self.uncache(key) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(TierError::NotCached { .. }) => Ok(Some(0)),
            Err(TierError::Busy { .. }) => {
                self.set_ttl(key, Some(0))?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Sets the time to live of every commit of a dataset that has none of its own.
    pub fn set_dataset_ttl(&self, lake: &LakeId, dataset: &str, ttl_ms: Option<u64>) -> Result<(), TierError> {
        self.core.write_ttl(&layout::dataset_ttl(lake, dataset)?, ttl_ms)
    }
}

impl<I: TierIo> Core<I> {
    /// Lease first, then record. True: both were there.
    fn renew(&self, id: &Uuid, lease: &LeaseState) -> Result<bool, TierError> {
        let record = &lease.record;
        let path = layout::lease(&record.key, &self.node, id);
        let mut there = true;
        match self.io.touch(&path).map_err(|e| TierError::io("touch", &path, e)) {
            Ok(_) => {}
            Err(error) if error.is_gone() => {
                there = false;
                self.write_new(&path, &self.lease_note(lease.purpose))?;
            }
            Err(error) => return Err(error),
        }
        there &= self.ensure_record(record)?;
        Ok(there)
    }

    fn lease_note(&self, purpose: Purpose) -> Vec<u8> {
        let note = Note {
            format: 1,
            node: self.node,
            host: host(),
            time_ms: self.clock.wall_ms(),
            instance: Some(self.instance),
            purpose: Some(purpose),
        };
        serde_json::to_vec(&note).expect("a note has only plain fields")
    }

    /// Says whether a lease of this node ended with the process that wrote it.
    pub(super) fn is_void(&self, path: &str, id: &Uuid) -> Result<bool, TierError> {
        let (fate, purpose) = self.fate_of_lease(path, id)?;
        Ok(purpose.ends_with(fate))
    }

    /// Says whether the process that wrote a lease of this node is gone.
    pub(super) fn has_ended(&self, path: &str, id: &Uuid) -> Result<bool, TierError> {
        Ok(self.fate_of_lease(path, id)?.0 != Fate::Unknown)
    }

    fn fate_of_lease(&self, path: &str, id: &Uuid) -> Result<(Fate, Purpose), TierError> {
        if self.state.lock().leases.contains_key(id) {
            return Ok((Fate::Unknown, Purpose::default()));
        }
        match self.read_json::<Note>(path) {
            Ok(Some(note)) => {
                let fate = note.instance.map_or(Fate::Unknown, |instance| self.siblings.fate(&instance));
                Ok((fate, note.purpose.unwrap_or_default()))
            }
            Ok(None) | Err(TierError::BadFile { .. }) => Ok((Fate::Unknown, Purpose::default())),
            Err(error) => Err(error),
        }
    }

    /// Writes the record unless it is there. True: it was.
    fn ensure_record(&self, record: &Record) -> Result<bool, TierError> {
        let path = record.path();
        if self.look(&path)?.is_some() {
            return Ok(true);
        }
        self.write_new(&path, &record.encode(self.clock.wall_ms())).map(|new| !new)
    }

    /// Reads a record; they never change, so once. None: it is gone, or damaged.
    pub(super) fn known_record(&self, path: &str) -> Result<Option<Arc<Record>>, TierError> {
        if let Some(record) = self.state.lock().records.get(path) {
            return Ok(Some(Arc::clone(record)));
        }
        let Some(bytes) = self.read_small(path)? else {
            return Ok(None);
        };
        let Ok(record) = Record::decode(&bytes) else {
            return Ok(None);
        };
        let record = Arc::new(record);
        self.state.lock().records.insert(path.to_owned(), Arc::clone(&record));
        Ok(Some(record))
    }

    /// Reads a commit's records again next time.
    pub(super) fn forget_records(&self, key: &CommitKey) {
        let dir = format!("{}/", layout::commit_dir(key));
        self.state.lock().records.retain(|path, _| !path.starts_with(&dir));
    }

    /// Writes down that a commit was used: the file's time counts, its text is for people.
    fn write_use(&self, key: &CommitKey) -> Result<(), TierError> {
        let path = layout::use_file(key, &self.node);
        match self.io.touch(&path).map_err(|e| TierError::io("touch", &path, e)) {
            Err(error) if error.is_gone() => self.replace(&path, &node_note(&self.node, self.clock.wall_ms())),
            other => other.map(drop),
        }
    }

    fn write_ttl(&self, path: &str, ttl_ms: Option<u64>) -> Result<(), TierError> {
        match ttl_ms {
            Some(ttl_ms) => {
                let text = TtlText { format: 1, ttl_ms };
                self.replace(path, &serde_json::to_vec(&text).expect("a number"))
            }
            None => self.remove(path).map(drop),
        }
    }

    /// Reads a time to live; a damaged one counts as none.
    pub(super) fn read_ttl(&self, path: &str) -> Result<Option<u64>, TierError> {
        match self.read_json::<TtlText>(path) {
            Ok(found) => Ok(found.map(|text| text.ttl_ms)),
            Err(TierError::BadFile { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Which placements of a commit have a record, as the server has it now.
    pub(super) fn record_names(&self, key: &CommitKey) -> Result<Vec<PlacementId>, TierError> {
        let dir = layout::commit_dir(key);
        let names = self.list(&dir)?.unwrap_or_default();
        Ok(names.iter().filter_map(|listed| layout::parse_record(&listed.name)).collect())
    }
}

impl<I: TierIo> Lease<I> {
    /// Gives the commit.
    pub fn key(&self) -> &CommitKey {
        &self.key
    }

    /// Ends the lease: the commit's time to live starts.
    pub fn release(mut self) -> Result<(), TierError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), TierError> {
        self.released = true;
        let core = &self.tier.core;
        core.state.lock().leases.remove(&self.id);
        // The use first: without it the commit would look unused since its mount.
        let used = core.write_use(&self.key);
        core.remove(&layout::lease(&self.key, &core.node, &self.id))?;
        used
    }
}

impl<I: TierIo> Drop for Lease<I> {
    fn drop(&mut self) {
        if !self.released {
            // What cannot be removed now expires.
            let _ = self.end();
        }
    }
}
