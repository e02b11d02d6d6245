//! Fixing what an imported pack's contents are: once, by exclusive create, for everybody.
//!
//! The first who has read all of a pack writes the proof to the lake; with read-only credentials,
//! beside the object in the tier. Whoever comes later must have read the same bytes: another digest
//! under the same pin is an error, and such a pack is not published.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use crate::format::ids::ContentDigest;
use crate::format::pack::{PackOutboard, Proof};
use crate::format::paths::{PackPart, pack_key};
use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{LakeError, PutIf};
use crate::store::tier::Sidecar;

use super::engine::Inner;
use super::fill::{FillState, Learned};
use super::job::PackFillError;
use super::pack_meta::proof_of;
use super::port::FetchTier;

impl Inner {
    /// Makes sure that an imported pack, all of whose pieces are there, has a proof that agrees.
    pub(super) async fn fix_proof(
        self: &Arc<Self>,
        tier: &Arc<dyn FetchTier>,
        fill: &Arc<FillState>,
    ) -> Result<(), PackFillError> {
        if fill.meta.is_native() {
            return Ok(());
        }
        let found = found_here(fill);
        if fill.meta.proof().is_none() {
            let ours = Proof { pack: fill.pack, digests: found.clone() };
            let fixed = self.write_proof(tier, fill, ours).await?;
            fill.meta.set_proof(Arc::new(fixed));
        }
        let agreed = fill.meta.proof().is_some_and(|proof| proof.digests == found);
        if !agreed {
            tracing::warn!(pack = %fill.pack, "imported objects gave other bytes than were recorded when they were first read");
            return Err(PackFillError::ProofConflict { pack: fill.pack });
        }
        self.keep_proof(tier, fill).await
    }

    /// Puts the proof where it counts; gives the one that is there.
    async fn write_proof(
        self: &Arc<Self>,
        tier: &Arc<dyn FetchTier>,
        fill: &Arc<FillState>,
        ours: Proof,
    ) -> Result<Proof, PackFillError> {
        let pack = fill.pack;
        let key = pack_key(&pack, PackPart::Proof);
        let bytes = ours.encode();
        match self.put_proof(&key, bytes.clone().into()).await {
            Ok(()) => Ok(ours),
            Err(LakeError::Precondition { .. }) => {
                self.metas
                    .look_for_proof(&fill.meta, self.deadline())
                    .await
                    .map_err(|error| PackFillError::of_meta(pack, error))?;
                let there = fill.meta.proof().ok_or(PackFillError::Damaged { pack })?;
                Ok(Proof::clone(&there))
            }
            Err(error) if error.is_passing() => Err(PackFillError::Lake { pack, key, source: Arc::new(error) }),
            // Read-only credentials: fixed for this tier alone.
            Err(_) => {
                let (tier, count) = (tier.clone(), ours.digests.len());
                let put = move || tier.put_sidecar(&pack, Sidecar::Proof, &bytes);
                let there = self.on_tier(pack, put).await?;
                proof_of(&there, &pack, count).ok_or(PackFillError::Damaged { pack })
            }
        }
    }

    /// Puts the proof where none is. A try whose answer was lost may have put it: the next finds it there.
    async fn put_proof(&self, key: &str, bytes: Bytes) -> Result<(), LakeError> {
        let patience = Duration::from_millis(self.cfg.prefetch_timeout_ms);
        let policy = RetryPolicy { total_max: patience / 2, ..RetryPolicy::default() };
        let put = || async {
            let put = self.lake.put(key, bytes.clone(), PutIf::Absent);
            match timeout(patience / 4, put).await {
                Ok(answer) => answer.map(drop),
                Err(_) => Err(LakeError::Passing { key: key.to_owned(), source: "no answer".into() }),
            }
        };
        with_retry(&policy, put).await
    }

    /// Keeps proof and learned chaining values beside the object, for scrubbing and for other nodes.
    async fn keep_proof(
        self: &Arc<Self>,
        tier: &Arc<dyn FetchTier>,
        fill: &Arc<FillState>,
    ) -> Result<(), PackFillError> {
        let (tier, fill, pack) = (tier.clone(), fill.clone(), fill.pack);
        let keep = move || {
            if let Some(proof) = fill.meta.proof() {
                tier.put_sidecar(&pack, Sidecar::Proof, &proof.encode())?;
            }
            let outboard = learn_outboards(&fill);
            if !outboard.contents.is_empty() && fill.meta.recipe.outboard_len == 0 {
                tier.put_sidecar(&pack, Sidecar::Outboard, &outboard.encode())?;
            }
            Ok(())
        };
        self.on_tier(pack, keep).await
    }
}

/// Lists what every content turned out to be. One that was taken over from an earlier run was
/// checked against the proof.
fn found_here(fill: &FillState) -> Vec<Option<ContentDigest>> {
    let contents = 0..fill.meta.index.contents.len() as u32;
    contents
        .map(|position| match fill.learned(position) {
            Some(Learned::Digest(digest, _)) => Some(digest),
            Some(Learned::Gone) => None,
            // Parts of it were taken over; reading the pack back checks the whole of it.
            Some(Learned::Blocks(_)) | None if fill.meta.is_in_tier(position) => fill.meta.digest(position),
            Some(Learned::Blocks(_)) | None => None,
        })
        .collect()
}

/// Takes the chaining values of large contents that came with the bytes.
fn learn_outboards(fill: &FillState) -> PackOutboard {
    let mut all = PackOutboard::default();
    for position in 0..fill.meta.index.contents.len() as u32 {
        if let Some(Learned::Digest(_, Some(outboard))) = fill.learned(position) {
            fill.meta.learn_outboard(position, outboard.clone());
            all.contents.push((position, outboard));
        }
    }
    all
}
