//! The lake on the wire: what the client makes of an S3 server that misbehaves, and of one that is
//! killed; the commands of `larder lake`.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use larder::store::lake::s3::{S3Config, S3Lake, StaticKeys};
use larder::store::lake::{Body, Lake, LakeError, PutIf, get_all, list_all};

use crate::kit::proxy::{Fault, Proxy, Rule};
use crate::kit::s3::{ACCESS_KEY, BUCKET, SECRET_KEY, TestS3, config_at};
use crate::kit::world::World;

async fn drain(body: Body) -> Result<Vec<u8>, LakeError> {
    let mut bytes = Vec::new();
    let mut stream = body.stream;
    while let Some(chunk) = stream.next().await {
        bytes.extend_from_slice(&chunk?);
    }
    Ok(bytes)
}

fn body() -> Bytes {
    (0..1_000_000u32).map(|n| (n / 7) as u8).collect::<Vec<u8>>().into()
}

struct Setup {
    proxy: Proxy,
    config: S3Config,
    _s3: TestS3,
}

fn setup() -> Setup {
    let s3 = TestS3::start();
    let proxy = Proxy::start(s3.addr());
    let config =
        S3Config { read_timeout: Duration::from_millis(500), attempts_max: 1, ..config_at(&proxy.endpoint(), "p") };
    Setup { proxy, config, _s3: s3 }
}

async fn client(setup: &Setup) -> S3Lake {
    let lake = S3Lake::connect(setup.config.clone()).await.unwrap();
    lake.put("big", body(), PutIf::Always).await.unwrap();
    lake
}

#[test]
fn every_fault_of_the_wire_is_passing_and_none_gives_wrong_lengths() {
    let setup = setup();
    crate::kit::runtime().block_on(async {
        let lake = client(&setup).await;
        for fault in [
            Fault::Status(500),
            Fault::Status(503),
            Fault::CloseBefore,
            Fault::CutBody(0),
            Fault::CutBody(700_000),
            Fault::Stall(0),
            Fault::Stall(300_000),
            Fault::Late(Duration::from_secs(2)),
            Fault::LostAnswer,
        ] {
            setup.proxy.rule(Rule::next("GET", fault));
            let got = match lake.get("big", None).await {
                Ok(body) => drain(body).await,
                Err(error) => Err(error),
            };
            let error = got.expect_err("the fault shows");
            assert!(error.is_passing(), "{fault:?}: {error:?}");
            setup.proxy.heal();
            assert_eq!(get_all(&lake, "big", 1 << 20).await.unwrap(), body(), "{fault:?}");
        }
    });
}

#[test]
fn a_body_shorter_than_the_range_is_refused() {
    let setup = setup();
    crate::kit::runtime().block_on(async {
        let lake = client(&setup).await;
        setup.proxy.rule(Rule::next("GET", Fault::ShortBody(50)));
        assert!(lake.get("big", Some(100..200)).await.is_err());
        let right = drain(lake.get("big", Some(100..200)).await.unwrap()).await.unwrap();
        assert_eq!(right, &body()[100..200]);
    });
}

#[test]
fn retries_ride_over_a_store_that_is_down_for_a_moment() {
    let setup = setup();
    crate::kit::runtime().block_on(async {
        let lake = client(&setup).await;
        setup.proxy.set_down(true);
        assert!(lake.get("big", None).await.is_err_and(|error| error.is_passing()));
        let healing = tokio::task::spawn_blocking({
            let begun = Instant::now();
            move || {
                std::thread::sleep(Duration::from_millis(300));
                begun
            }
        });
        let (got, _) = tokio::join!(get_all(&lake, "big", 1 << 20), async {
            healing.await.unwrap();
            setup.proxy.set_down(false);
        });
        assert_eq!(got.unwrap(), body());
    });
}

#[test]
fn a_lost_answer_to_the_end_of_an_upload_is_made_good() {
    let setup = setup();
    crate::kit::runtime().block_on(async {
        let config = S3Config { attempts_max: 3, ..setup.config.clone() };
        let lake = S3Lake::connect(config).await.unwrap();
        let upload = lake.upload_begin("data/x").await.unwrap();
        let part = lake.upload_part(&upload, 1, body()).await.unwrap();
        setup.proxy.rule(Rule::next("POST", Fault::LostAnswer));
        let etag = lake.upload_finish(&upload, vec![part]).await.unwrap();
        assert_eq!(lake.head("data/x").await.unwrap().etag, etag);
    });
}

#[test]
fn a_wrong_key_is_denied_and_not_tried_again() {
    let setup = setup();
    crate::kit::runtime().block_on(async {
        let mut config = S3Config { attempts_max: 3, ..setup.config.clone() };
        if let Some(keys) = &mut config.keys {
            keys.secret_key = "wrong".into();
        }
        let lake = S3Lake::connect(config).await.unwrap();
        let error = lake.get("big", None).await.err().expect("denied");
        assert!(matches!(error, LakeError::Denied { .. }), "{error:?}");
        assert_eq!(setup.proxy.counters().total(), 1);
    });
}

#[test]
fn the_proxy_counts_requests_and_bytes() {
    let setup = setup();
    crate::kit::runtime().block_on(async {
        let lake = client(&setup).await;
        drain(lake.get("big", None).await.unwrap()).await.unwrap();
        drain(lake.get("big", Some(10..20)).await.unwrap()).await.unwrap();
        let counters = setup.proxy.counters();
        assert_eq!(counters.bytes_down.get("GET"), Some(&1_000_010));
        assert_eq!(counters.requests.get("GET"), Some(&2));
        assert!(counters.bytes_up.get("PUT").is_some_and(|bytes| *bytes >= 1_000_000));
    });
}

/// `larder lake serve` as a process; killed when dropped.
struct Served {
    child: Child,
    endpoint: String,
    keys: StaticKeys,
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have been killed already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Served {
    /// Starts it and reads from its output what a shell would `eval`.
    fn start(world: &World) -> Self {
        let args = ["lake", "serve", "served", "--listen", "127.0.0.1:0", "--quiet"];
        let mut command = world.command(args);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("starts larder");
        let stdout = BufReader::new(child.stdout.take().expect("is piped"));
        let mut found = std::collections::BTreeMap::new();
        for line in stdout.lines().take(4) {
            let line = line.expect("is text");
            let (name, value) =
                line.strip_prefix("export ").and_then(|rest| rest.split_once('=')).expect("is an export");
            found.insert(name.to_owned(), value.to_owned());
        }
        assert_eq!(found["LARDER_LAKE"], "s3://larder");
        let keys = StaticKeys {
            access_key: found["AWS_ACCESS_KEY_ID"].clone(),
            secret_key: found["AWS_SECRET_ACCESS_KEY"].clone(),
        };
        let endpoint = found["LARDER_ENDPOINT"].clone();
        Self { child, endpoint, keys }
    }

    async fn lake(&self) -> S3Lake {
        let config = S3Config {
            endpoint: Some(self.endpoint.clone()),
            keys: Some(self.keys.clone()),
            attempts_max: 1,
            ..S3Config::new("larder", "p")
        };
        S3Lake::connect(config).await.expect("a client")
    }
}

/// Puts objects until the server is gone; gives the keys that were acknowledged.
async fn put_until_killed(lake: S3Lake, writer: u32) -> Vec<String> {
    let mut acknowledged = Vec::new();
    for n in 0..100_000 {
        let key = format!("w{writer}/{n}");
        match lake.put(&key, killed_body(&key), PutIf::Absent).await {
            Ok(_) => acknowledged.push(key),
            Err(error) => {
                assert!(error.is_passing(), "{error:?}");
                break;
            }
        }
    }
    acknowledged
}

/// A body that tells which key it belongs to, and whether it is whole.
fn killed_body(key: &str) -> Bytes {
    key.repeat(20_000 / key.len()).into()
}

#[test]
fn a_served_lake_that_is_killed_keeps_what_it_acknowledged_and_shows_nothing_by_halves() {
    let world = World::new();
    for round in 0..3 {
        let mut served = Served::start(&world);
        let acknowledged = crate::kit::runtime().block_on(async {
            let lake = served.lake().await;
            let writers = (0..4).map(|n| tokio::spawn(put_until_killed(lake.clone(), round * 10 + n)));
            let writers: Vec<_> = writers.collect();
            tokio::time::sleep(Duration::from_millis(300)).await;
            served.child.kill().expect("kills it");
            let mut all = Vec::new();
            for writer in writers {
                all.extend(writer.await.expect("the writer ends"));
            }
            all
        });
        let again = Served::start(&world);
        assert_eq!(again.keys, served.keys, "clients keep their keys");
        crate::kit::runtime().block_on(async {
            let lake = again.lake().await;
            let listed = list_all(&lake, "").await.expect("lists");
            for key in &acknowledged {
                assert!(listed.iter().any(|meta| meta.key == *key), "{key} is lost");
            }
            for meta in listed {
                let body = get_all(&lake, &meta.key, 1 << 20).await.expect("is whole");
                assert_eq!(body, killed_body(&meta.key));
            }
        });
        assert!(!acknowledged.is_empty());
    }
}

#[test]
fn a_lake_is_made_once_shown_as_json_and_its_mode_never_changes() {
    let s3 = TestS3::start();
    let mut world = World::new();
    world.set_all(s3.env("team/lake"));
    let missing = world.run(["lake", "info"]);
    assert_eq!(missing.code, 1);
    assert!(missing.stderr.contains("larder lake init"), "{}", missing.stderr);
    let made = world.run(["lake", "init", "--refs", "log", "--json"]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let made: serde_json::Value = serde_json::from_str(&made.stdout).expect("is JSON");
    assert_eq!((&made["refs"], &made["format"]), (&"log".into(), &1.into()));
    assert_eq!(made["url"], format!("s3://{BUCKET}/team/lake"));
    let other = world.run(["lake", "init", "--refs", "cas"]);
    assert_eq!(other.code, 1);
    assert!(other.stderr.contains("never changes"), "{}", other.stderr);
    let shown = world.run(["lake", "info", "--probe", "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).expect("is JSON");
    assert_eq!((&shown["lake_id"], &shown["refs"]), (&made["lake_id"], &"log".into()));
    assert_eq!(shown["conditional_writes"], true);
    world.set("LARDER_LAKE", "s3://no-such-bucket/x");
    let refused = world.run(["lake", "init"]);
    assert!(refused.stderr.contains("--create-bucket"), "{}", refused.stderr);
    assert_eq!(world.run(["lake", "init", "--create-bucket"]).code, 0);
    assert_eq!(world.run(["lake", "serve", "d", "--bucket", "NO"]).code, 2);
}

#[test]
fn credentials_come_from_a_profile_of_the_standard_chain() {
    let s3 = TestS3::start();
    let mut world = World::new();
    let keys = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];
    world.set_all(s3.env("chain").into_iter().filter(|(name, _)| !keys.contains(&name.as_str())).collect());
    let profile = format!("[team]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n");
    std::fs::write(world.path("credentials"), profile + "[other]\naws_access_key_id = x\naws_secret_access_key = y\n")
        .expect("writes");
    world.set("AWS_SHARED_CREDENTIALS_FILE", world.path("credentials").to_str().expect("plain"));
    world.set("AWS_PROFILE", "team");
    world.ok(["lake", "init"]);
    world.ok(["lake", "info"]);
    world.set("AWS_PROFILE", "other");
    assert!(!world.fails(1, ["lake", "info"]).is_empty());
}
