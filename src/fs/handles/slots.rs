//! The record of a mount, in a memory file that outlives the daemon: the greeting, and what is open.
//!
//! `docs/formats/handover.md` has the bytes and the order of writes. A slot is written whole in one write,
//! so it is there or not. Written with pwrite to a memfd: nothing here waits for a disk, and no mapping
//! is needed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use parking_lot::Mutex;

use crate::fs::view::Ino;

const MAGIC: &[u8; 8] = b"LARDSLT2";
const LAST_ID_AT: u64 = 8;
const GREETING_STATE_AT: u64 = 12;
const CLOSING_AT: u64 = 64;
const CLOSING_COUNT: usize = 32;
const GREETING_AT: u64 = 256;
/// What INIT, and the answer to it, may take.
const GREETING_PART_MAX: usize = 256;
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

/// How kernel and daemon have greeted: INIT and the answer to it, as they went over the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Greeting {
    pub request: Vec<u8>,
    pub answer: Vec<u8>,
}

/// What a daemon left behind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Left {
    /// None: nobody has answered the kernel's INIT.
    pub greeting: Option<Greeting>,
    pub last_id: u32,
    /// Ids that were being closed, with their shards.
    pub closing: Vec<(u32, u32)>,
    /// With their positions.
    pub slots: Vec<(u32, Slot)>,
}

/// Whether a record can be read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nobody has served the mount yet.
    Empty,
    Record(Left),
    /// Written by another version.
    Foreign,
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
}

fn slot_at(slot: u32) -> u64 {
    SLOTS_AT + u64::from(slot) * SLOT_LEN
}

impl Slots {
    /// Starts the record in an empty memory file.
    pub fn create(file: File) -> io::Result<Self> {
        file.set_len(0)?;
        file.set_len(SLOTS_AT)?;
        file.write_all_at(MAGIC, 0)?;
        Ok(Self { file, free: Mutex::default() })
    }

    /// Goes on with the record that a daemon left.
    pub fn resume(file: File, left: &Left) -> Self {
        let next = left.slots.iter().map(|(at, _)| at + 1).max().unwrap_or(0);
        let taken: std::collections::HashSet<u32> = left.slots.iter().map(|(at, _)| *at).collect();
        let returned = (0..next).filter(|at| !taken.contains(at)).collect();
        Self { file, free: Mutex::new(Free { returned, next }) }
    }

    /// Gives the memory file once more, for another keeper.
    pub fn duplicate(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Records a greeting that is about to be answered.
    pub fn prepare_greeting(&self, greeting: &Greeting) -> io::Result<()> {
        let mut raw = vec![0; 8 + 2 * GREETING_PART_MAX];
        for (part, bytes) in [&greeting.request, &greeting.answer].into_iter().enumerate() {
            let at = 8 + part * GREETING_PART_MAX;
            let (Some(room), true) = (raw.get_mut(at..at + bytes.len()), bytes.len() <= GREETING_PART_MAX) else {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's greeting is too long"));
            };
            room.copy_from_slice(bytes);
            if let Some(len) = raw.get_mut(part * 4..part * 4 + 4) {
                len.copy_from_slice(&(bytes.len() as u32).to_le_bytes());
            }
        }
        self.file.write_all_at(&raw, GREETING_AT)?;
        self.file.write_all_at(&1u32.to_le_bytes(), GREETING_STATE_AT)
    }

    /// Records that the greeting was answered.
    pub fn greeted(&self) -> io::Result<()> {
        self.file.write_all_at(&2u32.to_le_bytes(), GREETING_STATE_AT)
    }

    /// Forgets that an id is being closed.
    pub fn clear_closing(&self, shard: u32) -> io::Result<()> {
        self.file.write_all_at(&[0; 4], CLOSING_AT + u64::from(shard) * 4)
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

    /// Records a backing id as the one that was made last. After its slot: an id that is newer than the last
    /// one and has no slot is nobody's.
    pub fn set_last_id(&self, id: u32) -> io::Result<()> {
        self.file.write_all_at(&id.to_le_bytes(), LAST_ID_AT)
    }

    /// Clears the slot of an inode's last open and runs `close`, with the id recorded as one that is being
    /// closed. One at a time per shard.
    pub fn clear_and_close(&self, at: u32, shard: u32, id: u32, close: impl FnOnce(u32)) -> io::Result<()> {
        let closing_at = CLOSING_AT + u64::from(shard) * 4;
        let noted = self.file.write_all_at(&id.to_le_bytes(), closing_at);
        self.clear(at)?;
        // An id whose end cannot be recorded ends with the mount.
        noted?;
        close(id);
        self.clear_closing(shard)
    }

    /// Reads what a daemon left behind.
    pub fn load(file: &File) -> io::Result<Found> {
        let mut raw = vec![0; usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?];
        file.read_exact_at(&mut raw, 0)?;
        if raw.iter().take(SLOTS_AT as usize).all(|&byte| byte == 0) {
            return Ok(Found::Empty);
        }
        let Some(head) = raw.get(..SLOTS_AT as usize).filter(|head| head.starts_with(MAGIC)) else {
            return Ok(Found::Foreign);
        };
        let word = |at: u64| -> u32 {
            let at = at as usize;
            let bytes = head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        let part = |number: usize| -> Option<Vec<u8>> {
            let len = word(GREETING_AT + number as u64 * 4) as usize;
            let at = GREETING_AT as usize + 8 + number * GREETING_PART_MAX;
            Some(head.get(at..at + len.min(GREETING_PART_MAX))?.to_vec())
        };
        let greeting = match word(GREETING_STATE_AT) {
            0 => None,
            _ => part(0).zip(part(1)).map(|(request, answer)| Greeting { request, answer }),
        };
        let closing = (0..CLOSING_COUNT as u32).map(|shard| (shard, word(CLOSING_AT + u64::from(shard) * 4)));
        let slots = raw.get(SLOTS_AT as usize..).unwrap_or_default().chunks_exact(SLOT_LEN as usize);
        Ok(Found::Record(Left {
            greeting,
            last_id: word(LAST_ID_AT),
            closing: closing.filter(|&(_, id)| id != 0).collect(),
            slots: (0..).zip(slots).filter_map(|(at, raw)| Some((at, Slot::decode(raw)?))).collect(),
        }))
    }
}
