//! One channel, with its sending and its receiving half. Chunks are sent in the order of their announcements. Receives are
//! posted, unpacked and consumed in the order of the peer's. Every chunk keeps its regions in use until it is done or the channel
//! is closed. Knows nothing of transfers.

use super::receiving::Receiving;
use super::sending::Sending;
use super::usage::{DeviceMode, Resources, Usage};
use crate::channel::path::{Arrival, Copier, Departure, Line, Outbound};
use crate::channel::stripe::{Flow, Load};
use crate::direct::{Event, Way};
use crate::net::setup::Pair;
use crate::net::signals::Quiet;
use crate::stats::{ChannelStats, Network};
use crate::status::{Error, Result};
use crate::types::Place;
use nccl_net_abi::{ucclCommInfo, MAX_REQUESTS};
use std::net::IpAddr;
use std::time::Instant;

/// One channel.
pub(crate) struct Channel {
    // Field order is drop order: registrations of sends are dropped through the receive comm, so it goes last.
    sending: Sending,
    receiving: Receiving,
    /// The names of its NICs here and at the peer.
    nic: String,
    peer_nic: String,
    local: Option<IpAddr>,
}

// SAFETY: the raw pointers point to memory that this channel or a held region owns, and one thread at a time uses a channel.
unsafe impl Send for Channel {}

impl Channel {
    pub(crate) fn new(pair: Pair) -> Channel {
        let Pair { send, recv, nic, peer_nic, local, .. } = pair;
        Channel { sending: Sending::new(send), receiving: Receiving::new(recv), nic, peer_nic, local }
    }

    /// See [`SendComm::quiet`].
    pub(super) fn quiet(&self) -> Option<Quiet> {
        self.sending.comm.quiet()
    }

    /// Whether chunks are announced, in flight or expected.
    pub(super) fn busy(&self) -> bool {
        !self.sending.outgoing.is_empty() || self.receiving.under_way() > 0
    }

    /// See [`Sending::flow`].
    pub(super) fn flow(&self) -> Option<Flow> {
        self.sending.flow()
    }

    /// Its load for a chunk from `place`; `nic`: the index of its NIC.
    pub(super) fn load(&self, place: Place, bulk: bool, usage: &Usage, nic: usize, now: Instant) -> Load {
        self.sending.load(place, bulk, usage, nic, now)
    }

    /// See `Path::ready`.
    pub(super) fn ready(&mut self, place: Place, copier: &mut Copier, usage: &Usage) -> Result<()> {
        self.sending.device_out(place, copier, usage)?;
        self.receiving.device_in(place, copier, usage)?;
        if usage.device != DeviceMode::GpuStaging {
            self.receiving.view(copier, place)?;
        }
        Ok(())
    }

    /// Takes a chunk to send; see [`Sending::take`].
    pub(super) fn submit(&mut self, departure: Departure, copier: &mut Copier, usage: &Usage, now: Instant) -> Result<()> {
        self.sending.take(departure, copier, usage, now).map_err(|e| self.blame(Way::Out, &e))
    }

    /// Drops the plugin's registrations of a region that is no longer used.
    pub(super) fn forget_region(&mut self, id: u64) {
        self.sending.comm.forget_region(id);
    }

    /// Takes a chunk that the peer announced on this channel.
    pub(super) fn expect(&mut self, arrival: Arrival) {
        self.receiving.expect(arrival);
    }

    /// Advances sends and receives. Returns whether anything advanced. `number`: its own.
    pub(super) fn progress(&mut self, number: u16, resources: Resources<'_>, events: &mut Vec<Event>) -> Result<bool> {
        let Resources { copier, usage, now } = resources;
        let mut any = false;
        if !self.sending.outgoing.is_empty() {
            any |= self.sending.progress(number, copier, now, events).map_err(|e| self.blame(Way::Out, &e))?;
        }
        if self.receiving.under_way() > 0 {
            any |= self.receiving.progress(number, copier, usage, events).map_err(|e| self.blame(Way::In, &e))?;
        }
        Ok(any)
    }

    /// Whether no device copy is running for it: then it can be closed.
    pub(super) fn is_quiet(&mut self, copier: &mut Copier) -> Result<bool> {
        Ok(self.sending.is_quiet(copier)? && self.receiving.is_quiet(copier)?)
    }

    /// Closes both comms, without waiting. Nothing else may follow but its statistics, and how the close ends.
    pub(super) fn close(&mut self) {
        // Registrations are dropped while their comm is open. If requests may still use them, they are dropped after it.
        if !self.busy() {
            self.sending.drop_staging();
            self.receiving.drop_staging();
        }
        self.sending.close();
        self.receiving.close();
    }

    /// Whether its close has ended.
    ///
    /// # Errors
    /// `Plugin` when a comm stays open: memory of its chunks may still be read or written, and stays in use until the process ends.
    pub(super) fn is_closed(&self) -> Result<bool> {
        Ok(self.sending.comm.is_closed()? & self.receiving.comm.is_closed()?)
    }

    /// See [`SendComm::settle`].
    pub(super) fn settle(&self) {
        self.sending.comm.settle();
    }

    /// The network's progress on this channel.
    pub(super) fn network(&self) -> Result<Line<'_>> {
        let sent = self.sending.comm.network_bytes().map_err(|e| self.blame(Way::Out, &e))?;
        let received = self.receiving.comm.network_bytes().map_err(|e| self.blame(Way::In, &e))?;
        let under_way = (self.sending.outgoing.len(), self.receiving.under_way());
        let (posted, arrived) = (self.receiving.posted.len(), self.receiving.counts.bytes);
        let control_silent = self.sending.comm.control_silent().max(self.receiving.comm.control_silent());
        let outbound = self.sending.outbound(sent);
        // Without an answer on the plugin's own control connection its data does not move either, and may not even be sent.
        let outbound = Outbound { control_silent, due: outbound.due || control_silent.is_some(), ..outbound };
        Ok(Line {
            local: self.local,
            nic: &self.nic,
            moved: sent.zip(received),
            arrived,
            outbound,
            under_way,
            posted,
            open: true,
        })
    }

    /// Its statistics. `kernel`: including the kernel's, which takes a system call.
    pub(super) fn stats(&self, kernel: bool, now: Instant) -> ChannelStats {
        let (sending, receiving) = (&self.sending, &self.receiving);
        let (sent, received) = (sending.counts, receiving.counts);
        let network = if kernel { self.sending.comm.info().map(network) } else { None };
        // A send ends when the kernel has the data, so only acknowledgements show the speed of the network.
        let delivered = network.as_ref().map(|n| n.delivery_rate as f64).filter(|&rate| rate > 0.0 && sent.bytes > 0);
        ChannelStats {
            delivered: if kernel { self.sending.comm.delivered() } else { None },
            nic: self.nic.clone(),
            peer_nic: if self.peer_nic == self.nic { String::new() } else { self.peer_nic.clone() },
            route: if kernel { self.describe(Way::Out) } else { String::new() },
            sent_bytes: sent.bytes,
            sent_chunks: sent.chunks,
            received_bytes: received.bytes,
            received_chunks: received.chunks,
            speed: delivered.unwrap_or_else(|| sending.rate.last(sending.oldest(), now)),
            queued_bytes: sending.queued,
            window_out: sending.outgoing.len() as u32,
            window_in: receiving.under_way() as u32,
            window: MAX_REQUESTS as u32,
            packed_chunks: sent.copied,
            unpacked_chunks: received.copied,
            pack_us: sent.copying.as_micros() as u64,
            unpack_us: received.copying.as_micros() as u64,
            network,
            ..ChannelStats::default()
        }
    }

    /// Its addresses in a direction and its NIC, for an error text.
    pub(super) fn describe(&self, way: Way) -> String {
        self.ends(way).unwrap_or_else(|| format!("NIC {}{}", self.nic, self.joined()))
    }

    /// The peer's NIC, if it has another name.
    fn joined(&self) -> String {
        match self.peer_nic == self.nic {
            true => String::new(),
            false => format!(", {} of the peer", self.peer_nic),
        }
    }

    fn ends(&self, way: Way) -> Option<String> {
        let ends = match way {
            Way::Out => self.sending.comm.describe(),
            Way::In => self.receiving.comm.describe(),
        };
        ends.map(|ends| format!("{ends}{}", self.joined()))
    }

    /// Adds the channel's description to an error.
    pub(super) fn blame(&self, way: Way, error: &Error) -> Error {
        let ends = self.ends(way).unwrap_or_else(|| format!("on NIC {}{}", self.nic, self.joined()));
        Error::new(error.kind(), format_args!("channel {ends}: {error}"))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.close();
    }
}

fn network(info: ucclCommInfo) -> Network {
    let name: Vec<u8> = info.congestion.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
    Network {
        segments: info.segments,
        retransmits: info.retransmits,
        rtt_us: info.rtt_us,
        min_rtt_us: info.min_rtt_us,
        delivery_rate: info.delivery_rate,
        congestion: String::from_utf8_lossy(&name).into_owned(),
    }
}
