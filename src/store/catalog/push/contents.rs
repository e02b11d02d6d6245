//! The contents pass: every walked file gets a digest and a place.
//!
//! ```text
//! spool --(in order)--> queue --jobs--> readers (read + digest, in parallel)
//!                        | front, once read
//!                        v
//!                known content?  -> its place
//!                else            -> appended to the pack that grows -> upload
//! ```
//!
//! Packs fill in tree order because only the front of the queue is consumed. A small file is held in
//! memory until its turn, so it is digested before a byte of it is sent, and equal contents are stored
//! once. A file above the layout's `whole_len` is a pack of its own: it is sent while it is digested,
//! unless a content of the same size is known, then it is digested first. A file between the two
//! limits is read twice (digested in parallel, then streamed into the pack in its turn): memory
//! bounds what can wait, and only datasets above 128 GiB have such files.
//!
//! This thread alone touches the index.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};

use crate::format::digest::{self, Outboard};
use crate::format::ids::{ContentDigest, PackId};
use crate::format::pack::{ALIGN, Layout, Place};
use crate::format::placement::Extent;

use super::Tuning;
use super::error::{Problem, ProblemKind, PushError};
use super::index::{At, FileRow, Index, LayoutRow, NO_PACK, PackState, PartRow};
use super::packs::Packs;
use super::places::{PlaceRow, Places};
use super::progress::{Progress, add};
use super::read::{self, Done, Failed, Got, Job, Reader, Streamed, Want};
use super::spool::{Item, Kind, Record, Spool, SpoolReader, Stat};
use super::sys::DataRun;
use super::upload::{Begun, Closed, PackSender, Uploads};

/// Files in the queue at most.
const SLOTS_MAX: usize = 4096;
/// Large files that are read and sent at the same time.
const WHOLES_MAX: usize = 4;
/// The index is made durable at least this often while files are only digested.
const COMMIT_EVERY: Duration = Duration::from_secs(2);
/// S3 takes 10,000 parts; parts of a huge file grow so that it stays below.
const PARTS_MAX: u64 = 9_000;

/// What readers and uploads tell the coordinator.
#[derive(Debug)]
pub(super) enum Message {
    Read {
        slot: u64,
        result: Box<Result<Done, Failed>>,
    },
    /// A multipart upload exists.
    Begun {
        pack: u32,
        upload: String,
    },
    Part {
        pack: u32,
        row: PartRow,
    },
    /// All bytes of the pack are in the lake.
    Sent {
        pack: u32,
        len: u64,
    },
    /// And it is described.
    Described {
        pack: u32,
        id: PackId,
    },
    Abandoned,
    Failed(PushError),
}

/// What the pass works on.
#[derive(Debug)]
pub(super) struct Work<'a> {
    pub spool: &'a Spool,
    pub index: &'a mut Index,
    pub packs: &'a mut Packs,
    pub places: &'a mut Places,
    pub uploads: &'a Uploads,
    pub messages: &'a Receiver<Message>,
    pub progress: &'a Arc<Progress>,
    pub tuning: &'a Tuning,
    pub layout: Layout,
    pub skip_unreadable: bool,
    /// What paths of the spool have in front of those below the pushed directory.
    pub prefix: &'a [u8],
    /// None: every file. Else: only those that lie in one of these packs, which are written again.
    pub rewrite: Option<&'a HashSet<u32>>,
}

/// What the pass found beside places.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub problems: Vec<Problem>,
    /// First entries of hard-link groups that were left out (where their records start).
    pub dropped_firsts: HashSet<u64>,
    pub dropped_files: u64,
    pub new_bytes: u64,
    /// Files with ACLs or attributes.
    pub xattrs_dropped: u64,
    /// A file was so young when it was read that its times may not show a later change.
    pub unsettled: bool,
}

/// One file in its turn.
#[derive(Debug)]
struct Slot {
    ordinal: u64,
    record_at: u64,
    dir: u64,
    path: Vec<u8>,
    stat: Stat,
    mode: u32,
    /// What it counts against `read_ahead_bytes`.
    charge: u64,
    /// How often it was sent and changed meanwhile.
    moved: u32,
    state: State,
}

#[derive(Debug)]
enum State {
    Waiting {
        whole: bool,
    },
    Known {
        digest: ContentDigest,
        at: At,
    },
    Read(Box<Result<Done, Failed>>),
    /// A later hard link of the group whose first record starts there.
    Link {
        first_at: u64,
    },
}

/// The pack that grows.
#[derive(Debug)]
struct Growing {
    sender: PackSender,
    contents: u32,
}

struct Coordinator<'a, 'w> {
    work: &'a mut Work<'w>,
    root: &'a OwnedFd,
    records: SpoolReader<'a>,
    jobs: Sender<Job>,
    queue: VecDeque<Slot>,
    queue_first: u64,
    charged: u64,
    wholes: usize,
    /// Read from the spool, but there was no room for it yet.
    held: Option<Slot>,
    spool_ended: bool,
    dir: (u64, Vec<u8>),
    ordinal: u64,
    growing: Option<Growing>,
    /// Packs that were ended but are not described yet.
    unfinished: BTreeSet<u32>,
    /// Sizes of whole files of this push and of known packs.
    whole_sizes: HashSet<u64>,
    committed_at: Instant,
    found: Found,
}

/// Gives every walked file (or those of `rewrite`) a place. `root` is the pushed directory.
pub(super) fn run(work: &mut Work<'_>, root: &OwnedFd, reports: &Sender<Message>) -> Result<Found, PushError> {
    let (jobs, inbox) = crossbeam_channel::unbounded::<Job>();
    let (progress, racy, readers) = (work.progress.clone(), work.tuning.racy, work.tuning.readers.max(1));
    let uploads = work.uploads.clone();
    std::thread::scope(|scope| {
        for number in 0..readers {
            let (inbox, reports, progress) = (inbox.clone(), reports.clone(), progress.clone());
            let spawned = std::thread::Builder::new()
                .name(format!("push-read-{number}"))
                .spawn_scoped(scope, move || read_jobs(Reader::new(root, &progress, racy), &inbox, &reports));
            if spawned.is_err() && number == 0 {
                return Err(PushError::Thread);
            }
        }
        let spool = work.spool;
        let coordinator = Coordinator::new(work, root, spool.read()?, jobs);
        let result = coordinator.run();
        if result.is_err() {
            // Wakes readers that wait for room, so that the scope can end.
            uploads.close();
        }
        result
    })
}

fn read_jobs(mut reader: Reader<'_>, inbox: &Receiver<Job>, reports: &Sender<Message>) {
    for job in inbox {
        let Job { slot, path, want } = job;
        let result = catch_unwind(AssertUnwindSafe(|| reader.read(&path, want)));
        let message = match result {
            Ok(result) => Message::Read { slot, result: Box::new(result) },
            Err(_) => Message::Failed(PushError::Thread),
        };
        if reports.send(message).is_err() {
            return;
        }
    }
}

impl<'a, 'w> Coordinator<'a, 'w> {
    fn new(work: &'a mut Work<'w>, root: &'a OwnedFd, records: SpoolReader<'a>, jobs: Sender<Job>) -> Self {
        let whole_sizes = work.packs.lens();
        Self {
            work,
            root,
            records,
            jobs,
            queue: VecDeque::new(),
            queue_first: 0,
            charged: 0,
            wholes: 0,
            held: None,
            spool_ended: false,
            dir: (0, Vec::new()),
            ordinal: 0,
            growing: None,
            unfinished: BTreeSet::new(),
            whole_sizes,
            committed_at: Instant::now(),
            found: Found::default(),
        }
    }

    fn run(mut self) -> Result<Found, PushError> {
        loop {
            self.fill()?;
            while self.front_is_ready() {
                self.consume_front()?;
            }
            if self.queue.is_empty() && self.held.is_none() && self.spool_ended {
                break;
            }
            self.listen(self.front_waits())?;
            if self.committed_at.elapsed() > COMMIT_EVERY {
                self.commit()?;
            }
        }
        self.close_growing()?;
        while !self.unfinished.is_empty() {
            self.listen(true)?;
        }
        self.commit()?;
        Ok(self.found)
    }

    fn commit(&mut self) -> Result<(), PushError> {
        self.committed_at = Instant::now();
        self.work.index.commit()
    }

    fn front_is_ready(&self) -> bool {
        self.queue.front().is_some_and(|slot| !matches!(slot.state, State::Waiting { .. }))
    }

    fn front_waits(&self) -> bool {
        self.queue.front().is_some_and(|slot| matches!(slot.state, State::Waiting { .. }))
    }

    // ---- from the spool to the queue ----------------------------------------------------------

    /// Queues files while there is room.
    fn fill(&mut self) -> Result<(), PushError> {
        while self.queue.len() < SLOTS_MAX {
            let slot = match self.held.take() {
                Some(slot) => slot,
                None => match self.next_slot()? {
                    Some(slot) => slot,
                    None => return Ok(()),
                },
            };
            let is_whole = matches!(slot.state, State::Waiting { whole: true });
            let full = self.charged > 0 && self.charged + slot.charge > self.work.tuning.read_ahead_bytes;
            if full || (is_whole && self.wholes >= WHOLES_MAX) {
                self.held = Some(slot);
                return Ok(());
            }
            self.enqueue(slot, is_whole)?;
        }
        Ok(())
    }

    fn enqueue(&mut self, slot: Slot, is_whole: bool) -> Result<(), PushError> {
        let number = self.queue_first + self.queue.len() as u64;
        if matches!(slot.state, State::Waiting { .. }) {
            self.wholes += usize::from(is_whole);
            let want = self.want_of(&slot)?;
            self.submit(number, &slot.path, want)?;
        }
        self.charged += slot.charge;
        self.queue.push_back(slot);
        Ok(())
    }

    fn submit(&self, slot: u64, path: &[u8], want: Want) -> Result<(), PushError> {
        self.jobs.send(Job { slot, path: path.to_vec(), want }).map_err(|_| PushError::Thread)
    }

    fn want_of(&mut self, slot: &Slot) -> Result<Want, PushError> {
        let State::Waiting { whole } = slot.state else {
            return Ok(Want::Digest);
        };
        if !whole {
            return Ok(if slot.charge > 0 { Want::Bytes { max: self.work.tuning.inline_bytes } } else { Want::Digest });
        }
        let unfinished = self.work.packs.unfinished_whole(&slot.path);
        if unfinished.is_none() && !self.whole_sizes.insert(slot.stat.stored) {
            return Ok(Want::Digest);
        }
        Ok(Want::Pack(self.open_whole(&slot.path, slot.stat.stored, unfinished)?))
    }

    /// Gives the next file of the spool as a slot; its state says what is to be done.
    fn next_slot(&mut self) -> Result<Option<Slot>, PushError> {
        loop {
            let Some(record) = self.records.next()? else {
                self.spool_ended = true;
                return Ok(None);
            };
            match record {
                Record::Enter { number, path } => self.dir = (number, path),
                Record::Item { at, item } => {
                    if let Some(slot) = self.slot_of(at, item)? {
                        return Ok(Some(slot));
                    }
                }
            }
        }
    }

    fn slot_of(&mut self, record_at: u64, item: Item) -> Result<Option<Slot>, PushError> {
        let mut path = self.dir.1.clone();
        super::walk::join(&mut path, &item.name);
        let path = path.strip_prefix(self.work.prefix).unwrap_or(&path).to_vec();
        let dir = self.dir.0;
        let slot = |ordinal, stat, charge, state| Slot {
            ordinal,
            record_at,
            dir,
            path: path.clone(),
            stat,
            mode: item.mode,
            charge,
            moved: 0,
            state,
        };
        match item.kind {
            Kind::File(stat) => {
                let ordinal = self.ordinal;
                self.ordinal += 1;
                let Some(state) = self.state_of(ordinal, &path, &stat)? else {
                    return Ok(None);
                };
                let charge = match state {
                    State::Waiting { whole: false } if stat.stored <= self.work.tuning.inline_bytes => {
                        stat.stored.max(1)
                    }
                    _ => 0,
                };
                Ok(Some(slot(ordinal, stat, charge, state)))
            }
            Kind::Link { first_at, .. } if self.work.skip_unreadable && self.work.rewrite.is_none() => {
                Ok(Some(slot(u64::MAX, EMPTY_STAT, 0, State::Link { first_at })))
            }
            _ => Ok(None),
        }
    }

    /// Decides whether a file must be read; None where this pass has nothing to do with it.
    fn state_of(&mut self, ordinal: u64, path: &[u8], stat: &Stat) -> Result<Option<State>, PushError> {
        let whole = stat.stored > self.work.layout.whole_len;
        if let Some(rewrite) = self.work.rewrite {
            return self.rewrite_state(ordinal, rewrite, whole);
        }
        if stat.size == 0 {
            return Ok(Some(State::Known { digest: digest::digest(&[]), at: At::NOWHERE }));
        }
        if let Some(row) = self.work.index.file(path)?
            && row.settled
            && row.stat.same_state(stat)
            && let Some(at) = self.place_of(&row.digest)?
        {
            self.found.xattrs_dropped += u64::from(row.xattrs);
            return Ok(Some(State::Known { digest: row.digest, at }));
        }
        Ok(Some(State::Waiting { whole }))
    }

    fn rewrite_state(&self, ordinal: u64, rewrite: &HashSet<u32>, whole: bool) -> Result<Option<State>, PushError> {
        let row = self.work.places.peek(ordinal)?;
        Ok((!row.dropped && rewrite.contains(&row.at.pack)).then_some(State::Waiting { whole }))
    }

    /// Gives where a content lies, if this push may rely on it.
    fn place_of(&self, digest: &ContentDigest) -> Result<Option<At>, PushError> {
        let at = self.work.index.content(digest)?;
        Ok(at.filter(|at| {
            let leaving = self.work.rewrite.is_some_and(|rewrite| rewrite.contains(&at.pack));
            at.pack == NO_PACK || (!leaving && self.work.packs.usable(at.pack))
        }))
    }

    // ---- from the queue to places ---------------------------------------------------------------

    fn consume_front(&mut self) -> Result<(), PushError> {
        let Some(mut slot) = self.queue.pop_front() else {
            return Ok(());
        };
        let state = std::mem::replace(&mut slot.state, State::Waiting { whole: false });
        let charge = slot.charge;
        match state {
            State::Known { digest, at } => self.place(&slot, digest, at, None)?,
            State::Link { first_at } => {
                if self.found.dropped_firsts.contains(&first_at) {
                    self.work.spool.drop_item(slot.dir)?;
                }
            }
            State::Read(result) => match *result {
                Ok(done) => {
                    if let Some(slot) = self.consume_read(slot, done)? {
                        // To be sent now that it is known to be new: it stays in front.
                        self.queue.push_front(slot);
                        return Ok(());
                    }
                }
                Err(Failed::Problem(problem)) => self.consume_problem(&slot, problem)?,
                Err(Failed::Moved(sender)) => {
                    if let Some(slot) = self.consume_moved(slot, *sender)? {
                        self.queue.push_front(slot);
                        return Ok(());
                    }
                }
                Err(Failed::Closed) => return Err(PushError::Thread),
            },
            State::Waiting { .. } => {}
        }
        self.charged -= charge;
        self.queue_first += 1;
        Ok(())
    }

    /// Places a file that was read; gives the slot back where it must be read once more, to be sent.
    fn consume_read(&mut self, mut slot: Slot, done: Done) -> Result<Option<Slot>, PushError> {
        self.note_file(&slot.path, &done)?;
        slot.stat = done.stat;
        slot.mode = done.mode;
        let known = if done.stat.size == 0 { Some(At::NOWHERE) } else { self.place_of(&done.digest)? };
        if let Some(at) = known {
            if let Got::Pack(sender) = done.got {
                self.throw_away(sender)?;
            }
            self.place(&slot, done.digest, at, None)?;
            return Ok(None);
        }
        if done.runs.is_empty() {
            self.work.index.add_nowhere(&done.digest)?;
            self.place(&slot, done.digest, At::NOWHERE, None)?;
            return Ok(None);
        }
        let stored: u64 = done.runs.iter().map(|(start, end)| end - start).sum();
        let at = match done.got {
            Got::Bytes(bytes) => {
                self.append(&done.digest, done.stat.size, &done.runs, done.outboard.as_ref(), &bytes)?
            }
            Got::Pack(sender) => {
                self.finish_whole(sender, &done.digest, done.stat.size, &done.runs, done.outboard.as_ref())?
            }
            Got::Nothing if stored > self.work.layout.whole_len => {
                let sender = self.open_whole(&slot.path, stored, None)?;
                self.wholes += 1;
                slot.state = State::Waiting { whole: true };
                self.submit(self.queue_first, &slot.path, Want::Pack(sender))?;
                return Ok(Some(slot));
            }
            Got::Nothing => match self.stream(&mut slot)? {
                Some((digest, at)) => {
                    self.place(&slot, digest, at, Some(stored))?;
                    return Ok(None);
                }
                None => return Ok(None),
            },
        };
        self.place(&slot, done.digest, at, Some(stored))?;
        Ok(None)
    }

    fn note_file(&mut self, path: &[u8], done: &Done) -> Result<(), PushError> {
        self.found.unsettled |= !done.settled;
        if self.work.rewrite.is_none() {
            self.found.xattrs_dropped += u64::from(done.xattrs);
        }
        let row = FileRow { stat: done.stat, settled: done.settled, xattrs: done.xattrs, digest: done.digest };
        self.work.index.set_file(path, &row)
    }

    /// A large file that changed while it was sent is sent again once it holds still for a reading;
    /// gives the slot back unless it has changed too often.
    fn consume_moved(&mut self, mut slot: Slot, sender: PackSender) -> Result<Option<Slot>, PushError> {
        self.throw_away(sender)?;
        slot.moved += 1;
        if slot.moved >= read::TRIES {
            self.consume_problem(&slot, read::never_still(&slot.path))?;
            return Ok(None);
        }
        self.wholes += 1;
        slot.state = State::Waiting { whole: true };
        self.submit(self.queue_first, &slot.path, Want::Digest)?;
        Ok(Some(slot))
    }

    fn consume_problem(&mut self, slot: &Slot, problem: Problem) -> Result<(), PushError> {
        let drop = self.work.skip_unreadable && problem.kind == ProblemKind::Unreadable;
        self.found.problems.push(problem);
        let row = PlaceRow {
            digest: digest::digest(&[]),
            at: At::NOWHERE,
            size: 0,
            mtime: slot.stat.mtime,
            mode: slot.mode,
            dropped: true,
        };
        self.note_place(slot.ordinal, &row)?;
        if drop {
            self.found.dropped_files += 1;
            self.found.dropped_firsts.insert(slot.record_at);
            self.work.spool.drop_item(slot.dir)?;
        }
        Ok(())
    }

    fn place(&mut self, slot: &Slot, digest: ContentDigest, at: At, new: Option<u64>) -> Result<(), PushError> {
        let row =
            PlaceRow { digest, at, size: slot.stat.size, mtime: slot.stat.mtime, mode: slot.mode, dropped: false };
        self.note_place(slot.ordinal, &row)?;
        if self.work.rewrite.is_none() {
            self.found.new_bytes += new.unwrap_or(0);
            add(&self.work.progress.files_done, 1);
            add(&self.work.progress.bytes_done, slot.stat.size);
        }
        Ok(())
    }

    fn note_place(&mut self, ordinal: u64, row: &PlaceRow) -> Result<(), PushError> {
        if self.work.rewrite.is_some() { self.work.places.set(ordinal, row) } else { self.work.places.push(row) }
    }

    // ---- packs ------------------------------------------------------------------------------------

    fn grow(&mut self) -> Result<Growing, PushError> {
        if let Some(growing) = self.growing.take() {
            return Ok(growing);
        }
        let part_bytes = self.part_bytes(self.work.layout.pack_len * 2);
        let (number, row) = self.work.packs.begin(self.work.index, part_bytes, None)?;
        let sender = self.work.uploads.open(number, &row.key, part_bytes, Begun::default());
        Ok(Growing { sender, contents: 0 })
    }

    fn part_bytes(&self, len_max: u64) -> u64 {
        let needed = len_max.div_ceil(PARTS_MAX).next_multiple_of(1 << 20);
        if len_max / self.work.tuning.part_bytes.max(1) < PARTS_MAX { self.work.tuning.part_bytes } else { needed }
    }

    fn append(
        &mut self,
        digest: &ContentDigest,
        size: u64,
        runs: &[DataRun],
        outboard: Option<&Outboard>,
        bytes: &[u8],
    ) -> Result<At, PushError> {
        let mut growing = self.grow()?;
        let sender = &mut growing.sender;
        closed(sender.pad_to(ALIGN))?;
        let place = place_at(sender.written(), size, runs);
        closed(sender.write(bytes))?;
        let at = At { pack: growing.sender.number, position: growing.contents };
        growing.contents += 1;
        self.note_content(at, LayoutRow { content: *digest, size, place }, outboard)?;
        self.growing = Some(growing);
        self.close_if_full()?;
        Ok(at)
    }

    fn note_content(&mut self, at: At, row: LayoutRow, outboard: Option<&Outboard>) -> Result<(), PushError> {
        self.work.index.add_content(at, &row, true)?;
        match outboard {
            Some(outboard) => self.work.index.set_outboard(at, outboard),
            None => Ok(()),
        }
    }

    fn close_if_full(&mut self) -> Result<(), PushError> {
        match &self.growing {
            Some(growing) if growing.sender.written() >= self.work.layout.pack_len => self.close_growing(),
            _ => Ok(()),
        }
    }

    fn close_growing(&mut self) -> Result<(), PushError> {
        let Some(mut growing) = self.growing.take() else {
            return Ok(());
        };
        closed(growing.sender.pad_to(ALIGN))?;
        self.end_pack(growing.sender)
    }

    fn end_pack(&mut self, sender: PackSender) -> Result<(), PushError> {
        let number = sender.number;
        let (index, outboard) = self.work.packs.describe(self.work.index, number, sender.written())?;
        // What the lake gets is written down before it may get it.
        self.commit()?;
        self.unfinished.insert(number);
        closed(sender.finish(index, outboard))
    }

    /// Streams a file of middle size into the growing pack, again if it changed meanwhile. What was
    /// written is listed in the pack under the digest it turned out to have, so that the pack stays
    /// provable whatever became of the file.
    fn stream(&mut self, slot: &mut Slot) -> Result<Option<(ContentDigest, At)>, PushError> {
        let mut reader = Reader::new(self.root, self.work.progress, self.work.tuning.racy);
        for _ in 0..read::TRIES {
            let mut growing = self.grow()?;
            closed(growing.sender.pad_to(ALIGN))?;
            let start = growing.sender.written();
            let streamed = match reader.stream(&slot.path, &mut growing.sender) {
                Ok(streamed) => streamed,
                Err(Failed::Problem(problem)) => {
                    // Half a file lies in the pack: the push fails, and this pack is never described.
                    self.consume_problem(slot, Problem { kind: ProblemKind::Changed, ..problem })?;
                    growing.sender.abandon();
                    return Ok(None);
                }
                Err(Failed::Closed | Failed::Moved(_)) => return Err(PushError::Thread),
            };
            let (done, moved) = match streamed {
                Streamed::Done(done) => (done, false),
                Streamed::Moved(done) => (done, true),
            };
            let at = self.note_streamed(growing, start, &done)?;
            if !moved {
                self.note_file(&slot.path, &done)?;
                slot.stat = done.stat;
                slot.mode = done.mode;
                return Ok(Some((done.digest, at)));
            }
        }
        self.consume_problem(slot, read::never_still(&slot.path))?;
        Ok(None)
    }

    fn note_streamed(&mut self, mut growing: Growing, start: u64, done: &Done) -> Result<At, PushError> {
        let at = At { pack: growing.sender.number, position: growing.contents };
        growing.contents += 1;
        self.growing = Some(growing);
        let place = place_at(start, done.stat.size, &done.runs);
        let row = LayoutRow { content: done.digest, size: done.stat.size, place };
        self.note_content(at, row, done.outboard.as_ref())?;
        self.close_if_full()?;
        Ok(at)
    }

    fn open_whole(&mut self, path: &[u8], stored: u64, unfinished: Option<u32>) -> Result<PackSender, PushError> {
        if let Some(number) = unfinished {
            let (row, begun) = self.work.packs.resume_whole(self.work.index, number)?;
            return Ok(self.work.uploads.open(number, &row.key, row.part_bytes, begun));
        }
        let part_bytes = self.part_bytes(stored);
        let (number, row) = self.work.packs.begin(self.work.index, part_bytes, Some(path))?;
        Ok(self.work.uploads.open(number, &row.key, part_bytes, Begun::default()))
    }

    fn finish_whole(
        &mut self,
        sender: PackSender,
        digest: &ContentDigest,
        size: u64,
        runs: &[DataRun],
        outboard: Option<&Outboard>,
    ) -> Result<At, PushError> {
        let at = At { pack: sender.number, position: 0 };
        let place = place_at(0, size, runs);
        self.note_content(at, LayoutRow { content: *digest, size, place }, outboard)?;
        self.end_pack(sender)?;
        Ok(at)
    }

    fn throw_away(&mut self, sender: PackSender) -> Result<(), PushError> {
        self.work.packs.forget(self.work.index, sender.number)?;
        sender.abandon();
        Ok(())
    }

    // ---- messages -----------------------------------------------------------------------------------

    /// Handles what arrived; waits for something where `wait`.
    fn listen(&mut self, wait: bool) -> Result<(), PushError> {
        if wait {
            let message = self.work.messages.recv().map_err(|_| PushError::Thread)?;
            self.handle(message)?;
        }
        while let Ok(message) = self.work.messages.try_recv() {
            self.handle(message)?;
        }
        Ok(())
    }

    fn handle(&mut self, message: Message) -> Result<(), PushError> {
        match message {
            Message::Read { slot, result } => {
                let position = slot.checked_sub(self.queue_first).and_then(|at| usize::try_from(at).ok());
                if let Some(slot) = position.and_then(|at| self.queue.get_mut(at)) {
                    self.wholes -= usize::from(matches!(slot.state, State::Waiting { whole: true }));
                    slot.state = State::Read(result);
                }
                Ok(())
            }
            Message::Described { pack, .. } => {
                self.unfinished.remove(&pack);
                note(self.work.index, self.work.packs, message)?;
                self.commit()
            }
            Message::Failed(error) => Err(error),
            other => {
                note(self.work.index, self.work.packs, other)?;
                self.commit()
            }
        }
    }
}

/// Writes down what an upload reported.
pub(super) fn note(index: &mut Index, packs: &mut Packs, message: Message) -> Result<(), PushError> {
    match message {
        Message::Begun { pack, upload } => packs.update(index, pack, |row| row.upload = Some(upload)),
        Message::Part { pack, row } => index.set_part(pack, &row),
        Message::Sent { pack, len } => packs.update(index, pack, |row| {
            row.state = PackState::Data;
            row.len = len;
        }),
        Message::Described { pack, id } => packs.described(index, pack, id),
        Message::Read { .. } | Message::Abandoned | Message::Failed(_) => Ok(()),
    }
}

const EMPTY_STAT: Stat = Stat {
    size: 0,
    stored: 0,
    mtime: crate::format::tree::Mtime { secs: 0, nanos: 0 },
    ctime: crate::format::tree::Mtime { secs: 0, nanos: 0 },
    dev: 0,
    ino: 0,
};

fn closed<T>(result: Result<T, Closed>) -> Result<T, PushError> {
    result.map_err(|Closed| PushError::Thread)
}

/// Says where data runs lie that are written back to back from `offset` on. Runs start on 4 KiB.
fn place_at(offset: u64, size: u64, runs: &[DataRun]) -> Place {
    if let [(0, end)] = runs
        && *end == size
    {
        return Place::Run { offset };
    }
    let mut at = offset;
    let extents = runs
        .iter()
        .map(|(start, end)| {
            let extent = Extent { logical: *start, offset: at, len: end - start };
            at += extent.len;
            extent
        })
        .collect();
    Place::Sparse { extents }
}
