//! Random histories of two nodes against a simple model of what must be there.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::{Strategy, any, prop, prop_oneof};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::kit::{
    TTL_MS, check_accounting, check_published, commit_key, fill, is_published, new_world, node, pack, record,
};
use crate::store::tier::{Lease, Tier, TierError};
use crate::testkit::sim_tier::{Rng, SimIo};

#[derive(Debug, Clone)]
enum Op {
    Mount { node: usize, commit: u8 },
    Unmount { node: usize, commit: u8 },
    Cache { node: usize, commit: u8 },
    Fill { node: usize, commit: u8 },
    Keep { commit: u8 },
    Unkeep { commit: u8 },
    Uncache { node: usize, commit: u8 },
    Sweep { node: usize },
    Wait { ms: u64 },
    Heartbeat { node: usize },
    Quarantine { pack: u8 },
    KillDuringFill { commit: u8, after: u64 },
    KillDuringSweep { after: u64 },
    PowerCut { seed: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    let (node, commit) = (0..2usize, 1..4u8);
    prop_oneof![
        1 => (node.clone(), commit.clone()).prop_map(|(node, commit)| Op::Mount { node, commit }),
        1 => (node.clone(), commit.clone()).prop_map(|(node, commit)| Op::Unmount { node, commit }),
        1 => (node.clone(), commit.clone()).prop_map(|(node, commit)| Op::Cache { node, commit }),
        3 => (node.clone(), commit.clone()).prop_map(|(node, commit)| Op::Fill { node, commit }),
        1 => commit.clone().prop_map(|commit| Op::Keep { commit }),
        1 => commit.clone().prop_map(|commit| Op::Unkeep { commit }),
        1 => (node.clone(), commit.clone()).prop_map(|(node, commit)| Op::Uncache { node, commit }),
        2 => node.clone().prop_map(|node| Op::Sweep { node }),
        2 => prop_oneof![0..200_000u64, 0..2 * TTL_MS].prop_map(|ms| Op::Wait { ms }),
        1 => node.prop_map(|node| Op::Heartbeat { node }),
        1 => (1..6u8).prop_map(|pack| Op::Quarantine { pack }),
        1 => (commit, 0..60u64).prop_map(|(commit, after)| Op::KillDuringFill { commit, after }),
        1 => (0..1500u64).prop_map(|after| Op::KillDuringSweep { after }),
        1 => any::<u64>().prop_map(|seed| Op::PowerCut { seed }),
    ]
}

/// Commit n needs packs n, n + 1, n + 2: neighbours share.
fn packs_of(commit: u8) -> Vec<super::kit::Pack> {
    (commit..commit + 3).map(pack).collect()
}

struct World {
    sim: crate::testkit::sim_tier::SimWorld,
    nodes: Vec<(Tier<SimIo>, SimIo)>,
    leases: BTreeMap<(usize, u8), Lease<SimIo>>,
    kept: BTreeSet<u8>,
    /// Commits that a node had mounted when it died: its lease may live on for a while.
    ghosts: BTreeSet<u8>,
    /// Packs that were published while their commit was protected, and must be there since.
    present: BTreeMap<u8, BTreeSet<u8>>,
}

impl World {
    fn new() -> Self {
        let sim = new_world();
        let nodes = (1..=2).map(|n| node(&sim, n)).collect();
        Self {
            sim,
            nodes,
            leases: BTreeMap::new(),
            kept: BTreeSet::new(),
            ghosts: BTreeSet::new(),
            present: BTreeMap::new(),
        }
    }

    fn protected(&self, commit: u8) -> bool {
        self.kept.contains(&commit) || self.leases.keys().any(|(_, c)| *c == commit)
    }

    fn note_present(&mut self, commit: u8) {
        if self.protected(commit) {
            let there = (commit..commit + 3).filter(|n| is_published(&self.sim, &pack(*n)));
            self.present.insert(commit, there.collect());
        }
    }

    fn fill(&mut self, node: usize, commit: u8) {
        let tier = &self.nodes[node].0;
        if tier.records(&commit_key(commit)).expect("records").is_empty() {
            return;
        }
        for source in packs_of(commit) {
            fill(tier, &source).expect("a healthy tier is filled");
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Mount { node, commit } => {
                let lease = self.nodes[node].0.lease(&record(commit, &packs_of(commit))).expect("a lease");
                if let Some(old) = self.leases.insert((node, commit), lease) {
                    old.release().expect("released");
                }
                self.note_present(commit);
            }
            Op::Unmount { node, commit } => {
                if let Some(lease) = self.leases.remove(&(node, commit)) {
                    lease.release().expect("released");
                }
            }
            Op::Cache { node, commit } => {
                self.nodes[node].0.add_record(&record(commit, &packs_of(commit))).expect("a record");
            }
            Op::Fill { node, commit } => {
                self.fill(node, commit);
                self.note_present(commit);
            }
            Op::Keep { commit } => match self.nodes[0].0.keep(&commit_key(commit)) {
                Ok(()) => {
                    self.kept.insert(commit);
                    self.note_present(commit);
                }
                Err(error) => assert!(matches!(error, TierError::NotCached { .. }), "{error:?}"),
            },
            Op::Unkeep { commit } => {
                self.nodes[0].0.unkeep(&commit_key(commit)).expect("not kept");
                self.kept.remove(&commit);
            }
            Op::Uncache { node, commit } => match self.nodes[node].0.uncache(&commit_key(commit)) {
                Ok(_) => assert!(!self.protected(commit), "a protected commit was removed"),
                Err(TierError::Busy { .. }) => {
                    assert!(self.protected(commit) || self.ghosts.contains(&commit));
                }
                Err(error) => assert!(matches!(error, TierError::NotCached { .. }), "{error:?}"),
            },
            Op::Sweep { node } => {
                let tier = &self.nodes[node].0;
                let report = tier.steward_step(&tier.policy()).expect("a sweep");
                assert!(report.failed.is_empty(), "{:?}", report.failed);
            }
            Op::Wait { ms } => self.wait(ms),
            Op::Heartbeat { node } => assert!(self.nodes[node].0.heartbeat().failed.is_empty()),
            Op::Quarantine { pack: n } => self.quarantine(n),
            Op::KillDuringFill { commit, after } => {
                self.nodes[1].1.kill_after(after);
                for source in packs_of(commit) {
                    if self.nodes[1].0.records(&commit_key(commit)).is_ok_and(|r| !r.is_empty()) {
                        let _ = fill(&self.nodes[1].0, &source);
                    }
                }
                self.restart(1);
            }
            Op::KillDuringSweep { after } => {
                self.nodes[1].1.kill_after(after);
                let _ = self.nodes[1].0.steward_step(&self.nodes[1].0.policy());
                self.restart(1);
            }
            Op::PowerCut { seed } => self.power_cut(seed),
        }
    }

    /// Nodes that live renew their leases in time.
    fn wait(&mut self, ms: u64) {
        let mut left = ms;
        while left > 0 {
            let step = left.min(300_000);
            self.sim.advance_ms(step);
            left -= step;
            for (tier, _) in &self.nodes {
                assert!(tier.heartbeat().failed.is_empty());
            }
        }
    }

    fn quarantine(&mut self, n: u8) {
        let tier = &self.nodes[0].0;
        if let Some(found) = tier.pack(&pack(n).id).expect("readable") {
            tier.quarantine(&pack(n).id, &found.identity, "test").expect("set aside");
            for present in self.present.values_mut() {
                present.remove(&n);
            }
        }
    }

    /// The process of a node is gone: its mounts as well.
    fn restart(&mut self, at: usize) {
        let gone: Vec<_> = self.leases.keys().filter(|(node, _)| *node == at).copied().collect();
        for key in gone {
            if let Some(lease) = self.leases.remove(&key) {
                drop(lease);
                self.ghosts.insert(key.1);
            }
        }
        self.nodes[at] = node(&self.sim, at as u8 + 1);
        // What its death left half-way is put right by the next sweep, once its turn has expired.
        self.wait(100_000);
        let tier = &self.nodes[0].0;
        tier.steward_step(&tier.policy()).expect("a sweep");
    }

    fn power_cut(&mut self, seed: u64) {
        // The dead write nothing more.
        for (_, io) in &self.nodes {
            io.kill_after(0);
        }
        self.ghosts.extend(self.leases.keys().map(|(_, commit)| *commit));
        self.leases.clear();
        self.sim.crash(&mut Rng::new(seed));
        self.nodes = (1..=2).map(|n| node(&self.sim, n)).collect();
        self.wait(100_000);
        let tier = &self.nodes[0].0;
        tier.steward_step(&tier.policy()).expect("a sweep");
    }

    fn check(&mut self) {
        check_published(&self.sim, &(0..8).map(pack).collect::<Vec<_>>());
        for (commit, packs) in self.present.clone() {
            if !self.protected(commit) {
                self.present.remove(&commit);
                continue;
            }
            for n in packs {
                assert!(is_published(&self.sim, &pack(n)), "commit {commit} is protected, and pack {n} is gone");
            }
            let records = self.nodes[0].0.records(&commit_key(commit)).expect("records");
            assert_eq!(records.len(), 1, "commit {commit} is protected and has its record");
        }
        check_accounting(&self.nodes[0].0);
    }
}

#[test]
fn random_histories_keep_every_promise() {
    let config = Config { cases: 48, max_shrink_iters: 400, failure_persistence: None, ..Config::default() };
    // The same histories each time; LARDER_TEST_SEED=n gives others.
    let seed = std::env::var("LARDER_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[seed.unwrap_or(1u8); 32]);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let ran = runner.run(&prop::collection::vec(op(), 1..25), |ops| {
        let mut world = World::new();
        for op in &ops {
            world.apply(op);
            world.check();
        }
        Ok(())
    });
    if let Err(error) = ran {
        panic!("{error}");
    }
}
