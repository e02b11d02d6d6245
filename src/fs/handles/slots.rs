//! The records of what is open, in a memory file that outlives the daemon.
//!
//! ```text
//! 0      "LARDSLT1"
//! 8      highest backing id that was registered (u32)
//! 64     one backing id per shard of inodes that is being closed, 0: none (u32 each)
//! 4096   slots of 32 bytes: fh u64, ino u64, backing id u32 (0: page cache), state u32, 0 u64
//! ```
//!
//! Little-endian. A slot's state is written with the rest of it in one write, so a slot is there or not.
//! Written with pwrite to a memfd: nothing here waits for a disk, and no mapping is needed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::fs::view::Ino;

const MAGIC: &[u8; 8] = b"LARDSLT1";
const HIGHEST_AT: u64 = 8;
const CLOSING_AT: u64 = 64;
const SLOTS_AT: u64 = 4096;
const SLOT_LEN: u64 = 32;
const STATE_AT: u64 = 20;

/// How many files one mount can have open: the memory file then takes 32 MiB.
pub(crate) const OPENS_MAX: u32 = 1 << 20;

/// How far an open is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotState {
    /// Recorded; the kernel may have been answered or not.
    Prepared = 1,
    Answered = 2,
}

/// One open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    pub fh: u64,
    pub ino: Ino,
    /// 0: through the page cache.
    pub id: u32,
    pub state: SlotState,
}

impl Slot {
    fn encode(self) -> [u8; SLOT_LEN as usize] {
        let mut raw = [0; SLOT_LEN as usize];
        let fields = [
            (0, self.fh.to_le_bytes().to_vec()),
            (8, self.ino.0.to_le_bytes().to_vec()),
            (16, self.id.to_le_bytes().to_vec()),
            (STATE_AT as usize, (self.state as u32).to_le_bytes().to_vec()),
        ];
        for (at, bytes) in fields {
            if let Some(room) = raw.get_mut(at..at + bytes.len()) {
                room.copy_from_slice(&bytes);
            }
        }
        raw
    }

    fn decode(raw: &[u8]) -> Option<Self> {
        let u64_at = |at: usize| Some(u64::from_le_bytes(raw.get(at..at + 8)?.try_into().ok()?));
        let u32_at = |at: usize| Some(u32::from_le_bytes(raw.get(at..at + 4)?.try_into().ok()?));
        let state = match u32_at(STATE_AT as usize)? {
            1 => SlotState::Prepared,
            2 => SlotState::Answered,
            _ => return None,
        };
        Some(Self { fh: u64_at(0)?, ino: Ino(u64_at(8)?), id: u32_at(16)?, state })
    }
}

/// What a daemon left behind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Left {
    pub highest: u32,
    pub closing: Vec<u32>,
    /// With their positions.
    pub slots: Vec<(u32, Slot)>,
}

#[derive(Debug, Default)]
struct Free {
    returned: Vec<u32>,
    next: u32,
}

/// The memory file.
#[derive(Debug)]
pub(crate) struct Slots {
    file: File,
    free: Mutex<Free>,
    highest: AtomicU32,
}

fn slot_at(slot: u32) -> u64 {
    SLOTS_AT + u64::from(slot) * SLOT_LEN
}

impl Slots {
    /// Starts the records in an empty memory file.
    pub fn create(file: File) -> io::Result<Self> {
        file.set_len(0)?;
        file.set_len(SLOTS_AT)?;
        file.write_all_at(MAGIC, 0)?;
        Ok(Self { file, free: Mutex::default(), highest: AtomicU32::new(0) })
    }

    /// Takes a free slot. None: all are taken.
    pub fn take(&self) -> Option<u32> {
        let mut free = self.free.lock();
        if let Some(slot) = free.returned.pop() {
            return Some(slot);
        }
        let slot = free.next;
        (slot < OPENS_MAX).then(|| {
            free.next += 1;
            slot
        })
    }

    /// Gives a slot back, cleared or never written.
    pub fn put_back(&self, slot: u32) {
        self.free.lock().returned.push(slot);
    }

    pub fn write(&self, at: u32, slot: Slot) -> io::Result<()> {
        self.file.write_all_at(&slot.encode(), slot_at(at))
    }

    pub fn mark_answered(&self, at: u32) -> io::Result<()> {
        self.file.write_all_at(&(SlotState::Answered as u32).to_le_bytes(), slot_at(at) + STATE_AT)
    }

    pub fn clear(&self, at: u32) -> io::Result<()> {
        self.file.write_all_at(&[0; SLOT_LEN as usize], slot_at(at))
    }

    /// Records a backing id as the highest that was registered, if it is.
    pub fn set_highest(&self, id: u32) -> io::Result<()> {
        if self.highest.fetch_max(id, Ordering::Relaxed) >= id {
            return Ok(());
        }
        self.file.write_all_at(&id.to_le_bytes(), HIGHEST_AT)
    }

    /// Runs `close` with the id recorded as one that is being closed. One at a time per shard.
    pub fn while_closing(&self, shard: u32, id: u32, close: impl FnOnce(u32)) {
        let at = CLOSING_AT + u64::from(shard) * 4;
        if let Err(error) = self.file.write_all_at(&id.to_le_bytes(), at) {
            // Not closed either: the id ends with the mount.
            tracing::warn!(id, %error, "a backing file stays open: its end cannot be recorded");
            return;
        }
        close(id);
        if let Err(error) = self.file.write_all_at(&[0; 4], at) {
            tracing::warn!(id, %error, "a closed backing file stays recorded as closing");
        }
    }

    /// Reads what a daemon left behind; empty where the file is not one of ours.
    #[cfg_attr(not(test), expect(dead_code, reason = "the takeover by a new daemon reads it"))]
    pub fn load(file: &File) -> io::Result<Left> {
        let mut raw = vec![0; usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?];
        file.read_exact_at(&mut raw, 0)?;
        let Some(head) = raw.get(..SLOTS_AT as usize).filter(|head| head.starts_with(MAGIC)) else {
            return Ok(Left::default());
        };
        let words = |bytes: &[u8]| -> Vec<u32> {
            bytes.chunks_exact(4).filter_map(|word| Some(u32::from_le_bytes(word.try_into().ok()?))).collect()
        };
        let highest = words(head).get(HIGHEST_AT as usize / 4).copied().unwrap_or(0);
        let closing = head.get(CLOSING_AT as usize..).map(words).unwrap_or_default();
        let slots = raw.get(SLOTS_AT as usize..).unwrap_or_default().chunks_exact(SLOT_LEN as usize);
        Ok(Left {
            highest,
            closing: closing.into_iter().filter(|&id| id != 0).collect(),
            slots: (0..).zip(slots).filter_map(|(at, raw)| Some((at, Slot::decode(raw)?))).collect(),
        })
    }
}
