//! The node's own small database: one file, `<state>/node.redb`.
//!
//! * What this node has verified: (tier, pack) -> the identity of the file it digested, and when.
//! * Generic tables of small byte values for the other parts of a node (mount table and the like).
//!
//! One process has the file, normally the daemon. A command that runs without a daemon while
//! another process has the file works with an empty database in memory: it then verifies again what
//! the daemon verified already, and nothing else is lost.
//!
//! Everything in it can be rebuilt or asked again; deleting the file loses no data (why redb and not
//! a larger store: `docs/design/node-database.md`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::backends::InMemoryBackend;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableError};

use crate::format::ids::{PackId, TierId};

/// The file's name in the state directory.
pub const KV_FILE: &str = "node.redb";

const VERIFIED: &str = "verified";

type Row = (Vec<u8>, Vec<u8>);

/// The database. Cheap to clone.
#[derive(Clone)]
pub struct Kv {
    db: Arc<Database>,
    path: Arc<PathBuf>,
    in_memory: bool,
}

impl std::fmt::Debug for Kv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kv").field("path", &self.path).field("in_memory", &self.in_memory).finish_non_exhaustive()
    }
}

/// Why the database did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// Another process (the daemon) has the file.
    #[error("{path}: another process has this database open; ask it (is a daemon running?) or wait for it to end")]
    Busy { path: PathBuf },
    #[error("{path}: the node's database failed; stop larder and remove the file, it is rebuilt")]
    Failed {
        path: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The file of a tier that this node digested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifiedFile {
    pub file_id: u64,
    pub size: u64,
    pub mtime_ns: i128,
    /// Unix time of this node's clock.
    pub when_ms: i64,
}

/// What a check looks at. Rows of checks that looked at less count as not there: 2 added the zeros between
/// contents, which mappings show.
const CHECK: u8 = 2;

impl VerifiedFile {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(41);
        bytes.push(CHECK);
        bytes.extend_from_slice(&self.file_id.to_le_bytes());
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend_from_slice(&self.mtime_ns.to_le_bytes());
        bytes.extend_from_slice(&self.when_ms.to_le_bytes());
        bytes
    }

    /// A row of another length or check was written by another version: it is as if it were not there.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (_, rest) = bytes.split_first().filter(|(check, _)| **check == CHECK)?;
        let (file_id, rest) = rest.split_first_chunk::<8>()?;
        let (size, rest) = rest.split_first_chunk::<8>()?;
        let (mtime_ns, rest) = rest.split_first_chunk::<16>()?;
        let when_ms = <[u8; 8]>::try_from(rest).ok()?;
        Some(Self {
            file_id: u64::from_le_bytes(*file_id),
            size: u64::from_le_bytes(*size),
            mtime_ns: i128::from_le_bytes(*mtime_ns),
            when_ms: i64::from_le_bytes(when_ms),
        })
    }
}

fn verified_key(tier: &TierId, pack: &PackId) -> Vec<u8> {
    let mut key = tier.0.as_bytes().to_vec();
    key.extend_from_slice(pack.as_bytes());
    key
}

/// Opens a redb file, or makes an empty one: under another name first, for redb never opens a file again
/// whose maker was killed before it was whole.
pub(crate) fn open_database(path: &Path, builder: &redb::Builder) -> Result<Database, DatabaseError> {
    if !path.exists() {
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(format!(".{:016x}.new", rand::random::<u64>()));
        drop(builder.create(&fresh)?);
        let named = std::fs::hard_link(&fresh, path);
        std::fs::remove_file(&fresh).map_err(redb::StorageError::from)?;
        // Another process may have been faster.
        named.or_else(|error| if path.exists() { Ok(()) } else { Err(error) }).map_err(redb::StorageError::from)?;
    }
    builder.create(path)
}

impl Kv {
    /// Opens `<state>/node.redb`, creating it.
    pub fn open(state_dir: &Path) -> Result<Self, KvError> {
        let path = state_dir.join(KV_FILE);
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| KvError::Failed { path: path.clone(), source };
        std::fs::create_dir_all(state_dir).map_err(|e| failed(e.into()))?;
        match open_database(&path, &Database::builder()) {
            Ok(db) => Ok(Self { db: Arc::new(db), path: Arc::new(path), in_memory: false }),
            Err(DatabaseError::DatabaseAlreadyOpen) => Err(KvError::Busy { path }),
            Err(e) => Err(failed(e.into())),
        }
    }

    /// Opens `<state>/node.redb`, or a database in memory where another process has it.
    pub fn open_or_memory(state_dir: &Path) -> Result<Self, KvError> {
        match Self::open(state_dir) {
            Err(KvError::Busy { .. }) => Ok(Self::in_memory()),
            other => other,
        }
    }

    /// Makes an empty database in memory.
    pub fn in_memory() -> Self {
        let db = Database::builder()
            .create_with_backend(InMemoryBackend::new())
            .expect("an empty database in memory meets no I/O error");
        Self { db: Arc::new(db), path: Arc::new(PathBuf::from("(memory)")), in_memory: true }
    }

    /// Says whether the contents end with this process.
    pub fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    fn failed(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> KvError {
        KvError::Failed { path: self.path.to_path_buf(), source: source.into() }
    }

    /// Gives a value of a generic table.
    pub fn get(&self, table: &str, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        let read = self.db.begin_read().map_err(|e| self.failed(e))?;
        let table = match read.open_table(TableDefinition::<&[u8], &[u8]>::new(table)) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(e) => return Err(self.failed(e)),
        };
        let value = table.get(key).map_err(|e| self.failed(e))?;
        Ok(value.map(|v| v.value().to_vec()))
    }

    /// Sets values of a generic table in one transaction; None removes. Durable when it returns.
    pub fn put(&self, table: &str, changes: &[(Vec<u8>, Option<Vec<u8>>)]) -> Result<(), KvError> {
        let write = self.db.begin_write().map_err(|e| self.failed(e))?;
        {
            let mut table =
                write.open_table(TableDefinition::<&[u8], &[u8]>::new(table)).map_err(|e| self.failed(e))?;
            for (key, value) in changes {
                match value {
                    Some(value) => table.insert(key.as_slice(), value.as_slice()).map(drop),
                    None => table.remove(key.as_slice()).map(drop),
                }
                .map_err(|e| self.failed(e))?;
            }
        }
        write.commit().map_err(|e| self.failed(e))
    }

    /// Lists a generic table in key order.
    pub fn list(&self, table: &str) -> Result<Vec<Row>, KvError> {
        let read = self.db.begin_read().map_err(|e| self.failed(e))?;
        let table = match read.open_table(TableDefinition::<&[u8], &[u8]>::new(table)) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(e) => return Err(self.failed(e)),
        };
        let rows = table.iter().map_err(|e| self.failed(e))?;
        rows.map(|row| {
            let (key, value) = row.map_err(|e| self.failed(e))?;
            Ok((key.value().to_vec(), value.value().to_vec()))
        })
        .collect()
    }

    /// Gives the file of a pack that this node has digested in this tier.
    pub fn verified(&self, tier: &TierId, pack: &PackId) -> Result<Option<VerifiedFile>, KvError> {
        let row = self.get(VERIFIED, &verified_key(tier, pack))?;
        Ok(row.and_then(|row| VerifiedFile::decode(&row)))
    }

    /// Remembers that this node has digested a file of a tier, all of it.
    pub fn set_verified(&self, tier: &TierId, pack: &PackId, file: &VerifiedFile) -> Result<(), KvError> {
        self.put(VERIFIED, &[(verified_key(tier, pack), Some(file.encode()))])
    }

    /// Forgets it: the file turned out to be damaged, or is gone.
    pub fn forget_verified(&self, tier: &TierId, pack: &PackId) -> Result<(), KvError> {
        self.put(VERIFIED, &[(verified_key(tier, pack), None)])
    }

    /// Forgets all verified files but those `keep` says yes to; gives how many are left. Called now
    /// and then with "is it still in the tier", so that the table does not grow for ever.
    pub fn sweep_verified(&self, tier: &TierId, keep: impl Fn(&PackId) -> bool) -> Result<usize, KvError> {
        let mut gone = Vec::new();
        let mut left = 0;
        for (key, _) in self.list(VERIFIED)? {
            let Some((of, pack)) = key.split_first_chunk::<16>() else {
                continue;
            };
            let Ok(pack) = <[u8; 32]>::try_from(pack) else {
                continue;
            };
            if of != tier.0.as_bytes() {
                continue;
            }
            if keep(&PackId(pack)) {
                left += 1;
            } else {
                gone.push((key, None));
            }
        }
        if !gone.is_empty() {
            self.put(VERIFIED, &gone)?;
        }
        Ok(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(n: u64) -> VerifiedFile {
        VerifiedFile { file_id: n, size: n + 1, mtime_ns: -5, when_ms: 7 }
    }

    #[test]
    fn of_many_who_make_a_database_at_once_one_has_it_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("one.redb");
        let opened = std::thread::scope(|scope| {
            let open = || open_database(&path, &Database::builder());
            let threads: Vec<_> = (0..6).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
        });
        assert_eq!(opened.iter().filter(|opened| opened.is_ok()).count(), 1, "{opened:?}");
        assert_eq!(std::fs::read_dir(dir.path()).expect("lists").count(), 1);
    }

    #[test]
    fn what_was_verified_is_remembered_across_a_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let tier = TierId(uuid::Uuid::from_u128(1));
        let (pack, other) = (PackId([1; 32]), PackId([2; 32]));
        let kv = Kv::open(dir.path()).expect("opens");
        assert_eq!(kv.verified(&tier, &pack).expect("reads"), None, "no table yet");
        kv.set_verified(&tier, &pack, &file(3)).expect("writes");
        drop(kv);
        let kv = Kv::open(dir.path()).expect("opens again");
        assert_eq!(kv.verified(&tier, &pack).expect("reads"), Some(file(3)));
        assert_eq!(kv.verified(&tier, &other).expect("reads"), None);
        assert_eq!(kv.verified(&TierId(uuid::Uuid::from_u128(2)), &pack).expect("reads"), None);
        kv.forget_verified(&tier, &pack).expect("writes");
        assert_eq!(kv.verified(&tier, &pack).expect("reads"), None);
    }

    #[test]
    fn what_an_older_check_has_looked_at_is_looked_at_again() {
        let mut row = file(3).encode();
        assert_eq!(VerifiedFile::decode(&row), Some(file(3)));
        row[0] -= 1;
        assert_eq!(VerifiedFile::decode(&row), None);
        assert_eq!(VerifiedFile::decode(&row[1..]), None, "as before there were versions");
    }

    #[test]
    fn a_database_that_another_has_open_is_busy_and_memory_serves_instead() {
        let dir = tempfile::tempdir().expect("a directory");
        let _first = Kv::open(dir.path()).expect("opens");
        assert!(matches!(Kv::open(dir.path()), Err(KvError::Busy { .. })));
        let second = Kv::open_or_memory(dir.path()).expect("falls back");
        assert!(second.is_in_memory());
        second.put("t", &[(b"k".to_vec(), Some(b"v".to_vec()))]).expect("writes");
        assert_eq!(second.get("t", b"k").expect("reads"), Some(b"v".to_vec()));
    }

    #[test]
    fn a_table_lists_in_key_order_and_a_change_set_removes() {
        let kv = Kv::in_memory();
        let (a, b) = (b"a".to_vec(), b"b".to_vec());
        kv.put("t", &[(b.clone(), Some(vec![2])), (a.clone(), Some(vec![1]))]).expect("writes");
        assert_eq!(kv.list("t").expect("lists"), vec![(a.clone(), vec![1]), (b.clone(), vec![2])]);
        kv.put("t", &[(a, None)]).expect("writes");
        assert_eq!(kv.list("t").expect("lists"), vec![(b, vec![2])]);
        assert_eq!(kv.list("unheard of").expect("lists"), vec![]);
    }

    #[test]
    fn sweeping_forgets_only_what_is_gone_from_that_tier() {
        let kv = Kv::in_memory();
        let (here, there) = (TierId(uuid::Uuid::from_u128(1)), TierId(uuid::Uuid::from_u128(2)));
        let (kept, gone) = (PackId([1; 32]), PackId([2; 32]));
        for tier in [&here, &there] {
            kv.set_verified(tier, &kept, &file(1)).expect("writes");
            kv.set_verified(tier, &gone, &file(2)).expect("writes");
        }
        assert_eq!(kv.sweep_verified(&here, |p| *p == kept).expect("sweeps"), 1);
        assert_eq!(kv.verified(&here, &gone).expect("reads"), None);
        assert!(kv.verified(&here, &kept).expect("reads").is_some());
        assert!(kv.verified(&there, &gone).expect("reads").is_some());
    }
}
