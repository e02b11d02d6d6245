//! The formats: what lies in the lake and in the tier, as pure functions between bytes and types.
//!
//! * [`ids`]: the newtypes of every digest and name.
//! * [`codec`]: the little-endian reader and writer that every decoder uses, and its errors.
//! * `json`: the same for the few formats that are JSON.
//! * [`digest`]: content digests, with the chaining values that let a block be checked alone.
//! * [`tree`]: entries, segments, the index over them, building and navigating.
//! * [`placement`]: where a tree's contents lie.
//! * [`pack`]: a pack's index, layout, recipe.
//! * [`erofs`]: images for the kernel engine.
//! * [`commit`]: versions and what led to them.
//! * [`refs`]: names of datasets, tags, branches; revisions; what a ref object holds.
//! * [`grants`]: who may do what with a dataset.
//! * [`paths`]: keys in the lake and file names in the tier.
//!
//! Invariants: no I/O, no clock, no async, no logging. Every decoder takes untrusted bytes: it
//! never panics, never allocates more than its input justifies, and says where the input is wrong.
//! `docs/formats/` describes the bytes; golden files under `tests/golden/` pin them.

pub mod codec;
pub mod commit;
pub mod digest;
pub mod erofs;
pub mod grants;
pub mod ids;
pub(crate) mod json;
pub mod pack;
pub mod paths;
pub mod placement;
pub mod refs;
pub mod tree;
