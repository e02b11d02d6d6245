//! What a running push can be asked: counters that a progress bar reads.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// What a push is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    Opening = 0,
    Walking = 1,
    Contents = 2,
    Building = 3,
    Committing = 4,
    Done = 5,
}

/// Counters of a running push; share it with an [`std::sync::Arc`].
#[derive(Debug, Default)]
pub struct Progress {
    phase: AtomicU8,
    /// Names found by the walk so far.
    pub walked: AtomicU64,
    /// Files and bytes of the tree, once walked.
    pub files_total: AtomicU64,
    pub bytes_total: AtomicU64,
    /// Files and bytes whose place is known.
    pub files_done: AtomicU64,
    pub bytes_done: AtomicU64,
    /// Files that were opened to be read, and bytes that were read.
    pub files_read: AtomicU64,
    pub bytes_read: AtomicU64,
    /// Bytes that the lake took: of contents, and of everything.
    pub uploaded_data: AtomicU64,
    pub uploaded: AtomicU64,
}

impl Progress {
    /// Says what the push is doing.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Opening,
            1 => Phase::Walking,
            2 => Phase::Contents,
            3 => Phase::Building,
            4 => Phase::Committing,
            _ => Phase::Done,
        }
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }
}

pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

pub(super) fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
