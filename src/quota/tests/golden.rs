//! The trace that every change must keep: two nodes of 8 GPUs, quotas a 4, b 2, c 2, d 8.

use super::super::Snapshot;
use super::kit::{cluster, gpus};

const FIRST: [(&str, &str, &str); 13] = [
    ("a1", "a", "1i"),
    ("a2", "a", "1"),
    ("a3", "a", "2"),
    ("b1", "b", "0.6i"),
    ("b2", "b", "0.4i"),
    ("b3", "b", "1"),
    ("b4", "b", "2"),
    ("c1", "c", "0.5i"),
    ("c2", "c", "0.3i"),
    ("c3", "c", "0.2i"),
    ("c4", "c", "2"),
    ("c5", "c", "1"),
    ("d1", "d", "4"),
];

fn shares(snapshot: &Snapshot) -> Vec<String> {
    ["a", "b", "c", "d"].iter().map(|project| snapshot.allocated(project).to_string()).collect()
}

fn waits(snapshot: &Snapshot) -> Vec<usize> {
    ["a", "b", "c", "d"].iter().map(|project| snapshot.waiting(project)).collect()
}

/// Plays the trace; `each`: a cycle after each job, else one for all jobs of a step.
fn play(each: bool) {
    let mut s = cluster(&[("n1", 8), ("n2", 8)], &[("a", "4"), ("b", "2"), ("c", "2"), ("d", "8")]);
    let submit = |s: &mut Snapshot, jobs: &[(&str, &str, &str)]| {
        let mut paused = Vec::new();
        for (id, project, amount) in jobs {
            s.submit(id, project, amount);
            if each {
                paused.extend(s.cycle().preemptions);
            }
        }
        paused.extend(s.cycle().preemptions);
        paused
    };
    assert_eq!(submit(&mut s, &FIRST), []);
    assert_eq!((shares(&s), waits(&s)), (vec!["4".into(), "4".into(), "4".into(), "4".into()], vec![0, 0, 0, 0]));

    let first = submit(&mut s, &[("d2", "d", "2")]);
    let second = submit(&mut s, &[("d3", "d", "2")]);
    let mut paused: Vec<&str> = first.iter().chain(&second).map(|preemption| preemption.job.as_str()).collect();
    paused.sort_unstable();
    assert_eq!((first.len(), paused), (1, vec!["b4", "c4"]), "one of each team, one at a time");
    assert_eq!(shares(&s), ["4", "2", "2", "8"]);

    let more = [("a4", "a", "2"), ("a5", "a", "2"), ("b5", "b", "2"), ("c6", "c", "2")];
    assert_eq!(submit(&mut s, &more), []);
    assert_eq!((shares(&s), waits(&s)), (vec!["4".into(), "2".into(), "2".into(), "8".into()], vec![2, 2, 2, 0]));

    ["d1", "d2", "d3"].iter().for_each(|id| s.end(id));
    assert_eq!(s.cycle().preemptions, []);
    assert_eq!((shares(&s), waits(&s)), (vec!["8".into(), "4".into(), "4".into(), "0".into()], vec![0, 1, 1, 0]));
    assert_eq!(s.allocated("a") + s.allocated("b") + s.allocated("c"), gpus("16"));
}

#[test]
fn golden_trace_with_a_cycle_after_each_job() {
    play(true);
}

#[test]
fn golden_trace_with_a_cycle_for_each_step() {
    play(false);
}
