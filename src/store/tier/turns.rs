//! Turns: a file that says who does something, exclusively created, with a heartbeat.
//!
//! Claims on spans, the steward's lease, the right to set an object aside. A turn saves work that
//! two would do twice; nothing is wrong where two believe to have it (a paused owner that wakes up).
//! The heartbeat is the file's modification time, so ages are the server's.

use uuid::Uuid;

use crate::format::ids::NodeId;
use crate::store::tier::Core;
use crate::store::tier::error::TierError;
use crate::store::tier::io::TierIo;
use crate::store::tier::layout::{TEMP, parent};
use crate::store::tier::records;
use crate::store::tier::siblings::Fate;

const TRIES: u32 = 8;

/// Who has a turn.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Owner {
    pub node: NodeId,
    pub instance: Uuid,
    /// Where peers reach the owner, where it answers them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// What came of asking for a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Ours; `taken_over`: from an owner that was silent for too long.
    Mine {
        taken_over: bool,
    },
    Other {
        owner: Owner,
        idle_ms: i64,
    },
}

impl<I: TierIo> Core<I> {
    fn owner(&self) -> Owner {
        Owner {
            node: self.node,
            instance: self.instance,
            address: self.state.lock().address.clone(),
            host: Some(records::host()),
        }
    }

    fn is_me(&self, owner: &Owner) -> bool {
        owner.node == self.node && owner.instance == self.instance
    }

    /// Takes a turn, also from an owner that has not renewed it for `ttl_ms`, or is a dead sibling.
    pub(super) fn take_turn(&self, path: &str, ttl_ms: u64) -> Result<Turn, TierError> {
        let me = self.owner();
        let text = serde_json::to_vec(&me).expect("an owner has only plain fields");
        let mut taken_over = false;
        for _ in 0..TRIES {
            if self.write_new(path, &text)? {
                self.state.lock().claims.insert(path.to_owned());
                return Ok(Turn::Mine { taken_over });
            }
            let owner = match self.read_json::<Owner>(path) {
                Ok(Some(owner)) => owner,
                Ok(None) => continue,
                // Not written whole by any of us: nobody owns it.
                Err(TierError::BadFile { .. }) => {
                    self.remove(path)?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            if self.is_me(&owner) {
                return Ok(Turn::Mine { taken_over });
            }
            let Some(seen) = self.look(path)? else {
                continue;
            };
            let idle_ms = self.now_ms()? - seen.mtime_ms();
            if idle_ms <= i64::try_from(ttl_ms).unwrap_or(i64::MAX) && !self.is_dead(&owner) {
                return Ok(Turn::Other { owner, idle_ms });
            }
            if !self.take_over(path, seen)? {
                return Ok(Turn::Other { owner, idle_ms: 0 });
            }
            taken_over = true;
        }
        Err(TierError::Contended { path: path.to_owned(), times: TRIES })
    }

    /// Says whether the owner is provably gone: a process of this node that ended.
    pub(super) fn is_dead(&self, owner: &Owner) -> bool {
        owner.node == self.node && self.siblings.fate(&owner.instance) != Fate::Unknown
    }

    /// Moves a stale file out of the way; puts it back where it turns out to be another, or renewed.
    pub(super) fn take_over(&self, path: &str, seen: crate::store::tier::io::Stat) -> Result<bool, TierError> {
        let aside = format!("{TEMP}/{}.{}", self.node, self.nonce().simple());
        if !self.move_away(path, &aside)? {
            return Ok(true);
        }
        let moved = self.look(&aside)?;
        if moved.is_some_and(|now| now.file_id == seen.file_id && now.mtime_ns == seen.mtime_ns) {
            self.remove(&aside)?;
            return Ok(true);
        }
        self.put_back(&aside, path)?;
        Ok(false)
    }

    /// Says "still here". False: somebody else has taken the turn.
    pub(super) fn renew_turn(&self, path: &str) -> Result<bool, TierError> {
        let _ = self.io.refresh(parent(path));
        match self.read_json::<Owner>(path) {
            Ok(Some(owner)) if self.is_me(&owner) => {}
            Ok(_) | Err(TierError::BadFile { .. }) => return Ok(false),
            Err(error) => return Err(error),
        }
        match self.io.touch(path).map_err(|e| TierError::io("touch", path, e)) {
            Ok(_) => Ok(true),
            Err(error) if error.is_gone() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives a turn up, if it is still ours.
    pub(super) fn give_turn(&self, path: &str) -> Result<(), TierError> {
        self.state.lock().claims.remove(path);
        match self.read_json::<Owner>(path) {
            Ok(Some(owner)) if self.is_me(&owner) => self.remove(path).map(drop),
            Ok(_) | Err(TierError::BadFile { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
