//! The packs that this push knows: which it may rely on, which grow, which an earlier push left.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::format::ids::{ContentId, PackId};
use crate::format::pack::{PackIndex, PackOutboard, PackedContent};

use super::error::PushError;
use super::index::{Index, PackRow, PackState};
use super::upload::Begun;

/// All packs of the index, in memory.
#[derive(Debug, Default)]
pub(super) struct Packs {
    rows: BTreeMap<u32, PackRow>,
    by_id: HashMap<PackId, u32>,
    usable: HashSet<u32>,
    /// Begun in this push.
    new: HashSet<u32>,
    /// Uploads of large files that an earlier push left, by hex path.
    resumable: HashMap<String, u32>,
}

impl Packs {
    pub(super) fn load(index: &Index) -> Result<Self, PushError> {
        let rows = index.packs()?;
        let by_id = rows.iter().filter_map(|(number, row)| Some((row.id?, *number))).collect();
        Ok(Self { rows, by_id, ..Self::default() })
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = (u32, &PackRow)> {
        self.rows.iter().map(|(number, row)| (*number, row))
    }

    pub(super) fn row(&self, number: u32) -> Option<&PackRow> {
        self.rows.get(&number)
    }

    pub(super) fn number_of(&self, id: &PackId) -> Option<u32> {
        self.by_id.get(id).copied()
    }

    /// Says whether contents of the pack may be referred to.
    pub(super) fn usable(&self, number: u32) -> bool {
        self.usable.contains(&number)
    }

    pub(super) fn allow(&mut self, number: u32) {
        self.usable.insert(number);
    }

    pub(super) fn allow_resume(&mut self, path_hex: String, number: u32) {
        self.resumable.insert(path_hex, number);
    }

    pub(super) fn is_new(&self, number: u32) -> bool {
        self.new.contains(&number)
    }

    pub(super) fn new_count(&self) -> u64 {
        self.new.len() as u64
    }

    /// Gives the lengths of the packs that hold one content: a file of such a size may be known.
    pub(super) fn lens(&self) -> HashSet<u64> {
        self.rows.values().filter(|row| row.contents == 1).map(|row| row.len).collect()
    }

    /// Begins a pack; `whole` is the path of the one large file that it will hold.
    pub(super) fn begin(
        &mut self,
        index: &mut Index,
        part_bytes: u64,
        whole: Option<&[u8]>,
    ) -> Result<(u32, PackRow), PushError> {
        let number = index.next_pack()?;
        let row = PackRow {
            state: PackState::Uploading,
            key: uuid::Uuid::new_v4().simple().to_string(),
            len: 0,
            id: None,
            upload: None,
            part_bytes,
            whole: whole.map(hex::encode),
            contents: 0,
        };
        self.set(index, number, row.clone())?;
        self.usable.insert(number);
        self.new.insert(number);
        Ok((number, row))
    }

    /// Adds a pack that somebody else made.
    pub(super) fn adopt(&mut self, index: &mut Index, id: PackId, len: u64, contents: u32) -> Result<u32, PushError> {
        let number = index.next_pack()?;
        let row = PackRow {
            state: PackState::Committed,
            key: String::new(),
            len,
            id: Some(id),
            upload: None,
            part_bytes: 0,
            whole: None,
            contents,
        };
        self.set(index, number, row)?;
        self.by_id.insert(id, number);
        Ok(number)
    }

    fn set(&mut self, index: &mut Index, number: u32, row: PackRow) -> Result<(), PushError> {
        index.set_pack(number, &row)?;
        self.rows.insert(number, row);
        Ok(())
    }

    pub(super) fn update(
        &mut self,
        index: &mut Index,
        number: u32,
        change: impl FnOnce(&mut PackRow),
    ) -> Result<(), PushError> {
        match self.rows.get_mut(&number) {
            Some(row) => {
                change(row);
                index.set_pack(number, row)
            }
            // Thrown away while its task was still reporting.
            None => Ok(()),
        }
    }

    /// Gives the index and the chaining values of a pack of which `len` bytes were written.
    pub(super) fn describe(
        &mut self,
        index: &mut Index,
        number: u32,
        len: u64,
    ) -> Result<(PackIndex, PackOutboard), PushError> {
        let rows = index.layout_of(number)?;
        let count = u32::try_from(rows.len()).unwrap_or(u32::MAX);
        self.update(index, number, |row| {
            row.len = len;
            row.contents = count;
        })?;
        let contents = rows.into_iter().map(|(_, row)| PackedContent {
            content: ContentId::Digest(row.content),
            size: row.size,
            place: row.place,
        });
        let outboard = PackOutboard { contents: index.outboards_of(number)? };
        Ok((PackIndex { len, contents: contents.collect() }, outboard))
    }

    /// Notes that the lake has all of a pack.
    pub(super) fn described(&mut self, index: &mut Index, number: u32, id: PackId) -> Result<(), PushError> {
        self.update(index, number, |row| {
            row.state = row.state.max(PackState::Described);
            row.id = Some(id);
            row.upload = None;
        })?;
        self.by_id.insert(id, number);
        self.usable.insert(number);
        index.forget_parts(number)
    }

    pub(super) fn forget(&mut self, index: &mut Index, number: u32) -> Result<(), PushError> {
        if let Some(row) = self.rows.remove(&number)
            && let Some(id) = row.id
            && self.by_id.get(&id) == Some(&number)
        {
            self.by_id.remove(&id);
        }
        self.usable.remove(&number);
        self.new.remove(&number);
        index.forget_pack(number)
    }

    /// Gives the pack of a large file's upload that an earlier push left, once.
    pub(super) fn unfinished_whole(&mut self, path: &[u8]) -> Option<u32> {
        if self.resumable.is_empty() {
            return None;
        }
        self.resumable.remove(&hex::encode(path))
    }

    /// Goes on with the upload of a large file.
    pub(super) fn resume_whole(&mut self, index: &mut Index, number: u32) -> Result<(PackRow, Begun), PushError> {
        let parts = index.parts_of(number)?;
        let row = self.rows.get(&number).cloned().unwrap_or_else(unreachable_row);
        self.usable.insert(number);
        self.new.insert(number);
        let begun = Begun {
            upload: row.upload.clone(),
            parts: parts.into_iter().map(|part| (part.part.number, part)).collect(),
        };
        Ok((row, begun))
    }
}

/// A row that is asked for by a number that was just taken from the rows.
fn unreachable_row() -> PackRow {
    PackRow {
        state: PackState::Uploading,
        key: uuid::Uuid::new_v4().simple().to_string(),
        len: 0,
        id: None,
        upload: None,
        part_bytes: 8 << 20,
        whole: None,
        contents: 0,
    }
}
