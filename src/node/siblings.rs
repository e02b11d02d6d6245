//! Proof that another process of this node has ended: a lock that only the living hold.
//!
//! ```text
//! <state>/instances/<instance>    locked by its process; two lines: boot id, machine id
//! ```
//!
//! The kernel gives a dead process' locks back, however it died, so there are no pids and no reuse of
//! them, and it works across pid namespaces. The file gets its name only when it is locked: nobody
//! sees a living instance unlocked. `docs/formats/tier.md`, "Dead siblings".

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use crate::store::tier::{Fate, Siblings};

use super::place::{Place, PlaceError};

/// How long the file of an ended instance is kept: longer than any lease lives.
const KEPT_FOR: Duration = Duration::from_secs(3600);

/// One instance of this node, which knows the others.
#[derive(Debug)]
pub struct Instance {
    dir: PathBuf,
    id: Uuid,
    /// Locked while we live, never read.
    _lock: File,
}

impl Instance {
    /// Makes this process known under a new id.
    pub fn enter(place: &Place) -> Result<Self, PlaceError> {
        let dir = place.root().join("instances");
        let at = |source| PlaceError::Io { path: dir.clone(), doing: "note this process", source };
        fs::create_dir_all(&dir).map_err(at)?;
        let id = Uuid::new_v4();
        let mut file = tempfile::NamedTempFile::new_in(&dir).map_err(at)?;
        file.write_all(machine().as_bytes()).map_err(at)?;
        match file.as_file().try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(at(io::ErrorKind::WouldBlock.into())),
            Err(TryLockError::Error(error)) => return Err(at(error)),
        }
        let lock = file.persist(dir.join(id.simple().to_string())).map_err(|error| at(error.error))?;
        let instance = Self { dir, id, _lock: lock };
        instance.tidy();
        Ok(instance)
    }

    /// Gives its id.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Removes files of instances that ended long ago.
    fn tidy(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let age = entry.metadata().and_then(|meta| meta.modified()).map(|at| at.elapsed().unwrap_or_default());
            if age.is_ok_and(|age| age > KEPT_FOR) && is_free(&entry.path()) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.dir.join(self.id.simple().to_string()));
    }
}

impl Siblings for Instance {
    fn fate(&self, instance: &Uuid) -> Fate {
        let path = self.dir.join(instance.simple().to_string());
        let Ok(text) = fs::read_to_string(&path) else {
            return Fate::Unknown;
        };
        if *instance == self.id || !is_free(&path) {
            return Fate::Unknown;
        }
        judge(&text, &machine())
    }
}

/// Says whether nobody holds the file's lock.
fn is_free(path: &Path) -> bool {
    // A shared lock: two that look do not take each other for the owner.
    OpenOptions::new().read(true).open(path).is_ok_and(|file| file.try_lock_shared().is_ok())
}

/// Compares who wrote a file that nobody holds with who looks at it.
fn judge(then: &str, now: &str) -> Fate {
    let lines = |text: &str| -> (String, String) {
        let mut lines = text.lines().map(str::to_owned);
        (lines.next().unwrap_or_default(), lines.next().unwrap_or_default())
    };
    let ((boot_then, machine_then), (boot, machine)) = (lines(then), lines(now));
    if !boot.is_empty() && boot_then == boot {
        return Fate::Ended;
    }
    // A lock says nothing about another machine with the same directory.
    if !boot_then.is_empty() && !machine.is_empty() && machine_then == machine {
        return Fate::Rebooted;
    }
    Fate::Unknown
}

fn machine() -> String {
    let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    format!("{}\n{}\n", line("/proc/sys/kernel/random/boot_id"), line("/etc/machine-id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_lives_is_not_taken_for_dead_and_who_was_killed_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place::open(dir.path()).expect("opens");
        let (me, other) = (Instance::enter(&place).expect("enters"), Instance::enter(&place).expect("enters"));
        assert_eq!(me.fate(&other.id()), Fate::Unknown, "it lives");
        assert_eq!(me.fate(&me.id()), Fate::Unknown, "so do we");
        assert_eq!(me.fate(&Uuid::new_v4()), Fate::Unknown, "never heard of");
        // A kill gives the lock back and leaves the file.
        let path = dir.path().join("instances").join(other.id().simple().to_string());
        let left = fs::read(&path).expect("reads");
        let killed = other.id();
        drop(other);
        assert_eq!(me.fate(&killed), Fate::Unknown, "after a clean end there is nothing to take over");
        fs::write(&path, left).expect("writes");
        assert_eq!(me.fate(&killed), Fate::Ended);
    }

    #[test]
    fn a_lock_that_is_free_proves_nothing_about_another_machine() {
        assert_eq!(judge("b1\nm1\n", "b1\nm1\n"), Fate::Ended);
        assert_eq!(judge("b1\nm1\n", "b2\nm1\n"), Fate::Rebooted);
        assert_eq!(judge("b1\nm1\n", "b2\nm2\n"), Fate::Unknown);
        assert_eq!(judge("b1\n\n", "b2\n\n"), Fate::Unknown, "machines without an id");
        assert_eq!(judge("", "b2\nm1\n"), Fate::Unknown);
    }

    #[test]
    fn files_of_the_long_dead_are_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place::open(dir.path()).expect("opens");
        let old = dir.path().join("instances/old");
        fs::create_dir_all(dir.path().join("instances")).expect("makes it");
        fs::write(&old, "b\nm\n").expect("writes");
        let long_ago = std::time::SystemTime::now() - KEPT_FOR * 2;
        File::options().write(true).open(&old).and_then(|file| file.set_modified(long_ago)).expect("sets the time");
        let _me = Instance::enter(&place).expect("enters");
        assert!(!old.exists());
    }
}
