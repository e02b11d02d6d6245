//! Makes an image from a commit's tree and placement.
//!
//! One pass over the segments in rank order, on a thread that may block. Each file's place is compared
//! with the index of its pack before it is written into the image: the kernel does not check what it
//! reads, so what it is told must be proved.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use tokio::runtime::Handle;

use crate::format::erofs::{
    Attributes, Copied, Finished, IMAGE_FORMAT, Item, Section, Sink, Spec, What, WriteError, Writer,
};
use crate::format::placement::{Location, PlacedBlock};
use crate::format::tree::nav::{self, EntryAt, NavError};
use crate::format::tree::{Block, Entry, EntryKind};
use crate::fs::view::{Ino, Look, ROOT};
use crate::store::fetch::{ContentRef, FetchError, Fetcher, Verify};
use crate::store::meta::{MetaError, MetaStore, Snapshot};

use super::files::{Description, Image, ImageId, Images, packs_of};

/// What is written at a time.
const BUFFER_LEN: usize = 256 << 10;
/// A gap up to this is filled instead of starting a new write.
const GAP_MAX: u64 = 4096;
/// What is copied to the tails at a time.
const COPY_LEN: u64 = 1 << 20;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("the image cannot be written to the state directory")]
    Write(#[source] io::Error),
    #[error("the commit's metadata is not to be had")]
    Meta(#[source] MetaError),
    #[error("a file's content is not to be had")]
    Fetch(#[source] FetchError),
    #[error("the placement gives the file at rank {rank} a place that its pack does not have; push the data again")]
    Misplaced { rank: u64 },
    #[error("the tree is damaged at rank {rank}: {why}")]
    Tree { rank: u64, why: &'static str },
    #[error("the file at rank {rank} does not fit into an image: {why}; mount with --engine fuse")]
    Limit { rank: u64, why: &'static str },
    #[error("the daemon is shutting down")]
    Stopped,
}

impl From<WriteError<BuildError>> for BuildError {
    fn from(error: WriteError<BuildError>) -> Self {
        match error {
            WriteError::Sink(error) => error,
            WriteError::Tree { rank, why } => Self::Tree { rank, why },
            WriteError::Limit { rank, why } => Self::Limit { rank, why },
        }
    }
}

/// What an image is made of.
#[derive(Debug, Clone)]
pub struct Subject {
    pub snapshot: Snapshot,
    pub meta: MetaStore,
    pub fetcher: Fetcher,
    pub look: Look,
    /// The directory whose mode keeps others out, by its rank + 1 (0: the root).
    pub private: Option<u64>,
}

impl Subject {
    /// Names the image.
    pub fn id(&self) -> ImageId {
        let tree = &self.snapshot.commit_body.tree;
        ImageId::of(tree, &self.snapshot.placement_id, &self.look, self.private)
    }

    fn mode(&self, mode: u32, number: u64) -> u32 {
        if self.private == Some(number) { mode & 0o7700 } else { mode }
    }
}

/// Builds an image, or finds the one that is there. Blocks; must not run on a thread of the runtime.
/// `go_on` is asked between segments.
pub fn build(images: &Images, subject: &Subject, rt: &Handle, go_on: &dyn Fn() -> bool) -> Result<Image, BuildError> {
    let id = subject.id();
    if let Some(image) = images.find(id) {
        if image.is_intact() {
            images.touch(id);
            return Ok(image);
        }
        tracing::warn!(image = %id, "an image on this node's disk is damaged; it is built again");
        images.remove(id);
    }
    let draft = images.draft(id).map_err(BuildError::Write)?;
    let root = &subject.snapshot.root;
    let look = subject.look.dir(ROOT, root.mode, root.mtime, root.subdirs);
    let spec = Spec {
        uuid: id.0,
        uid: look.uid,
        gid: look.gid,
        packs: subject.snapshot.placement.packs.clone(),
        root: Attributes { mode: subject.mode(look.mode, 0), mtime: look.mtime, nlink: look.nlink },
        children: root.children,
        subdirs: root.subdirs,
    };
    let head_len = crate::format::erofs::writer::head_len(spec.packs.len());
    let mut sink = FileSink {
        names: Buffered::new(&draft.image, head_len),
        inodes: Buffered::new(&draft.inodes, 0),
        tails: &draft.tails,
        file: None,
        subject,
        rt,
    };
    let mut writer = Writer::new(spec, &mut sink)?;
    let mut rank = 0;
    while rank < root.counts.entries {
        if !go_on() {
            return Err(BuildError::Stopped);
        }
        rank = write_segment(subject, rt, rank, &mut writer, &mut sink)?;
    }
    sink.names.flush().and_then(|()| sink.inodes.flush()).map_err(BuildError::Write)?;
    drop(sink);
    let done: Finished = writer.finish()?;
    let image_len = assemble(&draft.image, &draft.inodes, &done).map_err(BuildError::Write)?;
    draft.tails.set_len(done.tails_len).map_err(BuildError::Write)?;
    let about = Description {
        format: IMAGE_FORMAT,
        tree: subject.snapshot.commit_body.tree,
        placement: subject.snapshot.placement_id,
        packs: packs_of(&done.devices),
        inodes: done.inodes,
        image_len,
        tails_len: done.tails_len,
        image_digest: String::new(),
        tails_digest: String::new(),
    };
    draft.finish(about).map_err(BuildError::Write)
}

/// Puts the inodes behind the names, and the head before them; gives the length of the whole.
fn assemble(image: &File, inodes: &File, done: &Finished) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let inodes_at = done.head.len() as u64 + done.names_len;
    inodes.set_len(done.inodes_len)?;
    let (mut from, mut to) = (inodes, image);
    from.seek(SeekFrom::Start(0))?;
    to.seek(SeekFrom::Start(inodes_at))?;
    io::copy(&mut from, &mut to)?;
    let len = inodes_at + done.inodes_len;
    image.set_len(len)?;
    image.write_all_at(&done.head, 0)?;
    Ok(len)
}

/// Writes the entries of the segment that begins at a rank; gives the rank behind it.
fn write_segment(
    subject: &Subject,
    rt: &Handle,
    rank: u64,
    writer: &mut Writer,
    sink: &mut FileSink<'_>,
) -> Result<u64, BuildError> {
    let (root, placement) = (&subject.snapshot.root, &subject.snapshot.placement);
    let meta = &subject.meta;
    let (first, block) =
        rt.block_on(meta.drive(|blocks| nav::segment_at(root, blocks, rank))).map_err(BuildError::Meta)?;
    let placed = meta.drive(|blocks| nav::placed_at(root, placement, blocks, rank));
    let (placed_first, placed) = rt.block_on(placed).map_err(BuildError::Meta)?;
    let damaged = BuildError::Tree { rank, why: "a segment is not what its index says" };
    let (Block::Segment(segment), PlacedBlock::Segment(locations)) = (&*block, &*placed) else {
        return Err(damaged);
    };
    if first != rank || placed_first != rank || segment.entries.len() != locations.len() || locations.is_empty() {
        return Err(damaged);
    }
    for (rank, (entry, location)) in (rank..).zip(segment.entries.iter().zip(locations)) {
        write_entry(subject, rt, rank, entry, location, writer, sink)?;
    }
    Ok(rank + segment.entries.len() as u64)
}

fn write_entry(
    subject: &Subject,
    rt: &Handle,
    rank: u64,
    entry: &Entry,
    location: &Location,
    writer: &mut Writer,
    sink: &mut FileSink<'_>,
) -> Result<(), BuildError> {
    let what = match &entry.kind {
        EntryKind::Dir { children, subdirs, .. } => What::Dir { children: *children, subdirs: *subdirs },
        EntryKind::Symlink { target } => What::Symlink { target },
        EntryKind::HardLink { .. } => What::Link { rank: first_of(subject, rt, rank, entry)? },
        EntryKind::File { size, content, .. } => {
            let content = ContentRef { content: *content, size: *size, location: location.clone() };
            if *size > 0 && !rt.block_on(subject.fetcher.proves(&content)).map_err(BuildError::Fetch)? {
                return Err(BuildError::Misplaced { rank });
            }
            sink.file = Some(content);
            What::File { size: *size, location }
        }
    };
    // A later hard link has no attributes of its own, and the image needs none.
    let shown = subject.look.entry(Ino::of_rank(rank), entry);
    let attributes = Attributes {
        mode: shown.map_or(0, |attr| subject.mode(attr.mode, rank + 1)),
        mtime: entry.mtime,
        nlink: shown.map_or(1, |attr| attr.nlink),
    };
    Ok(writer.add(&Item { name: &entry.name, attributes, what }, sink)?)
}

/// Gives the rank of the file that a later hard link stands for.
fn first_of(subject: &Subject, rt: &Handle, rank: u64, entry: &Entry) -> Result<u64, BuildError> {
    let at = EntryAt { rank, entry: entry.clone(), dir: None };
    let root = &subject.snapshot.root;
    let found = rt.block_on(subject.meta.drive(|blocks| nav::resolve_link(root, blocks, &at)));
    match found {
        Ok(first) => Ok(first.rank),
        Err(MetaError::Nav(NavError::Damaged { rank, why })) => Err(BuildError::Tree { rank, why }),
        Err(error) => Err(BuildError::Meta(error)),
    }
}

struct FileSink<'a> {
    names: Buffered<'a>,
    inodes: Buffered<'a>,
    tails: &'a File,
    /// The file that is being written.
    file: Option<ContentRef>,
    subject: &'a Subject,
    rt: &'a Handle,
}

impl Sink for FileSink<'_> {
    type Error = BuildError;

    fn write(&mut self, section: Section, offset: u64, bytes: &[u8]) -> Result<(), BuildError> {
        let part = match section {
            Section::Names => &mut self.names,
            Section::Inodes => &mut self.inodes,
        };
        part.write(offset, bytes).map_err(BuildError::Write)
    }

    /// Through the fetcher, with the strictest check, whatever the mount asks for: an image serves later mounts as well,
    /// which may ask for more than this one.
    fn copy(&mut self, copied: &Copied) -> Result<(), BuildError> {
        let Some(content) = &self.file else {
            return Err(BuildError::Misplaced { rank: copied.rank });
        };
        let mut done = 0;
        while done < copied.len {
            let len = (copied.len - done).min(COPY_LEN);
            let read = self.subject.fetcher.read(content, copied.logical + done, len as u32, Verify::Always);
            let bytes = self.rt.block_on(read).map_err(BuildError::Fetch)?;
            if bytes.len() as u64 != len {
                return Err(BuildError::Misplaced { rank: copied.rank });
            }
            self.tails.write_all_at(&bytes, copied.to + done).map_err(BuildError::Write)?;
            done += len;
        }
        Ok(())
    }
}

/// Puts writes that follow each other together.
struct Buffered<'a> {
    file: &'a File,
    /// Where the section begins in the file.
    base: u64,
    /// Where the buffer begins in the section.
    at: u64,
    buf: Vec<u8>,
}

impl<'a> Buffered<'a> {
    fn new(file: &'a File, base: u64) -> Self {
        Self { file, base, at: 0, buf: Vec::with_capacity(BUFFER_LEN) }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = self.at + self.buf.len() as u64;
        if offset < self.at {
            return self.write_before(offset, bytes);
        }
        if offset > end + GAP_MAX || self.buf.len() > BUFFER_LEN {
            self.flush()?;
            self.at = offset;
        }
        let from = (offset - self.at) as usize;
        let to = from + bytes.len();
        if to > self.buf.len() {
            self.buf.resize(to, 0);
        }
        if let Some(target) = self.buf.get_mut(from..to) {
            target.copy_from_slice(bytes);
        }
        Ok(())
    }

    /// Changes what was flushed; it may reach into the buffer.
    fn write_before(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset + bytes.len() as u64 > self.at {
            self.flush()?;
        }
        self.file.write_all_at(bytes, self.base + offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buf, self.base + self.at)?;
        self.at += self.buf.len() as u64;
        self.buf.clear();
        Ok(())
    }
}
