//! Areas: memory of this library, on a GPU or of the host, cut into slots, into which a peer writes what this engine then copies to where it belongs.
//! Slots are used in turn, and each engine counts for itself, so the peer never sends a slot number that has to be trusted. An area serves one
//! connection; its pages are used for nothing else until both engines have ended their mappings. Knows nothing of sockets, records and
//! transfers.

use super::exports::Stretch;
use super::layout;
use super::memory::{Area, Export, LocalMemory, Mapping};
use super::messages::Message;
use super::shm::Shared;
use crate::hash::Map;
use crate::status::{bail, Result};
use crate::types::Place;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::Arc;

/// Slots of an area, bytes of a slot on a GPU, and of one of host memory: long enough that the threads of the pool copy it and not the one that drives.
pub(super) const SLOTS: u64 = 8;
pub(super) const SLOT: u64 = 4 << 20;
pub(super) const HOST_SLOT: u64 = 2 << 20;

/// Bytes of a slot in the area of a place.
pub(super) fn slot_bytes(place: Place) -> u64 {
    if place.is_device() {
        SLOT
    } else {
        HOST_SLOT
    }
}

/// Bytes of the area of a place.
pub(super) fn area_bytes(place: Place) -> u64 {
    slot_bytes(place) * SLOTS
}

/// What a record that uses an area says in place of an export, with the place whose area it is. Exports never have such numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Its sources lie in the next slot of the receiver's area.
    Write = 0xFFFF_FF00,
    /// Its sources are to be brought to the sender's area.
    Fetch = 0xFFFF_FE00,
    /// They are there: in the next slot of the receiver's area.
    Answer = 0xFFFF_FD00,
}

impl Kind {
    /// The number, for the area of a place.
    pub(super) fn export(self, place: Place) -> u32 {
        self as u32 | u32::from(place.0)
    }

    /// What a number says; `None` for an export.
    pub(super) fn of(export: u32) -> Option<(Kind, Place)> {
        let kinds = [Kind::Write, Kind::Fetch, Kind::Answer];
        kinds.into_iter().find(|&kind| kind as u32 == export & !0xFF).map(|kind| (kind, Place(export as u8)))
    }
}

/// A slot in use: the place of its area, and how many were used there before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub place: Place,
    pub number: u64,
}

/// Where a slot begins in its area.
pub(super) fn offset(Slot { place, number }: Slot) -> u64 {
    number % SLOTS * slot_bytes(place)
}

/// The word of a file that counts what was scattered from the area of a place.
fn scattered(place: Place) -> Result<usize> {
    match place.ordinal().map(usize::from) {
        None => Ok(layout::scattered(layout::GPUS)),
        Some(ordinal) if ordinal < layout::GPUS => Ok(layout::scattered(ordinal)),
        Some(_) => bail!(Unsupported, "no area for memory of {place:?}"),
    }
}

/// How many slots of the peer's area at its place were scattered, as the peer says in this engine's file.
pub(super) fn count(shared: &Shared, there: Place) -> Result<u64> {
    Ok(shared.word(scattered(there)?).load(Ordering::Acquire))
}

/// An area of this engine.
struct Own {
    area: Area,
    /// Slots that the peer has filled, and those of them that were scattered, without a gap.
    filled: u64,
    scattered: u64,
    /// Slots that were scattered before the ones that they follow.
    early: [bool; SLOTS as usize],
}

/// Areas of this engine, into which the peer writes.
#[derive(Default)]
pub(super) struct Areas {
    /// By place; `None` where there can be none.
    own: Map<Place, Option<Own>>,
    /// What the peer is to learn before any claim or grant.
    pub outbox: VecDeque<Message>,
}

impl Areas {
    /// Makes the area of a place, once, and offers it to the peer for each of its places `there`. Whether there is one.
    pub(super) fn provide(&mut self, here: Place, there: impl Iterator<Item = Place>, memory: &mut dyn LocalMemory) -> bool {
        if !self.own.contains_key(&here) {
            let made = self.make(here, there, memory);
            if let Err(e) = &made {
                log::debug!("nothing is staged for memory of {here:?}: {e}");
            }
            self.own.insert(here, made.ok());
        }
        self.has(here)
    }

    fn make(&mut self, here: Place, there: impl Iterator<Item = Place>, memory: &mut dyn LocalMemory) -> Result<Own> {
        scattered(here)?;
        let area = memory.area(here, area_bytes(here) as usize)?;
        let offer = |there| Ok(Message::Area { there: here, here: there, export: memory.export_area(&area)? });
        match there.map(offer).collect::<Result<Vec<Message>>>() {
            Ok(offers) => self.outbox.extend(offers),
            Err(e) => {
                memory.drop_area(area);
                return Err(e);
            }
        }
        Ok(Own { area, filled: 0, scattered: 0, early: [false; SLOTS as usize] })
    }

    /// Whether a place has an area.
    pub(super) fn has(&self, here: Place) -> bool {
        matches!(self.own.get(&here), Some(Some(_)))
    }

    /// The peer has filled the next slot: its name, and where it lies in the area and here. It is in use until [`Areas::leave`].
    ///
    /// # Errors
    /// `Protocol` when there is none.
    pub(super) fn enter(&mut self, here: Place) -> Result<(Slot, Stretch)> {
        let Some(Some(own)) = self.own.get_mut(&here) else { bail!(Protocol, "a staged record for memory of {here:?}") };
        let number = own.filled;
        if number - own.scattered >= SLOTS {
            bail!(Protocol, "a staged record for memory of {here:?}, all slots of which are in use");
        }
        own.filled += 1;
        let slot = Slot { place: here, number };
        let base = offset(slot);
        Ok((slot, Stretch { id: 0, base, len: slot_bytes(here), addr: own.area.addr + base }))
    }

    /// A slot was scattered: the peer learns of it in its file, in the order of slots.
    pub(super) fn leave(&mut self, slot: Slot, shared: &Shared) -> Result<()> {
        let Some(Some(own)) = self.own.get_mut(&slot.place) else { bail!(Internal, "a slot of no area") };
        own.early[(slot.number % SLOTS) as usize] = true;
        while own.scattered < own.filled && std::mem::take(&mut own.early[(own.scattered % SLOTS) as usize]) {
            own.scattered += 1;
        }
        shared.word(scattered(slot.place)?).store(own.scattered, Ordering::SeqCst);
        Ok(())
    }

    /// Hands out all of them to be dropped; no copy from them is under way. The peer may still write to them, but no process reads what it writes.
    pub(super) fn end(&mut self) -> impl Iterator<Item = (Place, Area)> + '_ {
        self.own.drain().filter_map(|(here, own)| Some((here, own?.area)))
    }
}

/// Areas of the peer, into which this engine writes.
#[derive(Default)]
pub(super) struct Targets {
    /// Mapped for a place of this engine, by that and the peer's.
    open: Map<(Place, Place), Mapping>,
    announced: Vec<(Place, Place)>,
    /// Announced, and not opened yet: opening takes long. An area that is announced for several GPUs is kept once.
    waiting: Vec<(Place, Place, Arc<Export>)>,
}

impl Targets {
    /// The peer offers an area at its place `there`, for this engine's `here`.
    ///
    /// # Errors
    /// `Protocol` for a second one, or one of another length.
    pub(super) fn announced(&mut self, here: Place, there: Place, export: Export) -> Result<()> {
        if export.len != area_bytes(there) || self.announced.contains(&(here, there)) {
            bail!(Protocol, "the peer offers {} bytes at {there:?} for {here:?}", export.len);
        }
        self.announced.push((here, there));
        let known = self.waiting.iter().find(|&&(_, other, _)| other == there).map(|(.., export)| export.clone());
        self.waiting.push((here, there, known.unwrap_or_else(|| Arc::new(export))));
        Ok(())
    }

    /// Opens the area of the peer's `there` for memory of `here`, once. Whether it is open.
    pub(super) fn open(&mut self, here: Place, there: Place, memory: &mut dyn LocalMemory) -> bool {
        let found = self.waiting.iter().position(|&(a, b, _)| (a, b) == (here, there));
        if let Some((.., export)) = found.map(|at| self.waiting.swap_remove(at)) {
            match memory.open_area(&export, here) {
                Ok(mapping) => drop(self.open.insert((here, there), mapping)),
                Err(e) => log::debug!("nothing is staged from {here:?} for the peer's {there:?}: {e}"),
            }
        }
        self.look(here, there).is_some()
    }

    /// Where the area of the peer's `there` is visible for memory of `here`.
    pub(super) fn look(&self, here: Place, there: Place) -> Option<u64> {
        self.open.get(&(here, there)).map(|mapping| mapping.addr)
    }

    /// Hands out all mappings to be closed; nothing is being written.
    pub(super) fn end(&mut self) -> impl Iterator<Item = (Place, Mapping)> + '_ {
        self.waiting.clear();
        self.open.drain().map(|((here, _), mapping)| (here, mapping))
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::emulated::EmulatedMemory;
    use super::super::ring::{RingIn, RingOut};
    use super::*;

    #[test]
    fn a_number_says_what_a_record_is() {
        for kind in [Kind::Write, Kind::Fetch, Kind::Answer] {
            for place in [Place::gpu(0), Place::gpu(31), Place(255)] {
                assert_eq!(Kind::of(kind.export(place)), Some((kind, place)));
            }
        }
        assert_eq!([0, 1, 1 << 31, 0xFFFF_FCFF].map(Kind::of), [None; 4]);
    }

    #[test]
    fn slots_are_used_in_turn_and_counted_without_a_gap() {
        let out = RingOut::new().unwrap();
        let inn = RingIn::open(out.fd()).unwrap();
        let (mut areas, mut memory) = (Areas::default(), EmulatedMemory::new(true));
        let (here, there) = (Place::gpu(3), Place::gpu(1));
        assert!(areas.enter(here).is_err());
        for _ in 0..2 {
            assert!(areas.provide(here, [there, Place::gpu(2)].into_iter(), &mut memory));
            assert_eq!(areas.outbox.len(), 2, "offered once");
        }
        let mut slots = Vec::new();
        for i in 0..SLOTS {
            let (slot, stretch) = areas.enter(here).unwrap();
            assert_eq!((slot.number, stretch.base, stretch.len), (i, i * SLOT, SLOT));
            slots.push(slot);
        }
        assert!(areas.enter(here).is_err(), "all are in use");
        for (i, counted) in [(1, 0), (2, 0), (0, 3), (4, 3), (3, 5)] {
            areas.leave(slots[i], inn.shared()).unwrap();
            assert_eq!(count(out.shared(), here).unwrap(), counted);
        }
        assert_eq!((areas.enter(here).unwrap().1.base, count(out.shared(), there).unwrap()), (0, 0));
        areas.end().for_each(|(_, area)| memory.drop_area(area));
        assert!(!areas.has(here));
    }
}
