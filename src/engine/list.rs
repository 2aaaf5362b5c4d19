//! A list of segments that is prepared once for several transfers. It knows regions only by their ids and items; each start
//! checks that they exist and contain the segments.

use crate::direct::{Blocks, Way};
use crate::engine::fifo::FifoItem;
use crate::engine::request::{Known, Sketching, MAX_BLOCK};
use crate::engine::transfer::LocalSegment;
use crate::proto::Sketch;
use crate::registry::Registry;
use crate::status::{err, Result};
use crate::types::Piece;
use std::collections::TryReserveError;

/// A segment: its addresses here and at the peer, and its length.
#[derive(Clone, Copy, Debug)]
struct Block {
    near: u64,
    far: u64,
    len: u64,
}

/// A local region and the item of a peer's region, with the ranges that the blocks use of each.
#[derive(Clone, Copy, Debug)]
struct Pair {
    mr: u64,
    item: FifoItem,
    near: (u64, u64),
    far: (u64, u64),
}

/// Consecutive blocks of one pair; `end` is the index after the last.
#[derive(Clone, Copy, Debug)]
struct Run {
    pair: usize,
    end: usize,
}

/// The list.
#[derive(Debug)]
pub struct List {
    pairs: Vec<Pair>,
    runs: Vec<Run>,
    blocks: Vec<Block>,
    /// Segments of zero bytes: they move nothing, but are checked.
    empty: Vec<(usize, Block)>,
    total: u64,
    longest: u64,
    /// A segment wraps around the address space.
    wraps: bool,
}

impl List {
    /// Makes a list of `n` segments.
    ///
    /// # Errors
    /// `Resource` when memory is short.
    pub fn new<'a>(n: usize, items: impl Iterator<Item = (LocalSegment, &'a FifoItem)>) -> Result<List> {
        List::gather(n, items).map_err(|_| err!(Resource, "no memory for a list of {n} segments"))
    }

    fn gather<'a>(
        n: usize,
        items: impl Iterator<Item = (LocalSegment, &'a FifoItem)>,
    ) -> std::result::Result<List, TryReserveError> {
        let mut blocks = Vec::new();
        blocks.try_reserve_exact(n)?;
        let (pairs, runs, empty) = (Vec::new(), Vec::<Run>::new(), Vec::new());
        let mut list = List { pairs, runs, blocks, empty, total: 0, longest: 0, wraps: false };
        let mut known = Known::default();
        for (local, item) in items {
            let last = list.runs.last().map(|run| run.pair).filter(|&pair| list.pairs[pair].is(local.mr, item));
            let pair = match last.or_else(|| known.find(local.mr, item)) {
                Some(pair) => pair,
                None => {
                    let nothing = (u64::MAX, 0);
                    push(&mut list.pairs, Pair { mr: local.mr, item: *item, near: nothing, far: nothing })?;
                    known.add(local.mr, item)?
                }
            };
            list.add(pair, Block { near: local.addr as u64, far: item.addr, len: local.len as u64 })?;
        }
        list.blocks.shrink_to_fit();
        Ok(list)
    }

    fn add(&mut self, pair: usize, block: Block) -> std::result::Result<(), TryReserveError> {
        if block.len == 0 {
            return push(&mut self.empty, (pair, block));
        }
        let ((near, over), (far, far_over)) = (block.near.overflowing_add(block.len), block.far.overflowing_add(block.len));
        self.wraps |= over | far_over;
        self.total = self.total.saturating_add(block.len);
        self.longest = self.longest.max(block.len);
        let Pair { near: here, far: there, .. } = &mut self.pairs[pair];
        *here = (here.0.min(block.near), here.1.max(near));
        *there = (there.0.min(block.far), there.1.max(far));
        self.blocks.push(block);
        let end = self.blocks.len();
        match self.runs.last_mut().filter(|run| run.pair == pair) {
            Some(run) => run.end = end,
            None => push(&mut self.runs, Run { pair, end })?,
        }
        Ok(())
    }

    /// The number of segments.
    pub(super) fn len(&self) -> usize {
        self.blocks.len() + self.empty.len()
    }

    /// Prepares a transfer that may go directly, like [`crate::engine::request::sketch`]: the sketch, and the feed that hands out
    /// the blocks. `None` if anything is wrong, empty or unusual.
    pub(super) fn sketch(&self, way: Way, registry: &Registry, peer_engine: [u8; 16]) -> Option<(Sketch, ListFeed<'_>)> {
        if self.wraps || self.blocks.is_empty() || !self.empty.is_empty() {
            return None;
        }
        let mut sketching = Sketching::new(registry, peer_engine);
        let mut pairings = Vec::with_capacity(self.pairs.len());
        for pair in &self.pairs {
            pairings.push(sketching.note(pair.mr, &pair.item, pair.near, pair.far)?);
        }
        let feed = ListFeed { list: self, pairings, way, run: 0, at: 0, given: 0 };
        Some((sketching.finish(self.total, self.blocks.len())?, feed))
    }

    /// The segments; those of zero bytes come last.
    pub(super) fn iter(&self) -> impl Iterator<Item = (LocalSegment, FifoItem)> + '_ {
        let mut runs = self.runs.iter().copied();
        let mut run = Run { pair: 0, end: 0 };
        let full = self.blocks.iter().enumerate().map(move |(i, block)| {
            if i == run.end {
                run = runs.next().unwrap_or(run);
            }
            (run.pair, block)
        });
        full.chain(self.empty.iter().map(|(pair, block)| (*pair, block))).map(|(pair, block)| {
            let Pair { mr, item, .. } = self.pairs[pair];
            (LocalSegment { mr, addr: block.near as usize, len: block.len as usize }, FifoItem { addr: block.far, ..item })
        })
    }
}

fn push<T>(list: &mut Vec<T>, value: T) -> std::result::Result<(), TryReserveError> {
    list.try_reserve(1)?;
    list.push(value);
    Ok(())
}

impl Pair {
    #[inline]
    fn is(&self, mr: u64, item: &FifoItem) -> bool {
        self.mr == mr && self.item.same_region(item)
    }
}

/// Hands out the blocks of a list.
pub(super) struct ListFeed<'a> {
    list: &'a List,
    /// The pairings of the list's pairs.
    pairings: Vec<usize>,
    way: Way,
    run: usize,
    at: usize,
    /// Bytes already handed out of a long block.
    given: u64,
}

impl ListFeed<'_> {
    #[inline]
    fn piece(way: Way, &Block { near, far, len }: &Block) -> Piece {
        match way {
            Way::In => Piece { src: far, dst: near, len },
            Way::Out => Piece { src: near, dst: far, len },
        }
    }

    /// Hands out the next part of a block longer than [`MAX_BLOCK`].
    fn part(&mut self, block: &Block, out: &mut Vec<Piece>) {
        let len = (block.len - self.given).min(MAX_BLOCK);
        out.push(Self::piece(self.way, &Block { near: block.near + self.given, far: block.far + self.given, len }));
        self.given += len;
        if self.given == block.len {
            (self.at, self.given) = (self.at + 1, 0);
        }
    }
}

impl Blocks for ListFeed<'_> {
    fn fill(&mut self, most: usize, bytes: u64, out: &mut Vec<Piece>) -> Option<usize> {
        let list = self.list;
        while self.at == list.runs.get(self.run)?.end {
            self.run += 1;
        }
        let Run { pair, end } = list.runs[self.run];
        let rest = &list.blocks[self.at..end];
        if rest[0].len > MAX_BLOCK {
            self.part(&rest[0], out);
            return self.pairings.get(pair).copied();
        }
        let rest = &rest[..rest.len().min(most.max(1))];
        let mut count = rest.len();
        if list.longest > MAX_BLOCK || list.longest * count as u64 > bytes {
            let mut sum = 0;
            let fits = |block: &&Block| {
                let fits = (sum < bytes || sum == 0) && block.len <= MAX_BLOCK;
                sum += block.len;
                fits
            };
            count = rest.iter().take_while(fits).count();
        }
        let (taken, way) = (&rest[..count], self.way);
        match way {
            Way::In => out.extend(taken.iter().map(|block| Self::piece(Way::In, block))),
            Way::Out => out.extend(taken.iter().map(|block| Self::piece(Way::Out, block))),
        }
        self.at += count;
        self.pairings.get(pair).copied()
    }

    fn is_done(&self) -> bool {
        self.at == self.list.blocks.len()
    }
}

#[cfg(test)]
mod tests;
