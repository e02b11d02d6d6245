//! The keeper's watch over the daemon: one connection that lives as long as the daemon does. When it breaks
//! while there are mounts, the daemon's command is started again. `docs/formats/handover.md` has the rules.
//!
//! When to start is decided in [`Pace`], without a clock of its own.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::wire::Restart;

/// Starts in a row that are not slowed down.
const BURST_MAX: u32 = 30;
/// One more start is free after this time.
const REFILL: Duration = Duration::from_millis(500);
/// Between the tries of a daemon that ends before it is ready: the first, and the longest.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// How often a child that was started is looked at until it connects, or ends.
const CHILD_INTERVAL: Duration = Duration::from_millis(100);

/// When a daemon that died is started again.
#[derive(Debug)]
struct Pace {
    free: u32,
    refilled: Instant,
    /// How often a daemon has ended since one was ready.
    failures: u32,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { free: BURST_MAX, refilled: now, failures: 0 }
    }

    /// A daemon serves.
    fn ready(&mut self) {
        self.failures = 0;
    }

    /// A daemon that served has died, or one that was started did not come so far. Gives the time to wait.
    fn wait(&mut self, was_ready: bool, now: Instant) -> Duration {
        let refills = now.saturating_duration_since(self.refilled).as_millis() / REFILL.as_millis();
        let refills = u32::try_from(refills).unwrap_or(BURST_MAX).min(BURST_MAX);
        self.refilled = if refills == BURST_MAX { now } else { self.refilled + REFILL * refills };
        self.free = (self.free + refills).min(BURST_MAX);
        if !was_ready {
            let doubled = RETRY_FIRST * 2u32.pow(self.failures.min(10));
            self.failures += 1;
            return doubled.min(RETRY_MAX);
        }
        match self.free.checked_sub(1) {
            Some(left) => {
                self.free = left;
                Duration::ZERO
            }
            None => REFILL,
        }
    }
}

/// Who serves the mounts, and how the next one is started.
#[derive(Debug)]
pub(super) struct Watch {
    daemon: Option<OwnedFd>,
    is_ready: bool,
    /// None: nobody is started.
    restart: Option<Restart>,
    /// What was started before an upgrade, until the new one is ready.
    before: Option<Restart>,
    /// The daemon that is to be replaced has not ended yet.
    is_leaving: bool,
    /// Started, and not connected yet.
    starting: Option<Child>,
    /// To be reaped.
    children: Vec<Child>,
    next: Option<Instant>,
    pace: Pace,
}

impl Watch {
    pub fn new() -> Self {
        Self {
            daemon: None,
            is_ready: false,
            restart: None,
            before: None,
            is_leaving: false,
            starting: None,
            children: Vec::new(),
            next: None,
            pace: Pace::new(Instant::now()),
        }
    }

    /// Gives the connection that breaks when the daemon dies.
    pub fn daemon(&self) -> Option<BorrowedFd<'_>> {
        self.daemon.as_ref().map(OwnedFd::as_fd)
    }

    /// A daemon has come.
    pub fn begin(&mut self, connection: OwnedFd, restart: Option<Restart>) {
        self.daemon = Some(connection);
        self.restart = restart;
        self.is_ready = false;
        self.is_leaving = false;
        self.next = None;
        self.children.extend(self.starting.take());
    }

    /// The daemon has taken its mounts over.
    pub fn ready(&mut self) {
        self.is_ready = true;
        self.before = None;
        self.pace.ready();
    }

    /// The daemon will end for another one.
    pub fn replace(&mut self, restart: Restart) {
        self.before = self.restart.replace(restart);
        self.is_leaving = true;
    }

    /// The daemon will end by itself.
    pub fn end(&mut self) {
        self.restart = None;
    }

    /// The daemon's connection has broken.
    pub fn lost(&mut self) {
        self.daemon = None;
        let now = Instant::now();
        self.next = Some(now + self.pace.wait(self.is_ready, now));
        if !std::mem::take(&mut self.is_leaving) && !self.is_ready {
            self.go_back();
        }
        self.is_ready = false;
    }

    /// After an upgrade that did not come up: what was there before.
    fn go_back(&mut self) {
        if let Some(before) = self.before.take() {
            self.restart = Some(before);
        }
    }

    /// Says how long nothing is to be done without an event.
    pub fn idle_for(&self) -> Option<Duration> {
        let until = self.next.filter(|_| self.restart.is_some());
        let until = until.map(|next| next.saturating_duration_since(Instant::now()));
        let has_children = self.starting.is_some() || !self.children.is_empty();
        [until, has_children.then_some(CHILD_INTERVAL)].into_iter().flatten().min()
    }

    /// Does what is due: reaps, and starts a daemon where there are mounts and nobody serves them.
    pub fn tick(&mut self, state: &Path, has_mounts: bool) {
        self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        if let Some(child) = &mut self.starting
            && !matches!(child.try_wait(), Ok(None))
        {
            // It ended before it connected: it could not start, or another one was faster.
            self.starting = None;
            self.go_back();
            let now = Instant::now();
            self.next = Some(now + self.pace.wait(false, now));
        }
        let is_due = self.next.is_some_and(|next| next <= Instant::now());
        if self.daemon.is_some() || self.starting.is_some() || !is_due || !has_mounts {
            return;
        }
        let Some(restart) = &self.restart else { return };
        match start(restart, state) {
            Ok(child) => {
                self.starting = Some(child);
                self.next = None;
            }
            Err(_) => {
                let now = Instant::now();
                self.next = Some(now + self.pace.wait(false, now));
                self.go_back();
            }
        }
    }
}

/// Starts a daemon; the keeper's own file serves where the daemon's is gone.
fn start(restart: &Restart, state: &Path) -> io::Result<Child> {
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(state.join("daemon.log"))?;
    let spawn = |program: &Path| {
        Command::new(program)
            .args(&restart.args)
            .env_clear()
            .envs(restart.env.iter().map(|(name, value)| (name, value)))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .spawn()
    };
    match spawn(&restart.program) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => spawn(Path::new("/proc/self/exe")),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_served_is_started_at_once_until_it_dies_too_often() {
        let begun = Instant::now();
        let mut pace = Pace::new(begun);
        for _ in 0..BURST_MAX {
            assert_eq!(pace.wait(true, begun), Duration::ZERO);
        }
        assert_eq!(pace.wait(true, begun), REFILL);
        assert_eq!(pace.wait(true, begun + REFILL), Duration::ZERO);
        assert_eq!(pace.wait(true, begun + REFILL), REFILL);
        let later = begun + Duration::from_secs(3600);
        assert_eq!(pace.wait(true, later), Duration::ZERO);
        assert_eq!(pace.free, BURST_MAX - 1);
    }

    #[test]
    fn an_upgrade_that_does_not_come_up_gives_way_to_what_was_there_before() {
        let restart = |program: &str| Restart { program: program.into(), args: Vec::new(), env: Vec::new() };
        let connection = || crate::fs::sys::seqpacket_pair().expect("a pair").0;
        for was_ready in [false, true] {
            let mut watch = Watch::new();
            watch.begin(connection(), Some(restart("old")));
            if was_ready {
                watch.ready();
            }
            watch.replace(restart("new"));
            watch.lost();
            assert_eq!(watch.restart, Some(restart("new")), "the old one has ended as it was told");
            watch.begin(connection(), Some(restart("new")));
            watch.lost();
            assert_eq!(watch.restart, Some(restart("old")));
            watch.replace(restart("newer"));
            watch.begin(connection(), Some(restart("newer")));
            watch.ready();
            watch.lost();
            assert_eq!(watch.restart, Some(restart("newer")), "it has served");
        }
    }

    #[test]
    fn a_daemon_that_does_not_come_up_is_tried_less_and_less() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        let waits: Vec<u128> = (0..9).map(|_| pace.wait(false, now).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        pace.ready();
        assert_eq!(pace.wait(false, now), RETRY_FIRST);
    }
}
