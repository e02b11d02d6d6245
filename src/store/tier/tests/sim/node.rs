//! What nodes do: mount and read, fill by claims, keep, hold, evict, find damage, sweep, sleep - by
//! chance, and each as the callers of the tier do it.

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::super::kit::{self, Pack, commit_key, record};
use super::baton::Baton;
use super::broken::Broken;
use super::oracle::{Protection, packs_of};
use super::params::{Mending, Mix, Params};
use super::seam::{Seam, SeamFile};
use crate::format::ids::NodeId;
use crate::store::tier::io::read_full;
use crate::store::tier::plan::plan;
use crate::store::tier::{Claimed, Hold, Lease, PackFile, Quarantined, Sidecar, Stage, StewardReport, Tier, TierError};
use crate::testkit::sim_tier::{Rng, SimClock, SimWorld};

pub(super) type SimTier = Tier<Seam>;

/// What a node's process has while it lives.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub tier: SimTier,
    pub client: u64,
    /// How often the node had died before.
    pub life: u64,
}

/// Everything that the actors of a run share.
#[derive(Debug)]
pub(super) struct Stage0 {
    pub baton: Arc<Baton>,
    pub world: SimWorld,
    pub params: Params,
    pub packs: Vec<Pack>,
    pub fans: Vec<String>,
    pub processes: Vec<Mutex<Option<Process>>>,
    /// Each node's id now, and ids that will not come back.
    pub ids: Mutex<Vec<u128>>,
    pub abandoned: Mutex<Vec<u128>>,
}

/// What a node's worker has in hand; gone when the node dies.
#[derive(Debug, Default)]
pub(super) struct Hands {
    life: u64,
    pub leases: Vec<(u8, u64, Lease<Seam>)>,
    holds: Vec<(u64, Hold<Seam>)>,
    open: Vec<(usize, PackFile<SeamFile>)>,
    stages: Vec<(usize, Stage<Seam>)>,
    mounts: u32,
}

impl Hands {
    /// What a dead process had is gone; nothing of it reaches the server.
    pub(super) fn outlive(&mut self, life: u64) {
        if life != self.life {
            *self = Self { life, mounts: self.mounts, ..Self::default() };
        }
    }

    /// Everything is released.
    pub(super) fn let_go(&mut self, stage: &Stage0) {
        stage.baton.tell(|oracle, _| oracle.end_all());
        let held = std::mem::take(self);
        (self.life, self.mounts) = (held.life, held.mounts);
    }
}

pub(super) fn node_id(number: u128) -> NodeId {
    NodeId(Uuid::from_u128(number))
}

impl Stage0 {
    /// Starts a node's process: a new client, a new instance, the same node or a new one.
    pub(super) fn boot(&self, node: usize, rng: &mut Rng) -> Result<(), TierError> {
        let life = self.baton.deaths(node);
        let io = self.world.client().with_schedule(&self.baton);
        let client = io.id();
        let id = {
            let mut ids = self.ids.lock();
            if life > 0 && rng.one_in(3) {
                self.abandoned.lock().push(ids[node]);
                ids[node] += 1000;
            }
            ids[node]
        };
        let hour_ms = 3_600_000;
        let skew_ms = i64::try_from(rng.below(2 * hour_ms)).unwrap_or(0) - hour_ms as i64;
        let clock = SimClock { world: self.world.clone(), skew_ms };
        let (broken, baton) = (self.params.broken, Arc::clone(&self.baton));
        let seam = Seam { io, fans: self.fans.clone(), broken, baton, skew_ms, seen: Mutex::default() };
        let instance = Uuid::from_u128((u128::from(client) << 96) | (id << 64));
        self.baton.join(node, client);
        let cfg = self.params.config();
        let tier = Tier::open_with(seam, Arc::new(clock), Path::new("/tier"), node_id(id), instance, cfg)?;
        *self.processes[node].lock() = Some(Process { tier, client, life });
        Ok(())
    }

    pub(super) fn process(&self, node: usize) -> Option<Process> {
        let found = self.processes[node].lock().clone();
        found.filter(|process| process.life == self.baton.deaths(node) && self.baton.dead_until_ns(node).is_none())
    }

    /// One of a node's two threads: leases, claims, sweeps; and coming back from the dead.
    pub(super) fn upkeep(&self, node: usize, rng: &mut Rng) {
        while !self.baton.is_over() {
            if let Some(back_ns) = self.baton.dead_until_ns(node) {
                let wait_ms = (back_ns - self.baton.now_ns()).max(0) / 1_000_000;
                self.baton.sleep_ms(wait_ms.unsigned_abs());
                if let Err(error) = self.boot(node, rng) {
                    self.baton.note(|| format!("node {node} does not come up: {error}"));
                    self.baton.sleep_ms(1_000);
                }
                continue;
            }
            let wait_ms = self.params.heartbeat_ms / 2 + rng.below(self.params.heartbeat_ms);
            self.baton.sleep_ms(wait_ms);
            let Some(process) = self.process(node) else {
                if self.baton.dead_until_ns(node).is_none() && self.boot(node, rng).is_err() {
                    self.baton.sleep_ms(1_000);
                }
                continue;
            };
            self.heartbeat(node, &process);
            if rng.one_in(3) {
                self.sweep(node, &process);
            }
        }
    }

    pub(super) fn heartbeat(&self, node: usize, process: &Process) {
        self.baton.calling(node, "heartbeat");
        let renewed = process.tier.heartbeat();
        if !renewed.failed.is_empty() || self.process(node).is_none_or(|now| now.client != process.client) {
            return;
        }
        for commit in 1..=super::COMMITS {
            self.baton.tell(|oracle, world| oracle.renewed(node, commit, world));
        }
    }

    pub(super) fn breaks(&self, rule: Broken) -> bool {
        self.params.broken == Some(rule)
    }

    /// Stewards that break a rule.
    fn sweep_badly(&self, process: &Process) -> Result<(), TierError> {
        let core = &process.tier.core;
        if self.params.mending == Mending::None {
            for batch in process.tier.scan()?.trash {
                let old = batch.age_ms > i64::try_from(kit::GRACE_MS).unwrap_or(0);
                for item in batch.items.iter().filter(|item| old && !item.is_dir) {
                    core.remove(&format!("trash/{}/{}", batch.name, item.name))?;
                }
            }
        }
        if self.breaks(Broken::LiveStagingGivenUp) {
            for listed in core.list("staging")?.unwrap_or_default() {
                core.give_up_staging(&format!("staging/{}", listed.name))?;
            }
        }
        Ok(())
    }

    pub(super) fn sweep(&self, node: usize, process: &Process) {
        self.baton.calling(node, "sweep");
        let lease = |stage: &Self| {
            stage.world.with(|world| {
                let ino = world.find("steward/lease")?;
                Some((ino, world.mtime_ns(ino), world.now_ns))
            })
        };
        let before = lease(self);
        if let Err(error) = self.sweep_badly(process) {
            self.baton.note(|| format!("sweep failed: {error:?}"));
        }
        let actor = self.baton.call_number().0;
        self.baton.tell(|oracle, _| oracle.evicts(actor));
        let swept = match self.params.mending {
            Mending::Whole => process.tier.steward_step(&process.tier.policy()),
            mending => sweep_without_restoring(process, mending),
        };
        let well = swept.as_ref().is_ok_and(|report| report.failed.is_empty());
        if self.process(node).is_some_and(|now| now.client == process.client) {
            self.baton.tell(|oracle, world| oracle.evicted(actor, well, world));
        }
        match swept {
            Ok(report) if report.elsewhere => {
                let ttl_ns = i64::try_from(process.tier.config().claim_ttl_ms).unwrap_or(0) * 1_000_000;
                let stuck = before.filter(|(_, mtime_ns, now_ns)| now_ns - mtime_ns > ttl_ns).is_some()
                    && before.map(|b| (b.0, b.1)) == lease(self).map(|a| (a.0, a.1));
                if stuck {
                    self.baton
                        .tell(|oracle, _| oracle.violate("liveness", "a dead steward's lease is respected for ever"));
                }
            }
            Ok(report) => {
                self.baton.count(|counts| counts.evicted += report.evicted);
                self.baton.note(|| format!("swept: {:?}", report.failed));
            }
            Err(error) => self.baton.note(|| format!("sweep failed: {error:?}")),
        }
    }
}

/// A sweep that does not begin with putting back what earlier ones did wrong.
fn sweep_without_restoring(process: &Process, mending: Mending) -> Result<StewardReport, TierError> {
    let scan = process.tier.scan()?;
    let mut plan = plan(&scan, &process.tier.policy());
    plan.restore.clear();
    if mending == Mending::None {
        // Emptied already, without a look.
        plan.trash.clear();
    }
    Ok(process.tier.core.carry_out(&scan, plan))
}

/// The other thread: it works with packs and commits.
pub(super) struct Worker<'a> {
    pub stage: &'a Stage0,
    pub node: usize,
    pub rng: Rng,
    pub hands: &'a mut Hands,
}

impl Worker<'_> {
    pub(super) fn run(&mut self) {
        while !self.stage.baton.is_over() {
            let idle_ms = 1 + self.rng.below(self.stage.params.idle_ms_max);
            self.stage.baton.sleep_ms(idle_ms);
            let Some(process) = self.stage.process(self.node) else {
                self.stage.baton.sleep_ms(1_000);
                continue;
            };
            self.hands.outlive(process.life);
            let outcome = self.act(&process);
            if let Err(error) = outcome {
                self.stage.baton.note(|| format!("node {} failed: {error:?}", self.node));
            }
        }
    }

    fn act(&mut self, process: &Process) -> Result<(), TierError> {
        // One commit is wanted by everybody, so that they meet.
        let others = u64::from(super::COMMITS) - 1;
        let commit = if self.rng.one_in(2) { 1 } else { 2 + u8::try_from(self.rng.below(others)).unwrap_or(0) };
        let tier = &process.tier;
        let favourites: &[u64] = match self.stage.params.mix {
            Mix::All => &[],
            Mix::Evicting => &[0, 0, 0, 7, 7, 15, 17, 18, 19, 19, 19, 21, 22],
            Mix::Filling => &[0, 7, 15, 19, 19, 23, 23, 25, 25],
            Mix::Damage => &[0, 0, 9, 9, 9, 27, 27, 28],
        };
        let choice =
            if favourites.is_empty() || self.rng.one_in(4) { self.rng.below(32) } else { self.rng.pick(favourites) };
        match choice {
            0..=6 => self.mount(process, commit),
            7..=8 => self.unmount(),
            9..=13 => self.read_mounted(process),
            14 => self.read_late(),
            15..=16 => self.cache(tier, commit),
            17 => self.keep(tier, commit),
            18 => self.unkeep(tier, commit),
            19..=20 => self.uncache(tier, commit),
            21 => self.hold(tier),
            22 => self.drop_hold(),
            23..=24 => self.stage_partly(tier),
            25..=26 => self.write_late(tier),
            27 => self.damage(process),
            28 => self.scrub(tier),
            29 => self.weigh(tier),
            30 => self.forget(tier),
            _ => {
                self.call("touch");
                tier.touch(&commit_key(commit));
                Ok(())
            }
        }
    }

    fn call(&self, name: &'static str) {
        self.stage.baton.calling(self.node, name);
    }

    fn sources(&self, commit: u8) -> &[Pack] {
        &self.stage.packs[packs_of(commit)]
    }

    fn mount(&mut self, process: &Process, commit: u8) -> Result<(), TierError> {
        if self.hands.leases.iter().any(|(c, ..)| *c == commit) {
            return Ok(());
        }
        if self.rng.one_in(2) {
            // It has looked around before: it remembers names.
            for at in packs_of(commit) {
                self.call("look");
                let _ = process.tier.pack(&self.stage.packs[at].id);
            }
        }
        let early = self.look_early(process, commit);
        self.call("mount");
        let lease = process.tier.lease(&record(commit, self.sources(commit)))?;
        let kind = Protection::Lease { node: self.node };
        let guard = self.stage.baton.tell(|oracle, world| oracle.guard(kind, commit, process.client, world));
        self.hands.leases.push((commit, guard, lease));
        for at in early {
            self.stage.baton.tell(|oracle, world| oracle.believe(guard, at, world));
        }
        if self.rng.one_in(2) {
            for at in packs_of(commit) {
                self.call("look");
                if process.tier.pack(&self.stage.packs[at].id)?.is_some() {
                    self.stage.baton.tell(|oracle, world| oracle.believe(guard, at, world));
                }
            }
        }
        if self.rng.one_in(4) {
            return Ok(());
        }
        self.bring(&process.tier, commit)
    }

    /// What a node that breaks this rule has seen before it is protected.
    fn look_early(&mut self, process: &Process, commit: u8) -> Vec<usize> {
        if !self.stage.breaks(Broken::LookedBeforeLease) {
            return Vec::new();
        }
        let there = |at: &usize| process.tier.pack(&self.stage.packs[*at].id).is_ok_and(|found| found.is_some());
        let seen = packs_of(commit).filter(there).collect();
        self.stage.baton.sleep_ms(200_000);
        seen
    }

    fn unmount(&mut self) -> Result<(), TierError> {
        let Some((_, guard, lease)) = self.hands.leases.pop() else {
            return Ok(());
        };
        self.stage.baton.tell(|oracle, _| oracle.end(guard));
        self.call("unmount");
        lease.release()
    }

    fn cache(&mut self, tier: &SimTier, commit: u8) -> Result<(), TierError> {
        self.call("cache");
        tier.add_record(&record(commit, self.sources(commit)))?;
        self.bring(tier, commit)
    }

    fn bring(&mut self, tier: &SimTier, commit: u8) -> Result<(), TierError> {
        for at in packs_of(commit) {
            self.bring_pack(tier, at)?;
        }
        Ok(())
    }

    /// What is given up under us is tried again, as fetching does.
    fn bring_pack(&mut self, tier: &SimTier, at: usize) -> Result<(), TierError> {
        let mut tries = 0;
        loop {
            match self.fill(tier, at) {
                Err(TierError::Gone { .. } | TierError::NoIndex { .. }) if tries < 3 => tries += 1,
                other => return other,
            }
        }
    }

    fn fill(&mut self, tier: &SimTier, at: usize) -> Result<(), TierError> {
        let source = self.stage.packs[at].clone();
        self.call("look");
        if tier.pack(&source.id)?.is_some() {
            return Ok(());
        }
        self.call("stage");
        let staged = tier.stage(&source.id, source.bytes.len() as u64)?;
        let shares = !self.rng.one_in(5);
        for span in 0..staged.spans() {
            self.bring_span(&staged, at, span, shares)?;
        }
        self.finish(tier, &staged, at)
    }

    fn finish(&mut self, tier: &SimTier, staged: &Stage<Seam>, at: usize) -> Result<(), TierError> {
        let source = &self.stage.packs[at];
        self.call("put the index");
        tier.put_sidecar(&source.id, Sidecar::Index, &source.index)?;
        self.call("publish");
        let published = staged.publish()?;
        self.stage.baton.tell(|oracle, _| oracle.published(at));
        self.stage.baton.count(|counts| counts.published += 1);
        self.check_bytes(tier, at, &published)
    }

    /// Claims, fetches, writes; or waits for who fetches, but not for ever.
    fn bring_span(&mut self, staged: &Stage<Seam>, at: usize, span: u32, shares: bool) -> Result<(), TierError> {
        if staged.is_done(span) {
            return Ok(());
        }
        let mut waited_ms = 0;
        // Who does not share brings what others bring, too.
        while shares && waited_ms <= 3 * 60_000 {
            self.call("claim");
            let baton = &self.stage.baton;
            let before = baton.tell(|oracle, world| oracle.claim_of(at, span, world));
            match staged.claim(span)? {
                Claimed::Done => return Ok(()),
                Claimed::Mine => break,
                Claimed::TakenOver => {
                    baton.count(|counts| counts.takeovers += 1);
                    break;
                }
                Claimed::Other { .. } => {
                    let after = baton.tell(|oracle, world| oracle.claim_of(at, span, world));
                    // Dead at both ends of the call, and not renewed in between.
                    if let (Some((_, _, true)), Some((_, _, true))) = (before, after)
                        && before == after
                    {
                        baton.tell(|oracle, _| oracle.violate("P4", "a dead owner's claim is respected for ever"));
                    }
                }
            }
            let wait_ms = 500 + self.rng.below(20_000);
            waited_ms += wait_ms;
            self.stage.baton.sleep_ms(wait_ms);
            if staged.refresh_done()? > 0 && staged.is_done(span) {
                return Ok(());
            }
        }
        self.stage.baton.count(|counts| counts.fetched_spans += 1);
        self.stage.baton.sleep_ms(1 + self.rng.clone().below(3_000));
        if self.stage.breaks(Broken::MarkedBeforeWritten) {
            staged.span_done(span)?;
        }
        self.write_span(staged, at, span)?;
        self.call("mark");
        staged.span_done(span)
    }

    fn write_span(&self, staged: &Stage<Seam>, at: usize, span: u32) -> Result<(), TierError> {
        let range = staged.span_range(span);
        let mut bytes = self.stage.packs[at].bytes.clone();
        if self.stage.breaks(Broken::Unverified) && self.stage.baton.now_ns() / 1_000_000 % 8 == 0 {
            bytes[range.start as usize] ^= 1;
        }
        let middle = range.start + (range.end - range.start) / 2;
        self.call("write");
        staged.write_at(&bytes[range.start as usize..middle as usize], range.start)?;
        staged.write_at(&bytes[middle as usize..range.end as usize], middle)
    }

    /// Begins a pack and stops somewhere; it may go on much later.
    fn stage_partly(&mut self, tier: &SimTier) -> Result<(), TierError> {
        let at = usize::try_from(self.rng.below(self.stage.packs.len() as u64)).unwrap_or(0);
        let source = self.stage.packs[at].clone();
        self.call("stage");
        let staged = tier.stage(&source.id, source.bytes.len() as u64)?;
        self.call("claim");
        let mine = staged.claim(0)? == Claimed::Mine;
        self.hands.stages.push((at, staged));
        let Some((_, staged)) = self.hands.stages.last().filter(|_| mine) else {
            return Ok(());
        };
        self.write_span(staged, at, 0)?;
        if self.rng.one_in(2) {
            self.call("mark");
            staged.span_done(0)?;
        }
        Ok(())
    }

    /// An old staging file is written to once more: by then it may be published, or in the trash.
    fn write_late(&mut self, tier: &SimTier) -> Result<(), TierError> {
        let Some((at, staged)) = self.hands.stages.pop() else {
            return Ok(());
        };
        for span in 0..staged.spans() {
            self.write_span(&staged, at, span)?;
        }
        match self.rng.below(4) {
            0 => {
                self.call("abandon");
                staged.abandon()
            }
            1 => {
                self.call("discard");
                staged.discard()
            }
            _ => {
                for span in 0..staged.spans() {
                    self.call("mark");
                    staged.span_done(span)?;
                }
                self.finish(tier, &staged, at)
            }
        }
    }

    fn read_mounted(&mut self, process: &Process) -> Result<(), TierError> {
        let Some((commit, ..)) = self.hands.leases.last() else {
            return Ok(());
        };
        let commit = *commit;
        for at in packs_of(commit) {
            self.call("look");
            match process.tier.pack(&self.stage.packs[at].id)? {
                None => self.bring_pack(&process.tier, at)?,
                Some(found) => {
                    self.check_bytes(&process.tier, at, &found)?;
                    if self.rng.one_in(4) {
                        self.hands.open.push((at, found));
                    }
                }
            }
        }
        Ok(())
    }

    /// A file that was opened long ago: the right bytes, or an error.
    fn read_late(&mut self) -> Result<(), TierError> {
        let Some((at, found)) = self.hands.open.pop() else {
            return Ok(());
        };
        self.call("read");
        let mut bytes = vec![0; self.stage.packs[at].bytes.len() + 1];
        if let Ok(len) = read_full(&found.file, &mut bytes, 0) {
            bytes.truncate(len);
            self.judge(at, &found, &bytes);
        }
        Ok(())
    }

    /// Says whether these are the pack's bytes; wrong ones are the protocol's fault, or damage.
    fn judge(&self, at: usize, found: &PackFile<SeamFile>, bytes: &[u8]) -> bool {
        if bytes == self.stage.packs[at].bytes {
            return true;
        }
        self.stage.baton.tell(|oracle, _| {
            if !oracle.is_damaged(found.file.file.node()) {
                oracle.violate("P1", &format!("pack {at}: other bytes were read than the pack's"));
            }
        });
        false
    }

    /// Reads as a node does: what is damaged is set aside and fetched again.
    fn check_bytes(&self, tier: &SimTier, at: usize, found: &PackFile<SeamFile>) -> Result<(), TierError> {
        self.call("read");
        let mut bytes = vec![0; self.stage.packs[at].bytes.len() + 1];
        let len = read_full(&found.file, &mut bytes, 0).map_err(|e| TierError::io("read", "a pack", e))?;
        bytes.truncate(len);
        if self.judge(at, found, &bytes) {
            return Ok(());
        }
        let mut identity = found.identity;
        if self.stage.breaks(Broken::SetAsideByName) {
            self.stage.baton.sleep_ms(5_000);
            identity = tier.pack(&self.stage.packs[at].id)?.map_or(identity, |now| now.identity);
        }
        self.call("set aside");
        if tier.quarantine(&self.stage.packs[at].id, &identity, "other bytes")? == Quarantined::SetAside {
            self.stage.baton.count(|counts| counts.set_aside += 1);
        }
        Ok(())
    }

    fn keep(&self, tier: &SimTier, commit: u8) -> Result<(), TierError> {
        self.call("keep");
        tier.keep(&commit_key(commit))?;
        let actor = self.node * 2 + 1;
        self.stage.baton.tell(|oracle, world| oracle.guard_keep(commit, actor, world));
        Ok(())
    }

    fn unkeep(&self, tier: &SimTier, commit: u8) -> Result<(), TierError> {
        let actor = self.node * 2 + 1;
        self.stage.baton.tell(|oracle, _| oracle.end_keep(commit, actor));
        self.call("unkeep");
        let done = tier.unkeep(&commit_key(commit));
        self.stage.baton.tell(|oracle, _| oracle.unkept(actor));
        done
    }

    fn uncache(&self, tier: &SimTier, commit: u8) -> Result<(), TierError> {
        self.call("uncache");
        let badly = self.stage.breaks(Broken::SharedObjectsMoved) || self.stage.breaks(Broken::TrashEmptiedBlindly);
        if badly && self.stage.world.with(|world| world.now_ns) % 2_000_000 == 0 {
            return self.evict_badly(tier, commit);
        }
        let actor = self.node * 2 + 1;
        self.stage.baton.tell(|oracle, _| oracle.evicts(actor));
        let uncached = tier.uncache(&commit_key(commit));
        let well = matches!(uncached, Ok(_) | Err(TierError::Busy { .. } | TierError::NotCached { .. }));
        let life = self.hands.life;
        if self.stage.process(self.node).is_some_and(|now| now.life == life) {
            self.stage.baton.tell(|oracle, world| oracle.evicted(actor, well, world));
        }
        uncached?;
        self.stage.baton.tell(|oracle, world| {
            let since = oracle.call_since(actor);
            if oracle.was_protected(commit, since, world) {
                oracle.violate("P5", &format!("commit {commit} was removed, and it was protected all the time"));
            }
        });
        Ok(())
    }

    /// Moves all that a commit needs, whoever else needs it.
    fn evict_badly(&self, tier: &SimTier, commit: u8) -> Result<(), TierError> {
        let batch = tier.core.new_batch()?;
        for at in packs_of(commit) {
            let id = self.stage.packs[at].id;
            tier.core.move_away(&crate::store::tier::layout::object(&id), &format!("{batch}/{id}"))?;
        }
        Ok(())
    }

    /// A hold is made under a lease, and stays when that ends.
    fn hold(&mut self, tier: &SimTier) -> Result<(), TierError> {
        let Some((commit, guard, _)) = self.hands.leases.last() else {
            return Ok(());
        };
        let (commit, guard) = (*commit, *guard);
        self.hands.mounts += 1;
        let name = format!("m{}", self.hands.mounts);
        self.call("hold");
        let hold = tier.hold(&commit_key(commit), &name)?;
        for at in packs_of(commit) {
            hold.add(&self.stage.packs[at].id)?;
        }
        let held = self.stage.baton.tell(|oracle, world| oracle.guard_hold(guard, commit, world));
        self.hands.holds.push((held, hold));
        Ok(())
    }

    fn drop_hold(&mut self) -> Result<(), TierError> {
        let Some((guard, hold)) = self.hands.holds.pop() else {
            return Ok(());
        };
        self.stage.baton.tell(|oracle, _| oracle.end(guard));
        self.call("release a hold");
        hold.release()
    }

    /// A bit flips in a published object; sooner or later somebody reads it.
    fn damage(&mut self, process: &Process) -> Result<(), TierError> {
        if !self.stage.params.damage {
            return Ok(());
        }
        let choice = usize::try_from(self.rng.below(16)).unwrap_or(0);
        let hit = self.stage.baton.tell(|oracle, _| oracle.damage(choice));
        if let Some(ino) = hit {
            self.stage.world.with(|world| world.damage(ino, |bytes| bytes[7] ^= 0x20));
            self.stage.baton.note(|| format!("file {ino} is damaged"));
        }
        self.read_mounted(process)
    }

    fn scrub(&self, tier: &SimTier) -> Result<(), TierError> {
        self.call("scrub");
        if let Some(pack) = tier.next_scrub()? {
            tier.scrub(&pack, &mut |_| {})?;
        }
        Ok(())
    }

    /// Accounting while others go on: never more than there can be.
    fn weigh(&self, tier: &SimTier) -> Result<(), TierError> {
        self.call("usage");
        let bytes = || self.stage.world.with(|world| (world.live_bytes(), world.added_bytes()));
        let before = bytes();
        let usage = tier.usage()?;
        let most = before.0 + (bytes().1 - before.1);
        if usage.total_bytes > most {
            let text = format!("the accounting says {} bytes, there were never more than {most}", usage.total_bytes);
            self.stage.baton.tell(|oracle, _| oracle.violate("P8", &text));
        }
        Ok(())
    }

    fn forget(&self, tier: &SimTier) -> Result<(), TierError> {
        let Some(number) = self.stage.abandoned.lock().pop() else {
            return Ok(());
        };
        self.call("forget a node");
        self.stage.baton.tell(|oracle, _| oracle.end_holds());
        // Whoever gave the command gives it again: it may fail, and a power cut may bring back what it removed.
        self.stage.abandoned.lock().insert(0, number);
        tier.forget_node(&node_id(number))
    }
}
