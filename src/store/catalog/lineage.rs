//! What a commit came from, and what came from it: lineage, both ways.
//!
//! Upwards the inputs are in the commits themselves. Downwards nothing in the lake says who used a commit, so all
//! commits that refs lead to are read once and turned around; commits are small and read in parallel.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};

use crate::format::commit::Commit;
use crate::format::ids::CommitId;
use crate::format::refs::{DatasetName, Revision};
use crate::store::catalog::refs::RefError;
use crate::store::catalog::{Catalog, CatalogError};

/// How many commits are read at a time.
const PARALLEL: usize = 32;

/// Which way a commit is related to the one that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// It was made from it, directly or not.
    Input,
    /// The commit itself.
    Itself,
    /// It was made from this one, directly or not.
    Output,
}

/// A commit in a lineage.
#[derive(Debug, Clone, serde::Serialize)]
pub struct LineageRow {
    pub direction: Direction,
    /// How many steps away.
    pub steps: u32,
    pub commit: CommitId,
    /// The dataset whose history has it; None where no ref leads there any more.
    pub dataset: Option<String>,
    /// None where the commit is gone.
    pub time_ms: Option<i64>,
    pub message: String,
    pub inputs: Vec<CommitId>,
    pub job: Option<String>,
    pub image: Option<String>,
    pub code: Option<String>,
}

/// All commits that refs lead to, and the dataset of each.
type Known = HashMap<CommitId, (DatasetName, Arc<Commit>)>;

impl Catalog {
    /// Follows a commit's lineage both ways; the nearest first.
    pub async fn lineage(&self, rev: &Revision) -> Result<Vec<LineageRow>, CatalogError> {
        let id = self.resolve(rev).await?;
        let known = self.all_commits().await?;
        let mut users: BTreeMap<CommitId, BTreeSet<CommitId>> = BTreeMap::new();
        for (user, (_, body)) in &known {
            for input in &body.lineage.inputs {
                users.entry(*input).or_default().insert(*user);
            }
        }
        let mut rows = Vec::new();
        let mut seen = BTreeSet::from([id]);
        let mut todo = VecDeque::from([(Direction::Itself, 0u32, id)]);
        while let Some((direction, steps, commit)) = todo.pop_front() {
            let row = self.lineage_row(&known, direction, steps, commit).await?;
            if direction != Direction::Output {
                let inputs = row.inputs.iter().filter(|input| seen.insert(**input));
                todo.extend(inputs.map(|input| (Direction::Input, steps + 1, *input)));
            }
            if direction != Direction::Input {
                let outputs = users.get(&commit).into_iter().flatten().filter(|user| seen.insert(**user));
                todo.extend(outputs.map(|user| (Direction::Output, steps + 1, *user)));
            }
            rows.push(row);
        }
        rows.sort_by_key(|row| match row.direction {
            // The first sources first, the last results last.
            Direction::Input => (row.direction, u32::MAX - row.steps),
            Direction::Itself | Direction::Output => (row.direction, row.steps),
        });
        Ok(rows)
    }

    async fn lineage_row(
        &self,
        known: &Known,
        direction: Direction,
        steps: u32,
        commit: CommitId,
    ) -> Result<LineageRow, CatalogError> {
        let (dataset, body) = match known.get(&commit) {
            Some((dataset, body)) => (Some(dataset.as_str().to_owned()), Some(body.clone())),
            // No ref leads to it: gc keeps it all the same as long as an output needs it.
            None => (None, self.commit(&commit).await.ok()),
        };
        let (time_ms, message) =
            body.as_ref().map_or((None, String::new()), |body| (Some(body.time_ms), body.message.clone()));
        let lineage = body.map(|body| body.lineage.clone()).unwrap_or_default();
        let (inputs, job, image, code) = (lineage.inputs, lineage.job, lineage.image, lineage.code);
        Ok(LineageRow { direction, steps, commit, dataset, time_ms, message, inputs, job, image, code })
    }

    /// Reads all commits that refs of any dataset lead to.
    async fn all_commits(&self) -> Result<Known, CatalogError> {
        let mut known = Known::new();
        for dataset in self.refs.datasets().await.map_err(CatalogError::Refs)? {
            let refs = match self.refs.list(&dataset).await {
                Ok(refs) => refs,
                // It was removed meanwhile.
                Err(RefError::NoDataset { .. }) => continue,
                Err(error) => return Err(CatalogError::Refs(error)),
            };
            let heads = refs.iter().flat_map(|state| &state.heads).map(|head| head.commit);
            let mut next: BTreeSet<CommitId> = heads.filter(|head| !known.contains_key(head)).collect();
            while !next.is_empty() {
                let read = stream::iter(std::mem::take(&mut next))
                    .map(|id| async move { self.commit(&id).await.map(|body| (id, body)) });
                let bodies: Vec<(CommitId, Arc<Commit>)> = read.buffer_unordered(PARALLEL).try_collect().await?;
                for (id, body) in bodies {
                    next.extend(body.parents.iter().copied());
                    known.insert(id, (dataset.clone(), body));
                }
                next.retain(|id| !known.contains_key(id));
            }
        }
        Ok(known)
    }
}
