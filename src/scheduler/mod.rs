//! The companion scheduler: acts on what [`crate::quota`] decides.
//!
//! * [`service`]: the thread that owns the state. [`core`]: the state, and what may be asked of it.
//!   [`registry`]: projects and nodes. `check`: what a request must look like.
//! * `decide`: records to snapshot, plan to records. `progress`: what happens to jobs that have GPUs.
//!   `mounts`: commits that jobs share.
//! * [`executor`]: a job's process as a command: plain, or in a container. [`task`]: a command that runs
//!   at most once, whatever happens to the scheduler. [`supervise`]: who runs it.
//!   `family`: its processes.
//! * [`job`], [`cluster`]: the records. [`store`]: the directory that has them. `disk`: files that
//!   survive a crash.
//! * [`api`], [`server`], [`view`], `metrics`: how others see it. [`lake_side`]: what it needs of data.
//! * [`simulate`]: plays a scenario against the decision, with a clock of its own.
//!
//! Invariants: nothing here decides who may run; that is in `quota`, pure and tested there. A record is on
//! disk before anything follows from it, so after a kill at any moment no job is lost and none is started
//! twice (`docs/formats/scheduler.md` goes through the steps).

pub mod api;
mod check;
pub mod cluster;
pub mod core;
mod decide;
mod disk;
pub mod error;
pub mod executor;
mod family;
pub mod job;
pub mod lake_side;
mod metrics;
mod mounts;
mod progress;
pub mod registry;
pub mod server;
pub mod service;
pub mod simulate;
pub mod store;
pub mod supervise;
pub mod task;
pub mod view;

pub use disk::DiskError;
