//! Tokens of fragments that are to be given back, in the ranges that the kernel takes. No system calls.

/// Tokens that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Range {
    /// The first token.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// Ranges, and tokens in them, that one call may name.
const MOST_RANGES: usize = 128;
const MOST_TOKENS: usize = 1024;

/// Tokens to be given back, in any order.
#[derive(Debug, Default)]
pub struct Tokens {
    waiting: Vec<u32>,
}

impl Tokens {
    /// One more.
    pub fn add(&mut self, token: u32) {
        self.waiting.push(token);
    }

    /// Takes all of another.
    pub fn append(&mut self, other: &mut Tokens) {
        self.waiting.append(&mut other.waiting);
    }

    /// How many are waiting.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none is waiting.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Takes those that one call can give back, as few ranges as they fill, and how many they are. Tokens of fragments that arrived one after
    /// another follow each other, so a call seldom ends at its number of ranges.
    pub fn take(&mut self) -> (Vec<Range>, usize) {
        self.waiting.sort_unstable();
        let mut ranges: Vec<Range> = Vec::new();
        let mut taken = 0;
        for token in self.waiting.iter().take(MOST_TOKENS) {
            let full = ranges.len() == MOST_RANGES;
            match ranges.last_mut() {
                Some(last) if last.first.checked_add(last.count) == Some(*token) => last.count += 1,
                _ if full => break,
                _ => ranges.push(Range { first: *token, count: 1 }),
            }
            taken += 1;
        }
        self.waiting.drain(..taken);
        (ranges, taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn every_token_goes_back_once(all in proptest::collection::btree_set(0..5000u32, 0..3000), top in proptest::bool::ANY) {
            // The largest numbers too.
            let all: BTreeSet<u32> = if top { all.iter().map(|token| u32::MAX - token).collect() } else { all };
            let mut tokens = Tokens::default();
            all.iter().rev().for_each(|token| tokens.add(*token));
            let mut back = BTreeSet::new();
            while !tokens.is_empty() {
                let (ranges, count) = tokens.take();
                prop_assert!(!ranges.is_empty() && ranges.len() <= MOST_RANGES && count <= MOST_TOKENS);
                prop_assert_eq!(ranges.iter().map(|range| range.count as usize).sum::<usize>(), count);
                for range in ranges {
                    for i in 0..range.count {
                        prop_assert!(back.insert(range.first + i));
                    }
                }
            }
            prop_assert_eq!(back, all);
        }
    }
}
