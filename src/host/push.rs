//! Where pushed chunks lie between two GPUs: memory of the destination's library, cut into slots. The source's side writes a chunk into
//! a slot and tells its number; the destination's side copies from there to where the chunk belongs. Keeps which slots are taken, on
//! either side. An area serves one connection; its pages are used for nothing else before both sides have ended their mappings. Knows
//! nothing of sockets, rings and transfers.

use super::memory::{Area, Export, LocalMemory, Mapping};
use super::messages::Note;
use super::ring::Extent;
use crate::hash::Map;
use crate::status::{bail, Result};
use crate::types::Place;
use std::collections::VecDeque;
use std::sync::Arc;

/// Bytes of a slot: what a pushed chunk is at most.
pub(crate) const SLOT: usize = 4 << 20;
/// Slots of an area: as many chunks as may be under way.
pub(crate) const SLOTS: usize = 8;
/// Bytes of an area.
pub(crate) const AREA: usize = SLOT * SLOTS;
/// What a piece in a slot has in place of an export; its address is the slot's number.
pub(crate) const PUSHED: u32 = u32::MAX;

/// An area of this side, and which slots are being copied from.
struct Own {
    area: Area,
    taken: [bool; SLOTS],
}

/// Areas of this side, into which the peer pushes.
#[derive(Default)]
pub(crate) struct Areas {
    /// By GPU; `None` where there can be none.
    own: Map<Place, Option<Own>>,
    /// What the peer has to be told.
    pub notes: VecDeque<Note>,
}

impl Areas {
    /// Makes the area of a GPU, once, and tells the peer of it for each of its GPUs `there`. Where that fails other channels carry.
    pub(crate) fn provide(&mut self, here: Place, there: impl Iterator<Item = Place>, memory: &mut dyn LocalMemory) {
        if self.own.contains_key(&here) {
            return;
        }
        let made = self.make(here, there, memory);
        if let Err(e) = &made {
            log::debug!("nothing is pushed into memory of {here:?}: {e}");
        }
        self.own.insert(here, made.ok());
    }

    fn make(&mut self, here: Place, there: impl Iterator<Item = Place>, memory: &mut dyn LocalMemory) -> Result<Own> {
        let area = memory.area(here, AREA)?;
        let notes: Result<Vec<Note>> =
            there.map(|there| Ok(Note::Area { there: here, here: there, export: memory.export_area(&area)? })).collect();
        match notes {
            Ok(notes) => self.notes.extend(notes),
            Err(e) => {
                memory.drop_area(area);
                return Err(e);
            }
        }
        Ok(Own { area, taken: [false; SLOTS] })
    }

    /// The slot of a chunk of `len` bytes for memory of `here`, and where it lies. The slot is taken until [`Areas::leave`].
    ///
    /// # Errors
    /// `Protocol` when the pieces are not one slot that is free.
    pub(crate) fn enter(&mut self, here: Place, pieces: &[Extent], len: usize) -> Result<(usize, u64)> {
        let Some(Some(own)) = self.own.get_mut(&here) else { bail!(Protocol, "a chunk was pushed for memory of {here:?}") };
        let [Extent { addr, len: told, export: PUSHED }] = *pieces else {
            bail!(Protocol, "a chunk for memory of {here:?} that was not pushed into one slot")
        };
        let slot = usize::try_from(addr).unwrap_or(usize::MAX);
        match own.taken.get_mut(slot) {
            Some(taken) if !*taken && told as usize == len && len <= SLOT => *taken = true,
            _ => bail!(Protocol, "{told} bytes were pushed into slot {addr}, for a chunk of {len}"),
        }
        Ok((slot, own.area.addr + (slot * SLOT) as u64))
    }

    /// A slot was copied from, and may be written again.
    pub(crate) fn leave(&mut self, here: Place, slot: usize) {
        if let Some(Some(own)) = self.own.get_mut(&here) {
            own.taken[slot] = false;
        }
    }

    /// Ends all of them; nothing copies from them any more. The peer may still write to them: nobody ever reads that.
    pub(crate) fn end(&mut self, memory: &mut dyn LocalMemory) {
        self.own.drain().filter_map(|(_, own)| own).for_each(|own| memory.drop_area(own.area));
    }
}

/// Areas of the peer, into which this side pushes.
#[derive(Default)]
pub(crate) struct Targets {
    /// Mapped for a GPU of this side, by that and the peer's.
    open: Map<(Place, Place), Mapping>,
    told: Vec<(Place, Place)>,
    /// Told, and not opened yet: opening takes long, and makes a GPU's driver ready. An area that is told for several GPUs is kept once, since
    /// some may never be wanted.
    waiting: Vec<(Place, Place, Arc<Export>)>,
    /// GPUs of this side with memory that may be pushed.
    wanted: Vec<Place>,
    /// Slots that are written or told, by the peer's GPU.
    taken: Map<Place, [bool; SLOTS]>,
}

impl Targets {
    /// The peer offers an area on its GPU `there`, for this side's GPU `here`.
    ///
    /// # Errors
    /// `Protocol` for a second one, or one of another length.
    pub(crate) fn told(&mut self, here: Place, there: Place, export: Export) -> Result<()> {
        if export.len != AREA as u64 || self.told.contains(&(here, there)) {
            bail!(Protocol, "the peer offers {} bytes on GPU {there:?} for {here:?}", export.len);
        }
        self.told.push((here, there));
        let known = self.waiting.iter().find(|&&(_, other, _)| other == there).map(|(.., export)| export.clone());
        self.waiting.push((here, there, known.unwrap_or_else(|| Arc::new(export))));
        Ok(())
    }

    /// Memory of `here` may be pushed from now on: whether that is new.
    pub(crate) fn want(&mut self, here: Place) -> bool {
        let new = !self.wanted.contains(&here);
        if new {
            self.wanted.push(here);
        }
        new
    }

    fn next(&self) -> Option<usize> {
        self.waiting.iter().position(|(here, ..)| self.wanted.contains(here))
    }

    /// Something waits to be opened.
    pub(crate) fn waiting(&self) -> bool {
        self.next().is_some()
    }

    /// Opens one area. Where that fails other channels carry.
    pub(crate) fn open_one(&mut self, memory: &mut dyn LocalMemory) {
        let Some((here, there, export)) = self.next().map(|at| self.waiting.swap_remove(at)) else { return };
        match memory.open_area(&export, here) {
            Ok(mapping) => drop(self.open.insert((here, there), mapping)),
            Err(e) => log::debug!("nothing is pushed from {here:?} to the peer's {there:?}: {e}"),
        }
    }

    /// Whether memory of `here` can be pushed to `there`.
    pub(crate) fn is_open(&self, here: Place, there: Place) -> bool {
        self.open.contains_key(&(here, there))
    }

    /// A free slot, and where it is visible here. It is taken until [`Targets::leave`].
    ///
    /// # Errors
    /// `Internal` when there is none.
    pub(crate) fn enter(&mut self, here: Place, there: Place) -> Result<(usize, u64)> {
        let taken = self.taken.entry(there).or_default();
        let free = taken.iter().position(|taken| !taken);
        let (Some(slot), Some(mapping)) = (free, self.open.get(&(here, there))) else {
            bail!(Internal, "no slot to push from {here:?} to {there:?}")
        };
        taken[slot] = true;
        Ok((slot, mapping.addr + (slot * SLOT) as u64))
    }

    /// The peer has taken what was in a slot.
    pub(crate) fn leave(&mut self, there: Place, slot: usize) {
        if let Some(taken) = self.taken.get_mut(&there) {
            taken[slot] = false;
        }
    }

    /// Closes everything; nothing is being written.
    pub(crate) fn close_all(&mut self, memory: &mut dyn LocalMemory) {
        self.waiting.clear();
        self.open.drain().for_each(|(_, mapping)| memory.close(mapping));
    }
}
