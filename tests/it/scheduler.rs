//! The scheduler's command line: scenarios are played, printed and compared.

use crate::kit::World;

fn golden() -> String {
    format!("{}/examples/scenarios/golden.yaml", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_scenario_is_played_as_a_table_a_plot_and_json() {
    let world = World::new();
    let told = world.ok(["scheduler", "simulate", &golden(), "--actions"]);
    let row = |time: &str| {
        let rows = told.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.filter(|row| row.first() == Some(&time)).map(|row| row.join(" ")).next().unwrap_or_default()
    };
    assert_eq!(row("0s"), "0s 4/4 4/2 4/2 4/8 0 0 everybody begins", "{told}");
    assert_eq!(row("40m"), "40m 8/4 4/2 +1 4/2 +1 0/8 0 2 d goes home", "{told}");
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
