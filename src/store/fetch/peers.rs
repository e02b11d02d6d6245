//! Between nodes: bytes that one is bringing and a reader of another waits for.
//!
//! Who gives: only what this process checked and wrote itself, or has in flight; a piece of a span that
//! is ours is brought now. Who asks: believes nothing, and leaves a node that failed alone for a while,
//! so that a dead one costs a reader one try.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};

use crate::format::ids::PackId;

use super::engine::Inner;
use super::fill::{FillState, PieceAt};
use super::port::{Given, Peers};

/// How long a node that failed is left alone.
const LEFT_ALONE: Duration = Duration::from_secs(1);
/// Nodes that are remembered to have failed.
const FAILED_MAX: usize = 1024;

/// How other nodes are asked, and which of them do not answer.
#[derive(Debug, Default)]
pub(super) struct PeerTable {
    peers: OnceLock<Arc<dyn Peers>>,
    failed: Mutex<HashMap<String, Instant>>,
}

impl PeerTable {
    pub(super) fn set(&self, peers: Arc<dyn Peers>) {
        // The first one stays.
        let _ = self.peers.set(peers);
    }

    fn answers(&self, address: &str, now: Instant) -> bool {
        self.failed.lock().get(address).is_none_or(|at| now.duration_since(*at) >= LEFT_ALONE)
    }

    fn note_failed(&self, address: &str, now: Instant) {
        let mut failed = self.failed.lock();
        if failed.len() >= FAILED_MAX {
            failed.clear();
        }
        failed.insert(address.to_owned(), now);
    }
}

impl Inner {
    /// Asks another node for a range of a pack; checks nothing but its length. It answers, or is given
    /// up, within `until`.
    pub(super) async fn ask_peer(&self, address: &str, pack: &PackId, range: Range<u64>, until: Instant) -> Given {
        let begun = Instant::now();
        let patience = until.saturating_duration_since(begun);
        let Some(peers) = self.peers.peers.get().filter(|_| !patience.is_zero()) else {
            return Given::Nothing;
        };
        if !self.peers.answers(address, begun) {
            return Given::Nothing;
        }
        let len = range.end - range.start;
        let got = timeout_at(until, peers.get(address, pack, range, patience)).await;
        match got {
            Ok(Given::Bytes(bytes)) if bytes.len() as u64 == len => Given::Bytes(bytes),
            Ok(Given::Coming) => Given::Coming,
            _ => {
                self.peers.note_failed(address, Instant::now());
                Given::Nothing
            }
        }
    }

    /// Gives another node what this one has, or is bringing.
    pub(super) async fn give(self: &Arc<Self>, pack: &PackId, range: Range<u64>, patience: Duration) -> Given {
        let until = Instant::now() + patience;
        let found = self.packs.filling(pack).and_then(|fill| Some((fill.piece_of(&range)?, fill)));
        let Some((index, fill)) = found else {
            return Given::Nothing;
        };
        if matches!(fill.piece_at(index), PieceAt::Todo) && fill.is_mine(index) {
            self.bring_now(&fill, index);
        }
        let given = match fill.piece_at(index) {
            PieceAt::Flying(mut arrival) => match timeout_at(until, arrival.wait_for(Option::is_some)).await {
                Err(_) => return Given::Coming,
                Ok(landed) => {
                    landed.ok().and_then(|landed| landed.clone()?).and_then(|bytes| fill.cut(index, &range, &bytes))
                }
            },
            PieceAt::Staged if fill.is_ours(index) => match fill.kept(&range) {
                Some(bytes) => Some(bytes),
                None => self.read_own(fill, range).await,
            },
            // Another wrote it: who asks finds it where we would. Or another brings it.
            PieceAt::Staged | PieceAt::Todo => None,
        };
        let Some(bytes) = given else {
            return Given::Nothing;
        };
        self.counters.to_peers.add(bytes.len() as u64);
        Given::Bytes(bytes)
    }

    async fn read_own(&self, fill: Arc<FillState>, range: Range<u64>) -> Option<Bytes> {
        let read = move || {
            let mut bytes = vec![0; usize::try_from(range.end - range.start).ok()?];
            fill.read_staged(&mut bytes, range.start).ok()?;
            Some(Bytes::from(bytes))
        };
        self.look_at_tier(read).await?
    }
}
