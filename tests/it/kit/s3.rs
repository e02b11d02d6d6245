//! An embedded lake as a server on loopback.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use larder::store::lake::embedded::{Server, Store, StoreOptions};
use larder::store::lake::s3::{S3Config, S3Lake, StaticKeys};

use super::runtime;

/// The bucket that is there.
pub const BUCKET: &str = "test-bucket";
pub const ACCESS_KEY: &str = "test-access-key";
pub const SECRET_KEY: &str = "test-secret-key";

/// A running S3 server over a temporary directory; both go when it is dropped.
pub struct TestS3 {
    pub store: Store,
    server: Server,
    dir: tempfile::TempDir,
}

impl TestS3 {
    /// Starts a server that asks for its keys, without flushing to the disk.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(dir.path(), StoreOptions { fsync: false }).expect("a store");
        store.ensure_bucket(BUCKET).expect("a bucket");
        let server = runtime().block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
            Server::start(store.clone(), listener, Some(keys())).expect("a server")
        });
        Self { store, server, dir }
    }

    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// Gives `http://127.0.0.1:port`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// The directory that the server keeps its buckets in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The object files below the bucket, for tests that damage them: the body comes first in each.
    pub fn object_files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut dirs = vec![self.dir.path().join(BUCKET).join("objects")];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(&dir).expect("a directory") {
                let path = entry.expect("an entry").path();
                if path.is_dir() { dirs.push(path) } else { found.push(path) }
            }
        }
        found.sort();
        found
    }

    /// The environment that points the binary at a prefix of the bucket.
    pub fn env(&self, prefix: &str) -> Vec<(String, String)> {
        env_at(&self.endpoint(), prefix)
    }

    /// A client of a prefix of the bucket.
    pub fn lake(&self, prefix: &str) -> S3Lake {
        lake_at(&self.endpoint(), prefix)
    }
}

/// The environment for a server behind another endpoint, such as a proxy's.
pub fn env_at(endpoint: &str, prefix: &str) -> Vec<(String, String)> {
    [
        ("LARDER_LAKE", format!("s3://{BUCKET}/{prefix}")),
        ("LARDER_ENDPOINT", endpoint.to_owned()),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

/// A client of a server behind another endpoint.
pub fn lake_at(endpoint: &str, prefix: &str) -> S3Lake {
    runtime().block_on(S3Lake::connect(config_at(endpoint, prefix))).expect("a client")
}

/// The client's configuration, for tests that change it.
pub fn config_at(endpoint: &str, prefix: &str) -> S3Config {
    S3Config { endpoint: Some(endpoint.to_owned()), keys: Some(keys()), ..S3Config::new(BUCKET, prefix) }
}

fn keys() -> StaticKeys {
    StaticKeys { access_key: ACCESS_KEY.to_owned(), secret_key: SECRET_KEY.to_owned() }
}
