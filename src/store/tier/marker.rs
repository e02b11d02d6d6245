//! The marker `larder-tier.json`: what makes a directory a tier, and what all its nodes agree on.

use std::path::Path;

use crate::format::ids::TierId;
use crate::store::tier::clock::Clock;
use crate::store::tier::error::TierError;
use crate::store::tier::io::{TierFile, TierIo, read_full};
use crate::store::tier::layout;

/// The format that this larder writes, and the newest it reads.
pub(crate) const FORMAT: u32 = 1;
/// A marker is small; more is not one.
const MARKER_LEN_MAX: usize = 64 << 10;

/// What `larder tier init` fixes for every node.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Marker {
    pub format: u32,
    pub tier: TierId,
    /// Unix time in milliseconds of the host that made it.
    pub created_ms: i64,
    /// Permission bits of folders and of files, whatever the umask of a process is.
    #[serde(with = "octal")]
    pub dir_mode: u32,
    #[serde(with = "octal")]
    pub file_mode: u32,
    /// Owner that files get where the process may give it (root without root_squash).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// Defaults for every node; a node's configuration may say otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
}

/// What a new tier gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitOptions {
    pub capacity_bytes: Option<u64>,
    pub ttl_ms: Option<u64>,
    /// Permission bits of folders; files get the same without the execute bits.
    pub dir_mode: u32,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

impl Default for InitOptions {
    fn default() -> Self {
        Self { capacity_bytes: None, ttl_ms: None, dir_mode: 0o770, uid: None, gid: None }
    }
}

impl InitOptions {
    /// Permission bits of files.
    pub fn file_mode(&self) -> u32 {
        self.dir_mode & 0o666
    }
}

mod octal {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(mode: &u32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{mode:04o}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        let text = String::deserialize(deserializer)?;
        u32::from_str_radix(&text, 8).map_err(serde::de::Error::custom)
    }
}

/// Makes the folders, then the marker: a tier that has one is whole.
pub(crate) fn init<I: TierIo>(
    io: &I,
    dir: &Path,
    options: &InitOptions,
    clock: &dyn Clock,
) -> Result<Marker, TierError> {
    match read(io, dir) {
        Ok(marker) => {
            return Err(TierError::AlreadyTier { dir: dir.to_owned(), tier: marker.tier.to_string() });
        }
        Err(TierError::NoMarker { .. }) => {}
        Err(other) => return Err(other),
    }
    refuse_foreign(io, dir)?;
    for folder in layout::FOLDERS {
        make_dir(io, folder)?;
    }
    for fan in 0..=255u8 {
        make_dir(io, &format!("{}/{fan:02x}", layout::OBJECTS))?;
    }
    make_dir(io, layout::TRASH_SPILL)?;
    match io.create(layout::CLOCK) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(TierError::io("create", layout::CLOCK, error));
        }
        _ => {}
    }
    let marker = Marker {
        format: FORMAT,
        tier: TierId(uuid::Uuid::new_v4()),
        created_ms: clock.wall_ms(),
        dir_mode: options.dir_mode,
        file_mode: options.file_mode(),
        uid: options.uid,
        gid: options.gid,
        capacity_bytes: options.capacity_bytes,
        ttl_ms: options.ttl_ms,
    };
    write_marker(io, &marker)?;
    // Two nodes may have raced: the link decided, and what lies there counts.
    read(io, dir)
}

/// Reads the marker; writes nothing.
pub(crate) fn read<I: TierIo>(io: &I, dir: &Path) -> Result<Marker, TierError> {
    let path = layout::MARKER;
    let file = match io.open(path, false) {
        Ok(file) => file,
        Err(error) => {
            return Err(match TierError::io("open", path, error) {
                TierError::Gone { .. } => TierError::NoMarker { dir: dir.to_owned() },
                other if is_not_a_folder(&other) => TierError::NoMarker { dir: dir.to_owned() },
                other => other,
            });
        }
    };
    let mut bytes = vec![0; MARKER_LEN_MAX];
    let len = read_full(&file, &mut bytes, 0).map_err(|e| TierError::io("read", path, e))?;
    bytes.truncate(len);
    let bad = |source| TierError::BadMarker { dir: dir.to_owned(), source };
    // The version first: a newer format may have fields that we cannot parse.
    let version: Version = serde_json::from_slice(&bytes).map_err(bad)?;
    if version.format > FORMAT {
        return Err(TierError::NewerFormat { dir: dir.to_owned(), found: version.format, known: FORMAT });
    }
    serde_json::from_slice(&bytes).map_err(bad)
}

#[derive(serde::Deserialize)]
struct Version {
    format: u32,
}

fn is_not_a_folder(error: &TierError) -> bool {
    error.os_error() == Some(nix::libc::ENOTDIR)
}

/// A directory with somebody's files in it does not become a tier by a typing error.
fn refuse_foreign<I: TierIo>(io: &I, dir: &Path) -> Result<(), TierError> {
    let names = io.list("").map_err(|e| TierError::io("list", ".", e))?;
    for listed in names {
        let ours = layout::FOLDERS.contains(&listed.name.as_str()) || listed.name == "lost+found";
        if !ours {
            return Err(TierError::NotEmpty { dir: dir.to_owned(), name: listed.name });
        }
    }
    Ok(())
}

fn make_dir<I: TierIo>(io: &I, path: &str) -> Result<(), TierError> {
    match io.mkdir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(TierError::io("make", path, error)),
        _ => Ok(()),
    }
}

fn write_marker<I: TierIo>(io: &I, marker: &Marker) -> Result<(), TierError> {
    let temp = format!("{}/marker.{}", layout::TEMP, marker.tier);
    let mut text = serde_json::to_vec_pretty(marker).expect("a marker has only plain fields");
    text.push(b'\n');
    let file = io.create(&temp).map_err(|e| TierError::io("create", &temp, e))?;
    file.write_at(&text, 0).map_err(|e| TierError::io("write", &temp, e))?;
    file.sync().map_err(|e| TierError::io("sync", &temp, e))?;
    for folder in layout::FOLDERS {
        io.sync_dir(folder).map_err(|e| TierError::io("sync", folder, e))?;
    }
    match io.link(&temp, layout::MARKER) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(TierError::io("link", layout::MARKER, error));
        }
        _ => {}
    }
    io.sync_dir("").map_err(|e| TierError::io("sync", ".", e))?;
    io.unlink(&temp).map_err(|e| TierError::io("remove", &temp, e))
}
