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
use super::port::Peers;

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
    /// Asks another node for a range of a pack; checks nothing but its length.
    pub(super) async fn ask_peer(
        &self,
        address: &str,
        pack: &PackId,
        range: Range<u64>,
        until: Instant,
    ) -> Option<Bytes> {
        let peers = self.peers.peers.get()?;
        let begun = Instant::now();
        let patience = until.saturating_duration_since(begun);
        if patience.is_zero() || !self.peers.answers(address, begun) {
            return None;
        }
        let len = range.end - range.start;
        let got = timeout_at(until, peers.get(address, pack, range, patience)).await.ok().flatten();
        let got = got.filter(|bytes| bytes.len() as u64 == len);
        if got.is_none() {
            self.peers.note_failed(address, Instant::now());
        }
        got
    }

    /// Gives another node what this one has, or is bringing.
    pub(super) async fn give(self: &Arc<Self>, pack: &PackId, range: Range<u64>, patience: Duration) -> Option<Bytes> {
        let until = Instant::now() + patience;
        let fill = self.packs.filling(pack)?;
        let index = fill.piece_of(&range)?;
        if matches!(fill.piece_at(index), PieceAt::Todo) && fill.is_mine(index) {
            self.bring_now(&fill, index);
        }
        let given = match fill.piece_at(index) {
            PieceAt::Todo => None,
            PieceAt::Flying(mut arrival) => {
                let landed = timeout_at(until, arrival.wait_for(Option::is_some)).await.ok()?.ok()?.clone()??;
                let from = range.start - fill.pieces.get(index)?.offset;
                let (from, len) = (usize::try_from(from).ok()?, usize::try_from(range.end - range.start).ok()?);
                (from + len <= landed.len()).then(|| landed.slice(from..from + len))
            }
            PieceAt::Staged if fill.is_ours(index) => self.read_own(fill, range).await,
            // Another wrote it: who asks finds it where we would.
            PieceAt::Staged => None,
        }?;
        self.counters.to_peers.add(given.len() as u64);
        Some(given)
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
