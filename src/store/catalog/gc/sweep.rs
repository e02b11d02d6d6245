//! Comparing what is there with what is needed, and acting on it.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::{TryStreamExt, stream};

use crate::format::ids::CommitId;
use crate::format::pack::{Recipe, Source};
use crate::format::paths;
use crate::store::catalog::spool::{SORT_BYTES_MAX, Sorted, Sorter};
use crate::store::catalog::{Catalog, puts};
use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{LakeError, get_all};

use super::condemned::{CONDEMNED_PREFIX, CondemnedSet, Run, RunHead, list_of, list_page, rescued, run_key};
use super::mark::{Marked, USES_PREFIX, pack_stem};
use super::{GcError, GcOptions, GcReport, PendingRun, Plan, intent, ms};

/// Where immutable objects lie.
const CLASSES: [&str; 7] = ["commits/", "data/", "nodes/", "packs/", "placed/", "placements/", "trees/"];
/// How many deletions run at a time.
const PARALLEL: usize = 32;
/// Keys in one list object of a run.
const LIST_KEYS: usize = 100_000;
/// How often a sweep says that it is still alive.
const REFRESH_EVERY: Duration = Duration::from_secs(60);
const RECIPE_LEN_MAX: u64 = 1 << 30;
/// Uploads and intents of writers that are long gone are removed after this many `intent_max`.
const ABANDONED_AFTER: i32 = 7;

/// Says that a run is being swept, before anything of it is deleted.
pub(super) async fn announce(catalog: &Catalog, run: &Run) -> Result<(), GcError> {
    let key = run_key(&run.head.run, "sweeping");
    Ok(puts::put(catalog.lake.as_ref(), &key, catalog.by.clone().into()).await?)
}

/// Takes the announcement back: nothing was deleted.
pub(super) async fn renounce(catalog: &Catalog, run: &Run) -> Result<(), GcError> {
    Ok(catalog.lake.delete(&run_key(&run.head.run, "sweeping")).await?)
}

/// An object of the lake that nothing refers to.
#[derive(Debug)]
struct Dead<'a> {
    key: &'a str,
    size: u64,
    modified_ms: i64,
}

/// Compares, condemns, deletes.
pub(super) async fn compare_and_act(
    catalog: &Catalog,
    options: &GcOptions,
    plan: &Plan,
    marked: Marked,
    spool: &Path,
) -> Result<GcReport, GcError> {
    let mut report = GcReport { live: marked.counts, ..GcReport::default() };
    let known = CondemnedSet::load(&catalog.lake).await?;
    let mut sorter = Sorter::new(spool, SORT_BYTES_MAX);
    for class in CLASSES {
        list_into(catalog, class, &mut sorter, &mut report).await?;
    }
    let mut verdicts = Verdicts {
        plan,
        known,
        due: DueKeys::open(catalog, plan.due.clone()).await?,
        condemn: Sorter::new(spool, SORT_BYTES_MAX),
        delete: Sorter::new(spool, SORT_BYTES_MAX),
        report,
    };
    let mut live = marked.keys.finish().map_err(GcError::Spool)?;
    let mut needed = next_key(&mut live).map_err(GcError::Spool)?;
    for record in sorter.finish().map_err(GcError::Spool)? {
        let (key, value) = record.map_err(GcError::Spool)?;
        let key = String::from_utf8_lossy(&key);
        while needed.as_deref().is_some_and(|needed| needed < pack_stem(&key)) {
            needed = next_key(&mut live).map_err(GcError::Spool)?;
        }
        if needed.as_deref() == Some(pack_stem(&key)) {
            continue;
        }
        let (size, modified_ms) = decode_meta(&value);
        verdicts.judge(catalog, &Dead { key: &key, size, modified_ms }).await?;
    }
    let Verdicts { condemn, delete, mut report, .. } = verdicts;
    if options.delete {
        markers(catalog, plan, &marked.commits).await?;
        if let Some(due) = &plan.due {
            delete_all(catalog, due, delete).await?;
            end_run(catalog, due).await?;
        }
        condemn_all(catalog, plan, condemn, &report).await?;
    }
    pending(catalog, options, plan, &mut report).await?;
    Ok(report)
}

fn next_key(sorted: &mut Sorted) -> io::Result<Option<String>> {
    let Some(record) = sorted.next().transpose()? else {
        return Ok(None);
    };
    Ok(Some(String::from_utf8_lossy(&record.0).into_owned()))
}

fn encode_meta(size: u64, modified_ms: i64) -> [u8; 16] {
    let mut bytes = [0; 16];
    let (size_bytes, time_bytes) = bytes.split_at_mut(8);
    size_bytes.copy_from_slice(&size.to_le_bytes());
    time_bytes.copy_from_slice(&modified_ms.to_le_bytes());
    bytes
}

fn decode_meta(bytes: &[u8]) -> (u64, i64) {
    let number = |part: Option<&[u8]>| part.and_then(|part| <[u8; 8]>::try_from(part).ok()).unwrap_or_default();
    let size = u64::from_le_bytes(number(bytes.get(..8)));
    (size, i64::from_le_bytes(number(bytes.get(8..16))))
}

async fn list_into(catalog: &Catalog, prefix: &str, sorter: &mut Sorter, report: &mut GcReport) -> Result<(), GcError> {
    let mut page = None;
    loop {
        let listed = list_page(catalog.lake.as_ref(), prefix, page).await?;
        for object in listed.objects {
            report.listed.add(object.size);
            let value = encode_meta(object.size, object.modified_ms);
            sorter.push(object.key.as_bytes(), &value).map_err(GcError::Spool)?;
        }
        page = listed.next;
        if page.is_none() {
            return Ok(());
        }
    }
}

/// The keys of the due run, in order, and what writers rescued of them.
struct DueKeys {
    run: Option<Run>,
    next_list: u64,
    keys: std::vec::IntoIter<String>,
    current: Option<String>,
    rescued: HashSet<String>,
}

impl DueKeys {
    async fn open(catalog: &Catalog, run: Option<Run>) -> Result<Self, GcError> {
        let mut due = Self { next_list: 0, keys: Vec::new().into_iter(), current: None, rescued: HashSet::new(), run };
        if let Some(run) = due.run.clone() {
            due.rescued = with_data(catalog, rescued(catalog.lake.as_ref(), &run).await?).await?;
            due.advance(catalog).await?;
        }
        Ok(due)
    }

    async fn advance(&mut self, catalog: &Catalog) -> Result<(), GcError> {
        loop {
            self.current = self.keys.next();
            let Some(run) = self.run.as_ref().filter(|_| self.current.is_none()) else {
                return Ok(());
            };
            if self.next_list >= run.head.lists {
                return Ok(());
            }
            let keys = list_of(catalog.lake.as_ref(), run, self.next_list).await?;
            self.next_list += 1;
            self.keys = keys.into_iter();
        }
    }

    /// Says whether the run names the key. Keys are asked for in order.
    async fn names(&mut self, catalog: &Catalog, key: &str) -> Result<bool, GcError> {
        while self.current.as_deref().is_some_and(|current| current < key) {
            self.advance(catalog).await?;
        }
        Ok(self.current.as_deref() == Some(key))
    }
}

/// Adds the data of rescued packs: a writer names the pack only.
async fn with_data(catalog: &Catalog, mut rescued: HashSet<String>) -> Result<HashSet<String>, GcError> {
    let stems: Vec<String> = rescued.iter().filter(|key| key.starts_with("packs/")).cloned().collect();
    for stem in stems {
        let bytes = match get_all(catalog.lake.as_ref(), &format!("{stem}.recipe"), RECIPE_LEN_MAX).await {
            Ok(bytes) => bytes,
            Err(LakeError::NotFound { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        if let Ok(Recipe { source: Source::Native { key }, .. }) = Recipe::decode(&bytes) {
            rescued.insert(paths::data_key(&key));
        }
    }
    Ok(rescued)
}

/// Where each dead object goes.
struct Verdicts<'a> {
    plan: &'a Plan,
    known: CondemnedSet,
    due: DueKeys,
    condemn: Sorter,
    delete: Sorter,
    report: GcReport,
}

impl Verdicts<'_> {
    async fn judge(&mut self, catalog: &Catalog, dead: &Dead<'_>) -> Result<(), GcError> {
        if self.due.names(catalog, dead.key).await? {
            let condemned_ms = self.plan.due.as_ref().map_or(i64::MIN, |due| due.condemned_ms);
            // Put again since (stores count in seconds, so perhaps in the same one), or rescued: it
            // gets another wait.
            if dead.modified_ms >= condemned_ms || self.due.rescued.contains(pack_stem(dead.key)) {
                self.report.rescued.add(dead.size);
                return Ok(());
            }
            self.report.deleted.add(dead.size);
            let key = [&[order(dead.key)], dead.key.as_bytes()].concat();
            return self.delete.push(&key, b"").map_err(GcError::Spool);
        }
        if self.known.contains(dead.key) {
            return Ok(());
        }
        if dead.modified_ms >= self.plan.cutoff_ms {
            self.report.young.add(dead.size);
            return Ok(());
        }
        self.report.condemned.add(dead.size);
        self.condemn.push(dead.key.as_bytes(), &encode_meta(dead.size, 0)).map_err(GcError::Spool)
    }
}

/// What refers goes before what it refers to; a pack's recipe before its other parts.
fn order(key: &str) -> u8 {
    match key.split('/').next() {
        Some("commits") => 0,
        Some("placements") => 1,
        Some("trees") => 2,
        Some("placed") => 3,
        Some("nodes") => 4,
        Some("packs") if key.ends_with(".recipe") => 5,
        Some("packs") => 6,
        _ => 7,
    }
}

/// Deletes, class after class; says meanwhile that it is alive.
async fn delete_all(catalog: &Catalog, due: &Run, delete: Sorter) -> Result<(), GcError> {
    let mut keys = delete.finish().map_err(GcError::Spool)?.peekable();
    let mut refreshed = Instant::now();
    while let Some(first) = keys.peek() {
        let class = first.as_ref().ok().and_then(|record| record.0.first().copied());
        let same = |record: &io::Result<(Vec<u8>, Vec<u8>)>| match record {
            Ok((key, _)) => key.first().copied() == class,
            Err(_) => true,
        };
        let mut batch = Vec::new();
        while let Some(record) = keys.next_if(|record| batch.len() < 10_000 && same(record)) {
            let (key, _) = record.map_err(GcError::Spool)?;
            let key = key.get(1..).unwrap_or_default();
            batch.push(String::from_utf8_lossy(key).into_owned());
        }
        delete_keys(catalog, batch).await?;
        if refreshed.elapsed() > REFRESH_EVERY {
            refreshed = Instant::now();
            announce(catalog, due).await?;
        }
    }
    Ok(())
}

async fn delete_keys(catalog: &Catalog, keys: Vec<String>) -> Result<(), GcError> {
    stream::iter(keys.into_iter().map(Ok::<_, LakeError>))
        .try_for_each_concurrent(PARALLEL, |key| async move {
            catalog.meta.forget(&key);
            with_retry(&RetryPolicy::default(), || catalog.lake.delete(&key)).await
        })
        .await?;
    Ok(())
}

/// Removes the markers of commits that the due run deletes, so that no dataset names them.
async fn markers(catalog: &Catalog, plan: &Plan, live: &HashSet<CommitId>) -> Result<(), GcError> {
    let Some(due) = &plan.due else { return Ok(()) };
    let mut condemned = HashSet::new();
    for n in 0..due.head.lists {
        let keys = list_of(catalog.lake.as_ref(), due, n).await?;
        let commits = keys.iter().filter_map(|key| key.strip_prefix("commits/"));
        let ids = commits.filter_map(|rest| rest.rsplit('/').next()?.parse::<CommitId>().ok());
        condemned.extend(ids.filter(|commit| !live.contains(commit)));
    }
    let rescued = rescued(catalog.lake.as_ref(), due).await?;
    condemned.retain(|commit| !rescued.contains(&paths::commit_key(commit)));
    if condemned.is_empty() {
        return Ok(());
    }
    for dataset in catalog.refs.datasets().await? {
        for commit in catalog.refs.commits(&dataset, "").await? {
            if condemned.contains(&commit) {
                catalog.refs.remove_commit(&dataset, &commit).await?;
            }
        }
    }
    Ok(())
}

/// Ends a run: its head first, so that it counts no more; the announcement last.
async fn end_run(catalog: &Catalog, run: &Run) -> Result<(), GcError> {
    let prefix = run_key(&run.head.run, "");
    catalog.lake.delete(&format!("{prefix}head")).await?;
    remove_below(catalog, &prefix, |key| !key.ends_with("/sweeping")).await?;
    Ok(catalog.lake.delete(&format!("{prefix}sweeping")).await?)
}

async fn remove_below(catalog: &Catalog, prefix: &str, which: impl Fn(&str) -> bool) -> Result<(), GcError> {
    let mut page = None;
    loop {
        let listed = list_page(catalog.lake.as_ref(), prefix, page).await?;
        let keys = listed.objects.into_iter().map(|object| object.key);
        delete_keys(catalog, keys.filter(|key| which(key)).collect()).await?;
        page = listed.next;
        if page.is_none() {
            return Ok(());
        }
    }
}

/// Writes the lists of a new run, and its head last.
async fn condemn_all(catalog: &Catalog, plan: &Plan, condemn: Sorter, report: &GcReport) -> Result<(), GcError> {
    let lake = catalog.lake.as_ref();
    let mut lists = 0;
    let mut text = String::new();
    let mut held = 0;
    let list_key = |n: u64| run_key(&plan.run, &format!("list/{n:08}"));
    for record in condemn.finish().map_err(GcError::Spool)? {
        let (key, _) = record.map_err(GcError::Spool)?;
        text.push_str(&String::from_utf8_lossy(&key));
        text.push('\n');
        held += 1;
        if held == LIST_KEYS {
            puts::put(lake, &list_key(lists), std::mem::take(&mut text).into()).await?;
            (lists, held) = (lists + 1, 0);
        }
    }
    if held > 0 {
        puts::put(lake, &list_key(lists), text.into()).await?;
        lists += 1;
    }
    if lists == 0 {
        return Ok(());
    }
    let head = RunHead {
        format: 1,
        run: plan.run.clone(),
        by: catalog.by.clone(),
        lists,
        keys: report.condemned.objects,
        bytes: report.condemned.bytes,
    };
    let bytes = serde_json::to_vec(&head).expect("a head is plain data");
    Ok(puts::put(lake, &run_key(&plan.run, "head"), bytes.into()).await?)
}

/// Says which runs wait.
async fn pending(catalog: &Catalog, options: &GcOptions, plan: &Plan, report: &mut GcReport) -> Result<(), GcError> {
    let runs = match options.delete {
        true => super::condemned::runs(catalog.lake.as_ref()).await?,
        false => plan.pending.clone(),
    };
    report.pending = runs
        .into_iter()
        .map(|run| PendingRun {
            due_ms: run.condemned_ms.saturating_add(ms(options.wait)),
            condemned_ms: run.condemned_ms,
            objects: run.head.keys,
            bytes: run.head.bytes,
            run: run.head.run,
        })
        .collect();
    Ok(())
}

/// Removes what writers and gcs that are long gone left: intents, use markers, uploads, half runs.
pub(super) async fn tidy(catalog: &Catalog, options: &GcOptions, plan: &Plan) -> Result<(), GcError> {
    let abandoned_ms = plan.now_ms - ms(options.intent_max * ABANDONED_AFTER.unsigned_abs());
    for seen in intent::list(catalog.lake.as_ref()).await? {
        if seen.refreshed_ms < abandoned_ms {
            catalog.lake.delete(&seen.key).await?;
        }
    }
    let uses_ms = plan.now_ms - 2 * ms(options.uses_max);
    remove_older(catalog, USES_PREFIX, uses_ms, |_| true).await?;
    // Runs without a head never counted, or ended.
    let counting: HashSet<String> = super::condemned::runs(catalog.lake.as_ref())
        .await?
        .into_iter()
        .map(|run| run_key(&run.head.run, ""))
        .collect();
    let orphan = |key: &str| !counting.iter().any(|prefix| key.starts_with(prefix));
    remove_older(catalog, CONDEMNED_PREFIX, abandoned_ms, orphan).await?;
    for running in catalog.lake.list_uploads("data/").await? {
        if running.begun_ms < abandoned_ms {
            catalog.lake.upload_abort(&running.upload).await?;
        }
    }
    Ok(())
}

async fn remove_older(
    catalog: &Catalog,
    prefix: &str,
    before_ms: i64,
    which: impl Fn(&str) -> bool,
) -> Result<(), GcError> {
    let mut page = None;
    loop {
        let listed = list_page(catalog.lake.as_ref(), prefix, page).await?;
        let old = listed.objects.into_iter().filter(|object| object.modified_ms < before_ms);
        let keys = old.map(|object| object.key).filter(|key| which(key)).collect();
        delete_keys(catalog, keys).await?;
        page = listed.next;
        if page.is_none() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_refers_is_deleted_before_what_it_refers_to() {
        let mut keys = [
            "data/x",
            "packs/ab/c.index",
            "packs/ab/c.recipe",
            "nodes/ab/c",
            "placed/ab/c",
            "trees/ab/c",
            "placements/t/p",
            "commits/ab/c",
        ];
        keys.sort_by_key(|key| order(key));
        assert_eq!(keys.first(), Some(&"commits/ab/c"));
        assert_eq!(keys.last(), Some(&"data/x"));
        let at = |part: &str| keys.iter().position(|key| key.ends_with(part)).unwrap();
        assert!(at(".recipe") < at(".index"));
    }

    #[test]
    fn sizes_and_times_survive_the_spool() {
        assert_eq!(decode_meta(&encode_meta(u64::MAX, -5)), (u64::MAX, -5));
    }
}
