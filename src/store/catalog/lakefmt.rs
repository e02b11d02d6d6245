//! The format object at the root of a lake's prefix: `larder.json`.
//!
//! It says which format version the prefix has, which lake it is (so that a tier never mixes two),
//! and how refs move. It is written once, by whoever comes first, and never changed.

use crate::format::ids::LakeId;
use crate::store::lake::{Lake, LakeError};

/// The newest format version that this larder reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// How refs move in a lake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefMode {
    /// Conditional writes: one object per ref, compared and swapped.
    Cas,
    /// An append-only log per ref; racing writers leave two heads, both visible.
    Log,
}

/// What was asked for when a lake is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RefChoice {
    /// `Cas` where the store proves that it can, else `Log`.
    #[default]
    Auto,
    Cas,
    Log,
}

/// The content of `larder.json`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LakeFormat {
    pub format: u32,
    pub lake_id: LakeId,
    pub refs: RefMode,
    /// Unix time in milliseconds.
    pub created_ms: i64,
    /// Names of features that a reader must know.
    #[serde(default)]
    pub features: Vec<String>,
}

/// Says why a lake cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("{url}: no larder.json there: this is not a lake yet; `larder lake init` makes one")]
    Missing { url: String },
    #[error(
        "{url}: has format version {found}, this larder knows up to {known}; use a newer larder"
    )]
    Newer { url: String, found: u32, known: u32 },
    #[error(
        "{url}: needs the feature `{feature}`, which this larder does not know; use a newer larder"
    )]
    Feature { url: String, feature: String },
    #[error("{url}: larder.json is damaged; restore it, or point LARDER_LAKE at another prefix")]
    Damaged {
        url: String,
        #[source]
        source: serde_json::Error,
    },
    #[error(
        "{url}: the store does not keep conditions of writes ({why}), so refs cannot move by them; use --refs log"
    )]
    NoConditions { url: String, why: &'static str },
    #[error("{url}: the lake exists already, with refs in {found:?} mode")]
    OtherMode { url: String, found: RefMode },
    #[error("{url}: cannot read or write larder.json")]
    Lake {
        url: String,
        #[source]
        source: LakeError,
    },
}

/// Reads the format object; None where the prefix holds none.
pub async fn read(_lake: &dyn Lake) -> Result<Option<LakeFormat>, FormatError> {
    todo!()
}

/// Reads the format object, or makes one; of racing makers one wins and all see its object.
pub async fn open_or_create(_lake: &dyn Lake, _refs: RefChoice) -> Result<LakeFormat, FormatError> {
    todo!()
}
