//! The embedded lake: an S3 server over a local directory, for the laptop, the demo and tests.
//!
//! * [`names`]: keys as file names, in an order that a directory walk keeps.
//! * [`object`]: one object as one file, body and meta.
//! * [`disk`]: the directory: atomic and conditional writes, versions, locks.
//! * [`walk`], [`list`]: pages of keys, without reading the whole bucket for each.
//! * [`uploads`]: multipart uploads.
//! * [`service`], [`body`]: the S3 protocol over them (the wire half is the crate `s3s`).
//! * [`in_process`]: the SDK's client over that service, without a port.
//!
//! Several processes may use one directory at the same time, each through its own [`Store`]: all
//! that they share is on the disk, and conditions of writes hold between them. It is a local
//! directory: flock(2), rename(2) and modification times have to mean what they mean there.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder as ConnBuilder;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};

use super::s3::StaticKeys;

pub mod body;
pub mod disk;
pub mod in_process;
pub mod list;
pub mod names;
pub mod object;
pub mod service;
pub mod uploads;
pub mod walk;

#[cfg(test)]
mod tests;

/// The bucket of the laptop's lake.
pub const DEFAULT_BUCKET: &str = "larder";

/// Says whether S3 takes this as a bucket's name.
pub fn is_bucket_name(name: &str) -> bool {
    s3s::path::check_bucket_name(name)
}

/// Says what went wrong with the directory of an embedded lake.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {doing} failed")]
pub struct StoreError {
    pub path: PathBuf,
    pub doing: &'static str,
    #[source]
    pub source: std::io::Error,
}

/// How a [`Store`] behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// Flush each object to the disk before it is acknowledged.
    pub fsync: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { fsync: true }
    }
}

/// A directory that holds buckets. Cheap to clone; several processes may use one directory.
#[derive(Debug, Clone)]
pub struct Store {
    disk: Arc<disk::Disk>,
}

impl Store {
    /// Opens (and makes, where missing) the directory.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        Ok(Self { disk: Arc::new(disk::Disk::open(dir, options)?) })
    }

    /// Makes a bucket where there is none of that name.
    pub fn ensure_bucket(&self, name: &str) -> Result<(), StoreError> {
        self.disk.ensure_bucket(name).map(drop)
    }

    /// Keeps the older versions of a bucket's objects from now on, or no longer.
    pub fn set_versioning(&self, bucket: &str, on: bool) -> Result<(), StoreError> {
        self.disk.ensure_bucket(bucket)?.set_versioning(on)
    }

    /// Makes the protocol's service; with `keys`, only for who has them.
    pub fn service(&self, keys: Option<StaticKeys>) -> S3Service {
        let mut builder = S3ServiceBuilder::new(service::Service(self.disk.clone()));
        if let Some(keys) = keys {
            builder.set_auth(SimpleAuth::from_single(keys.access_key, keys.secret_key));
        }
        builder.build()
    }
}

/// A running server; it stops when dropped.
#[derive(Debug)]
pub struct Server {
    addr: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Serves `store` on `listener`; with `keys` only to who has them, else to unsigned requests.
    pub fn start(store: Store, listener: tokio::net::TcpListener, keys: Option<StaticKeys>) -> std::io::Result<Self> {
        let addr = listener.local_addr()?;
        let task = tokio::spawn(accept(listener, store.service(keys)));
        Ok(Self { addr, task })
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Takes connections until the task is aborted; the connections end with it.
async fn accept(listener: tokio::net::TcpListener, service: S3Service) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            }
        };
        // Small answers must not wait for the client's delayed acknowledgement.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        let service = service.clone();
        connections.spawn(async move {
            let server = ConnBuilder::new(TokioExecutor::new());
            if let Err(error) = server.serve_connection(TokioIo::new(socket), service).await {
                tracing::debug!(error, "a connection ended early");
            }
        });
    }
}
