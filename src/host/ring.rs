//! The ring of records through which one engine orders the other to copy blocks of its memory into memory that the other has granted,
//! and learns how each order ended. It lies in memory that both write: what the peer may write is read once, checked, and never
//! read again. Knows nothing of what addresses mean.
//!
//! An order is one direct write: one or more records of the same number. Records of several orders may alternate, so that a small write
//! never waits for a large one.

use super::layout::{CLOSED, END, ENDED, HEAD, LISTENS, MOVED, PROGRESS, READ, RECORDS, RING, STATUS, TAIL, WINDOW};
use super::shm::{self, Shared};
use crate::status::{bail, Result};
use crate::types::Piece;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{fence, AtomicU64, Ordering};
use std::sync::Arc;

/// Blocks of a record at most.
pub(crate) const MAX_BLOCKS: usize = 4096;
/// Bytes of a record at most: what a record costs the engine that copies grows with them, and its blocks may all name the same bytes.
pub(crate) const MAX_BYTES: u64 = 1 << 30;
/// Words of a record's head, and of a block.
const HEAD_WORDS: usize = 4;
const BLOCK_WORDS: usize = 3;
/// A record is put at the ring's end only if it holds so many blocks there, or all of them.
const LEAST: usize = 64;
/// Words that records of large orders leave free for those of small ones.
const RESERVE: usize = RING / 8;
/// An empty ring starts again at its front once it has come so far: what is written again and again stays in the cache.
const FAR: usize = RING / 4;

/// Flags of a record: the order has no more; nothing but the way to the ring's front; part of a large order.
const LAST: u64 = 1;
const SKIP: u64 = 2;
const BULK: u64 = 4;

/// What all blocks of a record have in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Head {
    /// Number of the order, from 1 on.
    pub order: u64,
    /// The grant that allows it.
    pub slot: u32,
    pub generation: u64,
    /// The export that the source lies in; 0: memory of the process.
    pub export: u32,
    /// The order's last record.
    pub last: bool,
    /// Part of a large order.
    pub bulk: bool,
}

/// A record: `src` in the writer's address space, `dst` in the reader's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    pub head: Head,
    pub blocks: Vec<Piece>,
}

/// A record of the peer whose head was copied and whose blocks are still in the ring: where they are, and its words.
#[derive(Clone, Copy)]
struct Open {
    head: Head,
    at: usize,
    words: usize,
}

/// The writer's end of the ring: its own file.
pub(crate) struct RingOut {
    shared: Arc<Shared>,
    fd: OwnedFd,
    tail: u64,
    /// The reader's positions as they were last seen.
    head: u64,
    ended: u64,
    /// Orders that were begun, the number of the newest, and by place in the window those that have not ended.
    begun: u64,
    newest: u64,
    open: Box<[bool; WINDOW]>,
}

/// Lets the owner of a [`RingOut`] be woken, or no longer. Any thread may use it.
#[derive(Clone)]
pub(crate) struct Listening(Arc<Shared>);

impl Listening {
    /// Asks the peer to ring when something of this engine's has ended, or no longer.
    pub(crate) fn set(&self, on: bool) {
        self.0.word(LISTENS).store(on.into(), Ordering::SeqCst);
        // Pairs with the fence of `RingIn::wakes`: what is looked at afterwards is not older.
        fence(Ordering::SeqCst);
    }
}

impl RingOut {
    pub(crate) fn new() -> Result<RingOut> {
        let fd = shm::create(c"uccl-ring", END * 8)?;
        let shared = Arc::new(Shared::map(fd.as_fd(), END * 8, true)?);
        Ok(RingOut { shared, fd, tail: 0, head: 0, ended: 0, begun: 0, newest: 0, open: Box::new([false; WINDOW]) })
    }

    /// The file, for the peer.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The mapping.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The switch of the doorbell.
    pub(crate) fn listening(&self) -> Listening {
        Listening(self.shared.clone())
    }

    /// From now on the announced memory may hold anything: orders that have not ended never will.
    pub(crate) fn close(&self) {
        self.shared.word(CLOSED).store(1, Ordering::SeqCst);
    }

    /// The number of a new order; `None` while [`WINDOW`] orders have not ended.
    pub(crate) fn begin(&mut self) -> Option<u64> {
        let free = (1..=WINDOW as u64).map(|next| self.newest + next).find(|&number| !self.open[place(number)])?;
        (self.open[place(free)], self.newest, self.begun) = (true, free, self.begun + 1);
        Some(free)
    }

    /// The end of an order was seen: its place is free.
    pub(crate) fn forget(&mut self, order: u64) {
        self.open[place(order)] = false;
    }

    /// How many blocks of `wanted` the next record may have; 0 when there is no room now.
    ///
    /// # Errors
    /// `Protocol` when the peer reports an impossible position.
    pub(crate) fn room(&mut self, wanted: usize, bulk: bool) -> Result<usize> {
        self.find(wanted, wanted.min(LEAST), bulk)
    }

    /// Whether the next record may have so many blocks.
    ///
    /// # Errors
    /// As [`RingOut::room`].
    pub(crate) fn fits(&mut self, blocks: usize, bulk: bool) -> Result<bool> {
        Ok(self.find(blocks, blocks, bulk)? == blocks)
    }

    fn find(&mut self, wanted: usize, least: usize, bulk: bool) -> Result<usize> {
        let head = self.shared.word(HEAD).load(Ordering::Acquire);
        if head < self.head || head > self.tail {
            bail!(Protocol, "the peer has read the ring up to {head}, which ends at {}", self.tail);
        }
        self.head = head;
        let fits = |words: usize| (words.saturating_sub(HEAD_WORDS) / BLOCK_WORDS).min(MAX_BLOCKS).min(wanted);
        let kept = if bulk { RESERVE } else { 0 };
        let (free, at) = ((RING - (self.tail - self.head) as usize).saturating_sub(kept), self.tail as usize % RING);
        let left = RING - at;
        let (here, front) = (fits(free.min(left)), fits(free.saturating_sub(left)));
        let anew = at >= FAR && self.head == self.tail && front >= wanted.min(MAX_BLOCKS);
        if here >= least && !anew {
            return Ok(here);
        }
        if front < least {
            return Ok(0);
        }
        self.shared.word(RECORDS + at).store(left as u64 | SKIP << 32, Ordering::Relaxed);
        self.tail += left as u64;
        Ok(front)
    }

    /// Writes a record with blocks of an order; [`RingOut::room`] has said that they fit.
    ///
    /// # Errors
    /// `Internal` when they do not.
    pub(crate) fn announce(&mut self, head: Head, blocks: &[Piece]) -> Result<()> {
        let words = HEAD_WORDS + BLOCK_WORDS * blocks.len();
        let (free, at) = (RING - (self.tail - self.head) as usize, self.tail as usize % RING);
        if blocks.is_empty() || blocks.len() > MAX_BLOCKS || words > free || at + words > RING {
            bail!(Internal, "no room for a record of {} blocks", blocks.len());
        }
        let ring: &[_; RING] = self.shared.words(RECORDS);
        let (front, rest) = ring[at..at + words].split_at(HEAD_WORDS);
        let flags = (u64::from(head.last) * LAST) | (u64::from(head.bulk) * BULK);
        let values =
            [words as u64 | flags << 32, head.order, head.generation, u64::from(head.slot) | u64::from(head.export) << 32];
        front.iter().zip(values).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
        for (to, block) in rest.chunks_exact(BLOCK_WORDS).zip(blocks) {
            to[0].store(block.src, Ordering::Relaxed);
            to[1].store(block.dst, Ordering::Relaxed);
            to[2].store(block.len, Ordering::Relaxed);
        }
        self.tail += words as u64;
        self.shared.word(TAIL).store(self.tail, Ordering::Release);
        Ok(())
    }

    /// Whether orders have ended since the last call.
    ///
    /// # Errors
    /// `Protocol` when more have than were begun.
    pub(crate) fn ended(&mut self) -> Result<bool> {
        let ended = self.shared.word(ENDED).load(Ordering::Acquire);
        if ended < self.ended || ended > self.begun {
            bail!(Protocol, "{ended} orders of {} have ended, after {}", self.begun, self.ended);
        }
        Ok(std::mem::replace(&mut self.ended, ended) != ended)
    }

    /// Whether an order was carried out (`true`) or refused; `None` while it is under way.
    pub(crate) fn outcome(&self, order: u64) -> Option<bool> {
        let status: &[_; WINDOW] = self.shared.words(STATUS);
        let word = status[place(order)].load(Ordering::Acquire);
        (word >> 1 == order).then_some(word & 1 == 1)
    }

    /// Bytes of an order that the peer says it has copied.
    pub(crate) fn progress(&self, order: u64) -> u64 {
        let progress: &[_; WINDOW] = self.shared.words(PROGRESS);
        progress[place(order)].load(Ordering::Relaxed)
    }

    /// Bytes of all orders that the peer says it has copied: changes whenever some order has moved on.
    pub(crate) fn moved(&self) -> u64 {
        self.shared.word(MOVED).load(Ordering::Relaxed)
    }

    /// Bytes of this engine that the peer says its reads have copied.
    pub(crate) fn read(&self) -> u64 {
        self.shared.word(READ).load(Ordering::Relaxed)
    }
}

/// The place of an order in the window.
pub(super) fn place(order: u64) -> usize {
    order as usize % WINDOW
}

/// The reader's end of the ring: the peer's file.
pub(crate) struct RingIn {
    shared: Arc<Shared>,
    open: Option<Open>,
    head: u64,
    ended: u64,
    moved: u64,
    read: u64,
}

impl RingIn {
    /// Maps the peer's file.
    ///
    /// # Errors
    /// `Protocol` when it is none that could be.
    pub(crate) fn open(fd: BorrowedFd<'_>) -> Result<RingIn> {
        shm::check(fd, END as u64 * 8)?;
        Ok(RingIn { shared: Arc::new(Shared::map(fd, END * 8, true)?), open: None, head: 0, ended: 0, moved: 0, read: 0 })
    }

    /// The mapping.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether the peer sleeps and wants to be woken for what was just written; it is asked once.
    pub(crate) fn wakes(&self) -> bool {
        fence(Ordering::SeqCst);
        self.shared.word(LISTENS).load(Ordering::SeqCst) == 1 && self.shared.word(LISTENS).swap(0, Ordering::SeqCst) == 1
    }

    /// The peer has taken its memory back. What was copied before this returned `false` is what it announced.
    pub(crate) fn closed(&self) -> bool {
        fence(Ordering::SeqCst);
        self.shared.word(CLOSED).load(Ordering::SeqCst) != 0
    }

    /// Records wait to be read.
    pub(crate) fn waiting(&self) -> bool {
        self.shared.word(TAIL).load(Ordering::SeqCst) != self.head
    }

    /// The head of the next record, copied, and its number of blocks; `None` when there is no record yet. It stays the same until its
    /// blocks have been taken.
    ///
    /// # Errors
    /// `Protocol` when the contents cannot be.
    pub(crate) fn next(&mut self) -> Result<Option<(Head, usize)>> {
        if self.open.is_none() && !self.advance()? {
            return Ok(None);
        }
        Ok(self.open.map(|open| (open.head, (open.words - HEAD_WORDS) / BLOCK_WORDS)))
    }

    /// Copies the head of the next record; `false` when there is none yet.
    fn advance(&mut self) -> Result<bool> {
        let shared = self.shared.clone();
        let ring: &[_; RING] = shared.words(RECORDS);
        let word = |at: usize| ring[at % RING].load(Ordering::Relaxed);
        let mut filled = self.shared.word(TAIL).load(Ordering::Acquire).wrapping_sub(self.head);
        if filled > RING as u64 {
            bail!(Protocol, "a ring that holds {filled} words");
        }
        let (mut words, mut flags, mut at);
        loop {
            if filled == 0 {
                return Ok(false);
            }
            at = self.head as usize % RING;
            let first = word(at);
            (words, flags) = ((first & 0xFFFF_FFFF) as usize, first >> 32);
            if flags != SKIP {
                break;
            }
            if words != RING - at || words as u64 > filled {
                bail!(Protocol, "a way of {words} words to the front of the ring");
            }
            filled -= words as u64;
            self.passed(words);
        }
        let whole =
            words > HEAD_WORDS && words <= HEAD_WORDS + BLOCK_WORDS * MAX_BLOCKS && (words - HEAD_WORDS) % BLOCK_WORDS == 0;
        if !whole || flags & !(LAST | BULK) != 0 || words as u64 > filled || at + words > RING {
            bail!(Protocol, "a record of {words} words in a ring that holds {filled}");
        }
        let last = word(at + 3);
        let (slot, export) = (last as u32, (last >> 32) as u32);
        let (last, bulk) = (flags & LAST != 0, flags & BULK != 0);
        let head = Head { order: word(at + 1), slot, generation: word(at + 2), export, last, bulk };
        self.open = Some(Open { head, at, words });
        Ok(true)
    }

    /// Hands out the blocks of the record at hand, each word of which is read once, and goes past it.
    #[inline]
    pub(crate) fn take(&mut self, each: impl FnMut(Piece)) {
        let Some(Open { at, words, .. }) = self.open.take() else { return };
        let ring: &[_; RING] = self.shared.words(RECORDS);
        let blocks = ring[at + HEAD_WORDS..at + words].chunks_exact(BLOCK_WORDS);
        let block = |w: &[AtomicU64]| Piece {
            src: w[0].load(Ordering::Relaxed),
            dst: w[1].load(Ordering::Relaxed),
            len: w[2].load(Ordering::Relaxed),
        };
        blocks.map(block).for_each(each);
        self.passed(words);
    }

    /// Goes past the record at hand without a look at its blocks.
    pub(crate) fn skip(&mut self) {
        if let Some(Open { words, .. }) = self.open.take() {
            self.passed(words);
        }
    }

    fn passed(&mut self, words: usize) {
        self.head += words as u64;
        self.shared.word(HEAD).store(self.head, Ordering::Release);
    }

    /// A new order of the peer starts at no bytes.
    pub(crate) fn begin(&mut self, order: u64) {
        let progress: &[_; WINDOW] = self.shared.words(PROGRESS);
        progress[place(order)].store(0, Ordering::Relaxed);
    }

    /// So many more bytes of an order are copied, which makes `sum` of it.
    pub(crate) fn moved(&mut self, order: u64, bytes: u64, sum: u64) {
        let progress: &[_; WINDOW] = self.shared.words(PROGRESS);
        progress[place(order)].store(sum, Ordering::Relaxed);
        self.moved += bytes;
        self.shared.word(MOVED).store(self.moved, Ordering::Relaxed);
    }

    /// An order has ended: all bytes are in place, or it was refused.
    pub(crate) fn end(&mut self, order: u64, done: bool) {
        let status: &[_; WINDOW] = self.shared.words(STATUS);
        status[place(order)].store(order << 1 | u64::from(done), Ordering::Release);
        self.ended += 1;
        self.shared.word(ENDED).store(self.ended, Ordering::SeqCst);
    }

    /// Bytes were read under grants.
    pub(crate) fn read(&mut self, bytes: u64) {
        self.read += bytes;
        self.shared.word(READ).store(self.read, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn both() -> (RingOut, RingIn) {
        let out = RingOut::new().unwrap();
        let inn = RingIn::open(out.fd()).unwrap();
        (out, inn)
    }

    /// Takes the next record; `false` when there is none yet.
    fn next(inn: &mut RingIn, got: &mut Record) -> Result<bool> {
        let Some((head, count)) = inn.next()? else { return Ok(false) };
        assert_eq!(inn.next()?, Some((head, count)), "the same again");
        (got.head, got.blocks) = (head, Vec::new());
        inn.take(|block| got.blocks.push(block));
        assert_eq!(got.blocks.len(), count);
        Ok(true)
    }

    fn blocks(n: usize, len: u64) -> Vec<Piece> {
        (0..n as u64).map(|i| Piece { src: i * 8192 + 1, dst: i * 4096 + 2, len }).collect()
    }

    fn head(order: u64, last: bool) -> Head {
        Head { order, slot: order as u32 % 7, generation: order + 5, export: order as u32 % 3, last, bulk: order % 2 == 1 }
    }

    proptest! {
        /// Whatever sizes and however often the ring goes round, what comes out is what went in.
        #[test]
        fn orders_arrive_as_they_were_announced(rounds in proptest::collection::vec((1usize..2 * MAX_BLOCKS, 0usize..3), 1..80)) {
            let (mut out, mut inn) = both();
            let (mut waiting, mut got) = (VecDeque::new(), Record::default());
            for (i, (n, reads)) in rounds.into_iter().enumerate() {
                let mut left = blocks(n, 4096);
                while !left.is_empty() {
                    let room = out.room(left.len(), i % 2 == 1).unwrap();
                    prop_assert!(room <= left.len().min(MAX_BLOCKS));
                    if room == 0 {
                        prop_assert!(next(&mut inn, &mut got).unwrap());
                        prop_assert_eq!(Some(got.clone()), waiting.pop_front());
                        continue;
                    }
                    let record = Record { head: head(i as u64, room == left.len()), blocks: left.drain(..room).collect() };
                    out.announce(record.head, &record.blocks).unwrap();
                    prop_assert!(inn.waiting());
                    waiting.push_back(record);
                }
                for _ in 0..reads {
                    prop_assert_eq!(next(&mut inn, &mut got).unwrap(), !waiting.is_empty());
                    if let Some(expected) = waiting.pop_front() {
                        prop_assert_eq!(&got, &expected);
                    }
                }
            }
            while let Some(expected) = waiting.pop_front() {
                prop_assert!(next(&mut inn, &mut got).unwrap());
                prop_assert_eq!(&got, &expected);
            }
            prop_assert!(!next(&mut inn, &mut got).unwrap() && !inn.waiting());
            prop_assert!(out.room(1, true).unwrap() == 1);
        }

        /// A peer that writes anything anywhere is found out or gives a record in bounds.
        #[test]
        fn a_hostile_ring_is_never_believed(writes in proptest::collection::vec((0usize..200, any::<bool>(), any::<u64>(), any::<bool>()), 1..200)) {
            let (mut out, mut inn) = both();
            let mut got = Record::default();
            out.room(5, false).unwrap();
            out.announce(head(1, true), &blocks(5, 7)).unwrap();
            for (at, front, value, small) in writes {
                let at = if front { at % 96 } else { RECORDS + at };
                out.shared.word(at).store(if small { value % 5000 } else { value }, Ordering::SeqCst);
                match next(&mut inn, &mut got) {
                    Ok(true) => prop_assert!(!got.blocks.is_empty() && got.blocks.len() <= MAX_BLOCKS),
                    Ok(false) => {}
                    Err(e) => prop_assert_eq!(e.kind(), ErrorKind::Protocol),
                }
                for claimed in [out.room(3, false).err(), out.ended().err()].into_iter().flatten() {
                    prop_assert_eq!(claimed.kind(), ErrorKind::Protocol);
                }
            }
        }
    }

    #[test]
    fn the_end_of_each_order_is_seen_in_any_sequence() {
        let (mut out, mut inn) = both();
        let orders: Vec<u64> = (0..3).filter_map(|_| out.begin()).collect();
        assert_eq!((orders[0], out.ended().unwrap()), (1, false));
        inn.end(2, true);
        assert!(out.ended().unwrap() && !out.ended().unwrap());
        assert_eq!(orders.iter().map(|&o| out.outcome(o)).collect::<Vec<_>>(), [None, Some(true), None]);
        inn.end(1, false);
        assert_eq!(out.outcome(1), Some(false));
        inn.moved(3, 70, 70);
        inn.moved(3, 5, 75);
        inn.read(30);
        assert_eq!((out.moved(), out.progress(3), out.progress(2), out.read()), (75, 75, 0, 30));
        (0..2).for_each(|i| inn.end(3 + i, true));
        assert_eq!(out.ended().unwrap_err().kind(), ErrorKind::Protocol, "one more than was announced");
    }

    #[test]
    fn a_ring_that_is_full_takes_no_more_and_empties() {
        let (mut out, mut inn) = both();
        let all = blocks(MAX_BLOCKS, 1);
        let mut n = 0;
        while out.room(MAX_BLOCKS, true).unwrap() == MAX_BLOCKS {
            out.announce(head(1, false), &all).unwrap();
            n += 1;
        }
        assert!(n >= 8, "{n}");
        assert_eq!(out.room(MAX_BLOCKS, false).unwrap(), MAX_BLOCKS, "kept for small orders");
        out.announce(head(2, false), &all).unwrap();
        while out.room(MAX_BLOCKS, false).unwrap() > 0 {
            let n = out.room(MAX_BLOCKS, false).unwrap();
            out.announce(head(2, false), &all[..n]).unwrap();
        }
        assert!(out.announce(head(1, false), &all).is_err());
        let mut got = Record::default();
        assert!(inn.next().unwrap().is_some());
        inn.skip();
        while next(&mut inn, &mut got).unwrap() {}
        assert_eq!(out.room(MAX_BLOCKS, false).unwrap(), MAX_BLOCKS);
    }

    #[test]
    fn an_old_order_keeps_its_place_and_no_other() {
        let (mut out, _inn) = both();
        let old = out.begin().unwrap();
        for _ in 0..3 * WINDOW {
            let next = out.begin().unwrap();
            assert!(place(next) != place(old));
            out.forget(next);
        }
        let more = std::iter::from_fn(|| out.begin()).count();
        assert_eq!(more, WINDOW - 1);
        out.forget(old);
        assert!(out.begin().is_some_and(|next| place(next) == place(old)));
    }

    #[test]
    fn the_doorbell_rings_once_for_a_side_that_listens() {
        let (out, inn) = both();
        assert!(!inn.wakes());
        out.listening().set(true);
        assert!(inn.wakes() && !inn.wakes());
        assert!(!inn.closed());
        out.close();
        assert!(inn.closed());
    }
}
