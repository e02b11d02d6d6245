//! Writes an image entry by entry, in the order of the tree's ranks.
//!
//! A directory's own entries stand together in a tree, and the directories below follow in order. So
//! one directory is listed at a time; of those that are known and still to come the writer keeps their
//! attributes and where their names' inode numbers have to be put (a directory's inode is written when
//! its names are known, beside them where they fit into a block).
//!
//! Two parts grow at once, names and inodes; whoever holds the [`Sink`] puts the inodes behind the names.

use std::collections::VecDeque;

use crate::format::ids::PackId;
use crate::format::placement::{Location, PackUse};
use crate::format::tree::Mtime;

use super::BLOCK;
use super::dirs::DirBlock;
use super::disk::{self, FileType, INDEX_LEN, INODE_LEN, INODE_UNIT, Inode, Layout, SLOT_LEN};
use super::map::{CHUNKS_MAX, Chunk, Copied, Map};

/// Number of the root's inode.
const ROOT: u64 = 1;
/// Most that can stand in one block beside an inode.
const INLINE_LEN_MAX: usize = (BLOCK - INODE_LEN) as usize;
/// Long targets that wait for their directory's end.
const LONG_LINKS_MAX: usize = 4096;
/// Packs at most: device numbers have 16 bits, and the tails take one.
pub const PACKS_MAX: usize = 65_534;
/// Length of the file of tails at most.
const TAILS_MAX: u64 = 8 << 30;
/// Indexes that are written at a time.
const INDEX_BATCH: u64 = 8192;
/// Marks a place in the inodes; others are in the names.
const IN_INODES: u64 = 1 << 63;
const DOTS: [&[u8]; 2] = [b".", b".."];
const TAILS_TAG: &[u8] = b"larder-tails";

/// A part of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    Names,
    Inodes,
}

/// Takes what is written.
pub trait Sink {
    type Error;

    /// Writes at an offset of a section; what is never written is zeros.
    fn write(&mut self, section: Section, offset: u64, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Has bytes of a file copied to the file of tails.
    fn copy(&mut self, copied: &Copied) -> Result<(), Self::Error>;
}

/// A device of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Pack(PackId),
    Tails,
}

/// What stat(2) shows of an entry and its kind does not say.
#[derive(Debug, Clone, Copy)]
pub struct Attributes {
    pub mode: u32,
    pub mtime: Mtime,
    /// Of a file; a directory's follows from what is in it.
    pub nlink: u32,
}

/// What an image is made of, before its entries.
#[derive(Debug, Clone)]
pub struct Spec {
    pub uuid: [u8; 16],
    pub uid: u32,
    pub gid: u32,
    /// The packs, ascending.
    pub packs: Vec<PackUse>,
    pub root: Attributes,
    /// Entries of the root, and how many of them are directories.
    pub children: u64,
    pub subdirs: u64,
}

/// An entry.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    pub name: &'a [u8],
    pub attributes: Attributes,
    pub what: What<'a>,
}

/// What an entry is.
#[derive(Debug, Clone, Copy)]
pub enum What<'a> {
    File {
        size: u64,
        location: &'a Location,
    },
    Dir {
        children: u64,
        subdirs: u64,
    },
    Symlink {
        target: &'a [u8],
    },
    /// A later name of the file at this rank, which must have said that it has several links.
    Link {
        rank: u64,
    },
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum WriteError<E> {
    #[error("the image cannot be written")]
    Sink(#[source] E),
    /// The tree contradicts itself.
    #[error("the tree is damaged at rank {rank}: {why}")]
    Tree { rank: u64, why: &'static str },
    /// Right, but more than an image can say.
    #[error("the entry at rank {rank} does not fit into an image for the kernel: {why}")]
    Limit { rank: u64, why: &'static str },
}

/// What is still to be written when all entries were.
#[derive(Debug)]
pub struct Finished {
    /// The first blocks of the image; names follow, then inodes.
    pub head: Vec<u8>,
    pub names_len: u64,
    pub inodes_len: u64,
    /// 0: there is no file of tails.
    pub tails_len: u64,
    /// In the order in which the kernel has to get them.
    pub devices: Vec<Device>,
    pub inodes: u64,
}

/// A directory that is known and not yet listed.
#[derive(Debug)]
struct Waiting {
    /// Where its number has to be put.
    place: u64,
    children: u64,
    subdirs: u64,
    secs: i64,
    nanos: u32,
    label: u32,
    mode: u16,
}

/// The directories of one directory, and its inode's number.
#[derive(Debug)]
struct Level {
    number: u64,
    waiting: VecDeque<Waiting>,
}

/// The directory whose entries come now.
#[derive(Debug)]
struct Listing {
    me: Waiting,
    parent: u64,
    number: Option<u64>,
    left: u64,
    block: DirBlock,
    /// Where in the block its own number goes.
    dot: Option<usize>,
    dots: usize,
    /// Where its full blocks begin in the names, and how many they are.
    start: u64,
    blocks: u64,
    last_name: Vec<u8>,
    subdirs: VecDeque<Waiting>,
    /// Positions in the block of the last so many of `subdirs`.
    unplaced: Vec<usize>,
    long_links: Vec<(u64, Inode, Box<[u8]>)>,
}

impl Listing {
    fn new(me: Waiting, parent: u64, number: Option<u64>) -> Self {
        Self {
            left: me.children,
            me,
            parent,
            number,
            block: DirBlock::default(),
            dot: None,
            dots: 0,
            start: 0,
            blocks: 0,
            last_name: Vec::new(),
            subdirs: VecDeque::new(),
            unplaced: Vec::new(),
            long_links: Vec::new(),
        }
    }

    /// Notes where the numbers of this block's directories have to be put; the block begins at `at`.
    fn place_subdirs(&mut self, at: u64) {
        let first = self.subdirs.len().saturating_sub(self.unplaced.len());
        for (subdir, position) in self.subdirs.iter_mut().skip(first).zip(self.unplaced.drain(..)) {
            subdir.place = at + (position * disk::DIRENT_LEN) as u64;
        }
    }
}

/// Writes one image.
#[derive(Debug)]
pub struct Writer {
    spec: Spec,
    names: u64,
    inodes: u64,
    tails: u64,
    rank: u64,
    count: u64,
    /// Rank and number of each file with several links, ascending.
    links: Vec<(u64, u64)>,
    stack: Vec<Level>,
    listing: Option<Listing>,
}

type Written<T, S> = Result<T, WriteError<<S as Sink>::Error>>;

impl Writer {
    /// Begins an image; `sink` may get something already where the tree is empty.
    pub fn new<S: Sink>(spec: Spec, sink: &mut S) -> Written<Self, S> {
        if spec.packs.len() > PACKS_MAX {
            return Err(WriteError::Limit { rank: 0, why: "the commit has more than 65,534 packs" });
        }
        let root = Waiting {
            place: u64::MAX,
            children: spec.children,
            subdirs: spec.subdirs,
            secs: spec.root.mtime.secs,
            nanos: spec.root.mtime.nanos,
            label: 1,
            mode: spec.root.mode as u16,
        };
        let mut writer = Self {
            spec,
            names: 0,
            // Number 0 is nobody's; the root's inode comes next.
            inodes: ROOT * INODE_UNIT + INODE_LEN,
            tails: 0,
            rank: 0,
            count: 1,
            links: Vec::new(),
            stack: Vec::new(),
            listing: Some(Listing::new(root, ROOT, Some(ROOT))),
        };
        writer.advance(sink)?;
        Ok(writer)
    }

    /// Gives the length of what stands before the names.
    pub fn head_len(&self) -> u64 {
        head_len(self.spec.packs.len())
    }

    /// Writes the next entry.
    pub fn add<S: Sink>(&mut self, item: &Item<'_>, sink: &mut S) -> Written<(), S> {
        let rank = self.rank;
        let Some(mut listing) = self.listing.take() else {
            return Err(WriteError::Tree { rank, why: "it has more entries than its directories" });
        };
        if !listing.last_name.is_empty() && *listing.last_name >= *item.name {
            return Err(WriteError::Tree { rank, why: "the names of a directory are not in order" });
        }
        while let Some(dot) = DOTS.get(listing.dots).filter(|dot| **dot < item.name) {
            self.push_dot(&mut listing, dot, sink)?;
        }
        // Before the entry is counted: the block that is written away has only what came before.
        self.make_room(&mut listing, item.name, sink)?;
        let (number, kind) = self.inode(&mut listing, item, sink)?;
        let position = listing.block.push(number, kind, item.name);
        if kind == FileType::Dir {
            listing.unplaced.push(position);
        }
        listing.last_name.clear();
        listing.last_name.extend_from_slice(item.name);
        listing.left -= 1;
        self.rank += 1;
        self.listing = Some(listing);
        self.advance(sink)
    }

    /// Ends the image.
    pub fn finish<E>(self) -> Result<Finished, WriteError<E>> {
        let rank = self.rank;
        if self.listing.is_some() || !self.stack.is_empty() {
            return Err(WriteError::Tree { rank, why: "it has fewer entries than its directories" });
        }
        let names_at = self.head_len() / BLOCK;
        let inodes_at = names_at + self.names / BLOCK;
        let blocks = inodes_at + self.inodes.div_ceil(BLOCK);
        let limit = |_| WriteError::Limit { rank, why: "the image is longer than 16 TiB" };
        let mut devices: Vec<Device> = self.spec.packs.iter().map(|used| Device::Pack(used.pack)).collect();
        let mut slots = Vec::new();
        for used in &self.spec.packs {
            slots.extend(disk::slot(&tag(used.pack.to_string().as_bytes()), saturated(used.len / BLOCK)));
        }
        if self.tails > 0 {
            devices.push(Device::Tails);
            slots.extend(disk::slot(&tag(TAILS_TAG), saturated(self.tails / BLOCK)));
        }
        let superblock = disk::Superblock {
            root: ROOT as u16,
            inodes: self.count,
            blocks: u32::try_from(blocks).map_err(limit)?,
            inodes_at: u32::try_from(inodes_at).map_err(limit)?,
            uuid: self.spec.uuid,
            devices: devices.len() as u16,
        };
        let mut head = superblock.encode();
        head.extend(slots);
        head.resize(self.head_len() as usize, 0);
        Ok(Finished {
            head,
            names_len: self.names,
            inodes_len: self.inodes.next_multiple_of(BLOCK),
            tails_len: self.tails,
            devices,
            inodes: self.count,
        })
    }

    /// Ends directories that have no more entries, and begins the next.
    fn advance<S: Sink>(&mut self, sink: &mut S) -> Written<(), S> {
        while let Some(listing) = self.listing.take_if(|listing| listing.left == 0) {
            let done = self.end_directory(listing, sink)?;
            self.stack.push(done);
            while let Some(level) = self.stack.last_mut() {
                if let Some(next) = level.waiting.pop_front() {
                    self.listing = Some(Listing::new(next, level.number, None));
                    break;
                }
                self.stack.pop();
            }
        }
        Ok(())
    }

    /// Writes the inode of an entry; a directory gets its number later.
    fn inode<S: Sink>(&mut self, listing: &mut Listing, item: &Item<'_>, sink: &mut S) -> Written<(u64, FileType), S> {
        let rank = self.rank;
        Ok(match item.what {
            What::Link { rank: first } => {
                let found = self.links.binary_search_by_key(&first, |(rank, _)| *rank);
                let found = found.ok().and_then(|at| self.links.get(at));
                let why = "the first entry of a hard-link group is not a file before it";
                (found.ok_or(WriteError::Tree { rank, why })?.1, FileType::File)
            }
            What::Dir { children, subdirs } => {
                listing.subdirs.push_back(Waiting {
                    place: u64::MAX,
                    children,
                    subdirs,
                    secs: item.attributes.mtime.secs,
                    nanos: item.attributes.mtime.nanos,
                    label: label(rank),
                    mode: item.attributes.mode as u16,
                });
                (0, FileType::Dir)
            }
            What::Symlink { target } => (self.symlink(listing, item, target, sink)?, FileType::Symlink),
            What::File { size, location } => {
                let number = self.file(item, size, location, sink)?;
                if item.attributes.nlink > 1 {
                    self.links.push((rank, number));
                }
                (number, FileType::File)
            }
        })
    }

    fn symlink<S: Sink>(
        &mut self,
        listing: &mut Listing,
        item: &Item<'_>,
        target: &[u8],
        sink: &mut S,
    ) -> Written<u64, S> {
        let inode = self.plain(item, FileType::Symlink, target.len() as u64, Layout::Inline);
        if target.len() <= INLINE_LEN_MAX {
            return self.write_inline(&inode, target, sink);
        }
        if listing.long_links.len() >= LONG_LINKS_MAX {
            let why = "its directory has more than 4,096 symbolic links with targets above 4,032 bytes";
            return Err(WriteError::Limit { rank: self.rank, why });
        }
        // Its block must not stand between those of the directory.
        let at = self.allot(INODE_LEN, false);
        listing.long_links.push((at, inode, target.into()));
        Ok(at / INODE_UNIT)
    }

    fn file<S: Sink>(&mut self, item: &Item<'_>, size: u64, location: &Location, sink: &mut S) -> Written<u64, S> {
        let rank = self.rank;
        if size == 0 {
            let inode = self.plain(item, FileType::File, 0, Layout::Flat { block: disk::NULL_BLOCK });
            let at = self.allot(INODE_LEN, false);
            put(sink, Section::Inodes, at, &inode.encode())?;
            return Ok(at / INODE_UNIT);
        }
        let (device, pack_len) = match location.pack() {
            None => (0, 0),
            Some(pack) => {
                let found = self.spec.packs.binary_search_by(|used| used.pack.cmp(&pack)).ok();
                let used = found.and_then(|at| Some((at, self.spec.packs.get(at)?)));
                let why = "its placement does not list the pack of this file";
                let (at, used) = used.ok_or(WriteError::Tree { rank, why })?;
                (at as u16 + 1, used.len)
            }
        };
        let why = "the file is so sparse that it would take more than 8,388,608 indexes or 256 MiB of copies";
        let map = Map::new(size, location, pack_len).ok_or(WriteError::Limit { rank, why })?;
        debug_assert!(map.count() <= CHUNKS_MAX);
        if self.tails.saturating_add(map.copied_len()) > TAILS_MAX {
            let why = "the ends of the commit's files would take more than 8 GiB on this node's disk";
            return Err(WriteError::Limit { rank, why });
        }
        let inode = self.plain(item, FileType::File, size, Layout::Chunks { bits: map.bits() });
        let at = self.allot(INODE_LEN + map.count() * INDEX_LEN, false);
        self.write_chunks(&inode, at, &map, device, sink)?;
        Ok(at / INODE_UNIT)
    }

    /// Writes an inode and its indexes, a batch at a time.
    fn write_chunks<S: Sink>(
        &mut self,
        inode: &Inode,
        at: u64,
        map: &Map<'_>,
        device: u16,
        sink: &mut S,
    ) -> Written<(), S> {
        let rank = self.rank;
        let mut bytes = inode.encode().to_vec();
        let mut from = at;
        for chunk in 0..map.count() {
            let place = match map.chunk(chunk) {
                Chunk::Hole => None,
                Chunk::At(block) => Some((device, block)),
                Chunk::Copy => {
                    let (logical, len) = map.range(chunk);
                    let copied = Copied { rank, logical, len, to: self.tails };
                    sink.copy(&copied).map_err(WriteError::Sink)?;
                    self.tails += len.next_multiple_of(BLOCK);
                    Some((self.spec.packs.len() as u16 + 1, copied.to / BLOCK))
                }
            };
            let why = "it lies behind the first 16 TiB of its pack";
            let narrow =
                |(device, block)| Some((device, u32::try_from(block).ok().filter(|b| *b != disk::NULL_BLOCK)?));
            let place = match place {
                None => None,
                Some(place) => Some(narrow(place).ok_or(WriteError::Limit { rank, why })?),
            };
            bytes.extend(disk::index(place));
            if (chunk + 1).is_multiple_of(INDEX_BATCH) {
                put(sink, Section::Inodes, from, &bytes)?;
                from += bytes.len() as u64;
                bytes.clear();
            }
        }
        put(sink, Section::Inodes, from, &bytes)
    }

    fn plain(&mut self, item: &Item<'_>, kind: FileType, size: u64, layout: Layout) -> Inode {
        self.count += 1;
        Inode {
            kind,
            layout,
            mode: item.attributes.mode,
            size,
            label: label(self.rank),
            uid: self.spec.uid,
            gid: self.spec.gid,
            secs: item.attributes.mtime.secs,
            nanos: item.attributes.mtime.nanos,
            nlink: item.attributes.nlink,
        }
    }

    /// Takes room for an inode; `together`: within one block.
    fn allot(&mut self, len: u64, together: bool) -> u64 {
        let mut at = self.inodes;
        if together && at % BLOCK + len > BLOCK {
            at = at.next_multiple_of(BLOCK);
        }
        self.inodes = (at + len).next_multiple_of(INODE_UNIT);
        at
    }

    fn write_inline<S: Sink>(&mut self, inode: &Inode, bytes: &[u8], sink: &mut S) -> Written<u64, S> {
        let at = self.allot(INODE_LEN + bytes.len() as u64, true);
        put(sink, Section::Inodes, at, &[&inode.encode(), bytes].concat())?;
        Ok(at / INODE_UNIT)
    }

    fn push_dot<S: Sink>(&mut self, listing: &mut Listing, dot: &[u8], sink: &mut S) -> Written<(), S> {
        self.make_room(listing, dot, sink)?;
        let number = if listing.dots == 0 { listing.number.unwrap_or(0) } else { listing.parent };
        let position = listing.block.push(number, FileType::Dir, dot);
        if listing.dots == 0 {
            listing.dot = Some(position);
        }
        listing.dots += 1;
        Ok(())
    }

    /// Writes the block away where a name does not fit any more.
    fn make_room<S: Sink>(&mut self, listing: &mut Listing, name: &[u8], sink: &mut S) -> Written<(), S> {
        if listing.block.has_room(name) { Ok(()) } else { self.write_block(listing, sink) }
    }

    /// Writes the block that was filled to the names.
    fn write_block<S: Sink>(&mut self, listing: &mut Listing, sink: &mut S) -> Written<(), S> {
        let number = match listing.number {
            Some(number) => number,
            None => self.allot(INODE_LEN, false) / INODE_UNIT,
        };
        listing.number = Some(number);
        if let Some(dot) = listing.dot.take() {
            listing.block.set(dot, number);
        }
        if listing.blocks == 0 {
            listing.start = self.names;
        }
        let mut bytes = listing.block.encode();
        bytes.resize(BLOCK as usize, 0);
        put(sink, Section::Names, self.names, &bytes)?;
        listing.place_subdirs(self.names);
        self.names += BLOCK;
        listing.blocks += 1;
        listing.block = DirBlock::default();
        Ok(())
    }

    /// Writes what is left of a directory and its inode, and puts its number where its name is.
    fn end_directory<S: Sink>(&mut self, mut listing: Listing, sink: &mut S) -> Written<Level, S> {
        while let Some(dot) = DOTS.get(listing.dots) {
            self.push_dot(&mut listing, dot, sink)?;
        }
        if listing.subdirs.len() as u64 != listing.me.subdirs {
            let why = "a directory does not have as many directories as it says";
            return Err(WriteError::Tree { rank: self.rank, why });
        }
        let used = listing.block.used();
        let number = if listing.number.is_none() && used <= INLINE_LEN_MAX {
            self.end_inline(&mut listing, sink)?
        } else {
            self.end_in_blocks(&mut listing, sink)?
        };
        self.write_long_links(&mut listing, sink)?;
        // The root's name is in no directory.
        if listing.me.place != u64::MAX {
            let (section, at) = match listing.me.place & IN_INODES {
                0 => (Section::Names, listing.me.place),
                _ => (Section::Inodes, listing.me.place & !IN_INODES),
            };
            put(sink, section, at, &number.to_le_bytes())?;
            self.count += 1;
        }
        Ok(Level { number, waiting: listing.subdirs })
    }

    fn end_inline<S: Sink>(&mut self, listing: &mut Listing, sink: &mut S) -> Written<u64, S> {
        let used = listing.block.used();
        let at = self.allot(INODE_LEN + used as u64, true);
        let number = at / INODE_UNIT;
        if let Some(dot) = listing.dot.take() {
            listing.block.set(dot, number);
        }
        let inode = self.directory(listing, used as u64, Layout::Inline);
        put(sink, Section::Inodes, at, &[&inode.encode()[..], &listing.block.encode()].concat())?;
        listing.place_subdirs((at + INODE_LEN) | IN_INODES);
        Ok(number)
    }

    fn end_in_blocks<S: Sink>(&mut self, listing: &mut Listing, sink: &mut S) -> Written<u64, S> {
        let used = listing.block.used() as u64;
        self.write_block(listing, sink)?;
        let block = self.block(listing.start)?;
        let size = (listing.blocks - 1) * BLOCK + used;
        let inode = self.directory(listing, size, Layout::Flat { block });
        let number = listing.number.unwrap_or(ROOT);
        put(sink, Section::Inodes, number * INODE_UNIT, &inode.encode())?;
        Ok(number)
    }

    fn directory(&self, listing: &Listing, size: u64, layout: Layout) -> Inode {
        let me = &listing.me;
        Inode {
            kind: FileType::Dir,
            layout,
            mode: u32::from(me.mode),
            size,
            label: me.label,
            uid: self.spec.uid,
            gid: self.spec.gid,
            secs: me.secs,
            nanos: me.nanos,
            nlink: u32::try_from(me.subdirs.saturating_add(2)).unwrap_or(1),
        }
    }

    fn write_long_links<S: Sink>(&mut self, listing: &mut Listing, sink: &mut S) -> Written<(), S> {
        for (at, inode, target) in listing.long_links.drain(..) {
            let layout = Layout::Flat { block: self.block(self.names)? };
            put(sink, Section::Inodes, at, &Inode { layout, ..inode }.encode())?;
            let mut bytes = target.into_vec();
            bytes.resize(BLOCK as usize, 0);
            put(sink, Section::Names, self.names, &bytes)?;
            self.names += BLOCK;
        }
        Ok(())
    }

    /// Gives the number of the block of the image at an offset of the names.
    fn block<E>(&self, names: u64) -> Result<u32, WriteError<E>> {
        let why = "the image is longer than 16 TiB";
        u32::try_from((self.head_len() + names) / BLOCK).map_err(|_| WriteError::Limit { rank: self.rank, why })
    }
}

fn put<S: Sink>(sink: &mut S, section: Section, offset: u64, bytes: &[u8]) -> Written<(), S> {
    sink.write(section, offset, bytes).map_err(WriteError::Sink)
}

/// Gives the length of superblock and slots: there is always room for the slot of the tails.
pub fn head_len(packs: usize) -> u64 {
    BLOCK + ((packs as u64 + 1) * SLOT_LEN).next_multiple_of(BLOCK)
}

/// Gives what tools show as an inode's number: as FUSE shows it, in 32 bits.
fn label(rank: u64) -> u32 {
    rank.wrapping_add(2) as u32
}

fn tag(text: &[u8]) -> [u8; 64] {
    let mut tag = [0; 64];
    tag.iter_mut().zip(text).for_each(|(to, from)| *to = *from);
    tag
}

fn saturated(blocks: u64) -> u32 {
    u32::try_from(blocks).unwrap_or(u32::MAX)
}
