//! The workers of one mount, over a descriptor that the keeper gave.
//!
//! The session never mounts and never unmounts; it ends when the kernel ends the connection. It takes
//! no cloned descriptors: a clone that only this process holds would take its requests with it.
//!
//! A mount that another daemon served is taken over, one that is new is greeted; both in the same way
//! (`docs/formats/handover.md`): fuser gets one end of a pair of sockets with INIT in it, its workers come to the
//! gate, and the device is put in the socket's place. * [`device`]: what is said to the kernel beside fuser.
//! * [`gate`]: where the workers wait.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use fuser::{BackingId, Config, SessionACL};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use tokio::runtime::Handle;

use super::fuse::{Adapter, Counters, Shared};
use super::handles::{Found, Greeting, Handles, Left, Slots};
use super::sys;
use super::view::View;
use crate::store::histogram::Times;

mod device;
pub(crate) mod gate;

use gate::{Gate, Settled};

/// Version of the hand-over: of the record, and of what daemon and keeper say to each other.
pub const HANDOVER: u32 = 2;

/// How long the workers may take to come to the gate: they have nothing else to do.
const GATE_TIMEOUT: Duration = Duration::from_secs(120);
/// What an answer to INIT may take.
const GREETING_ANSWER_BYTES_MAX: usize = 4096;

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
    /// Whether it has to be known at any time if a file is open. It costs a question to us at each open and each
    /// close, which are left out otherwise where they gain nothing.
    pub counts_opens: bool,
}

impl ServeOptions {
    /// Says whether files below `dir` need one more level of stacking to be handed to the kernel.
    pub fn needs_stacking(dir: &std::path::Path) -> bool {
        nix::sys::statfs::statfs(dir)
            .is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC)
    }
}

impl ServeOptions {
    fn workers(&self) -> usize {
        match self.workers {
            0 => thread::available_parallelism().map_or(WORKERS_MIN, |n| n.get() * 2).clamp(WORKERS_MIN, WORKERS_MAX),
            chosen => chosen,
        }
    }

    /// The kernel takes backing files from root alone; to ask for them without would only forbid an
    /// overlayfs on top of the mount.
    fn wants_passthrough(&self) -> bool {
        self.passthrough && nix::unistd::geteuid().is_root()
    }

    fn stack_depth(&self) -> u32 {
        match (self.wants_passthrough(), self.stacked) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => 2,
        }
    }
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { workers: 0, passthrough: true, stacked: false, counts_opens: false }
    }
}

/// Fewest and most workers that are chosen for a machine. A worker does no more than short local I/O,
/// but a tier on a slow server may hold it for a while.
const WORKERS_MIN: usize = 4;
const WORKERS_MAX: usize = 16;

/// What a mount has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct MountStats {
    pub requests: u64,
    /// Requests that waited for something to be fetched.
    pub waited: u64,
    /// Requests that were answered with EIO.
    pub errors: u64,
    pub read_bytes: u64,
    /// Opens of files that the daemon serves.
    pub cached_opens: u64,
    /// Opens of files that the kernel reads itself.
    pub passthrough_opens: u64,
    pub workers: u64,
    pub busy_workers: u64,
    pub open_files: u64,
    /// Of the open files, those that the kernel reads itself.
    pub passthrough_files: u64,
    /// Whether the kernel takes backing files here.
    pub passthrough: bool,
    /// Whether the kernel opens files without telling: then `open_files` counts none.
    pub skips_opens: bool,
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
    /// Serves a mount: a new one, or one that another daemon left. `slots` is the memory file with its
    /// record. Nobody else may read from the device.
    pub fn serve(view: View, fuse: OwnedFd, slots: OwnedFd, options: ServeOptions, rt: Handle) -> io::Result<Self> {
        let (device, slots) = (File::from(fuse), File::from(slots));
        let left = match Slots::load(&slots)? {
            Found::Empty => None,
            Found::Record(left) => Some(left),
            Found::Foreign => return Err(unsupported("its record was written by another version of larder")),
        };
        let greeted = left.as_ref().and_then(|left| left.greeting.clone());
        let handles = match &left {
            Some(left) => Handles::resume(slots, left),
            None => Handles::new(slots)?,
        };
        let init = match &greeted {
            Some(greeting) => greeting.request.clone(),
            None => first_init(&device, left.is_some())?,
        };
        let shared = Arc::new(Shared {
            view,
            handles: Arc::new(handles),
            counters: Counters::default(),
            device,
            passthrough: AtomicBool::new(false),
            skips_opens: AtomicBool::new(false),
            gate: Gate::default(),
            settled: Settled::new(greeted.is_some()),
            can_resend: device::can_resend(&init),
            rt,
        });
        let workers = options.workers();
        let joint = Joint::new(&init)?;
        let session =
            joint.start(Adapter { shared: Arc::clone(&shared), stack_depth: options.stack_depth() }, workers)?;
        let greeting = Greeting { request: init, answer: session.answer };
        let agreed = match &left {
            Some(left) if greeted.is_some() => go_on(&shared, left, &options)?,
            _ => greet(&shared, &greeting)?,
        };
        shared.passthrough.store(agreed, Ordering::Relaxed);
        // A handle that the kernel has would never be released: not while there is one.
        let has_handles = left.as_ref().is_some_and(|left| !left.slots.is_empty());
        let gains = options.counts_opens || (agreed && shared.view.gains_by_opens());
        shared.skips_opens.store(!gains && !has_handles, Ordering::Relaxed);
        let ended = Arc::new(AtomicBool::new(false));
        let thread = run(session.session, Arc::clone(&ended))?;
        let handed = session.joint.hand_over(&shared, workers, greeted.is_some());
        // Also where it failed: the workers then find the socket closed, and end.
        shared.gate.open();
        handed?;
        Ok(Self { shared, workers, ended, thread: Some(thread) })
    }

    /// Says whether another daemon can take the mount over while it is in use.
    pub fn can_hand_over(&self) -> bool {
        self.shared.can_resend
    }

    /// Gives device and record once more, for another keeper.
    pub fn descriptors(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        Ok((self.shared.device.try_clone()?.into(), self.shared.handles.record().duplicate()?.into()))
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
        let (cached_opens, passthrough_opens) = self.shared.handles.opens();
        MountStats {
            requests: counters.requests.load(Ordering::Relaxed),
            waited: counters.waited.load(Ordering::Relaxed),
            errors: counters.errors.load(Ordering::Relaxed),
            read_bytes: counters.read_bytes.load(Ordering::Relaxed),
            cached_opens,
            passthrough_opens,
            workers: self.workers as u64,
            busy_workers: counters.busy_workers.load(Ordering::Relaxed),
            open_files,
            passthrough_files,
            passthrough: self.shared.passthrough.load(Ordering::Relaxed),
            skips_opens: self.shared.skips_opens.load(Ordering::Relaxed),
        }
    }

    /// Gives how long the requests took that waited for something to be fetched.
    pub fn waits(&self) -> Times {
        self.shared.counters.waits.times()
    }

    /// Gives the view that is served.
    pub fn view(&self) -> &View {
        &self.shared.view
    }
}

fn unsupported(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, why)
}

/// Makes a backing id.
fn make_backing_id(device: &File, file: &impl AsFd) -> io::Result<u32> {
    BackingId::create_raw(device, file)
}

/// Reads the kernel's first request; again, where a daemon may have died with it in its hands.
fn first_init(device: &File, again: bool) -> io::Result<Vec<u8>> {
    let sent = if again { device::resend(device) } else { Ok(()) };
    match device::read_greeting(device) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut && sent.is_err() => Err(unsupported(
            "a dead daemon has taken its greeting, and this kernel (before 6.9) does not give it again",
        )),
        other => other,
    }
}

/// Answers a new mount's INIT; the answer is on record before. Says whether passthrough is agreed.
fn greet(shared: &Shared, greeting: &Greeting) -> io::Result<bool> {
    let record = shared.handles.record();
    record.prepare_greeting(greeting)?;
    device::answer(&shared.device, &greeting.answer)?;
    record.greeted()?;
    Ok(device::has_passthrough(&greeting.answer))
}

/// Finishes what the daemon before left half done. Says whether passthrough is agreed, and wanted.
fn go_on(shared: &Shared, left: &Left, options: &ServeOptions) -> io::Result<bool> {
    let record = shared.handles.record();
    let Some(greeting) = &left.greeting else { return Ok(false) };
    if !device::can_resend(&greeting.request) {
        return Err(unsupported("this kernel (before 6.9) does not give requests again that a dead daemon had taken"));
    }
    device::answer(&shared.device, &greeting.answer)?;
    record.greeted()?;
    let agreed = device::has_passthrough(&greeting.answer);
    let takes = device::settle(&shared.device, record, left, agreed && nix::unistd::geteuid().is_root())?;
    Ok(takes && options.wants_passthrough())
}

/// The pair of sockets over which fuser is started; its end is replaced by the device.
struct Joint {
    ours: OwnedFd,
    theirs: Option<OwnedFd>,
    /// The number under which fuser knows its end.
    number: RawFd,
}

struct Started {
    session: fuser::Session<Adapter>,
    /// What fuser said to INIT.
    answer: Vec<u8>,
    joint: Joint,
}

impl Joint {
    fn new(init: &[u8]) -> io::Result<Self> {
        let (ours, theirs) = sys::seqpacket_pair()?;
        // A worker that does not read would hold the sender for ever.
        setsockopt(&ours, sockopt::SendTimeout, &TimeVal::seconds(GATE_TIMEOUT.as_secs().cast_signed()))?;
        sys::send_message(ours.as_fd(), init, &[])?;
        let number = theirs.as_raw_fd();
        Ok(Self { ours, theirs: Some(theirs), number })
    }

    /// Has fuser greet.
    fn start(mut self, adapter: Adapter, workers: usize) -> io::Result<Started> {
        let mut config = Config::default();
        config.n_threads = Some(workers);
        let theirs = self.theirs.take().ok_or(io::ErrorKind::NotConnected)?;
        // The kernel lets in whom the mount options allow; asking again here would only cost.
        let session = fuser::Session::from_fd(adapter, theirs, SessionACL::All, config)?;
        let (answer, _) = sys::receive_message(self.ours.as_fd(), GREETING_ANSWER_BYTES_MAX)?;
        Ok(Started { session, answer, joint: self })
    }

    /// Brings all workers to the gate, with their buffers resident, and puts the device in the socket's
    /// place. `again`: what was read before and not answered is to come first.
    fn hand_over(self, shared: &Shared, workers: usize, again: bool) -> io::Result<()> {
        let message = device::gate_message();
        for _ in 0..workers {
            sys::send_message(self.ours.as_fd(), &message, &[])?;
        }
        if !shared.gate.has_all(workers, GATE_TIMEOUT) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the workers do not start"));
        }
        if again && let Err(error) = device::resend(&shared.device) {
            tracing::debug!(%error, "this kernel sends no request again");
        }
        sys::put_over(self.number, shared.device.as_fd())
    }
}

fn run(session: fuser::Session<Adapter>, ended: Arc<AtomicBool>) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name("fuse-session".to_owned()).spawn(move || {
        if let Err(error) = session.run() {
            tracing::error!(%error, "a mount is no longer served");
        }
        ended.store(true, Ordering::Release);
    })
}
