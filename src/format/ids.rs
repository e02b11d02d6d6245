//! Newtypes of every id: 32-byte BLAKE3 digests that cannot be mixed up, and the ids of places.
//!
//! A digest id prints as 64 lower-case hex digits and parses from exactly those. `LakeId` and
//! `NodeId` are UUIDs: they name places, not contents.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Says that a text is not an id of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind}: expected 64 lower-case hex digits")]
pub struct ParseIdError {
    /// What was expected, in words.
    pub kind: &'static str,
    /// What was given.
    pub text: String,
}

macro_rules! digest_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// Gives the raw digest.
            pub fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// Gives the first 12 hex digits, for messages.
            pub fn short(&self) -> String {
                let mut text = hex::encode(self.0);
                text.truncate(12);
                text
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let error = || ParseIdError { kind: $kind, text: text.to_owned() };
                if text.bytes().any(|b| b.is_ascii_uppercase()) {
                    return Err(error());
                }
                let mut raw = [0; 32];
                hex::decode_to_slice(text, &mut raw).map_err(|_| error())?;
                Ok(Self(raw))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

digest_id!(/** Names a tree: names, modes, times, sizes and content ids of one version. */ TreeId, "tree id");
digest_id!(/** Names a commit. */ CommitId, "commit id");
digest_id!(/** Names a pack: the digest of its index. */ PackId, "pack id");
digest_id!(/** Names one placement of a tree. */ PlacementId, "placement id");
digest_id!(/** Names a segment or an index block of a tree, or of a placement. */ BlockId, "block id");
digest_id!(/** The BLAKE3 digest of a file's logical bytes. */ ContentDigest, "content digest");
digest_id!(/** The digest of a pin (see [`crate::format::tree::Pin`]). */ PinId, "pin id");

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub uuid::Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0.simple())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0.simple())
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, uuid::Error> {
                uuid::Uuid::parse_str(text).map(Self)
            }
        }
    };
}

uuid_id!(/** Names a lake: one prefix of one bucket, from its initialisation on. */ LakeId);
uuid_id!(/** Names a node: one state directory, from its first start on. */ NodeId);
uuid_id!(/** Names a tier: one directory, from its initialisation on. */ TierId);

/// What a file's bytes are proven by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ContentId {
    /// The bytes have this digest.
    Digest(ContentDigest),
    /// The bytes are those of a user's own object, pinned by version or ETag.
    Pin(PinId),
}
