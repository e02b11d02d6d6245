//! The catalog: what people do with versions.
//!
//! * [`lakefmt`]: the format object at the root of the prefix: version, lake id, ref mode.
//! * [`refs`]: datasets, tags, branches; one API over both ref modes.
//! * [`open`]: [`Catalog`] itself: from a revision to a [`Snapshot`] in few round trips.
//! * [`history`]: datasets, log, show, ls, diff, tag, branch, rm. [`lineage`]: what a commit came from.
//! * [`grants`]: who may do what with a dataset.
//! * [`get`]: contents copied out. * [`compare`]: what differs between two commits.
//! * [`push`]: a directory becomes a commit. * [`import`]: objects that already lie in a bucket do.
//! * [`gc`]: what nothing refers to leaves the lake.
//! * [`scan`]: walking over what a snapshot holds. * [`spool`]: sorting on disk, for what memory should not hold.

pub mod compare;
pub mod gc;
pub mod get;
pub mod grants;
pub mod history;
pub mod import;
pub mod lakefmt;
pub mod lineage;
pub mod open;
pub mod push;
mod puts;
pub mod refs;
pub mod scan;
pub mod spool;
#[cfg(test)]
pub(crate) mod testing;

pub use crate::store::meta::Snapshot;
pub use open::{Catalog, CatalogError};
