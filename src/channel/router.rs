//! The channels of a connection over all its paths: which path carries what, which channel takes the next chunk, and the device copier
//! that all of them share. Channels are numbered over the paths in order; both sides have the same paths in the same order.

use super::device::spread;
use super::path::{Arrival, Copier, Departure, Dest, Event, Path};
use super::plan::Chunk;
use super::stripe::{self, Load};
use crate::stats::ChannelStats;
use crate::status::{bail, Result};
use crate::types::Place;
use std::time::Instant;

/// Bytes that have passed the channels so far, counted in whole chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Handed to channels for sending.
    pub submitted: u64,
    /// Gone.
    pub sent: u64,
    /// In place, or drained.
    pub received: u64,
}

/// All channels of a connection.
pub(crate) struct Channels {
    // The paths close before the copier goes (field order).
    paths: Vec<Box<dyn Path>>,
    copier: Copier,
    loads: Vec<Load>,
    totals: Totals,
}

impl Channels {
    /// Channels over `paths`; of several that carry a pair of places the first is taken.
    pub(crate) fn new(paths: Vec<Box<dyn Path>>, copier: Copier) -> Channels {
        Channels { paths, copier, loads: Vec::new(), totals: Totals::default() }
    }

    /// Number of paths: each route is blocked on its own.
    pub(crate) fn routes(&self) -> usize {
        self.paths.len()
    }

    /// The path for memory of these places.
    pub(crate) fn route(&self, local: Place, peer: Place) -> Option<usize> {
        self.paths.iter().position(|p| p.carries(local, peer))
    }

    /// Channels of a route.
    pub(crate) fn width(&self, route: usize) -> usize {
        self.paths.get(route).map_or(0, |p| p.channels())
    }

    /// Number of channels.
    pub(crate) fn count(&self) -> usize {
        self.paths.iter().map(|p| p.channels()).sum()
    }

    /// The channel for the next chunk from `place` on a route; `None` when none should take one now.
    pub(crate) fn pick(&mut self, route: usize, place: Place, len: u64, bulk: bool, now: Instant) -> Option<u16> {
        let base: usize = self.paths.iter().take(route).map(|p| p.channels()).sum();
        self.loads.clear();
        self.paths.get(route)?.loads(place, bulk, now, &mut self.loads);
        stripe::pick(&self.loads, len).and_then(|channel| u16::try_from(base + channel).ok())
    }

    fn path(&mut self, channel: u16) -> Option<(&mut Box<dyn Path>, usize, &mut Copier)> {
        let mut index = usize::from(channel);
        for path in &mut self.paths {
            if index < path.channels() {
                return Some((path, index, &mut self.copier));
            }
            index -= path.channels();
        }
        None
    }

    /// Sends a chunk on a channel that [`Channels::pick`] named.
    pub(crate) fn submit(&mut self, channel: u16, departure: Departure, now: Instant) -> Result<()> {
        let len = departure.chunk.len as u64;
        let Some((path, index, copier)) = self.path(channel) else { bail!(Internal, "channel {channel} does not exist") };
        path.submit(index, departure, copier, now)?;
        self.totals.submitted += len;
        Ok(())
    }

    /// Expects a chunk that the peer announced. A channel that does not exist, or that cannot carry the chunk's destination, is the
    /// peer's fault.
    pub(crate) fn expect(&mut self, channel: u16, arrival: Arrival) -> Result<()> {
        let Some((path, index, _)) = self.path(channel) else { bail!(Protocol, "channel {channel} does not exist") };
        if let Dest::Memory { place, .. } = &arrival.dest {
            if !path.carries_local(*place) {
                bail!(Protocol, "channel {channel} does not carry memory of {place:?}");
            }
        }
        path.expect(index, arrival)
    }

    /// Advances all channels; gives what happened.
    pub(crate) fn progress(&mut self, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let mut any = false;
        for path in &mut self.paths {
            if path.busy() {
                any |= path.progress(&mut self.copier, now, events)?;
            }
        }
        self.flush()?;
        for event in events.iter() {
            match event {
                Event::Sent(_, len) => self.totals.sent += len,
                Event::Received(_, len) => self.totals.received += len,
            }
        }
        Ok(any)
    }

    /// Starts the copies that were handed over since the last flush.
    pub(crate) fn flush(&mut self) -> Result<()> {
        match &mut self.copier {
            Some(copier) => copier.flush(),
            None => Ok(()),
        }
    }

    /// Chunks are announced, in flight or expected.
    pub(crate) fn busy(&self) -> bool {
        self.paths.iter().any(|p| p.busy())
    }

    /// A device copies for this connection; nobody is woken when it ends.
    pub(crate) fn copies_pending(&self) -> bool {
        self.copier.as_ref().is_some_and(|c| c.busy())
    }

    /// Bytes in whole chunks.
    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    /// Bytes that the network took and brought, as finely as all plugins tell; else in whole chunks.
    ///
    /// # Errors
    /// When a channel has failed, idle or not.
    pub(crate) fn network_bytes(&self) -> Result<(u64, u64)> {
        let mut sum = Some((0, 0));
        for path in &self.paths {
            sum = sum.zip(path.network_bytes()?).map(|((a, b), (c, d))| (a + c, b + d));
        }
        Ok(sum.unwrap_or((self.totals.sent, self.totals.received)))
    }

    /// What each channel counts, in the order of their numbers; none after the end. `kernel`: with what the kernel knows.
    pub(crate) fn stats(&self, kernel: bool, now: Instant) -> Vec<ChannelStats> {
        let mut out = Vec::new();
        self.paths.iter().for_each(|path| path.stats(kernel, now, &mut out));
        out
    }

    /// What is under way and where, for an error text.
    pub(crate) fn describe_busy(&self) -> String {
        const MOST: usize = 4;
        let all: Vec<String> = self.paths.iter().flat_map(|p| p.describe_busy()).collect();
        let more = if all.len() > MOST { format!(" and {} more", all.len() - MOST) } else { String::new() };
        format!("{}{more}", all[..all.len().min(MOST)].join("; "))
    }

    /// Up to how many bytes a transfer should travel inside a control frame.
    pub(crate) fn inline_bytes(&self, device: bool) -> usize {
        match &self.copier {
            Some(copier) if device => copier.inline_bytes(),
            _ if device => 0,
            _ => usize::MAX,
        }
    }

    /// Appends the bytes of a small chunk to `out`.
    ///
    /// # Safety
    /// Its parts lie in registered regions that the caller holds.
    pub(crate) unsafe fn fetch(&mut self, chunk: &Chunk, out: &mut Vec<u8>) -> Result<()> {
        match &mut self.copier {
            // SAFETY: by the caller's contract.
            Some(copier) if chunk.place.is_device() => unsafe { copier.fetch(&chunk.parts, chunk.place, out) },
            _ if chunk.place.is_device() => bail!(Gpu, "device memory on a connection without a device"),
            _ => {
                for part in &chunk.parts {
                    // SAFETY: by the caller's contract.
                    out.extend_from_slice(unsafe { std::slice::from_raw_parts(part.addr as *const u8, part.len as usize) });
                }
                Ok(())
            }
        }
    }

    /// Puts the bytes of a small chunk in place.
    ///
    /// # Safety
    /// Its parts lie in registered regions that the caller holds.
    pub(crate) unsafe fn store(&mut self, chunk: &Chunk, bytes: &[u8]) -> Result<()> {
        if bytes.len() != chunk.len {
            bail!(Internal, "{} bytes for a chunk of {}", bytes.len(), chunk.len);
        }
        match &mut self.copier {
            // SAFETY: by the caller's contract.
            Some(copier) if chunk.place.is_device() => unsafe { copier.store(bytes, &chunk.parts, chunk.place) },
            _ if chunk.place.is_device() => bail!(Gpu, "device memory on a connection without a device"),
            _ => {
                // SAFETY: by the caller's contract; the parts hold chunk.len bytes.
                unsafe { spread(bytes.as_ptr(), &chunk.parts) };
                Ok(())
            }
        }
    }

    /// Drops registrations of a region that nothing uses any more.
    pub(crate) fn forget_region(&mut self, id: u64) {
        self.paths.iter_mut().for_each(|p| p.forget_region(id));
    }

    /// Ends all copies and closes all channels: afterwards nothing touches registered memory on this connection's behalf. Where a GPU
    /// does not end its copies, channels and regions stay as they are until the process ends.
    pub(crate) fn close(&mut self) {
        if let Some(Err(e)) = self.copier.as_mut().map(|copier| copier.quiesce()) {
            log::error!("channels of a connection stay open, and its regions in use: {e}");
            std::mem::forget((std::mem::take(&mut self.paths), self.copier.take()));
        }
        self.paths.clear();
        self.copier = None;
    }
}
