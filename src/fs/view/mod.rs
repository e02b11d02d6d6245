//! The view: what a mount shows of a commit, without any FUSE in it.
//!
//! * [`attr`]: inode numbers and attributes. * [`names`]: lookup, listing, links, extended
//!   attributes, the content of a file: pure functions over blocks. * [`cache`]: what is remembered.
//! * this file: the view over real blocks and contents.
//!
//! Invariants: numbers, attributes and bytes are a pure function of the commit and the options, so
//! that any daemon can answer what another one was asked. Everything that is remembered is bounded
//! and can be computed again. Nothing here waits unless it is `async`.

use std::sync::Arc;

use bytes::Bytes;

use crate::format::ids::CommitId;
use crate::format::tree::nav::{Blocks, NavError};
use crate::store::fetch::{Attachment, ContentRef, FetchError, Fetcher, Prefetch, TreeOrder, Verify, WholeFile};
use crate::store::meta::{MetaError, MetaStore, Snapshot};

mod attr;
mod cache;
mod names;
#[cfg(test)]
mod tests;

pub use attr::{Attr, Ino, Kind, Look, ROOT};
pub use names::{Listed, Names, Origin, Totals, XATTR_COMMIT, XATTR_DIGEST, XATTR_TREE};

/// How a commit is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewOptions {
    /// The directory that becomes the root of the mount, names separated by `/`; empty: all.
    pub subdir: Vec<u8>,
    pub look: Look,
    pub verify: Verify,
    pub prefetch: Prefetch,
}

/// Why the view has no answer. What each is to a reader stands in `crate::fs::errno`.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    #[error("no such name")]
    NoEntry,
    #[error("no such inode in this commit")]
    NoInode,
    #[error("not a directory")]
    NotDir,
    #[error("not a file")]
    NotFile,
    #[error("not a symlink")]
    NotLink,
    #[error("no such extended attribute")]
    NoXattr,
    #[error("the buffer is too small")]
    SmallBuffer,
    #[error("a mount is read-only")]
    ReadOnly,
    #[error("too many files are open in this mount")]
    TooManyOpen,
    /// The metadata contradicts itself.
    #[error("the commit's tree cannot be navigated")]
    Damaged(#[source] NavError),
    #[error("the commit's metadata is not to be had")]
    Meta(#[source] MetaError),
    #[error("the file's content is not to be had")]
    Fetch(#[source] FetchError),
}

impl From<NavError> for ViewError {
    fn from(error: NavError) -> Self {
        match error {
            NavError::NotFound => Self::NoInode,
            NavError::NotDir => Self::NotDir,
            NavError::Need(_) | NavError::Damaged { .. } | NavError::Decode(_) => Self::Damaged(error),
        }
    }
}

impl From<MetaError> for ViewError {
    fn from(error: MetaError) -> Self {
        match error {
            MetaError::Nav(error) => error.into(),
            other => Self::Meta(other),
        }
    }
}

/// A commit as a mount shows it.
#[derive(Debug)]
pub struct View {
    snapshot: Snapshot,
    names: Names,
    meta: MetaStore,
    fetcher: Fetcher,
    verify: Verify,
    /// Lives as long as the mount: it keeps the prefetch going.
    _attachment: Attachment,
}

impl View {
    /// Prepares a commit to be shown. Fetches what leads to `subdir`, else nothing.
    pub async fn open(
        snapshot: Snapshot,
        meta: MetaStore,
        fetcher: Fetcher,
        options: ViewOptions,
    ) -> Result<Self, ViewError> {
        let origin = Origin {
            root: Arc::clone(&snapshot.root),
            placement: Arc::clone(&snapshot.placement),
            commit: snapshot.commit,
            tree: snapshot.commit_body.tree,
        };
        let names = meta
            .drive(|blocks| Names::new(origin.clone(), options.look, &options.subdir, blocks))
            .await
            .map_err(|error| match ViewError::from(error) {
                ViewError::NoInode => ViewError::NoEntry,
                other => other,
            })?;
        let attachment = fetcher.attach(snapshot.placement.packs.clone(), options.prefetch);
        if options.prefetch == Prefetch::All && snapshot.placement.packs.len() > 1 {
            tokio::spawn(learn_order(meta.clone(), snapshot.clone(), attachment.expect_order()));
        }
        Ok(Self { snapshot, names, meta, fetcher, verify: options.verify, _attachment: attachment })
    }

    /// Says which commit is shown.
    pub fn commit(&self) -> CommitId {
        self.snapshot.commit
    }

    /// Gives the snapshot that is shown.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Gives the sums of the tree.
    pub fn totals(&self) -> Totals {
        self.names.totals()
    }

    /// Navigates over what this node has. None: something has to be fetched; ask [`View::soon`].
    pub fn now<T>(
        &self,
        navigate: impl FnOnce(&Names, &dyn Blocks) -> Result<T, NavError>,
    ) -> Option<Result<T, ViewError>> {
        match self.meta.try_now(|blocks| navigate(&self.names, blocks)) {
            Err(NavError::Need(_)) => None,
            other => Some(other.map_err(ViewError::from)),
        }
    }

    /// Navigates, fetching what is missing.
    pub async fn soon<T>(
        &self,
        mut navigate: impl FnMut(&Names, &dyn Blocks) -> Result<T, NavError>,
    ) -> Result<T, ViewError> {
        Ok(self.meta.drive(|blocks| navigate(&self.names, blocks)).await?)
    }

    /// Reads into `buffer` what this node has; gives how many bytes. None: ask [`View::read`].
    pub fn try_read(&self, content: &ContentRef, offset: u64, buffer: &mut [u8]) -> Option<Result<usize, ViewError>> {
        let expected = expected_len(content, offset, buffer.len());
        let buffer = buffer.get_mut(..expected).unwrap_or_default();
        if buffer.is_empty() {
            return Some(Ok(0));
        }
        let result = self.fetcher.try_read_into(content, offset, buffer, self.verify)?;
        Some(result.map_err(ViewError::Fetch).inspect(|&len| debug_assert_eq!(len, expected)))
    }

    /// Reads exactly `min(len, size - offset)` bytes, or fails.
    pub async fn read(&self, content: &ContentRef, offset: u64, len: u32) -> Result<Bytes, ViewError> {
        if expected_len(content, offset, len as usize) == 0 {
            return Ok(Bytes::new());
        }
        self.fetcher.read(content, offset, len, self.verify).await.map_err(ViewError::Fetch)
    }

    /// Says whether it is worth while to be asked at each open: whether the kernel may read files of this commit by
    /// itself. With small files only, an open costs more than it gains.
    pub fn gains_by_opens(&self) -> bool {
        let files = self.snapshot.root.counts.files;
        self.verify != Verify::Always && !self.snapshot.placement.is_of_small_files(files)
    }

    /// Says whether [`View::whole`] would wait for a server.
    pub fn waits_for_whole(&self, content: &ContentRef) -> bool {
        content.size > 0 && self.verify != Verify::Always && self.fetcher.waits_for_whole(content)
    }

    /// Looks for what [`View::whole`] gives, within the stall time.
    pub async fn look_for_whole(&self, content: &ContentRef) {
        self.fetcher.look_for_whole(content).await;
    }

    /// Gives the file that the kernel may read itself, where the content is one.
    pub fn whole(&self, content: &ContentRef) -> Option<WholeFile> {
        if content.size == 0 || self.verify == Verify::Always {
            return None;
        }
        self.fetcher.whole(content, self.verify).filter(|whole| whole.len == content.size)
    }
}

/// Finds out, behind the mount's back, in which order the tree refers to the packs, and tells it.
async fn learn_order(meta: MetaStore, snapshot: Snapshot, order: TreeOrder) {
    if let Err(error) = meta.packs_in_tree_order(&snapshot, |packs| order.learn(packs)).await {
        tracing::info!(%error, "the rest of the commit is prefetched in no particular order");
    }
}

/// How many bytes a read of `len` at `offset` has to give.
pub(crate) fn expected_len(content: &ContentRef, offset: u64, len: usize) -> usize {
    let left = content.size.saturating_sub(offset);
    usize::try_from(left).unwrap_or(usize::MAX).min(len)
}
