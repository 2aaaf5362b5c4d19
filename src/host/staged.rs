//! Transfers between places where one engine cannot well read the other's memory, GPUs over PCIe or host memory of separate containers: the
//! engine at the source gathers blocks into an area of the destination's library, and the engine at the destination scatters them from there.
//! So the peer maps no memory of the application, and only the owner of memory writes it. `gather` announces a write as it fills slots; `fetch` asks for a read, and the peer's `gather` answers.

use super::areas::{Areas, Kind, Slot, Targets};
use super::copies::{Copies, Owner};
use super::exports::Stretch;
use super::fetch::Fetches;
use super::gather::{Around, Gathers, Source};
use super::memory::Export;
use super::messages::{Granted, Message};
use super::ring::{Head, RingIn, RingOut};
use crate::direct::{Event, Pairing, Route, Start, Way};
use crate::status::{bail, Result};
use crate::types::{Key, Piece, Place, RemoteAccess};
use std::collections::VecDeque;

/// Staged transfers of a connection.
pub(super) struct Staged {
    /// Pairs of places, here and there, whose bytes are staged.
    pairs: Vec<(Place, Place)>,
    areas: Areas,
    targets: Targets,
    gathers: Gathers,
    fetches: Fetches,
    /// Slots are free again: the peer may sleep.
    rings: bool,
}

/// What staged transfers do just now.
pub(super) struct Doing {
    pub writes: usize,
    pub reads: usize,
    /// Any of either engine.
    pub busy: bool,
    /// Bytes that have left this engine, and those of writes that have ended.
    pub moved: (u64, u64),
}

impl Staged {
    pub(super) fn new(pairs: Vec<(Place, Place)>) -> Staged {
        let (areas, targets) = (Areas::default(), Targets::default());
        Staged { pairs, areas, targets, gathers: Gathers::default(), fetches: Fetches::default(), rings: false }
    }

    /// Whether bytes between two places are staged.
    pub(super) fn joins(&self, here: Place, there: Place) -> bool {
        self.pairs.contains(&(here, there))
    }

    /// The peer's places to which bytes from `here` are staged.
    pub(super) fn peers_of(&self, here: Place) -> impl Iterator<Item = Place> + '_ {
        self.pairs.iter().filter(move |pair| pair.0 == here).map(|pair| pair.1)
    }

    /// Messages for the peer, which come before any claim or grant.
    pub(super) fn outbox(&mut self) -> &mut VecDeque<Message> {
        &mut self.areas.outbox
    }

    /// Messages wait.
    pub(super) fn speaks(&self) -> bool {
        !self.areas.outbox.is_empty()
    }

    // ---- which way a transfer goes ----

    /// Whether all pairings of a transfer can be staged, as one transfer; `None` where none is.
    pub(super) fn suits(&self, way: Way, pairings: &[Pairing]) -> Option<bool> {
        let staged = pairings.iter().filter(|pairing| self.joins(pairing.here, pairing.there)).count();
        // Records of a write are announced in the order of one area's slots.
        let apart = way == Way::Out && pairings.windows(2).any(|two| two[0].there != two[1].there);
        (staged > 0).then_some(staged == pairings.len() && !apart)
    }

    /// Makes the area of a place, and offers it to the peer; whether there is one.
    pub(super) fn provide(&mut self, here: Place, copies: &mut Copies) -> bool {
        let there = self.pairs.iter().filter(|pair| pair.0 == here).map(|pair| pair.1);
        copies.memory(here).is_some_and(|memory| self.areas.provide(here, there, memory))
    }

    /// The peer offers an area.
    ///
    /// # Errors
    /// `Protocol` for one that was not agreed.
    pub(super) fn announced(&mut self, here: Place, there: Place, export: Export) -> Result<()> {
        self.targets.announced(here, there, export)
    }

    /// Opens the peer's area for a pair of places; whether it is open.
    pub(super) fn open(&mut self, here: Place, there: Place, copies: &mut Copies) -> bool {
        copies.memory(here).is_some_and(|memory| self.targets.open(here, there, memory))
    }

    /// Whether messages between two places are staged, too: of host memory alone, since areas of both engines are made for them.
    pub(super) fn takes_messages(&self, here: Place, there: Place) -> bool {
        !here.is_device() && self.joins(here, there)
    }

    /// Whether a message from `here` can be sent to a landing at `there`. The first call offers the area of `here`, which the peer answers
    /// with its own.
    pub(super) fn can_send(&mut self, here: Place, there: Place, copies: &mut Copies) -> bool {
        if !self.takes_messages(here, there) {
            return false;
        }
        let open = self.open(here, there, copies);
        if !open {
            self.provide(here, copies);
        }
        open
    }

    /// How a pairing goes whose region the peer has granted.
    pub(super) fn route(&self, way: Way, pairing: &Pairing, granted: &Granted) -> Route {
        let open = match way {
            Way::In => granted.direct.read && self.areas.has(pairing.here),
            Way::Out => granted.direct.write && self.targets.look(pairing.here, pairing.there).is_some(),
        };
        if open {
            Route::Direct
        } else {
            Route::Channels
        }
    }

    /// What the peer can do directly with a region at `here` from its memory at `there`.
    pub(super) fn access(&mut self, here: Place, there: Place, copies: &mut Copies) -> RemoteAccess {
        let read = self.open(here, there, copies);
        RemoteAccess { read, write: self.provide(here, copies) }
    }

    /// Starts a transfer. `sources`: by pairing, the grant, and this engine's place.
    ///
    /// # Errors
    /// `Protocol` for a message to an area that is not open, or why the connection must end.
    pub(super) fn start(&mut self, transfer: &mut Start<'_>, sources: Vec<Source>, around: &mut Around<'_>) -> Result<()> {
        let Some(&Pairing { here, there, .. }) = transfer.pairings.first() else { bail!(Internal, "a transfer of no pairing") };
        match transfer.way {
            Way::Out if sources.iter().any(|source| self.targets.look(source.here, there).is_none()) => {
                bail!(Protocol, "bytes for memory of {there:?}, whose area is not open")
            }
            Way::Out => self.gathers.start(transfer, sources, there)?,
            Way::In => {
                let grants = sources.iter().map(|source| (source.slot, source.generation)).collect();
                self.fetches.start(transfer, grants, here)?;
            }
        }
        self.advance(around).map(drop)
    }

    // ---- records of the peer ----

    /// Where the blocks of a record of this engine's area lie, and the slot that is in use until [`Staged::leave`].
    ///
    /// # Errors
    /// `Protocol` when there is no such area, or no slot free.
    pub(super) fn enter(&mut self, here: Place) -> Result<(Slot, Stretch)> {
        self.areas.enter(here)
    }

    /// A slot was scattered, or is of no use.
    ///
    /// # Errors
    /// `Internal` for a slot of no area.
    pub(super) fn leave(&mut self, slot: Slot, inn: &RingIn) -> Result<()> {
        self.rings = true;
        self.areas.leave(slot, inn.shared())
    }

    /// The peer asks for blocks of a region that its order keeps.
    ///
    /// # Errors
    /// `Protocol` where that was not agreed.
    pub(super) fn ask(&mut self, head: &Head, (here, there): (Place, Place), pieces: &[Piece]) -> Result<()> {
        if self.targets.look(here, there).is_none() {
            bail!(Protocol, "a read of memory of {here:?} into {there:?}, whose area is not open");
        }
        self.gathers.ask(head, (here, there), pieces)
    }

    /// The peer answers a read with the record at hand.
    ///
    /// # Errors
    /// `Protocol` for what cannot be, or why the connection must end.
    pub(super) fn answer(&mut self, (head, count): (Head, usize), inn: &mut RingIn, around: Copying<'_>) -> Result<()> {
        let Some((Kind::Answer, here)) = Kind::of(head.export) else { bail!(Internal, "no answer") };
        let (slot, stretch) = self.areas.enter(here)?;
        let mut block = Piece { src: 0, dst: 0, len: 0 };
        inn.take(|piece| block = piece);
        if count != 1 || block.src != stretch.base || block.len == 0 || block.len > stretch.len {
            bail!(Protocol, "an answer of {count} blocks, the last of {} bytes at {}", block.len, block.src);
        }
        let Copying { copies, imports } = around;
        copies.pieces.clear();
        match self.fetches.answered((head.order, here), (stretch.addr, block.len), &mut copies.pieces)? {
            // SAFETY: the source is a slot of this engine's area, the destinations are blocks of a read that holds them.
            Some(key) => unsafe { copies.start(here, Vec::new(), block.len, Owner::Answer(slot, key), imports) },
            // The rest of a read that was refused.
            None => self.leave(slot, inn),
        }
    }

    // ---- copies ----

    /// A slot of the peer is full.
    pub(super) fn gathered(&mut self, slot: Slot) {
        self.gathers.copied(slot);
    }

    /// A slot of a read is scattered.
    ///
    /// # Errors
    /// `Internal` for a slot of no area.
    pub(super) fn copied(&mut self, slot: Slot, key: Key, inn: &RingIn) -> Result<()> {
        self.fetches.copied(key);
        self.leave(slot, inn)
    }

    /// Goes on with all transfers; whether something was announced.
    ///
    /// # Errors
    /// When the connection must end.
    pub(super) fn advance(&mut self, around: &mut Around<'_>) -> Result<bool> {
        Ok(self.fetches.advance(around.out)? | self.gathers.advance(&self.targets, around)?)
    }

    /// Reads of the peer, and bytes of them that were announced since the last call.
    pub(super) fn take_answered(&mut self) -> Vec<(u64, u64)> {
        self.gathers.take_answered()
    }

    /// Reports what has ended, and how far the rest is; whether something has ended.
    ///
    /// # Errors
    /// `Protocol` when the peer reports an impossible count.
    pub(super) fn report(&mut self, out: &mut RingOut, events: &mut Vec<Event>) -> Result<bool> {
        Ok(self.gathers.report(out, events)? | self.fetches.report(out, events)?)
    }

    /// Whether the peer is to be woken where it sleeps, asked once.
    pub(super) fn rings(&mut self) -> bool {
        std::mem::take(&mut self.rings)
    }

    /// What it does.
    pub(super) fn doing(&self) -> Doing {
        let (writes, reads) = (self.gathers.writes(), self.fetches.len());
        Doing { writes, reads, busy: reads > 0 || !self.gathers.is_empty(), moved: self.gathers.moved() }
    }

    /// Ends everything. With `copies` no copy runs; without, what they use stays for ever.
    pub(super) fn end(&mut self, copies: Option<&mut Copies>) {
        let (gathers, fetches) = (std::mem::take(&mut self.gathers), std::mem::take(&mut self.fetches));
        let Some(copies) = copies else { return std::mem::forget((gathers, fetches)) };
        for (here, mapping) in self.targets.end() {
            if let Some(memory) = copies.memory(here) {
                memory.close(mapping);
            }
        }
        for (here, area) in self.areas.end() {
            if let Some(memory) = copies.memory(here) {
                memory.drop_area(area);
            }
        }
    }
}

/// What copies of answers need.
pub(super) struct Copying<'a> {
    pub copies: &'a mut Copies,
    pub imports: &'a mut super::exports::Imports,
}
