//! Where the workers of a mount wait until the device is theirs, and when what a daemon before this one
//! had taken has come again.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// The bit that marks a request that the kernel has sent again; not part of a handle.
pub(crate) const RESENT: u64 = 1 << 63;
/// Inode and count of the message that brings a worker to the gate: no inode of a commit has this number.
pub(crate) const AT_THE_GATE: u64 = u64::MAX;
/// A read that was sent again is with a worker by then, and counted.
const SETTLING: Duration = Duration::from_millis(100);

#[derive(Debug, Default)]
struct State {
    waiting: usize,
    is_open: bool,
}

/// Closed at first; each worker waits at it once.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// Waits until the gate is open.
    pub fn wait(&self) {
        let mut state = self.state.lock();
        state.waiting += 1;
        self.changed.notify_all();
        while !state.is_open {
            self.changed.wait(&mut state);
        }
        state.waiting -= 1;
    }

    /// Says whether so many workers came in time.
    pub fn has_all(&self, workers: usize, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        while state.waiting < workers {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return state.waiting >= workers;
            }
        }
        true
    }

    /// Lets everybody through from now on.
    pub fn open(&self) {
        self.state.lock().is_open = true;
        self.changed.notify_all();
    }
}

/// Whether reads that a dead daemon had taken may still be on their way. While they are, no inode is newly
/// given to the kernel, which would refuse to mix them with its own reads. They come before all
/// others: the first request that was not sent again is behind them.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    taken_over: bool,
    first_new: OnceLock<Instant>,
}

impl Settled {
    /// Of a mount that nobody served before, or that another daemon left.
    pub fn new(taken_over: bool) -> Self {
        Self { taken_over, first_new: OnceLock::new() }
    }

    /// Notes that a request was read.
    pub fn saw(&self, sent_again: bool) {
        if self.taken_over && !sent_again {
            self.first_new.get_or_init(Instant::now);
        }
    }

    /// Says whether inodes may be given to the kernel.
    pub fn is_settled(&self) -> bool {
        !self.taken_over || self.first_new.get().is_some_and(|at| at.elapsed() > SETTLING)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn nobody_passes_a_closed_gate_and_everybody_an_open_one() {
        let gate = Arc::new(Gate::default());
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let gate = Arc::clone(&gate);
                std::thread::spawn(move || gate.wait())
            })
            .collect();
        assert!(gate.has_all(3, Duration::from_secs(60)));
        assert!(workers.iter().all(|worker| !worker.is_finished()));
        assert!(!gate.has_all(4, Duration::from_millis(1)));
        gate.open();
        for worker in workers {
            worker.join().expect("passes");
        }
        gate.wait();
    }

    #[test]
    fn a_mount_that_was_taken_over_settles_with_the_first_new_request() {
        assert!(Settled::new(false).is_settled());
        let settled = Settled::new(true);
        settled.saw(true);
        assert!(!settled.is_settled() && settled.first_new.get().is_none());
        settled.saw(false);
        while !settled.is_settled() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
