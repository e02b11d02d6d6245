//! The build pass: from the spool and the places to blocks of tree and placement, and to the lake.
//!
//! Blocks are content-addressed: one that the lake has is not sent again. The index remembers those
//! of the newest commit and of an unfinished push; each push renews the mark of those that it uses,
//! and the others are forgotten once it is committed, because `gc` may take them.

use std::collections::HashSet;

use futures::StreamExt;

use crate::format::ids::{BlockId, ContentDigest, ContentId};
use crate::format::pack::Place;
use crate::format::paths::{node_key, placed_key};
use crate::format::placement::{Location, PackUse};
use crate::format::tree::build::{BlockOf, Built, BuiltBlock, TreeBuilder};
use crate::format::tree::{Entry, EntryKind};
use crate::store::catalog::gc::Relied;
use crate::store::meta::MetaStore;

use super::error::PushError;
use super::index::{At, Index, NO_PACK};
use super::packs::Packs;
use super::places::{PlaceRow, Places};
use super::spool::{Item, Kind, Record, Spool};
use super::upload::Uploads;

/// Blocks that are sent together, and how many of them at the same time.
const BATCH: usize = 128;
const PARALLEL: usize = 32;

/// What the pass works on.
#[derive(Debug)]
pub(super) struct Build<'a> {
    /// Packs of the commit that is pushed onto.
    pub base_packs: &'a [PackUse],
    pub spool: &'a Spool,
    pub places: &'a mut Places,
    pub packs: &'a Packs,
    pub index: &'a mut Index,
    pub uploads: &'a Uploads,
    pub meta: &'a MetaStore,
    pub dropped_firsts: &'a HashSet<u64>,
    /// The mark of this push in the index's blocks.
    pub generation: u64,
}

/// Builds the tree and stores its blocks (not its root).
pub(super) fn run(mut work: Build<'_>) -> Result<Built, PushError> {
    let counts = work.spool.counts(0)?;
    let (mode, mtime) = (work.spool.root_mode, work.spool.root_mtime);
    let mut builder = TreeBuilder::new(mode, mtime, counts.children, counts.subdirs);
    for pack in work.base_packs {
        builder.declare_pack(pack.pack, pack.len);
    }
    let mut declared: HashSet<u32> = HashSet::new();
    let mut batch: Vec<BuiltBlock> = Vec::new();
    let mut ordinal = 0;
    let mut records = work.spool.read()?;
    while let Some(record) = records.next()? {
        let Record::Item { item, .. } = record else {
            continue;
        };
        let place = match &item.kind {
            Kind::File(_) => {
                ordinal += 1;
                Some(work.places.get(ordinal - 1)?)
            }
            _ => None,
        };
        if place.is_some_and(|place| place.dropped) || is_dropped_link(&item, work.dropped_firsts) {
            continue;
        }
        let (entry, location) = work.entry_of(item, place)?;
        if let Some(number) = place.map(|place| place.at.pack)
            && number != NO_PACK
            && declared.insert(number)
            && let Some((id, len)) = work.packs.row(number).and_then(|row| Some((row.id?, row.len)))
        {
            builder.declare_pack(id, len);
        }
        builder.push(entry, location)?;
        batch.extend(builder.drain());
        if batch.len() >= BATCH {
            work.store(&mut batch)?;
        }
    }
    let (built, last) = builder.finish()?;
    batch.extend(last);
    work.store(&mut batch)?;
    Ok(built)
}

fn is_dropped_link(item: &Item, dropped: &HashSet<u64>) -> bool {
    matches!(&item.kind, Kind::Link { first_at, .. } if dropped.contains(first_at))
}

impl Build<'_> {
    fn entry_of(&self, item: Item, place: Option<PlaceRow>) -> Result<(Entry, Location), PushError> {
        let mut entry = Entry {
            name: item.name.into_boxed_slice(),
            mode: item.mode,
            mtime: item.mtime,
            nlink: item.nlink,
            kind: EntryKind::Symlink { target: Box::default() },
        };
        let mut location = Location::None;
        entry.kind = match item.kind {
            Kind::File(_) => {
                let place = place.ok_or_else(|| self.spool.damaged("a file has no place"))?;
                entry.mode = place.mode;
                entry.mtime = place.mtime;
                location = self.location(place.at, &place.digest)?;
                EntryKind::File { size: place.size, content: ContentId::Digest(place.digest), pin: None }
            }
            Kind::Known { size, content, pin, location: known } => {
                location = known;
                EntryKind::File { size, content, pin }
            }
            Kind::Dir { number } => {
                let counts = self.spool.counts(number)?;
                let (children, descendants, subdirs) = (counts.children, counts.descendants, counts.subdirs);
                EntryKind::Dir { children, descendants, subdirs }
            }
            Kind::Symlink { target } => EntryKind::Symlink { target: target.into_boxed_slice() },
            Kind::Link { path, .. } => EntryKind::HardLink { first: path.into_boxed_slice() },
        };
        Ok((entry, location))
    }

    fn location(&self, at: At, digest: &ContentDigest) -> Result<Location, PushError> {
        if at.pack == NO_PACK {
            return Ok(Location::None);
        }
        let lost = || self.spool.damaged("a file's pack is not known");
        let row = self.index.layout(at)?.filter(|row| row.content == *digest).ok_or_else(lost)?;
        let pack = self.packs.row(at.pack).and_then(|row| row.id).ok_or_else(lost)?;
        Ok(match row.place {
            Place::Run { offset } => Location::Run { pack, offset },
            Place::Sparse { extents } => Location::Sparse { pack, extents },
        })
    }

    /// Says whether gc may have deleted a block that the lake had.
    fn is_swept(&self, block: &BuiltBlock) -> Result<bool, PushError> {
        let key = key_of(block.of, &block.id);
        if !self.uploads.is_condemned(&key) {
            return Ok(false);
        }
        let relied = self.uploads.rt.block_on(self.uploads.rely_on(&key))?;
        Ok(relied == Relied::PutAgain)
    }

    /// Sends the blocks of a batch that the lake has not; remembers all of them.
    fn store(&mut self, batch: &mut Vec<BuiltBlock>) -> Result<(), PushError> {
        let mut marks = Vec::with_capacity(batch.len());
        let mut missing = Vec::new();
        for block in batch.drain(..) {
            marks.push((block.of, block.id));
            let known = self.index.has_block(block.of, &block.id)?;
            if !known || self.is_swept(&block)? {
                missing.push(block);
            }
        }
        let (uploads, meta) = (self.uploads, self.meta);
        let puts = futures::stream::iter(missing).map(|block| async move {
            let key = key_of(block.of, &block.id);
            // Whoever mounts what was pushed here finds its blocks on this node already.
            meta.keep(&key, &block.bytes);
            uploads.put_named(&key, block.bytes.into()).await
        });
        let done: Vec<Result<(), _>> = uploads.rt.block_on(puts.buffer_unordered(PARALLEL).collect());
        done.into_iter().collect::<Result<Vec<()>, _>>()?;
        self.index.mark_blocks(&marks, self.generation)?;
        self.index.commit()
    }
}

/// Gives the key of a block.
pub(super) fn key_of(of: BlockOf, id: &BlockId) -> String {
    match of {
        BlockOf::Tree => node_key(id),
        BlockOf::Placement => placed_key(id),
    }
}
