//! Small objects on their way to the lake, many at a time.

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinSet;

use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{Lake, LakeError, PutIf};
use crate::store::meta::MetaStore;

use super::gc::{CondemnedSet, Relied};

/// How many objects are on their way at a time.
const PARALLEL: usize = 32;

/// Puts objects in parallel; the first error stops it.
#[derive(Debug)]
pub(super) struct Puts {
    lake: Arc<dyn Lake>,
    meta: MetaStore,
    condemned: CondemnedSet,
    running: JoinSet<Result<(), LakeError>>,
}

impl Puts {
    pub(super) fn new(lake: Arc<dyn Lake>, meta: MetaStore, condemned: CondemnedSet) -> Self {
        Self { lake, meta, condemned, running: JoinSet::new() }
    }

    /// Puts an object, and keeps it on this node's disk too; waits while too many are on their way.
    pub(super) async fn put(&mut self, key: String, bytes: Vec<u8>) -> Result<(), LakeError> {
        self.meta.keep(&key, &bytes);
        self.put_only(vec![(key, bytes.into())]).await
    }

    /// Puts objects one after the other (who sees the last finds the others).
    pub(super) async fn put_only(&mut self, objects: Vec<(String, Bytes)>) -> Result<(), LakeError> {
        while self.running.len() >= PARALLEL {
            self.join_one().await?;
        }
        let (lake, condemned) = (self.lake.clone(), self.condemned.clone());
        self.running.spawn(async move {
            for (key, bytes) in objects {
                save(&condemned, &key).await?;
                put(lake.as_ref(), &key, bytes).await?;
            }
            Ok(())
        });
        Ok(())
    }

    /// Waits until all are there.
    pub(super) async fn all(&mut self) -> Result<(), LakeError> {
        while !self.running.is_empty() {
            self.join_one().await?;
        }
        Ok(())
    }

    async fn join_one(&mut self) -> Result<(), LakeError> {
        match self.running.join_next().await {
            Some(Ok(result)) => result,
            Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Some(Err(_)) | None => Ok(()),
        }
    }
}

/// Keeps gc from deleting a key that is put or relied on now; says whether it may be gone already.
pub(super) async fn save(condemned: &CondemnedSet, key: &str) -> Result<Relied, LakeError> {
    match condemned.contains(key) {
        true => condemned.rely_on(key).await,
        false => Ok(Relied::Safe),
    }
}

/// Puts one object, trying again what passes.
pub(super) async fn put(lake: &dyn Lake, key: &str, bytes: Bytes) -> Result<(), LakeError> {
    with_retry(&RetryPolicy::default(), || lake.put(key, bytes.clone(), PutIf::Always)).await.map(|_| ())
}
