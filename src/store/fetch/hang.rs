//! A tier that hangs (a hard NFS mount whose server is away) must not take the lake's readers with it.
//!
//! Readers who wait look at the tier on blocking threads and leave after the stall time; the tier is
//! then believed to hang, and nobody looks at it, for the tier pause. The threads that hang are
//! bounded: above [`BUSY_MAX`] nobody looks either. Of a tier on a server nothing is read on the
//! caller's own thread (`try_read`): a worker that waits in the kernel would serve nobody else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::time::timeout;

use super::engine::Inner;
use super::packs::Packs;
use super::stats::bump;

/// Looks at the tier by waiting readers, at once.
const BUSY_MAX: usize = 128;

/// Whether the tier answers.
#[derive(Debug, Default)]
pub(super) struct Answers {
    busy: Arc<AtomicUsize>,
    silent_until_ms: AtomicU64,
}

/// Counts a look until it ends, however late.
struct Busy(Arc<AtomicUsize>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Packs {
    /// Says whether it is worth looking at the tier.
    pub(super) fn tier_answers(&self) -> bool {
        let answers = &self.answers;
        answers.busy.load(Ordering::Relaxed) < BUSY_MAX
            && self.now_ms() >= answers.silent_until_ms.load(Ordering::Relaxed)
    }
}

impl Inner {
    /// Looks at the tier, but not for longer than the stall time. None: no tier, or no answer.
    pub(super) async fn look_at_tier<T: Send + 'static>(&self, look: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.packs.tier().is_none() || !self.packs.tier_answers() {
            return None;
        }
        let answers = &self.packs.answers;
        answers.busy.fetch_add(1, Ordering::Relaxed);
        let busy = Busy(answers.busy.clone());
        let work = tokio::task::spawn_blocking(move || {
            let _busy = busy;
            look()
        });
        match timeout(self.cfg.stall_timeout(), work).await {
            Ok(found) => found.ok(),
            Err(_) => {
                bump(&self.counters.tier_errors);
                tracing::warn!("the tier does not answer; reads go on from the lake");
                let until = self.packs.now_ms() + self.cfg.tier_pause_ms;
                answers.silent_until_ms.store(until, Ordering::Relaxed);
                None
            }
        }
    }
}
