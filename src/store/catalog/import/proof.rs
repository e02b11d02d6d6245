//! Proofs: what the contents of an imported pack turned out to be when they were first read.
//!
//! A pin names bytes by version or ETag; the first reader learns their digests and writes them down
//! once, by exclusive create. From then on every reader checks against them: an object whose bytes
//! changed under an unchanged pin is found. Where the credentials may not write, the proof goes to
//! the tier (see [`crate::store::fetch`]).

use crate::format::ids::PackId;
use crate::format::pack::Proof;
use crate::format::paths::{PackPart, pack_key};
use crate::store::lake::{Lake, LakeError, PutIf, get_all};

/// What no proof exceeds.
const PROOF_LEN_MAX: u64 = 256 << 20;

/// Why a proof could not be fixed.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// Another reader got other bytes: one of the two was lied to.
    #[error(
        "pack {pack}: content {position} has other bytes now than when it was first read; its object was changed without a new version or ETag"
    )]
    Conflict { pack: PackId, position: usize },
    #[error("pack {pack}: its proof in the lake is damaged")]
    Damaged {
        pack: PackId,
        #[source]
        source: crate::format::codec::DecodeError,
    },
    #[error(transparent)]
    Lake(#[from] LakeError),
}

/// Gives the proof of a pack, where there is one.
pub async fn load(lake: &dyn Lake, pack: &PackId) -> Result<Option<Proof>, ProofError> {
    let key = pack_key(pack, PackPart::Proof);
    let bytes = match get_all(lake, &key, PROOF_LEN_MAX).await {
        Ok(bytes) => bytes,
        Err(LakeError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match Proof::decode(&bytes) {
        Ok(proof) if proof.pack == *pack => Ok(Some(proof)),
        Ok(proof) => Err(ProofError::Conflict { pack: proof.pack, position: 0 }),
        Err(source) => Err(ProofError::Damaged { pack: *pack, source }),
    }
}

/// Fixes what was found: the first one wins, and whoever found other bytes gets an error.
pub async fn fix(lake: &dyn Lake, found: &Proof) -> Result<Proof, ProofError> {
    let key = pack_key(&found.pack, PackPart::Proof);
    match lake.put(&key, found.encode().into(), PutIf::Absent).await {
        Ok(_) => return Ok(found.clone()),
        Err(LakeError::Precondition { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let Some(fixed) = load(lake, &found.pack).await? else {
        return Ok(found.clone());
    };
    let differs = |(old, new): (&Option<_>, &Option<_>)| old.is_some() && new.is_some() && old != new;
    match fixed.digests.iter().zip(&found.digests).position(differs) {
        Some(position) => Err(ProofError::Conflict { pack: found.pack, position }),
        None => Ok(fixed),
    }
}
