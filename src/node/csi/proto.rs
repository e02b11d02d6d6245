//! The protocols that the kubelet and the provisioner speak, as `build.rs` has made them of `proto/`.

#![allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used, clippy::indexing_slicing, rustdoc::all)]

/// The Container Storage Interface 1.13 (`proto/csi.proto`).
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// How a driver makes itself known to the kubelet (`proto/pluginregistration.proto`).
pub mod registration {
    tonic::include_proto!("pluginregistration");
}
