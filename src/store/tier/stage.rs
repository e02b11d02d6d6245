//! Staging: a pack's bytes arrive span by span, survive a kill, and are published by a link.
//!
//! ```text
//! stage -> write_at* -> span_done(i)* -> put_sidecar(index) -> publish
//! ```
//!
//! Invariants:
//! * Only verified bytes are written, at their final offsets; the data file is never shortened. So
//!   whoever writes late writes what is there already.
//! * A span's done-mark is made after its bytes were made durable. Marks and data file carry the
//!   generation of their staging folder: a mark that comes late, from a folder that was given up,
//!   says nothing about another data file.
//! * `publish` links the data file under its final name: one winner, and the loser's bytes are equal.

use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use crate::format::ids::{NodeId, PackId};
use crate::store::tier::error::TierError;
use crate::store::tier::io::{TierFile, TierIo, read_full};
use crate::store::tier::layout::{self, Sidecar, StagingName, parse_staging};
use crate::store::tier::objects::PackFile;
use crate::store::tier::real::RealIo;
use crate::store::tier::turns::Turn;
use crate::store::tier::{Core, Tier};

/// What one claim and one done-mark cover: 64 MiB of a pack.
pub const SPAN_LEN: u64 = 64 << 20;
const TRIES: u32 = 8;

/// What `staging/<pack>/generation` says.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Generation {
    pub format: u32,
    pub generation: Uuid,
    pub len_bytes: u64,
    /// What one claim and one done-mark cover.
    pub span_len_bytes: u64,
}

impl Generation {
    pub(crate) fn spans(&self) -> u32 {
        u32::try_from(self.len_bytes.div_ceil(self.span_len_bytes.max(1))).unwrap_or(u32::MAX)
    }

    pub(crate) fn span_range(&self, span: u32) -> Range<u64> {
        let start = u64::from(span).saturating_mul(self.span_len_bytes).min(self.len_bytes);
        start..start.saturating_add(self.span_len_bytes).min(self.len_bytes)
    }
}

/// Whether this process may fetch a span, or another does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    /// Ours until `release_claim`; renewed by [`Stage::renew_claims`] and [`Tier::heartbeat`].
    Mine,
    /// The same, taken from an owner that was silent for too long: part of the span may be there.
    TakenOver,
    /// The span has arrived.
    Done,
    /// Another fetches it: wait for its done-mark, ask its owner, or go to the lake.
    Other {
        node: NodeId,
        /// Since the owner's last heartbeat, by the server's clock.
        idle_ms: i64,
        /// Where the owner answers peers, if it does.
        address: Option<String>,
    },
}

/// The staging file of one pack. May be used by many threads at once.
#[derive(Debug)]
pub struct Stage<I: TierIo = RealIo> {
    tier: Tier<I>,
    pack: PackId,
    dir: String,
    generation: Generation,
    /// The data file: under its name in staging, and once published under the object's.
    file: RwLock<Arc<I::File>>,
    done: Mutex<Vec<bool>>,
}

/// A staging file and which of its spans are done.
type OpenStaging<I> = (<I as TierIo>::File, Vec<bool>);

impl<I: TierIo> Tier<I> {
    /// Opens a pack's staging file, or makes it; what arrived in an earlier run is kept. Gone: the pack
    /// was published meanwhile.
    pub fn stage(&self, pack: &PackId, len: u64) -> Result<Stage<I>, TierError> {
        let core = &self.core;
        let dir = layout::staging_dir(pack);
        for _ in 0..TRIES {
            let generation = core.generation(pack, &dir, len)?;
            let Some((file, done)) = core.open_staging(&dir, &generation)? else {
                core.give_up_staging(&dir)?;
                continue;
            };
            let there = done.iter().filter(|done| **done).count() as u64 * generation.span_len_bytes;
            core.check_room(pack, generation.len_bytes.saturating_sub(there))?;
            match file.extend(len) {
                Ok(()) => {}
                Err(error) => return Err(TierError::io("extend", &dir, error)),
            }
            let stage = Stage {
                tier: self.clone(),
                pack: *pack,
                dir,
                generation,
                file: RwLock::new(Arc::new(file)),
                done: Mutex::new(done),
            };
            return match stage.is_overtaken()? {
                true => Err(TierError::io("stage", &stage.dir, Errno::ENOENT.into())),
                false => Ok(stage),
            };
        }
        Err(TierError::Contended { path: dir, times: TRIES })
    }
}

impl<I: TierIo> Core<I> {
    /// Reads which generation a staging folder has, or fixes it: one winner.
    fn generation(&self, pack: &PackId, dir: &str, len: u64) -> Result<Generation, TierError> {
        let path = layout::generation(dir);
        self.refresh(dir);
        for _ in 0..TRIES {
            match self.read_json::<Generation>(&path) {
                Ok(Some(found)) if found.len_bytes == len => return Ok(found),
                Ok(Some(found)) => {
                    return Err(TierError::WrongSize { pack: *pack, expected: found.len_bytes, found: len });
                }
                Ok(None) => {}
                Err(TierError::BadFile { .. }) => self.give_up_staging(dir)?,
                Err(error) => return Err(error),
            }
            let ours = Generation {
                format: 1,
                generation: self.nonce(),
                span_len_bytes: self.cfg.span_len_bytes.max(1),
                len_bytes: len,
            };
            let text = serde_json::to_vec(&ours).expect("a generation has only plain fields");
            if self.write_new(&path, &text)? {
                return Ok(ours);
            }
        }
        Err(TierError::Contended { path, times: TRIES })
    }

    /// Opens the data file and reads the marks. None: marks without their bytes, which a crash of
    /// the medium may leave; nothing of it can be trusted.
    fn open_staging(&self, dir: &str, generation: &Generation) -> Result<Option<OpenStaging<I>>, TierError> {
        let path = layout::staging_data(dir, &generation.generation);
        let file = match self.io.create(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                self.io.open(&path, true).map_err(|e| TierError::io("open", &path, e))?
            }
            Err(error) => return Err(TierError::io("create", &path, error)),
        };
        let done = self.marks(dir, generation)?;
        let size = file.stat().map_err(|e| TierError::io("look at", &path, e))?.size_bytes;
        let marked_end = done
            .iter()
            .rposition(|d| *d)
            .map_or(0, |last| generation.span_range(u32::try_from(last).unwrap_or(u32::MAX)).end);
        Ok((size >= marked_end && size <= generation.len_bytes).then_some((file, done)))
    }

    fn marks(&self, dir: &str, generation: &Generation) -> Result<Vec<bool>, TierError> {
        let mut done = vec![false; generation.spans() as usize];
        for listed in self.list(dir)?.unwrap_or_default() {
            if let Some(StagingName::Done(span, of)) = parse_staging(&listed.name)
                && of == generation.generation
                && let Some(mark) = done.get_mut(span as usize)
            {
                *mark = true;
            }
        }
        Ok(done)
    }

    /// Moves a whole staging folder into the trash: at once, for everybody.
    pub(super) fn give_up_staging(&self, dir: &str) -> Result<(), TierError> {
        let batch = self.new_batch()?;
        let name = layout::file_name(dir);
        self.move_away(dir, &format!("{batch}/staging.{name}"))?;
        Ok(())
    }
}

impl<I: TierIo> Stage<I> {
    /// Gives the pack.
    pub fn pack(&self) -> PackId {
        self.pack
    }

    /// Gives the pack's length.
    pub fn len_bytes(&self) -> u64 {
        self.generation.len_bytes
    }

    /// Gives what one claim and one done-mark cover; the last span may be shorter.
    pub fn span_len(&self) -> u64 {
        self.generation.span_len_bytes
    }

    /// Gives how long a claim on a span lasts without a heartbeat.
    pub fn span_claim_ttl_ms(&self) -> u64 {
        self.tier.core.cfg.span_claim_ttl_ms
    }

    /// Gives the data file's id: a published object of the same id is this file.
    pub fn file_id(&self) -> Option<u64> {
        self.file().stat().ok().map(|stat| stat.file_id)
    }

    /// Counts the spans.
    pub fn spans(&self) -> u32 {
        self.generation.spans()
    }

    /// Gives a span's range in the pack.
    pub fn span_range(&self, span: u32) -> Range<u64> {
        self.generation.span_range(span)
    }

    /// Says whether a span is marked done, by this or an earlier run.
    pub fn is_done(&self, span: u32) -> bool {
        self.done.lock().get(span as usize).copied().unwrap_or(false)
    }

    /// Looks for marks that others made meanwhile; gives how many spans are done.
    pub fn refresh_done(&self) -> Result<usize, TierError> {
        let found = self.tier.core.marks(&self.dir, &self.generation)?;
        let mut done = self.done.lock();
        for (mark, found) in done.iter_mut().zip(found) {
            *mark |= found;
        }
        Ok(done.iter().filter(|d| **d).count())
    }

    /// Asks the server anew what others did: their marks, and their bytes. Fails where the folder was
    /// published or given up.
    pub fn refresh(&self) -> Result<(), TierError> {
        self.refresh_done()?;
        self.look_at_data()
    }

    /// Fails where the data file has no name here any more. Opening it asks the server: pages of it
    /// that are older than another's write are dropped.
    fn look_at_data(&self) -> Result<(), TierError> {
        let path = layout::staging_data(&self.dir, &self.generation.generation);
        self.tier.core.io.open(&path, false).map(drop).map_err(|e| TierError::io("open", &path, e))
    }

    /// Asks whether to fetch a span: several nodes share one download so. The number behind the last
    /// span stands for the right to publish.
    pub fn claim(&self, span: u32) -> Result<Claimed, TierError> {
        if self.is_done(span) {
            return Ok(Claimed::Done);
        }
        let core = &self.tier.core;
        let path = layout::span_claim(&self.dir, span, &self.generation.generation);
        // A claim must not make a folder anew that was published or given up.
        self.look_at_data()?;
        let turn = core.take_turn(&path, core.cfg.span_claim_ttl_ms)?;
        // Its owner may have finished between our look and our claim.
        self.refresh_done()?;
        if self.is_done(span) {
            core.give_turn(&path)?;
            return Ok(Claimed::Done);
        }
        Ok(match turn {
            Turn::Mine { taken_over: false } => Claimed::Mine,
            Turn::Mine { taken_over: true } => Claimed::TakenOver,
            Turn::Other { owner, idle_ms } => Claimed::Other { node: owner.node, idle_ms, address: owner.address },
        })
    }

    /// Renews what this process has claimed of the pack; gives the spans that others took over.
    pub fn renew_claims(&self) -> Result<Vec<u32>, TierError> {
        let core = &self.tier.core;
        let mut lost = Vec::new();
        for (span, path) in self.claims() {
            if !core.renew_turn(&path)? {
                core.state.lock().claims.remove(&path);
                lost.push(span);
            }
        }
        Ok(lost)
    }

    /// Lists what this process has claimed of the pack.
    fn claims(&self) -> Vec<(u32, String)> {
        let ours = |path: &String| match parse_staging(layout::file_name(path)) {
            Some(StagingName::Claim(span, of)) if of == self.generation.generation => Some((span, path.clone())),
            _ => None,
        };
        let state = self.tier.core.state.lock();
        let from_here = state.claims.range(self.dir.clone()..);
        from_here.take_while(|path| path.starts_with(&self.dir)).filter_map(ours).collect()
    }

    /// Gives a claim up.
    pub fn release_claim(&self, span: u32) -> Result<(), TierError> {
        self.tier.core.give_turn(&layout::span_claim(&self.dir, span, &self.generation.generation))
    }

    /// Writes verified bytes at their final offset.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), TierError> {
        let len = bytes.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.generation.len_bytes) {
            return Err(TierError::OutOfRange { pack: self.pack, offset, len, pack_len: self.generation.len_bytes });
        }
        self.file().write_at(bytes, offset).map_err(|e| TierError::io("write", &self.dir, e))
    }

    /// Reads what was staged; the caller knows what of it is there.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, TierError> {
        read_full(&*self.file(), buf, offset).map_err(|e| TierError::io("read", &self.dir, e))
    }

    /// Makes what was written durable, then marks one span as arrived.
    pub fn span_done(&self, span: u32) -> Result<(), TierError> {
        self.spans_done(&[span])
    }

    /// The same for several spans with one sync.
    pub fn spans_done(&self, spans: &[u32]) -> Result<(), TierError> {
        self.file().sync().map_err(|e| TierError::io("sync", &self.dir, e))?;
        for span in spans {
            let path = layout::span_done(&self.dir, *span, &self.generation.generation);
            match self.tier.core.io.create(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(TierError::io("mark", &path, error));
                }
                _ => {}
            }
            if let Some(mark) = self.done.lock().get_mut(*span as usize) {
                *mark = true;
            }
            if self.tier.core.state.lock().claims.contains(&layout::span_claim(
                &self.dir,
                *span,
                &self.generation.generation,
            )) {
                self.release_claim(*span)?;
            }
        }
        Ok(())
    }

    /// Publishes the pack. Another node's equal object under the name is as good.
    pub fn publish(&self) -> Result<PackFile<I::File>, TierError> {
        self.check_complete()?;
        let core = &self.tier.core;
        if core.look(&layout::sidecar(&self.pack, Sidecar::Index))?.is_none() {
            return Err(TierError::NoIndex { pack: self.pack });
        }
        let data = layout::staging_data(&self.dir, &self.generation.generation);
        let object = layout::object(&self.pack);
        for _ in 0..TRIES {
            // What this client remembers of the name may be older than an eviction.
            core.refresh(&layout::fan_dir(&self.pack));
            match core.io.link(&data, &object) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(TierError::io("publish", &object, error)),
            }
            core.sync_dir(&layout::fan_dir(&self.pack))?;
            let Some(published) = self.tier.pack(&self.pack)? else {
                continue;
            };
            if published.len == self.generation.len_bytes {
                // Leftovers cost space, not correctness: the steward removes what stays.
                self.rest_on(&object);
                let _ = self.clean();
                return Ok(published);
            }
            let why = format!("{} bytes instead of {}", published.len, self.generation.len_bytes);
            self.tier.quarantine(&self.pack, &published.identity, &why)?;
        }
        Err(TierError::Contended { path: object, times: TRIES })
    }

    /// Says whether the pack was published before this folder was whole. A publisher links the object
    /// before it clears its folder: so who finds the folder cleared, or clears it with us, has the
    /// object to be found, and would bring all of it for nothing. What was made anew goes at once.
    fn is_overtaken(&self) -> Result<bool, TierError> {
        let object = layout::object(&self.pack);
        // An old cached name would show an object that was set aside, and cost who brings it anew its claims.
        self.tier.core.refresh(layout::parent(&object));
        let Some(published) = self.tier.pack(&self.pack)? else {
            return Ok(false);
        };
        if published.len != self.generation.len_bytes {
            // Not ours to decide: it is set aside when ours is published.
            return Ok(false);
        }
        self.rest_on(&object);
        let _ = self.clean();
        Ok(true)
    }

    fn file(&self) -> Arc<I::File> {
        self.file.read().clone()
    }

    /// Goes on with the published object. An NFS client keeps a removed name alive as `.nfs*` while it
    /// is open, and then the staging folder cannot be removed.
    fn rest_on(&self, object: &str) {
        if let Ok(file) = self.tier.core.io.open(object, false) {
            *self.file.write() = Arc::new(file);
        }
    }

    fn check_complete(&self) -> Result<(), TierError> {
        self.refresh_done()?;
        if let Some(span) = self.done.lock().iter().position(|d| !*d) {
            return Err(TierError::Incomplete { pack: self.pack, span: u32::try_from(span).unwrap_or(u32::MAX) });
        }
        self.file().sync().map_err(|e| TierError::io("sync", &self.dir, e))?;
        let found = self.file().stat().map_err(|e| TierError::io("look at", &self.dir, e))?.size_bytes;
        if found != self.generation.len_bytes {
            return Err(TierError::WrongSize { pack: self.pack, expected: self.generation.len_bytes, found });
        }
        Ok(())
    }

    /// Removes what this generation left in staging: marks, claims, then the data's second name.
    fn clean(&self) -> Result<(), TierError> {
        let core = &self.tier.core;
        let data = layout::staging_data(&self.dir, &self.generation.generation);
        for listed in core.list(&self.dir)?.unwrap_or_default() {
            let path = format!("{}/{}", self.dir, listed.name);
            match parse_staging(&listed.name) {
                Some(StagingName::Claim(_, of) | StagingName::Done(_, of)) if of == self.generation.generation => {
                    core.state.lock().claims.remove(&path);
                    core.remove(&path)?;
                }
                _ => {}
            }
        }
        core.remove(&data)?;
        core.remove(&layout::generation(&self.dir))?;
        let _ = core.io.rmdir(&self.dir);
        Ok(())
    }

    /// Gives all claims up; what arrived stays for whoever goes on.
    pub fn abandon(&self) -> Result<(), TierError> {
        self.claims().into_iter().try_for_each(|(span, _)| self.release_claim(span))
    }

    /// Throws away what arrived (it turned out to be damaged).
    pub fn discard(self) -> Result<(), TierError> {
        self.tier.core.give_up_staging(&self.dir)
    }
}
