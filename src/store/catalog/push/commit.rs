//! The end of a push: roots, commit, marker, ref, tag, each only when what it names is complete.

use crate::format::commit::{Commit, Lineage};
use crate::format::ids::CommitId;
use crate::format::paths::{commit_key, placement_key, tree_key};
use crate::format::refs::{At, DEFAULT_BRANCH, RefKind, RefName};
use crate::format::tree::build::Built;
use crate::store::catalog::Catalog;
use crate::store::catalog::refs::{Expect, RefError};
use crate::store::meta::Snapshot;

use super::PushOptions;
use super::error::PushError;
use super::intent::now_ms;
use super::upload::Uploads;

/// Commits that are looked at for one that the same job made: nobody waits to repeat a push while more are made.
const JOB_HISTORY_MAX: usize = 128;

/// Where the push goes: the branch, and what it stands on now.
#[derive(Debug)]
pub(super) struct Target {
    pub branch: RefName,
    /// Heads of the branch now: none for a new one, several after a race in log mode.
    pub heads: Vec<CommitId>,
    pub parents: Vec<CommitId>,
    /// The commit pushed onto, or the branch's only head.
    pub base: Option<Snapshot>,
    /// Where contents may be reused from if there is no base.
    pub other: Option<Snapshot>,
    /// The tag exists and names the head: fine as long as no new commit is needed.
    pub tag_at_head: bool,
}

impl Target {
    /// Finds the branch and its parent; refuses early what could not succeed at the end.
    pub(super) async fn find(catalog: &Catalog, options: &PushOptions) -> Result<Self, PushError> {
        let dataset = &options.dataset;
        let branch = branch_of(catalog, options).await?;
        let heads = catalog.refs.heads(dataset, RefKind::Branch, &branch).await?;
        let heads: Vec<CommitId> = heads.iter().map(|head| head.commit).collect();
        let onto = match &options.onto {
            Some(onto) => Some(catalog.resolve(&onto.rev).await?),
            None => None,
        };
        if let (Some(onto), Some(head)) = (onto, heads.iter().find(|head| Some(**head) != onto)) {
            let _ = onto;
            return Err(PushError::NotHead {
                dataset: dataset.as_str().to_owned(),
                branch: branch.as_str().to_owned(),
                head: *head,
            });
        }
        let parents = onto.map_or_else(|| heads.clone(), |onto| vec![onto]);
        let base = match parents.as_slice() {
            [] => None,
            [first, ..] => {
                let dataset = options.onto.as_ref().map_or(dataset, |onto| &onto.rev.dataset);
                Some(catalog.snapshot_of(dataset, first).await?)
            }
        };
        let mut target = Self { branch, heads, parents, other: None, tag_at_head: false, base };
        target.tag_at_head = target.check_tag(catalog, options).await?;
        target.with_other(catalog, options).await
    }

    /// A new branch has no parent, but the dataset's default branch has contents.
    async fn with_other(mut self, catalog: &Catalog, options: &PushOptions) -> Result<Self, PushError> {
        if self.base.is_some() {
            return Ok(self);
        }
        let Ok(main) = RefName::parse(DEFAULT_BRANCH) else {
            return Ok(self);
        };
        let heads = catalog.refs.heads(&options.dataset, RefKind::Branch, &main).await?;
        if let Some(head) = heads.first() {
            // Only a help: what cannot be opened is not reused.
            self.other = catalog.snapshot_of(&options.dataset, &head.commit).await.ok();
        }
        Ok(self)
    }

    async fn check_tag(&self, catalog: &Catalog, options: &PushOptions) -> Result<bool, PushError> {
        let dataset = options.dataset.as_str().to_owned();
        let branch_as_tag = catalog.refs.heads(&options.dataset, RefKind::Tag, &self.branch).await?;
        if !branch_as_tag.is_empty() {
            return Err(PushError::NameTaken { dataset, kind: "tag", name: self.branch.as_str().to_owned() });
        }
        let Some(tag) = &options.tag else {
            return Ok(false);
        };
        let taken = |kind| PushError::NameTaken { dataset: dataset.clone(), kind, name: tag.as_str().to_owned() };
        if tag == &self.branch || !catalog.refs.heads(&options.dataset, RefKind::Branch, tag).await?.is_empty() {
            return Err(taken("branch"));
        }
        let at = catalog.refs.heads(&options.dataset, RefKind::Tag, tag).await?;
        // At the head it may stay: the tree may turn out unchanged.
        if at.iter().any(|head| !self.heads.contains(&head.commit)) {
            return Err(taken("tag"));
        }
        Ok(!at.is_empty())
    }
}

async fn branch_of(catalog: &Catalog, options: &PushOptions) -> Result<RefName, PushError> {
    if let Some(branch) = &options.branch {
        return Ok(branch.clone());
    }
    if let Some(At::Named(name)) = options.onto.as_ref().map(|onto| &onto.rev.at)
        && !catalog.refs.heads(&options.dataset, RefKind::Branch, name).await?.is_empty()
    {
        return Ok(name.clone());
    }
    Ok(RefName::parse(DEFAULT_BRANCH).expect("the default branch is a name"))
}

/// What the end of a push made.
#[derive(Debug)]
pub(super) struct Committed {
    pub commit: CommitId,
    pub unchanged: bool,
    pub heads: Vec<CommitId>,
}

/// Stores the roots and the commit, then moves the branch, then tags. `moved`: packs were written
/// again, so that the placement is worth storing even where the tree is not new.
pub(super) async fn commit(
    catalog: &Catalog,
    uploads: &Uploads,
    options: &PushOptions,
    target: &Target,
    built: &Built,
    moved: bool,
) -> Result<Committed, PushError> {
    // A push that is repeated, because nobody saw the first one end: its commit is there, and others may be
    // above it by now.
    if let Some(commit) = made_before(catalog, options, target, built).await? {
        tag(catalog, options, target, commit).await?;
        return Ok(Committed { commit, unchanged: true, heads: target.heads.clone() });
    }
    let parent = match (target.parents.as_slice(), &target.base) {
        ([only], Some(base)) if base.commit_body.tree == built.tree => Some(*only),
        _ => None,
    };
    if parent.is_none() || moved {
        store_roots(catalog, uploads, built).await?;
    }
    let wanted = wants_commit(options, target);
    let in_place = target.heads.as_slice() == target.parents.as_slice();
    let made = match parent {
        Some(parent) if !wanted && in_place => {
            Committed { commit: parent, unchanged: true, heads: target.heads.clone() }
        }
        _ => {
            refuse_taken_tag(options, target)?;
            let commit = store_commit(catalog, uploads, options, target, built).await?;
            let heads = move_branch(catalog, options, target, commit).await?;
            Committed { commit, unchanged: false, heads }
        }
    };
    tag(catalog, options, target, made.commit).await?;
    Ok(made)
}

/// Finds the commit of this very tree that the same job made before, along the first parents.
async fn made_before(
    catalog: &Catalog,
    options: &PushOptions,
    target: &Target,
    built: &Built,
) -> Result<Option<CommitId>, PushError> {
    if options.lineage.job.is_none() {
        return Ok(None);
    }
    let mut next = target.parents.first().copied();
    for _ in 0..JOB_HISTORY_MAX {
        let Some(id) = next else { break };
        let body = catalog.commit(&id).await?;
        if body.lineage.job == options.lineage.job && body.tree == built.tree {
            return Ok(Some(id));
        }
        next = body.parents.first().copied();
    }
    Ok(None)
}

/// Says whether an unchanged tree gets a commit of its own all the same. The output of a job is known by
/// the job's id: a push of it that is repeated, because nobody saw the first one end, adds nothing.
fn wants_commit(options: &PushOptions, target: &Target) -> bool {
    let lineage = &options.lineage;
    let before = target.base.as_ref().and_then(|base| base.commit_body.lineage.job.as_ref());
    if lineage.job.is_some() && lineage.job.as_ref() == before {
        return false;
    }
    options.message.is_some() || !options.meta.is_empty() || *lineage != Lineage::default()
}

/// A new commit cannot have a tag that names the head before it.
fn refuse_taken_tag(options: &PushOptions, target: &Target) -> Result<(), PushError> {
    match &options.tag {
        Some(tag) if target.tag_at_head => Err(PushError::NameTaken {
            dataset: options.dataset.as_str().to_owned(),
            kind: "tag",
            name: tag.as_str().to_owned(),
        }),
        _ => Ok(()),
    }
}

async fn store_roots(catalog: &Catalog, uploads: &Uploads, built: &Built) -> Result<(), PushError> {
    let (tree, placement) = (built.root.encode(), built.placement.encode());
    let keys = [tree_key(&built.tree), placement_key(&built.tree, &built.placement.id())];
    for (key, bytes) in keys.iter().zip([tree, placement]) {
        catalog.meta.keep(key, &bytes);
        uploads.put_named(key, bytes.into()).await?;
    }
    Ok(())
}

async fn store_commit(
    catalog: &Catalog,
    uploads: &Uploads,
    options: &PushOptions,
    target: &Target,
    built: &Built,
) -> Result<CommitId, PushError> {
    let body = Commit {
        format: 1,
        tree: built.tree,
        parents: target.parents.clone(),
        time_ms: now_ms(),
        message: options.message.clone().unwrap_or_default(),
        author: options.author.clone(),
        meta: options.meta.iter().cloned().collect(),
        lineage: options.lineage.clone(),
    };
    let bytes = body.encode();
    let id = Commit::id_of(&bytes);
    let key = commit_key(&id);
    catalog.meta.keep(&key, &bytes);
    uploads.put_named(&key, bytes.into()).await?;
    catalog.refs.ensure_dataset(&options.dataset).await?;
    catalog.refs.add_commit(&options.dataset, &id).await?;
    Ok(id)
}

async fn move_branch(
    catalog: &Catalog,
    options: &PushOptions,
    target: &Target,
    commit: CommitId,
) -> Result<Vec<CommitId>, PushError> {
    let expect = Expect::Heads(target.heads.clone());
    let moved = catalog.refs.move_branch(&options.dataset, &target.branch, commit, expect).await;
    match moved {
        Ok(heads) => Ok(heads.iter().map(|head| head.commit).collect()),
        Err(RefError::Conflict { .. }) => Err(PushError::Lost {
            commit,
            dataset: options.dataset.as_str().to_owned(),
            branch: target.branch.as_str().to_owned(),
        }),
        Err(error) => Err(error.into()),
    }
}

async fn tag(catalog: &Catalog, options: &PushOptions, target: &Target, commit: CommitId) -> Result<(), PushError> {
    let Some(tag) = &options.tag else {
        return Ok(());
    };
    match catalog.refs.tag(&options.dataset, tag, commit, false).await {
        Ok(_) => Ok(()),
        Err(RefError::TagExists { heads, .. }) if heads.iter().all(|head| head.commit == commit) => Ok(()),
        Err(RefError::TagExists { .. }) => Err(PushError::TagTaken {
            commit,
            dataset: options.dataset.as_str().to_owned(),
            branch: target.branch.as_str().to_owned(),
            tag: tag.as_str().to_owned(),
        }),
        Err(error) => Err(error.into()),
    }
}
