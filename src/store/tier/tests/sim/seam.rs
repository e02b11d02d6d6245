//! The seam that simulated nodes use: the simulated file system, and one rule of the protocol broken
//! where a test wants to see that it is missed.

use std::io;

use crate::store::tier::io::Listed;
use crate::store::tier::{Space, Stat, TierFile, TierIo};
use crate::testkit::sim_tier::{SimFile, SimIo};

/// A client of the simulated server.
#[derive(Debug)]
pub(super) struct Seam {
    pub(super) io: SimIo,
    /// Folders of objects in which a pack can lie; the others are always empty and cost no step.
    pub(super) fans: Vec<String>,
}

/// An open file.
#[derive(Debug)]
pub(super) struct SeamFile {
    pub(super) file: SimFile,
}

impl TierIo for Seam {
    type File = SeamFile;

    fn open(&self, path: &str, write: bool) -> io::Result<SeamFile> {
        Ok(SeamFile { file: self.io.open(path, write)? })
    }

    fn create(&self, path: &str) -> io::Result<SeamFile> {
        Ok(SeamFile { file: self.io.create(path)? })
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.io.link(from, to)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.io.rename(from, to)
    }

    fn unlink(&self, path: &str) -> io::Result<()> {
        self.io.unlink(path)
    }

    fn mkdir(&self, path: &str) -> io::Result<()> {
        self.io.mkdir(path)
    }

    fn rmdir(&self, path: &str) -> io::Result<()> {
        self.io.rmdir(path)
    }

    fn list(&self, dir: &str) -> io::Result<Vec<Listed>> {
        if dir.starts_with("objects/") && !self.fans.iter().any(|fan| fan == dir) {
            return Ok(Vec::new());
        }
        self.io.list(dir)
    }

    fn stat(&self, path: &str) -> io::Result<Stat> {
        self.io.stat(path)
    }

    fn touch(&self, path: &str) -> io::Result<Stat> {
        self.io.touch(path)
    }

    fn refresh(&self, dir: &str) -> io::Result<()> {
        self.io.refresh(dir)
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.io.sync_dir(dir)
    }

    fn space(&self) -> io::Result<Space> {
        self.io.space()
    }
}

impl TierFile for SeamFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn extend(&self, len_bytes: u64) -> io::Result<()> {
        self.file.extend(len_bytes)
    }

    fn stat(&self) -> io::Result<Stat> {
        self.file.stat()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}
