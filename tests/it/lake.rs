//! The lake on the wire: what the client makes of an S3 server that misbehaves.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use larder::store::lake::s3::{S3Config, S3Lake};
use larder::store::lake::{Body, Lake, LakeError, PutIf, get_all};

use crate::kit::proxy::{Fault, Proxy, Rule};
use crate::kit::s3::{TestS3, config_at};

async fn drain(body: Body) -> Result<Vec<u8>, LakeError> {
    let mut bytes = Vec::new();
    let mut stream = body.stream;
    while let Some(chunk) = stream.next().await {
        bytes.extend_from_slice(&chunk?);
    }
    Ok(bytes)
}

fn body() -> Bytes {
    (0..1_000_000u32)
        .map(|n| (n / 7) as u8)
        .collect::<Vec<u8>>()
        .into()
}

struct Setup {
    proxy: Proxy,
    config: S3Config,
    _s3: TestS3,
}

fn setup() -> Setup {
    let s3 = TestS3::start();
    let proxy = Proxy::start(s3.addr());
    let config = S3Config {
        read_timeout: Duration::from_millis(500),
        attempts_max: 1,
        ..config_at(&proxy.endpoint(), "p")
    };
    Setup {
        proxy,
        config,
        _s3: s3,
    }
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
            assert_eq!(
                get_all(&lake, "big", 1 << 20).await.unwrap(),
                body(),
                "{fault:?}"
            );
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
        let right = drain(lake.get("big", Some(100..200)).await.unwrap())
            .await
            .unwrap();
        assert_eq!(right, &body()[100..200]);
    });
}

#[test]
fn retries_ride_over_a_store_that_is_down_for_a_moment() {
    let setup = setup();
    crate::kit::runtime().block_on(async {
        let lake = client(&setup).await;
        setup.proxy.set_down(true);
        assert!(
            lake.get("big", None)
                .await
                .is_err_and(|error| error.is_passing())
        );
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
        let config = S3Config {
            attempts_max: 3,
            ..setup.config.clone()
        };
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
        let mut config = S3Config {
            attempts_max: 3,
            ..setup.config.clone()
        };
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
        drain(lake.get("big", Some(10..20)).await.unwrap())
            .await
            .unwrap();
        let counters = setup.proxy.counters();
        assert_eq!(counters.bytes_down.get("GET"), Some(&1_000_010));
        assert_eq!(counters.requests.get("GET"), Some(&2));
        assert!(
            counters
                .bytes_up
                .get("PUT")
                .is_some_and(|bytes| *bytes >= 1_000_000)
        );
    });
}
