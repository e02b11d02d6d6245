//! Two machines push to one dataset at the same time, with both ways in which refs move.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::kit::proxy::{Fault, Proxy, Rule};
use crate::kit::s3::{TestS3, env_at};
use crate::kit::{World, wait_for};

/// How late an answer is: long enough for another push.
const LATE: Fault = Fault::Late(Duration::from_secs(4));

/// A lake with one commit; the first machine reaches it through a proxy.
struct Two {
    first: World,
    second: World,
    proxy: Proxy,
    _s3: TestS3,
}

fn two(refs: &str) -> Two {
    let s3 = TestS3::start();
    let proxy = Proxy::start(s3.addr());
    let (mut first, mut second) = (World::new(), World::new());
    first.set_all(env_at(&proxy.endpoint(), "together"));
    second.set_all(s3.env("together"));
    second.ok(["lake", "init", "--refs", refs]);
    let source = second.files("base", &[("base", b"0")]);
    second.push(&source, "photos");
    Two { first, second, proxy, _s3: s3 }
}

/// Pushes from both; the second moves the branch while an answer to the first is late. Gives what the first
/// said, and the second's commit.
fn push_at_once(two: &Two, late: Rule) -> (i32, String, String, String) {
    let (mine, theirs) = (two.first.files("mine", &[("mine", b"1")]), two.second.files("theirs", &[("theirs", b"2")]));
    two.proxy.rule(late);
    let args = ["push", mine.to_str().expect("plain"), "photos", "--json"];
    let child = two.first.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    wait_for("the first push to be held up", || two.proxy.counters().faults > 0);
    let other = two.second.push(&theirs, "photos");
    let done = child.wait_with_output().expect("ends");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("plain");
    (done.status.code().unwrap_or(-1), text(done.stdout), text(done.stderr), other)
}

fn log_of(world: &World) -> Vec<(String, usize)> {
    let log = world.json(&["log", "photos"]);
    let rows = log.as_array().or_else(|| log["commits"].as_array()).expect("a list").clone();
    let row = |row: &Value| {
        let parents = row["parents"].as_array().map_or(0, Vec::len);
        (row["commit"].as_str().expect("an id").to_owned(), parents)
    };
    rows.iter().map(row).collect()
}

fn pushes(world: &World, dir: &Path) -> Value {
    world.json(&["push", dir.to_str().expect("plain"), "photos"])
}

#[test]
fn with_conditional_writes_one_push_wins_and_the_other_is_told_how_to_go_on() {
    let two = two("cas");
    // The first has looked at the branch, and has not moved it yet.
    let (code, stdout, stderr, other) = push_at_once(&two, Rule::next("PUT", LATE).on("/commits/"));
    assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
    assert!(stderr.contains("is stored, but `photos@main` moved") && stderr.contains("push again"), "{stderr}");
    // Its commit is there under its id, and nothing of the other's is lost.
    let stored = stderr.split_whitespace().find(|word| word.len() == 64).expect("the id is told").to_owned();
    two.first.ok(["show", &format!("photos@{stored}")]);
    assert_eq!(log_of(&two.second)[0].0, other);
    let again = pushes(&two.first, &two.first.path("mine"));
    assert_eq!(again["uploaded_data_bytes"], 0, "its contents are there: {again}");
    let log = log_of(&two.second);
    assert_eq!((log[0].0.as_str(), log[1].0.as_str()), (again["commit"].as_str().expect("an id"), other.as_str()));
}

#[test]
fn with_logged_refs_both_heads_show_and_the_next_push_merges_them() {
    let two = two("log");
    // The first has looked at the log for the last time, and has not written its entry yet.
    let (code, stdout, stderr, other) = push_at_once(&two, Rule::next("GET", LATE).on("log%2Fbranch%2Fmain").after(1));
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("has 2 heads now") && stderr.contains("push again to merge"), "{stderr}");
    let mine: Value = serde_json::from_str(&stdout).expect("JSON");
    let heads = |value: &Value| value.as_array().map_or(0, Vec::len);
    assert_eq!(heads(&mine["heads"]), 2, "{mine}");
    let row = two.second.json(&["datasets"])["datasets"][0].clone();
    assert_eq!((&row["head"], heads(&row["heads"])), (&Value::Null, 2), "{row}");
    assert_eq!(heads(&two.second.json(&["branch", "photos"])[0]["heads"]), 2);
    let ids: Vec<String> = log_of(&two.second).into_iter().map(|(commit, _)| commit).collect();
    assert!(ids.contains(&other) && ids.contains(&mine["commit"].as_str().expect("an id").to_owned()), "{ids:?}");
    let dir = two.second.make_dir("m");
    let told = two.second.fails(1, ["mount", "photos", dir.to_str().expect("plain")]);
    assert!(told.contains(&other[..12]), "which heads there are: {told}");
    let merged = pushes(&two.second, &two.second.path("theirs"));
    assert_eq!(heads(&merged["heads"]), 1, "{merged}");
    assert_eq!(log_of(&two.second)[0], (merged["commit"].as_str().expect("an id").to_owned(), 2), "two parents");
}
