//! Writes of this engine: it orders the owner of the destination to copy blocks, a few steps of each large write at a time, so that a
//! large write holds up no small one. Knows nothing of how the owner copies.

use super::blocks::{is_small, Rest, Stride};
use super::exports::Stretch;
use super::locate::{export_of, locate};
use super::ring::{Head, Record, RingOut, MAX_BLOCKS};
use crate::direct::{Blocks, Event, Start};
use crate::region::Hold;
use crate::status::{bail, Result};
use crate::types::{Key, Piece};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Most bytes and blocks of all large writes that are announced and not copied: enough to keep the owner busy until the next announcement.
const AHEAD: Stride = Stride { blocks: 32 << 10, bytes: 256 << 20 };
/// Time in which a small write should be over.
const SOON: Duration = Duration::from_micros(15);

/// Where a pairing's blocks go: a grant, and the allocations of this engine that they come from, rising; none where addresses are valid as they
/// are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub slot: u32,
    pub generation: u64,
    pub stretches: Vec<Stretch>,
}

/// A write of this engine.
struct Writing {
    key: Key,
    /// Its number; `None` while it waits for one.
    order: Option<u64>,
    total: u64,
    /// Bytes that were reported.
    moved: u64,
    bulk: bool,
    begun: Instant,
    targets: Vec<Target>,
    rest: Rest,
    /// Records that found no room.
    unsent: VecDeque<Record>,
    stride: Stride,
    /// Steps that are announced and not copied: the bytes of the write up to the end of each, and its blocks; and bytes announced so far.
    steps: VecDeque<(u64, usize)>,
    announced: u64,
    /// The peer copies it over NVLink.
    nvlink: bool,
    _hold: Hold,
}

/// All writes of a connection.
pub(super) struct Writes {
    pub out: RingOut,
    list: VecDeque<Writing>,
    pieces: Vec<Piece>,
    /// Bytes and blocks of large writes that are announced and not copied.
    ahead: Stride,
    /// What the peer had moved at the last look.
    seen: u64,
    /// Bytes of writes that have ended, and of those under way that were reported.
    done: u64,
    running: u64,
    /// Bytes of writes over NVLink that have ended.
    nvlink: u64,
}

impl Writes {
    pub(super) fn new(out: RingOut) -> Writes {
        let ahead = Stride { blocks: 0, bytes: 0 };
        Writes { out, list: VecDeque::new(), pieces: Vec::new(), ahead, seen: 0, done: 0, running: 0, nvlink: 0 }
    }

    /// Starts a write: announces what fits, and keeps the rest for later. `nvlink`: the peer copies it over NVLink.
    ///
    /// # Errors
    /// When the connection must end.
    pub(super) fn start(&mut self, transfer: &mut Start<'_>, targets: Vec<Target>, nvlink: bool) -> Result<()> {
        let bulk = !is_small(transfer.total, transfer.count);
        let mut rest = if bulk { Rest::with_room(transfer.count)? } else { Rest::default() };
        let mut writing = Writing {
            key: transfer.key,
            order: self.out.begin(),
            total: transfer.total,
            moved: 0,
            bulk,
            begun: transfer.now,
            targets,
            rest: Rest::default(),
            unsent: VecDeque::new(),
            stride: Stride::first(transfer.total),
            steps: VecDeque::new(),
            announced: 0,
            nvlink,
            _hold: transfer.hold.clone(),
        };
        let announced = self.announce(&mut writing, transfer.blocks);
        rest.take(transfer.blocks);
        writing.rest = rest;
        self.list.push_back(writing);
        announced.map(drop)
    }

    /// Announces what fits of a write; whether it announced any.
    fn announce(&mut self, writing: &mut Writing, blocks: &mut dyn Blocks) -> Result<bool> {
        let mut any = false;
        if writing.order.is_none() {
            writing.order = self.out.begin();
        }
        let Some(order) = writing.order else { return Ok(false) };
        while self.announce_unsent(writing, &mut any)? && !blocks.is_done() {
            if writing.bulk && (self.ahead.bytes >= AHEAD.bytes || self.ahead.blocks >= AHEAD.blocks) {
                break;
            }
            let wanted = writing.stride.blocks.min(MAX_BLOCKS);
            let room = self.out.room(wanted, writing.bulk)?;
            if room == 0 {
                break;
            }
            let mut pieces = std::mem::take(&mut self.pieces);
            pieces.clear();
            let pairing = blocks.fill(room, writing.stride.bytes, &mut pieces);
            writing.announced += pieces.iter().map(|piece| piece.len).sum::<u64>();
            self.note_step(writing, pieces.len());
            let Some(Target { slot, generation, stretches }) = pairing.and_then(|at| writing.targets.get(at)) else {
                bail!(Internal, "blocks of no pairing")
            };
            let last = blocks.is_done();
            let head = Head { order, slot: *slot, generation: *generation, export: 0, last, bulk: writing.bulk };
            let announced = match &stretches[..] {
                // There is room for them as they are.
                [] => self.out.announce(head, &pieces),
                [only] => self.out.announce(Head { export: only.id, ..head }, &pieces),
                _ => records(head, stretches, &mut pieces, &mut writing.unsent),
            };
            self.pieces = pieces;
            announced?;
            any = true;
            writing.stride = writing.stride.next();
        }
        Ok(any)
    }

    /// Counts what a step of a large write has under way.
    fn note_step(&mut self, writing: &mut Writing, blocks: usize) {
        if writing.bulk {
            let before = writing.steps.back().map_or(writing.moved, |&(end, _)| end);
            self.ahead.bytes += writing.announced - before;
            self.ahead.blocks += blocks;
            writing.steps.push_back((writing.announced, blocks));
        }
    }

    /// Announces the records of a write that wait for room; whether none is left.
    fn announce_unsent(&mut self, writing: &mut Writing, any: &mut bool) -> Result<bool> {
        while let Some(record) = writing.unsent.front_mut() {
            let room = self.out.room(record.blocks.len(), writing.bulk)?;
            if room == 0 {
                return Ok(false);
            }
            let rest = record.blocks.split_off(room.min(record.blocks.len()));
            self.out.announce(Head { last: record.head.last && rest.is_empty(), ..record.head }, &record.blocks)?;
            *any = true;
            record.blocks = rest;
            if record.blocks.is_empty() {
                writing.unsent.pop_front();
            }
        }
        Ok(true)
    }

    /// Announces more of the writes that wait, small ones first, large ones in turns; whether it announced any.
    ///
    /// # Errors
    /// When the connection must end.
    pub(super) fn advance(&mut self) -> Result<bool> {
        let mut any = false;
        for bulk in [false, true] {
            for _ in 0..self.list.len() {
                let Some(mut writing) = self.list.pop_front() else { break };
                if writing.bulk == bulk && (!writing.rest.is_done() || !writing.unsent.is_empty()) {
                    let mut rest = std::mem::take(&mut writing.rest);
                    let announced = self.announce(&mut writing, &mut rest);
                    writing.rest = rest;
                    self.list.push_back(writing);
                    any |= announced?;
                } else {
                    self.list.push_back(writing);
                }
            }
        }
        Ok(any)
    }

    /// Reports writes that have ended, and how far others are; whether some has ended.
    ///
    /// # Errors
    /// `Protocol` when the peer reports an impossible count.
    pub(super) fn report(&mut self, events: &mut Vec<Event>) -> Result<bool> {
        if self.list.is_empty() {
            return Ok(false);
        }
        let ended = self.out.ended()?;
        let seen = self.out.moved();
        if !ended && seen == self.seen {
            return Ok(false);
        }
        self.seen = seen;
        let before = self.list.len();
        for _ in 0..before {
            let Some(mut writing) = self.list.pop_front() else { break };
            let outcome = writing.order.and_then(|order| self.out.outcome(order));
            if outcome == Some(true) && !(writing.rest.is_done() && writing.unsent.is_empty()) {
                bail!(Protocol, "the peer reports the end of an order before it has read all of it");
            }
            let at = match (outcome, writing.order) {
                (Some(true), _) => writing.total,
                (None, Some(order)) => self.out.progress(order).min(writing.announced),
                _ => writing.moved,
            };
            self.advance_to(&mut writing, at, events);
            match (outcome, writing.order) {
                (Some(done), Some(order)) => self.end(writing, order, done, events),
                _ => self.list.push_back(writing),
            }
        }
        Ok(self.list.len() != before)
    }

    /// So many bytes of a write are in place.
    fn advance_to(&mut self, writing: &mut Writing, at: u64, events: &mut Vec<Event>) {
        let more = at.saturating_sub(writing.moved);
        if more == 0 {
            return;
        }
        (writing.moved, self.running) = (at, self.running + more);
        events.push(Event::Moved(writing.key, more));
        while let Some(&(_, blocks)) = writing.steps.front().filter(|(end, _)| *end <= at) {
            writing.steps.pop_front();
            self.ahead.blocks -= blocks;
        }
        if writing.bulk {
            self.ahead.bytes = self.ahead.bytes.saturating_sub(more);
        }
    }

    /// A write has ended.
    fn end(&mut self, writing: Writing, order: u64, done: bool, events: &mut Vec<Event>) {
        self.out.forget(order);
        self.ahead.blocks -= writing.steps.iter().map(|&(_, blocks)| blocks).sum::<usize>();
        if writing.bulk {
            self.ahead.bytes = self.ahead.bytes.saturating_sub(writing.announced - writing.moved);
        }
        self.running -= writing.moved;
        self.done += if done { writing.total } else { 0 };
        self.nvlink += if done && writing.nvlink { writing.total } else { 0 };
        events.push(Event::Ended(writing.key, done));
    }

    /// Writes that have not ended.
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Records of some write wait for room, or blocks for their turn.
    pub(super) fn wait(&self) -> bool {
        self.list.iter().any(|writing| !writing.rest.is_done() || !writing.unsent.is_empty())
    }

    /// When the newest write should be over, if it is small.
    pub(super) fn end_soon(&self) -> Option<Instant> {
        self.list.back().filter(|writing| !writing.bulk).map(|writing| writing.begun + SOON)
    }

    /// Bytes that have moved, and those of writes that have ended.
    pub(super) fn moved(&self) -> (u64, u64) {
        (self.done + self.running, self.done)
    }

    /// Bytes of writes over NVLink that have ended.
    pub(super) fn by_nvlink(&self) -> u64 {
        self.nvlink
    }
}

/// Turns the blocks of a step into records, one for each allocation that they lie in.
fn records(head: Head, stretches: &[Stretch], pieces: &mut Vec<Piece>, out: &mut VecDeque<Record>) -> Result<()> {
    // Addresses of this engine stay as they are; no piece crosses the end of an allocation.
    locate(pieces, 0, stretches, |_| {})?;
    let mut rest = &pieces[..];
    while let Some(first) = rest.first() {
        let export = export_of(stretches, first);
        let n = rest.iter().take_while(|piece| export_of(stretches, piece) == export).count();
        let (now, after) = rest.split_at(n);
        out.push_back(Record { head: Head { export, last: head.last && after.is_empty(), ..head }, blocks: now.to_vec() });
        rest = after;
    }
    Ok(())
}
