//! Doing what the plan says: moving away, looking again, putting back, deleting later.
//!
//! Evicting a commit, step by step (`docs/formats/tier.md` has what a crash leaves after each):
//! 1. its records are renamed into a new batch of the trash;
//! 2. leases, keeps, holds and uses are looked at again: if there is one now, the records go back;
//! 3. its objects that no record names are renamed into the batch;
//! 4. the records of all commits are looked at again: an object that one names now goes back;
//! 5. sidecars follow their packs, leftovers of the commit's folder are removed;
//! 6. after the grace time the batch is looked at once more, and deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::format::ids::{NodeId, PackId};
use crate::store::tier::error::TierError;
use crate::store::tier::io::{Listed, TierIo};
use crate::store::tier::layout::{self, CommitKey, ObjectName, Sidecar, parse_object, parse_trashed_record};
use crate::store::tier::plan::{Decision, Policy, Reason, SweepPlan, Verdict, plan, protection};
use crate::store::tier::records::Record;
use crate::store::tier::scan::{CommitScan, Scan};
use crate::store::tier::turns::Turn;
use crate::store::tier::{Core, Tier};

/// Objects are moved, and the records looked at again, so many at a time.
const MOVED_AT_ONCE: usize = 64;

/// What one sweep did.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct StewardReport {
    /// Another process is sweeping: nothing was done.
    pub elsewhere: bool,
    /// Who, where another is at it.
    pub steward: Option<Steward>,
    pub decisions: Vec<Decision>,
    /// Commits that left.
    pub evicted: u64,
    /// Bytes moved into the trash by this sweep.
    pub moved_bytes: u64,
    /// Bytes deleted from the trash for good.
    pub deleted_bytes: u64,
    /// Things put back: they turned out to be needed.
    pub restored: u64,
    pub orphans: u64,
    pub staging_given_up: u64,
    /// Deleting so much freed nothing on the file system: evictions for room are suspended for an hour.
    pub freed_nothing_bytes: Option<u64>,
    /// What could not be done, in words; the next sweep tries again.
    pub failed: Vec<String>,
}

/// Who is sweeping.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Steward {
    pub node: NodeId,
    pub host: Option<String>,
    /// Since it last said that it is at it.
    pub idle_ms: i64,
}

/// What came of evicting one commit.
#[derive(Debug)]
pub(super) enum Evicted {
    Left { bytes: u64 },
    Stayed(Reason),
    NotThere,
}

impl<I: TierIo> Tier<I> {
    /// Says how this node's configuration wants the tier swept.
    pub fn policy(&self) -> Policy {
        Policy::new(&self.core.cfg, self.configured_capacity_bytes())
    }

    /// Decides and writes nothing: what a sweep would do now.
    pub fn dry_run(&self, policy: &Policy) -> Result<SweepPlan, TierError> {
        Ok(plan(&self.core.scan()?, policy))
    }

    /// One sweep, unless another process is at it.
    pub fn steward_step(&self, policy: &Policy) -> Result<StewardReport, TierError> {
        let core = &self.core;
        match core.take_turn(layout::STEWARD_LEASE, core.cfg.claim_ttl_ms) {
            Ok(Turn::Mine { .. }) => {}
            Ok(Turn::Other { owner, idle_ms }) => {
                let steward = Some(Steward { node: owner.node, host: owner.host, idle_ms });
                return Ok(StewardReport { elsewhere: true, steward, ..StewardReport::default() });
            }
            // On a full medium nobody can take a turn, and sweeping is what helps.
            Err(error) if error.is_full() => {}
            Err(error) => return Err(error),
        }
        let report = core.scan().map(|mut scan| {
            let judged = core.judge_suspicion(&mut scan);
            let mut report = core.carry_out(&scan, plan(&scan, policy));
            report.freed_nothing_bytes = note(&mut report, judged).flatten();
            report
        });
        core.give_turn(layout::STEWARD_LEASE)?;
        report
    }

    /// Removes a commit now, if it is not mounted, kept or held. Its objects are in the trash then,
    /// and deleted after the grace time. Gives the bytes moved.
    pub fn uncache(&self, key: &CommitKey) -> Result<u64, TierError> {
        let core = &self.core;
        let now_ms = core.now_ms()?;
        let Some(commit) = core.scan_commit(key, now_ms)? else {
            return Err(TierError::NotCached { commit: key.commit });
        };
        let decision = Decision {
            key: *key,
            dataset: commit.dataset().to_owned(),
            verdict: Verdict::Leaves,
            reason: Reason::Uncached,
            last_used_ms: commit.last_use_ms,
            time_ms: now_ms,
        };
        match core.evict(&decision)? {
            Evicted::Left { bytes } => {
                // Only a note: a tier too full to take it has the commit removed all the same.
                let _ = core.remember(std::slice::from_ref(&decision));
                Ok(bytes)
            }
            Evicted::Stayed(reason) => Err(TierError::Busy { commit: key.commit, why: core.refusal(key, &reason) }),
            Evicted::NotThere => Err(TierError::NotCached { commit: key.commit }),
        }
    }
}

impl<I: TierIo> Core<I> {
    /// Makes a batch of the trash. Its age is its folder's modification time.
    pub(super) fn new_batch(&self) -> Result<String, TierError> {
        let dir = format!("{}/{}", layout::TRASH, self.nonce().simple());
        match self.make_dirs(&dir) {
            Ok(()) => Ok(dir),
            Err(error) if error.is_full() => Ok(layout::TRASH_SPILL.to_owned()),
            Err(error) => Err(error),
        }
    }

    pub(super) fn carry_out(&self, scan: &Scan, plan: SweepPlan) -> StewardReport {
        let mut report = StewardReport { decisions: plan.decisions.clone(), ..StewardReport::default() };
        let sum_bytes = self.sum_bytes(scan);
        self.carry_out_restores(scan, &plan, &mut report);
        let mut renewed_ms = self.clock.monotonic_ms();
        for (path, seen) in &plan.expired_leases {
            let taken = self.take_over(path, *seen);
            note(&mut report, taken);
        }
        for (at, decision) in plan.decisions.iter().enumerate() {
            if decision.verdict == Verdict::Leaves {
                self.still_sweeping(&mut renewed_ms);
                let outcome = self.evict(decision);
                record_eviction(&mut report, at, outcome);
            }
        }
        let evicted_bytes = report.moved_bytes;
        self.carry_out_leftovers(&plan, &mut report);
        self.still_sweeping(&mut renewed_ms);
        let free_bytes = self.free_bytes();
        self.delete_trash(&plan.trash, &mut report);
        if let (Some(sum_bytes), Some(free_bytes)) = (sum_bytes, free_bytes) {
            let noted = self.note_deleted(scan.now_ms, sum_bytes, free_bytes, report.deleted_bytes);
            note(&mut report, noted);
        }
        // Only notes: a tier too full to take them is swept all the same.
        let _ = self.note_room(scan, &plan, evicted_bytes);
        let remembered = self.remember(&report.decisions);
        note(&mut report, remembered);
        report
    }

    /// Renews the steward's lease during a long sweep. Who lost it goes on: two do no harm.
    fn still_sweeping(&self, renewed_ms: &mut u64) {
        let now_ms = self.clock.monotonic_ms();
        if now_ms.saturating_sub(*renewed_ms) > self.cfg.claim_ttl_ms / 4 {
            *renewed_ms = now_ms;
            let _ = self.renew_turn(layout::STEWARD_LEASE);
        }
    }

    fn carry_out_restores(&self, scan: &Scan, plan: &SweepPlan, report: &mut StewardReport) {
        let mut records = false;
        for restore in &plan.restore {
            let from = format!("{}/{}/{}", layout::TRASH, restore.batch, restore.name);
            records |= parse_trashed_record(&restore.name).is_some();
            if let Some(to) = restored_path(&restore.name) {
                let done = self.put_back(&from, &to);
                report.restored += u64::from(note(report, done).is_some());
            }
        }
        if records {
            // What these name may be in the trash as well.
            let done = self.restore_named(scan);
            report.restored += note(report, done).unwrap_or(0);
        }
        for (name, pack) in &plan.innocent {
            let from = format!("{}/{name}", layout::QUARANTINE);
            let done = self.put_back(&from, &layout::object(pack)).and_then(|()| self.remove(&format!("{from}.json")));
            report.restored += u64::from(note(report, done).is_some());
        }
    }

    /// Puts back what the records, as they are now, name and objects lack.
    fn restore_named(&self, scan: &Scan) -> Result<u64, TierError> {
        let named = self.referenced_now()?;
        let mut restored = 0;
        for batch in &scan.trash {
            for item in batch.items.iter().filter(|item| scan.is_needed(&item.name, &named)) {
                let from = format!("{}/{}/{}", layout::TRASH, batch.name, item.name);
                // Records were put back before.
                if let Some(object) = parse_object(&item.name)
                    && self.look(&from)?.is_some()
                {
                    self.put_back(&from, &object.path())?;
                    restored += 1;
                }
            }
        }
        Ok(restored)
    }

    fn carry_out_leftovers(&self, plan: &SweepPlan, report: &mut StewardReport) {
        if !plan.orphans.is_empty() || !plan.loose.is_empty() || !plan.staging.is_empty() {
            let cleared = self.new_batch().and_then(|batch| {
                let packs: Vec<PackId> = plan.orphans.clone();
                report.moved_bytes += self.move_objects(&packs, &batch)?;
                for loose in plan.loose.chunk_by(|a, b| a.0 == b.0) {
                    let Some((pack, _)) = loose.first() else { continue };
                    let parts: Vec<Sidecar> = loose.iter().map(|(_, part)| *part).collect();
                    self.move_sidecars(pack, &parts, &batch)?;
                }
                for name in &plan.staging {
                    let dir = format!("{}/{name}", layout::STAGING);
                    self.move_away(&dir, &format!("{batch}/staging.{name}"))?;
                }
                let _ = self.io.rmdir(&batch);
                Ok(())
            });
            if note(report, cleared).is_some() {
                report.orphans += plan.orphans.len() as u64;
                report.staging_given_up += plan.staging.len() as u64;
            }
        }
        for name in &plan.quarantine {
            let removed = self.remove(&format!("{}/{name}", layout::QUARANTINE));
            note(report, removed);
        }
        for name in &plan.temp {
            let removed = self.remove(&format!("{}/{name}", layout::TEMP));
            note(report, removed);
        }
    }

    /// Removes one commit's records and what only it needed.
    pub(super) fn evict(&self, decision: &Decision) -> Result<Evicted, TierError> {
        let key = &decision.key;
        let by_user = decision.reason == Reason::Uncached;
        let Some(before) = self.protected_scan(key)? else {
            return Ok(Evicted::NotThere);
        };
        if let Some(reason) = protection(&before) {
            return Ok(Evicted::Stayed(reason));
        }
        if !by_user && before.last_use_ms > decision.last_used_ms {
            return Ok(Evicted::Stayed(Reason::UsedMeanwhile));
        }
        let batch = self.new_batch()?;
        let mut moved = Vec::new();
        for placement in self.record_names(key)? {
            let (from, to) = (layout::record(key, &placement), layout::trashed_record(key, &placement));
            let to = format!("{batch}/{to}");
            if self.move_away(&from, &to)? {
                moved.push((to, from));
            }
        }
        // Who mounted meanwhile has written a lease before it looked for the record.
        let after = self.protected_scan(key)?;
        let protected = after.as_ref().and_then(protection);
        let used = after.as_ref().is_some_and(|now| !by_user && now.last_use_ms > before.last_use_ms);
        if protected.is_some() || used {
            for (from, to) in &moved {
                self.put_back(from, to)?;
            }
            let _ = self.io.rmdir(&batch);
            return Ok(Evicted::Stayed(protected.unwrap_or(Reason::UsedMeanwhile)));
        }
        if moved.is_empty() && before.records.is_empty() {
            self.clear_commit(key, &before)?;
            let _ = self.io.rmdir(&batch);
            return Ok(Evicted::NotThere);
        }
        let packs: Vec<PackId> = before.packs().iter().map(|p| p.pack).collect();
        let bytes = self.move_objects(&packs, &batch)?;
        self.clear_commit(key, &before)?;
        let _ = self.io.rmdir(&batch);
        Ok(Evicted::Left { bytes })
    }

    /// Looks at one commit with its holds, as the server has it now.
    fn protected_scan(&self, key: &CommitKey) -> Result<Option<CommitScan>, TierError> {
        let Some(mut commit) = self.scan_commit(key, self.now_ms()?)? else {
            return Ok(None);
        };
        commit.held = self.held_keys()?.contains(key);
        Ok(Some(commit))
    }

    /// Moves those of the packs away that no record names; puts back what one names afterwards.
    pub(super) fn move_objects(&self, packs: &[PackId], batch: &str) -> Result<u64, TierError> {
        let mut bytes = 0;
        for chunk in packs.chunks(MOVED_AT_ONCE) {
            let named = self.referenced_now()?;
            let mut moved = Vec::new();
            for pack in chunk.iter().filter(|pack| !named.contains(*pack)) {
                if self.move_away(&layout::object(pack), &format!("{batch}/{pack}"))? {
                    moved.push(*pack);
                }
            }
            let named = self.referenced_now()?;
            for pack in moved {
                let aside = format!("{batch}/{pack}");
                if named.contains(&pack) {
                    self.put_back(&aside, &layout::object(&pack))?;
                    continue;
                }
                bytes += self.look(&aside)?.map_or(0, |stat| stat.size_bytes);
                self.move_sidecars(&pack, &Sidecar::ALL, batch)?;
            }
        }
        Ok(bytes)
    }

    /// Moves what lies beside a pack away, unless the pack is there, or on its way.
    pub(super) fn move_sidecars(&self, pack: &PackId, parts: &[Sidecar], batch: &str) -> Result<(), TierError> {
        let mut moved = Vec::new();
        for part in parts {
            let from = layout::sidecar(pack, *part);
            let to = format!("{batch}/{}", layout::file_name(&from));
            if self.move_away(&from, &to)? {
                moved.push((to, from));
            }
        }
        // A publisher makes its staging folder before the sidecars, and removes it after the link:
        // in this order one of the two is seen.
        let staged = self.look(&layout::staging_dir(pack))?.is_some();
        if staged || self.look(&layout::object(pack))?.is_some() {
            // The index went first and comes back last: where it is, the others are.
            for (from, to) in moved.into_iter().rev() {
                self.put_back(&from, &to)?;
            }
        }
        Ok(())
    }

    /// Removes what is left of a commit's folder, unless it has a record again.
    pub(super) fn clear_commit(&self, key: &CommitKey, seen: &CommitScan) -> Result<(), TierError> {
        if !self.record_names(key)?.is_empty() {
            return Ok(());
        }
        for lease in &seen.leases {
            self.take_over(&lease.path, lease.stat)?;
        }
        let uses = layout::uses_dir(key);
        for listed in self.list(&uses)?.unwrap_or_default() {
            self.remove(&format!("{uses}/{}", listed.name))?;
        }
        self.remove(&layout::commit_ttl(key))?;
        // A folder in which something new has appeared stays: rmdir refuses.
        let dir = layout::commit_dir(key);
        for empty in [uses, layout::leases_dir(key), dir.clone(), layout::parent(&dir).to_owned()] {
            let _ = self.io.rmdir(&empty);
        }
        Ok(())
    }

    /// Which packs any record names, as the server has it now. Records never change, so that one
    /// that was read once is not read again.
    pub(super) fn referenced_now(&self) -> Result<BTreeSet<PackId>, TierError> {
        let mut known = std::mem::take(&mut self.state.lock().records);
        let mut current: BTreeMap<String, Arc<Record>> = BTreeMap::new();
        for key in self.commit_keys()? {
            for placement in self.record_names(&key)? {
                let path = layout::record(&key, &placement);
                if let Some(record) = known.remove(&path) {
                    current.insert(path, record);
                    continue;
                }
                let Some(bytes) = self.read_small(&path)? else {
                    continue;
                };
                // A damaged record names nothing that anybody could use.
                if let Ok(record) = Record::decode(&bytes) {
                    current.insert(path, Arc::new(record));
                }
            }
        }
        let named = current.values().flat_map(|r| r.packs.iter().map(|p| p.pack)).collect();
        self.state.lock().records = current;
        Ok(named)
    }

    /// Deletes old batches, after a last look at whether something in them is needed.
    fn delete_trash(&self, batches: &[String], report: &mut StewardReport) {
        for batch in batches {
            let done = self.delete_batch(batch);
            if let Some((bytes, restored)) = note(report, done) {
                report.deleted_bytes += bytes;
                report.restored += restored;
            }
        }
    }

    fn delete_batch(&self, batch: &str) -> Result<(u64, u64), TierError> {
        let dir = format!("{}/{batch}", layout::TRASH);
        let named = self.referenced_now()?;
        let (mut bytes, mut restored) = (0, 0);
        for listed in self.in_order_of_return(&dir)? {
            let path = format!("{dir}/{}", listed.name);
            let needed = match (parse_object(&listed.name), parse_trashed_record(&listed.name)) {
                (Some(ObjectName::Pack(pack) | ObjectName::Sidecar(pack, _)), _) => named.contains(&pack),
                (None, Some((key, _))) => self.protected_scan(&key)?.is_some_and(|c| protection(&c).is_some()),
                (None, None) => false,
            };
            // Published again meanwhile: what is in the trash is one too many.
            let to = restored_path(&listed.name).filter(|_| needed);
            let there = to.as_ref().map_or(Ok(None), |to| self.look(to))?.is_some();
            match to.filter(|_| !there) {
                Some(to) => {
                    self.put_back(&path, &to)?;
                    restored += 1;
                }
                None => {
                    bytes += self.bytes_below(&path, listed.is_dir, &mut BTreeSet::new())?;
                    self.delete(&path, listed.is_dir)?;
                }
            }
        }
        if dir != layout::TRASH_SPILL {
            // Not empty where a reader of this client has something open: the next sweep.
            let _ = self.io.rmdir(&dir);
        }
        Ok((bytes, restored))
    }

    /// Lists a batch of the trash in the order in which its names come back: of a pack the index behind
    /// the other sidecars, and the pack behind all of them.
    pub(super) fn in_order_of_return(&self, batch: &str) -> Result<Vec<Listed>, TierError> {
        let mut listed = self.list(batch)?.unwrap_or_default();
        listed.sort_unstable_by(|a, b| b.name.cmp(&a.name));
        Ok(listed)
    }

    fn delete(&self, path: &str, is_dir: bool) -> Result<(), TierError> {
        if !is_dir {
            return self.remove(path).map(drop);
        }
        for listed in self.list(path)?.unwrap_or_default() {
            self.remove(&format!("{path}/{}", listed.name))?;
        }
        let _ = self.io.rmdir(path);
        Ok(())
    }
}

/// Where a name in the trash came from.
fn restored_path(name: &str) -> Option<String> {
    match parse_object(name) {
        Some(object) => Some(object.path()),
        None => parse_trashed_record(name).map(|(key, placement)| layout::record(&key, &placement)),
    }
}

fn record_eviction(report: &mut StewardReport, at: usize, outcome: Result<Evicted, TierError>) {
    let Some(outcome) = note(report, outcome) else {
        return;
    };
    match outcome {
        Evicted::Left { bytes } => {
            report.evicted += 1;
            report.moved_bytes += bytes;
        }
        Evicted::Stayed(reason) => {
            if let Some(decision) = report.decisions.get_mut(at) {
                decision.verdict = Verdict::Stays;
                decision.reason = reason;
            }
        }
        Evicted::NotThere => {}
    }
}

/// Takes the value, or notes the error: one thing that fails does not stop the sweep.
fn note<T>(report: &mut StewardReport, outcome: Result<T, TierError>) -> Option<T> {
    match outcome {
        Ok(value) => Some(value),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|c| format!(": {c}")).unwrap_or_default();
            report.failed.push(format!("{error}{cause}"));
            None
        }
    }
}
