//! How long one decision takes: 1,000 nodes of 8 GPUs, 20,000 waiting and some 6,500 running jobs.
//!
//! `cargo bench --bench quota`. The goal is 100 ms for a cycle and 200 MB for the process.
//!
//! * `steady`: the cluster is full, everybody has the fair share; each waiting job gets its reason.
//! * `ends`: the same, after 100 jobs ended.
//! * `returns`: a team with a quota of 800 GPUs comes back to a cluster that others use up.
//! * `fill`: all nodes are empty, 27,000 jobs wait.
//!
//! Then 1,000 random traces (TRACES=N: so many) are played: how much of the GPUs is used, against a bound that no
//! schedule can exceed, and how fair that is (Jain's index of service per quota), by fair shares, strict quotas and FIFO.

use std::hint::black_box;

mod traces;

use criterion::{Criterion, criterion_group, criterion_main};
use larder::quota::{Job, JobState, Kind, MilliGpus, Node, Project, Snapshot, Template, after, plan};

const NODES: u64 = 1000;
const TEAMS: u64 = 100;
const WAITING: usize = 20_000;
/// More than 5,000 of them find room.
const JOBS: usize = WAITING + 7_000;

/// Numbers that are as good as random, and the same each time.
fn mixed(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9).wrapping_add(0x9E37_79B9_7F4A_7C15);
    (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB) >> 33
}

fn job(number: u64, teams: u64) -> Job {
    let kind = match mixed(number) % 10 {
        0 => Kind::Interactive,
        1 => Kind::Build,
        _ => Kind::Train,
    };
    let gpus = match (kind, mixed(number + 7) % 20) {
        (Kind::Train, 0..=1) => MilliGpus::whole(1),
        (Kind::Train, 2..=13) => MilliGpus::whole(2),
        (Kind::Train, 14..=17) => MilliGpus::whole(4),
        (Kind::Train, 18..) => MilliGpus::whole(8),
        (Kind::Build, _) => MilliGpus::whole(1),
        (_, 0..=9) => MilliGpus(250),
        _ => MilliGpus(500),
    };
    let team = format!("team-{:03}", mixed(number + 13) % teams);
    let mut job = Job::new(&format!("job-{number:06}"), &team, kind, gpus, number);
    if kind == Kind::Train && mixed(number + 17).is_multiple_of(50) {
        job.templates = vec![Template { processes: 4, ..Template::new(MilliGpus::whole(4)) }, Template::new(gpus)];
    }
    job
}

fn empty(teams: u64) -> Snapshot {
    Snapshot {
        nodes: (0..NODES).map(|number| Node::new(&format!("node-{number:04}"), 8)).collect(),
        projects: (0..TEAMS).map(|number| Project::new(&format!("team-{number:03}"), MilliGpus::whole(72))).collect(),
        jobs: (0..JOBS as u64).map(|number| job(number, teams)).collect(),
        ..Snapshot::default()
    }
}

fn running(snapshot: &Snapshot) -> usize {
    snapshot.jobs.iter().filter(|job| matches!(job.state, JobState::Running { .. })).count()
}

/// A cluster whose GPUs are used up, with so many jobs running and waiting.
fn full(teams: u64) -> Snapshot {
    let mut snapshot = empty(teams);
    for _ in 0..3 {
        let plan = plan(&snapshot).expect("the snapshot is sound");
        snapshot = after(snapshot, &plan);
    }
    let (mut run, mut wait) = (0, 0);
    snapshot.jobs.retain(|job| {
        let counter = if job.state == JobState::Waiting { &mut wait } else { &mut run };
        *counter += 1;
        job.state != JobState::Waiting || wait <= WAITING
    });
    println!("{} jobs run, {} wait", running(&snapshot), wait.min(WAITING));
    snapshot
}

fn decisions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("quota");
    group.sample_size(10);
    let steady = full(TEAMS);
    let mut ends = steady.clone();
    let mut ended = 0;
    ends.jobs.retain(|job| {
        ended += usize::from(job.state != JobState::Waiting);
        job.state == JobState::Waiting || ended > 100
    });
    // One team was away: its part was lent; now it wants 800 GPUs.
    let mut returns = full(TEAMS - 1);
    returns
        .projects
        .iter_mut()
        .filter(|project| project.id.as_str() == "team-099")
        .for_each(|project| project.quota = MilliGpus::whole(800));
    for number in 0..800 {
        returns.jobs.push(Job::new(
            &format!("back-{number}"),
            "team-099",
            Kind::Train,
            MilliGpus::whole(1),
            1_000_000 + number,
        ));
    }
    for (name, snapshot) in [("steady", &steady), ("ends", &ends), ("returns", &returns), ("fill", &empty(TEAMS))] {
        let once = plan(snapshot).expect("the snapshot is sound");
        println!(
            "{name}: {} starts, {} pauses, {} wait",
            once.starts.len(),
            once.preemptions.len(),
            once.waiting.len()
        );
        group
            .bench_function(name, |bencher| bencher.iter(|| plan(black_box(snapshot)).expect("the snapshot is sound")));
    }
    group.finish();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .filter(|line| line.starts_with("VmHWM"))
        .for_each(|line| println!("{line} (four such snapshots, and criterion)"));
}

/// Not a time but a quality: printed once.
fn sharing(_: &mut Criterion) {
    let count = std::env::var("TRACES").ok().and_then(|text| text.parse().ok()).unwrap_or(1000);
    let mut number = 0u64;
    let random = |limit: u64| {
        number += 1;
        mixed(number.wrapping_mul(0x9E37_79B9_7F4A_7C15)) % limit.max(1)
    };
    traces::compare(random, |round| round < count);
}

criterion_group!(benches, decisions, sharing);
criterion_main!(benches);
