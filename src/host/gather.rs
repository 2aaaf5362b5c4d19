//! Where this engine copies out of its own memory: its own writes and the peer's reads are gathered, a slot at a time, into
//! the peer's area, and announced once they are there. Slots are used in turn, and announced in that order. Knows nothing of where the
//! peer puts the bytes it has asked for.

use super::areas::{self, offset, slot_bytes, Kind, Slot, Targets, SLOTS};
use super::blocks::is_small;
use super::copies::{Copies, Owner};
use super::exports::Imports;
use super::fetch;
use super::queue::Queue;
use super::ring::{Head, RingOut, MAX_BLOCKS};
use crate::direct::{Event, Start};
use crate::hash::Map;
use crate::region::Hold;
use crate::status::{bail, Result};
use crate::types::{Key, Piece, Place};
use std::collections::VecDeque;

/// A grant that allows a copy, and the place of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Source {
    pub slot: u32,
    pub generation: u64,
    pub here: Place,
}

/// What a write of this engine has that a read of the peer has not.
struct Write {
    key: Key,
    total: u64,
    /// Bytes that were announced to the peer, and bytes that were reported to the caller.
    announced: u64,
    moved: u64,
    _hold: Hold,
}

/// A write of this engine, or a read of the peer, which itself keeps the source.
struct Outgoing {
    write: Option<Write>,
    /// Its number; `None` while a write waits for one.
    order: Option<u64>,
    there: Place,
    bulk: bool,
    /// By pairing.
    sources: Vec<Source>,
    queue: Queue,
    /// Gathers that run, or are full and not announced.
    gathers: usize,
}

/// What a slot is filled with, and its announcement.
struct Gather {
    head: Head,
    blocks: Vec<Piece>,
    bytes: u64,
    /// Part of a write of this engine.
    mine: bool,
    done: bool,
}

/// Slots of one area of the peer.
#[derive(Default)]
struct Lane {
    /// Slots that were used, and those of them that the peer has scattered.
    used: u64,
    scattered: u64,
    /// The newest of the used ones: not announced yet.
    gathers: VecDeque<Gather>,
}

/// What gathers need of the rest of the transport.
pub(super) struct Around<'a> {
    pub copies: &'a mut Copies,
    pub imports: &'a mut Imports,
    pub out: &'a mut RingOut,
}

/// All gathers of a connection.
#[derive(Default)]
pub(super) struct Gathers {
    lanes: Map<Place, Lane>,
    list: VecDeque<Outgoing>,
    /// Blocks that the peer has asked for and that were not gathered.
    asked: usize,
    /// Reads of the peer, and bytes of them that were announced.
    answered: Vec<(u64, u64)>,
    /// Bytes of writes that have ended, and of those under way that were reported.
    done: u64,
    running: u64,
}

impl Gathers {
    /// Starts a write for memory of `there`. `sources`: that of each pairing.
    ///
    /// # Errors
    /// `Resource` without memory.
    pub(super) fn start(&mut self, transfer: &mut Start<'_>, sources: Vec<Source>, there: Place) -> Result<()> {
        let queue = Queue::of(transfer.blocks, transfer.count)?;
        let write = Write { key: transfer.key, total: transfer.total, announced: 0, moved: 0, _hold: transfer.hold.clone() };
        let bulk = !is_small(transfer.total, transfer.count);
        self.list.push_back(Outgoing { write: Some(write), order: None, there, bulk, sources, queue, gathers: 0 });
        Ok(())
    }

    /// The peer asks for blocks, which lie in memory that the order keeps.
    ///
    /// # Errors
    /// `Protocol` for more than may be asked for at once.
    pub(super) fn ask(&mut self, head: &Head, (here, there): (Place, Place), pieces: &[Piece]) -> Result<()> {
        self.asked += pieces.len();
        if self.asked > fetch::BLOCKS {
            bail!(Protocol, "the peer asks for {} blocks at once", self.asked);
        }
        let source = Source { slot: head.slot, generation: head.generation, here };
        let known = self.list.iter().position(|next| next.write.is_none() && next.order == Some(head.order));
        let at = known.unwrap_or_else(|| {
            let (order, queue) = (Some(head.order), Queue::default());
            self.list.push_back(Outgoing { write: None, order, there, bulk: head.bulk, sources: Vec::new(), queue, gathers: 0 });
            self.list.len() - 1
        });
        let Outgoing { sources, queue, there: other, .. } = &mut self.list[at];
        if *other != there {
            bail!(Protocol, "a read into memory of {there:?} and of {other:?}");
        }
        let pairing = sources.iter().position(|known| *known == source).unwrap_or_else(|| {
            sources.push(source);
            sources.len() - 1
        });
        queue.extend(pairing, pieces);
        Ok(())
    }

    /// Fills slots and announces those that are full; whether it announced any.
    ///
    /// # Errors
    /// `Protocol` when the peer reports an impossible count, or why the connection must end.
    pub(super) fn advance(&mut self, targets: &Targets, around: &mut Around<'_>) -> Result<bool> {
        let announced = self.announce(around)?;
        for bulk in [false, true] {
            let mut idle = 0;
            while idle < self.list.len() {
                let went = self.list[0].bulk == bulk && self.gather(targets, around)?;
                self.list.rotate_left(1);
                idle = if went { 0 } else { idle + 1 };
            }
        }
        Ok(announced)
    }

    /// Announces the slots that are full, in order.
    fn announce(&mut self, around: &mut Around<'_>) -> Result<bool> {
        let (Gathers { lanes, list, answered, .. }, mut any) = (self, false);
        for (&there, lane) in lanes {
            let (scattered, announced) = (areas::count(around.out.shared(), there)?, lane.used - lane.gathers.len() as u64);
            if scattered < lane.scattered || scattered > announced {
                bail!(Protocol, "the peer has scattered {scattered} slots of {announced}, after {}", lane.scattered);
            }
            lane.scattered = scattered;
            while let Some(Gather { head, blocks, bytes, mine, .. }) = lane.gathers.front().filter(|gather| gather.done) {
                if !around.out.fits(blocks.len(), head.bulk)? {
                    break;
                }
                around.out.announce(*head, blocks)?;
                let of = list.iter_mut().find(|next| next.order == Some(head.order) && next.write.is_some() == *mine);
                if let Some(of) = of {
                    of.gathers -= 1;
                    of.write.iter_mut().for_each(|write| write.announced += bytes);
                }
                if !mine {
                    answered.push((head.order, *bytes));
                }
                lane.gathers.pop_front();
                any = true;
            }
        }
        list.retain(|next| next.write.is_some() || next.gathers > 0 || !next.queue.is_empty());
        Ok(any)
    }

    /// Fills a slot with what comes first in the list; whether there was one.
    fn gather(&mut self, targets: &Targets, around: &mut Around<'_>) -> Result<bool> {
        let Gathers { lanes, list, asked, .. } = self;
        let Some(next) = list.front_mut().filter(|next| !next.queue.is_empty()) else { return Ok(false) };
        let lane = lanes.entry(next.there).or_default();
        // The last free slot is for small ones.
        if lane.used - lane.scattered >= SLOTS - u64::from(next.bulk) {
            return Ok(false);
        }
        if next.order.is_none() {
            next.order = around.out.begin();
        }
        let Some(order) = next.order else { return Ok(false) };
        let (pieces, before) = (&mut around.copies.pieces, next.queue.len());
        pieces.clear();
        let cut = next.queue.cut(MAX_BLOCKS, slot_bytes(next.there), pieces);
        let (Some((pairing, bytes)), mine) = (cut, next.write.is_some()) else { return Ok(false) };
        if !mine {
            *asked -= before - next.queue.len();
        }
        let Some(&Source { slot: grant, generation, here }) = next.sources.get(pairing) else {
            bail!(Internal, "blocks of no pairing")
        };
        let Some(area) = targets.look(here, next.there) else {
            bail!(Internal, "nothing is staged from {here:?} for the peer's {:?}", next.there)
        };
        let slot = Slot { place: next.there, number: lane.used };
        let mut at = offset(slot);
        let mut blocks = vec![Piece { src: at, dst: 0, len: bytes }];
        if mine {
            blocks = pieces.clone();
        }
        for (i, piece) in pieces.iter_mut().enumerate() {
            if mine {
                blocks[i].src = at;
            }
            piece.dst = area + at;
            at += piece.len;
        }
        let kind = if mine { Kind::Write } else { Kind::Answer };
        let (last, bulk) = (next.queue.is_empty(), next.bulk);
        let head = Head { order, slot: grant, generation, export: kind.export(next.there), last, bulk };
        // SAFETY: the sources lie in memory that the write or the peer's order keeps until this is announced, the destinations in an open area of
        // the peer; all stay for ever where the copy does not end.
        unsafe { around.copies.start(here, Vec::new(), bytes, Owner::Gather(slot), around.imports) }?;
        lane.gathers.push_back(Gather { head, blocks, bytes, mine, done: false });
        lane.used += 1;
        next.gathers += 1;
        Ok(true)
    }

    /// A slot is full.
    pub(super) fn copied(&mut self, slot: Slot) {
        let Some(lane) = self.lanes.get_mut(&slot.place) else { return };
        let announced = lane.used - lane.gathers.len() as u64;
        if let Some(gather) = slot.number.checked_sub(announced).and_then(|at| lane.gathers.get_mut(at as usize)) {
            gather.done = true;
        }
    }

    /// Reads of the peer, and bytes of them that were announced since the last call.
    pub(super) fn take_answered(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.answered)
    }

    /// Reports writes that have ended, and how far others are; whether some has ended.
    ///
    /// # Errors
    /// `Protocol` when the peer reports an impossible count.
    pub(super) fn report(&mut self, out: &mut RingOut, events: &mut Vec<Event>) -> Result<bool> {
        let (before, mut i) = (self.list.len(), 0);
        while let Some(next) = self.list.get_mut(i) {
            let (Some(write), Some(order)) = (&mut next.write, next.order) else {
                i += 1;
                continue;
            };
            let outcome = out.outcome(order);
            if outcome == Some(true) && (next.gathers > 0 || !next.queue.is_empty()) {
                bail!(Protocol, "the peer reports the end of an order before it has read all of it");
            }
            let at = match outcome {
                Some(true) => write.total,
                None => out.progress(order).min(write.announced),
                Some(false) => write.moved,
            };
            let more = at.saturating_sub(write.moved);
            if more > 0 {
                (write.moved, self.running) = (at, self.running + more);
                events.push(Event::Moved(write.key, more));
            }
            let Some(done) = outcome else {
                i += 1;
                continue;
            };
            next.queue.clear();
            // Used slots must be announced: the peer counts those after them.
            if next.gathers > 0 {
                i += 1;
                continue;
            }
            self.running -= write.moved;
            self.done += if done { write.total } else { 0 };
            out.forget(order);
            events.push(Event::Ended(write.key, done));
            self.list.remove(i);
        }
        Ok(self.list.len() != before)
    }

    /// Writes that have not ended.
    pub(super) fn writes(&self) -> usize {
        self.list.iter().filter(|next| next.write.is_some()).count()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Bytes that have moved, and those of writes that have ended.
    pub(super) fn moved(&self) -> (u64, u64) {
        (self.done + self.running, self.done)
    }
}
