//! Bytes of the node's own files (spool, index rows): little-endian, never sent anywhere.

use crate::format::ids::{ContentDigest, ContentId, PackId, PinId};
use crate::format::placement::{Extent, Location};
use crate::format::tree::{Mtime, Pin};

/// Appends values.
#[derive(Debug, Default)]
pub(super) struct Put(pub(super) Vec<u8>);

impl Put {
    pub(super) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }
    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
    /// Bytes with their length in front.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.u32(u32::try_from(bytes.len()).expect("the node's own strings are far below 4 GiB"));
        self.raw(bytes);
    }
    pub(super) fn mtime(&mut self, time: Mtime) {
        self.u64(time.secs.cast_unsigned());
        self.u32(time.nanos);
    }
    pub(super) fn content(&mut self, content: &ContentId) {
        match content {
            ContentId::Digest(digest) => {
                self.u8(0);
                self.raw(digest.as_bytes());
            }
            ContentId::Pin(pin) => {
                self.u8(1);
                self.raw(pin.as_bytes());
            }
        }
    }
    pub(super) fn extents(&mut self, extents: &[Extent]) {
        self.u32(u32::try_from(extents.len()).expect("extents are merged far below 4 billion"));
        for extent in extents {
            self.u64(extent.logical);
            self.u64(extent.offset);
            self.u64(extent.len);
        }
    }
    pub(super) fn location(&mut self, location: &Location) {
        match location {
            Location::None => self.u8(0),
            Location::Run { pack, offset } => {
                self.u8(1);
                self.raw(pack.as_bytes());
                self.u64(*offset);
            }
            Location::Sparse { pack, extents } => {
                self.u8(2);
                self.raw(pack.as_bytes());
                self.extents(extents);
            }
        }
    }
    pub(super) fn pin(&mut self, pin: &Pin) {
        self.bytes(pin.bucket.as_bytes());
        self.bytes(pin.key.as_bytes());
        match &pin.version {
            None => self.u8(0),
            Some(version) => {
                self.u8(1);
                self.bytes(version.as_bytes());
            }
        }
        self.bytes(pin.etag.as_bytes());
        self.u64(pin.size);
    }
}

/// Takes values; None where the bytes end too early or make no sense.
#[derive(Debug, Clone, Copy)]
pub(super) struct Take<'a>(pub(super) &'a [u8]);

impl<'a> Take<'a> {
    pub(super) fn raw(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }
    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.raw(N)?.try_into().ok()
    }
    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }
    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
    pub(super) fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.raw(len as usize)
    }
    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?.to_vec()).ok()
    }
    pub(super) fn mtime(&mut self) -> Option<Mtime> {
        Some(Mtime { secs: self.u64()?.cast_signed(), nanos: self.u32()? })
    }
    pub(super) fn content(&mut self) -> Option<ContentId> {
        match self.u8()? {
            0 => Some(ContentId::Digest(ContentDigest(self.array()?))),
            1 => Some(ContentId::Pin(PinId(self.array()?))),
            _ => None,
        }
    }
    pub(super) fn extents(&mut self) -> Option<Vec<Extent>> {
        let count = self.u32()? as usize;
        if count > self.0.len() / 24 {
            return None;
        }
        (0..count).map(|_| Some(Extent { logical: self.u64()?, offset: self.u64()?, len: self.u64()? })).collect()
    }
    pub(super) fn location(&mut self) -> Option<Location> {
        match self.u8()? {
            0 => Some(Location::None),
            1 => Some(Location::Run { pack: PackId(self.array()?), offset: self.u64()? }),
            2 => Some(Location::Sparse { pack: PackId(self.array()?), extents: self.extents()? }),
            _ => None,
        }
    }
    pub(super) fn pin(&mut self) -> Option<Pin> {
        let bucket = self.text()?;
        let key = self.text()?;
        let version = match self.u8()? {
            0 => None,
            _ => Some(self.text()?),
        };
        Some(Pin { bucket, key, version, etag: self.text()?, size: self.u64()? })
    }
}
