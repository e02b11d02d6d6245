//! What is open, without a kernel.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::*;
use crate::store::locking::{Explored, Plain, explore};

fn handles() -> (Arc<Handles>, File) {
    let file = tempfile::tempfile().expect("tempfile");
    let kept = file.try_clone().expect("dup");
    (Arc::new(Handles::<Plain>::new(file).expect("creates")), kept)
}

fn load(file: &File) -> Left {
    match Slots::load(file).expect("loads") {
        Found::Record(left) => left,
        other => panic!("no record: {other:?}"),
    }
}

const INO: Ino = Ino(7);

fn never() -> Option<u32> {
    panic!("the latch is set: nothing is to be registered")
}

fn not_closed(id: u32) {
    panic!("{id} is still open")
}

#[test]
fn the_first_open_decides_for_all_until_the_last_release() {
    let (handles, _) = handles();
    assert_eq!(handles.open(INO, 1, || Some(5)).expect("opens"), Latch::Backed(5));
    assert_eq!(handles.open(INO, 2, never).expect("opens"), Latch::Backed(5));
    handles.release(INO, 1, not_closed);
    assert_eq!(handles.open(INO, 3, never).expect("opens"), Latch::Backed(5));
    handles.release(INO, 2, not_closed);
    let closed = RefCell::new(Vec::new());
    handles.release(INO, 3, |id| closed.borrow_mut().push(id));
    assert_eq!(*closed.borrow(), [5]);
    assert_eq!(handles.latch(INO), None);
    assert_eq!(handles.open(INO, 4, || None).expect("opens"), Latch::Cached);
    assert_eq!(handles.open(INO, 5, never).expect("opens"), Latch::Cached);
    handles.release(INO, 4, not_closed);
    handles.release(INO, 5, not_closed);
    assert_eq!(handles.open(INO, 6, || Some(6)).expect("opens"), Latch::Backed(6));
}

#[test]
fn a_read_that_is_not_answered_keeps_the_inode_in_the_page_cache() {
    let (handles, _) = handles();
    handles.open(INO, 1, || None).expect("opens");
    let reading = handles.reading(INO);
    handles.release(INO, 1, not_closed);
    assert_eq!(handles.open(INO, 2, never).expect("opens"), Latch::Cached);
    handles.release(INO, 2, not_closed);
    drop(reading);
    assert_eq!(handles.open(INO, 3, || Some(9)).expect("opens"), Latch::Backed(9));
}

#[test]
fn a_release_that_comes_twice_or_from_nowhere_does_no_harm() {
    let (handles, _) = handles();
    handles.open(INO, 1, || Some(5)).expect("opens");
    handles.open(INO, 2, never).expect("opens");
    handles.release(INO, 1, not_closed);
    handles.release(INO, 1, not_closed);
    handles.release(Ino(99), 77, not_closed);
    assert_eq!(handles.open_now(), (1, 1));
    let closed = RefCell::new(0);
    handles.release(INO, 2, |id| *closed.borrow_mut() = id);
    assert_eq!(*closed.borrow(), 5);
    assert_eq!((handles.open_now(), handles.opens()), ((0, 0), (0, 2)));
}

#[test]
fn every_open_is_recorded_before_it_is_answered_and_until_it_is_released() {
    let (handles, file) = handles();
    handles.open(INO, 1, || Some(5)).expect("opens");
    handles.open(Ino(8), 2, || None).expect("opens");
    handles.answered(INO, 1);
    let left = load(&file);
    let slots: Vec<Slot> = left.slots.iter().map(|(_, slot)| *slot).collect();
    let backed = Slot { fh: 1, ino: INO, id: 5, state: SlotState::Answered };
    let cached = Slot { fh: 2, ino: Ino(8), id: 0, state: SlotState::Prepared };
    assert_eq!(slots, [backed, cached]);
    assert_eq!((left.last_id, left.closing), (5, vec![]));
    handles.release(INO, 1, |_| {
        let left = load(&file);
        assert_eq!(left.closing, [(7, 5)], "the id is recorded while it is being closed");
        assert_eq!(left.slots.len(), 1, "the slot is gone before the id is closed");
    });
    handles.answered(INO, 1);
    handles.release(Ino(8), 2, not_closed);
    let left = load(&file);
    assert_eq!((left.last_id, left.closing, left.slots), (5, vec![], vec![]));
}

#[test]
fn slots_are_used_again() {
    let (handles, file) = handles();
    for round in 0..100 {
        for fh in 0..10 {
            handles.open(Ino(fh), round * 10 + fh, || None).expect("opens");
        }
        for fh in 0..10 {
            handles.release(Ino(fh), round * 10 + fh, not_closed);
        }
    }
    assert_eq!(file.metadata().expect("stat").len(), 4096 + 10 * 32);
}

#[test]
fn a_record_of_another_version_is_not_taken_for_one_of_ours_nor_for_none() {
    let file = tempfile::tempfile().expect("tempfile");
    assert_eq!(Slots::load(&file).expect("loads"), Found::Empty);
    file.set_len(10_000).expect("grows");
    assert_eq!(Slots::load(&file).expect("loads"), Found::Empty);
    std::os::unix::fs::FileExt::write_all_at(&file, b"LARDSLT1", 0).expect("writes");
    assert_eq!(Slots::load(&file).expect("loads"), Found::Foreign);
}

#[test]
fn the_next_daemon_goes_on_with_what_is_open() {
    let (handles, file) = handles();
    for fh in 1..=3 {
        handles.open(INO, fh, || Some(5)).expect("opens");
    }
    handles.open(Ino(8), 4, || None).expect("opens");
    handles.release(INO, 2, not_closed);
    drop(handles);
    let left = load(&file);
    let handles = Handles::<Plain>::resume(file.try_clone().expect("dup"), &left);
    assert_eq!(handles.open_now(), (3, 2));
    assert_eq!((handles.latch(INO), handles.latch(Ino(8))), (Some(Latch::Backed(5)), Some(Latch::Cached)));
    assert_eq!(handles.open(INO, 9, never).expect("opens as it is latched"), Latch::Backed(5));
    assert_eq!(file.metadata().expect("stat").len(), 4096 + 4 * 32, "the slot that was free is used");
    handles.release(INO, 1, not_closed);
    handles.release(INO, 9, not_closed);
    let closed = RefCell::new(0);
    handles.release(INO, 3, |id| *closed.borrow_mut() = id);
    assert_eq!(*closed.borrow(), 5);
    handles.release(Ino(8), 4, not_closed);
    assert_eq!(load(&file).slots, []);
}

#[test]
fn an_open_that_is_sent_again_is_not_counted_twice() {
    let (handles, file) = handles();
    handles.open(INO, 1, || Some(5)).expect("opens");
    assert_eq!(handles.open(INO, 1, never).expect("opens"), Latch::Backed(5));
    assert_eq!((handles.open_now(), load(&file).slots.len()), ((1, 1), 1));
    let closed = RefCell::new(0);
    handles.release(INO, 1, |id| *closed.borrow_mut() = id);
    assert_eq!(*closed.borrow(), 5);
}

#[test]
fn a_greeting_is_on_record_before_and_after_it_is_answered() {
    let (handles, file) = handles();
    assert_eq!(load(&file).greeting, None);
    let greeting = Greeting { request: vec![1; 104], answer: vec![2; 80] };
    handles.record().prepare_greeting(&greeting).expect("records");
    assert_eq!(load(&file).greeting.as_ref(), Some(&greeting));
    handles.record().greeted().expect("records");
    assert_eq!(load(&file).greeting, Some(greeting));
    let long = Greeting { request: vec![1; 300], answer: vec![] };
    assert!(handles.record().prepare_greeting(&long).is_err());
}

/// The kernel's side of backing ids, and what has to hold whenever it is asked.
struct Kernel {
    live: parking_lot::Mutex<(u32, BTreeSet<u32>)>,
    record: File,
}

impl Kernel {
    fn make_id(&self) -> Option<u32> {
        loom::thread::yield_now();
        let (last, live) = &mut *self.live.lock();
        assert!(live.is_empty(), "a second backing id for an inode that has {live:?}");
        *last += 1;
        live.insert(*last);
        Some(*last)
    }

    fn close(&self, id: u32) {
        loom::thread::yield_now();
        let left = load(&self.record);
        assert!(left.slots.iter().all(|(_, slot)| slot.id != id), "{id} is closed and open: {left:?}");
        assert!(left.closing.iter().any(|&(_, closing)| closing == id), "{id} is closed and nobody would know");
        assert!(self.live.lock().1.remove(&id), "{id} is closed twice");
    }

    /// What the next daemon would find if this one died now.
    fn is_told_nothing_that_is_not_on_record(&self, latch: Latch, fh: u64) {
        let left = load(&self.record);
        let slot = left.slots.iter().find(|(_, slot)| slot.fh == fh).expect("is on record before it is answered");
        assert_eq!(slot.1.id, if let Latch::Backed(id) = latch { id } else { 0 });
        let (last, live) = &*self.live.lock();
        let unknown = live.iter().find(|&&id| id < left.last_id && left.slots.iter().all(|(_, slot)| slot.id != id));
        assert_eq!(unknown, None, "an id without a slot is newer than the last on record: {last} {left:?}");
    }
}

#[test]
fn in_every_order_opens_and_releases_of_an_inode_agree_with_the_record() {
    explore(|| {
        let file = tempfile::tempfile().expect("tempfile");
        let record = file.try_clone().expect("dup");
        let handles = Arc::new(Handles::<Explored>::new(file).expect("creates"));
        let kernel = Arc::new(Kernel { live: parking_lot::Mutex::default(), record });
        let user = |fh: u64| {
            let (handles, kernel) = (handles.clone(), kernel.clone());
            move || {
                let latch = handles.open(INO, fh, || kernel.make_id()).expect("opens");
                kernel.is_told_nothing_that_is_not_on_record(latch, fh);
                handles.answered(INO, fh);
                handles.release(INO, fh, |id| kernel.close(id));
                // Sent again by the kernel: does nothing.
                handles.release(INO, fh, not_closed);
            }
        };
        let other = loom::thread::spawn(user(2));
        user(1)();
        other.join().expect("ends");
        assert_eq!((handles.open_now(), handles.opens()), ((0, 0), (0, 2)));
        assert!(kernel.live.lock().1.is_empty(), "an id is left");
        assert_eq!(load(&kernel.record).slots, []);
    });
}
