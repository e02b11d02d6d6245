//! Reads and changes the grants of a dataset (`docs/formats/grants.md`).
//!
//! The node keeps the last list it has seen: it counts while the lake is away.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;

use super::open::{Catalog, CatalogError};
use super::refs::{next_id, now_ms};
use crate::format::codec::DecodeError;
use crate::format::grants::{GRANTS_FORMAT, GRANTS_LEN_MAX, Grant, Grants, GrantsEntry};
use crate::format::ids::LakeId;
use crate::format::refs::DatasetName;
use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{LakeError, PutIf, get_all, list_all};

/// How long the lake may take where this node knows a list.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a listing whose entries vanish is made again.
const TRIES_MAX: u32 = 10;

/// Why the grants of a dataset are not known, so that nobody has any.
#[derive(Debug, thiserror::Error)]
pub enum GrantsError {
    #[error("{key}: cannot be read as grants; `larder grant --clear` replaces it")]
    Damaged {
        key: String,
        #[source]
        source: DecodeError,
    },
    #[error("the grants of {dataset} change all the time; try again when the others are done")]
    Busy { dataset: String },
    #[error("the grants of {dataset} cannot be asked for, and this node has never seen them")]
    Away {
        dataset: String,
        #[source]
        source: LakeError,
    },
    #[error("cannot write the grants of {dataset}")]
    Write {
        dataset: String,
        #[source]
        source: LakeError,
    },
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

/// What was found of a dataset's grants.
#[derive(Debug, Default)]
struct Found {
    /// All entries, the oldest first.
    ids: Vec<String>,
    grants: Grants,
    /// Named by no other, the oldest first.
    heads: Vec<String>,
}

fn prefix_of(dataset: &DatasetName) -> String {
    format!("datasets/{dataset}/grants/")
}

fn kept_key(lake: &LakeId, dataset: &DatasetName) -> String {
    format!("local/{lake}/grants/{dataset}")
}

impl Catalog {
    /// Gives the grants of a dataset: the lake's, or with the lake away those that this node saw last.
    pub async fn grants(&self, dataset: &DatasetName) -> Result<Grants, GrantsError> {
        let key = kept_key(&self.lake_id, dataset);
        let kept: Option<Grants> = self.meta.kept(&key).and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let asked = self.find_grants(dataset);
        let asked = match &kept {
            Some(_) => tokio::time::timeout(ASK_TIMEOUT, asked).await.ok(),
            None => Some(asked.await),
        };
        match (asked, kept) {
            (Some(Ok(found)), kept) => {
                if kept.as_ref() != Some(&found.grants)
                    && let Ok(bytes) = serde_json::to_vec(&found.grants)
                {
                    self.meta.keep(&key, &bytes);
                }
                Ok(found.grants)
            }
            (Some(Err(GrantsError::Away { .. })) | None, Some(kept)) => {
                tracing::warn!(%dataset, "the lake is away; the grants that this node saw last count");
                Ok(kept)
            }
            (Some(Err(error)), _) => Err(error),
            (None, None) => Err(GrantsError::Busy { dataset: dataset.to_string() }),
        }
    }

    /// Changes the grants of a dataset, which must exist; gives the new list.
    pub async fn change_grants(
        &self,
        dataset: &DatasetName,
        change: impl FnOnce(Vec<Grant>) -> Vec<Grant>,
    ) -> Result<Vec<Grant>, GrantsError> {
        if self.refs.dataset(dataset).await.map_err(CatalogError::Refs)?.is_none() {
            let url = self.lake.url();
            let missing = super::refs::RefError::NoDataset { dataset: dataset.to_string(), url };
            return Err(self.explain(missing).await.into());
        }
        // A list that nobody can read is replaced: else nobody could open the dataset again.
        let found = match self.find_grants(dataset).await {
            Err(GrantsError::Damaged { .. }) => Found { ids: self.grant_ids(dataset).await?, ..Found::default() },
            found => found?,
        };
        let mut lists = found.grants.heads.into_iter();
        // Of several heads, the newest is what people see as the last change.
        let before = lists.next_back().unwrap_or_default();
        let entry = GrantsEntry {
            format: GRANTS_FORMAT,
            grants: change(before),
            supersedes: found.ids.clone(),
            time_ms: now_ms(),
            by: self.by.clone(),
        };
        let failed = |source| GrantsError::Write { dataset: dataset.to_string(), source };
        let prefix = prefix_of(dataset);
        let key = format!("{prefix}{}", next_id(&found.ids));
        let body = Bytes::from(entry.encode());
        let policy = RetryPolicy::default();
        with_retry(&policy, || self.lake.put(&key, body.clone(), PutIf::Always)).await.map_err(failed)?;
        for old in found.ids.iter().filter(|id| !found.heads.contains(id)) {
            if let Err(error) = self.lake.delete(&format!("{prefix}{old}")).await {
                tracing::debug!(%error, "an old entry of the grants stays; nobody reads it");
            }
        }
        Ok(entry.grants)
    }

    async fn grant_ids(&self, dataset: &DatasetName) -> Result<Vec<String>, GrantsError> {
        let prefix = prefix_of(dataset);
        let away = |source| GrantsError::Away { dataset: dataset.to_string(), source };
        let listed = list_all(&*self.lake, &prefix).await.map_err(away)?;
        let ids = listed.iter().filter_map(|object| object.key.strip_prefix(&prefix));
        let mut ids: Vec<String> = ids.filter(|id| !id.contains('/')).map(str::to_owned).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    async fn find_grants(&self, dataset: &DatasetName) -> Result<Found, GrantsError> {
        for _ in 0..TRIES_MAX {
            let ids = self.grant_ids(dataset).await?;
            if let Some(found) = self.read_grants(dataset, ids).await? {
                return Ok(found);
            }
        }
        Err(GrantsError::Busy { dataset: dataset.to_string() })
    }

    /// Reads the entries that no newer one names. None: one of them was deleted meanwhile.
    async fn read_grants(&self, dataset: &DatasetName, ids: Vec<String>) -> Result<Option<Found>, GrantsError> {
        let prefix = prefix_of(dataset);
        let mut covered = BTreeSet::new();
        let mut read = Vec::new();
        for id in ids.iter().rev() {
            if covered.contains(id) {
                continue;
            }
            let key = format!("{prefix}{id}");
            let bytes = match get_all(&*self.lake, &key, GRANTS_LEN_MAX as u64).await {
                Err(LakeError::NotFound { .. }) => return Ok(None),
                bytes => bytes.map_err(|source| GrantsError::Away { dataset: dataset.to_string(), source })?,
            };
            let entry = GrantsEntry::decode(&bytes).map_err(|source| GrantsError::Damaged { key, source })?;
            // One that names itself would leave no list at all, and open the dataset.
            covered.extend(entry.supersedes.iter().filter(|old| *old != id).cloned());
            read.push((id.clone(), entry));
        }
        let heads = read.into_iter().rev().filter(|(id, _)| !covered.contains(id));
        let (heads, lists) = heads.map(|(id, entry)| (id, entry.grants)).unzip();
        Ok(Some(Found { ids, grants: Grants { heads: lists }, heads }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::grants::{Principal, Right};
    use crate::store::catalog::testing::bench;
    use crate::testkit::faulty_lake::{Fault, Op, Rule};

    fn grant(who: &str, rights: &[Right]) -> Grant {
        Grant { who: who.parse().expect(who), rights: rights.iter().copied().collect() }
    }

    fn uid(uid: u32) -> Principal {
        Principal { uid, ..Principal::default() }
    }

    fn xray() -> DatasetName {
        DatasetName::parse("xray").expect("a name")
    }

    #[tokio::test]
    async fn every_node_sees_the_list_that_was_written_last() {
        let bench = bench().await;
        bench.catalog.refs.ensure_dataset(&xray()).await.unwrap();
        assert_eq!(bench.catalog.grants(&xray()).await.unwrap(), Grants::default());
        for who in ["user:1", "user:2", "user:3"] {
            bench.catalog.change_grants(&xray(), |_| vec![grant(who, &[Right::Mount])]).await.unwrap();
        }
        let (other, _dir) = bench.fresh().await;
        let seen = other.grants(&xray()).await.unwrap();
        assert!(seen.allow(&uid(3), Right::Mount) && !seen.allow(&uid(1), Right::Mount));
        let entries = bench.memory.keys().iter().filter(|key| key.contains("/grants/")).count();
        assert!(entries <= 2, "old entries are deleted: {entries}");
        bench.catalog.change_grants(&xray(), |_| Vec::new()).await.unwrap();
        assert!(other.grants(&xray()).await.unwrap().allow(&uid(9), Right::Push), "an empty list opens it again");
        bench.catalog.refs.remove_dataset(&xray()).await.unwrap();
        assert!(!bench.memory.keys().iter().any(|key| key.contains("/grants/")), "they go with the dataset");
    }

    #[tokio::test]
    async fn two_writers_that_raced_close_rather_than_open() {
        let bench = bench().await;
        bench.catalog.refs.ensure_dataset(&xray()).await.unwrap();
        for (id, who) in [("0001", "user:1"), ("0002", "user:2")] {
            let grants = vec![grant(who, &Right::ALL), grant("user:3", &[Right::Mount])];
            let entry = GrantsEntry { format: 1, grants, supersedes: vec![], time_ms: 1, by: String::new() };
            let key = format!("datasets/xray/grants/{id}");
            bench.catalog.lake.put(&key, entry.encode().into(), PutIf::Always).await.unwrap();
        }
        let seen = bench.catalog.grants(&xray()).await.unwrap();
        assert!(!seen.allow(&uid(1), Right::Mount) && !seen.allow(&uid(2), Right::Mount));
        assert!(seen.allow(&uid(3), Right::Mount));
        bench.catalog.change_grants(&xray(), |list| list).await.unwrap();
        let seen = bench.catalog.grants(&xray()).await.unwrap();
        assert!(seen.allow(&uid(2), Right::Mount), "the next change settles it");
    }

    #[tokio::test]
    async fn an_entry_that_names_itself_opens_nothing() {
        let bench = bench().await;
        bench.catalog.refs.ensure_dataset(&xray()).await.unwrap();
        let (grants, supersedes) = (vec![grant("user:1", &Right::ALL)], vec!["0001".to_owned()]);
        let entry = GrantsEntry { format: 1, grants, supersedes, time_ms: 1, by: String::new() };
        bench.catalog.lake.put("datasets/xray/grants/0001", entry.encode().into(), PutIf::Always).await.unwrap();
        let seen = bench.catalog.grants(&xray()).await.unwrap();
        assert!(seen.allow(&uid(1), Right::Mount) && !seen.allow(&uid(2), Right::Mount));
    }

    #[tokio::test]
    async fn with_the_lake_away_what_was_seen_last_counts_and_what_was_never_seen_is_refused() {
        let bench = bench().await;
        let other = DatasetName::parse("other").expect("a name");
        bench.catalog.refs.ensure_dataset(&xray()).await.unwrap();
        bench.catalog.change_grants(&xray(), |_| vec![grant("user:1", &[Right::Mount])]).await.unwrap();
        bench.catalog.grants(&xray()).await.unwrap();
        // What passes is waited for (a lake that is away is tried for half a minute): the last list counts then.
        bench.faulty.rule(Rule::every(Op::List, Fault::Hang));
        let seen = bench.catalog.grants(&xray()).await.unwrap();
        assert!(seen.allow(&uid(1), Right::Mount) && !seen.allow(&uid(2), Right::Mount));
        bench.faulty.heal();
        bench.faulty.rule(Rule::every(Op::List, Fault::Denied));
        assert!(bench.catalog.grants(&xray()).await.unwrap().allow(&uid(1), Right::Mount));
        assert!(matches!(bench.catalog.grants(&other).await, Err(GrantsError::Away { .. })));
    }

    #[tokio::test]
    async fn a_list_that_cannot_be_read_gives_nobody_anything_until_it_is_replaced() {
        let bench = bench().await;
        bench.catalog.refs.ensure_dataset(&xray()).await.unwrap();
        for body in ["", "{}", "[]", r#"{"format":9}"#, "\u{0}\u{1}"] {
            let put = bench.catalog.lake.put("datasets/xray/grants/0001", body.into(), PutIf::Always);
            put.await.unwrap();
            let seen = bench.catalog.grants(&xray()).await;
            assert!(matches!(seen, Err(GrantsError::Damaged { .. })), "{body}: {seen:?}");
        }
        bench.catalog.change_grants(&xray(), |_| vec![grant("user:1", &[Right::Mount])]).await.unwrap();
        assert!(bench.catalog.grants(&xray()).await.unwrap().allow(&uid(1), Right::Mount));
    }
}
