//! What the battery of all stores does not show: crashes, damage, versions, encryption's headers,
//! and requests that only other clients make.

use aws_sdk_s3::config::{BehaviorVersion, Region};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use bytes::Bytes;

use super::*;
use crate::store::lake::s3::{S3Config, S3Lake, SecretKey, Sse};
use crate::store::lake::{Lake, LakeError, PutIf, get_all};

const BUCKET: &str = "bucket";

struct Setup {
    dir: tempfile::TempDir,
    store: Store,
    /// What any S3 client can do.
    client: aws_sdk_s3::Client,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
    store.ensure_bucket(BUCKET).unwrap();
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .endpoint_url("http://embedded.lake")
        .force_path_style(true)
        .allow_no_auth()
        .http_client(in_process::http_client(store.service(None)))
        .build();
    Setup { dir, store, client: aws_sdk_s3::Client::from_conf(config) }
}

impl Setup {
    async fn lake(&self, config: S3Config) -> S3Lake {
        S3Lake::in_process(&self.store, config).await.unwrap()
    }

    async fn put(&self, key: &str, body: &'static str) -> Option<String> {
        let put = self.client.put_object().bucket(BUCKET).key(key);
        let put = put.body(ByteStream::from_static(body.as_bytes())).send().await.unwrap();
        put.version_id().map(str::to_owned)
    }

    async fn get(&self, key: &str, version: Option<&str>) -> Option<String> {
        let get = self.client.get_object().bucket(BUCKET).key(key);
        let got = get.set_version_id(version.map(str::to_owned)).send().await.ok()?;
        let bytes = got.body.collect().await.unwrap().into_bytes();
        Some(String::from_utf8(bytes.to_vec()).unwrap())
    }

    fn tmp_files(&self) -> usize {
        std::fs::read_dir(self.dir.path().join(BUCKET).join("tmp")).unwrap().count()
    }

    fn object_file(&self, key: &str) -> PathBuf {
        let root = self.dir.path().join(BUCKET).join("objects");
        names::key_path(&root, key, names::NameKind::Object)
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_leaves_the_old_object_and_nothing_else() {
    let setup = setup();
    setup.put("a", "old").await;
    let chunks = [Ok(Bytes::from_static(b"half")), Err(std::io::Error::other("gone"))];
    let body = s3s::dto::StreamingBlob::wrap(futures::stream::iter(chunks));
    let bucket = setup.store.disk.bucket(BUCKET).unwrap();
    assert!(body::receive(bucket.clone(), Some(body), None, None).await.is_err());
    let short =
        s3s::dto::StreamingBlob::wrap(futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"x"))]));
    assert!(body::receive(bucket, Some(short), Some(2), None).await.is_err());
    assert_eq!(setup.get("a", None).await.unwrap(), "old");
    assert_eq!(setup.tmp_files(), 0);
}

#[tokio::test]
async fn what_a_crash_left_is_never_seen_and_is_cleared_after_a_day() {
    let setup = setup();
    let tmp = setup.dir.path().join(BUCKET).join("tmp");
    for (name, age_hours) in [("old", 25), ("fresh", 1)] {
        let file = std::fs::File::create(tmp.join(name)).unwrap();
        let time = std::time::SystemTime::now() - std::time::Duration::from_secs(age_hours * 3600);
        file.set_modified(time).unwrap();
    }
    setup.store.ensure_bucket(BUCKET).unwrap();
    assert!(tmp.join("fresh").exists() && !tmp.join("old").exists());
    let listed = setup.client.list_objects_v2().bucket(BUCKET).send().await.unwrap();
    assert!(listed.contents().is_empty());
}

#[tokio::test]
async fn a_damaged_object_file_is_an_error_and_no_object() {
    let setup = setup();
    setup.put("a", "some bytes").await;
    let path = setup.object_file("a");
    let whole = std::fs::read(&path).unwrap();
    for damaged in [&whole[..whole.len() - 1], &whole[1..], &[]] {
        std::fs::write(&path, damaged).unwrap();
        assert!(setup.get("a", None).await.is_none());
    }
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(setup.get("a", None).await.unwrap(), "some bytes");
}

#[tokio::test]
async fn versions_are_kept_deleted_behind_markers_and_come_back() {
    let setup = setup();
    let null = setup.put("k", "before").await;
    assert_eq!(null, None);
    setup.store.set_versioning(BUCKET, true).unwrap();
    let one = setup.put("k", "one").await.unwrap();
    let two = setup.put("k", "two").await.unwrap();
    assert_eq!(setup.get("k", Some("null")).await.unwrap(), "before");
    assert_eq!(setup.get("k", Some(&one)).await.unwrap(), "one");
    let gone = setup.client.delete_object().bucket(BUCKET).key("k").send().await.unwrap();
    assert_eq!(gone.delete_marker(), Some(true));
    assert!(setup.get("k", None).await.is_none());
    assert_eq!(setup.get("k", Some(&two)).await.unwrap(), "two");
    let listed = setup.client.list_object_versions().bucket(BUCKET).send().await.unwrap();
    let ids: Vec<_> = listed.versions().iter().map(|version| version.version_id().unwrap()).collect();
    assert_eq!(ids, [two.as_str(), one.as_str(), "null"]);
    assert_eq!(listed.delete_markers()[0].is_latest(), Some(true));
    let marker = gone.version_id().unwrap();
    let delete = |id: String| setup.client.delete_object().bucket(BUCKET).key("k").version_id(id).send();
    delete(marker.to_owned()).await.unwrap();
    assert_eq!(setup.get("k", None).await.unwrap(), "two");
    delete(two.clone()).await.unwrap();
    assert_eq!(setup.get("k", None).await.unwrap(), "one");
    assert!(setup.get("k", Some(&two)).await.is_none());
    assert!(setup.get("k", Some("../../objects/x.o")).await.is_none(), "an id is no path");
}

#[tokio::test]
async fn other_clients_copy_delete_many_and_list_by_any_delimiter() {
    let setup = setup();
    for key in ["a-1", "a-2", "b-1", "c"] {
        setup.put(key, "body").await;
    }
    let copy = setup.client.copy_object().bucket(BUCKET).key("d/e f");
    copy.copy_source(format!("{BUCKET}/a-1")).send().await.unwrap();
    assert_eq!(setup.get("d/e f", None).await.unwrap(), "body");
    let list = || setup.client.list_objects_v2().bucket(BUCKET).delimiter("-").max_keys(1);
    let (mut seen, mut token) = (Vec::new(), None);
    loop {
        let page = list().set_continuation_token(token).send().await.unwrap();
        seen.extend(page.common_prefixes().iter().map(|prefix| prefix.prefix().unwrap().to_owned()));
        seen.extend(page.contents().iter().map(|object| object.key().unwrap().to_owned()));
        assert_eq!(page.key_count(), Some(1));
        token = page.next_continuation_token().map(str::to_owned);
        if token.is_none() {
            break;
        }
    }
    assert_eq!(seen, ["a-", "b-", "c", "d/e f"]);
    let id = |key: &str| ObjectIdentifier::builder().key(key).build().unwrap();
    let keys = Delete::builder().objects(id("a-1")).objects(id("c")).objects(id("none")).build().unwrap();
    setup.client.delete_objects().bucket(BUCKET).delete(keys).send().await.unwrap();
    assert!(setup.get("a-1", None).await.is_none() && setup.get("a-2", None).await.is_some());
    let busy = setup.client.delete_bucket().bucket(BUCKET).send().await;
    assert!(busy.is_err(), "it is not empty");
    for key in ["a-2", "b-1", "d/e f"] {
        setup.client.delete_object().bucket(BUCKET).key(key).send().await.unwrap();
    }
    setup.client.delete_bucket().bucket(BUCKET).send().await.unwrap();
    assert!(setup.client.head_bucket().bucket(BUCKET).send().await.is_err());
}

#[tokio::test]
async fn empty_directories_do_not_stay_behind_deleted_keys() {
    let setup = setup();
    setup.put("x/y/z/deep", "body").await;
    setup.put("x/other", "body").await;
    setup.client.delete_object().bucket(BUCKET).key("x/y/z/deep").send().await.unwrap();
    assert!(!setup.object_file("x/y/z/deep").parent().unwrap().exists());
    assert_eq!(setup.get("x/other", None).await.unwrap(), "body");
}

#[tokio::test(flavor = "multi_thread")]
async fn puts_and_deletes_below_one_directory_do_not_trip_over_each_other() {
    let setup = setup();
    let lake = setup.lake(S3Config::new(BUCKET, "")).await;
    let work = (0..8).map(|n| {
        let lake = lake.clone();
        tokio::spawn(async move {
            let key = format!("dir/sub/{n}");
            for _ in 0..50 {
                lake.put(&key, Bytes::from_static(b"x"), PutIf::Absent).await.unwrap();
                lake.delete(&key).await.unwrap();
            }
        })
    });
    for done in futures::future::join_all(work).await {
        done.unwrap();
    }
    assert!(!setup.object_file("dir/sub/0").parent().unwrap().exists());
}

#[tokio::test]
async fn a_customers_key_is_needed_to_read_again() {
    let setup = setup();
    let with = |key: u8| S3Config { sse: Sse::Customer { key: SecretKey([key; 32]) }, ..S3Config::new(BUCKET, "p") };
    let lake = setup.lake(with(1)).await;
    lake.put("one", Bytes::from_static(b"x"), PutIf::Absent).await.unwrap();
    let upload = lake.upload_begin("many").await.unwrap();
    let part = lake.upload_part(&upload, 1, Bytes::from_static(b"y")).await.unwrap();
    lake.upload_finish(&upload, vec![part]).await.unwrap();
    let (other, none) = (setup.lake(with(2)).await, setup.lake(S3Config::new(BUCKET, "p")).await);
    for key in ["one", "many"] {
        assert!(get_all(&lake, key, 9).await.is_ok());
        assert!(lake.head(key).await.is_ok());
        assert!(matches!(other.get(key, None).await, Err(LakeError::Permanent { .. })));
        assert!(matches!(none.get(key, None).await, Err(LakeError::Permanent { .. })));
        assert!(none.head(key).await.is_err());
    }
}

#[tokio::test]
async fn encryption_is_asked_for_with_every_write() {
    let setup = setup();
    let kms = Sse::Kms { key_id: Some("key-7".into()) };
    for (sse, header, key) in [(Sse::S3, "AES256", None), (kms, "aws:kms", Some("key-7"))] {
        let lake = setup.lake(S3Config { sse, ..S3Config::new(BUCKET, "") }).await;
        lake.put("one", Bytes::from_static(b"x"), PutIf::Always).await.unwrap();
        let upload = lake.upload_begin("many").await.unwrap();
        let part = lake.upload_part(&upload, 1, Bytes::from_static(b"y")).await.unwrap();
        lake.upload_finish(&upload, vec![part]).await.unwrap();
        for name in ["one", "many"] {
            let file = std::fs::File::open(setup.object_file(name)).unwrap();
            let headers = object::ObjectInfo::read(&file).unwrap().headers;
            assert_eq!((headers.sse.as_deref(), headers.sse_kms_key_id.as_deref()), (Some(header), key));
        }
    }
}

#[tokio::test]
async fn requests_that_are_not_signed_with_the_servers_keys_are_denied() {
    let setup = setup();
    let keys = StaticKeys { access_key: "key".into(), secret_key: "secret".into() };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = Server::start(setup.store.clone(), listener, Some(keys.clone())).unwrap();
    let with = |keys: Option<StaticKeys>| S3Config {
        endpoint: Some(format!("http://{}", server.addr())),
        keys,
        ..S3Config::new(BUCKET, "")
    };
    let lake = S3Lake::connect(with(Some(keys.clone()))).await.unwrap();
    assert!(lake.list("", None).await.is_ok());
    for wrong in [("key", "other"), ("other", "secret")] {
        let wrong = StaticKeys { access_key: wrong.0.into(), secret_key: wrong.1.into() };
        let lake = S3Lake::connect(with(Some(wrong))).await.unwrap();
        assert!(matches!(lake.list("", None).await, Err(LakeError::Denied { .. })));
    }
    let mut stream = tokio::net::TcpStream::connect(server.addr()).await.unwrap();
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let request = format!("GET /{BUCKET}?list-type=2 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
}
