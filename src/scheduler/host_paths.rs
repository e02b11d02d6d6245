//! Paths of the machine that jobs name: where they lead, looked at again at each start.
//!
//! A link may have been turned since the job was submitted, and a file server may hang: so a thread follows them,
//! and the executor is given where they led.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::thread::JoinHandle;

use uuid::Uuid;

use super::check;
use super::job::JobRecord;

type Found = BTreeMap<PathBuf, PathBuf>;

#[derive(Debug)]
enum Slot {
    Looking(JoinHandle<Result<Found, PathBuf>>),
    Found(Found),
}

/// The paths of the jobs that have GPUs.
#[derive(Debug, Default)]
pub(super) struct HostPaths {
    slots: HashMap<Uuid, Slot>,
    none: Found,
}

impl HostPaths {
    /// Says whether a job may see what it names, or why not. None as long as somebody looks.
    pub(super) fn want(&mut self, job: &JobRecord, allowed: &[PathBuf]) -> Option<Result<(), String>> {
        if job.spec.host_paths.is_empty() {
            return Some(Ok(()));
        }
        match self.slots.remove(&job.id) {
            Some(Slot::Found(found)) => {
                self.slots.insert(job.id, Slot::Found(found));
                Some(Ok(()))
            }
            Some(Slot::Looking(looking)) if !looking.is_finished() => {
                self.slots.insert(job.id, Slot::Looking(looking));
                None
            }
            Some(Slot::Looking(looked)) => match looked.join() {
                Ok(Ok(found)) => {
                    self.slots.insert(job.id, Slot::Found(found));
                    Some(Ok(()))
                }
                Ok(Err(path)) => Some(Err(format!(
                    "{} is not there, or not among the paths that jobs may see (`larder scheduler run --host-path`)",
                    path.display()
                ))),
                Err(_) => Some(Err("looking at its paths ended by a panic".to_owned())),
            },
            None => self.look(job, allowed.to_vec()).err().map(Err),
        }
    }

    fn look(&mut self, job: &JobRecord, allowed: Vec<PathBuf>) -> Result<(), String> {
        let paths: Vec<PathBuf> = job.spec.host_paths.iter().map(|host| host.host.clone()).collect();
        let looking = std::thread::Builder::new().name("host-paths".to_owned()).spawn(move || {
            let find = |path: PathBuf| match check::real_path(&path, &allowed) {
                Some(real) => Ok((path, real)),
                None => Err(path),
            };
            paths.into_iter().map(find).collect()
        });
        let looking = looking.map_err(|error| format!("no thread to look at its paths: {error}"))?;
        self.slots.insert(job.id, Slot::Looking(looking));
        Ok(())
    }

    /// Gives where a job's paths lead, as far as that is known.
    pub(super) fn found(&self, job: &Uuid) -> &Found {
        match self.slots.get(job) {
            Some(Slot::Found(found)) => found,
            _ => &self.none,
        }
    }

    /// Forgets what a job's paths led to: its next attempt looks again.
    pub(super) fn forget(&mut self, job: &Uuid) {
        self.slots.remove(job);
    }
}
