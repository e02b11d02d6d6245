//! Bytes in flight, in two lanes: demand (someone waits) before prefetch.
//!
//! One budget for both. A waiting demand request is granted before any prefetch request, and
//! prefetch never takes more than three quarters, so that a demand request seldom waits for a
//! prefetch body to end. Within a lane: first come, first served.
//!
//! Invariant: the sum of granted permits never exceeds the budget. The lock is never held while
//! anybody is woken.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::store::locking::{Lock as _, Locking, Plain};

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    /// A reader waits.
    Demand,
    /// Nobody waits.
    Prefetch,
}

#[derive(Debug)]
struct Waiter<L: Locking> {
    bytes: u64,
    grant: oneshot::Sender<Permit<L>>,
}

#[derive(Debug)]
struct State<L: Locking> {
    used: u64,
    used_prefetch: u64,
    peak: u64,
    demand: VecDeque<Waiter<L>>,
    prefetch: VecDeque<Waiter<L>>,
}

impl<L: Locking> Default for State<L> {
    fn default() -> Self {
        Self { used: 0, used_prefetch: 0, peak: 0, demand: VecDeque::new(), prefetch: VecDeque::new() }
    }
}

/// The budget.
#[derive(Debug)]
pub(super) struct Lanes<L: Locking = Plain> {
    state: L::Mutex<State<L>>,
    bytes_max: u64,
    prefetch_bytes_max: u64,
}

/// The right to have so many bytes in flight; given back when dropped.
#[derive(Debug)]
pub(super) struct Permit<L: Locking = Plain> {
    lanes: Arc<Lanes<L>>,
    lane: Lane,
    bytes: u64,
}

impl<L: Locking> Lanes<L> {
    pub(super) fn new(bytes_max: u64) -> Arc<Self> {
        let bytes_max = bytes_max.max(4);
        Arc::new(Self { state: L::Mutex::default(), bytes_max, prefetch_bytes_max: bytes_max / 4 * 3 })
    }

    /// Waits for its turn. A request above the lane's whole share counts as that share.
    pub(super) async fn acquire(self: &Arc<Self>, lane: Lane, bytes: u64) -> Permit<L> {
        let (grant, granted) = oneshot::channel();
        {
            let mut state = self.state.lock();
            let (queue, most) = match lane {
                Lane::Demand => (&mut state.demand, self.bytes_max),
                Lane::Prefetch => (&mut state.prefetch, self.prefetch_bytes_max),
            };
            queue.push_back(Waiter { bytes: bytes.min(most), grant });
        }
        self.grant_waiting();
        granted.await.expect("a waiter is dropped only with its receiver")
    }

    /// Bytes in flight now, and the most there ever were.
    pub(super) fn used(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.used, state.peak)
    }

    fn grant_waiting(self: &Arc<Self>) {
        loop {
            let Some((lane, waiter)) = self.next_grant() else {
                return;
            };
            let permit = Permit { lanes: self.clone(), lane, bytes: waiter.bytes };
            // A waiter that left drops the permit here, which gives it back.
            if let Err(permit) = waiter.grant.send(permit) {
                permit.give_back();
            }
        }
    }

    fn next_grant(&self) -> Option<(Lane, Waiter<L>)> {
        let mut state = self.state.lock();
        let lane = state.choose(self.bytes_max, self.prefetch_bytes_max)?;
        let waiter = match lane {
            Lane::Demand => state.demand.pop_front(),
            Lane::Prefetch => state.prefetch.pop_front(),
        }?;
        state.used += waiter.bytes;
        state.peak = state.peak.max(state.used);
        if lane == Lane::Prefetch {
            state.used_prefetch += waiter.bytes;
        }
        Some((lane, waiter))
    }

    fn release(&self, lane: Lane, bytes: u64) {
        let mut state = self.state.lock();
        state.used -= bytes;
        if lane == Lane::Prefetch {
            state.used_prefetch -= bytes;
        }
    }
}

impl<L: Locking> State<L> {
    /// Decides whose turn it is, if anybody's. A demand request that does not fit yet holds back all
    /// prefetch: else small prefetch requests could keep a large demand request waiting for ever.
    fn choose(&mut self, bytes_max: u64, prefetch_bytes_max: u64) -> Option<Lane> {
        self.demand.retain(|w| !w.grant.is_closed());
        self.prefetch.retain(|w| !w.grant.is_closed());
        if let Some(waiter) = self.demand.front() {
            return (self.used + waiter.bytes <= bytes_max).then_some(Lane::Demand);
        }
        let waiter = self.prefetch.front()?;
        let fits = self.used + waiter.bytes <= bytes_max && self.used_prefetch + waiter.bytes <= prefetch_bytes_max;
        fits.then_some(Lane::Prefetch)
    }
}

impl<L: Locking> Permit<L> {
    /// Gives the bytes back without waking anybody: the caller's loop does that.
    fn give_back(mut self) {
        self.lanes.release(self.lane, self.bytes);
        self.bytes = 0;
    }
}

impl<L: Locking> Drop for Permit<L> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.lanes.release(self.lane, self.bytes);
            self.lanes.grant_waiting();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::store::locking::{Explored, explore};

    type Asked = Pin<Box<dyn Future<Output = Permit>>>;

    fn ask(lanes: &Arc<Lanes>, lane: Lane, bytes: u64) -> Asked {
        let lanes = lanes.clone();
        let mut asked: Asked = Box::pin(async move { lanes.acquire(lane, bytes).await });
        // Queues it; nobody else may run in between.
        assert!(poll(&mut asked).is_none() || bytes == 0, "ask only while the budget is used up");
        asked
    }

    fn take(lanes: &Arc<Lanes>, lane: Lane, bytes: u64) -> Permit {
        let mut asked = Box::pin(lanes.acquire(lane, bytes));
        match asked.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(permit) => permit,
            Poll::Pending => panic!("there was room"),
        }
    }

    fn poll(asked: &mut Asked) -> Option<Permit> {
        match asked.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(permit) => Some(permit),
            Poll::Pending => None,
        }
    }

    /// Three of which two do not fit together, one that leaves before its turn: a grant that is lost makes loom find that
    /// nobody can go on.
    #[test]
    fn in_every_order_all_who_wait_get_their_turn_and_the_budget_holds() {
        explore(|| {
            let lanes = Lanes::<Explored>::new(100);
            let others = [(Lane::Prefetch, 60, false), (Lane::Demand, 70, true)].map(|(lane, bytes, leaves)| {
                let lanes = lanes.clone();
                loom::thread::spawn(move || {
                    let mut asked = Box::pin(lanes.acquire(lane, bytes));
                    if leaves {
                        // Asks, and goes away with its turn or without.
                        let polled = asked.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                        loom::thread::yield_now();
                        return drop((asked, polled));
                    }
                    drop(loom::future::block_on(asked));
                })
            });
            let permit = loom::future::block_on(lanes.acquire(Lane::Demand, 50));
            loom::thread::yield_now();
            drop(permit);
            for other in others {
                other.join().expect("ends");
            }
            let (used, peak) = lanes.used();
            assert!(used == 0 && peak <= 100, "{used} {peak}");
        });
    }

    #[test]
    fn a_demand_request_passes_prefetch_requests_that_waited_longer() {
        let lanes = Lanes::new(100);
        let held = take(&lanes, Lane::Demand, 100);
        let mut first_prefetch = ask(&lanes, Lane::Prefetch, 50);
        let mut second_prefetch = ask(&lanes, Lane::Prefetch, 20);
        let mut demand = ask(&lanes, Lane::Demand, 60);
        drop(held);
        let demand = poll(&mut demand).expect("demand first");
        assert!(poll(&mut first_prefetch).is_none(), "60 + 50 is above the budget");
        assert!(poll(&mut second_prefetch).is_none(), "first come, first served within the lane");
        drop(demand);
        assert!(poll(&mut first_prefetch).is_some());
        assert!(poll(&mut second_prefetch).is_some());
    }

    #[test]
    fn prefetch_leaves_a_quarter_for_demand() {
        let lanes = Lanes::new(100);
        let _prefetch = take(&lanes, Lane::Prefetch, 75);
        let mut more_prefetch = ask(&lanes, Lane::Prefetch, 1);
        let _demand = take(&lanes, Lane::Demand, 25);
        assert!(poll(&mut more_prefetch).is_none());
        assert_eq!(lanes.used(), (100, 100));
    }

    #[test]
    fn a_waiting_demand_request_holds_back_prefetch() {
        let lanes = Lanes::new(100);
        let held = take(&lanes, Lane::Demand, 90);
        let mut demand = ask(&lanes, Lane::Demand, 50);
        let mut prefetch = ask(&lanes, Lane::Prefetch, 5);
        assert!(poll(&mut prefetch).is_none(), "5 would fit, but somebody waits");
        drop(held);
        assert!(poll(&mut demand).is_some());
        assert!(poll(&mut prefetch).is_some());
    }

    #[test]
    fn who_stops_waiting_leaves_nothing_behind() {
        let lanes = Lanes::new(100);
        let held = take(&lanes, Lane::Demand, 100);
        let gone = ask(&lanes, Lane::Demand, 80);
        let mut next = ask(&lanes, Lane::Demand, 80);
        drop(gone);
        drop(held);
        let next = poll(&mut next).expect("the one that left does not count");
        drop(next);
        assert_eq!(lanes.used().0, 0);
    }

    #[test]
    fn a_request_above_the_budget_is_granted_alone() {
        let lanes = Lanes::new(100);
        let all = take(&lanes, Lane::Demand, 1000);
        assert_eq!(lanes.used().0, 100);
        drop(all);
        let most = take(&lanes, Lane::Prefetch, 1000);
        assert_eq!(lanes.used().0, 75);
        drop(most);
        assert_eq!(lanes.used(), (0, 100));
    }
}
