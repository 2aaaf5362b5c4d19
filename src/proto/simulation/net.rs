//! The channels of a simulated connection. Their messages move when a script says so, or as TCP and the network of a cluster let them. They
//! stall, fail or run out of memory on demand. Bytes are copied at the moment at which a real network would copy them.

use super::direct::DirectNet;
use super::positions::{is_described, Content, Positions};
use super::tcp::{Receiver, Sender};
use crate::channel::path::{Arrival, Carries, Change, Copier, Departure, Dest, Line, Outbound, Path};
use crate::channel::plan::{chunk_len, ChunkLimits, MAX_CROSSED, MAX_PARTS};
use crate::channel::stripe::{self, Flow, Load, Loads, Nic, Rate};
use crate::direct::{Event, Way};
use crate::region::Hold;
use crate::stats::ChannelStats;
use crate::status::{bail, err, Error, Result};
use crate::types::{Key, Part, Place};
use process::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Requests in flight on a channel, each way.
const WINDOW: usize = 16;
/// With so many bytes of large transfers in flight, a channel takes no more of them.
const BULK_BYTES: u64 = 2 << 20;

/// A message in flight.
pub(super) struct Message {
    pub tag: i32,
    pub content: Content,
}

/// A chunk that its sender has posted.
struct Posted {
    key: Key,
    tag: i32,
    bulk: bool,
    parts: Vec<Part>,
    _hold: Hold,
}

impl Posted {
    fn len(&self) -> u64 {
        self.parts.iter().map(|part| part.len).sum()
    }
}

/// The TCP connection under one direction of a channel.
pub(super) struct Stream {
    pub sender: Sender,
    pub receiver: Receiver,
    /// Bytes of messages that have been delivered whole.
    read: u64,
    /// It waits for its turn on a NIC, and for its timer.
    pub queued: bool,
    pub timed: bool,
}

impl Stream {
    pub(super) fn new(packet: u64, seed: u64) -> Stream {
        Stream { sender: Sender::new(packet, seed), receiver: Receiver::default(), read: 0, queued: false, timed: false }
    }
}

/// One direction of a channel.
#[derive(Default)]
pub(super) struct Wire {
    posted: VecDeque<Posted>,
    sent: VecDeque<(Key, u64)>,
    pub flying: VecDeque<Message>,
    expected: VecDeque<Arrival>,
    arrived: VecDeque<(Key, u64)>,
    pub stalled: bool,
    /// The sender's GPU is busy with what it is to send.
    pub packing: bool,
    pub failed: bool,
    /// A message met a receive that it does not fit.
    misfit: bool,
    taken: u64,
    brought: u64,
    /// Messages that arrived.
    delivered: u64,
    /// Bytes of the oldest posted message that the socket has taken.
    moved: u64,
    /// In a cluster.
    pub stream: Option<Box<Stream>>,
}

impl Wire {
    /// The socket takes what it has room for. Returns whether it has taken a whole message.
    pub(super) fn pump(&mut self, now: u64) -> bool {
        let before = self.sent.len();
        while let (Some(posted), Some(stream)) = (self.posted.front(), &mut self.stream) {
            let len = posted.len();
            let n = stream.sender.room().min(len - self.moved);
            if n == 0 || self.failed || self.packing {
                break;
            }
            stream.sender.offer(n, now);
            (self.moved, self.taken) = (self.moved + n, self.taken + n);
            if self.moved == len {
                self.taken -= len;
                self.moved = 0;
                self.take();
            }
        }
        self.sent.len() > before
    }

    /// The network takes the oldest posted message and reads its source.
    fn take(&mut self) -> bool {
        let Some(posted) = self.posted.pop_front() else { return false };
        let content = if posted.parts.first().is_some_and(|part| is_described(part.addr)) {
            Content::Ranges(posted.parts)
        } else {
            let mut bytes = Vec::new();
            for part in &posted.parts {
                // SAFETY: memory of the harness, which outlives the simulation.
                bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(part.addr as *const u8, part.len as usize) });
            }
            Content::Bytes(bytes)
        };
        self.taken += content.len() as u64;
        self.sent.push_back((posted.key, content.len() as u64));
        self.flying.push_back(Message { tag: posted.tag, content });
        true
    }

    /// How much of its stream the receiver has read: all that has arrived for messages with a receive.
    pub(super) fn read(&self) -> u64 {
        let Some(stream) = &self.stream else { return 0 };
        if self.expected.len() >= self.flying.len() {
            return u64::MAX / 2;
        }
        let may = self.flying.iter().take(self.expected.len()).map(|message| message.content.len() as u64).sum::<u64>();
        stream.read + may
    }

    /// Whether the oldest message has arrived whole.
    fn is_here(&self, message: &Message) -> bool {
        self.stream.as_ref().is_none_or(|stream| stream.receiver.got() >= stream.read + message.content.len() as u64)
    }

    /// Bytes that were posted and that the socket has not taken.
    fn queued(&self) -> u64 {
        self.posted.iter().map(Posted::len).sum::<u64>() - self.moved
    }

    /// Bytes that have arrived.
    fn brought(&self) -> u64 {
        self.stream.as_ref().map_or(self.brought, |stream| stream.receiver.got())
    }

    fn outbound(&self) -> Outbound {
        match &self.stream {
            None => Outbound {
                acknowledged: self.taken,
                waiting: self.posted.len() as u64,
                due: !self.posted.is_empty() && !self.packing,
                ..Outbound::default()
            },
            Some(stream) => Outbound {
                acknowledged: stream.sender.acked(),
                waiting: stream.sender.waiting(),
                due: stream.sender.in_flight() > 0,
                ..Outbound::default()
            },
        }
    }

    /// What the kernel says of it.
    fn flow(&self, now: u64) -> Option<Flow> {
        let sender = &self.stream.as_ref()?.sender;
        Some(Flow {
            acknowledged: sender.acked(),
            backlog: self.queued() + sender.waiting(),
            in_flight: sender.in_flight(),
            busy: Duration::from_nanos(sender.busy(now)),
            limited: Duration::ZERO,
            round_trip: Duration::from_nanos(sender.round_trip()),
            tick: Some(Duration::ZERO),
        })
    }
}

/// State that the two sides share.
pub(super) struct Net {
    /// The direct transport.
    pub direct: DirectNet,
    /// By sending side: first one of each channel, then those of restored ones.
    pub wires: Vec<[Wire; 2]>,
    /// Of each channel, by side.
    ends: Vec<[End; 2]>,
    /// Calls until an allocation of a side fails.
    pub out_of_memory: [Option<u32>; 2],
    /// Whether the network reports bytes.
    pub reports_moved: bool,
    /// Channels alternate over so many NICs, 1 to 8.
    pub nics: usize,
    /// The NIC that moves nothing now, without a word, and over which no channel comes up.
    pub silent: Option<usize>,
    /// Sides that have closed their channels.
    pub closed: [bool; 2],
    /// Described memory.
    positions: Arc<Mutex<Positions>>,
    /// When the simulation began.
    start: Instant,
    /// Bytes of a packet and the seed, where TCP is under the channels.
    tcp: Option<(u64, u64)>,
}

impl Net {
    pub(super) fn new(channels: usize, reports_moved: bool) -> Net {
        let wires = (0..channels).map(|_| Default::default()).collect();
        let ends = (0..channels).map(|wire| [0, 1].map(|_| End { wire, ..End::default() })).collect();
        Net {
            direct: DirectNet::default(),
            wires,
            ends,
            out_of_memory: [None; 2],
            reports_moved,
            nics: 1,
            silent: None,
            closed: [false; 2],
            positions: Arc::default(),
            start: Instant::now(),
            tcp: None,
        }
    }

    /// The channels of a connection in a cluster. `nics`: how many of each engine they use.
    pub(super) fn in_cluster(channels: usize, nics: usize, positions: &Arc<Mutex<Positions>>, start: Instant) -> Net {
        Net { nics, positions: positions.clone(), start, ..Net::new(channels, true) }
    }

    /// Puts TCP under the channels.
    pub(super) fn over_tcp(mut self, packet: u64, seed: u64) -> Net {
        self.tcp = Some((packet, seed));
        (0..self.wires.len()).for_each(|wire| self.connect(wire));
        self
    }

    /// Makes the TCP connections of new wires.
    fn connect(&mut self, wire: usize) {
        let Some((packet, seed)) = self.tcp else { return };
        for (side, wires) in self.wires[wire].iter_mut().enumerate() {
            wires.stream = Some(Box::new(Stream::new(packet, seed << 8 | (2 * wire + side) as u64)));
        }
    }

    /// Nanoseconds since the simulation began.
    fn ns(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_nanos() as u64
    }

    pub(super) fn allocate(&mut self, side: usize) -> Result<()> {
        if let Some(left) = &mut self.out_of_memory[side] {
            if *left == 0 {
                self.out_of_memory[side] = None;
                bail!(Resource, "simulated: no memory");
            }
            *left -= 1;
        }
        Ok(())
    }

    /// The wire on which a side sends for a channel.
    pub(super) fn wire(&mut self, channel: usize, side: usize) -> &mut Wire {
        &mut self.wires[self.ends[channel][side].wire][side]
    }

    /// Whether the NIC of a channel is silent.
    pub(super) fn is_silent(&self, channel: usize) -> bool {
        self.silent == Some(channel % self.nics)
    }

    /// New wires, for a channel that is being restored.
    pub(super) fn string(&mut self) -> usize {
        self.wires.push(Default::default());
        let wire = self.wires.len() - 1;
        self.connect(wire);
        wire
    }

    /// Which wires a side uses for a channel.
    pub(super) fn wires_of(&self, channel: usize, side: usize) -> usize {
        self.ends[channel][side].wire
    }

    /// A side takes such wires in place of its closed end of a channel.
    pub(super) fn restore(&mut self, channel: usize, side: usize, wire: usize) {
        let end = &mut self.ends[channel][side];
        assert!(end.closed, "an open channel is restored");
        *end = End { wire, waits: true, ..End::default() };
    }

    /// A liar uses such wires for a channel that the other side has restored. It never closes anything.
    pub(super) fn follow(&mut self, channel: usize, side: usize, wire: usize) {
        self.ends[channel][side].wire = wire;
    }

    /// The network takes the oldest posted message of a wire and reads its source.
    /// Returns whether there was one.
    pub(super) fn transmit(&mut self, channel: usize, side: usize) -> bool {
        let silent = self.is_silent(channel);
        let wire = self.wire(channel, side);
        if silent || wire.stalled || wire.failed {
            return false;
        }
        wire.take()
    }

    /// The oldest message of a wire reaches the receive that waits for it, and memory is written.
    /// Returns whether there was one.
    pub(super) fn deliver(&mut self, channel: usize, side: usize) -> bool {
        let silent = self.is_silent(channel);
        let wire = self.wire(channel, side);
        let here = wire.flying.front().is_some_and(|message| wire.is_here(message));
        if silent || wire.stalled || wire.failed || wire.expected.is_empty() || !here {
            return false;
        }
        let (Some(message), Some(arrival)) = (wire.flying.pop_front(), wire.expected.pop_front()) else { return false };
        if message.tag != arrival.tag || message.content.len() != arrival.len {
            wire.misfit = true;
            return true;
        }
        wire.brought += arrival.len as u64;
        wire.stream.iter_mut().for_each(|stream| stream.read += arrival.len as u64);
        wire.delivered += 1;
        wire.arrived.push_back((arrival.key, arrival.len as u64));
        match (&arrival.dest, &message.content) {
            (Dest::Memory { parts, .. }, Content::Bytes(bytes)) => {
                let mut rest = &bytes[..];
                for part in parts {
                    let (head, tail) = rest.split_at(part.len as usize);
                    // SAFETY: memory of the harness, which outlives the simulation.
                    unsafe { std::ptr::copy_nonoverlapping(head.as_ptr(), part.addr as *mut u8, head.len()) };
                    rest = tail;
                }
            }
            (Dest::Memory { parts, .. }, Content::Ranges(ranges)) => self.positions.lock().place(ranges, parts),
            (Dest::Discard, _) => {}
        }
        true
    }

    /// A side closes its end of a channel: it reads and writes nothing for it any more, and the peer finds out when it next sends.
    fn close(&mut self, channel: usize, side: usize) {
        let [out, incoming] = [side, 1 - side];
        let wires = &mut self.wires[self.ends[channel][side].wire];
        wires[out].posted.clear();
        wires[out].moved = 0;
        wires[out].sent.clear();
        wires[incoming].expected.clear();
        wires[incoming].arrived.clear();
        wires[incoming].failed = true;
    }

    /// Chunks that restored channels have brought.
    #[cfg(test)]
    pub(super) fn restored_chunks(&self) -> u64 {
        self.wires[self.ends.len()..].iter().flatten().map(|wire| wire.delivered).sum()
    }

    /// Marks all paths as open again.
    pub(super) fn open(&mut self) {
        self.closed = [false; 2];
        self.wires.iter_mut().flatten().for_each(|wire| wire.failed = false);
    }
}

/// Asserts that the parts of a chunk lie in regions that the chunk holds.
fn assert_held(parts: &[Part], hold: &Hold) {
    for part in parts {
        let span = hold.span_to_register(part.region).expect("a part of a region that its chunk does not hold");
        assert!(part.addr >= span.addr && part.addr + part.len <= span.addr + span.len, "a part outside its region");
    }
}

/// Names of NICs.
const NICS: [&str; 8] = ["net0", "net1", "net2", "net3", "net4", "net5", "net6", "net7"];

/// One side's end of some of the channels.
pub(super) struct SimulatedPath {
    net: Arc<Mutex<Net>>,
    side: usize,
    first: usize,
    channels: usize,
    device: bool,
    chunk_bytes: usize,
    /// What is known of the NICs in a cluster, and by channel the speed, and the busy time at the last look and now.
    nics: Vec<Nic>,
    rates: Vec<Rate>,
    busy: Vec<[Duration; 2]>,
    /// The NIC that goes first among equals.
    first_nic: usize,
}

/// One side's end of a channel.
#[derive(Default)]
struct End {
    /// Why it closes.
    failed: Option<Error>,
    closed: bool,
    /// It is restored, and the peer's is not yet.
    waits: bool,
    wire: usize,
}

impl End {
    fn sends(&self) -> bool {
        self.failed.is_none() && !self.waits
    }
}

impl SimulatedPath {
    /// Channels `first..first + channels`: for device memory on both sides, or for everything else.
    pub(super) fn new(
        net: &Arc<Mutex<Net>>,
        side: usize,
        first: usize,
        channels: usize,
        device: bool,
        chunk_bytes: usize,
    ) -> SimulatedPath {
        let state = net.lock();
        let compared = if state.wires.iter().any(|wires| wires[side].stream.is_some()) { state.nics } else { 0 };
        drop(state);
        SimulatedPath {
            net: net.clone(),
            side,
            first,
            channels,
            device,
            chunk_bytes,
            nics: (0..compared).map(|_| Nic::default()).collect(),
            rates: (0..channels).map(|_| Rate::default()).collect(),
            busy: vec![Default::default(); channels],
            first_nic: 0,
        }
    }

    pub(super) fn beginning_with(mut self, first_nic: usize) -> SimulatedPath {
        self.first_nic = first_nic;
        self
    }

    /// Whether there are several NICs to compare.
    fn compares(&self) -> bool {
        self.nics.len() > 1
    }

    /// Samples the progress of each NIC, when due: as the path over a plugin's comms does.
    fn look(&mut self, now: Instant) {
        let net = self.net.lock();
        for (number, nic) in self.nics.iter_mut().enumerate().filter(|(_, nic)| nic.due(now)) {
            let (mut flow, mut busy) = (Flow { tick: Some(Duration::ZERO), ..Flow::default() }, Duration::ZERO);
            for channel in (0..self.channels).filter(|channel| (self.first + channel) % net.nics == number) {
                let end = &net.ends[self.first + channel][self.side];
                let Some(more) = net.wires[end.wire][self.side].flow(net.ns(now)).filter(|_| end.sends()) else { continue };
                flow = flow.and(more);
                let [before, _] = std::mem::replace(&mut self.busy[channel], [more.busy; 2]);
                busy = busy.max(more.busy.saturating_sub(before));
            }
            nic.look(flow, busy, now);
        }
    }
}

impl Path for SimulatedPath {
    fn channels(&self) -> usize {
        self.channels
    }

    fn stats(&self, _kernel: bool, _now: Instant, out: &mut Vec<ChannelStats>) {
        let nics = self.net.lock().nics;
        let nic = |channel: usize| NICS[channel % nics].to_owned();
        out.extend(
            (self.first..self.first + self.channels).map(|channel| ChannelStats { nic: nic(channel), ..ChannelStats::default() }),
        );
    }

    fn limits(&self, total: u64) -> ChunkLimits {
        // The limits differ by route.
        let bytes = chunk_len(total, self.channels, self.chunk_bytes);
        ChunkLimits { bytes, pieces: if self.device { 64 } else { MAX_PARTS }, crossed: MAX_CROSSED }
    }

    fn carries(&self, local: Place, peer: Place) -> Carries {
        let net = self.net.lock();
        let open = net.ends[self.first..self.first + self.channels].iter().any(|ends| ends[self.side].sends());
        Carries::of(!self.device || (local.is_device() && peer.is_device()), open)
    }

    fn loads(&mut self, _place: Place, bulk: bool, now: Instant, out: &mut Loads) {
        let compares = self.compares();
        if compares {
            self.look(now);
        }
        out.first = self.first_nic;
        let net = self.net.lock();
        // NICs without an open channel are left out.
        let mut seen = [None; NICS.len()];
        for number in 0..self.channels {
            let (channel, end) = (self.first + number, &net.ends[self.first + number][self.side]);
            if !end.sends() {
                continue;
            }
            let nic = *seen[channel % net.nics].get_or_insert_with(|| {
                out.nics.extend(self.nics.get(channel % net.nics).filter(|_| compares).map(|nic| nic.load(now)));
                out.nics.len().saturating_sub(1)
            });
            let wire = &net.wires[end.wire][self.side];
            let taken = wire.posted.len() + wire.sent.len();
            let free = WINDOW.saturating_sub(taken);
            let (large, bytes) = wire.posted.iter().filter(|p| p.bulk).fold((0, 0), |(n, bytes), p| (n + 1, bytes + p.len()));
            let free = match bulk {
                true if bytes >= BULK_BYTES => 0,
                true => free.min((WINDOW / 2).saturating_sub(large)),
                false => free,
            };
            let load = match wire.stream {
                None => Load { free, queued: taken as u64, rate: 0.0, nic },
                Some(_) => {
                    let oldest = wire.posted.front().map_or(0, Posted::len);
                    Load { free, queued: wire.queued(), rate: self.rates[number].get(oldest, now), nic }
                }
            };
            out.numbers.push(number);
            out.channels.push(load);
        }
    }

    fn submit(&mut self, channel: usize, departure: Departure, _copier: &mut Copier, now: Instant) -> Result<()> {
        let mut net = self.net.lock();
        net.allocate(self.side)?;
        assert!(net.ends[self.first + channel][self.side].sends(), "a chunk for a channel that has failed, or is not open yet");
        let wire = net.wire(self.first + channel, self.side);
        assert!(wire.posted.len() + wire.sent.len() < WINDOW, "more requests than the window has slots");
        let Departure { key, chunk, hold, bulk, tag } = departure;
        assert_held(&chunk.parts, &hold);
        wire.posted.push_back(Posted { key, tag, bulk, parts: chunk.parts, _hold: hold });
        self.rates[channel].posted(now);
        let nic = (self.first + channel) % net.nics;
        self.nics.get_mut(nic).into_iter().for_each(|nic| nic.gave(chunk.len as u64, now));
        Ok(())
    }

    fn expect(&mut self, channel: usize, arrival: Arrival) -> Result<()> {
        let mut net = self.net.lock();
        net.allocate(self.side)?;
        if let Dest::Memory { parts, hold, place } = &arrival.dest {
            if self.device && !place.is_device() {
                bail!(Protocol, "channel {channel} does not carry memory of {place:?}");
            }
            assert_held(parts, hold);
        }
        let end = &net.ends[self.first + channel][self.side];
        if end.failed.is_none() {
            let wire = end.wire;
            net.wires[wire][1 - self.side].expected.push_back(arrival);
        }
        Ok(())
    }

    fn progress(&mut self, _copier: &mut Copier, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let mut net = self.net.lock();
        net.allocate(self.side)?;
        let before = events.len();
        for number in 0..self.channels {
            let Net { wires, ends, .. } = &mut *net;
            let end = &mut ends[self.first + number][self.side];
            if let Some(why) = end.failed.clone().filter(|_| !end.closed) {
                end.closed = true;
                net.close(self.first + number, self.side);
                events.push(Event::Closed(number as u16, why));
                continue;
            }
            if end.closed {
                continue;
            }
            let [a, b] = &mut wires[end.wire];
            let (out, incoming) = if self.side == 0 { (a, b) } else { (b, a) };
            while let Some((key, len)) = out.sent.pop_front() {
                self.rates[number].done(len, now, !out.sent.is_empty() || !out.posted.is_empty());
                events.push(Event::Sent(number as u16, key, len));
            }
            events.extend(incoming.arrived.drain(..).map(|(key, len)| Event::Received(number as u16, key, len)));
            if incoming.misfit {
                bail!(Protocol, "simulated: a message does not fit its receive");
            }
            let waits = !incoming.expected.is_empty() || !out.posted.is_empty();
            if waits && (out.failed || incoming.failed) {
                end.failed = Some(err!(RemoteDisconnect, "simulated: channel {number} has failed"));
            }
        }
        Ok(events.len() > before)
    }

    fn change(&mut self, channel: usize, change: Change) -> Result<()> {
        let mut net = self.net.lock();
        let nics = net.nics;
        let end = &mut net.ends[self.first + channel][self.side];
        let closes = matches!(change, Change::Close(_));
        match change {
            Change::Close(why) => {
                end.failed.get_or_insert(why);
            }
            Change::Restore(_) => bail!(Internal, "simulated: comms of a plugin"),
            // The harness has restored it: see `Net::restore`.
            Change::Open => end.waits = false,
        }
        // As the path over a plugin's comms does.
        match self.nics.get_mut((self.first + channel) % nics) {
            Some(nic) if closes => *nic = Nic::default(),
            Some(nic) => nic.restart(),
            None => {}
        }
        Ok(())
    }

    fn busy(&self) -> bool {
        let net = self.net.lock();
        (self.first..self.first + self.channels).any(|channel| {
            let end = &net.ends[channel][self.side];
            let (out, incoming) = (&net.wires[end.wire][self.side], &net.wires[end.wire][1 - self.side]);
            if end.closed || end.failed.is_some() {
                return !end.closed;
            }
            !out.posted.is_empty() || !out.sent.is_empty() || !incoming.expected.is_empty() || !incoming.arrived.is_empty()
        })
    }

    fn network(&mut self, each: &mut dyn FnMut(Line<'_>)) -> Result<()> {
        let net = &mut *self.net.lock();
        for number in 0..self.channels {
            let channel = self.first + number;
            let end = &mut net.ends[channel][self.side];
            let (out, incoming) = (&net.wires[end.wire][self.side], &net.wires[end.wire][1 - self.side]);
            if out.failed || incoming.failed {
                end.failed.get_or_insert_with(|| err!(RemoteDisconnect, "simulated: channel {number} has failed"));
            }
            let (nic, moved) = (NICS[channel % net.nics], net.reports_moved.then_some((out.taken, incoming.brought())));
            if end.failed.is_some() {
                // Nothing is due there any more.
                let outbound = Outbound { acknowledged: out.outbound().acknowledged, ..Outbound::default() };
                each(Line { local: None, nic, moved, arrived: 0, outbound, under_way: (0, 0), posted: 0, open: false });
                continue;
            }
            each(Line {
                local: None,
                nic,
                moved,
                arrived: incoming.brought(),
                outbound: out.outbound(),
                under_way: (out.posted.len() + out.sent.len(), incoming.expected.len()),
                posted: incoming.expected.len().min(WINDOW),
                open: end.sends(),
            });
        }
        Ok(())
    }

    fn relieve(&mut self, now: Instant) -> bool {
        if !self.compares() {
            return false;
        }
        self.look(now);
        let net = &mut *self.net.lock();
        let (first, side, nics) = (self.first, self.side, net.nics);
        let of = |nic: usize| (0..self.channels).filter(move |channel| (first + channel) % nics == nic);
        let open = |nic: usize| of(nic).any(|channel| net.ends[first + channel][side].sends());
        if let Some((nic, _)) = stripe::stuck(&self.nics, open, now) {
            for channel in of(nic) {
                let wire = net.ends[first + channel][side].wire;
                if net.wires[wire][side].flow(net.ns(now)).is_some_and(|flow| flow.backlog > 0) {
                    let why = err!(RemoteDisconnect, "{} has become slow", NICS[nic]);
                    net.ends[first + channel][side].failed.get_or_insert(why);
                }
            }
            self.nics[nic].emptied(now);
        }
        self.nics.iter().any(|nic| nic.backlog() > 0)
    }

    fn describe(&self, channel: usize, way: Way) -> String {
        format!("simulated channel {channel} {way:?}")
    }

    fn forget_region(&mut self, _id: u64) {}
}

impl Drop for SimulatedPath {
    fn drop(&mut self) {
        let mut net = self.net.lock();
        net.closed[self.side] = true;
        for channel in self.first..self.first + self.channels {
            net.close(channel, self.side);
        }
    }
}
