//! What every store has to do, run against each: in this process, over TCP, and a foreign server.
//!
//! One battery, [`all`]; a store's own test is a few lines that set it up. The foreign server is
//! moto (`tests/kit/moto.sh` installs it): where it is missing its test says so and passes, unless
//! LARDER_TEST_FOREIGN=1 asks for it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::join_all;

use super::embedded::{Server, Store, StoreOptions};
use super::s3::{S3Config, S3Lake, Sse, StaticKeys};
use super::{
    Body, Lake, LakeError, ListPage, ObjectMeta, PutIf, RunningUpload, UploadId, UploadedPart, get_all, list_all,
};
use crate::format::ids::CommitId;
use crate::format::refs::{DatasetName, RefName, Revision};
use crate::format::tree::Pin;
use crate::store::catalog::lakefmt::{self, Conditions, RefChoice, RefMode};
use crate::store::catalog::refs::{Expect, RefError, Refs};
use crate::testkit::faulty_lake::MemLake;

const MIB: usize = 1 << 20;

/// A store to be tested: a lake in it, and how a user of a bucket beside it writes.
struct Subject {
    lake: Arc<dyn Lake>,
    /// Clients whose lake is a whole bucket, by the bucket's name: one plain, one with versions.
    plain: (String, Arc<dyn Lake>),
    versioned: (String, Arc<dyn Lake>),
    /// Keys that this store takes; a foreign one may not take all that S3 does.
    odd_keys: Vec<String>,
    /// Objects of the listing test.
    many: usize,
    /// Says whether its answer to ListParts can be read.
    lists_parts: bool,
    /// Says whether the condition of a write and the write are one step, as S3 promises.
    atomic: bool,
}

fn odd_keys() -> Vec<String> {
    let plain = [
        "a",
        "a/b",
        "a/b/c",
        "a//b",
        "a/",
        "//",
        "/lead",
        "dir/../up",
        "..",
        ".",
        "./x",
        "sp ace",
        "plus+and%25",
        "ünï/çødé",
        "日本",
        "q?u=e&r#y",
        "tab\there",
        "line\nbreak",
        "quote\"'<>&",
        "*()!~",
        "UPPER",
        "upper",
        "x.o",
        "x.d",
        "back\\slash",
    ];
    let mut keys: Vec<String> = plain.iter().map(|key| (*key).to_owned()).collect();
    keys.extend(["k".repeat(900), format!("{}/{}", "l".repeat(400), "m".repeat(400)), "n/".repeat(300)]);
    keys
}

async fn drain(body: Body) -> Result<Bytes, LakeError> {
    let announced = body.len;
    let mut bytes = Vec::new();
    let mut stream = body.stream;
    while let Some(chunk) = stream.next().await {
        bytes.extend_from_slice(&chunk?);
    }
    assert_eq!(bytes.len() as u64, announced);
    Ok(bytes.into())
}

fn pattern(len: usize, seed: u8) -> Bytes {
    (0..len).map(|at| (at / 251) as u8 ^ (at as u8) ^ seed).collect::<Vec<u8>>().into()
}

fn is_precondition<T>(result: Result<T, LakeError>) -> bool {
    matches!(result, Err(LakeError::Precondition { .. }))
}

/// Runs the whole battery.
async fn all(subject: &Subject) {
    objects_come_and_go(&*subject.lake).await;
    ranges_are_exact(&*subject.lake).await;
    conditions_hold(&*subject.lake).await;
    if subject.atomic {
        one_of_many_writers_wins(&subject.lake).await;
    }
    odd_keys_are_keys(subject).await;
    listings_are_in_byte_order_and_whole(subject).await;
    uploads_resume(&*subject.lake, subject.lists_parts).await;
    pins_hold_without_versions(subject).await;
    pins_hold_with_versions(subject).await;
    large_bodies_stream(&*subject.lake).await;
    what_is_missing_is_not_found(&*subject.lake).await;
    refs_move_in_both_modes(&subject.lake).await;
}

/// The refs have a battery of their own over a store in memory; this is its heart, on the wire.
async fn refs_move_in_both_modes(lake: &Arc<dyn Lake>) {
    let commit = |n: u8| CommitId([n; 32]);
    for (mode, name) in [(RefMode::Cas, "by-condition"), (RefMode::Log, "by-log")] {
        let dataset = DatasetName::parse(name).unwrap();
        let main = RefName::parse("main").unwrap();
        let refs = Refs::new(lake.clone(), mode, "ann@here".into());
        refs.ensure_dataset(&dataset).await.unwrap();
        refs.move_branch(&dataset, &main, commit(1), Expect::Heads(vec![])).await.unwrap();
        refs.move_branch(&dataset, &main, commit(2), Expect::Heads(vec![commit(1)])).await.unwrap();
        let late = refs.move_branch(&dataset, &main, commit(3), Expect::Heads(vec![commit(1)])).await;
        assert!(matches!(late, Err(RefError::Conflict { .. })), "{mode:?}: {late:?}");
        refs.tag(&dataset, &RefName::parse("v1").unwrap(), commit(1), false).await.unwrap();
        for (revision, found) in [(name.to_owned(), commit(2)), (format!("{name}@v1"), commit(1))] {
            assert_eq!(refs.resolve(&Revision::parse(&revision).unwrap()).await.unwrap(), found, "{revision}");
        }
        refs.remove_dataset(&dataset).await.unwrap();
        assert!(refs.dataset(&dataset).await.unwrap().is_none());
    }
}

async fn objects_come_and_go(lake: &dyn Lake) {
    for body in [Bytes::new(), Bytes::from_static(b"x"), pattern(300_000, 1)] {
        let etag = lake.put("crud/one", body.clone(), PutIf::Always).await.unwrap();
        let meta = lake.head("crud/one").await.unwrap();
        assert_eq!((meta.size, &meta.etag, meta.key.as_str()), (body.len() as u64, &etag, "crud/one"));
        assert!(meta.modified_ms > 1_600_000_000_000, "{}", meta.modified_ms);
        let got = lake.get("crud/one", None).await.unwrap();
        assert_eq!(got.etag, etag);
        assert_eq!(drain(got).await.unwrap(), body);
    }
    let listed = list_all(lake, "crud/").await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].etag, lake.head("crud/one").await.unwrap().etag, "a listing has ETags");
    lake.delete("crud/one").await.unwrap();
    lake.delete("crud/one").await.unwrap();
    assert!(matches!(lake.get("crud/one", None).await, Err(LakeError::NotFound { .. })));
    assert!(matches!(lake.head("crud/one").await, Err(LakeError::NotFound { .. })));
    assert!(list_all(lake, "crud/").await.unwrap().is_empty());
}

async fn ranges_are_exact(lake: &dyn Lake) {
    let body = pattern(MIB + 17, 2);
    lake.put("range", body.clone(), PutIf::Always).await.unwrap();
    let len = body.len() as u64;
    for (from, to) in [(0, 1), (0, len), (len - 1, len), (1000, 600_000), (5, 5), (0, 0), (len, len)] {
        let got = lake.get("range", Some(from..to)).await.unwrap();
        assert_eq!(got.len, to - from);
        assert_eq!(drain(got).await.unwrap(), body.slice(from as usize..to as usize), "{from}..{to}");
    }
    for beyond in [len - 5..len + 1, len..len + 1] {
        assert!(lake.get("range", Some(beyond.clone())).await.is_err(), "{beyond:?}");
    }
}

async fn conditions_hold(lake: &dyn Lake) {
    let put = |text: &'static str, when| lake.put("cond", Bytes::from_static(text.as_bytes()), when);
    assert!(is_precondition(put("0", PutIf::Match("\"0123\"".into())).await), "nothing is there to match");
    let first = put("1", PutIf::Absent).await.unwrap();
    assert!(is_precondition(put("2", PutIf::Absent).await));
    assert!(is_precondition(put("2", PutIf::Match("\"0123\"".into())).await));
    let third = put("3", PutIf::Match(first.clone())).await.unwrap();
    assert!(is_precondition(put("4", PutIf::Match(first)).await));
    assert_eq!(get_all(lake, "cond", 10).await.unwrap(), "3");
    assert_eq!(lake.head("cond").await.unwrap().etag, third);
    lake.delete("cond").await.unwrap();
    put("5", PutIf::Absent).await.unwrap();
}

async fn one_of_many_writers_wins(lake: &Arc<dyn Lake>) {
    let mut etag = None;
    for round in 0..5 {
        let racers = (0..16).map(|n| {
            let (lake, body) = (lake.clone(), Bytes::from(format!("round {round} racer {n}")));
            let when = etag.clone().map_or(PutIf::Absent, PutIf::Match);
            tokio::spawn(async move { (body.clone(), lake.put("race", body, when).await) })
        });
        let mut winners = Vec::new();
        for outcome in join_all(racers).await {
            match outcome.unwrap() {
                (body, Ok(etag)) => winners.push((body, etag)),
                (_, Err(LakeError::Precondition { .. })) => {}
                (_, Err(error)) => panic!("{error:?}"),
            }
        }
        assert_eq!(winners.len(), 1, "round {round}");
        assert_eq!(get_all(&**lake, "race", 100).await.unwrap(), winners[0].0);
        etag = Some(winners[0].1.clone());
    }
}

async fn odd_keys_are_keys(subject: &Subject) {
    let lake = &*subject.lake;
    for (n, key) in subject.odd_keys.iter().enumerate() {
        let key = format!("odd/{key}");
        lake.put(&key, Bytes::from(format!("body {n}")), PutIf::Absent)
            .await
            .unwrap_or_else(|e| panic!("{key:?} {e:?}"));
    }
    for (n, key) in subject.odd_keys.iter().enumerate() {
        let got = get_all(lake, &format!("odd/{key}"), 100).await;
        assert_eq!(got.unwrap_or_else(|e| panic!("{key:?} {e:?}")), format!("body {n}"), "{key:?}");
    }
    let listed: Vec<_> = list_all(lake, "odd/").await.unwrap().into_iter().map(|meta| meta.key).collect();
    let mut expected: Vec<_> = subject.odd_keys.iter().map(|key| format!("odd/{key}")).collect();
    expected.sort();
    assert_eq!(listed, expected);
    for key in &expected {
        lake.delete(key).await.unwrap();
    }
    assert!(list_all(lake, "odd/").await.unwrap().is_empty());
}

async fn listings_are_in_byte_order_and_whole(subject: &Subject) {
    let lake = &subject.lake;
    let mut keys = BTreeSet::new();
    for n in 0..subject.many {
        keys.insert(format!("list/{}/{}", ["flat", "flat!", "flat0"][n % 3], (n * 7919) % 100_003));
    }
    keys.extend(["list/flat", "list/flat/a/b", "list/other/x", "list/zz"].map(str::to_owned));
    let puts = keys.iter().map(|key| lake.put(key, Bytes::from_static(b"v"), PutIf::Always));
    let done: Vec<_> = futures::stream::iter(puts).buffer_unordered(32).collect().await;
    assert!(done.iter().all(Result::is_ok));
    let listed: Vec<_> = list_all(&**lake, "list/").await.unwrap().into_iter().map(|meta| meta.key).collect();
    assert_eq!(listed, keys.iter().cloned().collect::<Vec<_>>());
    let below: Vec<_> = list_all(&**lake, "list/flat/1").await.unwrap().into_iter().map(|meta| meta.key).collect();
    let expected: Vec<_> = keys.iter().filter(|key| key.starts_with("list/flat/1")).cloned().collect();
    assert_eq!(below, expected);
    assert_eq!(lake.list_dirs("list/").await.unwrap(), ["flat", "flat!", "flat0", "other"]);
    assert!(lake.list_dirs("nothing/").await.unwrap().is_empty());
}

async fn uploads_resume(lake: &dyn Lake, lists_parts: bool) {
    let body = pattern(5 * MIB * 2 + 333, 3);
    let upload = lake.upload_begin("data/up load").await.unwrap();
    let first = lake.upload_part(&upload, 1, body.slice(..5 * MIB)).await.unwrap();
    assert!(lake.head("data/up load").await.is_err(), "nothing is visible before the end");
    // Killed here: another run lists what arrived, and goes on.
    let running = lake.list_uploads("data/").await.unwrap();
    assert_eq!(running.iter().map(|found| &found.upload).collect::<Vec<_>>(), [&upload]);
    if lists_parts {
        assert_eq!(lake.upload_parts(&upload).await.unwrap(), std::slice::from_ref(&first));
    }
    lake.upload_part(&upload, 2, pattern(5 * MIB, 9)).await.unwrap();
    let second = lake.upload_part(&upload, 2, body.slice(5 * MIB..10 * MIB)).await.unwrap();
    let third = lake.upload_part(&upload, 3, body.slice(10 * MIB..)).await.unwrap();
    let parts = vec![first, second, third];
    if lists_parts {
        assert_eq!(lake.upload_parts(&upload).await.unwrap(), parts);
    }
    let etag = lake.upload_finish(&upload, parts.clone()).await.unwrap();
    assert_eq!(lake.head("data/up load").await.unwrap().etag, etag);
    assert_eq!(drain(lake.get("data/up load", None).await.unwrap()).await.unwrap(), body);
    let middle = 5 * MIB as u64 - 3..5 * MIB as u64 + 3;
    let got = drain(lake.get("data/up load", Some(middle.clone())).await.unwrap()).await.unwrap();
    assert_eq!(got, body.slice(middle.start as usize..middle.end as usize));
    assert!(lake.list_uploads("data/").await.unwrap().is_empty());
    let dropped = lake.upload_begin("data/dropped").await.unwrap();
    lake.upload_part(&dropped, 1, body.slice(..100)).await.unwrap();
    lake.upload_abort(&dropped).await.unwrap();
    lake.upload_abort(&dropped).await.unwrap();
    assert!(lake.upload_parts(&dropped).await.is_err());
    assert!(lake.head("data/dropped").await.is_err());
}

fn pin_of(bucket: &str, meta: &ObjectMeta) -> Pin {
    Pin {
        bucket: bucket.to_owned(),
        key: meta.key.clone(),
        version: meta.version.clone(),
        etag: meta.etag.clone(),
        size: meta.size,
    }
}

async fn list_foreign(lake: &dyn Lake, bucket: &str, prefix: &str) -> Vec<ObjectMeta> {
    let (mut found, mut next) = (Vec::new(), None);
    loop {
        let page = lake.list_foreign(bucket, prefix, next).await.unwrap();
        found.extend(page.objects);
        next = page.next;
        if next.is_none() {
            return found;
        }
    }
}

async fn pins_hold_without_versions(subject: &Subject) {
    let (bucket, user) = &subject.plain;
    let body = pattern(10_000, 4);
    for key in ["pics/a.jpg", "pics/b c.jpg"] {
        user.put(key, body.clone(), PutIf::Always).await.unwrap();
    }
    let found = list_foreign(&*subject.lake, bucket, "pics/").await;
    assert_eq!(found.iter().map(|meta| meta.key.as_str()).collect::<Vec<_>>(), ["pics/a.jpg", "pics/b c.jpg"]);
    assert!(found.iter().all(|meta| meta.version.is_none() && meta.size == 10_000));
    let pin = pin_of(bucket, &found[1]);
    let got = subject.lake.get_pinned(&pin, Some(10..20)).await.unwrap();
    assert_eq!(drain(got).await.unwrap(), body.slice(10..20));
    user.put("pics/b c.jpg", pattern(10_000, 5), PutIf::Always).await.unwrap();
    assert!(is_precondition(subject.lake.get_pinned(&pin, Some(10..20)).await));
    assert!(is_precondition(subject.lake.get_pinned(&pin, None).await));
    user.delete("pics/b c.jpg").await.unwrap();
    assert!(matches!(subject.lake.get_pinned(&pin, None).await, Err(LakeError::NotFound { .. })));
    assert!(subject.lake.list_foreign("no-such-bucket-here", "", None).await.is_err());
}

async fn pins_hold_with_versions(subject: &Subject) {
    let (bucket, user) = &subject.versioned;
    let (old, new) = (pattern(10_000, 6), pattern(20_000, 7));
    user.put("v/a", old.clone(), PutIf::Always).await.unwrap();
    user.put("v/b", old.clone(), PutIf::Always).await.unwrap();
    let before = list_foreign(&*subject.lake, bucket, "v/").await;
    assert!(before.len() == 2 && before.iter().all(|meta| meta.version.is_some()), "{before:?}");
    user.put("v/a", new.clone(), PutIf::Always).await.unwrap();
    user.delete("v/b").await.unwrap();
    for meta in &before {
        let got = subject.lake.get_pinned(&pin_of(bucket, meta), None).await.unwrap();
        assert_eq!(drain(got).await.unwrap(), old, "{} in its old version", meta.key);
    }
    let after = list_foreign(&*subject.lake, bucket, "v/").await;
    assert_eq!(after.len(), 1, "what is deleted is not listed: {after:?}");
    assert_eq!((after[0].key.as_str(), after[0].size), ("v/a", 20_000));
    assert_ne!(after[0].version, before[0].version);
}

async fn large_bodies_stream(lake: &dyn Lake) {
    let body = pattern(24 * MIB, 8);
    lake.put("data/large", body.clone(), PutIf::Always).await.unwrap();
    let got = lake.get("data/large", None).await.unwrap();
    let (mut stream, mut at, mut chunks) = (got.stream, 0, 0);
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.unwrap();
        assert!(chunk == body.slice(at..at + chunk.len()), "at {at}");
        at += chunk.len();
        chunks += 1;
    }
    assert!(at == body.len() && chunks > 3, "{at} bytes in {chunks} chunks");
    let reads = (0..8).map(|n| {
        let range = n * 3 * MIB as u64..(n + 1) * 3 * MIB as u64;
        async move { drain(lake.get("data/large", Some(range)).await.unwrap()).await.unwrap() }
    });
    assert!(join_all(reads).await.concat() == body);
    // A reader that stops in the middle leaves the lake usable.
    let mut stream = lake.get("data/large", None).await.unwrap().stream;
    assert!(stream.next().await.unwrap().is_ok());
    drop(stream);
    assert_eq!(lake.head("data/large").await.unwrap().size, body.len() as u64);
}

async fn what_is_missing_is_not_found(lake: &dyn Lake) {
    assert!(matches!(lake.get("none", None).await, Err(LakeError::NotFound { .. })));
    assert!(matches!(lake.get("none", Some(1..2)).await, Err(LakeError::NotFound { .. })));
    assert!(matches!(lake.get("none", Some(1..1)).await, Err(LakeError::NotFound { .. })));
    assert!(matches!(lake.head("none").await, Err(LakeError::NotFound { .. })));
    assert!(lake.list("none/", None).await.unwrap().objects.is_empty());
}

fn store(dir: &tempfile::TempDir) -> Store {
    let store = Store::open(dir.path(), StoreOptions { fsync: false }).unwrap();
    for bucket in ["lake-bucket", "plain-bucket", "versioned-bucket"] {
        store.ensure_bucket(bucket).unwrap();
    }
    store.set_versioning("versioned-bucket", true).unwrap();
    store
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_store_in_this_process_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir);
    let lake = |bucket: &'static str, prefix: &'static str| {
        let store = store.clone();
        async move {
            let lake = S3Lake::in_process(&store, S3Config::new(bucket, prefix)).await.unwrap();
            Arc::new(lake) as Arc<dyn Lake>
        }
    };
    let subject = Subject {
        lake: lake("lake-bucket", "some/prefix").await,
        plain: ("plain-bucket".into(), lake("plain-bucket", "").await),
        versioned: ("versioned-bucket".into(), lake("versioned-bucket", "").await),
        odd_keys: odd_keys(),
        many: 2500,
        lists_parts: true,
        atomic: true,
    };
    all(&subject).await;
    let left = walk_files(&dir.path().join("lake-bucket/tmp"));
    assert!(left.is_empty(), "temporary files stay: {left:?}");
    let made = lakefmt::open_or_create(&*lake("lake-bucket", "fresh").await, RefChoice::Auto).await;
    assert_eq!(made.unwrap().refs, RefMode::Cas);
}

fn walk_files(dir: &std::path::Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_store_over_tcp_conforms_also_for_two_servers_of_one_directory() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(&dir);
    let second = Store::open(dir.path(), StoreOptions { fsync: false }).unwrap();
    let keys = StaticKeys { access_key: "key".into(), secret_key: "secret".into() };
    let mut servers = Vec::new();
    for store in [first, second] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        servers.push(Server::start(store, listener, Some(keys.clone())).unwrap());
    }
    let at = |server: usize, bucket: &'static str, prefix: &'static str| {
        let endpoint = format!("http://{}", servers[server].addr());
        tcp_lake(endpoint, bucket, prefix, keys.clone())
    };
    let subject = Subject {
        lake: Arc::new(Alternating(
            vec![at(0, "lake-bucket", "p").await, at(1, "lake-bucket", "p").await],
            AtomicUsize::new(0),
        )),
        plain: ("plain-bucket".into(), at(1, "plain-bucket", "").await),
        versioned: ("versioned-bucket".into(), at(0, "versioned-bucket", "").await),
        odd_keys: odd_keys(),
        many: 1200,
        lists_parts: true,
        atomic: true,
    };
    all(&subject).await;
}

/// One lake through several clients in turn, so that each call meets what another one did.
#[derive(Debug)]
struct Alternating(Vec<Arc<dyn Lake>>, AtomicUsize);

impl Alternating {
    fn next(&self) -> &dyn Lake {
        &*self.0[self.1.fetch_add(1, Ordering::Relaxed) % self.0.len()]
    }
}

#[async_trait::async_trait]
impl Lake for Alternating {
    fn url(&self) -> String {
        self.next().url()
    }
    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Body, LakeError> {
        self.next().get(key, range).await
    }
    async fn get_pinned(&self, pin: &Pin, range: Option<Range<u64>>) -> Result<Body, LakeError> {
        self.next().get_pinned(pin, range).await
    }
    async fn head(&self, key: &str) -> Result<ObjectMeta, LakeError> {
        self.next().head(key).await
    }
    async fn put(&self, key: &str, body: Bytes, when: PutIf) -> Result<String, LakeError> {
        self.next().put(key, body, when).await
    }
    async fn delete(&self, key: &str) -> Result<(), LakeError> {
        self.next().delete(key).await
    }
    async fn list(&self, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        self.next().list(prefix, page).await
    }
    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>, LakeError> {
        self.next().list_dirs(prefix).await
    }
    async fn list_foreign(&self, bucket: &str, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        self.next().list_foreign(bucket, prefix, page).await
    }
    async fn list_uploads(&self, prefix: &str) -> Result<Vec<RunningUpload>, LakeError> {
        self.next().list_uploads(prefix).await
    }
    async fn upload_begin(&self, key: &str) -> Result<UploadId, LakeError> {
        self.next().upload_begin(key).await
    }
    async fn upload_part(&self, upload: &UploadId, number: u32, body: Bytes) -> Result<UploadedPart, LakeError> {
        self.next().upload_part(upload, number, body).await
    }
    async fn upload_parts(&self, upload: &UploadId) -> Result<Vec<UploadedPart>, LakeError> {
        self.next().upload_parts(upload).await
    }
    async fn upload_finish(&self, upload: &UploadId, parts: Vec<UploadedPart>) -> Result<String, LakeError> {
        self.next().upload_finish(upload, parts).await
    }
    async fn upload_abort(&self, upload: &UploadId) -> Result<(), LakeError> {
        self.next().upload_abort(upload).await
    }
}

async fn tcp_lake(endpoint: String, bucket: &str, prefix: &str, keys: StaticKeys) -> Arc<dyn Lake> {
    let config = S3Config { endpoint: Some(endpoint), keys: Some(keys), ..S3Config::new(bucket, prefix) };
    Arc::new(S3Lake::connect(config).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lake_in_memory_conforms_too() {
    let memory = Arc::new(MemLake::with_page(100));
    let lake: Arc<dyn Lake> = memory.clone();
    objects_come_and_go_in_memory(&*lake).await;
    conditions_hold(&*lake).await;
    one_of_many_writers_wins(&lake).await;
    uploads_resume(&*lake, true).await;
    large_bodies_stream(&*lake).await;
    what_is_missing_is_not_found(&*lake).await;
    let none: Arc<dyn Lake> = Arc::new(MemLake::new());
    let subject = Subject {
        lake,
        plain: (String::new(), none.clone()),
        versioned: (String::new(), none),
        odd_keys: odd_keys(),
        many: 700,
        lists_parts: true,
        atomic: true,
    };
    odd_keys_are_keys(&subject).await;
    listings_are_in_byte_order_and_whole(&subject).await;
}

/// The clock in memory counts from one: all but the times.
async fn objects_come_and_go_in_memory(lake: &dyn Lake) {
    lake.put("crud/one", Bytes::from_static(b"x"), PutIf::Always).await.unwrap();
    assert_eq!(list_all(lake, "crud/").await.unwrap().len(), 1);
    lake.delete("crud/one").await.unwrap();
    lake.delete("crud/one").await.unwrap();
    assert!(matches!(lake.head("crud/one").await, Err(LakeError::NotFound { .. })));
    ranges_are_exact(lake).await;
}

/// The foreign server; it is killed when dropped.
struct Moto {
    child: Child,
    endpoint: String,
}

impl Drop for Moto {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Moto {
    /// Finds its program: LARDER_TEST_MOTO, the kit's cache directory, PATH.
    fn program() -> Option<PathBuf> {
        if let Some(path) = std::env::var_os("LARDER_TEST_MOTO") {
            return Some(path.into());
        }
        let cache = std::env::var_os("LARDER_TEST_CACHE").map(PathBuf::from);
        let cache = cache.or_else(|| Some(xdg::BaseDirectories::new().get_cache_home()?.join("larder-test")));
        let kit = cache.map(|dir| dir.join("moto/bin/moto_server"));
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&paths).map(|dir| dir.join("moto_server"));
        kit.into_iter().chain(on_path).find(|path| path.is_file())
    }

    async fn start() -> Option<Self> {
        Self::start_with("http", |_| Vec::new()).await
    }

    /// Behind TLS, with a certificate of an authority that nobody knows; gives the authority's file.
    async fn start_with_tls(dir: &Path) -> Option<(Self, PathBuf)> {
        let certificate = |program: &Path| {
            let python = program.with_file_name("python");
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kit/certs.py");
            let made = Command::new(python).arg(script).arg(dir).status().unwrap();
            assert!(made.success(), "certs.py made no certificate");
            let file = |name: &str| dir.join(name).into_os_string();
            vec!["-c".into(), file("cert.pem"), "-k".into(), file("key.pem")]
        };
        let moto = Self::start_with("https", certificate).await?;
        Some((moto, dir.join("ca.pem")))
    }

    async fn start_with(scheme: &str, more: impl FnOnce(&Path) -> Vec<OsString>) -> Option<Self> {
        let asked_for = std::env::var_os("LARDER_TEST_FOREIGN").is_some_and(|value| value == "1");
        let Some(program) = Self::program() else {
            assert!(!asked_for, "LARDER_TEST_FOREIGN=1, but no moto_server: run tests/kit/moto.sh");
            eprintln!("skipped: no moto_server here; tests/kit/moto.sh installs it");
            return None;
        };
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new(&program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .args(more(&program))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let moto = Self { child, endpoint: format!("{scheme}://127.0.0.1:{port}") };
        for _ in 0..600 {
            if tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                return Some(moto);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("moto_server does not listen after a minute");
    }

    fn config(&self, bucket: &str, prefix: &str) -> S3Config {
        S3Config {
            endpoint: Some(self.endpoint.clone()),
            keys: Some(StaticKeys { access_key: "key".into(), secret_key: "secret".into() }),
            ..S3Config::new(bucket, prefix)
        }
    }

    async fn lake(&self, bucket: &str, prefix: &str) -> S3Lake {
        let lake = S3Lake::connect(self.config(bucket, prefix)).await.unwrap();
        lake.create_bucket().await.unwrap();
        lake
    }
}

/// Its web framework cleans paths up before it sees them, as no real store does.
fn moto_takes(key: &str) -> bool {
    !key.contains("//") && !key.contains('.') && !key.contains('\n')
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_server_conforms() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    let versioned = moto.lake("versioned-bucket", "").await;
    versioned.set_versioning(true).await.unwrap();
    let subject = Subject {
        lake: Arc::new(moto.lake("lake-bucket", "some/prefix").await),
        plain: ("plain-bucket".into(), Arc::new(moto.lake("plain-bucket", "").await)),
        versioned: ("versioned-bucket".into(), Arc::new(versioned)),
        odd_keys: odd_keys().into_iter().filter(|key| moto_takes(key)).collect(),
        many: 1200,
        // It calls the element ListPartsResponse, which no SDK takes.
        lists_parts: false,
        // Its threads check the condition, and then write, without a lock.
        atomic: false,
    };
    all(&subject).await;
    let lake = moto.lake("lake-bucket", "probed").await;
    assert_eq!(lakefmt::probe(&lake).await.unwrap(), Conditions::Kept);
    let made = lakefmt::open_or_create(&lake, RefChoice::Auto).await.unwrap();
    assert_eq!(made.refs, RefMode::Cas);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_behind_tls_is_trusted_by_the_authority_that_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let Some((moto, authority)) = Moto::start_with_tls(dir.path()).await else {
        return;
    };
    let config = S3Config { attempts_max: 1, ..moto.config("lake-bucket", "p") };
    let stranger = S3Lake::connect(config.clone()).await.unwrap();
    let refused = format!("{:?}", stranger.create_bucket().await.unwrap_err());
    assert!(refused.contains("not trusted"), "{refused}");
    let lake = S3Lake::connect(S3Config { ca_file: Some(authority), ..config }).await.unwrap();
    lake.create_bucket().await.unwrap();
    objects_come_and_go(&lake).await;
    large_bodies_stream(&lake).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_server_is_asked_for_encryption() {
    let dir = tempfile::tempdir().unwrap();
    let Some((moto, authority)) = Moto::start_with_tls(dir.path()).await else {
        return;
    };
    let kms = Sse::Kms { key_id: Some("alias/larder".into()) };
    for (sse, bucket) in [(Sse::S3, "sse-s3"), (kms, "sse-kms")] {
        let config = S3Config { sse, ca_file: Some(authority.clone()), ..moto.config(bucket, "") };
        let lake = S3Lake::connect(config).await.unwrap();
        lake.create_bucket().await.unwrap();
        objects_come_and_go(&lake).await;
        uploads_resume(&lake, false).await;
    }
}
