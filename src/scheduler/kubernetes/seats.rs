//! Which GPUs of a node are held by whom: a pure function of what the pods say. Whatever they say, no GPU is
//! given twice and nobody's GPUs are forgotten.

/// Thousandths of a whole GPU.
const WHOLE: u32 = 1000;

/// A pod on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occupant {
    /// Its place in the order of all starts; who has none comes last.
    pub start: u64,
    /// What it says that it was given; empty: nothing.
    pub given: Vec<u32>,
    /// How many GPUs it holds, and how much of each.
    pub count: u32,
    pub each: u32,
}

/// Gives each occupant its GPUs, in the order of `occupants`, and how many GPUs the node then has: more than `gpus`
/// where more are held.
pub fn seat(gpus: u32, occupants: &[Occupant]) -> (Vec<Vec<u32>>, u32) {
    let mut free = vec![WHOLE; gpus as usize];
    let mut seats = vec![Vec::new(); occupants.len()];
    let mut order: Vec<(usize, &Occupant)> = occupants.iter().enumerate().collect();
    order.sort_by_key(|(at, one)| (one.given.is_empty(), one.start, *at));
    let mut rest = Vec::new();
    for (at, one) in order {
        if take_given(&mut free, one) {
            set(&mut seats, at, one.given.clone());
        } else {
            rest.push((at, one));
        }
    }
    for (at, one) in rest {
        set(&mut seats, at, take_any(&mut free, one));
    }
    (seats, u32::try_from(free.len()).unwrap_or(u32::MAX))
}

fn set(seats: &mut [Vec<u32>], at: usize, gpus: Vec<u32>) {
    if let Some(seat) = seats.get_mut(at) {
        *seat = gpus;
    }
}

fn take_given(free: &mut [u32], one: &Occupant) -> bool {
    let mut sorted = one.given.clone();
    sorted.sort_unstable();
    sorted.dedup();
    let is_whole = sorted.len() == one.given.len() && one.given.len() == one.count as usize;
    let is_free = |gpu: &u32| free.get(*gpu as usize).is_some_and(|free| *free >= one.each);
    if !is_whole || !one.given.iter().all(is_free) {
        return false;
    }
    for gpu in &one.given {
        if let Some(free) = free.get_mut(*gpu as usize) {
            *free -= one.each;
        }
    }
    true
}

/// Takes wholly free GPUs, or the fullest one that has room for a part; where there is none, one more than the node has.
fn take_any(free: &mut Vec<u32>, one: &Occupant) -> Vec<u32> {
    let mut seat = Vec::with_capacity(one.count as usize);
    for _ in 0..one.count {
        let fitting = free.iter().enumerate().filter(|(_, free)| **free >= one.each);
        let at = match fitting.min_by_key(|(at, free)| (**free, *at)) {
            Some((at, _)) => at,
            None => {
                free.push(WHOLE);
                free.len() - 1
            }
        };
        if let Some(free) = free.get_mut(at) {
            *free -= one.each;
        }
        seat.push(u32::try_from(at).unwrap_or(u32::MAX));
    }
    seat
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(start: u64, given: &[u32], count: u32, each: u32) -> Occupant {
        Occupant { start, given: given.to_vec(), count, each }
    }

    #[test]
    fn who_was_given_gpus_first_keeps_them() {
        let table = [
            ("as given", 4, vec![one(1, &[3], 1, 1000), one(2, &[0, 1], 2, 1000)], vec![vec![3], vec![0, 1]], 4),
            (
                "the later of two moves",
                4,
                vec![one(2, &[0], 1, 1000), one(1, &[0], 1, 1000)],
                vec![vec![1], vec![0]],
                4,
            ),
            (
                "parts share one",
                2,
                vec![one(1, &[0], 1, 600), one(2, &[0], 1, 400), one(3, &[], 1, 500)],
                vec![vec![0], vec![0], vec![1]],
                2,
            ),
            (
                "who was given none comes last",
                2,
                vec![one(0, &[], 1, 1000), one(5, &[0], 1, 1000)],
                vec![vec![1], vec![0]],
                2,
            ),
            ("a GPU that is gone", 1, vec![one(1, &[7], 1, 1000)], vec![vec![0]], 1),
            ("more than there is", 1, vec![one(1, &[0], 1, 1000), one(2, &[1], 1, 1000)], vec![vec![0], vec![1]], 2),
        ];
        for (what, gpus, occupants, wanted, total) in table {
            assert_eq!(seat(gpus, &occupants), (wanted, total), "{what}");
        }
    }

    proptest! {
        #[test]
        fn whatever_pods_say_no_gpu_is_given_twice(
            gpus in 0u32..6,
            occupants in prop::collection::vec(
                (0u64..4, prop::collection::vec(0u32..8, 0..4), 1u32..4, prop_oneof![Just(1000u32), 1u32..1000])
                    .prop_map(|(start, given, count, each)| Occupant { start, given, count: if each < 1000 { 1 } else { count }, each }),
                0..8),
        ) {
            let (seats, total) = seat(gpus, &occupants);
            let mut used = vec![0u32; total as usize];
            for (one, seat) in occupants.iter().zip(&seats) {
                prop_assert_eq!(seat.len(), one.count as usize);
                for gpu in seat {
                    used[*gpu as usize] += one.each;
                }
            }
            prop_assert!(used.iter().all(|used| *used <= 1000), "{:?}", used);
            // Nothing is made up while there is room: what was added is used.
            prop_assert!(used.iter().skip(gpus as usize).all(|used| *used > 0), "{:?}", used);
        }
    }
}
