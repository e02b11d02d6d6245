//! The mounted view of a commit.
//!
//! * [`view`]: what a mount shows: inodes, names, attributes, contents. No FUSE in it.
//! * [`handles`]: what is open, and how; the records that outlive a daemon.
//! * [`errno`]: the one table from errors to errno.
//! * [`fuse`]: the adapter between the kernel's requests and the view. * [`session`]: the workers.
//! * [`keeper`]: the process that makes the mounts and holds their descriptors.
//! * [`kernel`]: the other engine: the commit as an EROFS image that the kernel reads by itself.
//! * [`mount`]: all of it together, for the daemon.
//! * [`sys`]: the system calls without a safe wrapper.
//!
//! One request: a named worker thread reads it, `fuse` asks the view for an answer from memory and
//! local disks; where something has to be fetched, the reply moves into a task of the runtime and
//! the worker takes the next request. So a slow lake never uses up the workers.

mod errno;
mod fuse;
mod handles;
pub mod keeper;
pub mod kernel;
pub mod mount;
pub mod session;
pub(crate) mod sys;
#[cfg(test)]
mod tests;
pub mod view;

pub(crate) use sys::exit_now;
