//! Small files, exclusively created or replaced; and looking up names as NFS needs it.

use std::io::ErrorKind;

use crate::store::tier::Core;
use crate::store::tier::error::TierError;
use crate::store::tier::io::{Listed, Stat, TierFile, TierIo, read_full};
use crate::store::tier::layout::{TEMP, parent};

/// Our own files are small, records of 2,000 packs the largest (300 KB) beside indexes.
const SMALL_LEN_MAX: u64 = 256 << 20;
/// How often a name that others keep changing is tried.
const TRIES: u32 = 8;

impl<I: TierIo> Core<I> {
    /// Makes the client ask the server for every folder down to `dir`.
    pub(super) fn refresh(&self, dir: &str) {
        // A folder that cannot be opened makes the lookup that follows fail: that error counts.
        let _ = self.io.refresh("");
        for (at, _) in dir.match_indices('/') {
            let _ = self.io.refresh(dir.get(..at).unwrap_or_default());
        }
        if !dir.is_empty() {
            let _ = self.io.refresh(dir);
        }
    }

    /// Opens for reading. A miss is believed only after the folders were refreshed.
    pub(super) fn open_read(&self, path: &str) -> Result<Option<I::File>, TierError> {
        match self.io.open(path, false) {
            Ok(file) => return Ok(Some(file)),
            Err(error) => {
                let error = TierError::io("open", path, error);
                if !error.is_gone() {
                    return Err(error);
                }
            }
        }
        self.refresh(parent(path));
        match self.io.open(path, false).map_err(|e| TierError::io("open", path, e)) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Looks at a name as the server has it now.
    pub(super) fn look(&self, path: &str) -> Result<Option<Stat>, TierError> {
        if self.io.refresh(parent(path)).is_err() {
            self.refresh(parent(path));
        }
        match self.io.stat(path).map_err(|e| TierError::io("look at", path, e)) {
            Ok(stat) => Ok(Some(stat)),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Looks at a name that a listing has just given.
    pub(super) fn peek(&self, path: &str) -> Result<Option<Stat>, TierError> {
        match self.io.stat(path).map_err(|e| TierError::io("look at", path, e)) {
            Ok(stat) => Ok(Some(stat)),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a small file whole.
    pub(super) fn read_small(&self, path: &str) -> Result<Option<Vec<u8>>, TierError> {
        let Some(file) = self.open_read(path)? else {
            return Ok(None);
        };
        let failed = |e| TierError::io("read", path, e);
        let len = file.stat().map_err(failed)?.size_bytes;
        if len > SMALL_LEN_MAX {
            let problem = format!("{len} bytes are too many");
            return Err(TierError::BadFile { path: path.to_owned(), problem });
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        let got = read_full(&file, &mut bytes, 0).map_err(failed)?;
        bytes.truncate(got);
        Ok(Some(bytes))
    }

    /// Reads and parses a small JSON file.
    pub(super) fn read_json<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<Option<T>, TierError> {
        let Some(bytes) = self.read_small(path)? else {
            return Ok(None);
        };
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some(value)),
            Err(error) => Err(TierError::BadFile { path: path.to_owned(), problem: error.to_string() }),
        }
    }

    /// Lists a folder as the server has it; None where there is no such folder.
    pub(super) fn list(&self, dir: &str) -> Result<Option<Vec<Listed>>, TierError> {
        let first = self.io.list(dir).map_err(|e| TierError::io("list", dir, e));
        let listed = match first {
            Err(error) if error.is_gone() => {
                self.refresh(parent(dir));
                self.io.list(dir).map_err(|e| TierError::io("list", dir, e))
            }
            other => other,
        };
        match listed {
            Ok(names) => Ok(Some(names)),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a folder and those above it.
    pub(super) fn make_dirs(&self, dir: &str) -> Result<(), TierError> {
        for (at, _) in dir.match_indices('/') {
            self.make_dir(dir.get(..at).unwrap_or_default())?;
        }
        self.make_dir(dir)
    }

    fn make_dir(&self, dir: &str) -> Result<(), TierError> {
        match self.io.mkdir(dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(TierError::io("make", dir, error)),
            _ => Ok(()),
        }
    }

    /// Writes a temporary file, durable.
    pub(super) fn write_temp(&self, bytes: &[u8]) -> Result<String, TierError> {
        let temp = format!("{TEMP}/{}.{}", self.node, self.nonce().simple());
        let written = self
            .io
            .create(&temp)
            .and_then(|file| file.write_at(bytes, 0).and_then(|()| file.sync()))
            .map_err(|e| TierError::io("write", &temp, e));
        if let Err(error) = written {
            let _ = self.io.unlink(&temp);
            return Err(error);
        }
        Ok(temp)
    }

    /// Creates a file whole, by a link that has one winner. False: the name was taken already.
    pub(super) fn write_new(&self, path: &str, bytes: &[u8]) -> Result<bool, TierError> {
        let temp = self.write_temp(bytes)?;
        // A name that this client remembers may be free by now.
        let _ = self.io.refresh(parent(path));
        let linked = self.place(path, |to| self.io.link(&temp, to));
        let _ = self.io.unlink(&temp);
        match linked {
            Ok(()) => {
                self.sync_dir(parent(path))?;
                Ok(true)
            }
            Err(error) if error.os_error() == Some(nix::libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Replaces a file whole, by rename.
    pub(super) fn replace(&self, path: &str, bytes: &[u8]) -> Result<(), TierError> {
        let temp = self.write_temp(bytes)?;
        let renamed = self.place(path, |to| self.io.rename(&temp, to));
        if renamed.is_err() {
            let _ = self.io.unlink(&temp);
        }
        renamed?;
        self.sync_dir(parent(path))
    }

    /// Puts something under a name whose folders may be missing, or vanish while we make them.
    fn place(&self, path: &str, put: impl Fn(&str) -> std::io::Result<()>) -> Result<(), TierError> {
        for _ in 0..TRIES {
            match put(path).map_err(|e| TierError::io("put", path, e)) {
                Err(error) if error.is_gone() => match self.make_dirs(parent(path)) {
                    Err(error) if !error.is_gone() => return Err(error),
                    _ => {}
                },
                other => return other,
            }
        }
        Err(TierError::Contended { path: path.to_owned(), times: TRIES })
    }

    pub(super) fn sync_dir(&self, dir: &str) -> Result<(), TierError> {
        match self.io.sync_dir(dir).map_err(|e| TierError::io("sync", dir, e)) {
            // Somebody removed it: nothing there is to become durable.
            Err(error) if error.is_gone() => Ok(()),
            other => other,
        }
    }

    /// Removes a file; no error where there is none.
    pub(super) fn remove(&self, path: &str) -> Result<bool, TierError> {
        match self.io.unlink(path).map_err(|e| TierError::io("remove", path, e)) {
            Ok(()) => Ok(true),
            Err(error) if error.is_gone() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Moves a name away. False: it was not there.
    pub(super) fn move_away(&self, from: &str, to: &str) -> Result<bool, TierError> {
        for tried in 0..2 {
            match self.io.rename(from, to).map_err(|e| TierError::io("move", from, e)) {
                Ok(()) => return Ok(true),
                Err(error) if error.is_gone() && tried == 0 => self.refresh(parent(from)),
                Err(error) if error.is_gone() => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Puts back what was moved away, unless somebody has put another there meanwhile.
    pub(super) fn put_back(&self, from: &str, to: &str) -> Result<(), TierError> {
        match self.place(to, |to| self.io.link(from, to)) {
            Ok(()) => {}
            Err(error) if error.os_error() == Some(nix::libc::EEXIST) => {}
            // Somebody else has put it back and removed this name.
            Err(TierError::Contended { .. }) => {}
            Err(error) => return Err(error),
        }
        self.remove(from)?;
        Ok(())
    }
}
