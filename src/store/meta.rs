//! Tree and placement blocks: from memory, from the node's disk, or from the lake.
//!
//! Contract: `MetaStore` implements [`crate::format::tree::nav::Blocks`] from a byte-bounded LRU and a
//! directory of block files; `fetch(Need)` brings a missing block from the lake, checks its id and keeps
//! it on disk. `drive(|| nav::...)` repeats a navigation until it needs nothing more.
