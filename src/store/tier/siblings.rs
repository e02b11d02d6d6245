//! What a process can prove about other processes of its own node.
//!
//! Ages tell that a node is dead only after minutes. Of its own node a process can know at once: who
//! is killed lets go of a lock on the node's own disk. The proof is the caller's (`node::siblings`);
//! here is what it is good for. Nothing depends on it for correctness: without a proof ages count.

use std::fmt;

use uuid::Uuid;

/// What became of an instance of the same node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It lives, or nobody knows.
    Unknown,
    /// Its process is gone; mounts that it made may live on with the keeper.
    Ended,
    /// The machine was started anew since: nothing of it lives.
    Rebooted,
}

/// Knows the instances of this node.
pub trait Siblings: fmt::Debug + Send + Sync + 'static {
    /// Says what became of an instance of this node.
    fn fate(&self, instance: &Uuid) -> Fate;
}

/// Knows nothing: only ages count.
#[derive(Debug)]
pub struct Strangers;

impl Siblings for Strangers {
    fn fate(&self, _: &Uuid) -> Fate {
        Fate::Unknown
    }
}

/// What a lease is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// A mount: its reads may outlive the process that made it.
    #[default]
    Mount,
    /// A running fill: it ends with its process.
    Fill,
}

impl Purpose {
    /// Says whether a lease for this ends with an instance of that fate.
    pub(super) fn ends_with(self, fate: Fate) -> bool {
        match fate {
            Fate::Unknown => false,
            Fate::Ended => self == Self::Fill,
            Fate::Rebooted => true,
        }
    }
}
