//! What is open, and how: the latch of each inode, and the records that outlive this process.
//!
//! The kernel reads a file either itself, from a backing file (passthrough), or through its page cache
//! by asking us. It refuses to mix the two for one inode, and it refuses a second backing id. So how an
//! inode is read is decided at its first open and kept until its last release ([`Handles`]).
//!
//! What the kernel was told has to be known to the next daemon as well. Before an OPEN is answered its
//! slot is written to a memory file that the keeper holds ([`slots`]); a RELEASE takes it away.
//!
//! `docs/formats/handover.md` says what is written when, and what a crash between two steps leaves. In
//! short: everything is on record before the kernel is told, and ids are made and recorded one after the
//! other, so that an id without a slot is newer than the last one on record, or recorded as closing.
//!
//! Locks: one per shard of inodes, held over the writes to the memory file and the ioctls that make
//! and close backing ids (none of them waits for a disk), never over the answer. Inside it: the lock under
//! which ids are made, and that of free slots.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::view::Ino;
use crate::store::locking::{Lock as _, Locking, Plain};

pub(crate) mod slots;

use slots::OPENS_MAX;
pub(crate) use slots::{Found, Greeting, Left, Slot, SlotState, Slots};

/// A power of two, several times the number of workers.
const SHARDS: usize = 32;

/// How an inode is read while it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Latch {
    /// Through the page cache, by asking us.
    Cached,
    /// By the kernel, from the backing file with this id.
    Backed(u32),
}

/// Why an open is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("{OPENS_MAX} files are open in this mount")]
    Full,
    #[error("cannot record an open file")]
    Record(#[source] io::Error),
}

#[derive(Debug)]
struct OpenInode {
    latch: Latch,
    opens: u32,
    /// Reads that we have not answered. The kernel counts a read-ahead as use of the page cache even
    /// after the last release.
    reads: u32,
}

#[derive(Debug, Default)]
struct Shard {
    inodes: HashMap<Ino, OpenInode>,
    /// Slots by handle number.
    opens: HashMap<u64, u32>,
}

/// What is open in one mount.
#[derive(Debug)]
pub(crate) struct Handles<L: Locking = Plain> {
    shards: Vec<L::Mutex<Shard>>,
    slots: Slots,
    /// Held while a backing id is made and recorded.
    making_ids: L::Mutex<()>,
    open_now: AtomicU64,
    backed_now: AtomicU64,
    /// Opens so far: read through the daemon, and by the kernel itself.
    cached_opens: AtomicU64,
    backed_opens: AtomicU64,
}

/// A read that is not answered yet.
#[derive(Debug)]
pub(crate) struct Reading<L: Locking = Plain> {
    handles: Arc<Handles<L>>,
    ino: Ino,
}

impl<L: Locking> Drop for Reading<L> {
    fn drop(&mut self) {
        let mut shard = self.handles.shard(self.ino).lock();
        if let Some(inode) = shard.inodes.get_mut(&self.ino) {
            inode.reads = inode.reads.saturating_sub(1);
            if inode.reads == 0 && inode.opens == 0 {
                shard.inodes.remove(&self.ino);
            }
        }
    }
}

impl<L: Locking> Handles<L> {
    /// Starts with nothing open; `slots` is an empty memory file.
    pub fn new(slots: File) -> io::Result<Self> {
        Ok(Self::over(Slots::create(slots)?))
    }

    /// Goes on with what another daemon left open.
    pub fn resume(slots: File, left: &Left) -> Self {
        let handles = Self::over(Slots::resume(slots, left));
        for &(at, slot) in &left.slots {
            let latch = if slot.id == 0 { Latch::Cached } else { Latch::Backed(slot.id) };
            let mut shard = handles.shard(slot.ino).lock();
            let inode = shard.inodes.entry(slot.ino).or_insert(OpenInode { latch, opens: 0, reads: 0 });
            inode.opens += 1;
            shard.opens.insert(slot.fh, at);
            handles.count(latch, 1);
        }
        handles
    }

    fn over(slots: Slots) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| L::Mutex::default()).collect(),
            slots,
            making_ids: L::Mutex::default(),
            open_now: AtomicU64::new(0),
            backed_now: AtomicU64::new(0),
            cached_opens: AtomicU64::new(0),
            backed_opens: AtomicU64::new(0),
        }
    }

    /// Gives the record, for the hand-over.
    pub fn record(&self) -> &Slots {
        &self.slots
    }

    fn count(&self, latch: Latch, by: i64) {
        self.open_now.fetch_add(by as u64, Ordering::Relaxed);
        if matches!(latch, Latch::Backed(_)) {
            self.backed_now.fetch_add(by as u64, Ordering::Relaxed);
        }
    }

    fn shard(&self, ino: Ino) -> &L::Mutex<Shard> {
        let at = ino.0 as usize % SHARDS;
        self.shards.get(at).expect("a remainder by SHARDS is one of SHARDS")
    }

    fn shard_number(ino: Ino) -> u32 {
        (ino.0 % SHARDS as u64) as u32
    }

    /// Says how an inode is read, where that is decided.
    pub fn latch(&self, ino: Ino) -> Option<Latch> {
        self.shard(ino).lock().inodes.get(&ino).map(|inode| inode.latch)
    }

    /// Opens an inode as it is latched; once more does no harm. Where it is not, `register` may give the id of a backing file
    /// (it is called with the shard locked), else it is latched to the page cache.
    pub fn open(&self, ino: Ino, fh: u64, register: impl FnOnce() -> Option<u32>) -> Result<Latch, OpenError> {
        let slot = self.slots.take().ok_or(OpenError::Full)?;
        let mut shard = self.shard(ino).lock();
        let latched = shard.inodes.get(&ino).map(|inode| inode.latch);
        if let (Some(latch), true) = (latched, shard.opens.contains_key(&fh)) {
            self.slots.put_back(slot);
            return Ok(latch);
        }
        let _making = latched.is_none().then(|| self.making_ids.lock());
        let latch = latched.unwrap_or_else(|| register().map_or(Latch::Cached, Latch::Backed));
        let id = match latch {
            Latch::Cached => 0,
            Latch::Backed(id) => id,
        };
        let mut recorded = self.slots.write(slot, Slot { fh, ino, id, state: SlotState::Prepared });
        if latched.is_none() && id != 0 {
            recorded = recorded.and_then(|()| self.slots.set_last_id(id));
        }
        if let Err(error) = recorded {
            // An id that was made for nothing ends with the mount.
            self.slots.put_back(slot);
            return Err(OpenError::Record(error));
        }
        let inode = shard.inodes.entry(ino).or_insert(OpenInode { latch, opens: 0, reads: 0 });
        inode.opens += 1;
        shard.opens.insert(fh, slot);
        self.count(latch, 1);
        let opens = if id == 0 { &self.cached_opens } else { &self.backed_opens };
        opens.fetch_add(1, Ordering::Relaxed);
        Ok(latch)
    }

    /// Records that an open was answered, unless it has been released since.
    pub fn answered(&self, ino: Ino, fh: u64) {
        let shard = self.shard(ino).lock();
        if let Some(&slot) = shard.opens.get(&fh)
            && let Err(error) = self.slots.mark_answered(slot)
        {
            tracing::warn!(ino = ino.0, %error, "an open file is not recorded as answered");
        }
    }

    /// Releases an open; once more does no harm. `close` closes a backing id when the inode's last
    /// open is gone (it is called with the shard locked).
    pub fn release(&self, ino: Ino, fh: u64, close: impl FnOnce(u32)) {
        let mut shard = self.shard(ino).lock();
        let Some(slot) = shard.opens.remove(&fh) else {
            return;
        };
        let Some(inode) = shard.inodes.get_mut(&ino) else {
            return;
        };
        inode.opens = inode.opens.saturating_sub(1);
        let (latch, last, reads) = (inode.latch, inode.opens == 0, inode.reads);
        let cleared = match latch {
            Latch::Backed(id) if last => self.slots.clear_and_close(slot, Self::shard_number(ino), id, close),
            _ => self.slots.clear(slot),
        };
        if let Err(error) = cleared {
            tracing::warn!(ino = ino.0, %error, "the end of an open file is not recorded");
        }
        self.slots.put_back(slot);
        self.count(latch, -1);
        // Reads that are left are none of a backing file's.
        if last && (reads == 0 || latch != Latch::Cached) {
            shard.inodes.remove(&ino);
        }
    }

    /// Counts a read until the guard is dropped, which must come after its answer.
    pub fn reading(self: &Arc<Self>, ino: Ino) -> Reading<L> {
        let mut shard = self.shard(ino).lock();
        let inode = shard.inodes.entry(ino).or_insert(OpenInode { latch: Latch::Cached, opens: 0, reads: 0 });
        inode.reads += 1;
        Reading { handles: Arc::clone(self), ino }
    }

    /// Says how often files were opened to be read through this daemon, and by the kernel itself. What a daemon before it had
    /// opened is not counted.
    pub fn opens(&self) -> (u64, u64) {
        (self.cached_opens.load(Ordering::Relaxed), self.backed_opens.load(Ordering::Relaxed))
    }

    /// Says how many files are open, and how many of them the kernel reads itself.
    pub fn open_now(&self) -> (u64, u64) {
        (self.open_now.load(Ordering::Relaxed), self.backed_now.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests;
