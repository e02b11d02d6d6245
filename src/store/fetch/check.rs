//! Digesting whole objects: before a pack is published, and of the tier's objects once on each node.
//!
//! One object is digested at a time, in the background, soon after its first use: afterwards reads go
//! straight to the file and passthrough may take it. What is damaged is set aside and fetched again.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::format::digest::{BLOCK_LEN, ContentHasher};
use crate::format::ids::ContentDigest;
use crate::format::pack::PackedContent;

use super::engine::Inner;
use super::pack_meta::PackMeta;
use super::packs::{OpenPack, PackState};
use super::plan::unit_count;
use super::types::Verify;

/// What is read at once while digesting.
const WINDOW_LEN: usize = 1 << 20;

/// Reads a file in large steps, forwards.
struct Window<'a> {
    read: &'a dyn Fn(&mut [u8], u64) -> io::Result<()>,
    buf: Vec<u8>,
    at: u64,
    len: usize,
    end: u64,
}

impl<'a> Window<'a> {
    fn new(read: &'a dyn Fn(&mut [u8], u64) -> io::Result<()>, end: u64) -> Self {
        Self { read, buf: vec![0; WINDOW_LEN], at: 0, len: 0, end }
    }

    /// Gives some bytes from `offset` on, at most `most`, at least one.
    fn bytes(&mut self, offset: u64, most: u64) -> io::Result<&[u8]> {
        let inside = offset >= self.at && offset < self.at + self.len as u64;
        if !inside {
            self.len = (self.end.saturating_sub(offset)).min(WINDOW_LEN as u64) as usize;
            self.at = offset;
            let target = self.buf.get_mut(..self.len).filter(|b| !b.is_empty());
            (self.read)(target.ok_or(io::ErrorKind::UnexpectedEof)?, offset)?;
        }
        let start = (offset - self.at) as usize;
        let stop = self.len.min(start.saturating_add(most as usize));
        self.buf.get(start..stop).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

fn digest_content(window: &mut Window<'_>, content: &PackedContent) -> io::Result<ContentDigest> {
    let mut hasher = ContentHasher::new();
    for extent in content.extents().iter() {
        hasher.update_zeros(extent.logical.saturating_sub(hasher.len()));
        let mut done = 0;
        while done < extent.len {
            let bytes = window.bytes(extent.offset + done, extent.len - done)?;
            hasher.update(bytes);
            done += bytes.len() as u64;
        }
    }
    hasher.update_zeros(content.size.saturating_sub(hasher.len()));
    Ok(hasher.finish().0)
}

/// Says whether a range has nothing but zeros.
fn is_zeros(window: &mut Window<'_>, from: u64, to: u64) -> io::Result<bool> {
    let mut at = from;
    while at < to {
        let bytes = window.bytes(at, to - at)?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += bytes.len() as u64;
    }
    Ok(true)
}

/// How a check of an object ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Checked {
    /// This node has digested all of it.
    Whole,
    /// Nothing is wrong with it, and not everything about it can be proved.
    Unproven,
    /// It was set aside, and is fetched again.
    Damaged,
    /// It could not be read to its end, or what describes it could not: another time.
    Failed,
}

/// What digesting an object found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Findings {
    /// Contents with other bytes than their digest says.
    pub bad: Vec<u32>,
    /// Contents that nothing is known of that would prove them.
    pub unproven: usize,
}

/// Digests every content that has a digest and bytes in the tier.
pub(super) fn digest_all(
    meta: &PackMeta,
    read: &dyn Fn(&mut [u8], u64) -> io::Result<()>,
    go_on: &dyn Fn() -> bool,
) -> io::Result<Findings> {
    let mut window = Window::new(read, meta.index.len);
    let mut at = 0;
    let mut findings = Findings::default();
    for (position, content) in (0_u32..).zip(&meta.index.contents) {
        if !go_on() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        // A mapping shows the padding behind a content.
        if !is_zeros(&mut window, at, content.place.start())? {
            findings.bad.push(position);
        }
        at = content.end();
        if meta.proof().is_some() && !meta.is_in_tier(position) {
            continue;
        }
        match meta.digest(position) {
            Some(expected) if digest_content(&mut window, content)? != expected => findings.bad.push(position),
            Some(_) => {}
            None => findings.unproven += 1,
        }
        for pair in content.extents().windows(2) {
            if let [before, behind] = pair
                && !is_zeros(&mut window, before.offset.saturating_add(before.len), behind.offset)?
            {
                findings.bad.push(position);
            }
        }
    }
    if !is_zeros(&mut window, at, meta.index.len)? {
        findings.bad.push(u32::try_from(meta.index.contents.len()).unwrap_or(u32::MAX).saturating_sub(1));
    }
    Ok(findings)
}

#[derive(Debug, Default)]
struct Queue {
    /// Weak: what nobody has open any more need not be digested, and must not be held open for it.
    waiting: VecDeque<(Arc<PackState>, Weak<OpenPack>)>,
    running: bool,
}

/// Objects that wait to be digested.
#[derive(Debug, Default)]
pub(super) struct CheckQueue {
    queue: Mutex<Queue>,
}

impl Inner {
    /// Has an object digested in the background, unless that is on its way or of no use.
    pub(super) fn begin_check(self: &Arc<Self>, state: &Arc<PackState>, open: &Arc<OpenPack>, verify: Verify) {
        if verify != Verify::Node || open.is_whole_verified() || state.checking.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut queue = self.checks.queue.lock();
        queue.waiting.push_back((state.clone(), Arc::downgrade(open)));
        if std::mem::replace(&mut queue.running, true) {
            return;
        }
        drop(queue);
        let inner = self.clone();
        self.rt.spawn(async move {
            let stopped = inner.stopped.clone();
            tokio::select! {
                () = inner.run_checks() => {}
                () = stopped.cancelled() => {}
            }
        });
    }

    async fn run_checks(self: &Arc<Self>) {
        loop {
            let next = {
                let mut queue = self.checks.queue.lock();
                let next = queue.waiting.pop_front();
                queue.running = next.is_some();
                next
            };
            let Some((state, open)) = next else { return };
            if let Some(open) = open.upgrade() {
                self.check_object(&state, open).await;
            }
            state.checking.store(false, Ordering::Release);
        }
    }

    pub(super) async fn check_object(self: &Arc<Self>, state: &Arc<PackState>, open: Arc<OpenPack>) -> Checked {
        let Ok(meta) = self.metas.full(&state.pack, self.deadline()).await else {
            return Checked::Failed;
        };
        state.know_contents(&meta.index);
        let begun = std::time::Instant::now();
        let (file, seen, stopped) = (open.clone(), meta.clone(), self.stopped.clone());
        let work = move || digest_all(&seen, &|buf, at| file.read_exact(buf, at), &|| !stopped.is_cancelled());
        let findings = tokio::task::spawn_blocking(work).await;
        self.note_verify_time(begun.elapsed());
        match findings {
            Ok(Ok(found)) if open.len == meta.index.len && found.bad.is_empty() => {
                if found.unproven == 0 && meta.is_complete_in_tier() {
                    let (inner, state) = (self.clone(), state.clone());
                    let note = move || inner.packs.note_whole_verified(&state, &open);
                    let _ = tokio::task::spawn_blocking(note).await;
                    Checked::Whole
                } else {
                    note_good_units(&meta, &open);
                    Checked::Unproven
                }
            }
            Ok(Ok(_)) => {
                self.heal(state, open, "it does not have the digests of its contents").await;
                Checked::Damaged
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.heal(state, open, "it is shorter than its index says").await;
                Checked::Damaged
            }
            _ => {
                super::stats::bump(&self.counters.tier_errors);
                Checked::Failed
            }
        }
    }

    /// Has what is missing for trusting an object found out in the background, by verify level.
    pub(super) fn look_closer(self: &Arc<Self>, state: &Arc<PackState>, open: &Arc<OpenPack>, verify: Verify) {
        match verify {
            Verify::Node if !open.is_whole_verified() => self.begin_check(state, open, verify),
            Verify::Tier if !open.is_complete() => self.learn_pack(state, open),
            Verify::Tier | Verify::Node if !state.knows_contents() => self.learn_pack(state, open),
            _ => {}
        }
    }

    /// Finds out what a pack has, and whether its object lacks no content.
    fn learn_pack(self: &Arc<Self>, state: &Arc<PackState>, open: &Arc<OpenPack>) {
        if state.checking.swap(true, Ordering::AcqRel) {
            return;
        }
        let (inner, state, open) = (self.clone(), state.clone(), open.clone());
        self.rt.spawn(async move {
            let meta = tokio::select! {
                meta = inner.metas.full(&state.pack, inner.deadline()) => meta.ok(),
                () = inner.stopped.cancelled() => None,
            };
            if let Some(meta) = meta {
                state.know_contents(&meta.index);
                if meta.is_complete_in_tier() && meta.index.len == open.len {
                    open.set_complete();
                }
            }
            state.checking.store(false, Ordering::Release);
        });
    }
}

/// Of an imported pack that lacks contents: remembers the units of those that were digested.
fn note_good_units(meta: &PackMeta, open: &OpenPack) {
    for (position, content) in (0_u32..).zip(&meta.index.contents) {
        if meta.digest(position).is_none() || !meta.is_in_tier(position) {
            continue;
        }
        if let crate::format::pack::Place::Run { offset } = content.place {
            (0..unit_count(content.size)).for_each(|block| open.set_unit(offset + block * BLOCK_LEN));
        }
    }
}
