//! A scheduler without machines: plays a scenario, cycle by cycle, and says who had what and when.
//!
//! * [`scenario`]: what is played, read from YAML. `docs/formats/scenario.md` has the fields.
//! * [`engine`]: the clock, the events and the cycles.
//! * [`report`]: what came of it, and how good that is compared with what was possible.
//! * [`plot`]: the allocation over time as text.
//!
//! Time is simulated, pausing takes none, and a paused job goes on where it stopped. The same
//! scenario gives the same report.

pub mod engine;
pub mod plot;
pub mod report;
pub mod scenario;

#[cfg(test)]
mod tests;

pub use engine::{Policy, SimulateError, simulate};
pub use report::Report;
pub use scenario::Scenario;
