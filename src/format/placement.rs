//! Placements: where a tree's contents lie, in blocks that mirror the tree's own.
//!
//! One placement segment per tree segment, in entry order, and one index block per tree index
//! block, so that a change of k files rewrites O(k). The root lists every pack that is used, with
//! its length and how many of its bytes this tree refers to: accounting, filling and gc need no
//! more than the root. `placements/<tree>/<placement>` in the lake; immutable; the newest complete
//! one counts. Not part of any commit id.
//!
//! Bytes: `docs/formats/placement.md`. Offsets in a pack are multiples of 4 KiB and stored as such;
//! [`crate::format::tree::build`] refuses others before they get here.

use crate::format::codec::{DecodeError, Reader, Writer};
use crate::format::ids::{BlockId, PackId, PlacementId, TreeId};
use crate::format::pack::{ALIGN, plan::EXTENTS_MAX};
use crate::format::tree::segment::ROOT_LEN_MAX;

/// Where the bytes of one file lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// Not a file with bytes of its own (directory, symlink, later hard link, empty file), or a file
    /// of holes only.
    None,
    /// All logical bytes, in one run: `[offset, offset + size)` of the pack.
    Run { pack: PackId, offset: u64 },
    /// A sparse file: its data extents in logical order; everything between them is holes.
    Sparse { pack: PackId, extents: Vec<Extent> },
}

/// A piece of a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Position in the file's logical bytes.
    pub logical: u64,
    /// Position in the pack.
    pub offset: u64,
    pub len: u64,
}

/// One pack that a placement uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackUse {
    pub pack: PackId,
    /// Length of the whole pack.
    pub len: u64,
    /// Bytes of it that this tree refers to (each content once, without padding).
    pub referenced: u64,
}

/// The root of a placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacementRoot {
    pub tree: TreeId,
    /// Sorted by pack id, no duplicates.
    pub packs: Vec<PackUse>,
    /// Placed blocks of the children of the tree root's top block, one each, in order.
    pub top: Vec<BlockId>,
}

/// A block of a placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlacedBlock {
    /// Mirrors a tree segment: one location per entry.
    Segment(Vec<Location>),
    /// Mirrors a tree index block: one child per child.
    Index(Vec<BlockId>),
}

/// A tree is one of small files where a pack has this many of them on average ...
const SMALL_FILES_PER_PACK: u64 = 64;
/// ... and files that are packs of their own have at most one of this many parts of the bytes.
const SMALL_FILES_PARTS: u64 = 8;
/// Version of placements that this larder writes, and the newest it reads.
pub const PLACEMENT_FORMAT: u32 = 1;
/// Longest encoded block: 4,096 sparse files with 1,024 extents each stay below it.
pub const PLACED_LEN_MAX: usize = 64 << 20;
const ROOT_MAGIC: [u8; 4] = *b"LDPR";
const BLOCK_MAGIC: [u8; 4] = *b"LDPB";
const KIND_SEGMENT: u8 = 0;
const KIND_INDEX: u8 = 1;

impl PlacementRoot {
    /// Says whether the tree is one of small files: nearly all of its `files`, and of its bytes, lie in packs that
    /// they share. A pack that is no multiple of [`ALIGN`] is one file; of others that cannot be told from here.
    pub fn is_of_small_files(&self, files: u64) -> bool {
        let all: u64 = self.packs.iter().fold(0, |sum, pack| sum.saturating_add(pack.len));
        let single = self.packs.iter().filter(|pack| pack.len % ALIGN != 0);
        let single: u64 = single.fold(0, |sum, pack| sum.saturating_add(pack.len));
        files / SMALL_FILES_PER_PACK >= self.packs.len() as u64 && single <= all / SMALL_FILES_PARTS
    }

    /// Computes the placement id: the digest of the encoding.
    pub fn id(&self) -> PlacementId {
        Self::id_of(&self.encode())
    }

    /// Computes the id of an encoded root.
    pub fn id_of(encoded: &[u8]) -> PlacementId {
        PlacementId(*blake3::hash(encoded).as_bytes())
    }

    /// Encodes to the stored bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(ROOT_MAGIC, PLACEMENT_FORMAT);
        w.raw(self.tree.as_bytes());
        w.varint(self.packs.len() as u64);
        for pack in &self.packs {
            w.raw(pack.pack.as_bytes());
            w.varint(pack.len);
            w.varint(pack.referenced);
        }
        w.varint(self.top.len() as u64);
        self.top.iter().for_each(|id| w.raw(id.as_bytes()));
        w.finish()
    }

    /// Decodes and checks the order of the packs and their numbers.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (mut r, _) = Reader::open("placement root", bytes, ROOT_MAGIC, PLACEMENT_FORMAT)?;
        if bytes.len() > ROOT_LEN_MAX {
            return Err(r.bad(ROOT_LEN_MAX, "length", "it is above the limit"));
        }
        let tree = TreeId(r.array()?);
        let count = r.count("packs", 34)?;
        let mut packs: Vec<PackUse> = Vec::with_capacity(count);
        for _ in 0..count {
            let at = r.at();
            let pack = PackUse { pack: PackId(r.array()?), len: r.varint()?, referenced: r.varint()? };
            if packs.last().is_some_and(|last| last.pack >= pack.pack) {
                return Err(r.bad(at, "packs", "they are not in order"));
            }
            if pack.referenced > pack.len {
                return Err(r.bad(at, "pack", "more of it is referenced than it has"));
            }
            packs.push(pack);
        }
        let top = read_ids(&mut r)?;
        r.end()?;
        Ok(Self { tree, packs, top })
    }
}

impl PlacedBlock {
    /// Computes the id of an encoded block.
    pub fn id_of(encoded: &[u8]) -> BlockId {
        BlockId(*blake3::hash(encoded).as_bytes())
    }

    /// Encodes to the stored bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(BLOCK_MAGIC, PLACEMENT_FORMAT);
        match self {
            Self::Segment(locations) => {
                w.u8(KIND_SEGMENT);
                write_locations(&mut w, locations);
            }
            Self::Index(children) => {
                w.u8(KIND_INDEX);
                w.varint(children.len() as u64);
                children.iter().for_each(|id| w.raw(id.as_bytes()));
            }
        }
        w.finish()
    }

    /// Decodes and checks everything a block alone can show.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (mut r, _) = Reader::open("placed block", bytes, BLOCK_MAGIC, PLACEMENT_FORMAT)?;
        if bytes.len() > PLACED_LEN_MAX {
            return Err(r.bad(PLACED_LEN_MAX, "length", "it is above the limit"));
        }
        let at = r.at();
        let block = match r.u8()? {
            KIND_SEGMENT => Self::Segment(read_locations(&mut r)?),
            KIND_INDEX => Self::Index(read_ids(&mut r)?),
            _ => return Err(r.bad(at, "kind", "it is not one of 0 and 1")),
        };
        r.end()?;
        Ok(block)
    }

    /// Estimates the bytes that the decoded block takes in memory.
    pub fn heap_bytes(&self) -> usize {
        match self {
            Self::Segment(locations) => {
                let extents: usize = locations.iter().map(|location| location.extents().len()).sum();
                size_of_val(locations.as_slice()) + extents * size_of::<Extent>()
            }
            Self::Index(children) => size_of_val(children.as_slice()),
        }
    }
}

impl Location {
    /// Gives the pack, where there are bytes.
    pub fn pack(&self) -> Option<PackId> {
        match self {
            Self::None => None,
            Self::Run { pack, .. } | Self::Sparse { pack, .. } => Some(*pack),
        }
    }

    /// Gives the extents of a sparse file, else none.
    pub fn extents(&self) -> &[Extent] {
        match self {
            Self::Sparse { extents, .. } => extents,
            Self::None | Self::Run { .. } => &[],
        }
    }
}

/// Writes the packs in the order of their first use, then one code per entry: 0 for none, else
/// `1 + 2 * position of the pack` and one more where it is sparse.
fn write_locations(w: &mut Writer, locations: &[Location]) {
    let mut packs: Vec<PackId> = Vec::new();
    let mut known = std::collections::HashMap::new();
    for pack in locations.iter().filter_map(Location::pack) {
        known.entry(pack).or_insert_with(|| {
            packs.push(pack);
            packs.len() as u64 - 1
        });
    }
    w.varint(packs.len() as u64);
    packs.iter().for_each(|pack| w.raw(pack.as_bytes()));
    w.varint(locations.len() as u64);
    let code = |pack: &PackId| 1 + 2 * known.get(pack).copied().unwrap_or_default();
    for location in locations {
        match location {
            Location::None => w.varint(0),
            Location::Run { pack, offset } => {
                debug_assert!(offset % ALIGN == 0);
                w.varint(code(pack));
                w.varint(offset / ALIGN);
            }
            Location::Sparse { pack, extents } => {
                w.varint(code(pack) + 1);
                write_extents(w, extents);
            }
        }
    }
}

/// Writes, of each extent, the hole before it, its place in units of [`ALIGN`], and its length.
fn write_extents(w: &mut Writer, extents: &[Extent]) {
    w.varint(extents.len() as u64);
    let mut end = 0;
    for extent in extents {
        debug_assert!(extent.offset % ALIGN == 0 && extent.logical >= end);
        w.varint(extent.logical.saturating_sub(end));
        w.varint(extent.offset / ALIGN);
        w.varint(extent.len);
        end = extent.logical.saturating_add(extent.len);
    }
}

fn read_locations(r: &mut Reader<'_>) -> Result<Vec<Location>, DecodeError> {
    let at = r.at();
    let packs: Vec<PackId> = read_ids(r)?.into_iter().map(|id| PackId(id.0)).collect();
    if packs.iter().collect::<std::collections::HashSet<_>>().len() != packs.len() {
        return Err(r.bad(at, "packs", "one is there twice"));
    }
    let mut used = 0;
    let count = r.count("entries", 1)?;
    let mut locations = Vec::with_capacity(count);
    for _ in 0..count {
        let at = r.at();
        let Some(code) = r.varint()?.checked_sub(1) else {
            locations.push(Location::None);
            continue;
        };
        let position = usize::try_from(code / 2).unwrap_or(usize::MAX);
        let pack = *packs.get(position).ok_or_else(|| r.bad(at, "pack", "there is none at this position"))?;
        if position > used {
            return Err(r.bad(at, "packs", "they are not in the order of their first use"));
        }
        used = used.max(position + 1);
        locations.push(match code % 2 {
            0 => Location::Run { pack, offset: read_offset(r)? },
            _ => Location::Sparse { pack, extents: read_extents(r)? },
        });
    }
    match used == packs.len() {
        true => Ok(locations),
        false => Err(r.bad(at, "packs", "one is never used")),
    }
}

fn read_offset(r: &mut Reader<'_>) -> Result<u64, DecodeError> {
    let at = r.at();
    r.varint()?.checked_mul(ALIGN).ok_or_else(|| r.bad(at, "offset", "it is above 64 bits"))
}

fn read_extents(r: &mut Reader<'_>) -> Result<Vec<Extent>, DecodeError> {
    let start = r.at();
    let count = r.count("extents", 3)?;
    if count == 0 || count > EXTENTS_MAX {
        return Err(r.bad(start, "extents", "a sparse file has 1 to 1024"));
    }
    let mut extents = Vec::with_capacity(count);
    let mut end = 0_u64;
    for _ in 0..count {
        let at = r.at();
        let logical = end.checked_add(r.varint()?);
        let offset = read_offset(r)?;
        let len = r.varint()?;
        let ends = logical.and_then(|logical| logical.checked_add(len));
        let (Some(logical), Some(ends), Some(_)) = (logical, ends, offset.checked_add(len)) else {
            return Err(r.bad(at, "extent", "it ends above 64 bits"));
        };
        if len == 0 {
            return Err(r.bad(at, "extent", "it is empty"));
        }
        end = ends;
        extents.push(Extent { logical, offset, len });
    }
    Ok(extents)
}

fn read_ids(r: &mut Reader<'_>) -> Result<Vec<BlockId>, DecodeError> {
    let count = r.count("ids", 32)?;
    let mut ids = Vec::with_capacity(count);
    for _ in 0..count {
        ids.push(BlockId(r.array()?));
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(n: u8) -> PackId {
        PackId([n; 32])
    }

    fn segment() -> PlacedBlock {
        let extents =
            vec![Extent { logical: 0, offset: 4096, len: 100 }, Extent { logical: 1 << 40, offset: 8192, len: 4096 }];
        PlacedBlock::Segment(vec![
            Location::None,
            Location::Run { pack: pack(9), offset: 0 },
            Location::Sparse { pack: pack(1), extents },
            Location::Run { pack: pack(9), offset: 1 << 30 },
        ])
    }

    #[test]
    fn a_tree_of_small_files_has_many_in_a_pack_and_few_bytes_beside() {
        let root = |lens: &[u64]| {
            let packs = (0..).zip(lens).map(|(n, &len)| PackUse { pack: pack(n), len, referenced: len }).collect();
            PlacementRoot { tree: TreeId([3; 32]), packs, top: Vec::new() }
        };
        let packs = root(&[1 << 28, 1 << 28]);
        assert!(packs.is_of_small_files(128));
        assert!(!packs.is_of_small_files(127), "two packs could be two files");
        assert!(root(&[1 << 28, (1 << 25) - 1]).is_of_small_files(1000));
        assert!(!root(&[1 << 28, (1 << 26) - 1]).is_of_small_files(1000), "a file with a fifth of the bytes");
        assert!(!root(&[77]).is_of_small_files(1000));
        assert!(root(&[]).is_of_small_files(0), "nothing to read");
    }

    #[test]
    fn blocks_and_roots_survive_a_round_trip() {
        for block in [segment(), PlacedBlock::Segment(vec![]), PlacedBlock::Index(vec![BlockId([1; 32]); 3])] {
            assert_eq!(PlacedBlock::decode(&block.encode()), Ok(block));
        }
        let uses = [1, 2].map(|n| PackUse { pack: pack(n), len: 1 << 28, referenced: 77 });
        let root = PlacementRoot { tree: TreeId([3; 32]), packs: uses.to_vec(), top: vec![BlockId([4; 32])] };
        assert_eq!(PlacementRoot::decode(&root.encode()), Ok(root.clone()));
        let unordered = PlacementRoot { packs: uses.iter().rev().copied().collect(), ..root.clone() };
        assert!(PlacementRoot::decode(&unordered.encode()).is_err());
        let over = PlacementRoot { packs: vec![PackUse { referenced: 1 << 29, ..uses[0] }], ..root };
        assert!(PlacementRoot::decode(&over.encode()).is_err());
    }

    #[test]
    fn every_cut_of_a_block_is_refused() {
        let encoded = segment().encode();
        for cut in 0..encoded.len() {
            assert!(PlacedBlock::decode(&encoded[..cut]).is_err(), "{cut}");
        }
    }
}
