//! A job's log has a bound: its beginning is given up where it grows longer.
//!
//! Programs write to the file themselves, so that nothing between them and the disk can be lost or block
//! them. What is given up is made a hole: the rest stays at its offset, so who follows the log, or goes
//! on reading it after the scheduler was started again, misses nothing and gets nothing twice.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::Whence;

/// Holes are made in steps of this part of the bound, and of whole blocks.
const STEPS: u64 = 8;
const BLOCK_BYTES: u64 = 4096;

/// Keeps one log within its bound.
#[derive(Debug, Default)]
pub(super) struct LogBound {
    /// All before this is a hole already.
    given_up: u64,
    /// The file system makes no holes: it was said once.
    hopeless: bool,
}

impl LogBound {
    /// Gives up the beginning of a log that is longer than `bytes_max`.
    pub(super) fn keep(&mut self, log: &Path, bytes_max: u64) {
        if self.hopeless {
            return;
        }
        if let Err(error) = self.try_keep(log, bytes_max) {
            eprintln!("{}: its beginning can't be given up: {error}", log.display());
            self.hopeless = true;
        }
    }

    fn try_keep(&mut self, log: &Path, bytes_max: u64) -> io::Result<()> {
        let len = std::fs::metadata(log)?.len();
        let end = len.saturating_sub(bytes_max) / BLOCK_BYTES * BLOCK_BYTES;
        if end == 0 || end < self.given_up.saturating_add(bytes_max / STEPS) {
            return Ok(());
        }
        let file = OpenOptions::new().write(true).open(log)?;
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, flags, 0, i64::try_from(end).unwrap_or(i64::MAX))?;
        self.given_up = end;
        Ok(())
    }
}

/// Reads a piece of a log from `offset` on, or from where there is something left: gives the place of its
/// first byte, and the bytes. Nothing where there is no log (yet).
pub(super) fn read_piece(log: &Path, offset: u64, bytes_max: u64) -> io::Result<(u64, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut file = match File::open(log) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((offset, bytes)),
        Err(error) => return Err(error),
    };
    let begin = data_from(&file, offset)?;
    file.seek(SeekFrom::Start(begin))?;
    file.take(bytes_max).read_to_end(&mut bytes)?;
    Ok((begin, bytes))
}

/// Gives where the first byte at or behind `offset` is that is not given up.
fn data_from(file: &File, offset: u64) -> io::Result<u64> {
    let at = i64::try_from(offset).unwrap_or(i64::MAX);
    match nix::unistd::lseek(file, at, Whence::SeekData) {
        Ok(data) => Ok(u64::try_from(data).unwrap_or(offset)),
        // Behind the end, or a file system that knows no holes.
        Err(_) => Ok(offset),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_grows_gives_up_its_beginning_and_keeps_its_offsets() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        let line = |number: u64| format!("{number:063}\n");
        let text: String = (0..4096).map(line).collect();
        std::fs::write(&log, &text).expect("writes");
        let mut bound = LogBound::default();
        bound.keep(&log, 1 << 20);
        assert_eq!(read_piece(&log, 0, 10).expect("reads"), (0, b"0000000000".to_vec()), "it is short enough");
        bound.keep(&log, 64 << 10);
        if bound.hopeless {
            eprintln!("skipped: the file system makes no holes");
            return;
        }
        let (begin, bytes) = read_piece(&log, 0, u64::MAX).expect("reads");
        assert_eq!(begin, (256 - 64) << 10, "all before is gone");
        assert_eq!(bytes, text.as_bytes()[begin as usize..], "and what is left is where it was");
        assert_eq!(read_piece(&log, begin + 64, 64).expect("reads").1, line((begin + 64) / 64).as_bytes());
        assert_eq!(read_piece(&log, 1 << 30, 64).expect("reads").1, b"", "behind the end is nothing");
        assert_eq!(read_piece(&dir.path().join("none"), 5, 64).expect("reads"), (5, Vec::new()));
    }
}
