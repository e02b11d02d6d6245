//! Single flight: who wants a unit that somebody already fetches waits for that fetch.
//!
//! A flight is begun under the table's lock and ends when its result is given or its owner drops it
//! (cancelled, panicked): then the waiters get an error and nobody waits for ever. The result is put
//! into memory before the flight leaves the table, so that a reader finds one of the two. Flights of
//! different verify levels do not meet: what one may trust the other may not.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

use super::memory::UnitKey;
use super::types::{FetchError, Verify};
use crate::store::locking::{Lock as _, Locking, Plain};

type Outcome = Option<Result<Bytes, FetchError>>;
type Table = HashMap<(UnitKey, Verify), watch::Receiver<Outcome>>;

/// The flights of this process.
#[derive(Debug)]
pub(super) struct Flights<L: Locking = Plain> {
    table: L::Mutex<Table>,
}

impl<L: Locking> Default for Flights<L> {
    fn default() -> Self {
        Self { table: L::Mutex::default() }
    }
}

/// The duty to give a result.
#[derive(Debug)]
pub(super) struct Flight<L: Locking = Plain> {
    flights: Arc<Flights<L>>,
    pub key: UnitKey,
    verify: Verify,
    outcome: Option<watch::Sender<Outcome>>,
}

/// The hope for one.
#[derive(Debug)]
pub(super) struct Ticket(watch::Receiver<Outcome>);

/// What asking for a unit led to.
#[derive(Debug)]
pub(super) enum Boarded<L: Locking = Plain> {
    /// Somebody else fetches it.
    Joined(Ticket),
    /// The caller has to fetch it; the ticket is for the caller too.
    Begun(Flight<L>, Ticket),
}

impl<L: Locking> Flights<L> {
    pub(super) fn board(self: &Arc<Self>, key: UnitKey, verify: Verify) -> Boarded<L> {
        let mut table = self.table.lock();
        if let Some(there) = table.get(&(key, verify)) {
            return Boarded::Joined(Ticket(there.clone()));
        }
        let (outcome, ticket) = watch::channel(None);
        table.insert((key, verify), ticket.clone());
        let flight = Flight { flights: self.clone(), key, verify, outcome: Some(outcome) };
        Boarded::Begun(flight, Ticket(ticket))
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.table.lock().len()
    }
}

impl<L: Locking> Flight<L> {
    /// Gives the result to all who wait.
    pub(super) fn land(mut self, result: Result<Bytes, FetchError>) {
        self.end(result);
    }

    fn end(&mut self, result: Result<Bytes, FetchError>) {
        let Some(outcome) = self.outcome.take() else {
            return;
        };
        self.flights.table.lock().remove(&(self.key, self.verify));
        outcome.send_replace(Some(result));
    }
}

impl<L: Locking> Drop for Flight<L> {
    fn drop(&mut self) {
        self.end(Err(FetchError::Stopped));
    }
}

impl Ticket {
    pub(super) async fn wait(mut self) -> Result<Bytes, FetchError> {
        match self.0.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(FetchError::Stopped)),
            Err(_) => Err(FetchError::Stopped),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::{ContentDigest, ContentId};

    fn key() -> UnitKey {
        UnitKey { content: ContentId::Digest(ContentDigest([1; 32])), block: 0 }
    }

    #[tokio::test]
    async fn all_who_ask_while_it_flies_get_the_one_result() {
        let flights = Arc::new(Flights::<Plain>::default());
        let Boarded::Begun(flight, own) = flights.board(key(), Verify::Node) else { panic!("nobody flies yet") };
        let Boarded::Joined(other) = flights.board(key(), Verify::Node) else { panic!("somebody flies") };
        flight.land(Ok(Bytes::from_static(b"x")));
        assert_eq!(own.wait().await.expect("landed"), "x");
        assert_eq!(other.wait().await.expect("landed"), "x");
        assert_eq!(flights.len(), 0);
        assert!(matches!(flights.board(key(), Verify::Node), Boarded::Begun(..)), "a new one may begin");
    }

    #[tokio::test]
    async fn a_flight_that_is_dropped_leaves_nobody_waiting() {
        let flights = Arc::new(Flights::<Plain>::default());
        let Boarded::Begun(flight, ticket) = flights.board(key(), Verify::Node) else { panic!("nobody flies yet") };
        drop(flight);
        assert!(matches!(ticket.wait().await, Err(FetchError::Stopped)));
        assert_eq!(flights.len(), 0);
    }
}
