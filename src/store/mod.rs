//! Everything that lies somewhere: the lake, the tier, the catalog, and the fetching between them.
//!
//! * [`lake`]: the object store seam, its S3 implementation and the embedded server.
//! * [`tier`]: the write-once cache directory: a deterministic state machine over `TierIo`, `Clock`.
//! * [`meta`]: tree and placement blocks, from memory, the node's disk, or the lake.
//! * [`fetch`]: single flight, lanes, windows; verified bytes of contents.
//! * [`catalog`]: push, import, refs, log, diff, get, gc.
//! * [`usage`]: what cached commits cost; pure.
//! * [`histogram`]: how long things took, for metrics.
//! * [`kv`]: the node's own small database.
//! * `locking`: the lock of what is tried in all schedules.

pub mod catalog;
pub mod fetch;
pub mod histogram;
pub mod kv;
pub mod lake;
pub(crate) mod locking;
pub mod meta;
pub mod tier;
pub mod usage;
