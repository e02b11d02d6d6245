//! Test doubles that several modules share. Compiled for tests only.
//!
//! * [`faulty_lake`]: a lake in memory, and a lake that fails on demand and counts.

pub(crate) mod faulty_lake;
