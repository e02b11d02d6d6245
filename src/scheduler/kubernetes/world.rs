//! The cluster as the watches tell it, with what this process has asked for and not yet seen.
//!
//! Invariant: a pod that was seen, or asked to be, on a node holds its GPUs here until it is known to be gone or never to
//! have got there. So a decision never gives away what somebody may have.

use std::collections::{BTreeMap, HashMap};

use super::node::NodeRecord;
use super::pod::{Held, PodRecord};
use super::resource::{ProjectSpec, ProjectStatus};

/// A project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProjectRecord {
    pub name: String,
    pub spec: ProjectSpec,
    pub status: Option<ProjectStatus>,
}

/// A Job: its uid, and when it was made, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobRecord {
    pub uid: String,
    pub created_ms: i64,
}

/// News of one kind of thing.
#[derive(Debug)]
pub enum News<T> {
    /// Everything of the kind follows, each by `Listed`, until `Complete`.
    Begin,
    Listed(T),
    Complete,
    Is(T),
    Gone(T),
}

/// Things by name, and those of a listing that is under way.
#[derive(Debug)]
pub struct Shelf<T> {
    pub all: BTreeMap<String, T>,
    listing: BTreeMap<String, T>,
    /// Everything was listed once.
    pub is_complete: bool,
    /// How often.
    pub listings: u64,
}

impl<T> Default for Shelf<T> {
    fn default() -> Self {
        Self { all: BTreeMap::new(), listing: BTreeMap::new(), is_complete: false, listings: 0 }
    }
}

impl<T> Shelf<T> {
    /// Takes news; `keep` takes over from the older record of the same name what is newer.
    /// True where something is otherwise than before, as far as `same` goes.
    fn take(
        &mut self,
        news: News<T>,
        key: impl Fn(&T) -> String,
        keep: impl Fn(&mut T, &T),
        same: impl Fn(&T, &T) -> bool,
    ) -> bool {
        match news {
            News::Begin => {
                self.listing.clear();
                false
            }
            News::Listed(mut thing) => {
                let key = key(&thing);
                if let Some(older) = self.all.get(&key) {
                    keep(&mut thing, older);
                }
                self.listing.insert(key, thing);
                false
            }
            News::Complete => {
                self.all = std::mem::take(&mut self.listing);
                self.is_complete = true;
                self.listings += 1;
                true
            }
            News::Is(mut thing) => {
                let key = key(&thing);
                let older = self.all.get(&key);
                if let Some(older) = older {
                    keep(&mut thing, older);
                }
                let is_new = older.is_none_or(|older| !same(older, &thing));
                self.all.insert(key, thing);
                is_new
            }
            News::Gone(thing) => self.all.remove(&key(&thing)).is_some(),
        }
    }
}

/// A binding that was asked for, and of which it is not known yet what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub node: String,
    pub held: Held,
}

/// Everything.
#[derive(Debug, Default)]
pub struct World {
    pub pods: Shelf<PodRecord>,
    pub nodes: Shelf<NodeRecord>,
    pub projects: Shelf<ProjectRecord>,
    pub jobs: Shelf<JobRecord>,
    /// By the uid of the pod.
    pub asked: HashMap<String, Asked>,
}

impl World {
    /// Says whether everything was listed once.
    pub fn is_complete(&self) -> bool {
        self.pods.is_complete && self.nodes.is_complete && self.projects.is_complete && self.jobs.is_complete
    }

    /// Takes news of a pod. True where a decision may come out otherwise; likewise below.
    pub fn take_pod(&mut self, news: News<PodRecord>) -> bool {
        if let News::Gone(pod) = &news
            && self.pods.all.get(&pod.key()).is_some_and(|known| known.uid != pod.uid)
        {
            return false;
        }
        self.pods.take(news, PodRecord::key, PodRecord::keep, PodRecord::decides_like)
    }

    pub fn take_node(&mut self, news: News<NodeRecord>) -> bool {
        self.nodes.take(news, |node| node.name.clone(), |_, _| {}, NodeRecord::eq)
    }

    pub fn take_project(&mut self, news: News<ProjectRecord>) -> bool {
        let same = |a: &ProjectRecord, b: &ProjectRecord| a.spec == b.spec;
        self.projects.take(news, |project| project.name.clone(), |_, _| {}, same)
    }

    pub fn take_job(&mut self, news: News<JobRecord>) -> bool {
        self.jobs.take(news, |job| job.uid.clone(), |_, _| {}, JobRecord::eq)
    }

    /// Gives the pod of a name that is the one with this uid.
    pub fn pod_mut(&mut self, key: &str, uid: &str) -> Option<&mut PodRecord> {
        self.pods.all.get_mut(key).filter(|pod| pod.uid == uid)
    }

    /// A binding has come through.
    pub fn bound(&mut self, key: &str, uid: &str) {
        let asked = self.asked.remove(uid);
        if let (Some(asked), Some(pod)) = (asked, self.pod_mut(key, uid))
            && pod.node.is_none()
        {
            (pod.node, pod.held) = (Some(asked.node), Some(asked.held));
        }
    }

    /// A pod was looked at: so it is, and nothing is open any more. None: it is gone.
    pub fn seen(&mut self, key: &str, uid: &str, pod: Option<PodRecord>) {
        self.asked.remove(uid);
        match pod {
            Some(pod) => drop(self.take_pod(News::Is(pod))),
            None if self.pod_mut(key, uid).is_some() => drop(self.pods.all.remove(key)),
            None => {}
        }
    }

    /// Gives where a pod is, or will be: node, what it holds there.
    pub fn place<'a>(&'a self, pod: &'a PodRecord) -> Option<(&'a str, Option<&'a Held>)> {
        if pod.over {
            return None;
        }
        match (&pod.node, self.asked.get(&pod.uid)) {
            (Some(node), _) => Some((node, pod.held.as_ref())),
            (None, Some(asked)) => Some((&asked.node, Some(&asked.held))),
            (None, None) => None,
        }
    }

    /// Gives the place of a pod in the queue: nanoseconds, then its name.
    pub fn queued(&self, pod: &PodRecord) -> i128 {
        let of_job = || pod.job.as_ref().and_then(|job| self.jobs.all.get(job)).map(|job| job.created_ms);
        pod.queued_ns.unwrap_or_else(|| i128::from(of_job().unwrap_or(pod.created_ms)) * 1_000_000)
    }
}
