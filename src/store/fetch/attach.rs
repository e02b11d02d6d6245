//! What a mount brings into the tier behind its reads.
//!
//! A mount makes its packs known, with its policy. A read that has to go to the lake names its pack
//! here; each mount that has the pack then fills it (`touched`), or from there on everything it has
//! (`all`): first the packs that were read, then on in tree order, round to the start.
//!
//! Tree order is the order in which the tree first refers to the packs. Nobody knows it when the mount
//! is made: the placement says so, segment by segment, and whoever reads that tells it here
//! ([`TreeOrder`]) as he goes. Until he is done, only packs that he named (or that were read) are
//! brought, so that none comes too early; then the rest.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use futures::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use tokio::sync::Notify;
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
    /// Tree order, as far as it is known, and the place of each pack in it.
    sequence: Vec<usize>,
    places: Vec<Option<usize>>,
    /// Where the sequence goes on.
    cursor: usize,
    all: bool,
}

impl Order {
    fn new(packs: usize, all: bool) -> Self {
        Self {
            packs: vec![PackProgress::Todo; packs],
            urgent: VecDeque::new(),
            sequence: (0..packs).collect(),
            places: (0..packs).map(Some).collect(),
            cursor: 0,
            all,
        }
    }

    /// Forgets the order: it will be learned.
    fn unlearn(&mut self) {
        self.sequence.clear();
        self.places.fill(None);
        self.cursor = 0;
    }

    /// Notes that the tree refers to a pack behind those learned so far.
    fn learn(&mut self, index: usize) {
        let place = self.sequence.len();
        if let Some(unknown @ None) = self.places.get_mut(index) {
            *unknown = Some(place);
            self.sequence.push(index);
        }
    }

    /// Appends what was not learned: nothing more will be.
    fn learn_rest(&mut self) {
        (0..self.packs.len()).for_each(|index| self.learn(index));
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
            self.cursor = self.places.get(index).copied().flatten().unwrap_or(self.cursor);
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
        let (before, behind) = self.sequence.split_at(self.cursor.min(self.sequence.len()));
        let next = behind.iter().chain(before).copied();
        let index = next.into_iter().find(|i| self.packs.get(*i) == Some(&PackProgress::Todo))?;
        self.cursor = self.places.get(index).copied().flatten().map_or(self.cursor, |place| place + 1);
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
    /// A read went to the lake: from now on prefetch is wanted.
    begun: bool,
}

#[derive(Debug)]
pub(super) struct Attached {
    packs: Vec<PackUse>,
    index: HashMap<PackId, usize>,
    state: Mutex<State>,
    /// There may be a next pack for a run that has room for one.
    more: Notify,
    cancel: CancellationToken,
}

/// The mounts, by pack.
#[derive(Debug, Default)]
pub(super) struct Registry {
    /// Those that want prefetch.
    by_pack: Mutex<HashMap<PackId, Vec<Weak<Attached>>>>,
    /// How many there are, whatever they want.
    mounts: Mutex<HashMap<PackId, usize>>,
}

impl Registry {
    fn note_mounted(&self, packs: &[PackUse]) {
        let mut mounts = self.mounts.lock();
        packs.iter().for_each(|pack| *mounts.entry(pack.pack).or_insert(0) += 1);
    }

    fn is_mounted(&self, pack: &PackId) -> bool {
        self.mounts.lock().contains_key(pack)
    }

    /// Gives those of these packs that no mount has any more.
    fn note_unmounted(&self, packs: &[PackUse]) -> Vec<PackId> {
        let mut mounts = self.mounts.lock();
        let mut left = Vec::new();
        for PackUse { pack, .. } in packs {
            if let Some(count) = mounts.get_mut(pack) {
                *count -= 1;
                if *count == 0 {
                    mounts.remove(pack);
                    left.push(*pack);
                }
            }
        }
        left
    }
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
            state: Mutex::new(State { order, running: false, held: HashMap::new(), begun: false }),
            more: Notify::new(),
            cancel: inner.stopped.child_token(),
        });
        inner.registry.note_mounted(&attached.packs);
        if prefetch != Prefetch::None && inner.packs.tier().is_some() {
            let mut by_pack = inner.registry.by_pack.lock();
            for pack in attached.packs.iter() {
                by_pack.entry(pack.pack).or_default().push(Arc::downgrade(&attached));
            }
        }
        Self { inner: inner.clone(), attached }
    }

    /// Says that the order of the packs will be told; until then it counts as unknown.
    pub fn expect_order(&self) -> TreeOrder {
        self.attached.state.lock().order.unlearn();
        TreeOrder { inner: Arc::clone(&self.inner), attached: Arc::downgrade(&self.attached) }
    }
}

/// Tells an attachment in which order its tree refers to the packs. When it is dropped, the packs
/// that were not named come last.
#[derive(Debug)]
pub struct TreeOrder {
    inner: Arc<Inner>,
    attached: Weak<Attached>,
}

impl TreeOrder {
    /// Names the next packs; false: nobody wants to know any more.
    pub fn learn(&self, packs: impl IntoIterator<Item = PackId>) -> bool {
        self.tell(|mount, order| {
            let indexes = packs.into_iter().filter_map(|pack| mount.index.get(&pack));
            indexes.for_each(|index| order.learn(*index));
        })
    }

    fn tell(&self, tell: impl FnOnce(&Attached, &mut Order)) -> bool {
        let Some(mount) = self.attached.upgrade() else {
            return false;
        };
        let mut state = mount.state.lock();
        tell(&mount, &mut state.order);
        let starts = state.begun && state.order.all && !state.running;
        state.running |= starts;
        drop(state);
        mount.more.notify_one();
        if starts {
            self.inner.spawn_prefetch(&mount);
        }
        true
    }
}

impl Drop for TreeOrder {
    fn drop(&mut self) {
        self.tell(|_, order| order.learn_rest());
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.attached.cancel.cancel();
        self.unregister();
        // A pack that is evicted holds its space as long as anybody has it open. Not on this thread: the
        // tier may hang.
        let (inner, packs) = (self.inner.clone(), self.inner.registry.note_unmounted(&self.attached.packs));
        self.inner.rt.spawn_blocking(move || {
            // Unless somebody has mounted it again.
            let unmounted = packs.iter().filter(|pack| !inner.registry.is_mounted(pack));
            unmounted.for_each(|pack| inner.packs.close(pack));
        });
    }
}

impl Attachment {
    fn unregister(&self) {
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
            state.begun = true;
            if !state.order.touch(*index, Instant::now(), retry_after) {
                return;
            }
            if std::mem::replace(&mut state.running, true) {
                mount.more.notify_one();
                return;
            }
        }
        self.spawn_prefetch(mount);
    }

    fn spawn_prefetch(self: &Arc<Self>, mount: &Arc<Attached>) {
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
            if running.is_empty() {
                return;
            }
            let ended = tokio::select! {
                ended = running.next() => ended,
                () = mount.more.notified() => None,
            };
            let Some((index, result)) = ended else { continue };
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
    fn while_the_order_is_being_learned_only_what_it_names_is_brought() {
        let mut order = Order::new(5, true);
        order.unlearn();
        assert!(order.touch(3, Instant::now(), WAIT));
        assert_eq!(drain(&mut order), [3], "of the others nothing is known yet");
        order.learn(4);
        order.learn(3);
        order.learn(4);
        assert_eq!(drain(&mut order), [4]);
        order.learn(1);
        assert_eq!(drain(&mut order), [1]);
        order.learn_rest();
        assert_eq!(drain(&mut order), [0, 2]);
    }

    #[test]
    fn the_learned_order_goes_on_behind_what_was_read() {
        let mut order = Order::new(5, true);
        order.unlearn();
        [4, 2, 0, 3, 1].into_iter().for_each(|index| order.learn(index));
        assert!(order.touch(0, Instant::now(), WAIT));
        assert_eq!(drain(&mut order), [0, 3, 1, 4, 2]);
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
