//! Copies under way into memory of this engine: its own reads and the peer's writes. Knows nothing of grants and of how the peer learns of
//! them.

use super::areas::Slot;
use super::exports::Imports;
use super::memory::host::HostMemory;
use super::memory::{LocalMemory, Pull};
use crate::status::{bail, Result};
use crate::types::{Key, Piece, Place};
use std::time::{Duration, Instant};

/// Bytes that are copied in hardly more time than one, and the time in which that should be over.
const SMALL: u64 = 64 << 10;
const SOON: Duration = Duration::from_micros(15);

/// What a copy is part of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// A read of this engine.
    Read(Key),
    /// Orders of the peer, and the bytes of each.
    Orders(Vec<(u64, u64)>),
    /// A staged order of the peer, and the slot that it comes from.
    Staged(Slot, Vec<(u64, u64)>),
    /// A staged read of this engine, and the slot that it comes from.
    Answer(Slot, Key),
    /// A slot of the peer's area that is being filled.
    Gather(Slot),
}

/// What became of a copy.
pub(super) enum Done {
    /// So many more bytes of it are in place.
    Moved(Owner, u64),
    /// It has ended: the bytes that [`Done::Moved`] has not reported, its pieces and its place.
    Ended { owner: Owner, rest: u64, pieces: usize },
}

/// A copy under way.
struct Running {
    pull: Pull,
    place: Place,
    exports: Vec<u32>,
    pieces: usize,
    bytes: u64,
    /// It crosses NVLink.
    nvlink: bool,
    /// Bytes of it that were reported.
    moved: u64,
    begun: Instant,
    owner: Owner,
}

/// All copies of a connection.
pub(super) struct Copies {
    pub host: Option<HostMemory>,
    pub device: Option<Box<dyn LocalMemory>>,
    running: Vec<Running>,
    /// Bytes that have crossed NVLink.
    pub nvlink: u64,
    /// Room for the pieces of the next copy.
    pub pieces: Vec<Piece>,
    /// Room for what the next poll finds.
    pub done: Vec<Done>,
    /// When the transport was last called: copies begin then.
    pub now: Instant,
    /// Short copies are made by the thread that starts them.
    pub at_once: bool,
}

impl Copies {
    pub(super) fn new(host: Option<HostMemory>, device: Option<Box<dyn LocalMemory>>) -> Copies {
        let (running, pieces, done) = Default::default();
        Copies { host, device, running, nvlink: 0, pieces, done, now: Instant::now(), at_once: true }
    }

    /// The memory that copies into a place.
    pub(super) fn memory(&mut self, place: Place) -> Option<&mut dyn LocalMemory> {
        match place.is_device() {
            true => self.device.as_mut().map(|device| &mut **device as &mut dyn LocalMemory),
            false => self.host.as_mut().map(|host| host as &mut dyn LocalMemory),
        }
    }

    /// Starts copying the pieces at hand, which have so many bytes, into `place`. `exports`: where their sources lie.
    ///
    /// # Safety
    /// Sources lie in the peer's process or in the open `exports`; whatever `owner` names keeps the destinations until the copy has ended,
    /// or for ever where it does not end.
    ///
    /// # Errors
    /// When the connection must end.
    pub(super) unsafe fn start(
        &mut self,
        place: Place,
        exports: Vec<u32>,
        bytes: u64,
        owner: Owner,
        imports: &mut Imports,
    ) -> Result<()> {
        for &id in &exports {
            imports.enter(id, place)?;
        }
        let nvlink = exports.iter().any(|&id| imports.by_nvlink(id));
        let (pieces, at_once) = (std::mem::take(&mut self.pieces), self.at_once);
        let Some(memory) = self.memory(place) else { bail!(Internal, "no memory copies into {place:?}") };
        let transfer = match &owner {
            Owner::Read(key) | Owner::Answer(_, key) => key.id << 1,
            Owner::Gather(slot) => slot.number << 1,
            Owner::Orders(parts) | Owner::Staged(_, parts) => parts.first().map_or(0, |(order, _)| order << 1 | 1),
        };
        memory.belongs_to(transfer, at_once);
        // SAFETY: by the caller's contract; `exports` are in use from here on.
        let pull = unsafe { memory.pull(place, &pieces) };
        let n = pieces.len();
        self.pieces = pieces;
        self.running.push(Running { pull: pull?, place, exports, pieces: n, bytes, nvlink, moved: 0, begun: self.now, owner });
        Ok(())
    }

    /// Copies that have moved on or ended since the last call, in any order.
    ///
    /// # Errors
    /// When the bytes of one will never be in place.
    pub(super) fn poll(&mut self, imports: &mut Imports) -> Result<Vec<Done>> {
        let (mut done, mut i) = (std::mem::take(&mut self.done), 0);
        while let Some(&Running { pull, place, bytes, nvlink, moved, .. }) = self.running.get(i) {
            let Some(memory) = self.memory(place) else { bail!(Internal, "no memory copies into {place:?}") };
            if !memory.poll(pull)? {
                // Large ones end together, since all have their turns: what each has moved shows that they go on.
                let more = memory.copied(pull, bytes).min(bytes).saturating_sub(moved);
                if more > 0 {
                    self.running[i].moved += more;
                    self.nvlink += if nvlink { more } else { 0 };
                    done.push(Done::Moved(self.running[i].owner.clone(), more));
                }
                i += 1;
                continue;
            }
            let Running { exports, pieces, owner, .. } = self.running.swap_remove(i);
            self.nvlink += if nvlink { bytes - moved } else { 0 };
            if let Some(device) = &mut self.device {
                exports.into_iter().for_each(|id| imports.release(id, &mut **device));
            }
            done.push(Done::Ended { owner, rest: bytes - moved, pieces });
        }
        Ok(done)
    }

    /// Copies are under way.
    pub(super) fn any(&self) -> bool {
        !self.running.is_empty()
    }

    /// When the newest copy should be over, if it is small.
    pub(super) fn end_soon(&self) -> Option<Instant> {
        self.running.last().filter(|copy| copy.bytes <= SMALL).map(|copy| copy.begun + SOON)
    }

    /// Copies run whose end rings no doorbell.
    pub(super) fn copying(&self) -> bool {
        self.device.as_ref().is_some_and(|device| device.busy()) || self.host.as_ref().is_some_and(|host| host.busy())
    }

    /// Waits, for a bounded time, until no copy touches memory.
    ///
    /// # Errors
    /// When some still may.
    pub(super) fn quiesce(&mut self) -> Result<()> {
        let host = self.host.as_mut().map_or(Ok(()), |host| host.quiesce());
        host.and(self.device.as_mut().map_or(Ok(()), |device| device.quiesce()))
    }
}
