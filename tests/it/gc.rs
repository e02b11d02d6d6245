//! gc with the real binary: nothing that is needed goes, what is not does, also beside pushes.

use std::fs;

use crate::kit::World;
use crate::kit::s3::TestS3;

#[test]
fn gc_gives_back_the_bytes_of_what_was_removed_and_keeps_the_rest() {
    let s3 = TestS3::start();
    let mut world = World::new();
    world.set_all(s3.env("lake"));
    let keep = world.files("keep", &[("a", &[1; 100_000]), ("b", b"kept")]);
    world.push(&keep, "keep");
    let drop = world.files("drop", &[("c", &[2; 3_000_000]), ("d", b"dropped")]);
    world.push(&drop, "drop");
    world.ok(["rm", "drop", "--dataset"]);
    let files = || s3.object_files().len();
    let before = files();
    let plan = world.json(&["gc"]);
    assert_eq!(plan["acted"], false);
    assert_eq!(files(), before, "a plan changes nothing");
    let young = world.json(&["gc", "--delete"]);
    assert_eq!(young["condemned"]["objects"], 0, "nothing is an hour old: {young}");
    let condemned = world.json(&["gc", "--delete", "--wait", "0s"]);
    assert!(condemned["condemned"]["bytes"].as_u64().unwrap() > 3_000_000, "{condemned}");
    let patient = world.json(&["gc", "--delete"]);
    assert_eq!(patient["deleted"]["objects"], 0, "the wait is a day");
    let swept = world.json(&["gc", "--delete", "--wait", "0s"]);
    assert!(swept["deleted"]["bytes"].as_u64().unwrap() > 3_000_000, "{swept}");
    assert!(files() < before);
    assert_eq!(world.ok(["cat", "keep", "b"]), "kept");
    let out = world.path("out");
    world.ok(["get", "keep", out.to_str().unwrap()]);
    assert_eq!(fs::read(out.join("a")).unwrap(), [1; 100_000]);
}

#[test]
fn pushes_beside_gcs_without_a_wait_lose_nothing() {
    let s3 = TestS3::start();
    let mut world = World::new();
    world.set_all(s3.env("lake"));
    let base = world.files("base", &[("x", &[7; 200_000]), ("y", b"y")]);
    world.push(&base, "photos");
    for round in 0..4 {
        // Each round removes what the next one pushes again.
        let dir = world.files("again", &[("same", &[9; 300_000]), ("z", b"z")]);
        world.push(&dir, "again");
        world.ok(["rm", "again", "--dataset"]);
        world.ok(["gc", "--delete", "--wait", "0s"]);
        let gc = world.command(["gc", "--delete", "--wait", "0s"]).spawn().unwrap();
        world.push(&dir, "again");
        let mut gc = gc;
        assert!(gc.wait().unwrap().success());
        world.ok(["gc", "--delete", "--wait", "0s"]);
        world.ok(["gc", "--delete", "--wait", "0s"]);
        let out = world.path(&format!("out{round}"));
        world.ok(["get", "again", out.to_str().unwrap()]);
        assert_eq!(fs::read(out.join("same")).unwrap(), [9; 300_000]);
        assert_eq!(world.ok(["cat", "photos", "y"]), "y");
        world.ok(["rm", "again", "--dataset"]);
        world.ok(["gc", "--delete", "--wait", "0s"]);
        world.ok(["gc", "--delete", "--wait", "0s"]);
    }
}
