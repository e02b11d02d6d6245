//! Walking over what a snapshot holds: in tree order, or directory by directory with paths.

use crate::format::placement::Location;
use crate::format::tree::nav::{self, DirAt, EntryAt, NavError};
use crate::format::tree::{Block, Entry};
use crate::store::meta::{MetaError, MetaStore, Snapshot};

/// How many entries of a directory are listed at a time.
const LIST_LIMIT: usize = 1024;

/// An entry in tree order.
#[derive(Debug, Clone)]
pub struct Scanned {
    pub rank: u64,
    pub entry: Entry,
    pub location: Location,
}

/// Gives all entries of a snapshot in tree order, a segment at a time.
#[derive(Debug)]
pub struct Scan<'a> {
    meta: &'a MetaStore,
    snap: &'a Snapshot,
    next: u64,
}

impl<'a> Scan<'a> {
    pub fn new(meta: &'a MetaStore, snap: &'a Snapshot) -> Self {
        Self { meta, snap, next: 0 }
    }

    /// Gives the entries of the next segment; none at the end.
    pub async fn next(&mut self) -> Result<Vec<Scanned>, MetaError> {
        let (snap, from) = (self.snap, self.next);
        if from >= snap.root.counts.entries {
            return Ok(Vec::new());
        }
        let scanned = self.meta.drive(|blocks| {
            let (first, block) = nav::segment_at(&snap.root, blocks, from)?;
            let Block::Segment(segment) = block.as_ref() else {
                return Err(NavError::NotFound);
            };
            let ranks = first..;
            ranks
                .zip(&segment.entries)
                .filter(|(rank, _)| *rank >= from)
                .map(|(rank, entry)| {
                    let location = nav::location(&snap.root, &snap.placement, blocks, rank)?;
                    Ok(Scanned { rank, entry: entry.clone(), location })
                })
                .collect::<Result<Vec<_>, NavError>>()
        });
        let scanned = scanned.await?;
        self.next = scanned.last().map_or(u64::MAX, |last| last.rank + 1);
        Ok(scanned)
    }
}

/// An entry with its path from the walk's root.
#[derive(Debug, Clone)]
pub struct Walked {
    /// Names separated by `/`.
    pub path: Vec<u8>,
    pub at: EntryAt,
}

/// A directory that is still to be listed, or partly listed.
#[derive(Debug)]
struct Pending {
    path: Vec<u8>,
    dir: DirAt,
    from: u64,
}

/// Walks a directory: its entries, then those of its directories in order.
/// Memory: one path for each directory that waits.
#[derive(Debug)]
pub struct Walk<'a> {
    meta: &'a MetaStore,
    snap: &'a Snapshot,
    recursive: bool,
    /// The directory that is being listed is the last.
    pending: Vec<Pending>,
    /// Directories met in the one that is being listed.
    below: Vec<Pending>,
}

impl<'a> Walk<'a> {
    /// Begins at `dir`; paths begin with `path` (empty, or without a `/` at its end).
    pub fn new(meta: &'a MetaStore, snap: &'a Snapshot, dir: DirAt, path: Vec<u8>, recursive: bool) -> Self {
        let first = Pending { path, dir, from: 0 };
        Self { meta, snap, recursive, pending: vec![first], below: Vec::new() }
    }

    /// Gives some more entries; none at the end.
    pub async fn next(&mut self) -> Result<Vec<Walked>, MetaError> {
        loop {
            let Some(current) = self.pending.last_mut() else {
                return Ok(Vec::new());
            };
            if current.from >= current.dir.children {
                self.pending.pop();
                // The first of them comes next.
                self.pending.extend(self.below.drain(..).rev());
                continue;
            }
            let (snap, dir, from) = (self.snap, current.dir, current.from);
            let listed = self.meta.drive(|blocks| nav::list(&snap.root, blocks, &dir, from, LIST_LIMIT)).await?;
            if listed.is_empty() {
                current.from = u64::MAX;
                continue;
            }
            current.from += listed.len() as u64;
            let walked: Vec<Walked> =
                listed.into_iter().map(|at| Walked { path: join(&current.path, &at.entry.name), at }).collect();
            if self.recursive {
                let dirs = walked.iter().filter_map(|walked| {
                    let dir = walked.at.dir?;
                    let path = walked.path.clone();
                    Some(Pending { path, dir, from: 0 })
                });
                self.below.extend(dirs);
            }
            return Ok(walked);
        }
    }
}

/// Joins a path and a name.
pub fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() {
        return name.to_vec();
    }
    [path, b"/", name].concat()
}
