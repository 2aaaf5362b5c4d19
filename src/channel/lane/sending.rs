//! The sending half of a channel: where a chunk's bytes are handed to the plugin from, and in which order.

use super::staging::{Staging, STAGED_WINDOW};
use super::{iov, Context, Event, Lane, Outgoing, Source, ToPost};
use crate::channel::device::{gather, Ticket};
use crate::channel::memory::{HostBlock, PAGE};
use crate::channel::plan::Chunk;
use crate::status::{bail, Result};
use crate::types::Place;
use crate::types::{Key, Span};
use nccl_net_abi::{MAX_REQUESTS, NCCL_PTR_CUDA, NCCL_PTR_HOST};
use std::time::Instant;

impl Lane {
    /// Takes a chunk for sending. The caller announces it to the peer. There must be a free place ([`Lane::load`]).
    ///
    /// # Safety
    /// The chunk's memory stays mapped and unchanged until its [`Event::Sent`] or the lane's end.
    pub(crate) unsafe fn submit(
        &mut self,
        key: Key,
        chunk: Chunk,
        span: impl Fn(u16) -> Span,
        ctx: &mut Context<'_>,
        now: Instant,
    ) -> Result<()> {
        let len = chunk.len;
        let source = if chunk.place.is_device() {
            // SAFETY: by the caller's contract.
            unsafe { self.device_source(&chunk, span, ctx) }?
        } else if ctx.vectored {
            Source::Vectored(iov(&chunk.parts))
        } else {
            let staging = self.host_out(ctx)?;
            let (data, mhandle) = (staging.next(), staging.mhandle());
            // SAFETY: the chunk is at most a stride long; its memory is readable by the caller's contract.
            unsafe { gather(&chunk.parts, data) };
            Source::Contiguous { data, mhandle, packing: Ticket::Done, place: Place::HOST }
        };
        self.outgoing.push_back(Outgoing { key, len });
        self.queued += len as u64;
        self.to_post.push_back(ToPost { source, len });
        self.post_sends(ctx, now)?;
        Ok(())
    }

    /// # Safety
    /// As [`Lane::submit`].
    unsafe fn device_source(&mut self, chunk: &Chunk, span: impl Fn(u16) -> Span, ctx: &mut Context<'_>) -> Result<Source> {
        if let ([part], false) = (&chunk.parts[..], ctx.stage_sends) {
            let part = *part;
            // SAFETY: the region stays mapped while transfers use it; registrations go before it does (forget_region).
            let send = &mut self.send;
            // SAFETY: the region stays mapped while transfers use it; registrations go before it does (forget_region).
            let mhandle = ctx.register(chunk.place, || unsafe { send.region(span(part.region), part.addr) })?;
            return Ok(Source::Contiguous { data: part.addr as *mut u8, mhandle, packing: Ticket::Done, place: chunk.place });
        }
        let place = chunk.place;
        if !self.device_out.contains_key(&place) {
            let stride = ctx.chunk_bytes.next_multiple_of(PAGE);
            let (memory, places, kind) = if ctx.stage_sends {
                (ctx.copier()?.host_staging(stride * STAGED_WINDOW, place)?, STAGED_WINDOW, NCCL_PTR_HOST)
            } else {
                (ctx.copier()?.staging(stride * MAX_REQUESTS, place)?, MAX_REQUESTS, NCCL_PTR_CUDA)
            };
            let send = &self.send;
            let staging = Staging::new(memory, stride, places, |p, n| {
                // SAFETY: the staging memory is dropped after the comm (field order).
                ctx.register(place, || unsafe { send.register(p.cast(), n, kind) })
            })?;
            self.device_out.insert(place, staging);
        }
        let Some(staging) = self.device_out.get_mut(&place) else { bail!(Internal, "no staging") };
        let (data, mhandle) = (staging.next(), staging.mhandle());
        // SAFETY: the chunk is at most a stride long; parts are registered device memory by the caller's contract.
        let packing = unsafe { ctx.copier()?.pack(&chunk.parts, data, place) }?;
        Ok(Source::Contiguous { data, mhandle, packing, place: if ctx.stage_sends { Place::HOST } else { place } })
    }

    /// Drops the plugin's registrations of a region that no transfer uses any more.
    pub(crate) fn forget_region(&mut self, id: u64) {
        self.send.forget_region(id);
    }

    fn host_out(&mut self, ctx: &Context<'_>) -> Result<&mut Staging> {
        if self.host_out.is_none() {
            let stride = ctx.chunk_bytes.next_multiple_of(PAGE);
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

    /// Hands announced chunks to the plugin, in order, as far as they are packed and it takes them.
    fn post_sends(&mut self, ctx: &mut Context<'_>, now: Instant) -> Result<bool> {
        let mut any = false;
        while let Some(next) = self.to_post.front() {
            let taken = match &next.source {
                // SAFETY: the source's memory is kept by the contract of `submit`.
                Source::Vectored(iov) => unsafe { self.send.send_vectored(iov, next.len) }?,
                Source::Contiguous { data, mhandle, packing, place } => {
                    if *packing != Ticket::Done && !ctx.copier()?.poll(*packing)? {
                        break;
                    }
                    let send = &mut self.send;
                    // SAFETY: as above, or it is a place of the staging ring.
                    ctx.within(*place, &mut || unsafe { send.send(data.cast(), next.len, *mhandle) })?
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

    pub(super) fn progress_sends(&mut self, ctx: &mut Context<'_>, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let mut done = 0;
        let mut any = false;
        while self.send.inflight() > 0 && self.send.test_oldest()? {
            let Some(sent) = self.outgoing.pop_front() else { bail!(Internal, "a send without a chunk") };
            done += sent.len as u64;
            events.push(Event::Sent(sent.key, sent.len as u64));
        }
        if done > 0 {
            self.queued -= done;
            self.rate.done(done, now, self.send.inflight() > 0);
            any = true;
        }
        if !self.to_post.is_empty() {
            any |= self.post_sends(ctx, now)?;
        }
        Ok(any)
    }
}
