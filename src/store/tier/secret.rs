//! The key by which nodes of a tier know each other: it lies in the tier, for its owner's eyes only.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt;

use crate::store::tier::Tier;
use crate::store::tier::error::TierError;
use crate::store::tier::io::TierIo as _;
use crate::store::tier::layout::{PEER_KEY, TEMP};

/// 32 random bytes; never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerKey([u8; 32]);

impl fmt::Debug for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerKey(..)")
    }
}

impl PeerKey {
    /// Makes a key of bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Digests lines with the key: proves that who made the token has it.
    pub fn token(&self, lines: &[&str]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for line in lines {
            hasher.update(line.as_bytes());
            hasher.update(b"\n");
        }
        hasher.finalize()
    }
}

impl Tier {
    /// Gives the tier's key; makes it where there is none and `make` is set.
    pub fn peer_key(&self, make: bool) -> Result<Option<PeerKey>, TierError> {
        let failed = |op, source| TierError::io(op, PEER_KEY, source);
        if let Some(key) = self.read_peer_key()? {
            return Ok(Some(key));
        }
        if !make {
            return Ok(None);
        }
        let temp = self.dir().join(format!("{TEMP}/{}.{}", self.core.node, self.core.nonce().simple()));
        let made = write_secret(&temp, &rand::random::<[u8; 32]>());
        let linked = made.and_then(|()| std::fs::hard_link(&temp, self.dir().join(PEER_KEY)));
        let _ = std::fs::remove_file(&temp);
        match linked {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed("make", error)),
            _ => {}
        }
        // An NFS client may believe for a while that there is no such file.
        self.core.refresh("");
        self.read_peer_key()
    }

    fn read_peer_key(&self) -> Result<Option<PeerKey>, TierError> {
        let mut text = String::new();
        let read = self.core.io.open(PEER_KEY, false).and_then(|file| file.take(80).read_to_string(&mut text));
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(TierError::io("read", PEER_KEY, error)),
            Ok(_) => {}
        }
        let mut key = [0; 32];
        match hex::decode_to_slice(text.trim_end(), &mut key) {
            Ok(()) => Ok(Some(PeerKey(key))),
            Err(error) => Err(TierError::BadFile { path: PEER_KEY.to_owned(), problem: error.to_string() }),
        }
    }
}

fn write_secret(path: &std::path::Path, key: &[u8; 32]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{}", hex::encode(key))?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::format::ids::NodeId;
    use crate::store::tier::{InitOptions, TierConfig};

    #[test]
    fn every_node_gets_the_same_key_and_only_the_owner_may_read_it() {
        let dir = tempfile::tempdir().expect("a directory");
        Tier::init(dir.path(), &InitOptions::default()).expect("a tier");
        let open = |n| {
            let node = NodeId(uuid::Uuid::from_u128(n));
            Tier::open(dir.path(), node, TierConfig::default()).expect("opens")
        };
        assert_eq!(open(1).peer_key(false).expect("asks"), None, "nobody listens");
        let keys: Vec<_> = std::thread::scope(|scope| {
            let running: Vec<_> = (0..8).map(|n| scope.spawn(move || open(n).peer_key(true))).collect();
            running.into_iter().map(|thread| thread.join().expect("ends").expect("a key")).collect()
        });
        assert!(keys.windows(2).all(|pair| pair[0].is_some() && pair[0] == pair[1]));
        let mode = std::fs::metadata(dir.path().join(PEER_KEY)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(open(9).peer_key(false).expect("reads"), keys[0]);
        let report = open(1).check(false).expect("checks");
        assert!(report.findings.is_empty(), "{:?}", report.findings);
    }

    #[test]
    fn a_token_depends_on_key_and_lines_and_where_they_end() {
        let (key, other) = (PeerKey::new([1; 32]), PeerKey::new([2; 32]));
        assert_eq!(key.token(&["a", "b"]), key.token(&["a", "b"]));
        assert_ne!(key.token(&["a", "b"]), other.token(&["a", "b"]));
        assert_ne!(key.token(&["a", "b"]), key.token(&["ab", ""]));
        assert_eq!(format!("{key:?}"), "PeerKey(..)");
    }
}
