//! The path over a plugin's comms: a window of chunks on each channel. Knows comms and device copiers, nothing of transfers.

mod channel;
mod copying;
mod receiving;
mod sending;
mod slot;
mod staging;
mod usage;

pub(crate) use slot::Seat;
pub(crate) use usage::{DeviceMode, Usage};

use super::path::{Arrival, Carries, Change, Copier, Departure, Dest, Line, Path};
use super::plan::{chunk_len, ChunkLimits, MAX_CROSSED, MAX_PARTS};
use super::stripe::{self, Flow, Loads, Nic, LEFT_ALONE};
use crate::direct::{Event, Way};
use crate::stats::ChannelStats;
use crate::status::{bail, Result};
use crate::types::Place;
use slot::Slot;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use usage::Resources;

/// Channels over one plugin.
pub(crate) struct NetPath {
    slots: Vec<Slot>,
    usage: Usage,
    /// The plugin's name.
    plugin: String,
    /// The pairs of NICs that the channels use, and their names.
    nics: Vec<Nic>,
    names: Vec<(String, String)>,
    /// The NIC that goes first among equals.
    first: usize,
}

/// The number of a new path. Processes begin anywhere, so that those of many hosts that send to one spread over its NICs.
fn next_number() -> usize {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // It fails for every path but the first.
    let _ = NEXT.compare_exchange(0, RandomState::new().hash_one(0) as u32 | 1, Ordering::Relaxed, Ordering::Relaxed);
    NEXT.fetch_add(1, Ordering::Relaxed) as usize
}

impl NetPath {
    pub(crate) fn new(plugin: &str, seats: Vec<Seat>, usage: Usage) -> NetPath {
        let (plugin, first) = (plugin.to_owned(), next_number());
        let mut path = NetPath { slots: Vec::new(), usage, plugin, nics: Vec::new(), names: Vec::new(), first };
        for seat in seats {
            let nic = path.nic(seat.nics());
            path.slots.push(Slot::new(seat, nic));
        }
        path
    }

    /// The number of a pair of NICs.
    fn nic(&mut self, (here, there): (&str, &str)) -> usize {
        self.names.iter().position(|known| known.0 == here && known.1 == there).unwrap_or_else(|| {
            self.names.push((here.to_owned(), there.to_owned()));
            self.nics.push(Nic::default());
            self.names.len() - 1
        })
    }

    /// Whether there are several NICs to compare.
    fn compares(&self) -> bool {
        self.nics.len() > 1
    }

    /// Samples the progress of each NIC, when due.
    fn look(&mut self, now: Instant) {
        for (number, nic) in self.nics.iter_mut().enumerate().filter(|(_, nic)| nic.due(now)) {
            let mine = |slot: &&mut Slot| slot.nic == number && slot.is_open();
            let (mut flows, none) = (self.slots.iter_mut().filter(mine), Flow { tick: Some(Duration::ZERO), ..Flow::default() });
            let Some(flow) = flows.try_fold(none, |sum, slot| Some(sum.and(slot.flow()?))) else {
                nic.postpone(now);
                continue;
            };
            // Channels of a NIC are busy at the same time.
            let busy = self.slots.iter_mut().filter(mine).map(Slot::busy_time).max().unwrap_or_default();
            nic.look(flow, busy, now);
        }
    }

    /// Whether its channels carry memory of the place `local` here.
    fn carries_local(&self, local: Place) -> bool {
        match self.usage.gpus {
            Some((here, _)) => local == here,
            None => self.usage.host || local.is_device(),
        }
    }

    fn slot(&mut self, channel: usize) -> Result<&mut Slot> {
        match self.slots.get_mut(channel) {
            Some(slot) => Ok(slot),
            None => bail!(Internal, "channel {channel} does not exist"),
        }
    }

    fn is_open(&self) -> bool {
        self.slots.iter().any(Slot::is_open)
    }
}

impl Drop for NetPath {
    fn drop(&mut self) {
        self.slots.iter_mut().for_each(Slot::close);
        self.slots.iter().for_each(Slot::settle);
    }
}

impl Path for NetPath {
    fn channels(&self) -> usize {
        self.slots.len()
    }

    fn limits(&self, total: u64) -> ChunkLimits {
        let open = self.slots.iter().filter(|slot| slot.is_open()).count();
        let share = if total <= self.usage.alone && !self.compares() { 1 } else { open };
        let bytes = chunk_len(total, share, self.usage.chunk_bytes);
        ChunkLimits { bytes, pieces: MAX_PARTS, crossed: MAX_CROSSED }
    }

    fn carries(&self, local: Place, peer: Place) -> Carries {
        let fits = match self.usage.gpus {
            Some((here, there)) => local == here && peer == there,
            None => self.usage.host || (local.is_device() && peer.is_device()),
        };
        Carries::of(fits, self.is_open())
    }

    fn loads(&mut self, place: Place, bulk: bool, now: Instant, out: &mut Loads) {
        let compares = self.compares();
        if compares {
            self.look(now);
        }
        (out.alone, out.first) = (self.usage.alone, self.first);
        if self.slots.iter().all(Slot::is_open) {
            if compares {
                out.nics.extend(self.nics.iter().map(|nic| nic.load(now)));
            }
            out.channels.extend(self.slots.iter().filter_map(|slot| slot.load(place, bulk, &self.usage, slot.nic, now)));
            return;
        }
        // Closed channels, and NICs that have no other ones, are left out.
        let mut seen = vec![None; self.nics.len()];
        for (number, slot) in self.slots.iter().enumerate() {
            let next = out.nics.len();
            let index = seen.get(slot.nic).copied().flatten().unwrap_or(next);
            let Some(load) = slot.load(place, bulk, &self.usage, index, now) else { continue };
            if index == next && compares {
                seen[slot.nic] = Some(next);
                out.nics.push(self.nics[slot.nic].load(now));
            }
            out.channels.push(load);
            out.numbers.push(number);
        }
    }

    fn submit(&mut self, channel: usize, departure: Departure, copier: &mut Copier, now: Instant) -> Result<()> {
        let (usage, len) = (self.usage, departure.chunk.len as u64);
        let slot = self.slot(channel)?;
        slot.submit(departure, copier, &usage, now)?;
        let nic = slot.nic;
        self.nics.get_mut(nic).into_iter().for_each(|nic| nic.gave(len, now));
        Ok(())
    }

    fn expect(&mut self, channel: usize, arrival: Arrival) -> Result<()> {
        match &arrival.dest {
            Dest::Memory { place, .. } if !self.carries_local(*place) => {
                bail!(Protocol, "channel {channel} does not carry memory of {place:?}")
            }
            _ => {}
        }
        self.slot(channel)?.expect(arrival);
        Ok(())
    }

    fn progress(&mut self, copier: &mut Copier, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let _quiet = self.slots.iter().find_map(Slot::quiet);
        let mut any = false;
        for (number, slot) in self.slots.iter_mut().enumerate() {
            let was_open = slot.is_open();
            any |= slot.progress(number as u16, Resources { copier, usage: &self.usage, now }, events)?;
            if was_open && !slot.is_open() {
                // Its measurements span channels that are closed now.
                self.nics[slot.nic] = Nic::default();
                any = true;
            }
        }
        if any && self.compares() {
            self.look(now);
        }
        Ok(any)
    }

    fn change(&mut self, channel: usize, change: Change) -> Result<()> {
        let nic = match &change {
            Change::Restore(pair) => Some(self.nic((&pair.nic, &pair.peer_nic))),
            _ => None,
        };
        let (slot, closes) = (self.slot(channel)?, matches!(change, Change::Close(_)));
        match change {
            Change::Close(why) => slot.give_up(&why),
            Change::Restore(pair) => slot.restore(*pair)?,
            Change::Open => slot.released(),
        }
        slot.nic = nic.unwrap_or(slot.nic);
        // Measurements span the channels that are open. A NIC that was slow before its channels came back may be so still.
        let nic = slot.nic;
        match closes {
            true => self.nics[nic] = Nic::default(),
            false => self.nics[nic].restart(),
        }
        Ok(())
    }

    fn relieve(&mut self, now: Instant) -> bool {
        if !self.compares() {
            return false;
        }
        self.look(now);
        let open = |nic: usize| self.slots.iter().any(|slot| slot.nic == nic && slot.is_open());
        if let Some((nic, stuck)) = stripe::stuck(&self.nics, open, now) {
            self.slots.iter_mut().filter(|slot| slot.nic == nic && slot.holds()).for_each(|slot| slot.fail_slow(stuck));
            self.nics[nic].emptied(now);
        }
        self.nics.iter().any(|nic| nic.backlog() > 0)
    }

    fn busy(&self) -> bool {
        self.slots.iter().any(Slot::busy)
    }

    fn network(&mut self, each: &mut dyn FnMut(Line<'_>)) -> Result<()> {
        self.slots.iter_mut().try_for_each(|slot| slot.network(each))
    }

    fn describe(&self, channel: usize, way: Way) -> String {
        self.slots.get(channel).map_or_else(String::new, |slot| slot.describe(way))
    }

    fn stats(&self, kernel: bool, now: Instant, out: &mut Vec<ChannelStats>) {
        let first = out.len();
        out.extend(self.slots.iter().map(|slot| ChannelStats { plugin: self.plugin.clone(), ..slot.stats(kernel, now) }));
        if !self.compares() {
            return;
        }
        // Short chunks pass a slow NIC in bursts: the long-term speed is measured here.
        let fastest = self.nics.iter().map(Nic::floor).fold(0.0, f64::max);
        for (stats, slot) in out[first..].iter_mut().zip(&self.slots) {
            let speed = self.nics[slot.nic].speed();
            stats.avoided = speed > 0.0 && speed < LEFT_ALONE * fastest;
            let share = speed / self.slots.iter().filter(|other| other.nic == slot.nic).count() as f64;
            if share > 0.0 && (share < stats.speed || stats.avoided) {
                stats.speed = share;
            }
        }
    }

    fn ready(&mut self, place: Place, copier: &mut Copier) -> Result<()> {
        if !place.is_device() || !self.carries_local(place) {
            return Ok(());
        }
        let usage = self.usage;
        self.slots.iter_mut().try_for_each(|slot| slot.ready(place, copier, &usage))
    }

    fn forget_region(&mut self, id: u64) {
        self.slots.iter_mut().for_each(|slot| slot.forget_region(id));
    }
}
