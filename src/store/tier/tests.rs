//! The tier under test: the same battery over the simulated and the real file system, kills at every
//! step, two clients in every order, random histories against a simple model.

mod calls;
mod concurrency;
mod conformance;
mod crashes;
mod golden;
mod kit;
mod model;
mod siblings;
mod sim;
