//! The path over a plugin's comms: a window of chunks on each channel. Knows comms and device copiers, nothing of transfers.

mod channel;
mod copying;
mod receiving;
mod sending;
mod staging;

pub(crate) use channel::Channel;

use super::path::{Arrival, Copier, Departure, Line, Path};
use super::plan::{chunk_len, ChunkLimits, MAX_CROSSED, MAX_PARTS};
use super::stripe::{Loads, Nic, LEFT_ALONE};
use crate::direct::{Event, Way};
use crate::stats::ChannelStats;
use crate::status::{bail, Result};
use crate::types::Place;
use std::time::{Duration, Instant};

/// How the channels of a path are used: the plugin's traits, and what both engines agreed on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Host memory uses the vectored extension.
    pub vectored: bool,
    /// The comms carry host memory.
    pub host: bool,
    /// Device memory is sent from host memory that the GPU fills, not by the plugin's device sends.
    pub stage_sends: bool,
    /// The GPU whose memory the comms receive into, here and at the peer; `None` if any.
    pub gpus: Option<(Place, Place)>,
    /// Largest chunk, bytes.
    pub chunk_bytes: usize,
    /// See [`Loads::alone`].
    pub alone: u64,
}

/// Channels over one plugin.
pub(crate) struct NetPath {
    channels: Vec<Channel>,
    usage: Usage,
    /// The pairs of NICs in use, and the index of each channel's pair.
    nics: Vec<Nic>,
    nic_of: Vec<usize>,
}

impl NetPath {
    pub(crate) fn new(channels: Vec<Channel>, usage: Usage) -> NetPath {
        let mut names: Vec<(&str, &str)> = Vec::new();
        let mut number = |channel| {
            let nics = Channel::nics(channel);
            names.iter().position(|known| *known == nics).unwrap_or_else(|| {
                names.push(nics);
                names.len() - 1
            })
        };
        let nic_of: Vec<usize> = channels.iter().map(&mut number).collect();
        let nics = names.iter().map(|_| Nic::default()).collect();
        NetPath { channels, usage, nics, nic_of }
    }

    /// Whether there are several NICs to compare.
    fn compares(&self) -> bool {
        self.nics.len() > 1
    }

    /// Samples the progress of each NIC that is due.
    fn look(&mut self, now: Instant) {
        for (number, nic) in self.nics.iter_mut().enumerate().filter(|(_, nic)| nic.due(now)) {
            let mine = self.channels.iter().zip(&self.nic_of).filter(|(_, &nic)| nic == number);
            let sum = mine.map(|(channel, _)| channel.flow()).try_fold((0, 0, Duration::ZERO), |(a, b, r), flow| {
                let (acknowledged, backlog, round_trip) = flow?;
                Some((a + acknowledged, b + backlog, r.max(round_trip)))
            });
            match sum {
                Some((acknowledged, backlog, round_trip)) => nic.look(acknowledged, backlog, round_trip, now),
                None => nic.postpone(now),
            }
        }
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
        let share = if total <= self.usage.alone && !self.compares() { 1 } else { self.channels.len() };
        chunk_len(total, share, self.usage.chunk_bytes)
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

    fn loads(&mut self, place: Place, bulk: bool, now: Instant, out: &mut Loads) {
        if self.compares() {
            self.look(now);
            out.nics.extend(self.nics.iter().map(|nic| nic.load(now)));
        }
        out.alone = self.usage.alone;
        let channels = self.channels.iter().zip(&self.nic_of);
        out.channels.extend(channels.map(|(channel, &nic)| channel.load(place, bulk, &self.usage, nic, now)));
    }

    fn submit(&mut self, channel: usize, departure: Departure, copier: &mut Copier, now: Instant) -> Result<()> {
        if let Some(nic) = self.nic_of.get(channel).and_then(|&nic| self.nics.get_mut(nic)) {
            nic.gave(departure.chunk.len as u64, now);
        }
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
        if any && self.compares() {
            self.look(now);
        }
        Ok(any)
    }

    fn busy(&self) -> bool {
        self.channels.iter().any(Channel::busy)
    }

    fn network(&self, each: &mut dyn FnMut(Line<'_>)) -> Result<()> {
        self.channels.iter().try_for_each(|channel| channel.network().map(&mut *each))
    }

    fn describe(&self, channel: usize, way: Way) -> String {
        self.channels.get(channel).map_or_else(String::new, |c| c.describe(way))
    }

    fn stats(&self, kernel: bool, now: Instant, out: &mut Vec<ChannelStats>) {
        let first = out.len();
        out.extend(self.channels.iter().map(|c| c.stats(kernel, now)));
        if !self.compares() {
            return;
        }
        // Short chunks can pass a slow NIC in bursts, so the speed over a longer time counts here.
        let fastest = self.nics.iter().map(Nic::speed).fold(0.0, f64::max);
        for (stats, &number) in out[first..].iter_mut().zip(&self.nic_of) {
            let speed = self.nics[number].speed();
            stats.avoided = speed > 0.0 && speed < LEFT_ALONE * fastest;
            let share = speed / self.nic_of.iter().filter(|&&other| other == number).count() as f64;
            if share > 0.0 && (share < stats.speed || stats.avoided) {
                stats.speed = share;
            }
        }
    }

    fn ready(&mut self, place: Place, copier: &mut Copier) -> Result<()> {
        if !place.is_device() || !self.carries_local(place) {
            return Ok(());
        }
        self.channels.iter_mut().try_for_each(|c| c.ready(place, copier, &self.usage))
    }

    fn forget_region(&mut self, id: u64) {
        self.channels.iter_mut().for_each(|c| c.forget_region(id));
    }
}
