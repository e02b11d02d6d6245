//! From pods to what is started and paused as one: a pod, a gang, the rest of a gang that is there by half.

use std::collections::BTreeMap;

use super::pod::{Ask, PodRecord};
use super::world::World;

/// What a unit does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    Waits,
    Runs,
    /// Its pods end and hold their GPUs until they are gone.
    Stops,
}

/// Pods that a decision sees as one job.
#[derive(Debug, Clone)]
pub struct Unit<'a> {
    /// Unlike any other's.
    pub id: String,
    pub ask: &'a Ask,
    pub doing: Doing,
    /// In the order of their ranks.
    pub pods: Vec<&'a PodRecord>,
    /// The rest of a gang: the unit of those that are bound.
    pub rest_of: Option<String>,
}

/// All units, and pods that are none yet with the reason.
#[derive(Debug, Default)]
pub struct Units<'a> {
    pub units: Vec<Unit<'a>>,
    pub others: Vec<(&'a PodRecord, Unfit)>,
}

/// Why a pod is in no unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// It can't be understood, or is not allowed.
    Invalid(String),
    /// Its gang is not whole.
    Unready(String),
}

/// A gang's pods.
#[derive(Debug, Default)]
struct Gang<'a> {
    bound: Vec<&'a PodRecord>,
    waiting: Vec<&'a PodRecord>,
    succeeded: Vec<&'a PodRecord>,
}

/// Groups the pods of this scheduler.
pub fn units(world: &World) -> Units<'_> {
    let mut found = Units::default();
    let mut gangs: BTreeMap<(&str, &str), Gang<'_>> = BTreeMap::new();
    for pod in world.pods.all.values() {
        let ask = match &pod.ask {
            None => continue,
            Some(Ok(ask)) => ask,
            Some(Err(why)) => {
                if pod.waits() {
                    found.others.push((pod, Unfit::Invalid(why.clone())));
                }
                continue;
            }
        };
        if let Some(why) = refused(world, pod, ask) {
            if pod.waits() && world.place(pod).is_none() {
                found.others.push((pod, Unfit::Invalid(why)));
            }
            continue;
        }
        let is_there = place_is_known(world, pod);
        let gang = ask.gang.as_ref().map(|(name, _)| gangs.entry((&pod.namespace, name)).or_default());
        match (is_there, gang) {
            (true, _) if pod.deleting => found.units.push(single(pod, ask, Doing::Stops)),
            (true, None) => found.units.push(single(pod, ask, Doing::Runs)),
            (true, Some(gang)) => gang.bound.push(pod),
            (false, Some(gang)) if pod.waits() => gang.waiting.push(pod),
            (false, Some(gang)) if pod.succeeded => gang.succeeded.push(pod),
            (false, None) if pod.waits() => found.units.push(single(pod, ask, Doing::Waits)),
            (false, _) => {}
        }
    }
    for ((namespace, name), gang) in gangs {
        gather(&mut found, &format!("{namespace}/gang:{name}"), gang);
    }
    found
}

/// Says whether a pod is on a node that has GPUs, or will be.
fn place_is_known(world: &World, pod: &PodRecord) -> bool {
    world.place(pod).is_some_and(|(node, _)| world.nodes.all.contains_key(node))
}

/// Says why a pod may not have the project that it names.
fn refused(world: &World, pod: &PodRecord, ask: &Ask) -> Option<String> {
    match world.projects.all.get(&ask.project) {
        None => Some(format!("there is no project `{}`: `kubectl get projects` shows them", ask.project)),
        // What runs goes on.
        Some(_) if pod.node.is_some() => None,
        Some(project) if !project.spec.admits(&pod.namespace) => {
            Some(format!("pods of namespace {} may not name project {}", pod.namespace, ask.project))
        }
        Some(_) => None,
    }
}

fn single<'a>(pod: &'a PodRecord, ask: &'a Ask, doing: Doing) -> Unit<'a> {
    Unit { id: pod.key(), ask, doing, pods: vec![pod], rest_of: None }
}

fn gather<'a>(found: &mut Units<'a>, id: &str, mut gang: Gang<'a>) {
    let mut members = gang.bound.iter().chain(&gang.waiting).filter_map(|pod| pod.asked());
    let Some(first) = members.next() else {
        return;
    };
    if !members.all(|ask| (&ask.project, ask.gpus, &ask.gang) == (&first.project, first.gpus, &first.gang)) {
        let why = "the pods of its gang ask for different projects, GPUs or sizes of the gang";
        found.units.extend(gang.bound.iter().filter_map(|pod| Some(single(pod, pod.asked()?, Doing::Runs))));
        found.others.extend(gang.waiting.iter().map(|pod| (*pod, Unfit::Invalid(why.to_owned()))));
        return;
    }
    let size = first.gang.as_ref().map_or(1, |(_, size)| *size);
    gang.waiting.sort_by_key(|pod| (pod.index.unwrap_or(u32::MAX), &pod.name));
    gang.bound.sort_by_key(|pod| (pod.index.unwrap_or(u32::MAX), &pod.name));
    let bound = u32::try_from(gang.bound.len()).unwrap_or(u32::MAX);
    // Those of an earlier gang of that name are none of this one.
    let live: Vec<&Option<String>> = gang.bound.iter().chain(&gang.waiting).map(|pod| &pod.owner).collect();
    let succeeded = gang.succeeded.iter().filter(|pod| pod.owner.is_some() && live.contains(&&pod.owner)).count();
    let needed = (size.saturating_sub(bound) as usize).saturating_sub(succeeded);
    let is_short = gang.waiting.len() < needed;
    let mut rest = gang.waiting.split_off(if is_short { 0 } else { needed });
    let there = bound as usize + gang.waiting.len() + rest.len();
    let why = match is_short {
        true => format!("{there} of the {size} pods of its gang are there; they start together"),
        false => format!("its gang has its {size} pods already"),
    };
    found.others.extend(rest.drain(..).map(|pod| (pod, Unfit::Unready(why.clone()))));
    let rest_of = (bound > 0).then(|| id.to_owned());
    if let Some(ask) = gang.waiting.first().and_then(|pod| pod.asked()) {
        let id = if bound > 0 { format!("{id}+rest") } else { id.to_owned() };
        found.units.push(Unit { id, ask, doing: Doing::Waits, pods: gang.waiting, rest_of });
    }
    if let Some(ask) = gang.bound.first().and_then(|pod| pod.asked()) {
        found.units.push(Unit { id: id.to_owned(), ask, doing: Doing::Runs, pods: gang.bound, rest_of: None });
    }
}
