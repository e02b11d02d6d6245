//! Trees nobody here wrote, and tools nobody here wrote on their mounts.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Campaign, assert_same_tree};
use crate::kit::World;

/// The cache that `tests/kit/trees.sh` fills.
fn trees() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kit/trees.sh");
    let done = Command::new(script).output().expect("runs trees.sh");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    PathBuf::from(String::from_utf8_lossy(&done.stdout).trim())
}

fn tree_of(world: &World, revision: &str) -> String {
    world.json(&["show", revision])["tree"].as_str().expect("show tells the tree").to_owned()
}

#[track_caller]
fn works(program: &str, args: &[&str], dir: &Path) -> String {
    let done = Command::new(program).args(args).current_dir(dir).output().expect("runs the tool");
    assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

#[test]
#[ignore = "long: make campaign PART=trees"]
fn a_linux_source_tree_survives_to_the_last_bit() {
    let source = trees().join("linux");
    let world = World::new();
    let begun = std::time::Instant::now();
    world.push(&source, "linux");
    println!("pushed in {:.1} s", begun.elapsed().as_secs_f64());
    let mount = world.mount("linux", "m", &[]);
    assert_same_tree(&source, &mount);
    let names = works("find", &[".", "-type", "f"], &mount).lines().count();
    assert_eq!(names, works("find", &[".", "-type", "f"], &source).lines().count());
    works("tar", &["cf", "/dev/null", "kernel"], &mount);
    works("grep", &["-rq", "SPDX", "kernel"], &mount);
}

#[test]
#[ignore = "long: make campaign PART=trees"]
fn the_same_tree_from_another_place_has_the_same_id() {
    let source = trees().join("linux").join("drivers/net");
    let world = World::new();
    let copy = world.path("copy");
    // Copied in reverse order, so that the directories list their entries in another one.
    works("sh", &["-c", &format!("cp -a '{}' '{}'", source.display(), copy.display())], Path::new("/"));
    world.push(&source, "one");
    world.push(&copy, "two");
    assert_eq!(tree_of(&world, "one"), tree_of(&world, "two"));
    // Reached by other steps of history: first a part, then all.
    let part = world.make_dir("part");
    works(
        "sh",
        &[
            "-c",
            &format!(
                "cp -a '{}'/ethernet '{}' && touch -r '{}' '{}'",
                source.display(),
                part.display(),
                source.display(),
                part.display()
            ),
        ],
        Path::new("/"),
    );
    world.push(&part, "three");
    world.push(&source, "three");
    assert_eq!(tree_of(&world, "one"), tree_of(&world, "three"));
}

#[test]
#[ignore = "long: make campaign PART=trees"]
fn python_imports_its_packages_from_a_mount() {
    let source = trees().join("site-packages").canonicalize().expect("is there");
    let world = World::new();
    world.push(&source, "packages");
    let mount = world.mount("packages", "m", &[]);
    assert_same_tree(&source, &mount);
    let code = "import sklearn, PIL, numpy, scipy.linalg; from PIL import Image; print(sklearn.__file__)";
    let python = trees().join("python/bin/python");
    let done =
        Command::new(python).args(["-S", "-B", "-c", code]).env("PYTHONPATH", &mount).output().expect("runs python");
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(said.starts_with(mount.to_str().expect("plain")), "{said} {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
#[ignore = "long: make campaign PART=trees"]
fn git_works_on_a_mounted_repository() {
    let world = World::new();
    let source = world.files("repo", &[("a.txt", b"one\n"), ("d/b.txt", b"two\n")]);
    let git = |args: &[&str], dir: &Path| {
        let mut all = vec!["-c", "safe.directory=*", "-c", "user.name=t", "-c", "user.email=t@t"];
        all.extend(args);
        works("git", &all, dir)
    };
    git(&["init", "-q"], &source);
    git(&["add", "-A"], &source);
    git(&["commit", "-qm", "first"], &source);
    world.push(&source, "repo");
    let mount = world.mount("repo", "m", &[]);
    assert!(git(&["log", "--oneline"], &mount).contains("first"));
    assert_eq!(git(&["--no-optional-locks", "status", "--porcelain"], &mount), "");
    assert_eq!(git(&["show", "HEAD:d/b.txt"], &mount), "two\n");
}

#[test]
#[ignore = "long: make campaign PART=trees"]
fn hostile_trees_survive() {
    let mut campaign = Campaign::new();
    let world = World::new();
    for round in 0.. {
        if !campaign.goes_on(round, 20) {
            break;
        }
        let source = world.path(&format!("source{round}"));
        campaign.write_tree(&source, 300);
        let name = format!("hostile{round}");
        world.push(&source, &name);
        let mount = world.mount(&name, &format!("m{round}"), &[]);
        assert_same_tree(&source, &mount);
        world.ok(["umount", mount.to_str().expect("plain")]);
    }
}
