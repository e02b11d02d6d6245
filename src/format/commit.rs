//! Commits: a tree with parents, a message and what led to it.
//!
//! Stored as JSON with a fixed order of fields (`commits/ab/<id>`); the id is the BLAKE3 of exactly the
//! stored bytes, so a reader never re-encodes.

use std::collections::BTreeMap;

use crate::format::codec::DecodeError;
use crate::format::ids::{CommitId, TreeId};

/// One version of a dataset.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Commit {
    /// Format version, 1.
    pub format: u32,
    pub tree: TreeId,
    pub parents: Vec<CommitId>,
    /// Unix time in milliseconds, UTC, of the committer's clock.
    pub time_ms: i64,
    pub message: String,
    /// Who: user@host, free text.
    pub author: String,
    /// Free metadata (`--meta k=v`).
    pub meta: BTreeMap<String, String>,
    pub lineage: Lineage,
}

/// What a commit was made from; gc keeps the inputs.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Lineage {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<CommitId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// `s3://bucket/prefix` of an import.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported_from: Option<String>,
}

impl Commit {
    /// Encodes to the bytes that are stored and digested.
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }
    pub fn decode(_bytes: &[u8]) -> Result<Self, DecodeError> {
        todo!()
    }
    pub fn id_of(_encoded: &[u8]) -> CommitId {
        todo!()
    }
}
