//! Why a commit is in the tier, or left it: what protects it, and the decisions that were written down.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::discriminant;

use crate::format::ids::{NodeId, PlacementId};
use crate::store::tier::error::TierError;
use crate::store::tier::io::TierIo;
use crate::store::tier::layout::{self, CommitKey};
use crate::store::tier::plan::{Decision, Reason, plan, span_text};
use crate::store::tier::records::Note;
use crate::store::tier::scan::{CommitScan, signed};
use crate::store::tier::siblings::{Fate, Purpose};
use crate::store::tier::{Core, Tier};

/// Decisions about so many commits are remembered.
const DECISIONS_MAX: usize = 10_000;

/// Why a commit is, or is not, in the tier.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Why {
    /// The last decision that a sweep, or `uncache`, wrote down.
    pub last: Option<Decision>,
    /// What a sweep would decide now; null where the commit is not cached.
    pub now: Option<Decision>,
    pub records: Vec<RecordInfo>,
    pub leases: Vec<LeaseInfo>,
    pub holds: Vec<HoldInfo>,
    pub kept: bool,
    /// Null where the commit is not cached.
    pub ttl_ms: Option<u64>,
    /// Until it ages out; null where something protects it.
    pub expires_in_ms: Option<i64>,
}

/// A record of a commit.
#[derive(Debug, Clone, serde::Serialize)]
pub struct RecordInfo {
    pub placement: PlacementId,
    pub dataset: String,
    pub packs: usize,
    /// Of these packs, how many are published here.
    pub packs_cached: usize,
    pub bytes: u64,
}

/// A lease of a commit.
#[derive(Debug, Clone, serde::Serialize)]
pub struct LeaseInfo {
    pub node: Option<NodeId>,
    pub host: Option<String>,
    pub purpose: Purpose,
    /// Since it was last renewed.
    pub age_ms: i64,
    /// It protects the commit.
    pub live: bool,
    /// Its process is known to have ended.
    pub ended: bool,
}

/// A hold of a commit.
#[derive(Debug, Clone, serde::Serialize)]
pub struct HoldInfo {
    pub node: String,
    pub mount: String,
    pub packs: u64,
}

impl<I: TierIo> Tier<I> {
    /// Says why a commit stays or left.
    pub fn why(&self, key: &CommitKey) -> Result<Why, TierError> {
        let core = &self.core;
        let last = core.decisions()?.into_iter().find(|decision| decision.key == *key);
        let scan = core.scan()?;
        let now = plan(&scan, &self.policy()).decisions.into_iter().find(|decision| decision.key == *key);
        let commit = scan.commits.iter().find(|commit| commit.key == *key);
        let records = commit.iter().flat_map(|commit| &commit.records).map(|record| RecordInfo {
            placement: record.placement,
            dataset: record.dataset.clone(),
            packs: record.packs.len(),
            packs_cached: record.packs.iter().filter(|used| scan.objects.contains_key(&used.pack)).count(),
            bytes: record.packs.iter().map(|used| used.len).sum(),
        });
        let holds = scan.holds.iter().filter(|hold| hold.key == Some(*key)).map(|hold| HoldInfo {
            node: hold.node.clone(),
            mount: hold.mount.clone(),
            packs: hold.packs,
        });
        let free = |commit: &&CommitScan| !commit.kept && !commit.held && commit.live_leases() == 0;
        let left = |commit: &CommitScan| signed(commit.ttl_ms).saturating_sub(scan.now_ms - commit.last_use_ms);
        Ok(Why {
            last,
            now,
            records: records.collect(),
            leases: core.lease_infos(commit, scan.now_ms)?,
            holds: holds.collect(),
            kept: commit.is_some_and(|commit| commit.kept),
            ttl_ms: commit.map(|commit| commit.ttl_ms),
            expires_in_ms: commit.filter(free).map(left),
        })
    }

    /// Finds the commits, cached or once decided about, whose id begins so.
    pub fn find_commits(&self, prefix: &str) -> Result<Vec<CommitKey>, TierError> {
        let mut keys: BTreeSet<CommitKey> = self.core.commit_keys()?.into_iter().collect();
        keys.extend(self.core.decisions()?.into_iter().map(|decision| decision.key));
        Ok(keys.into_iter().filter(|key| key.commit.to_string().starts_with(prefix)).collect())
    }
}

impl<I: TierIo> Core<I> {
    fn lease_infos(&self, commit: Option<&CommitScan>, now_ms: i64) -> Result<Vec<LeaseInfo>, TierError> {
        let mut infos = Vec::new();
        for lease in commit.iter().flat_map(|commit| &commit.leases) {
            let note = match self.read_json::<Note>(&lease.path) {
                Ok(note) => note,
                Err(TierError::BadFile { .. }) => None,
                Err(error) => return Err(error),
            };
            let instance = note.as_ref().and_then(|note| note.instance).filter(|_| lease.node == Some(self.node));
            infos.push(LeaseInfo {
                node: lease.node,
                purpose: note.as_ref().and_then(|note| note.purpose).unwrap_or_default(),
                host: note.map(|note| note.host).filter(|host| !host.is_empty()),
                age_ms: now_ms - lease.stat.mtime_ms(),
                live: lease.live,
                ended: instance.is_some_and(|instance| self.siblings.fate(&instance) != Fate::Unknown),
            });
        }
        Ok(infos)
    }

    /// Says why a commit cannot leave on a user's word, and what to do about it.
    pub(super) fn refusal(&self, key: &CommitKey, reason: &Reason) -> String {
        match reason {
            Reason::Mounted { .. } => {
                self.who_mounts(key).unwrap_or_else(|_| "it is mounted; unmount it first".to_owned())
            }
            Reason::Kept => "it is kept; say `larder cache --no-keep` first".to_owned(),
            Reason::Held => "a mount without a daemon holds it; unmount it, or `larder tier forget-node` the node \
                             if it will not come back (`larder tier why` names it)"
                .to_owned(),
            _ => "it is in use".to_owned(),
        }
    }

    fn who_mounts(&self, key: &CommitKey) -> Result<String, TierError> {
        let now_ms = self.now_ms()?;
        let commit = self.scan_commit(key, now_ms)?;
        let leases = self.lease_infos(commit.as_ref(), now_ms)?;
        let live: Vec<&LeaseInfo> = leases.iter().filter(|lease| lease.live).collect();
        let Some(first) = live.first() else {
            return Ok("it was in use until just now; try again".to_owned());
        };
        let node = first.node.map_or_else(|| "unknown".to_owned(), |node| node.to_string());
        let host = first.host.as_deref().unwrap_or("unknown host");
        let doing = match first.purpose {
            Purpose::Mount => "it is mounted",
            Purpose::Fill => "it is being filled",
        };
        let age = span_text(first.age_ms);
        let expires = span_text(signed(self.cfg.lease_ttl_ms).saturating_sub(first.age_ms));
        let others = if live.len() > 1 { format!(", and {} others", live.len() - 1) } else { String::new() };
        let next = if first.ended {
            format!("the daemon that mounted it has ended: start one on that node (`larder daemon`), or wait {expires}")
        } else if first.node == Some(self.node) {
            "`larder mounts` lists the mounts of this node: unmount it first".to_owned()
        } else {
            format!("unmount it there; if that node will not come back, `larder tier forget-node {node}`")
        };
        Ok(format!("{doing} by node {node} ({host}, lease renewed {age} ago){others}; {next}"))
    }

    pub(super) fn decisions(&self) -> Result<Vec<Decision>, TierError> {
        match self.read_json(layout::DECISIONS) {
            Ok(found) => Ok(found.unwrap_or_default()),
            // Only notes: a damaged file is written anew.
            Err(TierError::BadFile { .. }) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Writes decisions down, the newest about each commit. What was decided before for the same kind
    /// of reason stays as it is, with the time when that began: most sweeps write nothing.
    pub(super) fn remember(&self, decisions: &[Decision]) -> Result<(), TierError> {
        let mut all: BTreeMap<CommitKey, Decision> =
            self.decisions()?.into_iter().map(|decision| (decision.key, decision)).collect();
        let same = |old: &Decision, new: &Decision| {
            old.verdict == new.verdict && discriminant(&old.reason) == discriminant(&new.reason)
        };
        let mut changed = false;
        for decision in decisions {
            if !all.get(&decision.key).is_some_and(|old| same(old, decision)) {
                all.insert(decision.key, decision.clone());
                changed = true;
            }
        }
        if !changed {
            return Ok(());
        }
        let mut all: Vec<Decision> = all.into_values().collect();
        all.sort_by_key(|decision| std::cmp::Reverse(decision.time_ms));
        all.truncate(DECISIONS_MAX);
        self.replace(layout::DECISIONS, &serde_json::to_vec(&all).expect("plain fields"))
    }
}
