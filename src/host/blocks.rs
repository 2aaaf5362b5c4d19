//! How a long list of blocks is handed on in steps: a first one soon, so that copies start while the rest is prepared, and longer ones after
//! it. Knows nothing of what is done with the blocks.

use crate::direct::Blocks;
use crate::status::{err, Result};
use crate::types::Piece;
use std::collections::VecDeque;

/// Bytes up to which a transfer of a few blocks is small: it is copied in hardly more time than a message takes, and goes before large ones.
pub(super) const SMALL: u64 = 128 << 10;
pub(super) const SMALL_BLOCKS: usize = 512;
/// Bytes up to which a transfer has one step, blocks permitting.
const ONE_STEP: u64 = 1 << 20;

/// Whether a transfer is small.
pub(super) fn is_small(total: u64, count: usize) -> bool {
    total <= SMALL && count <= SMALL_BLOCKS
}

/// How much is handed on at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stride {
    pub blocks: usize,
    pub bytes: u64,
}

impl Stride {
    pub(super) const FIRST: Stride = Stride { blocks: 512, bytes: 4 << 20 };
    pub(super) const MOST: Stride = Stride { blocks: 8192, bytes: 16 << 20 };

    /// The first step of a transfer of so many bytes.
    pub(super) fn first(total: u64) -> Stride {
        match total {
            ..=ONE_STEP => Stride { blocks: 4 * Stride::FIRST.blocks, ..Stride::FIRST },
            _ => Stride::FIRST,
        }
    }

    /// The next one.
    pub(super) fn next(self) -> Stride {
        Stride { blocks: (2 * self.blocks).min(Stride::MOST.blocks), bytes: (2 * self.bytes).min(Stride::MOST.bytes) }
    }
}

/// The blocks of a transfer that wait for their turn after the call that started it has returned.
#[derive(Debug, Default)]
pub(super) struct Rest {
    blocks: Vec<Piece>,
    /// Runs of one pairing, and where each ends.
    runs: VecDeque<(usize, usize)>,
    at: usize,
}

impl Rest {
    /// Room for all blocks of a transfer, taken before anything of it moves.
    ///
    /// # Errors
    /// `Resource` without memory.
    pub(super) fn with_room(count: usize) -> Result<Rest> {
        let mut rest = Rest::default();
        rest.blocks.try_reserve_exact(count).map_err(|_| err!(Resource, "no memory for a list of {count} blocks"))?;
        Ok(rest)
    }

    /// Takes all that is left.
    pub(super) fn take(&mut self, blocks: &mut dyn Blocks) {
        while let Some(pairing) = blocks.fill(usize::MAX / 2, u64::MAX, &mut self.blocks) {
            let end = self.blocks.len();
            match self.runs.back_mut().filter(|(last, _)| *last == pairing) {
                Some(run) => run.1 = end,
                None => self.runs.push_back((pairing, end)),
            }
        }
    }
}

impl Blocks for Rest {
    fn fill(&mut self, most: usize, bytes: u64, out: &mut Vec<Piece>) -> Option<usize> {
        let &(pairing, end) = self.runs.front()?;
        let run = &self.blocks[self.at..end];
        let mut sum = 0u64;
        let fits = |piece: &&Piece| {
            let fits = sum < bytes;
            sum = sum.saturating_add(piece.len);
            fits
        };
        let count = run.iter().take(most.max(1)).take_while(fits).count().max(1).min(run.len());
        out.extend_from_slice(&run[..count]);
        self.at += count;
        if self.at == end {
            self.runs.pop_front();
        }
        if self.is_done() {
            *self = Rest::default();
        }
        Some(pairing)
    }

    fn is_done(&self) -> bool {
        self.runs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Blocks of two pairings in turns.
    struct Turns(VecDeque<(usize, Piece)>);

    impl Blocks for Turns {
        fn fill(&mut self, most: usize, _bytes: u64, out: &mut Vec<Piece>) -> Option<usize> {
            let (pairing, first) = self.0.pop_front()?;
            out.push(first);
            while let Some(&(_, next)) = self.0.front().filter(|(other, _)| *other == pairing && out.len() < most) {
                self.0.pop_front();
                out.push(next);
            }
            Some(pairing)
        }
        fn is_done(&self) -> bool {
            self.0.is_empty()
        }
    }

    proptest! {
        /// What was taken comes out again, in order, within the limits of each step.
        #[test]
        fn nothing_is_lost_or_changes_places(lens in proptest::collection::vec((0usize..3, 1u64..1000), 1..200), most in 1usize..50, bytes in 1u64..5000) {
            let all: VecDeque<(usize, Piece)> =
                lens.iter().enumerate().map(|(i, &(pairing, len))| (pairing, Piece { src: i as u64, dst: !(i as u64), len })).collect();
            let mut rest = Rest::with_room(all.len()).unwrap();
            rest.take(&mut Turns(all.clone()));
            let mut got = VecDeque::new();
            loop {
                let mut out = Vec::new();
                prop_assert_eq!(rest.is_done(), got.len() == all.len());
                let Some(pairing) = rest.fill(most, bytes, &mut out) else { break };
                let before: u64 = out[..out.len() - 1].iter().map(|p| p.len).sum();
                prop_assert!(out.len() <= most && before < bytes);
                got.extend(out.into_iter().map(|piece| (pairing, piece)));
            }
            prop_assert_eq!(got, all);
        }
    }
}
