//! The kernel tells when a task of a running job ended, so that nobody has to look at all of them all the time.
//!
//! A supervisor renames `exit.json` into the task's directory last; that is what is waited for. Where the
//! kernel watches no more directories, a job is not watched and is looked at in each turn instead.

use std::collections::HashMap;
use std::sync::Arc;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use parking_lot::Mutex;
use uuid::Uuid;

use super::task::TaskDir;

/// What the thread knows of a directory.
type Known = Arc<Mutex<HashMap<WatchDescriptor, Uuid>>>;

/// The jobs that are watched.
#[derive(Debug, Default)]
pub(super) struct Watch {
    inotify: Option<Arc<Inotify>>,
    known: Known,
    jobs: HashMap<Uuid, Vec<WatchDescriptor>>,
}

impl Watch {
    /// Begins to watch; `tell` is called from a thread of its own with the job of which something ended, or with
    /// None where so much happened that the kernel has lost count.
    pub(super) fn start(tell: impl Fn(Option<Uuid>) + Send + 'static) -> Self {
        let Ok(inotify) = Inotify::init(InitFlags::IN_CLOEXEC) else {
            tracing::warn!("the kernel watches no directories here: running jobs are looked at all the time");
            return Self::default();
        };
        let watch = Self { inotify: Some(Arc::new(inotify)), ..Self::default() };
        let (inotify, known) = (watch.inotify.clone(), Arc::clone(&watch.known));
        let reading = std::thread::Builder::new().name("watch".to_owned()).spawn(move || {
            while let Some(Ok(events)) = inotify.as_ref().map(|inotify| inotify.read_events()) {
                for event in events {
                    let lost = event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                    let job = known.lock().get(&event.wd).copied();
                    if lost || job.is_some() {
                        tell(job);
                    }
                }
            }
        });
        if reading.is_ok() { watch } else { Self::default() }
    }

    /// Says whether a job is watched.
    pub(super) fn has(&self, job: &Uuid) -> bool {
        self.jobs.contains_key(job)
    }

    /// Begins to watch a job, all of its tasks or none.
    pub(super) fn add(&mut self, job: Uuid, tasks: &[TaskDir]) {
        let Some(inotify) = &self.inotify else {
            return;
        };
        let mut watched = Vec::new();
        for task in tasks {
            // Known before the first event can come: the thread waits for the lock.
            let mut known = self.known.lock();
            match inotify.add_watch(task.path(), AddWatchFlags::IN_MOVED_TO) {
                Ok(descriptor) => {
                    known.insert(descriptor, job);
                    watched.push(descriptor);
                }
                Err(error) => {
                    tracing::debug!(%error, task = %task.path().display(), "not watched");
                    drop(known);
                    self.drop_all(&watched);
                    return;
                }
            }
        }
        self.jobs.insert(job, watched);
    }

    /// Watches a job no more.
    pub(super) fn remove(&mut self, job: &Uuid) {
        if let Some(watched) = self.jobs.remove(job) {
            self.drop_all(&watched);
        }
    }

    fn drop_all(&self, watched: &[WatchDescriptor]) {
        let mut known = self.known.lock();
        for descriptor in watched {
            known.remove(descriptor);
            // Fails where the directory is gone: then the kernel has dropped it.
            let _ = self.inotify.as_ref().map(|inotify| inotify.rm_watch(*descriptor));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::super::disk;
    use super::*;

    #[test]
    fn the_end_of_a_task_is_told_and_not_any_more_once_the_job_is_dropped() {
        let dir = tempfile::tempdir().expect("a directory");
        let (tell, told) = channel();
        let mut watch = Watch::start(move |job| {
            let _ = tell.send(job);
        });
        let task = |name: &str| {
            let task = TaskDir::at(&dir.path().join(name));
            disk::make_dir(task.path(), 0o700).expect("makes");
            task
        };
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        watch.add(one, &[task("a"), task("b")]);
        watch.add(other, &[task("c")]);
        assert!(watch.has(&one) && watch.has(&other));
        disk::write_json(&task("b").exit_file(), &1).expect("writes");
        assert_eq!(told.recv().expect("is told"), Some(one));
        watch.remove(&one);
        assert!(!watch.has(&one));
        disk::write_json(&task("a").exit_file(), &1).expect("writes");
        disk::write_json(&task("c").exit_file(), &1).expect("writes");
        assert_eq!(told.recv().expect("is told"), Some(other), "nothing of the first");
        watch.add(one, &[task("a"), TaskDir::at(&dir.path().join("none"))]);
        assert!(!watch.has(&one), "all or none");
    }
}
