//! What a seed stands for: how many nodes, how slow, how unlucky.

use crate::store::tier::TierConfig;
use crate::testkit::sim_tier::Rng;

use super::super::kit;
use super::broken::Broken;

/// What nodes do most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mix {
    All,
    Evicting,
    Filling,
    Damage,
}

/// What later sweeps do about what an eviction did wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mending {
    /// They put back what is needed before anything else, and look once more before the trash is emptied.
    Whole,
    /// They only look once more before the trash is emptied.
    LastLook,
    /// Nothing: the trash is emptied blindly.
    None,
}

/// How one run goes. Everything follows from the seed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Params {
    pub seed: u64,
    pub nodes: usize,
    /// After an operation it is anybody's turn once in so many times.
    pub switch_one_in: u64,
    pub operation_ms_max: u64,
    /// 0: never.
    pub pause_one_in: u64,
    pub crash_one_in: u64,
    pub fault_one_in: u64,
    pub power_cuts: bool,
    pub damage: bool,
    pub nfs3: bool,
    pub full: bool,
    pub idle_ms_max: u64,
    pub heartbeat_ms: u64,
    pub ttl_ms: u64,
    pub capacity_bytes: Option<u64>,
    pub mix: Mix,
    /// The rule of the protocol that nodes do not keep.
    pub broken: Option<Broken>,
    /// Who is about to take something away, a turn or what goes into the trash, often stops before it does.
    pub brake: bool,
    pub mending: Mending,
}

impl Params {
    pub(super) fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x9a7a);
        let mut params = Self {
            seed,
            nodes: 2 + usize::try_from(rng.below(2)).unwrap_or(0),
            switch_one_in: rng.pick(&[1, 2, 4, 8, 24]),
            operation_ms_max: rng.pick(&[1, 10, 100, 600]),
            pause_one_in: rng.pick(&[0, 60, 200, 800]),
            crash_one_in: rng.pick(&[0, 0, 300, 1500]),
            fault_one_in: rng.pick(&[0, 0, 0, 40, 300]),
            power_cuts: rng.one_in(4),
            damage: rng.one_in(2),
            nfs3: rng.one_in(3),
            full: rng.one_in(8),
            idle_ms_max: rng.pick(&[100, 3_000, 30_000]),
            heartbeat_ms: rng.pick(&[10_000, 30_000]),
            ttl_ms: rng.pick(&[1_000, 60_000, kit::TTL_MS]),
            capacity_bytes: rng.pick(&[None, None, Some(900), Some(2_000)]),
            mix: rng.pick(&[Mix::All, Mix::Evicting, Mix::Evicting, Mix::Filling, Mix::Damage]),
            broken: None,
            brake: false,
            mending: Mending::Whole,
        };
        if params.mix == Mix::Evicting {
            // Calls must overlap: nobody idles for longer than one takes.
            params.idle_ms_max = params.operation_ms_max * 40;
        }
        params
    }

    /// Nobody fails or dies; calls overlap, and whoever has moved something stops for a while.
    pub(super) fn crowd(&mut self, mix: Mix) {
        (self.mix, self.nodes, self.switch_one_in, self.pause_one_in) = (mix, 3, 4, 60);
        (self.crash_one_in, self.fault_one_in, self.power_cuts, self.full) = (0, 0, false, false);
        self.idle_ms_max = self.operation_ms_max * 40;
    }

    pub(super) fn config(&self) -> TierConfig {
        TierConfig { ttl_ms: Some(self.ttl_ms), capacity_bytes: self.capacity_bytes, ..kit::config() }
    }
}
