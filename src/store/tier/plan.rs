//! What the steward does about a tier: a pure function from a scan to a plan, with a reason for
//! each decision.
//!
//! 1. A commit that is mounted, kept or held stays, always.
//! 2. A commit whose time to live has passed since its last use leaves.
//! 3. Above the high watermark the others leave, least recently used first, until what stays is
//!    below the low one; unless evictions turned out to free nothing.
//! 4. Objects that nobody needs, staging that nobody writes, old trash and leftovers leave.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::ids::PackId;
use crate::store::tier::TierConfig;
use crate::store::tier::layout::{CommitKey, Sidecar};
use crate::store::tier::scan::{CommitScan, Scan, StagingScan, signed};
use crate::store::tier::stall::Stall;

/// What was refused for want of room within this time, or the grace time, is made room for.
const LATELY_MS: u64 = 60_000;

/// By what the steward decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// What the tier may take; None: what the file system has.
    pub capacity_bytes: Option<u64>,
    pub high_watermark_percent: u8,
    pub low_watermark_percent: u8,
    pub grace_ms: u64,
    pub staging_ttl_ms: u64,
    pub quarantine_ttl_ms: u64,
}

impl Policy {
    /// Takes over what the configuration says.
    pub fn new(cfg: &TierConfig, capacity_bytes: Option<u64>) -> Self {
        Self {
            capacity_bytes,
            high_watermark_percent: cfg.high_watermark_percent,
            low_watermark_percent: cfg.low_watermark_percent,
            grace_ms: cfg.grace_ms,
            staging_ttl_ms: cfg.staging_ttl_ms,
            quarantine_ttl_ms: cfg.quarantine_ttl_ms,
        }
    }
}

/// Whether a commit stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Stays,
    Leaves,
}

/// Why.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Reason {
    Mounted {
        leases: usize,
    },
    Kept,
    Held,
    /// Its time to live has not passed.
    Fresh {
        expires_in_ms: i64,
    },
    /// Its time to live has passed.
    AgedOut {
        unused_ms: i64,
        ttl_ms: u64,
    },
    /// The tier is above its high watermark and this was the least recently used.
    LeastRecentlyUsed {
        unused_ms: i64,
        taken_bytes: u64,
        high_bytes: u64,
    },
    /// It would have to leave for room, but evictions free nothing (snapshots?).
    EvictionsFreeNothing,
    /// It would have to leave for room, but what was deleted last is not free yet.
    SpaceNotFreeYet,
    /// Its folder has no record: what is left of it leaves.
    Leftover,
    /// A user said `uncache`.
    Uncached,
    /// It was mounted, kept or used while it was being removed, and was put back.
    UsedMeanwhile,
}

/// One decision about a commit.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Decision {
    #[serde(flatten)]
    pub key: CommitKey,
    pub dataset: String,
    pub verdict: Verdict,
    #[serde(flatten)]
    pub reason: Reason,
    /// When it was last used, as the decision saw it; a later use changes the decision.
    pub last_used_ms: i64,
    /// Server's clock.
    pub time_ms: i64,
}

/// What to do, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SweepPlan {
    /// For every commit.
    pub decisions: Vec<Decision>,
    /// Moved away, but needed: put back.
    pub restore: Vec<Restore>,
    /// Set aside by mistake: put back.
    pub innocent: Vec<(String, PackId)>,
    /// Published, but no record names them.
    pub orphans: Vec<PackId>,
    /// Sidecars without a pack.
    pub loose: Vec<(PackId, Sidecar)>,
    /// Staging folders that nobody writes to.
    pub staging: Vec<String>,
    /// Trash batches older than the grace time.
    pub trash: Vec<String>,
    /// Leases of dead nodes.
    pub expired_leases: Vec<(String, crate::store::tier::io::Stat)>,
    /// Old files in quarantine.
    pub quarantine: Vec<String>,
    /// Forgotten temporary files.
    pub temp: Vec<String>,
    /// Bytes taken, and the watermarks in bytes.
    pub taken_bytes: u64,
    pub high_bytes: u64,
    pub low_bytes: u64,
}

/// A thing in the trash that is needed: batch, name there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restore {
    pub batch: String,
    pub name: String,
}

impl SweepPlan {
    /// The commits that leave.
    pub fn leaving(&self) -> impl Iterator<Item = &Decision> {
        self.decisions.iter().filter(|decision| decision.verdict == Verdict::Leaves)
    }
}

/// Decides about everything in a scan.
pub fn plan(scan: &Scan, policy: &Policy) -> SweepPlan {
    let mut plan =
        SweepPlan { decisions: scan.commits.iter().map(|c| by_age(c, scan.now_ms)).collect(), ..SweepPlan::default() };
    for_room(scan, policy, &mut plan);
    restores(scan, &mut plan);
    leftovers(scan, policy, &mut plan);
    plan
}

/// Why a commit may not leave, whatever else is so.
pub(crate) fn protection(commit: &CommitScan) -> Option<Reason> {
    match (commit.live_leases(), commit.kept, commit.held) {
        (leases @ 1.., _, _) => Some(Reason::Mounted { leases }),
        (_, true, _) => Some(Reason::Kept),
        (_, _, true) => Some(Reason::Held),
        _ => None,
    }
}

fn by_age(commit: &CommitScan, now_ms: i64) -> Decision {
    let unused_ms = now_ms.saturating_sub(commit.last_use_ms);
    let ttl_ms = signed(commit.ttl_ms);
    let (verdict, reason) = match protection(commit) {
        Some(reason) => (Verdict::Stays, reason),
        None if commit.records.is_empty() => (Verdict::Leaves, Reason::Leftover),
        None if unused_ms > ttl_ms => (Verdict::Leaves, Reason::AgedOut { unused_ms, ttl_ms: commit.ttl_ms }),
        None => (Verdict::Stays, Reason::Fresh { expires_in_ms: ttl_ms.saturating_sub(unused_ms) }),
    };
    Decision {
        key: commit.key,
        dataset: commit.dataset().to_owned(),
        verdict,
        reason,
        last_used_ms: commit.last_use_ms,
        time_ms: now_ms,
    }
}

/// Lets the least recently used commits leave until the rest is below the low watermark.
fn for_room(scan: &Scan, policy: &Policy, plan: &mut SweepPlan) {
    let facts = scan.facts(policy.capacity_bytes);
    let usage = crate::store::usage::account(&facts);
    // Trash, orphans and quarantine leave by themselves; evicting because of them would be for nothing.
    let leaving_anyway = usage.trash_bytes + usage.orphan_bytes;
    let capacity = usage.capacity_bytes.min(usage.total_bytes.saturating_add(scan.space.free_bytes));
    plan.high_bytes = share(capacity, policy.high_watermark_percent);
    plan.low_bytes = share(capacity, policy.low_watermark_percent);
    plan.taken_bytes = usage.total_bytes.saturating_sub(leaving_anyway);

    let mut users: BTreeMap<PackId, usize> = BTreeMap::new();
    for pack in scan.commits.iter().flat_map(CommitScan::packs) {
        *users.entry(pack.pack).or_insert(0) += 1;
    }
    // What comes needs room as well: also what was refused until there is some.
    let lately_ms = signed(policy.grace_ms.max(LATELY_MS));
    let comes = |staging: &&StagingScan| staging.accepted || staging.idle_ms <= lately_ms;
    let coming = scan.staging.iter().filter(comes).map(StagingScan::coming_bytes).sum::<u64>();
    let mut taken = plan.taken_bytes.saturating_add(coming);
    let mut frees = |commit: &CommitScan| {
        let mut freed = 0;
        for pack in commit.packs() {
            if let Some(count) = users.get_mut(&pack.pack) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    freed += facts.objects.get(&pack.pack).copied().unwrap_or(0);
                }
            }
        }
        freed
    };
    for (commit, decision) in scan.commits.iter().zip(&plan.decisions) {
        if decision.verdict == Verdict::Leaves {
            taken = taken.saturating_sub(frees(commit));
        }
    }
    if taken <= plan.high_bytes {
        return;
    }
    // Where the file system is the limit, each eviction that frees nothing makes the next one necessary.
    let medium_is_limit = policy.capacity_bytes.is_none_or(|configured| capacity < configured);
    let rests = scan.stall == Stall::Found || (scan.stall == Stall::Suspected && medium_is_limit);
    let mut order: Vec<usize> = (0..scan.commits.len()).collect();
    order.sort_by_key(|at| scan.commits.get(*at).map(|c| (c.last_use_ms, c.key)));
    for at in order {
        let (Some(commit), Some(decision)) = (scan.commits.get(at), plan.decisions.get_mut(at)) else {
            continue;
        };
        if taken <= plan.low_bytes || !matches!(decision.reason, Reason::Fresh { .. }) {
            continue;
        }
        if rests {
            decision.reason = match scan.stall {
                Stall::Suspected => Reason::SpaceNotFreeYet,
                _ => Reason::EvictionsFreeNothing,
            };
            continue;
        }
        taken = taken.saturating_sub(frees(commit));
        decision.verdict = Verdict::Leaves;
        decision.reason = Reason::LeastRecentlyUsed {
            unused_ms: scan.now_ms.saturating_sub(commit.last_use_ms),
            taken_bytes: plan.taken_bytes,
            high_bytes: plan.high_bytes,
        };
    }
}

fn share(capacity: u64, percent: u8) -> u64 {
    u64::try_from(u128::from(capacity) * u128::from(percent) / 100).unwrap_or(u64::MAX)
}

/// What a steward that died, or a race, left in the trash though it is needed.
fn restores(scan: &Scan, plan: &mut SweepPlan) {
    let referenced = scan.referenced();
    for batch in &scan.trash {
        for item in &batch.items {
            if scan.is_needed(&item.name, &referenced) {
                plan.restore.push(Restore { batch: batch.name.clone(), name: item.name.clone() });
            }
        }
    }
    for found in &scan.quarantine {
        if let Some(pack) = found.innocent {
            plan.innocent.push((found.name.clone(), pack));
        }
    }
}

fn leftovers(scan: &Scan, policy: &Policy, plan: &mut SweepPlan) {
    let grace_ms = signed(policy.grace_ms);
    let referenced = scan.referenced();
    let staged: BTreeSet<PackId> = scan.staging.iter().filter_map(|s| s.pack).collect();
    plan.orphans = scan
        .objects
        .iter()
        .filter(|(pack, object)| {
            let age_ms = scan.now_ms - object.identity.mtime_ns.div_euclid(1_000_000);
            !referenced.contains(*pack) && age_ms > grace_ms
        })
        .map(|(pack, _)| *pack)
        .collect();
    plan.loose = scan
        .loose
        .iter()
        .filter(|l| !staged.contains(&l.pack) && l.age_ms > grace_ms)
        .map(|l| (l.pack, l.part))
        .collect();
    // The parts of a pack together, the index first.
    plan.loose.sort_unstable();
    plan.staging = scan
        .staging
        .iter()
        .filter(|s| {
            let published = s.pack.is_some_and(|pack| scan.objects.contains_key(&pack));
            let unneeded = s.pack.is_some_and(|pack| !referenced.contains(&pack));
            let limit_ms = if published || unneeded { grace_ms } else { signed(policy.staging_ttl_ms) };
            s.live_claims == 0 && s.idle_ms > limit_ms
        })
        .map(|s| s.name.clone())
        .collect();
    plan.trash = scan.trash.iter().filter(|b| b.age_ms > grace_ms).map(|b| b.name.clone()).collect();
    let leases = scan.commits.iter().flat_map(|c| &c.leases).filter(|lease| !lease.live);
    plan.expired_leases = leases.map(|lease| (lease.path.clone(), lease.stat)).collect();
    let quarantine_ttl_ms = signed(policy.quarantine_ttl_ms);
    plan.quarantine = scan
        .quarantine
        .iter()
        .filter(|q| q.innocent.is_none() && q.age_ms > quarantine_ttl_ms)
        .map(|q| q.name.clone())
        .collect();
    // A temporary file lives for one write: a day is for clients that hang.
    plan.temp = scan.temp.iter().filter(|t| t.age_ms > grace_ms.max(3_600_000)).map(|t| t.name.clone()).collect();
}

impl Reason {
    /// Says it in words.
    pub fn text(&self) -> String {
        match self {
            Self::Mounted { leases } => format!("mounted ({leases} leases)"),
            Self::Kept => "kept: someone said `larder cache --keep`".to_owned(),
            Self::Held => "held by a mount that needs no daemon".to_owned(),
            Self::Fresh { expires_in_ms } => format!("used lately; ages out in {}", span_text(*expires_in_ms)),
            Self::AgedOut { unused_ms, ttl_ms } => {
                format!("not used for {}, its time to live is {}", span_text(*unused_ms), span_text(signed(*ttl_ms)))
            }
            Self::LeastRecentlyUsed { unused_ms, taken_bytes, high_bytes } => format!(
                "least recently used (unused for {}) while the tier held {taken_bytes} bytes, above its high watermark of {high_bytes}",
                span_text(*unused_ms)
            ),
            Self::EvictionsFreeNothing => {
                "the tier is above its high watermark, but evictions free nothing; do snapshots hold the space?"
                    .to_owned()
            }
            Self::SpaceNotFreeYet => {
                "the tier is above its high watermark, and the space of what was deleted last is not free yet"
                    .to_owned()
            }
            Self::Leftover => "it has no record here: leftovers".to_owned(),
            Self::Uncached => "someone said `larder uncache`".to_owned(),
            Self::UsedMeanwhile => "it was used while it was being removed, and was put back".to_owned(),
        }
    }
}

/// Writes a duration as people do.
pub fn span_text(ms: i64) -> String {
    let duration = std::time::Duration::from_millis(u64::try_from(ms.max(0)).unwrap_or(0));
    // Whole seconds are enough above one.
    let rounded = if ms >= 1000 { std::time::Duration::from_secs(duration.as_secs()) } else { duration };
    humantime::format_duration(rounded).to_string()
}
