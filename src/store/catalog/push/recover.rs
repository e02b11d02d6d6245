//! What an earlier push left: finished where it can be, forgotten where it cannot.
//!
//! | pack was            | the lake has                | now                                            |
//! |---------------------|-----------------------------|------------------------------------------------|
//! | growing             | a run of its first parts    | cut behind the last content that is whole in   |
//! |                     |                             | them, finished, described                      |
//! | growing             | no whole content            | aborted, forgotten                             |
//! | one large file      | some parts                  | kept: parts that are equal are not sent again  |
//! | sent                | its bytes                   | described                                      |
//! | described           | all of it, not condemned    | used                                           |
//! | described           | not all of it any more      | forgotten: its contents are sent again         |
//!
//! A pack that was cut may be shorter than its object: the rest is never referred to.

use futures::StreamExt;

use crate::format::pack::{ALIGN, Place};
use crate::format::paths::{PackPart, data_key, pack_key};
use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{LakeError, UploadId, UploadedPart};

use super::error::PushError;
use super::index::{Index, LayoutRow, PackRow, PackState};
use super::packs::Packs;
use super::upload::{Uploads, finish_upload};

/// Questions to the lake at the same time.
const PARALLEL: usize = 16;

/// Brings the packs of earlier pushes to an end. `condemned` says which packs are being collected.
pub(super) fn recover(
    index: &mut Index,
    packs: &mut Packs,
    uploads: &Uploads,
    condemned: &dyn Fn(&str) -> bool,
) -> Result<(), PushError> {
    let rows: Vec<(u32, PackRow)> = packs.rows().map(|(number, row)| (number, row.clone())).collect();
    for (number, row) in rows.iter().filter(|(_, row)| row.state == PackState::Uploading) {
        if row.whole.is_some() {
            recover_whole(index, packs, uploads, *number, row)?;
        } else {
            recover_growing(index, packs, uploads, *number, row)?;
        }
        index.commit()?;
    }
    for (number, row) in rows.iter().filter(|(_, row)| row.state == PackState::Data) {
        describe(index, packs, uploads, *number, row)?;
    }
    check_described(index, packs, uploads, condemned)?;
    index.commit()
}

/// Aborts an upload; what cannot be aborted is left to the store's rule for old uploads.
fn abort(uploads: &Uploads, row: &PackRow) {
    if let Some(id) = &row.upload {
        let upload = UploadId { key: data_key(&row.key), id: id.clone() };
        // It may be gone already.
        let _ = uploads.rt.block_on(uploads.lake.upload_abort(&upload));
    }
}

/// Gives the parts that the store has of an upload; None where there is no such upload (any more).
fn listed(uploads: &Uploads, row: &PackRow) -> Result<Option<Vec<UploadedPart>>, PushError> {
    let Some(id) = &row.upload else {
        return Ok(None);
    };
    let upload = UploadId { key: data_key(&row.key), id: id.clone() };
    let listed = uploads.rt.block_on(with_retry(&RetryPolicy::default(), || uploads.lake.upload_parts(&upload)));
    match listed {
        Ok(listed) => Ok(Some(listed)),
        Err(LakeError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Gives the parts that both we and the store know, in order from the first on without a gap.
fn parts_in_order(
    index: &Index,
    uploads: &Uploads,
    number: u32,
    row: &PackRow,
) -> Result<Vec<UploadedPart>, PushError> {
    let listed = listed(uploads, row)?.unwrap_or_default();
    let both = index.parts_of(number)?.into_iter().map(|row| row.part).filter(|part| {
        listed.iter().any(|other| other.number == part.number && other.etag == part.etag && other.size == part.size)
    });
    let numbered = (1..).zip(both);
    Ok(numbered.take_while(|(number, part)| *number == part.number).map(|(_, part)| part).collect())
}

fn recover_whole(
    index: &mut Index,
    packs: &mut Packs,
    uploads: &Uploads,
    number: u32,
    row: &PackRow,
) -> Result<(), PushError> {
    // What its content is was not known: nothing may refer to it yet.
    index.forget_contents(number, 0)?;
    let alive = listed(uploads, row)?.is_some();
    match &row.whole {
        Some(path) if alive => {
            packs.allow_resume(path.clone(), number);
            Ok(())
        }
        _ => packs.forget(index, number),
    }
}

fn recover_growing(
    index: &mut Index,
    packs: &mut Packs,
    uploads: &Uploads,
    number: u32,
    row: &PackRow,
) -> Result<(), PushError> {
    let parts = parts_in_order(index, uploads, number, row)?;
    let arrived: u64 = parts.iter().map(|part| part.size).sum();
    let layout = index.layout_of(number)?;
    let (kept, len) = whole_in(&layout, arrived);
    let (Some(id), true) = (&row.upload, kept > 0) else {
        abort(uploads, row);
        return packs.forget(index, number);
    };
    let upload = UploadId { key: data_key(&row.key), id: id.clone() };
    match uploads.rt.block_on(finish_upload(&*uploads.lake, &upload, &parts)) {
        Ok(()) => {}
        Err(error) if error.is_passing() => return Err(error.into()),
        Err(error) => {
            tracing::warn!(%error, "an upload of an earlier push cannot be finished; its contents are sent again");
            abort(uploads, row);
            return packs.forget(index, number);
        }
    }
    index.forget_contents(number, kept)?;
    packs.update(index, number, |row| {
        row.state = PackState::Data;
        row.len = len;
    })?;
    index.commit()?;
    let row = packs.row(number).cloned();
    row.map_or(Ok(()), |row| describe(index, packs, uploads, number, &row))
}

/// Says how many contents lie wholly in the first `arrived` bytes, and where a pack of them ends.
fn whole_in(layout: &[(u32, LayoutRow)], arrived: u64) -> (u32, u64) {
    let mut kept = (0, 0);
    for (position, row) in layout {
        let end = match &row.place {
            Place::Run { offset } => offset + row.size,
            Place::Sparse { extents } => extents.last().map_or(0, |extent| extent.offset + extent.len),
        };
        let end = end.next_multiple_of(ALIGN);
        if end > arrived {
            break;
        }
        kept = (position + 1, end);
    }
    kept
}

fn describe(
    index: &mut Index,
    packs: &mut Packs,
    uploads: &Uploads,
    number: u32,
    row: &PackRow,
) -> Result<(), PushError> {
    let exists = uploads.rt.block_on(uploads.exists(&data_key(&row.key)))?;
    if !exists {
        // Either it was collected, or an equal pack of somebody else took its place.
        return packs.forget(index, number);
    }
    let (pack, outboard) = packs.describe(index, number, row.len)?;
    let id = uploads.rt.block_on(uploads.describe(&row.key, &pack, &outboard))?;
    packs.described(index, number, id)
}

/// Asks the lake whether the packs that no commit refers to yet are all there.
fn check_described(
    index: &mut Index,
    packs: &mut Packs,
    uploads: &Uploads,
    condemned: &dyn Fn(&str) -> bool,
) -> Result<(), PushError> {
    let described = packs.rows().filter(|(_, row)| row.state == PackState::Described);
    let asked: Vec<(u32, String)> =
        described.filter_map(|(number, row)| Some((number, pack_key(&row.id?, PackPart::Recipe)))).collect();
    let answers = futures::stream::iter(asked).map(|(number, key)| async move {
        let there = uploads.exists(&key).await?;
        Ok::<_, LakeError>((number, key, there))
    });
    let answers: Vec<_> = uploads.rt.block_on(answers.buffer_unordered(PARALLEL).collect());
    for answer in answers {
        let (number, key, there) = answer?;
        if there && !condemned(&key) {
            packs.allow(number);
        } else {
            packs.forget(index, number)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::ContentDigest;

    fn at(offset: u64, size: u64) -> LayoutRow {
        LayoutRow { content: ContentDigest([1; 32]), size, place: Place::Run { offset } }
    }

    #[test]
    fn a_pack_is_cut_behind_the_last_content_that_arrived_whole() {
        let layout = [(0, at(0, 5000)), (1, at(8192, 4096)), (2, at(12288, 9000))];
        assert_eq!(whole_in(&layout, 4096), (0, 0));
        assert_eq!(whole_in(&layout, 8192), (1, 8192));
        assert_eq!(whole_in(&layout, 16384), (2, 12288));
        assert_eq!(whole_in(&layout, 24576), (3, 24576));
    }
}
