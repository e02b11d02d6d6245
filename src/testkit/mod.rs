//! Test doubles that several modules share. Compiled for tests only.
//!
//! * [`faulty_lake`]: a lake in memory, and a lake that fails on demand and counts.
//! * [`golden`]: small files as version 1 wrote them.
//! * [`model`]: a model of a tree, and a commit of it in a lake.
//! * [`sim_tier`]: a file system with NFS clients, crashes and schedules, for the tier.

pub(crate) mod faulty_lake;
pub(crate) mod golden;
pub(crate) mod model;
pub(crate) mod sim_tier;
