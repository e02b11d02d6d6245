//! The fetcher against a lake in memory and real or failing tiers.
//!
//! * [`arriving`]: reads of what a fill brings.
//! * [`reads`]: the lake alone: faults, time, single flight, bounds. * [`tiers`]: filling, damage,
//!   eviction, full and failing tiers. * [`nodes`]: several nodes on one tier. * [`pins`]: imported
//!   packs. * [`model`]: random everything.

mod arriving;
mod kit;
mod model;
mod nodes;
mod pins;
mod reads;
mod tiers;
