//! How good the sharing is: random traces by fair shares, by strict quotas and by plain FIFO, compared
//! with a bound that no schedule can exceed. The bench prints it, and a campaign part asserts on it.

use std::time::Instant;

use larder::quota::{Kind, MilliGpus, Project};
use larder::scheduler::simulate::scenario::{Event, JobSpec, NodeSpec, Span};
use larder::scheduler::simulate::{Policy, Scenario, simulate};

/// Four hours in which some 250 jobs come, in bursts, to 3 to 5 teams on 16 to 64 GPUs.
fn trace(below: &mut impl FnMut(u64) -> u64) -> Scenario {
    let nodes = 2 + below(7);
    let teams = 3 + below(3);
    let projects = (0..teams).map(|team| {
        let quota = MilliGpus::whole(1 + below(nodes * 8 * 2 / teams));
        Project::new(&format!("team-{team}"), quota)
    });
    let projects: Vec<Project> = projects.collect();
    let mut events = Vec::new();
    for burst in 0..40 + below(40) {
        // Teams have their hours: a burst is one team's, and some teams have more of them.
        let team = below(teams).min(below(teams));
        let project = projects[team as usize].id.clone();
        let kind = if below(5) == 0 { Kind::Interactive } else { Kind::Train };
        let sizes: &[u64] =
            if kind == Kind::Train { &[1000, 1000, 2000, 2000, 4000, 8000] } else { &[250, 500, 500, 1000] };
        let gpus = MilliGpus(sizes[below(sizes.len() as u64) as usize]);
        let job = JobSpec {
            id: format!("job-{burst}"),
            project,
            gpus: Some(gpus),
            processes: (below(10) == 0).then(|| 2 + below(3) as u32),
            kind,
            priority: None,
            preemptible: None,
            templates: Vec::new(),
            near: None,
            runs: Some(Span { ms: 60_000 * (5 + below(120)) }),
            count: Some(1 + below(8) as u32),
        };
        let at = Span { ms: 1000 * below(4 * 3600) };
        events.push(Event { at, submit: vec![job], ..Event::default() });
    }
    let node = NodeSpec { id: "n".into(), gpus: 8, count: Some(nodes as u32), labels: [].into(), pools: [].into() };
    Scenario {
        about: String::new(),
        projects,
        nodes: vec![node],
        held: [].into(),
        events,
        until: Some(Span { ms: 4 * 3_600_000 }),
    }
}

/// What came of all traces by one policy.
#[derive(Debug, Default)]
pub struct Sums {
    pub used: u64,
    pub of_bound: u64,
    pub jain: u64,
    pub wait_s: u64,
    pub pauses: u64,
}

pub const POLICIES: [Policy; 3] = [Policy::Fair, Policy::Quota, Policy::Fifo];

/// Plays traces as long as `goes_on` says so, and prints the means. `below` gives random numbers.
pub fn compare(mut below: impl FnMut(u64) -> u64, goes_on: impl Fn(u64) -> bool) -> [Sums; 3] {
    let mut sums = [Sums::default(), Sums::default(), Sums::default()];
    let begun = Instant::now();
    let mut rounds = 0u64;
    while goes_on(rounds) {
        let scenario = trace(&mut below);
        for (policy, sum) in POLICIES.iter().zip(&mut sums) {
            let report = simulate(&scenario, *policy).expect("the trace plays");
            let (used, bound) = (report.utilisation_permille(), report.utilisation_bound_permille());
            assert!(used <= bound, "round {rounds}, {policy:?}: {used} is above the bound {bound}");
            sum.used += used;
            sum.of_bound += (used * 1000).checked_div(bound).unwrap_or(1000);
            sum.jain += report.jain_permille();
            sum.wait_s += report.mean_wait_ms() / 1000;
            sum.pauses += report.pauses();
        }
        rounds += 1;
    }
    println!("{rounds} random traces in {:.1} s", begun.elapsed().as_secs_f64());
    println!("policy   used    of the bound   Jain    mean wait   pauses a trace");
    for (policy, sum) in POLICIES.iter().zip(&sums) {
        let mean = |sum: u64| sum as f64 / rounds as f64;
        println!(
            "{:<8} {:>4.1} %  {:>8.1} %     {:.3}   {:>6.0} s    {:>5.1}",
            format!("{policy:?}"),
            mean(sum.used) / 10.0,
            mean(sum.of_bound) / 10.0,
            mean(sum.jain) / 1000.0,
            mean(sum.wait_s),
            mean(sum.pauses)
        );
    }
    sums
}
