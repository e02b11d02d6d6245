//! A push from beginning to end, as numbered steps.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use tokio::runtime::Handle;

use crate::format::pack::Layout;
use crate::format::paths::{PackPart, pack_key};
use crate::format::placement::{PackUse, PlacementRoot};
use crate::format::tree::TreeRoot;
use crate::format::tree::build::Built;
use crate::store::catalog::Catalog;
use crate::store::catalog::gc::{CondemnedSet, Relied};

use super::build::{self, Build};
use super::commit::{self, Committed, Target};
use super::contents::{self, Found, Message, Work};
use super::error::{AtPath, Problem, ProblemKind, PushError};
use super::exclude::Excludes;
use super::index::{Index, OpenError, PackState, WalkedRow};
use super::intent::{Intent, IntentBody, now_ms};
use super::packs::Packs;
use super::places::Places;
use super::progress::{Phase, Progress, add, get};
use super::reuse::{self, History};
use super::spool::{Spool, Totals};
use super::sys;
use super::upload::Uploads;
use super::walk::{self, Walked};
use super::{PushOptions, PushOutcome, onto, recover};

/// Blocks that an unfinished push sent so long ago may have been collected: they are sent again.
const BLOCKS_STALE_MS: i64 = 6 * 3600 * 1000;
/// How long a push that failed waits for uploads that still run.
const QUIESCE_PATIENCE: Duration = Duration::from_secs(3);
/// Parts that may be on their way at least: fewer would stop large files that wait for each other.
const PARTS_IN_FLIGHT_MIN: u64 = 8;

/// What a push works with.
struct Session<'a> {
    catalog: &'a Catalog,
    rt: &'a Handle,
    options: &'a PushOptions,
    progress: &'a Arc<Progress>,
    /// Absolute.
    dir: PathBuf,
    scratch: PathBuf,
    index: Index,
    packs: Packs,
    uploads: Uploads,
    reports: Sender<Message>,
    messages: Receiver<Message>,
    generation: u64,
}

/// Pushes a directory. Blocks its caller, which must be a plain thread (`spawn_blocking` of a
/// multi-thread runtime, or outside of any); uploads run on `rt`.
pub fn push(
    catalog: &Catalog,
    rt: &Handle,
    options: &PushOptions,
    progress: &Arc<Progress>,
) -> Result<PushOutcome, PushError> {
    let begun = Instant::now();
    let excludes = Excludes::new(&options.excludes)?;
    // 1. This node's memory of the directory; a second push at once stops here.
    let mut session = Session::open(catalog, rt, options, progress)?;
    // 2. Say so in the lake, before anything is looked up that gc could take.
    let intent = session.begin_intent()?;
    // 3. Where it goes, what an earlier push left, what history offers.
    let target = rt.block_on(Target::find(catalog, options))?;
    session.learn(&target)?;
    // 4. Names.
    progress.enter(Phase::Walking);
    let walked = walk::walk(&session.dir, &session.scratch, &excludes, progress)?;
    if let Err(error) = check_problems(&walked.problems, options) {
        rt.block_on(intent.end())?;
        return Err(error);
    }
    // 5. Contents, and blocks of the tree, unless the walk saw just what the last push saw.
    let fingerprint = walked.spool.fingerprint().to_hex().to_string();
    let Walked { spool, mut problems, xattrs_dropped } = walked;
    let stored = match session.unchanged(&fingerprint, &spool.totals, &problems, &target)? {
        Some(stored) => stored,
        None => session.store(spool, &target, &mut problems)?,
    };
    // 6. Roots, commit, refs.
    progress.enter(Phase::Committing);
    session.look_again(&stored.built)?;
    let (built, moved) = (&stored.built, stored.rewritten);
    let made = rt.block_on(commit::commit(catalog, &session.uploads, options, &target, built, moved))?;
    session.settle(&made, &stored, fingerprint, &problems)?;
    rt.block_on(intent.end())?;
    session.forget_push()?;
    progress.enter(Phase::Done);
    let mut outcome = session.outcome(&target, &made, &stored);
    outcome.skipped = problems;
    outcome.xattrs_dropped = xattrs_dropped + stored.found.xattrs_dropped;
    outcome.elapsed_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(outcome)
}

/// Fails where something changed, or cannot be read and may not be left out.
fn check_problems(problems: &[Problem], options: &PushOptions) -> Result<(), PushError> {
    let changed: Vec<Problem> =
        problems.iter().filter(|problem| problem.kind == ProblemKind::Changed).cloned().collect();
    let may_go = |problem: &Problem| {
        let is_left_out = options.skip_unreadable || (options.skip_special && problem.kind.is_special());
        is_left_out || problem.kind == ProblemKind::Changed
    };
    if !problems.iter().all(may_go) {
        return Err(PushError::Problems { problems: problems.to_vec() });
    }
    if !changed.is_empty() {
        return Err(PushError::Changed { problems: changed });
    }
    Ok(())
}

/// Gives the index's file for a directory and dataset.
fn index_path(catalog: &Catalog, dir: &Path, options: &PushOptions) -> PathBuf {
    let mut hasher = blake3::Hasher::new();
    hasher.update(options.dataset.as_str().as_bytes());
    hasher.update(&[0]);
    hasher.update(std::os::unix::ffi::OsStrExt::as_bytes(dir.as_os_str()));
    let name = hasher.finalize().to_hex();
    let name = name.get(..32).unwrap_or(&name);
    catalog.state_dir.join("push").join(catalog.lake_id.to_string()).join(format!("{name}.redb"))
}

impl<'a> Session<'a> {
    fn open(
        catalog: &'a Catalog,
        rt: &'a Handle,
        options: &'a PushOptions,
        progress: &'a Arc<Progress>,
    ) -> Result<Self, PushError> {
        progress.enter(Phase::Opening);
        let dir = std::fs::canonicalize(&options.dir).at(&options.dir)?;
        let path = index_path(catalog, &dir, options);
        let scratch = path.parent().map_or_else(|| catalog.state_dir.clone(), Path::to_owned);
        let mut index = Index::open(&path).map_err(|error| match error {
            OpenError::Busy => {
                PushError::Busy { dir: dir.clone(), dataset: options.dataset.as_str().to_owned(), index: path.clone() }
            }
            OpenError::Other(error) => error,
        })?;
        let generation = index.meta("generation")?.and_then(|text| text.parse().ok()).unwrap_or(0u64) + 1;
        index.set_meta("generation", Some(&generation.to_string()))?;
        let packs = Packs::load(&index)?;
        let (reports, messages) = crossbeam_channel::unbounded();
        let tuning = &options.tuning;
        let in_flight = tuning.upload_bytes.max(tuning.part_bytes * PARTS_IN_FLIGHT_MIN);
        let uploads = Uploads::new(catalog.lake.clone(), rt.clone(), progress.clone(), in_flight, reports.clone());
        Ok(Self { catalog, rt, options, progress, dir, scratch, index, packs, uploads, reports, messages, generation })
    }

    fn begin_intent(&mut self) -> Result<Intent, PushError> {
        let now = now_ms();
        let push = match self.index.meta("push_id")? {
            Some(push) => push,
            None => {
                let push = uuid::Uuid::now_v7().simple().to_string();
                self.index.set_meta("push_id", Some(&push))?;
                self.index.set_meta("push_start_ms", Some(&now.to_string()))?;
                push
            }
        };
        let start_ms = self.index.meta("push_start_ms")?.and_then(|text| text.parse().ok()).unwrap_or(now);
        if now - start_ms > BLOCKS_STALE_MS {
            self.index.forget_blocks()?;
        }
        self.index.commit()?;
        let dataset = self.options.dataset.as_str().to_owned();
        let by = self.options.author.clone();
        let body = IntentBody { format: 1, push, dataset, by, start_ms, refreshed_ms: now };
        Ok(self.rt.block_on(Intent::begin(self.catalog.lake.clone(), self.rt, body))?)
    }

    /// Finishes what an earlier push left, and learns which packs of history may be used.
    fn learn(&mut self, target: &Target) -> Result<(), PushError> {
        let set = self.rt.block_on(CondemnedSet::load(&self.catalog.lake))?;
        self.uploads.know_condemned(set.clone());
        let condemned = |key: &str| set.contains(key);
        recover::recover(&mut self.index, &mut self.packs, &self.uploads, &condemned)?;
        let mut history = History::default();
        for snapshot in target.base.iter().chain(&target.other) {
            history.add(snapshot);
            self.rt.block_on(history.add_ancestors(self.catalog, &snapshot.dataset, snapshot));
        }
        match self.index.blocks_of()? {
            Some(commit) if !history.commits.contains(&commit) => self.index.forget_blocks()?,
            _ => {}
        }
        self.rt.block_on(history.learn(self.catalog, &mut self.index, &mut self.packs, &condemned))
    }

    /// Merges the walked names with those of the commit that is pushed onto.
    fn merge(&self, spool: Spool, target: &Target) -> Result<Spool, PushError> {
        let (Some(onto), Some(base)) = (&self.options.onto, &target.base) else {
            return Ok(spool);
        };
        onto::merge(self.rt, &self.catalog.meta, base, &spool, onto.at.as_deref(), &self.scratch)
    }

    /// Gives where the pushed directory lies in the tree: its path and `/`, or nothing.
    fn prefix(&self) -> Result<Vec<u8>, PushError> {
        let Some(at) = self.options.onto.as_ref().and_then(|onto| onto.at.as_deref()) else {
            return Ok(Vec::new());
        };
        let mut prefix = onto::names_of(at)?.make_contiguous().join(&b'/');
        prefix.push(b'/');
        Ok(prefix)
    }

    /// Gives the parent's tree where the walk saw just what it was made of: then no file needs to be
    /// looked up, and no block to be built.
    fn unchanged(
        &mut self,
        fingerprint: &str,
        totals: &Totals,
        problems: &[Problem],
        target: &Target,
    ) -> Result<Option<Stored>, PushError> {
        let (Some(base), [parent], None, []) = (&target.base, target.parents.as_slice(), &self.options.onto, problems)
        else {
            return Ok(None);
        };
        let Some(row) = self.index.walked()? else {
            return Ok(None);
        };
        let is_same = row.fingerprint == fingerprint
            && row.tree == base.commit_body.tree
            && self.index.blocks_of()? == Some(*parent);
        let recipe = |used: &PackUse| pack_key(&used.pack, PackPart::Recipe);
        if !is_same || base.placement.packs.iter().any(|used| self.uploads.is_condemned(&recipe(used))) {
            return Ok(None);
        }
        self.generation = row.generation;
        add(&self.progress.files_done, totals.walked_files);
        add(&self.progress.bytes_done, totals.bytes);
        let found = Found { xattrs_dropped: row.xattrs_dropped, ..Found::default() };
        let built = Built {
            tree: base.commit_body.tree,
            root: TreeRoot::clone(&base.root),
            placement: PlacementRoot::clone(&base.placement),
        };
        Ok(Some(Stored { built, found, rewritten: false }))
    }

    /// Stores contents, then blocks of tree and placement.
    fn store(&mut self, spool: Spool, target: &Target, problems: &mut Vec<Problem>) -> Result<Stored, PushError> {
        let spool = self.merge(spool, target)?;
        self.progress.enter(Phase::Contents);
        let mut places = Places::create(&self.scratch)?;
        let contents = self.contents(&spool, &mut places)?;
        problems.extend(contents.found.problems.iter().cloned());
        check_problems(problems, self.options)?;
        self.progress.enter(Phase::Building);
        let built = self.build(&spool, &mut places, &contents, target)?;
        Ok(Stored { built, found: contents.found, rewritten: contents.rewritten })
    }

    fn contents(&mut self, spool: &Spool, places: &mut Places) -> Result<Contents, PushError> {
        let layout = self.options.tuning.layout.unwrap_or_else(|| Layout::for_bytes(spool.totals.bytes));
        let found = self.contents_pass(spool, places, layout, None)?;
        let mut contents = Contents { found, rewritten: false };
        if self.options.onto.is_some() || !contents.found.problems.is_empty() {
            return Ok(contents);
        }
        let tallies = reuse::tally(places, spool.totals.walked_files, &self.packs, &mut self.index)?;
        let rewrite = reuse::plan_rewrite(&tallies, layout.pack_len);
        if !rewrite.is_empty() {
            tracing::info!(packs = rewrite.len(), "packs that are mostly unused, or small and many, are written again");
            let again = self.contents_pass(spool, places, layout, Some(&rewrite))?;
            contents.found.problems.extend(again.problems);
            contents.found.unsettled |= again.unsettled;
            contents.rewritten = true;
        }
        Ok(contents)
    }

    fn contents_pass(
        &mut self,
        spool: &Spool,
        places: &mut Places,
        layout: Layout,
        rewrite: Option<&HashSet<u32>>,
    ) -> Result<Found, PushError> {
        let root = sys::open_root(&self.dir).at(&self.dir)?;
        let prefix = self.prefix()?;
        let mut work = Work {
            spool,
            index: &mut self.index,
            packs: &mut self.packs,
            places,
            uploads: &self.uploads,
            messages: &self.messages,
            progress: self.progress,
            tuning: &self.options.tuning,
            layout,
            skip_unreadable: self.options.skip_unreadable,
            prefix: &prefix,
            rewrite,
        };
        let mut found = contents::run(&mut work, &root, &self.reports);
        if found.is_err() {
            // So that the next push can go on with what arrived.
            self.rt.block_on(self.uploads.quiesce(QUIESCE_PATIENCE));
            while let Ok(message) = self.messages.try_recv() {
                match message {
                    // What a writer met was only the echo of this.
                    Message::Failed(cause) if matches!(found, Err(PushError::Thread)) => {
                        found = Err(cause);
                    }
                    message => contents::note(&mut self.index, &mut self.packs, message)?,
                }
            }
            self.index.commit()?;
        }
        found
    }

    fn build(
        &mut self,
        spool: &Spool,
        places: &mut Places,
        contents: &Contents,
        target: &Target,
    ) -> Result<Built, PushError> {
        let base = target.base.as_ref().filter(|_| self.options.onto.is_some());
        build::run(Build {
            base_packs: base.map_or(&[], |base| &base.placement.packs),
            spool,
            places,
            packs: &self.packs,
            index: &mut self.index,
            uploads: &self.uploads,
            meta: &self.catalog.meta,
            dropped_firsts: &contents.found.dropped_firsts,
            generation: self.generation,
        })
    }

    /// Looks once more whether gc condemned something that this push refers to but did not make:
    /// from now on it would see the commit, before it might not.
    fn look_again(&mut self, built: &Built) -> Result<(), PushError> {
        let set = self.rt.block_on(CondemnedSet::load(&self.catalog.lake))?;
        if set.is_empty() {
            return Ok(());
        }
        let packs = built.placement.packs.iter().map(|used| pack_key(&used.pack, PackPart::Recipe));
        let blocks = self.index.blocks_of_push(self.generation)?;
        let blocks = blocks.iter().map(|(of, id)| build::key_of(*of, id));
        for key in packs.chain(blocks).filter(|key| set.contains(key)) {
            if self.rt.block_on(set.rely_on(&key))? == Relied::PutAgain {
                // It may be gone. What this node believes of the lake is checked by the next push.
                self.index.forget_blocks()?;
                self.index.commit()?;
                return Err(PushError::Condemned);
            }
        }
        Ok(())
    }

    /// Writes down that the push is done.
    fn settle(
        &mut self,
        made: &Committed,
        stored: &Stored,
        fingerprint: String,
        problems: &[Problem],
    ) -> Result<(), PushError> {
        for used in &stored.built.placement.packs {
            if let Some(number) = self.packs.number_of(&used.pack) {
                self.packs.update(&mut self.index, number, |row| row.state = PackState::Committed)?;
            }
        }
        self.index.keep_blocks_of(self.generation)?;
        self.index.set_meta("blocks_of", Some(&made.commit.to_string()))?;
        let walked = WalkedRow {
            fingerprint,
            tree: stored.built.tree,
            generation: self.generation,
            xattrs_dropped: stored.found.xattrs_dropped,
        };
        // What was left out, or may have changed unseen, has to be looked at again.
        let is_whole = problems.is_empty() && !stored.found.unsettled && self.options.onto.is_none();
        self.index.set_walked(Some(&walked).filter(|_| is_whole))?;
        self.index.commit()
    }

    /// Forgets the push's id, once its intent is gone: until then the next push takes the id over.
    fn forget_push(&mut self) -> Result<(), PushError> {
        self.index.set_meta("push_id", None)?;
        self.index.set_meta("push_start_ms", None)?;
        self.index.commit()
    }

    fn outcome(&self, target: &Target, made: &Committed, stored: &Stored) -> PushOutcome {
        let Stored { built, found, .. } = stored;
        let counts = &built.root.counts;
        let progress = self.progress;
        PushOutcome {
            dataset: self.options.dataset.as_str().to_owned(),
            commit: made.commit,
            tree: built.tree,
            unchanged: made.unchanged,
            branch: Some(target.branch.as_str().to_owned()),
            tag: self.options.tag.as_ref().map(|tag| tag.as_str().to_owned()),
            heads: made.heads.clone(),
            files: counts.files,
            dirs: counts.dirs,
            symlinks: counts.symlinks,
            bytes: counts.bytes,
            files_read: get(&progress.files_read),
            bytes_read: get(&progress.bytes_read),
            new_bytes: found.new_bytes,
            uploaded_data_bytes: get(&progress.uploaded_data),
            uploaded_bytes: get(&progress.uploaded),
            reused_bytes: progress.bytes_done.load(Ordering::Relaxed).saturating_sub(found.new_bytes),
            packs_new: self.packs.new_count(),
            packs_total: built.placement.packs.len() as u64,
            skipped: Vec::new(),
            xattrs_dropped: 0,
            elapsed_ms: 0,
        }
    }
}

/// What a push refers to: it is in the lake, but for its roots.
struct Stored {
    built: Built,
    found: Found,
    /// Packs were written again.
    rewritten: bool,
}

/// What the contents passes found.
struct Contents {
    found: Found,
    /// Packs were written again.
    rewritten: bool,
}
