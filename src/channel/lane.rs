//! One channel: a send comm and a receive comm with their queues. Chunks leave in the order they were announced; receives are
//! posted in the order of the peer's announcements, unpacked, and consumed in that order.

mod receiving;
mod sending;
mod staging;

use super::device::{DeviceCopier, StagingMemory, Ticket, View};
use super::memory::HostBlock;
use super::stripe::{Load, Rate};
use crate::net::comm::{Doorbell, MHandle, RecvComm, SendComm};
use crate::net::registrations::Registration;
use crate::status::{bail, Result};
use crate::types::{Key, Part, Place};
use nccl_net_abi::{ucclIoVec, MAX_REQUESTS};
use staging::{Staging, STAGED_WINDOW};
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

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

    fn register<R>(&mut self, place: Place, mut register: impl FnMut() -> Result<R>) -> Result<R> {
        let mut registered = None;
        self.within(place, &mut || {
            registered = Some(register()?);
            Ok(true)
        })?;
        registered.ok_or_else(|| crate::status::err!(Internal, "nothing was registered"))
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
    device_in: Option<(Registration, Box<dyn StagingMemory>)>,
    discard: Option<HostBlock>,
}
// SAFETY: raw pointers inside point to memory that this lane or a live region owns; a lane is used by one thread at a time.
unsafe impl Send for Lane {}

impl Lane {
    pub(crate) fn new(send: SendComm, recv: RecvComm) -> Lane {
        Lane {
            send,
            recv,
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
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Registrations go while their comm is open, unless its requests may still use them: then they go after it.
        if !self.busy() {
            (self.host_out, self.host_in, self.device_in) = (None, None, None);
            self.device_out.clear();
        }
    }
}

fn iov(parts: &[Part]) -> Vec<ucclIoVec> {
    parts.iter().map(|p| ucclIoVec { base: p.addr as *mut _, len: p.len as usize }).collect()
}
