//! Reads of this engine: blocks that the peer has granted are copied out of its memory, a few steps of each read at a time, so that a large read
//! holds up no small one. Knows nothing of how copies run.

use super::blocks::{Rest, Stride};
use super::copies::{Copies, Owner};
use super::exports::{Imports, Stretch};
use super::grants::Leases;
use super::locate::locate;
use crate::direct::{Blocks, Event, Start};
use crate::region::Hold;
use crate::status::{bail, Result};
use crate::types::{Key, Place};

/// Copies of a read under way at once.
const AHEAD: usize = 8;
/// Blocks that are fetched before the next ones are: they stay in the nearest cache meanwhile.
const AT_ONCE: usize = 512;

/// Where a pairing's blocks are read from: a grant, and the allocations of the peer as they are mapped here, rising; none where its addresses are
/// valid as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    pub slot: u32,
    pub generation: u64,
    pub stretches: Vec<Stretch>,
}

/// A read of this engine.
struct Reading {
    key: Key,
    place: Place,
    sources: Vec<Source>,
    rest: Rest,
    stride: Stride,
    /// Copies under way.
    copies: usize,
    _hold: Hold,
}

/// What reads need of the rest of the transport.
pub(super) struct Around<'a> {
    pub copies: &'a mut Copies,
    pub imports: &'a mut Imports,
    pub leases: &'a Leases,
}

/// All reads of a connection.
#[derive(Default)]
pub(super) struct Reads(Vec<Reading>);

impl Reads {
    /// Starts a read whose blocks all go to `place`. `false` where a grant has ended meanwhile: then nothing has begun.
    ///
    /// # Errors
    /// When the connection must end.
    pub(super) fn start(
        &mut self,
        transfer: &mut Start<'_>,
        sources: Vec<Source>,
        place: Place,
        around: &mut Around<'_>,
    ) -> Result<bool> {
        let mut rest = Rest::default();
        let later = transfer.total > Stride::FIRST.bytes || transfer.count > Stride::FIRST.blocks;
        if later {
            rest = Rest::with_room(transfer.count)?;
        }
        for (i, Source { slot, generation, .. }) in sources.iter().enumerate() {
            if !around.leases.enter(*slot, *generation) {
                sources[..i].iter().for_each(|source| around.leases.leave(source.slot));
                return Ok(false);
            }
        }
        let (key, stride) = (transfer.key, Stride::first(transfer.total));
        self.0.push(Reading { key, place, sources, rest: Rest::default(), stride, copies: 0, _hold: transfer.hold.clone() });
        let Some(reading) = self.0.last_mut() else { bail!(Internal, "a read that is not there") };
        reading.more(transfer.blocks, around)?;
        rest.take(transfer.blocks);
        reading.rest = rest;
        Ok(true)
    }

    /// Goes on with the reads that have room; whether one did.
    ///
    /// # Errors
    /// When the connection must end.
    pub(super) fn advance(&mut self, around: &mut Around<'_>) -> Result<bool> {
        let mut any = false;
        for reading in self.0.iter_mut().filter(|reading| !reading.rest.is_done()) {
            let mut rest = std::mem::take(&mut reading.rest);
            let went = reading.more(&mut rest, around);
            reading.rest = rest;
            any |= went?;
        }
        Ok(any)
    }

    /// A copy of a read has ended, and perhaps the read.
    pub(super) fn copied(&mut self, key: Key, leases: &Leases, events: &mut Vec<Event>) {
        let Some(at) = self.0.iter().position(|reading| reading.key == key) else { return };
        let reading = &mut self.0[at];
        reading.copies -= 1;
        if reading.copies == 0 && reading.rest.is_done() {
            self.0.swap_remove(at).leave(leases);
            events.push(Event::Ended(key, true));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Ends all of them. `quiet`: no copy runs; else what they use stays for ever.
    pub(super) fn end(&mut self, quiet: bool, leases: &Leases) {
        let all = std::mem::take(&mut self.0);
        match quiet {
            true => all.into_iter().for_each(|reading| reading.leave(leases)),
            false => std::mem::forget(all),
        }
    }
}

impl Reading {
    fn leave(self, leases: &Leases) {
        self.sources.iter().for_each(|source| leases.leave(source.slot));
    }

    /// Starts copies as long as there is room for them; whether it did.
    fn more(&mut self, blocks: &mut dyn Blocks, around: &mut Around<'_>) -> Result<bool> {
        let mut any = false;
        while self.copies < AHEAD {
            let Some((exports, bytes)) = self.gather(blocks, &mut around.copies.pieces)? else { break };
            let owner = Owner::Read(self.key);
            // SAFETY: the sources were located in the peer's memory or its open exports; this read holds the destinations.
            unsafe { around.copies.start(self.place, exports, bytes, owner, around.imports) }?;
            (self.copies, self.stride, any) = (self.copies + 1, self.stride.next(), true);
        }
        Ok(any)
    }

    /// The pieces of the next copy: the exports that they lie in, and their bytes; `None` at the end.
    fn gather(&self, blocks: &mut dyn Blocks, pieces: &mut Vec<crate::types::Piece>) -> Result<Option<(Vec<u32>, u64)>> {
        let (mut exports, mut bytes): (Vec<u32>, u64) = (Vec::new(), 0);
        pieces.clear();
        while pieces.len() < self.stride.blocks && bytes < self.stride.bytes {
            let begin = pieces.len();
            let most = (self.stride.blocks - begin).min(AT_ONCE);
            let Some(pairing) = blocks.fill(most, self.stride.bytes - bytes, pieces) else { break };
            bytes += pieces[begin..].iter().map(|piece| piece.len).sum::<u64>();
            let Some(Source { stretches, .. }) = self.sources.get(pairing) else { bail!(Internal, "blocks of no pairing") };
            if !stretches.is_empty() {
                locate(pieces, begin, stretches, |id| {
                    if !exports.contains(&id) {
                        exports.push(id);
                    }
                })?;
            }
        }
        Ok((!pieces.is_empty()).then_some((exports, bytes)))
    }
}
