//! What callers of the fetcher hold: contents, verify levels, prefetch policies, errors.

use std::fs::File;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::format::ids::{ContentId, PackId};
use crate::format::placement::Location;
use crate::store::lake::LakeError;

/// One file's content: what its bytes are and where they lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentRef {
    pub content: ContentId,
    /// Logical size, holes included.
    pub size: u64,
    pub location: Location,
}

/// How much a read trusts the tier. Bytes from the lake are always checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// Trusts what the publisher checked.
    Tier,
    /// This node digests each object once before it trusts it.
    #[default]
    Node,
    /// Each read through the daemon is checked.
    Always,
}

/// Says that a text is not one of the words it has to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not one of {words}")]
pub struct ParseWordError {
    pub text: String,
    pub words: &'static str,
}

impl FromStr for Verify {
    type Err = ParseWordError;

    fn from_str(text: &str) -> Result<Self, ParseWordError> {
        match text {
            "tier" => Ok(Self::Tier),
            "node" => Ok(Self::Node),
            "always" => Ok(Self::Always),
            _ => Err(ParseWordError { text: text.to_owned(), words: "tier, node, always" }),
        }
    }
}

impl std::fmt::Display for Verify {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tier => "tier",
            Self::Node => "node",
            Self::Always => "always",
        })
    }
}

/// What a mount brings into the tier behind its reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefetch {
    /// Nothing but what is read.
    None,
    /// The packs of what was read.
    Touched,
    /// From the first read on the whole commit, packs near the reads first.
    #[default]
    All,
}

impl FromStr for Prefetch {
    type Err = ParseWordError;

    fn from_str(text: &str) -> Result<Self, ParseWordError> {
        match text {
            "none" => Ok(Self::None),
            "touched" => Ok(Self::Touched),
            "all" => Ok(Self::All),
            _ => Err(ParseWordError { text: text.to_owned(), words: "none, touched, all" }),
        }
    }
}

impl std::fmt::Display for Prefetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Touched => "touched",
            Self::All => "all",
        })
    }
}

/// A content that is a whole object of the tier, verified as asked: the kernel may read it itself.
#[derive(Debug, Clone)]
pub struct WholeFile {
    /// Opened for reading. Keeps the object readable however long it is held.
    pub file: Arc<File>,
    pub len: u64,
}

/// Why a read did not give its bytes. Every one of them is EIO to a reader.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// The lake did not give the object within the time a read may take.
    #[error(
        "{key}: not fetched from the lake within {waited_ms} ms (pack {pack}, content {content}); check the lake, then read again"
    )]
    Unreachable {
        pack: PackId,
        content: String,
        key: String,
        waited_ms: u64,
        #[source]
        source: Arc<LakeError>,
    },
    /// The lake does not have the object any more, or refuses it.
    #[error(
        "{key}: the lake does not give this object (pack {pack}, content {content}); it was removed, overwritten, or access was taken away"
    )]
    Gone {
        pack: PackId,
        content: String,
        key: String,
        #[source]
        source: Arc<LakeError>,
    },
    /// What the lake holds does not have the digest that the tree names, also when fetched again.
    #[error(
        "{key}: the lake's bytes do not have their digest (pack {pack}, content {content}), fetched {tries} times; restore the object from a backup or push the data again"
    )]
    Damaged { pack: PackId, content: String, key: String, tries: u32 },
    /// The pack's description contradicts the placement or itself.
    #[error("pack {pack}: its description in the lake is damaged: {why} (content {content})")]
    BadPack { pack: PackId, content: String, why: &'static str },
    /// Two readers of an imported object saw different bytes under one pin.
    #[error(
        "{key}: its bytes are not those that were read first and recorded (pack {pack}, content {content}); import the objects again"
    )]
    ProofConflict { pack: PackId, content: String, key: String },
    /// The fetcher is shutting down.
    #[error("fetching has stopped: the daemon is shutting down")]
    Stopped,
}
