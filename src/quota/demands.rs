//! Where requests may go at all: sets of nodes with the right pools and labels, and whether an
//! empty cluster would hold a request.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::cluster::{Request, slots};
use super::snapshot::{Job, Node, NodeState, Project, Template};

/// Pools of the project (none: all), pool of the template, labels of the template.
type Key = (BTreeSet<String>, Option<String>, BTreeMap<String, String>);

/// A set of nodes.
#[derive(Debug)]
pub(super) struct Class {
    /// By node: whether it is in the set, ready or not.
    member: Vec<bool>,
    /// GPUs of the ready ones, as (GPUs of a node, how many such nodes).
    ready: BTreeMap<u32, u32>,
    /// Of those that are not ready.
    unready: BTreeMap<u32, u32>,
}

impl Class {
    fn of(nodes: &[&Node], key: &Key) -> Self {
        let (pools, pool, labels) = key;
        let mut class = Self { member: vec![false; nodes.len()], ready: BTreeMap::new(), unready: BTreeMap::new() };
        for (node, member) in nodes.iter().zip(&mut class.member) {
            let in_pools = pools.is_empty() || !pools.is_disjoint(&node.pools);
            let in_pool = pool
                .as_ref()
                .is_none_or(|pool| node.pools.contains(pool) && (pools.is_empty() || pools.contains(pool)));
            let labelled = labels.iter().all(|(name, value)| node.labels.get(name) == Some(value));
            if !(in_pools && in_pool && labelled) {
                continue;
            }
            *member = true;
            let sizes = if node.state == NodeState::Ready { &mut class.ready } else { &mut class.unready };
            *sizes.entry(node.gpus).or_default() += 1;
        }
        class
    }

    /// Says whether the node is in the set.
    pub fn has(&self, node: u32) -> bool {
        self.member.get(node as usize).copied().unwrap_or(false)
    }

    /// Ready nodes, and GPUs of the largest of them.
    pub fn ready(&self) -> (u32, u32) {
        (self.ready.values().sum(), self.ready.keys().next_back().copied().unwrap_or(0))
    }
}

/// All sets of nodes that a snapshot's templates name.
#[derive(Debug, Default)]
pub(super) struct Classes {
    all: Vec<Class>,
    numbers: HashMap<Key, u32>,
    possible: HashMap<(Request, bool), bool>,
}

impl Classes {
    /// Turns a template into a request; None if GPUs can't be cut like that.
    pub fn request(&mut self, nodes: &[&Node], project: &Project, job: &Job, template: &Template) -> Option<Request> {
        if !template.is_sound() {
            return None;
        }
        let pools = if job.kind.in_interactive_pools() { &project.interactive_pools } else { &project.train_pools };
        let key = (pools.clone(), template.pool.clone(), template.labels.clone());
        let next = self.all.len() as u32;
        let class = *self.numbers.entry(key).or_insert_with_key(|key| {
            self.all.push(Class::of(nodes, key));
            next
        });
        Some(Request { class, milli: u32::try_from(template.gpus.0).ok()?, processes: template.processes })
    }

    pub fn class(&self, number: u32) -> &Class {
        &self.all[number as usize]
    }

    /// Says whether the empty ready nodes would hold the request (`cordoned`: the others too).
    pub fn possible(&mut self, request: &Request, cordoned: bool) -> bool {
        let class = &self.all[request.class as usize];
        *self.possible.entry((*request, cordoned)).or_insert_with(|| {
            let unready = class.unready.iter().filter(|_| cordoned);
            let sizes = class.ready.iter().chain(unready);
            let found = sizes.map(|(gpus, nodes)| {
                let each = slots(std::iter::repeat_n(1000, *gpus as usize), request.milli);
                each.saturating_mul(*nodes)
            });
            found.fold(0, u32::saturating_add) >= request.processes
        })
    }
}
