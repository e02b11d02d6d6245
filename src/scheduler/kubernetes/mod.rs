//! The scheduler on Kubernetes: pods that name it get nodes by the quotas of their projects.
//!
//! * [`run`]: the process: lease, watches, decisions, requests. [`serve`]: how it does, over HTTP.
//! * [`feed`]: watches as news. [`world`]: the cluster as they tell it, with what was asked for and not yet seen.
//!   `pod`, `node`, `constraints`, `quantity`, [`resource`]: what of each object counts. `names`: labels and annotations.
//! * `units`: pods that start and stop as one. `seats`: who holds which GPUs. [`snapshot`]: all that, as [`crate::quota`]
//!   takes it. [`decide`]: the plan, and what is asked for because of it.
//! * `connect`: the way to the cluster. `acts`: bindings and evictions. `tell`: conditions, events, statuses. `requests`: their number and time. [`lease`]: who leads.
//! * [`jobs`]: `larder job` on a cluster. `manifest`: what was asked for as a Job of Kubernetes.
//!
//! Invariants: there is no state but the API server's, so whoever starts next knows all. A pod's node and GPUs are
//! written in one request that works once. What was asked for holds its GPUs here until it is known that it was
//! in vain. Nothing here decides who may run. `docs/formats/kube-scheduler.md` goes through the steps.

mod acts;
mod connect;
mod constraints;
pub mod decide;
pub mod error;
pub mod feed;
pub mod jobs;
pub mod lease;
mod manifest;
pub mod names;
mod node;
mod pod;
mod quantity;
mod requests;
pub mod resource;
pub mod run;
mod seats;
pub mod serve;
pub mod snapshot;
mod tell;
mod units;
pub mod world;

#[cfg(test)]
mod tests;

pub use connect::connect;
pub use error::KubeError;
