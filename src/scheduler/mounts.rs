//! Mounts that jobs share: one for each commit that a job with GPUs reads.
//!
//! Mounting and unmounting may take long, so each runs on a thread of its own and tells its end to the
//! scheduler's thread. Which commits are needed follows from the records; so after a crash the mounts are
//! asked for again, and the daemon says that they are there.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::lake_side::{DataError, LakeSide};
use super::store::Store;

/// How often a mount is tried, each time after twice the time: an hour of a lake that is down is no reason to
/// fail a job, but a commit that is gone is.
const TRIES: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// When an unmount that failed (somebody has a file open) is tried again.
const UMOUNT_PAUSE: Duration = Duration::from_secs(10);

/// What a thread tells.
#[derive(Debug)]
pub struct MountEnd {
    commit: String,
    result: Result<(), DataError>,
    mounted: bool,
}

/// How a mount stands.
#[derive(Debug)]
enum Slot {
    Mounting,
    Ready { leave_at: Option<Instant> },
    Failed { why: String },
    Leaving,
}

/// What a job that starts sees of its mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountSight {
    Wait,
    Ready,
    Failed(String),
}

/// The mounts.
#[derive(Debug)]
pub struct Mounts {
    lake: Arc<dyn LakeSide>,
    ends: Sender<MountEnd>,
    slots: HashMap<String, Slot>,
}

impl Mounts {
    /// Begins with nothing mounted: what is, is found when it is asked for, or left over.
    pub(super) fn new(lake: Arc<dyn LakeSide>, ends: Sender<MountEnd>) -> Self {
        Self { lake, ends, slots: HashMap::new() }
    }

    /// Says whether a commit is mounted; begins to mount it where nobody has.
    pub(super) fn want(&mut self, dataset: &str, commit: &str, dir: PathBuf) -> MountSight {
        match self.slots.get(commit) {
            Some(Slot::Ready { .. }) => MountSight::Ready,
            Some(Slot::Failed { why }) => MountSight::Failed(why.clone()),
            Some(Slot::Mounting | Slot::Leaving) => MountSight::Wait,
            None => {
                self.slots.insert(commit.to_owned(), Slot::Mounting);
                let (lake, dataset) = (Arc::clone(&self.lake), dataset.to_owned());
                let named = commit.to_owned();
                self.in_background(commit, true, move || mount(lake.as_ref(), &dataset, &named, &dir));
                MountSight::Wait
            }
        }
    }

    /// Says why a commit can't be mounted, or None.
    pub(super) fn problem(&self, commit: &str) -> Option<&str> {
        match self.slots.get(commit) {
            Some(Slot::Failed { why }) => Some(why),
            _ => None,
        }
    }

    /// Says whether a commit is being mounted.
    pub(super) fn is_mounting(&self, commit: &str) -> bool {
        matches!(self.slots.get(commit), Some(Slot::Mounting))
    }

    /// Begins to unmount what no job needs any more.
    pub(super) fn keep_only(&mut self, needed: &BTreeSet<String>, store: &Store) {
        for left in store.mounts() {
            // Nobody of this process mounted it: an earlier one did.
            if !needed.contains(&left) {
                self.slots.entry(left).or_insert(Slot::Ready { leave_at: None });
            }
        }
        let now = Instant::now();
        let idle: Vec<String> = self
            .slots
            .iter()
            .filter(|(commit, slot)| match slot {
                Slot::Ready { leave_at } => !needed.contains(*commit) && leave_at.is_none_or(|at| at <= now),
                _ => false,
            })
            .map(|(commit, _)| commit.clone())
            .collect();
        // A failure is remembered as long as somebody waits for it.
        self.slots.retain(|commit, slot| needed.contains(commit) || !matches!(slot, Slot::Failed { .. }));
        for commit in idle {
            let (lake, dir) = (Arc::clone(&self.lake), store.mount(&commit));
            self.slots.insert(commit.clone(), Slot::Leaving);
            self.in_background(&commit, false, move || {
                lake.umount(&dir)?;
                match std::fs::remove_dir(&dir) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
                    _ => Ok(()),
                }
            });
        }
    }

    /// Begins to bring a commit near.
    pub(super) fn warm(&self, dataset: &str, commit: &str) {
        let (lake, dataset, commit) = (Arc::clone(&self.lake), dataset.to_owned(), commit.to_owned());
        let begun = std::thread::Builder::new().name("warm".to_owned()).spawn(move || {
            if let Err(error) = lake.warm(&dataset, &commit) {
                tracing::warn!(%error, dataset, commit, "a waiting job's commit can't be brought near");
            }
        });
        if let Err(error) = begun {
            tracing::warn!(%error, "no thread to warm a commit");
        }
    }

    fn in_background(
        &self,
        commit: &str,
        mounted: bool,
        work: impl FnOnce() -> Result<(), DataError> + Send + 'static,
    ) {
        let (ends, commit) = (self.ends.clone(), commit.to_owned());
        let named = commit.clone();
        let begun = std::thread::Builder::new().name("mounting".to_owned()).spawn(move || {
            let result = work();
            // The scheduler may be gone by now; the next one asks again.
            let _ = ends.send(MountEnd { commit: named, result, mounted });
        });
        if let Err(error) = begun {
            let _ = self.ends.send(MountEnd { commit, result: Err(error.into()), mounted });
        }
    }

    /// Takes in what a thread told.
    pub fn ended(&mut self, end: MountEnd) {
        let slot = match (end.mounted, end.result) {
            (true, Ok(())) => Some(Slot::Ready { leave_at: None }),
            (true, Err(error)) => Some(Slot::Failed { why: told(error.as_ref()) }),
            (false, Ok(())) => None,
            (false, Err(error)) => {
                tracing::warn!(%error, commit = end.commit, "could not be unmounted yet");
                Some(Slot::Ready { leave_at: Instant::now().checked_add(UMOUNT_PAUSE) })
            }
        };
        match slot {
            Some(slot) => self.slots.insert(end.commit, slot),
            None => self.slots.remove(&end.commit),
        };
    }
}

fn mount(lake: &dyn LakeSide, dataset: &str, commit: &str, dir: &std::path::Path) -> Result<(), DataError> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..TRIES {
        match lake.mount(dataset, commit, dir) {
            Ok(()) => return Ok(()),
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
