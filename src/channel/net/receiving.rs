//! The receiving half of a channel: posting receives, unpacking arrived chunks, consuming them in order. Knows nothing of the
//! control connection.

use super::copying::{device, iov, register, within, Copying, Counts};
use super::staging::{Staging, STAGED_WINDOW};
use super::usage::{DeviceMode, Usage, Used};
use crate::channel::device::{spread, View};
use crate::channel::memory::{HostBlock, PAGE};
use crate::channel::path::{Arrival, Copier, Dest};
use crate::direct::Event;
use crate::net::comm::{Done, RecvComm};
use crate::status::{bail, Result};
use crate::types::Place;
use nccl_net_abi::{ucclIoVec, MAX_REQUESTS, NCCL_PTR_CUDA, NCCL_PTR_HOST};
use std::collections::VecDeque;

/// A posted receive.
pub(super) struct Posted {
    arrival: Arrival,
    /// The staging buffer in which it arrives, if the plugin writes to the posted address and that is not the destination.
    staged: Option<*mut u8>,
}

/// A chunk that has arrived and is not yet in place.
struct Finishing {
    arrival: Arrival,
    copying: Copying,
}

/// The receive comm and the chunks that it expects.
pub(super) struct Receiving {
    // Field order is drop order, as in the sending half.
    pub comm: RecvComm,
    expected: VecDeque<Arrival>,
    pub posted: VecDeque<Posted>,
    finishing: VecDeque<Finishing>,
    view: Option<View>,
    host_in: Option<Staging>,
    /// Of a plugin with bounce buffers, one small buffer: the plugin never writes to it.
    device_in: Option<Staging>,
    discard: Option<HostBlock>,
    pub counts: Counts,
}

impl Receiving {
    pub(super) fn new(comm: RecvComm) -> Receiving {
        Receiving {
            comm,
            expected: VecDeque::new(),
            posted: VecDeque::new(),
            finishing: VecDeque::new(),
            view: None,
            host_in: None,
            device_in: None,
            discard: None,
            counts: Counts::default(),
        }
    }

    /// Takes a chunk that the peer announced.
    pub(super) fn expect(&mut self, arrival: Arrival) {
        self.expected.push_back(arrival);
    }

    /// Chunks that were announced and are not in place.
    pub(super) fn under_way(&self) -> usize {
        self.expected.len() + self.posted.len() + self.finishing.len()
    }

    /// Drops the registrations while their comm is open. Only while nothing is in flight.
    pub(super) fn drop_staging(&mut self) {
        (self.host_in, self.device_in) = (None, None);
    }

    /// Closes the comm. What it may write, with the regions of its chunks, stays in use until the close has ended. Nothing else may
    /// follow.
    pub(super) fn close(&mut self) {
        let chunks = (std::mem::take(&mut self.posted), std::mem::take(&mut self.finishing));
        let used = (chunks, self.host_in.take(), self.device_in.take(), self.discard.take());
        // SAFETY: memory that these values own or hold in use.
        self.comm.close(unsafe { Used::new(used) });
    }

    /// Whether no copy out of the bounce buffer is running.
    pub(super) fn is_quiet(&mut self, copier: &mut Copier) -> Result<bool> {
        for chunk in &mut self.finishing {
            if !chunk.copying.over(copier, &mut self.counts.copying)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// `channel`: its number.
    pub(super) fn progress(&mut self, channel: u16, copier: &mut Copier, usage: &Usage, events: &mut Vec<Event>) -> Result<bool> {
        let mut any = self.post_receives(copier, usage)?;
        while let Some(done) = self.comm.test_oldest()? {
            // The chunk leaves the queue only when its copy has been submitted. After an earlier failure its memory stays in use
            // until the channel is closed.
            let copying = self.put_in_place(done, copier)?;
            let Some(Posted { arrival, .. }) = self.posted.pop_front() else { bail!(Internal, "a receive without a chunk") };
            self.finishing.push_back(Finishing { arrival, copying });
            any = true;
        }
        while let Some(first) = self.finishing.front_mut() {
            if !first.copying.over(copier, &mut self.counts.copying)? {
                break;
            }
            self.comm.consume_oldest()?;
            self.counts.chunks += 1;
            self.counts.bytes += first.arrival.len as u64;
            events.push(Event::Received(channel, first.arrival.key, first.arrival.len as u64));
            self.finishing.pop_front();
            any = true;
        }
        if any {
            self.post_receives(copier, usage)?;
        }
        Ok(any)
    }

    /// Starts to copy the oldest receive, which is done, to its destination.
    fn put_in_place(&mut self, done: Done, copier: &mut Copier) -> Result<Copying> {
        let view = match self.posted.front() {
            Some(Posted { arrival: Arrival { dest: Dest::Memory { place, .. }, .. }, staged: None }) if place.is_device() => {
                Some(self.view(copier, *place)?)
            }
            _ => None,
        };
        let Some(Posted { arrival, staged }) = self.posted.front() else { bail!(Internal, "a receive without a chunk") };
        if done.len.is_some_and(|len| len != arrival.len) {
            bail!(Protocol, "a chunk was announced with {} bytes and arrived with {}", arrival.len, done.len.unwrap_or(0));
        }
        match (&arrival.dest, view, staged) {
            (Dest::Memory { place, parts, .. }, Some(view), _) => {
                // SAFETY: the receive is done and not consumed; the arrival holds the parts' regions.
                let unpack = || unsafe { device(copier)?.unpack(&view, done.slot, arrival.len, parts, *place) };
                let copying = Copying::begin(unpack)?;
                self.counts.copied += 1;
                Ok(copying)
            }
            (Dest::Memory { place, parts, .. }, None, Some(staged)) if place.is_device() => {
                // SAFETY: the staging buffer holds the message; the arrival holds the parts' regions.
                let scatter = || unsafe { device(copier)?.scatter(*staged, parts, *place) };
                let copying = Copying::begin(scatter)?;
                self.counts.copied += 1;
                Ok(copying)
            }
            (Dest::Memory { parts, .. }, None, Some(staged)) => {
                // SAFETY: the staging buffer holds the message; the arrival holds the parts' regions.
                unsafe { spread(*staged, parts) };
                Ok(Copying::none())
            }
            _ => Ok(Copying::none()),
        }
    }

    fn post_receives(&mut self, copier: &mut Copier, usage: &Usage) -> Result<bool> {
        let mut any = false;
        let window = if usage.device == DeviceMode::GpuStaging { STAGED_WINDOW } else { MAX_REQUESTS };
        while self.comm.inflight() < window {
            let Some(next) = self.expected.pop_front() else { break };
            let (taken, staged) = self.post_receive(&next, copier, usage)?;
            if !taken {
                self.expected.push_front(next);
                break;
            }
            self.posted.push_back(Posted { arrival: next, staged });
            any = true;
        }
        Ok(any)
    }

    fn post_receive(&mut self, next: &Arrival, copier: &mut Copier, usage: &Usage) -> Result<(bool, Option<*mut u8>)> {
        match &next.dest {
            Dest::Memory { place, .. } if place.is_device() => self.post_device(next, *place, copier, usage),
            Dest::Memory { parts, .. } if usage.vectored => {
                // SAFETY: the arrival holds the parts' regions until the chunk is in place or the channel is closed.
                Ok((unsafe { self.comm.recv_vectored(&iov(parts), next.len, next.tag) }?, None))
            }
            Dest::Discard if usage.vectored => {
                let discard = match &self.discard {
                    Some(discard) => discard,
                    None => self.discard.insert(HostBlock::new(usage.chunk_bytes)?),
                };
                let iov = [ucclIoVec { base: discard.as_ptr().cast(), len: next.len }];
                // SAFETY: the discard block holds a chunk and outlives the comm, and its content is never read.
                Ok((unsafe { self.comm.recv_vectored(&iov, next.len, next.tag) }?, None))
            }
            _ if usage.host => self.post_staged(next, usage),
            Dest::Memory { .. } => bail!(Internal, "host memory on a channel for device memory only"),
            // Discarded chunks are received for the comm's own GPU.
            Dest::Discard => {
                let place = usage.gpus.map_or(Place::gpu(0), |(here, _)| here);
                self.post_device(next, place, copier, usage)
            }
        }
    }

    /// Posts a receive of host memory that is not vectored: the chunk arrives in staging memory.
    fn post_staged(&mut self, next: &Arrival, usage: &Usage) -> Result<(bool, Option<*mut u8>)> {
        if self.host_in.is_none() {
            let recv = &self.comm;
            // SAFETY: the registration keeps the staging memory, and is dropped after the comm (field order).
            let register = |p: *mut u8, n, keep| unsafe { recv.register(p.cast(), n, NCCL_PTR_HOST, keep) };
            let block = Box::new(HostBlock::new(Staging::bytes(usage.chunk_bytes, MAX_REQUESTS))?);
            self.host_in = Some(Staging::new(block, usage.chunk_bytes, MAX_REQUESTS, register)?);
        }
        let Some(staging) = &mut self.host_in else { bail!(Internal, "no staging") };
        let data = staging.next();
        // SAFETY: the staging buffer holds a chunk and outlives the comm.
        let taken = unsafe { self.comm.recv(data.cast(), next.len, next.tag, staging.mhandle()) }?;
        if !taken {
            staging.undo();
        }
        Ok((taken, Some(data)))
    }

    /// Posts a receive of device memory. A plugin with bounce buffers leaves the data there, others in a staging buffer.
    fn post_device(
        &mut self,
        next: &Arrival,
        place: Place,
        copier: &mut Copier,
        usage: &Usage,
    ) -> Result<(bool, Option<*mut u8>)> {
        let staging = self.device_in(place, copier, usage)?;
        let (data, mhandle) = (staging.next(), staging.mhandle());
        let recv = &mut self.comm;
        // SAFETY: the staging buffer holds a chunk and outlives the comm; a plugin with bounce buffers does not touch it.
        let taken = within(copier, place, &mut || unsafe { recv.recv(data.cast(), next.len, next.tag, mhandle) })?;
        match &mut self.device_in {
            Some(staging) if !taken => staging.undo(),
            _ => {}
        }
        Ok((taken, (usage.device == DeviceMode::GpuStaging).then_some(data)))
    }

    /// The staging buffers for receives of device memory.
    pub(super) fn device_in(&mut self, place: Place, copier: &mut Copier, usage: &Usage) -> Result<&mut Staging> {
        if self.device_in.is_none() {
            let (chunk, places) = match usage.device {
                DeviceMode::GpuStaging => (usage.chunk_bytes, STAGED_WINDOW),
                DeviceMode::HostStaging | DeviceMode::Packed | DeviceMode::Regions => (PAGE, 1),
            };
            let memory = device(copier)?.staging(Staging::bytes(chunk, places), place)?;
            let recv = &self.comm;
            let staging = Staging::new(memory, chunk, places, |p, n, keep| {
                // SAFETY: the registration keeps the staging memory, and is dropped after the comm (field order).
                register(copier, place, || unsafe { recv.register(p.cast(), n, NCCL_PTR_CUDA, keep) })
            })?;
            self.device_in = Some(staging);
        }
        match &mut self.device_in {
            Some(staging) => Ok(staging),
            None => bail!(Internal, "no staging"),
        }
    }

    pub(super) fn view(&mut self, copier: &mut Copier, place: Place) -> Result<View> {
        if let Some(view) = self.view {
            return Ok(view);
        }
        let handle = self.comm.device_handle()?;
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
        let view = unsafe { device(copier)?.view(handle.handle, place) }?;
        self.view = Some(view);
        Ok(view)
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.close();
    }
}
