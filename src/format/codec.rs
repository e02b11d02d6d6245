//! The reader and writer under every binary format: little-endian, length-checked, panic-free.
//!
//! Integers are fixed little-endian or LEB128 varints (at most 10 bytes, shortest form only, so
//! that one value has one encoding). A decoder never allocates by a count it has not checked
//! against the bytes that are left.

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
