//! Uploads: parts of growing packs on their way to the lake, and what describes a finished pack.
//!
//! One task a pack. A pack whose bytes never fill a part is one plain put; a larger one is a
//! multipart upload under a random key, begun when the first part is full, so that bytes leave before
//! the pack is known. Order: all bytes, then `.outboard`, `.index`, and `.recipe` last: who sees a
//! recipe finds everything that it names.
//!
//! Bytes in flight are bounded by one semaphore for the whole push; a writer blocks until there is
//! room. Every step is reported to the coordinator, which writes it down.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use crossbeam_channel::Sender;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};

use crate::format::ids::PackId;
use crate::format::pack::{PackIndex, PackOutboard, Recipe, Source};
use crate::format::paths::{PackPart, data_key, pack_key};
use crate::store::catalog::gc::{CondemnedSet, Relied};
use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{Lake, LakeError, PutIf, UploadId, UploadedPart};

use super::contents::Message;
use super::error::PushError;
use super::index::PartRow;
use super::progress::{Progress, add};

/// A semaphore counts in these.
const PERMIT_BYTES: u64 = 1024;

/// What every upload of a push shares. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Uploads {
    pub lake: Arc<dyn Lake>,
    pub rt: Handle,
    pub progress: Arc<Progress>,
    room: Arc<Semaphore>,
    room_permits: u32,
    reports: Sender<Message>,
    tasks: Arc<Mutex<Vec<JoinHandle<()>>>>,
    /// What gc means to delete; known once the intent is put.
    condemned: Arc<OnceLock<CondemnedSet>>,
}

/// A part that came from an earlier push.
pub(super) type KnownParts = HashMap<u32, PartRow>;

/// An upload that an earlier push began.
#[derive(Debug, Clone, Default)]
pub(super) struct Begun {
    pub upload: Option<String>,
    pub parts: KnownParts,
}

enum Order {
    Part(Part),
    End { tail: Part, index: Box<PackIndex>, outboard: Box<PackOutboard> },
    Abandon,
}

/// Bytes on their way, with the room they take.
struct Part {
    number: u32,
    bytes: Bytes,
    digest: String,
    room: OwnedSemaphorePermit,
}

/// The writing end of one pack.
#[derive(Debug)]
pub(super) struct PackSender {
    pub number: u32,
    uploads: Uploads,
    orders: mpsc::UnboundedSender<Order>,
    buffer: Vec<u8>,
    part_bytes: usize,
    part_next: u32,
    written: u64,
}

/// The uploads ended: another one failed, and the push is on its way out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Closed;

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Order")
    }
}

impl Uploads {
    pub(super) fn new(
        lake: Arc<dyn Lake>,
        rt: Handle,
        progress: Arc<Progress>,
        bytes_max: u64,
        reports: Sender<Message>,
    ) -> Self {
        let permits = u32::try_from(bytes_max.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX >> 4);
        let room = Arc::new(Semaphore::new(permits as usize));
        Self {
            lake,
            rt,
            progress,
            room,
            room_permits: permits,
            reports,
            tasks: Arc::default(),
            condemned: Arc::default(),
        }
    }

    /// Begins (or goes on with) the upload of a pack under `data/<key>`.
    pub(super) fn open(&self, number: u32, key: &str, part_bytes: u64, begun: Begun) -> PackSender {
        let (orders, inbox) = mpsc::unbounded_channel();
        let task = PackTask {
            uploads: self.clone(),
            number,
            key: key.to_owned(),
            data_key: data_key(key),
            upload: begun.upload.map(|id| UploadId { key: data_key(key), id }),
            known: begun.parts,
        };
        let mut tasks = self.tasks.lock();
        tasks.retain(|task| !task.is_finished());
        tasks.push(self.rt.spawn(task.run(inbox)));
        drop(tasks);
        let part_bytes = usize::try_from(part_bytes).unwrap_or(usize::MAX);
        PackSender { number, uploads: self.clone(), orders, buffer: Vec::new(), part_bytes, part_next: 1, written: 0 }
    }

    /// Describes a pack whose bytes are in the lake already (an earlier push ended in between).
    pub(super) async fn describe(
        &self,
        key: &str,
        index: &PackIndex,
        outboard: &PackOutboard,
    ) -> Result<PackId, LakeError> {
        let encoded = index.encode();
        let id = index.id();
        let recipe_key = pack_key(&id, PackPart::Recipe);
        if self.exists(&recipe_key).await? && self.rely_on(&recipe_key).await? == Relied::Safe {
            // Somebody made the very same pack before; ours is not needed.
            let ours = data_key(key);
            if !self.names(&recipe_key, key).await? {
                with_retry(&RetryPolicy::default(), || self.lake.delete(&ours)).await?;
            }
            return Ok(id);
        }
        let outboard = if outboard.contents.is_empty() { Vec::new() } else { outboard.encode() };
        let recipe = Recipe {
            pack: id,
            len: index.len,
            index_len: encoded.len() as u64,
            outboard_len: outboard.len() as u64,
            source: Source::Native { key: key.to_owned() },
        };
        if !outboard.is_empty() {
            self.put_named(&pack_key(&id, PackPart::Outboard), outboard.into()).await?;
        }
        self.put_named(&pack_key(&id, PackPart::Index), encoded.into()).await?;
        self.put_named(&recipe_key, recipe.encode().into()).await?;
        Ok(id)
    }

    async fn names(&self, recipe_key: &str, key: &str) -> Result<bool, LakeError> {
        let bytes = crate::store::lake::get_all(&*self.lake, recipe_key, 64 << 20).await?;
        Ok(Recipe::decode(&bytes).is_ok_and(|recipe| recipe.source == Source::Native { key: key.to_owned() }))
    }

    /// Tells what is condemned, once.
    pub(super) fn know_condemned(&self, set: CondemnedSet) {
        // A second telling would say the same.
        let _ = self.condemned.set(set);
    }

    pub(super) fn is_condemned(&self, key: &str) -> bool {
        self.condemned.get().is_some_and(|set| set.contains(key))
    }

    /// Makes sure that gc leaves an object alone that this push does not make itself.
    pub(super) async fn rely_on(&self, key: &str) -> Result<Relied, LakeError> {
        match self.condemned.get() {
            Some(set) if set.contains(key) => set.rely_on(key).await,
            _ => Ok(Relied::Safe),
        }
    }

    /// Puts an object whose name follows from its contents: gc may be about to delete the name.
    pub(super) async fn put_named(&self, key: &str, body: Bytes) -> Result<(), LakeError> {
        self.rely_on(key).await?;
        self.put(key, body).await
    }

    /// Puts a whole object, whatever was there.
    pub(super) async fn put(&self, key: &str, body: Bytes) -> Result<(), LakeError> {
        let len = body.len() as u64;
        with_retry(&RetryPolicy::default(), || self.lake.put(key, body.clone(), PutIf::Always)).await?;
        add(&self.progress.uploaded, len);
        Ok(())
    }

    pub(super) async fn exists(&self, key: &str) -> Result<bool, LakeError> {
        match with_retry(&RetryPolicy::default(), || self.lake.head(key)).await {
            Ok(_) => Ok(true),
            Err(LakeError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits for room for so many bytes in flight.
    pub(super) async fn room_for(&self, len: usize) -> Result<OwnedSemaphorePermit, Closed> {
        let permits = u32::try_from((len as u64).div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX);
        let permits = permits.clamp(1, self.room_permits.max(1));
        self.room.clone().acquire_many_owned(permits).await.map_err(|_| Closed)
    }

    /// Wakes whoever waits for room: the push is over.
    pub(super) fn close(&self) {
        self.room.close();
    }

    /// Waits until no upload runs any more, but not for ever: what is left behind is resumed or
    /// sent again by the next push.
    pub(super) async fn quiesce(&self, patience: Duration) {
        let tasks = std::mem::take(&mut *self.tasks.lock());
        // Whether they ended in time makes no difference to what is done next.
        let _ = tokio::time::timeout(patience, futures::future::join_all(tasks)).await;
    }

    fn report(&self, message: Message) {
        // A coordinator that is gone has failed already.
        let _ = self.reports.send(message);
    }
}

impl PackSender {
    /// Bytes written so far, sent or not.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Appends bytes; blocks while too much is in flight.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<(), Closed> {
        while !bytes.is_empty() {
            if self.buffer.is_empty() && self.part_next > 1 {
                // A pack that has filled one part fills the next one, or most of it.
                self.buffer.reserve_exact(self.part_bytes);
            }
            let (head, rest) = bytes.split_at(bytes.len().min(self.part_bytes - self.buffer.len()));
            self.buffer.extend_from_slice(head);
            self.written += head.len() as u64;
            bytes = rest;
            if self.buffer.len() == self.part_bytes {
                self.send_part()?;
            }
        }
        Ok(())
    }

    /// Appends zeros up to a multiple of `align`.
    pub(super) fn pad_to(&mut self, align: u64) -> Result<(), Closed> {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut missing = self.written.next_multiple_of(align) - self.written;
        while missing > 0 {
            let len = usize::try_from(missing).unwrap_or(ZEROS.len()).min(ZEROS.len());
            self.write(ZEROS.get(..len).unwrap_or_default())?;
            missing -= len as u64;
        }
        Ok(())
    }

    fn send_part(&mut self) -> Result<(), Closed> {
        let part = self.take_part()?;
        self.orders.send(Order::Part(part)).map_err(|_| Closed)
    }

    fn take_part(&mut self) -> Result<Part, Closed> {
        let bytes = Bytes::from(std::mem::take(&mut self.buffer));
        let room = self.uploads.rt.block_on(self.uploads.room_for(bytes.len()))?;
        let digest = blake3::hash(&bytes).to_hex().to_string();
        let number = self.part_next;
        self.part_next += 1;
        Ok(Part { number, bytes, digest, room })
    }

    /// Ends the pack: sends the rest, then its description.
    pub(super) fn finish(mut self, index: PackIndex, outboard: PackOutboard) -> Result<(), Closed> {
        let tail = self.take_part()?;
        let (index, outboard) = (Box::new(index), Box::new(outboard));
        self.orders.send(Order::End { tail, index, outboard }).map_err(|_| Closed)
    }

    /// Throws the pack away: its content turned out to be known.
    pub(super) fn abandon(self) {
        // A task that is gone has nothing to throw away.
        let _ = self.orders.send(Order::Abandon);
    }
}

/// The task of one pack.
struct PackTask {
    uploads: Uploads,
    number: u32,
    key: String,
    data_key: String,
    upload: Option<UploadId>,
    known: KnownParts,
}

type Sending = JoinSet<Result<PartRow, LakeError>>;

impl PackTask {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Order>) {
        let mut parts: Vec<UploadedPart> = Vec::new();
        let mut sending = Sending::new();
        // Without an end (the push failed elsewhere) what was sent stays for the next push.
        while let Some(order) = inbox.recv().await {
            let done = match order {
                Order::Part(part) => self.part(part, &mut parts, &mut sending).await,
                Order::End { tail, index, outboard } => {
                    if let Err(error) = self.end(tail, &mut parts, &mut sending, &index, &outboard).await {
                        self.uploads.report(Message::Failed(PushError::Lake(error)));
                    }
                    return;
                }
                Order::Abandon => {
                    sending.shutdown().await;
                    if let Some(upload) = &self.upload {
                        // What stays behind costs space, not correctness; the store's rule for old uploads removes it.
                        let _ = self.uploads.lake.upload_abort(upload).await;
                    }
                    self.uploads.report(Message::Abandoned);
                    return;
                }
            };
            let done = match done {
                Ok(()) => self.reap(&mut parts, &mut sending, false).await,
                error => error,
            };
            if let Err(error) = done {
                self.uploads.report(Message::Failed(PushError::Lake(error)));
                return;
            }
        }
    }

    async fn part(
        &mut self,
        part: Part,
        parts: &mut Vec<UploadedPart>,
        sending: &mut Sending,
    ) -> Result<(), LakeError> {
        let Part { number, bytes, digest, room } = part;
        if let Some(known) = self.known.get(&number)
            && known.digest == digest
            && known.part.size == bytes.len() as u64
        {
            parts.push(known.part.clone());
            return Ok(());
        }
        let upload = match &self.upload {
            Some(upload) => upload.clone(),
            None => {
                let lake = &self.uploads.lake;
                let upload = with_retry(&RetryPolicy::default(), || lake.upload_begin(&self.data_key)).await?;
                self.uploads.report(Message::Begun { pack: self.number, upload: upload.id.clone() });
                self.upload = Some(upload.clone());
                upload
            }
        };
        let (lake, progress) = (self.uploads.lake.clone(), self.uploads.progress.clone());
        sending.spawn(async move {
            let _room = room;
            let part = with_retry(&RetryPolicy::default(), || lake.upload_part(&upload, number, bytes.clone())).await?;
            add(&progress.uploaded_data, bytes.len() as u64);
            add(&progress.uploaded, bytes.len() as u64);
            Ok(PartRow { part, digest })
        });
        Ok(())
    }

    /// Collects parts that arrived; all of them where `all`.
    async fn reap(&self, parts: &mut Vec<UploadedPart>, sending: &mut Sending, all: bool) -> Result<(), LakeError> {
        loop {
            let joined = if all { sending.join_next().await } else { sending.try_join_next() };
            let Some(joined) = joined else { return Ok(()) };
            // A part task neither panics nor is cancelled while this one waits for it.
            let Ok(row) = joined else { continue };
            let row = row?;
            parts.push(row.part.clone());
            self.uploads.report(Message::Part { pack: self.number, row });
        }
    }

    async fn end(
        &mut self,
        tail: Part,
        parts: &mut Vec<UploadedPart>,
        sending: &mut Sending,
        index: &PackIndex,
        outboard: &PackOutboard,
    ) -> Result<(), LakeError> {
        if tail.number == 1 {
            let len = tail.bytes.len() as u64;
            self.uploads.put(&self.data_key, tail.bytes).await?;
            add(&self.uploads.progress.uploaded_data, len);
        } else {
            if !tail.bytes.is_empty() {
                self.part(tail, parts, sending).await?;
            }
            self.reap(parts, sending, true).await?;
            parts.sort_by_key(|part| part.number);
            self.finish(parts).await?;
        }
        self.uploads.report(Message::Sent { pack: self.number, len: index.len });
        let id = self.uploads.describe(&self.key, index, outboard).await?;
        self.uploads.report(Message::Described { pack: self.number, id });
        Ok(())
    }

    async fn finish(&self, parts: &[UploadedPart]) -> Result<(), LakeError> {
        let Some(upload) = &self.upload else {
            let source = "parts without an upload".into();
            return Err(LakeError::Permanent { key: self.data_key.clone(), source });
        };
        finish_upload(&*self.uploads.lake, upload, parts).await
    }
}

/// Finishes an upload; one that was finished before (the answer was lost) is fine.
pub(super) async fn finish_upload(lake: &dyn Lake, upload: &UploadId, parts: &[UploadedPart]) -> Result<(), LakeError> {
    let finish = with_retry(&RetryPolicy::default(), || lake.upload_finish(upload, parts.to_vec())).await;
    let Err(error) = finish else { return Ok(()) };
    if !matches!(error, LakeError::NotFound { .. } | LakeError::Permanent { .. }) {
        return Err(error);
    }
    let len: u64 = parts.iter().map(|part| part.size).sum();
    match with_retry(&RetryPolicy::default(), || lake.head(&upload.key)).await {
        Ok(meta) if meta.size == len => Ok(()),
        _ => Err(error),
    }
}
