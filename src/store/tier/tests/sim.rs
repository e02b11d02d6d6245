//! The protocol under a scheduler: several nodes, two threads each, take turns operation by operation
//! over one simulated server, as a seed says. They mount, fill by claims, read, keep, hold, evict, sweep,
//! find damage; they are paused, killed and started again between any two operations; calls fail, late
//! or early; clocks are off by up to an hour; the power goes. After each step the promises are checked.
//!
//! * [`params`]: what a seed stands for. [`baton`]: whose turn it is. [`seam`]: what nodes see of the server.
//! * [`node`]: what nodes do. [`oracle`]: what must be true. [`broken`]: rules broken on purpose, and found. Here: a run, its quiet points, its tests.
//!
//! `LARDER_SIM_SEED=n cargo test --lib replays_a_seed -- --ignored --nocapture` shows every step of a run.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use super::kit::{self, Pack, new_world, pack};
use crate::testkit::sim_tier::{Rng, SimWorld};

mod baton;
mod broken;
mod node;
mod oracle;
mod params;
mod seam;

use baton::{Baton, Counts};
use broken::Broken;
use node::{Hands, Process, Stage0, Worker, node_id};
use oracle::Oracle;
use params::Params;

/// Commits of the universe; each needs two packs, neighbours share one.
const COMMITS: u8 = 3;
/// Parts of a run, with a quiet point behind each.
const PARTS: u64 = 2;

/// What came of a run.
#[derive(Debug)]
struct Outcome {
    violation: Option<String>,
    counts: Counts,
    trace: Vec<String>,
}

fn universe() -> Vec<Pack> {
    (1..=COMMITS + 1).map(pack).collect()
}

struct Run {
    stage: Stage0,
    hands: Vec<Mutex<Hands>>,
}

/// Runs a seed.
fn simulate(base: &SimWorld, params: Params, steps: u64, traced: bool) -> Outcome {
    let run = Run::new(base, params, traced);
    let mut rng = Rng::new(params.seed ^ 0x77);
    for part in 0..PARTS {
        run.part(part, steps / PARTS);
        if params.power_cuts && rng.one_in(2) && !run.is_broken() {
            run.stage.baton.power_cut();
        }
        run.quiet(part + 1 == PARTS, &mut rng);
        if run.is_broken() {
            break;
        }
    }
    let violation = run.stage.baton.tell(|oracle, _| oracle.violation.clone());
    Outcome { violation, counts: run.stage.baton.counts(), trace: run.stage.baton.take_trace() }
}

impl Run {
    fn new(base: &SimWorld, params: Params, traced: bool) -> Self {
        let world = base.fork();
        let packs = universe();
        world.set_stale_when_removed(params.nfs3);
        world.with(|world| world.watched = true);
        if params.full {
            let live = world.with(|world| world.live_bytes());
            world.set_capacity(Some(live + 4_000));
        }
        let mut oracle = Oracle::new(&packs, params.config());
        oracle.losses_only = params.broken == Some(Broken::TrashEmptiedBlindly);
        let baton = Baton::new(world.clone(), params, oracle, traced);
        let fans = packs.iter().map(|p| format!("objects/{}", &p.id.to_string()[..2])).collect();
        let processes = (0..params.nodes).map(|_| Mutex::new(None)).collect();
        let ids = Mutex::new((0..params.nodes).map(|node| node as u128 + 1).collect());
        let hands = (0..params.nodes).map(|_| Mutex::default()).collect();
        let stage = Stage0 { baton, world, params, packs, fans, processes, ids, abandoned: Mutex::default() };
        let run = Self { stage, hands };
        let mut rng = Rng::new(params.seed);
        for node in 0..params.nodes {
            run.stage.boot(node, &mut rng).expect("an undisturbed node comes up");
        }
        run
    }

    fn is_broken(&self) -> bool {
        self.stage.baton.tell(|oracle, _| oracle.violation.is_some())
    }

    /// Everybody runs for so many steps.
    fn part(&self, part: u64, steps: u64) {
        self.stage.baton.run(steps, |actor| {
            let seed = self.stage.params.seed.wrapping_mul(31).wrapping_add(part * 64 + actor as u64);
            self.actor(actor, Rng::new(seed));
        });
    }

    fn actor(&self, actor: usize, mut rng: Rng) {
        let node = actor / 2;
        if actor.is_multiple_of(2) {
            self.stage.upkeep(node, &mut rng);
        } else {
            let hands = &mut *self.hands[node].lock();
            Worker { stage: &self.stage, node, rng, hands }.run();
        }
    }

    /// Nobody is at anything: what time and sweeps mend is mended, then everything must be in order.
    fn quiet(&self, last: bool, rng: &mut Rng) {
        if self.is_broken() {
            return;
        }
        let stage = &self.stage;
        stage.world.set_capacity(None);
        for node in 0..stage.params.nodes {
            if stage.process(node).is_none() {
                stage.boot(node, rng).expect("an undisturbed node comes up");
            }
            let process = stage.process(node).expect("it is up");
            let hands = &mut *self.hands[node].lock();
            hands.outlive(process.life);
            if last {
                hands.let_go(stage);
            }
        }
        let processes: Vec<Process> = (0..stage.params.nodes).filter_map(|node| stage.process(node)).collect();
        // Longer than any turn lives, so that a dead steward's is over.
        for round in 0..3 {
            for _ in 0..4 {
                stage.baton.sleep_ms(30_000);
                processes.iter().enumerate().for_each(|(node, process)| stage.heartbeat(node, process));
            }
            self.clean_sweep(&processes[round % processes.len()]);
        }
        stage.baton.tell(|oracle, world| oracle.check_settled(world));
        self.check_accounting(&processes[0]);
        if last && !self.is_broken() {
            self.nothing_is_left(&processes[0]);
        }
    }

    fn clean_sweep(&self, process: &Process) {
        self.stage.baton.calling(0, "sweep");
        match process.tier.steward_step(&process.tier.policy()) {
            Ok(report) if !report.elsewhere && report.failed.is_empty() => {}
            other => self.complain("liveness", &format!("a sweep of a quiet tier: {other:?}")),
        }
    }

    fn complain(&self, promise: &str, text: &str) {
        self.stage.baton.tell(|oracle, _| oracle.violate(promise, text));
    }

    /// The accounting equals what the server has, by the byte and by kind.
    fn check_accounting(&self, process: &Process) {
        let usage = match process.tier.check(false) {
            Ok(report) if report.walked_bytes == report.usage.total_bytes => report.usage,
            other => return self.complain("P8", &format!("the accounting is not the walk: {other:?}")),
        };
        let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
        self.stage.world.with(|world| {
            let mut seen = std::collections::BTreeSet::new();
            // A file with several names counts where it is first met, in this order.
            for kind in ["objects", "staging", "holds", "trash", "quarantine", "tmp"] {
                world.each_file(|path, ino| {
                    let counts = path.starts_with(kind) && !(kind == "holds" && path.ends_with("/hold"));
                    if counts && seen.insert(ino) {
                        *kinds.entry(kind.to_owned()).or_insert(0) += world.bytes(ino).len() as u64;
                    }
                });
            }
        });
        let told = [
            ("objects", usage.used_bytes + usage.orphan_bytes),
            ("staging", usage.staging_bytes),
            ("holds", usage.held_only_bytes),
            ("trash", usage.trash_bytes),
            ("quarantine", usage.quarantine_bytes),
            ("tmp", usage.temp_bytes),
        ];
        for (kind, told) in told {
            let is = kinds.get(kind).copied().unwrap_or(0);
            if is != told {
                self.complain("P8", &format!("{kind}: the accounting says {told} bytes, there are {is}"));
            }
        }
    }

    /// Nobody needs anything any more: after a while nothing is left.
    fn nothing_is_left(&self, process: &Process) {
        for id in self.stage.ids.lock().iter().chain(self.stage.abandoned.lock().iter()) {
            self.stage.baton.calling(0, "forget a node");
            process.tier.forget_node(&node_id(*id)).expect("an undisturbed call works");
        }
        for commit in 1..=COMMITS {
            process.tier.unkeep(&kit::commit_key(commit)).expect("an undisturbed call works");
        }
        for _ in 0..5 {
            self.stage.baton.sleep_ms(8 * 24 * 3_600_000);
            self.clean_sweep(process);
        }
        let stays = ["larder-tier.json", "nodes/", "steward/", "datasets/"];
        let left = self.stage.world.files().into_keys().filter(|path| !stays.iter().any(|s| path.starts_with(s)));
        let left: Vec<String> = left.collect();
        if !left.is_empty() {
            self.complain("liveness", &format!("left behind for ever: {left:?}"));
        }
    }
}

/// Steps of one run.
const STEPS: u64 = 3_000;

/// Runs seeds until the first that breaks a promise.
fn find(base: &SimWorld, seeds: std::ops::Range<u64>, steps: u64, counts: &mut Counts) -> Option<(u64, String)> {
    for seed in seeds {
        let outcome = simulate(base, asked(seed), steps, false);
        counts.add(&outcome.counts);
        if let Some(violation) = outcome.violation {
            return Some((seed, violation));
        }
    }
    None
}

/// A seed's run; LARDER_SIM_CROWDED=1..4 makes calls overlap more, in each of the mixes.
fn asked(seed: u64) -> Params {
    let mut params = Params::of(seed);
    let mixes = [params::Mix::All, params::Mix::Evicting, params::Mix::Filling, params::Mix::Damage];
    let crowded = usize::try_from(number("LARDER_SIM_CROWDED", 0)).ok().and_then(|n| n.checked_sub(1));
    if let Some(mix) = crowded.and_then(|at| mixes.get(at)) {
        params.crowd(*mix);
    }
    params
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

#[test]
fn random_schedules_keep_every_promise() {
    let base = new_world();
    let begun = std::time::Instant::now();
    let mut counts = Counts::default();
    let first = number("LARDER_SIM_SEED", 1);
    let found = find(&base, first..first + number("LARDER_SIM_SEEDS", 100), STEPS, &mut counts);
    let seconds = begun.elapsed().as_secs_f64();
    println!("{counts:?} in {seconds:.1} s: {:.0} steps/s", counts.steps as f64 / seconds);
    if let Some((seed, violation)) = found {
        panic!(
            "seed {seed}: {violation}; LARDER_SIM_SEED={seed} cargo test --lib replays_a_seed -- --ignored --nocapture"
        );
    }
}

/// The long form: `make campaign PART=sim`.
#[test]
#[ignore = "make campaign PART=sim"]
fn campaign_of_random_schedules() {
    let base = new_world();
    let begun = std::time::Instant::now();
    let ends = begun + std::time::Duration::from_secs(60 * number("LARDER_CAMPAIGN_MINUTES", 20));
    let mut counts = Counts::default();
    let mut seed = number("LARDER_CAMPAIGN_SEED", 1);
    let mut said = 0;
    while std::time::Instant::now() < ends {
        let found = find(&base, seed..seed + 20, STEPS, &mut counts);
        seed += 20;
        let rate = counts.steps as f64 / begun.elapsed().as_secs_f64();
        if let Some((seed, violation)) = found {
            panic!("seed {seed}: {violation} (after {} steps)", counts.steps);
        }
        if counts.steps / 1_000_000 > said {
            said = counts.steps / 1_000_000;
            println!("up to seed {seed}: {counts:?}, {rate:.0} steps/s");
        }
    }
    println!("up to seed {seed}: {counts:?}: every promise kept");
}

/// Shows every step of one run.
#[test]
#[ignore = "for people: LARDER_SIM_SEED=n"]
fn replays_a_seed() {
    let outcome = simulate(&new_world(), asked(number("LARDER_SIM_SEED", 1)), number("LARDER_SIM_STEPS", STEPS), true);
    for line in &outcome.trace {
        println!("{line}");
    }
    println!("{:?}\n{:?}", outcome.counts, outcome.violation);
}
