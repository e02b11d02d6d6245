//! The golden trace again and again, with a scheduler that is killed at random moments; a small trace once for each
//! named moment (`src/scheduler/crash.rs`) at which the scheduler or a supervisor dies.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Campaign;
use crate::golden::Golden;
use crate::kit::World;
use crate::kit::gpus::{Gpus, processes_with};

#[test]
#[ignore = "long: make campaign PART=jobs"]
fn a_scheduler_that_is_killed_at_random_moments_loses_nothing_and_starts_nothing_twice() {
    let mut campaign = Campaign::new();
    let mut kills = 0;
    for round in 0.. {
        if !campaign.goes_on(round, 1000) {
            break;
        }
        let mut golden = Golden::new();
        golden.play(&mut |gpus| {
            for _ in 0..campaign.below(3) {
                std::thread::sleep(Duration::from_millis(campaign.below(400)));
                gpus.kill();
                kills += 1;
                gpus.start();
            }
        });
        golden.assert_nothing_is_lost_or_twice();
    }
    println!("{kills} kills");
}

/// Each is between a record on disk and what follows from it.
const POINTS: [&str; 20] = [
    "before submission",
    "after submission",
    "before Starting",
    "after Starting",
    "before supervisor",
    "after supervisor",
    "before Running",
    "after Running",
    "before Stopping",
    "after Stopping",
    "before Pending",
    "after Pending",
    "before Completing",
    "after Completing",
    "before Succeeded",
    "after Succeeded",
    "before deletion",
    "after deletion",
    "supervisor: before the command",
    "supervisor: before its end",
];

/// It saves its state when it is told to stop, and ends well when it finds that.
const SCRIPT: &str = r#"echo "$LARDER_ATTEMPT" >> "$LEDGER"; \
    if test -e step; then echo done > $LARDER_OUTPUT_MODEL/weights; exit 0; fi; \
    trap 'touch step; exit 0' TERM; echo begun; while :; do sleep 0.05; done"#;

/// A trace while which the scheduler, or a supervisor, dies once.
struct Doomed {
    gpus: Gpus,
}

impl Doomed {
    fn new(point: &str) -> Self {
        let mut world = World::of_this_build();
        world.set("LARDER_CRASH_POINT", point);
        world.set("LARDER_CRASH_ONCE", world.path("crashed").display().to_string());
        Self { gpus: Gpus::new(world, &[]) }
    }

    fn has_died(&self) -> bool {
        self.gpus.world.path("crashed").exists()
    }

    fn job(&self, name: &str) -> Value {
        let ran = self.gpus.world.run(["job", "describe", name, "--json"]);
        serde_json::from_str(&ran.stdout).unwrap_or_default()
    }

    /// Starts the scheduler again where it has died.
    fn revive(&mut self) {
        if self.gpus.world.run(["scheduler", "status"]).code != 0 {
            self.gpus.kill();
            self.gpus.start();
        }
    }

    /// Gives a command until it has worked; `done`: what it says where an earlier try has.
    fn command(&mut self, args: &[&str], done: &str) {
        for attempt in 0.. {
            let ran = self.gpus.world.run(args);
            if ran.code == 0 || (attempt > 0 && ran.stderr.contains(done)) {
                return;
            }
            let interrupted = ["no scheduler", "went away"].iter().any(|text| ran.stderr.contains(text));
            assert!(interrupted && self.has_died() && attempt < 100, "{args:?}: {}", ran.stderr);
            self.revive();
        }
    }

    fn wait_for(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            assert!(
                begun.elapsed() < Duration::from_secs(180),
                "{what}: not within three minutes\n{}",
                self.gpus.log()
            );
            self.revive();
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn play(&mut self) {
        let ledger = format!("LEDGER={}", self.gpus.world.path("ledger").display());
        for args in [&["node", "add", "n0", "--gpus", "1"][..], &["project", "create", "team", "--gpus", "1"]] {
            self.gpus.world.ok(args);
        }
        self.gpus.world.ok(["project", "create", "guest", "--gpus", "0", "--weight", "1"]);
        let train = ["submit", "train", "-p", "guest", "--grace", "10m", "-e", &ledger, "--output", "model:/out"];
        self.command(&[&train[..], &["--", "sh", "-c", SCRIPT]].concat(), "already");
        let begun = |doomed: &Self| doomed.gpus.world.run(["job", "logs", "train"]).stdout.contains("begun");
        self.wait_for("the job's first words", begun);
        self.command(&["submit", "shell", "-p", "team", "--interactive", "--", "sleep", "1000000"], "already");
        self.wait_for("the person's turn", |doomed| doomed.job("shell")["status"] == "Running");
        self.command(&["job", "delete", "shell"], "there is no job");
        self.wait_for("the job's end", |doomed| doomed.job("train")["status"] == "Succeeded");
        self.wait_for("the end of the other", |doomed| doomed.job("shell").is_null());
    }

    fn assert_nothing_is_lost_or_twice(&self, point: &str) {
        let ledger = fs::read_to_string(self.gpus.world.path("ledger")).expect("reads");
        let attempts: Vec<&str> = ledger.lines().collect();
        let unique: std::collections::BTreeSet<&str> = attempts.iter().copied().collect();
        assert_eq!(attempts.len(), unique.len(), "{point}: an attempt ran twice: {attempts:?}");
        let job = self.job("train");
        assert!(job["losses"].as_u64() <= Some(u64::from(point.starts_with("supervisor"))), "{point}: {job}");
        assert_eq!(self.gpus.world.ok(["cat", "model", "weights"]), "done\n", "{point}");
        let commits = self.gpus.world.json(&["log", "model"]);
        assert_eq!(commits.as_array().map(Vec::len), Some(1), "{point}: {commits}");
        let alive = processes_with("LEDGER", self.gpus.world.path("ledger").to_str().expect("a plain path"));
        assert_eq!(alive, Vec::<i32>::new(), "{point}");
    }
}

#[test]
#[ignore = "long: make campaign PART=jobs"]
fn a_scheduler_that_dies_at_a_named_moment_loses_nothing_and_starts_nothing_twice() {
    for point in POINTS {
        println!("dies {point}");
        let mut doomed = Doomed::new(point);
        doomed.play();
        assert!(doomed.has_died(), "{point}: it never came to that");
        doomed.assert_nothing_is_lost_or_twice(point);
    }
}
