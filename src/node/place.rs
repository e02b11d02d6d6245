//! The state directory of a node: where things lie in it, the node's id, the daemon's lock.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::format::ids::NodeId;

/// Says what is wrong with the state directory.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    #[error("{}: cannot {doing}", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{}: holds no node id; restore it, or remove it and lose what the tiers know of this node", path.display())]
    NodeId { path: PathBuf },
}

/// A node's own directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    root: PathBuf,
}

/// How often, and in which distance, the daemon's lock is asked for.
const LOCK_TRIES: u32 = 5;
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// Held while a daemon lives.
#[derive(Debug)]
pub struct DaemonLock {
    _file: File,
}

impl Place {
    /// Makes the directory where it is missing (mode 0700).
    pub fn open(root: &Path) -> Result<Self, PlaceError> {
        let at = |source| PlaceError::Io { path: root.to_owned(), doing: "make the state directory", source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(at)?;
        let root = fs::canonicalize(root).map_err(at)?;
        Ok(Self { root })
    }

    /// Names the directory without making it.
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn log(&self) -> PathBuf {
        self.root.join("daemon.log")
    }

    pub fn lock(&self) -> PathBuf {
        self.root.join("daemon.lock")
    }

    /// Gives the folder of the kernel engine's images.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub fn mounts(&self) -> PathBuf {
        self.root.join("mounts.json")
    }

    /// Gives the parent of private states (`mount --foreground`).
    pub fn private(&self) -> PathBuf {
        self.root.join("private")
    }

    /// Gives the node's id, made at the first call; of racing processes all get the same one.
    pub fn node_id(&self) -> Result<NodeId, PlaceError> {
        let path = self.root.join("node-id");
        let at = |doing| {
            let path = path.clone();
            move |source| PlaceError::Io { path, doing, source }
        };
        if let Some(id) = read_node_id(&path)? {
            return Ok(id);
        }
        // Written whole beside its place and then linked: nobody ever reads half an id, one wins.
        let mut file = tempfile::NamedTempFile::new_in(&self.root).map_err(at("write the node id"))?;
        writeln!(file, "{}", NodeId(uuid::Uuid::new_v4())).map_err(at("write the node id"))?;
        file.as_file().sync_all().map_err(at("write the node id"))?;
        match file.persist_noclobber(&path) {
            Ok(_) => {}
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(at("write the node id")(error.error)),
        }
        read_node_id(&path)?.ok_or(PlaceError::NodeId { path })
    }

    /// Takes the daemon's lock; None where a daemon lives.
    pub fn take_daemon_lock(&self) -> Result<Option<DaemonLock>, PlaceError> {
        let path = self.lock();
        let at = |source| PlaceError::Io { path: path.clone(), doing: "lock", source };
        let options = OpenOptions::new().create(true).read(true).write(true).truncate(false).mode(0o600).open(&path);
        let mut file = options.map_err(at)?;
        // Who looks whether a daemon lives has the lock for an instant.
        for tries_left in (0..LOCK_TRIES).rev() {
            match file.try_lock() {
                Ok(()) => break,
                Err(fs::TryLockError::WouldBlock) if tries_left == 0 => return Ok(None),
                Err(fs::TryLockError::WouldBlock) => std::thread::sleep(LOCK_INTERVAL),
                Err(fs::TryLockError::Error(error)) => return Err(at(error)),
            }
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(at)?;
        Ok(Some(DaemonLock { _file: file }))
    }

    /// Says whether a daemon holds the lock now.
    pub fn daemon_lives(&self) -> bool {
        let Ok(file) = OpenOptions::new().read(true).open(self.lock()) else {
            return false;
        };
        matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock))
    }

    /// Gives the pid that the lock's holder wrote.
    pub fn daemon_pid(&self) -> Option<i32> {
        if !self.daemon_lives() {
            return None;
        }
        fs::read_to_string(self.lock()).ok()?.trim().parse().ok()
    }

    /// Gives the last lines of the daemon's log from a position on.
    pub fn log_tail(&self, from: u64, lines_max: usize) -> String {
        const TAIL_BYTES_MAX: u64 = 16 * 1024;
        let Ok(mut file) = File::open(self.log()) else {
            return String::new();
        };
        let len = file.metadata().map_or(0, |meta| meta.len());
        let start = from.max(len.saturating_sub(TAIL_BYTES_MAX)).min(len);
        let mut raw = Vec::new();
        let read = file.seek(io::SeekFrom::Start(start)).and_then(|_| file.read_to_end(&mut raw));
        if read.is_err() {
            return String::new();
        }
        let text = String::from_utf8_lossy(&raw);
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(lines_max)..).unwrap_or_default().join("\n")
    }
}

fn read_node_id(path: &Path) -> Result<Option<NodeId>, PlaceError> {
    match fs::read_to_string(path) {
        Ok(text) => text.trim().parse().map(Some).map_err(|_| PlaceError::NodeId { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PlaceError::Io { path: path.to_owned(), doing: "read the node id", source }),
    }
}

/// Replaces a small file as a whole: written beside it, flushed, renamed.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), PlaceError> {
    let at = |source| PlaceError::Io { path: path.to_owned(), doing: "write", source };
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(at)?;
    file.write_all(bytes).map_err(at)?;
    file.as_file().sync_all().map_err(at)?;
    file.persist(path).map_err(|error| at(error.error))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at)
}

/// What has to be left for everything that is not a mount: connections, the tier, unmounting.
const DESCRIPTORS_LEFT: u64 = 48;

/// Raises how many descriptors this process may have to what it is allowed to.
pub fn raise_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(soft, hard)| if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) });
    if let Err(error) = raised {
        tracing::info!(%error, "the limit of open files stays as it is");
    }
}

/// Refuses a mount that would leave too few descriptors for what is mounted: that could not even be unmounted.
pub(super) fn refuse_without_descriptors() -> Result<(), super::error::NodeError> {
    use nix::sys::resource::{Resource, getrlimit};
    let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return Ok(());
    };
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, |listed| listed.count() as u64);
    if open + DESCRIPTORS_LEFT <= limit {
        return Ok(());
    }
    Err(super::error::NodeError::Descriptors { open, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_id_stays_and_is_the_same_for_racing_processes() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place::open(&dir.path().join("a/b")).expect("opens");
        let ids: Vec<NodeId> = std::thread::scope(|scope| {
            let running: Vec<_> = (0..8).map(|_| scope.spawn(|| place.node_id().expect("an id"))).collect();
            running.into_iter().map(|thread| thread.join().expect("ends")).collect()
        });
        assert!(ids.windows(2).all(|pair| pair[0] == pair[1]), "{ids:?}");
        assert_eq!(place.node_id().ok(), ids.first().copied());
    }

    #[test]
    fn a_damaged_node_id_is_refused_and_not_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place::open(dir.path()).expect("opens");
        fs::write(dir.path().join("node-id"), "garbage").expect("writes");
        assert!(matches!(place.node_id(), Err(PlaceError::NodeId { .. })));
    }

    #[test]
    fn one_daemon_at_a_time_has_the_lock() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place::open(dir.path()).expect("opens");
        let first = place.take_daemon_lock().expect("locks").expect("is free");
        assert!(place.daemon_lives());
        assert_eq!(place.daemon_pid(), i32::try_from(std::process::id()).ok());
        assert!(place.take_daemon_lock().expect("asks").is_none());
        drop(first);
        assert!(!place.daemon_lives());
        assert!(place.take_daemon_lock().expect("locks").is_some());
    }

    #[test]
    fn the_tail_of_a_log_is_its_last_lines_since_a_position() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place::open(dir.path()).expect("opens");
        fs::write(place.log(), "old\none\ntwo\nthree\n").expect("writes");
        assert_eq!(place.log_tail(4, 2), "two\nthree");
        assert_eq!(place.log_tail(4, 9), "one\ntwo\nthree");
        assert_eq!(place.log_tail(999, 9), "");
    }
}
