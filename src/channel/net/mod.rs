//! The path over the comms of a network plugin: a window of chunks on each channel. Knows comms and device copiers, nothing of transfers.

mod channel;
mod receiving;
mod sending;
mod staging;

pub(crate) use channel::Channel;

use super::path::{Arrival, ChunkLimits, Copier, Departure, Event, Path};
use super::plan::{chunk_len, MAX_CROSSED, MAX_PARTS};
use super::stripe::Load;
use crate::stats::ChannelStats;
use crate::status::{bail, Result};
use crate::types::Place;
use std::time::Instant;

/// How the channels of a path are used: what their plugin can do, and what both sides agreed on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Host memory goes through the vectored extension.
    pub vectored: bool,
    /// The comms carry host memory.
    pub host: bool,
    /// Device memory leaves through host memory that the GPU fills, not through the plugin's device sends.
    pub stage_sends: bool,
    /// The GPU whose memory the comms receive into, here and at the peer; `None` where they take any.
    pub gpus: Option<(Place, Place)>,
    /// Largest chunk, bytes.
    pub chunk_bytes: usize,
}

/// Channels over one plugin.
pub(crate) struct NetPath {
    channels: Vec<Channel>,
    usage: Usage,
}

impl NetPath {
    pub(crate) fn new(channels: Vec<Channel>, usage: Usage) -> NetPath {
        NetPath { channels, usage }
    }
}

impl Path for NetPath {
    fn channels(&self) -> usize {
        self.channels.len()
    }

    fn limits(&self) -> ChunkLimits {
        ChunkLimits { bytes: self.usage.chunk_bytes, pieces: MAX_PARTS, crossed: MAX_CROSSED }
    }

    fn chunk_len(&self, total: u64) -> usize {
        chunk_len(total, self.channels.len(), self.usage.chunk_bytes)
    }

    fn carries(&self, local: Place, peer: Place) -> bool {
        match self.usage.gpus {
            Some((here, there)) => local == here && peer == there && !self.channels.is_empty(),
            None => (self.usage.host || (local.is_device() && peer.is_device())) && !self.channels.is_empty(),
        }
    }

    fn carries_local(&self, local: Place) -> bool {
        match self.usage.gpus {
            Some((here, _)) => local == here,
            None => self.usage.host || local.is_device(),
        }
    }

    fn loads(&self, place: Place, bulk: bool, now: Instant, out: &mut Vec<Load>) {
        out.extend(self.channels.iter().map(|c| c.load(place, bulk, &self.usage, now)));
    }

    fn submit(&mut self, channel: usize, departure: Departure, copier: &mut Copier, now: Instant) -> Result<()> {
        let Some(channel) = self.channels.get_mut(channel) else { bail!(Internal, "channel {channel} does not exist") };
        channel.submit(departure, copier, &self.usage, now)
    }

    fn expect(&mut self, channel: usize, arrival: Arrival) -> Result<()> {
        let Some(channel) = self.channels.get_mut(channel) else { bail!(Internal, "channel {channel} does not exist") };
        channel.expect(arrival);
        Ok(())
    }

    fn progress(&mut self, copier: &mut Copier, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let _quiet = self.channels.first().and_then(Channel::quiet);
        let mut any = false;
        for channel in &mut self.channels {
            any |= channel.progress(copier, &self.usage, now, events)?;
        }
        Ok(any)
    }

    fn busy(&self) -> bool {
        self.channels.iter().any(Channel::busy)
    }

    fn network_bytes(&self) -> Result<Option<(u64, u64)>> {
        let mut sum = Some((0, 0));
        for channel in &self.channels {
            sum = sum.zip(channel.network_bytes()?).map(|((a, b), (c, d))| (a + c, b + d));
        }
        Ok(sum)
    }

    fn describe_busy(&self) -> Vec<String> {
        self.channels
            .iter()
            .enumerate()
            .filter_map(|(i, c)| c.describe_busy().map(|text| format!("channel {i}: {text}")))
            .collect()
    }

    fn stats(&self, kernel: bool, now: Instant, out: &mut Vec<ChannelStats>) {
        out.extend(self.channels.iter().map(|c| c.stats(kernel, now)));
    }

    fn forget_region(&mut self, id: u64) {
        self.channels.iter_mut().for_each(|c| c.forget_region(id));
    }
}
