//! What happened to a dataset, and what its versions hold.

use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};

use crate::format::commit::Commit;
use crate::format::ids::{CommitId, PlacementId, TreeId};
use crate::format::pack::{Recipe, Source};
use crate::format::paths::{PackPart, pack_key};
use crate::format::refs::{DEFAULT_BRANCH, DatasetName, RefKind, RefName, Revision};
use crate::format::tree::Counts;
use crate::store::catalog::gc::condemned;
use crate::store::catalog::refs::{Expect, Head, RefError, RefState};
use crate::store::catalog::{Catalog, CatalogError};
use crate::store::lake::{LakeError, get_all};
use crate::store::meta::Snapshot;

/// How many objects are asked for at a time.
const PARALLEL: usize = 32;
const RECIPE_LEN_MAX: u64 = 1 << 30;

/// A dataset, for a listing.
#[derive(Debug, Clone, serde::Serialize)]
pub struct DatasetRow {
    pub dataset: String,
    pub branches: u64,
    pub tags: u64,
    /// The head of the default branch; none where there is none, or more than one.
    pub head: Option<CommitId>,
    /// More than one: writers raced.
    pub heads: Vec<CommitId>,
    pub time_ms: Option<i64>,
    pub files: Option<u64>,
    pub bytes: Option<u64>,
}

/// A commit, for a listing.
#[derive(Debug, Clone, serde::Serialize)]
pub struct LogRow {
    pub commit: CommitId,
    pub tree: TreeId,
    pub parents: Vec<CommitId>,
    pub time_ms: i64,
    pub author: String,
    pub message: String,
    pub meta: std::collections::BTreeMap<String, String>,
    pub tags: Vec<String>,
    pub branches: Vec<String>,
}

/// Whether the bytes of a commit are proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProofState {
    /// Every content is named by its digest.
    Digested,
    /// Some are pinned, and all pinned packs were read and fixed once.
    PinnedProven,
    /// Some are pinned and were never read.
    PinnedUnproven,
}

/// Everything about one commit.
#[derive(Debug, Clone, serde::Serialize)]
pub struct CommitDetails {
    #[serde(flatten)]
    pub row: LogRow,
    pub dataset: String,
    pub lineage: crate::format::commit::Lineage,
    pub files: u64,
    pub dirs: u64,
    pub symlinks: u64,
    pub bytes: u64,
    pub placement: PlacementId,
    pub packs: u64,
    pub pack_bytes: u64,
    /// Bytes of the packs that this tree refers to.
    pub referenced_bytes: u64,
    pub proof: ProofState,
    /// Packs that lie in the user's own objects, and how many of them are proven.
    pub assembled_packs: u64,
    pub proven_packs: u64,
}

impl Catalog {
    /// Lists the datasets, in order.
    pub async fn dataset_rows(&self) -> Result<Vec<DatasetRow>, CatalogError> {
        let datasets = self.refs.datasets().await.map_err(CatalogError::Refs)?;
        stream::iter(datasets).map(|dataset| self.dataset_row(dataset)).buffered(PARALLEL).try_collect().await
    }

    async fn dataset_row(&self, dataset: DatasetName) -> Result<DatasetRow, CatalogError> {
        let refs = match self.refs.list(&dataset).await {
            Ok(refs) => refs,
            // It was removed meanwhile.
            Err(RefError::NoDataset { .. }) => Vec::new(),
            Err(error) => return Err(CatalogError::Refs(error)),
        };
        let of = |kind| refs.iter().filter(move |state| state.kind == kind);
        let main = of(RefKind::Branch).find(|state| state.name.as_str() == DEFAULT_BRANCH);
        let heads: Vec<CommitId> =
            main.map_or_else(Vec::new, |state| state.heads.iter().map(|head| head.commit).collect());
        let head = match heads.as_slice() {
            [only] => Some(*only),
            _ => None,
        };
        let body = match head {
            Some(head) => Some(self.commit(&head).await?),
            None => None,
        };
        let counts = match &body {
            Some(body) => Some(self.meta.tree_root(&body.tree).await?.counts),
            None => None,
        };
        Ok(DatasetRow {
            branches: of(RefKind::Branch).count() as u64,
            tags: of(RefKind::Tag).count() as u64,
            dataset: dataset.as_str().to_owned(),
            head,
            heads,
            time_ms: body.map(|body| body.time_ms),
            files: counts.map(|counts| counts.files),
            bytes: counts.map(|counts| counts.bytes),
        })
    }

    /// Lists the refs of a dataset.
    pub async fn ref_list(&self, dataset: &DatasetName) -> Result<Vec<RefState>, CatalogError> {
        match self.refs.list(dataset).await {
            Ok(refs) if refs.is_empty() => match self.refs.dataset(dataset).await {
                Ok(Some(_)) => Ok(refs),
                Ok(None) => {
                    let (dataset, url) = (dataset.as_str().to_owned(), self.lake.url());
                    Err(self.explain(RefError::NoDataset { dataset, url }).await)
                }
                Err(error) => Err(CatalogError::Refs(error)),
            },
            Ok(refs) => Ok(refs),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Gives the history of a revision, newest first. A dataset alone means all its branches' heads
    /// where the default branch does not exist or has several.
    pub async fn log(&self, rev: &Revision, limit: usize) -> Result<Vec<LogRow>, CatalogError> {
        let refs = self.ref_list(&rev.dataset).await?;
        let names = names_by_commit(&refs);
        let starts = match self.resolve(rev).await {
            Ok(commit) => vec![commit],
            Err(CatalogError::Refs(RefError::Heads { heads, .. })) => heads.iter().map(|head| head.commit).collect(),
            Err(CatalogError::Refs(RefError::NoDefault { .. })) if !refs.is_empty() => {
                let heads = refs.iter().flat_map(|state| &state.heads);
                heads.map(|head| head.commit).collect()
            }
            Err(error) => return Err(error),
        };
        let mut seen: HashSet<CommitId> = HashSet::new();
        let mut next: BinaryHeap<(i64, CommitId)> = BinaryHeap::new();
        let mut bodies: HashMap<CommitId, Arc<Commit>> = HashMap::new();
        let mut add = starts;
        let mut rows = Vec::new();
        loop {
            for commit in add.drain(..).filter(|commit| seen.insert(*commit)) {
                let body = self.commit(&commit).await?;
                next.push((body.time_ms, commit));
                bodies.insert(commit, body);
            }
            if rows.len() >= limit {
                break;
            }
            let Some((_, commit)) = next.pop() else { break };
            let Some(body) = bodies.remove(&commit) else {
                continue;
            };
            add.extend(&body.parents);
            rows.push(log_row(commit, &body, &names));
        }
        Ok(rows)
    }

    /// Gives everything about one commit.
    pub async fn show(&self, rev: &Revision) -> Result<(Snapshot, CommitDetails), CatalogError> {
        let snap = self.snapshot(rev).await?;
        let refs = self.ref_list(&rev.dataset).await?;
        let (assembled, proven) = self.proofs(&snap).await?;
        let proof = match (assembled.pinned, proven == assembled.pinned) {
            (0, _) => ProofState::Digested,
            (_, true) => ProofState::PinnedProven,
            (_, false) => ProofState::PinnedUnproven,
        };
        let Counts { files, dirs, symlinks, bytes, .. } = snap.root.counts;
        let packs = &snap.placement.packs;
        let details = CommitDetails {
            row: log_row(snap.commit, &snap.commit_body, &names_by_commit(&refs)),
            dataset: rev.dataset.as_str().to_owned(),
            lineage: snap.commit_body.lineage.clone(),
            files,
            dirs,
            symlinks,
            bytes,
            placement: snap.placement_id,
            packs: packs.len() as u64,
            pack_bytes: packs.iter().map(|used| used.len).sum(),
            referenced_bytes: packs.iter().map(|used| used.referenced).sum(),
            proof,
            assembled_packs: assembled.all,
            proven_packs: proven,
        };
        Ok((snap, details))
    }

    /// Counts the packs that lie in the user's own objects, and those of them that are proven.
    async fn proofs(&self, snap: &Snapshot) -> Result<(Assembled, u64), CatalogError> {
        let mut assembled = Assembled::default();
        let mut proven = 0;
        let packs = snap.placement.packs.iter().map(|used| used.pack);
        let mut looks = stream::iter(packs)
            .map(|pack| async move {
                let key = pack_key(&pack, PackPart::Recipe);
                let bytes = match get_all(self.lake.as_ref(), &key, RECIPE_LEN_MAX).await {
                    Ok(bytes) => bytes,
                    Err(LakeError::NotFound { .. }) => return Ok((false, false, false)),
                    Err(error) => return Err(error),
                };
                let Ok(Recipe { source: Source::Assembled { .. }, .. }) = Recipe::decode(&bytes) else {
                    return Ok((false, false, false));
                };
                let pinned = self.is_pinned(&pack).await?;
                let proof = match self.lake.head(&pack_key(&pack, PackPart::Proof)).await {
                    Ok(_) => true,
                    Err(LakeError::NotFound { .. }) => false,
                    Err(error) => return Err(error),
                };
                Ok((true, pinned, proof && pinned))
            })
            .buffer_unordered(PARALLEL);
        while let Some((is_assembled, pinned, proof)) = looks.try_next().await? {
            assembled.all += u64::from(is_assembled);
            assembled.pinned += u64::from(pinned);
            proven += u64::from(proof);
        }
        Ok((assembled, proven))
    }

    /// Says whether a pack has contents that are named by a pin.
    async fn is_pinned(&self, pack: &crate::format::ids::PackId) -> Result<bool, LakeError> {
        let key = pack_key(pack, PackPart::Index);
        let bytes = get_all(self.lake.as_ref(), &key, RECIPE_LEN_MAX).await?;
        let index = crate::format::pack::PackIndex::decode(&bytes).ok();
        Ok(index.is_none_or(|index| {
            let mut contents = index.contents.iter();
            contents.any(|content| matches!(content.content, crate::format::ids::ContentId::Pin(_)))
        }))
    }

    /// Tags a commit; one that gc is about to delete is refused.
    pub async fn make_tag(&self, rev: &Revision, tag: &RefName, force: bool) -> Result<CommitId, CatalogError> {
        let commit = self.resolve(rev).await?;
        let made = self.refs.tag(&rev.dataset, tag, commit, force).await;
        if let Err(error) = made {
            return Err(self.explain(error).await);
        }
        self.check_kept(&rev.dataset, RefKind::Tag, tag, &commit).await?;
        Ok(commit)
    }

    /// Makes a branch at a commit, or moves it there with `force`.
    pub async fn make_branch(
        &self,
        rev: &Revision,
        branch: &RefName,
        force: bool,
    ) -> Result<(CommitId, Vec<Head>), CatalogError> {
        let commit = self.resolve(rev).await?;
        let expect = match force {
            true => Expect::Any,
            false => Expect::Heads(Vec::new()),
        };
        let moved = self.refs.move_branch(&rev.dataset, branch, commit, expect).await;
        let heads = match moved {
            Ok(heads) => heads,
            Err(error) => return Err(self.explain(error).await),
        };
        self.check_kept(&rev.dataset, RefKind::Branch, branch, &commit).await?;
        Ok((commit, heads))
    }

    /// A ref that was just made to a condemned commit: a gc that begins now sees the ref; one that
    /// is deleting already may not have. (The ref was written before this looks: one of the two sees the other.)
    async fn check_kept(
        &self,
        dataset: &DatasetName,
        kind: RefKind,
        name: &RefName,
        commit: &CommitId,
    ) -> Result<(), CatalogError> {
        let key = crate::format::paths::commit_key(commit);
        if !condemned::is_being_swept(&self.lake, &key).await? {
            return Ok(());
        }
        let deleted = self.refs.delete(dataset, kind, name).await;
        deleted.map_err(CatalogError::Refs)?;
        Err(CatalogError::Swept { commit: *commit })
    }
}

#[derive(Debug, Default)]
struct Assembled {
    all: u64,
    pinned: u64,
}

/// Names of refs by the commit they point to.
type Names = HashMap<CommitId, (Vec<String>, Vec<String>)>;

fn names_by_commit(refs: &[RefState]) -> Names {
    let mut names = Names::new();
    for state in refs {
        for head in &state.heads {
            let (tags, branches) = names.entry(head.commit).or_default();
            let list = match state.kind {
                RefKind::Tag => tags,
                RefKind::Branch => branches,
            };
            list.push(state.name.as_str().to_owned());
        }
    }
    names
}

fn log_row(commit: CommitId, body: &Commit, names: &Names) -> LogRow {
    let (tags, branches) = names.get(&commit).cloned().unwrap_or_default();
    LogRow {
        commit,
        tree: body.tree,
        parents: body.parents.clone(),
        time_ms: body.time_ms,
        author: body.author.clone(),
        message: body.message.clone(),
        meta: body.meta.clone(),
        tags,
        branches,
    }
}
