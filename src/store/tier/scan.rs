//! A snapshot of everything that lies in the tier: what accounting and the steward's plan go by.
//!
//! A scan is not atomic: others go on. Whoever acts on it looks again before and after each step.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::ids::{NodeId, PackId};
use crate::format::placement::PackUse;
use crate::store::tier::error::TierError;
use crate::store::tier::io::{Space, Stat, TierIo};
use crate::store::tier::layout::{
    self, CommitKey, ObjectName, Sidecar, StagingName, parse_object, parse_trashed_record,
};
use crate::store::tier::objects::{FileIdentity, QuarantineReport};
use crate::store::tier::plan::protection;
use crate::store::tier::records::Record;
use crate::store::tier::stage::Generation;
use crate::store::tier::stall::Stall;
use crate::store::tier::{Core, Tier, holds};
use crate::store::usage::{CommitFacts, TierFacts, TierUsage, account};

/// Everything that lies in a tier. Times are milliseconds of the server's clock.
#[derive(Debug, Clone, Default)]
pub struct Scan {
    pub now_ms: i64,
    pub space: Space,
    pub commits: Vec<CommitScan>,
    pub objects: BTreeMap<PackId, ObjectScan>,
    /// Sidecars that are there, with or without their pack.
    pub sidecars: BTreeSet<(PackId, Sidecar)>,
    /// Sidecars without their pack.
    pub loose: Vec<LooseScan>,
    pub staging: Vec<StagingScan>,
    pub trash: Vec<BatchScan>,
    pub quarantine: Vec<QuarantineScan>,
    pub holds: Vec<HoldScan>,
    pub temp: Vec<FileScan>,
    /// Names that are not ours, or that nobody can parse.
    pub strangers: Vec<String>,
    /// Whether the steward found that evictions free nothing.
    pub stall: Stall,
    /// What published objects and sidecars take on the medium: less than their sizes where it compresses.
    objects_medium_bytes: u64,
    /// Files that were counted: one with several names counts once.
    seen: BTreeSet<u64>,
}

/// A cached commit.
#[derive(Debug, Clone)]
pub struct CommitScan {
    pub key: CommitKey,
    /// One for each placement.
    pub records: Vec<Record>,
    /// Records that cannot be parsed.
    pub damaged: Vec<String>,
    pub last_use_ms: i64,
    pub leases: Vec<LeaseScan>,
    pub kept: bool,
    pub held: bool,
    pub ttl_ms: u64,
}

/// A lease of a commit.
#[derive(Debug, Clone)]
pub struct LeaseScan {
    pub path: String,
    pub stat: Stat,
    /// None: a name that is no lease's.
    pub node: Option<NodeId>,
    /// Renewed lately, and not of a process that provably ended.
    pub live: bool,
}

/// A published object.
#[derive(Debug, Clone, Copy)]
pub struct ObjectScan {
    pub identity: FileIdentity,
    pub len: u64,
    pub sidecar_bytes: u64,
    pub has_index: bool,
}

/// A sidecar without its pack.
#[derive(Debug, Clone)]
pub struct LooseScan {
    pub pack: PackId,
    pub part: Sidecar,
    pub bytes: u64,
    pub age_ms: i64,
}

/// A pack that arrives.
#[derive(Debug, Clone)]
pub struct StagingScan {
    pub name: String,
    pub pack: Option<PackId>,
    /// Bytes on the medium, without those that an object has as well.
    pub bytes: u64,
    /// What it will be when all has arrived; 0: unknown.
    pub len_bytes: u64,
    /// There was room for it: its data file has its full length.
    pub accepted: bool,
    /// Bytes of spans that are done.
    pub done_bytes: u64,
    pub live_claims: usize,
    /// Since the last write, mark or claim.
    pub idle_ms: i64,
    /// File ids, and bytes on the medium.
    files: Vec<(u64, u64)>,
}

/// What one eviction moved away.
#[derive(Debug, Clone)]
pub struct BatchScan {
    pub name: String,
    /// Since the last thing was moved in or out.
    pub age_ms: i64,
    pub items: Vec<TrashItem>,
}

/// One thing in the trash.
#[derive(Debug, Clone)]
pub struct TrashItem {
    pub name: String,
    pub is_dir: bool,
    pub bytes: u64,
}

/// A damaged object that was set aside, or its report, or a claim.
#[derive(Debug, Clone)]
pub struct QuarantineScan {
    pub name: String,
    pub bytes: u64,
    pub age_ms: i64,
    /// It is not the file that its report means: a good one was moved away by mistake.
    pub innocent: Option<PackId>,
}

/// A hold.
#[derive(Debug, Clone)]
pub struct HoldScan {
    pub node: String,
    pub mount: String,
    pub key: Option<CommitKey>,
    /// Bytes that only the hold keeps.
    pub only_bytes: u64,
    pub packs: u64,
}

/// A temporary file.
#[derive(Debug, Clone)]
pub struct FileScan {
    pub name: String,
    pub bytes: u64,
    pub age_ms: i64,
}

impl<I: TierIo> Tier<I> {
    /// Looks at everything.
    pub fn scan(&self) -> Result<Scan, TierError> {
        self.core.scan()
    }

    /// Sums up what the tier holds, exactly: by a scan.
    pub fn usage(&self) -> Result<TierUsage, TierError> {
        let scan = self.scan()?;
        Ok(account(&scan.facts(self.configured_capacity_bytes())))
    }
}

impl CommitScan {
    /// All packs that the records name, each once.
    pub fn packs(&self) -> Vec<PackUse> {
        let mut packs: BTreeMap<PackId, PackUse> = BTreeMap::new();
        for used in self.records.iter().flat_map(|record| &record.packs) {
            packs.entry(used.pack).or_insert(*used);
        }
        packs.into_values().collect()
    }

    /// Counts live leases.
    pub fn live_leases(&self) -> usize {
        self.leases.iter().filter(|lease| lease.live).count()
    }

    /// The dataset that its first record names.
    pub fn dataset(&self) -> &str {
        self.records.first().map_or("", |record| &record.dataset)
    }
}

impl StagingScan {
    /// Bytes that have not arrived yet.
    pub(super) fn coming_bytes(&self) -> u64 {
        self.len_bytes.saturating_sub(self.bytes)
    }
}

impl Scan {
    /// Gives the facts that accounting needs.
    pub fn facts(&self, configured_capacity_bytes: Option<u64>) -> TierFacts {
        let commits = self.commits.iter().filter(|commit| !commit.records.is_empty()).map(|commit| {
            let facts = CommitFacts {
                packs: commit.packs(),
                last_use_ms: commit.last_use_ms,
                ttl_ms: commit.ttl_ms,
                kept: commit.kept,
                held: commit.held,
                mounts: commit.live_leases(),
            };
            ((commit.key.lake, commit.key.commit, commit.dataset().to_owned()), facts)
        });
        let staged = self.staging.iter().filter_map(|s| Some((s.pack?, s.done_bytes)));
        TierFacts {
            commits: commits.collect(),
            objects: self.objects.iter().map(|(pack, o)| (*pack, o.len + o.sidecar_bytes)).collect(),
            staged: staged.collect(),
            loose_bytes: self.loose.iter().map(|l| l.bytes).sum(),
            staging_bytes: self.staging.iter().map(|s| s.bytes).sum(),
            trash_bytes: self.trash.iter().flat_map(|b| &b.items).map(|item| item.bytes).sum(),
            quarantine_bytes: self.quarantine.iter().map(|q| q.bytes).sum(),
            held_only_bytes: self.holds.iter().map(|h| h.only_bytes).sum(),
            temp_bytes: self.temp.iter().map(|t| t.bytes).sum(),
            configured_capacity_bytes,
            fs_free_bytes: self.space.free_bytes,
            evictions_free_nothing: self.stall == Stall::Found,
            now_ms: self.now_ms,
        }
    }

    /// What everything in the tier takes together.
    pub(super) fn on_medium_bytes(&self) -> u64 {
        let facts = self.facts(None);
        let others = [facts.staging_bytes, facts.trash_bytes, facts.quarantine_bytes];
        let held = [facts.held_only_bytes, facts.temp_bytes];
        self.objects_medium_bytes + others.iter().chain(&held).sum::<u64>()
    }

    /// What a file takes, unless it was counted under another name.
    fn weigh(&mut self, stat: Stat) -> u64 {
        if self.seen.insert(stat.file_id) { stat.on_medium() } else { 0 }
    }

    /// Says whether what has this name in the trash is needed: a record names it, or a lease, keep or
    /// hold protects its commit, and it is not there again.
    pub(super) fn is_needed(&self, name: &str, referenced: &BTreeSet<PackId>) -> bool {
        match (parse_object(name), parse_trashed_record(name)) {
            (Some(ObjectName::Pack(pack)), _) => referenced.contains(&pack) && !self.objects.contains_key(&pack),
            (Some(ObjectName::Sidecar(pack, part)), _) => {
                referenced.contains(&pack) && !self.sidecars.contains(&(pack, part))
            }
            (None, Some((key, placement))) => self.commits.iter().any(|commit| {
                let there = commit.records.iter().any(|record| record.placement == placement);
                commit.key == key && protection(commit).is_some() && !there
            }),
            (None, None) => false,
        }
    }

    /// Packs that a record names.
    pub fn referenced(&self) -> BTreeSet<PackId> {
        self.commits.iter().flat_map(|c| &c.records).flat_map(|r| &r.packs).map(|p| p.pack).collect()
    }
}

impl<I: TierIo> Core<I> {
    pub(super) fn scan(&self) -> Result<Scan, TierError> {
        self.scan_with(false)
    }

    /// The same, and believes nothing that was seen before.
    pub(super) fn scan_afresh(&self) -> Result<Scan, TierError> {
        self.scan_with(true)
    }

    fn scan_with(&self, fresh: bool) -> Result<Scan, TierError> {
        let now_ms = self.now_ms()?;
        let mut scan = Scan { now_ms, ..Scan::default() };
        scan.space = self.io.space().map_err(|e| TierError::io("measure", ".", e))?;
        scan.stall = self.stall(now_ms)?;
        // In the direction in which things move, so that nothing is missed; what is seen under two
        // names counts once.
        self.scan_staging(&mut scan)?;
        self.scan_objects(&mut scan, fresh)?;
        for staging in &mut scan.staging {
            let new = staging.files.iter().filter(|(id, _)| scan.seen.insert(*id));
            staging.bytes = new.map(|(_, bytes)| bytes).sum();
        }
        self.scan_holds(&mut scan)?;
        self.scan_commits(&mut scan, fresh)?;
        self.scan_trash(&mut scan)?;
        self.scan_quarantine(&mut scan)?;
        for listed in self.list(layout::TEMP)?.unwrap_or_default() {
            let path = format!("{}/{}", layout::TEMP, listed.name);
            if let Some(stat) = self.peek(&path)? {
                let age_ms = now_ms - stat.mtime_ms();
                let bytes = scan.weigh(stat);
                scan.temp.push(FileScan { name: listed.name, bytes, age_ms });
            }
        }
        self.scan_strangers(&mut scan)?;
        Ok(scan)
    }

    fn scan_objects(&self, scan: &mut Scan, fresh: bool) -> Result<(), TierError> {
        let mut sidecars = Vec::new();
        for fan in 0..=255u8 {
            let found = self.fan(fan, scan.now_ms, fresh)?;
            scan.strangers.extend(found.strangers.iter().cloned());
            for (name, stat) in &found.objects {
                scan.objects_medium_bytes += scan.weigh(*stat);
                match *name {
                    ObjectName::Pack(pack) => {
                        let (len, identity) = (stat.size_bytes, (*stat).into());
                        scan.objects.insert(pack, ObjectScan { identity, len, sidecar_bytes: 0, has_index: false });
                    }
                    ObjectName::Sidecar(pack, part) => sidecars.push((pack, part, *stat)),
                }
            }
        }
        for (pack, part, stat) in sidecars {
            scan.sidecars.insert((pack, part));
            match scan.objects.get_mut(&pack) {
                Some(object) => {
                    object.sidecar_bytes += stat.size_bytes;
                    object.has_index |= part == Sidecar::Index;
                }
                None => {
                    let age_ms = scan.now_ms - stat.mtime_ms();
                    scan.loose.push(LooseScan { pack, part, bytes: stat.size_bytes, age_ms });
                }
            }
        }
        Ok(())
    }

    fn scan_staging(&self, scan: &mut Scan) -> Result<(), TierError> {
        for listed in self.list(layout::STAGING)?.unwrap_or_default() {
            let pack = listed.name.parse::<PackId>().ok();
            let dir = format!("{}/{}", layout::STAGING, listed.name);
            if pack.is_none() || !listed.is_dir {
                scan.strangers.push(dir);
                continue;
            }
            if let Some(found) = self.scan_one_staging(&dir, pack, scan.now_ms)? {
                scan.staging.push(found);
            }
        }
        Ok(())
    }

    fn scan_one_staging(&self, dir: &str, pack: Option<PackId>, now_ms: i64) -> Result<Option<StagingScan>, TierError> {
        let Some(folder) = self.look(dir)? else {
            return Ok(None);
        };
        let current = self.read_json::<Generation>(&layout::generation(dir)).ok().flatten();
        let name = layout::file_name(dir).to_owned();
        let mut found = StagingScan {
            name,
            pack,
            bytes: 0,
            len_bytes: current.as_ref().map_or(0, |current| current.len_bytes),
            accepted: false,
            done_bytes: 0,
            live_claims: 0,
            idle_ms: now_ms - folder.mtime_ms(),
            files: Vec::new(),
        };
        for listed in self.list(dir)?.unwrap_or_default() {
            let path = format!("{dir}/{}", listed.name);
            let Some(stat) = self.peek(&path)? else {
                continue;
            };
            let idle_ms = now_ms - stat.mtime_ms();
            found.idle_ms = found.idle_ms.min(idle_ms);
            found.files.push((stat.file_id, stat.on_medium()));
            match layout::parse_staging(&listed.name) {
                Some(StagingName::Claim(..)) if idle_ms <= signed(self.cfg.claim_ttl_ms) => found.live_claims += 1,
                Some(StagingName::Done(span, of)) => {
                    if let Some(current) = current.as_ref().filter(|c| c.generation == of) {
                        let range = current.span_range(span);
                        found.done_bytes += range.end - range.start;
                    }
                }
                Some(StagingName::Data(of)) => {
                    let is_current = current.as_ref().is_some_and(|current| current.generation == of);
                    found.accepted |= is_current && stat.size_bytes >= found.len_bytes;
                }
                _ => {}
            }
        }
        Ok(Some(found))
    }

    fn scan_holds(&self, scan: &mut Scan) -> Result<(), TierError> {
        for node in self.list(layout::HOLDS)?.unwrap_or_default() {
            let node_dir = format!("{}/{}", layout::HOLDS, node.name);
            for mount in self.list(&node_dir)?.unwrap_or_default() {
                let dir = format!("{node_dir}/{}", mount.name);
                let text = self.read_json::<holds::HoldText>(&format!("{dir}/hold")).ok().flatten();
                let (node, mount) = (node.name.clone(), mount.name);
                let mut found = HoldScan { node, mount, key: text.map(|t| t.key), only_bytes: 0, packs: 0 };
                for listed in self.list(&dir)?.unwrap_or_default() {
                    let Ok(_) = listed.name.parse::<PackId>() else {
                        continue;
                    };
                    let Some(stat) = self.peek(&format!("{dir}/{}", listed.name))? else {
                        continue;
                    };
                    found.packs += 1;
                    if scan.seen.insert(stat.file_id) {
                        found.only_bytes += stat.size_bytes;
                    }
                }
                scan.holds.push(found);
            }
        }
        Ok(())
    }

    /// Lists the commits that have a folder.
    pub(super) fn commit_keys(&self) -> Result<Vec<CommitKey>, TierError> {
        let mut keys = Vec::new();
        for lake in self.list(layout::COMMITS)?.unwrap_or_default() {
            let Ok(lake_id) = lake.name.parse() else {
                continue;
            };
            for commit in self.list(&format!("{}/{}", layout::COMMITS, lake.name))?.unwrap_or_default() {
                if let Ok(commit) = commit.name.parse() {
                    keys.push(CommitKey { lake: lake_id, commit });
                }
            }
        }
        Ok(keys)
    }

    /// Which commits have a hold, as the server has it now.
    pub(super) fn held_keys(&self) -> Result<BTreeSet<CommitKey>, TierError> {
        let mut keys = BTreeSet::new();
        for node in self.list(layout::HOLDS)?.unwrap_or_default() {
            let node = format!("{}/{}", layout::HOLDS, node.name);
            for mount in self.list(&node)?.unwrap_or_default() {
                let path = format!("{node}/{}/hold", mount.name);
                // Read as the server has it: this protects.
                let _ = self.io.refresh(layout::parent(&path));
                match self.read_json::<holds::HoldText>(&path) {
                    Ok(text) => keys.extend(text.map(|text| text.key)),
                    Err(TierError::BadFile { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(keys)
    }

    fn scan_commits(&self, scan: &mut Scan, fresh: bool) -> Result<(), TierError> {
        let held: BTreeSet<CommitKey> = scan.holds.iter().filter_map(|hold| hold.key).collect();
        for key in self.commit_keys()? {
            if fresh {
                self.forget_records(&key);
            }
            if let Some(mut commit) = self.scan_commit(&key, scan.now_ms)? {
                commit.held = held.contains(&key);
                scan.commits.push(commit);
            }
        }
        Ok(())
    }

    /// Looks at one commit; None where it has no folder. Holds are not looked at.
    pub(super) fn scan_commit(&self, key: &CommitKey, now_ms: i64) -> Result<Option<CommitScan>, TierError> {
        let dir = layout::commit_dir(key);
        self.refresh(&dir);
        let Some(names) = self.list(&dir)? else {
            return Ok(None);
        };
        let mut commit = CommitScan {
            key: *key,
            records: Vec::new(),
            damaged: Vec::new(),
            last_use_ms: i64::MIN,
            leases: Vec::new(),
            kept: false,
            held: false,
            ttl_ms: self.cfg.ttl_ms.or(self.marker.ttl_ms).unwrap_or(super::TTL_DEFAULT_MS),
        };
        for listed in &names {
            let path = format!("{dir}/{}", listed.name);
            commit.kept |= listed.name == "keep";
            if layout::parse_record(&listed.name).is_none() {
                continue;
            }
            let Some(stat) = self.peek(&path)? else {
                continue;
            };
            commit.last_use_ms = commit.last_use_ms.max(stat.mtime_ms());
            match self.known_record(&path)? {
                Some(record) if record.key == *key => commit.records.push(Record::clone(&record)),
                Some(_) => commit.damaged.push(path),
                None if self.look(&path)?.is_some() => commit.damaged.push(path),
                // Moved away since it was listed.
                None => {}
            }
        }
        self.scan_uses(&mut commit, now_ms)?;
        if let Some(ttl_ms) = self.ttl_of(&commit)? {
            commit.ttl_ms = ttl_ms;
        }
        Ok(Some(commit))
    }

    fn scan_uses(&self, commit: &mut CommitScan, now_ms: i64) -> Result<(), TierError> {
        let uses = layout::uses_dir(&commit.key);
        for listed in self.list(&uses)?.unwrap_or_default() {
            if let Some(stat) = self.peek(&format!("{uses}/{}", listed.name))? {
                commit.last_use_ms = commit.last_use_ms.max(stat.mtime_ms());
            }
        }
        let leases = layout::leases_dir(&commit.key);
        for listed in self.list(&leases)?.unwrap_or_default() {
            let path = format!("{leases}/{}", listed.name);
            if let Some(stat) = self.peek(&path)? {
                commit.last_use_ms = commit.last_use_ms.max(stat.mtime_ms());
                let owner = layout::parse_lease(&listed.name);
                let mut live = now_ms - stat.mtime_ms() <= signed(self.cfg.lease_ttl_ms);
                if let Some((_, id)) = owner.filter(|(node, _)| live && *node == self.node) {
                    live = !self.is_void(&path, &id)?;
                }
                commit.leases.push(LeaseScan { path, stat, node: owner.map(|(node, _)| node), live });
            }
        }
        Ok(())
    }

    fn ttl_of(&self, commit: &CommitScan) -> Result<Option<u64>, TierError> {
        if let Some(ttl) = self.read_ttl(&layout::commit_ttl(&commit.key))? {
            return Ok(Some(ttl));
        }
        match layout::dataset_ttl(&commit.key.lake, commit.dataset()) {
            Ok(path) => self.read_ttl(&path),
            Err(_) => Ok(None),
        }
    }

    fn scan_trash(&self, scan: &mut Scan) -> Result<(), TierError> {
        for batch in self.list(layout::TRASH)?.unwrap_or_default() {
            let dir = format!("{}/{}", layout::TRASH, batch.name);
            let Some(stat) = self.peek(&dir)? else {
                continue;
            };
            let mut items = Vec::new();
            for listed in self.in_order_of_return(&dir)? {
                let bytes = self.bytes_below(&format!("{dir}/{}", listed.name), listed.is_dir, &mut scan.seen)?;
                items.push(TrashItem { name: listed.name, is_dir: listed.is_dir, bytes });
            }
            scan.trash.push(BatchScan { name: batch.name, age_ms: scan.now_ms - stat.mtime_ms(), items });
        }
        Ok(())
    }

    /// Sums up a file, or a folder of files, without what was seen already.
    pub(super) fn bytes_below(&self, path: &str, is_dir: bool, seen: &mut BTreeSet<u64>) -> Result<u64, TierError> {
        let mut paths = vec![path.to_owned()];
        if is_dir {
            let names = self.list(path)?.unwrap_or_default();
            paths = names.into_iter().map(|listed| format!("{path}/{}", listed.name)).collect();
        }
        let mut sum = 0;
        for path in paths {
            if let Some(stat) = self.peek(&path)?.filter(|stat| seen.insert(stat.file_id)) {
                sum += stat.on_medium();
            }
        }
        Ok(sum)
    }

    fn scan_quarantine(&self, scan: &mut Scan) -> Result<(), TierError> {
        let dir = layout::QUARANTINE;
        for listed in self.list(dir)?.unwrap_or_default() {
            let path = format!("{dir}/{}", listed.name);
            let Some(stat) = self.peek(&path)? else {
                continue;
            };
            let mut found = QuarantineScan {
                bytes: scan.weigh(stat),
                age_ms: scan.now_ms - stat.mtime_ms(),
                innocent: None,
                name: listed.name,
            };
            let report = format!("{path}.json");
            if !found.name.ends_with(".json")
                && !found.name.ends_with(".claim")
                && let Some(report) = self.read_json::<QuarantineReport>(&report).ok().flatten()
            {
                // The object's own age says nothing: the report is from when it was set aside.
                found.age_ms = self.look(&format!("{path}.json"))?.map_or(found.age_ms, |s| scan.now_ms - s.mtime_ms());
                found.innocent = (report.identity.file_id != stat.file_id).then_some(report.pack);
            }
            scan.quarantine.push(found);
        }
        Ok(())
    }

    fn scan_strangers(&self, scan: &mut Scan) -> Result<(), TierError> {
        for listed in self.list("")?.unwrap_or_default() {
            let ours = layout::FOLDERS.contains(&listed.name.as_str())
                || matches!(listed.name.as_str(), layout::MARKER | layout::PEER_KEY | "lost+found");
            if !ours {
                scan.strangers.push(listed.name);
            }
        }
        for listed in self.list(layout::NODES)?.unwrap_or_default() {
            if listed.name.parse::<NodeId>().is_err() {
                scan.strangers.push(format!("{}/{}", layout::NODES, listed.name));
            }
        }
        Ok(())
    }
}

pub(super) fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}
