//! One channel: a send comm and a receive comm with their queues. Chunks leave in the order they were announced; receives are
//! posted in the order of the peer's announcements, unpacked, and consumed in that order.

use super::device::{gather, spread, DeviceCopier, StagingMemory, Ticket, View};
use super::memory::{HostBlock, PAGE};
use super::plan::{Chunk, Part};
use super::stripe::{Load, Rate};
use crate::net::comm::{Doorbell, MHandle, RecvComm, SendComm, MAX_PIECE_BYTES};
use crate::status::{bail, Result};
use crate::wire::frame::Place;
use nccl_net_abi::{ucclIoVec, MAX_REQUESTS, NCCL_PTR_CUDA, NCCL_PTR_HOST};
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

/// Names a data stream of a connection: the transfer id and which side chose it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The initiator's transfer id.
    pub id: u64,
    /// This side is the initiator.
    pub mine: bool,
}

/// Extent of a registered region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// Id of the region.
    pub id: u64,
    /// First byte.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

/// What happened on a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A chunk left: its source may change.
    Sent(Key, u64),
    /// A chunk is in place.
    Received(Key, u64),
}

/// Where a chunk goes.
#[derive(Debug)]
pub(crate) enum Dest {
    /// Host memory.
    Host(Vec<Part>),
    /// Memory of a GPU.
    Device(Place, Vec<Part>),
    /// Nowhere: the transfer was refused or is unknown, but its data must be drained.
    Discard,
}

/// What a lane needs from its set to work.
pub(crate) struct Context<'a> {
    /// Copies device memory; absent where no device memory can be registered.
    pub copier: Option<&'a mut dyn DeviceCopier>,
    /// Host memory goes through the vectored extension.
    pub vectored: bool,
    /// The comms carry host memory (TCPX comms do not).
    pub host: bool,
    /// Device memory leaves through host memory that the GPU fills, not through the plugin's device sends.
    pub stage_sends: bool,
    /// Largest chunk, bytes.
    pub chunk_bytes: usize,
}

impl Context<'_> {
    fn copier(&mut self) -> Result<&mut dyn DeviceCopier> {
        match &mut self.copier {
            Some(copier) => Ok(&mut **copier),
            None => bail!(Gpu, "a chunk of device memory on a connection without a device"),
        }
    }

    /// Runs a plugin call with the GPU of `place` current.
    fn within(&mut self, place: Place, body: &mut dyn FnMut() -> Result<bool>) -> Result<bool> {
        if place.is_device() {
            self.copier()?.within(place, body)
        } else {
            body()
        }
    }

    fn register(&mut self, place: Place, register: impl Fn() -> Result<MHandle>) -> Result<MHandle> {
        let mut mhandle = std::ptr::null_mut();
        self.within(place, &mut || {
            mhandle = register()?;
            Ok(true)
        })?;
        Ok(mhandle)
    }
}

/// Chunks of device memory in flight on a channel when they leave through host memory: enough to keep copies and socket busy, few enough
/// for the memory of all channels to stay in the processor's cache.
const STAGED_WINDOW: usize = 8;

/// A ring of staging buffers, registered with the plugin. Messages use the places in turn; since no more are in flight than there are
/// places, and they complete in order, a place is free again when its turn comes.
struct Staging {
    memory: Box<dyn StagingMemory>,
    mhandle: MHandle,
    stride: usize,
    places: usize,
    turn: usize,
}

impl Staging {
    fn new(
        memory: Box<dyn StagingMemory>,
        stride: usize,
        places: usize,
        register: impl FnOnce(*mut u8, usize) -> Result<MHandle>,
    ) -> Result<Staging> {
        let mhandle = register(memory.ptr(), stride * places)?;
        Ok(Staging { memory, mhandle, stride, places, turn: 0 })
    }
    fn next(&mut self) -> *mut u8 {
        let place = self.turn % self.places;
        self.turn += 1;
        // SAFETY: place * stride is inside the block of so many strides.
        unsafe { self.memory.ptr().add(place * self.stride) }
    }
}

struct Outgoing {
    key: Key,
    len: usize,
}

/// A chunk announced and not yet taken by the plugin.
struct ToPost {
    source: Source,
    len: usize,
}

enum Source {
    Contiguous { data: *mut u8, mhandle: MHandle, packing: Ticket, place: Place },
    Vectored(Vec<ucclIoVec>),
}

struct Expected {
    key: Key,
    len: usize,
    dest: Dest,
}

struct Posted {
    key: Key,
    len: usize,
    dest: Dest,
    /// Staging place of a host receive without the extension.
    staged: Option<*mut u8>,
}

struct Finishing {
    key: Key,
    len: usize,
    ticket: Ticket,
}

/// Announcements of one channel that may wait for a place of the window.
const MAX_EXPECTED: usize = 1 << 16;

/// One channel.
pub(crate) struct Lane {
    // Field order is drop order: the comms close first, and with them the last access to everything below.
    send: SendComm,
    recv: RecvComm,
    registered: HashMap<(u64, u64), MHandle>,
    outgoing: VecDeque<Outgoing>,
    to_post: VecDeque<ToPost>,
    queued: u64,
    rate: Rate,
    expected: VecDeque<Expected>,
    posted: VecDeque<Posted>,
    finishing: VecDeque<Finishing>,
    view: Option<View>,
    host_out: Option<Staging>,
    device_out: HashMap<Place, Staging>,
    host_in: Option<Staging>,
    device_in: Option<(Box<dyn StagingMemory>, MHandle)>,
    discard: Option<HostBlock>,
}
// SAFETY: raw pointers inside point to memory that this lane or a live region owns; a lane is used by one thread at a time.
unsafe impl Send for Lane {}

impl Lane {
    pub(crate) fn new(send: SendComm, recv: RecvComm) -> Lane {
        Lane {
            send,
            recv,
            registered: HashMap::new(),
            outgoing: VecDeque::new(),
            to_post: VecDeque::new(),
            queued: 0,
            rate: Rate::default(),
            expected: VecDeque::new(),
            posted: VecDeque::new(),
            finishing: VecDeque::new(),
            view: None,
            host_out: None,
            device_out: HashMap::new(),
            host_in: None,
            device_in: None,
            discard: None,
        }
    }

    /// Asks for a doorbell; `false` when the plugin has none and must be polled.
    pub(crate) fn set_doorbell(&self, doorbell: &Doorbell) -> Result<bool> {
        Ok(self.send.set_doorbell(doorbell)? && self.recv.set_doorbell(doorbell)?)
    }

    /// Anything announced, in flight or expected.
    pub(crate) fn busy(&self) -> bool {
        !self.outgoing.is_empty() || !self.expected.is_empty() || !self.posted.is_empty() || !self.finishing.is_empty()
    }

    /// For a chunk from `place`.
    pub(crate) fn load(&self, place: Place, stage_sends: bool, now: Instant) -> Load {
        let oldest = self.outgoing.front().map_or(0, |o| o.len as u64);
        let window = if place.is_device() && stage_sends { STAGED_WINDOW } else { MAX_REQUESTS };
        Load { free: window.saturating_sub(self.outgoing.len()), queued: self.queued, rate: self.rate.get(oldest, now) }
    }

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
            let (data, mhandle) = (staging.next(), staging.mhandle);
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
            let mhandle = unsafe { self.region_mhandle(span(part.region), part, chunk.place, ctx) }?;
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
        let (data, mhandle) = (staging.next(), staging.mhandle);
        // SAFETY: the chunk is at most a stride long; parts are registered device memory by the caller's contract.
        let packing = unsafe { ctx.copier()?.pack(&chunk.parts, data, place) }?;
        Ok(Source::Contiguous { data, mhandle, packing, place: if ctx.stage_sends { Place::HOST } else { place } })
    }

    /// The registration that covers `part`: regions are registered in overlapping pieces of the enclosing pages, since plugins address
    /// by 31-bit offsets and ask for page alignment.
    ///
    /// # Safety
    /// The region is mapped and stays so until `forget_region` or the lane's end.
    unsafe fn region_mhandle(&mut self, span: Span, part: Part, place: Place, ctx: &mut Context<'_>) -> Result<MHandle> {
        const PIECE: u64 = MAX_PIECE_BYTES as u64;
        const OVERLAP: u64 = crate::config::MAX_CHUNK_BYTES as u64;
        let first_page = span.addr & !(PAGE as u64 - 1);
        let end = (span.addr + span.len).next_multiple_of(PAGE as u64);
        let piece = (part.addr - first_page) / PIECE;
        if let Some(&mhandle) = self.registered.get(&(span.id, piece)) {
            return Ok(mhandle);
        }
        let start = first_page + piece * PIECE;
        let len = (PIECE + OVERLAP).min(end - start);
        let send = &self.send;
        // SAFETY: by the caller's contract; whole pages of a mapping are mapped.
        let mhandle = ctx.register(place, || unsafe { send.register(start as *mut _, len as usize, NCCL_PTR_CUDA) })?;
        self.registered.insert((span.id, piece), mhandle);
        Ok(mhandle)
    }

    /// Drops the plugin's registrations of a region that no transfer uses any more.
    pub(crate) fn forget_region(&mut self, id: u64) {
        let send = &self.send;
        self.registered.retain(|&(region, _), &mut mhandle| {
            if region == id {
                // SAFETY: registered by this comm, and no request uses it: its transfers have ended.
                unsafe { send.deregister(mhandle) };
            }
            region != id
        });
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

    /// The peer announced a chunk on this channel.
    pub(crate) fn expect(&mut self, key: Key, len: usize, dest: Dest) -> Result<()> {
        if self.expected.len() >= MAX_EXPECTED {
            bail!(Protocol, "the peer announced {MAX_EXPECTED} chunks on one channel without sending them");
        }
        self.expected.push_back(Expected { key, len, dest });
        Ok(())
    }

    /// Advances everything that can advance. Returns whether something did.
    pub(crate) fn progress(&mut self, ctx: &mut Context<'_>, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let mut any = false;
        if !self.outgoing.is_empty() {
            any |= self.progress_sends(ctx, now, events)?;
        }
        if !self.expected.is_empty() || !self.posted.is_empty() || !self.finishing.is_empty() {
            any |= self.progress_receives(ctx, events)?;
        }
        Ok(any)
    }

    fn progress_sends(&mut self, ctx: &mut Context<'_>, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
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

    fn progress_receives(&mut self, ctx: &mut Context<'_>, events: &mut Vec<Event>) -> Result<bool> {
        let mut any = self.post_receives(ctx)?;
        while let Some(slot) = self.recv.test_oldest()? {
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
                let taken = unsafe { self.recv.recv(data.cast(), next.len, staging.mhandle) }?;
                if !taken {
                    staging.turn -= 1;
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
        if let Some((block, mhandle)) = &self.device_in {
            return Ok((block.ptr(), *mhandle));
        }
        let block = ctx.copier()?.staging(PAGE, place)?;
        let (data, recv) = (block.ptr(), &self.recv);
        // SAFETY: the block is dropped after the comm (field order).
        let mhandle = ctx.register(place, || unsafe { recv.register(data.cast(), PAGE, NCCL_PTR_CUDA) })?;
        self.device_in = Some((block, mhandle));
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

impl Drop for Lane {
    fn drop(&mut self) {
        // Registrations go back while their comm lives. Requests of a failed connection may still use them inside a plugin that is
        // not ours; there they stay with the comm.
        if self.busy() && !self.send.plugin_is_soft() {
            return;
        }
        let staged = self.device_out.values().chain(&self.host_out).map(|s| s.mhandle);
        for mhandle in self.registered.values().copied().chain(staged) {
            // SAFETY: registered by this comm once; no request of it runs, or the software plugin, whose requests do not use it.
            unsafe { self.send.deregister(mhandle) };
        }
        let received = self.host_in.iter().map(|s| s.mhandle).chain(self.device_in.iter().map(|(_, m)| *m));
        for mhandle in received {
            // SAFETY: as above.
            unsafe { self.recv.deregister(mhandle) };
        }
    }
}

fn iov(parts: &[Part]) -> Vec<ucclIoVec> {
    parts.iter().map(|p| ucclIoVec { base: p.addr as *mut _, len: p.len as usize }).collect()
}
