//! A file system in memory that behaves like an NFS server with several clients, and that can crash.
//!
//! * [`SimWorld`]: the server: names, files, its clock, its capacity. [`SimWorld::crash`] gives what a
//!   power cut leaves: names as of any point since the last sync, unsynced bytes lost or torn.
//! * [`SimIo`]: one client: remembers lookups, found and failed, for 30 s until it refreshes the folder,
//!   and what it read of an open file for 3 s; can be killed or fail at its n-th operation.
//! * [`Gate`]: who may do the next operation, and what becomes of it. [`Schedule`]: two clients on two
//!   threads take turns operation by operation, as a seed or a list of switches says.

use std::fmt;
use std::io;

use crate::store::tier::Clock;

mod client;
mod schedule;
mod world;

pub(crate) use client::{SimFile, SimIo};
pub(crate) use schedule::Schedule;
pub(crate) use world::{Event, SimWorld, World};

/// A small generator: the same seed, the same run.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit.max(1)
    }

    /// True once in so many times; never for 0.
    pub(crate) fn one_in(&mut self, times: u64) -> bool {
        times != 0 && self.below(times) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap_or(0)]
    }

    fn is_third(&self) -> bool {
        self.0.is_multiple_of(3)
    }
}

fn os(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// Which operation a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Open,
    Create,
    Link,
    Rename,
    Unlink,
    Mkdir,
    Rmdir,
    List,
    Stat,
    Touch,
    Refresh,
    SyncDir,
    Space,
    /// On an open file.
    Read,
    Write,
    Extend,
    StatOpen,
    Sync,
}

/// One operation of a client.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call<'a> {
    pub verb: Verb,
    pub path: &'a str,
    pub to: &'a str,
}

/// What becomes of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It takes so long, and is done.
    Done { ns: i64 },
    /// It fails without having done anything, or (`late`) after it has.
    Fails { errno: i32, late: bool },
    /// The process is dead: nothing is done any more, and nobody waits.
    Dead,
}

/// Who may do the next operation, and what becomes of it.
pub(crate) trait Gate: fmt::Debug + Send + Sync {
    /// Waits for this client's turn.
    fn before(&self, client: u64, call: &Call<'_>) -> Fate;
    /// Looks at what it did, before anybody else does anything.
    fn after(&self, client: u64, call: &Call<'_>, world: &mut World, done: Option<i32>);
}

/// The clock of a simulated node: as far ahead of the server's as a test wants.
#[derive(Debug)]
pub(crate) struct SimClock {
    pub(crate) world: SimWorld,
    pub(crate) skew_ms: i64,
}

impl Clock for SimClock {
    fn monotonic_ms(&self) -> u64 {
        u64::try_from(self.world.with(|world| world.now_ns) / 1_000_000).unwrap_or(0)
    }

    fn wall_ms(&self) -> i64 {
        self.world.with(|world| world.now_ns) / 1_000_000 + self.skew_ms
    }
}
