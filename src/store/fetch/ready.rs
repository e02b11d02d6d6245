//! What has to be known before the kernel reads packs by itself: that an object is complete and was
//! checked as asked, and that a reference is one that its pack has.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::format::ids::PackId;
use crate::format::placement::{Location, PackUse};
use crate::store::tier::FileIdentity;

use super::check::Checked;
use super::engine::{Inner, pack_of};
use super::packs::{OpenPack, PackState};
use super::types::{ContentRef, FetchError, Verify};

/// How often somebody looks who waits for a check that runs already.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Why the kernel may not have an object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    #[error("pack {pack} is not in the tier, not whole there, or was damaged and is being fetched again")]
    Absent { pack: PackId },
    #[error("pack {pack} has contents that nothing proves or that the lake no longer has")]
    Unproven { pack: PackId },
    #[error("pack {pack} could not be checked: the tier, or what describes the pack, cannot be read now")]
    Unchecked { pack: PackId },
    #[error("with --verify always each read has to be checked, so the kernel may read nothing by itself")]
    Always,
}

impl Inner {
    /// Waits until a pack's object is checked as asked; gives which file that is.
    pub(super) async fn ready(self: &Arc<Self>, used: &PackUse, verify: Verify) -> Result<FileIdentity, NotReady> {
        let pack = used.pack;
        if verify == Verify::Always {
            return Err(NotReady::Always);
        }
        let state = self.packs.state(&pack);
        let mut checked: Option<Checked> = None;
        loop {
            self.packs.expect_present(&state);
            let (inner, looked) = (self.clone(), state.clone());
            let open = self.look_at_tier(move || inner.packs.open(&looked)).await.flatten();
            let Some(open) = open.filter(|open| open.len == used.len) else {
                return Err(NotReady::Absent { pack });
            };
            let is_known = self.know_pack(&state, &open).await;
            let trusted = open.is_whole_verified() || (verify == Verify::Tier && open.is_complete());
            if trusted && state.knows_contents() {
                return Ok(open.identity);
            }
            match checked {
                Some(Checked::Unproven) => return Err(NotReady::Unproven { pack }),
                Some(Checked::Damaged) => return Err(NotReady::Absent { pack }),
                // Whole, but of another file than the one that is open by now.
                Some(Checked::Failed | Checked::Whole) => return Err(NotReady::Unchecked { pack }),
                None if !is_known => return Err(NotReady::Unchecked { pack }),
                None if verify == Verify::Tier => return Err(NotReady::Unproven { pack }),
                None => {}
            }
            if state.checking.swap(true, Ordering::AcqRel) {
                drop(open);
                tokio::time::sleep(LOOK_INTERVAL).await;
                continue;
            }
            checked = Some(self.check_object(&state, open).await);
            state.checking.store(false, Ordering::Release);
        }
    }

    /// Learns what a pack has, and whether its object lacks nothing. False: that cannot be read now.
    async fn know_pack(self: &Arc<Self>, state: &Arc<PackState>, open: &Arc<OpenPack>) -> bool {
        if state.knows_contents() && open.is_complete() {
            return true;
        }
        let Ok(meta) = self.metas.full(&state.pack, self.deadline()).await else {
            return false;
        };
        state.know_contents(&meta.index);
        if meta.is_complete_in_tier() && meta.index.len == open.len {
            open.set_complete();
        }
        true
    }

    /// Says whether a content lies where its reference says, by the index of the pack; of one without a
    /// place, whether it is zeros.
    pub(super) async fn proves(self: &Arc<Self>, c: &ContentRef) -> Result<bool, FetchError> {
        let Some(pack) = pack_of(c).filter(|_| c.location != Location::None) else {
            return match self.check_holes(c).await {
                Err(FetchError::BadPack { .. }) => Ok(false),
                other => other.map(|()| true),
            };
        };
        let state = self.packs.state(&pack);
        if !state.knows_contents() {
            let meta = self.metas.full(&pack, self.deadline()).await.map_err(|error| self.meta_error(c, error))?;
            state.know_contents(&meta.index);
        }
        Ok(state.has(c))
    }
}
