//! One decision: what is asked of the API server now, and what is told to whom.
//!
//! The plan is that of [`crate::quota`]. What it does not know is checked behind it: whether a node has the CPU, memory
//! and places left that a start needs. Where not, the node is left out for that unit and the plan is made again.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::names;
use super::pod::{Held, PodRecord, Told};
use super::quantity::{Amounts, add, lacking, subtract};
use super::resource::ProjectStatus;
use super::snapshot::{Avoid, NOBODY, Seen, see};
use super::units::{Doing, Unfit, Unit, Units, units};
use super::world::World;
use crate::quota::{Cause, Grounds, JobState, MilliGpus, Placement, Plan, Snapshot, SnapshotError, Start, Why, plan};

/// How often a plan is made again because a node lacks something; what then still does not fit waits for the next decision.
const ROUNDS_MAX: usize = 6;

/// A pod that gets a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub node: String,
    pub held: Held,
    pub grounds: Grounds,
    /// Pods of one unit are bound together as far as that goes.
    pub unit: String,
}

/// A pod that has to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evict {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub why: String,
}

/// Why a pod waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tell {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub version: String,
    pub told: Told,
}

/// What follows from the state of the cluster.
#[derive(Debug)]
pub struct Decision {
    pub binds: Vec<Bind>,
    pub evicts: Vec<Evict>,
    /// Of all pods that wait, also where they know it already.
    pub tells: Vec<Tell>,
    pub statuses: BTreeMap<String, ProjectStatus>,
    pub snapshot: Snapshot,
    pub plan: Plan,
}

/// Decides. `held_up`: units that are not started now, with the reason.
pub fn decide(world: &World, held_up: &HashMap<String, String>) -> Result<Decision, SnapshotError> {
    let units = units(world);
    let mut avoid = Avoid::new();
    let mut lacks: HashMap<String, String> = HashMap::new();
    let mut round = 0;
    loop {
        round += 1;
        let seen = see(world, &units, &avoid);
        let decided = plan(&seen.snapshot)?;
        let short = Room::of(world, &units, &seen, &decided).check(&decided);
        let is_last = round == ROUNDS_MAX || short.is_empty();
        for one in short {
            lacks.insert(one.unit.clone(), one.told());
            avoid.entry(one.unit).or_default().insert(one.node);
        }
        if is_last {
            return Ok(Decider { world, units: &units, lacks, held_up, avoid: &avoid }.conclude(seen, decided));
        }
    }
}

/// A start that a node has no room for.
struct Short {
    unit: String,
    node: String,
    what: String,
}

impl Short {
    fn told(&self) -> String {
        format!("node {} has GPUs for it, but not enough {} left", self.node, self.what)
    }
}

/// CPU, memory and what else there is on the nodes while starts are checked.
struct Room<'a> {
    world: &'a World,
    pods: HashMap<&'a str, &'a Unit<'a>>,
    /// In use once all that ends has ended.
    used: HashMap<String, Amounts>,
}

impl<'a> Room<'a> {
    fn of(world: &'a World, units: &'a Units<'a>, seen: &Seen, plan: &Plan) -> Self {
        let by_id: HashMap<&str, &Unit<'_>> = units.units.iter().map(|unit| (unit.id.as_str(), unit)).collect();
        let mut used = seen.used.clone();
        let paused = plan.preemptions.iter().filter_map(|one| by_id.get(one.job.as_str()));
        let stopping = units.units.iter().filter(|unit| unit.doing == Doing::Stops);
        for pod in paused.copied().chain(stopping).flat_map(|unit| &unit.pods) {
            if let Some(used) = world.place(pod).and_then(|(node, _)| used.get_mut(node)) {
                subtract(used, &pod.requests);
            }
        }
        Self { world, pods: by_id, used }
    }

    /// Gives the starts that do not fit.
    fn check(&mut self, plan: &Plan) -> Vec<Short> {
        plan.starts.iter().filter_map(|start| self.take(start)).collect()
    }

    fn take(&mut self, start: &Start) -> Option<Short> {
        let unit = *self.pods.get(start.job.as_str())?;
        for (pod, seat) in unit.pods.iter().zip(&start.placement.seats) {
            let node = self.world.nodes.all.get(seat.node.as_str())?;
            let used = self.used.entry(node.name.clone()).or_default();
            if let Some(what) = lacking(&node.allocatable, used, &pod.requests) {
                return Some(Short { unit: unit.id.clone(), node: node.name.clone(), what: what.to_owned() });
            }
            add(used, &pod.requests);
        }
        None
    }
}

struct Decider<'a> {
    world: &'a World,
    units: &'a Units<'a>,
    lacks: HashMap<String, String>,
    held_up: &'a HashMap<String, String>,
    avoid: &'a Avoid,
}

impl Decider<'_> {
    fn conclude(&self, seen: Seen, plan: Plan) -> Decision {
        let by_id: HashMap<&str, &Unit<'_>> = self.units.units.iter().map(|unit| (unit.id.as_str(), unit)).collect();
        let mut told: HashMap<&str, Told> = HashMap::new();
        let binds = self.binds(&seen, &plan, &by_id, &mut told);
        let evicts = self.evicts(&plan, &by_id);
        for waiting in &plan.waiting {
            if let Some(unit) = by_id.get(waiting.job.as_str()) {
                let lacks = self.lacks.get(&unit.id).map(|message| reason("Unschedulable", message));
                told.insert(&unit.id, lacks.unwrap_or_else(|| why(&waiting.why)));
            }
        }
        Decision {
            binds,
            evicts,
            tells: self.tells(&told),
            statuses: self.statuses(&seen.snapshot, &plan),
            snapshot: seen.snapshot,
            plan,
        }
    }

    fn binds<'u>(
        &self,
        seen: &Seen,
        plan: &Plan,
        by_id: &HashMap<&str, &'u Unit<'u>>,
        told: &mut HashMap<&'u str, Told>,
    ) -> Vec<Bind> {
        let mut binds = Vec::new();
        let mut now = seen.used.clone();
        for (start, number) in plan.starts.iter().zip(seen.last_start.saturating_add(1)..) {
            let Some(unit) = by_id.get(start.job.as_str()) else {
                continue;
            };
            if !start.after.is_empty() {
                let names: Vec<String> = start.after.iter().take(3).map(ToString::to_string).collect();
                let more = if start.after.len() > 3 { " and others" } else { "" };
                let message = format!("it starts as soon as {}{more} has stopped", names.join(", "));
                told.insert(&unit.id, reason("Stopping", &message));
            } else if let Some(message) = self.held_up.get(&unit.id) {
                told.insert(&unit.id, reason("Unschedulable", message));
            } else if let Some(message) = self.no_room(unit, &start.placement, &mut now) {
                told.insert(&unit.id, reason("Unschedulable", &message));
            } else {
                binds.extend(bindings(unit, start, number));
            }
        }
        binds
    }

    /// Says what a node lacks as long as those that end have not ended.
    fn no_room(&self, unit: &Unit<'_>, placement: &Placement, now: &mut HashMap<String, Amounts>) -> Option<String> {
        let pairs = || unit.pods.iter().zip(&placement.seats);
        if pairs().any(|(_, seat)| self.avoid.get(&unit.id).is_some_and(|nodes| nodes.contains(seat.node.as_str()))) {
            return self.lacks.get(&unit.id).cloned();
        }
        let mut taken: Vec<(&str, &PodRecord)> = Vec::new();
        for (pod, seat) in pairs() {
            let node = self.world.nodes.all.get(seat.node.as_str())?;
            let used = now.entry(node.name.clone()).or_default();
            if let Some(what) = lacking(&node.allocatable, used, &pod.requests) {
                let message = format!("node {} has GPUs for it, and waits for {what} that ending pods have", node.name);
                for (node, pod) in taken {
                    if let Some(used) = now.get_mut(node) {
                        subtract(used, &pod.requests);
                    }
                }
                return Some(message);
            }
            add(used, &pod.requests);
            taken.push((&node.name, pod));
        }
        None
    }

    fn evicts(&self, plan: &Plan, by_id: &HashMap<&str, &Unit<'_>>) -> Vec<Evict> {
        let mut evicts = Vec::new();
        let mut seen: HashSet<&str> = HashSet::new();
        for preemption in &plan.preemptions {
            let why = match &preemption.cause {
                Cause::Needed { by, project, .. } => format!("paused for {by} of project {project}"),
                Cause::Draining { node } => format!("paused: node {node} is draining"),
            };
            if let Some(unit) = by_id.get(preemption.job.as_str()).filter(|unit| seen.insert(&unit.id)) {
                evicts.extend(unit.pods.iter().map(|pod| evict(pod, &why)));
            }
        }
        // Half a gang that can't be made whole now goes back to the queue.
        for waiting in &plan.waiting {
            let rest = by_id.get(waiting.job.as_str()).and_then(|unit| unit.rest_of.as_deref());
            let bound = rest.and_then(|id| by_id.get(id)).filter(|unit| seen.insert(&unit.id));
            let why = "paused: the rest of its gang has no place now";
            evicts.extend(bound.into_iter().flat_map(|unit| &unit.pods).map(|pod| evict(pod, why)));
        }
        // Somebody whose binding is under way can be asked to go only when it has got there.
        evicts.retain(|evict| !self.world.asked.contains_key(&evict.uid));
        evicts
    }

    fn tells(&self, told: &HashMap<&str, Told>) -> Vec<Tell> {
        let of_units = self.units.units.iter().filter(|unit| unit.doing == Doing::Waits);
        let of_units = of_units.filter_map(|unit| Some((unit, told.get(unit.id.as_str())?)));
        let of_units = of_units.flat_map(|(unit, told)| unit.pods.iter().map(move |pod| (*pod, told.clone())));
        let of_others = self.units.others.iter().map(|(pod, unfit)| match unfit {
            Unfit::Invalid(why) => (*pod, reason("Invalid", why)),
            Unfit::Unready(why) => (*pod, reason("Unready", why)),
        });
        let one = |(pod, told): (&PodRecord, Told)| Tell {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            version: pod.version.clone(),
            told,
        };
        of_units.chain(of_others).map(one).collect()
    }

    /// How the projects stand now: what runs, not what will.
    fn statuses(&self, snapshot: &Snapshot, plan: &Plan) -> BTreeMap<String, ProjectStatus> {
        let mut statuses: BTreeMap<String, ProjectStatus> = BTreeMap::new();
        for share in plan.shares.iter().filter(|share| share.project.as_str() != NOBODY) {
            let status = ProjectStatus { fair_share: share.fair_share, ..ProjectStatus::default() };
            statuses.insert(share.project.to_string(), status);
        }
        for job in &snapshot.jobs {
            let Some(status) = statuses.get_mut(job.project.as_str()) else {
                continue;
            };
            match &job.state {
                JobState::Waiting => {
                    status.waiting += 1;
                    let asked = job.templates.first().map_or(MilliGpus(0), crate::quota::Template::size);
                    status.waiting_gpus = status.waiting_gpus + asked;
                }
                JobState::Running { placement, .. } => {
                    status.running += 1;
                    status.allocated = status.allocated + placement.size();
                }
                JobState::Stopping { .. } => {}
            }
        }
        for project in self.world.projects.all.values() {
            if let Some(status) = statuses.get_mut(&project.name) {
                status.over_quota = status.allocated.saturating_sub(project.spec.quota);
            }
        }
        statuses
    }
}

fn bindings(unit: &Unit<'_>, start: &Start, number: u64) -> Vec<Bind> {
    let pairs = unit.pods.iter().zip(&start.placement.seats);
    let one = |(pod, seat): (&&PodRecord, &crate::quota::Seat)| Bind {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        node: seat.node.to_string(),
        held: Held { gpus: seat.gpus.clone(), each: u32::try_from(seat.each.0).unwrap_or(u32::MAX), start: number },
        grounds: start.grounds,
        unit: unit.id.clone(),
    };
    pairs.map(one).collect()
}

fn evict(pod: &PodRecord, why: &str) -> Evict {
    let (namespace, name, uid) = (pod.namespace.clone(), pod.name.clone(), pod.uid.clone());
    Evict { namespace, name, uid, why: why.to_owned() }
}

fn reason(reason: &str, message: &str) -> Told {
    Told { reason: reason.to_owned(), message: message.to_owned() }
}

/// Gives a reason of the plan as a condition has it.
fn why(why: &Why) -> Told {
    let word = match why {
        Why::Unsound { .. } => "Invalid",
        Why::NoCandidate { .. } | Why::Fragmented { .. } => "Unschedulable",
        Why::Limit { .. } => "ProjectLimit",
        Why::QuotaInUse { .. } => "QuotaInUse",
        Why::ShareInUse { .. } => "ShareInUse",
        Why::PausedFor { .. } | Why::PausedByDrain { .. } => "Paused",
    };
    reason(word, &why.to_string())
}

impl Bind {
    /// Gives what is written on the pod with its node.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        let gpus: Vec<String> = self.held.gpus.iter().map(ToString::to_string).collect();
        let grounds = match self.grounds {
            Grounds::Quota => "quota",
            Grounds::Share => "share",
            Grounds::Idle => "idle",
        };
        let mut all = BTreeMap::from([
            (names::GPUS.to_owned(), gpus.join(",")),
            (names::START.to_owned(), self.held.start.to_string()),
            (names::GROUNDS.to_owned(), grounds.to_owned()),
        ]);
        if self.held.each < 1000 {
            all.insert(names::GPU_SHARE.to_owned(), MilliGpus(u64::from(self.held.each)).to_string());
        }
        all
    }

    /// Gives the name of the pod in the cluster.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// Gives the GPUs of each node, and what of them is in use.
pub fn nodes_of(snapshot: &Snapshot) -> BTreeMap<String, (u32, MilliGpus)> {
    let mut nodes: BTreeMap<String, (u32, MilliGpus)> =
        snapshot.nodes.iter().map(|node| (node.id.to_string(), (node.gpus, MilliGpus(0)))).collect();
    let placements = snapshot.jobs.iter().filter_map(|job| match &job.state {
        JobState::Running { placement, .. } | JobState::Stopping { placement } => Some(placement),
        JobState::Waiting => None,
    });
    let mut seats: Vec<&crate::quota::Seat> = placements.flat_map(|placement| &placement.seats).collect();
    seats.sort_by_key(|seat| &seat.node);
    for seat in seats {
        if let Some((_, used)) = nodes.get_mut(seat.node.as_str()) {
            *used = *used + MilliGpus(seat.each.0.saturating_mul(seat.gpus.len() as u64));
        }
    }
    nodes
}
