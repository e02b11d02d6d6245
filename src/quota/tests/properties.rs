//! Promises on random clusters and streams of events. A failure prints its seed: put it into
//! `stream_of_seed` to see it again.

use proptest::prelude::*;

use super::super::{
    Claim, Job, Kind, MilliGpus, Node, NodeState, Project, Snapshot, Template, after, fair_shares, plan,
};
use super::kit::cluster;
use super::oracle::check;

/// A small generator of numbers (splitmix64), so that a seed is all that is needed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }

    fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }

    fn shuffle<T>(&mut self, all: &mut [T]) {
        for at in (1..all.len()).rev() {
            all.swap(at, self.below(at as u64 + 1) as usize);
        }
    }
}

fn pools(random: &mut Random) -> std::collections::BTreeSet<String> {
    ["x", "y"].iter().filter(|_| random.one_in(3)).map(ToString::to_string).collect()
}

fn template(random: &mut Random) -> Template {
    let sizes = [100, 250, 300, 500, 500, 700, 1000, 1000, 1000, 2000, 2000, 3000, 4000, 8000];
    let mut template = Template::new(MilliGpus(*random.pick(&sizes)));
    if random.one_in(4) {
        template.processes = 1 + random.below(4) as u32;
    }
    if random.one_in(8) {
        template.pool = Some((*random.pick(&["x", "y", "nowhere"])).to_owned());
    }
    if random.one_in(10) {
        template.labels.insert("gpu".into(), (*random.pick(&["old", "new"])).to_owned());
    }
    template
}

fn world(random: &mut Random) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for number in 0..1 + random.below(5) {
        let mut node = Node::new(&format!("n{number}"), 1 + random.below(8) as u32);
        node.pools = pools(random);
        node.labels.insert("gpu".into(), (*random.pick(&["old", "new"])).to_owned());
        snapshot.nodes.push(node);
    }
    for number in 0..1 + random.below(5) {
        let mut project = Project::new(&format!("p{number}"), MilliGpus(500 * random.below(12)));
        project.weight = random.one_in(2).then(|| MilliGpus(1000 * random.below(5)));
        project.limit = random.one_in(5).then(|| MilliGpus(1000 + 500 * random.below(12)));
        if random.one_in(6) {
            (project.train_pools, project.interactive_pools) = (pools(random), pools(random));
        }
        snapshot.projects.push(project);
    }
    snapshot
        .held
        .insert("commit".into(), snapshot.nodes.iter().filter(|_| random.one_in(2)).map(|n| n.id.clone()).collect());
    snapshot
}

fn submit(random: &mut Random, snapshot: &mut Snapshot, seq: u64) {
    let kind = *random.pick(&[Kind::Train, Kind::Train, Kind::Train, Kind::Interactive, Kind::Build, Kind::Inference]);
    let project = random.pick(&snapshot.projects).id.clone();
    let mut job = Job::new(&format!("j{seq:04}"), project.as_str(), kind, MilliGpus(1000), seq);
    job.templates = (0..1 + random.below(2)).map(|_| template(random)).collect();
    if random.one_in(5) {
        job.priority = 40 + random.below(3) as u32 * 10;
    }
    if random.one_in(6) {
        job.preemptible = !job.preemptible;
    }
    job.near = random.one_in(3).then(|| "commit".to_owned());
    snapshot.jobs.push(job);
}

/// Something happens: jobs come, jobs end, a node or a quota changes.
fn event(random: &mut Random, snapshot: &mut Snapshot, seq: &mut u64) {
    match random.below(8) {
        0..=4 => {
            for _ in 0..1 + random.below(8) {
                submit(random, snapshot, *seq);
                *seq += 1;
            }
        }
        5 => snapshot.jobs.retain(|_| !random.one_in(4)),
        6 => {
            let at = random.below(snapshot.nodes.len() as u64) as usize;
            snapshot.nodes[at].state =
                *random.pick(&[NodeState::Ready, NodeState::Ready, NodeState::Cordoned, NodeState::Draining]);
        }
        _ => {
            let at = random.below(snapshot.projects.len() as u64) as usize;
            snapshot.projects[at].quota = MilliGpus(500 * random.below(12));
        }
    }
}

/// Plays a stream; `each` sees every snapshot before its cycle.
fn stream(seed: u64, events: u64, mut each: impl FnMut(&mut Random, &Snapshot)) -> Snapshot {
    let random = &mut Random(seed);
    let (mut snapshot, mut seq) = (world(random), 0);
    for _ in 0..events {
        event(random, &mut snapshot, &mut seq);
        each(random, &snapshot);
        snapshot.cycle();
    }
    snapshot
}

/// Prints the snapshot of a check that failed.
struct Shown<'a>(&'a Snapshot);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the snapshot was {}", serde_json::to_string(self.0).unwrap_or_default());
        }
    }
}

/// Plays a stream with all checks, until nothing changes after each event.
fn stream_of_seed(seed: u64, events: u64) {
    stream(seed, events, |_, snapshot| {
        let mut now = snapshot.clone();
        for cycle in 0.. {
            let plan = plan(&now).expect("the snapshot is sound");
            let next = after(now.clone(), &plan);
            let shown = Shown(&now);
            check(&now, &plan, &next);
            if plan.starts.is_empty() && plan.preemptions.is_empty() {
                break;
            }
            assert!(cycle < 30, "the system does not settle");
            drop(shown);
            now = next;
        }
    });
}

/// Streams that once broke a promise.
#[test]
fn streams_that_found_something_are_played_for_ever() {
    for (seed, events) in [
        (4025279909654133536, 6),
        (7070285715475419177, 5),
        (15076278035032813302, 2),
        (2778173804772845154, 9),
        (9298975159983064671, 6),
        (12346804368551203043, 7),
        (612155285929712335, 7),
        (8594718796505535257, 8),
        (4249370207309581059, 8),
        (11248633077210496283, 4),
        (4362214848504622841, 11),
    ] {
        stream_of_seed(seed, events);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_plan_keeps_every_promise_and_the_system_settles(seed in any::<u64>(), events in 1u64..12) {
        stream_of_seed(seed, events);
    }

    #[test]
    fn the_same_snapshot_gives_the_same_plan_in_any_order(seed in any::<u64>(), events in 1u64..12) {
        stream(seed, events, |random, snapshot| {
            let mut mixed = snapshot.clone();
            random.shuffle(&mut mixed.jobs);
            random.shuffle(&mut mixed.nodes);
            random.shuffle(&mut mixed.projects);
            assert_eq!(plan(snapshot), plan(&mixed));
        });
    }

    #[test]
    fn a_template_without_candidates_changes_nothing(seed in any::<u64>(), events in 1u64..12) {
        stream(seed, events, |random, snapshot| {
            let mut mixed = snapshot.clone();
            let mut nowhere = Template::new(MilliGpus(1000));
            nowhere.pool = Some("nowhere".into());
            for job in mixed.jobs.iter_mut().filter(|job| matches!(job.state, super::super::JobState::Waiting)) {
                if random.one_in(2) {
                    job.templates.insert(0, nowhere.clone());
                }
            }
            let mut lost = Job::new("lost", snapshot.projects[0].id.as_str(), Kind::Train, MilliGpus(1000), 0);
            lost.priority = 1000;
            lost.templates = vec![nowhere];
            mixed.jobs.push(lost);
            let (one, other) = (plan(snapshot).expect("is sound"), plan(&mixed).expect("is sound"));
            assert_eq!(one.started(), other.started());
            assert_eq!(one.preemptions, other.preemptions);
            assert_eq!(one.shares, other.shares);
        });
    }

    #[test]
    fn a_plan_survives_being_stored(seed in any::<u64>(), events in 1u64..6) {
        let snapshot = stream(seed, events, |_, _| {});
        let text = serde_json::to_string(&snapshot).expect("prints");
        prop_assert_eq!(serde_json::from_str::<Snapshot>(&text).expect("reads"), snapshot);
    }

    #[test]
    fn shares_sum_up_and_grow_with_the_weight(
        capacity in 0u64..64_000,
        claims in prop::collection::vec((0u64..16_000, 0u64..20, 0u64..40_000), 1..8),
        more in 1u64..20,
        at in any::<prop::sample::Index>(),
    ) {
        let claim = |(quota, weight, demand): &(u64, u64, u64)| Claim { quota: MilliGpus(*quota), weight: *weight, demand: MilliGpus(*demand) };
        let claims: Vec<Claim> = claims.iter().map(claim).collect();
        let shares = fair_shares(MilliGpus(capacity), &claims);
        let guaranteed: u64 = claims.iter().map(|claim| claim.quota.0.min(claim.demand.0)).sum();
        prop_assert!(shares.iter().map(|share| share.0).sum::<u64>() <= capacity.max(guaranteed));
        for (share, claim) in shares.iter().zip(&claims) {
            prop_assert!(*share >= claim.quota.min(claim.demand) && *share <= claim.demand);
        }
        let left = capacity.saturating_sub(shares.iter().map(|share| share.0).sum());
        let hungry = shares.iter().zip(&claims).any(|(share, claim)| *share < claim.demand && claim.weight > 0);
        prop_assert!(!hungry || left < claims.len() as u64, "{left} thousandths are left, and somebody wants them");
        let at = at.index(claims.len());
        let mut heavier = claims.clone();
        heavier[at].weight += more;
        let grown = fair_shares(MilliGpus(capacity), &heavier);
        prop_assert!(grown[at] >= shares[at]);
        for other in (0..claims.len()).filter(|other| *other != at) {
            prop_assert!(grown[other] <= shares[other]);
        }
    }

    #[test]
    fn with_divisible_jobs_allocations_follow_the_weights(weights in prop::collection::vec(1u64..6, 2..5), more in 1u64..4) {
        let allocations = |weights: &[u64]| -> Vec<u64> {
            let mut snapshot = cluster(&[("n1", 4), ("n2", 4)], &[]);
            for (number, weight) in weights.iter().enumerate() {
                let mut project = Project::new(&format!("p{number}"), MilliGpus(0));
                project.weight = Some(MilliGpus::whole(*weight));
                let id = project.id.clone();
                snapshot.projects.push(project);
                for job in 0..80 {
                    snapshot.submit(&format!("p{number}-{job:02}"), id.as_str(), "0.1");
                }
            }
            let plan = snapshot.cycle();
            plan.shares.iter().for_each(|share| {
                let apart = share.allocated.0.abs_diff(share.fair_share.0);
                assert!(apart <= 200, "{} has {} of {}", share.project, share.allocated, share.fair_share);
            });
            plan.shares.iter().map(|share| share.allocated.0).collect()
        };
        let one = allocations(&weights);
        let mut heavier = weights.clone();
        heavier[0] += more;
        prop_assert!(allocations(&heavier)[0] + 200 >= one[0]);
    }
}
