//! The configuration: samples that must be right or wrong, and the commands that explain it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use larder::config::{Env, Overrides, load};

use crate::kit::World;

fn samples(kind: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config").join(kind);
    let mut found: Vec<PathBuf> = std::fs::read_dir(&dir)
        .expect("the samples")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    found.sort();
    assert!(found.len() >= 4, "{kind}: {found:?}");
    found
}

fn bare() -> Env {
    Env { vars: BTreeMap::from([("HOME".to_owned(), "/home/ada".to_owned())]), cwd: "/".into() }
}

#[test]
fn every_valid_sample_is_taken() {
    for path in samples("valid") {
        if let Err(error) = load(Some(&path), &bare(), &Overrides::new()) {
            panic!("{}: {error}", path.display());
        }
    }
}

/// The first line of an invalid sample is a comment: `# LINE:COLUMN: part of the message`.
#[test]
fn every_invalid_sample_is_refused_at_the_place_that_it_names() {
    for path in samples("invalid") {
        let text = std::fs::read_to_string(&path).expect("reads");
        let want = text.lines().next().and_then(|line| line.strip_prefix("# ")).expect("says what is wrong");
        let (place, message) = want.split_once(": ").expect("LINE:COLUMN: message");
        let error = load(Some(&path), &bare(), &Overrides::new()).expect_err(&path.display().to_string());
        let told: Vec<String> = error.problems().iter().map(ToString::to_string).collect();
        let begin = format!("{}:{place}: ", path.display());
        let found = told.iter().any(|line| line.starts_with(&begin) && line.contains(message));
        assert!(found, "{}: wanted {begin}…{message}\n{told:#?}", path.display());
    }
}

#[test]
fn check_says_what_is_wrong_and_where() {
    let world = World::new();
    let file = world.path("larder.toml");
    std::fs::write(&file, "[fetch]\nrequets = 3\n").expect("writes");
    let file = file.to_str().expect("plain");
    let told = world.fails(2, ["config", "check", "--config", file]);
    assert!(
        told.contains(&format!("{file}:2:1: fetch.requets: unknown key; did you mean `fetch.requests`?")),
        "{told}"
    );
    let ran = world.run(["config", "check", "--config", file, "--json"]);
    let checked: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!((ran.code, &checked["ok"]), (2, &serde_json::json!(false)));
    assert_eq!(checked["problems"][0]["key"], "fetch.requets");
    world.ok(["config", "check"]);
}

#[test]
fn show_says_where_each_value_came_from() {
    let mut world = World::new();
    let file = world.path("larder.toml");
    std::fs::write(&file, "[fetch]\nrequests = 3\nmemory = \"1GiB\"\n").expect("writes");
    world.set("LARDER_CONFIG", file.to_str().expect("plain"));
    world.set("LARDER_FETCH_MEMORY", "2GiB");
    let shown: serde_json::Value = world.json(&["config", "show", "--fetch-give-up", "7s"]);
    let of = |key: &str| (shown[key]["value"].to_string(), shown[key]["origin"].as_str().unwrap_or("").to_owned());
    assert_eq!(of("fetch.requests"), ("3".into(), format!("{}:2:12", file.display())));
    assert_eq!(of("fetch.memory"), ("\"2GiB\"".into(), "$LARDER_FETCH_MEMORY".into()));
    assert_eq!(of("fetch.give_up"), ("\"7s\"".into(), "--fetch-give-up".into()));
    assert_eq!(of("mount.verify"), ("\"node\"".into(), "default".into()));
}
