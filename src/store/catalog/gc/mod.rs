//! Garbage collection: condemn what nothing refers to, wait, look again, delete.
//!
//! ```text
//! begin: the store's clock -> intents -> [sweeping of a due run] -> mark -> list -> compare
//!   dead, and in the due run        -> deleted now, references before what they refer to
//!   dead, old enough, in no run     -> a new run: condemned, deleted by a gc after the wait
//! ```
//!
//! * [`mark`]: what is needed. * [`intent`]: who writes now. * [`condemned`]: runs, and how a writer
//!   saves what it needs of them. * [`sweep`]: comparing and deleting.
//!
//! What keeps a concurrent push safe: objects newer than the start of a running push are never
//! condemned; a push that began before the run was condemned stops the sweep; one that began later knows the run
//! and rescues what it needs. What a crash leaves is garbage that the next gc finds: nothing that is
//! referred to is ever touched, and a commit's marker goes before what it names.

use std::path::Path;
use std::time::Duration;

use crate::format::codec::DecodeError;
use crate::format::ids::{CommitId, PackId};
use crate::store::catalog::refs::RefError;
use crate::store::catalog::{Catalog, CatalogError, puts};
use crate::store::lake::LakeError;
use crate::store::meta::MetaError;

pub mod condemned;
pub mod intent;
mod mark;
mod sweep;

pub use condemned::{CondemnedSet, Relied};
pub use mark::LiveCounts;

use condemned::{Run, run_key};
use intent::SeenIntent;

/// Clocks of writers may differ from the store's by this much.
const SKEW: Duration = Duration::from_secs(3600);
/// A store's times may be cut to whole seconds.
const STORE_TICK: Duration = Duration::from_secs(2);

/// How careful a gc is.
#[derive(Debug, Clone)]
pub struct GcOptions {
    /// False: only says what would be done.
    pub delete: bool,
    /// How long what was condemned is left alone: longer than any push takes.
    pub wait: Duration,
    /// An intent that was not refreshed for so long is of a dead push.
    pub intent_max: Duration,
    /// A commit that a node said to have mounted within this time is needed.
    pub uses_max: Duration,
}

impl Default for GcOptions {
    fn default() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self { delete: false, wait: day, intent_max: day, uses_max: 7 * day }
    }
}

/// Keys and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Amount {
    pub objects: u64,
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// A run that waits.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PendingRun {
    pub run: String,
    pub condemned_ms: i64,
    pub due_ms: i64,
    pub objects: u64,
    pub bytes: u64,
}

/// What a gc found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct GcReport {
    /// Whether anything was written or deleted.
    pub acted: bool,
    pub live: LiveCounts,
    pub listed: Amount,
    /// Dead and old enough, in no run yet: condemned now (or would be).
    pub condemned: Amount,
    /// Dead, but not old enough, or perhaps of a running push.
    pub young: Amount,
    /// Deleted now (or would be).
    pub deleted: Amount,
    /// Condemned, but needed again.
    pub rescued: Amount,
    /// Runs that wait, this one's included.
    pub pending: Vec<PendingRun>,
    /// Pushes that began before the due run was condemned: it was left alone.
    pub blocked_by: Vec<String>,
}

/// Why a gc stopped. Nothing that is needed was deleted.
#[derive(Debug, thiserror::Error)]
pub enum GcError {
    #[error("commit {commit} is needed, but cannot be read, so nothing is deleted; mend it, or remove the refs to it")]
    Broken {
        commit: CommitId,
        #[source]
        source: MetaError,
    },
    #[error("the recipe of pack {pack} cannot be read, so nothing is deleted; use a newer larder, or mend it")]
    Recipe {
        pack: PackId,
        #[source]
        source: DecodeError,
    },
    #[error("cannot use the spool directory below the state directory")]
    Spool(#[source] std::io::Error),
    #[error("cannot read or write the lake")]
    Lake(#[from] LakeError),
    #[error(transparent)]
    Refs(#[from] RefError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

fn ms(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// What a gc goes by, fixed at its beginning.
#[derive(Debug)]
struct Plan {
    run: String,
    /// The store's clock.
    now_ms: i64,
    /// Nothing newer is condemned.
    cutoff_ms: i64,
    pending: Vec<Run>,
    /// The oldest run whose wait is over.
    due: Option<Run>,
    blocked_by: Vec<String>,
}

/// Looks what nothing refers to; with `delete` condemns it, and deletes what waited long enough.
pub async fn gc(catalog: &Catalog, options: &GcOptions) -> Result<GcReport, GcError> {
    let spool = catalog.state_dir.join("spool");
    std::fs::create_dir_all(&spool).map_err(GcError::Spool)?;
    let mut plan = begin(catalog, options).await?;
    let result = collect(catalog, options, &mut plan, &spool).await;
    if options.delete {
        let key = run_key(&plan.run, "begin");
        catalog.lake.delete(&key).await?;
    }
    result
}

async fn collect(catalog: &Catalog, options: &GcOptions, plan: &mut Plan, spool: &Path) -> Result<GcReport, GcError> {
    if let (true, Some(due)) = (options.delete, plan.due.clone()) {
        sweep::announce(catalog, &due).await?;
        // Only now: a push whose intent is not seen here sees the announcement.
        plan.blocked_by = blocking(catalog, options, plan, &due).await?;
        if !plan.blocked_by.is_empty() {
            sweep::renounce(catalog, &due).await?;
            plan.due = None;
        }
    }
    let marked = mark::mark(catalog, plan.now_ms - ms(options.uses_max), spool).await?;
    let mut report = sweep::compare_and_act(catalog, options, plan, marked, spool).await?;
    report.blocked_by = plan.blocked_by.clone();
    report.acted = options.delete;
    if options.delete {
        sweep::tidy(catalog, options, plan).await?;
    }
    Ok(report)
}

async fn begin(catalog: &Catalog, options: &GcOptions) -> Result<Plan, GcError> {
    let lake = catalog.lake.as_ref();
    let run = uuid::Uuid::now_v7().simple().to_string();
    let now_ms = if options.delete {
        let key = run_key(&run, "begin");
        puts::put(lake, &key, catalog.by.clone().into()).await?;
        // From a listing, as all times here: some stores give a HEAD whole seconds only.
        let listed = condemned::list_page(lake, &key, None).await?;
        let local = jiff::Timestamp::now().as_millisecond();
        let at = listed.objects.first();
        at.map_or(local, |object| object.modified_ms)
    } else {
        jiff::Timestamp::now().as_millisecond()
    };
    let pending = condemned::runs(lake).await?;
    let intents = intent::list(lake).await?;
    let started = alive(&intents, options, now_ms).map(|intent| intent.start_ms);
    let oldest = started.min().map_or(i64::MAX, |start| start.saturating_sub(ms(SKEW)));
    let young = ms(options.wait.min(SKEW));
    let due = pending.iter().find(|run| run.condemned_ms + ms(options.wait) <= now_ms).cloned();
    Ok(Plan { run, now_ms, cutoff_ms: oldest.min(now_ms - young), pending, due, blocked_by: Vec::new() })
}

fn alive<'a>(intents: &'a [SeenIntent], options: &GcOptions, now_ms: i64) -> impl Iterator<Item = &'a SeenIntent> {
    let since = now_ms - ms(options.intent_max);
    intents.iter().filter(move |intent| intent.refreshed_ms >= since)
}

/// Names the writers that may not know the run: they began before it was condemned.
async fn blocking(catalog: &Catalog, options: &GcOptions, plan: &Plan, due: &Run) -> Result<Vec<String>, GcError> {
    let intents = intent::list(catalog.lake.as_ref()).await?;
    let skew = SKEW.min(options.wait).max(STORE_TICK);
    let before = due.condemned_ms.saturating_add(ms(skew));
    Ok(alive(&intents, options, plan.now_ms)
        .filter(|intent| intent.start_ms <= before)
        .map(|intent| format!("{} by {}", intent.dataset, intent.by))
        .collect())
}

#[cfg(test)]
mod tests;
