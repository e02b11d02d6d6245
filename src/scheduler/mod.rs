//! The companion scheduler: acts on what [`crate::quota`] decides.
//!
//! * [`simulate`]: plays a scenario against the decision, with a clock of its own.
//!
//! Invariants: nothing here decides who may run; that is in `quota`, pure and tested there.

pub mod simulate;
