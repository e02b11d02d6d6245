//! The scheduler's side of the data: commits are mounted and warmed by the node's daemon, and made by
//! `larder push`, all with the configuration of the scheduler.

use std::path::Path;
use std::time::Duration;

use crate::cli::context::DaemonReach;
use crate::format::grants::Right;
use crate::node::api::{FillRequest, MountRequest, MountState, PermitRequest, UmountRequest};
use crate::node::client::{ClientError, NodeClient};
use crate::node::mounting::Caller;
use crate::scheduler::job::Submitter;
use crate::scheduler::lake_side::{DataError, LakeSide, Need, NewCommit};

/// How often a mount is looked at that is being made.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// After how much time a daemon counts as hung. Mounting waits for the lake, which has its own limits below this.
const CALL_TIMEOUT: Duration = Duration::from_secs(300);

/// The daemon is older than this program, or of another build: it can't be asked for somebody else.
#[derive(Debug, thiserror::Error)]
#[error("the daemon does not say what user {uid} may; replace it with one of this version: `larder daemon upgrade`")]
struct Older {
    uid: u32,
    #[source]
    source: ClientError,
}

fn caller(user: Submitter) -> Caller {
    Caller { uid: user.uid, gid: user.gid }
}

/// A daemon, and how to start it.
#[derive(Debug)]
pub struct DaemonSide {
    pub rt: tokio::runtime::Handle,
    pub reach: DaemonReach,
    /// Arguments that give a command this configuration.
    pub config_args: Vec<String>,
}

impl DaemonSide {
    /// Runs it to its end, or to the time after which a daemon counts as hung.
    fn block_on(&self, what: impl Future<Output = Result<(), DataError>>) -> Result<(), DataError> {
        let bounded = async { tokio::time::timeout(CALL_TIMEOUT, what).await };
        let socket = self.reach.spawn.socket.display();
        match self.rt.block_on(bounded) {
            Ok(done) => done,
            Err(_) => Err(format!("the daemon at {socket} did not answer within {} s", CALL_TIMEOUT.as_secs()).into()),
        }
    }

    async fn client(&self) -> Result<NodeClient, DataError> {
        Ok(self.reach.client().await?)
    }

    async fn permit_now(&self, dataset: &str, need: Need, user: Submitter) -> Result<(), DataError> {
        let right = match need {
            Need::Read => Right::Mount,
            Need::Store => Right::Push,
        };
        let request = PermitRequest { dataset: dataset.to_owned(), right, for_user: Some(caller(user)) };
        match self.client().await?.permit(&request).await {
            Err(source @ ClientError::Refused { status: 400, .. }) => Err(Older { uid: user.uid, source }.into()),
            answered => Ok(answered?),
        }
    }

    async fn mount_now(&self, revision: String, dir: &Path, user: Option<Submitter>) -> Result<(), DataError> {
        let client = self.client().await?;
        loop {
            let mounts = client.mounts().await?;
            match mounts.iter().find(|mount| mount.dir == dir).map(|mount| mount.state) {
                Some(MountState::Mounted) => return Ok(()),
                // By an earlier scheduler, or by a daemon that starts.
                Some(MountState::Mounting) => tokio::time::sleep(LOOK_INTERVAL).await,
                Some(MountState::Failed) => {
                    client.umount(&UmountRequest { dir: dir.to_owned(), force: true }).await?;
                }
                None => break,
            }
        }
        let request = MountRequest {
            revision,
            dir: dir.to_owned(),
            mkdir: true,
            // Jobs run as their submitters, whoever mounts for them.
            allow_other: nix::unistd::geteuid().is_root().then_some(true),
            for_user: user.map(caller),
            ..MountRequest::default()
        };
        client.mount(&request).await?;
        Ok(())
    }

    async fn umount_now(&self, dir: &Path) -> Result<(), DataError> {
        let client = self.client().await?;
        if client.mounts().await?.iter().any(|mount| mount.dir == dir) {
            client.umount(&UmountRequest { dir: dir.to_owned(), force: false }).await?;
        }
        Ok(())
    }

    async fn warm_now(&self, revision: String) -> Result<(), DataError> {
        let request = FillRequest { revision, ..FillRequest::default() };
        match self.client().await?.fill(&request).await {
            Ok(_) => Ok(()),
            // Without a tier there is nothing to warm.
            Err(ClientError::Refused { status: 400, .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl LakeSide for DaemonSide {
    fn permit(&self, dataset: &str, need: Need, user: Submitter) -> Result<(), DataError> {
        self.block_on(self.permit_now(dataset, need, user))
    }

    fn mount(&self, dataset: &str, commit: &str, dir: &Path, user: Option<Submitter>) -> Result<(), DataError> {
        self.block_on(async {
            if let Some(user) = user {
                // What is mounted already is not asked for again.
                self.permit_now(dataset, Need::Read, user).await?;
            }
            self.mount_now(format!("{dataset}@{commit}"), dir, user).await
        })
    }

    fn is_final(&self, error: &DataError) -> bool {
        matches!(error.downcast_ref::<ClientError>(), Some(ClientError::Refused { status: 403 | 404, .. }))
    }

    fn umount(&self, dir: &Path) -> Result<(), DataError> {
        self.block_on(self.umount_now(dir))
    }

    fn warm(&self, dataset: &str, commit: &str) -> Result<(), DataError> {
        self.block_on(self.warm_now(format!("{dataset}@{commit}")))
    }

    fn push(&self, commit: &NewCommit) -> Vec<String> {
        let mut argv = vec![self.reach.spawn.exe.to_string_lossy().into_owned(), "push".to_owned()];
        argv.extend([commit.dir.to_string_lossy().into_owned(), commit.dataset.clone()]);
        let mut add = |flag: &str, value: &str| argv.extend([flag.to_owned(), value.to_owned()]);
        add("--message", &commit.message);
        add("--meta-file", &commit.meta_file.to_string_lossy());
        commit.inputs.iter().for_each(|input| add("--input", input));
        add("--job", &commit.job);
        if let Some(image) = &commit.image {
            add("--image", image);
        }
        if let Some(code) = &commit.code {
            // It may begin with a dash.
            argv.push(format!("--code={code}"));
        }
        if let Some(user) = commit.user {
            argv.extend(["--for".to_owned(), format!("{}:{}", user.uid, user.gid)]);
        }
        argv.extend(["--skip-special", "--json", "--quiet"].map(str::to_owned));
        argv.extend(self.config_args.iter().cloned());
        argv
    }
}
