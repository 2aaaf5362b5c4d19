//! Transfers under a grant, for which nobody is asked on the control connection: reads are pulled by whoever wants them, writes are
//! ordered in shared memory and pulled by the owner of the destination. Only the owner of memory writes it, as with chunks. Knows nothing
//! of frames and of transfers but their keys.

mod copying;

use super::super::grants::{Grants, Leases};
use super::super::notes::MAX_EXPORTS;
use super::super::orders::{Head, OrdersIn, OrdersOut, Record, MAX_BLOCKS, MAX_BYTES, WINDOW};
use super::super::puller::{Piece, Pull};
use super::super::ring::{Inbox, Outbox};
use super::super::sharing::{Imports, Stretch};
use crate::channel::path::{Direct, Event, Pairing, Way};
use crate::region::{Hold, RegionUse};
use crate::status::{bail, Result};
use crate::types::{Key, Place, Span};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Blocks and bytes of a transfer's first pull, or of an order's first record, and those of later ones at most. Copies begin early, while
/// the rest is prepared; and none is so long that much is left to be copied when all is prepared.
const FIRST: Stride = Stride { blocks: 512, bytes: 4 << 20 };
const MOST: Stride = Stride { blocks: 8192, bytes: 16 << 20 };
/// Bytes that are copied in hardly more time than one, and the time in which that should be over.
const SMALL: u64 = 64 << 10;
const SOON: Duration = Duration::from_micros(15);
/// Bytes up to which a transfer of some thousand blocks at most has one pull.
const ONE_START: u64 = 1 << 20;
/// Blocks that are looked at before the next ones are fetched: they stay in the nearest cache meanwhile.
const AT_ONCE: usize = 512;
/// Blocks and pulls of the peer's orders that are under way at once.
const UNDER_WAY: usize = 64 << 10;
const PULLS: usize = 32;
/// Records of the peer that are read in one round.
const RECORDS: usize = 4096;

/// How much is handed over at once.
#[derive(Clone, Copy)]
struct Stride {
    blocks: usize,
    bytes: u64,
}

impl Stride {
    /// The first one of a transfer of so many bytes: what is copied in the time of a start has one start.
    fn first(total: u64) -> Stride {
        match total {
            ..=ONE_START => Stride { blocks: 4 * FIRST.blocks, ..FIRST },
            _ => FIRST,
        }
    }

    /// The next one: what is longer is copied by fewer launches.
    fn next(self) -> Stride {
        Stride { blocks: (2 * self.blocks).min(MOST.blocks), bytes: (2 * self.bytes).min(MOST.bytes) }
    }
}

/// An order of this side that has not ended.
struct Told {
    order: u64,
    key: Key,
    len: u64,
    begun: Instant,
    over: bool,
    /// Bytes of it that were reported.
    moved: u64,
    /// The source, until the peer has it.
    _hold: Hold,
}

/// A read of this side.
struct Reading {
    key: Key,
    /// Grants that it uses.
    slots: Vec<u32>,
    /// Pulls under way, and whether there will be no more.
    pulls: usize,
    all: bool,
    _hold: Hold,
}

/// An order of the peer.
struct Order {
    number: u64,
    pulls: usize,
    last: bool,
    refused: bool,
    over: bool,
    /// Destinations, by their grants.
    uses: Vec<(u32, u64, RegionUse)>,
}

/// Who wanted a pull.
enum Whose {
    Read(Key),
    Orders(Vec<u64>),
}

/// Pieces that are being copied.
struct Batch {
    pull: Pull,
    place: Place,
    exports: Vec<u32>,
    pieces: usize,
    bytes: u64,
    /// Bytes of it that were reported.
    moved: u64,
    begun: Instant,
    whose: Whose,
}

/// What goes into a pull for the peer's orders: where to, from which exports, and of which orders.
#[derive(Default)]
struct Gathered {
    place: Option<Place>,
    exports: Vec<u32>,
    parts: Vec<u64>,
    bytes: u64,
}

/// State of all that.
pub(super) struct Unasked {
    /// Both ends are in this process: there the source's holds go with chunks.
    off: bool,
    pub(super) out: OrdersOut,
    inn: OrdersIn,
    pub(super) grants: Grants,
    pub(super) leases: Leases,
    told: VecDeque<Told>,
    unsent: VecDeque<Record>,
    reads: Vec<Reading>,
    orders: VecDeque<Order>,
    batches: Vec<Batch>,
    /// Pieces of the peer's orders that are being copied, and pulls of them.
    pieces_under_way: usize,
    order_pulls: usize,
    pieces: Vec<Piece>,
    ordered_bytes: u64,
    done_bytes: u64,
    /// Bytes of this side's orders that were reported.
    reported: u64,
}

/// How a pairing's blocks are found here: by the allocations that its source lies in, rising; none where addresses are valid as they are.
struct Source {
    slot: u32,
    generation: u64,
    stretches: Vec<Stretch>,
}

impl Unasked {
    pub(super) fn new(outbox: &Outbox, inbox: &Inbox, off: bool) -> Unasked {
        Unasked {
            off,
            out: OrdersOut::new(outbox.shared()),
            inn: OrdersIn::new(inbox.shared()),
            grants: Grants::new(outbox.shared()),
            leases: Leases::new(inbox.shared()),
            told: VecDeque::new(),
            unsent: VecDeque::new(),
            reads: Vec::new(),
            orders: VecDeque::new(),
            batches: Vec::new(),
            pieces_under_way: 0,
            order_pulls: 0,
            pieces: Vec::new(),
            ordered_bytes: 0,
            done_bytes: 0,
            reported: 0,
        }
    }

    /// Something of it is under way.
    pub(super) fn busy(&self) -> bool {
        !(self.told.is_empty() && self.reads.is_empty() && self.orders.is_empty())
    }

    /// What is under way ends in memory, or something waits there to be copied.
    pub(super) fn wants_polling(&self) -> bool {
        !self.told.is_empty() || !self.batches.is_empty() || self.inn.waiting()
    }

    /// Something small has begun so recently that it should end at once.
    pub(super) fn worth_spinning(&self, now: Instant) -> bool {
        let soon = |begun: Instant, bytes: u64| bytes <= SMALL && now.saturating_duration_since(begun) < SOON;
        let order = self.told.back().is_some_and(|told| !told.over && soon(told.begun, told.len));
        order || self.batches.last().is_some_and(|batch| soon(batch.begun, batch.bytes))
    }

    /// There is something to do although nothing is under way.
    pub(super) fn attention(&self) -> bool {
        self.inn.waiting() || !self.grants.notes.is_empty()
    }

    /// Orders of this side that are under way.
    pub(super) fn told(&self) -> usize {
        self.told.len()
    }

    /// Bytes of this side's orders that the peer has copied, and those of orders that have ended.
    pub(super) fn moved(&self) -> u64 {
        self.out.moved().min(self.ordered_bytes).max(self.done_bytes)
    }

    /// Bytes that left: by orders that have ended, and by reads of the peer, as it says.
    pub(super) fn sent(&self) -> u64 {
        self.done_bytes.saturating_add(self.out.read())
    }

    /// Whether something of it uses a region of this side. The destination of a read and the source of an order are known to whoever
    /// started them.
    pub(super) fn uses_region(&self, id: u64) -> bool {
        self.grants.is_read(id) || self.orders.iter().any(|order| order.uses.iter().any(|(.., region)| region.span.id == id))
    }

    /// No pull runs any more, or `false`: then what they use stays for ever.
    pub(super) fn end(&mut self, quiet: bool) {
        let (reads, orders) = (std::mem::take(&mut self.reads), std::mem::take(&mut self.orders));
        match quiet {
            true => reads.iter().flat_map(|read| &read.slots).for_each(|&slot| self.leases.leave(slot)),
            false => std::mem::forget((reads, orders)),
        }
    }

    /// All that the peer has told is taken, and the last order has more to come.
    fn wants_more(&self) -> bool {
        !self.inn.waiting() && self.orders.back().is_some_and(|order| !order.last)
    }

    fn order(&mut self, number: u64) -> Option<&mut Order> {
        let front = self.orders.front()?.number;
        self.orders.get_mut(usize::try_from(number.checked_sub(front)?).ok()?)
    }

    /// Ends an order of the peer of which nothing is under way or to come; whether it did.
    fn settle(&mut self, number: u64) -> bool {
        let Some(order) = self.order(number).filter(|order| order.last && order.pulls == 0 && !order.over) else { return false };
        // The region is free before the peer knows.
        order.uses.clear();
        order.over = true;
        let done = !order.refused;
        self.inn.end(number, done);
        while self.orders.front().is_some_and(|order| order.over) {
            self.orders.pop_front();
        }
        true
    }

    /// The order that a record belongs to.
    fn begin(&mut self, head: &Head) -> Result<()> {
        let next = match self.orders.back() {
            Some(order) if !order.last => order.number,
            Some(order) => order.number + 1,
            None => self.inn.ended() + 1,
        };
        if head.order != next {
            bail!(Protocol, "order {} where {next} comes", head.order);
        }
        if self.orders.back().is_none_or(|order| order.last) {
            if self.orders.len() >= WINDOW {
                bail!(Protocol, "more than {WINDOW} orders");
            }
            self.orders.push_back(Order { number: next, pulls: 0, last: false, refused: false, over: false, uses: Vec::new() });
        }
        if let (Some(order), true) = (self.orders.back_mut(), head.last) {
            order.last = true;
        }
        Ok(())
    }

    /// Where a record's blocks go, and where the peer's memory lies: the region of its grant, in use from the order's first block there
    /// until its end. `None` where the grant does not stand, or does not allow it.
    fn enter(&mut self, head: &Head) -> Option<Place> {
        let (region, there) = self.grants.region(head.slot, head.generation)?;
        let order = self.orders.back_mut()?;
        if !order.uses.iter().any(|&(slot, generation, _)| (slot, generation) == (head.slot, head.generation)) {
            if !region.access().write {
                return None;
            }
            order.uses.push((head.slot, head.generation, region.enter()?));
        }
        Some(there)
    }
}

/// Whether `len` bytes at `at` lie inside of `room`. Without branches: it is asked for every block.
#[inline]
fn holds(room: u64, at: u64, len: u64) -> bool {
    (len != 0) & (at < room) & (len <= room.wrapping_sub(at))
}

/// Turns `src` of the pieces from `begin` on into where it is visible here, each inside one allocation, and tells the exports.
///
/// # Errors
/// `Internal` for a piece outside of all allocations.
fn locate(pieces: &mut Vec<Piece>, begin: usize, stretches: &[Stretch], mut each: impl FnMut(u32)) -> Result<()> {
    if let [only] = stretches {
        each(only.id);
        let mut inside = true;
        for piece in &mut pieces[begin..] {
            let at = piece.src.wrapping_sub(only.base);
            inside &= holds(only.len, at, piece.len);
            piece.src = only.addr.wrapping_add(at);
        }
        if !inside {
            bail!(Internal, "a block outside of its allocation");
        }
        return Ok(());
    }
    let mut last: Option<Stretch> = None;
    for mut piece in pieces.split_off(begin) {
        while piece.len > 0 {
            let stretch = match last.filter(|stretch| stretch.locate(piece.src, 1).is_some()) {
                Some(stretch) => stretch,
                None => {
                    let after = stretches.partition_point(|stretch| stretch.base <= piece.src);
                    let found = after.checked_sub(1).map(|at| stretches[at]).filter(|s| s.locate(piece.src, 1).is_some());
                    let Some(found) = found else { bail!(Internal, "a block outside of its allocations") };
                    each(found.id);
                    last = Some(found);
                    found
                }
            };
            let at = piece.src - stretch.base;
            let len = piece.len.min(stretch.len - at);
            pieces.push(Piece { src: stretch.addr + at, dst: piece.dst, len });
            piece = Piece { src: piece.src + len, dst: piece.dst + len, len: piece.len - len };
        }
    }
    Ok(())
}

/// Whether allocations, rising, hold all of a range without a gap.
fn cover(stretches: &[Stretch], (begin, end): (u64, u64)) -> bool {
    let mut at = begin;
    if !stretches.windows(2).all(|pair| pair[0].base < pair[1].base) {
        return false;
    }
    for stretch in stretches {
        if stretch.base <= at && at - stretch.base < stretch.len {
            at = stretch.base + stretch.len;
        }
    }
    at >= end
}

impl Unasked {
    /// Tells the pieces at hand, a record for each allocation that they lie in.
    fn tell(&mut self, head: Head, stretches: &[Stretch]) -> Result<()> {
        let mut pieces = std::mem::take(&mut self.pieces);
        let told = match stretches {
            [] => self.put(head, &pieces),
            [only] => self.put(Head { export: only.id, ..head }, &pieces),
            _ => {
                // Addresses of this side stay as they are.
                let cut = locate(&mut pieces, 0, stretches, |_| {});
                cut.and_then(|()| self.put_by_export(head, stretches, &pieces))
            }
        };
        pieces.clear();
        self.pieces = pieces;
        told
    }

    /// Tells blocks of several allocations, none of which crosses the end of one.
    fn put_by_export(&mut self, head: Head, stretches: &[Stretch], mut blocks: &[Piece]) -> Result<()> {
        let export = |block: &Piece| {
            let after = stretches.partition_point(|stretch| stretch.base <= block.src);
            after.checked_sub(1).map_or(0, |at| stretches[at].id)
        };
        while let Some(first) = blocks.first() {
            let id = export(first);
            let n = blocks.iter().take_while(|block| export(block) == id).count();
            let (now, rest) = blocks.split_at(n);
            self.put(Head { export: id, last: head.last && rest.is_empty(), ..head }, now)?;
            blocks = rest;
        }
        Ok(())
    }

    /// Tells blocks as far as there is room, and keeps the rest.
    fn put(&mut self, head: Head, mut blocks: &[Piece]) -> Result<()> {
        while self.unsent.is_empty() && !blocks.is_empty() {
            let room = self.out.room(blocks.len())?;
            if room == 0 {
                break;
            }
            let (now, rest) = blocks.split_at(room);
            self.out.tell(Head { last: head.last && rest.is_empty(), ..head }, now)?;
            blocks = rest;
        }
        if !blocks.is_empty() {
            self.unsent.push_back(Record { head, blocks: blocks.to_vec() });
        }
        Ok(())
    }

    /// Tells what waits for room; whether something was told.
    fn tell_more(&mut self) -> Result<bool> {
        let mut any = false;
        while let Some(record) = self.unsent.front_mut() {
            let room = self.out.room(record.blocks.len())?;
            if room == 0 {
                break;
            }
            let rest = record.blocks.split_off(room);
            self.out.tell(Head { last: record.head.last && rest.is_empty(), ..record.head }, &record.blocks)?;
            record.blocks = rest;
            if record.blocks.is_empty() {
                self.unsent.pop_front();
            }
            any = true;
        }
        Ok(any)
    }

    /// Reports orders of this side that have ended, and how far others are.
    fn report(&mut self, events: &mut Vec<Event>) -> Result<bool> {
        if self.told.is_empty() {
            return Ok(false);
        }
        let ended = self.out.ended()? && self.report_ended(events);
        self.report_moved(events);
        Ok(ended)
    }

    /// What the peer says that it has copied. It takes orders in their sequence, several at once.
    fn report_moved(&mut self, events: &mut Vec<Event>) {
        let mut fresh = self.moved().saturating_sub(self.reported);
        for told in self.told.iter_mut().filter(|told| !told.over) {
            let more = fresh.min(told.len - told.moved);
            if more > 0 {
                (told.moved, self.reported, fresh) = (told.moved + more, self.reported + more, fresh - more);
                events.push(Event::Moved(told.key, more));
            }
            if fresh == 0 {
                return;
            }
        }
    }

    /// Reports those that have ended.
    fn report_ended(&mut self, events: &mut Vec<Event>) -> bool {
        for told in self.told.iter_mut().filter(|told| !told.over) {
            let Some(done) = self.out.outcome(told.order) else { continue };
            told.over = true;
            let rest = told.len - told.moved;
            if done {
                (self.done_bytes, self.reported) = (self.done_bytes + told.len, self.reported + rest);
            }
            if done && rest > 0 {
                events.push(Event::Moved(told.key, rest));
            }
            events.push(Event::Ended(told.key, done));
        }
        while self.told.front().is_some_and(|told| told.over) {
            self.told.pop_front();
        }
        true
    }

    /// Adds the record at hand to the pull that is being gathered: `false` when it belongs to the next one.
    fn add(&mut self, (head, count): (Head, usize), imports: &mut Imports, pull: &mut Gathered) -> Result<bool> {
        let wanted = self.grants.region(head.slot, head.generation).map(|(region, _)| region.place);
        if wanted.is_some() && pull.place.is_some() && pull.place != wanted {
            return Ok(false);
        }
        self.begin(&head)?;
        let refused = self.orders.back().is_none_or(|order| order.refused);
        let Some(there) = (if refused { None } else { self.enter(&head) }) else {
            self.refuse();
            self.inn.skip();
            return Ok(true);
        };
        let here = wanted.unwrap_or(Place::HOST);
        // Addresses of host memory are valid as they are.
        let everything = Stretch { id: 0, base: 0, len: u64::MAX, addr: 0 };
        let stretch = match (here.is_device(), head.export) {
            (true, id) => imports.look(id, here).filter(|_| there.is_device()),
            (false, 0) => Some(everything),
            (false, id) => bail!(Protocol, "an order of export {id} for memory of {here:?}"),
        };
        let Some(stretch) = stretch else {
            bail!(Protocol, "an order of export {}, which is not open for memory of {here:?}", head.export)
        };
        let Unasked { orders, inn, pieces, .. } = self;
        let Some(order) = orders.back() else { bail!(Internal, "a record of no order") };
        let used = order.uses.iter().find(|(slot, generation, _)| (*slot, *generation) == (head.slot, head.generation));
        let Some((.., region)) = used else { bail!(Internal, "a grant that was not entered") };
        let Span { addr, len: room, .. } = region.span;
        let (mut sum, mut source, mut destination) = (0u64, true, true);
        pieces.reserve(count);
        inn.take(|Piece { src, dst, len }| {
            let at = src.wrapping_sub(stretch.base);
            source &= holds(stretch.len, at, len);
            destination &= holds(room, dst.wrapping_sub(addr), len);
            sum = sum.wrapping_add(len);
            pieces.push(Piece { src: stretch.addr.wrapping_add(at), dst, len });
        });
        if !(source && destination) {
            // None of them is copied.
            pieces.clear();
            let what = if source { "the region that is granted" } else { "its export" };
            bail!(Protocol, "an order of {count} blocks, some of them outside of {what}");
        }
        if sum > MAX_BYTES {
            pieces.clear();
            bail!(Protocol, "an order of {count} blocks with {sum} bytes, at most {MAX_BYTES}");
        }
        pull.place = Some(here);
        pull.bytes += sum;
        if here.is_device() && !pull.exports.contains(&head.export) {
            pull.exports.push(head.export);
        }
        if pull.parts.last() != Some(&head.order) {
            pull.parts.push(head.order);
        }
        Ok(true)
    }

    /// Refuses the newest order of the peer; its records are still to come as they do.
    fn refuse(&mut self) {
        if let Some(order) = self.orders.back_mut() {
            order.refused = true;
        }
    }
}

impl Unasked {
    /// A pull of a read has ended, and perhaps the read.
    fn end_read(&mut self, key: Key, events: &mut Vec<Event>) {
        let Some(at) = self.reads.iter().position(|read| read.key == key) else { return };
        let read = &mut self.reads[at];
        read.pulls -= 1;
        if read.pulls == 0 && read.all {
            let Reading { slots, .. } = self.reads.swap_remove(at);
            slots.into_iter().for_each(|slot| self.leases.leave(slot));
            events.push(Event::Ended(key, true));
        }
    }
}

#[cfg(test)]
mod tests;
