//! The blocks of a directory: entries first, then their names.

use super::BLOCK;
use super::disk::{DIRENT_LEN, FileType};

/// One block that is being filled.
#[derive(Debug, Default)]
pub(super) struct DirBlock {
    entries: Vec<(u64, FileType, usize)>,
    names: Vec<u8>,
}

impl DirBlock {
    /// Says whether a name still fits.
    pub fn has_room(&self, name: &[u8]) -> bool {
        self.used() + DIRENT_LEN + name.len() <= BLOCK as usize
    }

    /// Counts the bytes that the block takes so far.
    pub fn used(&self) -> usize {
        self.entries.len() * DIRENT_LEN + self.names.len()
    }

    /// Adds a name; gives its position.
    pub fn push(&mut self, number: u64, kind: FileType, name: &[u8]) -> usize {
        self.entries.push((number, kind, self.names.len()));
        self.names.extend_from_slice(name);
        self.entries.len() - 1
    }

    /// Sets the inode number at a position.
    pub fn set(&mut self, position: usize, number: u64) {
        if let Some(entry) = self.entries.get_mut(position) {
            entry.0 = number;
        }
    }

    /// Gives the bytes, as many as are used.
    pub fn encode(&self) -> Vec<u8> {
        let names_at = self.entries.len() * DIRENT_LEN;
        let mut bytes = Vec::with_capacity(BLOCK as usize);
        for (number, kind, name_at) in &self.entries {
            bytes.extend_from_slice(&number.to_le_bytes());
            // Below a block's length, so it fits.
            bytes.extend_from_slice(&((names_at + name_at) as u16).to_le_bytes());
            bytes.extend_from_slice(&[kind.code(), 0]);
        }
        bytes.extend_from_slice(&self.names);
        bytes
    }
}
