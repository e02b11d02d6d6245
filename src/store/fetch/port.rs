//! What fetching asks of a tier: a narrow seam, so that tests can put a failing tier behind it.
//!
//! Every call is synchronous and may take as long as a file system does. Errors are `io::Error`:
//! fetching never shows them to a reader, it goes to the lake and counts them.

use std::fmt;
use std::io;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;

use crate::format::ids::{NodeId, PackId, TierId};
use crate::store::tier::{FileIdentity, PackFile, Sidecar};

/// A tier, as fetching sees it.
pub trait FetchTier: fmt::Debug + Send + Sync + 'static {
    fn id(&self) -> TierId;

    /// Says whether it lies on a server: then a call can wait for as long as the server is away.
    fn is_remote(&self) -> bool;

    /// Opens the published object of a pack; None where the tier does not have it.
    fn open_pack(&self, pack: &PackId) -> io::Result<Option<PackFile>>;

    /// Opens (or creates) the staging file of a pack. Its index must lie beside it before it is
    /// published.
    fn open_stage(&self, pack: &PackId, len: u64) -> io::Result<Box<dyn FetchStage>>;

    /// Sets a damaged object aside, if it still is the one of that identity.
    fn quarantine(&self, pack: &PackId, identity: &FileIdentity, why: &str) -> io::Result<()>;

    /// Reads what was kept beside a pack.
    fn sidecar(&self, pack: &PackId, part: Sidecar) -> io::Result<Option<Vec<u8>>>;

    /// Says whether something was kept beside a pack.
    fn has_sidecar(&self, pack: &PackId, part: Sidecar) -> io::Result<bool>;

    /// Keeps bytes beside a pack, by exclusive create; gives the bytes that are there afterwards.
    fn put_sidecar(&self, pack: &PackId, part: Sidecar, bytes: &[u8]) -> io::Result<Vec<u8>>;
}

/// Asks other nodes for what they are bringing.
#[async_trait::async_trait]
pub trait Peers: fmt::Debug + Send + Sync + 'static {
    /// Asks the node at an address for a range of a pack, which it may wait for. Nothing of what comes
    /// is believed: who asked checks it.
    async fn get(&self, address: &str, pack: &PackId, range: Range<u64>, patience: Duration) -> Given;
}

/// What a node has of a range that another asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Given {
    Bytes(Bytes),
    /// It is in flight: it is worth asking again.
    Coming,
    /// It has it not, or did not answer in time, or is gone.
    Nothing,
}

/// Who brings a span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SpanClaim {
    /// We do; `taken_over`: its owner was silent for too long, and part of it may be there.
    Mine { taken_over: bool },
    /// It is there.
    Done,
    /// Another node does; its claim can be taken over when it is not renewed for so long.
    Other { node: NodeId, peer: Option<String>, left: Duration },
}

/// The staging file of one pack: verified bytes at their final offsets, marks for what is durable.
pub trait FetchStage: fmt::Debug + Send + Sync {
    /// How many bytes one mark covers (a span; the last one may be shorter).
    fn span_len(&self) -> u64;

    /// The data file's id: a published object of the same id is this file. None: not known.
    fn file_id(&self) -> Option<u64>;

    /// Says whether a span was marked done, here or by an earlier run.
    fn is_done(&self, span: u64) -> bool;

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Makes a span durable (fsync) and marks it.
    fn mark_done(&self, span: u64) -> io::Result<()>;

    /// Asks whether to bring a span: nodes share one download so. The number behind the last span
    /// stands for the right to publish. May be asked again for a span that is ours.
    fn claim(&self, span: u64) -> io::Result<SpanClaim>;

    /// How long a claim lasts that is not renewed.
    fn claim_ttl(&self) -> Duration;

    /// Renews our claims; gives the spans that others took from us.
    fn renew(&self) -> io::Result<Vec<u64>>;

    /// Learns what others did since: their marks, and their bytes. Fails where the pack was published,
    /// or its staging given up.
    fn refresh(&self) -> io::Result<()>;

    /// Gives up the claims that are still ours.
    fn release(&self);

    /// Publishes the complete file under its final name and opens it.
    fn publish(&self) -> io::Result<PackFile>;
}
