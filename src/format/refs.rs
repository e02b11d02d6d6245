//! Names: datasets, tags, branches, revisions; and what a ref object or a ref log entry holds.
//!
//! A dataset's name is 1 to 100 of `a-z 0-9 . _ -`, beginning with a letter or digit. A tag's or a
//! branch's is the same with upper case and `/` allowed between parts, and may not look like an id
//! prefix (4 to 64 hex digits only). `main` is the branch that a push moves when none is named.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::format::codec::DecodeError;
use crate::format::ids::CommitId;
use crate::format::json;

/// The branch that a push without `--branch` moves and a revision without `@` means.
pub const DEFAULT_BRANCH: &str = "main";

/// A checked dataset name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DatasetName(String);

/// A checked tag or branch name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RefName(String);

/// What of a dataset is meant: `xray`, `xray@v2`, `xray@main`, `xray@3fa9c1`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Revision {
    pub dataset: DatasetName,
    pub at: At,
}

/// The part behind the `@`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum At {
    /// Nothing: the head of the default branch.
    Default,
    /// A tag or a branch (a tag wins; push and tag refuse a name that the other kind has).
    Named(RefName),
    /// 4 to 64 hex digits of a commit id.
    Prefix(String),
}

/// Whether a ref is a tag or a branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefKind {
    Branch,
    Tag,
}

/// Says what is wrong with a name and how names look.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind}: {why}")]
pub struct NameError {
    pub kind: &'static str,
    pub text: String,
    pub why: &'static str,
}

/// Longest name of a dataset, a tag or a branch.
pub const NAME_LEN_MAX: usize = 100;

impl DatasetName {
    /// Checks a dataset's name.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-');
        let why = match text.as_bytes() {
            [] => "a dataset needs a name",
            bytes if bytes.len() > NAME_LEN_MAX => "it is longer than 100 bytes",
            bytes if !bytes.iter().copied().all(allowed) => "only a-z, 0-9, `.`, `_` and `-` may be used",
            [first, ..] if !first.is_ascii_alphanumeric() => "it must begin with a letter or a digit",
            _ => return Ok(Self(text.to_owned())),
        };
        Err(NameError { kind: "dataset name", text: text.to_owned(), why })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl RefName {
    /// Checks the name of a tag or a branch.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let error = |why| Err(NameError { kind: "tag or branch name", text: text.to_owned(), why });
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if text.is_empty() {
            return error("a tag or branch needs a name");
        }
        if text.len() > NAME_LEN_MAX {
            return error("it is longer than 100 bytes");
        }
        for part in text.split('/') {
            match part.as_bytes() {
                [] => return error("`/` may only stand between parts"),
                bytes if !bytes.iter().copied().all(allowed) => {
                    return error("only letters, digits, `.`, `_`, `-`, and `/` between parts, may be used");
                }
                [first, ..] if !first.is_ascii_alphanumeric() => {
                    return error("each part must begin with a letter or a digit");
                }
                _ => {}
            }
        }
        if looks_like_id_prefix(text) {
            return error("4 to 64 hex digits would be taken for a commit id");
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Gives [`DEFAULT_BRANCH`] as a name.
    pub fn default_branch() -> Self {
        Self(DEFAULT_BRANCH.to_owned())
    }
}

/// Says whether a text is 4 to 64 hex digits, of either case.
fn looks_like_id_prefix(text: &str) -> bool {
    (4..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

impl Revision {
    /// Parses `name`, `name@tag`, `name@branch` or `name@prefix` (hex digits of either case).
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let (dataset, at) = match text.split_once('@') {
            None => (text, At::Default),
            Some((dataset, at)) if looks_like_id_prefix(at) => (dataset, At::Prefix(at.to_ascii_lowercase())),
            Some((dataset, at)) => (dataset, At::Named(RefName::parse(at)?)),
        };
        Ok(Self { dataset: DatasetName::parse(dataset)?, at })
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            At::Default => write!(f, "{}", self.dataset),
            At::Named(name) => write!(f, "{}@{name}", self.dataset),
            At::Prefix(prefix) => write!(f, "{}@{prefix}", self.dataset),
        }
    }
}

impl FromStr for Revision {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

impl RefKind {
    /// Gives the word in keys and messages: `branch` or `tag`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Branch => "branch",
            Self::Tag => "tag",
        }
    }
}

impl fmt::Display for RefKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

macro_rules! name_text {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::parse(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

name_text!(DatasetName);
name_text!(RefName);

/// The value of a ref in `cas` mode (`datasets/<name>/refs/<kind>/<ref>`), JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefValue {
    pub format: u32,
    /// None: the ref was deleted. (Stores cannot delete conditionally, so a deletion is a value.)
    pub commit: Option<CommitId>,
    /// Unix time in milliseconds of the last move.
    pub time_ms: i64,
    /// Who moved it.
    pub by: String,
}

/// One entry of a ref's log in `log` mode (`datasets/<name>/log/<kind>/<ref>/<entry id>`), JSON,
/// never overwritten. The heads of a ref are the entries that no other entry supersedes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefLogEntry {
    pub format: u32,
    /// None: a tombstone, the ref was deleted.
    pub commit: Option<CommitId>,
    /// Entry ids that this one replaces.
    pub supersedes: Vec<String>,
    pub time_ms: i64,
    pub by: String,
}

/// Version of ref values and log entries that this larder writes, and the newest it reads.
pub const REF_FORMAT: u32 = 1;
/// Longest encoding of a ref value or a log entry.
pub const REF_LEN_MAX: usize = 1 << 20;

impl RefValue {
    /// Encodes to the stored JSON.
    pub fn encode(&self) -> Vec<u8> {
        json::encode(self)
    }

    /// Decodes and checks the version.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        json::decode("ref", bytes, REF_FORMAT, REF_LEN_MAX)
    }
}

impl RefLogEntry {
    /// Encodes to the stored JSON.
    pub fn encode(&self) -> Vec<u8> {
        json::encode(self)
    }

    /// Decodes and checks the version.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        json::decode("ref log entry", bytes, REF_FORMAT, REF_LEN_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dataset_names_are_lower_case_and_safe_as_keys() {
        for good in ["x", "xray", "a.b_c-9", "0", "deadbeef"] {
            assert_eq!(DatasetName::parse(good).expect(good).as_str(), good);
        }
        let long = "a".repeat(101);
        for bad in ["", ".", "..", "-a", ".a", "X", "a/b", "a b", "ä", "a@b", "a\0", long.as_str()] {
            assert!(DatasetName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ref_names_are_no_id_prefixes_and_have_no_empty_or_hidden_parts() {
        for good in ["main", "v2", "V2.1", "team/x/y", "abc", "beef/cafe", "face0g"] {
            assert_eq!(RefName::parse(good).expect(good).as_str(), good);
        }
        let long = "z".repeat(101);
        for bad in
            ["", "/", "a/", "/a", "a//b", "a/../b", ".", "a/.b", "beef", "BEEF", "3fa9c1", "a b", "a@b", long.as_str()]
        {
            assert!(RefName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn revisions_tell_names_from_prefixes() {
        let rev = |text| Revision::parse(text).map(|r| r.at);
        assert_eq!(rev("xray"), Ok(At::Default));
        assert_eq!(rev("xray@v2"), Ok(At::Named(RefName("v2".into()))));
        assert_eq!(rev("xray@3FA9c1"), Ok(At::Prefix("3fa9c1".into())));
        for bad in ["", "@v2", "xray@", "xray@a@b", "Xray@v2", "xray@a//b"] {
            assert!(rev(bad).is_err(), "{bad}");
        }
        assert_eq!(Revision::parse("xray@v2").expect("good").to_string(), "xray@v2");
    }

    #[test]
    fn ref_values_survive_a_round_trip_and_a_newer_version_is_refused() {
        let value = RefValue { format: 1, commit: Some(CommitId([7; 32])), time_ms: -1, by: "a@b".into() };
        assert_eq!(RefValue::decode(&value.encode()), Ok(value.clone()));
        let entry =
            RefLogEntry { format: 1, commit: None, supersedes: vec!["x".into()], time_ms: 5, by: String::new() };
        assert_eq!(RefLogEntry::decode(&entry.encode()), Ok(entry));
        let newer = RefValue { format: 2, ..value };
        assert!(RefValue::decode(&newer.encode()).expect_err("newer").to_string().contains("format version 2"));
    }
}
