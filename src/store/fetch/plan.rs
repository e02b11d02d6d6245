//! Pure decisions of a read: which bytes of a pack a logical range needs, and how far to read ahead.

use std::ops::Range;

use crate::format::digest::BLOCK_LEN;
use crate::format::placement::Location;

/// A part of a logical range, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Zeros.
    Hole { len: u64 },
    /// Bytes of the pack.
    Data { offset: u64, len: u64 },
}

/// Says what the logical range `[range)` of a content consists of. None where the location
/// contradicts itself (it came from an untrusted placement). The range lies within the content.
pub(super) fn parts(location: &Location, range: Range<u64>) -> Option<Vec<Part>> {
    match location {
        Location::None => Some(vec![Part::Hole { len: range.end - range.start }]),
        Location::Run { offset, .. } => {
            let start = offset.checked_add(range.start)?;
            start.checked_add(range.end - range.start)?;
            Some(vec![Part::Data { offset: start, len: range.end - range.start }])
        }
        Location::Sparse { extents, .. } => {
            let mut parts = Vec::new();
            let mut at = range.start;
            for extent in extents {
                let end = extent.logical.checked_add(extent.len)?;
                extent.offset.checked_add(extent.len)?;
                if end <= at {
                    continue;
                }
                if extent.logical >= range.end {
                    break;
                }
                if extent.logical > at {
                    parts.push(Part::Hole { len: extent.logical - at });
                    at = extent.logical;
                }
                let stop = end.min(range.end);
                push_data(&mut parts, extent.offset + (at - extent.logical), stop - at);
                at = stop;
            }
            if at < range.end {
                parts.push(Part::Hole { len: range.end - at });
            }
            Some(parts)
        }
    }
}

/// Adds a run of bytes, joined to the one before where they touch: one request instead of two.
fn push_data(parts: &mut Vec<Part>, offset: u64, len: u64) {
    if len == 0 {
        return;
    }
    if let Some(Part::Data { offset: before, len: before_len }) = parts.last_mut()
        && *before + *before_len == offset
    {
        *before_len += len;
        return;
    }
    parts.push(Part::Data { offset, len });
}

/// Counts the units of a content: what is verified alone.
pub(super) fn unit_count(size: u64) -> u64 {
    size.div_ceil(BLOCK_LEN)
}

/// Gives the logical range of one unit.
pub(super) fn unit_range(size: u64, block: u64) -> Range<u64> {
    let start = block.saturating_mul(BLOCK_LEN).min(size);
    start..start.saturating_add(BLOCK_LEN).min(size)
}

/// Gives the units that a non-empty logical range touches.
pub(super) fn units_of(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_LEN..range.end.div_ceil(BLOCK_LEN)
}

/// How far one content's reader is, and how far ahead of it to read.
///
/// The window starts when the second read follows the first, doubles with each step, and ends where
/// a read jumps. The next stretch is asked when the reader enters the last half of what was asked,
/// so that it never waits for a whole round trip.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Readahead {
    /// The unit behind the last one that was read.
    next: u64,
    /// Units behind the last one that was asked ahead.
    asked: u64,
    /// Units to ask at the next step.
    window: u64,
}

impl Readahead {
    /// Notes a read of `units`; gives the units to ask ahead now (possibly none). `window_max` is in
    /// units, `count` is how many the content has.
    pub(super) fn note(&mut self, units: &Range<u64>, count: u64, window_max: u64) -> Range<u64> {
        if units.end == self.next {
            // Within the last unit: no step, no jump.
            return 0..0;
        }
        let steps = self.next > 0 && units.start <= self.next && units.end > self.next;
        if !steps {
            *self = Self { next: units.end, asked: units.end, window: 0 };
            return 0..0;
        }
        self.next = units.end;
        self.asked = self.asked.max(self.next);
        if self.asked - self.next > self.window / 2 {
            return 0..0;
        }
        self.window = (self.window * 2).max(units.end - units.start).max(1).min(window_max);
        let ahead = self.asked..(self.asked + self.window).min(count);
        self.asked = self.asked.max(ahead.end);
        if ahead.start >= ahead.end { 0..0 } else { ahead }
    }

    /// Says whether the reader goes through the content in order.
    pub(super) fn is_sequential(&self) -> bool {
        self.window > 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::PackId;
    use crate::format::placement::Extent;

    const PACK: PackId = PackId([1; 32]);

    fn sparse(extents: &[(u64, u64, u64)]) -> Location {
        let extents = extents.iter().map(|&(logical, offset, len)| Extent { logical, offset, len }).collect();
        Location::Sparse { pack: PACK, extents }
    }

    #[test]
    fn a_range_of_a_run_is_one_part() {
        let run = Location::Run { pack: PACK, offset: 4096 };
        assert_eq!(parts(&run, 10..30), Some(vec![Part::Data { offset: 4106, len: 20 }]));
        let wild = Location::Run { pack: PACK, offset: u64::MAX - 5 };
        assert_eq!(parts(&wild, 0..30), None);
    }

    #[test]
    fn holes_lie_between_and_behind_the_extents() {
        let file = sparse(&[(100, 0, 50), (200, 50, 50)]);
        assert_eq!(
            parts(&file, 0..300),
            Some(vec![
                Part::Hole { len: 100 },
                Part::Data { offset: 0, len: 50 },
                Part::Hole { len: 50 },
                Part::Data { offset: 50, len: 50 },
                Part::Hole { len: 50 },
            ])
        );
        assert_eq!(parts(&file, 120..130), Some(vec![Part::Data { offset: 20, len: 10 }]));
        assert_eq!(parts(&file, 150..200), Some(vec![Part::Hole { len: 50 }]));
        assert_eq!(parts(&Location::None, 5..9), Some(vec![Part::Hole { len: 4 }]));
    }

    #[test]
    fn neighbours_in_the_pack_are_one_request() {
        let file = sparse(&[(0, 0, 50), (50, 50, 50)]);
        assert_eq!(parts(&file, 10..90), Some(vec![Part::Data { offset: 10, len: 80 }]));
    }

    #[test]
    fn units_cover_a_content_and_its_short_end() {
        assert_eq!(unit_count(0), 0);
        assert_eq!(unit_count(BLOCK_LEN), 1);
        assert_eq!(unit_count(BLOCK_LEN + 1), 2);
        assert_eq!(unit_range(BLOCK_LEN + 1, 1), BLOCK_LEN..BLOCK_LEN + 1);
        assert_eq!(units_of(&(0..1)), 0..1);
        assert_eq!(units_of(&(BLOCK_LEN - 1..BLOCK_LEN + 1)), 0..2);
    }

    #[test]
    fn a_sequential_reader_gets_windows_that_double_and_never_overlap() {
        let mut readahead = Readahead::default();
        let mut asked = 0..0;
        let mut ahead_of_reader = 0;
        for unit in 0..200 {
            let ahead = readahead.note(&(unit..unit + 1), 1000, 32);
            if ahead.is_empty() {
                continue;
            }
            assert!(ahead.start >= asked.end && ahead.end - ahead.start <= 32, "{ahead:?} after {asked:?}");
            asked = ahead;
            ahead_of_reader = asked.end - unit;
        }
        assert!(readahead.is_sequential());
        assert!(ahead_of_reader > 32 && ahead_of_reader <= 64, "{ahead_of_reader}");
    }

    #[test]
    fn a_random_reader_gets_nothing_ahead() {
        let mut readahead = Readahead::default();
        for unit in [500, 20, 300, 7, 900] {
            assert!(readahead.note(&(unit..unit + 1), 1000, 32).is_empty());
        }
        assert!(!readahead.is_sequential());
    }

    #[test]
    fn nothing_is_asked_behind_the_end() {
        let mut readahead = Readahead::default();
        let mut last = 0;
        for unit in 0..10 {
            let ahead = readahead.note(&(unit..unit + 1), 10, 32);
            last = last.max(ahead.end);
        }
        assert_eq!(last, 10);
    }
}
