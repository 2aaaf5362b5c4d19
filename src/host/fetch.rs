//! Staged reads of this engine: it asks the owner of the source for blocks, and the owner fills slots of this engine's area, each with the next bytes of
//! what was asked. Only this engine knows where they go. Knows nothing of how copies run.

use super::areas::Kind;
use super::blocks::is_small;
use super::queue::Queue;
use super::ring::{Head, RingOut, MAX_BLOCKS};
use crate::direct::{Event, Start};
use crate::region::Hold;
use crate::status::{bail, Result};
use crate::types::{Key, Piece, Place};
use std::collections::VecDeque;

/// Blocks that are asked for and not answered at most, and how many of them may belong to large reads.
pub(super) const BLOCKS: usize = 32 << 10;
const BULK: usize = BLOCKS / 2;

/// A read.
struct Reading {
    key: Key,
    /// Its number; `None` while it waits for one.
    order: Option<u64>,
    place: Place,
    bulk: bool,
    /// The grant of each pairing.
    grants: Vec<(u32, u64)>,
    /// Blocks to be asked for.
    queue: Queue,
    /// Blocks that were asked for and have not been answered.
    asked: Queue,
    /// Copies under way.
    copies: usize,
    refused: bool,
    _hold: Hold,
}

/// All staged reads of a connection.
#[derive(Default)]
pub(super) struct Fetches {
    list: VecDeque<Reading>,
    pieces: Vec<Piece>,
    /// Blocks of all that were asked for and not answered.
    ahead: usize,
}

impl Fetches {
    /// Starts a read whose blocks all go to `place`. `grants`: that of each pairing.
    ///
    /// # Errors
    /// `Resource` without memory.
    pub(super) fn start(&mut self, transfer: &mut Start<'_>, grants: Vec<(u32, u64)>, place: Place) -> Result<()> {
        self.list.push_back(Reading {
            key: transfer.key,
            order: None,
            place,
            bulk: !is_small(transfer.total, transfer.count),
            grants,
            queue: Queue::of(transfer.blocks, transfer.count)?,
            asked: Queue::default(),
            copies: 0,
            refused: false,
            _hold: transfer.hold.clone(),
        });
        Ok(())
    }

    /// Asks for more, small reads first; whether it did.
    ///
    /// # Errors
    /// When the connection must end.
    pub(super) fn advance(&mut self, out: &mut RingOut) -> Result<bool> {
        let mut any = false;
        for bulk in [false, true] {
            for i in 0..self.list.len() {
                while self.list[i].bulk == bulk && self.ask(i, out)? {
                    any = true;
                }
            }
        }
        Ok(any)
    }

    /// Asks for the next blocks of a read; whether it did.
    fn ask(&mut self, at: usize, out: &mut RingOut) -> Result<bool> {
        let Fetches { list, pieces, ahead } = self;
        let Some(reading) = list.get_mut(at).filter(|reading| !reading.queue.is_empty()) else { return Ok(false) };
        if reading.order.is_none() {
            reading.order = out.begin();
        }
        let Some(order) = reading.order else { return Ok(false) };
        let most = if reading.bulk { BULK } else { BLOCKS };
        let wanted = reading.queue.len().min(MAX_BLOCKS).min(most.saturating_sub(*ahead));
        let room = if wanted > 0 { out.room(wanted, reading.bulk)? } else { 0 };
        if room == 0 {
            return Ok(false);
        }
        pieces.clear();
        let pairing = reading.queue.cut(room, u64::MAX, pieces).map(|(pairing, _)| pairing);
        let Some(&(slot, generation)) = pairing.and_then(|at| reading.grants.get(at)) else {
            bail!(Internal, "blocks of no pairing")
        };
        reading.asked.extend(0, pieces);
        *ahead += pieces.len();
        pieces.iter_mut().for_each(|piece| piece.dst = 0);
        let (last, bulk) = (reading.queue.is_empty(), reading.bulk);
        out.announce(Head { order, slot, generation, export: Kind::Fetch.export(reading.place), last, bulk }, pieces)?;
        Ok(true)
    }

    /// The next `len` bytes of a read are at `addr`: the pieces of their copy and the read's name; `None` where the read is over.
    ///
    /// # Errors
    /// `Protocol` for more than was asked for, or for another place.
    pub(super) fn answered(
        &mut self,
        (order, place): (u64, Place),
        (addr, len): (u64, u64),
        pieces: &mut Vec<Piece>,
    ) -> Result<Option<Key>> {
        let known = self.list.iter_mut().find(|reading| reading.order == Some(order) && !reading.refused);
        let Some(reading) = known else { return Ok(None) };
        let (begin, before, mut sum) = (pieces.len(), reading.asked.len(), 0);
        if let Some((_, bytes)) = reading.asked.cut(usize::MAX, len, pieces) {
            sum = bytes;
        }
        if sum != len || place != reading.place {
            pieces.truncate(begin);
            bail!(Protocol, "an answer of {len} bytes for memory of {place:?} to a read that has asked for {sum} of them");
        }
        self.ahead -= before - reading.asked.len();
        let mut src = addr;
        for piece in &mut pieces[begin..] {
            piece.src = src;
            src += piece.len;
        }
        reading.copies += 1;
        Ok(Some(reading.key))
    }

    /// A copy of a read has ended.
    pub(super) fn copied(&mut self, key: Key) {
        if let Some(reading) = self.list.iter_mut().find(|reading| reading.key == key) {
            reading.copies -= 1;
        }
    }

    /// Reports reads that have ended; whether some has.
    ///
    /// # Errors
    /// `Protocol` when the peer reports an impossible count.
    pub(super) fn report(&mut self, out: &mut RingOut, events: &mut Vec<Event>) -> Result<bool> {
        let (before, mut i) = (self.list.len(), 0);
        while let Some(reading) = self.list.get_mut(i) {
            let ended = reading.order.and_then(|order| Some((order, out.outcome(order)?)));
            let Some((order, done)) = ended else {
                i += 1;
                continue;
            };
            if done && !reading.queue.is_empty() {
                bail!(Protocol, "the peer has ended an order that it has not read");
            }
            if !done {
                self.ahead -= reading.asked.len();
                reading.refused = true;
                reading.queue.clear();
                reading.asked.clear();
            }
            // Its last answers may still be in the ring.
            if reading.copies > 0 || !reading.asked.is_empty() {
                i += 1;
                continue;
            }
            out.forget(order);
            events.push(Event::Ended(reading.key, done));
            self.list.remove(i);
        }
        Ok(self.list.len() != before)
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }
}
