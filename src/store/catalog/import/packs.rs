//! The packs of an import: laid out by sizes alone, their bytes left where they are.

use bytes::Bytes;

use crate::format::ids::PackId;
use crate::format::pack::{PackDraft, PackOutboard, PackPlanner, Recipe, Source};
use crate::format::paths::{PackPart, pack_key};
use crate::format::tree::Pin;
use crate::store::catalog::Catalog;
use crate::store::catalog::gc::{CondemnedSet, Relied};
use crate::store::catalog::puts::{self, Puts};
use crate::store::lake::{LakeError, get_all};

use super::keys::Found;
use super::listing::{Listed, Row};
use super::{ImportError, ImportOptions, content_of, pin_of};

/// What no recipe exceeds.
const RECIPE_LEN_MAX: u64 = 1 << 30;

/// The pack that is being filled.
#[derive(Debug, Default)]
struct Open {
    draft: PackDraft,
    pins: Vec<Pin>,
    outboard: PackOutboard,
}

/// Lays all files out and stores what describes the packs. Gives id and length by number in the plan.
pub(super) async fn store(
    catalog: &Catalog,
    options: &ImportOptions,
    condemned: &CondemnedSet,
    listed: &mut Listed,
) -> Result<Vec<(PackId, u64)>, ImportError> {
    let spool_error = |source| ImportError::Spool { path: catalog.state_dir.join("spool"), source };
    let mut planner = PackPlanner::new(listed.layout());
    let mut puts = Puts::new(catalog.lake.clone(), catalog.meta.clone(), condemned.clone());
    let mut numbered: Vec<(u64, PackId, u64)> = Vec::new();
    let mut open = Open::default();
    for row in listed.rows().map_err(spool_error)? {
        let row = row.map_err(spool_error)?;
        let Found::File(object) = &row.found else {
            continue;
        };
        if object.size == 0 {
            continue;
        }
        let slot = planner.push(object.size)?;
        // A large file is a pack of its own beside the open one.
        let mut own = Open::default();
        let pack = if slot.whole { &mut own } else { &mut open };
        add(pack, options, &row, &slot, object.size);
        if let Some(closed) = slot.closed {
            let mut full = std::mem::take(pack);
            full.draft.close(closed);
            let (id, len) = store_one(catalog, condemned, &mut puts, full).await?;
            numbered.push((closed.pack, id, len));
        }
    }
    if let Some(closed) = planner.finish() {
        open.draft.close(closed);
        let (id, len) = store_one(catalog, condemned, &mut puts, open).await?;
        numbered.push((closed.pack, id, len));
    }
    puts.all().await?;
    // Packs close in another order than they are opened.
    numbered.sort_unstable_by_key(|(number, _, _)| *number);
    Ok(numbered.into_iter().map(|(_, id, len)| (id, len)).collect())
}

fn add(pack: &mut Open, options: &ImportOptions, row: &Row, slot: &crate::format::pack::Slot, size: u64) {
    let Found::File(object) = &row.found else {
        return;
    };
    let (content, pin) = content_of(options, row, object);
    pack.draft.fill(slot, size, content);
    pack.pins.push(pin.unwrap_or_else(|| pin_of(options, &row.path, object)));
    if let Some(outboard) = row.digested.as_ref().and_then(|digested| digested.outboard.as_ref()) {
        pack.outboard.contents.push((slot.position, outboard.clone()));
    }
}

/// Stores what describes a pack, the recipe last: who sees a recipe finds everything that it needs.
async fn store_one(
    catalog: &Catalog,
    condemned: &CondemnedSet,
    puts: &mut Puts,
    open: Open,
) -> Result<(PackId, u64), ImportError> {
    let index = open.draft.finish().expect("every slot of a closed pack was filled");
    let encoded = index.encode();
    let id = crate::format::pack::PackIndex::id_of(&encoded);
    let kept = puts::save(condemned, &pack_key(&id, PackPart::Recipe)).await? == Relied::Safe;
    if kept && has_own_bytes(catalog, &id).await? {
        return Ok((id, index.len));
    }
    let outboard = match open.outboard.contents.is_empty() {
        true => Vec::new(),
        false => open.outboard.encode(),
    };
    let recipe = Recipe {
        pack: id,
        len: index.len,
        index_len: encoded.len() as u64,
        outboard_len: outboard.len() as u64,
        source: Source::Assembled { pins: open.pins },
    };
    let mut objects: Vec<(String, Bytes)> = Vec::new();
    if !outboard.is_empty() {
        objects.push((pack_key(&id, PackPart::Outboard), outboard.into()));
    }
    objects.push((pack_key(&id, PackPart::Index), encoded.into()));
    objects.push((pack_key(&id, PackPart::Recipe), recipe.encode().into()));
    puts.put_only(objects).await?;
    Ok((id, index.len))
}

/// Says whether the lake has the same contents as a pack of its own: that one is never given up for
/// somebody else's objects. (A digested import of what was pushed before.)
async fn has_own_bytes(catalog: &Catalog, id: &PackId) -> Result<bool, ImportError> {
    let key = pack_key(id, PackPart::Recipe);
    match get_all(catalog.lake.as_ref(), &key, RECIPE_LEN_MAX).await {
        Ok(bytes) => Ok(Recipe::decode(&bytes).is_ok_and(|recipe| matches!(recipe.source, Source::Native { .. }))),
        Err(LakeError::NotFound { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
