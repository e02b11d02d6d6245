//! Trees: the entries of one version of a dataset, in segments, under an index that carries counts.
//!
//! *Order.* Directory by directory, directories in preorder, the entries of one directory together,
//! names in byte order:
//!
//! ```text
//! /            ranks 0..n        a/  b  c/            <- the root's block
//! a/           ranks n..n+m      x/  y                <- a's block, then those of a's directories
//! a/x/         ...
//! c/           ...
//! ```
//!
//! An entry's rank is its position in that order; the inode number of the root is 1 and that of
//! the entry of rank `r` is `r + 2` (a later entry of a hard-link group has its first entry's).
//! A directory's entry says how many entries it has itself (`children`) and how many its whole
//! subtree has (`descendants`); nothing says where they start: that is computed from the counts in
//! the index, so a change touches only the segments and index blocks on its path.
//!
//! * [`entry`]: entries. * [`segment`]: segments (leaves) and index blocks, their codec and limits.
//! * [`cut`]: where blocks end. * [`build`]: from entries in tree order to blocks. * [`nav`]: lookups by path and by rank.
//! * [`walk`]: all entries below a directory, with their paths. * [`diff`]: what differs between two trees, skipping what is equal.

pub mod build;
pub mod cut;
pub mod diff;
pub mod entry;
pub mod nav;
pub mod segment;
mod uses;
pub mod walk;

pub use entry::{Entry, EntryKind, Mtime, Pin};
pub use segment::{Block, ChildRef, Counts, IndexBlock, Segment, TreeRoot};

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
