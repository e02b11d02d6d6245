//! Which of several tiers a commit is mounted from and cached in.
//!
//! 1. The one that was named.
//! 2. The one that the configuration names for the dataset.
//! 3. The default one; but where that does not have the commit and another one has (it was moved there,
//!    or cached there by somebody), that one.

use std::time::Duration;

use crate::store::tier::CommitKey;

use super::daemon::{Daemon, blocking};
use super::error::NodeError;

/// How long a tier may take to say whether it has a commit.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

impl Daemon {
    /// Gives the tier that was named, or is configured for the dataset.
    pub(super) fn named_tier(&self, asked: Option<&String>, dataset: &str) -> Option<String> {
        let of_dataset = || self.inner.config.dataset.get(dataset).and_then(|section| section.tier.clone());
        asked.cloned().or_else(of_dataset)
    }

    /// Chooses a tier for a commit where none is named.
    pub(super) async fn choose_tier(&self, key: &CommitKey) -> Result<String, NodeError> {
        let config = &self.inner.config;
        let default = config.default_tier.clone().ok_or(NodeError::NoTier)?;
        if config.tier.len() < 2 || self.has(&default, key).await {
            return Ok(default);
        }
        for name in config.tier.keys().filter(|name| **name != default) {
            if self.has(name, key).await {
                return Ok(name.clone());
            }
        }
        Ok(default)
    }

    /// Says whether a tier has a record of a commit that is not about to leave. One that does not answer
    /// in time has not.
    async fn has(&self, name: &str, key: &CommitKey) -> bool {
        let key = *key;
        let asked = async {
            let tier = self.tier(name).await.ok()?.tier?;
            blocking("asking a tier", move || tier.is_cached(&key)).await.ok()?.ok()
        };
        matches!(tokio::time::timeout(ASK_TIMEOUT, asked).await, Ok(Some(true)))
    }
}
