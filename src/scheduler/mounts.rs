//! Mounts that jobs share: one for each commit that jobs with GPUs of one user read. Users have mounts of their own,
//! for the daemon shows a dataset that not everybody may mount to one user only.
//!
//! Each attempt has the daemon asked before it starts, also where the commit is mounted already: it may be gone, or its
//! user may not read it any more.
//! Mounting and unmounting may take long, so each runs on a thread of its own and tells its end to the
//! scheduler's thread. Which commits are needed follows from the records; so after a crash the mounts are
//! asked for again, and the daemon says that they are there.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::disk;
use super::job::Submitter;
use super::lake_side::{DataError, LakeSide, Need};
use super::store::{MountOf, Store};

/// How often a mount is tried before its job goes back to the queue, each time after twice the time.
const TRIES: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// When an unmount that failed (somebody has a file open) is tried again.
const UMOUNT_PAUSE: Duration = Duration::from_secs(10);
/// Commits that wait to be brought near; more are let go, as that only helps.
const WARMS_MAX: usize = 256;

/// An attempt of a job: who asks for a mount.
pub type Asker = (Uuid, u32);

/// Where a mount is to be, and for whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPlace {
    pub dir: PathBuf,
    /// None: the scheduler's own user.
    pub user: Option<Submitter>,
}

/// A commit that is to be brought near.
#[derive(Debug)]
struct Warm {
    dataset: String,
    commit: String,
    user: Option<Submitter>,
}

/// What a thread tells.
#[derive(Debug)]
pub struct MountEnd {
    of: MountOf,
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
    slots: HashMap<MountOf, Slot>,
    /// Those that asked while a mount was being made: the next call is for all of them.
    waiting: HashMap<MountOf, BTreeSet<Asker>>,
    warms: SyncSender<Warm>,
}

impl Mounts {
    /// Begins with nothing mounted: what is, is found when it is asked for, or left over.
    pub(super) fn new(lake: Arc<dyn LakeSide>, ends: Sender<MountEnd>) -> Self {
        let (warms, asked) = sync_channel::<Warm>(WARMS_MAX);
        let warmer = Arc::clone(&lake);
        let begun = std::thread::Builder::new().name("warm".to_owned()).spawn(move || {
            for Warm { dataset, commit, user } in asked {
                let permitted = user.map_or(Ok(()), |user| warmer.permit(&dataset, Need::Read, user));
                if let Err(error) = permitted.and_then(|()| warmer.warm(&dataset, &commit)) {
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
    pub(super) fn want(&mut self, dataset: &str, of: &MountOf, place: MountPlace, asker: Asker) -> MountSight {
        match self.slots.get(of) {
            Some(Slot::Ready { askers }) if askers.contains(&asker) => return MountSight::Ready,
            Some(Slot::Failed { askers, why, is_final }) if askers.contains(&asker) => {
                return if *is_final { MountSight::Failed(why.clone()) } else { MountSight::Unready(why.clone()) };
            }
            Some(Slot::Mounting { .. } | Slot::Leaving) => {
                self.waiting.entry(of.clone()).or_default().insert(asker);
                return MountSight::Wait;
            }
            Some(Slot::Ready { .. } | Slot::Failed { .. } | Slot::Unknown { .. }) | None => {}
        }
        let mut askers = self.waiting.remove(of).unwrap_or_default();
        askers.insert(asker);
        if let Some(Slot::Ready { askers: before }) = self.slots.remove(of) {
            askers.extend(before);
        }
        self.slots.insert(of.clone(), Slot::Mounting { askers });
        let (lake, dataset) = (Arc::clone(&self.lake), dataset.to_owned());
        let commit = of.commit.clone();
        self.in_background(of, move || {
            let result = mount(lake.as_ref(), &dataset, &commit, &place);
            let is_final = result.as_ref().is_err_and(|error| lake.is_final(error));
            Done::Mounted { result, is_final }
        });
        MountSight::Wait
    }

    /// Says why a commit can't be mounted, or None.
    pub(super) fn problem(&self, of: &MountOf) -> Option<&str> {
        match self.slots.get(of) {
            Some(Slot::Failed { why, .. }) => Some(why),
            _ => None,
        }
    }

    /// Says whether a commit is being mounted.
    pub(super) fn is_mounting(&self, of: &MountOf) -> bool {
        matches!(self.slots.get(of), Some(Slot::Mounting { .. }))
    }

    /// Begins to unmount what no job needs any more.
    pub(super) fn keep_only(&mut self, needed: &BTreeSet<MountOf>, store: &Store) {
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
        let idle = self.slots.iter().filter(|(of, slot)| !needed.contains(*of) && is_idle(slot));
        let idle: Vec<MountOf> = idle.map(|(of, _)| of.clone()).collect();
        // A failure is remembered as long as somebody waits for it.
        self.slots.retain(|of, slot| needed.contains(of) || !matches!(slot, Slot::Failed { .. }));
        self.waiting.retain(|of, _| needed.contains(of));
        for of in idle {
            let (lake, dir) = (Arc::clone(&self.lake), store.mount(&of));
            self.slots.insert(of.clone(), Slot::Leaving);
            self.in_background(&of, move || Done::Unmounted(unmount(lake.as_ref(), &dir)));
        }
    }

    /// Begins to bring a commit near.
    pub(super) fn warm(&self, dataset: &str, commit: &str, user: Option<Submitter>) {
        let asked = Warm { dataset: dataset.to_owned(), commit: commit.to_owned(), user };
        if self.warms.try_send(asked).is_err() {
            tracing::warn!(dataset, commit, "too many commits wait to be brought near: this one is not");
        }
    }

    fn in_background(&self, of: &MountOf, work: impl FnOnce() -> Done + Send + 'static) {
        let (ends, named) = (self.ends.clone(), of.clone());
        let begun = std::thread::Builder::new().name("mounting".to_owned()).spawn(move || {
            let done = work();
            // The scheduler may be gone by now; the next one asks again.
            let _ = ends.send(MountEnd { of: named, done });
        });
        if let Err(error) = begun {
            let done = Done::Mounted { result: Err(error.into()), is_final: false };
            let _ = self.ends.send(MountEnd { of: of.clone(), done });
        }
    }

    /// Takes in what a thread told.
    pub fn ended(&mut self, end: MountEnd) {
        let askers = match self.slots.remove(&end.of) {
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
                tracing::warn!(%error, commit = end.of.commit, "could not be unmounted yet");
                Slot::Unknown { leave_at: Instant::now().checked_add(UMOUNT_PAUSE) }
            }
        };
        self.slots.insert(end.of, slot);
    }
}

fn unmount(lake: &dyn LakeSide, dir: &std::path::Path) -> Result<(), DataError> {
    lake.umount(dir)?;
    match std::fs::remove_dir(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn mount(lake: &dyn LakeSide, dataset: &str, commit: &str, place: &MountPlace) -> Result<(), DataError> {
    let MountPlace { dir, user } = place;
    // Others get through to what their jobs were given, and nobody to what the scheduler's own user's were.
    let mode = if user.is_some() { 0o711 } else { 0o700 };
    disk::make_dir(dir.parent().unwrap_or(dir), mode)?;
    let mut pause = FIRST_PAUSE;
    for _ in 1..TRIES {
        match lake.mount(dataset, commit, dir, *user) {
            Ok(()) => return Ok(()),
            Err(error) if lake.is_final(&error) => return Err(error),
            Err(error) => tracing::warn!(%error, dataset, commit, "could not be mounted; trying again"),
        }
        std::thread::sleep(pause);
        pause = pause.saturating_mul(2);
    }
    lake.mount(dataset, commit, dir, *user)
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
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::{Receiver, channel};

    use std::path::Path;

    use super::super::lake_side::NewCommit;
    use super::*;

    /// A lake that counts what it is asked, has no commit `gone`, and lets nobody do anything with `secret`.
    #[derive(Debug, Default)]
    pub struct Counted {
        mounts: AtomicU32,
        pub warmed: parking_lot::Mutex<Vec<String>>,
    }

    impl LakeSide for Counted {
        fn permit(&self, dataset: &str, _: Need, user: Submitter) -> Result<(), DataError> {
            if dataset == "secret" { Err(format!("user {} may not", user.uid).into()) } else { Ok(()) }
        }

        fn mount(&self, _: &str, commit: &str, _: &Path, _: Option<Submitter>) -> Result<(), DataError> {
            self.mounts.fetch_add(1, Ordering::Relaxed);
            if commit == "gone" { Err("there is no such commit".into()) } else { Ok(()) }
        }

        fn is_final(&self, error: &DataError) -> bool {
            ["no such commit", "may not"].iter().any(|why| error.to_string().contains(why))
        }

        fn umount(&self, _: &Path) -> Result<(), DataError> {
            Err("somebody has a file open".into())
        }

        fn warm(&self, _: &str, commit: &str) -> Result<(), DataError> {
            self.warmed.lock().push(commit.to_owned());
            Ok(())
        }

        fn push(&self, _: &NewCommit) -> Vec<String> {
            Vec::new()
        }
    }

    fn rig() -> (Mounts, Arc<Counted>, Receiver<MountEnd>) {
        let lake = Arc::new(Counted::default());
        let (ends, told) = channel();
        (Mounts::new(Arc::clone(&lake) as Arc<dyn LakeSide>, ends), lake, told)
    }

    fn of(uid: u32, commit: &str) -> MountOf {
        MountOf { uid: Some(uid), commit: commit.to_owned() }
    }

    fn place(dir: &Path) -> MountPlace {
        MountPlace { dir: dir.join("mounts/1/c1"), user: None }
    }

    fn asker(number: u32) -> Asker {
        (Uuid::nil(), number)
    }

    #[test]
    fn each_attempt_has_the_daemon_asked_and_those_that_ask_meanwhile_share_one_call() {
        let (mut mounts, lake, told) = rig();
        let dir = tempfile::tempdir().expect("a directory");
        let want = |mounts: &mut Mounts, number| mounts.want("xray", &of(1, "c1"), place(dir.path()), asker(number));
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
        // Another user's job is not shown what was mounted for this one's.
        assert_eq!(mounts.want("xray", &of(2, "c1"), place(dir.path()), asker(4)), MountSight::Wait);
        mounts.ended(told.recv().expect("is told"));
        assert_eq!(lake.mounts.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_commit_that_is_gone_fails_for_good_and_without_another_try() {
        let (mut mounts, lake, told) = rig();
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(mounts.want("xray", &of(1, "gone"), place(dir.path()), asker(1)), MountSight::Wait);
        mounts.ended(told.recv().expect("is told"));
        let sight = mounts.want("xray", &of(1, "gone"), place(dir.path()), asker(1));
        assert_eq!(sight, MountSight::Failed("there is no such commit".to_owned()));
        assert_eq!(lake.mounts.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn what_could_not_be_unmounted_is_asked_for_again() {
        let (mut mounts, lake, told) = rig();
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("opens");
        let at = || MountPlace { dir: store.mount(&of(1, "c1")), user: None };
        assert_eq!(mounts.want("xray", &of(1, "c1"), at(), asker(1)), MountSight::Wait);
        mounts.ended(told.recv().expect("is told"));
        mounts.keep_only(&BTreeSet::new(), &store);
        mounts.ended(told.recv().expect("is told"));
        assert_eq!(mounts.want("xray", &of(1, "c1"), at(), asker(2)), MountSight::Wait);
        mounts.ended(told.recv().expect("is told"));
        assert_eq!(mounts.want("xray", &of(1, "c1"), at(), asker(2)), MountSight::Ready);
        assert_eq!(lake.mounts.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn what_an_earlier_scheduler_mounted_for_everybody_is_found_beside_the_mounts_of_users() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("opens");
        let old = MountOf { uid: None, commit: "c".repeat(64) };
        for of in [&old, &of(1000, "c1")] {
            std::fs::create_dir_all(store.mount(of)).expect("makes");
        }
        let found: BTreeSet<MountOf> = store.mounts().into_iter().collect();
        assert_eq!(found, BTreeSet::from([old, of(1000, "c1")]));
    }
}
