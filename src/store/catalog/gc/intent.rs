//! Intents: `intents/<id>` says that somebody writes to the lake now, so gc leaves new objects alone.
//!
//! Put before anything is looked up or sent, put again every five minutes, removed at the end. The
//! store's own time of the last put says whether its writer is still alive.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::format::refs::DatasetName;
use crate::store::catalog::{Catalog, puts};
use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{Lake, LakeError, get_all};

/// Where intents lie.
pub const INTENTS_PREFIX: &str = "intents/";
const REFRESH_EVERY: Duration = Duration::from_secs(300);
const INTENT_LEN_MAX: u64 = 64 << 10;

/// What the object says. Only what gc needs has to be there.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IntentBody {
    pub format: u32,
    pub push: String,
    pub dataset: String,
    /// Who writes: `user@host`.
    #[serde(default)]
    pub by: String,
    /// Unix times in milliseconds of the writer's clock.
    pub start_ms: i64,
    pub refreshed_ms: i64,
}

/// A running import's intent; refreshed until it is dropped.
#[derive(Debug)]
pub(in crate::store::catalog) struct Intent {
    lake: Arc<dyn Lake>,
    key: String,
    refresher: JoinHandle<()>,
}

impl Intent {
    pub(in crate::store::catalog) async fn begin(catalog: &Catalog, dataset: &DatasetName) -> Result<Self, LakeError> {
        let now_ms = jiff::Timestamp::now().as_millisecond();
        let id = uuid::Uuid::new_v4().simple().to_string();
        let mut body = IntentBody {
            format: 1,
            push: id.clone(),
            dataset: dataset.as_str().to_owned(),
            by: catalog.by.clone(),
            start_ms: now_ms,
            refreshed_ms: now_ms,
        };
        let key = format!("{INTENTS_PREFIX}{id}");
        let lake = catalog.lake.clone();
        write(lake.as_ref(), &key, &body).await?;
        let (task_lake, task_key) = (lake.clone(), key.clone());
        let refresher = tokio::spawn(async move {
            loop {
                tokio::time::sleep(REFRESH_EVERY).await;
                body.refreshed_ms = jiff::Timestamp::now().as_millisecond();
                if let Err(error) = write(task_lake.as_ref(), &task_key, &body).await {
                    tracing::warn!(%error, "the intent could not be refreshed");
                }
            }
        });
        Ok(Self { lake, key, refresher })
    }

    /// Removes the intent: everything it protected is referred to.
    pub(in crate::store::catalog) async fn end(self) -> Result<(), LakeError> {
        self.refresher.abort();
        with_retry(&RetryPolicy::default(), || self.lake.delete(&self.key)).await
    }
}

impl Drop for Intent {
    fn drop(&mut self) {
        self.refresher.abort();
    }
}

async fn write(lake: &dyn Lake, key: &str, body: &IntentBody) -> Result<(), LakeError> {
    let bytes = serde_json::to_vec(body).expect("an intent is plain data");
    puts::put(lake, key, bytes.into()).await
}

/// An intent as gc sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SeenIntent {
    pub key: String,
    pub by: String,
    pub dataset: String,
    pub start_ms: i64,
    /// The store's time of the last refresh.
    pub refreshed_ms: i64,
}

/// Lists the intents. One that cannot be read counts from its store's time on: gc is careful.
pub(super) async fn list(lake: &dyn Lake) -> Result<Vec<SeenIntent>, LakeError> {
    let mut seen = Vec::new();
    let mut page = None;
    loop {
        let listed = with_retry(&RetryPolicy::default(), || lake.list(INTENTS_PREFIX, page.clone())).await?;
        for object in listed.objects {
            let bytes = match get_all(lake, &object.key, INTENT_LEN_MAX).await {
                Ok(bytes) => bytes,
                // It ended meanwhile.
                Err(LakeError::NotFound { .. }) => continue,
                Err(error) => return Err(error),
            };
            let body: Option<IntentBody> = serde_json::from_slice(&bytes).ok();
            seen.push(SeenIntent {
                by: body.as_ref().map_or_else(String::new, |body| body.by.clone()),
                dataset: body.as_ref().map_or_else(String::new, |body| body.dataset.clone()),
                // Unreadable: as if it had always been there.
                start_ms: body.map_or(i64::MIN, |body| body.start_ms),
                refreshed_ms: object.modified_ms,
                key: object.key,
            });
        }
        page = listed.next;
        if page.is_none() {
            return Ok(seen);
        }
    }
}
