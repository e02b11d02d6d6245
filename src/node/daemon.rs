//! The daemon's state and its life.
//!
//! Everything expensive is opened on first need: a daemon starts without its lake or a tier, and
//! says what is wrong when somebody needs them.
//!
//! Lock order: `keeper`, which is held while one is started; `table`; `live`. The last two are not held
//! across an await or I/O but for the table's own small file, which only one writer at a time may replace.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tokio::sync::{Notify, OnceCell};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::Config;
use crate::format::ids::NodeId;
use crate::fs::keeper;
use crate::fs::kernel::ImageId;
use crate::store::catalog::Catalog;
use crate::store::fetch::Fetcher;
use crate::store::kv::Kv;
use crate::store::lake::Lake;
use crate::store::lake::watch::Health;
use crate::store::tier::Tier;

use super::api::{API_VERSION, NodeInfo, TierInfo};
use super::error::NodeError;
use super::fills::Fill;
use super::mounting::Live;
use super::open;
use super::peers::Peering;
use super::place::{DaemonLock, Place};
use super::table::MountTable;

/// Bytes of decoded metadata files that are kept on the node's disk.
pub(super) const META_DISK_BYTES_MAX: u64 = crate::store::meta::DISK_BYTES_MAX;

/// A tier in use, and the fetcher that fills it.
#[derive(Debug, Clone)]
pub struct OpenTier {
    pub name: String,
    /// None: no tier at all, everything comes from the lake.
    pub tier: Option<Arc<Tier>>,
    pub fetcher: Fetcher,
}

/// The daemon. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Daemon {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub config: Config,
    /// Where the keeper listens: the state directory, or a private one.
    pub keeper_dir: PathBuf,
    /// Where the states of mounts in the foreground are.
    pub private_dir: PathBuf,
    pub node: NodeId,
    pub place: Place,
    pub started_ms: i64,
    pub lake: Arc<dyn Lake>,
    /// What was seen of it.
    pub lake_health: Arc<Health>,
    pub kv: Kv,
    pub catalog: OnceCell<Catalog>,
    pub tiers: Mutex<BTreeMap<String, Arc<OnceCell<OpenTier>>>>,
    pub keeper: tokio::sync::Mutex<Option<keeper::Client>>,
    /// What the keeper starts when this daemon dies; None: nothing.
    pub restart: OnceLock<keeper::Restart>,
    /// Mounts that a daemon before this one served, by the rows of the table: to be taken over.
    pub left: Mutex<HashMap<Uuid, keeper::MountId>>,
    /// Whether somebody tries again to take them over.
    pub retries_left: AtomicBool,
    /// None in a private daemon: its one mount ends with it.
    pub table: Option<Mutex<MountTable>>,
    pub live: Mutex<HashMap<Uuid, Live>>,
    /// Mounts that are being made.
    pub makings: AtomicUsize,
    pub fills: Mutex<HashMap<Uuid, Fill>>,
    /// Images whose mounts are being prepared: not to be swept.
    pub preparing: Mutex<Vec<ImageId>>,
    pub stop: CancellationToken,
    /// Whether the mounts stay when the daemon stops, for the one after it.
    pub leaves: AtomicBool,
    /// Commits that left, by tier and reason.
    pub evictions: Mutex<BTreeMap<(String, &'static str), u64>>,
    pub taken_over: AtomicU64,
    /// Whether the mounts of the daemon before are served.
    pub is_ready: AtomicBool,
    /// The keeper knows that too.
    pub told_ready: AtomicBool,
    /// Whether a service manager starts the keeper, so that it is waited for.
    pub keeper_comes: AtomicBool,
    /// Set where the daemon answers other nodes.
    pub peering: OnceLock<Arc<Peering>>,
    /// A tier got tight: it is swept at once.
    pub room_wanted: Arc<Notify>,
    /// Held while the daemon lives, never read; None in a private one.
    pub _lock: Option<DaemonLock>,
}

/// Gives now, in Unix milliseconds.
pub(super) fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

impl Daemon {
    /// Opens the daemon of a state directory: takes its lock and loads the mount table.
    pub async fn open(config: Config) -> Result<Self, NodeError> {
        let place = Place::open(&config.state)?;
        let Some(lock) = place.take_daemon_lock()? else {
            let pid = place.daemon_pid().map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
            return Err(NodeError::AlreadyRuns { state: config.state, pid });
        };
        let table = MountTable::load(&place.mounts())?;
        let keeper_dir = place.root().to_owned();
        Self::build(config, place, keeper_dir, Some(Mutex::new(table)), Some(lock)).await
    }

    /// Opens a private daemon, for one mount in the foreground: no lock, no socket, no table, and a
    /// keeper of its own in `keeper_dir`.
    pub async fn open_private(config: Config, keeper_dir: PathBuf) -> Result<Self, NodeError> {
        let place = Place::open(&config.state)?;
        Self::build(config, place, keeper_dir, None, None).await
    }

    async fn build(
        config: Config,
        place: Place,
        keeper_dir: PathBuf,
        table: Option<Mutex<MountTable>>,
        lock: Option<DaemonLock>,
    ) -> Result<Self, NodeError> {
        let node = place.node_id()?;
        let lake = open::open_lake(&config.lake).await?;
        let lake_health = lake.health();
        let kv = match lock {
            Some(_) => Kv::open_or_memory(place.root())?,
            // The database has one owner at a time: the state directory's daemon.
            None => Kv::in_memory(),
        };
        let inner = Inner {
            config,
            keeper_dir,
            private_dir: place.private(),
            node,
            place,
            started_ms: now_ms(),
            lake,
            lake_health,
            kv,
            catalog: OnceCell::new(),
            tiers: Mutex::default(),
            keeper: tokio::sync::Mutex::default(),
            restart: OnceLock::new(),
            left: Mutex::default(),
            retries_left: AtomicBool::new(false),
            table,
            live: Mutex::default(),
            makings: AtomicUsize::new(0),
            fills: Mutex::default(),
            preparing: Mutex::default(),
            stop: CancellationToken::new(),
            leaves: AtomicBool::new(false),
            evictions: Mutex::default(),
            taken_over: AtomicU64::new(0),
            is_ready: AtomicBool::new(false),
            told_ready: AtomicBool::new(false),
            keeper_comes: AtomicBool::new(false),
            peering: OnceLock::new(),
            room_wanted: Arc::default(),
            _lock: lock,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Gives the configuration.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Ends when the daemon is told to stop.
    pub fn stopping(&self) -> CancellationToken {
        self.inner.stop.clone()
    }

    /// Tells the daemon to stop.
    pub fn stop(&self) {
        self.inner.stop.cancel();
    }

    /// Tells the daemon to end and to leave its mounts to the next one.
    pub fn leave(&self) {
        self.inner.leaves.store(true, Ordering::Release);
        self.inner.stop.cancel();
    }

    /// Says whether the mounts stay when the daemon ends.
    pub fn leaves_mounts(&self) -> bool {
        self.inner.leaves.load(Ordering::Acquire)
    }

    /// Says who the daemon is.
    pub fn info(&self) -> NodeInfo {
        let inner = &self.inner;
        let tiers = inner.config.tier.iter().map(|(name, section)| TierInfo {
            name: name.clone(),
            path: section.path.clone(),
            default: inner.config.default_tier.as_ref() == Some(name),
            problem: None,
        });
        NodeInfo {
            api: API_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uid: nix::unistd::geteuid().as_raw(),
            node: inner.node,
            lake: inner.config.lake.url.clone(),
            endpoint: inner.config.lake.endpoint.clone(),
            lake_problem: inner.lake_health.trouble().map(|trouble| trouble.error),
            lake_problem_since_ms: inner.lake_health.trouble().map(|trouble| trouble.since_ms),
            state: inner.config.state.clone(),
            started_ms: inner.started_ms,
            tiers: tiers.collect(),
            program: own_exe(),
            ready: inner.told_ready.load(Ordering::Acquire),
        }
    }

    /// Gives the catalog; opens the lake on first need.
    pub(super) async fn catalog(&self) -> Result<&Catalog, NodeError> {
        let inner = &self.inner;
        let open = || open::open_catalog(Arc::clone(&inner.lake), &inner.config);
        Ok(inner.catalog.get_or_try_init(open).await?)
    }

    /// Gives a tier with its fetcher; opens it on first need.
    pub(super) async fn tier(&self, name: &str) -> Result<OpenTier, NodeError> {
        let cell = Arc::clone(self.inner.tiers.lock().entry(name.to_owned()).or_default());
        let opened = cell.get_or_try_init(|| self.open_tier(name.to_owned())).await?;
        Ok(opened.clone())
    }

    async fn open_tier(&self, name: String) -> Result<OpenTier, NodeError> {
        let inner = &self.inner;
        let Some(section) = inner.config.tier.get(&name).cloned() else {
            let known: Vec<&str> = inner.config.tier.keys().map(String::as_str).collect();
            return Err(NodeError::UnknownTier { name, known: known.join(", ") });
        };
        let scrub_rate = section.scrub_rate.0;
        let place = inner.place.clone();
        let label = name.clone();
        let tier = blocking("opening the tier", move || open::open_tier(&label, &section, &place)).await??;
        if inner.table.is_some() {
            super::scrub::start(tier.clone(), name.clone(), scrub_rate, inner.stop.clone());
        }
        let wanted = Arc::clone(&inner.room_wanted);
        tier.on_room_wanted(move || wanted.notify_one());
        let lake = Arc::clone(&inner.lake);
        let rt = tokio::runtime::Handle::current();
        let (kv, limits) = (inner.kv.clone(), &inner.config.fetch);
        let fetcher = open::open_fetcher(lake, Some(tier.clone()), kv, limits, rt);
        let opened = OpenTier { name, tier: Some(Arc::new(tier)), fetcher };
        self.join_peers(&opened).await;
        Ok(opened)
    }

    /// Lists the tiers that are open.
    pub(super) fn open_tiers(&self) -> Vec<OpenTier> {
        self.inner.tiers.lock().values().filter_map(|cell| cell.get().cloned()).collect()
    }
}

/// Gives this program's file; the link that still works after an upgrade has replaced it.
pub fn own_exe() -> PathBuf {
    match std::env::current_exe() {
        Ok(path) if path.exists() => path,
        _ => PathBuf::from("/proc/self/exe"),
    }
}

/// Runs what may block on a thread that may.
pub(super) async fn blocking<T: Send + 'static>(
    what: &'static str,
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NodeError> {
    tokio::task::spawn_blocking(f).await.map_err(|error| {
        tracing::error!(%error, what, "a task panicked");
        NodeError::Panicked { what }
    })
}
