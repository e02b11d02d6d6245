//! The structures of an image, byte by byte.

use super::BLOCK;

/// Where the superblock lies.
pub const SUPER_AT: usize = 1024;
/// Length of one device slot.
pub const SLOT_LEN: u64 = 128;
/// Length of an inode without what follows it.
pub const INODE_LEN: u64 = 64;
/// What inode numbers count.
pub const INODE_UNIT: u64 = 32;
/// Length of a directory entry without its name.
pub const DIRENT_LEN: usize = 12;
/// Length of an index.
pub const INDEX_LEN: u64 = 8;
/// Says "no block".
pub const NULL_BLOCK: u32 = u32::MAX;

const MAGIC: u32 = 0xE0F5_E1E2;
const COMPAT_CHECKSUM: u32 = 1;
const COMPAT_MTIME: u32 = 2;
const INCOMPAT_CHUNKED_FILE: u32 = 4;
const INCOMPAT_DEVICE_TABLE: u32 = 8;
/// The kernel goes by it only when it was given no devices: behind every image, so such a read fails.
const SLOT_START: u32 = 0xF000_0000;
/// The index form of chunks, as opposed to bare block numbers.
const CHUNKS_INDEXED: u16 = 0x20;

/// How an inode's bytes are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// In consecutive blocks of the image.
    Flat { block: u32 },
    /// Behind the inode.
    Inline,
    /// By indexes behind the inode; a chunk has 2^bits blocks.
    Chunks { bits: u8 },
}

/// The kinds of things, as a directory names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    File,
    Dir,
    Symlink,
}

impl FileType {
    /// Gives the byte in a directory entry.
    pub fn code(self) -> u8 {
        match self {
            Self::File => 1,
            Self::Dir => 2,
            Self::Symlink => 7,
        }
    }

    fn mode_bits(self) -> u32 {
        match self {
            Self::File => 0o100_000,
            Self::Dir => 0o040_000,
            Self::Symlink => 0o120_000,
        }
    }
}

/// An inode.
#[derive(Debug, Clone, Copy)]
pub struct Inode {
    pub kind: FileType,
    pub layout: Layout,
    /// Permission bits.
    pub mode: u32,
    pub size: u64,
    /// What tools show as its number.
    pub label: u32,
    pub uid: u32,
    pub gid: u32,
    pub secs: i64,
    pub nanos: u32,
    pub nlink: u32,
}

impl Inode {
    /// Encodes it.
    pub fn encode(&self) -> [u8; INODE_LEN as usize] {
        let (layout, union) = match self.layout {
            Layout::Flat { block } => (0, block),
            Layout::Inline => (2, NULL_BLOCK),
            Layout::Chunks { bits } => (4, u32::from(CHUNKS_INDEXED | u16::from(bits))),
        };
        let mode = u16::try_from(self.kind.mode_bits() | (self.mode & 0o7777)).unwrap_or(0);
        let mut w = Bytes::default();
        // The lowest bit: the extended form.
        w.u16(1 | layout << 1);
        w.u16(0);
        w.u16(mode);
        w.u16(0);
        w.u64(self.size);
        w.u32(union);
        w.u32(self.label);
        w.u32(self.uid);
        w.u32(self.gid);
        w.raw(&self.secs.to_le_bytes());
        w.u32(self.nanos);
        w.u32(self.nlink);
        w.padded()
    }
}

/// Encodes an index: where a chunk starts. None: a hole.
pub fn index(place: Option<(u16, u32)>) -> [u8; INDEX_LEN as usize] {
    let (device, block) = place.unwrap_or((0, NULL_BLOCK));
    let mut w = Bytes::default();
    w.u16(0);
    w.u16(device);
    w.u32(block);
    w.padded()
}

/// Encodes a device slot.
pub fn slot(tag: &[u8; 64], blocks: u32) -> [u8; SLOT_LEN as usize] {
    let mut w = Bytes::default();
    w.raw(tag);
    w.u32(blocks);
    w.u32(SLOT_START);
    w.padded()
}

/// What the superblock says.
#[derive(Debug, Clone, Copy)]
pub struct Superblock {
    pub root: u16,
    pub inodes: u64,
    pub blocks: u32,
    /// First block of the inodes.
    pub inodes_at: u32,
    pub uuid: [u8; 16],
    pub devices: u16,
}

impl Superblock {
    /// Encodes the whole first block, with its checksum.
    pub fn encode(&self) -> Vec<u8> {
        let without = self.fields(0);
        let checksum = crc32c(&without);
        [vec![0; SUPER_AT], self.fields(checksum)].concat()
    }

    fn fields(&self, checksum: u32) -> Vec<u8> {
        let mut w = Bytes::default();
        w.u32(MAGIC);
        w.u32(checksum);
        w.u32(COMPAT_CHECKSUM | COMPAT_MTIME);
        w.raw(&[12, 0]);
        w.u16(self.root);
        w.u64(self.inodes);
        w.u64(0);
        w.u32(0);
        w.u32(self.blocks);
        w.u32(self.inodes_at);
        w.u32(0);
        w.raw(&self.uuid);
        w.raw(b"larder\0\0\0\0\0\0\0\0\0\0");
        w.u32(INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE);
        w.u16(0);
        w.u16(self.devices);
        // Where the slots begin, counted in slots: at block 1.
        w.u16((BLOCK / SLOT_LEN) as u16);
        w.0.resize(BLOCK as usize - SUPER_AT, 0);
        w.0
    }
}

/// CRC-32C as EROFS counts it: from all ones, not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82F6_3B78 & 0_u32.wrapping_sub(crc & 1)))
    })
}

/// Little-endian bytes in a row.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    /// Fills up with zeros.
    fn padded<const N: usize>(self) -> [u8; N] {
        let mut out = [0; N];
        out.iter_mut().zip(self.0).for_each(|(to, from)| *to = from);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_of_castagnoli() {
        // The published check value of CRC-32C is of the inverted result.
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn structures_have_their_lengths_and_fields_in_place() {
        let inode = Inode {
            kind: FileType::Dir,
            layout: Layout::Chunks { bits: 3 },
            mode: 0o751,
            size: 5,
            label: 7,
            uid: 8,
            gid: 9,
            secs: -1,
            nanos: 11,
            nlink: 12,
        };
        let bytes = inode.encode();
        assert_eq!(&bytes[..6], &[9, 0, 0, 0, 0xE9, 0x41]);
        assert_eq!(&bytes[16..20], &[0x23, 0, 0, 0]);
        assert_eq!(&bytes[32..40], &[255; 8]);
        assert_eq!(&bytes[44..48], &[12, 0, 0, 0]);
        let sb = Superblock { root: 1, inodes: 2, blocks: 3, inodes_at: 4, uuid: [5; 16], devices: 6 }.encode();
        assert_eq!(sb.len(), BLOCK as usize);
        assert_eq!(&sb[1024..1028], &[0xE2, 0xE1, 0xF5, 0xE0]);
        assert_eq!(&sb[1024 + 86..1024 + 90], &[6, 0, 32, 0]);
        assert_eq!(index(None), [0, 0, 0, 0, 255, 255, 255, 255]);
    }
}
