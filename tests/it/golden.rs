//! The golden trace: four teams share sixteen GPUs on two nodes, through the real command line, scheduler
//! and processes; also with a scheduler that is killed at random moments.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use serde_json::Value;

use crate::kit::gpus::{Gpus, processes_with};
use crate::kit::{World, wait_for};

/// What each project has, and how many of its jobs wait.
type Shares = BTreeMap<String, (f64, u64)>;

/// The trace while it is played. `disturb` is called around each command.
pub struct Golden {
    pub gpus: Gpus,
}

/// Each job writes a line when it begins, and never ends by itself.
const SCRIPT: &str = r#"echo "$LARDER_PROJECT/$LARDER_JOB $LARDER_ATTEMPT" >> "$LEDGER"; exec sleep 1000000"#;

impl Golden {
    pub fn new() -> Self {
        let gpus = Gpus::new(World::new(), &[]);
        for node in ["n0", "n1"] {
            gpus.world.ok(["node", "add", node, "--gpus", "8"]);
        }
        for (project, quota) in [("a", "4"), ("b", "2"), ("c", "2"), ("d", "8")] {
            gpus.world.ok(["project", "create", project, "--gpus", quota]);
        }
        Self { gpus }
    }

    fn submit_args(&self, project: &str, name: &str, size: &str) -> Vec<String> {
        let (gpus, interactive) = match size.strip_suffix('i') {
            Some(gpus) => (gpus, true),
            None => (size, false),
        };
        let ledger = format!("LEDGER={}", self.gpus.world.path("ledger").display());
        let mut args: Vec<String> =
            ["submit", name, "-p", project, "-g", gpus, "-e", &ledger].iter().map(|arg| (*arg).to_owned()).collect();
        if interactive {
            args.push("--interactive".to_owned());
        }
        args.extend(["--", "sh", "-c", SCRIPT].map(str::to_owned));
        args
    }

    /// Submits `a1`, `a2`, ... of the sizes that follow; `2i` is interactive. A command that failed because
    /// the scheduler was killed meanwhile is given again, until it has worked or turns out to have worked.
    fn submit(&mut self, disturb: &mut dyn FnMut(&mut Gpus), project: &str, first: u32, sizes: &[&str]) {
        for (number, size) in (first..).zip(sizes) {
            let args = self.submit_args(project, &format!("{project}{number}"), size);
            self.command(disturb, &args, Some("already"));
        }
    }

    fn command(&mut self, disturb: &mut dyn FnMut(&mut Gpus), args: &[String], done: Option<&str>) {
        for attempt in 0.. {
            let child = self.gpus.world.command(args).stderr(std::process::Stdio::piped()).spawn().expect("starts");
            disturb(&mut self.gpus);
            let ended = child.wait_with_output().expect("ends");
            let told = String::from_utf8_lossy(&ended.stderr);
            if ended.status.success() || (attempt > 0 && done.is_some_and(|done| told.contains(done))) {
                return;
            }
            // The last: what a deletion of several jobs says of one that an earlier try deleted meanwhile.
            let passing = ["no scheduler", "went away", "stopping", "there is no job"];
            let interrupted = passing.iter().any(|text| told.contains(text));
            assert!(interrupted && attempt < 100, "{args:?}: {told}\n{}", self.gpus.log());
        }
    }

    fn shares(&self) -> Shares {
        let projects = self.gpus.world.json(&["project", "list"]);
        let one = |view: &Value| {
            let name = view["name"].as_str().expect("a name").to_owned();
            (name, (view["allocated"].as_f64().expect("a number"), view["pending"].as_u64().expect("a number")))
        };
        projects.as_array().expect("a list").iter().map(one).collect()
    }

    fn jobs(&self) -> Vec<Value> {
        self.gpus.world.json(&["job", "list", "-A"]).as_array().expect("a list").clone()
    }

    /// Waits until nothing is on its way and the projects have what is wanted; no GPU is ever above one.
    #[track_caller]
    fn settles(&self, what: &str, wanted: impl Fn(&Shares) -> bool) {
        self.gpus.wait(what, |_| {
            self.assert_no_gpu_is_overcommitted();
            let still =
                self.jobs().iter().all(|job| ["Running", "Pending"].contains(&job["status"].as_str().unwrap_or("")));
            still && wanted(&self.shares())
        });
    }

    fn assert_no_gpu_is_overcommitted(&self) {
        for node in self.gpus.world.json(&["node", "list"]).as_array().expect("a list") {
            let mut used: BTreeMap<u64, f64> = BTreeMap::new();
            for one in node["uses"].as_array().expect("a list") {
                for gpu in one["gpus"].as_array().expect("a list") {
                    *used.entry(gpu.as_u64().expect("a number")).or_default() +=
                        one["each"].as_f64().expect("a number");
                }
            }
            assert!(used.values().all(|part| *part < 1.0001), "{node}");
        }
        self.assert_live_processes_share_no_gpu();
    }

    /// The same without asking the scheduler: what the processes themselves were given. Two looks at a moment
    /// apart must agree before it counts, for one may end while the other begins.
    fn assert_live_processes_share_no_gpu(&self) {
        let over = || -> BTreeSet<String> {
            let mut used: BTreeMap<(String, String), f64> = BTreeMap::new();
            for given in self.live() {
                let part = given.get("LARDER_GPU_MEMORY_SHARE").map_or(1.0, |part| part.parse().expect("a number"));
                for gpu in given["NVIDIA_VISIBLE_DEVICES"].split(',') {
                    *used.entry((given["LARDER_NODE"].clone(), gpu.to_owned())).or_default() += part;
                }
            }
            let over = used.into_iter().filter(|(_, part)| *part > 1.0001);
            over.map(|((node, gpu), part)| format!("GPU {gpu} of {node}: {part}")).collect()
        };
        let (first, second) = (over(), over());
        let both: Vec<_> = first.intersection(&second).collect();
        assert!(both.is_empty(), "{both:?}");
    }

    /// The variables of the living processes of this trace, one for each task.
    fn live(&self) -> Vec<BTreeMap<String, String>> {
        let ledger = self.gpus.world.path("ledger");
        let pids = processes_with("LEDGER", ledger.to_str().expect("a plain path"));
        let variables = |pid: &i32| -> BTreeMap<String, String> {
            let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let text = String::from_utf8_lossy(&environ).into_owned();
            text.split('\0')
                .filter_map(|pair| pair.split_once('='))
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .collect()
        };
        let mut tasks: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for given in pids.iter().map(variables).filter(|given| given.contains_key("LARDER_NODE")) {
            tasks.entry(given["LARDER_TASK"].clone()).or_insert(given);
        }
        tasks.into_values().collect()
    }

    /// Plays the trace.
    pub fn play(&mut self, disturb: &mut dyn FnMut(&mut Gpus)) {
        let is = |wanted: [(f64, u64); 4]| {
            let wanted: Shares = ["a", "b", "c", "d"].map(str::to_owned).into_iter().zip(wanted).collect();
            move |shares: &Shares| *shares == wanted
        };
        self.submit(disturb, "a", 1, &["1i", "1", "2"]);
        self.submit(disturb, "b", 1, &["0.6i", "0.4i", "1", "2"]);
        self.submit(disturb, "c", 1, &["0.5i", "0.3i", "0.2i", "2", "1"]);
        self.submit(disturb, "d", 1, &["4"]);
        self.settles("everybody begins", is([(4.0, 0), (4.0, 0), (4.0, 0), (4.0, 0)]));
        self.submit(disturb, "d", 2, &["2"]);
        self.settles("the first pause", |shares| {
            let one = is([(4.0, 0), (2.0, 1), (4.0, 0), (6.0, 0)]);
            let other = is([(4.0, 0), (4.0, 0), (2.0, 1), (6.0, 0)]);
            one(shares) || other(shares)
        });
        self.submit(disturb, "d", 3, &["2"]);
        self.settles("the second pause", is([(4.0, 0), (2.0, 1), (2.0, 1), (8.0, 0)]));
        self.submit(disturb, "a", 4, &["2", "2"]);
        self.submit(disturb, "b", 5, &["2"]);
        self.submit(disturb, "c", 6, &["2"]);
        self.settles("the queues", is([(4.0, 2), (2.0, 2), (2.0, 2), (8.0, 0)]));
        let delete = ["job", "delete", "--all", "-p", "d"].map(str::to_owned);
        self.command(disturb, &delete, None);
        self.settles("d goes home", |shares| {
            let others: Shares = shares.iter().filter(|(name, _)| *name != "d").map(|(k, v)| (k.clone(), *v)).collect();
            let wanted = [("a", (8.0, 0)), ("b", (4.0, 1)), ("c", (4.0, 1))];
            others == wanted.map(|(name, share)| (name.to_owned(), share)).into() && shares["d"] == (0.0, 0)
        });
    }

    fn ledger(&self) -> String {
        fs::read_to_string(self.gpus.world.path("ledger")).unwrap_or_default()
    }

    /// Nothing was started twice, nothing was lost, and what runs is what should.
    pub fn assert_nothing_is_lost_or_twice(&self) {
        let jobs = self.jobs();
        assert_eq!(jobs.len(), 16, "a job is missing: {jobs:?}");
        for job in &jobs {
            let (project, name) = (job["project"].as_str().expect("a name"), job["name"].as_str().expect("a name"));
            let alive = || processes_with("LARDER_JOB_ID", job["id"].as_str().expect("an id"));
            assert_eq!(job["losses"], 0, "{job}");
            if job["status"] != "Running" {
                assert_eq!(alive(), Vec::<i32>::new(), "{project}/{name} is {}", job["status"]);
                continue;
            }
            // A job runs when its supervisor has begun; its first words may come a moment later.
            let attempt = job["attempts"].as_array().and_then(|all| all.last()).expect("an attempt");
            let line = format!("{project}/{name} {}", attempt["number"]);
            wait_for(&line, || self.ledger().lines().any(|have| have == line));
            assert_eq!(alive().len(), 1, "{project}/{name}: {:?}", alive());
        }
        // Of the jobs that were deleted nothing is left, neither a process nor a file.
        let known: BTreeSet<&str> = jobs.iter().map(|job| job["id"].as_str().expect("an id")).collect();
        wait_for("the end of what was deleted", || {
            self.live().iter().all(|given| known.contains(given["LARDER_JOB_ID"].as_str()))
        });
        let kept = fs::read_dir(self.gpus.dir().join("jobs")).expect("lists").flatten();
        let kept: BTreeSet<String> = kept.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        assert_eq!(kept.iter().map(String::as_str).collect::<BTreeSet<_>>(), known);
        let ledger = self.ledger();
        let unique: BTreeSet<&str> = ledger.lines().collect();
        assert_eq!(ledger.lines().count(), unique.len(), "an attempt ran twice:\n{ledger}");
    }
}

#[test]
fn the_golden_trace_gives_each_team_what_it_deserves() {
    let mut golden = Golden::new();
    golden.play(&mut |_| {});
    golden.assert_nothing_is_lost_or_twice();
    let waiting = golden.jobs().into_iter().find(|job| job["status"] == "Pending").expect("somebody waits");
    let told = golden.gpus.world.ok([
        "job",
        "why",
        waiting["name"].as_str().expect("a name"),
        "-p",
        waiting["project"].as_str().expect("a name"),
    ]);
    assert!(told.contains("is Pending: ") && told.contains("it runs when"), "{told}");
}

#[test]
fn a_scheduler_that_is_killed_in_the_golden_trace_loses_nothing_and_starts_nothing_twice() {
    let mut golden = Golden::new();
    let mut commands = 0u64;
    golden.play(&mut |gpus| {
        commands += 1;
        // Another moment each time: before the command came through, in the middle, after it.
        if commands.is_multiple_of(2) {
            std::thread::sleep(std::time::Duration::from_millis(commands * 37 % 290));
            gpus.kill();
            gpus.start();
        }
    });
    golden.assert_nothing_is_lost_or_twice();
}
