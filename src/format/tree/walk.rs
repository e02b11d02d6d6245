//! All entries below a directory in tree order, each with its path.
//!
//! For listings, copies and comparisons. A [`Walk`] is resumed as navigation is: on a need it stays
//! where it was; fetch the block and call again. It holds one batch of entries a level, and of each
//! directory that is still to come its name and place.

use std::collections::VecDeque;

use super::entry::DEPTH_MAX;
use super::nav::{Blocks, DirAt, EntryAt, NavError, list};
use super::segment::TreeRoot;

/// Entries that are taken from a directory at a time.
const BATCH: usize = 1024;

/// An entry and its path from the root, names separated by `/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Walked {
    pub path: Vec<u8>,
    pub at: EntryAt,
}

/// Walks a subtree in tree order: the entries of a directory, then those of its directories.
#[derive(Debug)]
pub struct Walk {
    stack: Vec<Frame>,
}

#[derive(Debug)]
struct Frame {
    dir: DirAt,
    /// Path of the directory; with a `/` at its end unless it is the root.
    path: Vec<u8>,
    /// Position of the next batch.
    from: u64,
    batch: VecDeque<EntryAt>,
    waiting: VecDeque<(DirAt, Box<[u8]>)>,
}

impl Walk {
    /// Starts at a directory whose path from the root is `path` (empty: the root).
    pub fn new(dir: DirAt, path: &[u8]) -> Self {
        let mut path = path.to_vec();
        if !path.is_empty() {
            path.push(b'/');
        }
        Self { stack: vec![Frame::new(dir, path)] }
    }

    /// Gives the next entry, or None at the end. On a need, fetch and call again.
    pub fn next(&mut self, root: &TreeRoot, blocks: &dyn Blocks) -> Result<Option<Walked>, NavError> {
        while let Some(frame) = self.stack.last_mut() {
            if let Some(at) = frame.batch.pop_front() {
                let path = [&*frame.path, &*at.entry.name].concat();
                if let Some(dir) = at.dir.filter(|dir| dir.children > 0) {
                    frame.waiting.push_back((dir, at.entry.name.clone()));
                }
                return Ok(Some(Walked { path, at }));
            }
            if frame.from < frame.dir.children {
                frame.batch = list(root, blocks, &frame.dir, frame.from, BATCH)?.into();
                frame.from += frame.batch.len() as u64;
                continue;
            }
            match frame.waiting.pop_front() {
                None => {
                    self.stack.pop();
                }
                Some((dir, name)) => {
                    let path = [&*frame.path, &*name, b"/"].concat();
                    self.enter(dir, path)?;
                }
            }
        }
        Ok(None)
    }

    fn enter(&mut self, dir: DirAt, path: Vec<u8>) -> Result<(), NavError> {
        if self.stack.len() > DEPTH_MAX {
            return Err(NavError::Damaged { rank: dir.first, why: "directories are nested deeper than 4096" });
        }
        self.stack.push(Frame::new(dir, path));
        Ok(())
    }
}

impl Frame {
    fn new(dir: DirAt, path: Vec<u8>) -> Self {
        Self { dir, path, from: 0, batch: VecDeque::new(), waiting: VecDeque::new() }
    }
}
