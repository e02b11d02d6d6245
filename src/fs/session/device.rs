//! What is said to the kernel beside the FUSE library: the greeting, answers for a daemon that died, and the
//! message that has requests sent again. `docs/formats/handover.md` says when.
//!
//! The kernel speaks the byte order of the machine.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::fs::handles::{Left, Slot, SlotState, Slots};
use crate::fs::sys;

use super::gate::{AT_THE_GATE, RESENT};

const IN_HEADER_BYTES: usize = 40;
const OUT_HEADER_BYTES: usize = 16;
const OP_FORGET: u32 = 2;
const OP_INIT: u32 = 26;
const NOTIFY_RESEND: u32 = 7;
const OPENED_KEEP_CACHE: u32 = 1 << 1;
const OPENED_NOFLUSH: u32 = 1 << 5;
const OPENED_PASSTHROUGH: u32 = 1 << 7;
const INIT_EXT: u32 = 1 << 30;
/// Bits of the second word of flags.
const PASSTHROUGH: u32 = 1 << (37 - 32);
const HAS_RESEND: u32 = 1 << (39 - 32);

/// The kernel refuses to give requests into less, before it knows what we take.
const GREETING_ROOM: usize = 128 << 10;
/// How long the kernel may take to say INIT: it is there before the mount call returns.
const GREETING_TIMEOUT_MS: u16 = 10_000;
/// Longer than every request of a read-only mount that must not be lost.
const GATE_MESSAGE_BYTES: usize = 16 << 10;
/// More ids than this are not made between two records of the last one.
const UNRECORDED_IDS_MAX: u32 = 1 << 20;

fn word_at(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map_or(0, u32::from_ne_bytes)
}

/// Says whether the kernel that said this INIT can send requests again.
pub(super) fn can_resend(init: &[u8]) -> bool {
    let extended = word_at(init, IN_HEADER_BYTES + 12) & INIT_EXT != 0;
    extended && word_at(init, IN_HEADER_BYTES + 16) & HAS_RESEND != 0
}

/// Says whether an answer to INIT asks for passthrough.
pub(super) fn has_passthrough(answer: &[u8]) -> bool {
    let extended = word_at(answer, OUT_HEADER_BYTES + 12) & INIT_EXT != 0;
    extended && word_at(answer, OUT_HEADER_BYTES + 32) & PASSTHROUGH != 0
}

/// Makes the message that a worker reads before it comes to the gate.
pub(super) fn gate_message() -> Vec<u8> {
    let mut message = Vec::with_capacity(GATE_MESSAGE_BYTES);
    message.extend((GATE_MESSAGE_BYTES as u32).to_ne_bytes());
    message.extend(OP_FORGET.to_ne_bytes());
    message.extend(0u64.to_ne_bytes());
    message.extend(AT_THE_GATE.to_ne_bytes());
    message.resize(IN_HEADER_BYTES, 0);
    message.extend(AT_THE_GATE.to_ne_bytes());
    message.resize(GATE_MESSAGE_BYTES, 0);
    message
}

fn out_header(len: usize, error: u32, unique: u64) -> Vec<u8> {
    let mut raw = Vec::with_capacity(len);
    raw.extend((len as u32).to_ne_bytes());
    raw.extend(error.to_ne_bytes());
    raw.extend(unique.to_ne_bytes());
    raw
}

/// Makes the answer to the OPEN that a slot records.
fn open_answer(slot: &Slot, unique: u64) -> Vec<u8> {
    let mut raw = out_header(OUT_HEADER_BYTES + 16, 0, unique);
    let how = if slot.id == 0 { OPENED_KEEP_CACHE } else { OPENED_PASSTHROUGH };
    raw.extend(slot.fh.to_ne_bytes());
    raw.extend((how | OPENED_NOFLUSH).to_ne_bytes());
    raw.extend(slot.id.to_ne_bytes());
    raw
}

/// Reads INIT.
pub(super) fn read_greeting(mut device: &File) -> io::Result<Vec<u8>> {
    let mut fds = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    while poll(&mut fds, PollTimeout::from(GREETING_TIMEOUT_MS)) == Err(Errno::EINTR) {}
    if !fds.first().and_then(PollFd::any).unwrap_or(false) {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel does not greet"));
    }
    let mut room = vec![1; GREETING_ROOM];
    let len = loop {
        match device.read(&mut room) {
            Ok(len) => break len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    room.truncate(len);
    if word_at(&room, 4) != OP_INIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's first request is no greeting"));
    }
    Ok(room)
}

/// Answers a request; false: the kernel does not wait for an answer to it.
pub(super) fn answer(mut device: &File, bytes: &[u8]) -> io::Result<bool> {
    match device.write(bytes) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Has everything sent again that was read and not answered.
pub(super) fn resend(mut device: &File) -> io::Result<()> {
    device.write(&out_header(OUT_HEADER_BYTES, NOTIFY_RESEND, 0)).map(drop)
}

/// Brings the kernel's side and the record together, before anything is read. Says whether the kernel takes
/// backing files from this process.
pub(super) fn settle(device: &File, record: &Slots, left: &Left, passthrough: bool) -> io::Result<bool> {
    for (at, slot) in left.slots.iter().filter(|(_, slot)| slot.state == SlotState::Prepared) {
        if !answer(device, &open_answer(slot, slot.fh))? {
            answer(device, &open_answer(slot, slot.fh | RESENT))?;
        }
        record.mark_answered(*at)?;
    }
    let recorded: HashSet<u32> = left.slots.iter().map(|(_, slot)| slot.id).collect();
    for &(shard, id) in &left.closing {
        if !recorded.contains(&id) {
            close_id(device, id);
        }
        record.clear_closing(shard)?;
    }
    if !passthrough {
        return Ok(false);
    }
    // Not worth a mount: an id that nobody closes holds a file of the tier open until the mount ends.
    match close_unrecorded(device, record, left.last_id, &recorded) {
        Ok(()) => Ok(true),
        Err(error) => {
            tracing::warn!(%error, "backing files that the daemon before did not record may stay open");
            Ok(!is_refusal(&error))
        }
    }
}

/// Says whether the kernel will never take a backing file from this process, as it does not from root of a user
/// namespace.
fn is_refusal(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EPERM | Errno::ENOTTY | Errno::EOPNOTSUPP))
}

fn close_id(device: &File, id: u32) {
    match sys::backing_close(device, id) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {}
        Err(error) => tracing::warn!(id, %error, "a backing file of the daemon before stays open"),
    }
}

/// Closes the ids that were made and not recorded: they lie between the last one on record and a new one.
fn close_unrecorded(device: &File, record: &Slots, last: u32, recorded: &HashSet<u32>) -> io::Result<()> {
    let empty = memfd_create(c"larder-probe", MFdFlags::MFD_CLOEXEC)?;
    let probe = super::make_backing_id(device, &empty)?;
    // The numbers begin again at 1 after 2^31 of them: then nothing is looked for.
    if probe > last && probe - last <= UNRECORDED_IDS_MAX {
        for id in (last + 1..probe).filter(|id| !recorded.contains(id)) {
            close_id(device, id);
        }
    }
    close_id(device, probe);
    record.set_last_id(probe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::view::Ino;

    #[test]
    fn a_mount_whose_kernel_takes_no_backing_files_is_taken_over_without() {
        let memory = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).expect("a memory file"));
        let record = Slots::create(memory).expect("a record");
        let no_device = File::options().read(true).write(true).open("/dev/null").expect("opens");
        let left = Left { last_id: 7, ..Left::default() };
        assert!(matches!(settle(&no_device, &record, &left, true), Ok(false)));
    }

    #[test]
    fn only_what_will_not_pass_is_a_refusal() {
        let of = |errno: Errno| is_refusal(&errno.into());
        assert!(of(Errno::EPERM) && of(Errno::ENOTTY) && of(Errno::EOPNOTSUPP));
        assert!(!of(Errno::EMFILE) && !of(Errno::ENOMEM));
    }

    #[test]
    fn answers_and_messages_have_the_kernels_layout() {
        let slot = Slot { fh: 7, ino: Ino(1), id: 3, state: SlotState::Prepared };
        let answer = open_answer(&slot, 7 | RESENT);
        assert_eq!((answer.len(), word_at(&answer, 0), word_at(&answer, 4)), (32, 32, 0));
        assert_eq!((word_at(&answer, 24), word_at(&answer, 28)), (OPENED_PASSTHROUGH | OPENED_NOFLUSH, 3));
        let cached = open_answer(&Slot { id: 0, ..slot }, 7);
        assert_eq!(word_at(&cached, 24), OPENED_KEEP_CACHE | OPENED_NOFLUSH);
        let message = gate_message();
        assert_eq!((message.len(), word_at(&message, 0)), (GATE_MESSAGE_BYTES, GATE_MESSAGE_BYTES as u32));
        assert!(!can_resend(&message) && !has_passthrough(&answer) && !can_resend(&[]));
    }
}
