//! The directory below an embedded lake, and what changes it.
//!
//! ```text
//! <dir>/<bucket>/objects/    the current objects, named by `names`
//! <dir>/<bucket>/versions/   older versions and delete markers: <key>.v/<version id>
//! <dir>/<bucket>/uploads/    multipart uploads that run: <upload id>/{upload.json,00001,...}
//! <dir>/<bucket>/tmp/        objects that are being written
//! <dir>/<bucket>/locks/      files to lock: a key's changes happen one after the other, and empty
//!                            directories are not removed under a writer who lost to that before
//! <dir>/<bucket>/versioning  exists while the bucket keeps versions
//! ```
//!
//! An object is written under `tmp/`, flushed, and renamed to its place with its key's lock held:
//! so the condition that was looked at still holds when the rename happens, whichever process
//! changes the key. The lock is flock(2): it dies with its process. Readers take no lock; they have
//! one version open, whole. A crash leaves files under `tmp/`, which opening the directory clears
//! after a day, and nothing else.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use md5::{Digest, Md5};

use super::names::{NameKind, key_path};
use super::object::{Headers, ObjectInfo};
use super::walk::{DirCache, is_gone};
use super::{StoreError, StoreOptions};

/// Locks of a bucket: enough that writers of different keys seldom meet.
const LOCKS: u8 = 64;
/// The lock of those who remove empty directories.
const REMOVALS: &str = "removals";
/// How often a writer whose directory was removed tries again before it has removals wait.
const TRIES_WITH_REMOVALS: u32 = 3;
/// Files under `tmp/` that are older were left by a crash.
const TMP_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Why an operation did not happen.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    #[error("no such bucket")]
    NoSuchBucket,
    #[error("no such key")]
    NoSuchKey,
    #[error("no such version")]
    NoSuchVersion,
    #[error("no such upload")]
    NoSuchUpload,
    #[error("the object is not what the condition says")]
    Precondition,
    #[error("a named part did not arrive, or is another one")]
    InvalidPart,
    #[error("parts are not in ascending order")]
    InvalidPartOrder,
    #[error("a part but the last is smaller than 5 MiB")]
    PartTooSmall,
    #[error("the bucket is not empty")]
    NotEmpty,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Gives I/O errors their path.
pub trait At<T> {
    fn at(self, path: &Path, doing: &'static str) -> Result<T, StoreError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: &Path, doing: &'static str) -> Result<T, StoreError> {
        self.map_err(|source| StoreError { path: path.to_path_buf(), doing, source })
    }
}

/// When a write may take effect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Condition {
    /// No object may be there.
    pub absent: bool,
    /// The object has to have this ETag (without quotes).
    pub etag: Option<String>,
}

/// An object that is open for reading.
#[derive(Debug)]
pub struct Opened {
    pub file: File,
    pub info: ObjectInfo,
}

/// One directory of buckets.
#[derive(Debug)]
pub struct Disk {
    dir: PathBuf,
    options: StoreOptions,
    pub(super) cache: DirCache,
}

/// One bucket, known to exist.
#[derive(Debug, Clone)]
pub struct Bucket {
    pub(super) disk: Arc<Disk>,
    pub(super) dir: PathBuf,
}

/// Unix time in milliseconds.
pub fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

impl Disk {
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        std::fs::create_dir_all(dir).at(dir, "making the directory")?;
        Ok(Self { dir: dir.to_path_buf(), options, cache: DirCache::default() })
    }

    pub fn ensure_bucket(self: &Arc<Self>, name: &str) -> Result<Bucket, StoreError> {
        let bucket = Bucket { disk: self.clone(), dir: self.dir.join(name) };
        for part in ["tmp", "locks", "uploads", "versions", "objects"] {
            let path = bucket.dir.join(part);
            std::fs::create_dir_all(&path).at(&path, "making the directory")?;
        }
        self.sync_dir(&bucket.dir)?;
        self.sync_dir(&self.dir)?;
        bucket.clear_tmp();
        Ok(bucket)
    }

    pub fn bucket(self: &Arc<Self>, name: &str) -> Result<Bucket, OpError> {
        let bucket = Bucket { disk: self.clone(), dir: self.dir.join(name) };
        if bucket.objects().is_dir() { Ok(bucket) } else { Err(OpError::NoSuchBucket) }
    }

    /// Lists the buckets with the times of their directories, in order.
    pub fn buckets(&self) -> Result<Vec<(String, SystemTime)>, StoreError> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.dir).at(&self.dir, "listing the directory")? {
            let entry = entry.at(&self.dir, "listing the directory")?;
            let time = entry.metadata().and_then(|meta| meta.modified()).unwrap_or(UNIX_EPOCH);
            if let (Ok(name), true) = (entry.file_name().into_string(), entry.path().join("objects").is_dir()) {
                found.push((name, time));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Flushes a directory's names to the disk.
    pub(super) fn sync_dir(&self, dir: &Path) -> Result<(), StoreError> {
        if !self.options.fsync {
            return Ok(());
        }
        match File::open(dir) {
            Ok(file) => file.sync_all().at(dir, "flushing the directory"),
            Err(error) if is_gone(&error) => Ok(()),
            Err(error) => Err(error).at(dir, "flushing the directory"),
        }
    }

    /// Makes a directory and those above it, each name flushed.
    fn make_dirs(&self, dir: &Path) -> Result<(), StoreError> {
        if dir.is_dir() {
            return Ok(());
        }
        let above = dir.parent().unwrap_or(&self.dir);
        self.make_dirs(above)?;
        match DirBuilder::new().create(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            // Somebody removed the empty directory above: the caller tries again.
            Err(error) if is_gone(&error) => Ok(()),
            made => made.at(dir, "making the directory").and_then(|()| self.sync_dir(above)),
        }
    }
}

/// Holds a key's lock until it is dropped.
#[derive(Debug)]
pub struct KeyLock(#[expect(dead_code, reason = "closing the file unlocks it")] File);

impl Bucket {
    pub(super) fn objects(&self) -> PathBuf {
        self.dir.join("objects")
    }

    pub(super) fn versions(&self) -> PathBuf {
        self.dir.join("versions")
    }

    pub(super) fn object_path(&self, key: &str) -> PathBuf {
        key_path(&self.objects(), key, NameKind::Object)
    }

    pub(super) fn versions_path(&self, key: &str) -> PathBuf {
        key_path(&self.versions(), key, NameKind::Versions)
    }

    /// Waits for the lock of a key's changes.
    pub(super) fn lock(&self, key: &str) -> Result<KeyLock, StoreError> {
        let shard = blake3::hash(key.as_bytes()).as_bytes()[0] % LOCKS;
        let (path, file) = self.lock_file(&format!("{shard:02}"))?;
        file.lock().at(&path, "taking a lock")?;
        Ok(KeyLock(file))
    }

    fn lock_file(&self, name: &str) -> Result<(PathBuf, File), StoreError> {
        let path = self.dir.join("locks").join(name);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.at(&path, "opening a lock")?;
        Ok((path, file))
    }

    /// Runs a rename or link to `to`, whose directory may be missing, or be removed just now. Who loses to
    /// removals a few times has them wait.
    fn place_in_dir(&self, to: &Path, what: impl Fn() -> io::Result<()>) -> Result<(), StoreError> {
        let dir = to.parent().unwrap_or(&self.dir);
        let mut tries = 0;
        let mut removals_wait = None;
        loop {
            self.disk.make_dirs(dir)?;
            match what() {
                Err(error) if is_gone(&error) && removals_wait.is_none() => tries += 1,
                done => {
                    return done.at(to, "moving an object to its place").and_then(|()| self.disk.sync_dir(dir));
                }
            }
            if tries > TRIES_WITH_REMOVALS {
                let (path, file) = self.lock_file(REMOVALS)?;
                file.lock_shared().at(&path, "taking a lock")?;
                removals_wait = Some(file);
            }
        }
    }

    pub fn keeps_versions(&self) -> bool {
        self.dir.join("versioning").exists()
    }

    pub fn set_versioning(&self, on: bool) -> Result<(), StoreError> {
        let path = self.dir.join("versioning");
        match on {
            true => std::fs::write(&path, b"").at(&path, "switching versions on")?,
            false => match std::fs::remove_file(&path) {
                Err(error) if is_gone(&error) => {}
                done => done.at(&path, "switching versions off")?,
            },
        }
        self.disk.sync_dir(&self.dir)
    }

    fn clear_tmp(&self) {
        // What cannot be cleared now is cleared next time.
        for entry in std::fs::read_dir(self.dir.join("tmp")).into_iter().flatten().flatten() {
            let age = entry.metadata().and_then(|meta| meta.modified()).ok().and_then(|time| time.elapsed().ok());
            if age.is_some_and(|age| age > TMP_AGE_MAX) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// Begins to write an object.
    pub fn temp(&self) -> Result<TempObject, StoreError> {
        let path = self.dir.join("tmp").join(uuid::Uuid::new_v4().simple().to_string());
        let file = OpenOptions::new().create_new(true).read(true).write(true).open(&path);
        let file = file.at(&path, "making a temporary file")?;
        Ok(TempObject { path, file, md5: Md5::new(), len: 0, fsync: self.disk.options.fsync })
    }

    /// Opens the current object, or a version of it.
    pub fn open(&self, key: &str, version: Option<&str>) -> Result<Opened, OpError> {
        let current = open_object(&self.object_path(key))?;
        let Some(version) = version else {
            return current.ok_or(OpError::NoSuchKey);
        };
        if let Some(opened) = current.filter(|opened| opened.info.version_id() == version) {
            return Ok(opened);
        }
        if !is_version_id(version) {
            return Err(OpError::NoSuchVersion);
        }
        // An overwritten version is linked here before it loses its first name.
        let older = open_object(&self.versions_path(key).join(version))?;
        older.filter(|opened| !opened.info.delete_marker).ok_or(OpError::NoSuchVersion)
    }

    /// Puts a written object to its place, if the condition holds.
    pub fn publish(
        &self,
        key: &str,
        mut temp: TempObject,
        etag: String,
        headers: Headers,
        when: &Condition,
    ) -> Result<ObjectInfo, OpError> {
        let version = self.keeps_versions().then(|| uuid::Uuid::now_v7().simple().to_string());
        let info = ObjectInfo { size: temp.len, etag, modified_ms: now_ms(), version, delete_marker: false, headers };
        temp.seal(&info)?;
        let path = self.object_path(key);
        let _lock = self.lock(key)?;
        let current = open_object(&path)?;
        if !holds(when, current.as_ref().map(|opened| &opened.info)) {
            let missing = current.is_none() && when.etag.is_some();
            return Err(if missing { OpError::NoSuchKey } else { OpError::Precondition });
        }
        self.keep_version(key, current.as_ref(), info.version.is_none())?;
        self.place_in_dir(&path, || std::fs::rename(&temp.path, &path))?;
        temp.path = PathBuf::new();
        Ok(info)
    }

    /// Links the current object among the older versions, where it has to outlive its name.
    fn keep_version(&self, key: &str, current: Option<&Opened>, null_follows: bool) -> Result<(), OpError> {
        let Some(current) = current else {
            return Ok(());
        };
        if null_follows && current.info.version.is_none() {
            return Ok(());
        }
        let path = self.object_path(key);
        let kept = self.versions_path(key).join(current.info.version_id());
        self.place_in_dir(&kept, || match std::fs::hard_link(&path, &kept) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        })?;
        Ok(())
    }

    /// Deletes the current object: for good, or behind a marker where versions are kept. Gives the
    /// marker's version id.
    pub fn delete(&self, key: &str, when: &Condition) -> Result<Option<String>, OpError> {
        let path = self.object_path(key);
        let _lock = self.lock(key)?;
        let current = open_object(&path)?;
        if !holds(when, current.as_ref().map(|opened| &opened.info)) {
            return Err(OpError::Precondition);
        }
        let mut marker = None;
        if self.keeps_versions() {
            self.keep_version(key, current.as_ref(), false)?;
            let id = uuid::Uuid::now_v7().simple().to_string();
            let mut temp = self.temp()?;
            let info = ObjectInfo {
                modified_ms: now_ms(),
                version: Some(id.clone()),
                delete_marker: true,
                ..ObjectInfo::default()
            };
            temp.seal(&info)?;
            let place = self.versions_path(key).join(&id);
            self.place_in_dir(&place, || std::fs::rename(&temp.path, &place))?;
            temp.path = PathBuf::new();
            marker = Some(id);
        }
        self.unlink(&path, &self.objects())?;
        Ok(marker)
    }

    /// Deletes one version for good; the newest one left becomes the current object.
    pub fn delete_version(&self, key: &str, version: &str) -> Result<(), OpError> {
        let path = self.object_path(key);
        let _lock = self.lock(key)?;
        let current = open_object(&path)?;
        if current.as_ref().is_some_and(|opened| opened.info.version_id() == version) {
            self.unlink(&path, &self.objects())?;
        } else if is_version_id(version) {
            self.unlink(&self.versions_path(key).join(version), &self.versions())?;
        }
        if open_object(&path)?.is_some() {
            return Ok(());
        }
        let newest = self.older_versions(key)?.into_iter().next().filter(|info| !info.delete_marker);
        if let Some(newest) = newest {
            let from = self.versions_path(key).join(newest.version_id());
            self.place_in_dir(&path, || std::fs::rename(&from, &path))?;
            self.remove_empty_above(&from, &self.versions())?;
        }
        Ok(())
    }

    /// Lists what lies beside the current object, the newest first.
    pub(super) fn older_versions(&self, key: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        let dir = self.versions_path(key);
        let mut found = Vec::new();
        let entries = match std::fs::read_dir(&dir) {
            Err(error) if is_gone(&error) => return Ok(found),
            entries => entries.at(&dir, "listing versions")?,
        };
        for entry in entries {
            let entry = entry.at(&dir, "listing versions")?;
            found.extend(open_object(&entry.path())?.map(|opened| opened.info));
        }
        found.sort_by(|a, b| (b.modified_ms, b.version_id()).cmp(&(a.modified_ms, a.version_id())));
        Ok(found)
    }

    fn unlink(&self, path: &Path, root: &Path) -> Result<(), StoreError> {
        match std::fs::remove_file(path) {
            Err(error) if is_gone(&error) => return Ok(()),
            done => done.at(path, "removing an object")?,
        }
        let kept = self.remove_empty_above(path, root)?;
        self.disk.sync_dir(&kept)
    }

    /// Removes the directories above `path` that are empty; gives the first that is not.
    fn remove_empty_above(&self, path: &Path, root: &Path) -> Result<PathBuf, StoreError> {
        let (lock, file) = self.lock_file(REMOVALS)?;
        file.lock().at(&lock, "taking a lock")?;
        let above = path.ancestors().skip(1).take_while(|dir| *dir != root);
        let kept = above.into_iter().find(|dir| std::fs::remove_dir(dir).is_err());
        Ok(kept.unwrap_or(root).to_path_buf())
    }

    /// Removes the bucket, if it holds nothing.
    pub fn remove(&self) -> Result<(), OpError> {
        for part in [self.objects(), self.versions()] {
            let mut entries = std::fs::read_dir(&part).at(&part, "listing the bucket")?;
            if entries.next().is_some() {
                return Err(OpError::NotEmpty);
            }
        }
        std::fs::remove_dir_all(&self.dir).at(&self.dir, "removing the bucket")?;
        Ok(())
    }
}

/// A version id becomes a file name: only what we make ourselves may.
fn is_version_id(version: &str) -> bool {
    version == "null" || (version.len() == 32 && version.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn holds(when: &Condition, current: Option<&ObjectInfo>) -> bool {
    let absent = !when.absent || current.is_none();
    let same = when.etag.as_ref().is_none_or(|etag| current.is_some_and(|info| info.etag == *etag));
    absent && same
}

/// Opens an object file; None where there is none.
pub(super) fn open_object(path: &Path) -> Result<Option<Opened>, StoreError> {
    let file = match File::open(path) {
        Err(error) if is_gone(&error) => return Ok(None),
        file => file.at(path, "opening an object")?,
    };
    let info = ObjectInfo::read(&file).at(path, "reading an object's meta")?;
    Ok(Some(Opened { file, info }))
}

/// An object that is being written; dropped before it has its place, it is removed.
#[derive(Debug)]
pub struct TempObject {
    path: PathBuf,
    file: File,
    md5: Md5,
    len: u64,
    fsync: bool,
}

impl TempObject {
    /// Appends bytes of the body.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.md5.update(bytes);
        self.len += bytes.len() as u64;
        self.file.write_all(bytes).at(&self.path, "writing an object")
    }

    /// Appends another object's body without looking at it (in the kernel, by copy_file_range).
    pub(super) fn append(&mut self, from: &Opened) -> Result<(), StoreError> {
        (&from.file).seek(SeekFrom::Start(0)).at(&self.path, "joining parts")?;
        let mut body = (&from.file).take(from.info.size);
        let copied = io::copy(&mut body, &mut self.file).at(&self.path, "joining parts")?;
        self.len += copied;
        if copied == from.info.size {
            return Ok(());
        }
        Err(io::ErrorKind::UnexpectedEof.into()).at(&self.path, "joining parts")
    }

    pub fn len_bytes(&self) -> u64 {
        self.len
    }

    /// Gives the MD5 of what was written.
    pub fn md5(&self) -> [u8; 16] {
        self.md5.clone().finalize().into()
    }

    /// Appends the meta and flushes.
    fn seal(&mut self, info: &ObjectInfo) -> Result<(), StoreError> {
        self.file.write_all(&info.encode()).at(&self.path, "writing an object's meta")?;
        if self.fsync {
            self.file.sync_all().at(&self.path, "flushing an object")?;
        }
        Ok(())
    }

    /// Seals it and moves it to a place that nobody else writes.
    pub(super) fn place(mut self, info: &ObjectInfo, place: &Path) -> Result<(), StoreError> {
        self.seal(info)?;
        std::fs::rename(&self.path, place).at(place, "moving a part to its place")?;
        self.path = PathBuf::new();
        Ok(())
    }
}

impl Drop for TempObject {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            // What stays is cleared after a day.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
