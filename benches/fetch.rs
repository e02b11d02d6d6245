//! The hot paths of a read: `cargo bench --bench fetch`.
//!
//! A pack of 2,000 files of 110 KB in a real tier in a temporary directory (page cache warm), and the
//! same read through memory, through the tier with and without digesting, and from a lake in memory.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use futures::StreamExt;
use larder::format::digest::digest;
use larder::format::ids::{ContentId, NodeId};
use larder::format::pack::{PackIndex, PackedContent, Place, Recipe, Source};
use larder::format::paths::{PackPart, data_key, pack_key};
use larder::format::placement::{Location, PackUse};
use larder::format::tree::Pin;
use larder::store::fetch::{ContentRef, FetchConfig, Fetcher, Verify};
use larder::store::kv::Kv;
use larder::store::lake::{Body, Lake, LakeError, ListPage, ObjectMeta, PutIf, RunningUpload, UploadId, UploadedPart};
use larder::store::tier::{InitOptions, Tier, TierConfig};

const FILES: usize = 2000;
const FILE_LEN: u64 = 110_000;

/// A lake that can be read, no more.
#[derive(Debug, Default)]
struct ReadLake(HashMap<String, Bytes>);

fn refused<T>(key: &str) -> Result<T, LakeError> {
    Err(LakeError::Permanent { key: key.to_owned(), source: "this lake can only be read".into() })
}

#[async_trait]
impl Lake for ReadLake {
    fn url(&self) -> String {
        "memory".to_owned()
    }
    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Body, LakeError> {
        let Some(object) = self.0.get(key) else {
            return Err(LakeError::NotFound { key: key.to_owned() });
        };
        let bytes = match range {
            Some(range) => object.slice(range.start as usize..range.end as usize),
            None => object.clone(),
        };
        let len = bytes.len() as u64;
        Ok(Body { len, etag: String::new(), stream: futures::stream::iter([Ok(bytes)]).boxed() })
    }
    async fn get_pinned(&self, pin: &Pin, _: Option<Range<u64>>) -> Result<Body, LakeError> {
        refused(&pin.key)
    }
    async fn head(&self, key: &str) -> Result<ObjectMeta, LakeError> {
        refused(key)
    }
    async fn put(&self, key: &str, _: Bytes, _: PutIf) -> Result<String, LakeError> {
        refused(key)
    }
    async fn delete(&self, key: &str) -> Result<(), LakeError> {
        refused(key)
    }
    async fn list(&self, prefix: &str, _: Option<String>) -> Result<ListPage, LakeError> {
        refused(prefix)
    }
    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>, LakeError> {
        refused(prefix)
    }
    async fn list_foreign(&self, _: &str, prefix: &str, _: Option<String>) -> Result<ListPage, LakeError> {
        refused(prefix)
    }
    async fn upload_begin(&self, key: &str) -> Result<UploadId, LakeError> {
        refused(key)
    }
    async fn upload_part(&self, upload: &UploadId, _: u32, _: Bytes) -> Result<UploadedPart, LakeError> {
        refused(&upload.key)
    }
    async fn upload_parts(&self, upload: &UploadId) -> Result<Vec<UploadedPart>, LakeError> {
        refused(&upload.key)
    }
    async fn list_uploads(&self, prefix: &str) -> Result<Vec<RunningUpload>, LakeError> {
        refused(prefix)
    }
    async fn upload_finish(&self, upload: &UploadId, _: Vec<UploadedPart>) -> Result<String, LakeError> {
        refused(&upload.key)
    }
    async fn upload_abort(&self, upload: &UploadId) -> Result<(), LakeError> {
        refused(&upload.key)
    }
}

/// Packs the files into a lake.
fn lake() -> (ReadLake, PackUse, Vec<ContentRef>) {
    let file = |n: usize| (0..FILE_LEN).map(|i| (i as usize * 31 + n * 7) as u8).collect::<Vec<u8>>();
    let contents = (0..FILES).map(|n| PackedContent {
        content: ContentId::Digest(digest(&file(n))),
        size: FILE_LEN,
        place: Place::Run { offset: 0 },
    });
    let index = PackIndex { len: 0, contents: contents.collect() };
    let index = PackIndex::decode(&index.encode()).expect("offsets are computed");
    let pack = index.id();
    let mut data = vec![0; index.len as usize];
    let mut refs = Vec::new();
    for (n, content) in index.contents.iter().enumerate() {
        let offset = content.place.start();
        data[offset as usize..][..FILE_LEN as usize].copy_from_slice(&file(n));
        let location = Location::Run { pack, offset };
        refs.push(ContentRef { content: content.content, size: FILE_LEN, location });
    }
    let recipe = Recipe {
        pack,
        len: index.len,
        index_len: index.encode().len() as u64,
        outboard_len: 0,
        source: Source::Native { key: "bench".to_owned() },
    };
    let objects = HashMap::from([
        (pack_key(&pack, PackPart::Index), index.encode().into()),
        (pack_key(&pack, PackPart::Recipe), recipe.encode().into()),
        (data_key("bench"), data.into()),
    ]);
    (ReadLake(objects), PackUse { pack, len: index.len, referenced: index.len }, refs)
}

fn hot_paths(c: &mut Criterion) {
    let rt = tokio::runtime::Runtime::new().expect("a runtime");
    let dir = tempfile::tempdir().expect("a directory");
    Tier::init(dir.path(), &InitOptions::default()).expect("a tier");
    let node = NodeId(uuid::Uuid::from_u128(1));
    let tier = Arc::new(Tier::open(dir.path(), node, TierConfig::default()).expect("a tier"));
    let (lake, pack, refs) = lake();
    let lake = Arc::new(lake);
    let make = |tier: Option<Arc<Tier>>, memory_bytes_max| {
        let cfg = FetchConfig { memory_bytes_max, ..FetchConfig::default() };
        let tier = tier.map(|tier| tier as Arc<dyn larder::store::fetch::FetchTier>);
        Fetcher::new(lake.clone(), tier, Kv::in_memory(), cfg, rt.handle().clone())
    };
    let from_tier = make(Some(tier), 0);
    rt.block_on(async { from_tier.fill(vec![pack]).wait().await }).expect("filled");

    let mut group = c.benchmark_group("try_read_into");
    for len in [4096, 110_000_usize] {
        let mut buf = vec![0; len];
        group.throughput(Throughput::Bytes(len as u64));
        for verify in [Verify::Node, Verify::Always] {
            let mut n = 0;
            group.bench_function(BenchmarkId::new(format!("tier, {verify}"), len), |b| {
                b.iter(|| {
                    n = (n + 7) % FILES;
                    let read = refs.get(n).and_then(|c| from_tier.try_read_into(c, 0, &mut buf, verify));
                    assert!(matches!(read, Some(Ok(_))));
                });
            });
        }
        let from_memory = make(None, 512 << 20);
        rt.block_on(async {
            for c in &refs {
                from_memory.read(c, 0, 1, Verify::Node).await.expect("read");
            }
        });
        let mut n = 0;
        group.bench_function(BenchmarkId::new("memory", len), |b| {
            b.iter(|| {
                n = (n + 7) % FILES;
                let read = refs.get(n).and_then(|c| from_memory.try_read_into(c, 0, &mut buf, Verify::Node));
                assert!(matches!(read, Some(Ok(_))));
            });
        });
    }
    group.finish();

    let from_lake = make(None, 0);
    let mut n = 0;
    c.bench_function("read from a lake without latency/110000", |b| {
        b.iter(|| {
            n = (n + 7) % FILES;
            let c = refs.get(n).expect("a remainder");
            rt.block_on(from_lake.read(c, 0, u32::MAX, Verify::Node)).expect("read")
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_secs(2));
    targets = hot_paths
}
criterion_main!(benches);
