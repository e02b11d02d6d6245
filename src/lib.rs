//! Larder mounts versions of datasets next to the GPUs.
//!
//! The lake (an S3-compatible object store) holds the only truth: commits, trees, placements
//! and packs. A tier (a directory on shared NFS, or a local one) caches packs, write-once. A
//! daemon shows a commit as a plain read-only directory and fetches what is read.
//!
//! ```text
//! cli -> node -> fs -> store -> format
//! cli -> scheduler -> quota
//! ```
//!
//! Arrows point down only: `format` and `quota` are pure (no I/O, no clock, no async, no logging); `store`
//! owns the lake, the tier, fetching and the catalog; `fs` owns the mounted view; `node` owns the
//! mount table and the control API; `quota` decides who computes, `scheduler` acts on it; `cli` owns the command line. `docs/architecture.md` has the
//! whole picture, `tests/tidy.rs` keeps it true.

// What serves must not panic: tests may.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic))]

pub mod cli;
pub mod config;
mod crash;
pub mod format;
pub mod fs;
pub mod node;
pub mod quota;
pub mod scheduler;
pub mod store;

#[cfg(test)]
pub(crate) mod testkit;
