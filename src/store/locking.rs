//! The lock of those parts whose every schedule is tried: single flight, lanes, and the record of open files.
//!
//! They are generic over it. Larder itself takes [`Plain`], parking_lot's; their tests take loom's, which yields to
//! another thread before each lock and goes through all orders. What they hold beside locks is either not shared, or
//! one step for everybody (a channel's send, a counter).

use std::fmt::Debug;
use std::ops::DerefMut;

/// A kind of locks.
pub(crate) trait Locking: Debug + Send + Sync + 'static {
    type Mutex<T: Debug + Default + Send>: Lock<T>;
}

/// One lock and what it guards.
pub(crate) trait Lock<T>: Debug + Default + Send + Sync {
    /// Waits for it.
    fn lock(&self) -> impl DerefMut<Target = T> + '_;
}

/// The locks of the product.
#[derive(Debug)]
pub(crate) struct Plain;

impl Locking for Plain {
    type Mutex<T: Debug + Default + Send> = parking_lot::Mutex<T>;
}

impl<T: Debug + Default + Send> Lock<T> for parking_lot::Mutex<T> {
    fn lock(&self) -> impl DerefMut<Target = T> + '_ {
        Self::lock(self)
    }
}

/// The locks of the tests that try all schedules.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Explored;

#[cfg(test)]
impl Locking for Explored {
    type Mutex<T: Debug + Default + Send> = loom::sync::Mutex<T>;
}

#[cfg(test)]
impl<T: Debug + Default + Send> Lock<T> for loom::sync::Mutex<T> {
    fn lock(&self) -> impl DerefMut<Target = T> + '_ {
        Self::lock(self).expect("no thread panics with the lock")
    }
}

/// Runs a case with every order of its threads' steps, but those that take more than three turns away from a thread that could go
/// on: where one is wrong, fewer show it. Panics with the first that fails.
#[cfg(test)]
pub(crate) fn explore(case: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.max_branches = 10_000;
    model.check(case);
}
