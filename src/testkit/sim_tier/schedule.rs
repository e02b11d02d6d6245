//! Two or more clients that take turns operation by operation, in an order that a test wants.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::{Call, Fate, Gate, Rng, SimIo, World};

/// Who does the next operation.
#[derive(Debug)]
pub(crate) struct Schedule {
    state: Mutex<Turns>,
    changed: Condvar,
}

#[derive(Debug)]
struct Turns {
    /// Clients that still run; the first one has the turn.
    running: Vec<u64>,
    /// After so many operations the turn goes to the next client; then the rest runs on.
    switches: Vec<u64>,
    rng: Option<Rng>,
    done: u64,
}

impl Schedule {
    /// The first of `clients` begins; the turn changes after each of these numbers of operations, and
    /// when one has finished.
    pub(crate) fn switching(clients: &[&SimIo], mut switches: Vec<u64>) -> Arc<Self> {
        switches.reverse();
        let running = clients.iter().map(|io| io.id()).collect();
        let state = Mutex::new(Turns { running, switches, rng: None, done: 0 });
        Arc::new(Self { state, changed: Condvar::new() })
    }

    /// Each next operation is anybody's.
    pub(crate) fn random(clients: &[&SimIo], seed: u64) -> Arc<Self> {
        let running = clients.iter().map(|io| io.id()).collect();
        let state = Mutex::new(Turns { running, switches: Vec::new(), rng: Some(Rng::new(seed)), done: 0 });
        Arc::new(Self { state, changed: Condvar::new() })
    }

    /// This client does no more.
    pub(crate) fn finish(&self, io: &SimIo) {
        let mut turns = self.state.lock();
        turns.running.retain(|id| *id != io.id());
        turns.done = 0;
        self.changed.notify_all();
    }
}

impl Gate for Schedule {
    fn before(&self, client: u64, _call: &Call<'_>) -> Fate {
        let mut turns = self.state.lock();
        while turns.running.contains(&client) && turns.running.first() != Some(&client) {
            self.changed.wait(&mut turns);
        }
        Fate::Done { ns: 1_000_000 }
    }

    fn after(&self, client: u64, _call: &Call<'_>, _world: &mut World, _done: Option<i32>) {
        let mut turns = self.state.lock();
        if turns.running.first() != Some(&client) {
            return;
        }
        turns.done += 1;
        let others = turns.running.len() as u64;
        let due = turns.switches.last() == Some(&turns.done);
        let step = if let Some(rng) = &mut turns.rng {
            rng.below(others)
        } else if due {
            turns.switches.pop();
            turns.done = 0;
            1
        } else {
            0
        };
        if !turns.running.is_empty() {
            let len = turns.running.len();
            turns.running.rotate_left(usize::try_from(step).unwrap_or(0) % len);
        }
        self.changed.notify_all();
    }
}
