//! Commits of models, mounted for real: the kernel is the caller.
//!
//! Needs root and /dev/fuse; elsewhere each test says so and passes.

mod basic;
mod faults;
mod kernel;
mod latch;
mod reads;
mod rig;
