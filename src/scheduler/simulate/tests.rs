//! Tests of the simulator: the shipped scenarios, the figures of a report, and what is refused.

use super::report::Report;
use super::{Policy, Scenario, SimulateError, plot, simulate};
use crate::quota::MilliGpus;

fn shipped(name: &str) -> Scenario {
    let path = format!("{}/examples/scenarios/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
    Scenario::parse(&std::fs::read_to_string(path).expect("reads")).expect("is a scenario")
}

fn played(text: &str, policy: Policy) -> Report {
    simulate(&Scenario::parse(text).expect("is a scenario"), policy).expect("plays")
}

/// What each project has, and how many of its jobs wait, after the sample.
fn shares(report: &Report, sample: usize) -> Vec<String> {
    let sample = &report.samples[sample];
    let told = |project: &crate::quota::Project| {
        let has = sample.allocated[&project.id];
        match sample.waiting[&project.id].len() {
            0 => has.to_string(),
            waiting => format!("{has} +{waiting}"),
        }
    };
    report.projects.iter().map(told).collect()
}

#[test]
fn the_golden_scenario_plays_as_promised() {
    let report = simulate(&shipped("golden"), Policy::Fair).expect("plays");
    assert_eq!(shares(&report, 0), ["4", "4", "4", "4"]);
    assert_eq!(shares(&report, 2), ["4", "2 +1", "2 +1", "8"]);
    assert_eq!(shares(&report, 3), ["4 +2", "2 +2", "2 +2", "8"]);
    assert_eq!(shares(&report, 4), ["8", "4 +1", "4 +1", "0"]);
    assert_eq!((report.utilisation_permille(), report.pauses()), (1000, 2));
}

#[test]
fn every_shipped_scenario_plays_by_every_policy_within_its_bound() {
    for name in ["golden", "gang", "reclaim"] {
        for policy in [Policy::Fair, Policy::Quota, Policy::Fifo] {
            let report = simulate(&shipped(name), policy).expect("plays");
            let (used, bound) = (report.utilisation_permille(), report.utilisation_bound_permille());
            assert!(used <= bound && bound <= 1000, "{name} {policy:?}: {used} of {bound}");
            assert!(plot::plot(&report, 40).iter().any(|line| line.contains('a')), "{name}: something is drawn");
        }
    }
}

#[test]
fn the_gang_takes_its_quota_back_in_one_go_and_a_drained_node_empties() {
    let report = simulate(&shipped("gang"), Policy::Fair).expect("plays");
    assert_eq!(shares(&report, 1)[0], "16.5", "the gang and the notebook run at once");
    let drained = report.samples.iter().find(|sample| sample.label.as_deref() == Some("a node must be repaired"));
    assert!(drained.is_some_and(|sample| sample.allocated.values().copied().sum::<MilliGpus>() <= MilliGpus(26_000)));
}

const TWO: &str = "
projects: [{id: a, quota: 1}, {id: b, quota: 1}]
nodes: [{id: n, gpus: 2}]
events:
  - submit:
      - {id: a1, project: a, gpus: 1, runs: 10}
      - {id: a2, project: a, gpus: 2, runs: 10}
      - {id: b1, project: b, gpus: 1, runs: 10}
until: 40
";

#[test]
fn policies_differ_as_their_names_say() {
    let fair = played(TWO, Policy::Fair);
    assert_eq!((shares(&fair, 0), fair.utilisation_permille()), (vec!["1 +1".into(), "1".into()], 500));
    let fifo = played(TWO, Policy::Fifo);
    assert_eq!(shares(&fifo, 0), ["1 +1", "0 +1"], "the large job holds up the small one");
    let quota = played(TWO, Policy::Quota);
    assert_eq!(
        shares(&quota, quota.samples.len() - 1),
        ["0 +1", "0"],
        "beyond the quota nothing runs, even on idle GPUs"
    );
}

#[test]
fn a_paused_job_goes_on_where_it_stopped() {
    let report = played(
        "
projects: [{id: a, quota: 0, weight: 1}, {id: b, quota: 1}]
nodes: [{id: n, gpus: 1}]
events:
  - {submit: [{id: long, project: a, runs: 100}]}
  - {at: 40, submit: [{id: short, project: b, runs: 30}]}
",
        Policy::Fair,
    );
    let ended = |id: &str| report.jobs[&id.into()].ended_ms;
    assert_eq!((ended("short"), ended("long")), (Some(70_000), Some(130_000)));
    assert_eq!((report.pauses(), report.utilisation_permille()), (1, 1000));
}

#[test]
fn the_bound_knows_that_work_must_come_before_it_is_done() {
    let report = played(TWO, Policy::Fair);
    // 1 + 2 + 1 GPUs for 10 s each: 40 of 80 GPU seconds, whatever the order.
    assert_eq!(report.utilisation_bound_permille(), 500);
    let late = TWO.replace("- submit", "- at: 30\n    submit");
    assert_eq!(played(&late, Policy::Fair).utilisation_bound_permille(), 250, "only the last quarter is left");
}

#[test]
fn jain_is_one_when_all_get_alike_and_one_nth_when_one_gets_all() {
    let mut report = played(TWO, Policy::Fair);
    for (a, b, jain) in [(5, 5, 1000), (7, 0, 500), (3, 1, 800)] {
        report.service_ms = [("a".into(), a * 1000), ("b".into(), b * 1000)].into();
        assert_eq!(report.jain_permille(), jain);
    }
}

#[test]
fn scenarios_that_make_no_sense_are_refused_with_the_place() {
    let wrong = Scenario::parse("projects: []\nnodes: []\nevents: [{at: soon}]").expect_err("no time");
    let cause = std::error::Error::source(&wrong).map(ToString::to_string).unwrap_or_default();
    assert!(cause.contains("line") || cause.contains("3"), "{cause}");
    assert!(Scenario::parse("projects: []\nnodes: []\nevents: []\nsurprise: 1").is_err());
    let lost = TWO.replace("until: 40", "  - {at: 5, delete: [nobody]}");
    let lost = simulate(&Scenario::parse(&lost).expect("reads"), Policy::Fair);
    assert!(matches!(lost, Err(SimulateError::Unknown { at_s: 5, kind: "job", .. })));
    let stranger = TWO.replace("project: b,", "project: c,");
    let stranger = simulate(&Scenario::parse(&stranger).expect("reads"), Policy::Fair);
    assert!(matches!(stranger, Err(SimulateError::Snapshot { .. })));
}
