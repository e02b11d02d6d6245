//! The reader and writer under every binary format: little-endian, length-checked, panic-free.
//!
//! Integers are fixed little-endian or LEB128 varints (at most 10 bytes, shortest form only, so
//! that one value has one encoding). A decoder never allocates by a count it has not checked
//! against the bytes that are left: [`Reader::count`] does that. Every object begins with four
//! bytes of magic and a fixed 32-bit version ([`Writer::new`], [`Reader::open`]).

/// Says what is wrong with bytes that were to be decoded, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {problem} at byte {offset}")]
pub struct DecodeError {
    /// What was being decoded: "tree segment", "commit", ...
    pub object: &'static str,
    /// Where, counted from the start of the object.
    pub offset: usize,
    /// What is wrong.
    pub problem: Problem,
}

/// What can be wrong with encoded bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("ends too early")]
    Truncated,
    #[error("has {0} bytes too many")]
    Trailing(usize),
    #[error("is not one of ours: wrong magic")]
    Magic,
    #[error("has format version {found}, this larder reads up to {known}; use a newer larder")]
    Version { found: u32, known: u32 },
    #[error("{field} is not valid: {why}")]
    Field { field: &'static str, why: &'static str },
}

/// Writes one object into a growing buffer.
#[derive(Debug, Clone, Default)]
pub struct Writer {
    out: Vec<u8>,
}

impl Writer {
    /// Starts an object with its magic and version.
    pub fn new(magic: [u8; 4], version: u32) -> Self {
        let mut writer = Self::default();
        writer.raw(&magic);
        writer.u32(version);
        writer
    }

    /// Gives the bytes written so far.
    pub fn finish(self) -> Vec<u8> {
        self.out
    }

    /// Gives the bytes written so far, to look at.
    pub fn as_slice(&self) -> &[u8] {
        &self.out
    }

    /// Counts the bytes written so far.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// Says whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// Writes one byte.
    pub fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    /// Writes a fixed 32-bit integer.
    pub fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    /// Writes a fixed 64-bit integer.
    pub fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    /// Writes a varint.
    pub fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.out.push((value as u8) | 0x80);
            value >>= 7;
        }
        self.out.push(value as u8);
    }

    /// Writes a signed varint: zigzag, so that small negative numbers are short.
    pub fn signed(&mut self, value: i64) {
        self.varint(((value << 1) ^ (value >> 63)) as u64);
    }

    /// Writes bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Writes a varint length and the bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.raw(bytes);
    }
}

/// Reads one object from untrusted bytes.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    object: &'static str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Starts to read `bytes` as an object without a header.
    pub fn bare(object: &'static str, bytes: &'a [u8]) -> Self {
        Self { object, bytes, at: 0 }
    }

    /// Starts to read an object: checks magic and version (1 to `known`), which it gives.
    pub fn open(object: &'static str, bytes: &'a [u8], magic: [u8; 4], known: u32) -> Result<(Self, u32), DecodeError> {
        let mut reader = Self::bare(object, bytes);
        if reader.array::<4>()? != magic {
            return Err(reader.error_at(0, Problem::Magic));
        }
        let found = reader.u32()?;
        if found == 0 {
            return Err(reader.error_at(4, Problem::Field { field: "format version", why: "it is zero" }));
        }
        if found > known {
            return Err(reader.error_at(4, Problem::Version { found, known }));
        }
        Ok((reader, found))
    }

    /// Tells where the reader stands.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Counts the bytes that are left.
    pub fn left(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    /// Makes an error about the bytes at `offset`.
    pub fn error_at(&self, offset: usize, problem: Problem) -> DecodeError {
        DecodeError { object: self.object, offset, problem }
    }

    /// Makes an error about a field that was read at `offset`.
    pub fn bad(&self, offset: usize, field: &'static str, why: &'static str) -> DecodeError {
        self.error_at(offset, Problem::Field { field, why })
    }

    /// Reads `len` bytes.
    pub fn raw(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let end = self.at.checked_add(len);
        let found = end.and_then(|end| self.bytes.get(self.at..end));
        let found = found.ok_or_else(|| self.error_at(self.at, Problem::Truncated))?;
        self.at += len;
        Ok(found)
    }

    /// Reads an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.raw(N)?);
        Ok(array)
    }

    /// Reads one byte.
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        let [byte] = self.array::<1>()?;
        Ok(byte)
    }

    /// Reads a fixed 32-bit integer.
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    /// Reads a fixed 64-bit integer.
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Reads a varint; only the shortest form counts.
    pub fn varint(&mut self) -> Result<u64, DecodeError> {
        let start = self.at;
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(self.bad(start, "varint", "it is above 64 bits"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(self.bad(start, "varint", "it is not in its shortest form"));
                }
                return Ok(value);
            }
        }
        Err(self.bad(start, "varint", "it is longer than 10 bytes"))
    }

    /// Reads a signed varint.
    pub fn signed(&mut self) -> Result<i64, DecodeError> {
        let raw = self.varint()?;
        Ok(((raw >> 1) as i64) ^ -((raw & 1) as i64))
    }

    /// Reads a varint length, checks it against `max`, and reads as many bytes.
    pub fn bytes(&mut self, field: &'static str, max: usize) -> Result<&'a [u8], DecodeError> {
        let start = self.at;
        let len = self.varint()?;
        match usize::try_from(len) {
            Ok(len) if len <= max => self.raw(len),
            _ => Err(self.bad(start, field, "it is too long")),
        }
    }

    /// Reads a text, checked as UTF-8.
    pub fn text(&mut self, field: &'static str, max: usize) -> Result<&'a str, DecodeError> {
        let start = self.at;
        let bytes = self.bytes(field, max)?;
        std::str::from_utf8(bytes).map_err(|_| self.bad(start, field, "it is not UTF-8"))
    }

    /// Reads a count of things that take `min_len` bytes each at least: a count that the bytes
    /// that are left cannot hold is refused, so that it may be used to allocate.
    pub fn count(&mut self, field: &'static str, min_len: usize) -> Result<usize, DecodeError> {
        let start = self.at;
        let count = self.varint()?;
        let most = self.left() / min_len.max(1);
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(self.bad(start, field, "there are not so many bytes left")),
        }
    }

    /// Ends reading: bytes that are left are an error.
    pub fn end(self) -> Result<(), DecodeError> {
        match self.left() {
            0 => Ok(()),
            more => Err(self.error_at(self.at, Problem::Trailing(more))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn varint_of(bytes: &[u8]) -> Result<u64, DecodeError> {
        let mut reader = Reader::bare("number", bytes);
        let value = reader.varint()?;
        reader.end()?;
        Ok(value)
    }

    proptest! {
        #[test]
        fn numbers_survive_a_round_trip(value: u64, signed: i64) {
            let mut writer = Writer::default();
            writer.varint(value);
            writer.signed(signed);
            let bytes = writer.finish();
            let mut reader = Reader::bare("number", &bytes);
            prop_assert_eq!(reader.varint(), Ok(value));
            prop_assert_eq!(reader.signed(), Ok(signed));
            prop_assert_eq!(reader.end(), Ok(()));
        }

        #[test]
        fn any_bytes_that_decode_as_a_varint_encode_to_the_same_bytes(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            if let Ok(value) = varint_of(&bytes) {
                let mut writer = Writer::default();
                writer.varint(value);
                prop_assert_eq!(writer.finish(), bytes);
            }
        }
    }

    #[test]
    fn a_varint_that_is_too_long_too_large_or_not_shortest_is_refused() {
        assert_eq!(varint_of(&[0xff; 9].iter().copied().chain([1]).collect::<Vec<_>>()), Ok(u64::MAX));
        for bad in [&[0x80, 0][..], &[0xff; 11], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2], &[0x80]] {
            assert!(varint_of(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_count_above_what_the_bytes_can_hold_is_refused_before_anything_is_allocated() {
        let mut writer = Writer::default();
        writer.varint(u64::MAX);
        writer.raw(&[0; 64]);
        let bytes = writer.finish();
        assert!(Reader::bare("list", &bytes).count("entries", 1).is_err());
        assert!(Reader::bare("list", &bytes).bytes("name", usize::MAX).is_err());
    }

    #[test]
    fn a_newer_version_is_refused_with_both_versions_and_the_next_step() {
        let bytes = Writer::new(*b"LDxx", 7).finish();
        let error = Reader::open("thing", &bytes, *b"LDxx", 1).expect_err("newer");
        assert_eq!(
            error.to_string(),
            "thing: has format version 7, this larder reads up to 1; use a newer larder at byte 4"
        );
        let error = Reader::open("thing", &bytes, *b"LDyy", 1).expect_err("other magic");
        assert_eq!(error.problem, Problem::Magic);
    }
}
