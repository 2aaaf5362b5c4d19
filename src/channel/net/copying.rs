//! What both halves of a channel need from a device: copies, and plugin calls with its GPU current. Knows nothing of comms.

use crate::channel::device::{DeviceCopier, Ticket};
use crate::channel::path::Copier;
use crate::status::{bail, Result};
use crate::types::{Part, Place};
use nccl_net_abi::ucclIoVec;
use std::time::{Duration, Instant};

/// The copier, for a chunk of device memory.
pub(super) fn device(copier: &mut Copier) -> Result<&mut dyn DeviceCopier> {
    match copier {
        Some(copier) => Ok(&mut **copier),
        None => bail!(Gpu, "a chunk of device memory on a connection without a device"),
    }
}

/// Runs a plugin call with the GPU of `place` current.
pub(super) fn within(copier: &mut Copier, place: Place, body: &mut dyn FnMut() -> Result<bool>) -> Result<bool> {
    if place.is_device() {
        device(copier)?.within(place, body)
    } else {
        body()
    }
}

/// Registers memory with the GPU of `place` current.
pub(super) fn register<R>(copier: &mut Copier, place: Place, register: impl FnOnce() -> Result<R>) -> Result<R> {
    let (mut register, mut registered) = (Some(register), None);
    within(copier, place, &mut || {
        registered = register.take().map(|register| register()).transpose()?;
        Ok(true)
    })?;
    registered.ok_or_else(|| crate::status::err!(Internal, "the registration was not attempted"))
}

/// A copy on the device, if the chunk needs one.
pub(super) struct Copying {
    ticket: Ticket,
    /// When it was submitted; `None` once its time is counted.
    since: Option<Instant>,
}

impl Copying {
    /// For a chunk that needs no copy.
    pub(super) fn none() -> Copying {
        Copying { ticket: Ticket::Done, since: None }
    }

    /// Submits a copy with `hand_over`.
    pub(super) fn begin(hand_over: impl FnOnce() -> Result<Ticket>) -> Result<Copying> {
        let since = Some(Instant::now());
        Ok(Copying { ticket: hand_over()?, since })
    }

    /// Whether it has finished; its time is then added to `spent`.
    pub(super) fn over(&mut self, copier: &mut Copier, spent: &mut Duration) -> Result<bool> {
        if self.ticket != Ticket::Done && !device(copier)?.poll(self.ticket)? {
            return Ok(false);
        }
        self.ticket = Ticket::Done;
        *spent += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        Ok(true)
    }
}

/// Counters of one half of a channel.
#[derive(Clone, Copy, Default)]
pub(super) struct Counts {
    pub bytes: u64,
    pub chunks: u64,
    /// Chunks that the device has copied, and how long it took.
    pub copied: u64,
    pub copying: Duration,
}

pub(super) fn iov(parts: &[Part]) -> Vec<ucclIoVec> {
    parts.iter().map(|p| ucclIoVec { base: p.addr as *mut _, len: p.len as usize }).collect()
}
