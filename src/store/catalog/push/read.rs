//! Reading: one file's bytes and digest, and whether it held still meanwhile.
//!
//! Runs on threads of its own. A file is stat'ed before and after; if anything differs, or the
//! bytes end early, it is read again, a few times. A file changed so recently that a further change
//! could have the same times is first left alone for a moment. (A writer through a shared mapping
//! is only seen once the kernel updates the times; `docs/push.md` says so.)

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::stat::{FileStat, SFlag};

use crate::format::digest::{ContentHasher, Outboard};
use crate::format::ids::ContentDigest;

use super::error::{Problem, ProblemKind};
use super::progress::{Progress, add};
use super::spool::Stat;
use super::sys::{self, DataRun};
use super::upload::{Closed, PackSender};

/// Tries before a file counts as changing.
pub(super) const TRIES: u32 = 4;
/// Times of a file may be this coarse (a tick of the kernel's clock, with room to spare).
const TICK: Duration = Duration::from_millis(20);
const CHUNK_BYTES: usize = 1 << 20;

/// What to do with the bytes.
#[derive(Debug)]
pub(super) enum Want {
    /// Give them, unless there are more than this: then only the digest.
    Bytes { max: u64 },
    /// Only the digest.
    Digest,
    /// Write them into a pack of their own.
    Pack(PackSender),
}

/// One file to read.
#[derive(Debug)]
pub(super) struct Job {
    /// Its position in the coordinator's queue.
    pub slot: u64,
    /// Below the pushed directory.
    pub path: Vec<u8>,
    pub want: Want,
}

/// What was read.
#[derive(Debug)]
pub(super) struct Done {
    /// Of the very file that was read.
    pub stat: Stat,
    pub mode: u32,
    pub digest: ContentDigest,
    pub outboard: Option<Outboard>,
    /// No later change can have these times.
    pub settled: bool,
    /// It has ACLs or attributes, which are not stored.
    pub xattrs: bool,
    pub runs: Vec<DataRun>,
    pub got: Got,
}

/// What became of the bytes.
#[derive(Debug)]
pub(super) enum Got {
    /// Those of the data runs, back to back.
    Bytes(Vec<u8>),
    Nothing,
    /// They are in this pack, which is to be finished or thrown away.
    Pack(PackSender),
}

/// Why a file was not read.
#[derive(Debug)]
pub(super) enum Failed {
    Problem(Problem),
    /// It changed while it was written into this pack of its own, which is to be thrown away.
    Moved(Box<PackSender>),
    /// The push is over.
    Closed,
}

impl From<Closed> for Failed {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}

/// Reads files one after the other; remembers the directory of the last one.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    root: &'a OwnedFd,
    progress: &'a Progress,
    racy: Duration,
    last_dir: Option<(Vec<u8>, OwnedFd)>,
    chunk: Vec<u8>,
}

/// One try.
struct Try {
    /// What was read, also where it is of no file any more.
    done: Box<Done>,
    /// The file changed meanwhile.
    moved: bool,
}

/// What became of a file that was streamed into a pack that holds other files too.
pub(super) enum Streamed {
    Done(Box<Done>),
    /// It changed. What was written is one content all the same: that of this digest.
    Moved(Box<Done>),
}

impl<'a> Reader<'a> {
    pub(super) fn new(root: &'a OwnedFd, progress: &'a Progress, racy: Duration) -> Self {
        Self { root, progress, racy, last_dir: None, chunk: Vec::new() }
    }

    /// Reads one file.
    pub(super) fn read(&mut self, path: &[u8], want: Want) -> Result<Done, Failed> {
        let mut want = Some(want);
        for attempt in 0..TRIES {
            if attempt > 0 {
                std::thread::sleep(TICK * attempt);
            }
            let file = self.open(path).map_err(|error| Failed::Problem(problem_of(path, &error)))?;
            add(&self.progress.files_read, 1);
            let sink = Sink::of(&mut want);
            let Try { done, moved } = self.attempt(path, &file, sink)?;
            if !moved {
                return Ok(*done);
            }
            // Bytes already written cannot be taken back from a pack.
            if let Got::Pack(sender) = done.got {
                return Err(Failed::Moved(Box::new(sender)));
            }
        }
        Err(Failed::Problem(never_still(path)))
    }

    /// Reads one file once and writes it into a pack that holds other files too.
    pub(super) fn stream(&mut self, path: &[u8], sender: &mut PackSender) -> Result<Streamed, Failed> {
        let file = self.open(path).map_err(|error| Failed::Problem(problem_of(path, &error)))?;
        add(&self.progress.files_read, 1);
        let Try { done, moved } = self.attempt(path, &file, Sink::Shared(sender))?;
        Ok(if moved { Streamed::Moved(done) } else { Streamed::Done(done) })
    }

    fn open(&mut self, path: &[u8]) -> io::Result<File> {
        let (dir, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
            None => (&[][..], path),
        };
        if self.last_dir.as_ref().is_none_or(|(last, _)| last != dir) {
            self.last_dir = Some((dir.to_vec(), sys::open_dir(self.root, dir)?));
        }
        let (_, fd) = self.last_dir.as_ref().ok_or(io::ErrorKind::NotFound)?;
        sys::open_file(fd, name)
    }

    /// Reads a file once. A file that ends early is read as if zeros followed: then it has moved.
    fn attempt(&mut self, path: &[u8], file: &File, mut sink: Sink<'_>) -> Result<Try, Failed> {
        let fail = |error: io::Error| Failed::Problem(problem_of(path, &error));
        let before = stat_at_rest(file).map_err(fail)?;
        if before.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
            let reason = "it is no longer a regular file";
            return Err(Failed::Problem(Problem::new(path, ProblemKind::Changed, reason)));
        }
        let read_at = SystemTime::now();
        let size = u64::try_from(before.st_size).unwrap_or(0);
        let runs = runs_of(file, &before, size).map_err(fail)?;
        let stored: u64 = runs.iter().map(|(start, end)| end - start).sum();
        sink.expect(stored);
        let mut hasher = ContentHasher::new();
        let whole = self.pour(file, size, &runs, &mut hasher, &mut sink).map_err(|error| match error {
            PourError::Io(error) => fail(error),
            PourError::Closed => Failed::Closed,
        })?;
        let after = sys::fstat(file).map_err(|errno| fail(errno.into()))?;
        let (digest, outboard) = hasher.finish();
        let done = Done {
            stat: stat_of(&before),
            mode: before.st_mode & 0o7777,
            digest,
            outboard,
            settled: settled(&before, read_at, self.racy),
            xattrs: sys::has_xattrs_open(file),
            runs,
            got: sink.into_got(),
        };
        Ok(Try { done: Box::new(done), moved: !whole || !same(&before, &after) })
    }

    /// Reads and digests the runs; false where the file ends early.
    fn pour(
        &mut self,
        file: &File,
        size: u64,
        runs: &[DataRun],
        hasher: &mut ContentHasher,
        sink: &mut Sink<'_>,
    ) -> Result<bool, PourError> {
        let mut at = 0;
        let mut whole = true;
        let longest = runs.iter().map(|(start, end)| end - start).max().unwrap_or(0);
        let wanted = CHUNK_BYTES.min(usize::try_from(longest).unwrap_or(CHUNK_BYTES));
        if self.chunk.len() < wanted {
            self.chunk.resize(wanted, 0);
        }
        for (start, end) in runs {
            hasher.update_zeros(start - at);
            at = *start;
            while at < *end {
                let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(self.chunk.len());
                let buffer = self.chunk.get_mut(..len).unwrap_or_default();
                let mut got = if whole { file.read_at(buffer, at).map_err(PourError::Io)? } else { 0 };
                if got == 0 {
                    whole = false;
                    if !sink.needs_all() {
                        return Ok(false);
                    }
                    buffer.fill(0);
                    got = buffer.len();
                }
                let bytes = buffer.get(..got).unwrap_or_default();
                hasher.update(bytes);
                sink.take(bytes).map_err(|Closed| PourError::Closed)?;
                add(&self.progress.bytes_read, got as u64);
                at += got as u64;
            }
        }
        hasher.update_zeros(size - at);
        Ok(whole)
    }
}

enum PourError {
    Io(io::Error),
    Closed,
}

/// Where bytes go while they are digested.
enum Sink<'a> {
    Bytes { max: u64, bytes: Vec<u8> },
    Nothing,
    Pack(PackSender),
    Shared(&'a mut PackSender),
}

impl Sink<'_> {
    /// Takes what is wanted; a pack can be taken once, the other wishes stay for the next try.
    fn of(want: &mut Option<Want>) -> Self {
        match want.take() {
            Some(Want::Bytes { max }) => {
                *want = Some(Want::Bytes { max });
                Self::Bytes { max, bytes: Vec::new() }
            }
            Some(Want::Pack(sender)) => Self::Pack(sender),
            Some(Want::Digest) => {
                *want = Some(Want::Digest);
                Self::Nothing
            }
            None => Self::Nothing,
        }
    }

    /// Makes room for so many bytes, or decides that they are too many to hold.
    fn expect(&mut self, stored: u64) {
        match self {
            Self::Bytes { max, .. } if stored > *max => *self = Self::Nothing,
            Self::Bytes { bytes, .. } => bytes.reserve_exact(usize::try_from(stored).unwrap_or(0)),
            _ => {}
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Closed> {
        match self {
            Self::Bytes { bytes: all, .. } => all.extend_from_slice(bytes),
            Self::Nothing => {}
            Self::Pack(sender) => sender.write(bytes)?,
            Self::Shared(sender) => sender.write(bytes)?,
        }
        Ok(())
    }

    /// Says whether what was announced must be written whatever becomes of the file: others follow it.
    fn needs_all(&self) -> bool {
        matches!(self, Self::Shared(_))
    }

    fn into_got(self) -> Got {
        match self {
            Self::Bytes { bytes, .. } => Got::Bytes(bytes),
            Self::Nothing | Self::Shared(_) => Got::Nothing,
            Self::Pack(sender) => Got::Pack(sender),
        }
    }
}

/// Finds where a file has data. One with as many blocks as bytes has no holes worth a look; fewer
/// blocks may be holes, compression, or data that has no blocks yet.
fn runs_of(file: &File, stat: &FileStat, size: u64) -> io::Result<Vec<DataRun>> {
    if size > 0 && stat_of(stat).stored >= size {
        return Ok(vec![(0, size)]);
    }
    sys::data_runs(file, size)
}

/// Stats a file; where it changed within the last tick, waits until a further change would show.
fn stat_at_rest(file: &File) -> io::Result<FileStat> {
    for _ in 0..TRIES {
        let stat = sys::fstat(file)?;
        if settled(&stat, SystemTime::now(), TICK) {
            return Ok(stat);
        }
        std::thread::sleep(TICK);
    }
    Ok(sys::fstat(file)?)
}

/// Says whether a file's times are older than `margin` at `now`. Times in the future never are,
/// unless they are far away: somebody set the mtime on purpose, and the ctime is looked at as well.
fn settled(stat: &FileStat, now: SystemTime, margin: Duration) -> bool {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let old_enough = |secs: i64, nanos: i64| {
        let time = u128::try_from(secs).unwrap_or(0) * 1_000_000_000 + u128::try_from(nanos).unwrap_or(0);
        time + margin.as_nanos() < now
    };
    // A change always sets the ctime; the mtime can be set to anything and proves nothing.
    old_enough(stat.st_ctime, stat.st_ctime_nsec)
}

fn same(a: &FileStat, b: &FileStat) -> bool {
    stat_of(a).same_state(&stat_of(b)) && a.st_mode == b.st_mode
}

fn stat_of(stat: &FileStat) -> Stat {
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    Stat {
        size,
        stored: u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512).min(size),
        mtime: sys::mtime_of(stat),
        ctime: sys::ctime_of(stat),
        dev: stat.st_dev,
        ino: stat.st_ino,
    }
}

/// Tells of a file that changed at every try.
pub(super) fn never_still(path: &[u8]) -> Problem {
    Problem::new(path, ProblemKind::Changed, "it changed each time it was read")
}

fn problem_of(path: &[u8], error: &io::Error) -> Problem {
    let gone = [libc::ENOENT, libc::ENOTDIR, libc::ELOOP, libc::ESTALE];
    match error.raw_os_error() {
        Some(code) if gone.contains(&code) => Problem::new(path, ProblemKind::Changed, "it went away during the push"),
        _ => Problem::new(path, ProblemKind::Unreadable, error.to_string()),
    }
}
