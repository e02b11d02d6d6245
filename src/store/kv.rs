//! The node's own small database: what this node has verified, and small tables of other parts.

use std::path::Path;

/// The database. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Kv(());

/// Why the database did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// Another process (the daemon) has the file.
    #[error("{path}: another process has this database open")]
    Busy { path: std::path::PathBuf },
    #[error("{path}: the node's database failed; stop larder and remove the file, it is rebuilt")]
    Failed {
        path: std::path::PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Kv {
    /// Opens `<state>/node.redb`, creating it.
    pub fn open(_state_dir: &Path) -> Result<Self, KvError> {
        todo!()
    }
    /// Opens `<state>/node.redb`, or a database in memory where another process has it.
    pub fn open_or_memory(_state_dir: &Path) -> Result<Self, KvError> {
        todo!()
    }
    /// Makes an empty database in memory.
    pub fn in_memory() -> Self {
        todo!()
    }
    /// Gives a value of a generic table.
    pub fn get(&self, _table: &str, _key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        todo!()
    }
    /// Sets values of a generic table in one transaction; None removes. Durable when it returns.
    pub fn put(&self, _table: &str, _changes: &[(Vec<u8>, Option<Vec<u8>>)]) -> Result<(), KvError> {
        todo!()
    }
    /// Lists a generic table in key order.
    pub fn list(&self, _table: &str) -> Result<Vec<(Vec<u8>, Vec<u8>)>, KvError> {
        todo!()
    }
}
