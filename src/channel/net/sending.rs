//! The sending half of a channel: the source of a chunk's bytes and the order of sends. Knows nothing of transfers: a chunk has
//! everything it needs.

use super::channel::{device, iov, register, within, Channel, Copying, Leaving, Source, ToPost};
use super::staging::{Staging, STAGED_WINDOW};
use super::Usage;
use crate::channel::device::gather;
use crate::channel::memory::{HostBlock, PAGE};
use crate::channel::path::{Copier, Departure};
use crate::channel::plan::Chunk;
use crate::direct::{Event, Way};
use crate::region::Hold;
use crate::status::{bail, Result};
use crate::types::Place;
use nccl_net_abi::{MAX_REQUESTS, NCCL_PTR_CUDA, NCCL_PTR_HOST};
use std::time::Instant;

impl Channel {
    /// Takes a chunk for sending. The caller announces it to the peer. The window must have a free slot ([`Channel::load`]). The departure's
    /// hold keeps the chunk's memory registered, and so mapped, until the chunk is sent or the channel closed.
    pub(super) fn submit(&mut self, departure: Departure, copier: &mut Copier, usage: &Usage, now: Instant) -> Result<()> {
        self.take(departure, copier, usage, now).map_err(|e| self.blame(Way::Out, &e))
    }

    fn take(&mut self, departure: Departure, copier: &mut Copier, usage: &Usage, now: Instant) -> Result<()> {
        let Departure { key, chunk, hold, bulk, tag } = departure;
        let len = chunk.len;
        // First, so that after a later failure the chunk's memory stays held until the channel is closed.
        self.outgoing.push_back(Leaving { key, len, bulk, _hold: hold.clone() });
        self.bulk += usize::from(bulk);
        self.bulk_bytes += if bulk { len as u64 } else { 0 };
        self.queued += len as u64;
        let source = if chunk.place.is_device() {
            self.device_source(&chunk, &hold, copier, usage)?
        } else if usage.vectored {
            Source::Vectored(iov(&chunk.parts))
        } else {
            let staging = self.host_out(usage)?;
            let (data, mhandle) = (staging.next(), staging.mhandle());
            // SAFETY: the chunk is at most a stride long; its memory is readable while the hold lives.
            unsafe { gather(&chunk.parts, data) };
            Source::Contiguous { data, mhandle, packing: Copying::none(), place: Place::HOST }
        };
        self.to_post.push_back(ToPost { source, len, tag });
        self.post_sends(copier, now)?;
        Ok(())
    }

    fn device_source(&mut self, chunk: &Chunk, hold: &Hold, copier: &mut Copier, usage: &Usage) -> Result<Source> {
        let place = chunk.place;
        if let ([part], false) = (&chunk.parts[..], usage.stage_sends) {
            let (span, send) = (hold.span_to_register(part.region)?, &mut self.send);
            // SAFETY: the region stays mapped while it is held; its registrations are dropped first (forget_region).
            let mhandle = register(copier, place, || unsafe { send.region(span, part.addr) })?;
            return Ok(Source::Contiguous { data: part.addr as *mut u8, mhandle, packing: Copying::none(), place });
        }
        let staging = self.device_out(place, copier, usage)?;
        let (data, mhandle) = (staging.next(), staging.mhandle());
        // SAFETY: the chunk is at most a stride long; parts are registered device memory by the caller's contract.
        let packing = Copying::begin(|| unsafe { device(copier)?.pack(&chunk.parts, data, place) })?;
        self.counts.packed += 1;
        Ok(Source::Contiguous { data, mhandle, packing, place: if usage.stage_sends { Place::HOST } else { place } })
    }

    /// The staging ring for memory of `place`.
    pub(super) fn device_out(&mut self, place: Place, copier: &mut Copier, usage: &Usage) -> Result<&mut Staging> {
        if !self.device_out.contains_key(&place) {
            let stride = usage.chunk_bytes.next_multiple_of(PAGE);
            let (memory, places, kind) = if usage.stage_sends {
                (device(copier)?.host_staging(stride * STAGED_WINDOW, place)?, STAGED_WINDOW, NCCL_PTR_HOST)
            } else {
                (device(copier)?.staging(stride * MAX_REQUESTS, place)?, MAX_REQUESTS, NCCL_PTR_CUDA)
            };
            let send = &self.send;
            let staging = Staging::new(memory, stride, places, |p, n| {
                // SAFETY: the staging memory is dropped after the comm (field order).
                register(copier, place, || unsafe { send.register(p.cast(), n, kind) })
            })?;
            self.device_out.insert(place, staging);
        }
        match self.device_out.get_mut(&place) {
            Some(staging) => Ok(staging),
            None => bail!(Internal, "no staging"),
        }
    }

    /// Drops the plugin's registrations of a region that no transfer uses.
    pub(crate) fn forget_region(&mut self, id: u64) {
        self.send.forget_region(id);
    }

    fn host_out(&mut self, usage: &Usage) -> Result<&mut Staging> {
        if self.host_out.is_none() {
            let stride = usage.chunk_bytes.next_multiple_of(PAGE);
            let send = &self.send;
            // SAFETY: the staging memory is dropped after the comm (field order).
            let register = |p: *mut u8, n| unsafe { send.register(p.cast(), n, NCCL_PTR_HOST) };
            self.host_out = Some(Staging::new(Box::new(HostBlock::new(stride * MAX_REQUESTS)?), stride, MAX_REQUESTS, register)?);
        }
        match &mut self.host_out {
            Some(staging) => Ok(staging),
            None => bail!(Internal, "no staging"),
        }
    }

    /// Posts announced chunks to the plugin in order, as far as they are packed and it accepts them.
    fn post_sends(&mut self, copier: &mut Copier, now: Instant) -> Result<bool> {
        let mut any = false;
        while let Some(next) = self.to_post.front_mut() {
            let taken = match &mut next.source {
                // SAFETY: the chunk's hold keeps the source's memory, or it is a buffer of the staging ring.
                Source::Vectored(iov) => unsafe { self.send.send_vectored(iov, next.len, next.tag) }?,
                Source::Contiguous { data, mhandle, packing, place } => {
                    if !packing.over(copier, &mut self.counts.packing)? {
                        break;
                    }
                    let send = &mut self.send;
                    // SAFETY: as above.
                    within(copier, *place, &mut || unsafe { send.send(data.cast(), next.len, next.tag, *mhandle) })?
                }
            };
            if !taken {
                break;
            }
            self.to_post.pop_front();
            self.rate.posted(now);
            any = true;
        }
        Ok(any)
    }

    pub(super) fn progress_sends(&mut self, copier: &mut Copier, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let mut done = 0;
        let mut any = false;
        while self.send.inflight() > 0 && self.send.test_oldest()? {
            let Some(sent) = self.outgoing.pop_front() else { bail!(Internal, "a send without a chunk") };
            done += sent.len as u64;
            self.bulk -= usize::from(sent.bulk);
            self.bulk_bytes -= if sent.bulk { sent.len as u64 } else { 0 };
            self.counts.sent_chunks += 1;
            events.push(Event::Sent(sent.key, sent.len as u64));
        }
        if done > 0 {
            self.queued -= done;
            self.counts.sent_bytes += done;
            self.rate.done(done, now, self.send.inflight() > 0);
            any = true;
        }
        if !self.to_post.is_empty() {
            any |= self.post_sends(copier, now)?;
        }
        Ok(any)
    }
}
