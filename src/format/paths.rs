//! Keys in the lake (below its prefix) and file names in the tier. One place, so that nothing can
//! be looked for where nothing was put.
//!
//! ```text
//! larder.json                         format version, lake id, ref mode
//! commits/ab/<commit>                 JSON
//! trees/ab/<tree>                     tree root
//! nodes/ab/<block>                    segments and index blocks of trees
//! placements/<tree>/<placement>       placement roots
//! placed/ab/<block>                   blocks of placements
//! packs/ab/<pack>.index .recipe .outboard .proof
//! data/<key>                          bytes of native packs
//! datasets/<name>/dataset.json        exists while the dataset does
//! datasets/<name>/refs/<kind>/<ref>   cas mode
//! datasets/<name>/log/<kind>/<ref>/<entry>   log mode
//! datasets/<name>/grants/<entry>      who may do what
//! datasets/<name>/commits/<commit>    marker: this dataset has that commit (for prefixes, log, reuse)
//! intents/<push id>                   a push is running
//! condemned/<id>                      gc's first phase
//! uses/<commit>/<node>                a node has mounted it (refreshed daily)
//! ```

use crate::format::ids::{BlockId, CommitId, NodeId, PackId, PlacementId, TreeId};

/// The format object at the root of the prefix.
pub const FORMAT_KEY: &str = "larder.json";

fn fan(hex: &str) -> &str {
    hex.get(..2).unwrap_or(hex)
}

pub fn commit_key(id: &CommitId) -> String {
    let hex = id.to_string();
    format!("commits/{}/{hex}", fan(&hex))
}

pub fn tree_key(id: &TreeId) -> String {
    let hex = id.to_string();
    format!("trees/{}/{hex}", fan(&hex))
}

pub fn node_key(id: &BlockId) -> String {
    let hex = id.to_string();
    format!("nodes/{}/{hex}", fan(&hex))
}

pub fn placed_key(id: &BlockId) -> String {
    let hex = id.to_string();
    format!("placed/{}/{hex}", fan(&hex))
}

pub fn placements_prefix(tree: &TreeId) -> String {
    format!("placements/{tree}/")
}

pub fn placement_key(tree: &TreeId, id: &PlacementId) -> String {
    format!("placements/{tree}/{id}")
}

/// A part of a pack's description in the lake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackPart {
    Index,
    Recipe,
    Outboard,
    Proof,
}

pub fn pack_key(id: &PackId, part: PackPart) -> String {
    let hex = id.to_string();
    let suffix = match part {
        PackPart::Index => "index",
        PackPart::Recipe => "recipe",
        PackPart::Outboard => "outboard",
        PackPart::Proof => "proof",
    };
    format!("packs/{}/{hex}.{suffix}", fan(&hex))
}

pub fn data_key(key: &str) -> String {
    format!("data/{key}")
}

pub fn use_key(commit: &CommitId, node: &NodeId) -> String {
    format!("uses/{commit}/{node}")
}
