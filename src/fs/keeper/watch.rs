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
/// A child that has not connected by then never will: it means another state directory, or hangs.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(180);

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

/// How often a program that was started may end well without having connected: longer than a daemon takes to die.
const ENDED_WELL_MAX: u32 = 30;

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
    /// Started then, and not connected yet.
    starting: Option<(Child, Instant)>,
    /// How many of those have ended well one after the other without connecting.
    ended_well: u32,
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
            ended_well: 0,
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
        self.ended_well = 0;
        self.children.extend(self.starting.take().map(|(child, _)| child));
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
        self.before = None;
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

    /// Says whether a daemon has to be started, now or at its time. An upgrade is finished also without mounts:
    /// there may be rows that could not be mounted yet.
    fn is_wanted(&self, has_mounts: bool) -> bool {
        let nobody = self.daemon.is_none() && self.starting.is_none();
        nobody && self.restart.is_some() && (has_mounts || self.before.is_some())
    }

    /// Says how long nothing is to be done without an event.
    pub fn idle_for(&self, has_mounts: bool) -> Option<Duration> {
        if self.starting.is_some() {
            return Some(CHILD_INTERVAL);
        }
        let next = self.next.filter(|_| self.is_wanted(has_mounts));
        next.map(|next| next.saturating_duration_since(Instant::now()))
    }

    /// Does what is due: reaps, and starts a daemon where there are mounts and nobody serves them.
    pub fn tick(&mut self, state: &Path, has_mounts: bool) {
        self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        self.look_at_child(Instant::now());
        let is_due = self.next.is_some_and(|next| next <= Instant::now());
        if !is_due || !self.is_wanted(has_mounts) {
            return;
        }
        let Some(restart) = &self.restart else { return };
        match start(restart, state) {
            Ok(child) => {
                self.starting = Some((child, Instant::now()));
                self.next = None;
            }
            Err(_) => self.failed(Instant::now()),
        }
    }

    /// Looks whether the child that is awaited has ended, or will never connect.
    fn look_at_child(&mut self, now: Instant) {
        let Some((child, since)) = &mut self.starting else { return };
        match child.try_wait() {
            Ok(None) if now.saturating_duration_since(*since) < CONNECT_TIMEOUT => {}
            Ok(None) => {
                let _ = child.kill();
                self.children.extend(self.starting.take().map(|(child, _)| child));
                self.failed(now);
            }
            // It found that a daemon runs already: the one that dies, or one that was faster. Again and again it
            // is a program that is no daemon.
            Ok(Some(status)) if status.success() && self.ended_well < ENDED_WELL_MAX => {
                self.ended_well += 1;
                self.starting = None;
                self.next = Some(now + REFILL);
            }
            _ => {
                self.starting = None;
                self.failed(now);
            }
        }
    }

    /// What was started did not come up.
    fn failed(&mut self, now: Instant) {
        self.next = Some(now + self.pace.wait(false, now));
        self.go_back();
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

    fn restart(program: &str) -> Restart {
        Restart { program: program.into(), args: Vec::new(), env: Vec::new() }
    }

    fn connection() -> OwnedFd {
        crate::fs::sys::seqpacket_pair().expect("a pair").0
    }

    /// A watch whose daemon was told to make room for another program, and has.
    fn upgrading(to: &str) -> Watch {
        let mut watch = Watch::new();
        watch.begin(connection(), Some(restart("/larder-old")));
        watch.ready();
        watch.replace(restart(to));
        watch.lost();
        watch
    }

    /// Ticks until the child that is started has ended.
    fn run_child(watch: &mut Watch, has_mounts: bool) {
        let state = tempfile::tempdir().expect("a directory");
        watch.tick(state.path(), has_mounts);
        let (child, _) = watch.starting.as_mut().expect("is started");
        child.wait().expect("ends");
        watch.look_at_child(Instant::now());
        assert!(watch.starting.is_none());
    }

    #[test]
    fn a_program_that_only_ever_ends_well_gives_way_to_the_one_before() {
        let mut watch = upgrading("/bin/true");
        for _ in 0..=ENDED_WELL_MAX {
            assert_eq!(watch.restart, Some(restart("/bin/true")));
            watch.next = Some(Instant::now());
            run_child(&mut watch, true);
        }
        assert_eq!(watch.restart, Some(restart("/larder-old")));
    }

    #[test]
    fn a_keeper_without_mounts_sleeps_when_its_daemon_has_died() {
        let mut watch = Watch::new();
        watch.begin(connection(), Some(restart("/larder")));
        watch.ready();
        assert_eq!(watch.idle_for(true), None, "a daemon that serves is not looked at");
        watch.lost();
        assert_eq!(watch.idle_for(false), None);
        assert_eq!(watch.idle_for(true), Some(Duration::ZERO));
    }

    #[test]
    fn a_daemon_that_has_said_that_it_ends_is_not_started_again() {
        let mut watch = Watch::new();
        watch.begin(connection(), Some(restart("/bin/true")));
        watch.ready();
        watch.end();
        watch.lost();
        assert_eq!(watch.idle_for(true), None);
        watch.tick(Path::new("/"), true);
        assert!(watch.starting.is_none());
    }

    #[test]
    fn a_daemon_that_finds_another_one_is_no_failure() {
        let mut watch = upgrading("/bin/true");
        run_child(&mut watch, true);
        assert_eq!(watch.restart, Some(restart("/bin/true")), "the upgrade goes on");
        assert_eq!(watch.pace.failures, 0);
        assert!(watch.idle_for(true).is_some(), "it is tried again");
        let mut watch = upgrading("/bin/false");
        run_child(&mut watch, true);
        assert_eq!((watch.restart, watch.pace.failures), (Some(restart("/larder-old")), 1));
    }

    #[test]
    fn an_upgrade_is_finished_without_mounts() {
        let mut watch = upgrading("/bin/true");
        assert_eq!(watch.idle_for(false), Some(Duration::ZERO));
        run_child(&mut watch, false);
    }

    #[test]
    fn a_child_that_never_connects_is_given_up() {
        let mut watch = upgrading("/bin/cat");
        let child = Command::new("sleep").arg("600").spawn().expect("starts");
        let begun = Instant::now();
        watch.starting = Some((child, begun));
        watch.look_at_child(begun);
        assert!(watch.starting.is_some());
        watch.look_at_child(begun + CONNECT_TIMEOUT);
        assert!(watch.starting.is_none());
        assert_eq!(watch.restart, Some(restart("/larder-old")));
        for child in &mut watch.children {
            child.wait().expect("was ended");
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
