//! The index of a pack: its codec, its checks, and finding a content by offset.

use crate::format::codec::{DecodeError, Reader, Writer};
use crate::format::ids::{ContentDigest, ContentId, PackId, PinId};

use super::plan::{EXTENTS_MAX, place_extents};
use super::{PACK_FORMAT, PackIndex, PackedContent, Place, align_up};

const MAGIC: [u8; 4] = *b"LDPI";
const OBJECT: &str = "pack index";
const PACKED: u8 = 0;
const WHOLE: u8 = 1;
const CONTENT_PIN: u8 = 1;
const CONTENT_SPARSE: u8 = 2;
/// Longest encoded index: more than a pack of 4,000,000 files takes.
pub const INDEX_LEN_MAX: usize = 256 << 20;

impl PackIndex {
    /// Computes the pack id: the digest of the encoding.
    pub fn id(&self) -> PackId {
        Self::id_of(&self.encode())
    }

    /// Computes the pack id of an encoded index.
    pub fn id_of(encoded: &[u8]) -> PackId {
        PackId(*blake3::hash(encoded).as_bytes())
    }

    /// Says whether the pack is one content, byte for byte, with nothing behind it.
    pub fn is_whole(&self) -> bool {
        match self.contents.as_slice() {
            [only] => matches!(only.place, Place::Run { offset: 0 }) && only.size == self.len,
            _ => false,
        }
    }

    /// Encodes to the stored bytes. Offsets are not among them: they follow from the sizes, so an
    /// index whose offsets are others would come back as another index (a writer takes them from
    /// [`super::PackPlanner`]).
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(MAGIC, PACK_FORMAT);
        w.u8(if self.contents.last().is_some_and(|last| last.end() == self.len) && self.contents.len() == 1 {
            WHOLE
        } else {
            PACKED
        });
        w.varint(self.contents.len() as u64);
        for content in &self.contents {
            let (pin, id) = match &content.content {
                ContentId::Digest(digest) => (0, digest.as_bytes()),
                ContentId::Pin(pin) => (CONTENT_PIN, pin.as_bytes()),
            };
            match &content.place {
                Place::Run { .. } => {
                    w.u8(pin);
                    w.raw(id);
                    w.varint(content.size);
                }
                Place::Sparse { extents } => {
                    w.u8(pin | CONTENT_SPARSE);
                    w.raw(id);
                    w.varint(content.size);
                    w.varint(extents.len() as u64);
                    let mut end = 0;
                    for extent in extents {
                        w.varint(extent.logical.saturating_sub(end));
                        w.varint(extent.len);
                        end = extent.logical.saturating_add(extent.len);
                    }
                }
            }
        }
        w.finish()
    }

    /// Decodes, checks, and computes the offsets.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (mut r, _) = Reader::open(OBJECT, bytes, MAGIC, PACK_FORMAT)?;
        if bytes.len() > INDEX_LEN_MAX {
            return Err(r.bad(INDEX_LEN_MAX, "length", "it is above the limit"));
        }
        let at = r.at();
        let whole = match r.u8()? {
            PACKED => false,
            WHOLE => true,
            _ => return Err(r.bad(at, "kind", "it is not one of 0 and 1")),
        };
        let count = r.count("contents", 34)?;
        if count == 0 || (whole && count != 1) || u32::try_from(count).is_err() {
            return Err(r.bad(at, "contents", "a whole pack has one, a packed one has 1 to 2^32-1"));
        }
        let mut contents = Vec::with_capacity(count);
        let mut end = 0;
        for _ in 0..count {
            let at = r.at();
            let content = read_content(&mut r, end)?;
            let exact = content.end();
            let aligned = align_up(exact).filter(|end| i64::try_from(*end).is_ok());
            let aligned = aligned.ok_or_else(|| r.bad(at, "size", "the pack is longer than 2^63 bytes"))?;
            end = if whole { exact } else { aligned };
            contents.push(content);
        }
        // One content that ends on a boundary is the same pack either way: it has one encoding.
        if !whole && count == 1 && contents.first().is_some_and(|only| only.end() == end) {
            return Err(r.bad(at, "kind", "a pack of one content that needs no padding is whole"));
        }
        r.end()?;
        Ok(Self { len: end, contents })
    }

    /// Finds the content that holds the byte at `offset`, if any (padding has none).
    pub fn content_at(&self, offset: u64) -> Option<usize> {
        let position = self.contents.partition_point(|content| content.place.start() <= offset).checked_sub(1)?;
        let content = self.contents.get(position)?;
        let holds = match &content.place {
            Place::Run { .. } => offset < content.end(),
            Place::Sparse { extents } => {
                let behind = extents.partition_point(|extent| extent.offset <= offset);
                behind
                    .checked_sub(1)
                    .and_then(|i| extents.get(i))
                    .is_some_and(|extent| offset - extent.offset < extent.len)
            }
        };
        holds.then_some(position)
    }

    /// Estimates the bytes that the decoded index takes in memory.
    pub fn heap_bytes(&self) -> usize {
        let extents = |content: &PackedContent| match &content.place {
            Place::Run { .. } => 0,
            Place::Sparse { extents } => size_of_val(extents.as_slice()),
        };
        size_of_val(self.contents.as_slice()) + self.contents.iter().map(extents).sum::<usize>()
    }
}

fn read_content(r: &mut Reader<'_>, offset: u64) -> Result<PackedContent, DecodeError> {
    let at = r.at();
    let flags = r.u8()?;
    if flags & !(CONTENT_PIN | CONTENT_SPARSE) != 0 {
        return Err(r.bad(at, "content", "it has unknown flags"));
    }
    let id = r.array()?;
    let content = match flags & CONTENT_PIN {
        0 => ContentId::Digest(ContentDigest(id)),
        _ => ContentId::Pin(PinId(id)),
    };
    let at = r.at();
    let size = r.varint()?;
    if size == 0 || size > i64::MAX as u64 {
        return Err(r.bad(at, "size", "it is not from 1 to 2^63-1"));
    }
    let place = match flags & CONTENT_SPARSE {
        0 => Place::Run { offset },
        _ => read_extents(r, offset, size)?,
    };
    Ok(PackedContent { content, size, place })
}

fn read_extents(r: &mut Reader<'_>, offset: u64, size: u64) -> Result<Place, DecodeError> {
    let start = r.at();
    let count = r.count("extents", 2)?;
    if count == 0 || count > EXTENTS_MAX {
        return Err(r.bad(start, "extents", "a sparse content has 1 to 1024"));
    }
    let mut data = Vec::with_capacity(count);
    let mut end = 0_u64;
    for _ in 0..count {
        let at = r.at();
        let logical = end.checked_add(r.varint()?);
        let len = r.varint()?;
        let ends = logical.and_then(|logical| logical.checked_add(len)).filter(|ends| *ends <= size && len > 0);
        let (Some(logical), Some(ends)) = (logical, ends) else {
            return Err(r.bad(at, "extent", "it is empty or ends behind the content"));
        };
        end = ends;
        data.push((logical, len));
    }
    let (place, _) =
        place_extents(offset, &data).map_err(|_| r.bad(start, "extents", "the pack is longer than 2^63 bytes"))?;
    Ok(place)
}
