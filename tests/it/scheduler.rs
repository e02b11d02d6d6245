//! The scheduler's command line: scenarios are played, printed and compared.

use crate::kit::World;

fn golden() -> String {
    format!("{}/examples/scenarios/golden.yaml", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_scenario_is_played_as_a_table_a_plot_and_json() {
    let world = World::new();
    let told = world.ok(["scheduler", "simulate", &golden(), "--actions"]);
    let row = |time: &str| told.lines().find(|line| line.trim_start().starts_with(time)).unwrap_or_default().to_owned();
    assert!(row("0s").contains("4/4  4/2  4/2  4/8"), "{told}");
    let last: Vec<String> = row("40m").split_whitespace().map(str::to_owned).collect();
    assert_eq!(last[1..8], ["8/4", "4/2", "+1", "4/2", "+1", "0/8", "0"], "{told}");
    assert!(told.contains("a = a  b = b  c = c  d = d"), "{told}");
    assert!(told.contains("is paused for d2 of d") && told.contains("it runs when"), "{told}");
    let json: serde_json::Value =
        serde_json::from_str(&world.ok(["scheduler", "simulate", &golden(), "--json"])).expect("is JSON");
    assert_eq!(json["summary"]["used_permille"], 1000);
    assert_eq!(json["samples"][4]["projects"][0]["allocated"], 8);
    assert_eq!(json["samples"][4]["projects"][1]["waiting"].as_array().map(Vec::len), Some(1));
}

#[test]
fn policies_are_compared_on_the_same_scenario() {
    let world = World::new();
    let told = world.ok(["scheduler", "simulate", &golden(), "--compare"]);
    assert_eq!(
        told.lines().filter_map(|line| line.split_whitespace().next()).collect::<Vec<_>>(),
        ["POLICY", "fair", "quota", "fifo"]
    );
    assert!(world.fails(1, ["scheduler", "simulate", "/nowhere.yaml"]).contains("cannot read the scenario"));
}
