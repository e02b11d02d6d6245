//! Condemned runs: what gc means to delete, and how a writer saves what it needs of that.
//!
//! ```text
//! condemned/<run>/list/<n>       keys, one a line, in order
//! condemned/<run>/head           put last: from now on the run counts
//! condemned/<run>/rescue/<id>    a writer needs these keys
//! condemned/<run>/sweeping       put before anything is deleted, refreshed while that goes on
//! ```
//!
//! Nothing is ever overwritten to say something else, so it also holds on stores where overwrites
//! are seen late. gc puts `sweeping` and then reads the rescues; a writer puts its rescue and then
//! looks for `sweeping`: so at least one of the two sees the other. A writer that finds `sweeping` waits for the
//! sweep to end, and puts the object again.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::store::catalog::puts;
use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{Lake, LakeError, ListPage, get_all};

/// Where runs lie.
pub const CONDEMNED_PREFIX: &str = "condemned/";
/// A sweep that was not refreshed for so long has crashed; the next gc looks at everything again.
pub(super) const SWEEP_STALE: Duration = Duration::from_secs(600);
/// How often a writer looks whether a sweep ended.
const POLL_EVERY: Duration = Duration::from_secs(2);
const LIST_LEN_MAX: u64 = 256 << 20;

/// What `head` says.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RunHead {
    pub format: u32,
    pub run: String,
    pub by: String,
    /// How many list objects there are, and what they name.
    pub lists: u64,
    pub keys: u64,
    pub bytes: u64,
}

/// A run with the store's time of its head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub head: RunHead,
    pub condemned_ms: i64,
}

impl Run {
    fn key(&self, name: &str) -> String {
        run_key(&self.head.run, name)
    }
}

pub(super) fn run_key(run: &str, name: &str) -> String {
    format!("{CONDEMNED_PREFIX}{run}/{name}")
}

pub(super) async fn list_page(lake: &dyn Lake, prefix: &str, page: Option<String>) -> Result<ListPage, LakeError> {
    with_retry(&RetryPolicy::default(), || lake.list(prefix, page.clone())).await
}

/// Lists the runs that count, oldest first.
pub(super) async fn runs(lake: &dyn Lake) -> Result<Vec<Run>, LakeError> {
    let mut runs = Vec::new();
    let mut page = None;
    loop {
        let listed = list_page(lake, CONDEMNED_PREFIX, page).await?;
        for object in listed.objects {
            if !object.key.ends_with("/head") {
                continue;
            }
            let bytes = match get_all(lake, &object.key, 1 << 20).await {
                Ok(bytes) => bytes,
                Err(LakeError::NotFound { .. }) => continue,
                Err(error) => return Err(error),
            };
            if let Ok(head) = serde_json::from_slice(&bytes) {
                runs.push(Run { head, condemned_ms: object.modified_ms });
            }
        }
        page = listed.next;
        if page.is_none() {
            runs.sort_by_key(|run| run.condemned_ms);
            return Ok(runs);
        }
    }
}

/// Reads the keys of one list of a run.
pub(super) async fn list_of(lake: &dyn Lake, run: &Run, n: u64) -> Result<Vec<String>, LakeError> {
    let bytes = get_all(lake, &run.key(&format!("list/{n:08}")), LIST_LEN_MAX).await?;
    Ok(String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect())
}

/// Reads the keys that writers rescued from a run.
pub(super) async fn rescued(lake: &dyn Lake, run: &Run) -> Result<HashSet<String>, LakeError> {
    let mut keys = HashSet::new();
    let mut page = None;
    loop {
        let listed = list_page(lake, &run.key("rescue/"), page).await?;
        for object in listed.objects {
            let bytes = get_all(lake, &object.key, LIST_LEN_MAX).await?;
            keys.extend(String::from_utf8_lossy(&bytes).lines().map(str::to_owned));
        }
        page = listed.next;
        if page.is_none() {
            return Ok(keys);
        }
    }
}

/// Says whether a gc is deleting now what a key belongs to.
pub(in crate::store::catalog) async fn is_being_swept(lake: &Arc<dyn Lake>, key: &str) -> Result<bool, LakeError> {
    let set = CondemnedSet::load(lake).await?;
    let hash = hash(key);
    for loaded in set.runs.iter() {
        if loaded.hashes.binary_search(&hash).is_err() {
            continue;
        }
        match lake.head(&loaded.run.key("sweeping")).await {
            Ok(_) => return Ok(true),
            Err(LakeError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// What became of a key that a writer needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relied {
    /// Nobody will delete it.
    Safe,
    /// It may be gone: put it (again), it is left alone from now on.
    PutAgain,
}

/// What is condemned, as one writer knows it. Load it after the writer's intent is put.
///
/// Ask before an object that this writer did not just make under a new name is relied on, and before an
/// object whose name follows from its contents is put.
#[derive(Debug, Clone)]
pub struct CondemnedSet {
    lake: Arc<dyn Lake>,
    runs: Arc<Vec<LoadedRun>>,
    settled: Arc<Mutex<HashSet<String>>>,
}

#[derive(Debug)]
struct LoadedRun {
    run: Run,
    /// First eight bytes of the digest of each key, in order. A false hit costs one needless rescue.
    hashes: Vec<u64>,
}

fn hash(key: &str) -> u64 {
    let digest = blake3::hash(super::mark::pack_stem(key).as_bytes());
    let first: [u8; 8] = digest.as_bytes().first_chunk().copied().unwrap_or_default();
    u64::from_le_bytes(first)
}

impl CondemnedSet {
    /// Reads what is condemned now.
    pub async fn load(lake: &Arc<dyn Lake>) -> Result<Self, LakeError> {
        let mut loaded = Vec::new();
        for run in runs(lake.as_ref()).await? {
            let mut hashes = Vec::new();
            for n in 0..run.head.lists {
                match list_of(lake.as_ref(), &run, n).await {
                    Ok(keys) => hashes.extend(keys.iter().map(|key| hash(key))),
                    // The run ended meanwhile.
                    Err(LakeError::NotFound { .. }) => break,
                    Err(error) => return Err(error),
                }
            }
            hashes.sort_unstable();
            hashes.dedup();
            loaded.push(LoadedRun { run, hashes });
        }
        Ok(Self { lake: lake.clone(), runs: Arc::new(loaded), settled: Arc::default() })
    }

    /// Says whether nothing is condemned: then nothing needs to be asked.
    pub fn is_empty(&self) -> bool {
        self.runs.iter().all(|run| run.hashes.is_empty())
    }

    /// Says whether a key is condemned. All parts of a pack (`packs/ab/<id>.*`) are so together.
    pub fn contains(&self, key: &str) -> bool {
        let hash = hash(key);
        self.runs.iter().any(|run| run.hashes.binary_search(&hash).is_ok())
    }

    /// Makes sure that a key is not deleted while this writer needs it.
    pub async fn rely_on(&self, key: &str) -> Result<Relied, LakeError> {
        let stem = super::mark::pack_stem(key);
        let hash = hash(stem);
        let mut relied = Relied::Safe;
        if self.settled.lock().contains(stem) {
            return Ok(Relied::Safe);
        }
        for loaded in self.runs.iter().filter(|run| run.hashes.binary_search(&hash).is_ok()) {
            let name = format!("rescue/{}", uuid::Uuid::new_v4().simple());
            let body = format!("{stem}\n");
            puts::put(self.lake.as_ref(), &loaded.run.key(&name), body.into()).await?;
            if self.wait_for_sweep(&loaded.run).await? {
                relied = Relied::PutAgain;
            }
        }
        self.settled.lock().insert(stem.to_owned());
        Ok(relied)
    }

    /// Waits while the run is being swept; says whether it was (so that the object may be gone).
    async fn wait_for_sweep(&self, run: &Run) -> Result<bool, LakeError> {
        let mut seen = false;
        let mut last_refresh = 0;
        let mut unchanged_since = tokio::time::Instant::now();
        loop {
            let at = with_retry(&RetryPolicy::default(), || async { self.lake.head(&run.key("sweeping")).await }).await;
            match at {
                Ok(meta) if meta.modified_ms != last_refresh => {
                    last_refresh = meta.modified_ms;
                    unchanged_since = tokio::time::Instant::now();
                }
                // Crashed: the next gc sees what is put from now on, and the rescue.
                Ok(_) if unchanged_since.elapsed() > SWEEP_STALE => return Ok(true),
                Ok(_) => {}
                Err(LakeError::NotFound { .. }) => return Ok(seen || !self.counts(run).await?),
                Err(error) => return Err(error),
            }
            seen = true;
            tokio::time::sleep(POLL_EVERY).await;
        }
    }

    /// Says whether the run's head is still there: a sweep that ended removed it.
    async fn counts(&self, run: &Run) -> Result<bool, LakeError> {
        match self.lake.head(&run.key("head")).await {
            Ok(_) => Ok(true),
            Err(LakeError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
