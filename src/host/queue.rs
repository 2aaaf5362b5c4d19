//! Blocks that are handed on in parts of so many bytes each, whatever their own lengths. Pure.

use crate::direct::Blocks;
use crate::status::{err, Result};
use crate::types::Piece;
use std::collections::VecDeque;

/// Blocks that are taken from a list at once.
const AT_ONCE: usize = 4096;

/// Blocks in their order, with the pairing of each.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pieces: VecDeque<Piece>,
    /// Runs of one pairing, and the blocks left of each.
    runs: VecDeque<(usize, usize)>,
}

impl Queue {
    /// All blocks of a transfer.
    ///
    /// # Errors
    /// `Resource` without memory.
    pub(super) fn of(blocks: &mut dyn Blocks, count: usize) -> Result<Queue> {
        let (mut queue, mut some) = (Queue::default(), Vec::new());
        queue.pieces.try_reserve_exact(count).map_err(|_| err!(Resource, "no memory for a list of {count} blocks"))?;
        while let Some(pairing) = blocks.fill(AT_ONCE, u64::MAX, &mut some) {
            queue.extend(pairing, &some);
            some.clear();
        }
        Ok(queue)
    }

    /// Adds blocks of a pairing at the end.
    pub(super) fn extend(&mut self, pairing: usize, pieces: &[Piece]) {
        self.pieces.extend(pieces);
        match self.runs.back_mut().filter(|(last, _)| *last == pairing) {
            Some((_, count)) => *count += pieces.len(),
            None if pieces.is_empty() => {}
            None => self.runs.push_back((pairing, pieces.len())),
        }
    }

    /// Blocks, the rest of one that was cut among them.
    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Forgets all blocks.
    pub(super) fn clear(&mut self) {
        *self = Queue::default();
    }

    /// Appends the next blocks, at most `most` of them and `bytes` bytes, all of one pairing, and cuts the last one where it is too long.
    /// The pairing and the bytes; `None` at the end.
    pub(super) fn cut(&mut self, most: usize, bytes: u64, out: &mut Vec<Piece>) -> Option<(usize, u64)> {
        let (pairing, count) = self.runs.front_mut()?;
        let (pairing, begin, mut sum) = (*pairing, out.len(), 0);
        while *count > 0 && out.len() - begin < most && sum < bytes {
            let Some(piece) = self.pieces.front_mut() else { break };
            let len = piece.len.min(bytes - sum);
            out.push(Piece { len, ..*piece });
            sum += len;
            if len == piece.len {
                self.pieces.pop_front();
                *count -= 1;
            } else {
                *piece = Piece { src: piece.src.wrapping_add(len), dst: piece.dst.wrapping_add(len), len: piece.len - len };
            }
        }
        if *count == 0 {
            self.runs.pop_front();
        }
        Some((pairing, sum))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What blocks are made of: the pairing of every byte, and its two addresses.
    fn bytes(all: &[(usize, Piece)]) -> Vec<(usize, u64, u64)> {
        all.iter().flat_map(|&(of, p)| (0..p.len).map(move |i| (of, p.src + i, p.dst + i))).collect()
    }

    proptest! {
        /// Every byte comes out once, in order, within the limits of each part.
        #[test]
        fn parts_are_made_of_the_same_bytes(lens in proptest::collection::vec((0usize..3, 1u64..100), 1..60), most in 1usize..9, room in 1u64..300) {
            let all: Vec<_> = lens.iter().enumerate().map(|(i, &(of, len))| (of, Piece { src: i as u64 * 1000, dst: i as u64 * 777, len })).collect();
            let mut queue = Queue::default();
            all.iter().for_each(|&(of, piece)| queue.extend(of, &[piece]));
            let mut got = Vec::new();
            while !queue.is_empty() {
                let mut part = Vec::new();
                let (of, sum) = queue.cut(most, room, &mut part).unwrap();
                prop_assert!(!part.is_empty() && part.len() <= most && sum <= room);
                prop_assert_eq!(sum, part.iter().map(|piece| piece.len).sum::<u64>());
                got.extend(part.into_iter().map(|piece| (of, piece)));
            }
            prop_assert_eq!(bytes(&got), bytes(&all));
            prop_assert!(queue.cut(most, room, &mut Vec::new()).is_none());
        }
    }
}
