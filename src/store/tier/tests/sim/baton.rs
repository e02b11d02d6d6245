//! Whose turn it is. Every operation of every node comes through here: the seed says who goes on, who
//! sleeps, who dies, what fails, and how long it took. The actors are coroutines of one thread, so that
//! a run is its seed, and a turn costs nearly nothing.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use generator::{Generator, Gn};
use nix::libc;
use parking_lot::Mutex;

use super::oracle::Oracle;
use super::params::Params;
use crate::testkit::sim_tier::{Call, Fate, Gate, Rng, SimWorld, Verb, World};

const NOBODY: usize = usize::MAX;
const MS: i64 = 1_000_000;
/// Unoptimised code has large frames; untouched pages cost nothing.
const STACK_WORDS: usize = 1 << 16;

thread_local! {
    /// Which actor runs; [`NOBODY`]: the test itself, which acts while nobody else does.
    static ACTOR: Cell<usize> = const { Cell::new(NOBODY) };
}

/// Something that runs: a node has two.
#[derive(Debug)]
struct Actor {
    node: usize,
    wake_ns: i64,
    done: bool,
    /// It has just moved or linked something: where others may come in between.
    moved: bool,
}

/// What the schedule knows of a node.
#[derive(Debug, Clone, Default)]
struct NodeTurn {
    paused_until_ns: i64,
    dead: bool,
    back_ns: i64,
    /// How often it died.
    deaths: u64,
}

#[derive(Debug)]
pub(super) struct Turns {
    rng: Rng,
    params: Params,
    actors: Vec<Actor>,
    nodes: Vec<NodeTurn>,
    /// Client -> its node; dead ones are gone.
    clients: BTreeMap<u64, usize>,
    /// Steps of this run, and at which this part of it ends.
    pub(super) step: u64,
    until: u64,
    /// Nothing bad happens any more, everybody comes to an end.
    draining: bool,
    pub(super) counts: Counts,
    pub(super) oracle: Oracle,
    trace: Option<Vec<String>>,
}

/// What happened in a run.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub steps: u64,
    pub calls: u64,
    pub pauses: u64,
    pub crashes: u64,
    pub faults: u64,
    pub power_cuts: u64,
    pub published: u64,
    pub evicted: u64,
    pub takeovers: u64,
    pub set_aside: u64,
    pub fetched_spans: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.calls += other.calls;
        self.pauses += other.pauses;
        self.crashes += other.crashes;
        self.faults += other.faults;
        self.power_cuts += other.power_cuts;
        self.published += other.published;
        self.evicted += other.evicted;
        self.takeovers += other.takeovers;
        self.set_aside += other.set_aside;
        self.fetched_spans += other.fetched_spans;
    }
}

/// Gives turns.
#[derive(Debug)]
pub(super) struct Baton {
    /// Whose turn is next.
    next: AtomicUsize,
    state: Mutex<Turns>,
    world: SimWorld,
    traced: bool,
}

impl Baton {
    pub(super) fn new(world: SimWorld, params: Params, oracle: Oracle, traced: bool) -> Arc<Self> {
        let turns = Turns {
            rng: Rng::new(params.seed ^ 0x5eed),
            actors: Vec::new(),
            nodes: vec![NodeTurn::default(); params.nodes],
            clients: BTreeMap::new(),
            step: 0,
            until: 0,
            draining: true,
            counts: Counts::default(),
            oracle,
            trace: traced.then(Vec::new),
            params,
        };
        Arc::new(Self { next: AtomicUsize::new(NOBODY), state: Mutex::new(turns), world, traced })
    }

    /// Looks at the oracle, or tells it something, between two operations.
    pub(super) fn tell<T>(&self, say: impl FnOnce(&mut Oracle, &World) -> T) -> T {
        let mut turns = self.state.lock();
        self.world.with(|world| say(&mut turns.oracle, world))
    }

    pub(super) fn count(&self, what: impl FnOnce(&mut Counts)) {
        what(&mut self.state.lock().counts);
    }

    pub(super) fn counts(&self) -> Counts {
        let turns = self.state.lock();
        Counts { steps: turns.step, ..turns.counts }
    }

    pub(super) fn note(&self, text: impl FnOnce() -> String) {
        let mut turns = self.state.lock();
        let step = turns.step;
        if let Some(trace) = &mut turns.trace {
            trace.push(format!("{step:>6} -- {}", text()));
        }
    }

    pub(super) fn take_trace(&self) -> Vec<String> {
        self.state.lock().trace.take().unwrap_or_default()
    }

    /// Runs two actors of each node to their ends; nothing bad happens any more after so many steps.
    pub(super) fn run(&self, steps: u64, act: impl Fn(usize) + Copy + Send) {
        let count = {
            let mut turns = self.state.lock();
            let count = turns.nodes.len() * 2;
            turns.actors = (0..count).map(|at| Actor { node: at / 2, wake_ns: 0, done: false, moved: false }).collect();
            turns.until = turns.step + steps;
            turns.draining = false;
            let first = self.pick(&mut turns);
            self.next.store(first, Ordering::Relaxed);
            count
        };
        let mut actors: Vec<Generator<'_, (), ()>> =
            (0..count).map(|at| Gn::new_opt(STACK_WORDS, move || act(at))).collect();
        loop {
            let next = self.next.load(Ordering::Relaxed);
            let Some(actor) = actors.get_mut(next) else {
                break;
            };
            ACTOR.set(next);
            actor.resume();
            ACTOR.set(NOBODY);
            if actor.is_done() {
                let mut turns = self.state.lock();
                if let Some(actor) = turns.actors.get_mut(next) {
                    actor.done = true;
                }
                let next = self.pick(&mut turns);
                self.next.store(next, Ordering::Relaxed);
            }
        }
    }

    /// Chooses among those that can run; where nobody can, time passes until somebody can.
    fn pick(&self, turns: &mut Turns) -> usize {
        loop {
            let now_ns = self.world.with(|world| world.now_ns);
            let ready = |turns: &Turns, actor: &Actor| {
                let paused = turns.nodes.get(actor.node).map_or(0, |node| node.paused_until_ns);
                actor.wake_ns.max(paused)
            };
            let mut first_ns = i64::MAX;
            let mut runnable: [usize; 16] = [NOBODY; 16];
            let mut count = 0;
            for (at, actor) in turns.actors.iter().enumerate().filter(|(_, actor)| !actor.done) {
                let ready_ns = ready(turns, actor);
                first_ns = first_ns.min(ready_ns);
                if ready_ns <= now_ns {
                    runnable[count] = at;
                    count += 1;
                }
            }
            if count > 0 {
                return runnable[usize::try_from(turns.rng.below(count as u64)).unwrap_or(0)];
            }
            if first_ns == i64::MAX {
                return NOBODY;
            }
            self.world.with(|world| world.now_ns = first_ns.max(world.now_ns));
        }
    }

    /// Lets the others go on until this actor's turn comes again.
    fn pass(&self, mut turns: parking_lot::MutexGuard<'_, Turns>, me: usize) {
        let next = self.pick(&mut turns);
        if next != me {
            self.next.store(next, Ordering::Relaxed);
            drop(turns);
            step_aside();
        }
    }

    /// Does nothing for a while.
    pub(super) fn sleep_ms(&self, ms: u64) {
        let me = ACTOR.get();
        let mut turns = self.state.lock();
        let now_ns = self.world.with(|world| world.now_ns);
        if me == NOBODY {
            self.world.advance_ms(ms);
            return;
        }
        // At the end nobody waits for long.
        let ms = if turns.draining { ms.min(10_000) } else { ms };
        if let Some(actor) = turns.actors.get_mut(me) {
            actor.wake_ns = now_ns + i64::try_from(ms).unwrap_or(0) * MS;
        }
        self.pass(turns, me);
    }

    /// Which public call the actor is in: its number, and its name.
    pub(super) fn call_number(&self) -> (usize, u64) {
        let actor = ACTOR.get();
        (actor, self.state.lock().oracle.call_of(actor).number)
    }

    pub(super) fn call_name(&self) -> &'static str {
        self.state.lock().oracle.call_of(ACTOR.get()).name
    }

    /// A public call begins.
    pub(super) fn calling(&self, node: usize, name: &'static str) {
        let mut turns = self.state.lock();
        turns.counts.calls += 1;
        let step = turns.step;
        turns.oracle.calling(ACTOR.get(), node, name, step);
    }

    /// This part of the run is over.
    pub(super) fn is_over(&self) -> bool {
        let turns = self.state.lock();
        turns.draining || turns.step >= turns.until || turns.oracle.violation.is_some()
    }

    pub(super) fn now_ns(&self) -> i64 {
        self.world.with(|world| world.now_ns)
    }

    /// A node has a new client.
    pub(super) fn join(&self, node: usize, client: u64) {
        let mut turns = self.state.lock();
        turns.clients.insert(client, node);
        if let Some(turn) = turns.nodes.get_mut(node) {
            turn.dead = false;
        }
    }

    /// When a dead node comes back; None while it lives.
    pub(super) fn dead_until_ns(&self, node: usize) -> Option<i64> {
        let turns = self.state.lock();
        turns.nodes.get(node).filter(|turn| turn.dead).map(|turn| turn.back_ns)
    }

    /// How often a node died so far.
    pub(super) fn deaths(&self, node: usize) -> u64 {
        self.state.lock().nodes.get(node).map_or(0, |turn| turn.deaths)
    }

    /// Everybody is dead, and the server comes back with what was durable, and more or less of the rest.
    pub(super) fn power_cut(&self) {
        let mut turns = self.state.lock();
        turns.counts.power_cuts += 1;
        for node in 0..turns.nodes.len() {
            self.kill(&mut turns, node);
        }
        let mut rng = Rng::new(turns.rng.below(1 << 40));
        let turns = &mut *turns;
        self.world.with(|world| {
            turns.oracle.power_goes();
            world.crash(&mut rng);
            turns.oracle.watch(world, 0, turns.step);
            turns.oracle.power_is_back(world);
        });
    }

    fn kill(&self, turns: &mut Turns, node: usize) {
        let away_ms = turns.rng.pick(&[1_000, 30_000, 70_000, 200_000]);
        let now_ns = self.world.with(|world| world.now_ns);
        turns.clients.retain(|_, of| *of != node);
        if let Some(turn) = turns.nodes.get_mut(node) {
            if turn.dead {
                return;
            }
            (turn.dead, turn.back_ns) = (true, now_ns + away_ms * MS);
            turn.deaths += 1;
        }
        turns.counts.crashes += 1;
        turns.oracle.died(node);
        if let Some(trace) = &mut turns.trace {
            trace.push(format!("{:>6} -- node {node} dies", turns.step));
        }
    }

    /// What happens to a node before its next operation. True: it cannot do it now.
    fn strike(&self, turns: &mut Turns, node: usize, moved: bool) -> bool {
        let params = turns.params;
        let often = |one_in: u64| if moved && one_in > 0 { (one_in / 20).max(3) } else { one_in };
        if turns.rng.one_in(often(params.crash_one_in)) {
            self.kill(turns, node);
            return true;
        }
        if turns.rng.one_in(often(params.pause_one_in)) {
            // For as long as others need for a call or two; or longer than a claim, the grace time, a lease live.
            let calls_ms = i64::try_from(params.operation_ms_max * 60).unwrap_or(1_000);
            let ms = turns.rng.pick(&[calls_ms, calls_ms, 4 * calls_ms, 20_000, 61_000, 130_000, 501_000, 700_000]);
            let now_ns = self.world.with(|world| world.now_ns);
            if let Some(turn) = turns.nodes.get_mut(node) {
                turn.paused_until_ns = now_ns + ms * MS;
            }
            turns.counts.pauses += 1;
            if let Some(trace) = &mut turns.trace {
                trace.push(format!("{:>6} -- node {node} pauses for {ms} ms", turns.step));
            }
            return true;
        }
        false
    }
}

/// Leaves the coroutine, deep in the code under test: there is no scope to hand down to here.
#[expect(deprecated, reason = "the scoped form needs the scope in every signature below")]
fn step_aside() {
    generator::yield_with(());
}

/// An error that this operation can give.
fn errno_for(verb: Verb, rng: &mut Rng) -> i32 {
    match verb {
        Verb::Create | Verb::Link | Verb::Mkdir | Verb::Write | Verb::Extend | Verb::Rename => {
            rng.pick(&[libc::EIO, libc::ENOSPC, libc::EDQUOT])
        }
        Verb::Read | Verb::StatOpen | Verb::Sync => rng.pick(&[libc::EIO, libc::ESTALE]),
        _ => libc::EIO,
    }
}

impl Gate for Baton {
    fn before(&self, client: u64, call: &Call<'_>) -> Fate {
        let me = ACTOR.get();
        let mut turns = self.state.lock();
        let quick = Fate::Done { ns: MS };
        if me == NOBODY {
            return quick;
        }
        let Some(node) = turns.clients.get(&client).copied().filter(|_| turns.oracle.violation.is_none()) else {
            return Fate::Dead;
        };
        turns.step += 1;
        if !turns.draining && turns.step >= turns.until {
            turns.draining = true;
        }
        let moving = matches!(call.verb, Verb::Rename | Verb::Link) && !call.to.starts_with("nodes/");
        let moved = turns.actors.get_mut(me).is_some_and(|actor| std::mem::replace(&mut actor.moved, moving));
        let takes_away = call.verb == Verb::Rename && (call.to.starts_with("trash/") || call.to.starts_with("tmp/"));
        let brakes = turns.params.brake && takes_away;
        let struck = !turns.draining && self.strike(&mut turns, node, moved || brakes);
        let often = if moved || brakes { 2 } else { turns.params.switch_one_in };
        if struck || turns.rng.one_in(often) {
            self.pass(turns, me);
            turns = self.state.lock();
            if !turns.clients.contains_key(&client) {
                return Fate::Dead;
            }
        }
        let params = turns.params;
        if !turns.draining && turns.rng.one_in(params.fault_one_in) {
            let errno = errno_for(call.verb, &mut turns.rng);
            let late = turns.rng.one_in(3);
            turns.counts.faults += 1;
            return Fate::Fails { errno, late };
        }
        let most = params.operation_ms_max;
        Fate::Done { ns: i64::try_from(1 + turns.rng.below(most)).unwrap_or(1) * MS }
    }

    fn after(&self, client: u64, call: &Call<'_>, world: &mut World, done: Option<i32>) {
        if world.events.is_empty() && !self.traced {
            return;
        }
        let mut turns = self.state.lock();
        turns.write_down(client, call, world, done);
        let (turns, me) = (&mut *turns, ACTOR.get());
        turns.oracle.acting(me);
        turns.oracle.watch(world, client, turns.step);
        if let (Some(violation), Some(trace)) = (&turns.oracle.violation, &mut turns.trace) {
            trace.push(format!("!! {violation}"));
        }
    }
}

impl Turns {
    fn write_down(&mut self, client: u64, call: &Call<'_>, world: &World, done: Option<i32>) {
        let Some(trace) = &mut self.trace else {
            return;
        };
        let who = match (self.clients.get(&client), ACTOR.get()) {
            (Some(node), NOBODY) => format!("n{node} quiet"),
            (Some(node), actor) => format!("n{node} {}", if actor % 2 == 0 { "upkeep" } else { "worker" }),
            (None, _) => "quiet".to_owned(),
        };
        let at_ms = (world.now_ns - 1_000_000_000_000_000_000) / MS;
        let to = if call.to.is_empty() { String::new() } else { format!(" -> {}", call.to) };
        let how = done.map_or(String::new(), |errno| format!("  errno {errno}"));
        trace.push(format!("{:>6} {at_ms:>9} {who:<10} {:?} {}{to}{how}", self.step, call.verb, call.path));
    }
}
