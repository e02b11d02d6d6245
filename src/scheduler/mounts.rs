//! Mounts that jobs share: one for each commit that a job with GPUs reads.
//!
//! Each attempt has the daemon asked before it starts, also where the commit is mounted already.
//! Mounting and unmounting may take long, so each runs on a thread of its own and tells its end to the
//! scheduler's thread. Which commits are needed follows from the records; so after a crash the mounts are
//! asked for again, and the daemon says that they are there.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::lake_side::{DataError, LakeSide};
use super::store::Store;

/// How often a mount is tried before its job goes back to the queue, each time after twice the time.
const TRIES: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// When an unmount that failed (somebody has a file open) is tried again.
const UMOUNT_PAUSE: Duration = Duration::from_secs(10);
/// Commits that wait to be brought near; more are let go, as that only helps.
const WARMS_MAX: usize = 256;

/// An attempt of a job: who asks for a mount.
pub type Asker = (Uuid, u32);

/// What a thread tells.
#[derive(Debug)]
pub struct MountEnd {
    commit: String,
    done: Done,
}

#[derive(Debug)]
enum Done {
    Mounted { result: Result<(), DataError>, is_final: bool },
    Unmounted(Result<(), DataError>),
}

/// How a mount stands. `askers`: the attempts whose asking the daemon has answered, or is answering.
#[derive(Debug)]
enum Slot {
    Mounting {
        askers: BTreeSet<Asker>,
    },
    Ready {
        askers: BTreeSet<Asker>,
    },
    Failed {
        askers: BTreeSet<Asker>,
        why: String,
        is_final: bool,
    },
    Leaving,
    /// Somebody else's, an earlier scheduler's, or one that could not be unmounted: nobody knows.
    Unknown {
        leave_at: Option<Instant>,
    },
}

/// What a job that starts sees of its mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountSight {
    Wait,
    Ready,
    /// Not now.
    Unready(String),
    /// Not ever.
    Failed(String),
}

/// The mounts.
#[derive(Debug)]
pub struct Mounts {
    lake: Arc<dyn LakeSide>,
    ends: Sender<MountEnd>,
    slots: HashMap<String, Slot>,
    /// Those that asked while a mount was being made: the next call is for all of them.
    waiting: HashMap<String, BTreeSet<Asker>>,
    warms: SyncSender<(String, String)>,
}

impl Mounts {
    /// Begins with nothing mounted: what is, is found when it is asked for, or left over.
    pub(super) fn new(lake: Arc<dyn LakeSide>, ends: Sender<MountEnd>) -> Self {
        let (warms, asked) = sync_channel::<(String, String)>(WARMS_MAX);
        let warmer = Arc::clone(&lake);
        let begun = std::thread::Builder::new().name("warm".to_owned()).spawn(move || {
            for (dataset, commit) in asked {
                if let Err(error) = warmer.warm(&dataset, &commit) {
                    tracing::warn!(%error, dataset, commit, "a waiting job's commit can't be brought near");
                }
            }
        });
        if let Err(error) = begun {
            tracing::warn!(%error, "no thread to bring commits near");
        }
        Self { lake, ends, slots: HashMap::new(), waiting: HashMap::new(), warms }
    }

    /// Says whether a commit is mounted for this attempt. The daemon is asked for each one: what was mounted
    /// for another may be gone by now, and an empty directory would look like a dataset without files.
    pub(super) fn want(&mut self, dataset: &str, commit: &str, dir: PathBuf, asker: Asker) -> MountSight {
        match self.slots.get(commit) {
            Some(Slot::Ready { askers }) if askers.contains(&asker) => return MountSight::Ready,
            Some(Slot::Failed { askers, why, is_final }) if askers.contains(&asker) => {
                return if *is_final { MountSight::Failed(why.clone()) } else { MountSight::Unready(why.clone()) };
            }
            Some(Slot::Mounting { .. } | Slot::Leaving) => {
                self.waiting.entry(commit.to_owned()).or_default().insert(asker);
                return MountSight::Wait;
            }
            Some(Slot::Ready { .. } | Slot::Failed { .. } | Slot::Unknown { .. }) | None => {}
        }
        let mut askers = self.waiting.remove(commit).unwrap_or_default();
        askers.insert(asker);
        if let Some(Slot::Ready { askers: before }) = self.slots.remove(commit) {
            askers.extend(before);
        }
        self.slots.insert(commit.to_owned(), Slot::Mounting { askers });
        let (lake, dataset) = (Arc::clone(&self.lake), dataset.to_owned());
        let named = commit.to_owned();
        self.in_background(commit, move || {
            let result = mount(lake.as_ref(), &dataset, &named, &dir);
            let is_final = result.as_ref().is_err_and(|error| lake.is_final(error));
            Done::Mounted { result, is_final }
        });
        MountSight::Wait
    }

    /// Says why a commit can't be mounted, or None.
    pub(super) fn problem(&self, commit: &str) -> Option<&str> {
        match self.slots.get(commit) {
            Some(Slot::Failed { why, .. }) => Some(why),
            _ => None,
        }
    }

    /// Says whether a commit is being mounted.
    pub(super) fn is_mounting(&self, commit: &str) -> bool {
        matches!(self.slots.get(commit), Some(Slot::Mounting { .. }))
    }

    /// Begins to unmount what no job needs any more.
    pub(super) fn keep_only(&mut self, needed: &BTreeSet<String>, store: &Store) {
        for left in store.mounts() {
            // Nobody of this process mounted it: an earlier one did.
            if !needed.contains(&left) {
                self.slots.entry(left).or_insert(Slot::Unknown { leave_at: None });
            }
        }
        let now = Instant::now();
        let is_idle = |slot: &Slot| match slot {
            Slot::Ready { .. } => true,
            Slot::Unknown { leave_at } => leave_at.is_none_or(|at| at <= now),
            Slot::Mounting { .. } | Slot::Failed { .. } | Slot::Leaving => false,
        };
        let idle = self.slots.iter().filter(|(commit, slot)| !needed.contains(*commit) && is_idle(slot));
        let idle: Vec<String> = idle.map(|(commit, _)| commit.clone()).collect();
        // A failure is remembered as long as somebody waits for it.
        self.slots.retain(|commit, slot| needed.contains(commit) || !matches!(slot, Slot::Failed { .. }));
        self.waiting.retain(|commit, _| needed.contains(commit));
        for commit in idle {
            let (lake, dir) = (Arc::clone(&self.lake), store.mount(&commit));
            self.slots.insert(commit.clone(), Slot::Leaving);
            self.in_background(&commit, move || Done::Unmounted(unmount(lake.as_ref(), &dir)));
        }
    }

    /// Begins to bring a commit near.
    pub(super) fn warm(&self, dataset: &str, commit: &str) {
        if self.warms.try_send((dataset.to_owned(), commit.to_owned())).is_err() {
            tracing::warn!(dataset, commit, "too many commits wait to be brought near: this one is not");
        }
    }

    fn in_background(&self, commit: &str, work: impl FnOnce() -> Done + Send + 'static) {
        let (ends, named) = (self.ends.clone(), commit.to_owned());
        let begun = std::thread::Builder::new().name("mounting".to_owned()).spawn(move || {
            let done = work();
            // The scheduler may be gone by now; the next one asks again.
            let _ = ends.send(MountEnd { commit: named, done });
        });
        if let Err(error) = begun {
            let done = Done::Mounted { result: Err(error.into()), is_final: false };
            let _ = self.ends.send(MountEnd { commit: commit.to_owned(), done });
        }
    }

    /// Takes in what a thread told.
    pub fn ended(&mut self, end: MountEnd) {
        let askers = match self.slots.remove(&end.commit) {
            Some(Slot::Mounting { askers }) => askers,
            _ => BTreeSet::new(),
        };
        let slot = match end.done {
            Done::Mounted { result: Ok(()), .. } => Slot::Ready { askers },
            Done::Mounted { result: Err(error), is_final } => {
                Slot::Failed { askers, why: told(error.as_ref()), is_final }
            }
            Done::Unmounted(Ok(())) => return,
            Done::Unmounted(Err(error)) => {
                tracing::warn!(%error, commit = end.commit, "could not be unmounted yet");
                Slot::Unknown { leave_at: Instant::now().checked_add(UMOUNT_PAUSE) }
            }
        };
        self.slots.insert(end.commit, slot);
    }
}

fn unmount(lake: &dyn LakeSide, dir: &Path) -> Result<(), DataError> {
    lake.umount(dir)?;
    match std::fs::remove_dir(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn mount(lake: &dyn LakeSide, dataset: &str, commit: &str, dir: &Path) -> Result<(), DataError> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..TRIES {
        match lake.mount(dataset, commit, dir) {
            Ok(()) => return Ok(()),
            Err(error) if lake.is_final(&error) => return Err(error),
            Err(error) => tracing::warn!(%error, dataset, commit, "could not be mounted; trying again"),
        }
        std::thread::sleep(pause);
        pause = pause.saturating_mul(2);
    }
    lake.mount(dataset, commit, dir)
}

/// Says an error with its causes on one line.
fn told(error: &(dyn std::error::Error + Send + Sync)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let line = next.to_string();
        if !text.contains(&line) {
            text.push_str(": ");
            text.push_str(&line);
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::{Receiver, channel};

    use super::super::lake_side::NewCommit;
    use super::*;

    /// A lake that counts what it is asked, and has no commit `gone`.
    #[derive(Debug, Default)]
    pub struct Counted {
        mounts: AtomicU32,
        pub warmed: parking_lot::Mutex<Vec<String>>,
    }

    impl LakeSide for Counted {
        fn mount(&self, _: &str, commit: &str, _: &Path) -> Result<(), DataError> {
            self.mounts.fetch_add(1, Ordering::Relaxed);
            if commit == "gone" { Err("there is no such commit".into()) } else { Ok(()) }
        }

        fn is_final(&self, error: &DataError) -> bool {
            error.to_string().contains("no such commit")
        }

        fn umount(&self, _: &Path) -> Result<(), DataError> {
            Err("somebody has a file open".into())
        }

        fn warm(&self, _: &str, commit: &str) -> Result<(), DataError> {
            self.warmed.lock().push(commit.to_owned());
            Ok(())
        }

        fn push(&self, _: &NewCommit) -> (Vec<String>, BTreeMap<String, String>) {
            (Vec::new(), BTreeMap::new())
        }
    }

    fn rig() -> (Mounts, Arc<Counted>, Receiver<MountEnd>) {
        let lake = Arc::new(Counted::default());
        let (ends, told) = channel();
        (Mounts::new(Arc::clone(&lake) as Arc<dyn LakeSide>, ends), lake, told)
    }

    fn asker(number: u32) -> Asker {
        (Uuid::nil(), number)
    }

    #[test]
    fn each_attempt_has_the_daemon_asked_and_those_that_ask_meanwhile_share_one_call() {
        let (mut mounts, lake, told) = rig();
        let want = |mounts: &mut Mounts, number| mounts.want("xray", "c1", PathBuf::new(), asker(number));
        assert_eq!(want(&mut mounts, 1), MountSight::Wait);
        assert_eq!((want(&mut mounts, 2), want(&mut mounts, 3)), (MountSight::Wait, MountSight::Wait));
        mounts.ended(told.recv().expect("is told"));
        assert_eq!(want(&mut mounts, 1), MountSight::Ready);
        assert_eq!(want(&mut mounts, 2), MountSight::Wait, "it is not known whether it is still there");
        mounts.ended(told.recv().expect("is told"));
        assert_eq!(
            [want(&mut mounts, 1), want(&mut mounts, 2), want(&mut mounts, 3)],
            [const { MountSight::Ready }; 3]
        );
        assert_eq!(lake.mounts.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_commit_that_is_gone_fails_for_good_and_without_another_try() {
        let (mut mounts, lake, told) = rig();
        assert_eq!(mounts.want("xray", "gone", PathBuf::new(), asker(1)), MountSight::Wait);
        mounts.ended(told.recv().expect("is told"));
        let sight = mounts.want("xray", "gone", PathBuf::new(), asker(1));
        assert_eq!(sight, MountSight::Failed("there is no such commit".to_owned()));
        assert_eq!(lake.mounts.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn what_could_not_be_unmounted_is_asked_for_again() {
        let (mut mounts, lake, told) = rig();
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("opens");
        assert_eq!(mounts.want("xray", "c1", store.mount("c1"), asker(1)), MountSight::Wait);
        mounts.ended(told.recv().expect("is told"));
        mounts.keep_only(&BTreeSet::new(), &store);
        mounts.ended(told.recv().expect("is told"));
        assert_eq!(mounts.want("xray", "c1", store.mount("c1"), asker(2)), MountSight::Wait);
        mounts.ended(told.recv().expect("is told"));
        assert_eq!(mounts.want("xray", "c1", store.mount("c1"), asker(2)), MountSight::Ready);
        assert_eq!(lake.mounts.load(Ordering::Relaxed), 2);
    }
}
