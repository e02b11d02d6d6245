//! Checking: the accounting against a walk over every file, and everything that is out of order.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::pack::PackIndex;
use crate::store::tier::error::TierError;
use crate::store::tier::io::TierIo;
use crate::store::tier::layout::{self, Sidecar};
use crate::store::tier::plan::plan;
use crate::store::tier::scan::{Scan, signed};
use crate::store::tier::{Core, Tier};
use crate::store::usage::{TierUsage, account};

/// How often the accounting is compared when others change the tier meanwhile.
const COMPARISONS: u32 = 3;

/// One thing that is out of order.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// Relative to the tier.
    pub path: String,
    pub problem: String,
    /// It was mended.
    pub repaired: bool,
}

/// What a check found.
#[derive(Debug, Clone, serde::Serialize)]
pub struct CheckReport {
    pub findings: Vec<Finding>,
    /// What the accounting says, before any repair.
    pub usage: TierUsage,
    /// What a walk over every file sums up to; equal to `usage.total_bytes`.
    pub walked_bytes: u64,
}

impl CheckReport {
    /// Says whether everything is in order, or is again.
    pub fn is_good(&self) -> bool {
        self.findings.iter().all(|finding| finding.repaired)
    }
}

impl<I: TierIo> Tier<I> {
    /// Compares the accounting with a walk, and looks for what is out of order; mends it if asked.
    /// Names that are not ours are only reported.
    pub fn check(&self, repair: bool) -> Result<CheckReport, TierError> {
        let core = &self.core;
        let mut findings = Vec::new();
        let (scan, usage, walked_bytes) = self.compare(&mut findings)?;
        for path in &scan.strangers {
            found(&mut findings, path, "not one of ours; remove it yourself if nobody needs it", false);
        }
        for commit in &scan.commits {
            core.check_commit(commit, repair, scan.now_ms, &mut findings)?;
        }
        self.check_objects(&scan, repair, &mut findings)?;
        self.check_leftovers(&scan, repair, &mut findings)?;
        Ok(CheckReport { findings, usage, walked_bytes })
    }

    fn compare(&self, findings: &mut Vec<Finding>) -> Result<(Scan, TierUsage, u64), TierError> {
        let mut tries = 0;
        loop {
            let scan = self.core.scan_afresh()?;
            let usage = account(&scan.facts(self.configured_capacity_bytes()));
            let walked = self.core.walk()?;
            tries += 1;
            if walked == usage.total_bytes || tries >= COMPARISONS {
                if walked != usage.total_bytes {
                    let problem = format!("the accounting says {} bytes, a walk finds {walked}", usage.total_bytes);
                    found(findings, ".", &problem, false);
                }
                return Ok((scan, usage, walked));
            }
        }
    }

    fn check_objects(&self, scan: &Scan, repair: bool, findings: &mut Vec<Finding>) -> Result<(), TierError> {
        let mut lens = BTreeMap::new();
        for used in scan.commits.iter().flat_map(|c| &c.records).flat_map(|r| &r.packs) {
            lens.insert(used.pack, used.len);
        }
        for (pack, object) in &scan.objects {
            let index = match self.sidecar(pack, Sidecar::Index) {
                Ok(Some(bytes)) => PackIndex::decode(&bytes).ok(),
                Ok(None) | Err(TierError::BadSidecar { .. }) => None,
                Err(error) => return Err(error),
            };
            let expected = index.as_ref().map(|index| index.len).or_else(|| lens.get(pack).copied());
            let problem = match (index, expected) {
                (_, Some(len)) if len != object.len => {
                    format!("has {} bytes instead of {len}", object.len)
                }
                (None, _) => "its index is missing or damaged, so it cannot be scrubbed".to_owned(),
                _ => continue,
            };
            if repair {
                self.quarantine(pack, &object.identity, &problem)?;
            }
            found(findings, &layout::object(pack), &problem, repair);
        }
        Ok(())
    }

    /// What the steward would mend by itself counts as out of order only here.
    fn check_leftovers(&self, scan: &Scan, repair: bool, findings: &mut Vec<Finding>) -> Result<(), TierError> {
        let plan = plan(scan, &self.policy());
        for restore in &plan.restore {
            let path = format!("{}/{}/{}", layout::TRASH, restore.batch, restore.name);
            found(findings, &path, "in the trash, but needed", repair);
        }
        for (name, _) in &plan.innocent {
            let path = format!("{}/{name}", layout::QUARANTINE);
            found(findings, &path, "in quarantine, but not the damaged file", repair);
        }
        for (pack, part) in &plan.loose {
            found(findings, &layout::sidecar(pack, *part), "without its pack", repair);
        }
        for pack in &plan.orphans {
            found(findings, &layout::object(pack), "no cached commit needs it", repair);
        }
        for name in &plan.staging {
            found(findings, &format!("{}/{name}", layout::STAGING), "nobody writes to it any more", repair);
        }
        for name in &plan.temp {
            found(findings, &format!("{}/{name}", layout::TEMP), "a forgotten temporary file", repair);
        }
        if repair && !findings.is_empty() {
            self.steward_step(&self.policy())?;
        }
        Ok(())
    }
}

impl<I: TierIo> Core<I> {
    fn check_commit(
        &self,
        commit: &crate::store::tier::scan::CommitScan,
        repair: bool,
        now_ms: i64,
        findings: &mut Vec<Finding>,
    ) -> Result<(), TierError> {
        for path in &commit.damaged {
            if repair {
                self.remove(path)?;
            }
            found(findings, path, "a record that cannot be read", repair);
        }
        let dir = layout::commit_dir(&commit.key);
        let idle = self.look(&dir)?.map_or(0, |stat| now_ms - stat.mtime_ms());
        if commit.records.is_empty() && commit.live_leases() == 0 && idle > signed(self.cfg.grace_ms) {
            if repair {
                self.clear_commit(&commit.key, commit)?;
            }
            found(findings, &dir, "leftovers of a commit without a record", repair);
        }
        Ok(())
    }

    /// Sums up every file once, by folder, with nothing but names and sizes.
    fn walk(&self) -> Result<u64, TierError> {
        let mut seen = BTreeSet::new();
        let mut sum = 0;
        // Objects first: a hard link elsewhere is the same bytes.
        let folders =
            [layout::OBJECTS, layout::STAGING, layout::HOLDS, layout::TRASH, layout::QUARANTINE, layout::TEMP];
        for folder in folders {
            let mut dirs = vec![folder.to_owned()];
            while let Some(dir) = dirs.pop() {
                for listed in self.list(&dir)?.unwrap_or_default() {
                    let path = format!("{dir}/{}", listed.name);
                    if listed.is_dir {
                        dirs.push(path);
                        continue;
                    }
                    let text = folder == layout::HOLDS && listed.name == "hold";
                    let Some(stat) = self.look(&path)?.filter(|_| !text) else {
                        continue;
                    };
                    if seen.insert(stat.file_id) {
                        let whole = folder == layout::OBJECTS || folder == layout::HOLDS;
                        sum += if whole { stat.size_bytes } else { stat.on_medium() };
                    }
                }
            }
        }
        Ok(sum)
    }
}

fn found(findings: &mut Vec<Finding>, path: &str, problem: &str, repaired: bool) {
    findings.push(Finding { path: path.to_owned(), problem: problem.to_owned(), repaired });
}
