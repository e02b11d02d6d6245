//! The real tier behind the fetcher's seam.

use std::io;

use crate::format::ids::{PackId, TierId};
use crate::store::tier::{FileIdentity, PackFile, SPAN_LEN, Sidecar, Stage, Tier, TierError};

use super::port::{FetchStage, FetchTier};

impl FetchTier for Tier {
    fn id(&self) -> TierId {
        Tier::id(self)
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

    fn put_sidecar(&self, pack: &PackId, part: Sidecar, bytes: &[u8]) -> io::Result<Vec<u8>> {
        Tier::put_sidecar(self, pack, part, bytes).map_err(to_io)
    }
}

impl FetchStage for Stage {
    fn span_len(&self) -> u64 {
        SPAN_LEN
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
        match u32::try_from(span) {
            Ok(span) => self.span_done(span).map_err(to_io),
            Err(_) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn publish(&self) -> io::Result<PackFile> {
        Stage::publish(self).map_err(to_io)
    }
}

/// Says whether a call failed because another node was faster: the staging folder or the index that
/// it needs was there, and was taken away. To begin again helps.
pub(super) fn is_overtaken(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<TierError>());
    matches!(inner, Some(TierError::NoIndex { .. } | TierError::Gone { .. }))
}

/// Keeps the file system's own error number in the message's source; the whole chain is in the text.
fn to_io(error: TierError) -> io::Error {
    io::Error::other(error)
}
