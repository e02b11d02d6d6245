//! Snapshots of jobs: what a job has made so far becomes a commit, and a job starts from such a commit.
//!
//! ```text
//! work/               where its processes run          (checkpoints)
//! out/<dataset>/      its outputs, as they are now
//! logs/<rank>         what it printed
//! job.json            what the job was: `larder job restore` submits that again
//! ```
//!
//! A snapshot is copied first, so that the job may go on writing, and pushed by a task of its own
//! (`jobs/<id>/snapshots/<number>/`). Both are done again after a crash; the push finds its commit. Starting
//! from one is the reverse: the commit is mounted, copied into `restoring/`, renamed into place, and only then
//! it is in the record that it was. `docs/formats/scheduler.md` has the order.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::core::{Caller, Core, Named, now_ms};
use super::disk::{self, DiskError};
use super::error::SchedulerError;
use super::job::{JobRecord, JobSnapshot, JobSpec, State, Stop, Submitter};
use super::lake_side::NewCommit;
use super::progress::{PUSH_USAGE, commit_of, last_line};
use super::store::{JobPlace, MountOf, Store};
use super::task::{Sight, TaskDir, TaskSpec};
use super::view::JobView;
use super::{check, copy};

/// So that `.snapshots` fits behind it in a dataset's name.
const SNAPSHOTS_BASE_LEN_MAX: usize = 63 - ".snapshots".len();
/// Snapshots that a record remembers.
const SNAPSHOTS_MAX: usize = 50;
/// How often storing one is tried, and the time before the next try, at first.
const TRIES_MAX: u32 = 6;
const PAUSE_MS: i64 = 1000;

/// `job.json` of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobFile {
    pub format: u32,
    pub id: Uuid,
    pub name: String,
    pub project: String,
    pub attempt: u32,
    pub spec: JobSpec,
}

impl JobPlace {
    fn snapshot(&self, number: u32) -> PathBuf {
        self.path().join("snapshots").join(number.to_string())
    }

    fn restoring(&self) -> PathBuf {
        self.path().join("restoring")
    }
}

/// Gives the dataset that a job's snapshots go to where none is named.
pub(super) fn default_dataset(job: &JobRecord) -> String {
    let fit = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c.to_ascii_lowercase() } else { '-' };
    let mut base: String = format!("{}-{}", job.project, job.name).chars().map(fit).collect();
    if base.len() > SNAPSHOTS_BASE_LEN_MAX {
        // Both names may be as long as a dataset's.
        base.truncate(SNAPSHOTS_BASE_LEN_MAX - 9);
        base.extend(format!("-{}", job.id.simple()).chars().take(9));
    }
    format!("{base}.snapshots")
}

impl Core {
    /// Begins a snapshot: the last one of the job that is given.
    pub fn snapshot_job(
        &mut self,
        named: &Named,
        dataset: Option<String>,
        caller: Caller,
    ) -> Result<JobView, SchedulerError> {
        let job = self.own(named, caller)?;
        if job.attempts.is_empty() {
            return Err(SchedulerError::NotRunning { name: job.name.clone(), state: job.state.word() });
        }
        if job.is_being_stored() {
            let what = format!("a snapshot of {} is being stored already", job.name);
            return Err(SchedulerError::Wrong { what });
        }
        let dataset = dataset.unwrap_or_else(|| default_dataset(job));
        check::dataset(&dataset)?;
        let number = job.snapshots.last().map_or(1, |last| last.number.saturating_add(1));
        let (begun_ms, tries, commit, error) = (now_ms(), 0, None, None);
        let begun = JobSnapshot { number, dataset, begun_ms, tries, commit, error };
        let id = job.id;
        self.change(&id, |job| {
            if job.snapshots.len() >= SNAPSHOTS_MAX {
                job.snapshots.remove(0);
            }
            job.snapshots.push(begun);
        })?;
        self.view(&id)
    }

    /// Takes the next step of a job's snapshot: it is copied, then pushed.
    pub(super) fn store_snapshot(&mut self, job: &JobRecord) -> Result<(), DiskError> {
        let Some(snapshot) = job.snapshots.last().filter(|snapshot| snapshot.is_running()) else {
            return Ok(());
        };
        let place = self.store.job(&job.id).snapshot(snapshot.number);
        if !place.join("copied").exists() {
            return self.copy_snapshot(job, place);
        }
        let task = TaskDir::at(&place.join(format!("push-{}", snapshot.tries)));
        let Some(exit) = self.run_push(&task, |core| core.snapshot_task(job, snapshot, &task))? else {
            return Ok(());
        };
        if let Some(commit) = commit_of(&task, &exit) {
            return self.end_snapshot(&job.id, place, Ok(commit));
        }
        let is_hopeless = exit.code == Some(PUSH_USAGE) && !exit.lost;
        if !is_hopeless && snapshot.tries + 1 < TRIES_MAX {
            let pause_ms = PAUSE_MS << snapshot.tries.min(16);
            return match now_ms() - exit.ended_ms < pause_ms {
                true => Ok(()),
                false => self.change_snapshot(&job.id, |snapshot| snapshot.tries += 1),
            };
        }
        let log = fs::read_to_string(task.path().join("log")).unwrap_or_default();
        self.end_snapshot(&job.id, place, Err(format!("{exit}: {}", last_line(&log))))
    }

    /// Copies on a thread; the mark `copied` says that it is whole.
    fn copy_snapshot(&mut self, job: &JobRecord, place: PathBuf) -> Result<(), DiskError> {
        match self.copies.remove(&job.id) {
            Some(copying) if !copying.is_finished() => {
                self.copies.insert(job.id, copying);
                return Ok(());
            }
            Some(copied) => {
                return match copied.join() {
                    Ok(Ok(())) => disk::make_once(&place.join("copied")).map(drop),
                    Ok(Err(error)) => self.end_snapshot(&job.id, place, Err(told(&error))),
                    Err(_) => self.end_snapshot(&job.id, place, Err("copying it ended by a panic".to_owned())),
                };
            }
            None => {}
        }
        let (own, job) = (self.store.job(&job.id), job.clone());
        let id = job.id;
        let copying =
            std::thread::Builder::new().name("snapshot".to_owned()).spawn(move || copy_out(&own, &place, &job));
        let copying = copying.map_err(disk::at(self.store.dir(), "start a thread that copies"))?;
        self.copies.insert(id, copying);
        Ok(())
    }

    fn change_snapshot(&mut self, id: &Uuid, change: impl FnOnce(&mut JobSnapshot)) -> Result<(), DiskError> {
        self.change(id, |job| {
            if let Some(snapshot) = job.snapshots.last_mut() {
                change(snapshot);
            }
        })
    }

    fn end_snapshot(&mut self, id: &Uuid, place: PathBuf, end: Result<String, String>) -> Result<(), DiskError> {
        self.change_snapshot(id, |snapshot| match end {
            Ok(commit) => snapshot.commit = Some(commit),
            Err(error) => snapshot.error = Some(error),
        })?;
        self.store.throw_away(&place)
    }

    fn snapshot_task(&self, job: &JobRecord, snapshot: &JobSnapshot, task: &TaskDir) -> Result<TaskSpec, DiskError> {
        let commit = NewCommit {
            dir: self.store.job(&job.id).snapshot(snapshot.number).join("tree"),
            message: format!("Snapshot {} of job {}/{}", snapshot.number, job.project, job.name),
            dataset: snapshot.dataset.clone(),
            ..self.commit_by(job, task)?
        };
        let marker = format!("{}.snapshot.{}.{}", job.id, snapshot.number, snapshot.tries);
        Ok(self.pushing(&commit, marker, task))
    }

    /// Removes copies of snapshots that are stored, or were given up: a crash may have come between.
    pub(super) fn clean_snapshots(store: &Store, job: &JobRecord) -> Result<(), DiskError> {
        let running = job.snapshots.last().filter(|snapshot| snapshot.is_running()).map(|one| one.number.to_string());
        let copies = fs::read_dir(store.job(&job.id).path().join("snapshots")).into_iter().flatten().flatten();
        let is_left = |name: &std::ffi::OsString| running.as_ref().is_none_or(|running| name != running.as_str());
        let mut left = copies.filter(|copy| is_left(&copy.file_name()));
        left.try_for_each(|copy| store.throw_away(&copy.path()))
    }

    /// Ends what stores a snapshot of a job that is to be forgotten. False as long as something does.
    pub(super) fn leave_snapshot(&mut self, job: &JobRecord) -> Result<bool, DiskError> {
        let Some(snapshot) = job.snapshots.last().filter(|snapshot| snapshot.is_running()) else {
            return Ok(true);
        };
        if self.copies.get(&job.id).is_some_and(|copying| !copying.is_finished()) {
            return Ok(false);
        }
        let place = self.store.job(&job.id).snapshot(snapshot.number);
        let task = TaskDir::at(&place.join(format!("push-{}", snapshot.tries)));
        if !task.path().exists() {
            return Ok(true);
        }
        let sight = task.look()?;
        match sight {
            Sight::Ended(_) => Ok(true),
            Sight::Alive { .. } => task.ask_to_stop(Duration::ZERO).map(|()| false),
            Sight::Fresh | Sight::Lost => Ok(self.close(&task, &sight)?.is_some()),
        }
    }

    /// Brings what a job starts from into its place. None as long as that lasts.
    pub(super) fn restore(&mut self, job: &JobRecord) -> Result<Option<()>, DiskError> {
        let Some(from) = job.spec.restore.as_ref().filter(|_| !job.restored) else {
            return Ok(Some(()));
        };
        match self.restorings.remove(&job.id) {
            Some(restoring) if !restoring.is_finished() => {
                self.restorings.insert(job.id, restoring);
                return Ok(None);
            }
            Some(restored) => {
                match restored.join() {
                    Ok(Ok(())) => self.change(&job.id, |job| job.restored = true)?,
                    Ok(Err(error)) => {
                        let why = format!("{} can't be restored now: {}", from.revision, told(&error));
                        self.begin_stop(&job.id, Stop::Unready { why })?;
                    }
                    Err(_) => {
                        let why = "restoring it ended by a panic".to_owned();
                        self.begin_stop(&job.id, Stop::Failed { why })?;
                    }
                }
                return Ok(None);
            }
            None => {}
        }
        let (place, mount) = (self.store.job(&job.id), self.store.mount(&MountOf::job(job, &from.commit)));
        let (owner, outputs) = (user_of(job).map(|user| (user.uid, user.gid)), job.spec.outputs.clone());
        let restoring = std::thread::Builder::new().name("restore".to_owned()).spawn(move || {
            let outputs: Vec<&str> = outputs.iter().map(|output| output.dataset.as_str()).collect();
            copy_in(&place, &mount, owner, &outputs)
        });
        let restoring = restoring.map_err(disk::at(self.store.dir(), "start a thread that restores"))?;
        self.restorings.insert(job.id, restoring);
        Ok(None)
    }

    /// Says whether a job's directory is needed by something that stores it.
    pub(super) fn is_storing(job: &JobRecord) -> bool {
        job.is_being_stored() || matches!(job.state, State::Completing { .. })
    }
}

/// Gives as whom a job runs; None: as the scheduler's own user.
pub(super) fn user_of(job: &JobRecord) -> Option<Submitter> {
    let own = nix::unistd::geteuid();
    (own.is_root() && job.submitter.uid != own.as_raw()).then_some(job.submitter)
}

fn told(error: &DiskError) -> String {
    let cause = std::error::Error::source(error).map_or(String::new(), |cause| format!(": {cause}"));
    format!("{error}{cause}")
}

/// Removes a directory with all that is in it; fine where there is none.
fn remove(path: &std::path::Path) -> Result<(), DiskError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(disk::at(path, "remove")),
    }
}

fn copy_out(own: &JobPlace, place: &std::path::Path, job: &JobRecord) -> Result<(), DiskError> {
    disk::make_dir(place, 0o700)?;
    let to = place.join("tree");
    remove(&to)?;
    disk::make_dir(&to.join("out"), 0o700)?;
    disk::make_dir(&to.join("logs"), 0o700)?;
    copy::tree(&own.work(), &to.join("work"), None)?;
    for output in &job.spec.outputs {
        copy::tree(&own.output(&output.dataset), &to.join("out").join(&output.dataset), None)?;
    }
    let ranks = job.attempts.iter().map(|attempt| attempt.placement.seats.len()).max().unwrap_or(0);
    for rank in 0..u32::try_from(ranks).unwrap_or(u32::MAX) {
        copy::file(&own.log(rank), &to.join("logs").join(rank.to_string()))?;
    }
    let (name, project) = (job.name.clone(), job.project.clone());
    let attempt = job.attempt().map_or(0, |attempt| attempt.number);
    let about = JobFile { format: super::job::FORMAT, id: job.id, name, project, attempt, spec: job.spec.clone() };
    disk::write_json(&to.join("job.json"), &about)
}

fn copy_in(
    place: &JobPlace,
    mount: &std::path::Path,
    owner: Option<(u32, u32)>,
    outputs: &[&str],
) -> Result<(), DiskError> {
    // Every snapshot has it. A mount that is gone is an empty directory, which would be taken for one without files.
    let about = mount.join("job.json");
    fs::metadata(&about).map_err(disk::at(&about, "find the snapshot"))?;
    let restoring = place.restoring();
    remove(&restoring)?;
    disk::make_dir(&restoring, 0o700)?;
    disk::make_dir(&restoring.join("out"), 0o700)?;
    copy::tree(&mount.join("work"), &restoring.join("work"), owner)?;
    for dataset in outputs {
        copy::tree(&mount.join("out").join(dataset), &restoring.join("out").join(dataset), owner)?;
    }
    let mut pairs = vec![(restoring.join("work"), place.work())];
    pairs.extend(outputs.iter().map(|dataset| (restoring.join("out").join(dataset), place.output(dataset))));
    for (from, to) in pairs.into_iter().filter(|(from, _)| from.exists()) {
        // Half of an earlier try; no process of the job has begun yet.
        remove(&to)?;
        disk::make_dir(to.parent().unwrap_or(place.path()), 0o711)?;
        fs::rename(&from, &to).map_err(disk::at(&to, "rename to it"))?;
        disk::sync_dir(to.parent().unwrap_or(place.path()))?;
    }
    remove(&restoring)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_copied_in_replaces_half_of_an_earlier_try_and_takes_only_what_the_job_makes() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = super::super::store::Store::open(&dir.path().join("state")).expect("opens");
        let place = store.job(&Uuid::new_v4());
        let mount = dir.path().join("mount");
        let files = [("work/step", "41"), ("out/model/w", "1"), ("out/other/x", "2"), ("logs/0", "said")];
        for (path, text) in files.into_iter().chain([("job.json", "{}")]) {
            let path = mount.join(path);
            fs::create_dir_all(path.parent().expect("has a parent")).expect("makes");
            fs::write(path, text).expect("writes");
        }
        fs::create_dir_all(place.work()).expect("makes");
        fs::write(place.work().join("half"), "").expect("writes");
        copy_in(&place, &mount, None, &["model"]).expect("copies");
        assert_eq!(fs::read_to_string(place.work().join("step")).expect("reads"), "41");
        assert_eq!(fs::read_to_string(place.output("model").join("w")).expect("reads"), "1");
        assert!(!place.work().join("half").exists() && !place.output("other").exists());
        assert!(!place.restoring().exists());
        // The mount is gone: nothing is taken for everything.
        assert!(copy_in(&place, &dir.path().join("gone"), None, &["model"]).is_err());
        assert_eq!(fs::read_to_string(place.work().join("step")).expect("reads"), "41");
    }
}
