//! The GPUs of all nodes: how much of each is free, and who takes which.
//!
//! Two indexes over nodes that take new jobs answer "where does this fit best" without looking at
//! every node: nodes by the number of their wholly free GPUs, and GPUs that are partly free by how
//! much. `take` is the only way to a GPU and refuses what is not there.

use std::collections::BTreeSet;

/// All of one GPU.
const WHOLE: u32 = 1000;

/// GPUs of one node, by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spot {
    pub node: u32,
    pub gpus: Vec<u32>,
    pub each: u32,
}

/// One node.
#[derive(Debug)]
pub(super) struct GpuNode {
    /// Thousandths free, by GPU.
    pub free: Vec<u32>,
    /// GPUs that are wholly free.
    pub whole: u32,
    /// Whether new jobs may come; only such nodes are in the indexes.
    pub ready: bool,
    /// Changes whenever something is taken or released, or the jobs' standing changes.
    pub version: u64,
}

/// What is asked for: `each` of a GPU, or that many wholly, for each of `processes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Request {
    /// Which nodes: a number of `demands::Classes`.
    pub class: u32,
    /// Thousandths for each process: below 1000, or a multiple of it.
    pub milli: u32,
    pub processes: u32,
}

impl Request {
    /// GPUs of a process, if it asks for whole ones.
    pub fn gpus(&self) -> Option<u32> {
        self.milli.is_multiple_of(WHOLE).then_some(self.milli / WHOLE)
    }

    pub fn size(&self) -> u64 {
        u64::from(self.milli) * u64::from(self.processes)
    }
}

/// Processes of `milli` each that fit on GPUs with so much `free`.
pub(super) fn slots(free: impl Iterator<Item = u32>, milli: u32) -> u32 {
    if milli.is_multiple_of(WHOLE) {
        let whole = free.filter(|free| *free == WHOLE).count();
        return u32::try_from(whole).unwrap_or(u32::MAX) / (milli / WHOLE).max(1);
    }
    free.map(|free| free / milli.max(1)).fold(0, u32::saturating_add)
}

#[derive(Debug, Default)]
pub(super) struct Cluster {
    pub nodes: Vec<GpuNode>,
    /// By number of wholly free GPUs: the nodes.
    by_whole: Vec<BTreeSet<u32>>,
    /// (free, node, gpu) of GPUs that are partly free.
    partial: BTreeSet<(u32, u32, u32)>,
    /// Counts releases: what did not fit fits no sooner than after one.
    pub releases: u64,
}

impl Cluster {
    /// Makes empty nodes: number of GPUs, and whether they take new jobs.
    pub fn new(nodes: impl Iterator<Item = (u32, bool)>) -> Self {
        let mut cluster = Self::default();
        for (gpus, ready) in nodes {
            let number = cluster.nodes.len() as u32;
            let free = vec![WHOLE; gpus as usize];
            cluster.nodes.push(GpuNode { free, whole: gpus, ready, version: 0 });
            if cluster.by_whole.len() <= gpus as usize {
                cluster.by_whole.resize_with(gpus as usize + 1, BTreeSet::new);
            }
            if ready {
                cluster.by_whole[gpus as usize].insert(number);
            }
        }
        cluster
    }

    /// Takes the spot; gives the first GPU that is not there or has too little, and takes nothing then.
    pub fn take(&mut self, spot: &Spot) -> Result<(), u32> {
        let free = &self.nodes[spot.node as usize].free;
        for (at, gpu) in spot.gpus.iter().enumerate() {
            let enough = free.get(*gpu as usize).is_some_and(|free| *free >= spot.each);
            if !enough || spot.gpus[..at].contains(gpu) {
                return Err(*gpu);
            }
        }
        for gpu in &spot.gpus {
            self.set(spot.node, *gpu, |free| free - spot.each);
        }
        Ok(())
    }

    /// Gives the spot back.
    pub fn release(&mut self, spot: &Spot) {
        self.releases += 1;
        for gpu in &spot.gpus {
            self.set(spot.node, *gpu, |free| free + spot.each);
        }
    }

    fn set(&mut self, number: u32, gpu: u32, change: impl Fn(u32) -> u32) {
        let node = &mut self.nodes[number as usize];
        let (was, whole_was) = (node.free[gpu as usize], node.whole);
        let is = change(was);
        node.free[gpu as usize] = is;
        node.whole = node.whole + u32::from(is == WHOLE) - u32::from(was == WHOLE);
        node.version += 1;
        if !node.ready {
            return;
        }
        if node.whole != whole_was {
            self.by_whole[whole_was as usize].remove(&number);
            self.by_whole[node.whole as usize].insert(number);
        }
        if was > 0 && was < WHOLE {
            self.partial.remove(&(was, number, gpu));
        }
        if is > 0 && is < WHOLE {
            self.partial.insert((is, number, gpu));
        }
    }

    /// Says whether the request fits now on nodes that `on` allows.
    pub fn fits(&self, request: &Request, on: &impl Fn(u32) -> bool) -> bool {
        self.slots_up_to(request, request.processes, on) >= request.processes
    }

    /// Counts processes that fit now, up to `most`.
    pub fn slots_up_to(&self, request: &Request, most: u32, on: &impl Fn(u32) -> bool) -> u32 {
        let mut found = 0u32;
        let Some(gpus) = request.gpus() else {
            for (free, _, _) in self.partial.range((request.milli, 0, 0)..).filter(|(_, node, _)| on(*node)) {
                found = found.saturating_add(free / request.milli);
                if found >= most {
                    return most;
                }
            }
            return self.count_whole(1, WHOLE / request.milli, found, most, on);
        };
        self.count_whole(gpus, 1, found, most, on)
    }

    /// Adds to `found`, for each `gpus` wholly free GPUs of a node, `per_slot`.
    fn count_whole(&self, gpus: u32, per_slot: u32, mut found: u32, most: u32, on: &impl Fn(u32) -> bool) -> u32 {
        for (whole, nodes) in self.by_whole.iter().enumerate().skip(gpus as usize) {
            for _ in nodes.iter().filter(|node| on(**node)) {
                found = found.saturating_add((whole as u32 / gpus).saturating_mul(per_slot));
                if found >= most {
                    return most;
                }
            }
        }
        found
    }

    /// Takes the best places for the request on nodes that `on` allows, or nothing.
    pub fn place(&mut self, request: &Request, on: &impl Fn(u32) -> bool) -> Option<Vec<Spot>> {
        if !self.fits(request, on) {
            return None;
        }
        let mut spots = Vec::with_capacity(request.processes as usize);
        while spots.len() < request.processes as usize {
            let rest = request.processes - spots.len() as u32;
            let found = match request.gpus() {
                Some(gpus) => self.whole_spots(gpus, rest, on),
                None => self.fraction_spot(request.milli, on).into_iter().collect(),
            };
            debug_assert!(!found.is_empty(), "what fits has a place");
            if found.is_empty() {
                spots.iter().for_each(|spot| self.release(spot));
                return None;
            }
            for spot in found {
                debug_assert!(self.nodes[spot.node as usize].ready);
                let taken = self.take(&spot);
                debug_assert!(taken.is_ok(), "a place that was found is free");
                spots.push(spot);
            }
        }
        Some(spots)
    }

    /// The fullest GPU that still has `milli`; else one of the node with the fewest wholly free ones.
    fn fraction_spot(&self, milli: u32, on: &impl Fn(u32) -> bool) -> Option<Spot> {
        let partly = self.partial.range((milli, 0, 0)..).find(|(_, node, _)| on(*node));
        if let Some((_, node, gpu)) = partly {
            return Some(Spot { node: *node, gpus: vec![*gpu], each: milli });
        }
        let node = self.by_whole.iter().skip(1).flatten().find(|node| on(**node))?;
        Some(Spot { node: *node, gpus: self.whole_gpus(*node, 1), each: milli })
    }

    /// As many of `rest` processes as one node takes: the tightest node that takes all of them, else the emptiest.
    fn whole_spots(&self, gpus: u32, rest: u32, on: &impl Fn(u32) -> bool) -> Vec<Spot> {
        let allowed = |nodes: &BTreeSet<u32>| nodes.iter().copied().find(|node| on(*node));
        let all = gpus.saturating_mul(rest) as usize;
        let tightest = self.by_whole.iter().skip(all).find_map(allowed);
        let emptiest = || self.by_whole.iter().skip(gpus as usize).rev().find_map(allowed);
        let Some(node) = tightest.or_else(emptiest) else {
            return Vec::new();
        };
        let count = (self.nodes[node as usize].whole / gpus).min(rest);
        let free = self.whole_gpus(node, count * gpus);
        free.chunks(gpus as usize).map(|gpus| Spot { node, gpus: gpus.to_vec(), each: WHOLE }).collect()
    }

    /// The first `count` wholly free GPUs of a node.
    fn whole_gpus(&self, node: u32, count: u32) -> Vec<u32> {
        let free = &self.nodes[node as usize].free;
        (0..free.len() as u32).filter(|gpu| free[*gpu as usize] == WHOLE).take(count as usize).collect()
    }

    /// Thousandths free on nodes that take new jobs and that `on` allows.
    pub fn free(&self, on: &impl Fn(u32) -> bool) -> u64 {
        let partly: u64 =
            self.partial.iter().filter(|(_, node, _)| on(*node)).map(|(free, _, _)| u64::from(*free)).sum();
        let wholly = self.by_whole.iter().enumerate().skip(1);
        let wholly: u64 =
            wholly.map(|(whole, nodes)| (whole * nodes.iter().filter(|node| on(**node)).count()) as u64).sum();
        partly + wholly * u64::from(WHOLE)
    }
}
