//! The real tier behind the fetcher's seam.

use std::io;
use std::time::Duration;

use crate::format::ids::{PackId, TierId};
use crate::store::tier::{Claimed, FileIdentity, PackFile, Sidecar, Stage, Tier, TierError};

use super::port::{FetchStage, FetchTier, SpanClaim};

impl FetchTier for Tier {
    fn id(&self) -> TierId {
        Tier::id(self)
    }

    fn is_remote(&self) -> bool {
        Tier::is_remote(self)
    }

    fn open_pack(&self, pack: &PackId) -> io::Result<Option<PackFile>> {
        self.pack(pack).map_err(to_io)
    }

    fn open_stage(&self, pack: &PackId, len: u64) -> io::Result<Box<dyn FetchStage>> {
        Ok(Box::new(self.stage(pack, len).map_err(to_io)?))
    }

    fn quarantine(&self, pack: &PackId, identity: &FileIdentity, why: &str) -> io::Result<()> {
        Tier::quarantine(self, pack, identity, why).map(drop).map_err(to_io)
    }

    fn sidecar(&self, pack: &PackId, part: Sidecar) -> io::Result<Option<Vec<u8>>> {
        Tier::sidecar(self, pack, part).map_err(to_io)
    }

    fn has_sidecar(&self, pack: &PackId, part: Sidecar) -> io::Result<bool> {
        Tier::has_sidecar(self, pack, part).map_err(to_io)
    }

    fn put_sidecar(&self, pack: &PackId, part: Sidecar, bytes: &[u8]) -> io::Result<Vec<u8>> {
        Tier::put_sidecar(self, pack, part, bytes).map_err(to_io)
    }
}

impl FetchStage for Stage {
    fn span_len(&self) -> u64 {
        Stage::span_len(self)
    }

    fn file_id(&self) -> Option<u64> {
        Stage::file_id(self)
    }

    fn is_done(&self, span: u64) -> bool {
        u32::try_from(span).is_ok_and(|span| Stage::is_done(self, span))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        Stage::write_at(self, bytes, offset).map_err(to_io)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        Stage::read_at(self, buf, offset).map_err(to_io)
    }

    fn mark_done(&self, span: u64) -> io::Result<()> {
        self.span_done(to_span(span)?).map_err(to_io)
    }

    fn claim(&self, span: u64) -> io::Result<SpanClaim> {
        let claimed = Stage::claim(self, to_span(span)?).map_err(to_io)?;
        Ok(match claimed {
            Claimed::Mine => SpanClaim::Mine { taken_over: false },
            Claimed::TakenOver => SpanClaim::Mine { taken_over: true },
            Claimed::Done => SpanClaim::Done,
            Claimed::Other { node, idle_ms, address } => {
                let left_ms = i64::try_from(Stage::span_claim_ttl_ms(self)).unwrap_or(i64::MAX).saturating_sub(idle_ms);
                SpanClaim::Other {
                    node,
                    peer: address,
                    left: Duration::from_millis(u64::try_from(left_ms).unwrap_or(0)),
                }
            }
        })
    }

    fn claim_ttl(&self) -> Duration {
        Duration::from_millis(Stage::span_claim_ttl_ms(self))
    }

    fn renew(&self) -> io::Result<Vec<u64>> {
        Ok(self.renew_claims().map_err(to_io)?.into_iter().map(u64::from).collect())
    }

    fn refresh(&self) -> io::Result<()> {
        Stage::refresh(self).map_err(to_io)
    }

    fn release(&self) {
        // What stays is taken over when it is old enough.
        if let Err(error) = self.abandon() {
            tracing::debug!(%error, "a claim could not be given up");
        }
    }

    fn publish(&self) -> io::Result<PackFile> {
        Stage::publish(self).map_err(to_io)
    }
}

fn to_span(span: u64) -> io::Result<u32> {
    u32::try_from(span).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Says whether a call failed because another node was faster: the staging folder or the index that
/// it needs was there, and was taken away. To begin again helps.
pub(super) fn is_overtaken(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<TierError>());
    matches!(inner, Some(TierError::NoIndex { .. } | TierError::Gone { .. }))
}

/// Says whether the tier has no room: it asks its steward then, which may make some soon.
pub(super) fn is_full(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<TierError>());
    inner.is_some_and(TierError::is_full)
}

/// Keeps the file system's own error number in the message's source; the whole chain is in the text.
fn to_io(error: TierError) -> io::Error {
    io::Error::other(error)
}
