//! A lake that is watched: what it answers, how long that takes, and what is done about it.
//!
//! * *Health*: the last error that was not an answer, until something goes well again: `larder status` tells it.
//! * *Times* of requests, by kind: for metrics.
//! * *Throttled*: a store that says `Retry-After` is asked nothing for so long (at most [`QUIET_MAX`]). Who waits is
//!   bounded by the patience it has anyway.
//! * *Rotated credentials*: where the store does not know the credentials any more, they are taken from the standard
//!   chain anew (a profile or a role may have others by now) and the request is made once more, at most every
//!   [`RENEW_INTERVAL`].

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::{Mutex, RwLock};

use super::s3::S3Failure;
use super::{Body, Lake, LakeError, ListPage, ObjectMeta, PutIf, RunningUpload, UploadId, UploadedPart};
use crate::format::tree::Pin;
use crate::store::histogram::{Histogram, Times};

/// However long a store asks to be left alone.
const QUIET_MAX: Duration = Duration::from_secs(30);
/// Who waits less than this for an answer has gone for another reason.
const UNANSWERED_MIN: Duration = Duration::from_millis(900);
/// How often credentials are asked for anew, at most.
const RENEW_INTERVAL: Duration = Duration::from_secs(5);

/// Kinds of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Get,
    Head,
    Put,
    Delete,
    List,
    Upload,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Get, Self::Head, Self::Put, Self::Delete, Self::List, Self::Upload];

    /// Gives the word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Head => "head",
            Self::Put => "put",
            Self::Delete => "delete",
            Self::List => "list",
            Self::Upload => "upload",
        }
    }
}

/// What is wrong with a lake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// Unix time in milliseconds of the first error since something went well.
    pub since_ms: i64,
    /// The last error, with its causes.
    pub error: String,
}

/// What was seen of a lake.
#[derive(Debug, Default)]
pub struct Health {
    trouble: Mutex<Option<Trouble>>,
    quiet_until: Mutex<Option<Instant>>,
    times: [Histogram; Kind::ALL.len()],
    renewals: std::sync::atomic::AtomicU64,
    throttled: std::sync::atomic::AtomicU64,
}

impl Health {
    /// Says what is wrong; None: the last request was answered.
    pub fn trouble(&self) -> Option<Trouble> {
        self.trouble.lock().clone()
    }

    /// Gives how long the answers of each kind of request took to begin.
    pub fn times(&self) -> Vec<(&'static str, Times)> {
        Kind::ALL.iter().zip(&self.times).map(|(kind, times)| (kind.as_str(), times.times())).collect()
    }

    /// Counts how often credentials were taken anew.
    pub fn renewals(&self) -> u64 {
        self.renewals.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Counts how often the store asked to be left alone.
    pub fn throttled(&self) -> u64 {
        self.throttled.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Waits as long as the store asked for.
    async fn wait(&self) {
        let until = *self.quiet_until.lock();
        if let Some(until) = until {
            tokio::time::sleep_until(until.into()).await;
        }
    }

    fn note<T>(&self, kind: Kind, begun: Instant, result: &Result<T, LakeError>) {
        if let Some(times) = self.times.get(kind as usize) {
            times.note(begun.elapsed());
        }
        let error = match result {
            // The store was there, and said what it knows.
            Ok(_) | Err(LakeError::NotFound { .. } | LakeError::Precondition { .. }) => {
                *self.trouble.lock() = None;
                return;
            }
            // Credentials for reading are enough for a node.
            Err(LakeError::Denied { .. }) if !matches!(kind, Kind::Get | Kind::Head | Kind::List) => return,
            Err(error) => error,
        };
        if let Some(after) = failure(error).and_then(S3Failure::retry_after) {
            self.throttled.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            *self.quiet_until.lock() = Some(Instant::now() + after.min(QUIET_MAX));
        }
        self.begin_trouble(chain(error));
    }

    fn begin_trouble(&self, error: String) {
        let mut trouble = self.trouble.lock();
        let since_ms = trouble.as_ref().map_or_else(now_ms, |trouble| trouble.since_ms);
        *trouble = Some(Trouble { since_ms, error });
    }
}

/// A request that is under way. Who made it may lose patience: that is noted too.
struct Asked<'a> {
    health: &'a Health,
    begun: Instant,
    is_answered: bool,
}

impl<'a> Asked<'a> {
    fn begin(health: &'a Health) -> Self {
        Self { health, begun: Instant::now(), is_answered: false }
    }

    fn answered<T>(mut self, kind: Kind, result: &Result<T, LakeError>) {
        self.is_answered = true;
        self.health.note(kind, self.begun, result);
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        let waited = self.begun.elapsed();
        if !self.is_answered && waited >= UNANSWERED_MIN {
            let seconds = waited.as_secs_f64();
            self.health.begin_trouble(format!("the lake is unreachable or overloaded: no answer for {seconds:.1} s"));
        }
    }
}

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

fn failure(error: &LakeError) -> Option<&S3Failure> {
    match error {
        LakeError::Denied { source, .. } | LakeError::Passing { source, .. } => source.downcast_ref(),
        _ => None,
    }
}

fn chain(error: &LakeError) -> String {
    let first: &(dyn std::error::Error + 'static) = error;
    let all = std::iter::successors(Some(first), |error| error.source());
    // The SDK's own chain repeats itself; what the store answered is in the first links.
    all.take(3).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Opens the same lake anew.
pub type Reopen = Box<dyn Fn() -> BoxFuture<'static, Option<Arc<dyn Lake>>> + Send + Sync>;

/// A watched lake.
pub struct WatchedLake {
    inner: RwLock<Arc<dyn Lake>>,
    health: Arc<Health>,
    reopen: Option<Reopen>,
    renewed: tokio::sync::Mutex<Option<Instant>>,
}

impl std::fmt::Debug for WatchedLake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WatchedLake({:?})", self.inner.read())
    }
}

impl WatchedLake {
    /// Watches a lake; `reopen` where its credentials can change.
    pub fn new(inner: Arc<dyn Lake>, reopen: Option<Reopen>) -> Self {
        Self { inner: RwLock::new(inner), health: Arc::default(), reopen, renewed: tokio::sync::Mutex::default() }
    }

    /// Gives what was seen of it.
    pub fn health(&self) -> Arc<Health> {
        Arc::clone(&self.health)
    }

    fn current(&self) -> Arc<dyn Lake> {
        Arc::clone(&self.inner.read())
    }

    /// After an error: says whether the request is worth another try, with credentials that were taken anew.
    async fn renews(&self, error: Option<&LakeError>, used: &Arc<dyn Lake>) -> bool {
        let (Some(error), Some(reopen)) = (error, &self.reopen) else {
            return false;
        };
        if !failure(error).is_some_and(S3Failure::is_of_credentials) {
            return false;
        }
        let mut renewed = self.renewed.lock().await;
        if !Arc::ptr_eq(used, &self.current()) {
            // Another request has renewed them meanwhile.
            return true;
        }
        if renewed.is_some_and(|at| at.elapsed() < RENEW_INTERVAL) {
            return false;
        }
        *renewed = Some(Instant::now());
        let Some(fresh) = reopen().await else {
            return false;
        };
        tracing::info!(%error, "the store does not take the credentials: they are asked for anew");
        self.health.renewals.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        *self.inner.write() = fresh;
        true
    }
}

/// Makes a request, with what is done before and after each.
macro_rules! watched {
    ($self:ident, $kind:expr, |$lake:ident| $request:expr) => {{
        $self.health.wait().await;
        let asked = Asked::begin(&$self.health);
        let $lake = $self.current();
        let mut result = $request.await;
        if $self.renews(result.as_ref().err(), &$lake).await {
            let $lake = $self.current();
            result = $request.await;
        }
        asked.answered($kind, &result);
        result
    }};
}

#[async_trait::async_trait]
impl Lake for WatchedLake {
    fn url(&self) -> String {
        self.current().url()
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Body, LakeError> {
        watched!(self, Kind::Get, |lake| lake.get(key, range.clone()))
    }

    async fn get_pinned(&self, pin: &Pin, range: Option<Range<u64>>) -> Result<Body, LakeError> {
        watched!(self, Kind::Get, |lake| lake.get_pinned(pin, range.clone()))
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta, LakeError> {
        watched!(self, Kind::Head, |lake| lake.head(key))
    }

    async fn put(&self, key: &str, body: Bytes, when: PutIf) -> Result<String, LakeError> {
        watched!(self, Kind::Put, |lake| lake.put(key, body.clone(), when.clone()))
    }

    async fn delete(&self, key: &str) -> Result<(), LakeError> {
        watched!(self, Kind::Delete, |lake| lake.delete(key))
    }

    async fn list(&self, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        watched!(self, Kind::List, |lake| lake.list(prefix, page.clone()))
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>, LakeError> {
        watched!(self, Kind::List, |lake| lake.list_dirs(prefix))
    }

    async fn list_foreign(&self, bucket: &str, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
        watched!(self, Kind::List, |lake| lake.list_foreign(bucket, prefix, page.clone()))
    }

    async fn list_uploads(&self, prefix: &str) -> Result<Vec<RunningUpload>, LakeError> {
        watched!(self, Kind::List, |lake| lake.list_uploads(prefix))
    }

    async fn upload_begin(&self, key: &str) -> Result<UploadId, LakeError> {
        watched!(self, Kind::Upload, |lake| lake.upload_begin(key))
    }

    async fn upload_part(&self, upload: &UploadId, number: u32, body: Bytes) -> Result<UploadedPart, LakeError> {
        watched!(self, Kind::Upload, |lake| lake.upload_part(upload, number, body.clone()))
    }

    async fn upload_parts(&self, upload: &UploadId) -> Result<Vec<UploadedPart>, LakeError> {
        watched!(self, Kind::Upload, |lake| lake.upload_parts(upload))
    }

    async fn upload_finish(&self, upload: &UploadId, parts: Vec<UploadedPart>) -> Result<String, LakeError> {
        watched!(self, Kind::Upload, |lake| lake.upload_finish(upload, parts.clone()))
    }

    async fn upload_abort(&self, upload: &UploadId) -> Result<(), LakeError> {
        watched!(self, Kind::Upload, |lake| lake.upload_abort(upload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::lake::get_all;
    use crate::testkit::faulty_lake::{Fault, FaultyLake, Op, Rule};

    #[tokio::test]
    async fn trouble_is_told_until_the_store_answers_again() {
        let (faulty, _memory) = FaultyLake::over_memory();
        let lake = WatchedLake::new(faulty.clone(), None);
        let health = lake.health();
        lake.put("a", Bytes::from_static(b"x"), PutIf::Always).await.expect("puts");
        assert_eq!(health.trouble(), None);
        faulty.rule(Rule::every(Op::Get, Fault::Passing));
        assert!(lake.get("a", None).await.is_err());
        let first = health.trouble().expect("is told");
        assert!(lake.get("a", None).await.is_err());
        assert_eq!(health.trouble().map(|trouble| trouble.since_ms), Some(first.since_ms));
        faulty.heal();
        assert!(matches!(lake.get("gone", None).await, Err(LakeError::NotFound { .. })), "is an answer too");
        assert_eq!(health.trouble(), None);
        assert_eq!(get_all(&lake, "a", 9).await.expect("gets"), "x");
        let gets = health.times().into_iter().find(|(kind, _)| *kind == "get").expect("is counted");
        assert_eq!(gets.1.count, 4);
    }

    #[tokio::test]
    async fn a_request_that_somebody_lost_patience_with_is_trouble_too() {
        let (faulty, memory) = FaultyLake::over_memory();
        memory.set("a", "x");
        faulty.rule(Rule::every(Op::Get, Fault::Hang));
        let lake = WatchedLake::new(faulty.clone(), None);
        let health = lake.health();
        assert!(tokio::time::timeout(Duration::from_millis(1), lake.get("a", None)).await.is_err());
        assert!(tokio::time::timeout(UNANSWERED_MIN * 2, lake.get("a", None)).await.is_err());
        assert!(health.trouble().is_some_and(|trouble| trouble.error.contains("no answer")));
    }

    fn answered(code: &str, retry_after: Option<Duration>) -> Result<(), LakeError> {
        let (code, message) = (code.to_owned(), String::new());
        let source = Box::new(S3Failure::Answer { status: 503, code, message, retry_after });
        Err(LakeError::Passing { key: "a".to_owned(), source })
    }

    #[tokio::test]
    async fn a_store_that_asks_for_time_is_left_alone_for_so_long_at_most_half_a_minute() {
        let (faulty, _memory) = FaultyLake::over_memory();
        let lake = WatchedLake::new(faulty, None);
        let left = |health: &Health| {
            let until = *health.quiet_until.lock();
            until.map(|until| until.saturating_duration_since(Instant::now()))
        };
        lake.health.note(Kind::Get, Instant::now(), &answered("SlowDown", None));
        assert_eq!(left(&lake.health), None);
        lake.health.note(Kind::Get, Instant::now(), &answered("SlowDown", Some(Duration::from_secs(7200))));
        assert!(left(&lake.health).is_some_and(|left| left <= QUIET_MAX));
        let hour = Instant::now() + Duration::from_secs(3600);
        *lake.health.quiet_until.lock() = Some(hour);
        let asked = tokio::time::timeout(Duration::from_millis(50), lake.head("a")).await;
        assert!(asked.is_err(), "nothing is asked meanwhile");
        assert_eq!(lake.health.throttled(), 1);
    }

    #[tokio::test]
    async fn credentials_that_the_store_does_not_know_any_more_are_asked_for_anew_once() {
        let (old, _) = FaultyLake::over_memory();
        let (new, memory) = FaultyLake::over_memory();
        memory.set("a", "x");
        let fresh: Arc<dyn Lake> = new.clone();
        let reopen: Reopen = Box::new(move || {
            let fresh = fresh.clone();
            Box::pin(async move { Some(fresh) })
        });
        let lake = WatchedLake::new(old.clone(), Some(reopen));
        let used = lake.current();
        assert!(!lake.renews(answered("SlowDown", None).as_ref().err(), &used).await);
        assert!(lake.renews(answered("ExpiredToken", None).as_ref().err(), &used).await);
        assert_eq!(get_all(&lake, "a", 9).await.expect("gets"), "x", "from the new one");
        assert!(
            lake.renews(answered("ExpiredToken", None).as_ref().err(), &used).await,
            "an older request only tries again"
        );
        let used = lake.current();
        *lake.renewed.lock().await = Some(Instant::now() + Duration::from_secs(3600));
        assert!(!lake.renews(answered("ExpiredToken", None).as_ref().err(), &used).await, "not again at once");
        assert_eq!(lake.health.renewals(), 1);
    }
}
