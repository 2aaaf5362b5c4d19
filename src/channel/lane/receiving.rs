//! The receiving half of a channel: posting receives, unpacking what arrived, consuming in order.

use super::staging::Staging;
use super::{iov, Context, Dest, Event, Expected, Finishing, Lane, Posted};
use crate::channel::device::{spread, Ticket, View};
use crate::channel::memory::{HostBlock, PAGE};
use crate::net::comm::MHandle;
use crate::status::{bail, Result};
use crate::types::Place;
use nccl_net_abi::{ucclIoVec, MAX_REQUESTS, NCCL_PTR_CUDA, NCCL_PTR_HOST};

impl Lane {
    pub(super) fn progress_receives(&mut self, ctx: &mut Context<'_>, events: &mut Vec<Event>) -> Result<bool> {
        let mut any = self.post_receives(ctx)?;
        while let Some(received) = self.recv.test_oldest()? {
            let slot = received.slot;
            let Some(posted) = self.posted.pop_front() else { bail!(Internal, "a receive without a chunk") };
            let ticket = match &posted.dest {
                Dest::Device(place, parts) => {
                    let view = self.view(ctx, *place)?;
                    // SAFETY: the receive is done and not consumed; the parts' region is in use by the transfer.
                    unsafe { ctx.copier()?.unpack(&view, slot, posted.len, parts, *place) }?
                }
                Dest::Host(parts) => {
                    if let Some(staged) = posted.staged {
                        // SAFETY: the staging place holds the message; the parts' region is in use by the transfer.
                        unsafe { spread(staged, parts) };
                    }
                    Ticket::Done
                }
                Dest::Discard => Ticket::Done,
            };
            self.finishing.push_back(Finishing { key: posted.key, len: posted.len, ticket });
            any = true;
        }
        while let Some(first) = self.finishing.front() {
            if first.ticket != Ticket::Done && !ctx.copier()?.poll(first.ticket)? {
                break;
            }
            self.recv.consume_oldest()?;
            events.push(Event::Received(first.key, first.len as u64));
            self.finishing.pop_front();
            any = true;
        }
        if any {
            self.post_receives(ctx)?;
        }
        Ok(any)
    }

    fn post_receives(&mut self, ctx: &mut Context<'_>) -> Result<bool> {
        let mut any = false;
        while self.recv.window_free() > 0 {
            let Some(next) = self.expected.pop_front() else { break };
            let (taken, staged) = self.post_receive(&next, ctx)?;
            if !taken {
                self.expected.push_front(next);
                break;
            }
            self.posted.push_back(Posted { key: next.key, len: next.len, dest: next.dest, staged });
            any = true;
        }
        Ok(any)
    }

    fn post_receive(&mut self, next: &Expected, ctx: &mut Context<'_>) -> Result<(bool, Option<*mut u8>)> {
        match &next.dest {
            Dest::Host(parts) if ctx.vectored => {
                // SAFETY: the parts' region is in use by the transfer until its last chunk is received or the lane is closed.
                Ok((unsafe { self.recv.recv_vectored(&iov(parts), next.len) }?, None))
            }
            Dest::Discard if ctx.vectored => {
                let discard = match &self.discard {
                    Some(discard) => discard,
                    None => self.discard.insert(HostBlock::new(ctx.chunk_bytes)?),
                };
                let iov = [ucclIoVec { base: discard.as_ptr().cast(), len: next.len }];
                // SAFETY: the discard block holds a chunk and outlives the comm; nobody reads it.
                Ok((unsafe { self.recv.recv_vectored(&iov, next.len) }?, None))
            }
            Dest::Host(_) | Dest::Discard if ctx.host => {
                if self.host_in.is_none() {
                    let stride = ctx.chunk_bytes.next_multiple_of(PAGE);
                    let recv = &self.recv;
                    // SAFETY: the staging memory is dropped after the comm (field order).
                    let register = |p: *mut u8, n| unsafe { recv.register(p.cast(), n, NCCL_PTR_HOST) };
                    self.host_in =
                        Some(Staging::new(Box::new(HostBlock::new(stride * MAX_REQUESTS)?), stride, MAX_REQUESTS, register)?);
                }
                let Some(staging) = &mut self.host_in else { bail!(Internal, "no staging") };
                let data = staging.next();
                // SAFETY: the staging place holds a chunk and outlives the comm.
                let taken = unsafe { self.recv.recv(data.cast(), next.len, staging.mhandle()) }?;
                if !taken {
                    staging.undo();
                }
                Ok((taken, Some(data)))
            }
            Dest::Host(_) => bail!(Internal, "host memory on a channel that carries device memory only"),
            Dest::Device(..) | Dest::Discard => {
                // What is discarded needs some GPU all the same; channels without host memory have one.
                let place = if let Dest::Device(place, _) = next.dest { place } else { Place::gpu(0) };
                let (data, mhandle) = self.device_in(place, ctx)?;
                let recv = &mut self.recv;
                // SAFETY: for a CUDA mhandle the destination is not touched; it is the small block's own address.
                Ok((ctx.within(place, &mut || unsafe { recv.recv(data.cast(), next.len, mhandle) })?, None))
            }
        }
    }

    /// The mhandle that marks a receive as one of device memory; its memory is never written.
    fn device_in(&mut self, place: Place, ctx: &mut Context<'_>) -> Result<(*mut u8, MHandle)> {
        if let Some((registration, block)) = &self.device_in {
            return Ok((block.ptr(), registration.mhandle()));
        }
        let block = ctx.copier()?.staging(PAGE, place)?;
        let (data, recv) = (block.ptr(), &self.recv);
        // SAFETY: the block is dropped after the comm (field order).
        let registration = ctx.register(place, || unsafe { recv.register(data.cast(), PAGE, NCCL_PTR_CUDA) })?;
        let mhandle = registration.mhandle();
        self.device_in = Some((registration, block));
        Ok((data, mhandle))
    }

    fn view(&mut self, ctx: &mut Context<'_>, place: Place) -> Result<View> {
        if let Some(view) = self.view {
            return Ok(view);
        }
        let handle = self.recv.device_handle();
        if handle.netDeviceType != nccl_net_abi::NCCL_NET_DEVICE_UNPACK
            || handle.netDeviceVersion != nccl_net_abi::NCCL_NET_DEVICE_UNPACK_VERSION
        {
            bail!(
                Plugin,
                "device handle of type {} version {}, expected unpack version 7",
                handle.netDeviceType,
                handle.netDeviceVersion
            );
        }
        // SAFETY: the handle of a live comm.
        let view = unsafe { ctx.copier()?.view(handle.handle, place) }?;
        self.view = Some(view);
        Ok(view)
    }
}
