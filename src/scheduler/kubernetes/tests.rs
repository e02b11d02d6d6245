//! The scheduler against a small API server in this process: what it does to pods, with faults and deaths at every step.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::fake::{Death, Fake, Fault};
use super::KubeError;
use super::lease::Times;
use super::run::{Options, run};
use super::serve::Shared;

mod fake;

/// However loaded the machine is.
const PATIENCE: Duration = Duration::from_secs(120);

/// A scheduler and its API server.
struct Rig {
    fake: Arc<Fake>,
    address: String,
    options: Options,
    shared: Arc<Shared>,
    scheduler: Option<JoinHandle<Result<(), KubeError>>>,
    stop: CancellationToken,
}

fn options() -> Options {
    Options {
        scheduler_name: "larder".to_owned(),
        gpu_resource: "nvidia.com/gpu".to_owned(),
        pool_label: "larder.io/pool".to_owned(),
        lease: None,
        times: Times::default(),
        identity: "one".to_owned(),
        requests_per_second: 1000.0,
        burst: 1000,
    }
}

impl Rig {
    async fn new() -> Self {
        let (fake, address) = Fake::start().await;
        let (shared, stop) = (Arc::default(), CancellationToken::new());
        Self { fake, address, options: options(), shared, scheduler: None, stop }
    }

    /// Starts a scheduler that knows nothing.
    fn start(&mut self) {
        let mut config = kube::Config::new(self.address.parse().expect("an address"));
        config.default_retry = false;
        let client = kube::Client::try_from(config).expect("a client");
        self.shared = Arc::default();
        self.stop = CancellationToken::new();
        let (options, shared, stop) = (self.options.clone(), self.shared.clone(), self.stop.clone());
        self.scheduler = Some(tokio::spawn(async move { run(client, &options, shared, stop).await }));
    }

    /// Ends it in the middle of what it does.
    async fn kill(&mut self) {
        if let Some(scheduler) = self.scheduler.take() {
            scheduler.abort();
            let _ = scheduler.await;
        }
    }

    /// Waits until something is so.
    #[track_caller]
    fn wait(&self, what: &'static str, is_so: impl Fn(&Fake) -> bool) -> impl Future<Output = ()> {
        let place = std::panic::Location::caller();
        async move {
            let begun = Instant::now();
            while !is_so(&self.fake) {
                let shares = || format!("{:?}", self.fake.shares());
                assert!(begun.elapsed() < PATIENCE, "{what} ({place}): {}\n{:#?}", shares(), self.fake.pods());
                self.fake.reap();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            self.fake.assert_sound();
        }
    }

    /// Waits until the projects have so much, and so many of their pods wait.
    #[track_caller]
    fn shares(&self, what: &'static str, wanted: &[(&str, u64, u64)]) -> impl Future<Output = ()> {
        let wanted: BTreeMap<String, (u64, u64)> =
            wanted.iter().map(|(name, gpus, waiting)| ((*name).to_owned(), (gpus * 1000, *waiting))).collect();
        self.wait(what, move |fake| fake.shares() == wanted)
    }

    fn gang(&self, project: &str, gang: &str, size: u32, members: std::ops::Range<u32>, gpus: &str) {
        for member in members {
            self.fake.pod_with(project, &format!("{gang}-{member}"), gpus, |pod| {
                pod["metadata"]["labels"]["larder.io/gang"] = json!(gang);
                pod["metadata"]["annotations"]["larder.io/gang-size"] = json!(size.to_string());
            });
        }
    }

    /// The golden trace: four teams share sixteen GPUs.
    async fn golden(&self) {
        let fake = &self.fake;
        for (name, size) in [("a1", "1i"), ("a2", "1"), ("a3", "2")] {
            fake.pod("a", name, size);
        }
        for (name, size) in [("b1", "0.6i"), ("b2", "0.4i"), ("b3", "1"), ("b4", "2")] {
            fake.pod("b", name, size);
        }
        for (name, size) in [("c1", "0.5i"), ("c2", "0.3i"), ("c3", "0.2i"), ("c4", "2"), ("c5", "1")] {
            fake.pod("c", name, size);
        }
        fake.pod("d", "d1", "4");
        self.shares("everybody begins", &[("a", 4, 0), ("b", 4, 0), ("c", 4, 0), ("d", 4, 0)]).await;
        fake.pod("d", "d2", "2");
        let paused = |of: &str| -> BTreeMap<String, (u64, u64)> {
            let one = |name: &str| if name == of { (2000, 1) } else { (4000, 0) };
            ["a", "b", "c"]
                .map(|name| (name.to_owned(), one(name)))
                .into_iter()
                .chain([("d".to_owned(), (6000, 0))])
                .collect()
        };
        let (b, c) = (paused("b"), paused("c"));
        self.wait("the first pause", |fake| fake.shares() == b || fake.shares() == c).await;
        fake.pod("d", "d3", "2");
        self.shares("the second pause", &[("a", 4, 0), ("b", 2, 1), ("c", 2, 1), ("d", 8, 0)]).await;
        for (project, name) in [("a", "a4"), ("a", "a5"), ("b", "b5"), ("c", "c6")] {
            fake.pod(project, name, "2");
        }
        self.shares("the queues", &[("a", 4, 2), ("b", 2, 2), ("c", 2, 2), ("d", 8, 0)]).await;
        for name in ["d1", "d2", "d3"] {
            fake.delete_pod(name);
        }
        self.shares("d goes home", &[("a", 8, 0), ("b", 4, 1), ("c", 4, 1)]).await;
    }
}

async fn golden_rig() -> Rig {
    let rig = Rig::new().await;
    for node in ["n0", "n1"] {
        rig.fake.node(node, 8);
    }
    for (project, quota) in [("a", 4.0), ("b", 2.0), ("c", 2.0), ("d", 8.0)] {
        rig.fake.project(project, quota);
    }
    rig
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(scheduler) = self.scheduler.take() {
            scheduler.abort();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_golden_trace_gives_each_team_what_it_deserves() {
    let mut rig = golden_rig().await;
    rig.start();
    rig.golden().await;
    let placed = rig.fake.bindings() as u64;
    assert_eq!(rig.fake.count("bind"), placed, "each pod that was placed cost one binding");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_watch_a_lost_answer_and_a_refusal_lose_nothing_and_place_nothing_twice() {
    let mut rig = golden_rig().await;
    rig.fake.fault("bind", &[Fault::AnswerLost, Fault::Refused(429), Fault::Refused(503), Fault::Refused(409)]);
    rig.fake.fault("evict", &[Fault::Refused(429), Fault::AnswerLost, Fault::Refused(500)]);
    rig.fake.fault("get", &[Fault::Refused(500)]);
    rig.start();
    let fake = rig.fake.clone();
    let breaking = tokio::spawn(async move {
        for round in 0u32.. {
            tokio::time::sleep(Duration::from_millis(150)).await;
            fake.drop_watches(round.is_multiple_of(2));
        }
    });
    rig.golden().await;
    breaking.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scheduler_that_dies_at_any_request_loses_nothing_and_starts_nothing_twice() {
    // Two gangs, a fraction, a pause: some ten requests that change something.
    for after in 0..12 {
        for done in [false, true] {
            let mut rig = Rig::new().await;
            rig.fake.node("n0", 4);
            rig.fake.project("a", 2.0);
            rig.fake.project("b", 2.0);
            rig.gang("a", "lent", 2, 0..2, "1");
            rig.gang("a", "gang", 2, 0..2, "1");
            rig.fake.doom(Death { after, done });
            rig.start();
            let survive = async |rig: &mut Rig, what: &'static str, wanted: &[(&str, u64, u64)]| {
                let fake = rig.fake.clone();
                let died = fake.died.notified();
                tokio::select! {
                    () = rig.shares(what, wanted) => return,
                    () = died => {}
                }
                rig.kill().await;
                rig.start();
                rig.shares(what, wanted).await;
            };
            survive(&mut rig, "all is lent", &[("a", 4, 0)]).await;
            rig.fake.pod("b", "half", "0.5i");
            rig.fake.pod("b", "part", "0.5i");
            rig.fake.pod("b", "one", "1");
            // The younger gang goes, whole; what the other is lent stays.
            survive(&mut rig, "b has its part", &[("a", 2, 2), ("b", 2, 0)]).await;
            let gangs = rig.fake.pods().into_iter().filter(|pod| pod["spec"]["nodeName"].is_string());
            let gangs: Vec<String> = gangs
                .filter_map(|pod| pod["metadata"]["labels"]["larder.io/gang"].as_str().map(str::to_owned))
                .collect();
            assert!(matches!(gangs.as_slice(), [one, other] if one == other), "a gang is there by half: {gangs:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_gang_is_made_whole_or_goes_back() {
    let mut rig = Rig::new().await;
    rig.fake.node("n0", 4);
    rig.fake.project("a", 4.0);
    let bound = |pod: &mut serde_json::Value| {
        pod["metadata"]["labels"]["larder.io/gang"] = json!("g");
        pod["metadata"]["annotations"]["larder.io/gang-size"] = json!("3");
        pod["metadata"]["annotations"]["larder.io/gpus"] = json!("2");
        pod["metadata"]["annotations"]["larder.io/start"] = json!("7");
        pod["spec"]["nodeName"] = json!("n0");
        pod["status"]["phase"] = json!("Running");
    };
    rig.fake.pod_with("a", "g-0", "1", bound);
    rig.gang("a", "g", 3, 1..3, "1");
    rig.start();
    rig.shares("the gang is whole", &[("a", 3, 0)]).await;
    let gpus = |name: &str| rig.fake.get_pod(name).map(|pod| pod["metadata"]["annotations"]["larder.io/gpus"].clone());
    let given = ["g-0", "g-1", "g-2"].map(gpus);
    assert!(given[0] == Some(json!("2")) && given[1] != given[2], "{given:?}");
    rig.kill().await;

    // There is no place for the rest: who is there goes, and the gang waits as a whole.
    let mut rig = Rig::new().await;
    rig.fake.node("n0", 3);
    rig.fake.project("a", 4.0);
    rig.fake.pod_with("a", "g-0", "1", bound);
    rig.gang("a", "g", 3, 1..3, "1");
    rig.fake.pod_with("a", "other", "1", |pod| {
        pod["spec"]["schedulerName"] = json!("default-scheduler");
        pod["spec"]["nodeName"] = json!("n0");
        pod["status"]["phase"] = json!("Running");
    });
    rig.start();
    rig.shares("the gang waits", &[("a", 1, 3)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_told_why_it_waits_and_a_project_how_it_stands() {
    let mut rig = golden_rig().await;
    rig.fake.pod("a", "shell", "5i");
    rig.fake.pod("nobody", "stray", "1");
    rig.fake.pod("a", "train", "2");
    rig.start();
    let condition = |fake: &Fake, name: &str| {
        fake.get_pod(name).map(|pod| pod["status"]["conditions"][0].clone()).unwrap_or_default()
    };
    rig.wait("the reasons", |fake| {
        condition(fake, "shell")["reason"] == "QuotaInUse" && condition(fake, "stray")["reason"] == "Invalid"
    })
    .await;
    let told = condition(&rig.fake, "shell")["message"].as_str().unwrap_or("").to_owned();
    assert!(told.contains("runs only within the quota"), "{told}");
    rig.wait("the events", |fake| {
        fake.events("shell") == ["FailedScheduling"] && fake.events("train").contains(&"Scheduled".to_owned())
    })
    .await;
    let status = |fake: &Fake| fake.project_status("a");
    rig.wait("the status", |fake| {
        let status = status(fake);
        (&status["allocated"], &status["running"], &status["waiting"]) == (&json!(2), &json!(1), &json!(1))
    })
    .await;
    let page = rig.shared.metrics();
    assert!(page.contains("larder_scheduler_project_gpus{project=\"a\",what=\"allocated\"} 2"), "{page}");
    assert!(rig.shared.is_ready());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_go_where_they_may_and_where_there_is_room() {
    let mut rig = Rig::new().await;
    rig.fake.node_with("small", 8, json!({"cpu": "4"}));
    rig.fake.node_with("big", 8, json!({"cpu": "64"}));
    rig.fake.project("a", 16.0);
    let needing = |cpu: &'static str| {
        move |pod: &mut serde_json::Value| {
            pod["spec"]["containers"][0]["resources"]["requests"] = json!({"cpu": cpu});
        }
    };
    rig.fake.pod_with("a", "many", "1", needing("8"));
    rig.fake.pod_with("a", "named", "1", |pod| {
        needing("3")(pod);
        pod["spec"]["affinity"] = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
            {"nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["small"]}]}]}}});
    });
    rig.start();
    rig.shares("both", &[("a", 2, 0)]).await;
    assert_eq!(
        (rig.fake.node_of("many").as_deref(), rig.fake.node_of("named").as_deref()),
        (Some("big"), Some("small"))
    );
    // The small node has GPUs, but no CPU any more; so they all go to the big one, as long as that has some.
    for number in 0..4 {
        rig.fake.pod_with("a", &format!("p{number}"), "1", needing("2"));
    }
    rig.shares("all", &[("a", 6, 0)]).await;
    assert!((0..4).all(|number| rig.fake.node_of(&format!("p{number}")).as_deref() == Some("big")));
    rig.fake.pod_with("a", "huge", "1", needing("60"));
    rig.wait("the reason", |fake| {
        fake.get_pod("huge").is_some_and(|pod| pod["status"]["conditions"][0]["reason"] == "Unschedulable")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_goes_where_its_commit_is() {
    let mut rig = Rig::new().await;
    let commit = "3f".repeat(32);
    for node in ["n0", "n1", "n2"] {
        rig.fake.node(node, 8);
    }
    rig.fake.put("nodes", json!({"metadata": {"name": "n3", "uid": "n3", "annotations": {"larder.io/commits": commit}},
        "status": {"allocatable": {"nvidia.com/gpu": "8", "pods": "100"}, "conditions": [{"type": "Ready", "status": "True"}]}}));
    rig.fake.project("a", 32.0);
    rig.fake.pod_with("a", "reader", "1", |pod| {
        pod["spec"]["volumes"] = json!([{"name": "x", "csi": {"driver": "csi.larder.io", "volumeAttributes": {"dataset": format!("xray@{commit}")}}}]);
    });
    rig.start();
    rig.shares("the reader", &[("a", 1, 0)]).await;
    assert_eq!(rig.fake.node_of("reader").as_deref(), Some("n3"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_scheduler_takes_over_when_the_leader_dies_and_gives_the_lease_back_when_it_is_told_to_stop() {
    let mut first = golden_rig().await;
    first.options.lease = Some(("larder".to_owned(), "larder-scheduler".to_owned()));
    let (renew, give_up) = (Duration::from_millis(500), Duration::from_secs(20));
    first.options.times = Times { duration: Duration::from_secs(2), renew, give_up };
    first.start();
    first.fake.pod("a", "a1", "1");
    first.shares("the first places", &[("a", 1, 0)]).await;
    assert_eq!(first.fake.holder("larder/larder-scheduler").as_deref(), Some("one"));
    let (fake, address, options) = (first.fake.clone(), first.address.clone(), first.options.clone());
    let stop = CancellationToken::new();
    let mut second = Rig { fake, address, options, shared: Arc::default(), scheduler: None, stop };
    second.options.identity = "two".to_owned();
    second.start();
    second.wait("the second is ready, whether or not it leads", |_| second.shared.is_ready()).await;
    first.kill().await;
    second.fake.pod("a", "a2", "1");
    second.shares("the second places", &[("a", 2, 0)]).await;
    assert_eq!(second.fake.holder("larder/larder-scheduler").as_deref(), Some("two"));
    // One that is told to stop gives the lease back.
    second.stop.cancel();
    let ended = second.scheduler.take().expect("runs").await.expect("no panic");
    assert!(ended.is_ok(), "{ended:?}");
    assert_eq!(second.fake.holder("larder/larder-scheduler"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: make campaign PART=kube"]
async fn a_scheduler_that_is_killed_fifty_times_in_the_golden_trace_loses_nothing_and_starts_nothing_twice() {
    let mut kills = 0;
    let mut random: u64 = std::env::var("LARDER_CAMPAIGN_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    while kills < 50 {
        let mut rig = golden_rig().await;
        rig.start();
        let (fake, address) = (rig.fake.clone(), rig.address.clone());
        let mut shadow = Rig {
            fake,
            address,
            options: rig.options.clone(),
            shared: Arc::default(),
            scheduler: rig.scheduler.take(),
            stop: CancellationToken::new(),
        };
        let mut playing = Box::pin(rig.golden());
        loop {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let pause = Duration::from_millis(random >> 54);
            tokio::select! {
                () = &mut playing => break,
                () = tokio::time::sleep(pause) => {
                    shadow.kill().await;
                    kills += 1;
                    shadow.start();
                }
            }
        }
    }
    println!("{kills} kills");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: make campaign PART=kube"]
async fn five_hundred_nodes_and_five_thousand_pods() {
    let mut rig = Rig::new().await;
    for node in 0..500 {
        rig.fake.node(&format!("n{node}"), 8);
    }
    for project in 0..20 {
        rig.fake.project(&format!("p{project}"), 200.0);
    }
    for pod in 0..5000 {
        let size = ["1", "1", "1", "2", "0.5"][pod % 5];
        rig.fake.pod(&format!("p{}", pod % 20), &format!("pod{pod}"), size);
    }
    rig.start();
    let begun = Instant::now();
    let full = |fake: &Fake| fake.shares().values().map(|(gpus, _)| gpus).sum::<u64>() >= 3_999_000;
    let mut slowest = Duration::ZERO;
    while !full(&rig.fake) && begun.elapsed() < Duration::from_secs(600) {
        slowest = slowest.max(rig.shared.cycles().0);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    rig.fake.assert_sound();
    let placed = rig.fake.bindings() as u64;
    let requests: u64 = ["bind", "evict", "get", "tell"].iter().map(|verb| rig.fake.count(verb)).sum();
    let (took, cycles) = rig.shared.cycles();
    println!(
        "{placed} of 5000 pods placed in {:?} by {cycles} cycles, the last {took:?}, the slowest seen {slowest:?}; {:.2} requests for each ({} bindings, {} told)",
        begun.elapsed(),
        requests as f64 / placed as f64,
        rig.fake.count("bind"),
        rig.fake.count("tell"),
    );
    assert!(full(&rig.fake) && requests <= 4 * placed, "{placed} placed, {requests} requests");
}
