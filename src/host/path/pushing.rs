//! Chunks of pairs of places whose bytes are pushed: each is written into a slot of the peer and told when it is all there. Chunks that
//! are pulled wait for those before them. Knows nothing of frames and transfers.

use super::super::memory::Piece;
use super::super::push::{PUSHED, SLOT};
use super::super::ring::Extent;
use super::{LocalPath, Stage};
use crate::channel::plan::Chunk;
use crate::status::{bail, Result};

impl LocalPath {
    /// Starts writing a chunk into a free slot of the peer.
    pub(super) fn push(&mut self, chunk: &Chunk) -> Result<(Stage, usize)> {
        let (slot, addr) = self.targets.enter(chunk.place, chunk.peer)?;
        let Some(device) = &mut self.device else { bail!(Internal, "a chunk to push, and no device") };
        let pieces = &mut self.scratch.pieces;
        pieces.clear();
        let mut dst = addr;
        for part in &chunk.parts {
            pieces.push(Piece { src: part.addr, dst, len: part.len });
            dst += part.len;
        }
        if chunk.len > SLOT || dst - addr != chunk.len as u64 {
            bail!(Internal, "a chunk of {} bytes for a slot", chunk.len);
        }
        // SAFETY: the parts are held by the chunk, which stays in `leaving` until the peer has taken it, and so does the slot, which lies in
        // an open mapping; both stay for ever where the copy does not end.
        let pull = unsafe { device.pull(chunk.place, pieces) }?;
        Ok((Stage::Pushing(pull), slot))
    }

    /// Tells of chunks that are all in their slots, in their order.
    pub(super) fn tell(&mut self) -> Result<bool> {
        let mut any = false;
        while let Some(next) = self.leaving.get_mut(self.told) {
            if let (Stage::Pushing(pull), Some((_, slot)), Some(device)) = (&next.stage, next.slot, &mut self.device) {
                if !device.poll(*pull)? {
                    break;
                }
                next.stage = Stage::Ready(vec![Extent { addr: slot as u64, len: next.len as u32, export: PUSHED }]);
            }
            let Stage::Ready(extents) = std::mem::replace(&mut next.stage, Stage::Told) else { break };
            if let Some((own, _)) = &self.shelves {
                own.put(next.hold.clone());
            }
            self.outbox.tell(next.tag, next.len as u64, &extents)?;
            self.scratch.extents = extents;
            self.told += 1;
            any = true;
        }
        Ok(any)
    }
}

#[cfg(test)]
mod tests;
