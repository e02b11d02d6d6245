//! From the cluster to a snapshot of the decision, which stays as it is: what Kubernetes knows beyond it (selectors,
//! taints, CPU and memory) becomes sets of nodes, and a set of nodes a label.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::constraints::Constraints;
use super::node::NodeRecord;
use super::pod::PodRecord;
use super::quantity::{Amounts, add, lacking};
use super::seats::{Occupant, seat};
use super::units::{Doing, Unit, Units};
use super::world::World;
use crate::quota::{
    Job, JobId, JobState, Kind, MilliGpus, Node, NodeId, Placement, Project, ProjectId, Seat, Snapshot, Template,
};

/// The project of pods that are nobody's: others' schedulers, projects that are gone. No Project can have this name.
pub const NOBODY: &str = "(nobody)";

/// Nodes that a unit may not have in this decision.
pub type Avoid = BTreeMap<String, BTreeSet<String>>;

/// A snapshot, and what all pods of each node ask for beside GPUs.
#[derive(Debug)]
pub struct Seen {
    pub snapshot: Snapshot,
    /// What each node has in use, by those that stay and by those that end.
    pub used: HashMap<String, Amounts>,
    /// Start numbers above this one are free.
    pub last_start: u64,
}

/// Pods by node, and the GPUs that each holds.
struct Seated<'a> {
    /// By uid: the node, its GPUs, how much of each.
    by_pod: HashMap<&'a str, (&'a str, Vec<u32>, u32)>,
    gpus: HashMap<&'a str, u32>,
}

/// Makes the snapshot.
pub fn see(world: &World, units: &Units<'_>, avoid: &Avoid) -> Seen {
    let seated = seated(world);
    let used = used(world);
    let foreign = foreign_use(world);
    let mut classes = Classes { world, foreign: &foreign, numbers: BTreeMap::new(), members: Vec::new() };
    let order = order(world, units);
    let mut jobs = Vec::with_capacity(units.units.len());
    let mut counted: BTreeSet<&str> = BTreeSet::new();
    for unit in &units.units {
        jobs.push(job(unit, &seated, &mut classes, &order, avoid));
        counted.extend(unit.pods.iter().map(|pod| pod.uid.as_str()));
    }
    let mut projects: Vec<Project> =
        world.projects.all.values().map(|project| project.spec.project(&project.name)).collect();
    let nobodys = nobodys(world, &seated, &counted);
    if !nobodys.is_empty() {
        let all = nobodys.iter().flat_map(|job| job.templates.iter().map(Template::size)).sum();
        projects.push(Project { weight: Some(MilliGpus(0)), ..Project::new(NOBODY, all) });
        jobs.extend(nobodys);
    }
    let nodes = world.nodes.all.values().filter(|node| seated.gpus.contains_key(node.name.as_str()));
    let nodes = nodes.map(|node| Node {
        id: node.name.as_str().into(),
        gpus: seated.gpus.get(node.name.as_str()).copied().unwrap_or(node.gpus),
        labels: classes.labels(&node.name),
        pools: node.pools.clone(),
        state: node.state,
    });
    let nodes = nodes.collect();
    let starts = world.pods.all.values().filter_map(|pod| pod.held.as_ref()).map(|held| held.start);
    let asked = world.asked.values().map(|asked| asked.held.start);
    let last_start = starts.chain(asked).max().unwrap_or(0);
    Seen { snapshot: Snapshot { projects, nodes, jobs, held: held(world) }, used, last_start }
}

/// Gives each pod that holds GPUs its seat, and each node with GPUs how many it has.
fn seated(world: &World) -> Seated<'_> {
    let mut on: BTreeMap<&str, Vec<&PodRecord>> = BTreeMap::new();
    for pod in world.pods.all.values() {
        if let Some((node, _)) = world.place(pod) {
            on.entry(node).or_default().push(pod);
        }
    }
    let mut seated = Seated { by_pod: HashMap::new(), gpus: HashMap::new() };
    for node in world.nodes.all.values() {
        let pods: Vec<(&PodRecord, Occupant)> = on
            .remove(node.name.as_str())
            .into_iter()
            .flatten()
            .filter_map(|pod| Some((pod, occupant(world, pod)?)))
            .collect();
        if node.gpus == 0 && pods.is_empty() {
            continue;
        }
        let occupants: Vec<Occupant> = pods.iter().map(|(_, occupant)| occupant.clone()).collect();
        let (seats, gpus) = seat(node.gpus, &occupants);
        for ((pod, occupant), seat) in pods.into_iter().zip(seats) {
            seated.by_pod.insert(&pod.uid, (&node.name, seat, occupant.each));
        }
        seated.gpus.insert(&node.name, gpus);
    }
    seated
}

/// Gives what a pod holds on its node; None: no GPU.
fn occupant(world: &World, pod: &PodRecord) -> Option<Occupant> {
    let (_, held) = world.place(pod)?;
    let start = held.map_or(u64::MAX, |held| held.start);
    let part = pod.asked().map(|ask| ask.gpus).filter(|gpus| *gpus < MilliGpus::ONE);
    let part = part.and_then(|part| u32::try_from(part.0).ok());
    let (count, each) = match part {
        Some(each) => (1, each),
        None if pod.whole > 0 => (pod.whole, 1000),
        None => return None,
    };
    let given = held.filter(|held| held.each == each).map(|held| held.gpus.clone()).unwrap_or_default();
    Some(Occupant { start, given, count, each })
}

/// Gives each unit its place in the queue.
fn order<'a>(world: &World, units: &'a Units<'_>) -> HashMap<&'a str, u64> {
    let queued = |unit: &Unit<'_>| unit.pods.iter().map(|pod| world.queued(pod)).min().unwrap_or(0);
    let mut all: Vec<(i128, &str)> = units.units.iter().map(|unit| (queued(unit), unit.id.as_str())).collect();
    all.sort_unstable();
    all.into_iter().map(|(_, id)| id).zip(0u64..).collect()
}

fn job(
    unit: &Unit<'_>,
    seated: &Seated<'_>,
    classes: &mut Classes<'_>,
    order: &HashMap<&str, u64>,
    avoid: &Avoid,
) -> Job {
    let seats = unit.pods.iter().filter_map(|pod| seated.by_pod.get(pod.uid.as_str()));
    let seats: Vec<Seat> = seats.map(|(node, gpus, each)| seat_of(node, gpus, *each)).collect();
    let placement = Placement { template: 0, seats };
    let started = unit.pods.iter().filter_map(|pod| pod.held.as_ref()).map(|held| held.start).min().unwrap_or(0);
    let state = match unit.doing {
        Doing::Waits => JobState::Waiting,
        Doing::Runs => JobState::Running { placement, started },
        Doing::Stops => JobState::Stopping { placement },
    };
    let first = unit.pods.first();
    Job {
        id: unit.id.as_str().into(),
        project: unit.ask.project.as_str().into(),
        kind: unit.ask.kind,
        priority: unit.ask.priority,
        preemptible: unit.ask.preemptible,
        seq: order.get(unit.id.as_str()).copied().unwrap_or(u64::MAX),
        templates: templates(unit, classes, avoid),
        near: first.and_then(|pod| pod.datasets.first()).cloned(),
        state,
    }
}

fn templates(unit: &Unit<'_>, classes: &mut Classes<'_>, avoid: &Avoid) -> Vec<Template> {
    let labels = match (unit.doing, unit.pods.first()) {
        (Doing::Waits | Doing::Runs, Some(pod)) => classes.label(pod, avoid.get(&unit.id)),
        _ => BTreeMap::new(),
    };
    let processes = u32::try_from(unit.pods.len()).unwrap_or(u32::MAX);
    let one = |pool: Option<String>| Template { gpus: unit.ask.gpus, processes, pool, labels: labels.clone() };
    match unit.ask.pools.as_slice() {
        [] => vec![one(None)],
        pools => pools.iter().map(|pool| one(Some(pool.clone()))).collect(),
    }
}

fn seat_of(node: &str, gpus: &[u32], each: u32) -> Seat {
    Seat { node: NodeId::from(node), gpus: gpus.to_vec(), each: MilliGpus(u64::from(each)) }
}

/// Gives what holds GPUs without being a unit, as jobs that nobody may pause.
fn nobodys(world: &World, seated: &Seated<'_>, counted: &BTreeSet<&str>) -> Vec<Job> {
    let others = world.pods.all.values().filter(|pod| !counted.contains(pod.uid.as_str()));
    let one = |pod: &PodRecord| -> Option<Job> {
        let (node, gpus, each) = seated.by_pod.get(pod.uid.as_str())?;
        let seat = seat_of(node, gpus, *each);
        let size = MilliGpus(seat.each.0.saturating_mul(seat.gpus.len() as u64));
        let placement = Placement { template: 0, seats: vec![seat] };
        let state = match pod.deleting {
            true => JobState::Stopping { placement },
            false => JobState::Running { placement, started: 0 },
        };
        Some(Job {
            id: JobId::from(pod.key().as_str()),
            project: ProjectId::from(NOBODY),
            state,
            ..Job::new("", NOBODY, Kind::Interactive, size, 0)
        })
    };
    others.filter_map(one).collect()
}

/// Gives what all pods of a node ask for.
fn used(world: &World) -> HashMap<String, Amounts> {
    sum_by_node(world, |_| true)
}

/// Gives what those pods ask for that this scheduler can't move.
fn foreign_use(world: &World) -> HashMap<String, Amounts> {
    sum_by_node(world, |pod| pod.ask.is_none())
}

fn sum_by_node(world: &World, counts: impl Fn(&PodRecord) -> bool) -> HashMap<String, Amounts> {
    let mut sums: HashMap<String, Amounts> = HashMap::new();
    for pod in world.pods.all.values().filter(|pod| counts(pod)) {
        if let Some((node, _)) = world.place(pod) {
            match sums.get_mut(node) {
                Some(sum) => add(sum, &pod.requests),
                None => drop(sums.insert(node.to_owned(), pod.requests.clone())),
            }
        }
    }
    sums
}

/// Gives which nodes hold what: as they say themselves, and by what runs there.
fn held(world: &World) -> BTreeMap<String, BTreeSet<NodeId>> {
    let mut held: BTreeMap<String, BTreeSet<NodeId>> = BTreeMap::new();
    for node in world.nodes.all.values() {
        for commit in &node.commits {
            held.entry(commit.clone()).or_default().insert(node.name.as_str().into());
        }
    }
    for pod in world.pods.all.values().filter(|pod| !pod.datasets.is_empty()) {
        let Some((node, _)) = world.place(pod).filter(|(node, _)| world.nodes.all.contains_key(*node)) else {
            continue;
        };
        for dataset in &pod.datasets {
            held.entry(dataset.clone()).or_default().insert(node.into());
        }
    }
    held
}

/// What decides on which nodes a pod may be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ClassKey {
    constraints: Arc<Constraints>,
    requests: Amounts,
    avoided: BTreeSet<String>,
}

/// Sets of nodes, each with a label that its nodes have.
struct Classes<'a> {
    world: &'a World,
    foreign: &'a HashMap<String, Amounts>,
    numbers: BTreeMap<ClassKey, Option<usize>>,
    members: Vec<BTreeSet<String>>,
}

impl Classes<'_> {
    /// Gives the label of the nodes that a pod may have; none where it may have all.
    fn label(&mut self, pod: &PodRecord, avoided: Option<&BTreeSet<String>>) -> BTreeMap<String, String> {
        let key = ClassKey {
            constraints: pod.constraints.clone(),
            requests: pod.requests.clone(),
            avoided: avoided.cloned().unwrap_or_default(),
        };
        let number = match self.numbers.get(&key) {
            Some(number) => *number,
            None => {
                let number = self.find(&key);
                self.numbers.insert(key, number);
                number
            }
        };
        number.map(|number| (number.to_string(), String::new())).into_iter().collect()
    }

    fn find(&mut self, key: &ClassKey) -> Option<usize> {
        let none = Amounts::new();
        let fits = |node: &NodeRecord| {
            let foreign = self.foreign.get(&node.name).unwrap_or(&none);
            key.constraints.allow(node)
                && !key.avoided.contains(&node.name)
                && lacking(&node.allocatable, foreign, &key.requests).is_none()
        };
        let nodes = self.world.nodes.all.values();
        let members: BTreeSet<String> = nodes.filter(|node| fits(node)).map(|node| node.name.clone()).collect();
        if members.len() == self.world.nodes.all.len() {
            return None;
        }
        self.members.push(members);
        Some(self.members.len() - 1)
    }

    fn labels(&self, node: &str) -> BTreeMap<String, String> {
        let of = self.members.iter().enumerate().filter(|(_, members)| members.contains(node));
        of.map(|(number, _)| (number.to_string(), String::new())).collect()
    }
}
