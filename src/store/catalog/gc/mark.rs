//! What the lake needs: every key that a ref reaches.
//!
//! Roots are the heads of all refs of all datasets (all heads where writers raced) and commits that
//! a node mounted lately. From a commit on: its parents, the inputs it was made from, its tree, all
//! placements of the tree, the packs they use, the data of those. Index blocks are read, segments are
//! only named. Memory: one id for each commit, index block and pack; the keys themselves are sorted on disk.

use std::collections::HashSet;
use std::path::Path;

use futures::{StreamExt, TryStreamExt, stream};

use crate::format::ids::{BlockId, CommitId, PackId, TreeId};
use crate::format::pack::{Recipe, Source};
use crate::format::paths::{self, PackPart, pack_key};
use crate::format::placement::PlacedBlock;
use crate::format::tree::Block;
use crate::format::tree::nav::{Blocks, NavError, Need};
use crate::store::catalog::Catalog;
use crate::store::catalog::spool::{SORT_BYTES_MAX, Sorter};
use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{LakeError, get_all};
use crate::store::meta::MetaError;

use super::GcError;

/// How many objects are read at a time.
const PARALLEL: usize = 32;
const RECIPE_LEN_MAX: u64 = 1 << 30;
/// Where nodes say which commits they have mounted.
pub(super) const USES_PREFIX: &str = "uses/";

/// Counts of what is needed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct LiveCounts {
    pub datasets: u64,
    pub commits: u64,
    pub trees: u64,
    pub placements: u64,
    pub packs: u64,
}

/// The marked keys, and what they were reached from.
pub(super) struct Marked {
    pub keys: Sorter,
    pub counts: LiveCounts,
    pub commits: HashSet<CommitId>,
}

/// Gives the key of a pack without its parts' suffixes: all parts live and die together.
pub(super) fn pack_stem(key: &str) -> &str {
    match key.rsplit_once('.') {
        Some((stem, _)) if key.starts_with("packs/") => stem,
        _ => key,
    }
}

/// Marks everything that is needed.
pub(super) async fn mark(catalog: &Catalog, uses_since_ms: i64, spool: &Path) -> Result<Marked, GcError> {
    let mut marker = Marker {
        catalog,
        keys: Sorter::new(spool, SORT_BYTES_MAX),
        counts: LiveCounts::default(),
        commits: HashSet::new(),
        trees: HashSet::new(),
        blocks: HashSet::new(),
        packs: HashSet::new(),
    };
    let roots = marker.roots(uses_since_ms).await?;
    marker.commits(roots).await?;
    marker.packs().await?;
    Ok(Marked { keys: marker.keys, counts: marker.counts, commits: marker.commits })
}

struct Marker<'a> {
    catalog: &'a Catalog,
    keys: Sorter,
    counts: LiveCounts,
    commits: HashSet<CommitId>,
    trees: HashSet<TreeId>,
    /// Index blocks that were walked (of trees and placements: their ids cannot meet).
    blocks: HashSet<BlockId>,
    packs: HashSet<PackId>,
}

/// A commit on the way, and whether the lake must have it.
#[derive(Clone, Copy)]
struct Pending {
    commit: CommitId,
    required: bool,
}

/// Which structure a walk goes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Tree,
    Placed,
}

impl Marker<'_> {
    fn keep(&mut self, key: &str) -> Result<(), GcError> {
        self.keys.push(key.as_bytes(), b"").map_err(GcError::Spool)
    }

    async fn roots(&mut self, uses_since_ms: i64) -> Result<Vec<Pending>, GcError> {
        let mut roots = Vec::new();
        for dataset in self.catalog.refs.datasets().await? {
            self.counts.datasets += 1;
            for state in self.catalog.refs.list(&dataset).await? {
                let heads = state.heads.iter();
                roots.extend(heads.map(|head| Pending { commit: head.commit, required: true }));
            }
        }
        let mut page = None;
        loop {
            let lake = &self.catalog.lake;
            let listed = with_retry(&RetryPolicy::default(), || lake.list(USES_PREFIX, page.clone())).await?;
            for object in listed.objects {
                let mut parts = object.key.split('/').skip(1);
                let commit = parts.next().and_then(|hex| hex.parse().ok());
                if let Some(commit) = commit.filter(|_| object.modified_ms >= uses_since_ms) {
                    roots.push(Pending { commit, required: false });
                }
            }
            page = listed.next;
            if page.is_none() {
                return Ok(roots);
            }
        }
    }

    async fn commits(&mut self, mut todo: Vec<Pending>) -> Result<(), GcError> {
        while let Some(Pending { commit, required }) = todo.pop() {
            if self.commits.contains(&commit) {
                continue;
            }
            let body = match self.catalog.meta.commit(&commit).await {
                Ok(body) => body,
                // An input from another lake, or a use of what is gone already.
                Err(error) if error.is_not_found() && !required => continue,
                Err(source) => return Err(GcError::Broken { commit, source }),
            };
            self.commits.insert(commit);
            self.counts.commits += 1;
            self.keep(&paths::commit_key(&commit))?;
            todo.extend(body.parents.iter().map(|&commit| Pending { commit, required }));
            todo.extend(body.lineage.inputs.iter().map(|&commit| Pending { commit, required: false }));
            if self.trees.insert(body.tree) {
                self.tree(commit, &body.tree).await?;
            }
        }
        Ok(())
    }

    async fn tree(&mut self, commit: CommitId, tree: &TreeId) -> Result<(), GcError> {
        self.counts.trees += 1;
        let broken = |source| GcError::Broken { commit, source };
        let root = self.catalog.meta.tree_root(tree).await.map_err(broken)?;
        self.keep(&paths::tree_key(tree))?;
        let children = root.top.children.iter().map(|child| child.id).collect();
        self.walk(commit, Side::Tree, root.top.level, children).await?;
        for id in self.catalog.placements(tree).await? {
            let placement = match self.catalog.meta.placement_root(tree, &id).await {
                Ok(placement) => placement,
                Err(error) if error.is_passing() => return Err(broken(error)),
                Err(error) => {
                    // Kept as it is: whoever mends the lake may want it.
                    tracing::warn!(placement = %id, %error, "this placement is damaged");
                    self.keep(&paths::placement_key(tree, &id))?;
                    continue;
                }
            };
            self.counts.placements += 1;
            self.keep(&paths::placement_key(tree, &id))?;
            self.packs.extend(placement.packs.iter().map(|used| used.pack));
            self.walk(commit, Side::Placed, root.top.level, placement.top.clone()).await?;
        }
        Ok(())
    }

    /// Marks the blocks below a block of `level`; reads those that are index blocks themselves.
    async fn walk(&mut self, commit: CommitId, side: Side, level: u8, children: Vec<BlockId>) -> Result<(), GcError> {
        let mut level = level;
        let mut row = children;
        while !row.is_empty() {
            for id in &row {
                let key = match side {
                    Side::Tree => paths::node_key(id),
                    Side::Placed => paths::placed_key(id),
                };
                self.keep(&key)?;
            }
            level = level.saturating_sub(1);
            if level == 0 {
                break;
            }
            row.retain(|id| self.blocks.insert(*id));
            let catalog = self.catalog;
            let mut below = stream::iter(row).map(|id| children_of(catalog, side, id)).buffer_unordered(PARALLEL);
            let mut next = Vec::new();
            while let Some(ids) = below.try_next().await.map_err(|source| GcError::Broken { commit, source })? {
                next.extend(ids);
            }
            drop(below);
            row = next;
        }
        Ok(())
    }

    async fn packs(&mut self) -> Result<(), GcError> {
        let packs = std::mem::take(&mut self.packs);
        self.counts.packs = packs.len() as u64;
        for pack in &packs {
            let key = pack_key(pack, PackPart::Recipe);
            self.keep(pack_stem(&key))?;
        }
        let lake = self.catalog.lake.clone();
        let mut recipes = stream::iter(packs)
            .map(|pack| {
                let lake = lake.clone();
                async move {
                    let key = pack_key(&pack, PackPart::Recipe);
                    let bytes = match get_all(lake.as_ref(), &key, RECIPE_LEN_MAX).await {
                        Ok(bytes) => bytes,
                        Err(LakeError::NotFound { .. }) => return Ok(None),
                        Err(error) => return Err(GcError::Lake(error)),
                    };
                    let recipe = Recipe::decode(&bytes).map_err(|source| GcError::Recipe { pack, source })?;
                    Ok(match recipe.source {
                        Source::Native { key } => Some(key),
                        Source::Assembled { .. } => None,
                    })
                }
            })
            .buffer_unordered(PARALLEL);
        while let Some(data) = recipes.try_next().await? {
            if let Some(data) = data {
                let key = paths::data_key(&data);
                self.keys.push(key.as_bytes(), b"").map_err(GcError::Spool)?;
            }
        }
        Ok(())
    }
}

async fn children_of(catalog: &Catalog, side: Side, id: BlockId) -> Result<Vec<BlockId>, MetaError> {
    let ids = |blocks: &dyn Blocks| match side {
        Side::Tree => match blocks.tree_block(id) {
            Some(block) => Ok(match block.as_ref() {
                Block::Index(index) => index.children.iter().map(|child| child.id).collect(),
                Block::Segment(_) => Vec::new(),
            }),
            None => Err(NavError::Need(Need::Tree(id))),
        },
        Side::Placed => match blocks.placed_block(id) {
            Some(block) => Ok(match block.as_ref() {
                PlacedBlock::Index(ids) => ids.clone(),
                PlacedBlock::Segment(_) => Vec::new(),
            }),
            None => Err(NavError::Need(Need::Placed(id))),
        },
    };
    catalog.meta.drive(ids).await
}
