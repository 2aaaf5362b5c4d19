//! The ring in which one side of a host tells the other which bytes of its memory make up each chunk, and learns which are taken. It
//! lies in memory that both write: whatever the other side may write is read once, checked, and never read again. Knows nothing of
//! what addresses mean.

use super::grants;
use super::layout::{FRONT, RING};
use super::shm::{self, Shared};
use crate::status::{bail, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

/// Pieces of a chunk at most.
pub(crate) const MAX_PIECES: usize = 4096;
/// Words of each descriptor's head, and of each piece.
const HEAD_WORDS: usize = 2;
const PIECE_WORDS: usize = 2;
/// Words of a descriptor at most.
const MAX_WORDS: usize = HEAD_WORDS + PIECE_WORDS * MAX_PIECES;
/// Bytes of the file.
pub(crate) const BYTES: usize = grants::END * 8;

/// Words of the front page, each in a cache line of its own. Written by the owner of the file: how far it has written, and that its
/// memory is its own again.
const TAIL: usize = 0;
const CLOSED: usize = 8;
/// The owner sleeps and wants to be woken when chunks are taken.
const LISTENS: usize = 16;
/// Written by the other side: how far it has read, and how many chunks it has taken.
const HEAD: usize = 24;
const TAKEN: usize = 32;

/// A piece of a chunk, in the source's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// First byte.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The export that it lies in; 0: memory of the process.
    pub export: u32,
}

/// What the source says of a chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// Its tag.
    pub tag: i32,
    /// Bytes of all pieces.
    pub len: u64,
    /// Its pieces, in order.
    pub pieces: Vec<Extent>,
}

/// The side that tells: its own file.
pub(crate) struct Outbox {
    shared: Arc<Shared>,
    fd: OwnedFd,
    tail: u64,
    /// The other side's place as it was last seen.
    head: u64,
    told: u64,
    taken: u64,
}

/// Lets the owner of an [`Outbox`] be woken, or no longer. Any thread may use it.
#[derive(Clone)]
pub(crate) struct Listening(Arc<Shared>);

impl Listening {
    /// Asks the other side to ring when it takes chunks, or no longer.
    pub(crate) fn set(&self, on: bool) {
        self.0.word(LISTENS).store(on.into(), Ordering::SeqCst);
        // The counterpart of that of `wakes`: what is looked at afterwards is not older.
        fence(Ordering::SeqCst);
    }
}

impl Outbox {
    pub(crate) fn new() -> Result<Outbox> {
        let fd = shm::create(c"uccl-ring", BYTES)?;
        let shared = Arc::new(Shared::map(fd.as_fd(), BYTES, true)?);
        Ok(Outbox { shared, fd, tail: 0, head: 0, told: 0, taken: 0 })
    }

    /// The file, for the other side.
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

    /// How many descriptors have room, whatever their size.
    pub(crate) fn room(&self) -> usize {
        (RING - (self.tail - self.head) as usize) / MAX_WORDS
    }

    /// Tells of a chunk. The caller has looked for room.
    ///
    /// # Errors
    /// `Internal` when there is none, or the chunk has too many pieces.
    pub(crate) fn tell(&mut self, tag: i32, len: u64, pieces: &[Extent]) -> Result<()> {
        if self.room() == 0 || pieces.len() > MAX_PIECES {
            bail!(Internal, "no room for a chunk of {} pieces", pieces.len());
        }
        let words = HEAD_WORDS + PIECE_WORDS * pieces.len();
        let ring: &[_; RING] = self.shared.words(FRONT);
        let mut at = self.tail;
        let mut put = |value: u64| {
            ring[at as usize % RING].store(value, Ordering::Relaxed);
            at += 1;
        };
        put(words as u64 | u64::from(tag as u32) << 32);
        put(len);
        for piece in pieces {
            put(piece.addr);
            put(u64::from(piece.len) | u64::from(piece.export) << 32);
        }
        self.tail = at;
        self.told += 1;
        self.shared.word(TAIL).store(at, Ordering::Release);
        Ok(())
    }

    /// How many more chunks the other side has taken since the last call.
    ///
    /// # Errors
    /// `Protocol` when it claims what cannot be.
    pub(crate) fn taken(&mut self) -> Result<u64> {
        let (taken, head) = (self.shared.word(TAKEN).load(Ordering::Acquire), self.shared.word(HEAD).load(Ordering::Acquire));
        if taken < self.taken || taken > self.told {
            bail!(Protocol, "the peer has taken {taken} chunks of {}, after {}", self.told, self.taken);
        }
        if head < self.head || head > self.tail {
            bail!(Protocol, "the peer has read a ring up to {head}, which ends at {}", self.tail);
        }
        self.head = head;
        Ok(taken - std::mem::replace(&mut self.taken, taken))
    }

    /// From now on the memory that was told of may be anything: chunks that are not taken by now never will be.
    pub(crate) fn close(&self) {
        self.shared.word(CLOSED).store(1, Ordering::SeqCst);
    }
}

/// The side that listens: the other side's file.
pub(crate) struct Inbox {
    shared: Arc<Shared>,
    head: u64,
    taken: u64,
}

impl Inbox {
    /// Maps the peer's file.
    ///
    /// # Errors
    /// `Protocol` when it is none that could be.
    pub(crate) fn open(fd: BorrowedFd<'_>) -> Result<Inbox> {
        shm::check(fd, BYTES as u64)?;
        Ok(Inbox { shared: Arc::new(Shared::map(fd, BYTES, true)?), head: 0, taken: 0 })
    }

    /// The next chunk's descriptor, copied; `false` when there is none yet.
    ///
    /// # Errors
    /// `Protocol` when the contents cannot be.
    pub(crate) fn next(&mut self, into: &mut Descriptor) -> Result<bool> {
        let filled = self.shared.word(TAIL).load(Ordering::Acquire).wrapping_sub(self.head);
        if filled == 0 {
            return Ok(false);
        }
        let ring: &[_; RING] = self.shared.words(FRONT);
        let word = |at: u64| ring[at as usize % RING].load(Ordering::Relaxed);
        let first = word(self.head);
        let words = (first & 0xFFFF_FFFF) as usize;
        let fits = (HEAD_WORDS..=MAX_WORDS).contains(&words) && words % 2 == 0;
        if filled > RING as u64 || !fits || words as u64 > filled {
            bail!(Protocol, "a descriptor of {words} words in a ring that holds {filled}");
        }
        (into.tag, into.len) = ((first >> 32) as i32, word(self.head + 1));
        into.pieces.clear();
        let mut sum = 0u64;
        for at in (self.head + HEAD_WORDS as u64..self.head + words as u64).step_by(PIECE_WORDS) {
            let (addr, second) = (word(at), word(at + 1));
            let piece = Extent { addr, len: second as u32, export: (second >> 32) as u32 };
            if piece.len == 0 || addr.checked_add(piece.len.into()).is_none() {
                bail!(Protocol, "a piece of {} bytes at {addr:#x}", piece.len);
            }
            sum += u64::from(piece.len);
            into.pieces.push(piece);
        }
        if sum != into.len {
            bail!(Protocol, "pieces of {sum} bytes make a chunk of {}", into.len);
        }
        self.head += words as u64;
        self.shared.word(HEAD).store(self.head, Ordering::Release);
        Ok(true)
    }

    /// The mapping.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// One more chunk is taken: its source may change. Whether the other side wants to be woken.
    pub(crate) fn take(&mut self) -> bool {
        self.taken += 1;
        self.shared.word(TAKEN).store(self.taken, Ordering::SeqCst);
        self.wakes()
    }

    /// Whether the other side sleeps and wants to be woken for what was just written; it is asked once.
    pub(crate) fn wakes(&self) -> bool {
        fence(Ordering::SeqCst);
        self.shared.word(LISTENS).load(Ordering::SeqCst) == 1 && self.shared.word(LISTENS).swap(0, Ordering::SeqCst) == 1
    }

    /// The other side has taken its memory back. What was copied before this said no is what it told of.
    pub(crate) fn closed(&self) -> bool {
        fence(Ordering::SeqCst);
        self.shared.word(CLOSED).load(Ordering::SeqCst) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use proptest::prelude::*;

    fn both() -> (Outbox, Inbox) {
        let out = Outbox::new().unwrap();
        let inn = Inbox::open(out.fd()).unwrap();
        (out, inn)
    }

    fn extents(lens: &[u32]) -> Vec<Extent> {
        lens.iter().enumerate().map(|(i, &len)| Extent { addr: 0x1000 * i as u64 + 1, len, export: i as u32 % 3 }).collect()
    }

    proptest! {
        /// Whatever sizes and however often the ring goes round, what comes out is what went in, and the room comes back.
        #[test]
        fn descriptors_arrive_in_order(rounds in proptest::collection::vec((any::<i32>(), 1usize..MAX_PIECES), 1..60)) {
            let (mut out, mut inn) = both();
            let mut waiting = std::collections::VecDeque::new();
            let mut got = Descriptor::default();
            for (tag, n) in rounds {
                while out.room() == 0 {
                    prop_assert!(inn.next(&mut got).unwrap());
                    prop_assert_eq!(Some(got.clone()), waiting.pop_front());
                    inn.take();
                    prop_assert_eq!(out.taken().unwrap(), 1);
                }
                let pieces = extents(&vec![7; n]);
                out.tell(tag, 7 * n as u64, &pieces).unwrap();
                waiting.push_back(Descriptor { tag, len: 7 * n as u64, pieces });
            }
            while let Some(expected) = waiting.pop_front() {
                prop_assert!(inn.next(&mut got).unwrap());
                prop_assert_eq!(&got, &expected);
            }
            prop_assert!(!inn.next(&mut got).unwrap());
            out.taken().unwrap();
            prop_assert_eq!(out.room(), RING / MAX_WORDS);
        }

        /// A peer that writes anything anywhere, at any time, is found out or gives a descriptor that is in bounds.
        #[test]
        fn a_hostile_ring_is_never_believed(writes in proptest::collection::vec((0usize..700, any::<u64>(), any::<bool>()), 1..200)) {
            let (mut out, mut inn) = both();
            let mut got = Descriptor::default();
            out.tell(1, 14, &extents(&[7, 7])).unwrap();
            for (at, value, small) in writes {
                // Small numbers look most like the truth.
                out.shared.word(at).store(if small { value % 5000 } else { value }, Ordering::SeqCst);
                match inn.next(&mut got) {
                    Ok(true) => {
                        prop_assert!(got.pieces.len() <= MAX_PIECES);
                        prop_assert_eq!(got.pieces.iter().map(|p| u64::from(p.len)).sum::<u64>(), got.len);
                        prop_assert!(got.pieces.iter().all(|p| p.len > 0 && p.addr.checked_add(p.len.into()).is_some()));
                    }
                    Ok(false) => {}
                    Err(e) => prop_assert_eq!(e.kind(), ErrorKind::Protocol),
                }
                match out.taken() {
                    Ok(n) => prop_assert!(n <= 1),
                    Err(e) => prop_assert_eq!(e.kind(), ErrorKind::Protocol),
                }
                prop_assert!(out.room() <= RING / MAX_WORDS);
            }
        }
    }

    #[test]
    fn a_ring_that_is_full_takes_no_more() {
        let (mut out, mut inn) = both();
        let pieces = extents(&[1; MAX_PIECES]);
        let mut n = 0;
        while out.room() > 0 {
            out.tell(n, MAX_PIECES as u64, &pieces).unwrap();
            n += 1;
        }
        assert!(n as usize >= 7 && out.tell(n, 1, &extents(&[1])).is_err());
        assert!(out.tell(n, 1, &extents(&vec![1; MAX_PIECES + 1])).is_err());
        let mut got = Descriptor::default();
        assert!(inn.next(&mut got).unwrap() && got.tag == 0);
        assert_eq!((out.taken(), out.room()), (Ok(0), 1), "read, and not yet taken");
    }

    #[test]
    fn pieces_that_do_not_make_the_chunk_are_a_violation() {
        for len in [6, 8, u64::MAX] {
            let (mut out, mut inn) = both();
            out.tell(0, len, &extents(&[3, 4])).unwrap();
            assert_eq!(inn.next(&mut Descriptor::default()).unwrap_err().kind(), ErrorKind::Protocol);
        }
    }

    #[test]
    fn the_doorbell_rings_once_for_whoever_listens() {
        let (mut out, mut inn) = both();
        let mut got = Descriptor::default();
        let mut taken = |listens: bool, out: &mut Outbox| {
            out.tell(0, 1, &extents(&[1])).unwrap();
            if listens {
                out.listening().set(true);
            }
            assert!(inn.next(&mut got).unwrap());
            (inn.take(), out.taken().unwrap())
        };
        assert_eq!([taken(false, &mut out), taken(true, &mut out), taken(false, &mut out)], [(false, 1), (true, 1), (false, 1)]);
    }

    #[test]
    fn memory_that_was_taken_back_is_seen() {
        let (out, inn) = both();
        assert!(!inn.closed());
        out.close();
        assert!(inn.closed());
    }

    #[test]
    fn counts_that_cannot_be_are_violations() {
        for (word, value) in [(TAKEN, 2), (TAKEN, u64::MAX), (HEAD, u64::MAX), (HEAD, 1 << 20)] {
            let (mut out, _inn) = both();
            out.tell(0, 1, &extents(&[1])).unwrap();
            out.shared.word(word).store(value, Ordering::SeqCst);
            assert_eq!(out.taken().unwrap_err().kind(), ErrorKind::Protocol);
        }
        let (mut out, mut inn) = both();
        for tag in 0..2 {
            out.tell(tag, 1, &extents(&[1])).unwrap();
            inn.take();
            out.taken().unwrap();
        }
        out.shared.word(TAKEN).store(1, Ordering::SeqCst);
        assert_eq!(out.taken().unwrap_err().kind(), ErrorKind::Protocol, "fewer than before");
    }
}
