//! The answers that take more than a conversion: opens, reads, extended attributes.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use fuser::{FileHandle, FopenFlags, INodeNo, ReplyData, ReplyOpen, ReplyXattr};

use crate::fs::handles::{Latch, OpenError};
use crate::fs::sys;
use crate::fs::view::{Ino, ViewError, expected_len};
use crate::store::fetch::ContentRef;

use super::{READ_BYTES_MAX, Shared, errno};

/// Answers an OPEN; in a task, where its file may have to be looked for on a server.
pub(super) fn open_late_or_now(
    shared: &Arc<Shared>,
    ino: INodeNo,
    fh: u64,
    reply: ReplyOpen,
    content: Result<Option<Arc<ContentRef>>, ViewError>,
) {
    let late = content.as_ref().ok().and_then(|content| content.clone());
    let Some(late) = late.filter(|content| shared.view.waits_for_whole(content)) else {
        return send_open(shared, ino, fh, reply, content);
    };
    let shared_ = Arc::clone(shared);
    shared.rt.spawn(async move {
        shared_.view.look_for_whole(&late).await;
        send_open(&shared_, ino, fh, reply, Ok(Some(late)));
    });
}

/// Answers an OPEN as the inode is latched, deciding that where it is not.
fn send_open(
    shared: &Arc<Shared>,
    ino: INodeNo,
    fh: u64,
    reply: ReplyOpen,
    content: Result<Option<Arc<ContentRef>>, ViewError>,
) {
    let content = match content {
        Ok(Some(content)) => content,
        Ok(None) => return reply.error(shared.fail("open", ino, &ViewError::NotFile)),
        Err(error) => return reply.error(shared.fail("open", ino, &error)),
    };
    // Outside of the lock: it may have to open a file.
    let undecided = shared.handles.latch(Ino(ino.0)).is_none();
    let whole = if undecided { shared.backing_file(&content) } else { None };
    let opened = shared.handles.open(Ino(ino.0), fh, || whole.as_ref().and_then(|whole| shared.register(whole)));
    send_opened(shared, ino, fh, reply, opened);
}

pub(super) fn close_backing(shared: &Shared, id: u32) {
    if let Err(error) = sys::backing_close(&shared.device, id) {
        tracing::warn!(id, %error, "cannot close a backing file");
    }
}

/// Tells the kernel how a recorded open is read.
pub(super) fn send_opened(shared: &Shared, ino: INodeNo, fh: u64, reply: ReplyOpen, opened: Result<Latch, OpenError>) {
    match opened {
        Ok(Latch::Cached) => {
            reply.opened(FileHandle(fh), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
        }
        Ok(Latch::Backed(id)) => {
            // SAFETY: the id was registered on this connection and stays so until the inode's last
            // release, which cannot come before this answer; the wrapper is dissolved before it could
            // close the id.
            let backing = unsafe { reply.wrap_backing(id) };
            reply.opened_passthrough(FileHandle(fh), FopenFlags::FOPEN_NOFLUSH, &backing);
            let _ = backing.into_raw();
        }
        Err(OpenError::Full) => {
            return reply.error(shared.fail("open", ino, &ViewError::TooManyOpen));
        }
        Err(OpenError::Record(error)) => {
            tracing::error!(%error, ino = ino.0, "an open file cannot be recorded with the keeper");
            return reply.error(fuser::Errno::EIO);
        }
    }
    shared.handles.answered(Ino(ino.0), fh);
}

thread_local! {
    /// A worker's buffer for reads, touched once so that it is resident.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Reads what this node has into the worker's buffer and answers. The reply comes back where something
/// has to be fetched.
pub(super) fn read_now(
    shared: &Shared,
    ino: INodeNo,
    content: &ContentRef,
    offset: u64,
    len: usize,
    reply: ReplyData,
) -> Option<ReplyData> {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < len {
            buffer.resize(len.max(READ_BYTES_MAX), 0);
        }
        let room = buffer.get_mut(..len).unwrap_or_default();
        match shared.view.try_read(content, offset, room) {
            None => return Some(reply),
            Some(Ok(read)) if read == expected_len(content, offset, len) => {
                shared.counters.read_bytes.fetch_add(read as u64, Ordering::Relaxed);
                reply.data(buffer.get(..read).unwrap_or_default());
            }
            Some(Ok(_)) => reply.error(short_read(shared, ino)),
            Some(Err(error)) => reply.error(shared.fail("read", ino, &error)),
        }
        None
    })
}

pub(super) fn short_read(shared: &Shared, ino: INodeNo) -> fuser::Errno {
    shared.counters.errors.fetch_add(1, Ordering::Relaxed);
    tracing::error!(ino = ino.0, "answered with EIO: the fetcher gave fewer bytes than the file has");
    fuser::Errno::EIO
}

pub(super) fn send_read(
    shared: &Shared,
    ino: INodeNo,
    content: &ContentRef,
    offset: u64,
    len: u32,
    result: Result<Bytes, ViewError>,
    reply: ReplyData,
) {
    match result {
        Ok(bytes) if bytes.len() == expected_len(content, offset, len as usize) => {
            shared.counters.read_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            reply.data(&bytes);
        }
        Ok(_) => reply.error(short_read(shared, ino)),
        Err(error) => reply.error(shared.fail("read", ino, &error)),
    }
}

/// Answers with a value, its size, or ERANGE, as getxattr and listxattr want it.
pub(super) fn send_xattr(
    shared: &Shared,
    ino: INodeNo,
    size: u32,
    value: Result<Vec<u8>, ViewError>,
    reply: ReplyXattr,
) {
    match value {
        Ok(value) if size == 0 => reply.size(u32::try_from(value.len()).unwrap_or(u32::MAX)),
        Ok(value) if value.len() <= size as usize => reply.data(&value),
        Ok(_) => reply.error(errno(&ViewError::SmallBuffer)),
        Err(error) => reply.error(shared.fail("xattr", ino, &error)),
    }
}
