//! The scheduler's thread, and how others speak with it.
//!
//! One thread owns the [`Core`]: requests come through a channel and are done between its turns. Nothing
//! else touches the state, so there is no lock and no order of locks.

use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::core::{Core, Options};
use super::error::SchedulerError;
use super::lake_side::LakeSide;
use super::mounts::MountEnd;
use super::store::StoreError;
use super::watch::Watch;

type Request = Box<dyn FnOnce(&mut Core) + Send>;

/// Speaks with the scheduler's thread. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    requests: Sender<Request>,
    stopping: Arc<AtomicBool>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    /// Runs something on the scheduler's thread and gives what it gave.
    pub async fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Core) -> T + Send + 'static,
    ) -> Result<T, SchedulerError> {
        let (tell, told) = oneshot::channel();
        let request: Request = Box::new(move |core| {
            let _ = tell.send(what(core));
        });
        self.requests.send(request).map_err(|_| SchedulerError::Stopping)?;
        told.await.map_err(|_| SchedulerError::Stopping)
    }

    /// Ends the thread after its present turn. Jobs go on.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        // It may be waiting for a request.
        let _ = self.requests.send(Box::new(|_| {}));
    }

    /// Says whether it was told to end.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

/// A scheduler that has its directory's lock, and does nothing yet.
#[derive(Debug)]
pub struct Opened {
    core: Core,
    ends: Receiver<MountEnd>,
}

/// Takes the lock of a socket, beside it: schedulers with other directories must not take it away from this
/// one. It is given back when the file is closed.
pub fn lock_socket(socket: &Path) -> Result<File, StoreError> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    if let Some(dir) = socket.parent() {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir);
        made.map_err(super::disk::at(dir, "make the directory"))?;
    }
    super::disk::try_lock(Path::new(&path))?.ok_or_else(|| StoreError::SocketTaken { socket: socket.to_owned() })
}

/// Opens the scheduler's directory.
pub fn open(options: Options, lake: Arc<dyn LakeSide>) -> Result<Opened, StoreError> {
    let (ends_to, ends) = channel();
    Ok(Opened { core: Core::open(options, lake, ends_to)?, ends })
}

impl Opened {
    /// Starts the scheduler's thread. Its end, also by a panic, cancels `ended`.
    pub fn start(self, ended: CancellationToken) -> Result<(Handle, std::thread::JoinHandle<()>), StoreError> {
        let (requests, incoming) = channel();
        let handle = Handle { requests, stopping: Arc::new(AtomicBool::new(false)) };
        let stopping = Arc::clone(&handle.stopping);
        let Self { mut core, ends } = self;
        let tell = handle.requests.clone();
        core.watch = Watch::start(move |job| {
            let _ = tell.send(Box::new(move |core: &mut Core| core.tell_ended(job)));
        });
        let spawned = std::thread::Builder::new()
            .name("scheduler".to_owned())
            .spawn(move || {
                let _ended = ended.drop_guard();
                turns(core, &incoming, &ends, &stopping);
            })
            .map_err(super::disk::at(std::path::Path::new("/proc/self"), "start the scheduler's thread"))?;
        Ok((handle, spawned))
    }
}

fn turns(mut core: Core, incoming: &Receiver<Request>, ends: &Receiver<MountEnd>, stopping: &AtomicBool) {
    while !stopping.load(Ordering::Relaxed) {
        while let Ok(end) = ends.try_recv() {
            core.mounts.ended(end);
        }
        core.turn();
        match incoming.recv_timeout(core.pause()) {
            Ok(request) => {
                request(&mut core);
                while let Ok(request) = incoming.try_recv() {
                    request(&mut core);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
