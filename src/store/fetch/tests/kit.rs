//! Packs with known bytes in a lake in memory, and a tier that fails on demand.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::format::digest::{BLOCK_LEN, ContentHasher};
use crate::format::ids::{ContentId, NodeId, PackId, TierId};
use crate::format::pack::{PackIndex, PackOutboard, PackedContent, Place, Recipe, Source};
use crate::format::paths::{PackPart, data_key, pack_key};
use crate::format::placement::{Extent, Location, PackUse};
use crate::format::tree::Pin;
use crate::store::fetch::{ContentRef, FetchConfig, FetchStage, FetchTier, Fetcher, SpanClaim};
use crate::store::kv::Kv;
use crate::store::tier::{FileIdentity, InitOptions, PackFile, Sidecar, Tier, TierConfig, TierError};
use crate::testkit::faulty_lake::{FaultyLake, MemLake};

/// A file to pack: its bytes, and its data extents where it is sparse.
#[derive(Debug, Clone)]
pub(crate) struct TestFile {
    pub bytes: Vec<u8>,
    pub extents: Option<Vec<(u64, u64)>>,
}

impl TestFile {
    /// Bytes that differ from file to file and from block to block.
    pub(crate) fn of(len: u64, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let bytes = (0..len).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        });
        Self { bytes: bytes.collect(), extents: None }
    }

    /// The same with holes: only these (logical, length) have data.
    pub(crate) fn sparse(len: u64, seed: u64, extents: &[(u64, u64)]) -> Self {
        let full = Self::of(len, seed);
        let mut bytes = vec![0; len as usize];
        for &(at, len) in extents {
            let range = at as usize..(at + len) as usize;
            bytes[range.clone()].copy_from_slice(&full.bytes[range]);
        }
        Self { bytes, extents: Some(extents.to_vec()) }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct TestContent {
    pub c: ContentRef,
    pub bytes: Vec<u8>,
}

#[derive(Debug, Clone)]
pub(crate) struct TestPack {
    pub pack: PackId,
    pub len: u64,
    pub contents: Vec<TestContent>,
    /// The object of a native pack.
    pub key: String,
}

impl TestPack {
    pub(crate) fn uses(&self) -> PackUse {
        PackUse { pack: self.pack, len: self.len, referenced: self.len }
    }
}

fn index_of(contents: Vec<PackedContent>, whole: bool) -> PackIndex {
    let len = match (whole, contents.as_slice()) {
        (true, [only]) => only.size,
        _ => 0,
    };
    // Decoding computes the offsets.
    PackIndex::decode(&PackIndex { len, contents }.encode()).expect("an index that this made")
}

fn packed(file: &TestFile, content: ContentId) -> PackedContent {
    let place = match &file.extents {
        None => Place::Run { offset: 0 },
        Some(extents) => {
            let extent = |&(logical, len): &(u64, u64)| Extent { logical, offset: 0, len };
            Place::Sparse { extents: extents.iter().map(extent).collect() }
        }
    };
    PackedContent { content, size: file.bytes.len() as u64, place }
}

fn refs(pack: PackId, index: &PackIndex, files: &[TestFile]) -> Vec<TestContent> {
    let contents = index.contents.iter().zip(files);
    contents
        .map(|(content, file)| {
            let location = match &content.place {
                Place::Run { offset } => Location::Run { pack, offset: *offset },
                Place::Sparse { extents } => Location::Sparse { pack, extents: extents.clone() },
            };
            let c = ContentRef { content: content.content, size: content.size, location };
            TestContent { c, bytes: file.bytes.clone() }
        })
        .collect()
}

/// Packs files and puts everything into the lake. A single file without padding is a whole pack.
pub(crate) fn native(lake: &MemLake, name: &str, files: &[TestFile]) -> TestPack {
    let mut outboard = PackOutboard::default();
    let mut contents = Vec::new();
    for (position, file) in (0_u32..).zip(files) {
        let mut hasher = ContentHasher::new();
        hasher.update(&file.bytes);
        let (digest, values) = hasher.finish();
        outboard.contents.extend(values.map(|values| (position, values)));
        contents.push(packed(file, ContentId::Digest(digest)));
    }
    let index = index_of(contents, files.len() == 1 && files[0].extents.is_none());
    let pack = index.id();
    let mut data = vec![0; index.len as usize];
    for (content, file) in index.contents.iter().zip(files) {
        for extent in content.extents().iter() {
            let from = &file.bytes[extent.logical as usize..][..extent.len as usize];
            data[extent.offset as usize..][..extent.len as usize].copy_from_slice(from);
        }
    }
    let outboard = if outboard.contents.is_empty() { Vec::new() } else { outboard.encode() };
    let recipe = Recipe {
        pack,
        len: index.len,
        index_len: index.encode().len() as u64,
        outboard_len: outboard.len() as u64,
        source: Source::Native { key: name.to_owned() },
    };
    lake.set(&pack_key(&pack, PackPart::Index), index.encode());
    lake.set(&pack_key(&pack, PackPart::Recipe), recipe.encode());
    if !outboard.is_empty() {
        lake.set(&pack_key(&pack, PackPart::Outboard), outboard);
    }
    lake.set(&data_key(name), data);
    TestPack { pack, len: index.len, contents: refs(pack, &index, files), key: data_key(name) }
}

/// Imports files: a user's own objects in `bucket`, and a recipe over them.
pub(crate) fn imported(lake: &MemLake, bucket: &str, files: &[TestFile]) -> TestPack {
    let mut pins = Vec::new();
    for (i, file) in files.iter().enumerate() {
        let found = lake.set_foreign(bucket, &format!("dir/{i}"), file.bytes.clone(), false);
        pins.push(Pin {
            bucket: bucket.to_owned(),
            key: found.key,
            version: found.version,
            etag: found.etag,
            size: found.size,
        });
    }
    let contents = files.iter().zip(&pins).map(|(file, pin)| packed(file, ContentId::Pin(pin.id())));
    let index = index_of(contents.collect(), files.len() == 1);
    let pack = index.id();
    let recipe = Recipe {
        pack,
        len: index.len,
        index_len: index.encode().len() as u64,
        outboard_len: 0,
        source: Source::Assembled { pins: pins.clone() },
    };
    lake.set(&pack_key(&pack, PackPart::Index), index.encode());
    lake.set(&pack_key(&pack, PackPart::Recipe), recipe.encode());
    TestPack { pack, len: index.len, contents: refs(pack, &index, files), key: String::new() }
}

/// Limits that make tests meet every bound.
pub(crate) fn small_config() -> FetchConfig {
    FetchConfig {
        memory_bytes_max: 1 << 20,
        in_flight_bytes_max: 4 << 20,
        piece_len_bytes: 2 * BLOCK_LEN,
        prefetch_requests_max: 3,
        read_timeout_ms: 5_000,
        prefetch_timeout_ms: 2_000,
        stall_timeout_ms: 150,
        absent_recheck_ms: 0,
        tier_pause_ms: 50,
        claim_wait_ms: 1_000,
        readahead_bytes_max: 4 * BLOCK_LEN,
        ..FetchConfig::default()
    }
}

/// Memory holds nothing: each read looks at the other sources.
pub(crate) fn no_memory() -> FetchConfig {
    FetchConfig { memory_bytes_max: 0, readahead_bytes_max: 0, ..small_config() }
}

/// A lake, a real tier in a directory, a node's database.
pub(crate) struct World {
    pub lake: Arc<FaultyLake>,
    pub memory: Arc<MemLake>,
    pub dir: tempfile::TempDir,
    pub kv: Kv,
}

impl World {
    pub(crate) fn new() -> Self {
        let (lake, memory) = FaultyLake::over_memory();
        let dir = tempfile::tempdir().expect("a directory");
        Tier::init(dir.path(), &InitOptions::default()).expect("a tier");
        Self { lake, memory, dir, kv: Kv::in_memory() }
    }

    pub(crate) fn tier(&self) -> Arc<Tier> {
        let node = NodeId(uuid::Uuid::from_u128(7));
        Arc::new(Tier::open(self.dir.path(), node, TierConfig::default()).expect("a tier"))
    }

    pub(crate) fn fetcher(&self, cfg: FetchConfig) -> Fetcher {
        self.fetcher_on(Some(self.tier()), cfg)
    }

    pub(crate) fn fetcher_on(&self, tier: Option<Arc<dyn FetchTier>>, cfg: FetchConfig) -> Fetcher {
        Fetcher::new(self.lake.clone(), tier, self.kv.clone(), cfg, tokio::runtime::Handle::current())
    }

    pub(crate) fn object_path(&self, pack: &PackId) -> PathBuf {
        let hex = pack.to_string();
        self.dir.path().join("objects").join(&hex[..2]).join(hex)
    }

    /// Takes away what lies beside a pack, as an eviction does that is killed then; says how much it was.
    pub(crate) fn lose_sidecars(&self, pack: &PackId) -> usize {
        let object = self.object_path(pack);
        let beside = |part: &Sidecar| object.with_extension(part.name());
        Sidecar::ALL.iter().filter(|part| std::fs::remove_file(beside(part)).is_ok()).count()
    }

    /// Flips one bit of the published object, behind everybody's back.
    pub(crate) fn flip_in_tier(&self, pack: &PackId, offset: u64) {
        flip(&self.object_path(pack), offset);
    }
}

pub(crate) fn flip(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("a file to damage");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], offset).expect("a byte");
}

/// A tier that is a folder of files, with short spans and switches for what goes wrong. It is what one
/// node sees; [`FakeTier::other_node`] is the same folder seen by another.
#[derive(Debug)]
pub(crate) struct FakeTier {
    dir: Arc<tempfile::TempDir>,
    node: u64,
    state: Arc<Mutex<FakeState>>,
    pub faults: Arc<FakeFaults>,
}

#[derive(Debug, Default)]
struct FakeState {
    done: HashMap<PackId, Vec<u64>>,
    /// Who claimed a span, and when the claim was renewed last.
    claims: HashMap<(PackId, u64), (u64, Instant)>,
    /// Counts the staging files of each pack: an old one may do nothing any more.
    generations: HashMap<PackId, u64>,
    sidecars: HashMap<(PackId, Sidecar), Vec<u8>>,
}

#[derive(Debug, Default)]
pub(crate) struct FakeFaults {
    pub full: AtomicBool,
    pub opens_fail: AtomicBool,
    pub hangs: AtomicBool,
    pub remote: AtomicBool,
    pub publishing_fails: AtomicBool,
    /// So many publishes find that the index was taken away.
    pub indexes_lost: AtomicU64,
    /// The node renews nothing: others believe it dead.
    pub silent: AtomicBool,
    pub opens: AtomicU64,
    pub staged_writes: AtomicU64,
    pub taken_over: AtomicU64,
}

pub(crate) const FAKE_SPAN_LEN: u64 = 1 << 20;
/// How long a claim lasts.
pub(crate) const FAKE_CLAIM_TTL: Duration = Duration::from_millis(400);

impl FakeTier {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            dir: Arc::new(tempfile::tempdir().expect("a directory")),
            node: 1,
            state: Arc::default(),
            faults: Arc::default(),
        })
    }

    /// The same tier as another node sees it, with faults of its own.
    pub(crate) fn other_node(&self, node: u64) -> Arc<Self> {
        Arc::new(Self { dir: self.dir.clone(), node, state: self.state.clone(), faults: Arc::default() })
    }

    fn root(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn object(&self, pack: &PackId) -> PathBuf {
        self.root().join(format!("{pack}.object"))
    }

    pub(crate) fn staging(&self, pack: &PackId) -> PathBuf {
        self.root().join(format!("{pack}.staging"))
    }

    pub(crate) fn spans_done(&self, pack: &PackId) -> usize {
        self.state.lock().done.get(pack).map_or(0, Vec::len)
    }

    /// Claims a span for a node that does nothing with it.
    pub(crate) fn claim_for(&self, node: u64, pack: &PackId, span: u64, renewed: Instant) {
        self.state.lock().claims.insert((*pack, span), (node, renewed));
    }

    /// Marks a span for another node.
    pub(crate) fn mark_for(&self, pack: &PackId, span: u64) {
        self.state.lock().done.entry(*pack).or_default().push(span);
    }

    pub(crate) fn claims(&self) -> usize {
        self.state.lock().claims.len()
    }

    pub(crate) fn evict(&self, pack: &PackId) {
        let _ = std::fs::remove_file(self.object(pack));
    }
}

fn open_object(path: &Path) -> io::Result<Option<PackFile>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let meta = file.metadata()?;
    let mtime_ns = meta.mtime() * 1_000_000_000 + meta.mtime_nsec();
    let identity = FileIdentity { file_id: meta.ino(), size_bytes: meta.len(), mtime_ns };
    Ok(Some(PackFile { file, len: meta.len(), identity }))
}

fn full() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::ENOSPC)
}

impl FetchTier for FakeTier {
    fn id(&self) -> TierId {
        TierId(uuid::Uuid::from_u128(99))
    }

    fn is_remote(&self) -> bool {
        self.faults.remote.load(Ordering::Relaxed)
    }

    fn open_pack(&self, pack: &PackId) -> io::Result<Option<PackFile>> {
        self.faults.opens.fetch_add(1, Ordering::Relaxed);
        while self.faults.hangs.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        if self.faults.opens_fail.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(nix::libc::ESTALE));
        }
        open_object(&self.object(pack))
    }

    fn open_stage(&self, pack: &PackId, len: u64) -> io::Result<Box<dyn FetchStage>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(self.staging(pack))?;
        if file.metadata()?.len() < len {
            file.set_len(len)?;
        }
        let generation = self.state.lock().generations.get(pack).copied().unwrap_or(0);
        Ok(Box::new(FakeStage {
            pack: *pack,
            len,
            node: self.node,
            generation,
            file,
            staging: self.staging(pack),
            object: self.object(pack),
            state: self.state.clone(),
            faults: self.faults.clone(),
        }))
    }

    fn quarantine(&self, pack: &PackId, identity: &FileIdentity, _why: &str) -> io::Result<()> {
        if open_object(&self.object(pack))?.is_some_and(|there| there.identity.file_id == identity.file_id) {
            std::fs::remove_file(self.object(pack))?;
        }
        Ok(())
    }

    fn sidecar(&self, pack: &PackId, part: Sidecar) -> io::Result<Option<Vec<u8>>> {
        Ok(self.state.lock().sidecars.get(&(*pack, part)).cloned())
    }

    fn has_sidecar(&self, pack: &PackId, part: Sidecar) -> io::Result<bool> {
        Ok(self.state.lock().sidecars.contains_key(&(*pack, part)))
    }

    fn put_sidecar(&self, pack: &PackId, part: Sidecar, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut state = self.state.lock();
        Ok(state.sidecars.entry((*pack, part)).or_insert_with(|| bytes.to_vec()).clone())
    }
}

#[derive(Debug)]
struct FakeStage {
    pack: PackId,
    len: u64,
    node: u64,
    generation: u64,
    file: File,
    staging: PathBuf,
    object: PathBuf,
    state: Arc<Mutex<FakeState>>,
    faults: Arc<FakeFaults>,
}

impl FakeStage {
    /// Fails where the pack was published meanwhile.
    fn still_there(&self, state: &FakeState) -> io::Result<()> {
        match state.generations.get(&self.pack).copied().unwrap_or(0) == self.generation {
            true => Ok(()),
            false => Err(gone("staging")),
        }
    }
}

fn gone(path: &str) -> io::Error {
    io::Error::other(TierError::Gone { path: path.to_owned(), source: io::ErrorKind::NotFound.into() })
}

impl FetchStage for FakeStage {
    fn span_len(&self) -> u64 {
        FAKE_SPAN_LEN
    }

    fn file_id(&self) -> Option<u64> {
        self.file.metadata().ok().map(|meta| meta.ino())
    }

    fn is_done(&self, span: u64) -> bool {
        let state = self.state.lock();
        self.still_there(&state).is_ok() && state.done.get(&self.pack).is_some_and(|done| done.contains(&span))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.faults.full.load(Ordering::Relaxed) {
            return Err(full());
        }
        self.faults.staged_writes.fetch_add(1, Ordering::Relaxed);
        self.file.write_all_at(bytes, offset)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn mark_done(&self, span: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        self.still_there(&state)?;
        state.claims.remove(&(self.pack, span));
        let done = state.done.entry(self.pack).or_default();
        if !done.contains(&span) {
            done.push(span);
        }
        Ok(())
    }

    fn claim(&self, span: u64) -> io::Result<SpanClaim> {
        let mut state = self.state.lock();
        self.still_there(&state)?;
        if state.done.get(&self.pack).is_some_and(|done| done.contains(&span)) {
            return Ok(SpanClaim::Done);
        }
        let mut taken_over = false;
        if let Some((node, renewed)) = state.claims.get(&(self.pack, span))
            && *node != self.node
        {
            let left = FAKE_CLAIM_TTL.saturating_sub(renewed.elapsed());
            if !left.is_zero() {
                let id = NodeId(uuid::Uuid::from_u128(u128::from(*node)));
                return Ok(SpanClaim::Other { node: id, peer: Some(format!("node-{node}")), left });
            }
            taken_over = true;
            self.faults.taken_over.fetch_add(1, Ordering::Relaxed);
        }
        state.claims.insert((self.pack, span), (self.node, Instant::now()));
        Ok(SpanClaim::Mine { taken_over })
    }

    fn claim_ttl(&self) -> Duration {
        FAKE_CLAIM_TTL
    }

    fn renew(&self) -> io::Result<Vec<u64>> {
        let mut state = self.state.lock();
        self.still_there(&state)?;
        for ((pack, _), (node, renewed)) in &mut state.claims {
            if *pack == self.pack && *node == self.node && !self.faults.silent.load(Ordering::Relaxed) {
                *renewed = Instant::now();
            }
        }
        Ok(Vec::new())
    }

    fn refresh(&self) -> io::Result<()> {
        self.still_there(&self.state.lock())
    }

    fn release(&self) {
        self.state.lock().claims.retain(|(pack, _), (node, _)| *pack != self.pack || *node != self.node);
    }

    fn publish(&self) -> io::Result<PackFile> {
        if self.faults.publishing_fails.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(nix::libc::EIO));
        }
        let lost = |left: u64| left.checked_sub(1);
        if self.faults.indexes_lost.fetch_update(Ordering::Relaxed, Ordering::Relaxed, lost).is_ok() {
            return Err(io::Error::other(TierError::NoIndex { pack: self.pack }));
        }
        let mut state = self.state.lock();
        assert!(
            state.sidecars.contains_key(&(self.pack, Sidecar::Index)),
            "the index must lie beside a pack before it is published"
        );
        if !self.object.exists() {
            self.still_there(&state)?;
            let done = state.done.get(&self.pack).map_or(0, Vec::len) as u64;
            assert_eq!(done, self.len.div_ceil(FAKE_SPAN_LEN), "only a pack with all its marks is published");
            std::fs::rename(&self.staging, &self.object)?;
        }
        state.done.remove(&self.pack);
        state.claims.retain(|(pack, _), _| *pack != self.pack);
        *state.generations.entry(self.pack).or_default() += 1;
        drop(state);
        open_object(&self.object)?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}
