//! The directory that somebody wants to mount on, looked at apart from everybody else's work: it may be on a file server
//! that does not answer, and whoever looks at it then hangs.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::api::MountRequest;
use super::daemon::{Daemon, blocking};
use super::error::NodeError;
use super::mounting::{Caller, check_dir};

/// Directories that are looked at at the same time, and how long that may take.
static LOOKS: Semaphore = Semaphore::const_new(32);
const LOOK_TIMEOUT: Duration = Duration::from_secs(60);

impl Daemon {
    /// Looks whether the directory is free and the caller's to mount on; gives its own path.
    pub(super) async fn look_at_dir(
        &self,
        request: MountRequest,
        caller: Caller,
    ) -> Result<(MountRequest, PathBuf), NodeError> {
        let (daemon, dir) = (self.clone(), request.dir.clone());
        let looked = async {
            // Kept by the thread: one that hangs is not replaced by another without end.
            let turn = LOOKS.acquire().await.ok();
            let looked = blocking("looking at the directory", move || {
                let _turn = turn;
                daemon.refuse_taken(&request.dir)?;
                let dir = check_dir(&request, caller)?;
                Ok::<_, NodeError>((request, dir))
            });
            looked.await?
        };
        let late = |_| {
            let hint = "it may be on a file server that is away: look at it, then mount again".to_owned();
            Err(NodeError::Dir { dir, why: "does not answer", hint })
        };
        tokio::time::timeout(LOOK_TIMEOUT, looked).await.unwrap_or_else(late)
    }
}
