//! The simulated network: channels whose messages move when the scheduler says so, and that stall, fail or run out of memory on
//! demand. Bytes are copied at the moment at which a real network would copy them.

use super::direct::DirectNet;
use crate::channel::path::{Arrival, Change, Copier, Departure, Dest, Line, Outbound, Path};
use crate::channel::plan::{chunk_len, ChunkLimits, MAX_CROSSED, MAX_PARTS};
use crate::channel::stripe::{Load, Loads};
use crate::direct::{Event, Way};
use crate::region::Hold;
use crate::stats::ChannelStats;
use crate::status::{bail, err, Error, Result};
use crate::types::{Key, Part, Place};
use process::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// Requests in flight on a channel, each way.
const WINDOW: usize = 16;

/// A message in flight.
pub(super) struct Message {
    pub tag: i32,
    pub bytes: Vec<u8>,
}

/// A chunk that its sender has posted.
struct Posted {
    key: Key,
    tag: i32,
    bulk: bool,
    parts: Vec<Part>,
    _hold: Hold,
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
    /// Bytes of the oldest posted message that a paced network has moved.
    moved: u64,
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
    /// Channels alternate over so many NICs, 1 or 2.
    pub nics: usize,
    /// Sides that have closed their channels.
    pub closed: [bool; 2],
}

impl Net {
    pub(super) fn new(channels: usize, reports_moved: bool) -> Net {
        let wires = (0..channels).map(|_| Default::default()).collect();
        let ends = (0..channels).map(|wire| [0, 1].map(|_| End { wire, ..End::default() })).collect();
        Net { direct: DirectNet::default(), wires, ends, out_of_memory: [None; 2], reports_moved, nics: 1, closed: [false; 2] }
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

    /// New wires, for a channel that is being restored.
    pub(super) fn string(&mut self) -> usize {
        self.wires.push(Default::default());
        self.wires.len() - 1
    }

    /// A side takes such wires in place of its closed end of a channel.
    pub(super) fn restore(&mut self, channel: usize, side: usize, wire: usize) {
        let end = &mut self.ends[channel][side];
        assert!(end.closed, "an open channel is restored");
        *end = End { wire, waits: true, ..End::default() };
    }

    /// The network takes the oldest posted message of a wire and reads its source.
    /// Returns whether there was one.
    pub(super) fn transmit(&mut self, channel: usize, side: usize) -> bool {
        let wire = self.wire(channel, side);
        if wire.stalled || wire.failed {
            return false;
        }
        let Some(posted) = wire.posted.pop_front() else { return false };
        let mut bytes = Vec::new();
        for part in &posted.parts {
            // SAFETY: memory of the harness, which outlives the simulation.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(part.addr as *const u8, part.len as usize) });
        }
        wire.taken += bytes.len() as u64 - wire.moved;
        wire.sent.push_back((posted.key, bytes.len() as u64));
        wire.flying.push_back(Message { tag: posted.tag, bytes });
        true
    }

    /// A paced network moves so many bytes of a side's messages, over the wires in turn, and delivers what is complete.
    pub(super) fn flow(&mut self, side: usize, mut bytes: u64) {
        const TURN: u64 = 16 << 10;
        loop {
            let before = bytes;
            for channel in 0..self.ends.len() {
                self.deliver(channel, side);
                let wire = self.wire(channel, side);
                let moves = !wire.stalled && !wire.packing && wire.flying.is_empty();
                let Some(posted) = wire.posted.front().filter(|_| moves) else { continue };
                let len: u64 = posted.parts.iter().map(|p| p.len).sum();
                let n = (len - wire.moved).min(bytes).min(TURN);
                (wire.moved, wire.taken, wire.brought, bytes) = (wire.moved + n, wire.taken + n, wire.brought + n, bytes - n);
                if wire.moved == len {
                    self.transmit(channel, side);
                    self.deliver(channel, side);
                }
            }
            if bytes == before {
                return;
            }
        }
    }

    /// The oldest message of a wire reaches the receive that waits for it, and memory is written.
    /// Returns whether there was one.
    pub(super) fn deliver(&mut self, channel: usize, side: usize) -> bool {
        let wire = self.wire(channel, side);
        if wire.stalled || wire.failed || wire.expected.is_empty() || wire.flying.is_empty() {
            return false;
        }
        let (Some(message), Some(arrival)) = (wire.flying.pop_front(), wire.expected.pop_front()) else { return false };
        if message.tag != arrival.tag || message.bytes.len() != arrival.len {
            wire.misfit = true;
            return true;
        }
        if let Dest::Memory { parts, .. } = &arrival.dest {
            let mut rest = &message.bytes[..];
            for part in parts {
                let (head, tail) = rest.split_at(part.len as usize);
                // SAFETY: memory of the harness, which outlives the simulation.
                unsafe { std::ptr::copy_nonoverlapping(head.as_ptr(), part.addr as *mut u8, head.len()) };
                rest = tail;
            }
        }
        wire.brought += arrival.len as u64 - std::mem::take(&mut wire.moved);
        wire.delivered += 1;
        wire.arrived.push_back((arrival.key, arrival.len as u64));
        true
    }

    /// A side closes its end of a channel: it reads and writes nothing for it any more, and the peer finds out when it next sends.
    fn close(&mut self, channel: usize, side: usize) {
        let [out, incoming] = [side, 1 - side];
        let wires = &mut self.wires[self.ends[channel][side].wire];
        wires[out].posted.clear();
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

/// One side's end of some of the channels.
pub(super) struct SimulatedPath {
    net: Arc<Mutex<Net>>,
    side: usize,
    first: usize,
    channels: usize,
    device: bool,
    chunk_bytes: usize,
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
        SimulatedPath { net: net.clone(), side, first, channels, device, chunk_bytes }
    }
}

impl Path for SimulatedPath {
    fn channels(&self) -> usize {
        self.channels
    }

    fn stats(&self, _kernel: bool, _now: Instant, out: &mut Vec<ChannelStats>) {
        let nics = self.net.lock().nics;
        let nic = |channel: usize| ["net0", "net1"][channel % nics].to_owned();
        out.extend(
            (self.first..self.first + self.channels).map(|channel| ChannelStats { nic: nic(channel), ..ChannelStats::default() }),
        );
    }

    fn limits(&self, total: u64) -> ChunkLimits {
        // The limits differ by route.
        let bytes = chunk_len(total, self.channels, self.chunk_bytes);
        ChunkLimits { bytes, pieces: if self.device { 64 } else { MAX_PARTS }, crossed: MAX_CROSSED }
    }

    fn carries(&self, local: Place, peer: Place) -> bool {
        let net = self.net.lock();
        let open = net.ends[self.first..self.first + self.channels].iter().any(|ends| ends[self.side].sends());
        open && (!self.device || (local.is_device() && peer.is_device()))
    }

    fn loads(&mut self, _place: Place, bulk: bool, _now: Instant, out: &mut Loads) {
        let net = self.net.lock();
        for channel in self.first..self.first + self.channels {
            let end = &net.ends[channel][self.side];
            if !end.sends() {
                continue;
            }
            out.numbers.push(channel - self.first);
            let wire = &net.wires[end.wire][self.side];
            let taken = wire.posted.len() + wire.sent.len();
            let free = WINDOW.saturating_sub(taken);
            let large = wire.posted.iter().filter(|p| p.bulk).count();
            let free = if bulk { free.min((WINDOW / 2).saturating_sub(large)) } else { free };
            out.channels.push(Load { free, queued: taken as u64, rate: 0.0, nic: 0 });
        }
    }

    fn submit(&mut self, channel: usize, departure: Departure, _copier: &mut Copier, _now: Instant) -> Result<()> {
        let mut net = self.net.lock();
        net.allocate(self.side)?;
        assert!(net.ends[self.first + channel][self.side].sends(), "a chunk for a channel that has failed, or is not open yet");
        let wire = net.wire(self.first + channel, self.side);
        assert!(wire.posted.len() + wire.sent.len() < WINDOW, "more requests than the window has slots");
        let Departure { key, chunk, hold, bulk, tag } = departure;
        assert_held(&chunk.parts, &hold);
        wire.posted.push_back(Posted { key, tag, bulk, parts: chunk.parts, _hold: hold });
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

    fn progress(&mut self, _copier: &mut Copier, _now: Instant, events: &mut Vec<Event>) -> Result<bool> {
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
            events.extend(out.sent.drain(..).map(|(key, len)| Event::Sent(number as u16, key, len)));
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
        let end = &mut self.net.lock().ends[self.first + channel][self.side];
        match change {
            Change::Close(why) => {
                end.failed.get_or_insert(why);
            }
            Change::Restore(_) => bail!(Internal, "simulated: comms of a plugin"),
            // The harness has restored it: see `Net::restore`.
            Change::Open => end.waits = false,
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
            each(Line {
                nic: ["net0", "net1"][channel % net.nics],
                moved: net.reports_moved.then_some((out.taken, incoming.brought)),
                outbound: Outbound {
                    acknowledged: out.taken,
                    waiting: out.posted.len() as u64,
                    due: !out.posted.is_empty() && !out.packing,
                    too_large: None,
                    control_silent: None,
                },
                under_way: (out.posted.len() + out.sent.len(), incoming.expected.len()),
                posted: incoming.expected.len().min(WINDOW),
                open: end.sends(),
            });
        }
        Ok(())
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
