//! A channel's place on its path: an open channel, one that is about to close, or a closed one. Counts what it has moved, open or not. A
//! channel that has failed is closed once no device copy runs for it; what was in flight on it is lost. Another may take its place, which
//! sends once the peer has it too. Knows nothing about transfers.

use super::channel::Channel;
use super::usage::{Resources, Usage};
use crate::channel::path::{Arrival, Copier, Departure, Line, Outbound};
use crate::channel::stripe::{Flow, Load, Stuck};
use crate::direct::{Event, Way};
use crate::net::setup::Pair;
use crate::net::signals::Quiet;
use crate::stats::ChannelStats;
use crate::status::{bail, err, Error, ErrorKind, Result};
use crate::types::Place;
use std::time::{Duration, Instant};

/// What a channel's place begins with.
pub(crate) enum Seat {
    Up(Box<Pair>),
    /// The channel did not come up; the names of its NICs.
    Lost(String, String),
}

impl Seat {
    pub(super) fn nics(&self) -> (&str, &str) {
        match self {
            Seat::Up(pair) => (&pair.nic, &pair.peer_nic),
            Seat::Lost(nic, peer_nic) => (nic, peer_nic),
        }
    }
}

/// A channel's place.
pub(super) struct Slot {
    channel: Option<Channel>,
    /// Why the channel has failed.
    failed: Option<Error>,
    /// The failed channel is being closed.
    closes: bool,
    /// The peer has not opened the restored channel yet: nothing is sent.
    waits: bool,
    /// The pair of NICs, as an index into the path's.
    pub nic: usize,
    /// What the network had moved and the peer acknowledged at the last look, what closed channels had moved, and their statistics.
    moved: Option<(u64, u64)>,
    acknowledged: u64,
    before: (u64, u64),
    past: ChannelStats,
    name: String,
    /// The busy time of the flow at the last sample of its NIC, and of the last flow.
    busy: (Duration, Duration),
}

/// Whether an error costs the channel, and not the connection: the network or the peer's end of the channel has failed.
fn is_loss(error: &Error) -> bool {
    error.kind() == ErrorKind::RemoteDisconnect
}

impl Slot {
    pub(super) fn new(seat: Seat, nic: usize) -> Slot {
        let name = seat.nics().0.to_owned();
        let past = ChannelStats { nic: name.clone(), lost: true, ..ChannelStats::default() };
        let channel = match seat {
            Seat::Up(pair) => Some(Channel::new(*pair)),
            Seat::Lost(..) => None,
        };
        let (before, busy) = ((0, 0), Default::default());
        Slot { channel, failed: None, closes: false, waits: false, nic, moved: None, acknowledged: 0, before, past, name, busy }
    }

    /// These comms take the place of the closed channel.
    ///
    /// # Errors
    /// `Internal` when it is not closed.
    pub(super) fn restore(&mut self, pair: Pair) -> Result<()> {
        if self.channel.is_some() {
            bail!(Internal, "a channel on {} is restored that was not closed", self.name);
        }
        self.name.clone_from(&pair.nic);
        (self.before, self.busy) = (self.moved.unwrap_or_default(), Default::default());
        (self.channel, self.failed, self.closes, self.waits) = (Some(Channel::new(pair)), None, false, true);
        Ok(())
    }

    /// The peer has the restored channel too.
    pub(super) fn released(&mut self) {
        self.waits = false;
    }

    /// The channel, unless it has failed.
    fn open(&self) -> Option<&Channel> {
        self.channel.as_ref().filter(|_| self.failed.is_none())
    }

    fn open_mut(&mut self) -> Option<&mut Channel> {
        self.channel.as_mut().filter(|_| self.failed.is_none())
    }

    /// Whether it is open at both engines.
    pub(super) fn is_open(&self) -> bool {
        self.open().is_some() && !self.waits
    }

    /// The channel fails if an error says so; other errors remain.
    fn note<T: Default>(&mut self, result: Result<T>) -> Result<T> {
        match result {
            Err(e) if is_loss(&e) => {
                self.fail(e);
                Ok(T::default())
            }
            other => other,
        }
    }

    /// The channel is out of use, and closed soon.
    pub(super) fn fail(&mut self, why: Error) {
        self.failed.get_or_insert(why);
    }

    /// The same for a cause that does not name the channel.
    pub(super) fn give_up(&mut self, why: &Error) {
        let why = self.open().map(|channel| channel.blame(Way::Out, why));
        why.into_iter().for_each(|why| self.fail(why));
    }

    /// Its NIC has become slow, while others are fast.
    pub(super) fn fail_slow(&mut self, Stuck { bytes, seconds }: Stuck) {
        let (name, mb) = (&self.name, bytes as f64 / 1e6);
        self.give_up(&err!(RemoteDisconnect, "{name} has become slow: it would need {seconds:.1} s for {mb:.1} MB"));
    }

    /// Whether it is open and holds bytes that the peer has not acknowledged.
    pub(super) fn holds(&self) -> bool {
        self.open().and_then(Channel::flow).is_some_and(|flow| flow.backlog > 0)
    }

    /// See [`Channel::quiet`].
    pub(super) fn quiet(&self) -> Option<Quiet> {
        self.channel.as_ref().and_then(Channel::quiet)
    }

    /// Whether chunks are announced, in flight or expected, or the channel is about to close.
    pub(super) fn busy(&self) -> bool {
        self.channel.as_ref().is_some_and(|channel| self.failed.is_some() || channel.busy())
    }

    /// See [`Channel::flow`]; `None` if the plugin cannot report now.
    pub(super) fn flow(&mut self) -> Option<Flow> {
        let flow = self.channel.as_ref().and_then(Channel::flow)?;
        self.busy.1 = flow.busy;
        Some(flow)
    }

    /// How long the network had something to do for it between the flows that were last reported and this call before.
    pub(super) fn busy_time(&mut self) -> Duration {
        let (before, now) = self.busy;
        self.busy.0 = now;
        now.saturating_sub(before)
    }

    /// Its load for a chunk from `place`; `nic`: the index of its NIC among those with open channels.
    pub(super) fn load(&self, place: Place, bulk: bool, usage: &Usage, nic: usize, now: Instant) -> Option<Load> {
        self.open().filter(|_| !self.waits).map(|channel| channel.load(place, bulk, usage, nic, now))
    }

    pub(super) fn submit(&mut self, departure: Departure, copier: &mut Copier, usage: &Usage, now: Instant) -> Result<()> {
        let Some(channel) = self.open_mut() else { return Ok(()) };
        let submitted = channel.submit(departure, copier, usage, now);
        self.note(submitted)
    }

    pub(super) fn expect(&mut self, arrival: Arrival) {
        if let Some(channel) = self.open_mut() {
            channel.expect(arrival);
        }
    }

    /// Advances the channel, or closes it. Returns whether anything advanced.
    pub(super) fn progress(&mut self, number: u16, resources: Resources<'_>, events: &mut Vec<Event>) -> Result<bool> {
        let (copier, now) = (&mut *resources.copier, resources.now);
        if let Some(channel) = self.open_mut() {
            let advanced = channel.progress(number, Resources { copier: &mut *copier, ..resources }, events);
            return self.note(advanced);
        }
        let (Some(channel), Some(why)) = (&mut self.channel, &self.failed) else { return Ok(false) };
        if !self.closes {
            if !channel.is_quiet(copier)? {
                return Ok(false);
            }
            let last = channel.stats(false, now).and(&self.past);
            let route = channel.describe(Way::Out);
            let idle =
                ChannelStats { network: None, delivered: None, speed: 0.0, queued_bytes: 0, window_out: 0, window_in: 0, ..last };
            self.past = ChannelStats { lost: true, route, ..idle };
            channel.close();
            self.closes = true;
        }
        // What the channel did not deliver must not be sent again while one of its comms may still read or write memory.
        let stays = |e| err!(Plugin, "channel {number} on {} was lost ({why}), and cannot be closed: {e}", self.name);
        if !channel.is_closed().map_err(stays)? {
            return Ok(false);
        }
        self.channel = None;
        events.push(Event::Closed(number, why.clone()));
        Ok(true)
    }

    /// Closes the channel, if it is not closed, without waiting.
    pub(super) fn close(&mut self) {
        self.channel.iter_mut().for_each(Channel::close);
    }

    /// See `SendComm::settle`.
    pub(super) fn settle(&self) {
        self.channel.iter().for_each(Channel::settle);
    }

    /// The network's progress on the channel, which fails if it has failed unnoticed.
    pub(super) fn network(&mut self, each: &mut dyn FnMut(Line<'_>)) -> Result<()> {
        match self.open().map(Channel::network) {
            Some(Ok(line)) => {
                let ((sent, received), open) = (self.before, !self.waits);
                let moved = line.moved.map(|(a, b)| (a + sent, b + received));
                let acknowledged = line.outbound.acknowledged;
                each(Line { moved, open, ..line });
                (self.moved, self.acknowledged) = (moved, acknowledged);
                return Ok(());
            }
            Some(Err(e)) => self.note(Err(e))?,
            None => {}
        }
        // What it moved stays moved.
        let outbound = Outbound { acknowledged: self.acknowledged, ..Outbound::default() };
        let moved = self.moved.or(Some((0, 0)));
        each(Line { local: None, nic: &self.name, moved, arrived: 0, outbound, under_way: (0, 0), posted: 0, open: false });
        Ok(())
    }

    pub(super) fn stats(&self, kernel: bool, now: Instant) -> ChannelStats {
        match &self.channel {
            Some(channel) if !self.closes => channel.stats(kernel, now).and(&self.past),
            _ => self.past.clone(),
        }
    }

    pub(super) fn describe(&self, way: Way) -> String {
        self.channel.as_ref().map_or_else(|| format!("NIC {}", self.name), |channel| channel.describe(way))
    }

    /// See `Path::ready`.
    pub(super) fn ready(&mut self, place: Place, copier: &mut Copier, usage: &Usage) -> Result<()> {
        let ready = self.open_mut().map_or(Ok(()), |channel| channel.ready(place, copier, usage));
        self.note(ready)
    }

    pub(super) fn forget_region(&mut self, id: u64) {
        self.channel.iter_mut().for_each(|channel| channel.forget_region(id));
    }
}
