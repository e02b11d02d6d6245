//! The driver's books: a record on disk for each directory where a pod sees a volume (`docs/formats/csi.md`).
//!
//! ```text
//! <dir>/lock                    locked while a driver lives
//! <dir>/mounts/<key>/           where the daemon mounts
//! <dir>/volumes/<target>.json   a record
//! ```
//!
//! A record is written before anything it speaks of is made, and removed after everything of it is gone. What
//! cannot be read stops the sweep: it might name a mount that pods read.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::volume::{Attributes, short_digest};
use crate::config::EngineChoice;
use crate::format::grants::PodPrincipal;
use crate::format::ids::CommitId;
use crate::node::place::{self, PlaceError};

/// Version of a record.
const FORMAT: u32 = 1;
/// How long a driver waits for the one before it to end, and how often it looks.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

/// Why the books cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BooksError {
    #[error("{}: cannot {doing}", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error("{}: is damaged; move it away, and delete the pods that use the volume", path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{}: was written by a newer larder (format {found}, known {FORMAT}); use that one", path.display())]
    Newer { path: PathBuf, found: u32 },
    #[error("another CSI driver has {}; end it first", path.display())]
    Taken { path: PathBuf },
}

/// The pod that sees a volume, as far as the kubelet has told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    #[serde(default)]
    pub namespace: String,
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub uid: String,
    #[serde(default)]
    pub service_account: String,
}

impl Pod {
    /// Gives who asks.
    pub fn principal(&self) -> PodPrincipal {
        PodPrincipal { namespace: self.namespace.clone(), service_account: self.service_account.clone() }
    }
}

/// A directory where a pod sees a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub format: u32,
    pub volume_id: String,
    pub target: PathBuf,
    /// As they were asked for, without the kubelet's.
    pub attributes: Attributes,
    pub dataset: String,
    pub revision: String,
    /// What the revision was when the volume was first published here.
    pub commit: CommitId,
    /// What serves it: fuse or kernel.
    pub engine: EngineChoice,
    /// Names the mount.
    pub key: String,
    #[serde(default)]
    pub pod: Pod,
    pub since_ms: i64,
}

impl Record {
    /// The version that new records have.
    pub const FORMAT: u32 = FORMAT;
}

/// The records and their folder.
#[derive(Debug)]
pub struct Books {
    /// Real path: the mount table knows no others.
    dir: PathBuf,
    /// Held, never read.
    _lock: File,
}

impl Books {
    /// Opens the books, when no other driver has them any more.
    pub fn open(dir: &Path) -> Result<Self, BooksError> {
        let at = |doing| {
            let path = dir.to_owned();
            move |source| BooksError::Io { path, doing, source }
        };
        for folder in ["volumes", "mounts"] {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir.join(folder));
            made.map_err(at("be made"))?;
        }
        let dir = fs::canonicalize(dir).map_err(at("be looked up"))?;
        let lock = take_lock(&dir.join("lock"))?;
        let books = Self { dir, _lock: lock };
        books.remove_drafts();
        Ok(books)
    }

    /// Removes records that a driver which died has not finished.
    fn remove_drafts(&self) {
        for entry in fs::read_dir(self.volumes()).into_iter().flatten().flatten() {
            if entry.path().extension().is_none_or(|ending| ending != "json") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Gives the folder below which the daemon mounts.
    pub fn mounts(&self) -> PathBuf {
        self.dir.join("mounts")
    }

    /// Gives the directory of a mount.
    pub fn mount_dir(&self, key: &str) -> PathBuf {
        self.mounts().join(key)
    }

    fn volumes(&self) -> PathBuf {
        self.dir.join("volumes")
    }

    fn path_of(&self, target: &Path) -> PathBuf {
        self.volumes().join(format!("{}.json", short_digest(target.as_os_str().as_encoded_bytes())))
    }

    /// Finds the record of a directory.
    pub fn find(&self, target: &Path) -> Result<Option<Record>, BooksError> {
        read(&self.path_of(target))
    }

    /// Writes a record.
    pub fn write(&self, record: &Record) -> Result<(), BooksError> {
        let path = self.path_of(&record.target);
        let text = serde_json::to_vec_pretty(record);
        let text = text.map_err(|source| BooksError::Damaged { path: path.clone(), source })?;
        Ok(place::replace(&path, &text)?)
    }

    /// Removes a record; none is no error.
    pub fn remove(&self, target: &Path) -> Result<(), BooksError> {
        let path = self.path_of(target);
        let at = |source| BooksError::Io { path: path.clone(), doing: "be removed", source };
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(at)?,
        }
        File::open(self.volumes()).and_then(|dir| dir.sync_all()).map_err(at)
    }

    /// Gives all records; an error where one of them cannot be read.
    pub fn all(&self) -> Result<Vec<Record>, BooksError> {
        let folder = self.volumes();
        let at = |source| BooksError::Io { path: folder.clone(), doing: "be listed", source };
        let mut all = Vec::new();
        for entry in fs::read_dir(&folder).map_err(at)? {
            let path = entry.map_err(at)?.path();
            // What has no such ending was not finished.
            if path.extension().is_some_and(|ending| ending == "json") {
                all.extend(read(&path)?);
            }
        }
        Ok(all)
    }

    /// Lists the directories for mounts that there are, by key.
    pub fn keys(&self) -> Result<Vec<String>, BooksError> {
        let folder = self.mounts();
        let at = |source| BooksError::Io { path: folder.clone(), doing: "be listed", source };
        let listed = fs::read_dir(&folder).map_err(at)?;
        Ok(listed.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }
}

fn read(path: &Path) -> Result<Option<Record>, BooksError> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(BooksError::Io { path: path.to_owned(), doing: "be read", source }),
    };
    let damaged = |source| BooksError::Damaged { path: path.to_owned(), source };
    let version: Version = serde_json::from_slice(&text).map_err(damaged)?;
    if version.format > FORMAT {
        return Err(BooksError::Newer { path: path.to_owned(), found: version.format });
    }
    serde_json::from_slice(&text).map(Some).map_err(damaged)
}

fn take_lock(path: &Path) -> Result<File, BooksError> {
    let at = |source| BooksError::Io { path: path.to_owned(), doing: "be locked", source };
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path).map_err(at)?;
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) if begun.elapsed() < LOCK_TIMEOUT => {
                std::thread::sleep(LOCK_INTERVAL);
            }
            Err(fs::TryLockError::WouldBlock) => return Err(BooksError::Taken { path: path.to_owned() }),
            Err(fs::TryLockError::Error(error)) => return Err(at(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(target: &str) -> Record {
        Record {
            format: FORMAT,
            volume_id: "v".into(),
            target: target.into(),
            attributes: Attributes::from([("dataset".into(), "xray@v2".into())]),
            dataset: "xray".into(),
            revision: "xray@v2".into(),
            commit: CommitId([7; 32]),
            engine: EngineChoice::Fuse,
            key: "k".into(),
            pod: Pod { namespace: "ns".into(), ..Pod::default() },
            since_ms: 5,
        }
    }

    #[test]
    fn a_record_is_found_by_its_directory_after_a_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let books = Books::open(dir.path()).expect("opens");
        assert_eq!(books.find(Path::new("/a")).expect("reads"), None);
        books.write(&record("/a")).expect("writes");
        books.write(&record("/b")).expect("writes");
        drop(books);
        let books = Books::open(dir.path()).expect("opens");
        assert_eq!(books.find(Path::new("/a")).expect("reads"), Some(record("/a")));
        books.remove(Path::new("/a")).expect("removes");
        books.remove(Path::new("/a")).expect("is gone already");
        assert_eq!(books.all().expect("reads"), [record("/b")]);
    }

    #[test]
    fn what_cannot_be_read_is_an_error_and_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let books = Books::open(dir.path()).expect("opens");
        books.write(&record("/a")).expect("writes");
        let path = books.path_of(Path::new("/a"));
        fs::write(books.volumes().join(".tmpXYZ"), "{").expect("writes");
        assert_eq!(books.all().expect("a draft is no record").len(), 1);
        drop(books);
        let books = Books::open(dir.path()).expect("opens");
        assert!(!books.volumes().join(".tmpXYZ").exists(), "drafts go");
        fs::write(&path, r#"{"format": 2}"#).expect("writes");
        assert!(matches!(books.all(), Err(BooksError::Newer { found: 2, .. })));
        fs::write(&path, "{").expect("writes");
        assert!(matches!(books.find(Path::new("/a")), Err(BooksError::Damaged { .. })));
        assert!(path.exists());
    }
}
