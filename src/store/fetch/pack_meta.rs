//! What is known of a pack: recipe, index, chaining values, proof. Fetched once, kept by bytes.
//!
//! Two levels, because most reads need only the first: the *recipe* says where the bytes lie in the
//! lake; the *full* description adds the index, the chaining values and the proof, which large and
//! pinned contents, fills and whole-object checks need. The index proves itself (its digest is the
//! pack's id), chaining values are checked against the content's digest before their first use. The
//! recipe proves nothing and need not: the bytes it leads to are checked. But those of an import that nobody has
//! digested yet are taken because the pinned object gave them: so a recipe has to name the very pins of the index.
//!
//! The tier keeps index, chaining values and proof beside its objects; they are read from there
//! first, so that a tier serves while the lake is down. It keeps the recipe too, which counts only then: the
//! lake's may have changed since.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use lru::LruCache;
use parking_lot::{Mutex, RwLock};
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout};

use crate::format::digest::{BLOCK_LEN, ChainingValue, Outboard};
use crate::format::ids::{ContentDigest, ContentId, PackId};
use crate::format::pack::{PackIndex, PackOutboard, PackedContent, Place, Proof, Recipe, Source};
use crate::format::paths::{PackPart, data_key, pack_key};
use crate::format::placement::Location;
use crate::store::tier::Sidecar;

use super::port::FetchTier;
use super::source::{For, LakeReader, Object, SourceError};

/// Largest index, recipe or outboard that is read; more is refused as damaged.
const PART_BYTES_MAX: u64 = 512 << 20;
/// How long the lake may take to give a recipe that the tier has, and for how long it is then not asked for others.
const CONFIRM_TIMEOUT: Duration = Duration::from_millis(500);
const AWAY_FOR: Duration = Duration::from_secs(10);
/// Bookkeeping of an entry, about.
const ENTRY_OVERHEAD_BYTES: u64 = 512;

/// Why a description was not read.
#[derive(Debug, Clone)]
pub(super) enum MetaError {
    Source {
        key: String,
        error: SourceError,
    },
    /// It does not decode, contradicts itself, or is another pack's, also when fetched again.
    Damaged {
        why: &'static str,
    },
}

/// The full description of a pack.
#[derive(Debug)]
pub(super) struct PackMeta {
    pub recipe: Arc<Recipe>,
    pub index: PackIndex,
    index_bytes: Bytes,
    outboard_bytes: Bytes,
    /// Chaining values by position, checked against the content's digest when first asked.
    outboards: RwLock<HashMap<u32, Values>>,
    proof: RwLock<Option<Arc<Proof>>>,
}

#[derive(Debug, Clone)]
enum Values {
    Unchecked(Arc<Outboard>),
    Good(Arc<Outboard>),
    Bad,
}

/// What proves one unit of a content.
#[derive(Debug, Clone)]
pub(super) enum UnitProof {
    /// The whole content has this digest.
    Digest(ContentDigest),
    /// The block has this chaining value.
    Block(ChainingValue),
    /// Nothing but the pin: right when it comes from the pinned object itself.
    Pin,
    /// The chaining values that the lake gave are not those of the content.
    Damaged,
}

impl PackMeta {
    /// Finds the content that a reference means. None: the reference and the index disagree.
    pub(super) fn position(&self, content: &ContentId, size: u64, location: &Location) -> Option<u32> {
        let start = match location {
            Location::None => return None,
            Location::Run { offset, .. } => *offset,
            Location::Sparse { extents, .. } => extents.first()?.offset,
        };
        let position = self.index.content_at(start)?;
        let found = self.index.contents.get(position)?;
        let same_place = match (&found.place, location) {
            (Place::Run { offset }, Location::Run { offset: asked, .. }) => offset == asked,
            (Place::Sparse { extents }, Location::Sparse { extents: asked, .. }) => extents == asked,
            _ => false,
        };
        let same = same_place && found.size == size && found.content == *content;
        same.then(|| u32::try_from(position).ok()).flatten()
    }

    pub(super) fn content(&self, position: u32) -> Option<&PackedContent> {
        self.index.contents.get(position as usize)
    }

    /// Gives the digest that a content must have, where one is known.
    pub(super) fn digest(&self, position: u32) -> Option<ContentDigest> {
        match self.content(position)?.content {
            ContentId::Digest(digest) => Some(digest),
            ContentId::Pin(_) => self.proof()?.digests.get(position as usize).copied().flatten(),
        }
    }

    /// Says whether the tier's copy of this content may be used at all: an imported content whose
    /// source was gone when the proof was made has no bytes there.
    pub(super) fn is_in_tier(&self, position: u32) -> bool {
        match self.proof() {
            Some(proof) => proof.digests.get(position as usize).copied().flatten().is_some(),
            None => self.is_native(),
        }
    }

    pub(super) fn is_native(&self) -> bool {
        matches!(self.recipe.source, Source::Native { .. })
    }

    /// Says whether every content of a published copy has its bytes there.
    pub(super) fn is_complete_in_tier(&self) -> bool {
        self.is_native() || self.proof().is_some_and(|proof| proof.digests.iter().all(Option::is_some))
    }

    pub(super) fn proof(&self) -> Option<Arc<Proof>> {
        self.proof.read().clone()
    }

    /// Takes a proof that was read or made; the caller checked that it is this pack's.
    pub(super) fn set_proof(&self, proof: Arc<Proof>) {
        *self.proof.write() = Some(proof);
    }

    /// Keeps chaining values that were computed here, from bytes that are the content's.
    pub(super) fn learn_outboard(&self, position: u32, outboard: Outboard) {
        self.outboards.write().insert(position, Values::Good(Arc::new(outboard)));
    }

    /// Says what proves a unit.
    pub(super) fn unit_proof(&self, position: u32, block: u64) -> UnitProof {
        let Some(content) = self.content(position) else {
            return UnitProof::Damaged;
        };
        let digest = self.digest(position);
        if content.size <= BLOCK_LEN {
            return digest.map_or(UnitProof::Pin, UnitProof::Digest);
        }
        let Some(digest) = digest else {
            return UnitProof::Pin;
        };
        match self.values(position, &digest) {
            Some(Values::Good(outboard)) => match outboard.blocks.get(block as usize) {
                Some(value) => UnitProof::Block(*value),
                None => UnitProof::Damaged,
            },
            Some(_) => UnitProof::Damaged,
            // Of an imported content nobody may have computed any; a native pack always has them.
            None if self.is_native() => UnitProof::Damaged,
            None => UnitProof::Pin,
        }
    }

    /// Gives a content's chaining values, checked against its digest once.
    fn values(&self, position: u32, digest: &ContentDigest) -> Option<Values> {
        let found = self.outboards.read().get(&position).cloned()?;
        let Values::Unchecked(outboard) = found else {
            return Some(found);
        };
        let size = self.content(position).map_or(0, |c| c.size);
        let checked = match outboard.size == size && outboard.verify(digest) {
            true => Values::Good(outboard),
            false => Values::Bad,
        };
        self.outboards.write().insert(position, checked.clone());
        Some(checked)
    }

    /// Gives where a content's own bytes lie in the lake, and at which offset of that object the
    /// pack's (native) or the content's (assembled) bytes start.
    pub(super) fn object_of(&self, position: u32) -> Option<Object> {
        match &self.recipe.source {
            Source::Native { key } => Some(Object::Own(data_key(key).into())),
            Source::Assembled { pins } => Some(Object::Pinned(Arc::new(pins.get(position as usize)?.clone()))),
        }
    }

    /// The encoded parts that lie beside the pack in the tier.
    pub(super) fn sidecars(&self) -> (&Bytes, &Bytes) {
        (&self.index_bytes, &self.outboard_bytes)
    }

    fn cost_bytes(&self) -> u64 {
        let values: usize = self.outboard_bytes.len() * 2;
        let pins = match &self.recipe.source {
            Source::Native { .. } => 0,
            Source::Assembled { pins } => pins.iter().map(|p| p.key.len() + p.bucket.len() + p.etag.len() + 128).sum(),
        };
        (self.index.heap_bytes() + self.index_bytes.len() + values + pins) as u64
    }
}

/// What proves a piece, for the format's own check.
impl crate::format::pack::piece::Known for PackMeta {
    fn digest(&self, position: u32) -> Option<ContentDigest> {
        PackMeta::digest(self, position)
    }

    fn block(&self, position: u32, block: u64) -> Option<ChainingValue> {
        match self.unit_proof(position, block) {
            UnitProof::Block(value) => Some(value),
            _ => None,
        }
    }
}

#[derive(Debug, Default)]
struct Entry {
    recipe: OnceCell<Arc<Recipe>>,
    full: OnceCell<Arc<PackMeta>>,
}

#[derive(Debug)]
struct Cache {
    entries: LruCache<PackId, (Arc<Entry>, u64)>,
    bytes: u64,
}

/// Descriptions of packs, least recently used go first.
#[derive(Debug)]
pub(super) struct PackMetas {
    cache: Mutex<Cache>,
    bytes_max: u64,
    tries_max: u32,
    reader: LakeReader,
    tier: Option<Arc<dyn FetchTier>>,
    /// The lake did not give a recipe that the tier has: it is not asked for others until then.
    away_until: Mutex<Option<Instant>>,
}

impl PackMetas {
    pub(super) fn new(reader: LakeReader, tier: Option<Arc<dyn FetchTier>>, bytes_max: u64, tries_max: u32) -> Self {
        let cache = Mutex::new(Cache { entries: LruCache::unbounded(), bytes: 0 });
        Self { cache, bytes_max, tries_max: tries_max.max(1), reader, tier, away_until: Mutex::default() }
    }

    fn entry(&self, pack: &PackId) -> Arc<Entry> {
        let mut cache = self.cache.lock();
        if let Some((entry, _)) = cache.entries.get(pack) {
            return entry.clone();
        }
        let entry = Arc::new(Entry::default());
        cache.entries.put(*pack, (entry.clone(), ENTRY_OVERHEAD_BYTES));
        cache.bytes += ENTRY_OVERHEAD_BYTES;
        entry
    }

    /// Counts what an entry costs now, and drops the least recently used ones above the bound.
    fn charge(&self, pack: &PackId, cost: u64) {
        let mut cache = self.cache.lock();
        let Some((_, charged)) = cache.entries.get_mut(pack) else {
            return;
        };
        let before = std::mem::replace(charged, cost + ENTRY_OVERHEAD_BYTES);
        cache.bytes = cache.bytes - before + cost + ENTRY_OVERHEAD_BYTES;
        while cache.bytes > self.bytes_max && cache.entries.len() > 1 {
            let Some((_, (_, dropped))) = cache.entries.pop_lru() else {
                return;
            };
            cache.bytes -= dropped;
        }
    }

    /// Drops what is in memory of a pack: it led to nothing good, so it is fetched again.
    pub(super) fn forget(&self, pack: &PackId) {
        let mut cache = self.cache.lock();
        if let Some((_, cost)) = cache.entries.pop(pack) {
            cache.bytes -= cost;
        }
    }

    /// Gives the full description if it is in memory.
    pub(super) fn peek(&self, pack: &PackId) -> Option<Arc<PackMeta>> {
        self.cache.lock().entries.get(pack)?.0.full.get().cloned()
    }

    /// Gives the recipe.
    pub(super) async fn recipe(&self, pack: &PackId, deadline: Instant) -> Result<Arc<Recipe>, MetaError> {
        let entry = self.entry(pack);
        entry.recipe.get_or_try_init(|| self.load_recipe(pack, deadline)).await.cloned()
    }

    /// Gives the full description.
    pub(super) async fn full(&self, pack: &PackId, deadline: Instant) -> Result<Arc<PackMeta>, MetaError> {
        let entry = self.entry(pack);
        let load = async {
            let recipe = entry.recipe.get_or_try_init(|| self.load_recipe(pack, deadline)).await?;
            let meta = match self.load_full(pack, recipe.clone(), deadline).await {
                // The recipe may be the tier's, which is anybody's who can write there.
                Err(MetaError::Damaged { .. }) => {
                    let lakes = self.lake_recipe(pack, deadline).await?;
                    self.load_full(pack, lakes, deadline).await?
                }
                loaded => loaded?,
            };
            let meta = Arc::new(meta);
            self.charge(pack, meta.cost_bytes());
            Ok(meta)
        };
        entry.full.get_or_try_init(|| load).await.cloned()
    }

    async fn lake_recipe(&self, pack: &PackId, deadline: Instant) -> Result<Arc<Recipe>, MetaError> {
        Ok(Arc::new(self.part(pack, PackPart::Recipe, deadline, |bytes| recipe_of(bytes, pack)).await?.1))
    }

    async fn load_recipe(&self, pack: &PackId, deadline: Instant) -> Result<Arc<Recipe>, MetaError> {
        let Some(kept) = self.sidecar(pack, Sidecar::Recipe).await.and_then(|bytes| recipe_of(&bytes, pack)) else {
            return self.lake_recipe(pack, deadline).await;
        };
        // Reads of what the tier has do not each wait for a lake that is away.
        let is_away = self.away_until.lock().is_some_and(|until| Instant::now() < until);
        if is_away {
            return Ok(Arc::new(kept));
        }
        let confirmed = deadline.min(Instant::now() + CONFIRM_TIMEOUT);
        match self.lake_recipe(pack, confirmed).await {
            Ok(recipe) => Ok(recipe),
            Err(MetaError::Source { error, .. }) => {
                tracing::debug!(%pack, ?error, "the lake is away; the tier knows the recipe");
                *self.away_until.lock() = Some(Instant::now() + AWAY_FOR);
                Ok(Arc::new(kept))
            }
            Err(error) => Err(error),
        }
    }

    async fn load_full(&self, pack: &PackId, recipe: Arc<Recipe>, deadline: Instant) -> Result<PackMeta, MetaError> {
        let index = self.part_near(pack, Sidecar::Index, deadline, |bytes| {
            let mine = *blake3::hash(bytes).as_bytes() == *pack.as_bytes();
            PackIndex::decode(bytes).ok().filter(|index| mine && index.len == recipe.len)
        });
        let (index_bytes, index) = index.await?;
        if !goes_with(&recipe, &index) {
            return Err(MetaError::Damaged { why: "its pins are not those of its index" });
        }
        let mut outboards = HashMap::new();
        let mut outboard_bytes = Bytes::new();
        if recipe.outboard_len == 0 && matches!(recipe.source, Source::Assembled { .. }) {
            // Computed by whoever filled the pack first.
            let learned = self.sidecar(pack, Sidecar::Outboard).await;
            let learned = learned.and_then(|bytes| PackOutboard::decode(&bytes).ok());
            if let Some(learned) = learned.filter(|outboard| values_match(outboard, &index)) {
                outboards = unchecked(learned);
            }
        }
        if recipe.outboard_len > 0 {
            let found = self.part_near(pack, Sidecar::Outboard, deadline, |bytes| {
                PackOutboard::decode(bytes).ok().filter(|outboard| values_match(outboard, &index))
            });
            let (bytes, found) = found.await?;
            outboard_bytes = bytes;
            outboards = unchecked(found);
        }
        let meta = PackMeta {
            recipe,
            index,
            index_bytes,
            outboard_bytes,
            outboards: RwLock::new(outboards),
            proof: RwLock::new(None),
        };
        if !meta.is_native() {
            self.look_for_proof(&meta, deadline).await?;
        }
        Ok(meta)
    }

    /// Looks for the proof of an imported pack; none is no error.
    pub(super) async fn look_for_proof(&self, meta: &PackMeta, deadline: Instant) -> Result<(), MetaError> {
        let pack = meta.recipe.pack;
        let count = meta.index.contents.len();
        let good = |bytes: &[u8]| proof_of(bytes, &pack, count);
        // The lake's counts: the tier's is there only where the credentials cannot write to the lake.
        match self.part(&pack, PackPart::Proof, deadline, good).await {
            Ok((_, proof)) => meta.set_proof(Arc::new(proof)),
            Err(error) => {
                let there = self.sidecar(&pack, Sidecar::Proof).await.and_then(|bytes| good(&bytes));
                match there {
                    Some(proof) => meta.set_proof(Arc::new(proof)),
                    None if is_missing(&error) => {}
                    None => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Reads a part from beside the tier's object, else from the lake.
    async fn part_near<T>(
        &self,
        pack: &PackId,
        part: Sidecar,
        deadline: Instant,
        decode: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<(Bytes, T), MetaError> {
        if let Some(bytes) = self.sidecar(pack, part).await
            && let Some(decoded) = decode(&bytes)
        {
            return Ok((bytes.into(), decoded));
        }
        let lake_part = match part {
            Sidecar::Index => PackPart::Index,
            Sidecar::Outboard => PackPart::Outboard,
            Sidecar::Proof => PackPart::Proof,
            Sidecar::Recipe => PackPart::Recipe,
        };
        self.part(pack, lake_part, deadline, decode).await
    }

    async fn sidecar(&self, pack: &PackId, part: Sidecar) -> Option<Vec<u8>> {
        let tier = self.tier.clone()?;
        let pack = *pack;
        let read = tokio::task::spawn_blocking(move || tier.sidecar(&pack, part));
        // A tier that hangs is as good as none.
        timeout(self.reader.stall_timeout, read).await.ok()?.ok()?.ok()?
    }

    /// Reads a part from the lake; one that does not decode is fetched again a few times.
    async fn part<T>(
        &self,
        pack: &PackId,
        part: PackPart,
        deadline: Instant,
        decode: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<(Bytes, T), MetaError> {
        let key = pack_key(pack, part);
        for _ in 0..self.tries_max {
            let object = Object::Own(key.as_str().into());
            let bytes = self.reader.read_whole(&object, PART_BYTES_MAX, For::Meta, deadline).await;
            let bytes = bytes.map_err(|error| MetaError::Source { key: key.clone(), error })?;
            if let Some(decoded) = decode(&bytes) {
                return Ok((bytes, decoded));
            }
            super::stats::bump(&self.reader.counters.damaged_fetches);
        }
        Err(MetaError::Damaged {
            why: match part {
                PackPart::Index => "the index is not this pack's",
                PackPart::Recipe => "the recipe is not this pack's",
                PackPart::Outboard => "the chaining values are not this pack's",
                PackPart::Proof => "the proof is not this pack's",
            },
        })
    }
}

/// Decodes a recipe and checks that it is this pack's.
fn recipe_of(bytes: &[u8], pack: &PackId) -> Option<Recipe> {
    Recipe::decode(bytes).ok().filter(|recipe| recipe.pack == *pack)
}

/// Decodes a proof and checks that it is this pack's.
pub(super) fn proof_of(bytes: &[u8], pack: &PackId, contents: usize) -> Option<Proof> {
    Proof::decode(bytes).ok().filter(|proof| proof.pack == *pack && proof.digests.len() == contents)
}

fn is_missing(error: &MetaError) -> bool {
    use crate::store::lake::LakeError;
    matches!(error, MetaError::Source { error: SourceError::Permanent(source), .. }
        if matches!(**source, LakeError::NotFound { .. }))
}

/// Says whether a recipe leads to what the index was made of: an imported content is its pinned object, and nothing
/// of ours stands for it.
fn goes_with(recipe: &Recipe, index: &PackIndex) -> bool {
    match &recipe.source {
        Source::Assembled { pins } => pins_match(pins, index),
        Source::Native { .. } => index.contents.iter().all(|c| matches!(c.content, ContentId::Digest(_))),
    }
}

/// Says whether the pins of a recipe are those that the index was made of.
fn pins_match(pins: &[crate::format::tree::Pin], index: &PackIndex) -> bool {
    pins.len() == index.contents.len()
        && pins.iter().zip(&index.contents).all(|(pin, content)| {
            let same_id = match content.content {
                ContentId::Pin(id) => pin.id() == id,
                ContentId::Digest(_) => true,
            };
            same_id && pin.size == content.size && matches!(content.place, Place::Run { .. })
        })
}

fn unchecked(outboard: PackOutboard) -> HashMap<u32, Values> {
    let values = |(position, outboard)| (position, Values::Unchecked(Arc::new(outboard)));
    outboard.contents.into_iter().map(values).collect()
}

/// Says whether chaining values are those of the contents: so one that arrived damaged is fetched
/// again at once. Those of pinned contents are checked when a proof names their digests.
fn values_match(outboard: &PackOutboard, index: &PackIndex) -> bool {
    outboard.contents.iter().all(|(position, values)| {
        let Some(content) = index.contents.get(*position as usize) else {
            return false;
        };
        let proven = match content.content {
            ContentId::Digest(digest) => values.verify(&digest),
            ContentId::Pin(_) => true,
        };
        content.size == values.size && proven
    })
}
