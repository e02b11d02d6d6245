//! What differs between two trees, skipping what is equal.

use super::entry::Entry;
use super::nav::{Blocks, NavError};
use super::segment::TreeRoot;

/// One difference, by path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// From the root, names separated by `/`.
    pub path: Vec<u8>,
    /// None: the path is new.
    pub before: Option<Entry>,
    /// None: the path is gone.
    pub after: Option<Entry>,
}

/// Walks both trees side by side, directory by directory; a directory whose entries are equal
/// including counts may still differ below, equal blocks are skipped by id where they align.
/// Resumable as navigation is: keep the `Differ`, feed missing blocks, call again.
#[derive(Debug)]
pub struct Differ {
    _private: (),
}

impl Differ {
    pub fn new(_before: TreeRoot, _after: TreeRoot) -> Self {
        todo!()
    }

    /// Gives the next change, or None at the end. On `Need`, fetch and call again.
    pub fn next(&mut self, _blocks: &dyn Blocks) -> Result<Option<Change>, NavError> {
        todo!()
    }
}
