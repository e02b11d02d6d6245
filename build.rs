//! Compiles the protocols that the kubelet speaks with a CSI driver. Needs no protoc.

use std::error::Error;

const PROTOS: [&str; 2] = ["proto/csi.proto", "proto/pluginregistration.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for proto in PROTOS {
        println!("cargo:rerun-if-changed={proto}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    let compiled = protox::compile(PROTOS, ["proto"])?;
    // Comments of a protocol are not rustdoc.
    // What a service does not offer is answered UNIMPLEMENTED.
    let builder = tonic_prost_build::configure().generate_default_stubs(true);
    builder.disable_comments(["."]).emit_rerun_if_changed(false).compile_fds(compiled)?;
    Ok(())
}
