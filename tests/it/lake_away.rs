//! The lake is away, slow, throttles, flaps or does not take the credentials: at the wire, before a real daemon.
//!
//! What holds each time: what is cached is read; what is not ends in EIO within `fetch.give_up`; `larder status`
//! says why; nothing is remembered, so that the next read after the end of the outage is right.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::kit::proxy::{Fault, Proxy, Rule};
use crate::kit::s3::{ACCESS_KEY, SECRET_KEY, TestS3, env_at};
use crate::kit::{World, wait_for};

/// `fetch.give_up` here. What ends later than a minute after it is no slow machine, but a hang.
const GIVE_UP: Duration = Duration::from_secs(5);
const HANG: Duration = Duration::from_secs(65);

fn bytes(salt: u8) -> Vec<u8> {
    (0..300_000_u32).map(|at| (at as u8).wrapping_mul(31).wrapping_add(salt)).collect()
}

/// A node before a proxy before a store, with a dataset whose first file is cached and whose second is not.
struct Node {
    world: World,
    proxy: Proxy,
    dir: PathBuf,
    _s3: TestS3,
}

impl Node {
    fn start() -> Self {
        Self::start_with(|_, _| {})
    }

    fn start_with(change: impl FnOnce(&mut World, &TestS3)) -> Self {
        let s3 = TestS3::start();
        let proxy = Proxy::start(s3.addr());
        let mut world = World::new();
        world.set_all(env_at(&proxy.endpoint(), "away"));
        for (name, salt) in [("hot", 1), ("cold", 2)] {
            let source = world.files(name, &[("file", &bytes(salt))]);
            world.push(&source, name);
        }
        world.ok(["cache", "hot"]);
        world.ok(["daemon", "stop"]);
        // Impatient from here on only: what comes before needs a store that answers at any speed.
        world.set("LARDER_FETCH_GIVE_UP", "5s");
        world.set("LARDER_FETCH_STALL_TIMEOUT", "1s");
        world.set("LARDER_READ_TIMEOUT", "1s");
        world.set("LARDER_CONNECT_TIMEOUT", "1s");
        change(&mut world, &s3);
        let dir = world.mount("hot", "hot-m", &[]);
        world.mount("cold", "cold-m", &["--prefetch", "none"]);
        // Its place in the commit is known from here on; its bytes are not.
        fs::metadata(world.path("cold-m/file")).expect("stat");
        Self { world, proxy, dir, _s3: s3 }
    }

    fn cold(&self) -> PathBuf {
        self.world.path("cold-m/file")
    }

    #[track_caller]
    fn hot_is_readable(&self) {
        assert!(fs::read(self.dir.join("file")).expect("what is cached is read") == bytes(1));
    }

    /// Reads what is not cached: EIO, and not for ever.
    #[track_caller]
    fn cold_fails(&self) {
        let begun = Instant::now();
        let error = fs::read(self.cold()).expect_err("nobody has these bytes");
        assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EIO as i32), "{error}");
        assert!(begun.elapsed() < HANG, "ends within fetch.give_up ({GIVE_UP:?}), with room for a slow machine");
    }

    #[track_caller]
    fn status_says(&self, what: &str) {
        // The last thing that was seen may be a request that took too long: another read sees the rest.
        wait_for(what, || {
            let status = self.world.json(&["status", "--no-lake"]);
            let is_told = status["daemon"]["lake_problem"].as_str().is_some_and(|problem| problem.contains(what));
            is_told || fs::read(self.cold()).is_ok()
        });
        assert!(self.world.ok(["status", "--no-lake"]).contains("its lake does not answer"));
    }

    #[track_caller]
    fn all_is_well_again(&self) {
        self.proxy.heal();
        let mut read = Vec::new();
        wait_for("the bytes after the outage", || match fs::read(self.cold()) {
            Ok(bytes) => {
                read = bytes;
                true
            }
            Err(_) => false,
        });
        assert!(read == bytes(2));
        self.hot_is_readable();
        wait_for("a status without trouble", || {
            self.world.json(&["status", "--no-lake"])["daemon"]["lake_problem"].is_null()
        });
    }
}

#[test]
fn a_store_that_is_down_costs_nothing_that_is_cached_and_the_rest_ends_in_eio() {
    let node = Node::start();
    node.proxy.set_down(true);
    node.hot_is_readable();
    node.cold_fails();
    node.status_says("unreachable");
    // Metadata that this node has is enough to mount, by the full id.
    let commit = node.world.json(&["mounts"])[1]["commit"].as_str().expect("a commit").to_owned();
    let again = node.world.mount(&format!("hot@{commit}"), "again", &[]);
    assert!(fs::read(again.join("file")).expect("reads") == bytes(1));
    node.all_is_well_again();
}

#[test]
fn a_store_that_refuses_connections_or_whose_name_is_gone_is_a_store_that_is_away() {
    let node = Node::start();
    let commit = node.world.json(&["mounts"])[1]["commit"].as_str().expect("a commit").to_owned();
    node.world.ok(["daemon", "stop"]);
    // Nobody listens there: a port that was ours a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("binds").local_addr().expect("an address");
    for endpoint in [format!("http://{free}"), "http://store.invalid:9000".to_owned()] {
        let mut world = World::new();
        world.set_all(env_at(&endpoint, "away"));
        world.set("LARDER_FETCH_GIVE_UP", "5s");
        world.set("LARDER_CONNECT_TIMEOUT", "1s");
        // The same node, after its store has moved away: the lake's URL is the same, where it is asked is not.
        world.set("LARDER_STATE", node.world.state().to_str().expect("plain"));
        world.set("LARDER_TIER", node.world.tier().to_str().expect("plain"));
        let mounts = world.make_dir("m");
        world.ok(["mount", &format!("hot@{commit}"), mounts.to_str().expect("plain")]);
        let read = fs::read(mounts.join("file"));
        assert!(read.is_ok_and(|read| read == bytes(1)), "what is cached is read: {endpoint}\n{}", node.world.log());
        let status = world.json(&["status"]);
        assert_eq!(status["lake"]["ok"], false, "{status}");
        world.ok(["daemon", "stop"]);
    }
}

#[test]
fn a_store_that_asks_for_time_is_given_it_and_the_read_goes_on() {
    let node = Node::start_with(|world, _| {
        for name in ["LARDER_FETCH_GIVE_UP", "LARDER_FETCH_STALL_TIMEOUT", "LARDER_READ_TIMEOUT"] {
            world.set(name, "5m");
        }
    });
    let asked = Rule::next("GET", Fault::Refuse(503, "SlowDown", Some(1))).on("/data/");
    node.proxy.rule(asked);
    node.proxy.reset_counters();
    assert!(fs::read(node.cold()).expect("reads on") == bytes(2));
    let metrics = node.world.ok(["daemon", "metrics"]);
    assert!(metrics.contains("larder_lake_throttled_total 1"), "{metrics}");
    // Asked once, told to wait, and not asked again by the SDK behind our back in the meantime.
    let asked = node.proxy.counters().log.iter().filter(|(_, path)| path.contains("/data/")).count();
    assert!(asked <= 3, "{asked} requests for a pack's bytes");
    node.hot_is_readable();
    node.all_is_well_again();
}

#[test]
fn a_store_that_only_ever_asks_for_time_ends_in_eio() {
    let node = Node::start();
    node.proxy.rule(Rule::every("GET", Fault::Refuse(503, "SlowDown", Some(1))));
    node.cold_fails();
    node.status_says("SlowDown");
    node.hot_is_readable();
    node.all_is_well_again();
}

#[test]
fn a_store_that_flaps_gives_the_right_bytes_in_the_end() {
    let node = Node::start();
    for fault in [Fault::CloseBefore, Fault::Status(500), Fault::CutBody(1000), Fault::ShortBody(5)] {
        node.proxy.rule(Rule::every("GET", fault).on("/data/").after(1).times(1));
    }
    node.proxy.rule(Rule::next("GET", Fault::Status(503)).on("/data/"));
    node.all_is_well_again();
}

#[test]
fn a_clock_that_is_wrong_is_told_as_such() {
    let node = Node::start();
    node.proxy.rule(Rule::every("GET", Fault::Refuse(403, "RequestTimeTooSkewed", None)));
    node.cold_fails();
    node.status_says("clock is off");
    node.hot_is_readable();
    node.all_is_well_again();
}

#[test]
fn expired_credentials_end_in_eio_and_are_told() {
    let node = Node::start();
    node.proxy.rule(Rule::every("GET", Fault::Refuse(400, "ExpiredToken", None)));
    node.cold_fails();
    node.status_says("ExpiredToken");
    node.hot_is_readable();
    node.all_is_well_again();
}

fn write_profile(path: &Path, secret: &str) {
    let text = format!("[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {secret}\n");
    fs::write(path, text).expect("writes the profile");
}

#[test]
fn credentials_that_were_rotated_are_taken_from_the_profile_without_a_restart() {
    let node = Node::start_with(|world, _| {
        // The pushes had the keys from the environment; the daemon finds them in the profile.
        let profile = world.path("credentials");
        write_profile(&profile, SECRET_KEY);
        // No keys in the environment: the profile's count.
        for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
            world.set(name, "");
        }
        world.set("AWS_SHARED_CREDENTIALS_FILE", profile.to_str().expect("plain"));
    });
    let pid = node.world.daemon_pid();
    // The daemon has read the profile. The old keys are what the store does not take any more, as it would say.
    let refused = Rule::next("GET", Fault::Refuse(403, "InvalidAccessKeyId", None)).on("/data/");
    node.proxy.rule(refused);
    let mut read = Vec::new();
    wait_for("bytes with the new credentials", || match fs::read(node.cold()) {
        Ok(bytes) => {
            read = bytes;
            true
        }
        Err(_) => false,
    });
    assert!(read == bytes(2));
    let metrics = node.world.ok(["daemon", "metrics"]);
    assert!(metrics.contains("larder_lake_credential_renewals_total 1"), "{metrics}");
    assert_eq!(node.world.daemon_pid(), pid, "the same daemon");
}
