//! The workers of one mount, over a descriptor that the keeper gave.
//!
//! The session never mounts and never unmounts; it ends when the kernel ends the connection. It takes
//! no cloned descriptors: a clone that only this process holds would take its requests with it.
//!
//! A later takeover of a mount that is already initialised fits in here: the descriptor that
//! [`Session::serve`] hands to fuser is then one end of a socket pair with a made-up INIT in it, over
//! which the real one is put. Nothing else in `fs` would know.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use fuser::{Config, SessionACL};
use tokio::runtime::Handle;

use super::fuse::{Adapter, Counters, Shared};
use super::handles::Handles;
use super::view::View;

/// How a mount is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServeOptions {
    /// Threads that read requests; 0: as many as suit the machine.
    pub workers: usize,
    /// Whether the kernel may read whole objects of the tier itself.
    pub passthrough: bool,
    /// Whether the tier may lie on an overlayfs. The kernel then stacks one deeper, and refuses an
    /// overlayfs on top of the mount.
    pub stacked: bool,
}

impl ServeOptions {
    /// Says whether files below `dir` need one more level of stacking to be handed to the kernel.
    pub fn needs_stacking(dir: &std::path::Path) -> bool {
        nix::sys::statfs::statfs(dir)
            .is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC)
    }
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { workers: 0, passthrough: true, stacked: false }
    }
}

/// Fewest and most workers that are chosen for a machine. A worker does no more than short local I/O,
/// but a tier on a slow server may hold it for a while.
const WORKERS_MIN: usize = 4;
const WORKERS_MAX: usize = 16;

/// What a mount has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct MountStats {
    pub requests: u64,
    /// Requests that waited for something to be fetched.
    pub waited: u64,
    /// Requests that were answered with EIO.
    pub errors: u64,
    pub read_bytes: u64,
    pub workers: u64,
    pub busy_workers: u64,
    pub open_files: u64,
    /// Of the open files, those that the kernel reads itself.
    pub passthrough_files: u64,
    /// Whether the kernel takes backing files here.
    pub passthrough: bool,
}

/// A mount that is being served.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    workers: usize,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Session {
    /// Serves a fresh mount: answers its INIT, then starts the workers. `slots` is the memory file for
    /// the records of what is open.
    pub fn serve(view: View, fuse: OwnedFd, slots: OwnedFd, options: ServeOptions, rt: Handle) -> io::Result<Self> {
        let workers = match options.workers {
            0 => thread::available_parallelism().map_or(WORKERS_MIN, |n| n.get() * 2).clamp(WORKERS_MIN, WORKERS_MAX),
            chosen => chosen,
        };
        let shared = Arc::new(Shared {
            view,
            handles: Arc::new(Handles::new(File::from(slots))?),
            counters: Counters::default(),
            device: File::from(fuse.try_clone()?),
            passthrough: AtomicBool::new(false),
            rt,
        });
        // The kernel takes backing files from root alone; to ask for them without would only forbid an
        // overlayfs on top of the mount.
        let passthrough = options.passthrough && nix::unistd::geteuid().is_root();
        let stack_depth = match (passthrough, options.stacked) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => 2,
        };
        let adapter = Adapter { shared: Arc::clone(&shared), stack_depth };
        let mut config = Config::default();
        config.n_threads = Some(workers);
        // The kernel lets in whom the mount options allow; asking again here would only cost.
        let session = fuser::Session::from_fd(adapter, fuse, SessionACL::All, config)?;
        let ended = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&ended);
        let thread = thread::Builder::new().name("fuse-session".to_owned()).spawn(move || {
            if let Err(error) = session.run() {
                tracing::error!(%error, "a mount is no longer served");
            }
            flag.store(true, Ordering::Release);
        })?;
        Ok(Self { shared, workers, ended, thread: Some(thread) })
    }

    /// Says whether the kernel still asks.
    pub fn is_alive(&self) -> bool {
        !self.ended.load(Ordering::Acquire)
    }

    /// Waits until the kernel has ended the connection.
    pub fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            // A worker that panicked has been reported by its thread; there is no more to say.
            let _ = thread.join();
        }
    }

    /// Copies the counters.
    pub fn stats(&self) -> MountStats {
        let counters = &self.shared.counters;
        let (open_files, passthrough_files) = self.shared.handles.open_now();
        MountStats {
            requests: counters.requests.load(Ordering::Relaxed),
            waited: counters.waited.load(Ordering::Relaxed),
            errors: counters.errors.load(Ordering::Relaxed),
            read_bytes: counters.read_bytes.load(Ordering::Relaxed),
            workers: self.workers as u64,
            busy_workers: counters.busy_workers.load(Ordering::Relaxed),
            open_files,
            passthrough_files,
            passthrough: self.shared.passthrough.load(Ordering::Relaxed),
        }
    }

    /// Gives the view that is served.
    pub fn view(&self) -> &View {
        &self.shared.view
    }
}
