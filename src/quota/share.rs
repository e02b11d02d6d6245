//! How much each project deserves: the quota first, the surplus in the ratio of the weights.

use super::snapshot::MilliGpus;

/// What a project brings to the division.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// What it is guaranteed.
    pub quota: MilliGpus,
    /// Its part of the surplus, relative to the others'.
    pub weight: u64,
    /// What it could use.
    pub demand: MilliGpus,
}

/// Divides `capacity`: each claim gets the smaller of quota and demand; what is left is poured out
/// in the ratio of the weights until each demand is met or nothing is left.
///
/// Results are rounded down, never distributed by position: so they do not depend on the order of
/// the claims, and a claim's share never falls when its weight grows.
pub fn fair_shares(capacity: MilliGpus, claims: &[Claim]) -> Vec<MilliGpus> {
    let mut shares: Vec<u64> = claims.iter().map(|claim| claim.quota.0.min(claim.demand.0)).collect();
    let given = shares.iter().fold(0u64, |sum, share| sum.saturating_add(*share));
    let mut surplus = u128::from(capacity.0.saturating_sub(given));
    let mut open: Vec<(usize, u128, u128)> = claims
        .iter()
        .zip(&shares)
        .enumerate()
        .map(|(at, (claim, share))| (at, u128::from(claim.demand.0.saturating_sub(*share)), u128::from(claim.weight)))
        .filter(|(_, missing, weight)| *missing > 0 && *weight > 0)
        .collect();
    // Who is full first, as the level rises: the smallest missing/weight. Positions do not matter
    // among equals, since all of them are full at the same level.
    open.sort_by(|a, b| (a.1 * b.2).cmp(&(b.1 * a.2)));
    let mut weights: u128 = open.iter().map(|(_, _, weight)| weight).sum();
    for (at, missing, weight) in open {
        // The level at which this one is full is reached by what is left if missing/weight <= surplus/weights.
        let part = if missing * weights <= surplus * weight { missing } else { surplus * weight / weights };
        if part == missing {
            surplus -= missing;
            weights -= weight;
        }
        if let Some(share) = shares.get_mut(at) {
            *share = share.saturating_add(u64::try_from(part).unwrap_or(u64::MAX));
        }
    }
    shares.into_iter().map(MilliGpus).collect()
}
