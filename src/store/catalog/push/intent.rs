//! The intent: says in the lake that a push is running, so that `gc` leaves its objects alone.
//!
//! `intents/<push id>`, JSON, put before anything is looked up or sent, put again every five minutes,
//! removed at the end. A push that is killed leaves it; the next push of the same directory goes on
//! under the same id.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{Lake, LakeError, PutIf};

/// How often a running push says that it is still there.
const REFRESH_EVERY: Duration = Duration::from_secs(300);

/// What the object says.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IntentBody {
    pub format: u32,
    pub push: String,
    pub dataset: String,
    /// Who pushes: `user@host`.
    pub by: String,
    /// Unix times in milliseconds of the pusher's clock.
    pub start_ms: i64,
    pub refreshed_ms: i64,
}

/// Gives the key of a push's intent.
pub fn intent_key(push: &str) -> String {
    format!("intents/{push}")
}

/// A running push's intent; refreshed until it is dropped.
#[derive(Debug)]
pub(super) struct Intent {
    lake: Arc<dyn Lake>,
    key: String,
    refresher: JoinHandle<()>,
}

impl Intent {
    /// Puts the intent and goes on refreshing it.
    pub(super) async fn begin(lake: Arc<dyn Lake>, rt: &Handle, body: IntentBody) -> Result<Self, LakeError> {
        let key = intent_key(&body.push);
        put(&*lake, &key, &body).await?;
        let (task_lake, task_key) = (lake.clone(), key.clone());
        let refresher = rt.spawn(async move {
            let mut body = body;
            loop {
                tokio::time::sleep(REFRESH_EVERY).await;
                body.refreshed_ms = now_ms();
                if let Err(error) = put(&*task_lake, &task_key, &body).await {
                    tracing::warn!(%error, "the push's intent could not be refreshed");
                }
            }
        });
        Ok(Self { lake, key, refresher })
    }

    /// Removes the intent: everything it protected is referred to, or never was sent.
    pub(super) async fn end(self) -> Result<(), LakeError> {
        self.refresher.abort();
        with_retry(&RetryPolicy::default(), || self.lake.delete(&self.key)).await
    }
}

impl Drop for Intent {
    fn drop(&mut self) {
        self.refresher.abort();
    }
}

async fn put(lake: &dyn Lake, key: &str, body: &IntentBody) -> Result<(), LakeError> {
    let bytes = Bytes::from(serde_json::to_vec(body).expect("an intent is plain data"));
    with_retry(&RetryPolicy::default(), || lake.put(key, bytes.clone(), PutIf::Always)).await.map(|_| ())
}

/// Gives the time of this machine's clock.
pub(super) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
