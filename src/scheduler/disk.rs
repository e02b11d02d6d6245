//! Small files that survive a crash at any moment: each is replaced whole, or made once.
//!
//! Everything the scheduler remembers is JSON in files of its own directory. A file is written beside
//! its place, synced, renamed over the old one, and the directory is synced: a reader finds the old
//! text or the new one, also after a power cut. `docs/formats/scheduler.md` has the files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Says which file could not be used, and for what.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file system refused.
    #[error("{}: cannot {doing}", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    /// What is there is not what was written.
    #[error("{}: is damaged; move it away to go on without it", path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// Makes an `io::Error` into one that has its path.
pub(super) fn at(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Io { path, doing, source }
}

/// Makes a directory and its parents, with this mode whatever the umask; what is there stays as it is.
pub(super) fn make_dir(path: &Path, mode: u32) -> Result<(), DiskError> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_dir(parent, mode)?;
    }
    match fs::DirBuilder::new().mode(mode).create(path) {
        // Another thread was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
        made => made.map_err(at(path, "make the directory"))?,
    }
    // Users reach what is theirs through directories of the scheduler's.
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(at(path, "open"))
}

pub(super) fn sync_dir(dir: &Path) -> Result<(), DiskError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir, "sync the directory"))
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

/// Replaces a file by a value's JSON, durably.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), DiskError> {
    let text = serde_json::to_vec(value).map_err(|error| at(path, "encode")(io::Error::other(error)))?;
    let dir = parent(path);
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(dir).map_err(at(path, "write"))?;
    file.write_all(&text).and_then(|()| file.as_file().sync_all()).map_err(at(path, "write"))?;
    file.persist(path).map_err(|error| at(path, "replace")(error.error))?;
    sync_dir(dir)
}

/// Replaces a file that only its owner reads, in a directory that is there.
pub(super) fn write_text(path: &Path, text: &str) -> Result<(), DiskError> {
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(parent(path)).map_err(at(path, "write"))?;
    file.write_all(text.as_bytes()).map_err(at(path, "write"))?;
    file.persist(path).map(drop).map_err(|error| at(path, "replace")(error.error))
}

/// Reads a value back; None where there is no file.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, DiskError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(path, "read")(error)),
    };
    serde_json::from_slice(&text).map(Some).map_err(|source| DiskError::Damaged { path: path.to_owned(), source })
}

/// Makes an empty file that must not be there yet, durably. Says whether this call made it: of many,
/// exactly one does.
pub(super) fn make_once(path: &Path) -> Result<bool, DiskError> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => file.sync_all().map_err(at(path, "sync"))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        Err(error) => return Err(at(path, "make")(error)),
    }
    sync_dir(parent(path))?;
    Ok(true)
}

/// Opens a file that is there to be locked, made where it is missing.
fn lock_file(path: &Path) -> Result<File, DiskError> {
    let mut options = OpenOptions::new();
    options.create(true).read(true).write(true).truncate(false).mode(0o600);
    options.open(path).map_err(at(path, "open"))
}

/// Takes a lock that is given back when the file is closed, so also when the process dies; None where
/// another process has it.
pub(super) fn try_lock(path: &Path) -> Result<Option<File>, DiskError> {
    let file = lock_file(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(error)) => Err(at(path, "lock")(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_makers_one_wins_and_a_lock_has_one_holder() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("started");
        let made: usize = std::thread::scope(|scope| {
            let makers: Vec<_> =
                (0..8).map(|_| scope.spawn(|| usize::from(make_once(&path).expect("makes")))).collect();
            makers.into_iter().map(|maker| maker.join().expect("ends")).sum()
        });
        assert_eq!(made, 1);
        let lock = dir.path().join("lock");
        let held = try_lock(&lock).expect("locks").expect("is free");
        assert!(try_lock(&lock).expect("asks").is_none());
        drop(held);
        assert!(try_lock(&lock).expect("asks").is_some());
    }

    #[test]
    fn a_value_comes_back_and_damage_is_told_with_its_path() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("value.json");
        assert_eq!(read_json::<Vec<u32>>(&path).expect("reads"), None);
        write_json(&path, &[1, 2]).expect("writes");
        assert_eq!(read_json::<Vec<u32>>(&path).expect("reads"), Some(vec![1, 2]));
        assert_eq!(fs::read_dir(dir.path()).expect("lists").count(), 1, "nothing is left beside it");
        fs::write(&path, "[1,").expect("damages");
        let told = read_json::<Vec<u32>>(&path).expect_err("is damaged").to_string();
        assert!(told.contains("value.json"), "{told}");
    }
}
