//! The sending half of a channel: where a chunk's bytes come from, and the order of sends. Knows nothing of transfers: a chunk
//! carries everything it needs.

use super::copying::{device, iov, register, within, Copying, Counts};
use super::staging::{Staging, STAGED_WINDOW};
use super::usage::{DeviceMode, Usage, Used};
use crate::channel::device::gather;
use crate::channel::memory::HostBlock;
use crate::channel::path::{Copier, Departure, Outbound};
use crate::channel::plan::Chunk;
use crate::channel::stripe::{Flow, Load, Rate};
use crate::direct::Event;
use crate::net::comm::{MHandle, SendComm};
use crate::region::Hold;
use crate::status::{bail, Result};
use crate::types::{Key, Place};
use nccl_net_abi::{ucclIoVec, MAX_REQUESTS, NCCL_PTR_CUDA, NCCL_PTR_HOST};
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Window slots that chunks of large transfers take at most, so that small ones soon find one.
const BULK_WINDOW: usize = MAX_REQUESTS / 2;
/// With this many bytes of large transfers in flight, a channel takes no more of them: a small transfer on it waits for all of
/// these bytes.
const BULK_BYTES: u64 = 2 << 20;

/// Packets that were sent again so often do not get through.
const IN_VAIN: u32 = 3;

/// How many of the `free` window slots the next chunk may use. `bulk`: the chunk is part of a large transfer, and so many chunks
/// and bytes of large transfers are in flight.
fn free(free: usize, bulk: Option<(usize, u64)>) -> usize {
    match bulk {
        None => free,
        Some((_, bytes)) if bytes >= BULK_BYTES => 0,
        // Slots of small transfers do not count against large ones, which would otherwise starve.
        Some((chunks, _)) => free.min(BULK_WINDOW.saturating_sub(chunks)),
    }
}

/// Window slots for chunks of device memory, and buffers of their ring.
fn places(usage: &Usage) -> usize {
    match usage.device {
        DeviceMode::Regions => MAX_REQUESTS,
        DeviceMode::HostStaging | DeviceMode::Packed | DeviceMode::GpuStaging => STAGED_WINDOW,
    }
}

/// A chunk being sent; dropped when its memory may change.
pub(super) struct Leaving {
    key: Key,
    len: usize,
    bulk: bool,
    _hold: Hold,
}

/// A chunk that was announced and that the plugin has not taken.
struct ToPost {
    source: Source,
    len: usize,
    tag: i32,
}

enum Source {
    Contiguous { data: *mut u8, mhandle: MHandle, packing: Copying, place: Place },
    Vectored(Vec<ucclIoVec>),
}

/// The send comm and the chunks that wait for it.
pub(super) struct Sending {
    // Field order is drop order: the comm closes before the memory that its requests may use.
    pub comm: SendComm,
    host_out: Option<Staging>,
    device_out: HashMap<Place, Staging>,
    pub outgoing: VecDeque<Leaving>,
    to_post: VecDeque<ToPost>,
    pub queued: u64,
    /// Chunks of large transfers in `outgoing`.
    bulk: usize,
    bulk_bytes: u64,
    pub rate: Rate,
    pub counts: Counts,
}

impl Sending {
    pub(super) fn new(comm: SendComm) -> Sending {
        Sending {
            comm,
            host_out: None,
            device_out: HashMap::new(),
            outgoing: VecDeque::new(),
            to_post: VecDeque::new(),
            queued: 0,
            bulk: 0,
            bulk_bytes: 0,
            rate: Rate::default(),
            counts: Counts::default(),
        }
    }

    /// Its load for a chunk from `place`; `nic`: the index of its NIC.
    pub(super) fn load(&self, place: Place, bulk: bool, usage: &Usage, nic: usize, now: Instant) -> Load {
        let oldest = self.oldest();
        let window = if place.is_device() { places(usage) } else { MAX_REQUESTS };
        let free = free(window.saturating_sub(self.outgoing.len()), bulk.then_some((self.bulk, self.bulk_bytes)));
        Load { free, queued: self.queued, rate: self.rate.get(oldest, now), nic }
    }

    /// Bytes of the chunk that has been in flight the longest.
    pub(super) fn oldest(&self) -> u64 {
        self.outgoing.front().map_or(0, |o| o.len as u64)
    }

    /// What the network has done with its bytes, as far as the plugin reports it; `None` if it cannot report now.
    pub(super) fn flow(&self) -> Option<Flow> {
        match self.comm.flow() {
            Some(flow) if flow.stale != 0 => None,
            Some(flow) => Some(Flow {
                acknowledged: flow.acknowledged,
                backlog: self.queued.saturating_sub(flow.begun.min(self.oldest())) + flow.waiting,
                in_flight: u64::from(flow.unanswered) * u64::from(flow.packet),
                busy: Duration::from_micros(flow.busy_us),
                limited: Duration::from_micros(flow.limited_us),
                round_trip: Duration::from_micros(flow.min_rtt_us.into()),
                tick: (flow.tick_us > 0).then(|| Duration::from_micros(flow.tick_us.into())),
            }),
            None => Some(Flow { acknowledged: self.counts.bytes, backlog: self.queued, ..Flow::default() }),
        }
    }

    /// What the network has. `acknowledged`: as the plugin reports it.
    pub(super) fn outbound(&self, acknowledged: Option<u64>) -> Outbound {
        let (Some(acknowledged), Some(flow)) = (acknowledged, self.comm.flow()) else {
            let due = if acknowledged.is_some() { self.comm.unanswered() } else { self.comm.inflight() > 0 };
            return Outbound { acknowledged: acknowledged.unwrap_or(self.counts.bytes), due, ..Outbound::default() };
        };
        // What set the connection up was small: where nothing of full size has passed since, the size may be the cause.
        let blocked = flow.unanswered > 0 && flow.retries >= IN_VAIN && flow.acknowledged < u64::from(flow.packet);
        Outbound {
            acknowledged,
            waiting: flow.waiting,
            due: flow.unanswered > 0,
            too_large: (blocked && flow.waiting >= u64::from(flow.packet)).then_some(flow.packet),
            control_silent: None,
        }
    }

    /// Drops the registrations while their comm is open. Only while nothing is in flight.
    pub(super) fn drop_staging(&mut self) {
        self.host_out = None;
        self.device_out.clear();
    }

    /// Takes a chunk to send, which the caller announces to the peer. There must be a free slot ([`Sending::load`]). The
    /// departure's hold keeps the memory registered, and so mapped, until the chunk is sent or the channel closed.
    pub(super) fn take(&mut self, departure: Departure, copier: &mut Copier, usage: &Usage, now: Instant) -> Result<()> {
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
        if let ([part], DeviceMode::Regions) = (&chunk.parts[..], usage.device) {
            let (span, send) = (hold.span_to_register(part.region)?, &mut self.comm);
            // SAFETY: the region stays mapped while it is held, and its registrations are dropped before it is (forget_region).
            let mhandle = register(copier, place, || unsafe { send.region(span, part.addr, || Box::new(hold.clone())) })?;
            return Ok(Source::Contiguous { data: part.addr as *mut u8, mhandle, packing: Copying::none(), place });
        }
        let staging = self.device_out(place, copier, usage)?;
        let (data, mhandle) = (staging.next(), staging.mhandle());
        // SAFETY: the chunk is at most a stride long; parts are registered device memory by the caller's contract.
        let packing = Copying::begin(|| unsafe { device(copier)?.pack(&chunk.parts, data, place) })?;
        self.counts.copied += 1;
        Ok(Source::Contiguous {
            data,
            mhandle,
            packing,
            place: if usage.device == DeviceMode::HostStaging { Place::HOST } else { place },
        })
    }

    /// The staging ring for memory of `place`.
    pub(super) fn device_out(&mut self, place: Place, copier: &mut Copier, usage: &Usage) -> Result<&mut Staging> {
        if !self.device_out.contains_key(&place) {
            let places = places(usage);
            let bytes = Staging::bytes(usage.chunk_bytes, places);
            let (memory, kind) = match usage.device {
                DeviceMode::HostStaging => (device(copier)?.host_staging(bytes, place)?, NCCL_PTR_HOST),
                DeviceMode::GpuStaging | DeviceMode::Packed | DeviceMode::Regions => {
                    (device(copier)?.staging(bytes, place)?, NCCL_PTR_CUDA)
                }
            };
            let send = &self.comm;
            let staging = Staging::new(memory, usage.chunk_bytes, places, |p, n, keep| {
                // SAFETY: the registration keeps the staging memory, and is dropped after the comm (field order).
                register(copier, place, || unsafe { send.register(p.cast(), n, kind, keep) })
            })?;
            self.device_out.insert(place, staging);
        }
        match self.device_out.get_mut(&place) {
            Some(staging) => Ok(staging),
            None => bail!(Internal, "no staging"),
        }
    }

    fn host_out(&mut self, usage: &Usage) -> Result<&mut Staging> {
        if self.host_out.is_none() {
            let send = &self.comm;
            // SAFETY: the registration keeps the staging memory, and is dropped after the comm (field order).
            let register = |p: *mut u8, n, keep| unsafe { send.register(p.cast(), n, NCCL_PTR_HOST, keep) };
            let block = Box::new(HostBlock::new(Staging::bytes(usage.chunk_bytes, MAX_REQUESTS))?);
            self.host_out = Some(Staging::new(block, usage.chunk_bytes, MAX_REQUESTS, register)?);
        }
        match &mut self.host_out {
            Some(staging) => Ok(staging),
            None => bail!(Internal, "no staging"),
        }
    }

    /// Posts announced chunks to the plugin in order, as long as they are packed and it accepts them.
    fn post_sends(&mut self, copier: &mut Copier, now: Instant) -> Result<bool> {
        let mut any = false;
        while let Some(next) = self.to_post.front_mut() {
            let taken = match &mut next.source {
                // SAFETY: the chunk's hold keeps the source's memory, or it is a buffer of the staging ring.
                Source::Vectored(iov) => unsafe { self.comm.send_vectored(iov, next.len, next.tag) }?,
                Source::Contiguous { data, mhandle, packing, place } => {
                    if !packing.over(copier, &mut self.counts.copying)? {
                        break;
                    }
                    let send = &mut self.comm;
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

    /// Closes the comm. What it may read, with the regions of its chunks, stays in use until the close has ended. Nothing else may
    /// follow.
    pub(super) fn close(&mut self) {
        let used = (std::mem::take(&mut self.outgoing), self.host_out.take(), std::mem::take(&mut self.device_out));
        // SAFETY: memory that these values own or hold in use.
        self.comm.close(unsafe { Used::new(used) });
    }

    /// Whether no copy into staging memory is running.
    pub(super) fn is_quiet(&mut self, copier: &mut Copier) -> Result<bool> {
        for next in &mut self.to_post {
            if let Source::Contiguous { packing, .. } = &mut next.source {
                if !packing.over(copier, &mut self.counts.copying)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// `channel`: its number.
    pub(super) fn progress(&mut self, channel: u16, copier: &mut Copier, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let mut done = 0;
        let mut any = false;
        while self.comm.inflight() > 0 && self.comm.test_oldest()? {
            let Some(sent) = self.outgoing.pop_front() else { bail!(Internal, "a send without a chunk") };
            done += sent.len as u64;
            self.bulk -= usize::from(sent.bulk);
            self.bulk_bytes -= if sent.bulk { sent.len as u64 } else { 0 };
            self.counts.chunks += 1;
            events.push(Event::Sent(channel, sent.key, sent.len as u64));
        }
        if done > 0 {
            self.queued -= done;
            self.counts.bytes += done;
            self.rate.done(done, now, self.comm.inflight() > 0);
            any = true;
        }
        if !self.to_post.is_empty() {
            any |= self.post_sends(copier, now)?;
        }
        Ok(any)
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks of large transfers that a channel takes one after the other, and the bytes that a small one then waits for.
    fn taken(len: u64) -> (usize, u64) {
        let mut chunks = 0;
        while free(MAX_REQUESTS - chunks, Some((chunks, chunks as u64 * len))) > 0 {
            chunks += 1;
        }
        (chunks, chunks as u64 * len)
    }

    #[test]
    fn large_transfers_leave_slots_and_bytes_to_small_ones() {
        // Bytes limit large chunks, slots limit smaller ones.
        assert_eq!(taken(512 << 10), (4, BULK_BYTES));
        assert_eq!(taken(1 << 20), (2, BULK_BYTES));
        assert_eq!(taken(4 << 20), (1, 4 << 20));
        assert_eq!(taken(64 << 10), (BULK_WINDOW, 512 << 10));
        // One byte less, and the next chunk need not wait.
        assert_eq!(free(5, Some((1, BULK_BYTES - 1))), 5);
        assert_eq!(free(5, Some((1, BULK_BYTES))), 0);
    }

    #[test]
    fn large_transfers_bound_themselves_alone() {
        for places in 0..=MAX_REQUESTS {
            assert_eq!(free(places, None), places);
            // Small ones in the window take only the slots that they have from the large ones' share.
            assert_eq!(free(places, Some((0, 0))), places.min(BULK_WINDOW));
            assert_eq!(free(places, Some((BULK_WINDOW, 1))), 0);
        }
    }
}
