//! The adapter between the kernel's requests and the view: nothing but conversion and dispatch.
//!
//! * [`convert`]: types. * [`answers`]: opens, reads, extended attributes. * this file: the handlers.
//!
//! Each handler asks the view for an answer from memory and local disks, on the worker that read the
//! request. Where something has to be fetched, the reply moves into a task. Replies are errors from
//! one table (`crate::fs::errno`), which are logged here, once, where they become EIO.
//!
//! Every operation that would change something is refused in one place (`read_only`); the mount is
//! read-only as well, so the kernel refuses nearly all of them before they get here.
//!
//! No directory is opened (the kernel then caches listings by itself, without a request at each end), nor a file
//! where it can't be a backing file anyway; no file is flushed, and nothing is ever invalidated: a commit does not
//! change.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BackingId, BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, Generation, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek,
    ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use tokio::runtime::Handle;
use tracing::Instrument;

use crate::format::tree::nav::{Blocks, NavError};
use crate::store::fetch::{ContentRef, WholeFile};
use crate::store::histogram::Histogram;

use super::errno::{errno_of, is_ordinary};
use super::handles::Handles;
use super::session::gate::{AT_THE_GATE, Gate, RESENT, Settled};
use super::view::{Attr, Ino, Names, View, ViewError};

mod answers;
mod convert;

use answers::{close_backing, open_late_or_now, read_now, send_opened, send_read, send_xattr};
use convert::{Listing, causes, file_attr, fill, no_entry};

/// How long the kernel may keep names and attributes: a commit does not change. Ten years.
const TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// A number is never used for another inode of the same commit.
const GENERATION: Generation = Generation(0);
/// Names that are taken out of the tree at a time for a listing; a page of them is about 100.
const LIST_CHUNK: usize = 128;
/// Longest name, as statfs tells.
const NAME_LEN_MAX: usize = 255;
/// What statfs counts in.
const BLOCK_BYTES: u64 = 4096;
/// Reads ahead that may wait for us at a time (the kernel's default of 12 is made for local daemons).
const BACKGROUND_MAX: u16 = 128;
/// The largest read that the kernel sends.
const READ_BYTES_MAX: usize = 1 << 20;

/// Counters of one mount.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub requests: AtomicU64,
    /// Requests that had to wait for something to be fetched.
    pub waited: AtomicU64,
    /// How long those took.
    pub waits: Histogram,
    pub errors: AtomicU64,
    pub read_bytes: AtomicU64,
    pub busy_workers: AtomicU64,
}

/// What workers and tasks share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub view: View,
    pub handles: Arc<Handles>,
    pub counters: Counters,
    /// A duplicate of the /dev/fuse descriptor, for the ioctls.
    pub device: File,
    /// Whether the kernel takes backing files from us. Becomes false when it refuses for good.
    pub passthrough: AtomicBool,
    /// Whether the kernel opens files by itself, and tells nobody. Said at its first question, or never.
    pub skips_opens: AtomicBool,
    /// Where workers wait until the device is theirs.
    pub gate: Gate,
    /// What a daemon before this one had taken has come again.
    pub settled: Settled,
    /// Whether the kernel gives requests again that a dead daemon had taken.
    pub can_resend: bool,
    pub rt: Handle,
}

/// The file system as fuser sees it.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub shared: Arc<Shared>,
    /// 2 where backing files may lie on an overlayfs, else 1; 0: no passthrough.
    pub stack_depth: u32,
}

/// Refuses an operation that would change something.
macro_rules! read_only {
    ($reply:expr) => {
        $reply.error(errno(&ViewError::ReadOnly))
    };
}

fn errno(error: &ViewError) -> fuser::Errno {
    fuser::Errno::from_i32(errno_of(error) as i32)
}

/// Counts a worker as busy while it lives.
struct Busy<'a>(&'a AtomicU64);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    fn enter(&self) -> Busy<'_> {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        self.counters.busy_workers.fetch_add(1, Ordering::Relaxed);
        Busy(&self.counters.busy_workers)
    }

    /// Turns an error into what the kernel gets, and writes it down where it is one of ours.
    fn fail(&self, operation: &'static str, ino: INodeNo, error: &ViewError) -> fuser::Errno {
        if !is_ordinary(error) {
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
            let commit = self.view.commit().short();
            let causes = causes(error);
            tracing::error!(operation, ino = ino.0, commit, "answered with EIO: {error}{causes}");
        }
        errno(error)
    }

    /// Gives the file of a content that the kernel may read itself.
    fn backing_file(&self, content: &ContentRef) -> Option<WholeFile> {
        if self.settled.is_settled() { self.view.whole(content) } else { None }
    }

    /// Gives the id of a backing file.
    fn register(&self, whole: &WholeFile) -> Option<u32> {
        match BackingId::create_raw(&self.device, &*whole.file) {
            Ok(id) => Some(id),
            Err(error) => {
                if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOTTY | libc::EOPNOTSUPP)) {
                    self.passthrough.store(false, Ordering::Relaxed);
                    tracing::info!(%error, "the kernel takes no backing files from this daemon; it reads through it instead");
                } else {
                    tracing::warn!(%error, "the kernel refused a backing file; it is read through the daemon");
                }
                None
            }
        }
    }
}

impl Adapter {
    /// Runs a handler on its worker: in the request's span, counted, and so that a bug in it costs this
    /// request (its reply says EIO when it is dropped unsent) and not the worker.
    fn on_worker(&self, span: &tracing::Span, work: impl FnOnce()) {
        let _entered = span.enter();
        let _busy = self.shared.enter();
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            self.shared.counters.errors.fetch_add(1, Ordering::Relaxed);
            tracing::error!("answered with EIO: this is a bug in larder, please report it");
        }
    }

    /// Goes on in a task.
    fn wait_in_task(&self, span: tracing::Span, task: impl Future<Output = ()> + Send + 'static) {
        self.shared.counters.waited.fetch_add(1, Ordering::Relaxed);
        let (shared, begun) = (Arc::clone(&self.shared), Instant::now());
        let timed = async move {
            task.await;
            shared.counters.waits.note(begun.elapsed());
        };
        self.shared.rt.spawn(timed.instrument(span));
    }

    /// Answers from what this node has, else from a task that fetches first.
    fn answer<T, R>(
        &self,
        span: tracing::Span,
        reply: R,
        mut navigate: impl FnMut(&Names, &dyn Blocks) -> Result<T, NavError> + Send + 'static,
        send: impl FnOnce(&Arc<Shared>, R, Result<T, ViewError>) + Send + 'static,
    ) where
        T: Send + 'static,
        R: Send + 'static,
    {
        self.on_worker(&span.clone(), || {
            if let Some(result) = self.shared.view.now(&mut navigate) {
                return send(&self.shared, reply, result);
            }
            let shared = Arc::clone(&self.shared);
            self.wait_in_task(span, async move {
                let result = shared.view.soon(navigate).await;
                send(&shared, reply, result);
            });
        });
    }

    /// Lists names into a reply until it is full or has something and more would have to be fetched.
    fn list(&self, span: tracing::Span, ino: INodeNo, offset: u64, mut listing: Listing) {
        let dir = Ino(ino.0);
        self.on_worker(&span.clone(), || {
            let mut from = offset;
            loop {
                let chunk = |names: &Names, blocks: &dyn Blocks| names.list(blocks, dir, from, LIST_CHUNK);
                match self.shared.view.now(chunk) {
                    Some(Ok(listed)) => match fill(&mut listing, &listed) {
                        Some(next) => from = next,
                        None => return listing.finish(Ok(())),
                    },
                    Some(Err(error)) => {
                        return listing.finish(Err(self.shared.fail("readdir", ino, &error)));
                    }
                    None if from != offset => return listing.finish(Ok(())),
                    None => break,
                }
            }
            let shared = Arc::clone(&self.shared);
            self.wait_in_task(span, async move {
                let chunk = |names: &Names, blocks: &dyn Blocks| names.list(blocks, dir, from, LIST_CHUNK);
                let result = shared.view.soon(chunk).await;
                let result = result.map(|listed| fill(&mut listing, &listed)).map(|_| ());
                listing.finish(result.map_err(|error| shared.fail("readdir", ino, &error)));
            });
        });
    }

    /// Reads from what this node has, else in a task.
    fn read_range(&self, span: tracing::Span, ino: INodeNo, offset: u64, size: u32, reply: ReplyData) {
        // Dropped after the answer, wherever that is given.
        let reading = self.shared.handles.reading(Ino(ino.0));
        let navigate = move |names: &Names, blocks: &dyn Blocks| names.content(blocks, Ino(ino.0));
        let known = match self.shared.view.now(navigate) {
            Some(Ok(Some(content))) => Some(content),
            Some(Ok(None)) => return reply.error(errno(&ViewError::NotFile)),
            Some(Err(error)) => return reply.error(self.shared.fail("read", ino, &error)),
            None => None,
        };
        let reply = match &known {
            Some(content) => match read_now(&self.shared, ino, content, offset, size as usize, reply) {
                Some(reply) => reply,
                None => return,
            },
            None => reply,
        };
        let shared = Arc::clone(&self.shared);
        self.wait_in_task(span, async move {
            let content = match known {
                Some(content) => Ok(content),
                None => {
                    let found = shared.view.soon(navigate).await;
                    found.and_then(|content| content.ok_or(ViewError::NotFile))
                }
            };
            match content {
                Ok(content) => {
                    let result = shared.view.read(&content, offset, size).await;
                    send_read(&shared, ino, &content, offset, size, result, reply);
                }
                Err(error) => reply.error(shared.fail("read", ino, &error)),
            }
            drop(reading);
        });
    }
}

fn want(config: &mut KernelConfig, flags: InitFlags) -> bool {
    config.add_capabilities(flags).is_ok()
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flags in [
            InitFlags::FUSE_DO_READDIRPLUS,
            // Attributes only where somebody looks at them: a walk of 10 million names need not
            // leave 10 million inodes in the kernel.
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            InitFlags::FUSE_HAS_RESEND,
            InitFlags::FUSE_ALLOW_IDMAP,
        ] {
            want(config, flags);
        }
        let passthrough = self.stack_depth > 0
            && want(config, InitFlags::FUSE_PASSTHROUGH)
            && config.set_max_stack_depth(self.stack_depth).is_ok();
        self.shared.passthrough.store(passthrough, Ordering::Relaxed);
        let _ = config.set_max_background(BACKGROUND_MAX);
        // Also bounds what the kernel asks for in one read.
        let _ = config.set_max_write(READ_BYTES_MAX as u32);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let span = tracing::debug_span!("lookup", req = req.unique().0, ino = parent.0, name = ?name);
        let send = move |shared: &Arc<Shared>, reply: ReplyEntry, found: Result<Option<Attr>, ViewError>| match found {
            Ok(Some(attr)) => reply.entry(&TTL, &file_attr(&attr), GENERATION),
            Ok(None) => reply.entry(&TTL, &no_entry(), GENERATION),
            Err(error) => reply.error(shared.fail("lookup", parent, &error)),
        };
        // The kernel takes longer names for this file system; no tree has one.
        if name.len() > NAME_LEN_MAX {
            return reply.error(fuser::Errno::ENAMETOOLONG);
        }
        let name: Box<[u8]> = name.as_bytes().into();
        self.answer(span, reply, move |names, blocks| names.lookup(blocks, Ino(parent.0), &name), send);
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        // Nothing is counted. The message that brings a worker to the gate looks like a forget, since that
        // is the request without an answer; the kernel never forgets this number.
        if ino.0 == AT_THE_GATE && nlookup == AT_THE_GATE {
            self.shared.gate.wait();
        }
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let span = tracing::debug_span!("getattr", req = req.unique().0, ino = ino.0);
        let send = move |shared: &Arc<Shared>, reply: ReplyAttr, found: Result<Attr, ViewError>| match found {
            Ok(attr) => reply.attr(&TTL, &file_attr(&attr)),
            Err(error) => reply.error(shared.fail("getattr", ino, &error)),
        };
        self.answer(span, reply, move |names, blocks| names.attr(blocks, Ino(ino.0)), send);
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        let span = tracing::debug_span!("readlink", req = req.unique().0, ino = ino.0);
        let send =
            move |shared: &Arc<Shared>, reply: ReplyData, found: Result<Option<Box<[u8]>>, ViewError>| match found
                .and_then(|target| target.ok_or(ViewError::NotLink))
            {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(shared.fail("readlink", ino, &error)),
            };
        self.answer(span, reply, move |names, blocks| names.readlink(blocks, Ino(ino.0)), send);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            return read_only!(reply);
        }
        let span = tracing::debug_span!("open", req = req.unique().0, ino = ino.0);
        if self.shared.skips_opens.load(Ordering::Relaxed) {
            // The kernel does not ask again, and sends no release.
            return reply.error(fuser::Errno::ENOSYS);
        }
        let fh = req.unique().0 & !RESENT;
        self.shared.settled.saw(req.unique().0 != fh);
        let undecided = self.shared.handles.latch(Ino(ino.0)).is_none();
        if !undecided || !self.shared.passthrough.load(Ordering::Relaxed) {
            return self.on_worker(&span, || {
                // No id can be given here: where the latch went meanwhile, the page cache it is.
                let opened = self.shared.handles.open(Ino(ino.0), fh, || None);
                send_opened(&self.shared, ino, fh, reply, opened);
            });
        }
        let send = move |shared: &Arc<Shared>, reply, content| open_late_or_now(shared, ino, fh, reply, content);
        self.answer(span, reply, move |names, blocks| names.content(blocks, Ino(ino.0)), send);
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let span = tracing::debug_span!("read", req = req.unique().0, ino = ino.0, offset, size);
        self.on_worker(&span.clone(), || self.read_range(span, ino, offset, size, reply));
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        // The kernel does not ask again.
        reply.error(fuser::Errno::ENOSYS);
    }

    fn release(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let span = tracing::debug_span!("release", req = req.unique().0, ino = ino.0, fh = fh.0);
        self.on_worker(&span, || {
            let handles = &self.shared.handles;
            handles.release(Ino(ino.0), fh.0, |id| close_backing(&self.shared, id));
            reply.ok();
        });
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // The kernel does not ask again, caches listings, and sends no release.
        reply.error(fuser::Errno::ENOSYS);
    }

    fn readdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        let span = tracing::debug_span!("readdir", req = req.unique().0, ino = ino.0, offset);
        self.list(span, ino, offset, Listing::Names(reply));
    }

    fn readdirplus(&self, req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        let span = tracing::debug_span!("readdirplus", req = req.unique().0, ino = ino.0, offset);
        self.list(span, ino, offset, Listing::Plus(reply));
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let _busy = self.shared.enter();
        let totals = self.shared.view.totals();
        let blocks = totals.bytes.div_ceil(BLOCK_BYTES);
        reply.statfs(blocks, 0, 0, totals.inodes, 0, BLOCK_BYTES as u32, 255, BLOCK_BYTES as u32);
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let span = tracing::debug_span!("getxattr", req = req.unique().0, ino = ino.0, name = ?name);
        let send = move |shared: &Arc<Shared>, reply: ReplyXattr, found: Result<Option<String>, ViewError>| {
            let value = found.and_then(|value| value.ok_or(ViewError::NoXattr)).map(String::into_bytes);
            send_xattr(shared, ino, size, value, reply);
        };
        let name: Box<[u8]> = name.as_bytes().into();
        self.answer(span, reply, move |names, blocks| names.xattr(blocks, Ino(ino.0), &name), send);
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let span = tracing::debug_span!("listxattr", req = req.unique().0, ino = ino.0);
        let send = move |shared: &Arc<Shared>, reply: ReplyXattr, found: Result<Vec<&'static [u8]>, ViewError>| {
            let list =
                |names: Vec<&[u8]>| names.into_iter().flat_map(|name| [name, b"\0"]).flatten().copied().collect();
            send_xattr(shared, ino, size, found.map(list), reply);
        };
        self.answer(span, reply, move |names, blocks| names.xattr_names(blocks, Ino(ino.0)), send);
    }

    fn lseek(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _offset: i64, _whence: i32, reply: ReplyLseek) {
        // The kernel then answers SEEK_DATA and SEEK_HOLE itself: all data up to the size.
        reply.error(fuser::Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        // The kernel does not ask again and reports files as always ready.
        reply.error(fuser::Errno::ENOSYS);
    }

    // --- what would change something -----------------------------------------------------------

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        read_only!(reply);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _mode: u32, _umask: u32, _rdev: u32, reply: ReplyEntry) {
        read_only!(reply);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        read_only!(reply);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        read_only!(reply);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        read_only!(reply);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        read_only!(reply);
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        read_only!(reply);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        read_only!(reply);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _offset: u64,
        _data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        read_only!(reply);
    }

    fn setxattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        read_only!(reply);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        read_only!(reply);
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _mode: u32, _umask: u32, _flags: i32, reply: ReplyCreate) {
        read_only!(reply);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        read_only!(reply);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _offset_in: u64,
        _: INodeNo,
        _: FileHandle,
        _offset_out: u64,
        _len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        read_only!(reply);
    }
}
