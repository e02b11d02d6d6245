//! What a mount brings into the tier behind its reads.
//!
//! A mount makes its packs known, in tree order, with its policy. A read that has to go to the lake
//! names its pack here; each mount that has the pack then fills it (`touched`), or from there on
//! everything it has (`all`): first the packs that were read, then on in tree order, round to the
//! start.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use futures::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use tokio::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

use crate::format::ids::PackId;
use crate::format::placement::PackUse;

use super::engine::Inner;
use super::fill_run::PackFill;
use super::types::Prefetch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PackProgress {
    Todo,
    Running,
    Done,
    Failed(Instant),
}

/// Which pack comes next: pure.
#[derive(Debug)]
struct Order {
    packs: Vec<PackProgress>,
    /// Were read, first come first served.
    urgent: VecDeque<usize>,
    /// Where tree order goes on.
    cursor: usize,
    all: bool,
}

impl Order {
    fn new(packs: usize, all: bool) -> Self {
        Self { packs: vec![PackProgress::Todo; packs], urgent: VecDeque::new(), cursor: 0, all }
    }

    /// Notes a read of a pack that the tier did not have. False: nothing new.
    fn touch(&mut self, index: usize, now: Instant, retry_after: Duration) -> bool {
        let Some(pack) = self.packs.get_mut(index) else {
            return false;
        };
        let wanted = match *pack {
            PackProgress::Running => false,
            PackProgress::Failed(at) => now.duration_since(at) >= retry_after,
            // Done, and yet a read went to the lake: the tier lost it.
            PackProgress::Todo | PackProgress::Done => true,
        };
        if wanted && !self.urgent.contains(&index) {
            *pack = PackProgress::Todo;
            self.urgent.push_back(index);
            self.cursor = index;
        }
        wanted
    }

    fn next(&mut self) -> Option<usize> {
        while let Some(index) = self.urgent.pop_front() {
            if self.start(index) {
                return Some(index);
            }
        }
        if !self.all {
            return None;
        }
        let count = self.packs.len();
        let next = (0..count).map(|step| (self.cursor + step) % count);
        let index = next.into_iter().find(|i| self.packs.get(*i) == Some(&PackProgress::Todo))?;
        self.cursor = index + 1;
        self.start(index);
        Some(index)
    }

    fn start(&mut self, index: usize) -> bool {
        match self.packs.get_mut(index) {
            Some(pack) if *pack == PackProgress::Todo => {
                *pack = PackProgress::Running;
                true
            }
            _ => false,
        }
    }

    fn end(&mut self, index: usize, progress: PackProgress) {
        if let Some(pack) = self.packs.get_mut(index) {
            *pack = progress;
        }
    }
}

#[derive(Debug)]
struct State {
    order: Order,
    running: bool,
    /// Fills that readers began before their turn came; kept until it does.
    held: HashMap<PackId, Arc<PackFill>>,
}

#[derive(Debug)]
pub(super) struct Attached {
    packs: Vec<PackUse>,
    index: HashMap<PackId, usize>,
    state: Mutex<State>,
    cancel: CancellationToken,
}

/// The mounts that want prefetch, by pack.
#[derive(Debug, Default)]
pub(super) struct Registry {
    by_pack: Mutex<HashMap<PackId, Vec<Weak<Attached>>>>,
}

/// A mount's packs, known to the fetcher as long as this lives. Dropping it ends its prefetch.
#[derive(Debug)]
pub struct Attachment {
    inner: Arc<Inner>,
    attached: Arc<Attached>,
}

impl Attachment {
    pub(super) fn new(inner: &Arc<Inner>, packs: Vec<PackUse>, prefetch: Prefetch) -> Self {
        let index = packs.iter().enumerate().map(|(i, pack)| (pack.pack, i)).collect();
        let order = Order::new(packs.len(), prefetch == Prefetch::All);
        let attached = Arc::new(Attached {
            packs,
            index,
            state: Mutex::new(State { order, running: false, held: HashMap::new() }),
            cancel: inner.stopped.child_token(),
        });
        if prefetch != Prefetch::None && inner.packs.tier().is_some() {
            let mut by_pack = inner.registry.by_pack.lock();
            for pack in attached.packs.iter() {
                by_pack.entry(pack.pack).or_default().push(Arc::downgrade(&attached));
            }
        }
        Self { inner: inner.clone(), attached }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.attached.cancel.cancel();
        let mut by_pack = self.inner.registry.by_pack.lock();
        for pack in &self.attached.packs {
            if let Some(mounts) = by_pack.get_mut(&pack.pack) {
                mounts.retain(|mount| !std::ptr::eq(mount.as_ptr(), Arc::as_ptr(&self.attached)));
                if mounts.is_empty() {
                    by_pack.remove(&pack.pack);
                }
            }
        }
    }
}

impl Inner {
    /// A read goes to the lake for this pack: whoever has it mounted may want more of it.
    pub(super) fn touched(self: &Arc<Self>, pack: PackId) {
        if self.packs.tier().is_none() || self.paused().is_some() {
            return;
        }
        let mounts: Vec<Arc<Attached>> = match self.registry.by_pack.lock().get(&pack) {
            Some(mounts) => mounts.iter().filter_map(Weak::upgrade).collect(),
            None => return,
        };
        for mount in mounts {
            self.touch_mount(&mount, &pack);
        }
    }

    /// Begins to fill a pack that a reader wants a piece of, whatever comes before it in its mount's
    /// order. None: no mount wants it filled, or the tier does not take it just now.
    pub(super) fn begin_fill(self: &Arc<Self>, pack: &PackId) -> Option<Arc<PackFill>> {
        if self.packs.tier().is_none() || self.paused().is_some() {
            return None;
        }
        let mounts: Vec<Arc<Attached>> =
            self.registry.by_pack.lock().get(pack)?.iter().filter_map(Weak::upgrade).collect();
        mounts.iter().find_map(|mount| self.hold_fill(mount, pack))
    }

    fn hold_fill(self: &Arc<Self>, mount: &Arc<Attached>, pack: &PackId) -> Option<Arc<PackFill>> {
        let index = *mount.index.get(pack)?;
        let mut state = mount.state.lock();
        if let Some(held) = state.held.get(pack).filter(|held| !held.has_ended()) {
            return Some(held.clone());
        }
        let failed = matches!(state.order.packs.get(index), Some(PackProgress::Failed(_)) | None);
        state.held.retain(|_, held| !held.has_ended());
        if failed || state.held.len() >= self.cfg.fill_open_max {
            return None;
        }
        let fill = self.fill_pack(*pack);
        state.held.insert(*pack, fill.clone());
        Some(fill)
    }

    fn touch_mount(self: &Arc<Self>, mount: &Arc<Attached>, pack: &PackId) {
        let Some(index) = mount.index.get(pack) else {
            return;
        };
        {
            let retry_after = Duration::from_millis(self.cfg.tier_pause_ms);
            let mut state = mount.state.lock();
            if !state.order.touch(*index, Instant::now(), retry_after) {
                return;
            }
            if std::mem::replace(&mut state.running, true) {
                return;
            }
        }
        let (inner, mount) = (self.clone(), mount.clone());
        self.rt.spawn(async move {
            tokio::select! {
                () = inner.run_prefetch(&mount) => {}
                () = mount.cancel.cancelled() => {}
            }
        });
    }

    /// Fills packs until none is left, a few at once.
    async fn run_prefetch(self: &Arc<Self>, mount: &Arc<Attached>) {
        let at_once = self.cfg.fill_packs_max.max(1);
        let mut running = FuturesUnordered::new();
        loop {
            while running.len() < at_once {
                let next = {
                    let mut state = mount.state.lock();
                    let next = if self.paused().is_some() { None } else { state.order.next() };
                    // Decided under the lock: a touch that comes later starts another run.
                    state.running = next.is_some() || !running.is_empty();
                    next
                };
                let Some(index) = next else { break };
                let Some(pack) = mount.packs.get(index) else {
                    continue;
                };
                let fill = self.fill_pack(pack.pack);
                running.push(async move { (index, fill.wait().await) });
            }
            let Some((index, result)) = running.next().await else {
                return;
            };
            let progress = match result {
                Ok(()) => PackProgress::Done,
                Err(error) => {
                    tracing::warn!(%error, "a pack could not be prefetched; reads of it go to the lake");
                    PackProgress::Failed(Instant::now())
                }
            };
            let mut state = mount.state.lock();
            state.order.end(index, progress);
            state.held.retain(|_, held| !held.has_ended());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Duration = Duration::from_secs(30);

    fn drain(order: &mut Order) -> Vec<usize> {
        std::iter::from_fn(|| order.next()).collect()
    }

    #[test]
    fn packs_that_were_read_come_first_then_tree_order_from_there() {
        let mut order = Order::new(6, true);
        assert!(order.touch(3, Instant::now(), WAIT));
        assert_eq!(order.next(), Some(3));
        assert_eq!(order.next(), Some(4), "what follows the read");
        assert!(order.touch(1, Instant::now(), WAIT));
        assert_eq!(drain(&mut order), [1, 2, 5, 0]);
    }

    #[test]
    fn touched_brings_only_what_was_read() {
        let mut order = Order::new(6, false);
        order.touch(2, Instant::now(), WAIT);
        order.touch(5, Instant::now(), WAIT);
        assert_eq!(drain(&mut order), [2, 5]);
        assert!(!order.touch(2, Instant::now(), WAIT), "on its way already");
    }

    #[test]
    fn a_failed_pack_is_tried_again_only_after_a_while_and_a_lost_one_at_once() {
        let now = Instant::now();
        let mut order = Order::new(2, false);
        order.touch(0, now, WAIT);
        order.touch(1, now, WAIT);
        drain(&mut order);
        order.end(0, PackProgress::Failed(now));
        order.end(1, PackProgress::Done);
        assert!(!order.touch(0, now, WAIT));
        assert!(order.touch(0, now + WAIT, WAIT));
        assert!(order.touch(1, now, WAIT), "a read went to the lake for it: the tier lost it");
    }
}
