//! Which calls of `send` on a connection the kernel still needs the memory of. No system calls.

use std::collections::BTreeMap;

/// Calls that the kernel counts: how many were made, and which of them have ended. The kernel says so by ranges, in any order: a call that is
/// sent again ends after later ones. The counts begin again after the largest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    made: u32,
    /// All before this one have ended.
    ended: u32,
    /// Ranges behind it that have ended too: how far from `ended` each begins, and how long it is.
    ahead: BTreeMap<u32, u32>,
}

/// A range that does not lie among the calls that are under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unknown;

impl Calls {
    /// How many were made.
    pub fn made(&self) -> u32 {
        self.made
    }

    /// One more.
    pub fn add(&mut self) {
        self.made = self.made.wrapping_add(1);
    }

    /// The calls from `first` to `last` have ended.
    ///
    /// # Errors
    /// They are not under way.
    pub fn end(&mut self, first: u32, last: u32) -> Result<(), Unknown> {
        let (from, count) = (first.wrapping_sub(self.ended), last.wrapping_sub(first).checked_add(1).ok_or(Unknown)?);
        let to = from.checked_add(count).filter(|to| *to <= self.under_way()).ok_or(Unknown)?;
        let before = self.ahead.range(..to).next_back();
        if before.is_some_and(|(begin, count)| begin + count > from) {
            return Err(Unknown);
        }
        self.ahead.insert(from, count);
        let mut advanced = 0;
        while let Some(count) = self.ahead.remove(&advanced) {
            advanced += count;
        }
        if advanced > 0 {
            self.ended = self.ended.wrapping_add(advanced);
            self.ahead = std::mem::take(&mut self.ahead).into_iter().map(|(begin, count)| (begin - advanced, count)).collect();
        }
        Ok(())
    }

    /// Whether all have ended.
    pub fn all_ended(&self) -> bool {
        self.made == self.ended
    }

    /// Whether the first `number` calls have ended, of which some may be under way.
    pub fn reached(&self, number: u32) -> bool {
        self.made.wrapping_sub(number) >= self.under_way()
    }

    fn under_way(&self) -> u32 {
        self.made.wrapping_sub(self.ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// So many calls made, the first of them being number `from`, none ended.
    fn calls(from: u32, count: u32) -> Calls {
        Calls { made: from.wrapping_add(count), ended: from, ahead: BTreeMap::new() }
    }

    const BEGINNINGS: [u32; 3] = [0, u32::MAX - 3, u32::MAX];

    #[test]
    fn a_later_call_that_ends_first_ends_no_earlier_one() {
        for from in BEGINNINGS {
            let at = |n: u32| from.wrapping_add(n);
            let mut calls = calls(from, 6);
            calls.end(at(3), at(4)).unwrap();
            assert!(calls.reached(at(0)) && !calls.reached(at(1)) && !calls.reached(at(5)), "{from}");
            calls.end(at(0), at(0)).unwrap();
            assert!(calls.reached(at(1)) && !calls.reached(at(2)), "{from}");
            calls.end(at(5), at(5)).unwrap();
            assert!(!calls.all_ended() && !calls.reached(at(3)), "{from}");
            calls.end(at(1), at(2)).unwrap();
            assert!(calls.all_ended() && calls.reached(at(6)), "{from}");
        }
    }

    #[test]
    fn a_range_that_is_not_under_way_is_refused() {
        for from in BEGINNINGS {
            let at = |n: u32| from.wrapping_add(n);
            let mut calls = calls(from, 6);
            calls.end(at(0), at(0)).unwrap();
            calls.end(at(2), at(3)).unwrap();
            // Ended, never made, backwards, all there are; overlapping from either side, inside, around.
            for (first, last) in [(0, 0), (6, 6), (5, 6), (4, 3), (0, u32::MAX), (1, 2), (3, 4), (2, 2), (3, 3), (1, 4)] {
                let before = calls.clone();
                assert_eq!((calls.end(at(first), at(last)), &calls), (Err(Unknown), &before), "{from}: {first} to {last}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_order_ends_what_it_says(from in any::<u32>(), cuts in proptest::collection::vec((1u32..5, any::<u32>()), 1..60)) {
            let total: u32 = cuts.iter().map(|(count, _)| count).sum();
            let mut calls = Calls { made: from, ended: from, ahead: BTreeMap::new() };
            (0..total).for_each(|_| calls.add());
            let mut begin = 0;
            let mut ranges: Vec<(u32, u32, u32)> = cuts.iter().map(|(count, order)| { begin += count; (*order, begin - count, *count) }).collect();
            ranges.sort_unstable();
            let mut over = vec![false; total as usize];
            for (_, begin, count) in ranges {
                let first = from.wrapping_add(begin);
                prop_assert_eq!(calls.end(first, first.wrapping_add(count - 1)), Ok(()));
                over[begin as usize..(begin + count) as usize].fill(true);
                let ended = over.iter().take_while(|over| **over).count() as u32;
                for number in 0..=total {
                    prop_assert_eq!(calls.reached(from.wrapping_add(number)), number <= ended);
                }
            }
            prop_assert!(calls.all_ended() && calls.ahead.is_empty());
        }
    }
}
