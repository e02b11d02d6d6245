//! A lake in memory, and a wrapper that fails on demand and counts.
//!
//! [`MemLake`] keeps what a good store promises (one winner of conditional puts, listing in byte
//! order, pinned reads); [`MemLake::without_conditions`] ignores conditions, as some stores do.
//! [`FaultyLake`] wraps any lake: each [`Rule`] says which calls go wrong, after how many, and how;
//! it counts every call and byte. Rules and counters may be changed while the lake is in use.

// Not every test uses every helper.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use parking_lot::Mutex;

use crate::format::tree::Pin;
use crate::store::lake::{Body, Lake, LakeError, ListPage, ObjectMeta, PutIf, RunningUpload, UploadId, UploadedPart};

/// Bytes that a body's chunk has at most, so that tests meet several chunks.
const CHUNK_BYTES: usize = 64 * 1024;

#[derive(Debug, Clone)]
struct MemObject {
    body: Bytes,
    etag: String,
    version: Option<String>,
    modified_ms: i64,
}

#[derive(Debug, Default)]
struct MemState {
    objects: BTreeMap<String, MemObject>,
    /// By bucket, then key; all versions, the newest last.
    foreign: BTreeMap<String, BTreeMap<String, Vec<MemObject>>>,
    uploads: BTreeMap<String, (String, BTreeMap<u32, Bytes>)>,
    clock_ms: i64,
    serial: u64,
}

/// A lake in memory.
#[derive(Debug)]
pub(crate) struct MemLake {
    state: Mutex<MemState>,
    conditions: bool,
    page_keys: usize,
}

impl Default for MemLake {
    fn default() -> Self {
        Self { state: Mutex::default(), conditions: true, page_keys: 1000 }
    }
}

impl MemLake {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Makes a lake that ignores the conditions of puts: each one wins.
    pub(crate) fn without_conditions() -> Self {
        Self { conditions: false, ..Self::default() }
    }

    /// Makes a lake whose listings have at most `page_keys` keys a page.
    pub(crate) fn with_page(page_keys: usize) -> Self {
        Self { page_keys, ..Self::default() }
    }

    /// Gives all keys in order.
    pub(crate) fn keys(&self) -> Vec<String> {
        self.state.lock().objects.keys().cloned().collect()
    }

    /// Gives the bytes of an object.
    pub(crate) fn bytes_of(&self, key: &str) -> Option<Bytes> {
        self.state.lock().objects.get(key).map(|object| object.body.clone())
    }

    /// Puts an object as somebody else would, without conditions.
    pub(crate) fn set(&self, key: &str, body: impl Into<Bytes>) {
        let mut state = self.state.lock();
        let object = state.object(body.into(), false);
        state.objects.insert(key.to_owned(), object);
    }

    /// Removes an object as somebody else would.
    pub(crate) fn unset(&self, key: &str) {
        self.state.lock().objects.remove(key);
    }

    /// Flips one bit of the byte at `offset` of an object, its ETag unchanged.
    pub(crate) fn flip(&self, key: &str, offset: usize) {
        let mut state = self.state.lock();
        let object = state.objects.get_mut(key).expect("the object to damage exists");
        let mut body = object.body.to_vec();
        body[offset] ^= 1;
        object.body = body.into();
    }

    /// Puts a user's own object into a foreign bucket; gives what a listing would say of it.
    pub(crate) fn set_foreign(&self, bucket: &str, key: &str, body: impl Into<Bytes>, versioned: bool) -> ObjectMeta {
        let mut state = self.state.lock();
        let object = state.object(body.into(), versioned);
        let meta = object.meta(key);
        let versions = state.foreign.entry(bucket.to_owned()).or_default().entry(key.to_owned()).or_default();
        if !versioned {
            versions.clear();
        }
        versions.push(object);
        meta
    }

    /// Removes a user's own object with all its versions.
    pub(crate) fn unset_foreign(&self, bucket: &str, key: &str) {
        if let Some(keys) = self.state.lock().foreign.get_mut(bucket) {
            keys.remove(key);
        }
    }

    /// Counts multipart uploads that were neither finished nor aborted.
    pub(crate) fn uploads_open(&self) -> usize {
        self.state.lock().uploads.len()
    }
}

impl MemState {
    fn object(&mut self, body: Bytes, versioned: bool) -> MemObject {
        self.serial += 1;
        self.clock_ms += 1;
        let digest = blake3::hash(&body).to_hex();
        MemObject {
            etag: format!("\"{}\"", &digest[..32]),
            version: versioned.then(|| format!("v{:08}", self.serial)),
            modified_ms: self.clock_ms,
            body,
        }
    }
}

impl MemObject {
    fn meta(&self, key: &str) -> ObjectMeta {
        ObjectMeta {
            key: key.to_owned(),
            size: self.body.len() as u64,
            etag: self.etag.clone(),
            version: self.version.clone(),
            modified_ms: self.modified_ms,
        }
    }
}

fn not_found(key: &str) -> LakeError {
    LakeError::NotFound { key: key.to_owned() }
}

fn precondition(key: &str) -> LakeError {
    LakeError::Precondition { key: key.to_owned() }
}

fn permanent(key: &str, why: &'static str) -> LakeError {
    LakeError::Permanent { key: key.to_owned(), source: why.into() }
}

fn body_of(key: &str, object: &MemObject, range: Option<Range<u64>>) -> Result<Body, LakeError> {
    let len = object.body.len() as u64;
    let range = range.unwrap_or(0..len);
    if range.start > range.end || range.end > len {
        return Err(permanent(key, "the range reaches beyond the object"));
    }
    let bytes = object.body.slice(range.start as usize..range.end as usize);
    Ok(body_from(bytes, object.etag.clone()))
}

fn body_from(bytes: Bytes, etag: String) -> Body {
    let len = bytes.len() as u64;
    let chunks: Vec<_> = (0..bytes.len())
        .step_by(CHUNK_BYTES)
        .map(|at| Ok(bytes.slice(at..bytes.len().min(at + CHUNK_BYTES))))
        .collect();
    Body { len, etag, stream: futures::stream::iter(chunks).boxed() }
}

fn page_of<'a>(
    found: impl Iterator<Item = (&'a String, &'a MemObject)>,
    prefix: &str,
    page: Option<String>,
    page_keys: usize,
) -> ListPage {
    let after = page.unwrap_or_default();
    let mut objects: Vec<ObjectMeta> = found
        .filter(|(key, _)| key.starts_with(prefix) && (after.is_empty() || **key > after))
        .take(page_keys + 1)
        .map(|(key, object)| object.meta(key))
        .collect();
    let more = objects.len() > page_keys;
    objects.truncate(page_keys);
    let next = if more { objects.last().map(|object| object.key.clone()) } else { None };
    ListPage { objects, next }
}

#[async_trait::async_trait]
impl Lake for MemLake {
    fn url(&self) -> String {
        "s3://memory/lake".to_owned()
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Body, LakeError> {
        let object = self.state.lock().objects.get(key).cloned().ok_or_else(|| not_found(key))?;
        body_of(key, &object, range)
    }

    async fn get_pinned(&self, pin: &Pin, range: Option<Range<u64>>) -> Result<Body, LakeError> {
        let object = {
            let state = self.state.lock();
            let versions = state.foreign.get(&pin.bucket).and_then(|keys| keys.get(&pin.key));
            let versions = versions.ok_or_else(|| not_found(&pin.key))?;
            let object = match &pin.version {
                Some(version) => versions.iter().find(|object| object.version.as_ref() == Some(version)),
                None => versions.last(),
            };
            object.cloned().ok_or_else(|| not_found(&pin.key))?
        };
        if object.etag != pin.etag {
            return Err(precondition(&pin.key));
        }
        body_of(&pin.key, &object, range)
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta, LakeError> {
        self.state.lock().objects.get(key).map(|object| object.meta(key)).ok_or_else(|| not_found(key))
    }

    async fn put(&self, key: &str, body: Bytes, when: PutIf) -> Result<String, LakeError> {
        let mut state = self.state.lock();
        let present = state.objects.get(key).map(|object| object.etag.clone());
        let allowed = match (&when, present) {
            (PutIf::Always, _) | (PutIf::Absent, None) => true,
            (PutIf::Match(etag), Some(present)) => *etag == present,
            (PutIf::Absent, Some(_)) | (PutIf::Match(_), None) => false,
        };
        if self.conditions && !allowed {
            return Err(precondition(key));
        }
        let object = state.object(body, false);
        let etag = object.etag.clone();
        state.objects.insert(key.to_owned(), object);
        Ok(etag)
    }

    async fn delete(&self, key: &str) -> Result<(), LakeError> {
        self.state.lock().objects.remove(key);
        Ok(())
    }

    async fn list(&self, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        Ok(page_of(self.state.lock().objects.iter(), prefix, page, self.page_keys))
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>, LakeError> {
        let state = self.state.lock();
        let below = state.objects.keys().filter_map(|key| key.strip_prefix(prefix)?.split_once('/'));
        let mut names: Vec<String> = below.map(|(name, _)| name.to_owned()).collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    async fn list_foreign(&self, bucket: &str, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        let state = self.state.lock();
        let keys = state.foreign.get(bucket).ok_or_else(|| not_found(bucket))?;
        let newest = keys.iter().filter_map(|(key, versions)| versions.last().map(|object| (key, object)));
        Ok(page_of(newest, prefix, page, self.page_keys))
    }

    async fn list_uploads(&self, prefix: &str) -> Result<Vec<RunningUpload>, LakeError> {
        let state = self.state.lock();
        let found = state.uploads.iter().filter(|(_, (key, _))| key.starts_with(prefix));
        let upload = |(id, (key, _)): (&String, &(String, BTreeMap<u32, Bytes>))| RunningUpload {
            upload: UploadId { key: key.clone(), id: id.clone() },
            begun_ms: 0,
        };
        Ok(found.map(upload).collect())
    }

    async fn upload_begin(&self, key: &str) -> Result<UploadId, LakeError> {
        let mut state = self.state.lock();
        state.serial += 1;
        let id = format!("upload-{}", state.serial);
        state.uploads.insert(id.clone(), (key.to_owned(), BTreeMap::new()));
        Ok(UploadId { key: key.to_owned(), id })
    }

    async fn upload_part(&self, upload: &UploadId, number: u32, body: Bytes) -> Result<UploadedPart, LakeError> {
        let mut state = self.state.lock();
        let (_, parts) = state.uploads.get_mut(&upload.id).ok_or_else(|| not_found(&upload.key))?;
        let part = part_of(number, &body);
        parts.insert(number, body);
        Ok(part)
    }

    async fn upload_parts(&self, upload: &UploadId) -> Result<Vec<UploadedPart>, LakeError> {
        let state = self.state.lock();
        let (_, parts) = state.uploads.get(&upload.id).ok_or_else(|| not_found(&upload.key))?;
        Ok(parts.iter().map(|(number, body)| part_of(*number, body)).collect())
    }

    async fn upload_finish(&self, upload: &UploadId, parts: Vec<UploadedPart>) -> Result<String, LakeError> {
        let mut state = self.state.lock();
        let (key, arrived) = state.uploads.get(&upload.id).cloned().ok_or_else(|| not_found(&upload.key))?;
        let mut body = Vec::new();
        let mut last = 0;
        for part in &parts {
            let bytes = arrived.get(&part.number).filter(|bytes| part_of(part.number, bytes) == *part);
            let bytes = bytes.ok_or_else(|| permanent(&key, "a named part did not arrive"))?;
            if part.number <= last {
                return Err(permanent(&key, "parts are not in order"));
            }
            last = part.number;
            body.extend_from_slice(bytes);
        }
        if parts.is_empty() {
            return Err(permanent(&key, "an upload needs a part"));
        }
        let object = state.object(body.into(), false);
        let etag = object.etag.clone();
        state.objects.insert(key, object);
        state.uploads.remove(&upload.id);
        Ok(etag)
    }

    async fn upload_abort(&self, upload: &UploadId) -> Result<(), LakeError> {
        self.state.lock().uploads.remove(&upload.id);
        Ok(())
    }
}

fn part_of(number: u32, body: &Bytes) -> UploadedPart {
    let digest = blake3::hash(body).to_hex();
    UploadedPart { number, etag: format!("\"{}\"", &digest[..32]), size: body.len() as u64 }
}

/// The calls of a lake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Op {
    Get,
    GetPinned,
    Head,
    Put,
    Delete,
    List,
    ListForeign,
    UploadBegin,
    UploadPart,
    UploadParts,
    UploadFinish,
    UploadAbort,
}

impl Op {
    /// The calls that change the lake.
    pub(crate) const WRITES: &[Self] =
        &[Self::Put, Self::Delete, Self::UploadBegin, Self::UploadPart, Self::UploadFinish, Self::UploadAbort];
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    NotFound,
    Precondition,
    Denied,
    Passing,
    Permanent,
    /// The call takes effect, but its answer is lost (`Passing`).
    LostAnswer,
    /// The call waits so long, then goes on.
    Delay(Duration),
    /// The call waits until the lake is healed, then goes on.
    UntilHealed,
    /// The call never comes back.
    Hang,
    /// The body ends with a passing error after so many bytes.
    CutBody(u64),
    /// The body ends without an error after so many bytes.
    ShortBody(u64),
    /// The byte at this offset of the body is another one.
    FlipByte(u64),
    /// The body stops after so many bytes and never goes on.
    StallBody(u64),
}

/// Which calls go wrong, and how.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    /// Empty: all calls.
    pub(crate) ops: Vec<Op>,
    /// The key has to contain this.
    pub(crate) key_contains: String,
    /// So many calls that match go well first.
    pub(crate) skip: u64,
    /// So many calls then fail.
    pub(crate) times: u64,
    pub(crate) fault: Fault,
}

impl Rule {
    /// Makes a rule for every call of `op` from now on.
    pub(crate) fn every(op: Op, fault: Fault) -> Self {
        Self { ops: vec![op], key_contains: String::new(), skip: 0, times: u64::MAX, fault }
    }

    /// Makes a rule for the next call of `op`.
    pub(crate) fn next(op: Op, fault: Fault) -> Self {
        Self { times: 1, ..Self::every(op, fault) }
    }

    /// Makes a rule that stops the world: `skip` writes go well, then each write fails.
    pub(crate) fn crash_after(skip: u64) -> Self {
        let fault = Fault::Permanent;
        Self { ops: Op::WRITES.to_vec(), key_contains: String::new(), skip, times: u64::MAX, fault }
    }

    /// Restricts the rule to keys that contain `part`.
    pub(crate) fn on(mut self, part: &str) -> Self {
        part.clone_into(&mut self.key_contains);
        self
    }

    /// Lets the first `skip` matching calls go well.
    pub(crate) fn after(mut self, skip: u64) -> Self {
        self.skip = skip;
        self
    }

    /// Lets so many calls fail.
    pub(crate) fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }
}

/// What passed through a [`FaultyLake`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Counters {
    pub(crate) calls: BTreeMap<Op, u64>,
    /// Bytes of bodies that were handed out, as far as they were read.
    pub(crate) bytes_out: u64,
    /// Bytes of bodies that were put.
    pub(crate) bytes_in: u64,
    /// Calls that run now, and the most that ever ran at once.
    pub(crate) running: u64,
    pub(crate) running_max: u64,
    /// Each call in order: what, and of which key.
    pub(crate) log: Vec<(Op, String)>,
}

impl Counters {
    /// Counts the calls of `op`.
    pub(crate) fn of(&self, op: Op) -> u64 {
        self.calls.get(&op).copied().unwrap_or(0)
    }

    /// Counts the calls that read objects.
    pub(crate) fn gets(&self) -> u64 {
        self.of(Op::Get) + self.of(Op::GetPinned)
    }
}

/// What a test does at each call, before it goes on.
type Hook = Box<dyn FnMut(Op, &str) + Send>;

/// A lake that fails on demand and counts.
pub(crate) struct FaultyLake {
    inner: Arc<dyn Lake>,
    rules: Mutex<Vec<Rule>>,
    hook: Mutex<Option<Hook>>,
    counters: Arc<Mutex<Counters>>,
}

impl std::fmt::Debug for FaultyLake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultyLake").field("inner", &self.inner).field("rules", &self.rules).finish_non_exhaustive()
    }
}

/// Counts a call as running until it is dropped.
struct Running(Arc<Mutex<Counters>>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
    }
}

impl FaultyLake {
    pub(crate) fn new(inner: Arc<dyn Lake>) -> Self {
        Self { inner, rules: Mutex::default(), hook: Mutex::default(), counters: Arc::default() }
    }

    /// Makes one over a fresh [`MemLake`]; gives both.
    pub(crate) fn over_memory() -> (Arc<Self>, Arc<MemLake>) {
        let memory = Arc::new(MemLake::new());
        (Arc::new(Self::new(memory.clone())), memory)
    }

    /// Adds a rule; the first that matches a call counts.
    pub(crate) fn rule(&self, rule: Rule) {
        self.rules.lock().push(rule);
    }

    /// Calls `hook` within each call, before it takes effect: what a test does there happens at that
    /// moment, however busy the machine is.
    pub(crate) fn at_each_call(&self, hook: impl FnMut(Op, &str) + Send + 'static) {
        *self.hook.lock() = Some(Box::new(hook));
    }

    /// Forgets all rules.
    pub(crate) fn heal(&self) {
        self.rules.lock().clear();
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters.lock().clone()
    }

    pub(crate) fn reset_counters(&self) {
        let mut counters = self.counters.lock();
        let running = counters.running;
        *counters = Counters { running, running_max: running, ..Counters::default() };
    }

    /// Counts a call and gives the fault that meets it.
    fn enter(&self, op: Op, key: &str) -> (Running, Option<Fault>) {
        {
            let mut counters = self.counters.lock();
            *counters.calls.entry(op).or_default() += 1;
            counters.log.push((op, key.to_owned()));
            counters.running += 1;
            counters.running_max = counters.running_max.max(counters.running);
        }
        let running = Running(self.counters.clone());
        if let Some(hook) = self.hook.lock().as_mut() {
            hook(op, key);
        }
        let mut fault = None;
        for rule in self.rules.lock().iter_mut() {
            if !(rule.ops.is_empty() || rule.ops.contains(&op)) || !key.contains(&rule.key_contains) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if rule.times > 0 && fault.is_none() {
                rule.times -= u64::from(rule.times != u64::MAX);
                fault = Some(rule.fault);
            }
        }
        (running, fault)
    }

    /// Runs a call under its fault.
    async fn run<T>(
        &self,
        op: Op,
        key: &str,
        call: impl Future<Output = Result<T, LakeError>>,
    ) -> Result<T, LakeError> {
        let (_running, fault) = self.enter(op, key);
        match fault {
            None => call.await,
            Some(Fault::LostAnswer) => {
                call.await?;
                Err(error_of(Fault::LostAnswer, key))
            }
            Some(Fault::Delay(time)) => {
                tokio::time::sleep(time).await;
                call.await
            }
            Some(Fault::UntilHealed) => {
                self.healed().await;
                call.await
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(fault) => Err(error_of(fault, key)),
        }
    }

    /// Runs a call that gives a body under its fault, which may be one of the body.
    async fn run_body(
        &self,
        op: Op,
        key: &str,
        call: impl Future<Output = Result<Body, LakeError>>,
    ) -> Result<Body, LakeError> {
        let (running, fault) = self.enter(op, key);
        let body = match fault {
            None => call.await?,
            Some(Fault::CutBody(_) | Fault::ShortBody(_) | Fault::FlipByte(_) | Fault::StallBody(_)) => {
                spoil(call.await?, fault, key)
            }
            Some(Fault::Delay(time)) => {
                tokio::time::sleep(time).await;
                call.await?
            }
            Some(Fault::UntilHealed) => {
                self.healed().await;
                call.await?
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(fault) => return Err(error_of(fault, key)),
        };
        let counters = self.counters.clone();
        let stream = body.stream.inspect(move |chunk| {
            let _ = &running;
            if let Ok(chunk) = chunk {
                counters.lock().bytes_out += chunk.len() as u64;
            }
        });
        Ok(Body { stream: stream.boxed(), ..body })
    }

    async fn healed(&self) {
        while !self.rules.lock().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn count_in(&self, body: &Bytes) {
        self.counters.lock().bytes_in += body.len() as u64;
    }
}

fn error_of(fault: Fault, key: &str) -> LakeError {
    let key = key.to_owned();
    match fault {
        Fault::NotFound => LakeError::NotFound { key },
        Fault::Precondition => LakeError::Precondition { key },
        Fault::Denied => LakeError::Denied { key, source: "injected".into() },
        Fault::Permanent => LakeError::Permanent { key, source: "injected".into() },
        _ => LakeError::Passing { key, source: "injected".into() },
    }
}

/// Applies a fault to a body.
fn spoil(body: Body, fault: Option<Fault>, key: &str) -> Body {
    let Body { len, etag, mut stream } = body;
    let key = key.to_owned();
    let (limit, end) = match fault {
        Some(Fault::CutBody(at)) => (at, Some(Err(error_of(Fault::Passing, &key)))),
        Some(Fault::ShortBody(at)) => (at, None),
        Some(Fault::StallBody(at)) => (at, Some(Ok(()))),
        _ => (u64::MAX, None),
    };
    let flip = match fault {
        Some(Fault::FlipByte(at)) => Some(at),
        _ => None,
    };
    let stream = async_stream_of(move |sender| async move {
        let mut at = 0;
        while let Some(chunk) = stream.next().await {
            let Ok(chunk) = chunk else {
                sender.send(chunk).await;
                return;
            };
            let left = usize::try_from(limit - at).unwrap_or(usize::MAX);
            let mut kept = chunk.slice(..chunk.len().min(left)).to_vec();
            let flip_at = flip.and_then(|flip| flip.checked_sub(at)).map(|flip| flip as usize);
            if let Some(byte) = flip_at.and_then(|flip| kept.get_mut(flip)) {
                *byte ^= 1;
            }
            at += kept.len() as u64;
            sender.send(Ok(kept.into())).await;
            if at >= limit {
                break;
            }
        }
        match end {
            Some(Err(error)) => sender.send(Err(error)).await,
            Some(Ok(())) => std::future::pending().await,
            None => {}
        }
    });
    Body { len, etag, stream }
}

/// Hands items of a spoiled body to its reader.
struct Sender(tokio::sync::mpsc::Sender<Result<Bytes, LakeError>>);

impl Sender {
    async fn send(&self, item: Result<Bytes, LakeError>) {
        // A reader that is gone needs no more.
        let _ = self.0.send(item).await;
    }
}

fn async_stream_of<F: Future<Output = ()> + Send + 'static>(
    produce: impl FnOnce(Sender) -> F,
) -> futures::stream::BoxStream<'static, Result<Bytes, LakeError>> {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    tokio::spawn(produce(Sender(sender)));
    futures::stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|item| (item, receiver)) })
        .boxed()
}

#[async_trait::async_trait]
impl Lake for FaultyLake {
    fn url(&self) -> String {
        self.inner.url()
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Body, LakeError> {
        self.run_body(Op::Get, key, self.inner.get(key, range)).await
    }

    async fn get_pinned(&self, pin: &Pin, range: Option<Range<u64>>) -> Result<Body, LakeError> {
        self.run_body(Op::GetPinned, &pin.key, self.inner.get_pinned(pin, range)).await
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta, LakeError> {
        self.run(Op::Head, key, self.inner.head(key)).await
    }

    async fn put(&self, key: &str, body: Bytes, when: PutIf) -> Result<String, LakeError> {
        self.count_in(&body);
        self.run(Op::Put, key, self.inner.put(key, body, when)).await
    }

    async fn delete(&self, key: &str) -> Result<(), LakeError> {
        self.run(Op::Delete, key, self.inner.delete(key)).await
    }

    async fn list(&self, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        self.run(Op::List, prefix, self.inner.list(prefix, page)).await
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>, LakeError> {
        self.run(Op::List, prefix, self.inner.list_dirs(prefix)).await
    }

    async fn list_foreign(&self, bucket: &str, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        self.run(Op::ListForeign, prefix, self.inner.list_foreign(bucket, prefix, page)).await
    }

    async fn list_uploads(&self, prefix: &str) -> Result<Vec<RunningUpload>, LakeError> {
        self.run(Op::List, prefix, self.inner.list_uploads(prefix)).await
    }

    async fn upload_begin(&self, key: &str) -> Result<UploadId, LakeError> {
        self.run(Op::UploadBegin, key, self.inner.upload_begin(key)).await
    }

    async fn upload_part(&self, upload: &UploadId, number: u32, body: Bytes) -> Result<UploadedPart, LakeError> {
        self.count_in(&body);
        self.run(Op::UploadPart, &upload.key, self.inner.upload_part(upload, number, body)).await
    }

    async fn upload_parts(&self, upload: &UploadId) -> Result<Vec<UploadedPart>, LakeError> {
        self.run(Op::UploadParts, &upload.key, self.inner.upload_parts(upload)).await
    }

    async fn upload_finish(&self, upload: &UploadId, parts: Vec<UploadedPart>) -> Result<String, LakeError> {
        self.run(Op::UploadFinish, &upload.key, self.inner.upload_finish(upload, parts)).await
    }

    async fn upload_abort(&self, upload: &UploadId) -> Result<(), LakeError> {
        self.run(Op::UploadAbort, &upload.key, self.inner.upload_abort(upload)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::lake::get_all;

    async fn drain(body: Body) -> (Vec<u8>, Option<LakeError>) {
        let mut bytes = Vec::new();
        let mut stream = body.stream;
        while let Some(chunk) = stream.next().await {
            match chunk {
                Ok(chunk) => bytes.extend_from_slice(&chunk),
                Err(error) => return (bytes, Some(error)),
            }
        }
        (bytes, None)
    }

    #[tokio::test]
    async fn a_rule_fails_the_calls_it_names_and_no_others() {
        let (lake, memory) = FaultyLake::over_memory();
        memory.set("a", "1");
        memory.set("b", "2");
        lake.rule(Rule::every(Op::Get, Fault::Permanent).on("b").after(1).times(2));
        assert!(lake.get("b", None).await.is_ok());
        assert!(lake.get("a", None).await.is_ok());
        assert!(lake.get("b", None).await.is_err());
        assert!(lake.get("b", None).await.is_err());
        assert!(lake.get("b", None).await.is_ok());
        assert_eq!(lake.counters().of(Op::Get), 5);
    }

    #[tokio::test]
    async fn body_faults_cut_shorten_and_damage() {
        let (lake, memory) = FaultyLake::over_memory();
        let body: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
        memory.set("a", body.clone());
        lake.rule(Rule::next(Op::Get, Fault::CutBody(70_000)));
        lake.rule(Rule::next(Op::Get, Fault::ShortBody(70_000)));
        lake.rule(Rule::next(Op::Get, Fault::FlipByte(70_000)));
        let (bytes, error) = drain(lake.get("a", None).await.unwrap()).await;
        assert!(bytes == body[..70_000] && error.is_some_and(|error| error.is_passing()));
        let (bytes, error) = drain(lake.get("a", None).await.unwrap()).await;
        assert!(bytes == body[..70_000] && error.is_none());
        let (bytes, error) = drain(lake.get("a", None).await.unwrap()).await;
        let wrong: Vec<_> = (0..body.len()).filter(|at| bytes[*at] != body[*at]).collect();
        assert!(wrong == [70_000] && error.is_none());
        assert_eq!(get_all(&*lake, "a", 1 << 20).await.unwrap(), body);
    }
}
