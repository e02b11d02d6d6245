//! Accounting: what cached commits cost, shared packs counted once. Pure: facts in, sums out.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::ids::{CommitId, LakeId, PackId};
use crate::format::placement::PackUse;

/// What is known of one cached commit.
#[derive(Debug, Clone, Default)]
pub struct CommitFacts {
    /// All packs that its records name, each once.
    pub packs: Vec<PackUse>,
    pub last_use_ms: i64,
    pub ttl_ms: u64,
    pub kept: bool,
    pub held: bool,
    /// Live leases.
    pub mounts: usize,
}

/// What is known of a tier: from a scan.
#[derive(Debug, Clone, Default)]
pub struct TierFacts {
    pub commits: BTreeMap<(LakeId, CommitId, String), CommitFacts>,
    /// Bytes of each published object, with what lies beside it.
    pub objects: BTreeMap<PackId, u64>,
    /// Bytes that have arrived of packs that are not published yet.
    pub staged: BTreeMap<PackId, u64>,
    pub loose_bytes: u64,
    pub staging_bytes: u64,
    pub trash_bytes: u64,
    pub quarantine_bytes: u64,
    pub held_only_bytes: u64,
    pub temp_bytes: u64,
    pub configured_capacity_bytes: Option<u64>,
    pub fs_free_bytes: u64,
    pub evictions_free_nothing: bool,
    pub now_ms: i64,
}

/// What a commit costs.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct CommitUsage {
    pub lake: LakeId,
    pub commit: CommitId,
    pub dataset: String,
    pub packs: u64,
    pub packs_cached: u64,
    /// Bytes of all its packs.
    pub total_bytes: u64,
    /// Bytes of those that are published here.
    pub cached_bytes: u64,
    /// Bytes that have arrived of the others.
    pub staged_bytes: u64,
    /// Of the cached bytes: those that no other cached commit needs …
    pub own_bytes: u64,
    /// … and the rest.
    pub shared_bytes: u64,
    /// Of `total_bytes`, cached or arrived; rounded down, 100 means all.
    pub percent_cached: u8,
    pub last_used_ms: i64,
    pub ttl_ms: u64,
    /// When it ages out; null while it is mounted, kept or held.
    pub expires_ms: Option<i64>,
    pub kept: bool,
    pub held: bool,
    pub mounts: usize,
}

/// What the commits of a dataset cost together, shared packs once.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct DatasetUsage {
    pub lake: LakeId,
    pub dataset: String,
    pub commits: u64,
    pub cached_bytes: u64,
    /// Of these, what no other dataset's commit needs.
    pub own_bytes: u64,
}

/// What a tier holds.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TierUsage {
    /// Published objects that cached commits need.
    pub used_bytes: u64,
    /// Published objects that no cached commit needs; the steward removes them.
    pub orphan_bytes: u64,
    pub staging_bytes: u64,
    pub trash_bytes: u64,
    pub quarantine_bytes: u64,
    /// Kept alive only by holds.
    pub held_only_bytes: u64,
    pub temp_bytes: u64,
    /// Everything above.
    pub total_bytes: u64,
    /// What was configured, or what the file system offers.
    pub capacity_bytes: u64,
    pub capacity_configured: bool,
    /// What may still be written.
    pub free_bytes: u64,
    pub objects: u64,
    /// Evicting freed nothing lately (server snapshots): for room, nothing is evicted for an hour.
    pub evictions_free_nothing: bool,
    pub commits: Vec<CommitUsage>,
    pub datasets: Vec<DatasetUsage>,
    /// Server's now: what `last_used_ms` and `expires_ms` compare to.
    pub now_ms: i64,
}

/// Sums up.
pub fn account(facts: &TierFacts) -> TierUsage {
    let users = users_of_packs(facts);
    let size = |pack: &PackId| facts.objects.get(pack).copied();
    let used_bytes = users.keys().filter_map(size).sum::<u64>();
    let orphans = facts.objects.iter().filter(|(pack, _)| !users.contains_key(*pack)).map(|(_, len)| len);
    let orphan_bytes = orphans.sum::<u64>() + facts.loose_bytes;
    let total_bytes = used_bytes
        + orphan_bytes
        + facts.staging_bytes
        + facts.trash_bytes
        + facts.quarantine_bytes
        + facts.held_only_bytes
        + facts.temp_bytes;
    let on_medium = total_bytes.saturating_add(facts.fs_free_bytes);
    let capacity_bytes = facts.configured_capacity_bytes.unwrap_or(on_medium);
    TierUsage {
        used_bytes,
        orphan_bytes,
        staging_bytes: facts.staging_bytes,
        trash_bytes: facts.trash_bytes,
        quarantine_bytes: facts.quarantine_bytes,
        held_only_bytes: facts.held_only_bytes,
        temp_bytes: facts.temp_bytes,
        total_bytes,
        capacity_bytes,
        capacity_configured: facts.configured_capacity_bytes.is_some(),
        free_bytes: capacity_bytes.saturating_sub(total_bytes).min(facts.fs_free_bytes),
        objects: facts.objects.len() as u64,
        evictions_free_nothing: facts.evictions_free_nothing,
        commits: facts.commits.iter().map(|(key, commit)| commit_usage(facts, &users, key, commit)).collect(),
        datasets: dataset_usage(facts),
        now_ms: facts.now_ms,
    }
}

/// How many cached commits need each pack.
fn users_of_packs(facts: &TierFacts) -> BTreeMap<PackId, u32> {
    let mut users = BTreeMap::new();
    for commit in facts.commits.values() {
        for pack in &commit.packs {
            *users.entry(pack.pack).or_insert(0) += 1;
        }
    }
    users
}

fn commit_usage(
    facts: &TierFacts,
    users: &BTreeMap<PackId, u32>,
    (lake, commit, dataset): &(LakeId, CommitId, String),
    known: &CommitFacts,
) -> CommitUsage {
    let mut usage = CommitUsage {
        lake: *lake,
        commit: *commit,
        dataset: dataset.clone(),
        packs: known.packs.len() as u64,
        packs_cached: 0,
        total_bytes: known.packs.iter().map(|p| p.len).sum(),
        cached_bytes: 0,
        staged_bytes: 0,
        own_bytes: 0,
        shared_bytes: 0,
        percent_cached: 0,
        last_used_ms: known.last_use_ms,
        ttl_ms: known.ttl_ms,
        expires_ms: None,
        kept: known.kept,
        held: known.held,
        mounts: known.mounts,
    };
    let mut arrived = 0;
    for pack in &known.packs {
        if let Some(len) = facts.objects.get(&pack.pack) {
            usage.packs_cached += 1;
            usage.cached_bytes += len;
            arrived += pack.len;
            let alone = users.get(&pack.pack).is_none_or(|n| *n <= 1);
            *(if alone { &mut usage.own_bytes } else { &mut usage.shared_bytes }) += len;
        } else if let Some(len) = facts.staged.get(&pack.pack) {
            usage.staged_bytes += len;
            arrived += len.min(&pack.len);
        }
    }
    usage.percent_cached = percent(arrived, usage.total_bytes);
    if !known.kept && !known.held && known.mounts == 0 {
        let ttl = i64::try_from(known.ttl_ms).unwrap_or(i64::MAX);
        usage.expires_ms = Some(known.last_use_ms.saturating_add(ttl));
    }
    usage
}

/// Rounds down: 100 means all. A commit of no bytes is all there.
fn percent(part: u64, whole: u64) -> u8 {
    if whole == 0 {
        return 100;
    }
    u8::try_from(u128::from(part) * 100 / u128::from(whole)).unwrap_or(100).min(100)
}

fn dataset_usage(facts: &TierFacts) -> Vec<DatasetUsage> {
    let mut datasets: BTreeMap<(LakeId, &str), (u64, BTreeSet<PackId>)> = BTreeMap::new();
    for ((lake, _, dataset), commit) in &facts.commits {
        let entry = datasets.entry((*lake, dataset)).or_default();
        entry.0 += 1;
        entry.1.extend(commit.packs.iter().map(|p| p.pack));
    }
    let mut users: BTreeMap<PackId, u32> = BTreeMap::new();
    for pack in datasets.values().flat_map(|(_, packs)| packs) {
        *users.entry(*pack).or_insert(0) += 1;
    }
    let size = |pack: &PackId| facts.objects.get(pack).copied().unwrap_or(0);
    let alone = |pack: &&PackId| users.get(*pack).is_none_or(|n| *n <= 1);
    datasets
        .iter()
        .map(|((lake, dataset), (commits, packs))| DatasetUsage {
            lake: *lake,
            dataset: (*dataset).to_owned(),
            commits: *commits,
            cached_bytes: packs.iter().map(size).sum(),
            own_bytes: packs.iter().filter(alone).map(size).sum(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(n: u8) -> PackId {
        PackId([n; 32])
    }

    fn uses(packs: &[(u8, u64)]) -> CommitFacts {
        let packs = packs.iter().map(|(n, len)| PackUse { pack: pack(*n), len: *len, referenced: *len }).collect();
        CommitFacts { packs, ttl_ms: 1000, last_use_ms: 500, ..CommitFacts::default() }
    }

    fn key(n: u8) -> (LakeId, CommitId, String) {
        (LakeId(uuid::Uuid::from_u128(1)), CommitId([n; 32]), "xray".to_owned())
    }

    #[test]
    fn shared_packs_are_counted_once_in_the_total_and_as_shared_in_each_commit() {
        let facts = TierFacts {
            commits: BTreeMap::from([(key(1), uses(&[(1, 100), (2, 50)])), (key(2), uses(&[(2, 50), (3, 30)]))]),
            objects: BTreeMap::from([(pack(1), 100), (pack(2), 50), (pack(3), 30), (pack(9), 7)]),
            fs_free_bytes: 1000,
            ..TierFacts::default()
        };
        let usage = account(&facts);
        assert_eq!((usage.used_bytes, usage.orphan_bytes, usage.total_bytes), (180, 7, 187));
        let parts: Vec<_> = usage.commits.iter().map(|c| (c.own_bytes, c.shared_bytes)).collect();
        assert_eq!(parts, [(100, 50), (30, 50)]);
        assert_eq!(usage.datasets.first().map(|d| (d.cached_bytes, d.own_bytes)), Some((180, 180)));
        assert_eq!((usage.capacity_bytes, usage.free_bytes), (1187, 1000));
    }

    #[test]
    fn a_hundred_percent_means_every_byte() {
        let mut facts = TierFacts {
            commits: BTreeMap::from([(key(1), uses(&[(1, 999_999), (2, 1)]))]),
            objects: BTreeMap::from([(pack(1), 999_999)]),
            ..TierFacts::default()
        };
        assert_eq!(account(&facts).commits.first().map(|c| c.percent_cached), Some(99));
        facts.staged.insert(pack(2), 1);
        assert_eq!(account(&facts).commits.first().map(|c| c.percent_cached), Some(100));
    }

    #[test]
    fn free_is_what_both_the_capacity_and_the_file_system_leave() {
        let mut facts = TierFacts {
            objects: BTreeMap::from([(pack(1), 60)]),
            configured_capacity_bytes: Some(100),
            fs_free_bytes: 1000,
            ..TierFacts::default()
        };
        assert_eq!(account(&facts).free_bytes, 40);
        facts.fs_free_bytes = 5;
        assert_eq!(account(&facts).free_bytes, 5);
    }

    #[test]
    fn what_is_kept_or_mounted_does_not_expire() {
        let mut facts = TierFacts { commits: BTreeMap::from([(key(1), uses(&[]))]), ..TierFacts::default() };
        assert_eq!(account(&facts).commits.first().and_then(|c| c.expires_ms), Some(1500));
        facts.commits.insert(key(1), CommitFacts { kept: true, ..uses(&[]) });
        assert_eq!(account(&facts).commits.first().and_then(|c| c.expires_ms), None);
    }
}
