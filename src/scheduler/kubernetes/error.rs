//! Why the scheduler on Kubernetes ends.

/// An error that ends the process: the next one takes up.
#[derive(Debug, thiserror::Error)]
pub enum KubeError {
    #[error("no way to a Kubernetes cluster is configured: name one with --kubeconfig or --context")]
    Config(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the client of the API server can't be made")]
    Client(#[source] kube::Error),
    #[error("cannot listen on {address}")]
    Listen {
        address: std::net::SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "the lease {name} could not be renewed in time: another scheduler leads, or the API server does not answer"
    )]
    LeaseLost { name: String },
    #[error("the watch of {kind} has ended")]
    WatchEnded { kind: &'static str },
}
