//! One commit, ready to be navigated.

use std::sync::Arc;

use crate::format::commit::Commit;
use crate::format::ids::{CommitId, LakeId, PlacementId};
use crate::format::placement::PlacementRoot;
use crate::format::refs::DatasetName;
use crate::format::tree::TreeRoot;

/// A commit with the roots of its tree and of one placement. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub dataset: DatasetName,
    pub commit: CommitId,
    pub commit_body: Arc<Commit>,
    pub root: Arc<TreeRoot>,
    pub placement: Arc<PlacementRoot>,
    pub placement_id: PlacementId,
    pub lake_id: LakeId,
}
