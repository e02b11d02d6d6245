//! The frame of the command line: exit statuses, help, completions, closed pipes.

use std::io::Read as _;
use std::process::Stdio;

use crate::kit::World;

#[test]
fn wrong_usage_is_exit_status_2_and_says_how_it_should_be() {
    let world = World::new();
    for args in [&["frobnicate"][..], &["mount"], &["mount", "No Such Name!", "/x"], &["ls", "--nope"], &[]] {
        let ran = world.run(args);
        assert_eq!(ran.code, 2, "{args:?}: {}", ran.stderr);
        assert!(ran.stdout.is_empty(), "{args:?}: data on stdout: {}", ran.stdout);
    }
    assert!(world.fails(2, ["mount", "x@@y", "/x"]).starts_with("error: "));
}

#[test]
fn a_wrong_configuration_stops_every_command_but_config_itself() {
    let mut world = World::new();
    world.set("LARDER_FETCH_MEMORY", "lots");
    let told = world.fails(2, ["datasets"]);
    assert!(told.contains("$LARDER_FETCH_MEMORY: fetch.memory: `lots` is not a size"), "{told}");
    world.ok(["config", "schema"]);
    world.ok(["completions", "bash"]);
}

#[test]
fn help_is_data_and_every_command_has_it() {
    let world = World::new();
    let help = world.ok(["--help"]);
    let listed = help.split("Commands:").nth(1).expect("a list of commands");
    let names: Vec<&str> = listed
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .take_while(|name| !name.starts_with('-'))
        .filter(|name| *name != "help" && *name != "larder")
        .collect();
    assert!(names.len() >= 20, "{names:?}");
    for name in names {
        let help = world.ok([name, "--help"]);
        assert!(help.contains("Usage: larder"), "{name}");
    }
    assert!(!help.contains("keeper"), "what is internal is hidden");
}

#[test]
fn completions_and_manual_pages_are_generated() {
    let world = World::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(world.ok(["completions", shell]).contains("uncache"), "{shell}");
    }
    let dir = world.path("man");
    world.ok(["man", dir.to_str().expect("a plain path")]);
    for page in ["larder.1", "larder-mount.1", "larder-config-check.1"] {
        let text = std::fs::read_to_string(dir.join(page)).expect(page);
        assert!(text.starts_with(".ie") || text.contains(".TH"), "{page}");
    }
}

#[test]
fn a_reader_that_goes_away_ends_a_listing_quietly() {
    let world = World::new();
    let mut command = world.command(["config", "schema"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    drop(child.stdout.take());
    let mut told = String::new();
    child.stderr.take().expect("is piped").read_to_string(&mut told).expect("reads");
    let status = child.wait().expect("ends");
    assert!(status.success(), "{status}: {told}");
    assert_eq!(told, "");
}

#[test]
fn commands_that_only_look_start_no_daemon_and_make_no_tier() {
    let world = World::new();
    let status = world.json(&["status"]);
    assert_eq!(status["daemon"]["running"], false);
    assert_eq!(status["tiers"][0]["made"], false);
    assert_eq!(world.json(&["mounts"]), serde_json::json!([]));
    assert!(!world.tier().exists());
    assert!(world.daemon_pid().is_none());
}

#[test]
fn the_doctor_finds_a_laptop_healthy_and_a_missing_tier_sick() {
    let mut world = World::new();
    let found = world.json(&["doctor"]);
    let checks = found.as_array().expect("a list");
    assert!(checks.iter().all(|check| check["level"] != "fail"), "{found:#}");
    assert!(checks.iter().any(|check| check["check"] == "kernel"));
    world.set("LARDER_TIER", world.path("export").to_str().expect("plain"));
    let ran = world.run(["doctor", "--json"]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(ran.stdout.contains("larder tier init"), "{}", ran.stdout);
    assert!(!world.path("export").exists(), "nothing was written");
}
