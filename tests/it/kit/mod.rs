//! What integration tests share.
//!
//! * [`s3`]: an embedded lake as a server on loopback, with the environment for the binary.
//! * [`csi`]: the CSI driver, and what the kubelet says to it.
//! * [`cluster`]: several nodes with one tier, before a lake that counts.
//! * [`world`]: a home of its own for one test, with the real binary in it.
//! * [`control_plane`]: a real API server of Kubernetes with simulated nodes.
//! * [`gpus`]: a scheduler with simulated GPUs.
//! * [`proxy`]: a proxy before any S3 server that delays, breaks and counts.

use std::sync::OnceLock;

pub mod cluster;
pub mod control_plane;
pub mod csi;
pub mod gpus;
pub mod proxy;
pub mod s3;
pub mod world;

pub use world::{World, copy_program, mount_by_kernel, wait_for};

/// Gives the runtime on which the kit's servers run, whatever runtime a test has itself.
pub fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().build().expect("a runtime starts")
    })
}
