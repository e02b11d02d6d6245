//! Pieces that have just arrived stay in memory for a while: who reads a little behind a fill takes his
//! bytes from them, without another look into the staging file and without another digest.
//!
//! The bytes lie in the fill's state and go with it. Here is only the order in which pieces are let go
//! when there are too many: the oldest first, since readers in order are done with those.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::fill::FillState;

/// What is kept, over all fills.
#[derive(Debug)]
pub(super) struct Kept {
    bytes_max: u64,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    pieces: VecDeque<KeptPiece>,
    bytes: u64,
}

#[derive(Debug)]
struct KeptPiece {
    fill: Weak<FillState>,
    index: usize,
    len: u64,
}

impl Kept {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, queue: Mutex::default() }
    }

    /// Counts a piece that a fill keeps; lets older ones go.
    pub(super) fn note(&self, fill: &Arc<FillState>, index: usize, len: u64) {
        let mut gone = Vec::new();
        {
            let mut queue = self.queue.lock();
            queue.pieces.push_back(KeptPiece { fill: Arc::downgrade(fill), index, len });
            queue.bytes += len;
            while queue.bytes > self.bytes_max
                && let Some(oldest) = queue.pieces.pop_front()
            {
                queue.bytes -= oldest.len;
                gone.push(oldest);
            }
        }
        for piece in gone {
            if let Some(fill) = piece.fill.upgrade() {
                fill.let_go(piece.index);
            }
        }
    }

    /// Bytes held now, at most: those of fills that have ended are counted until their turn comes.
    pub(super) fn bytes(&self) -> u64 {
        self.queue.lock().bytes
    }
}
