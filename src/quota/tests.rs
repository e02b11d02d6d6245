//! Tests of the decision: worked cases, the golden trace, and properties on random streams.

mod cases;
mod golden;
mod kit;
mod oracle;
mod properties;
