//! What differs between two trees, skipping what is equal.
//!
//! First the two sequences of segments are aligned, level by level from the top: equal blocks are
//! paired where they keep their order, only unpaired ones are opened. What comes out are *runs*:
//! stretches of ranks that hold the same entries in both trees. Then the directories are walked
//! side by side. A subtree that lies in one run on both sides, at the same distance, is equal and is
//! never opened; so a change of k files costs the blocks around them and those of the directories
//! above them.

use std::collections::{HashMap, VecDeque};

use crate::format::ids::BlockId;

use super::entry::{DEPTH_MAX, Entry, EntryKind};
use super::nav::{Blocks, DirAt, EntryAt, NavError, Need, list, root_dir, sum_before};
use super::segment::{Block, IndexBlock, TreeRoot};

/// Entries that are taken from a directory at a time.
const BATCH: usize = 1024;

/// One difference, by path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// From the root, names separated by `/`.
    pub path: Vec<u8>,
    /// None: the path is new.
    pub before: Option<Entry>,
    /// None: the path is gone.
    pub after: Option<Entry>,
}

/// Walks both trees side by side, directory by directory; a directory whose entries are equal
/// including counts may still differ below, equal blocks are skipped by id where they align.
/// Resumable as navigation is: keep the `Differ`, feed missing blocks, call again.
///
/// A directory is a change where it is on one side only, or where its mode or time differ; that
/// something below it differs is told by the changes below it. Of a directory that is on one side
/// only, everything below it is a change as well. The root directory itself is no change.
#[derive(Debug)]
pub struct Differ {
    before: TreeRoot,
    after: TreeRoot,
    /// Stretches that are still to be aligned, the first one last.
    gaps: Vec<Gap>,
    runs: Vec<Run>,
    aligned: bool,
    stack: Vec<Frame>,
}

/// Ranks that hold equal entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    before: u64,
    after: u64,
    len: u64,
}

/// A block of one tree, placed.
#[derive(Debug, Clone, Copy)]
struct Node {
    id: BlockId,
    level: u8,
    rank: u64,
    len: u64,
}

/// Neighbouring blocks of both trees between two pairs.
#[derive(Debug)]
struct Gap {
    before: Vec<Node>,
    after: Vec<Node>,
    /// Whether the blocks of the higher level were opened, so that both sides can be aligned.
    even: bool,
}

/// One directory of one tree, being listed.
#[derive(Debug)]
struct Side {
    dir: DirAt,
    from: u64,
    batch: VecDeque<EntryAt>,
}

/// The name of a directory that must be looked into, and where it is on either side.
type Pair = (Box<[u8]>, Option<DirAt>, Option<DirAt>);

/// A pair of directories of one path; either may be missing.
#[derive(Debug)]
struct Frame {
    path: Vec<u8>,
    before: Option<Side>,
    after: Option<Side>,
    waiting: VecDeque<Pair>,
}

impl Differ {
    pub fn new(before: TreeRoot, after: TreeRoot) -> Self {
        let gap = Gap { before: children_of(&before.top, 0), after: children_of(&after.top, 0), even: false };
        let frame = Frame::new(Vec::new(), Some(root_dir(&before)), Some(root_dir(&after)));
        Self { before, after, gaps: vec![gap], runs: Vec::new(), aligned: false, stack: vec![frame] }
    }

    /// Gives the next change, or None at the end. On `Need`, fetch and call again.
    pub fn next(&mut self, blocks: &dyn Blocks) -> Result<Option<Change>, NavError> {
        if !self.aligned {
            self.align(blocks)?;
            self.aligned = true;
        }
        while let Some(mut frame) = self.stack.pop() {
            let step = self.step(&mut frame, blocks);
            // A step that needs a block has changed nothing that cannot be done again.
            self.stack.push(frame);
            match step? {
                Step::Change(change) => return Ok(Some(change)),
                Step::Again => {}
                Step::Enter(next) => {
                    if self.stack.len() > DEPTH_MAX {
                        return Err(NavError::Damaged { rank: 0, why: "directories are nested deeper than 4096" });
                    }
                    self.stack.push(next);
                }
                Step::Leave => {
                    self.stack.pop();
                }
            }
        }
        Ok(None)
    }

    /// Aligns both sequences of segments; what is done stays done.
    fn align(&mut self, blocks: &dyn Blocks) -> Result<(), NavError> {
        while let Some(gap) = self.gaps.last() {
            if gap.before.is_empty() || gap.after.is_empty() {
                self.gaps.pop();
                continue;
            }
            if !gap.even {
                let level = gap.level();
                let even = Gap {
                    before: open_above(&gap.before, level, blocks)?,
                    after: open_above(&gap.after, level, blocks)?,
                    even: true,
                };
                self.gaps.pop();
                self.gaps.push(even);
                continue;
            }
            let (runs, gaps) = pair(gap);
            // All blocks are opened before anything is noted: a need leaves the gap as it was.
            let mut opened = Vec::with_capacity(gaps.len());
            for gap in gaps {
                opened.push(gap.open(blocks)?);
            }
            self.gaps.pop();
            self.gaps.extend(opened.into_iter().rev());
            self.runs.extend(runs);
        }
        self.runs.sort_unstable_by_key(|run| run.before);
        self.runs = merge(&self.runs);
        Ok(())
    }

    /// Says whether ranks hold the same entries on both sides.
    fn is_same(&self, before: u64, after: u64, len: u64) -> bool {
        len == 0 || self.same_len(before, after) >= len
    }

    /// Counts the equal entries from a pair of ranks on, as far as the runs tell.
    fn same_len(&self, before: u64, after: u64) -> u64 {
        let run = self.runs.partition_point(|run| run.before <= before).checked_sub(1).and_then(|at| self.runs.get(at));
        let left = run.and_then(|run| {
            let into = before - run.before;
            (run.after.checked_add(into) == Some(after)).then(|| run.len.saturating_sub(into))
        });
        left.unwrap_or(0)
    }

    fn step(&self, frame: &mut Frame, blocks: &dyn Blocks) -> Result<Step, NavError> {
        self.skip(frame, blocks)?;
        if let Some(side) = &mut frame.before {
            side.fill(&self.before, blocks)?;
        }
        if let Some(side) = &mut frame.after {
            side.fill(&self.after, blocks)?;
        }
        let (before, after) = frame.take_pair();
        if before.is_none() && after.is_none() {
            return Ok(self.next_dir(frame));
        }
        self.note_dirs(frame, before.as_ref(), after.as_ref());
        let change = change_of(&frame.path, before, after);
        Ok(change.map_or(Step::Again, Step::Change))
    }

    /// Skips entries that are equal on both sides, where the subtrees of the directories among them
    /// are equal too: at once where that is all of a run, else half of it, and so on.
    fn skip(&self, frame: &mut Frame, blocks: &dyn Blocks) -> Result<(), NavError> {
        let (Some(before), Some(after)) = (&mut frame.before, &mut frame.after) else {
            return Ok(());
        };
        if !before.batch.is_empty() || !after.batch.is_empty() {
            return Ok(());
        }
        let left = before.left().min(after.left());
        let (here, there) = (before.rank(), after.rank());
        let mut len = self.same_len(here, there).min(left);
        while len > 0 {
            let skipped = self.below(&self.before, blocks, &before.dir, here, len)?;
            let other = self.below(&self.after, blocks, &after.dir, there, len)?;
            if skipped.1 == other.1 && self.is_same(skipped.0, other.0, skipped.1) {
                before.from += len;
                after.from += len;
                return Ok(());
            }
            len = if len > BATCH as u64 { len / 2 } else { 0 };
        }
        Ok(())
    }

    /// Gives the rank where the subtrees of the directories among `len` own entries from `rank` on
    /// start, and what they hold.
    fn below(
        &self,
        root: &TreeRoot,
        blocks: &dyn Blocks,
        dir: &DirAt,
        rank: u64,
        len: u64,
    ) -> Result<(u64, u64), NavError> {
        let base = sum_before(root, blocks, dir.first)?;
        let start = sum_before(root, blocks, rank)?;
        let end = sum_before(root, blocks, rank.saturating_add(len))?;
        match (start.checked_sub(base), end.checked_sub(start)) {
            (Some(skipped), Some(held)) => Ok((dir.first.saturating_add(dir.children).saturating_add(skipped), held)),
            _ => Err(NavError::Damaged { rank, why: "sums go down" }),
        }
    }

    /// Notes the directories of a pair of entries that must be looked into.
    fn note_dirs(&self, frame: &mut Frame, before: Option<&EntryAt>, after: Option<&EntryAt>) {
        let dir = |at: Option<&EntryAt>| at.and_then(|at| at.dir).filter(|dir| dir.children > 0);
        let (here, there) = (dir(before), dir(after));
        let same = match (&here, &there) {
            (None, None) => true,
            (Some(a), Some(b)) => a.descendants == b.descendants && self.is_same(a.first, b.first, a.descendants),
            _ => false,
        };
        if let (false, Some(at)) = (same, before.or(after)) {
            frame.waiting.push_back((at.entry.name.clone(), here, there));
        }
    }

    fn next_dir(&self, frame: &mut Frame) -> Step {
        match frame.waiting.pop_front() {
            None => Step::Leave,
            Some((name, before, after)) => {
                Step::Enter(Frame::new([&*frame.path, &*name, b"/"].concat(), before, after))
            }
        }
    }
}

enum Step {
    Change(Change),
    Again,
    Enter(Frame),
    Leave,
}

impl Frame {
    fn new(path: Vec<u8>, before: Option<DirAt>, after: Option<DirAt>) -> Self {
        let side = |dir| Side { dir, from: 0, batch: VecDeque::new() };
        Self { path, before: before.map(side), after: after.map(side), waiting: VecDeque::new() }
    }

    /// Takes the entries of the lower name: both where it is the same.
    fn take_pair(&mut self) -> (Option<EntryAt>, Option<EntryAt>) {
        let name =
            |side: &Option<Side>| side.as_ref().and_then(|side| side.batch.front()).map(|at| at.entry.name.clone());
        let (before, after) = (name(&self.before), name(&self.after));
        let mut take_before = before.is_some();
        let mut take_after = after.is_some();
        if let (Some(before), Some(after)) = (before, after) {
            take_before = before <= after;
            take_after = after <= before;
        }
        let take = |side: &mut Option<Side>, wanted: bool| {
            side.as_mut().filter(|_| wanted).and_then(|side| side.batch.pop_front())
        };
        (take(&mut self.before, take_before), take(&mut self.after, take_after))
    }
}

impl Side {
    /// Rank of the next entry that is not in the batch.
    fn rank(&self) -> u64 {
        self.dir.first.saturating_add(self.from)
    }

    fn left(&self) -> u64 {
        self.dir.children.saturating_sub(self.from)
    }

    fn fill(&mut self, root: &TreeRoot, blocks: &dyn Blocks) -> Result<(), NavError> {
        if self.batch.is_empty() && self.left() > 0 {
            self.batch = list(root, blocks, &self.dir, self.from, BATCH)?.into();
            self.from += self.batch.len() as u64;
        }
        Ok(())
    }
}

impl Run {
    /// Says whether the other run goes on where this one ends, on both sides.
    fn touches(&self, next: &Self) -> bool {
        self.before.checked_add(self.len) == Some(next.before) && self.after.checked_add(self.len) == Some(next.after)
    }
}

impl Gap {
    /// The lowest of the highest levels of both sides: what both can be opened to.
    fn level(&self) -> u8 {
        let highest = |nodes: &[Node]| nodes.iter().map(|node| node.level).max().unwrap_or(0);
        highest(&self.before).min(highest(&self.after))
    }

    /// Opens all blocks by one level; segments have nothing to open.
    fn open(self, blocks: &dyn Blocks) -> Result<Self, NavError> {
        let level = self.level();
        let empty = self.before.is_empty() || self.after.is_empty();
        if level == 0 || empty {
            return Ok(Self { before: Vec::new(), after: Vec::new(), even: true });
        }
        let (before, after) =
            (open_above(&self.before, level - 1, blocks)?, open_above(&self.after, level - 1, blocks)?);
        Ok(Self { before, after, even: true })
    }
}

fn merge(runs: &[Run]) -> Vec<Run> {
    let mut merged: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        match merged.last_mut() {
            Some(last) if last.touches(run) => last.len += run.len,
            _ => merged.push(*run),
        }
    }
    merged
}

fn children_of(index: &IndexBlock, rank: u64) -> Vec<Node> {
    let node = |(at, child): (usize, &super::segment::ChildRef)| Node {
        id: child.id,
        level: index.level.saturating_sub(1),
        rank: rank.saturating_add(index.before(at).0),
        len: child.counts.entries,
    };
    index.children.iter().enumerate().map(node).collect()
}

/// Replaces blocks above `level` by what they hold, until none is above it.
fn open_above(nodes: &[Node], level: u8, blocks: &dyn Blocks) -> Result<Vec<Node>, NavError> {
    let mut nodes = nodes.to_vec();
    while nodes.iter().any(|node| node.level > level) {
        let mut opened = Vec::with_capacity(nodes.len());
        for node in nodes {
            if node.level <= level {
                opened.push(node);
                continue;
            }
            let block = blocks.tree_block(node.id).ok_or(NavError::Need(Need::Tree(node.id)))?;
            match &*block {
                Block::Index(index) if index.level == node.level && index.counts().entries == node.len => {
                    opened.extend(children_of(index, node.rank));
                }
                _ => {
                    return Err(NavError::Damaged { rank: node.rank, why: "a block is not what its index says" });
                }
            }
        }
        nodes = opened;
    }
    Ok(nodes)
}

/// Pairs equal blocks of a gap without crossing: those at its start, those at its end, and between
/// them the longest ascending sequence of the ones that each side has once. Gives the runs, and the
/// gaps that are left.
fn pair(gap: &Gap) -> (Vec<Run>, Vec<Gap>) {
    let same = |(a, b): &(&Node, &Node)| a.id == b.id;
    let head = gap.before.iter().zip(&gap.after).take_while(same).count();
    let rest = gap.before.len().min(gap.after.len()) - head;
    let tail = gap.before.iter().rev().zip(gap.after.iter().rev()).take(rest).take_while(same).count();
    let (before_end, after_end) = (gap.before.len() - tail, gap.after.len() - tail);
    let mut pairs: Vec<(usize, usize)> = (0..head).map(|at| (at, at)).collect();
    let inner = |nodes: &'_ [Node], end: usize| nodes.get(head..end).unwrap_or_default().to_vec();
    let (before, after) = (inner(&gap.before, before_end), inner(&gap.after, after_end));
    pairs.extend(anchors(&before, &after).into_iter().map(|(a, b)| (a + head, b + head)));
    pairs.extend((0..tail).map(|at| (before_end + at, after_end + at)));

    let mut runs = Vec::with_capacity(pairs.len());
    let mut gaps = Vec::new();
    let (mut a_from, mut b_from) = (0, 0);
    for (a, b) in pairs.into_iter().chain([(gap.before.len(), gap.after.len())]) {
        let part = |nodes: &[Node], from: usize, to: usize| nodes.get(from..to).unwrap_or_default().to_vec();
        let between = Gap { before: part(&gap.before, a_from, a), after: part(&gap.after, b_from, b), even: true };
        if !between.before.is_empty() && !between.after.is_empty() {
            gaps.push(between);
        }
        if let (Some(x), Some(y)) = (gap.before.get(a), gap.after.get(b)) {
            runs.push(Run { before: x.rank, after: y.rank, len: x.len.min(y.len) });
        }
        (a_from, b_from) = (a + 1, b + 1);
    }
    (runs, gaps)
}

/// Finds blocks that each side has exactly once, and of those the longest sequence that ascends on
/// both sides.
fn anchors(before: &[Node], after: &[Node]) -> Vec<(usize, usize)> {
    let mut places: HashMap<BlockId, (usize, usize, usize, usize)> = HashMap::new();
    for (at, node) in before.iter().enumerate() {
        let place = places.entry(node.id).or_default();
        (place.0, place.1) = (place.0 + 1, at);
    }
    for (at, node) in after.iter().enumerate() {
        let place = places.entry(node.id).or_default();
        (place.2, place.3) = (place.2 + 1, at);
    }
    let mut unique: Vec<(usize, usize)> =
        places.into_values().filter(|p| p.0 == 1 && p.2 == 1).map(|p| (p.1, p.3)).collect();
    unique.sort_unstable();
    longest_ascending(&unique)
}

/// Gives the longest subsequence in which the second positions ascend as the first do.
fn longest_ascending(pairs: &[(usize, usize)]) -> Vec<(usize, usize)> {
    // Of each length the pair that ends lowest, and of each pair the one before it.
    let mut ends: Vec<usize> = Vec::new();
    let mut links: Vec<Option<usize>> = Vec::with_capacity(pairs.len());
    let second = |at: usize| pairs.get(at).map_or(usize::MAX, |pair| pair.1);
    for (at, pair) in pairs.iter().enumerate() {
        let len = ends.partition_point(|end| second(*end) < pair.1);
        links.push(len.checked_sub(1).and_then(|before| ends.get(before)).copied());
        match ends.get_mut(len) {
            Some(end) => *end = at,
            None => ends.push(at),
        }
    }
    let mut longest = Vec::with_capacity(ends.len());
    let mut next = ends.last().copied();
    while let Some(at) = next {
        longest.extend(pairs.get(at));
        next = links.get(at).copied().flatten();
    }
    longest.reverse();
    longest
}

/// Says what a pair of entries of one name is as a change, if it is one.
fn change_of(dir: &[u8], before: Option<EntryAt>, after: Option<EntryAt>) -> Option<Change> {
    let (before, after) = (before.map(|at| at.entry), after.map(|at| at.entry));
    let name = before.as_ref().or(after.as_ref()).map(|entry| entry.name.clone())?;
    let same = match (&before, &after) {
        (Some(a), Some(b)) => match (&a.kind, &b.kind) {
            (EntryKind::Dir { .. }, EntryKind::Dir { .. }) => a.mode == b.mode && a.mtime == b.mtime,
            _ => a == b,
        },
        _ => false,
    };
    (!same).then(|| Change { path: [dir, &*name].concat(), before, after })
}
