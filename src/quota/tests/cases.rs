//! Worked cases, one behaviour each.

use std::collections::BTreeSet;

use super::super::{Claim, Grounds, JobState, MilliGpus, NodeState, SnapshotError, Template, Why, fair_shares, plan};
use super::kit::{cluster, gpus};

#[test]
fn amounts_print_and_parse_exactly() {
    for (text, milli) in [("2", 2000), ("0.5", 500), ("1.25", 1250), ("0.125", 125), ("0", 0)] {
        assert_eq!(gpus(text), MilliGpus(milli));
        assert_eq!(MilliGpus(milli).to_string(), text);
    }
    for text in ["", ".", "-1", "1.2345", "x", "1e3"] {
        assert!(text.parse::<MilliGpus>().is_err(), "{text}");
    }
}

#[test]
fn surplus_goes_out_by_weight_until_demands_are_met() {
    let claim = |quota, weight, demand| Claim { quota: gpus(quota), weight, demand: gpus(demand) };
    let shares =
        |claims: &[Claim]| -> Vec<String> { fair_shares(gpus("16"), claims).iter().map(ToString::to_string).collect() };
    assert_eq!(
        shares(&[claim("4", 4, "9"), claim("2", 2, "9"), claim("2", 2, "9"), claim("8", 8, "0")]),
        ["8", "4", "4", "0"]
    );
    assert_eq!(shares(&[claim("4", 4, "5"), claim("2", 2, "9"), claim("2", 1, "9")]), ["5", "6.666", "4.333"]);
    assert_eq!(shares(&[claim("10", 1, "20"), claim("10", 1, "20")]), ["10", "10"], "quotas beyond the capacity stand");
}

#[test]
fn fractions_fill_up_a_gpu_before_they_open_another() {
    let mut s = cluster(&[("n1", 2), ("n2", 2)], &[("a", "4")]);
    for (id, amount) in [("j1", "0.5"), ("j2", "0.3"), ("j3", "0.6"), ("j4", "0.2"), ("j5", "0.4"), ("j6", "2")] {
        s.submit(id, "a", amount);
    }
    assert_eq!(s.cycle().started().len(), 6, "six jobs of exactly four GPUs");
}

#[test]
fn small_jobs_leave_whole_nodes_to_large_ones() {
    let mut s = cluster(&[("n1", 4), ("n2", 8)], &[("a", "12")]);
    for id in ["j1", "j2"] {
        s.submit(id, "a", "1");
        s.cycle();
    }
    s.submit("large", "a", "8");
    s.cycle();
    assert!(s.running("large"));
}

#[test]
fn a_gang_starts_whole_or_not_at_all() {
    let mut s = cluster(&[("n1", 4), ("n2", 4)], &[("a", "8")]);
    s.submit("other", "a", "1");
    s.cycle();
    s.submit("gang", "a", "2").templates[0].processes = 4;
    let refused = s.cycle();
    assert!(!s.running("gang"));
    assert!(matches!(refused.why("gang"), Why::ShareInUse { .. }), "{}", refused.why("gang"));
    s.end("other");
    let started = s.cycle();
    assert_eq!(started.starts[0].placement.seats.len(), 4);
}

#[test]
fn interactive_jobs_stay_within_the_quota_and_are_never_paused() {
    let mut s = cluster(&[("n1", 4)], &[("a", "2"), ("b", "2")]);
    s.submit("a1", "a", "1i");
    s.submit("a2", "a", "1i");
    s.submit("a3", "a", "1i");
    let plan = s.cycle();
    assert_eq!(plan.started(), ["a1", "a2"]);
    assert_eq!(plan.why("a3").kind(), "quota-in-use");
    s.submit("b1", "b", "2");
    s.submit("b2", "b", "2");
    let plan = s.cycle();
    assert_eq!((plan.started(), plan.paused()), (vec!["b1"], vec![]));
}

#[test]
fn an_interactive_job_takes_its_part_of_the_quota_from_train_jobs_of_its_team() {
    let mut s = cluster(&[("n1", 4)], &[("a", "2"), ("b", "2")]);
    for (id, project) in [("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b")] {
        s.submit(id, project, "1");
    }
    s.cycle();
    s.submit("shell", "a", "1i");
    let plan = s.cycle();
    assert_eq!(
        (plan.started(), plan.paused()),
        (vec!["shell"], vec!["a2"]),
        "the youngest of the own team, b has only its quota"
    );
}

#[test]
fn surplus_is_taken_back_up_to_the_fair_share() {
    let mut s = cluster(&[("n1", 8)], &[("a", "1"), ("b", "1")]);
    for number in 0..8 {
        s.submit(&format!("a{number}"), "a", "1");
    }
    s.cycle();
    for number in 0..8 {
        s.submit(&format!("b{number}"), "b", "1");
    }
    let plan = s.cycle();
    assert_eq!(s.allocated("b"), gpus("4"), "half of the surplus, not only the quota");
    assert_eq!(plan.paused(), ["a7", "a6", "a5", "a4"], "the youngest first");
    assert_eq!(s.cycle().preemptions, [], "and that is that");
}

#[test]
fn one_job_that_is_larger_than_the_share_gives_way() {
    let mut s = cluster(&[("n1", 8)], &[("a", "0"), ("b", "0")]);
    s.projects.iter_mut().for_each(|project| project.weight = Some(gpus("1")));
    s.submit("hog", "a", "8");
    s.cycle();
    s.submit("b1", "b", "4");
    assert_eq!(s.cycle().paused(), ["hog"]);
    assert_eq!(s.cycle().preemptions, [], "the hog does not come back by force");
}

#[test]
fn the_fewest_jobs_are_paused_and_none_is_that_could_be_spared() {
    let mut s = cluster(&[("n1", 4), ("n2", 4)], &[("a", "0"), ("b", "4")]);
    s.projects[0].weight = Some(gpus("1"));
    for (id, amount) in [("s1", "1"), ("s2", "1"), ("s3", "1"), ("s4", "1"), ("large", "4")] {
        s.submit(id, "a", amount);
        s.cycle();
    }
    s.submit("b1", "b", "4");
    assert_eq!(s.cycle().paused(), ["large"]);
    s.projects[1].weight = Some(gpus("0"));
    s.submit("fraction", "b", "0.5");
    assert!(s.cycle().preemptions.is_empty(), "beyond the quota and the share nothing is paused");
}

#[test]
fn victims_are_spread_over_the_teams() {
    let mut s = cluster(&[("n1", 8)], &[("a", "0"), ("b", "0"), ("c", "0"), ("d", "3")]);
    s.projects.iter_mut().for_each(|project| project.weight = Some(gpus("1")));
    for number in 0..3 {
        for team in ["a", "b", "c"] {
            s.submit(&format!("{team}{number}"), team, "1");
        }
    }
    s.cycle();
    s.submit("d1", "d", "3");
    let plan = s.cycle();
    let teams: BTreeSet<&str> = plan.paused().iter().map(|id| &id[..1]).collect();
    assert_eq!((plan.paused().len(), teams.len()), (3, 3), "{:?}", plan.paused());
}

#[test]
fn a_template_without_candidates_holds_up_nobody() {
    let mut s = cluster(&[("n1", 2)], &[("a", "2")]);
    s.submit("lost", "a", "2").templates[0].labels.insert("gpu".into(), "h200".into());
    let job = s.submit("next", "a", "2");
    let mut elsewhere = Template::new(gpus("2"));
    elsewhere.pool = Some("cloud".into());
    job.templates.insert(0, elsewhere);
    let plan = s.cycle();
    assert_eq!((plan.started(), plan.starts[0].placement.template), (vec!["next"], 1));
    assert!(matches!(plan.why("lost"), Why::NoCandidate { nodes: 0, .. }));
    assert_eq!(plan.shares[0].demand, gpus("2"), "what can't run is no demand");
}

#[test]
fn pools_labels_and_cordons_are_obeyed() {
    let mut s = cluster(&[("n1", 4), ("n2", 4)], &[("a", "8")]);
    s.nodes[0].pools.insert("train".into());
    s.nodes[1].pools.insert("desk".into());
    s.projects[0].train_pools.insert("train".into());
    s.projects[0].interactive_pools.insert("desk".into());
    s.submit("t", "a", "1");
    s.submit("i", "a", "1i");
    s.submit("p", "a", "1").templates[0].pool = Some("desk".into());
    let plan = s.cycle();
    assert_eq!((s.node_of("t"), s.node_of("i")), (Some("n1".into()), Some("n2".into())));
    assert_eq!(plan.why("p").kind(), "no-candidate", "the team's train jobs may not use the pool");
    s.nodes[0].state = NodeState::Cordoned;
    s.submit("t2", "a", "1");
    let plan = s.cycle();
    assert!(s.running("t"), "what runs goes on");
    assert!(matches!(plan.why("t2"), Why::NoCandidate { cordoned: true, .. }), "{}", plan.why("t2"));
}

#[test]
fn draining_pauses_train_jobs_and_leaves_interactive_ones() {
    let mut s = cluster(&[("n1", 2), ("n2", 1)], &[("a", "3")]);
    s.submit("i", "a", "1i");
    s.submit("t", "a", "1");
    s.cycle();
    let node = s.node_of("t").expect("runs");
    for node_state in &mut s.nodes {
        node_state.state = if node_state.id == node { NodeState::Draining } else { NodeState::Ready };
    }
    let drained = s.cycle();
    assert_eq!(drained.paused(), ["t"]);
    assert_eq!(drained.why("t").kind(), "paused-by-drain");
    assert!(s.running("i"));
    s.cycle();
    assert_ne!(s.node_of("t"), Some(node));
}

#[test]
fn a_job_goes_where_its_commit_lies() {
    let mut s = cluster(&[("n1", 4), ("n2", 8)], &[("a", "12")]);
    s.held.insert("xray@3fa9c1".into(), BTreeSet::from(["n2".into()]));
    s.submit("j1", "a", "1").near = Some("xray@3fa9c1".into());
    s.submit("j2", "a", "1").near = Some("unknown".into());
    s.cycle();
    assert_eq!(s.node_of("j1"), Some("n2".into()));
    assert_eq!(s.node_of("j2"), Some("n1".into()), "else the tightest node");
}

#[test]
fn the_limit_holds_and_a_higher_job_makes_room_below_it() {
    let mut s = cluster(&[("n1", 8)], &[("a", "2")]);
    s.projects[0].limit = Some(gpus("3"));
    for id in ["t1", "t2", "t3", "t4"] {
        s.submit(id, "a", "1");
    }
    let plan = s.cycle();
    assert_eq!((plan.started(), plan.why("t4").kind()), (vec!["t1", "t2", "t3"], "limit"));
    s.submit("shell", "a", "2i");
    let plan = s.cycle();
    let mut paused = plan.paused();
    paused.sort_unstable();
    assert_eq!((plan.started(), paused), (vec!["shell"], vec!["t2", "t3"]), "the oldest stays");
}

#[test]
fn a_pause_that_a_later_one_makes_needless_is_taken_back() {
    let mut s = cluster(&[("n1", 8)], &[("a", "4")]);
    s.projects[0].limit = Some(gpus("5.5"));
    for (id, amount, priority) in
        [("i", "1i", 100), ("large", "2", 100), ("half", "0.5", 60), ("one", "1", 50), ("two", "1", 50)]
    {
        s.submit(id, "a", amount).priority = priority;
        s.cycle();
    }
    // The gang pauses `two` and `one` for the limit; then `high` needs `large` to go, which is more than enough.
    s.submit("gang", "a", "0.5i").templates[0].processes = 4;
    s.submit("high", "a", "1").priority = 100;
    let plan = s.cycle();
    let room = gpus("5.5").saturating_sub(s.allocated("a"));
    assert!(
        plan.paused().iter().all(|id| *id == "large" || room < gpus("1")),
        "{:?} with room for {room}",
        plan.paused()
    );
}

#[test]
fn where_scattering_forbids_a_guarantee_why_says_so() {
    let mut s = cluster(&[("n1", 2), ("n2", 2)], &[("a", "2"), ("b", "2")]);
    for (id, node) in [("a1", "x"), ("a2", "y")] {
        s.submit(id, "a", "1i").templates[0].labels.insert("at".into(), node.into());
    }
    s.nodes[0].labels.insert("at".into(), "x".into());
    s.nodes[1].labels.insert("at".into(), "y".into());
    s.cycle();
    s.submit("b1", "b", "2");
    let scattered = s.cycle();
    let why = scattered.why("b1");
    assert!(matches!(why, Why::Fragmented { in_quota: true, possible: 0, .. }), "{why}");
    assert_eq!(
        why.to_string(),
        "project b is entitled to it by its quota, but the places are too scattered: 2 GPUs free, room for 0 of 2 GPUs even after \
         pausing all that may be paused; it runs when running jobs leave 2 GPUs together"
    );
}

#[test]
fn a_start_waits_for_those_who_still_have_its_gpus_and_nobody_else_is_paused() {
    let mut s = cluster(&[("n1", 2)], &[("a", "0"), ("b", "2")]);
    s.projects[0].weight = Some(gpus("1"));
    s.submit("a1", "a", "1");
    s.submit("a2", "a", "1");
    s.cycle();
    s.submit("b1", "b", "1");
    let first = plan(&s).expect("is sound");
    assert_eq!((first.paused(), first.starts[0].after.len()), (vec!["a2"], 1));
    let stopping = s.jobs.iter_mut().find(|job| job.id.as_str() == "a2").expect("is there");
    if let JobState::Running { placement, .. } = stopping.state.clone() {
        stopping.state = JobState::Stopping { placement };
    }
    let second = plan(&s).expect("is sound");
    assert_eq!((second.paused(), second.started()), (vec![], vec!["b1"]));
    assert_eq!(second.starts[0].after, ["a2".into()]);
    assert_eq!(second.starts[0].grounds, Grounds::Quota);
}

#[test]
fn a_snapshot_that_contradicts_itself_is_refused() {
    let mut s = cluster(&[("n1", 1)], &[("a", "1")]);
    s.submit("j", "nobody", "1");
    assert!(matches!(plan(&s), Err(SnapshotError::UnknownProject { .. })));
    let mut s = cluster(&[("n1", 1)], &[("a", "1")]);
    s.submit("j", "a", "1");
    s.cycle();
    let mut twin = s.jobs[0].clone();
    twin.id = "k".into();
    s.jobs.push(twin);
    assert!(matches!(plan(&s), Err(SnapshotError::Overcommitted { gpu: 0, .. })));
    s.jobs[1].id = "j".into();
    assert!(matches!(plan(&s), Err(SnapshotError::DuplicateJob(_))));
    s.jobs.pop();
    s.nodes[0].id = "n2".into();
    assert!(matches!(plan(&s), Err(SnapshotError::UnknownNode { .. })));
}

#[test]
fn a_request_that_gpus_cannot_be_cut_into_says_so() {
    let mut s = cluster(&[("n1", 4)], &[("a", "4")]);
    s.submit("j", "a", "1.5");
    assert!(matches!(s.cycle().why("j"), Why::Unsound { .. }));
}
