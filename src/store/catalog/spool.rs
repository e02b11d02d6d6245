//! Sorting more records than memory should hold, on disk.
//!
//! * [`Sorter`]: takes records in any order, gives them by key; holds `bytes_max` in memory.
//! * [`Records`]: a file of records, written once, read in order as often as wanted.
//!
//! All files are unnamed temporary ones: nothing is left behind by a crash.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// What a sorter holds in memory before it writes a sorted run.
pub const SORT_BYTES_MAX: usize = 32 << 20;
/// How many runs are merged at once: a bound for open files.
const RUNS_MAX: usize = 64;

/// A key with its value; compared by both.
pub type Record = (Vec<u8>, Vec<u8>);

/// A file of records.
#[derive(Debug)]
pub struct Records {
    file: BufWriter<File>,
    count: u64,
}

impl Records {
    /// Makes an empty one; its file lies in `dir` and has no name.
    pub fn create(dir: &Path) -> io::Result<Self> {
        Ok(Self { file: BufWriter::with_capacity(1 << 18, tempfile::tempfile_in(dir)?), count: 0 })
    }

    pub fn push(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).map_err(io::Error::other);
        self.file.write_all(&len(key)?.to_le_bytes())?;
        self.file.write_all(&len(value)?.to_le_bytes())?;
        self.file.write_all(key)?;
        self.file.write_all(value)?;
        self.count += 1;
        Ok(())
    }

    /// How many records there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Reads all records from the first on. One reader at a time.
    pub fn read(&mut self) -> io::Result<RecordReader> {
        self.file.flush()?;
        let mut file = self.file.get_ref().try_clone()?;
        file.seek(SeekFrom::Start(0))?;
        Ok(RecordReader { file: BufReader::with_capacity(1 << 16, file), left: self.count })
    }
}

/// Reads the records of a [`Records`] in order.
#[derive(Debug)]
pub struct RecordReader {
    file: BufReader<File>,
    left: u64,
}

impl RecordReader {
    fn read_one(&mut self) -> io::Result<Record> {
        let mut lens = [0; 4];
        self.file.read_exact(&mut lens)?;
        let key_len = u32::from_le_bytes(lens);
        self.file.read_exact(&mut lens)?;
        let value_len = u32::from_le_bytes(lens);
        let mut key = vec![0; key_len as usize];
        self.file.read_exact(&mut key)?;
        let mut value = vec![0; value_len as usize];
        self.file.read_exact(&mut value)?;
        Ok((key, value))
    }
}

impl Iterator for RecordReader {
    type Item = io::Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        Some(self.read_one())
    }
}

/// One record in a sorter's arena.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    start: usize,
    key_len: u32,
    value_len: u32,
}

/// Sorts records by key, then value.
#[derive(Debug)]
pub struct Sorter {
    dir: PathBuf,
    bytes_max: usize,
    arena: Vec<u8>,
    slots: Vec<Slot>,
    runs: Vec<Records>,
}

impl Sorter {
    /// Makes a sorter that spills to `dir` beyond `bytes_max` of memory.
    pub fn new(dir: &Path, bytes_max: usize) -> Self {
        Self { dir: dir.to_owned(), bytes_max, arena: Vec::new(), slots: Vec::new(), runs: Vec::new() }
    }

    pub fn push(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        let held = self.arena.len() + self.slots.len() * size_of::<Slot>();
        if held + key.len() + value.len() > self.bytes_max && !self.slots.is_empty() {
            self.spill()?;
        }
        let slot = Slot {
            start: self.arena.len(),
            key_len: u32::try_from(key.len()).map_err(io::Error::other)?,
            value_len: u32::try_from(value.len()).map_err(io::Error::other)?,
        };
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(value);
        self.slots.push(slot);
        Ok(())
    }

    /// Ends the input; gives the records in order.
    pub fn finish(mut self) -> io::Result<Sorted> {
        if self.runs.is_empty() {
            // All fits: no file at all.
            sort_slots(&self.arena, &mut self.slots);
            return Ok(Sorted::Memory { arena: self.arena, slots: self.slots.into_iter() });
        }
        self.spill()?;
        Ok(Sorted::Runs(Merge::new(std::mem::take(&mut self.runs))?))
    }

    fn spill(&mut self) -> io::Result<()> {
        sort_slots(&self.arena, &mut self.slots);
        let mut run = Records::create(&self.dir)?;
        for slot in self.slots.drain(..) {
            let (key, value) = slot_bytes(&self.arena, slot);
            run.push(key, value)?;
        }
        self.arena.clear();
        self.runs.push(run);
        if self.runs.len() >= RUNS_MAX {
            let mut merged = Records::create(&self.dir)?;
            for record in Merge::new(std::mem::take(&mut self.runs))? {
                let (key, value) = record?;
                merged.push(&key, &value)?;
            }
            self.runs.push(merged);
        }
        Ok(())
    }
}

fn slot_bytes(arena: &[u8], slot: Slot) -> (&[u8], &[u8]) {
    let (key_len, value_len) = (slot.key_len as usize, slot.value_len as usize);
    let both = arena.get(slot.start..slot.start + key_len + value_len).expect("slots lie within the arena");
    both.split_at(key_len)
}

fn sort_slots(arena: &[u8], slots: &mut [Slot]) {
    slots.sort_unstable_by(|a, b| slot_bytes(arena, *a).cmp(&slot_bytes(arena, *b)));
}

/// Records in order.
#[derive(Debug)]
pub enum Sorted {
    Memory { arena: Vec<u8>, slots: std::vec::IntoIter<Slot> },
    Runs(Merge),
}

impl Iterator for Sorted {
    type Item = io::Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Memory { arena, slots } => {
                let (key, value) = slot_bytes(arena, slots.next()?);
                Some(Ok((key.to_vec(), value.to_vec())))
            }
            Self::Runs(merge) => merge.next(),
        }
    }
}

/// Merges sorted runs.
#[derive(Debug)]
pub struct Merge {
    readers: Vec<RecordReader>,
    /// The next record of each run, least first, with the run's position.
    heads: BinaryHeap<Reverse<(Record, usize)>>,
}

impl Merge {
    fn new(mut runs: Vec<Records>) -> io::Result<Self> {
        let mut readers = Vec::with_capacity(runs.len());
        let mut heads = BinaryHeap::with_capacity(runs.len());
        for (position, run) in runs.iter_mut().enumerate() {
            let mut reader = run.read()?;
            if let Some(first) = reader.next() {
                heads.push(Reverse((first?, position)));
            }
            readers.push(reader);
        }
        Ok(Self { readers, heads })
    }
}

impl Iterator for Merge {
    type Item = io::Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut least = self.heads.peek_mut()?;
        let position = least.0.1;
        match self.readers.get_mut(position).and_then(Iterator::next) {
            Some(Ok(next)) => Some(Ok(std::mem::replace(&mut least.0.0, next))),
            Some(Err(error)) => Some(Err(error)),
            None => Some(Ok(PeekMut::pop(least).0.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngExt;

    fn sorted(bytes_max: usize, records: &[Record]) -> Vec<Record> {
        let dir = tempfile::tempdir().unwrap();
        let mut sorter = Sorter::new(dir.path(), bytes_max);
        for (key, value) in records {
            sorter.push(key, value).unwrap();
        }
        sorter.finish().unwrap().map(Result::unwrap).collect()
    }

    #[test]
    fn records_come_out_in_order_whether_they_fit_or_not() {
        let mut rng = rand::rng();
        let records: Vec<Record> = (0..5000)
            .map(|_| {
                let len = rng.random_range(0..6);
                ((0..len).map(|_| rng.random_range(0..4)).collect(), vec![rng.random(); 3])
            })
            .collect();
        let mut expected = records.clone();
        expected.sort();
        assert_eq!(sorted(1 << 20, &records), expected);
        // So small that more runs arise than are merged at once.
        assert_eq!(sorted(1000, &records), expected);
    }

    #[test]
    fn nothing_in_nothing_out() {
        assert!(sorted(1000, &[]).is_empty());
    }

    #[test]
    fn records_read_back_more_than_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = Records::create(dir.path()).unwrap();
        file.push(b"a", b"1").unwrap();
        file.push(b"", b"").unwrap();
        for _ in 0..2 {
            let all: Vec<Record> = file.read().unwrap().map(Result::unwrap).collect();
            assert_eq!(all, vec![(b"a".to_vec(), b"1".to_vec()), (vec![], vec![])]);
        }
    }
}
