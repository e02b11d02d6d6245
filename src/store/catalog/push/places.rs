//! Where the contents of the walked files lie: one row of fixed length for each, in spool order.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::format::ids::ContentDigest;
use crate::format::tree::Mtime;

use super::codec::{Put, Take};
use super::error::{AtPath, PushError};
use super::index::At;

const ROW_LEN: usize = 64;
const ROWS_BUFFERED: usize = 1024;
const DROPPED: u32 = 1 << 31;

/// One walked file, as it was when it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PlaceRow {
    pub digest: ContentDigest,
    pub at: At,
    pub size: u64,
    pub mtime: Mtime,
    pub mode: u32,
    /// It could not be read and is left out.
    pub dropped: bool,
}

/// The rows, by ordinal.
#[derive(Debug)]
pub(super) struct Places {
    dir: PathBuf,
    file: File,
    rows: u64,
    tail: Vec<u8>,
    /// A run of rows that was read last: readers go in order.
    cache: Vec<u8>,
    cache_first: u64,
}

impl Places {
    pub(super) fn create(dir: &Path) -> Result<Self, PushError> {
        let file = tempfile::tempfile_in(dir).at(dir)?;
        Ok(Self { dir: dir.to_owned(), file, rows: 0, tail: Vec::new(), cache: Vec::new(), cache_first: 0 })
    }

    pub(super) fn push(&mut self, row: &PlaceRow) -> Result<(), PushError> {
        encode(row, &mut self.tail);
        self.rows += 1;
        if self.tail.len() >= ROW_LEN * ROWS_BUFFERED {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), PushError> {
        let at = self.rows * ROW_LEN as u64 - self.tail.len() as u64;
        self.file.write_all_at(&self.tail, at).at(&self.dir)?;
        self.tail.clear();
        Ok(())
    }

    pub(super) fn set(&mut self, ordinal: u64, row: &PlaceRow) -> Result<(), PushError> {
        self.flush()?;
        self.cache.clear();
        let mut bytes = Vec::with_capacity(ROW_LEN);
        encode(row, &mut bytes);
        self.file.write_all_at(&bytes, ordinal * ROW_LEN as u64).at(&self.dir)
    }

    /// Reads one row that was flushed (no row is added any more).
    pub(super) fn peek(&self, ordinal: u64) -> Result<PlaceRow, PushError> {
        let mut bytes = [0; ROW_LEN];
        self.file.read_exact_at(&mut bytes, ordinal * ROW_LEN as u64).at(&self.dir)?;
        decode(&bytes).ok_or_else(|| PushError::Spool { path: self.dir.clone(), why: "a file's place is missing" })
    }

    pub(super) fn get(&mut self, ordinal: u64) -> Result<PlaceRow, PushError> {
        let damaged = |dir: &Path| PushError::Spool { path: dir.to_owned(), why: "a file's place is missing" };
        if ordinal >= self.rows {
            return Err(damaged(&self.dir));
        }
        self.flush()?;
        let cached = (self.cache.len() / ROW_LEN) as u64;
        if ordinal < self.cache_first || ordinal >= self.cache_first + cached {
            let rows = (self.rows - ordinal).min(ROWS_BUFFERED as u64);
            self.cache.resize(usize::try_from(rows).unwrap_or(0) * ROW_LEN, 0);
            self.file.read_exact_at(&mut self.cache, ordinal * ROW_LEN as u64).at(&self.dir)?;
            self.cache_first = ordinal;
        }
        let from = usize::try_from(ordinal - self.cache_first).unwrap_or(usize::MAX).saturating_mul(ROW_LEN);
        self.cache.get(from..).and_then(decode).ok_or_else(|| damaged(&self.dir))
    }
}

fn encode(row: &PlaceRow, bytes: &mut Vec<u8>) {
    let mut put = Put(std::mem::take(bytes));
    put.raw(row.digest.as_bytes());
    put.u32(row.at.pack);
    put.u32(row.at.position);
    put.u64(row.size);
    put.mtime(row.mtime);
    put.u32(row.mode | if row.dropped { DROPPED } else { 0 });
    *bytes = put.0;
}

fn decode(bytes: &[u8]) -> Option<PlaceRow> {
    let mut take = Take(bytes);
    let digest = ContentDigest(take.array()?);
    let at = At { pack: take.u32()?, position: take.u32()? };
    let size = take.u64()?;
    let mtime = take.mtime()?;
    let mode = take.u32()?;
    Some(PlaceRow { digest, at, size, mtime, mode: mode & !DROPPED, dropped: mode & DROPPED != 0 })
}
