//! The embedded lake: an S3 server over a local directory.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::s3::StaticKeys;

/// The bucket of the laptop's lake.
pub const DEFAULT_BUCKET: &str = "larder";

/// Says what went wrong with the directory of an embedded lake.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {doing} failed")]
pub struct StoreError {
    pub path: PathBuf,
    pub doing: &'static str,
    #[source]
    pub source: std::io::Error,
}

/// A directory that holds buckets. Cheap to clone; several processes may use one directory.
#[derive(Debug, Clone)]
pub struct Store {}

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

impl Store {
    /// Opens (and makes, where missing) the directory.
    pub fn open(_dir: &Path, _options: StoreOptions) -> Result<Self, StoreError> {
        todo!()
    }

    /// Makes a bucket where there is none of that name.
    pub fn ensure_bucket(&self, _name: &str) -> Result<(), StoreError> {
        todo!()
    }
}

/// A running server; it stops when dropped.
#[derive(Debug)]
pub struct Server {
    addr: SocketAddr,
}

impl Server {
    /// Serves `store` on `listener`; with `keys` only to who has them.
    pub fn start(
        _store: Store,
        _listener: tokio::net::TcpListener,
        _keys: Option<StaticKeys>,
    ) -> std::io::Result<Self> {
        todo!()
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}
