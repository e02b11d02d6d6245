//! The companion scheduler: acts on what [`crate::quota`] decides.
//!
//! * [`service`]: the thread that owns the state. [`core`]: the state, and what may be asked of it.
//!   [`registry`]: projects and nodes. `check`: what a request must look like.
//! * `decide`: records to snapshot, plan to records. `progress`: what happens to jobs that have GPUs.
//!   `mounts`: commits that jobs share. `host_paths`: paths of the machine that they name.
//! * [`executor`]: a job's process as a command: plain, or in a container. [`task`]: a command that runs
//!   at most once, whatever happens to the scheduler. [`supervise`]: who runs it.
//!   `family`: its processes. `image`: which image it has. `logfile`: what it prints has a bound.
//!   `watch`: the kernel tells that one ended.
//! * [`snapshot`]: what a job has made so far, as a commit, and back. `copy`: trees that others write to.
//! * [`job`], [`cluster`]: the records. [`store`]: the directory that has them. `disk`: files that
//!   survive a crash.
//! * [`api`], [`server`], [`view`], `metrics`: how others see it. [`lake_side`]: what it needs of data.
//! * [`kubernetes`]: the same decision for a cluster, where pods are the jobs and the API server has all records.
//! * [`simulate`]: plays a scenario against the decision, with a clock of its own.
//!
//! Invariants: nothing here decides who may run; that is in `quota`, pure and tested there. A record is on
//! disk before anything follows from it, so after a kill at any moment no job is lost and none is started
//! twice (`docs/formats/scheduler.md` goes through the steps).

pub mod api;
mod check;
pub mod cluster;
mod copy;
pub mod core;
mod decide;
mod disk;
pub mod error;
pub mod executor;
pub mod family;
pub mod gpus;
mod host_paths;
mod image;
pub mod job;
pub mod kubernetes;
pub mod lake_side;
mod logfile;
mod metrics;
mod mounts;
mod progress;
pub mod registry;
pub mod server;
pub mod service;
pub mod simulate;
pub mod snapshot;
pub mod store;
pub mod supervise;
pub mod task;
pub mod view;
mod watch;

pub use disk::DiskError;
