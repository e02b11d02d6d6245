//! `--onto`: the entries of an existing commit merged with the walked ones, in tree order.
//!
//! Without `--at`, both roots are one directory: a directory on both sides is merged (with the walked
//! attributes), of any other name that both have the walked one counts. With `--at PATH` the name PATH
//! becomes the walked directory as a whole; directories on the way are made where they are missing.
//! The root keeps the attributes it has in the commit.
//!
//! Restricted to the walked directories, the order of the merged tree is that of the walk, so the
//! walk's spool is read once, in order. Files of the commit keep content and place: nothing of
//! theirs is read. A hard-link group of the commit whose first entry goes away begins with the next.

use std::collections::{HashMap, VecDeque};
use std::path::Path;

use tokio::runtime::Handle;

use crate::format::placement::Location;
use crate::format::tree::nav::{self, DirAt, EntryAt};
use crate::format::tree::{EntryKind, Mtime};
use crate::store::meta::{MetaStore, Snapshot};

use super::error::PushError;
use super::spool::{DirCounts, Item, Kind, Record, Spool, SpoolReader};
use super::walk::join;

/// Entries of the commit that are listed at once.
const LIST: usize = 1024;

/// A directory of the merged tree that is to be visited.
#[derive(Debug)]
struct Merged {
    number: u64,
    path: Vec<u8>,
    /// The commit's side.
    base: Option<DirAt>,
    walked: Side,
}

/// What the walk has for a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Side {
    Nothing,
    /// The items that follow the next `Enter` of its spool.
    Spooled,
    /// On the way to `--at`: only these names, one below the other.
    Way(VecDeque<Vec<u8>>),
}

struct Frame {
    number: u64,
    counts: DirCounts,
    left: VecDeque<Merged>,
}

struct Merger<'a> {
    rt: &'a Handle,
    meta: &'a MetaStore,
    base: &'a Snapshot,
    records: SpoolReader<'a>,
    walked: &'a Spool,
    ahead: Option<Record>,
    out: Spool,
    at: Vec<u8>,
    /// Where the first entries of the walked hard-link groups start, in both spools.
    walked_firsts: HashMap<u64, u64>,
    /// By the path that the commit's later links name: the first entry that is left, and its path.
    base_firsts: HashMap<Vec<u8>, (u64, Vec<u8>)>,
}

/// Checks `--at` and splits it into names.
pub(super) fn names_of(at: &[u8]) -> Result<VecDeque<Vec<u8>>, PushError> {
    let names: VecDeque<Vec<u8>> =
        at.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".").map(<[u8]>::to_vec).collect();
    let why = match &names {
        names if names.iter().any(|name| name == b"..") => "`..` is not allowed",
        names if names.iter().any(|name| name.len() > 255) => "a name has more than 255 bytes",
        names if names.is_empty() => "name a path below the root, or leave --at out to merge into the root",
        _ => return Ok(names),
    };
    Err(PushError::At { path: String::from_utf8_lossy(at).into_owned(), why })
}

/// Merges a walk with the commit it is pushed onto.
pub(super) fn merge(
    rt: &Handle,
    meta: &MetaStore,
    base: &Snapshot,
    walked: &Spool,
    at: Option<&[u8]>,
    scratch: &Path,
) -> Result<Spool, PushError> {
    let way = at.map(names_of).transpose()?;
    let mut merger = Merger {
        rt,
        meta,
        base,
        records: walked.read()?,
        walked,
        ahead: None,
        out: Spool::create(scratch, base.root.mode, base.root.mtime)?,
        at: way.iter().flatten().fold(Vec::new(), |mut path, name| {
            join(&mut path, name);
            path
        }),
        walked_firsts: HashMap::new(),
        base_firsts: HashMap::new(),
    };
    merger.run(way.map_or(Side::Spooled, Side::Way))?;
    merger.out.flush()?;
    Ok(merger.out)
}

impl Merger<'_> {
    fn run(&mut self, root: Side) -> Result<(), PushError> {
        let root = Merged { number: 0, path: Vec::new(), base: Some(nav::root_dir(&self.base.root)), walked: root };
        let mut stack = vec![self.visit(root, 0)?];
        while let Some(frame) = stack.last_mut() {
            if let Some(next) = frame.left.pop_front() {
                let parent = frame.number;
                let child = self.visit(next, parent)?;
                stack.push(child);
                continue;
            }
            let Some(done) = stack.pop() else { break };
            if let Some(parent) = stack.last_mut() {
                parent.counts.descendants += done.counts.descendants;
            }
            self.out.set_counts(done.number, done.counts)?;
        }
        Ok(())
    }

    fn visit(&mut self, dir: Merged, parent: u64) -> Result<Frame, PushError> {
        self.out.enter(dir.number, &dir.path)?;
        let mut frame =
            Frame { number: dir.number, counts: DirCounts { parent, ..DirCounts::default() }, left: VecDeque::new() };
        let mut walked = self.begin_walked(&dir)?;
        let mut from = 0;
        if let Some(base) = dir.base {
            while from < base.children {
                let listed = self.list(&base, from)?;
                from += listed.len() as u64;
                for (entry, location) in listed {
                    while walked.as_ref().is_some_and(|item| item.item.name.as_slice() < &*entry.entry.name) {
                        self.take_walked(&dir, &mut walked, None, &mut frame)?;
                    }
                    if walked.as_ref().is_some_and(|item| item.item.name.as_slice() == &*entry.entry.name) {
                        self.take_walked(&dir, &mut walked, Some(&entry), &mut frame)?;
                    } else {
                        self.take_base(&dir, entry, location, &mut frame)?;
                    }
                }
            }
        }
        while walked.is_some() {
            self.take_walked(&dir, &mut walked, None, &mut frame)?;
        }
        frame.counts.descendants = frame.counts.children;
        Ok(frame)
    }

    fn list(&self, dir: &DirAt, from: u64) -> Result<Vec<(EntryAt, Location)>, PushError> {
        let base = self.base;
        let listed = self.meta.drive(|blocks| {
            let entries = nav::list(&base.root, blocks, dir, from, LIST)?;
            let locate = |entry: EntryAt| {
                let has_place = matches!(entry.entry.kind, EntryKind::File { size, .. } if size > 0);
                let location = match has_place {
                    true => nav::location(&base.root, &base.placement, blocks, entry.rank)?,
                    false => Location::None,
                };
                Ok((entry, location))
            };
            entries.into_iter().map(locate).collect()
        });
        Ok(self.rt.block_on(listed)?)
    }

    // ---- the walked side ----------------------------------------------------------------------------

    /// Gives the first walked item of a directory.
    fn begin_walked(&mut self, dir: &Merged) -> Result<Option<WalkedItem>, PushError> {
        match &dir.walked {
            Side::Nothing => Ok(None),
            Side::Spooled => match self.next_record()? {
                Some(Record::Enter { .. }) => self.next_walked(),
                _ => Err(self.out.damaged("a walked directory is missing")),
            },
            Side::Way(way) => {
                let mut way = way.clone();
                let Some(name) = way.pop_front() else {
                    return Ok(None);
                };
                let walked = if way.is_empty() { Side::Spooled } else { Side::Way(way) };
                let last = walked == Side::Spooled;
                let item = Item {
                    name,
                    mode: if last { self.walked.root_mode } else { 0o755 },
                    mtime: self.walked.root_mtime,
                    nlink: 1,
                    kind: Kind::Dir { number: 0 },
                };
                Ok(Some(WalkedItem { at: 0, item, below: walked, replaces: last, on_way: true }))
            }
        }
    }

    fn next_record(&mut self) -> Result<Option<Record>, PushError> {
        match self.ahead.take() {
            Some(record) => Ok(Some(record)),
            None => self.records.next(),
        }
    }

    fn next_walked(&mut self) -> Result<Option<WalkedItem>, PushError> {
        match self.next_record()? {
            Some(Record::Item { at, item }) => {
                Ok(Some(WalkedItem { at, item, below: Side::Spooled, replaces: false, on_way: false }))
            }
            other => {
                self.ahead = other;
                Ok(None)
            }
        }
    }

    /// Emits the walked item and moves on to the next; `base` has the same name in the commit.
    fn take_walked(
        &mut self,
        dir: &Merged,
        walked: &mut Option<WalkedItem>,
        base: Option<&EntryAt>,
        frame: &mut Frame,
    ) -> Result<(), PushError> {
        let Some(WalkedItem { at, mut item, below, replaces, on_way }) = walked.take() else {
            return Ok(());
        };
        let base_dir = base.and_then(|entry| entry.dir);
        if on_way
            && !replaces
            && let Some(entry) = base
        {
            if base_dir.is_none() {
                let path = String::from_utf8_lossy(&self.at).into_owned();
                return Err(PushError::At { path, why: "a name on the way is not a directory in that commit" });
            }
            (item.mode, item.mtime) = (entry.entry.mode, entry.entry.mtime);
        }
        let mut path = dir.path.clone();
        join(&mut path, &item.name);
        let is_dir = matches!(item.kind, Kind::Dir { .. });
        if is_dir {
            let number = self.out.number_dir();
            item.kind = Kind::Dir { number };
            let base = if replaces { None } else { base_dir };
            frame.left.push_back(Merged { number, path, base, walked: below });
        }
        if let Kind::Link { first_at, path } = &mut item.kind {
            *first_at =
                *self.walked_firsts.get(first_at).ok_or_else(|| self.out.damaged("a link's first is missing"))?;
            if !self.at.is_empty() {
                let mut prefixed = self.at.clone();
                join(&mut prefixed, path);
                *path = prefixed;
            }
        }
        let has_links = item.nlink > 1;
        let new_at = self.emit(&item, frame)?;
        if has_links {
            self.walked_firsts.insert(at, new_at);
        }
        *walked = if on_way { None } else { self.next_walked()? };
        Ok(())
    }

    // ---- the commit's side --------------------------------------------------------------------------

    fn take_base(
        &mut self,
        dir: &Merged,
        entry: EntryAt,
        location: Location,
        frame: &mut Frame,
    ) -> Result<(), PushError> {
        let mut path = dir.path.clone();
        join(&mut path, &entry.entry.name);
        let mut item = Item {
            name: entry.entry.name.to_vec(),
            mode: entry.entry.mode,
            mtime: entry.entry.mtime,
            nlink: 1,
            kind: Kind::Dir { number: 0 },
        };
        match &entry.entry.kind {
            EntryKind::Dir { .. } => {
                let number = self.out.number_dir();
                item.kind = Kind::Dir { number };
                frame.left.push_back(Merged { number, path, base: entry.dir, walked: Side::Nothing });
                self.emit(&item, frame)?;
            }
            EntryKind::Symlink { target } => {
                item.kind = Kind::Symlink { target: target.to_vec() };
                self.emit(&item, frame)?;
            }
            EntryKind::File { size, content, pin } => {
                item.kind = Kind::Known { size: *size, content: *content, pin: pin.clone(), location };
                let at = self.emit(&item, frame)?;
                if entry.entry.nlink > 1 {
                    self.base_firsts.insert(path.clone(), (at, path));
                }
            }
            EntryKind::HardLink { first } => self.take_base_link(first, &entry, item, path, frame)?,
        }
        Ok(())
    }

    fn take_base_link(
        &mut self,
        first: &[u8],
        entry: &EntryAt,
        mut item: Item,
        path: Vec<u8>,
        frame: &mut Frame,
    ) -> Result<(), PushError> {
        if let Some((first_at, first_path)) = self.base_firsts.get(first).cloned() {
            self.out.add_link(first_at)?;
            (item.mode, item.mtime) = (0, Mtime::default());
            item.kind = Kind::Link { first_at, path: first_path };
            self.emit(&item, frame)?;
            return Ok(());
        }
        // The group's first entry went away: this one takes its place.
        let base = self.base;
        let (original, location) = self.rt.block_on(self.meta.drive(|blocks| {
            let original = nav::resolve_link(&base.root, blocks, entry)?;
            let location = nav::location(&base.root, &base.placement, blocks, original.rank)?;
            Ok((original, location))
        }))?;
        let EntryKind::File { size, content, pin } = original.entry.kind else {
            return Err(self.out.damaged("a hard link of the commit names no file"));
        };
        (item.mode, item.mtime) = (original.entry.mode, original.entry.mtime);
        item.kind = Kind::Known { size, content, pin, location };
        let at = self.emit(&item, frame)?;
        self.base_firsts.insert(first.to_vec(), (at, path));
        Ok(())
    }

    fn emit(&mut self, item: &Item, frame: &mut Frame) -> Result<u64, PushError> {
        frame.counts.children += 1;
        frame.counts.subdirs += u64::from(matches!(item.kind, Kind::Dir { .. }));
        self.out.item(item)
    }
}

/// An item of the walk, in its turn.
#[derive(Debug)]
struct WalkedItem {
    at: u64,
    item: Item,
    /// What the walk has below it, if it is a directory.
    below: Side,
    /// It takes the place of whatever the commit has there.
    replaces: bool,
    /// It is a name of `--at`.
    on_way: bool,
}
