//! Files of immutable metadata on the node's disk, named as in the lake.
//!
//! A file appears whole (temporary file, then rename) but is not synced: whoever reads it checks it
//! against its id, so a file that a power cut emptied is fetched again. Last use is the
//! modification time, renewed at most daily, because access times cannot be relied on.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// How old a file's modification time may be before a use renews it.
const RENEW_AFTER: Duration = Duration::from_secs(24 * 3600);
/// What no file of ours exceeds: a damaged length must not fill the memory.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// A temporary file of a process that is gone: older than this.
const TEMP_AGE_MAX: Duration = Duration::from_secs(3600);
const TEMP_PREFIX: &str = ".tmp-";

static TEMP_COUNTER: AtomicU64 = AtomicU64::new(0);

/// A directory of files by lake key.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    dir: PathBuf,
}

impl Disk {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Reads a file; anything that stands in the way is as good as "not there".
    pub(super) fn read(&self, key: &str) -> Option<Vec<u8>> {
        let mut file = File::open(self.dir.join(key)).ok()?;
        let stat = file.metadata().ok()?;
        if stat.len() > FILE_BYTES_MAX {
            return None;
        }
        let mut bytes = Vec::with_capacity(stat.len() as usize);
        file.read_to_end(&mut bytes).ok()?;
        let now = SystemTime::now();
        if stat.modified().is_ok_and(|used| now.duration_since(used).is_ok_and(|age| age > RENEW_AFTER)) {
            // Opened for reading: the owner may set times all the same.
            let _ = file.set_modified(now);
        }
        Some(bytes)
    }

    /// Says whether a file is there, unread.
    pub(super) fn has(&self, key: &str) -> bool {
        self.dir.join(key).exists()
    }

    /// Writes a file whole. A failure (full disk, read-only directory) only costs a fetch later.
    pub(super) fn write(&self, key: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.dir.join(key);
        let parent = path.parent().unwrap_or(&self.dir);
        let number = TEMP_COUNTER.fetch_add(1, Ordering::Relaxed);
        let temp = parent.join(format!("{TEMP_PREFIX}{}-{number}", std::process::id()));
        let mut file = match File::create(&temp) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(parent)?;
                File::create(&temp)?
            }
            Err(error) => return Err(error),
        };
        let done = file.write_all(bytes).and_then(|()| fs::rename(&temp, &path));
        if done.is_err() {
            let _ = fs::remove_file(&temp);
        }
        done
    }

    pub(super) fn remove(&self, key: &str) {
        let _ = fs::remove_file(self.dir.join(key));
    }

    /// Deletes what was not used for longest until at most `bytes_max` are left.
    pub(super) fn sweep(&self, bytes_max: u64) -> io::Result<u64> {
        let mut files = Vec::new();
        if self.dir.exists() {
            collect(&self.dir, &mut files)?;
        }
        let mut bytes: u64 = files.iter().map(|file| file.len).sum();
        if bytes <= bytes_max {
            return Ok(bytes);
        }
        // A tenth below the limit, so that the next block does not call for the next sweep.
        let target = bytes_max - bytes_max / 10;
        files.sort_unstable_by_key(|file| file.used);
        for file in files {
            if bytes <= target {
                break;
            }
            if fs::remove_file(&file.path).is_ok() {
                bytes -= file.len;
            }
        }
        Ok(bytes)
    }
}

struct CachedFile {
    used: SystemTime,
    len: u64,
    path: PathBuf,
}

/// Lists the files below `dir`, and deletes temporary ones that nobody writes any more.
fn collect(dir: &Path, files: &mut Vec<CachedFile>) -> io::Result<()> {
    for item in fs::read_dir(dir)? {
        let item = item?;
        let Ok(stat) = item.metadata() else { continue };
        if stat.is_dir() {
            collect(&item.path(), files)?;
            continue;
        }
        let used = stat.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let temporary = item.file_name().to_string_lossy().starts_with(TEMP_PREFIX);
        if temporary && used.elapsed().is_ok_and(|age| age > TEMP_AGE_MAX) {
            let _ = fs::remove_file(item.path());
            continue;
        }
        files.push(CachedFile { used, len: stat.len(), path: item.path() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_reads_back_and_no_temporary_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(dir.path().join("meta"));
        assert!(disk.read("nodes/ab/x").is_none());
        disk.write("nodes/ab/x", b"bytes").unwrap();
        assert_eq!(disk.read("nodes/ab/x").unwrap(), b"bytes");
        assert!(disk.has("nodes/ab/x"));
        assert_eq!(fs::read_dir(dir.path().join("meta/nodes/ab")).unwrap().count(), 1);
    }

    #[test]
    fn a_sweep_deletes_the_longest_unused_first() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(dir.path().to_owned());
        let now = SystemTime::now();
        for (n, age_days) in [(0u64, 3u64), (1, 5), (2, 1), (3, 4)] {
            let key = format!("nodes/ab/{n}");
            disk.write(&key, &[0; 1000]).unwrap();
            let file = File::open(dir.path().join(&key)).unwrap();
            file.set_modified(now - Duration::from_secs(age_days * 86400)).unwrap();
        }
        assert_eq!(disk.sweep(10_000).unwrap(), 4000, "within the limit nothing leaves");
        assert_eq!(disk.sweep(2500).unwrap(), 2000);
        assert!(!disk.has("nodes/ab/1") && !disk.has("nodes/ab/3"));
        assert!(disk.has("nodes/ab/0") && disk.has("nodes/ab/2"));
    }

    #[test]
    fn a_use_renews_the_time_of_last_use() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(dir.path().to_owned());
        disk.write("a/b", b"x").unwrap();
        let old = SystemTime::now() - Duration::from_secs(3 * 86400);
        File::open(dir.path().join("a/b")).unwrap().set_modified(old).unwrap();
        disk.read("a/b").unwrap();
        let used = fs::metadata(dir.path().join("a/b")).unwrap().modified().unwrap();
        assert!(used > old + Duration::from_secs(86400));
    }
}
