//! What differs between two commits, in words that people and scripts read.

use crate::format::tree::diff::{Change, Differ};
use crate::format::tree::{Entry, EntryKind};
use crate::store::meta::{MetaError, MetaStore, Snapshot};

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    Added,
    Removed,
    /// Another kind of entry (a file became a directory).
    Replaced,
    /// The bytes, the target, or what a hard link belongs to.
    Content,
    /// Mode or time only.
    Attributes,
}

impl ChangeKind {
    /// Gives the letter that listings show.
    pub fn letter(self) -> char {
        match self {
            Self::Added => 'A',
            Self::Removed => 'D',
            Self::Replaced => 'T',
            Self::Content => 'M',
            Self::Attributes => 'm',
        }
    }
}

/// Says what a change is; None where only the counts of a directory changed.
pub fn kind_of(change: &Change) -> Option<ChangeKind> {
    let (before, after) = match (&change.before, &change.after) {
        (None, None) => return None,
        (None, Some(_)) => return Some(ChangeKind::Added),
        (Some(_), None) => return Some(ChangeKind::Removed),
        (Some(before), Some(after)) => (before, after),
    };
    if std::mem::discriminant(&before.kind) != std::mem::discriminant(&after.kind) {
        return Some(ChangeKind::Replaced);
    }
    if !same_content(before, after) {
        return Some(ChangeKind::Content);
    }
    let attributes = before.mode != after.mode || before.mtime != after.mtime;
    let links = before.nlink != after.nlink;
    (attributes || links).then_some(ChangeKind::Attributes)
}

fn same_content(before: &Entry, after: &Entry) -> bool {
    match (&before.kind, &after.kind) {
        (EntryKind::Dir { .. }, EntryKind::Dir { .. }) => true,
        (before, after) => before == after,
    }
}

/// Sums of a comparison.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct DiffStat {
    pub added: u64,
    pub removed: u64,
    pub replaced: u64,
    pub content: u64,
    pub attributes: u64,
    /// Sizes of the files that are new or have other bytes, and of those that are gone.
    pub bytes_added: u64,
    pub bytes_removed: u64,
}

impl DiffStat {
    /// Says whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.added + self.removed + self.replaced + self.content + self.attributes == 0
    }

    fn add(&mut self, kind: ChangeKind, change: &Change) {
        let count = match kind {
            ChangeKind::Added => &mut self.added,
            ChangeKind::Removed => &mut self.removed,
            ChangeKind::Replaced => &mut self.replaced,
            ChangeKind::Content => &mut self.content,
            ChangeKind::Attributes => &mut self.attributes,
        };
        *count += 1;
        if kind != ChangeKind::Attributes {
            self.bytes_added = self.bytes_added.saturating_add(size_of_file(&change.after));
            self.bytes_removed = self.bytes_removed.saturating_add(size_of_file(&change.before));
        }
    }
}

fn size_of_file(entry: &Option<Entry>) -> u64 {
    match entry.as_ref().map(|entry| &entry.kind) {
        Some(EntryKind::File { size, .. }) => *size,
        _ => 0,
    }
}

/// Compares two snapshots; gives each change to `sink` in order.
pub async fn diff<E: From<MetaError>>(
    meta: &MetaStore,
    before: &Snapshot,
    after: &Snapshot,
    mut sink: impl FnMut(ChangeKind, &Change) -> Result<(), E>,
) -> Result<DiffStat, E> {
    let mut stat = DiffStat::default();
    let mut differ = Differ::new((*before.root).clone(), (*after.root).clone());
    while let Some(change) = meta.drive(|blocks| differ.next(blocks)).await? {
        let Some(kind) = kind_of(&change) else {
            continue;
        };
        stat.add(kind, &change);
        sink(kind, &change)?;
    }
    Ok(stat)
}
