//! What lies beside a pack's index: its recipe, its chaining values, its proof.

use std::ops::Range;

use crate::format::codec::{DecodeError, Reader, Writer};
use crate::format::digest::{
    BLOCK_LEN, ChainingValue, GROUP_BLOCKS, Outboard, block_count, blocks_of_group, group_values,
};
use crate::format::ids::{ContentDigest, PackId};
use crate::format::tree::entry::{PinReader, PinWriter};

use super::{PACK_FORMAT, PackIndex, PackOutboard, Proof, Recipe, Source};

const RECIPE_MAGIC: [u8; 4] = *b"LDRC";
const OUTBOARD_MAGIC: [u8; 4] = *b"LDOB";
const PROOF_MAGIC: [u8; 4] = *b"LDPF";
const NATIVE: u8 = 0;
const ASSEMBLED: u8 = 1;
/// Longest key of a native pack's object, below `data/`.
const KEY_LEN_MAX: usize = 512;
const OUTBOARD_HEADER_LEN: u64 = 12;
const OUTBOARD_ROW_LEN: u64 = 12;
const VALUE_LEN: u64 = 32;

impl Recipe {
    /// Encodes to the stored bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(RECIPE_MAGIC, PACK_FORMAT);
        w.raw(self.pack.as_bytes());
        w.varint(self.len);
        w.varint(self.index_len);
        w.varint(self.outboard_len);
        match &self.source {
            Source::Native { key } => {
                w.u8(NATIVE);
                w.bytes(key.as_bytes());
            }
            Source::Assembled { pins } => {
                w.u8(ASSEMBLED);
                w.varint(pins.len() as u64);
                let mut writer = PinWriter::default();
                for pin in pins {
                    w.varint(pin.size);
                    writer.write(&mut w, pin);
                }
            }
        }
        w.finish()
    }

    /// Decodes and checks everything that a recipe alone can show.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (mut r, _) = Reader::open("recipe", bytes, RECIPE_MAGIC, PACK_FORMAT)?;
        let pack = PackId(r.array()?);
        let (len, index_len, outboard_len) = (r.varint()?, r.varint()?, r.varint()?);
        let at = r.at();
        let source = match r.u8()? {
            NATIVE => Source::Native { key: read_key(&mut r)? },
            ASSEMBLED => {
                let count = r.count("pins", 6)?;
                let mut pins = Vec::with_capacity(count);
                let mut reader = PinReader::default();
                for _ in 0..count {
                    let size = r.varint()?;
                    pins.push(reader.read(&mut r, size)?);
                }
                Source::Assembled { pins }
            }
            _ => return Err(r.bad(at, "source", "it is not one of 0 and 1")),
        };
        r.end()?;
        Ok(Self { pack, len, index_len, outboard_len, source })
    }
}

/// Reads a key below `data/`: parts of letters, digits, `.`, `_` and `-`, none empty, `.` or `..`,
/// so that no recipe can point at something else.
fn read_key(r: &mut Reader<'_>) -> Result<String, DecodeError> {
    let at = r.at();
    let key = r.text("key", KEY_LEN_MAX)?;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let good = |part: &str| !part.is_empty() && part != "." && part != ".." && part.bytes().all(allowed);
    match key.split('/').all(good) {
        true => Ok(key.to_owned()),
        false => Err(r.bad(at, "key", "it is not a key below data/")),
    }
}

impl PackOutboard {
    /// Encodes to the stored bytes: a table of positions and sizes, then all values, so that a
    /// reader who has the pack's index computes where each value lies ([`OutboardLayout`]).
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(OUTBOARD_MAGIC, PACK_FORMAT);
        w.u32(self.contents.len() as u32);
        for (position, outboard) in &self.contents {
            w.u32(*position);
            w.u64(outboard.size);
        }
        for (_, outboard) in &self.contents {
            outboard.groups.iter().chain(&outboard.blocks).for_each(|value| w.raw(value));
        }
        w.finish()
    }

    /// Decodes a whole outboard; its values are checked by [`Outboard::verify`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (mut r, _) = Reader::open("pack outboard", bytes, OUTBOARD_MAGIC, PACK_FORMAT)?;
        let at = r.at();
        let count = r.u32()? as usize;
        if count > r.left() / (OUTBOARD_ROW_LEN + 2 * VALUE_LEN) as usize {
            return Err(r.bad(at, "contents", "there are not so many bytes left"));
        }
        let mut rows: Vec<(u32, u64)> = Vec::with_capacity(count);
        for _ in 0..count {
            let at = r.at();
            let row = (r.u32()?, r.u64()?);
            if row.1 <= BLOCK_LEN || rows.last().is_some_and(|last| last.0 >= row.0) {
                return Err(r.bad(at, "contents", "they are out of order, or one needs no values"));
            }
            rows.push(row);
        }
        let mut contents = Vec::with_capacity(count);
        for (position, size) in rows {
            let groups = read_values(&mut r, group_values(size))?;
            let blocks = read_values(&mut r, block_count(size))?;
            contents.push((position, Outboard { size, blocks, groups }));
        }
        r.end()?;
        Ok(Self { contents })
    }

    /// Gives the values of the content at `position`.
    pub fn get(&self, position: u32) -> Option<&Outboard> {
        let at = self.contents.binary_search_by_key(&position, |(position, _)| *position).ok()?;
        self.contents.get(at).map(|(_, outboard)| outboard)
    }
}

fn read_values(r: &mut Reader<'_>, count: u64) -> Result<Vec<ChainingValue>, DecodeError> {
    let at = r.at();
    match usize::try_from(count) {
        Ok(count) if count <= r.left() / VALUE_LEN as usize => (0..count).map(|_| r.array()).collect(),
        _ => Err(r.bad(at, "values", "there are not so many bytes left")),
    }
}

/// Where the values of each content lie in the encoded outboard of a pack: for reads by range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboardLayout {
    /// (position, size, offset of the first value), ascending.
    rows: Vec<(u32, u64, u64)>,
    len: u64,
}

impl OutboardLayout {
    /// Computes the layout from the pack's index: every content above 256 KiB has values.
    /// None where they would take more than 64 bits can count.
    pub fn of(index: &PackIndex) -> Option<Self> {
        let large = || (0_u32..).zip(&index.contents).filter(|(_, content)| content.size > BLOCK_LEN);
        let mut at = OUTBOARD_HEADER_LEN + large().count() as u64 * OUTBOARD_ROW_LEN;
        let mut rows = Vec::new();
        for (position, content) in large() {
            rows.push((position, content.size, at));
            let values = group_values(content.size).checked_add(block_count(content.size))?;
            at = at.checked_add(values.checked_mul(VALUE_LEN)?)?;
        }
        let len = if rows.is_empty() { 0 } else { at };
        Some(Self { rows, len })
    }

    /// Gives the length of the whole outboard; 0 where the pack needs none.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Says whether the pack needs no outboard.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Gives the range of a content's group values (empty where it is one group).
    pub fn groups(&self, position: u32) -> Option<Range<u64>> {
        let (size, at) = self.row(position)?;
        Some(at..at + group_values(size) * VALUE_LEN)
    }

    /// Gives the range of the block values of one group of a content.
    pub fn blocks(&self, position: u32, group: u64) -> Option<Range<u64>> {
        let (size, at) = self.row(position)?;
        let count = Some(blocks_of_group(size, group)).filter(|count| *count > 0)?;
        let start = at + (group_values(size) + group * GROUP_BLOCKS) * VALUE_LEN;
        Some(start..start + count * VALUE_LEN)
    }

    /// Splits bytes that were read by range into values.
    pub fn values(bytes: &[u8]) -> Option<Vec<ChainingValue>> {
        bytes.chunks(VALUE_LEN as usize).map(|value| value.try_into().ok()).collect()
    }

    fn row(&self, position: u32) -> Option<(u64, u64)> {
        let at = self.rows.binary_search_by_key(&position, |(position, ..)| *position).ok()?;
        self.rows.get(at).map(|(_, size, at)| (*size, *at))
    }
}

impl Proof {
    /// Encodes to the stored bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(PROOF_MAGIC, PACK_FORMAT);
        w.raw(self.pack.as_bytes());
        w.varint(self.digests.len() as u64);
        for digest in &self.digests {
            match digest {
                None => w.u8(0),
                Some(digest) => {
                    w.u8(1);
                    w.raw(digest.as_bytes());
                }
            }
        }
        w.finish()
    }

    /// Decodes and checks the form; whether it has one digest for each content, the index tells.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (mut r, _) = Reader::open("proof", bytes, PROOF_MAGIC, PACK_FORMAT)?;
        let pack = PackId(r.array()?);
        let count = r.count("digests", 1)?;
        let mut digests = Vec::with_capacity(count);
        for _ in 0..count {
            let at = r.at();
            digests.push(match r.u8()? {
                0 => None,
                1 => Some(ContentDigest(r.array()?)),
                _ => return Err(r.bad(at, "digest", "its mark is not one of 0 and 1")),
            });
        }
        r.end()?;
        Ok(Self { pack, digests })
    }
}
