//! Entries: what a tree says of one name, its limits, and its encoding.
//!
//! [`Entry::fault`] has all rules that an entry can show alone; the builder asks it before anything
//! is written, the decoder after anything was read.

use crate::format::codec::{DecodeError, Reader, Writer};
use crate::format::ids::{ContentDigest, ContentId, PinId};

/// A modification time: seconds since 1970 (also before), and nanoseconds below 1,000,000,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mtime {
    pub secs: i64,
    pub nanos: u32,
}

/// A user's own object that an imported tree refers to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pin {
    pub bucket: String,
    pub key: String,
    /// The version id, where the bucket keeps versions.
    pub version: Option<String>,
    /// The ETag as the store gave it, quotes included.
    pub etag: String,
    pub size: u64,
}

/// Under which pins are digested, so that a pin's id is never that of other bytes.
const PIN_CONTEXT: &str = "larder 2026 pin v1";

impl Pin {
    /// Computes the id: the digest of the encoding, under its own domain.
    pub fn id(&self) -> PinId {
        let mut w = Writer::default();
        w.bytes(self.bucket.as_bytes());
        w.bytes(self.key.as_bytes());
        match &self.version {
            None => w.u8(0),
            Some(version) => {
                w.u8(1);
                w.bytes(version.as_bytes());
            }
        }
        w.bytes(self.etag.as_bytes());
        w.varint(self.size);
        let mut hasher = pin_hasher().clone();
        hasher.update(&w.finish());
        PinId(*hasher.finalize().as_bytes())
    }

    /// Says what of the pin breaks the limits, if anything does.
    pub fn fault(&self) -> Option<&'static str> {
        let empty_or_long = |text: &str, max: usize| text.is_empty() || text.len() > max;
        if empty_or_long(&self.bucket, PIN_TEXT_MAX) || empty_or_long(&self.key, PIN_TEXT_MAX) {
            return Some("a pin's bucket and key have 1 to 1024 bytes");
        }
        if self.version.as_ref().is_some_and(|version| empty_or_long(version, PIN_TEXT_MAX)) {
            return Some("a pin's version id has 1 to 1024 bytes");
        }
        (self.etag.len() > PIN_TEXT_MAX).then_some("a pin's ETag has at most 1024 bytes")
    }

    /// Estimates the bytes that the pin takes in memory.
    pub fn heap_bytes(&self) -> usize {
        let version = self.version.as_ref().map_or(0, String::len);
        size_of::<Self>() + self.bucket.len() + self.key.len() + self.etag.len() + version
    }
}

/// The hasher under [`PIN_CONTEXT`], made once: an import asks for an id per object.
fn pin_hasher() -> &'static blake3::Hasher {
    static HASHER: std::sync::OnceLock<blake3::Hasher> = std::sync::OnceLock::new();
    HASHER.get_or_init(|| blake3::Hasher::new_derive_key(PIN_CONTEXT))
}

/// Longest bucket, key, version id and ETag of a pin.
pub const PIN_TEXT_MAX: usize = 1024;
const PIN_SAME_BUCKET: u8 = 1;
const PIN_VERSION: u8 = 2;

/// Writes pins one after the other, without their sizes: the bucket only where it changes, of the
/// key what differs from the one before.
#[derive(Debug, Default, Clone)]
pub(crate) struct PinWriter {
    bucket: String,
    key: String,
}

impl PinWriter {
    pub(crate) fn write(&mut self, w: &mut Writer, pin: &Pin) {
        let same = pin.bucket == self.bucket;
        let version = if pin.version.is_some() { PIN_VERSION } else { 0 };
        w.u8(version | if same { PIN_SAME_BUCKET } else { 0 });
        if !same {
            w.bytes(pin.bucket.as_bytes());
            self.bucket.clone_from(&pin.bucket);
        }
        let shared = shared_len(self.key.as_bytes(), pin.key.as_bytes());
        w.varint(shared as u64);
        w.bytes(pin.key.as_bytes().get(shared..).unwrap_or_default());
        self.key.clone_from(&pin.key);
        if let Some(version) = &pin.version {
            w.bytes(version.as_bytes());
        }
        w.bytes(pin.etag.as_bytes());
    }
}

/// Reads what [`PinWriter`] wrote, and nothing else: each pin has one encoding.
#[derive(Debug, Default)]
pub(crate) struct PinReader {
    bucket: String,
    key: String,
}

impl PinReader {
    pub(crate) fn read(&mut self, r: &mut Reader<'_>, size: u64) -> Result<Pin, DecodeError> {
        let at = r.at();
        let flags = r.u8()?;
        if flags & !(PIN_SAME_BUCKET | PIN_VERSION) != 0 {
            return Err(r.bad(at, "pin", "it has unknown flags"));
        }
        if flags & PIN_SAME_BUCKET == 0 {
            let bucket = r.text("pin's bucket", PIN_TEXT_MAX)?;
            if bucket == self.bucket {
                return Err(r.bad(at, "pin's bucket", "it is written twice"));
            }
            self.bucket = bucket.to_owned();
        }
        self.read_key(r)?;
        let version = match flags & PIN_VERSION {
            0 => None,
            _ => Some(r.text("pin's version id", PIN_TEXT_MAX)?.to_owned()),
        };
        let etag = r.text("pin's ETag", PIN_TEXT_MAX)?.to_owned();
        let pin = Pin { bucket: self.bucket.clone(), key: self.key.clone(), version, etag, size };
        match pin.fault() {
            Some(why) => Err(r.bad(at, "pin", why)),
            None => Ok(pin),
        }
    }

    fn read_key(&mut self, r: &mut Reader<'_>) -> Result<(), DecodeError> {
        let at = r.at();
        let shared = usize::try_from(r.varint()?).unwrap_or(usize::MAX);
        let rest = r.bytes("pin's key", PIN_TEXT_MAX)?;
        let before = self.key.as_bytes();
        let start = before.get(..shared).ok_or_else(|| r.bad(at, "pin's key", "the one before is not as long"))?;
        if before.get(shared).is_some_and(|byte| rest.first() == Some(byte)) {
            return Err(r.bad(at, "pin's key", "it has more in common with the one before than is said"));
        }
        let key = String::from_utf8([start, rest].concat());
        self.key = key.map_err(|_| r.bad(at, "pin's key", "it is not UTF-8"))?;
        Ok(())
    }
}

fn shared_len(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// One name in one directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// 1 to 255 bytes, no `/`, no NUL, not `.` or `..`; not necessarily UTF-8.
    pub name: Box<[u8]>,
    /// Permission bits, setuid, setgid and sticky: at most 0o7777.
    pub mode: u32,
    pub mtime: Mtime,
    /// Links of the group inside this tree, in its first entry; 1 elsewhere.
    pub nlink: u32,
    pub kind: EntryKind,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file. An empty one has the digest of no bytes and no place in a pack.
    File {
        size: u64,
        content: ContentId,
        /// The pin itself, exactly where `content` is a pin.
        pin: Option<Box<Pin>>,
    },
    /// A directory: entries of its own, of its whole subtree (`descendants >= children`), and how
    /// many of its own entries are directories (its link count is `2 + subdirs`).
    Dir { children: u64, descendants: u64, subdirs: u64 },
    /// A symbolic link: 1 to 4095 bytes without NUL.
    Symlink { target: Box<[u8]> },
    /// A later entry of a hard-link group: the first one's path from the root, `/` between names.
    /// Its mode and mtime are those of the first and are not stored again (0 here).
    HardLink { first: Box<[u8]> },
}

/// Longest name.
pub const NAME_LEN_MAX: usize = 255;
/// Longest target of a symbolic link: what the kernel takes.
pub const TARGET_LEN_MAX: usize = 4095;
/// Longest path of the first entry of a hard-link group.
pub const LINK_PATH_LEN_MAX: usize = 32 << 10;
/// Directories below each other, the root not counted.
pub const DEPTH_MAX: usize = 4096;
/// Largest file: what an `off_t` holds.
pub const FILE_LEN_MAX: u64 = i64::MAX as u64;
/// Entries of a tree at most: far above any tree, far below overflow of sums.
pub const ENTRIES_MAX: u64 = 1 << 48;

const KIND_FILE: u8 = 0;
const KIND_PINNED: u8 = 1;
const KIND_DIR: u8 = 2;
const KIND_SYMLINK: u8 = 3;
const KIND_HARD_LINK: u8 = 4;
const KIND_MASK: u8 = 7;
/// The entry has more links than one; their number follows.
const FLAG_LINKS: u8 = 8;

impl Entry {
    /// Says which rule the entry breaks by itself, if any.
    pub fn fault(&self) -> Option<&'static str> {
        name_fault(&self.name).or_else(|| self.attribute_fault()).or_else(|| self.kind_fault())
    }

    /// Says whether the entry is a directory.
    pub fn is_dir(&self) -> bool {
        matches!(self.kind, EntryKind::Dir { .. })
    }

    /// Gives the size that a reader sees: of a file its bytes, of a link its target.
    pub fn size(&self) -> u64 {
        match &self.kind {
            EntryKind::File { size, .. } => *size,
            EntryKind::Symlink { target } => target.len() as u64,
            EntryKind::Dir { .. } | EntryKind::HardLink { .. } => 0,
        }
    }

    /// Estimates the bytes that the entry has on the heap.
    pub fn heap_bytes(&self) -> usize {
        let kind = match &self.kind {
            EntryKind::File { pin, .. } => pin.as_ref().map_or(0, |pin| pin.heap_bytes()),
            EntryKind::Dir { .. } => 0,
            EntryKind::Symlink { target: bytes } | EntryKind::HardLink { first: bytes } => bytes.len(),
        };
        self.name.len() + kind
    }

    fn attribute_fault(&self) -> Option<&'static str> {
        match self {
            entry if entry.mode > 0o7777 => Some("its mode has more than permission bits"),
            entry if entry.mtime.nanos >= 1_000_000_000 => Some("its nanoseconds are a second or more"),
            Entry { nlink: 0, .. } => Some("it has no link"),
            Entry { nlink: 1, .. } | Entry { kind: EntryKind::File { .. }, .. } => None,
            _ => Some("only the first file of a hard-link group has more than one link"),
        }
    }

    fn kind_fault(&self) -> Option<&'static str> {
        match &self.kind {
            EntryKind::File { size, content, pin } => file_fault(*size, content, pin.as_deref()),
            EntryKind::Dir { children, descendants, subdirs } => dir_fault(*children, *descendants, *subdirs),
            EntryKind::Symlink { target } => match target.len() {
                1..=TARGET_LEN_MAX if !target.contains(&0) => None,
                _ => Some("a symbolic link's target has 1 to 4095 bytes, none of them NUL"),
            },
            EntryKind::HardLink { .. } if self.mode != 0 || self.mtime != Mtime::default() => {
                Some("a later hard link has the attributes of the first and none of its own")
            }
            EntryKind::HardLink { first } => {
                let good = first.len() <= LINK_PATH_LEN_MAX
                    && first.split(|b| *b == b'/').all(|part| name_fault(part).is_none());
                (!good).then_some(
                    "the path of a hard-link group's first entry is not a path of valid names, or above 32 KiB",
                )
            }
        }
    }

    /// Writes the entry; [`Self::fault`] must be none.
    pub(super) fn write(&self, w: &mut Writer, pins: &mut PinWriter) {
        let links = if self.nlink > 1 { FLAG_LINKS } else { 0 };
        w.u8(links | self.kind_code());
        w.bytes(&self.name);
        if !matches!(self.kind, EntryKind::HardLink { .. }) {
            w.varint(u64::from(self.mode));
            self.mtime.write(w);
        }
        match &self.kind {
            EntryKind::File { size, content, pin } => {
                if self.nlink > 1 {
                    w.varint(u64::from(self.nlink));
                }
                w.varint(*size);
                match (content, pin) {
                    (ContentId::Digest(digest), _) => w.raw(digest.as_bytes()),
                    (ContentId::Pin(_), Some(pin)) => pins.write(w, pin),
                    (ContentId::Pin(_), None) => {
                        debug_assert!(false, "a fault: a pinned file without its pin")
                    }
                }
            }
            EntryKind::Dir { children, descendants, subdirs } => {
                [children, descendants, subdirs].into_iter().for_each(|count| w.varint(*count));
            }
            EntryKind::Symlink { target } => w.bytes(target),
            EntryKind::HardLink { first } => w.bytes(first),
        }
    }

    /// Reads an entry and checks it.
    pub(super) fn read(r: &mut Reader<'_>, pins: &mut PinReader) -> Result<Self, DecodeError> {
        let at = r.at();
        let code = r.u8()?;
        let kind = code & KIND_MASK;
        let linked = code & FLAG_LINKS != 0;
        if code & !(KIND_MASK | FLAG_LINKS) != 0 || (linked && kind > KIND_PINNED) {
            return Err(r.bad(at, "entry", "it has unknown flags"));
        }
        let name = r.bytes("name", NAME_LEN_MAX)?.into();
        let (mode, mtime) = match kind {
            KIND_HARD_LINK => (0, Mtime::default()),
            _ => (read_u32(r, "mode")?, Mtime::read(r)?),
        };
        let nlink = if linked { read_u32(r, "links")? } else { 1 };
        if linked && nlink < 2 {
            return Err(r.bad(at, "links", "one link or none is not written"));
        }
        let kind = match kind {
            KIND_FILE => {
                EntryKind::File { size: r.varint()?, content: ContentId::Digest(ContentDigest(r.array()?)), pin: None }
            }
            KIND_PINNED => {
                let size = r.varint()?;
                let pin = pins.read(r, size)?;
                EntryKind::File { size, content: ContentId::Pin(pin.id()), pin: Some(Box::new(pin)) }
            }
            KIND_DIR => EntryKind::Dir { children: r.varint()?, descendants: r.varint()?, subdirs: r.varint()? },
            KIND_SYMLINK => EntryKind::Symlink { target: r.bytes("target", TARGET_LEN_MAX)?.into() },
            KIND_HARD_LINK => EntryKind::HardLink { first: r.bytes("first", LINK_PATH_LEN_MAX)?.into() },
            _ => return Err(r.bad(at, "entry", "it is of an unknown kind")),
        };
        let entry = Self { name, mode, mtime, nlink, kind };
        // A pin's id was just computed from it; asking again would digest it twice.
        let fault = match &entry.kind {
            EntryKind::File { pin: Some(_), size, .. } => {
                name_fault(&entry.name).or_else(|| entry.attribute_fault()).or_else(|| size_fault(*size))
            }
            _ => entry.fault(),
        };
        match fault {
            Some(why) => Err(r.bad(at, "entry", why)),
            None => Ok(entry),
        }
    }

    fn kind_code(&self) -> u8 {
        match &self.kind {
            EntryKind::File { content: ContentId::Digest(_), .. } => KIND_FILE,
            EntryKind::File { content: ContentId::Pin(_), .. } => KIND_PINNED,
            EntryKind::Dir { .. } => KIND_DIR,
            EntryKind::Symlink { .. } => KIND_SYMLINK,
            EntryKind::HardLink { .. } => KIND_HARD_LINK,
        }
    }
}

impl Mtime {
    pub(super) fn write(&self, w: &mut Writer) {
        w.signed(self.secs);
        w.varint(u64::from(self.nanos));
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { secs: r.signed()?, nanos: read_u32(r, "nanoseconds")? })
    }
}

/// Reads a varint of 32 bits.
pub(super) fn read_u32(r: &mut Reader<'_>, field: &'static str) -> Result<u32, DecodeError> {
    let at = r.at();
    u32::try_from(r.varint()?).map_err(|_| r.bad(at, field, "it is above 32 bits"))
}

/// Says what is wrong with a name, if anything is.
pub fn name_fault(name: &[u8]) -> Option<&'static str> {
    match name {
        b"" => Some("a name is empty"),
        b"." | b".." => Some("a name is `.` or `..`"),
        name if name.len() > NAME_LEN_MAX => Some("a name is longer than 255 bytes"),
        name if name.iter().any(|byte| matches!(byte, b'/' | 0)) => Some("a name has `/` or NUL"),
        _ => None,
    }
}

/// Says what is wrong with the root directory's own attributes, if anything is.
pub(super) fn root_fault(mode: u32, mtime: &Mtime) -> Option<&'static str> {
    (mode > 0o7777 || mtime.nanos >= 1_000_000_000).then_some("the root's mode or time is out of range")
}

fn size_fault(size: u64) -> Option<&'static str> {
    (size > FILE_LEN_MAX).then_some("a file is larger than 2^63-1 bytes")
}

fn file_fault(size: u64, content: &ContentId, pin: Option<&Pin>) -> Option<&'static str> {
    match (content, pin) {
        (ContentId::Digest(digest), None) if (size == 0) != (*digest == empty_digest()) => {
            Some("an empty file, and no other, has the digest of no bytes")
        }
        (ContentId::Digest(_), None) => size_fault(size),
        (ContentId::Pin(id), Some(pin)) if pin.id() != *id => Some("a pinned file's content is not its pin"),
        (ContentId::Pin(_), Some(pin)) if pin.size != size => Some("a pinned file has another size than its pin"),
        (ContentId::Pin(_), Some(pin)) => pin.fault().or_else(|| size_fault(size)),
        _ => Some("a pin is there exactly where the content is one"),
    }
}

fn dir_fault(children: u64, descendants: u64, subdirs: u64) -> Option<&'static str> {
    if descendants > ENTRIES_MAX {
        return Some("a directory has more than 2^48 entries below it");
    }
    // Nothing below subdirectories that are not there; without this, navigation could go in circles.
    let good = subdirs <= children && children <= descendants && (subdirs > 0 || descendants == children);
    (!good).then_some("a directory's counts contradict each other")
}

/// The digest of no bytes.
pub fn empty_digest() -> ContentDigest {
    const EMPTY: [u8; 32] = [
        0xaf, 0x13, 0x49, 0xb9, 0xf5, 0xf9, 0xa1, 0xa6, 0xa0, 0x40, 0x4d, 0xea, 0x36, 0xdc, 0xc9, 0x49, 0x9b, 0xcb,
        0x25, 0xc9, 0xad, 0xc1, 0x12, 0xb7, 0xcc, 0x9a, 0x93, 0xca, 0xe4, 0x1f, 0x32, 0x62,
    ];
    ContentDigest(EMPTY)
}
