//! The process: it waits for the lease, lists and watches the cluster, decides when something has changed, and asks for
//! what follows. One task owns all state; requests run beside it and report back.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use kube::{Api, Client};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::acts::{Actor, Done};
use super::decide::{Bind, Decision, Evict, Tell, decide};
use super::error::KubeError;
use super::feed::{Feed, Item, Readings, feed};
use super::lease::{Holder, Leading, Times};
use super::pod::{PodRecord, Reading};
use super::requests::{REQUEST_TIMEOUT, Throttle};
use super::resource::ProjectStatus;
use super::serve::Shared;
use super::tell::{PodEvent, Teller, Word, queue};
use super::world::{Asked, World};

/// Decisions are at least so far apart: what comes together is decided together.
const CYCLE_PAUSE: Duration = Duration::from_millis(50);
/// What depends on time alone is looked at so often.
const TICK: Duration = Duration::from_secs(1);
/// A pod is told why it waits when it has waited for so long, and again when its sentence is so old and another one holds.
const TELL_AFTER: Duration = Duration::from_secs(2);
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// What was refused is tried again, at first and at last, after.
const HOLD_MIN: Duration = Duration::from_secs(1);
const HOLD_MAX: Duration = Duration::from_secs(30);
/// The same status is not written again before.
const STATUS_AGAIN: Duration = Duration::from_secs(1);
/// What is told has this part of the requests per second for itself.
const TELL_PART: f64 = 0.25;

/// What the scheduler is told at its start.
#[derive(Debug, Clone)]
pub struct Options {
    pub scheduler_name: String,
    pub gpu_resource: String,
    pub pool_label: String,
    /// Namespace and name; None: this process always leads.
    pub lease: Option<(String, String)>,
    pub times: Times,
    pub identity: String,
    pub requests_per_second: f64,
    pub burst: u32,
}

/// Schedules until it is told to stop, or can't go on.
pub async fn run(
    client: Client,
    options: &Options,
    shared: Arc<Shared>,
    stop: CancellationToken,
) -> Result<(), KubeError> {
    let leading = Arc::new(Leading::default());
    let requests = shared.requests.clone();
    let mut tasks = JoinSet::new();
    let holder = options.lease.as_ref().map(|(namespace, name)| {
        let (identity, times) = (options.identity.clone(), options.times);
        Arc::new(Holder { api: Api::namespaced(client.clone(), namespace), name: name.clone(), identity, times })
    });
    shared.waits_for_lease();
    match &holder {
        None => leading.lead(None),
        Some(holder) => {
            let lease = tokio::select! {
                lease = holder.acquire(&requests, &leading) => lease,
                () = stop.cancelled() => return Ok(()),
            };
            let (holder, requests, leading) = (holder.clone(), requests.clone(), leading.clone());
            tasks.spawn(async move { holder.keep(lease, &requests, &leading).await });
        }
    }
    tracing::info!(identity = options.identity, "this process leads");
    shared.leads();
    let mut scheduler = Scheduler::new(client, options, shared.clone(), leading.clone());
    let ended = tokio::select! {
        lost = tasks.join_next(), if !tasks.is_empty() => match lost {
            Some(Ok(error)) => Err(error),
            _ => Err(KubeError::WatchEnded { kind: "the lease" }),
        },
        error = scheduler.work() => Err(error),
        () = stop.cancelled() => Ok(()),
    };
    if ended.is_ok() {
        scheduler.finish().await;
    }
    // Nothing is asked for any more before the lease is anybody else's.
    leading.end();
    drop(scheduler);
    tasks.shutdown().await;
    if let Some(holder) = holder.filter(|_| ended.is_ok()) {
        holder.release(&requests).await;
    }
    ended
}

/// Something that was refused, and when it is tried again.
#[derive(Debug)]
struct Hold {
    until: Instant,
    pause: Duration,
    why: String,
}

impl Hold {
    fn next(before: Option<&Self>, why: String) -> Self {
        let pause = before.map_or(HOLD_MIN, |before| (before.pause * 2).min(HOLD_MAX));
        Self { until: Instant::now() + pause, pause, why }
    }
}

/// All state of the process.
struct Scheduler {
    world: World,
    feed: Feed,
    actor: Arc<Actor>,
    acts: JoinSet<Done>,
    acts_max: usize,
    words: tokio::sync::mpsc::Sender<Word>,
    /// Runs as long as this lives.
    _teller: JoinSet<()>,
    shared: Arc<Shared>,
    is_dirty: bool,
    last_cycle: Instant,
    /// By unit.
    unit_holds: HashMap<String, Hold>,
    /// By uid of the pod.
    evict_holds: HashMap<String, Hold>,
    evicting: HashSet<String>,
    /// Since when pods wait, and when they were told why; by uid.
    waiting: HashMap<String, Instant>,
    told: HashMap<String, Instant>,
    tells: Vec<Tell>,
    statuses: HashMap<String, (Instant, ProjectStatus)>,
}

impl Scheduler {
    fn new(client: Client, options: &Options, shared: Arc<Shared>, leading: Arc<Leading>) -> Self {
        let reading =
            Reading { scheduler_name: options.scheduler_name.clone(), gpu_resource: options.gpu_resource.clone() };
        let (rate, burst) = (options.requests_per_second, f64::from(options.burst));
        let requests = shared.requests.clone();
        let (words, queue) = queue();
        let teller = Teller {
            client: client.clone(),
            requests: requests.clone(),
            leading: leading.clone(),
            throttle: Throttle::new(rate * TELL_PART, burst * TELL_PART),
            identity: options.identity.clone(),
        };
        let mut telling = JoinSet::new();
        telling.spawn(async move { teller.run(queue).await });
        let readings = Readings { pod: reading.clone(), pool_label: options.pool_label.clone() };
        let feed = feed(&client, readings);
        let throttle = Throttle::new(rate, burst);
        let actor = Arc::new(Actor { client, requests, leading, throttle, reading });
        Self {
            world: World::default(),
            feed,
            actor,
            acts: JoinSet::new(),
            acts_max: (options.burst as usize).max(1),
            words,
            _teller: telling,
            shared,
            is_dirty: true,
            last_cycle: Instant::now(),
            unit_holds: HashMap::new(),
            evict_holds: HashMap::new(),
            evicting: HashSet::new(),
            waiting: HashMap::new(),
            told: HashMap::new(),
            tells: Vec::new(),
            statuses: HashMap::new(),
        }
    }

    /// Works until it can't.
    async fn work(&mut self) -> KubeError {
        let mut tick = tokio::time::interval(TICK);
        loop {
            let can_decide = self.is_dirty && self.world.is_complete();
            let next = self.last_cycle + CYCLE_PAUSE;
            tokio::select! {
                news = self.feed.next() => match news {
                    Some(news) => self.take(news),
                    None => return KubeError::WatchEnded { kind: "the cluster" },
                },
                Some(done) = self.acts.join_next() => {
                    if let Ok(done) = done {
                        self.learn(done);
                    }
                }
                _ = tick.tick() => self.tick(),
                () = tokio::time::sleep_until(next.into()), if can_decide => self.cycle(),
            }
            self.shared.turns();
        }
    }

    /// Waits for what was asked for, as long as one request may take.
    async fn finish(&mut self) {
        let all = async { while self.acts.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(REQUEST_TIMEOUT, all).await;
    }

    fn take(&mut self, news: Vec<Item>) {
        for item in news {
            self.is_dirty |= item.enter(&mut self.world);
        }
        if self.world.is_complete() {
            self.shared.has_listed();
        }
    }

    /// Looks at what depends on time alone.
    fn tick(&mut self) {
        let now = Instant::now();
        self.is_dirty |= self.unit_holds.values().any(|hold| hold.until <= now);
        self.is_dirty |= self.evict_holds.values().any(|hold| hold.until <= now);
        self.tell();
        self.tell_statuses();
    }

    /// Decides, and asks for what follows.
    fn cycle(&mut self) {
        self.is_dirty = false;
        let begun = Instant::now();
        let held_up = self.unit_holds.iter().filter(|(_, hold)| hold.until > begun);
        let held_up: HashMap<String, String> =
            held_up.map(|(unit, hold)| (unit.clone(), format!("it could not start: {}", hold.why))).collect();
        let decision = decide(&self.world, &held_up);
        self.last_cycle = Instant::now();
        let took = begun.elapsed();
        let mut decision = match decision {
            Ok(decision) => decision,
            Err(error) => {
                tracing::error!(%error, "the cluster contradicts itself: nothing is started or paused");
                return;
            }
        };
        self.unit_holds.retain(|_, hold| hold.until + HOLD_MAX > begun);
        self.evict_holds.retain(|_, hold| hold.until + HOLD_MAX > begun);
        self.act(&mut decision);
        self.tells = std::mem::take(&mut decision.tells);
        let waiting: HashSet<&str> = self.tells.iter().map(|tell| tell.uid.as_str()).collect();
        self.waiting.retain(|uid, _| waiting.contains(uid.as_str()));
        self.told.retain(|uid, _| waiting.contains(uid.as_str()));
        for uid in waiting {
            if !self.waiting.contains_key(uid) {
                self.waiting.insert(uid.to_owned(), begun);
            }
        }
        self.shared.decided(decision, took);
        self.tell_statuses();
    }

    /// Asks for as much as may be under way; the rest comes out of the next decision again.
    fn act(&mut self, decision: &mut Decision) {
        let now = Instant::now();
        for evict in std::mem::take(&mut decision.evicts) {
            let held = self.evict_holds.get(&evict.uid).is_some_and(|hold| hold.until > now);
            if held || self.acts.len() >= self.acts_max || !self.evicting.insert(evict.uid.clone()) {
                continue;
            }
            tracing::info!(pod = %evict, why = evict.why, "evicting");
            let actor = self.actor.clone();
            self.acts.spawn(async move { actor.evict(evict).await });
        }
        let mut unit = String::new();
        for bind in std::mem::take(&mut decision.binds) {
            // A gang is not cut in two.
            if bind.unit != unit && self.acts.len() >= self.acts_max {
                break;
            }
            unit.clone_from(&bind.unit);
            if self.world.asked.contains_key(&bind.uid) {
                continue;
            }
            tracing::info!(pod = bind.key(), node = bind.node, grounds = ?bind.grounds, "placing");
            self.world.asked.insert(bind.uid.clone(), Asked { node: bind.node.clone(), held: bind.held.clone() });
            let actor = self.actor.clone();
            self.acts.spawn(async move { actor.bind(bind).await });
        }
    }

    /// Learns what became of something that was asked for.
    fn learn(&mut self, done: Done) {
        self.is_dirty = true;
        match done {
            Done::Bound(bind) => {
                self.world.bound(&bind.key(), &bind.uid);
                self.unit_holds.remove(&bind.unit);
                self.has_happened(placed(bind));
            }
            Done::NotBound { bind, pod, why } => {
                let key = bind.key();
                let got_there = pod.as_ref().and_then(Option::as_ref).is_some_and(|pod| pod.node.is_some());
                match pod {
                    Some(pod) => self.world.seen(&key, &bind.uid, pod),
                    None => drop(self.world.asked.remove(&bind.uid)),
                }
                if !got_there {
                    tracing::warn!(pod = key, why, "not placed");
                    let hold = Hold::next(self.unit_holds.get(&bind.unit), why);
                    self.unit_holds.insert(bind.unit, hold);
                }
            }
            Done::Evicted(evict) => {
                self.evicting.remove(&evict.uid);
                self.evict_holds.remove(&evict.uid);
                let key = format!("{}/{}", evict.namespace, evict.name);
                if let Some(pod) = self.world.pod_mut(&key, &evict.uid) {
                    pod.deleting = true;
                }
                self.has_happened(paused(evict));
            }
            Done::NotEvicted { evict, pod, why } => {
                self.evicting.remove(&evict.uid);
                tracing::warn!(pod = %evict, why, "not evicted");
                if let Some(pod) = pod {
                    self.world.seen(&format!("{}/{}", evict.namespace, evict.name), &evict.uid, pod);
                }
                let hold = Hold::next(self.evict_holds.get(&evict.uid), why);
                self.evict_holds.insert(evict.uid, hold);
            }
        }
    }

    /// Where too much waits to be told, this is not.
    fn has_happened(&self, event: PodEvent) {
        let _ = self.words.try_send(Word::Event(event));
    }

    /// Tells pods why they wait, those that do not know it.
    fn tell(&mut self) {
        let now = Instant::now();
        for tell in &self.tells {
            let key = format!("{}/{}", tell.namespace, tell.name);
            let Some(pod) = self.world.pods.all.get(&key).filter(|pod| pod.uid == tell.uid && pod.waits()) else {
                continue;
            };
            if self.world.asked.contains_key(&pod.uid) || !self.is_due(pod, tell, now) {
                continue;
            }
            let event = pod.told.as_ref().is_none_or(|told| told.reason != tell.told.reason);
            let tell = Tell { version: pod.version.clone(), ..tell.clone() };
            if self.words.try_send(Word::Waits { tell, event }).is_err() {
                return;
            }
            self.told.insert(pod.uid.clone(), now);
        }
    }

    fn is_due(&self, pod: &PodRecord, tell: &Tell, now: Instant) -> bool {
        let waits = self.waiting.get(&pod.uid).map_or(Duration::ZERO, |since| now.duration_since(*since));
        let last = self.told.get(&pod.uid).map(|told| now.duration_since(*told));
        match &pod.told {
            Some(told) if *told == tell.told => false,
            Some(told) if told.reason == tell.told.reason => last.unwrap_or(waits) >= TELL_AGAIN,
            // One word at a time: what was told last comes back by the watch, or was in vain.
            _ => waits >= TELL_AFTER && last.is_none_or(|last| last >= TELL_AFTER),
        }
    }

    fn tell_statuses(&mut self) {
        let now = Instant::now();
        let Some(decision) = self.shared.decision() else {
            return;
        };
        for (name, status) in &decision.statuses {
            let known = self.world.projects.all.get(name).and_then(|project| project.status.as_ref());
            let sent = self.statuses.get(name);
            if known == Some(status) || sent.is_some_and(|(at, _)| now.duration_since(*at) < STATUS_AGAIN) {
                continue;
            }
            let word = Word::Status { project: name.clone(), status: status.clone() };
            if self.words.try_send(word).is_err() {
                return;
            }
            self.statuses.insert(name.clone(), (now, status.clone()));
        }
    }
}

fn placed(bind: Bind) -> PodEvent {
    let annotations = bind.annotations();
    let gpus = annotations.get(super::names::GPUS).map_or("", String::as_str);
    let grounds = annotations.get(super::names::GROUNDS).map_or("", String::as_str);
    let message = format!("placed on node {}, GPU {gpus}, on the grounds of: {grounds}", bind.node);
    let Bind { namespace, name, uid, .. } = bind;
    PodEvent { namespace, name, uid, kind: "Normal", reason: "Scheduled", message }
}

fn paused(evict: Evict) -> PodEvent {
    let Evict { namespace, name, uid, why } = evict;
    PodEvent { namespace, name, uid, kind: "Normal", reason: "Preempted", message: why }
}
