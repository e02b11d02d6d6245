//! The names of a mount: pure navigation over blocks that may not be at hand.
//!
//! Every function ends with [`NavError::Need`] where a block is missing, and may be called again once
//! it is there. None of them waits, so the same code answers on a FUSE worker and in a task.

use std::sync::Arc;

use crate::format::ids::{CommitId, ContentId, TreeId};
use crate::format::placement::{Location, PlacementRoot};
use crate::format::tree::nav::{self, Blocks, DirAt, EntryAt, NavError};
use crate::format::tree::{EntryKind, TreeRoot};
use crate::store::fetch::ContentRef;

use super::attr::{Attr, Ino, Look, ROOT};
use super::cache::Recent;

/// Directories whose place is remembered.
const DIRS_MAX: usize = 4096;
/// Contents whose place is remembered: more than are commonly open at once.
const CONTENTS_MAX: usize = 8192;
/// A content in more extents than this is looked up for each read instead of being remembered.
const EXTENTS_MAX: usize = 1024;

/// Position of the first entry in a directory: `.` and `..` come before.
const DOTS: u64 = 2;

/// Names of the extended attributes that every file and directory has.
pub const XATTR_COMMIT: &[u8] = b"user.larder.commit";
/// The tree's id.
pub const XATTR_TREE: &[u8] = b"user.larder.tree";
/// The BLAKE3 digest of a file's bytes; missing where the file was imported and not digested.
pub const XATTR_DIGEST: &[u8] = b"user.larder.digest";

/// One name of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: Box<[u8]>,
    /// Where a listing goes on behind this name.
    pub next: u64,
    pub attr: Attr,
}

/// Real numbers for statfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Sum of the sizes of all files, hard links once.
    pub bytes: u64,
    /// Files, directories and symlinks, the root included.
    pub inodes: u64,
}

/// The tree that a mount shows.
#[derive(Debug)]
pub struct Names {
    root: Arc<TreeRoot>,
    placement: Arc<PlacementRoot>,
    commit: CommitId,
    tree: TreeId,
    /// What the root of the mount is: the root of the tree, or a directory below.
    base: DirAt,
    base_attr: Attr,
    look: Look,
    dirs: Recent<Ino, DirAt>,
    contents: Recent<Ino, Arc<ContentRef>>,
}

/// What a view of a tree starts from.
#[derive(Debug, Clone)]
pub struct Origin {
    pub root: Arc<TreeRoot>,
    pub placement: Arc<PlacementRoot>,
    pub commit: CommitId,
    pub tree: TreeId,
}

impl Names {
    /// Shows the directory at `subdir` (empty: all of the tree) as the root. `NotFound` or `NotDir`
    /// where there is no such directory.
    pub fn new(origin: Origin, look: Look, subdir: &[u8], blocks: &dyn Blocks) -> Result<Self, NavError> {
        let Origin { root, placement, commit, tree } = origin;
        let (base, base_attr) = match nav::resolve(&root, blocks, subdir)? {
            None => (nav::root_dir(&root), look.dir(ROOT, root.mode, root.mtime, root.subdirs)),
            Some(at) => {
                let attr = look.entry(ROOT, &at.entry).ok_or(NavError::NotDir)?;
                (at.dir.ok_or(NavError::NotDir)?, attr)
            }
        };
        let (dirs, contents) = (Recent::new(DIRS_MAX), Recent::new(CONTENTS_MAX));
        Ok(Self { root, placement, commit, tree, base, base_attr, look, dirs, contents })
    }

    /// Gives the sums of the whole tree.
    pub fn totals(&self) -> Totals {
        let counts = &self.root.counts;
        let inodes = counts.files.saturating_add(counts.dirs).saturating_add(counts.symlinks).saturating_add(1);
        Totals { bytes: counts.bytes, inodes }
    }

    /// Finds a name. None: there is no such name.
    pub fn lookup(&self, blocks: &dyn Blocks, parent: Ino, name: &[u8]) -> Result<Option<Attr>, NavError> {
        let dir = self.dir_at(blocks, parent)?;
        let at = match nav::lookup(&self.root, blocks, &dir, name) {
            Ok(at) => at,
            Err(NavError::NotFound) => return Ok(None),
            Err(error) => return Err(error),
        };
        let at = self.first_of_group(blocks, at)?;
        if let Some(found) = at.dir {
            self.dirs.put(Ino::of_rank(at.rank), found);
        }
        self.attr_of(&at).map(Some)
    }

    /// Gives the attributes of an inode. `NotFound` where the tree has no such inode.
    pub fn attr(&self, blocks: &dyn Blocks, ino: Ino) -> Result<Attr, NavError> {
        if ino == ROOT {
            return Ok(self.base_attr);
        }
        self.attr_of(&self.entry(blocks, ino)?)
    }

    /// Lists up to `limit` names of a directory from position `from` on, `.` and `..` first. Fewer than
    /// `limit` do not mean the end; none do.
    pub fn list(&self, blocks: &dyn Blocks, ino: Ino, from: u64, limit: usize) -> Result<Vec<Listed>, NavError> {
        let dir = self.dir_at(blocks, ino)?;
        let mut listed = Vec::new();
        if from == 0 {
            listed.push(Listed { name: (*b".").into(), next: 1, attr: self.attr(blocks, ino)? });
        }
        if from <= 1 {
            listed.push(Listed { name: (*b"..").into(), next: DOTS, attr: self.attr(blocks, self.parent_of(&dir))? });
        }
        let mut position = from.saturating_sub(DOTS);
        if position >= dir.children {
            return Ok(listed);
        }
        for at in nav::list(&self.root, blocks, &dir, position, limit)? {
            let name = at.entry.name.clone();
            let at = self.first_of_group(blocks, at)?;
            position += 1;
            listed.push(Listed { name, next: position + DOTS, attr: self.attr_of(&at)? });
        }
        Ok(listed)
    }

    /// Gives where a symlink points. None: it is not one.
    pub fn readlink(&self, blocks: &dyn Blocks, ino: Ino) -> Result<Option<Box<[u8]>>, NavError> {
        if ino == ROOT {
            return Ok(None);
        }
        match self.entry(blocks, ino)?.entry.kind {
            EntryKind::Symlink { target } => Ok(Some(target)),
            EntryKind::File { .. } | EntryKind::Dir { .. } | EntryKind::HardLink { .. } => Ok(None),
        }
    }

    /// Gives a file's content and where it lies. None: it is not a file.
    pub fn content(&self, blocks: &dyn Blocks, ino: Ino) -> Result<Option<Arc<ContentRef>>, NavError> {
        if let Some(known) = self.contents.get(&ino) {
            return Ok(Some(known));
        }
        let Some(rank) = ino.rank() else {
            return Ok(None);
        };
        let EntryKind::File { size, content, .. } = self.entry(blocks, ino)?.entry.kind else {
            return Ok(None);
        };
        let location = nav::location(&self.root, &self.placement, blocks, rank)?;
        let few = !matches!(&location, Location::Sparse { extents, .. } if extents.len() > EXTENTS_MAX);
        let found = Arc::new(ContentRef { content, size, location });
        if few {
            self.contents.put(ino, Arc::clone(&found));
        }
        Ok(Some(found))
    }

    /// Gives an extended attribute. None: the inode does not have it.
    pub fn xattr(&self, blocks: &dyn Blocks, ino: Ino, name: &[u8]) -> Result<Option<String>, NavError> {
        match name {
            XATTR_COMMIT => Ok(Some(self.commit.to_string())),
            XATTR_TREE => Ok(Some(self.tree.to_string())),
            XATTR_DIGEST => self.digest(blocks, ino),
            _ => Ok(None),
        }
    }

    /// Lists the names of the extended attributes of an inode.
    pub fn xattr_names(&self, blocks: &dyn Blocks, ino: Ino) -> Result<Vec<&'static [u8]>, NavError> {
        let mut names = vec![XATTR_COMMIT, XATTR_TREE];
        if self.digest(blocks, ino)?.is_some() {
            names.push(XATTR_DIGEST);
        }
        Ok(names)
    }

    fn digest(&self, blocks: &dyn Blocks, ino: Ino) -> Result<Option<String>, NavError> {
        if ino == ROOT {
            return Ok(None);
        }
        match self.entry(blocks, ino)?.entry.kind {
            EntryKind::File { content: ContentId::Digest(digest), .. } => Ok(Some(digest.to_string())),
            EntryKind::File { content: ContentId::Pin(_), .. }
            | EntryKind::Dir { .. }
            | EntryKind::Symlink { .. }
            | EntryKind::HardLink { .. } => Ok(None),
        }
    }

    /// Gives the entry of an inode that is not the root.
    fn entry(&self, blocks: &dyn Blocks, ino: Ino) -> Result<EntryAt, NavError> {
        let rank = ino.rank().ok_or(NavError::NotFound)?;
        nav::entry_at(&self.root, blocks, rank)
    }

    fn dir_at(&self, blocks: &dyn Blocks, ino: Ino) -> Result<DirAt, NavError> {
        if ino == ROOT {
            return Ok(self.base);
        }
        if let Some(known) = self.dirs.get(&ino) {
            return Ok(known);
        }
        let found = self.entry(blocks, ino)?.dir.ok_or(NavError::NotDir)?;
        self.dirs.put(ino, found);
        Ok(found)
    }

    fn parent_of(&self, dir: &DirAt) -> Ino {
        match dir.parent {
            // Above the root of the mount is nothing: it is its own parent.
            _ if *dir == self.base => ROOT,
            Some(rank) if self.base.rank != Some(rank) => Ino::of_rank(rank),
            Some(_) | None => ROOT,
        }
    }

    /// Follows a later entry of a hard-link group to the first, which has the inode.
    fn first_of_group(&self, blocks: &dyn Blocks, at: EntryAt) -> Result<EntryAt, NavError> {
        let EntryKind::HardLink { first } = &at.entry.kind else {
            return Ok(at);
        };
        let damaged = NavError::Damaged { rank: at.rank, why: "a hard link does not lead to a file" };
        match nav::resolve(&self.root, blocks, first) {
            Ok(Some(found)) if found.dir.is_none() => Ok(found),
            Ok(_) | Err(NavError::NotFound | NavError::NotDir) => Err(damaged),
            Err(error) => Err(error),
        }
    }

    fn attr_of(&self, at: &EntryAt) -> Result<Attr, NavError> {
        let damaged = NavError::Damaged { rank: at.rank, why: "a hard link leads to a hard link" };
        self.look.entry(Ino::of_rank(at.rank), &at.entry).ok_or(damaged)
    }
}
