//! Writes of the peer, carried out by this engine, which owns the destinations: records are read from the peer's ring, checked against grants and
//! exports, and copied. Nothing from the peer is trusted. Knows nothing of how copies run.

use super::areas::{Kind, Slot};
use super::blocks::Stride;
use super::copies::{Copies, Owner};
use super::exports::{Imports, Stretch};
use super::grants::{Grants, Target};
use super::layout::WINDOW;
use super::locate::holds;
use super::ring::{place, Head, RingIn, MAX_BLOCKS, MAX_BYTES};
use super::staged::{Copying, Staged};
use crate::direct::Event;
use crate::hash::Map;
use crate::status::{bail, Result};
use crate::types::{Key, Piece, Place};

/// Blocks and copies of large orders under way at once, and of all. A peer announces no more of large ones than half of that, so that small ones
/// always find room.
const UNDER_WAY: usize = 64 << 10;
const COPIES: usize = 256;
/// Records that are read in one round.
const RECORDS: usize = 4096;

/// An order of the peer that has not ended.
struct Order {
    number: u64,
    copies: usize,
    /// Its last record has come.
    last: bool,
    refused: bool,
    /// It reads what lies here, and is answered.
    reads: bool,
    /// Bytes that are in place, and that were announced.
    moved: u64,
    announced: u64,
    /// What it writes, by grant.
    targets: Vec<(u32, u64, Target)>,
}

/// What goes into one copy.
#[derive(Default)]
struct Gathered {
    place: Option<Place>,
    exports: Vec<u32>,
    parts: Vec<(u64, u64)>,
    bytes: u64,
    bulk: bool,
    /// The slot that all of it comes from.
    slot: Option<Slot>,
}

/// What orders need of the rest of the transport.
pub(super) struct Around<'a> {
    pub copies: &'a mut Copies,
    pub imports: &'a mut Imports,
    pub grants: &'a mut Grants,
    pub staged: &'a mut Staged,
}

/// All orders of the peer.
pub(super) struct Orders {
    pub inn: RingIn,
    /// By place in the window.
    open: Map<usize, Order>,
    /// The newest number of each place in the window: staged orders come in another sequence than they were numbered.
    seen: Box<[u64; WINDOW]>,
    /// Orders of which more is to come.
    unfinished: usize,
    pieces: usize,
    copies: usize,
    /// Orders ended, or there is room for more of one: the peer may sleep.
    rings: bool,
}

impl Orders {
    pub(super) fn new(inn: RingIn) -> Orders {
        Orders { inn, open: Map::default(), seen: Box::new([0; WINDOW]), unfinished: 0, pieces: 0, copies: 0, rings: false }
    }

    /// Whether the peer is to be woken, asked once.
    pub(super) fn rings(&mut self) -> bool {
        std::mem::take(&mut self.rings) && self.inn.wakes()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Whether one of them uses a region.
    pub(super) fn uses_region(&self, id: u64) -> bool {
        let uses = |order: &Order| order.targets.iter().any(|(.., target)| target.used.span.id == id);
        self.open.values().any(uses)
    }

    /// Whether a landing is being written.
    pub(super) fn has_landing(&self, key: Key) -> bool {
        let lands = |order: &Order| order.targets.iter().any(|(.., target)| target.landing == Some(key));
        self.open.values().any(lands)
    }

    fn order(&mut self, number: u64) -> Option<&mut Order> {
        self.open.get_mut(&place(number)).filter(|order| order.number == number)
    }

    /// Starts copies for what the peer has announced; whether there was anything.
    ///
    /// # Errors
    /// `Protocol` for what cannot be, or why the connection must end.
    pub(super) fn advance(&mut self, around: &mut Around<'_>, events: &mut Vec<Event>) -> Result<bool> {
        let (mut any, mut records) = (false, 0);
        // What waits is not all prepared before the first of it is copied.
        let mut stride = if self.copies == 0 { Stride::FIRST } else { Stride::MOST };
        while self.pieces < UNDER_WAY && self.copies < COPIES && records < RECORDS {
            let (mut copy, mut read) = (Gathered::default(), false);
            around.copies.pieces.clear();
            while around.copies.pieces.len() < stride.blocks.min(MAX_BLOCKS) && copy.bytes < stride.bytes && records < RECORDS {
                let Some((head, count)) = self.inn.next()? else { break };
                match Kind::of(head.export) {
                    // It is a copy of its own, or none.
                    Some(_) if copy.place.is_some() => break,
                    Some((Kind::Fetch, there)) => self.fetch(head, count, there, around)?,
                    Some((Kind::Answer, _)) => {
                        let Around { copies, imports, staged, .. } = around;
                        staged.answer((head, count), &mut self.inn, Copying { copies, imports })?;
                        around.copies.pieces.clear();
                        (read, records) = (true, records + 1);
                        continue;
                    }
                    _ if !self.add(head, count, around, &mut copy)? => break,
                    _ => {}
                }
                (read, records) = (true, records + 1);
                self.settle(head.order, around.grants, events)?;
            }
            self.start(copy, around)?;
            if !read {
                break;
            }
            any = true;
            stride = stride.next();
        }
        // The rest of an order that found no room comes once there is some, and its sender may sleep.
        self.rings |= any && self.unfinished > 0 && !self.inn.waiting();
        Ok(any)
    }

    fn start(&mut self, copy: Gathered, around: &mut Around<'_>) -> Result<()> {
        let Gathered { place: Some(to), exports, parts, bytes, slot, .. } = copy else { return Ok(()) };
        for &(number, _) in &parts {
            if let Some(order) = self.order(number) {
                order.copies += 1;
            }
        }
        self.pieces += around.copies.pieces.len();
        self.copies += 1;
        let owner = match slot {
            Some(slot) => Owner::Staged(slot, parts),
            None => Owner::Orders(parts),
        };
        // SAFETY: `add` has checked that sources lie in the peer's process, its open exports or a slot of this engine's area, and destinations in
        // targets that the orders hold until the copy has ended.
        unsafe { around.copies.start(to, exports, bytes, owner, around.imports) }
    }

    /// Adds the record at hand to a copy: `false` when it belongs to another one. Small orders never wait for large ones.
    fn add(&mut self, head: Head, count: usize, around: &mut Around<'_>, copy: &mut Gathered) -> Result<bool> {
        let to = around.grants.place(head.slot, head.generation);
        let other = copy.slot.is_some()
            || copy.place.is_some() && (to.is_some_and(|to| copy.place != Some(to)) || copy.bulk != head.bulk);
        if other || (head.bulk && copy.parts.last().is_some_and(|&(number, _)| number != head.order)) {
            return Ok(false);
        }
        let slot = match Kind::of(head.export) {
            Some((_, here)) => Some(around.staged.enter(here)?),
            None => None,
        };
        if !self.begin(&head, false, around.grants)? {
            self.inn.skip();
            return slot.map_or(Ok(()), |(slot, _)| around.staged.leave(slot, &self.inn)).map(|()| true);
        }
        let Orders { open, inn, .. } = self;
        let Some(order) = open.get_mut(&place(head.order)) else { bail!(Internal, "a record of no order") };
        let used = order.targets.iter().find(|(slot, generation, _)| (*slot, *generation) == (head.slot, head.generation));
        let Some((.., target)) = used else { bail!(Internal, "a grant that was not entered") };
        let here = target.used.place;
        let stretch = source(slot, &head, (here, target.there), around)?;
        let (mut sum, mut from, mut into) = (0u64, true, true);
        let pieces = &mut around.copies.pieces;
        pieces.reserve(count);
        inn.take(|Piece { src, dst, len }| {
            let at = src.wrapping_sub(stretch.base);
            from &= holds(stretch.len, at, len);
            into &= holds(target.len, dst.wrapping_sub(target.addr), len);
            sum = sum.saturating_add(len);
            pieces.push(Piece { src: stretch.addr.wrapping_add(at), dst, len });
        });
        if !(from && into) || sum > MAX_BYTES {
            // None of them is copied.
            pieces.clear();
            match (from, into) {
                (false, _) => bail!(Protocol, "a record of {count} blocks, some of them outside of its export"),
                (_, false) => bail!(Protocol, "a record of {count} blocks, some of them outside of what is granted"),
                _ => bail!(Protocol, "a record of {count} blocks with {sum} bytes, at most {MAX_BYTES}"),
            }
        }
        if target.landing.is_some() && order.announced.saturating_add(sum) > target.len {
            pieces.clear();
            bail!(Protocol, "a message of more than {} bytes", target.len);
        }
        order.announced += sum;
        (copy.place, copy.bulk, copy.bytes) = (Some(here), head.bulk, copy.bytes + sum);
        copy.slot = slot.map(|(slot, _)| slot);
        if here.is_device() && slot.is_none() && !copy.exports.contains(&head.export) {
            copy.exports.push(head.export);
        }
        match copy.parts.last_mut().filter(|(number, _)| *number == head.order) {
            Some((_, bytes)) => *bytes += sum,
            None => copy.parts.push((head.order, sum)),
        }
        Ok(true)
    }

    /// The order of a record, with a use of what it writes. `false` where the record is to be skipped, since the order is refused.
    fn begin(&mut self, head: &Head, reads: bool, grants: &Grants) -> Result<bool> {
        let number = head.order;
        let seen = &mut self.seen[place(number)];
        if number > *seen {
            if self.open.contains_key(&place(number)) {
                bail!(Protocol, "order {number} after {seen}, which has not ended");
            }
            (*seen, self.unfinished) = (number, self.unfinished + 1);
            self.inn.begin(number);
            let order =
                Order { number, copies: 0, last: false, refused: false, reads, moved: 0, announced: 0, targets: Vec::new() };
            self.open.insert(place(number), order);
        }
        // What is left of an order that was refused has nowhere to go.
        let Some(order) = self.open.get_mut(&place(number)).filter(|order| order.number == number) else { return Ok(false) };
        if order.last || order.reads != reads {
            bail!(Protocol, "a record of order {number} after its last one, or of another kind");
        }
        if order.refused {
            return Ok(false);
        }
        order.last = head.last;
        self.unfinished -= usize::from(head.last);
        let known = |(slot, generation, _): &(u32, u64, Target)| (*slot, *generation) == (head.slot, head.generation);
        if !order.targets.iter().any(known) {
            let found = if reads { grants.source(head.slot, head.generation) } else { grants.target(head.slot, head.generation) };
            match found {
                Some(target) => order.targets.push((head.slot, head.generation, target)),
                None => {
                    self.unfinished -= usize::from(!order.last);
                    order.refused = true;
                }
            }
        }
        if order.targets.len() > 1 && order.targets.iter().any(|(.., target)| target.landing.is_some()) {
            bail!(Protocol, "a message for several buffers");
        }
        Ok(!order.refused)
    }

    /// The peer asks for the blocks of the record at hand, which go to the area of its GPU `there`.
    fn fetch(&mut self, head: Head, count: usize, there: Place, around: &mut Around<'_>) -> Result<()> {
        if !self.begin(&head, true, around.grants)? {
            self.inn.skip();
            return Ok(());
        }
        let Orders { open, inn, .. } = self;
        let Some(order) = open.get_mut(&place(head.order)) else { bail!(Internal, "a record of no order") };
        let used = order.targets.iter().find(|(slot, generation, _)| (*slot, *generation) == (head.slot, head.generation));
        let Some((.., target)) = used else { bail!(Internal, "a grant that was not entered") };
        let (mut sum, mut inside) = (order.announced, target.there == there);
        let mut pieces = Vec::with_capacity(count);
        inn.take(|piece| {
            inside &= holds(target.len, piece.src.wrapping_sub(target.addr), piece.len);
            sum = sum.saturating_add(piece.len);
            pieces.push(piece);
        });
        if !inside || sum == u64::MAX {
            bail!(Protocol, "a read of {count} blocks, some of them outside of what is granted");
        }
        order.announced = sum;
        around.staged.ask(&head, (target.used.place, there), &pieces)
    }

    /// So many more bytes that the peer has asked for were announced.
    ///
    /// # Errors
    /// `Internal` for what cannot be.
    pub(super) fn answered(&mut self, number: u64, bytes: u64, grants: &mut Grants, events: &mut Vec<Event>) -> Result<()> {
        self.moved_of(number, bytes, events);
        self.settle(number, grants, events)
    }

    /// So many more bytes of a copy are in place.
    pub(super) fn moved(&mut self, parts: &[(u64, u64)], bytes: u64, events: &mut Vec<Event>) {
        // Of several orders only the end of their common copy is reported.
        if let &[(number, _)] = parts {
            self.moved_of(number, bytes, events);
        }
    }

    fn moved_of(&mut self, number: u64, bytes: u64, events: &mut Vec<Event>) {
        let Some(order) = self.open.get_mut(&place(number)).filter(|order| order.number == number) else { return };
        order.moved += bytes;
        self.inn.moved(number, bytes, order.moved);
        if let Some((.., Target { landing: Some(key), .. })) = order.targets.first() {
            events.push(Event::Moved(*key, bytes));
        }
    }

    /// A copy has ended: the bytes of it that were not reported are in place. Perhaps its orders have ended too.
    ///
    /// # Errors
    /// `Protocol` for a message that is too short.
    pub(super) fn copied(
        &mut self,
        parts: &[(u64, u64)],
        rest: u64,
        pieces: usize,
        grants: &mut Grants,
        events: &mut Vec<Event>,
    ) -> Result<()> {
        (self.pieces, self.copies) = (self.pieces - pieces, self.copies - 1);
        for &(number, bytes) in parts {
            self.moved_of(number, if parts.len() == 1 { rest } else { bytes }, events);
            if let Some(order) = self.order(number) {
                order.copies -= 1;
                let more = !order.last && !order.refused;
                self.rings |= more;
            }
            self.settle(number, grants, events)?;
        }
        Ok(())
    }

    /// Ends an order of which nothing is under way or to come.
    fn settle(&mut self, number: u64, grants: &mut Grants, events: &mut Vec<Event>) -> Result<()> {
        let over = |order: &&mut Order| order.copies == 0 && order.moved == order.announced && (order.last || order.refused);
        let Some(order) = self.order(number).filter(over) else { return Ok(()) };
        let (done, targets, moved) = (!order.refused, std::mem::take(&mut order.targets), order.moved);
        if let Some((.., Target { landing: Some(key), len, .. })) = targets.first() {
            if moved != *len {
                bail!(Protocol, "a message of {moved} bytes for a buffer of {len}");
            }
            grants.end_landing(*key);
            events.push(Event::Ended(*key, true));
        }
        // The region is free before the peer knows.
        drop(targets);
        self.open.remove(&place(number));
        self.inn.end(number, done);
        self.rings = true;
        Ok(())
    }

    /// Ends all of them. `quiet`: no copy runs; else what they use stays for ever.
    pub(super) fn end(&mut self, quiet: bool) {
        let open = std::mem::take(&mut self.open);
        if !quiet {
            std::mem::forget(open);
        }
    }
}

/// Where the source of a record for memory of a pair of places lies: in the slot of a staged one, or at the peer.
fn source(slot: Option<(Slot, Stretch)>, head: &Head, (here, there): (Place, Place), around: &Around<'_>) -> Result<Stretch> {
    match (slot, around.staged.joins(here, there)) {
        (Some((Slot { place, .. }, stretch)), true) if place == here => return Ok(stretch),
        (Some(_), _) => bail!(Protocol, "a staged record for memory of {here:?}, which was not agreed"),
        // Its addresses would be taken for some of this process.
        (None, true) => bail!(Protocol, "a record for memory of {here:?} that is not staged"),
        (None, false) => {}
    }
    match (here.is_device(), head.export) {
        // Addresses of host memory are valid as they are.
        (false, 0) => Ok(Stretch { id: 0, base: 0, len: u64::MAX, addr: 0 }),
        (true, id) if there.is_device() => match around.imports.look(id, here) {
            Some(stretch) => Ok(stretch),
            None => bail!(Protocol, "a record of export {id}, which is not open for memory of {here:?}"),
        },
        (_, id) => bail!(Protocol, "a record of export {id} for memory of {here:?}"),
    }
}
