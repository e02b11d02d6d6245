//! What the daemon does for pods: says what a revision is and whether a pod may have it, and shows its mounts at
//! their directories too. The caller keeps the books (`docs/formats/csi.md`): a bound directory is in no table here.
//!
//! The keeper makes and takes away the binds, in the host's mount namespace, as it does with the mounts.

use std::path::Path;

use nix::errno::Errno;

use crate::format::refs::Revision;
use crate::fs::keeper::KeeperError;

use super::api::{BindRequest, MountState, ResolveInfo, ResolveRequest, UnbindRequest};
use super::daemon::{Daemon, blocking};
use super::error::NodeError;

impl Daemon {
    /// Resolves a revision, for a pod that may have it.
    pub(super) async fn resolve(&self, request: ResolveRequest) -> Result<ResolveInfo, NodeError> {
        let revision = Revision::parse(&request.revision)?;
        if let Some(pod) = &request.pod {
            for right in request.rights {
                self.permit_pod(pod, &revision.dataset, right).await?;
            }
        }
        let commit = self.catalog().await?.resolve(&revision).await?;
        Ok(ResolveInfo { dataset: revision.dataset.as_str().to_owned(), commit })
    }

    /// Shows a mount at another directory too.
    pub(super) async fn bind(&self, request: BindRequest) -> Result<(), NodeError> {
        let BindRequest { dir, target } = request;
        refuse_relative(&target)?;
        let mounts = self.mounts();
        if !mounts.iter().any(|mount| mount.dir == dir && mount.state == MountState::Mounted) {
            return Err(NodeError::NotMounted { dir });
        }
        let keeper = self.keeper().await?;
        Ok(blocking("showing a mount elsewhere", move || keeper.bind(&dir, &target)).await??)
    }

    /// Takes a mount away from a directory where it was shown too.
    pub(super) async fn unbind(&self, request: UnbindRequest) -> Result<(), NodeError> {
        let UnbindRequest { target, force } = request;
        refuse_relative(&target)?;
        // A mount of the table is ended by umount: it has a lease, and a row.
        if self.mounts().iter().any(|mount| mount.dir == target) {
            let what = format!("{} is a mount of its own: `larder umount` ends it", target.display());
            return Err(NodeError::Wrong { what });
        }
        let keeper = self.keeper().await?;
        let dir = target.clone();
        match blocking("unmounting", move || keeper.unmount(&target, force)).await? {
            Err(KeeperError::Refused { errno, .. }) if errno == Errno::EINVAL as i32 => {
                Err(NodeError::NotMounted { dir })
            }
            other => Ok(other?),
        }
    }
}

fn refuse_relative(target: &Path) -> Result<(), NodeError> {
    if target.is_absolute() {
        return Ok(());
    }
    let hint = "name the directory from the root".to_owned();
    Err(NodeError::Dir { dir: target.to_owned(), why: "is not absolute", hint })
}
