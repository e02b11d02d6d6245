//! Fair shares of GPUs: a snapshot in, a plan out.
//!
//! * [`snapshot`]: what is: projects, nodes, jobs. [`plan()`] refuses one that contradicts itself.
//! * [`plan`](mod@plan): what shall be done: starts, pauses, and [`why`] each other job waits.
//! * `share`: how much each project deserves. `ledger`: which running jobs stand on which line.
//! * `cluster`: the GPUs, who takes which. `demands`: where a request may go at all.
//! * `cycle`: the steps of one decision. `victims`: whom to pause. `spare`: which pauses to take back.
//! * `explain`: why the others wait.
//! * `after`: the snapshot once a plan is carried out.
//!
//! Invariants: pure (no I/O, no clock, no randomness, no floating point), so a snapshot gives one
//! plan, in whatever order its parts are listed; no GPU is over-committed; the system settles.
//! `docs/design/fair-share.md` has the model, the promises and the reasons.
//!
//! Inside, projects, nodes and jobs are numbers: positions in lists that are sorted by id once and
//! never shrink, so indexing with them can't fail; what comes from outside (where jobs run) is looked
//! up and refused by `snapshot::SnapshotError` first.

#![allow(clippy::indexing_slicing, reason = "numbers are positions in lists that are made once and never shrink")]

mod after;
mod cluster;
mod cycle;
mod demands;
mod explain;
mod ledger;
pub mod plan;
mod share;
pub mod snapshot;
mod spare;
mod victims;
pub mod why;

#[cfg(test)]
mod tests;

pub use after::after;
pub use cycle::plan;
pub use plan::{Cause, Grounds, Plan, Preemption, ProjectShare, Start, Waiting};
pub use share::{Claim, fair_shares};
pub use snapshot::{
    Job, JobId, JobState, Kind, MilliGpus, Node, NodeId, NodeState, Placement, Project, ProjectId, Seat, Snapshot,
    SnapshotError, Template,
};
pub use why::Why;
