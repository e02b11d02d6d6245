//! The scheduler's directory: where things lie, and the records in it.
//!
//! ```text
//! <dir>/lock                     held while a scheduler lives; holds its pid
//! <dir>/cluster.json             projects and nodes
//! <dir>/jobs/<id>/record.json    a job
//! <dir>/jobs/<id>/logs/<rank>    what it printed, all attempts
//! <dir>/jobs/<id>/work           where it runs: a directory that stays while it is paused
//! <dir>/jobs/<id>/root/          what it was given, by path (processes)
//! <dir>/jobs/<id>/out/<dataset>/ its outputs; stay while it is paused
//! <dir>/jobs/<id>/attempts/<n>/<rank>/  a task (see `task`)
//! <dir>/jobs/<id>/push/<try>-<output>/  a task that stores an output
//! <dir>/jobs/<id>/snapshots/<number>/  a copy of the job's files, and tasks that store it
//! <dir>/jobs/<id>/progress       how far it is, as the job says
//! <dir>/mounts/<uid>/<commit>/   a mount that a user's jobs share
//! <dir>/volumes/<project>/<name>/
//! <dir>/trash/                   what is being deleted
//! ```

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::cluster::Cluster;
use super::disk::{self, DiskError};
use super::job::{JobRecord, Submitter};
use super::task::TaskDir;

/// Says why a scheduler cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("a scheduler with the directory {} runs already (pid {pid})", dir.display())]
    Taken { dir: PathBuf, pid: String },
    #[error("another scheduler has the socket {}; stop it first (`larder scheduler stop`)", socket.display())]
    SocketTaken { socket: PathBuf },
    #[error("{}: was written by a newer larder (format {found}); use that one", path.display())]
    Newer { path: PathBuf, found: u32 },
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// The directory, with its lock.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    _lock: File,
}

impl Store {
    /// Opens the directory, made where it is missing, and takes its lock.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        // Users get through to what is theirs, and list nothing.
        if let Some(above) = dir.parent().filter(|above| !above.as_os_str().is_empty()) {
            let made = fs::DirBuilder::new().recursive(true).mode(0o711).create(above);
            made.map_err(disk::at(above, "make the directory"))?;
        }
        disk::make_dir(dir, 0o711)?;
        let dir = fs::canonicalize(dir).map_err(disk::at(dir, "resolve"))?;
        let path = dir.join("lock");
        let Some(mut lock) = disk::try_lock(&path)? else {
            let pid = fs::read_to_string(&path).unwrap_or_default();
            return Err(StoreError::Taken { dir, pid: pid.trim().to_owned() });
        };
        let told = lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id()));
        told.map_err(disk::at(&path, "write"))?;
        for name in ["jobs", "mounts", "volumes", "trash"] {
            disk::make_dir(&dir.join(name), 0o711)?;
        }
        let store = Self { dir, _lock: lock };
        // What an earlier scheduler could not finish deleting.
        let _ = fs::remove_dir_all(store.dir.join("trash")).and_then(|()| fs::create_dir(store.dir.join("trash")));
        Ok(store)
    }

    /// Gives the directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Reads projects and nodes.
    pub fn cluster(&self) -> Result<Cluster, StoreError> {
        let path = self.dir.join("cluster.json");
        let cluster: Cluster = disk::read_json(&path)?.unwrap_or_default();
        if cluster.format > super::cluster::FORMAT {
            return Err(StoreError::Newer { path, found: cluster.format });
        }
        Ok(cluster)
    }

    /// Writes projects and nodes.
    pub fn keep_cluster(&self, cluster: &Cluster) -> Result<(), DiskError> {
        disk::write_json(&self.dir.join("cluster.json"), cluster)
    }

    /// Reads all jobs. A directory without a record is a submission that was never acknowledged.
    pub fn jobs(&self) -> Result<Vec<JobRecord>, StoreError> {
        let jobs = self.dir.join("jobs");
        let mut found = Vec::new();
        for entry in fs::read_dir(&jobs).map_err(disk::at(&jobs, "list"))? {
            let dir = entry.map_err(disk::at(&jobs, "list"))?.path();
            let path = dir.join("record.json");
            match disk::read_json::<JobRecord>(&path)? {
                Some(job) if job.format > super::job::FORMAT => {
                    return Err(StoreError::Newer { path, found: job.format });
                }
                Some(job) => found.push(job),
                None => self.throw_away(&dir)?,
            }
        }
        Ok(found)
    }

    /// Writes a job's record.
    pub fn keep(&self, job: &JobRecord) -> Result<(), DiskError> {
        let dir = self.job(&job.id).0;
        if !dir.exists() {
            disk::make_dir(&dir, 0o700)?;
            if let Some(Submitter { gid, .. }) = super::snapshot::user_of(job) {
                // Its user gets through to what is the user's; nobody else does.
                std::os::unix::fs::chown(&dir, None, Some(gid)).map_err(disk::at(&dir, "give to its group"))?;
                fs::set_permissions(&dir, fs::Permissions::from_mode(0o710)).map_err(disk::at(&dir, "open"))?;
            }
            disk::sync_dir(&self.dir.join("jobs"))?;
        }
        disk::write_json(&dir.join("record.json"), job)
    }

    /// Removes a job with everything it has but its commits. It is gone, also after a crash, when this returns
    /// well; its files may take longer.
    pub fn forget(&self, id: &Uuid) -> Result<(), DiskError> {
        self.throw_away(&self.job(id).0)
    }

    /// Removes the volumes of a project, likewise.
    pub fn forget_volumes(&self, project: &str) -> Result<(), DiskError> {
        self.throw_away(&self.dir.join("volumes").join(project))
    }

    /// Renames a directory away, so that it is gone at once, and removes it on a thread of its own: that may
    /// take long. What is left of it, the next scheduler removes.
    pub(super) fn throw_away(&self, dir: &Path) -> Result<(), DiskError> {
        let away = self.dir.join("trash").join(Uuid::new_v4().to_string());
        match fs::rename(dir, &away) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !dir.exists() => return Ok(()),
            renamed => renamed.map_err(disk::at(dir, "remove"))?,
        }
        disk::sync_dir(dir.parent().unwrap_or(&self.dir))?;
        let removed = std::thread::Builder::new().name("trash".to_owned()).spawn(move || {
            if let Err(error) = fs::remove_dir_all(&away) {
                tracing::warn!(%error, dir = %away.display(), "could not be removed yet; the next start tries again");
            }
        });
        if let Err(error) = removed {
            tracing::warn!(%error, "no thread to remove what was deleted; the next start does");
        }
        Ok(())
    }

    /// Gives where a job's things lie.
    pub fn job(&self, id: &Uuid) -> JobPlace {
        JobPlace(self.dir.join("jobs").join(id.to_string()))
    }

    /// Gives where a commit is mounted for the jobs of a user.
    pub fn mount(&self, of: &MountOf) -> PathBuf {
        let all = self.dir.join("mounts");
        let own = of.uid.map_or_else(|| all.clone(), |uid| all.join(uid.to_string()));
        own.join(&of.commit)
    }

    /// Lists what has a directory for its mount.
    pub fn mounts(&self) -> Vec<MountOf> {
        let names = |dir: &Path| {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>()
        };
        let all = self.dir.join("mounts");
        let mut found = Vec::new();
        for name in names(&all) {
            // No commit's id is a number so small.
            match name.parse::<u32>() {
                Ok(uid) => {
                    let own = names(&all.join(&name));
                    found.extend(own.into_iter().map(|commit| MountOf { uid: Some(uid), commit }));
                }
                Err(_) => found.push(MountOf { uid: None, commit: name }),
            }
        }
        found
    }

    /// Gives where a volume lies.
    pub fn volume(&self, project: &str, name: &str) -> PathBuf {
        self.dir.join("volumes").join(project).join(name)
    }
}

/// Names a mount: what it shows, and to whose jobs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MountOf {
    /// None: everybody's, as schedulers made them that asked nobody's rights. Jobs that run may still read it.
    pub uid: Option<u32>,
    pub commit: String,
}

impl MountOf {
    /// Names the one that a job reads a commit by.
    pub fn job(job: &JobRecord, commit: &str) -> Self {
        let own = nix::unistd::geteuid().as_raw();
        let uid = super::snapshot::user_of(job).map_or(own, |user| user.uid);
        Self { uid: Some(uid), commit: commit.to_owned() }
    }
}

/// Where a job's things lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobPlace(PathBuf);

impl JobPlace {
    /// All of it.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where the job says how far it is.
    pub fn progress(&self) -> PathBuf {
        self.0.join("progress")
    }

    /// All tasks of an attempt.
    pub fn attempt(&self, attempt: u32) -> PathBuf {
        self.0.join("attempts").join(attempt.to_string())
    }

    /// Where it runs.
    pub fn work(&self) -> PathBuf {
        self.0.join("work")
    }

    /// Where a path that it names lies for a process.
    pub fn root(&self, path: &str) -> PathBuf {
        self.0.join("root").join(path.trim_start_matches('/'))
    }

    /// Where an output lies until it is a commit.
    pub fn output(&self, dataset: &str) -> PathBuf {
        self.0.join("out").join(dataset)
    }

    /// What a rank printed.
    pub fn log(&self, rank: u32) -> PathBuf {
        self.0.join("logs").join(rank.to_string())
    }

    /// A rank of an attempt.
    pub fn task(&self, attempt: u32, rank: u32) -> TaskDir {
        TaskDir::at(&self.0.join("attempts").join(attempt.to_string()).join(rank.to_string()))
    }

    /// Storing an output.
    pub fn push(&self, attempt: u32, output: usize) -> TaskDir {
        TaskDir::at(&self.0.join("push").join(format!("{attempt}-{output}")))
    }

    /// A file of the attempt's own.
    pub fn attempt_file(&self, attempt: u32, name: &str) -> PathBuf {
        self.0.join("attempts").join(attempt.to_string()).join(name)
    }

    /// Makes a directory that belongs to the job's user. One that is another user's already (a volume of the
    /// project) stays theirs.
    pub(super) fn make_for(path: &Path, user: Option<(u32, u32)>, mode: u32) -> Result<(), DiskError> {
        disk::make_dir(path, mode)?;
        let Some((uid, gid)) = user else {
            return Ok(());
        };
        let owner = fs::metadata(path).map_err(disk::at(path, "look at"))?.uid();
        if owner == uid || owner != nix::unistd::geteuid().as_raw() {
            return Ok(());
        }
        std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(disk::at(path, "give to its user"))
    }
}
