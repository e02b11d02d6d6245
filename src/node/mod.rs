//! The node: what one machine does with commits, held together by one daemon per state directory.
//!
//! * [`place`]: the state directory: node id, socket, lock, mount table, log.
//! * [`siblings`]: proof that another process of this node has ended.
//! * [`open`]: from the configuration to a lake, a catalog, tiers, fetchers.
//! * [`table`]: the mount table: mounts, their attachments and owners; kept in one file.
//! * [`daemon`]: the daemon's state and its life. [`mounting`], `leftover`, [`fills`], [`upkeep`], `scrub`: what
//!   it does. `binding`: what it does for pods. [`csi`]: what the kubelet asks. `choosing`: which of several tiers.
//!   `ending`: its end. `directory`: where a mount is to be. `keeping`: the daemon and its keeper.
//! * [`api`]: the requests and answers, as JSON. [`server`]: the same over a unix socket. [`client`]: what
//!   the command line speaks with. [`spawn`]: the daemon on demand.
//! * `peers`: nodes of one tier ask one another for bytes that are on their way.
//! * [`policy`]: who may do what. [`remote`]: the API over TCP, with token and TLS.
//! * [`metrics`]: the names of all metrics, and their text.
//!
//! ```text
//! <state>/node-id         UUID, from the first start on
//! <state>/daemon.lock     locked while a daemon lives; holds its pid
//! <state>/daemon.log      what a daemon says that was started on demand
//! <state>/mounts.json     the mount table, replaced by rename
//! <state>/meta/           tree and placement blocks
//! <state>/images/         what the kernel engine mounts
//! <state>/instances/<id>  locked by each process that uses a tier
//! <state>/private/<id>/   the state of one `mount --foreground`
//! ```
//!
//! Invariants: one daemon per state directory; the mount table is on disk before a mount is reported;
//! one mount that cannot be made takes no other with it.

pub mod api;
mod binding;
mod choosing;
pub mod client;
pub mod csi;
pub mod daemon;
mod dial;
mod directory;
mod ending;
pub mod engine;
pub mod error;
pub mod fills;
mod keeping;
mod leftover;
pub mod metrics;
pub mod mounting;
pub mod open;
mod peers;
pub mod place;
pub mod policy;
pub mod remote;
mod scrub;
pub mod server;
pub mod siblings;
pub mod spawn;
pub mod table;
pub mod upkeep;
