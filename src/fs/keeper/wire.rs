//! What the keeper and its clients say to each other: one JSON packet each way.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// No packet is longer.
pub(crate) const PACKET_BYTES_MAX: usize = 128 << 10;
/// A note is kept as text beside a mount; it has to fit into a packet with others.
pub const NOTE_BYTES_MAX: usize = 16 << 10;

/// Names a mount to its keeper, from when it was made until it is gone. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MountId(pub u64);

impl std::fmt::Display for MountId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What a mount is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRequest {
    /// An existing directory, absolute.
    pub dir: PathBuf,
    /// Whose it has to be, reached without a symbolic link; None: anybody's.
    #[serde(default)]
    pub owner: Option<u32>,
    /// `DATASET@REV`; the mount table shows it as `larder:DATASET@REV`.
    pub source: String,
    /// Whether other users than the mounting one may look in.
    pub allow_other: bool,
    /// Kept with the mount for whoever asks; at most [`NOTE_BYTES_MAX`].
    pub note: String,
}

/// A mount that the keeper has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptMount {
    pub id: MountId,
    pub dir: PathBuf,
    pub source: String,
    pub note: String,
    /// Taken out of the directory tree, but still open somewhere.
    pub detached: bool,
    /// Whether a daemon answers, as far as the keeper knows: the one that took the mount is connected
    /// no longer than it lives, so its pid is asked.
    pub server_pid: i32,
}

/// The command that starts a daemon.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    pub program: PathBuf,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
}

impl std::fmt::Debug for Restart {
    /// Without the values of the environment, where the credentials are.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.env.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("Restart")
            .field("program", &self.program)
            .field("args", &self.args)
            .field("env", &names)
            .finish()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Takes a mount in that another keeper had. Brings its /dev/fuse descriptor and its slots.
    Adopt(MountRequest),
    /// A daemon has come; it lives as long as this connection, which stays open. When it dies, `restart` is
    /// started, if there are mounts.
    Watch {
        restart: Option<Restart>,
        /// Nobody will come: the mounts end with it, and who reads them gets errors.
        #[serde(default)]
        ends_mounts: bool,
    },
    /// The daemon has taken its mounts over.
    Ready,
    /// The daemon ends by itself.
    Unwatch,
    /// The daemon will end for another one: this is started then, and the command before it where this one ends
    /// before it is ready.
    Replace(Restart),
    /// Makes a mount. The answer brings its /dev/fuse descriptor and its slots.
    Mount(MountRequest),
    /// Asks for the descriptors of a mount again.
    Attach { id: MountId },
    /// Asks for the mounts after `after`, as many as fit into a packet.
    List { after: Option<MountId> },
    /// Unmounts what is mounted at a directory.
    Unmount { dir: PathBuf, lazy: bool },
    /// Lets go of a mount that is no longer in the directory tree. Who still has something open there gets
    /// errors, unless a daemon serves it.
    Forget { id: MountId },
    /// Replaces a mount's note.
    Note { id: MountId, note: String },
    /// Raises the kernel's read-ahead of a mount. To be asked once the mount has been served.
    ReadAhead { id: MountId, kib: u32 },
    /// Puts the mount that comes with the message at a directory. With `instead` it takes the place of the
    /// mount of ours that is there, which is taken away lazily.
    Place {
        dir: PathBuf,
        instead: bool,
        #[serde(default)]
        owner: Option<u32>,
    },
    /// Shows the mount of ours that is at `from` at another directory too.
    Bind { from: PathBuf, dir: PathBuf },
    /// Ends the keeper if it has no mounts.
    Stop,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Mount(MountId),
    Mounts {
        mounts: Vec<KeptMount>,
        more: bool,
        /// Tells one process of a keeper from the next; 0: it is of a version that does not say.
        #[serde(default)]
        instance: u64,
    },
    Done,
    Failed {
        errno: i32,
        what: String,
    },
}
