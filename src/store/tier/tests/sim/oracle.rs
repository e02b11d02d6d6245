//! What must be true after each step. It sees every change of a name, of bytes and of times as the
//! server made it, and knows what each node was promised.
//!
//! * P1, P2: what has its final name is the pack, whole, from the moment it has it, and never changes.
//! * P5: what a protected commit's record names is not lost, and is not taken away by who could have
//!   seen the record; who was promised protection keeps its lease.
//! * P4: a claim with a heartbeat is nobody else's.

use std::collections::{BTreeMap, BTreeSet};

use super::super::kit::{self, Pack};
use crate::store::tier::TierConfig;
use crate::testkit::sim_tier::{Event, World};

/// Why a commit is safe, and since when.
#[derive(Debug, Clone)]
struct Guard {
    kind: Protection,
    commit: u8,
    /// Not before this step.
    since: u64,
    /// Packs that lay there since: by their place in the universe.
    present: u64,
    /// Its node slept for longer than a lease lives.
    lapsed: bool,
    lease: Option<u32>,
}

/// What protects a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protection {
    Lease { node: usize },
    Keep,
    Hold,
}

/// Where copies of a pack are.
#[derive(Debug, Default)]
struct Copies {
    hex: String,
    object: Option<u32>,
    last_object: Option<u32>,
    trash: Vec<u32>,
    aside: Vec<u32>,
    /// `publish` said that this one is published.
    published: Option<u32>,
}

/// A file whose heartbeat counts: a lease, or a claim.
#[derive(Debug, Clone)]
struct Turn {
    client: u64,
    is_lease: bool,
    pack: Option<usize>,
    /// Nobody renewed it for too long, and nobody has since, under its own name.
    gap: bool,
    /// Somebody who takes it over has moved it away.
    aside: bool,
    since: u64,
    owner: String,
}

/// The public call that an actor is in.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct InCall {
    pub name: &'static str,
    since: u64,
    pub number: u64,
}

#[derive(Debug)]
pub(super) struct Oracle {
    cfg: TierConfig,
    packs: Vec<Pack>,
    copies: Vec<Copies>,
    guards: BTreeMap<u64, Guard>,
    next_guard: u64,
    /// Commit -> its records, and since which step there is one all the time.
    records: BTreeMap<String, (u32, u64)>,
    turns: BTreeMap<u32, Turn>,
    /// Path of a claim -> the file that has it.
    claims: BTreeMap<String, u32>,
    calls: BTreeMap<usize, InCall>,
    acting: usize,
    damaged: BTreeSet<u32>,
    /// Actors that are evicting just now.
    evicting: BTreeSet<usize>,
    /// One of them died or failed half-way: the next sweep mends it.
    leftover: bool,
    /// When a commit was last let go again.
    unkept: BTreeMap<u8, u64>,
    /// Actors that let a commit go just now.
    unkeeping: BTreeMap<usize, u8>,
    /// Evictions are wrong on purpose and others mend it: only what is lost counts.
    pub(super) losses_only: bool,
    pub(super) violation: Option<String>,
    step: u64,
}

/// Which packs a commit needs: neighbours share.
pub(super) fn packs_of(commit: u8) -> std::ops::Range<usize> {
    let first = usize::from(commit - 1);
    first..first + 2
}

fn bit(pack: usize) -> u64 {
    1 << pack
}

impl Oracle {
    pub(super) fn new(packs: &[Pack], cfg: TierConfig) -> Self {
        let copies = packs.iter().map(|p| Copies { hex: p.id.to_string(), ..Copies::default() }).collect();
        Self {
            cfg,
            packs: packs.to_vec(),
            copies,
            guards: BTreeMap::new(),
            next_guard: 1,
            records: BTreeMap::new(),
            turns: BTreeMap::new(),
            claims: BTreeMap::new(),
            calls: BTreeMap::new(),
            acting: usize::MAX,
            damaged: BTreeSet::new(),
            evicting: BTreeSet::new(),
            leftover: false,
            unkept: BTreeMap::new(),
            unkeeping: BTreeMap::new(),
            losses_only: false,
            violation: None,
            step: 0,
        }
    }

    pub(super) fn violate(&mut self, promise: &str, text: &str) {
        if self.violation.is_none() {
            let call = self.calls.get(&self.acting).map_or("", |call| call.name);
            self.violation = Some(format!("{promise}: {text} (step {}, during `{call}`)", self.step));
        }
    }

    pub(super) fn calling(&mut self, actor: usize, _node: usize, name: &'static str, step: u64) {
        let number = self.call_of(actor).number + 1;
        self.calls.insert(actor, InCall { name, since: step, number });
    }

    pub(super) fn acting(&mut self, actor: usize) {
        self.acting = actor;
    }

    fn call(&self) -> InCall {
        self.call_of(self.acting)
    }

    pub(super) fn call_of(&self, actor: usize) -> InCall {
        self.calls.get(&actor).copied().unwrap_or_default()
    }

    // What nodes were promised.

    /// A call that protects has ended well: from here on the promise holds.
    pub(super) fn guard(&mut self, kind: Protection, commit: u8, client: u64, world: &World) -> u64 {
        let lease = match kind {
            Protection::Lease { .. } => self
                .turns
                .iter()
                .filter(|(_, turn)| {
                    turn.is_lease && turn.client == client && turn.owner == kit::commit_key(commit).commit.to_string()
                })
                .map(|(ino, _)| *ino)
                .next_back(),
            _ => None,
        };
        // A heartbeat that runs beside it may just be writing anew what expired while the call slept.
        let lapsed = match kind {
            Protection::Lease { node } => self.calls.get(&(2 * node)).is_some_and(|call| call.name == "heartbeat"),
            _ => false,
        };
        let guard = Guard { kind, commit, since: self.step, present: 0, lapsed, lease };
        let id = self.next_guard;
        self.next_guard += 1;
        self.guards.insert(id, guard);
        self.check_guards(world);
        self.check_in_place(world);
        id
    }

    /// A hold protects what the lease protects under which it was made, and goes on when that ends.
    pub(super) fn guard_hold(&mut self, lease: u64, commit: u8, world: &World) -> u64 {
        self.see_lapses(world);
        let under = self.guards.get(&lease).is_some_and(|guard| !guard.lapsed);
        if !under {
            // Nothing was promised: the lease had expired.
            self.next_guard += 1;
            return self.next_guard - 1;
        }
        self.guard(Protection::Hold, commit, 0, world)
    }

    pub(super) fn end_holds(&mut self) {
        self.guards.retain(|_, guard| guard.kind != Protection::Hold);
    }

    /// A node has seen a pack after it was promised protection: it counts on it.
    pub(super) fn believe(&mut self, guard: u64, pack: usize, world: &World) {
        self.see_lapses(world);
        if let Some(guard) = self.guards.get_mut(&guard).filter(|guard| !guard.lapsed) {
            guard.present |= bit(pack);
        }
        self.check_guards(world);
    }

    /// What protects ends now.
    pub(super) fn end(&mut self, guard: u64) {
        self.guards.remove(&guard);
    }

    /// A commit is kept, unless somebody let it go again while the call ran: either order is right.
    pub(super) fn guard_keep(&mut self, commit: u8, actor: usize, world: &World) {
        let before = self.unkept.get(&commit).is_none_or(|step| *step < self.call_since(actor));
        if before && !self.unkeeping.values().any(|other| *other == commit) {
            self.guard(Protection::Keep, commit, 0, world);
        }
    }

    pub(super) fn unkept(&mut self, actor: usize) {
        if let Some(commit) = self.unkeeping.remove(&actor) {
            self.unkept.insert(commit, self.step);
        }
    }

    pub(super) fn end_keep(&mut self, commit: u8, actor: usize) {
        self.unkeeping.insert(actor, commit);
        self.guards.retain(|_, guard| guard.kind != Protection::Keep || guard.commit != commit);
    }

    pub(super) fn end_all(&mut self) {
        self.guards.clear();
    }

    /// A heartbeat has ended well for a commit of a node.
    pub(super) fn renewed(&mut self, node: usize, commit: u8, world: &World) {
        let step = self.step;
        for guard in self.guards.values_mut() {
            if guard.kind == (Protection::Lease { node }) && guard.commit == commit && guard.lapsed {
                (guard.lapsed, guard.present, guard.since) = (false, 0, step);
            }
        }
        self.check_guards(world);
    }

    /// Says whether a commit was protected all the time since a step.
    pub(super) fn was_protected(&mut self, commit: u8, since: u64, world: &World) -> bool {
        self.see_lapses(world);
        self.guards.values().any(|guard| guard.commit == commit && !guard.lapsed && guard.since < since)
    }

    pub(super) fn call_since(&self, actor: usize) -> u64 {
        self.calls.get(&actor).map_or(0, |call| call.since)
    }

    pub(super) fn published(&mut self, pack: usize) {
        if let Some(copies) = self.copies.get_mut(pack) {
            copies.published = copies.object;
        }
    }

    pub(super) fn died(&mut self, node: usize) {
        self.guards.retain(|_, guard| guard.kind != Protection::Lease { node });
        for actor in [2 * node, 2 * node + 1] {
            self.leftover |= self.evicting.remove(&actor);
            self.unkept(actor);
        }
    }

    /// A call that may evict begins.
    pub(super) fn evicts(&mut self, actor: usize) {
        self.evicting.insert(actor);
    }

    /// It ended; with an error it may have left something half-way.
    pub(super) fn evicted(&mut self, actor: usize, well: bool, world: &World) {
        self.leftover |= !(self.evicting.remove(&actor) && well);
        self.check_in_place(world);
    }

    /// Nobody is evicting, and nobody died at it: what is protected is where it belongs.
    fn check_in_place(&mut self, world: &World) {
        // Also where nothing is checked: a lease that is written again later protects anew, not still.
        self.see_lapses(world);
        if self.leftover || self.losses_only || !self.evicting.is_empty() {
            return;
        }
        let guards: Vec<Guard> = self.guards.values().filter(|guard| !guard.lapsed).cloned().collect();
        for guard in guards {
            let (commit, kind) = (guard.commit, guard.kind);
            if self.recorded_since(commit).is_none() {
                self.violate(
                    "P5",
                    &format!("commit {commit}, protected by {kind:?}, has no record, and nobody is evicting"),
                );
            }
            for pack in packs_of(commit) {
                // The one that was published last: an older one may lie there while that was set aside as damaged.
                let taken = |c: &Copies| c.last_object.filter(|ino| c.trash.contains(ino) && c.object.is_none());
                let away = self.copies.get(pack).and_then(taken).is_some_and(|ino| !self.damaged.contains(&ino));
                if guard.present & bit(pack) != 0 && away {
                    let text = format!("pack {pack} of commit {commit}, protected by {kind:?}, was not put back");
                    self.violate("P5", &text);
                }
            }
        }
    }

    /// Only what was said to be published is sure to be there afterwards.
    pub(super) fn power_goes(&mut self) {
        for guard in self.guards.values_mut() {
            for (pack, copies) in self.copies.iter().enumerate() {
                let mut there = copies.object.iter().chain(&copies.trash).chain(&copies.aside);
                if copies.published.is_none_or(|ino| !there.any(|at| *at == ino)) {
                    guard.present &= !bit(pack);
                }
            }
        }
    }

    /// Unsynced bytes were lost: what has a final name must be right all the same.
    pub(super) fn power_is_back(&mut self, world: &World) {
        for pack in 0..self.copies.len() {
            if let Some(ino) = self.copies.get(pack).and_then(|copies| copies.object) {
                self.check_object(pack, ino, world);
            }
        }
        self.check_guards(world);
    }

    // Damage is the medium's, not the protocol's.

    /// Gives a published object that may be damaged now.
    pub(super) fn damage(&mut self, choice: usize) -> Option<u32> {
        let ino = self
            .copies
            .iter()
            .cycle()
            .skip(choice % self.copies.len())
            .take(self.copies.len())
            .find_map(|c| c.object)?;
        self.damaged.insert(ino);
        Some(ino)
    }

    pub(super) fn is_damaged(&self, ino: u32) -> bool {
        self.damaged.contains(&ino)
    }

    pub(super) fn object(&self, pack: usize) -> Option<u32> {
        self.copies.get(pack).and_then(|copies| copies.object)
    }

    // What the server did.

    /// Takes in what an operation changed, and checks.
    pub(super) fn watch(&mut self, world: &mut World, client: u64, step: u64) {
        self.step = step;
        let events = std::mem::take(&mut world.events);
        let mut moved = false;
        for event in &events {
            match event {
                Event::Named { dir, name, was, is } => moved |= self.named(world, client, *dir, name, (*was, *is)),
                Event::Touched { node, was_ns } => self.touched(world, *node, *was_ns),
                Event::Altered { node } => self.altered(world, *node),
            }
        }
        for event in &events {
            if let Event::Named { was: Some(ino), is, .. } = event {
                self.check_removed_turn(world, client, *ino, is.is_some());
            }
        }
        if moved {
            self.check_taken(&events, world);
            self.check_guards(world);
        }
    }

    fn pack_of(&self, name: &str) -> Option<usize> {
        let hex = name.get(..64)?;
        self.copies.iter().position(|copies| copies.hex == hex)
    }

    /// True: copies of packs went somewhere.
    fn named(
        &mut self,
        world: &World,
        client: u64,
        dir: u32,
        name: &str,
        (was, is): (Option<u32>, Option<u32>),
    ) -> bool {
        let path = world.path_of(dir);
        let parts: Vec<&str> = path.split('/').collect();
        if let Some(turn) = is.and_then(|ino| self.turns.get_mut(&ino)) {
            turn.aside = parts.first() == Some(&"tmp");
        }
        match (parts.first().copied(), parts.len()) {
            (Some("objects"), 2) => return self.object_named(world, name, is),
            (Some("trash"), 2) if name.starts_with("staging.") && is.is_some() => self.check_given_up(world, name),
            (Some("trash"), 2) if name.starts_with("staging.") => {}
            (Some("trash"), 2) => return self.copy_named(name, (was, is), false),
            (Some("quarantine"), 1) if !name.ends_with(".json") && !name.ends_with(".claim") => {
                return self.copy_named(name, (was, is), true);
            }
            (Some("commits"), 3) if name.starts_with("record.") => {
                self.record_named(parts.get(2).copied().unwrap_or(""), is)
            }
            (Some("commits"), 4) if parts.get(3) == Some(&"leases") => {
                if let Some(ino) = is {
                    let commit = parts.get(2).copied().unwrap_or("").to_owned();
                    self.turn_named(world, client, ino, commit, true, name);
                }
            }
            (Some("staging"), 2) if name.ends_with(".claim") => {
                let path = format!("{path}/{name}");
                match is {
                    Some(ino) => {
                        self.claims.insert(path.clone(), ino);
                        self.turn_named(world, client, ino, path, false, name);
                    }
                    None => drop(self.claims.remove(&path)),
                }
            }
            _ => {}
        }
        false
    }

    fn object_named(&mut self, world: &World, name: &str, is: Option<u32>) -> bool {
        let Some(pack) = self.pack_of(name) else {
            return false;
        };
        if name.len() == 64 {
            if let Some(copies) = self.copies.get_mut(pack) {
                copies.last_object = is.or(copies.object);
                copies.object = is;
            }
            if let Some(ino) = is {
                self.check_object(pack, ino, world);
            }
            return true;
        }
        if let Some(ino) = is.filter(|_| name.ends_with(".index"))
            && self.packs.get(pack).is_some_and(|p| world.bytes(ino) != p.index)
        {
            self.violate("P2", &format!("pack {pack}: an index that is not its own has the final name"));
        }
        false
    }

    fn check_object(&mut self, pack: usize, ino: u32, world: &World) {
        let right = self.packs.get(pack).is_some_and(|p| world.bytes(ino) == p.bytes);
        if !right && !self.damaged.contains(&ino) {
            self.violate("P2", &format!("pack {pack}: file {ino} has the final name and not the pack's bytes"));
        }
    }

    fn copy_named(&mut self, name: &str, (was, is): (Option<u32>, Option<u32>), aside: bool) -> bool {
        let plain = name.len() == 64 || (aside && name.as_bytes().get(64) == Some(&b'.'));
        let Some(copies) = self.pack_of(name).filter(|_| plain).and_then(|pack| self.copies.get_mut(pack)) else {
            return false;
        };
        let list = if aside { &mut copies.aside } else { &mut copies.trash };
        if let Some(at) = was.and_then(|ino| list.iter().position(|there| *there == ino)) {
            list.swap_remove(at);
        }
        list.extend(is);
        true
    }

    fn record_named(&mut self, commit: &str, is: Option<u32>) {
        let step = self.step;
        let entry = self.records.entry(commit.to_owned()).or_default();
        match is {
            Some(_) => {
                if entry.0 == 0 {
                    entry.1 = step;
                }
                entry.0 += 1;
            }
            None => entry.0 = entry.0.saturating_sub(1),
        }
    }

    /// Since when a commit has a record all the time.
    fn recorded_since(&self, commit: u8) -> Option<u64> {
        let hex = kit::commit_key(commit).commit.to_string();
        self.records.get(&hex).filter(|entry| entry.0 > 0).map(|entry| entry.1)
    }

    // Leases and claims.

    fn turn_named(&mut self, world: &World, client: u64, ino: u32, owner: String, is_lease: bool, name: &str) {
        if self.turns.contains_key(&ino) {
            return;
        }
        let pack = if is_lease { None } else { owner.split('/').nth(1).and_then(|hex| self.pack_of(hex)) };
        let gap = world.now_ns - world.mtime_ns(ino) > self.ttl_ns(is_lease);
        let owner = if is_lease { owner } else { name.to_owned() };
        self.turns
            .insert(ino, Turn { client, is_lease, pack, gap, aside: false, since: self.step, owner: owner.clone() });
        if is_lease {
            // The same mount has a new lease: an old one was gone.
            for guard in self.guards.values_mut() {
                let same = guard.lease.and_then(|old| self.turns.get(&old)).is_some_and(|old| old.client == client);
                if same && kit::commit_key(guard.commit).commit.to_string() == owner {
                    guard.lapsed |= guard.lease.is_some_and(|old| {
                        world.now_ns - world.mtime_ns(old)
                            > i64::try_from(self.cfg.lease_ttl_ms).unwrap_or(0) * 1_000_000
                    });
                    guard.lease = Some(ino);
                }
            }
        }
    }

    fn ttl_ns(&self, is_lease: bool) -> i64 {
        let ms = if is_lease { self.cfg.lease_ttl_ms } else { self.cfg.span_claim_ttl_ms };
        i64::try_from(ms).unwrap_or(i64::MAX / 1_000_000) * 1_000_000
    }

    fn touched(&mut self, world: &World, ino: u32, was_ns: i64) {
        let Some(is_lease) = self.turns.get(&ino).map(|turn| turn.is_lease) else {
            return;
        };
        let lapsed = world.now_ns - was_ns > self.ttl_ns(is_lease);
        if let Some(turn) = self.turns.get_mut(&ino).filter(|turn| lapsed || turn.gap) {
            // A lease begins anew: who judged it before must look once more.
            (turn.gap, turn.since) = (turn.aside || !turn.is_lease, self.step);
        }
        if lapsed {
            for guard in self.guards.values_mut().filter(|guard| guard.lease == Some(ino)) {
                guard.lapsed = true;
            }
        }
    }

    fn see_lapses(&mut self, world: &World) {
        let ttl_ns = self.ttl_ns(true);
        for guard in self.guards.values_mut() {
            if let Some(lease) = guard.lease {
                guard.lapsed |= world.now_ns - world.mtime_ns(lease) > ttl_ns;
            }
        }
    }

    /// A file that somebody keeps alive is removed by its owner only.
    fn check_removed_turn(&mut self, world: &World, client: u64, ino: u32, replaced: bool) {
        let Some(turn) = self.turns.get(&ino).cloned().filter(|_| world.links(ino) == 0) else {
            return;
        };
        let fresh = world.now_ns - world.mtime_ns(ino) <= self.ttl_ns(turn.is_lease);
        let published = turn.pack.is_some_and(|pack| self.object(pack).is_some());
        // Who gives a claim up after a silence may remove its successor's: a third fetch at most.
        let given_up =
            !turn.is_lease && !replaced && matches!(self.call().name, "mark" | "abandon" | "claim" | "publish");
        let taken_over = self.turns.values().any(|own| own.client == client && own.owner == turn.owner);
        let explained = turn.client == client
            || (given_up && taken_over)
            || published
            || self.call().name == "forget a node"
            || client == 0;
        if fresh && !turn.gap && !explained {
            let (promise, what) = if turn.is_lease { ("P5", "lease") } else { ("P4", "claim") };
            self.violate(promise, &format!("a live {what} ({}) was removed by somebody else", turn.owner));
        }
    }

    /// A staging folder goes into the trash: nobody may be at it.
    fn check_given_up(&mut self, world: &World, name: &str) {
        let call = self.call();
        let Some(hex) = name.strip_prefix("staging.") else {
            return;
        };
        let start = format!("staging/{hex}/");
        let within: Vec<u32> =
            self.claims.iter().filter(|(path, _)| path.starts_with(&start)).map(|(_, ino)| *ino).collect();
        self.claims.retain(|path, _| !path.starts_with(&start));
        let Some(pack) = self.pack_of(hex).filter(|_| call.name == "sweep") else {
            return;
        };
        let ttl_ns = self.ttl_ns(false);
        let live = within.iter().any(|ino| {
            let fresh = world.now_ns - world.mtime_ns(*ino) <= ttl_ns;
            self.turns.get(ino).is_some_and(|turn| fresh && !turn.gap && turn.since < call.since)
        });
        if live {
            self.violate("P4", &format!("pack {pack}: its staging was given up under a live claim"));
        }
    }

    fn altered(&mut self, world: &World, ino: u32) {
        for pack in 0..self.copies.len() {
            if self.object(pack) == Some(ino) {
                self.check_object(pack, ino, world);
            }
        }
    }

    // What protected commits need.

    /// Who takes an object away could not have seen a record that names it.
    fn check_taken(&mut self, events: &[Event], world: &World) {
        if self.losses_only {
            return;
        }
        let (taken, to): (Vec<u32>, bool) = {
            let into = |dir: &u32| world.path_of(*dir).starts_with("trash");
            let to = events.iter().any(|e| matches!(e, Event::Named { dir, is: Some(_), .. } if into(dir)));
            let from = events.iter().filter_map(|e| match e {
                Event::Named { was: Some(ino), is: None, .. } => Some(*ino),
                _ => None,
            });
            (from.collect(), to)
        };
        if !to {
            return;
        }
        let since = self.call().since;
        for pack in 0..self.copies.len() {
            let left = self
                .copies
                .get(pack)
                .and_then(|c| c.last_object.filter(|ino| c.object.is_none() && taken.contains(ino)));
            if left.is_none() {
                continue;
            }
            for commit in commits_of(pack) {
                if self.recorded_since(commit).is_some_and(|from| from < since) {
                    let text = format!(
                        "pack {pack} was moved away, and commit {commit} had its record before that call began"
                    );
                    self.violate("P5", &text);
                }
            }
        }
    }

    fn check_guards(&mut self, world: &World) {
        self.see_lapses(world);
        let mut lost = None;
        for guard in self.guards.values_mut().filter(|guard| !guard.lapsed) {
            for pack in packs_of(guard.commit) {
                let Some(copies) = self.copies.get(pack) else {
                    continue;
                };
                if copies.object.is_some() {
                    guard.present |= bit(pack);
                    continue;
                }
                let good = |ino: &u32| !self.damaged.contains(ino);
                if guard.present & bit(pack) == 0 || copies.trash.iter().chain(&copies.aside).any(good) {
                    continue;
                }
                guard.present &= !bit(pack);
                if copies.last_object.is_none_or(|ino| good(&ino)) {
                    lost = Some((pack, guard.commit, guard.kind));
                }
            }
        }
        if let Some((pack, commit, kind)) = lost {
            self.violate("P5", &format!("pack {pack} of commit {commit}, protected by {kind:?}, is lost"));
        }
    }

    // Quiet points.

    /// Sweeps have been made since the last thing happened: everything is where it belongs.
    pub(super) fn check_settled(&mut self, world: &World) {
        self.leftover = false;
        self.evicting.clear();
        self.see_lapses(world);
        let guards: Vec<Guard> = self.guards.values().filter(|guard| !guard.lapsed).cloned().collect();
        for guard in guards {
            let (commit, kind) = (guard.commit, guard.kind);
            if self.recorded_since(commit).is_none() {
                self.violate("P5", &format!("commit {commit}, protected by {kind:?}, has no record at a quiet point"));
            }
            for pack in packs_of(commit) {
                if guard.present & bit(pack) != 0 && self.object(pack).is_none() {
                    let text =
                        format!("pack {pack} of commit {commit}, protected by {kind:?}, is not back at a quiet point");
                    self.violate("P5", &text);
                }
            }
        }
        for pack in 0..self.copies.len() {
            let Some(copies) = self.copies.get(pack) else {
                continue;
            };
            let innocent = copies.aside.iter().any(|ino| !self.damaged.contains(ino));
            let needed = commits_of(pack).any(|commit| self.recorded_since(commit).is_some());
            let stuck = needed && copies.object.is_none() && copies.trash.iter().any(|ino| !self.damaged.contains(ino));
            if innocent {
                self.violate("P2", &format!("pack {pack}: a good object is in quarantine at a quiet point"));
            }
            if stuck {
                self.violate("P5", &format!("pack {pack} is in the trash at a quiet point, and a record names it"));
            }
        }
    }

    /// The file that has a claim, when it was renewed, and whether its owner was silent for too long.
    pub(super) fn claim_of(&self, pack: usize, span: u32, world: &World) -> Option<(u32, i64, bool)> {
        let start = format!("staging/{}/span-{span}.", self.copies.get(pack)?.hex);
        let (_, ino) = self.claims.range(start.clone()..).take_while(|(path, _)| path.starts_with(&start)).last()?;
        let renewed_ns = world.mtime_ns(*ino);
        Some((*ino, renewed_ns, world.now_ns - renewed_ns > self.ttl_ns(false)))
    }
}

fn commits_of(pack: usize) -> impl Iterator<Item = u8> {
    (1..=super::COMMITS).filter(move |commit| packs_of(*commit).contains(&pack))
}
