//! How good the sharing is: random traces by fair shares, by strict quotas and by plain FIFO, compared
//! with a bound that no schedule can exceed.

use std::time::Instant;

use larder::quota::{Kind, MilliGpus, Project};
use larder::scheduler::simulate::scenario::{Event, JobSpec, NodeSpec, Span};
use larder::scheduler::simulate::{Policy, Scenario, simulate};

use super::Campaign;

/// Four hours in which some 250 jobs come, in bursts, to 3 to 5 teams on 16 to 64 GPUs.
fn trace(campaign: &mut Campaign) -> Scenario {
    let nodes = 2 + campaign.below(7);
    let teams = 3 + campaign.below(3);
    let projects = (0..teams).map(|team| {
        let quota = MilliGpus::whole(1 + campaign.below(nodes * 8 * 2 / teams));
        Project::new(&format!("team-{team}"), quota)
    });
    let projects: Vec<Project> = projects.collect();
    let mut events = Vec::new();
    for burst in 0..40 + campaign.below(40) {
        // Teams have their hours: a burst is one team's, and some teams have more of them.
        let team = campaign.below(teams).min(campaign.below(teams));
        let project = projects[team as usize].id.clone();
        let kind = if campaign.below(5) == 0 { Kind::Interactive } else { Kind::Train };
        let sizes: &[u64] =
            if kind == Kind::Train { &[1000, 1000, 2000, 2000, 4000, 8000] } else { &[250, 500, 500, 1000] };
        let gpus = MilliGpus(sizes[campaign.below(sizes.len() as u64) as usize]);
        let job = JobSpec {
            id: format!("job-{burst}"),
            project,
            gpus: Some(gpus),
            processes: (campaign.below(10) == 0).then(|| 2 + campaign.below(3) as u32),
            kind,
            priority: None,
            preemptible: None,
            templates: Vec::new(),
            near: None,
            runs: Some(Span { ms: 60_000 * (5 + campaign.below(120)) }),
            count: Some(1 + campaign.below(8) as u32),
        };
        let at = Span { ms: 1000 * campaign.below(4 * 3600) };
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

#[derive(Default)]
struct Sums {
    used: u64,
    of_bound: u64,
    jain: u64,
    wait_s: u64,
    pauses: u64,
}

#[test]
#[ignore = "long: make campaign PART=sched"]
fn sharing_uses_more_than_quotas_and_is_fairer_than_a_queue() {
    let mut campaign = Campaign::new();
    let policies = [Policy::Fair, Policy::Quota, Policy::Fifo];
    let mut sums = [Sums::default(), Sums::default(), Sums::default()];
    let begun = Instant::now();
    let mut rounds = 0u64;
    while campaign.goes_on(rounds, 1000) {
        let scenario = trace(&mut campaign);
        for (policy, sum) in policies.iter().zip(&mut sums) {
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
    println!("{rounds} traces in {:.1} s", begun.elapsed().as_secs_f64());
    println!("policy   used    of the bound   Jain    mean wait   pauses a trace");
    for (policy, sum) in policies.iter().zip(&sums) {
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
    let [fair, quota, fifo] = &sums;
    assert!(fair.used > quota.used, "lending uses more than strict quotas");
    assert!(fair.jain > fifo.jain, "shares are fairer than a queue");
}
