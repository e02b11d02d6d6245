//! The mount table: mounts, their attachments and owners; kept in one file.
//!
//! A *mount* is a commit with effective options: one FUSE mount. An *attachment* is a place where
//! somebody sees it: a directory and its owner. Today each mount has one attachment, the directory where
//! the FUSE mount itself is; more may share it by bind mounts. The table says what should be mounted: it
//! is on disk before a mount is reported, and a daemon that starts makes what it finds in it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::place::{self, PlaceError};
use crate::config::{EngineChoice, PrefetchLevel, Span, VerifyLevel};
use crate::format::ids::CommitId;
use crate::fs::kernel::ImageId;

/// Version of the file.
const FORMAT: u32 = 1;

/// Options that are in effect: nothing is left to defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountOptions {
    /// Path inside the commit; None: all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subdir: Option<String>,
    #[serde(default)]
    pub engine: EngineChoice,
    pub verify: VerifyLevel,
    pub prefetch: PrefetchLevel,
    pub uid: u32,
    pub gid: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub umask: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_mode: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir_mode: Option<u32>,
    pub allow_other: bool,
    /// Name of the tier; None: not chosen yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Span>,
}

/// Who asked for an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Owner {
    User { uid: u32 },
    Job { id: String },
    Pod { uid: String },
}

/// A place where a mount is seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    pub dir: PathBuf,
    pub owner: Owner,
    pub since_ms: i64,
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRow {
    pub id: Uuid,
    pub dataset: String,
    /// As it was asked for: `photos@v2`.
    pub revision: String,
    pub commit: CommitId,
    pub options: MountOptions,
    pub attachments: Vec<Attachment>,
    /// The image that the kernel engine shows; None: the FUSE engine serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageId>,
}

impl MountRow {
    /// Gives the directory of the FUSE mount itself.
    pub fn dir(&self) -> &Path {
        self.attachments.first().map_or(Path::new(""), |first| &first.dir)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    format: u32,
    mounts: Vec<MountRow>,
}

/// Says why the table cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error("{}: is damaged; move it away and mount again what you need", path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{}: was written by a newer larder (format {found}, known {FORMAT}); use that one", path.display())]
    Newer { path: PathBuf, found: u32 },
    #[error("{} is mounted already: {revision}; unmount it first (`larder umount {}`)", dir.display(), dir.display())]
    Taken { dir: PathBuf, revision: String },
}

/// The table and its file.
#[derive(Debug)]
pub struct MountTable {
    path: PathBuf,
    rows: Vec<MountRow>,
}

impl MountTable {
    /// Loads the table; none is an empty one.
    pub fn load(path: &Path) -> Result<Self, TableError> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self { path: path.to_owned(), rows: Vec::new() });
            }
            Err(source) => {
                let doing = "read the mount table";
                return Err(PlaceError::Io { path: path.to_owned(), doing, source }.into());
            }
        };
        let damaged = |source| TableError::Damaged { path: path.to_owned(), source };
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let version: Version = serde_json::from_slice(&text).map_err(damaged)?;
        if version.format > FORMAT {
            return Err(TableError::Newer { path: path.to_owned(), found: version.format });
        }
        let stored: Stored = serde_json::from_slice(&text).map_err(damaged)?;
        Ok(Self { path: path.to_owned(), rows: stored.mounts })
    }

    /// Gives all rows.
    pub fn rows(&self) -> &[MountRow] {
        &self.rows
    }

    /// Finds the row whose attachment is at `dir`.
    pub fn at(&self, dir: &Path) -> Option<&MountRow> {
        self.rows.iter().find(|row| row.attachments.iter().any(|attachment| attachment.dir == dir))
    }

    /// Adds a row and writes the file; refused where the directory is taken.
    pub fn add(&mut self, row: MountRow) -> Result<(), TableError> {
        if let Some(taken) = self.at(row.dir()) {
            return Err(TableError::Taken { dir: row.dir().to_owned(), revision: taken.revision.clone() });
        }
        self.rows.push(row);
        self.save().inspect_err(|_| drop(self.rows.pop()))
    }

    /// Says whether there is a row of that id.
    pub fn has(&self, id: &Uuid) -> bool {
        self.rows.iter().any(|row| row.id == *id)
    }

    /// Adds a row, or replaces the one of that id.
    pub fn put(&mut self, row: &MountRow) -> Result<(), TableError> {
        if self.has(&row.id) { self.update(row) } else { self.add(row.clone()) }
    }

    /// Replaces the row of that id and writes the file; no error where there is none.
    pub fn update(&mut self, row: &MountRow) -> Result<(), TableError> {
        let Some(at) = self.rows.iter().position(|other| other.id == row.id) else {
            return Ok(());
        };
        let Some(before) = self.rows.get_mut(at).map(|slot| std::mem::replace(slot, row.clone())) else {
            return Ok(());
        };
        self.save().inspect_err(|_| {
            if let Some(slot) = self.rows.get_mut(at) {
                *slot = before;
            }
        })
    }

    /// Removes a row and writes the file; no error where there is none.
    pub fn remove(&mut self, id: &Uuid) -> Result<(), TableError> {
        let Some(at) = self.rows.iter().position(|row| row.id == *id) else {
            return Ok(());
        };
        let row = self.rows.remove(at);
        self.save().inspect_err(|_| self.rows.insert(at, row))
    }

    fn save(&self) -> Result<(), TableError> {
        let stored = Stored { format: FORMAT, mounts: self.rows.clone() };
        let damaged = |source| TableError::Damaged { path: self.path.clone(), source };
        let bytes = serde_json::to_vec_pretty(&stored).map_err(damaged)?;
        Ok(place::replace(&self.path, &bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(dir: &str) -> MountRow {
        MountRow {
            id: Uuid::new_v4(),
            dataset: "photos".into(),
            revision: "photos@v2".into(),
            commit: CommitId([7; 32]),
            options: MountOptions {
                engine: EngineChoice::Fuse,
                subdir: None,
                verify: VerifyLevel::Node,
                prefetch: PrefetchLevel::All,
                uid: 1,
                gid: 2,
                umask: None,
                file_mode: Some(0o444),
                dir_mode: None,
                allow_other: false,
                tier: Some("default".into()),
                ttl: None,
            },
            attachments: vec![Attachment { dir: dir.into(), owner: Owner::User { uid: 1 }, since_ms: 5 }],
            image: None,
        }
    }

    #[test]
    fn rows_survive_a_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("mounts.json");
        let mut table = MountTable::load(&path).expect("loads");
        let (a, b) = (row("/a"), row("/b"));
        table.add(a.clone()).expect("adds");
        table.add(b.clone()).expect("adds");
        assert!(matches!(table.add(row("/a")), Err(TableError::Taken { .. })));
        table.remove(&a.id).expect("removes");
        assert_eq!(MountTable::load(&path).expect("loads").rows(), [b]);
    }

    #[test]
    fn a_row_that_is_put_is_there_once_and_takes_no_others_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("mounts.json");
        let mut table = MountTable::load(&path).expect("loads");
        let mut a = row("/a");
        table.put(&a).expect("is added");
        a.image = Some(ImageId([3; 16]));
        table.put(&a).expect("is replaced");
        assert!(table.has(&a.id));
        assert!(matches!(table.put(&row("/a")), Err(TableError::Taken { .. })));
        assert_eq!(MountTable::load(&path).expect("loads").rows(), [a]);
    }

    #[test]
    fn a_damaged_or_newer_table_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("mounts.json");
        std::fs::write(&path, "{").expect("writes");
        assert!(matches!(MountTable::load(&path), Err(TableError::Damaged { .. })));
        std::fs::write(&path, r#"{"format": 2, "rows": []}"#).expect("writes");
        assert!(matches!(MountTable::load(&path), Err(TableError::Newer { found: 2, .. })));
    }

    #[test]
    fn a_table_that_cannot_be_written_keeps_what_it_had() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut table = MountTable::load(&dir.path().join("gone/mounts.json")).expect("loads");
        assert!(table.add(row("/a")).is_err());
        assert!(table.rows().is_empty());
    }
}
