//! Holds: hard links of a mount's packs, for mounts that go on without a daemon.
//!
//! A hold never expires: whatever happens to leases, the mount's handles stay valid. A clean release
//! drops it, or `larder tier forget-node` for a node that will not come back.

use crate::format::ids::{NodeId, PackId};
use crate::store::tier::Tier;
use crate::store::tier::error::TierError;
use crate::store::tier::io::TierIo;
use crate::store::tier::layout::{self, CommitKey, HOLDS};
use crate::store::tier::real::RealIo;

/// What `holds/<node>/<mount>/hold` says.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct HoldText {
    pub format: u32,
    #[serde(flatten)]
    pub key: CommitKey,
}

/// The hard links of one mount.
#[derive(Debug)]
pub struct Hold<I: TierIo = RealIo> {
    tier: Tier<I>,
    dir: String,
}

impl<I: TierIo> Tier<I> {
    /// Holds packs of a commit for a mount of this node; an existing hold of that name is continued.
    pub fn hold(&self, key: &CommitKey, mount: &str) -> Result<Hold<I>, TierError> {
        let dir = layout::hold_dir(&self.core.node, mount)?;
        let text = serde_json::to_vec(&HoldText { format: 1, key: *key }).expect("plain fields");
        self.core.write_new(&format!("{dir}/hold"), &text)?;
        Ok(Hold { tier: self.clone(), dir })
    }

    /// Drops one hold of this node.
    pub fn release_hold(&self, mount: &str) -> Result<(), TierError> {
        self.drop_hold(&layout::hold_dir(&self.core.node, mount)?)
    }

    /// Lists the holds of this node, by the names of their mounts.
    pub fn own_holds(&self) -> Result<Vec<String>, TierError> {
        let listed = self.core.list(&format!("{HOLDS}/{}", self.core.node))?.unwrap_or_default();
        Ok(listed.into_iter().map(|mount| mount.name).collect())
    }

    /// Drops everything that a node left here: for one that will not come back.
    pub fn forget_node(&self, node: &NodeId) -> Result<(), TierError> {
        let dir = format!("{HOLDS}/{node}");
        for mount in self.core.list(&dir)?.unwrap_or_default() {
            self.drop_hold(&format!("{dir}/{}", mount.name))?;
        }
        let _ = self.core.io.rmdir(&dir);
        let prefix = format!("{node}.");
        for key in self.core.commit_keys()? {
            let leases = layout::leases_dir(&key);
            for lease in self.core.list(&leases)?.unwrap_or_default() {
                if lease.name.starts_with(&prefix) {
                    self.core.remove(&format!("{leases}/{}", lease.name))?;
                }
            }
        }
        self.core.remove(&layout::node_file(node)).map(drop)
    }

    /// Removes the leases of this node's processes that have ended, mounts as well: for a daemon that
    /// has made its mounts again. Gives how many these were.
    pub fn forget_ended(&self) -> Result<usize, TierError> {
        let core = &self.core;
        let mut removed = 0;
        for key in core.commit_keys()? {
            let leases = layout::leases_dir(&key);
            for listed in core.list(&leases)?.unwrap_or_default() {
                let path = format!("{leases}/{}", listed.name);
                let own = layout::parse_lease(&listed.name).filter(|(node, _)| *node == core.node);
                if let Some((_, id)) = own
                    && core.has_ended(&path, &id)?
                    && core.remove(&path)?
                {
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }

    /// The links first: as long as `hold` is there, the commit is not evicted.
    fn drop_hold(&self, dir: &str) -> Result<(), TierError> {
        for listed in self.core.list(dir)?.unwrap_or_default() {
            if listed.name != "hold" {
                self.core.remove(&format!("{dir}/{}", listed.name))?;
            }
        }
        self.core.remove(&format!("{dir}/hold"))?;
        let _ = self.core.io.rmdir(dir);
        Ok(())
    }
}

impl<I: TierIo> Hold<I> {
    /// Adds a pack. False: the tier does not have it.
    pub fn add(&self, pack: &PackId) -> Result<bool, TierError> {
        let to = format!("{}/{pack}", self.dir);
        let object = layout::object(pack);
        match self.tier.core.io.link(&object, &to) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                let error = TierError::io("hold", &object, error);
                if error.is_gone() { Ok(false) } else { Err(error) }
            }
            _ => Ok(true),
        }
    }

    /// Drops the link of one pack, so that it can be made again.
    pub fn drop_link(&self, pack: &PackId) -> Result<(), TierError> {
        self.tier.core.remove(&format!("{}/{pack}", self.dir)).map(drop)
    }

    /// Gives the path of a pack's link.
    pub fn path(&self, pack: &PackId) -> std::path::PathBuf {
        self.tier.core.dir.join(&self.dir).join(pack.to_string())
    }

    /// Drops the links.
    pub fn release(self) -> Result<(), TierError> {
        self.tier.drop_hold(&self.dir)
    }
}
