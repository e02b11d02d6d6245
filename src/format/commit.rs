//! Commits: a tree with parents, a message and what led to it.
//!
//! Stored as JSON with a fixed order of fields (`commits/ab/<id>`); the id is the BLAKE3 of exactly the
//! stored bytes, so a reader never re-encodes.

use std::collections::BTreeMap;

use crate::format::codec::{DecodeError, Problem};
use crate::format::ids::{CommitId, TreeId};
use crate::format::json;

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

/// Version of commits that this larder writes, and the newest it reads.
pub const COMMIT_FORMAT: u32 = 1;
/// Longest encoding of a commit.
pub const COMMIT_LEN_MAX: usize = 1 << 20;
/// Most parents, and most lineage inputs, of a commit.
pub const PARENTS_MAX: usize = 256;

impl Commit {
    /// Encodes to the bytes that are stored and digested.
    pub fn encode(&self) -> Vec<u8> {
        json::encode(self)
    }

    /// Decodes and checks the version and the limits.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let commit: Self = json::decode("commit", bytes, COMMIT_FORMAT, COMMIT_LEN_MAX)?;
        if commit.parents.len() > PARENTS_MAX || commit.lineage.inputs.len() > PARENTS_MAX {
            let problem = Problem::Field { field: "parents", why: "there are more than 256" };
            return Err(DecodeError { object: "commit", offset: 0, problem });
        }
        Ok(commit)
    }

    /// Computes the id of an encoded commit.
    pub fn id_of(encoded: &[u8]) -> CommitId {
        CommitId(*blake3::hash(encoded).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit() -> Commit {
        Commit {
            format: COMMIT_FORMAT,
            tree: TreeId([1; 32]),
            parents: vec![CommitId([2; 32])],
            time_ms: 1_700_000_000_000,
            message: "first\n\"quoted\" \u{1f600}".into(),
            author: "a@b".into(),
            meta: BTreeMap::from([("k".into(), "v".into())]),
            lineage: Lineage { job: Some("j".into()), ..Lineage::default() },
        }
    }

    #[test]
    fn a_commit_survives_a_round_trip() {
        let encoded = commit().encode();
        assert_eq!(Commit::decode(&encoded), Ok(commit()));
        assert_ne!(Commit::id_of(&encoded), Commit::id_of(&encoded[1..]));
    }

    #[test]
    fn a_newer_a_cut_or_a_huge_commit_is_refused_with_the_reason() {
        let newer = Commit { format: 9, ..commit() }.encode();
        let error = Commit::decode(&newer).expect_err("newer");
        assert_eq!(error.problem, Problem::Version { found: 9, known: 1 });
        let encoded = commit().encode();
        for cut in 0..encoded.len() {
            assert!(Commit::decode(&encoded[..cut]).is_err());
        }
        let huge = Commit { message: "m".repeat(COMMIT_LEN_MAX), ..commit() }.encode();
        assert!(Commit::decode(&huge).is_err());
        let many = Commit { parents: vec![CommitId([3; 32]); PARENTS_MAX + 1], ..commit() }.encode();
        assert!(Commit::decode(&many).is_err());
    }
}
